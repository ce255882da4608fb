//! Runs that count, across hosts that share their locks through etcd.

use std::fs;
use std::time::{Duration, Instant};

use crate::cluster::{host, hosts, name, restart};
use crate::etcd_harness::Etcd;
use crate::harness::*;

const FINISHED: i32 = 79;

/// The folder of the first daemon has the list of runs, of all hosts.
struct Runs(std::path::PathBuf);

impl Runs {
    fn of(daemon: &Daemon) -> Runs {
        Runs(daemon.folder().join("runs"))
    }

    /// A command that adds a line to the list.
    fn command(&self, daemon: &Daemon, options: &[&str], key: &str, then: &str) -> std::process::Command {
        let script = format!("echo {key} >> {}; {then}", self.0.display());
        let mut command = daemon.run(options);
        command.args([key, "sh", "-c", &script]).env("USER", "alice");
        command
    }

    fn count(&self, key: &str) -> usize {
        fs::read_to_string(&self.0).unwrap_or_default().lines().filter(|line| *line == key).count()
    }
}

#[test]
#[ignore = "needs etcd"]
fn a_run_counts_for_all_hosts_until_it_is_forgotten_on_one() {
    let etcd = Etcd::single();
    let [a, mut b, c] = hosts(&etcd);
    let runs = Runs::of(&a);
    let fresh = |daemon: &Daemon, options: &[&str]| {
        finish(&mut runs.command(daemon, &[&["--fresh", "1h"], options].concat(), "k", "true"))
    };
    fresh(&a, &[]).assert_silent(0);
    // The watch of another host may be a moment late, so it asks etcd as well as its watch.
    for options in [&[][..], &["--queue"], &["--nonblock"], &["--finished-exit-code", "79"]] {
        fresh(&b, options).assert_silent(FINISHED);
        fresh(&c, options).assert_silent(FINISHED);
    }
    let told = fresh(&b, &["--verbose"]);
    assert!(told.stderr.contains("s ago by alice@"), "{}", told.stderr);
    b.kill();
    restart(&mut b, &etcd);
    b.wait_for_log("clustering locks under lease");
    // A daemon that has just begun, and one that never saw it.
    let late = host(&etcd);
    for daemon in [&b, &late] {
        let status = finish(&mut daemon.kmutex(&["status", "k"]));
        assert!(status.stdout.contains("last success: done"), "{}", status.stdout);
        fresh(daemon, &[]).assert_silent(FINISHED);
    }
    assert_eq!(runs.count("k"), 1);
    // A failure does not undo it.
    finish(&mut runs.command(&c, &["--fresh-failure", "1h"], "k", "exit 3")).assert_silent(3);
    fresh(&late, &[]).assert_silent(FINISHED);
    let failure = ["--fresh-failure", "1h", "--on-peer-failure", "adopt"];
    finish(&mut runs.command(&a, &failure, "k", "true")).assert_silent(3);
    assert_eq!(runs.count("k"), 2);
    finish(&mut late.kmutex(&["forget", "k"])).assert_silent(0);
    fresh(&late, &[]).assert_silent(0);
    assert_eq!(runs.count("k"), 3);
    assert_eq!(crate::cluster::standing(&etcd, "k"), 0, "nothing stands in line");
}

#[test]
#[ignore = "needs etcd"]
fn what_one_host_forgets_all_hosts_have_forgotten() {
    let etcd = Etcd::single();
    let daemons: [Daemon; 3] = crate::cluster::steady_hosts(&etcd);
    let runs = Runs::of(&daemons[0]);
    let last_success = |daemon: &Daemon| {
        let status = finish(&mut daemon.kmutex(&["status", "k"]));
        assert_eq!(status.code, 0, "{}", status.stderr);
        status.stdout.contains("last success: done")
    };
    for (round, forgets) in daemons.iter().enumerate() {
        let runner = &daemons[(round + 1) % 3];
        finish(&mut runs.command(runner, &["--fresh", "1h"], "k", "true")).assert_silent(0);
        for daemon in &daemons {
            wait_until("every host tells of the run", || last_success(daemon));
        }
        finish(&mut forgets.kmutex(&["forget", "k"])).assert_silent(0);
        for daemon in &daemons {
            wait_until("no host tells of the run", || !last_success(daemon));
        }
    }
    assert_eq!(runs.count("k"), 3);
}

#[test]
#[ignore = "needs etcd"]
fn queued_starts_of_all_hosts_are_content_with_the_run_they_waited_for() {
    let etcd = Etcd::single();
    let [a, b, c] = hosts(&etcd);
    let holder = a.hold_with(&["--fresh", "1h"], "k");
    let queued = |daemon: &Daemon| {
        let process = Process::spawn(&mut daemon.run(&["--fresh", "1h", "--queue", "k", "false"]));
        daemon.wait_for_counts("k", 1, 1);
        process
    };
    let mut waiters = [queued(&b), queued(&c)];
    assert_eq!(holder.finish(0), 0);
    assert_eq!(waiters.each_mut().map(|waiter| waiter.wait()), [FINISHED, FINISHED]);
}

#[test]
#[ignore = "needs etcd"]
fn the_age_of_a_run_is_what_its_lease_says_and_no_clock_of_another_host() {
    let etcd = Etcd::single();
    let put = |key: &str, granted: u64, age_secs: u64| {
        let lease = etcd.ctl(&["lease", "grant", &granted.to_string()]);
        let lease = lease.split_whitespace().nth(1).unwrap();
        let record = format!(
            r#"{{"token":1,"outcome":{{"exit":0}},"age_ms":{},"counts_for_ms":3600000,"by":"alice@elsewhere"}}"#,
            age_secs * 1000
        );
        etcd.ctl(&["put", &format!("--lease={lease}"), &format!("{}.success", name(key)), &record]);
    };
    put("k", 600, 3000);
    let daemon = host(&etcd);
    let status = finish(&mut daemon.kmutex(&["status", "k"]));
    assert!(status.stdout.contains("done 50m0"), "{}", status.stdout);
    finish(&mut daemon.run(&["--fresh", "3500", "k", "false"])).assert_silent(FINISHED);
    finish(&mut daemon.run(&["--fresh", "3000", "k", "true"])).assert_silent(0);
    // What was put by hand, and is no record, harms neither.
    for (key, value) in [("bad", "{}"), ("worse", ""), ("odd", r#"{"token":1,"outcome":"x"}"#)] {
        etcd.ctl(&["put", &format!("{}.success", name(key)), value]);
        finish(&mut daemon.run(&["--fresh", "1h", key, "true"])).assert_silent(0);
        finish(&mut daemon.run(&["--fresh", "1h", key, "true"])).assert_silent(FINISHED);
    }
}

#[test]
#[ignore = "needs etcd"]
fn a_release_that_the_daemon_did_not_survive_is_made_up_for_with_its_run() {
    let etcd = Etcd::single();
    let [mut a, b] = hosts(&etcd);
    let runs = Runs::of(&a);
    let mut holder = Process::spawn(&mut runs.command(
        &a,
        &["--fresh", "1h"],
        "k",
        "until test -e go; do sleep 0.01; done",
    ));
    a.wait_for_counts("k", 1, 0);
    let mut waiter = Process::spawn(&mut runs.command(&b, &["--fresh", "1h"], "k", "true"));
    b.wait_for_counts("k", 1, 1);
    // The daemon writes to its journal that the run is over, and cannot tell etcd before it is killed.
    let mut etcd = etcd;
    etcd.stop(0);
    fs::write(a.folder().join("go"), "").unwrap();
    assert_eq!(holder.wait(), 0);
    a.kill();
    etcd.cont(0);
    restart(&mut a, &etcd);
    assert_eq!(waiter.wait(), FINISHED);
    assert_eq!(runs.count("k"), 1);
}

/// A sequence that looks random and is the same each time.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

#[test]
#[ignore = "needs etcd"]
fn the_batches_of_all_hosts_are_one_run_and_the_newest_makes_it() {
    let etcd = Etcd::single();
    let [a, b, c] = crate::cluster::steady_hosts(&etcd);
    let runs = Runs::of(&a);
    let coalesce =
        |daemon: &Daemon, then: &str| Process::spawn(&mut runs.command(daemon, &["--coalesce"], "k", then));
    let mut first = coalesce(&a, "until test -e go; do sleep 0.01; done");
    a.wait_for_counts("k", 1, 0);
    let wait_for_places = |count| wait_until("places", || crate::cluster::standing(&etcd, "k") == count);
    let mut older = coalesce(&b, "exit 3");
    wait_for_places(2);
    let mut newer = coalesce(&c, "exit 5");
    wait_for_places(3);
    // Their daemons know of all places.
    b.wait_for_log("wait: ");
    c.wait_for_log("wait: ");
    fs::write(a.folder().join("go"), "").unwrap();
    assert_eq!((first.wait(), older.wait(), newer.wait()), (0, FINISHED, 5));
    assert_eq!(runs.count("k"), 2);
    wait_for_places(0);
}

/// One night: each host starts the job ten times, in the order and at the times that chance says; daemons are killed between.
fn night(number: u64, daemons: &mut [Daemon; 3], options: &[&str], runs: &Runs) {
    let mut chance = Chance(number);
    let key = format!("night-{number}");
    let mut starts: Vec<(u64, usize)> = (0..30).map(|index| (chance.below(2_000), index % 3)).collect();
    starts.sort_unstable();
    let (began, mut jobs) = (Instant::now(), Vec::new());
    for (at, host) in starts {
        // Cron's clock, and not a wait for anything.
        std::thread::sleep(Duration::from_millis(at).saturating_sub(began.elapsed()));
        let fresh = ["--fresh", "12h", "--finished-exit-code", "0"];
        jobs.push(Process::spawn(&mut runs.command(&daemons[host], &fresh, &key, "sleep 0.05")));
        if chance.below(10) == 0 {
            let victim = chance.below(3) as usize;
            daemons[victim].kill();
            daemons[victim].restart(options);
        }
    }
    for mut job in jobs {
        // A start that finds no daemon, because it was killed just then, fails and runs nothing.
        let code = job.wait();
        assert!(matches!(code, 0 | 69), "night {number}: exit status {code}");
    }
    assert_eq!(
        runs.count(&key),
        1,
        "night {number}: {}",
        daemons.each_ref().map(Daemon::log).join("\n---\n")
    );
}

/// KMUTEX_NIGHTS says how many.
#[test]
#[ignore = "needs etcd, and two seconds for each night"]
fn of_all_starts_of_a_night_on_all_hosts_exactly_one_runs() {
    let etcd = Etcd::single();
    let nights = std::env::var("KMUTEX_NIGHTS").map_or(3, |nights| nights.parse().expect("a number"));
    // A lease of two seconds is lost on a busy machine, and a job that has lost its lock runs again.
    let options = crate::cluster::steady_options(&etcd);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut daemons = std::array::from_fn(|_| Daemon::with(&options));
    for daemon in &daemons {
        daemon.wait_for_log("clustering locks under lease");
    }
    let runs = Runs::of(&daemons[0]);
    (1..=nights).for_each(|number| night(number, &mut daemons, &options, &runs));
}
