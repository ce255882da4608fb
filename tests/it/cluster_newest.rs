//! The newest request of several hosts that share their locks through etcd: `--newest` and `--replace`.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use kmutex::proto::Protocol;
use nix::sys::signal::Signal;

use crate::cluster::{name, restart_steady, standing, steady_hosts};
use crate::etcd_harness::Etcd;
use crate::harness::*;
use crate::other_user::OtherUser;

const FINISHED: i32 = 79;

/// A request whose command adds a line to a list when it runs.
fn request(daemon: &Daemon, list: &Daemon, options: &[&str], line: &str) -> Process {
    let script = format!("echo {line} >> {}", list.folder().join("runs").display());
    let mut command = daemon.run(options);
    command.args(["--status-file", line, "k", "sh", "-c", &script]);
    Process::spawn(&mut command)
}

/// The same, and it waits by now.
fn waits(daemon: &Daemon, list: &Daemon, options: &[&str], line: &str) -> Process {
    let waiting = daemon.log().matches("wait: ").count();
    let process = request(daemon, list, options, line);
    daemon.wait_for_logs("wait: ", waiting + 1);
    process
}

fn runs(list: &Daemon) -> Vec<String> {
    let runs = fs::read_to_string(list.folder().join("runs")).unwrap_or_default();
    runs.lines().map(String::from).collect()
}

fn assert_superseded(daemon: &Daemon, process: &mut Process, line: &str) {
    assert_eq!(process.wait(), FINISHED, "{line}");
    let report = fs::read_to_string(daemon.folder().join(line)).unwrap();
    assert!(report.contains(r#""verdict":"superseded""#), "{report}");
}

const NEWEST: [&str; 2] = ["--queue", "--newest"];

#[test]
#[ignore = "needs etcd"]
fn of_all_hosts_the_newest_request_runs_and_the_others_are_superseded() {
    let etcd = Etcd::single();
    let hosts: [Daemon; 3] = steady_hosts(&etcd);
    let holder = hosts[0].hold("k");
    let mut plain = waits(&hosts[1], &hosts[0], &["--queue"], "plain");
    let mut last: Option<(&Daemon, Process, String)> = None;
    // The host of the holder has its turn, too, and so has one whose place is older than the others'.
    for (count, host) in [1, 2, 0, 2, 2, 1].into_iter().enumerate() {
        let line = format!("newest-{count}");
        let next = waits(&hosts[host], &hosts[0], &NEWEST, &line);
        if let Some((daemon, mut older, line)) = last.replace((&hosts[host], next, line)) {
            assert_superseded(daemon, &mut older, &line);
        }
    }
    assert!(plain.is_running());
    assert_eq!(holder.finish(0), 0);
    assert_eq!((plain.wait(), last.unwrap().1.wait()), (0, 0));
    assert_eq!(runs(&hosts[0]), ["plain", "newest-5"]);
    wait_until("nothing stands in line", || standing(&etcd, "k") == 0);
    // A free lock is had at once.
    assert_eq!(request(&hosts[2], &hosts[0], &NEWEST, "free").wait(), 0);
}

#[test]
#[ignore = "needs etcd"]
fn of_many_requests_at_the_same_time_one_is_left() {
    let etcd = Etcd::single();
    let hosts: [Daemon; 3] = steady_hosts(&etcd);
    for round in 1..=3 {
        let holder = hosts[round % 3].hold("k");
        let mut requests: Vec<Process> =
            (0..24).map(|count| request(&hosts[count % 3], &hosts[0], &NEWEST, "one")).collect();
        let mut running = requests.iter_mut().collect::<Vec<_>>();
        wait_until("one to be left", || {
            running.retain_mut(|request| request.is_running());
            running.len() <= 1
        });
        assert_eq!(holder.finish(0), 0);
        let mut codes: Vec<i32> = requests.iter_mut().map(Process::wait).collect();
        codes.sort_unstable();
        assert_eq!(codes, [&[0][..], &[FINISHED; 23]].concat(), "round {round}");
        assert_eq!(runs(&hosts[0]).len(), round);
        wait_until("nothing stands in line", || standing(&etcd, "k") == 0);
    }
}

#[test]
#[ignore = "needs etcd"]
fn a_request_that_kept_its_place_over_a_restart_gives_way_to_a_newer_one_and_to_no_older_one() {
    let etcd = Etcd::single();
    let [a, mut b, c]: [Daemon; 3] = steady_hosts(&etcd);
    let holder = a.hold("k");
    let mut older = waits(&c, &a, &NEWEST, "older");
    let mut kept = waits(&b, &a, &NEWEST, "kept");
    assert_superseded(&c, &mut older, "older");
    restart_steady(&mut b, &etcd);
    b.wait_for_log("wait: ");
    // Its host has recorded it before, and does not do so again.
    let record = etcd.ctl(&["get", &format!("{}.newest", name("k"))]);
    b.kill();
    let mut newer = waits(&c, &a, &NEWEST, "newer");
    assert!(kept.is_running());
    restart_steady(&mut b, &etcd);
    assert_superseded(&b, &mut kept, "kept");
    assert!(newer.is_running());
    assert_ne!(record, etcd.ctl(&["get", &format!("{}.newest", name("k"))]));
    assert_eq!(holder.finish(0), 0);
    assert_eq!((newer.wait(), runs(&a)), (0, vec![String::from("newer")]));
}

#[test]
#[ignore = "needs etcd"]
fn a_request_that_waits_survives_the_restart_of_its_daemon() {
    let etcd = Etcd::single();
    let [a, mut b]: [Daemon; 2] = steady_hosts(&etcd);
    let holder = a.hold("k");
    let mut kept = waits(&b, &a, &NEWEST, "kept");
    restart_steady(&mut b, &etcd);
    b.wait_for_log("wait: ");
    assert_eq!(holder.finish(0), 0);
    assert_eq!((kept.wait(), runs(&a)), (0, vec![String::from("kept")]));
}

#[test]
#[ignore = "needs etcd"]
fn a_record_that_says_anything_supersedes_no_request_and_a_deleted_one_comes_back() {
    let etcd = Etcd::single();
    let [a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let record = format!("{}.newest", name("k"));
    let holder = a.hold("k");
    let mut waiting = waits(&b, &a, &NEWEST, "waiting");
    for (count, value) in [
        "",
        "text",
        "[]",
        "{}",
        r#"{"by":"x","place":-1,"after":0}"#,
        r#"{"by":"x","place":18446744073709551615,"after":-9223372036854775808,"rank":-5}"#,
        r#"{"by":"x","place":1e300,"after":9}"#,
    ]
    .into_iter()
    .enumerate()
    {
        etcd.ctl(&["put", &record, value]);
        // A later event of the same watch shows that the daemons have seen it.
        let by_hand = format!("{}/by-hand-{count}", name("k"));
        etcd.ctl(&["put", &by_hand, ""]);
        for daemon in [&a, &b] {
            finish(&mut daemon.run(&["-n", "k", "true"])).assert_silent(75);
        }
        etcd.ctl(&["del", &by_hand]);
        assert!(waiting.is_running(), "{value}");
    }
    etcd.ctl(&["del", &record]);
    wait_until("it is recorded again", || etcd.ctl(&["get", &record]).contains("rank"));
    let mut newer = waits(&a, &a, &NEWEST, "newer");
    assert_superseded(&b, &mut waiting, "waiting");
    assert_eq!(holder.finish(0), 0);
    assert_eq!((newer.wait(), runs(&a)), (0, vec![String::from("newer")]));
}

#[test]
#[ignore = "needs etcd"]
fn a_request_survives_the_restart_of_its_daemon_without_its_journal() {
    let etcd = Etcd::single();
    let [a, mut b]: [Daemon; 2] = steady_hosts(&etcd);
    let holder = a.hold("k");
    let mut kept = waits(&b, &a, &NEWEST, "kept");
    b.kill();
    fs::remove_file(b.folder().join("sock.journal")).unwrap();
    restart_steady(&mut b, &etcd);
    // The daemon has another lease, and the record of the request is of the first one, which lives on for a while.
    b.wait_for_log("wait: ");
    assert_eq!(holder.finish(0), 0);
    assert_eq!((kept.wait(), runs(&a)), (0, vec![String::from("kept")]));
}

/// A command that runs until it is stopped, and takes its time for that. What it starts then is not stopped with it.
const SLOW: &str =
    "trap 'trap \"\" TERM; sleep 0.3; rm -f alive; exit 1' TERM; touch alive; while :; do sleep 0.05; done";

fn slow(daemon: &Daemon, options: &[&str]) -> Process {
    let mut run = daemon.run(options);
    run.args(["--status-file", "old", "k", "sh", "-c", SLOW]).stderr(Stdio::piped());
    let process = Process::spawn(&mut run);
    wait_until("the old command runs", || daemon.folder().join("alive").exists());
    process
}

fn is_dead(daemon: &Daemon) -> String {
    format!("test ! -e {}", daemon.folder().join("alive").display())
}

#[test]
#[ignore = "needs etcd"]
fn a_holder_on_another_host_has_ended_before_the_request_runs_that_replaces_it() {
    let etcd = Etcd::single();
    let [a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let mut old = slow(&a, &[]);
    finish(&mut b.run(&["--replace", "k", "sh", "-c", &is_dead(&a)])).assert_silent(0);
    assert_eq!(old.wait(), 1);
    assert!(old.stderr().contains("--replace"));
    let report = fs::read_to_string(a.folder().join("old")).unwrap();
    assert!(report.contains(r#""verdict":"replaced""#), "{report}");
    wait_until("nothing stands in line", || standing(&etcd, "k") == 0);
}

#[test]
#[ignore = "needs etcd"]
fn a_holder_on_another_host_gets_its_time_and_may_refuse() {
    let etcd = Etcd::single();
    let [a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let mut old = slow(&a, &[]);
    let began = Instant::now();
    finish(&mut b.run(&["--replace-after", "0.7", "k", "sh", "-c", &is_dead(&a)])).assert_silent(0);
    assert!(began.elapsed() >= Duration::from_millis(700));
    assert_eq!(old.wait(), 1);

    let mut protected = a.hold_with(&["--no-replace"], "k");
    let mut older = waits(&b, &a, &["--replace"], "older");
    // It is recorded only after the entry of the first one, so that the holder's host has seen that.
    let mut newer = waits(&a, &a, &NEWEST, "newer");
    assert_superseded(&b, &mut older, "older");
    assert!(protected.process.is_running());
    assert_eq!(protected.finish(0), 0);
    assert_eq!(newer.wait(), 0);
}

#[test]
#[ignore = "needs etcd"]
fn a_request_that_waits_behind_another_one_of_its_host_replaces_the_holder_too() {
    let etcd = Etcd::single();
    let [a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let mut old = slow(&a, &[]);
    // The place of the host is this one's. It does not end early either when it holds.
    let mut plain = waits(&b, &a, &["--queue", "--no-replace"], "plain");
    let mut new = waits(&b, &a, &["--replace"], "new");
    assert_eq!((old.wait(), plain.wait(), new.wait()), (1, 0, 0));
    assert_eq!(runs(&a), ["plain", "new"]);
}

#[test]
#[ignore = "needs etcd"]
fn a_request_that_goes_away_stops_no_holder() {
    let etcd = Etcd::single();
    let [a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let mut holder = a.hold("k");
    let mut plain = waits(&b, &a, &["--queue"], "plain");
    let says_so = || etcd.ctl(&["get", "--prefix", &format!("{}/", name("k"))]).contains("replaces");
    let mut new = waits(&b, &a, &["--replace-after", "2h"], "new");
    wait_until("its host says that it replaces the holder", says_so);
    new.signal(Signal::SIGTERM);
    new.wait();
    wait_until("its host says so no more", || !says_so());
    assert!(holder.process.is_running() && plain.is_running());
    assert_eq!(holder.finish(0), 0);
    assert_eq!(plain.wait(), 0);
}

#[test]
#[ignore = "needs etcd"]
fn a_holder_whose_daemon_was_away_is_asked_to_stop_when_it_is_back() {
    let etcd = Etcd::single();
    let [mut a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let mut old = slow(&a, &[]);
    a.kill();
    let new_script = is_dead(&a);
    let mut new = b.run(&["--replace", "k", "sh", "-c", &new_script]);
    let mut new = Process::spawn(&mut new);
    b.wait_for_log("wait: ");
    assert!(old.is_running());
    restart_steady(&mut a, &etcd);
    assert_eq!((old.wait(), new.wait()), (1, 0));
}

#[test]
#[ignore = "needs etcd"]
fn an_entry_that_says_anything_stops_no_holder() {
    let etcd = Etcd::single();
    let [a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let mut holder = a.hold("k");
    let entries = [
        r#""replaces":"all""#,
        r#""replaces":{"uid":-1,"after_ms":0,"place":0}"#,
        r#""replaces":{"uid":4294967296,"after_ms":0,"place":0}"#,
        r#""replaces":{"uid":1,"after_ms":0,"place":0}"#,
        r#""replaces":{"uid":0,"after_ms":18446744073709551615,"place":18446744073709551615}"#,
    ];
    for (count, entry) in entries.into_iter().enumerate() {
        let key = format!("{}/by-hand-{count}", name("k"));
        let protocol = serde_json::to_string(&Protocol::V2).unwrap();
        etcd.ctl(&["put", &key, &format!(r#"{{"host":"h","protocol":{protocol},{entry}}}"#)]);
        // It is recorded only after that, so that the holder's host has seen the entry.
        let mut waiting = waits(&a, &a, &NEWEST, "waiting");
        assert!(holder.process.is_running(), "{entry}");
        waiting.signal(Signal::SIGTERM);
        waiting.wait();
        etcd.ctl(&["del", &key]);
    }
    finish(&mut b.run(&["-n", "k", "true"])).assert_silent(75);
    assert_eq!(holder.finish(0), 0);
}

#[test]
#[ignore = "needs etcd, and root, to act as two users"]
fn only_a_holder_of_the_same_user_is_stopped_on_another_host_unless_root_asks() {
    let etcd = Etcd::single();
    let endpoint = etcd.endpoints()[0].to_string();
    let other = OtherUser::new();
    let [a, b]: [Daemon; 2] = std::array::from_fn(|_| {
        let daemon = Daemon::with(&["--etcd", &endpoint, "--etcd-ttl", "10", "--mode", "666"]);
        open_to_all(daemon.folder());
        daemon.wait_for_log("clustering locks under lease");
        daemon
    });
    let as_other = |daemon: &Daemon, options: &[&str]| {
        let mut command = other.command(other.kmutex());
        command.args(["run", "--no-autostart", "--sock"]).arg(daemon.sock()).args(options);
        Process::spawn(command.stderr(Stdio::null()))
    };
    // Root's lock, and that user.
    let mut holder = a.hold("k");
    let mut refused = as_other(&b, &["--replace", "k", "true"]);
    b.wait_for_log("wait: ");
    // It is recorded only after the entry of the first one, so that the holder's host has seen that.
    let mut newest = waits(&a, &a, &NEWEST, "newest");
    assert_eq!(refused.wait(), FINISHED);
    assert!(holder.process.is_running());
    assert_eq!((holder.finish(0), newest.wait()), (0, 0));
    // That user's lock, and that user; and root.
    for root in [false, true] {
        wait_until("the lock is free for all hosts", || standing(&etcd, "k") == 0);
        let mut holder = as_other(&a, &["k", "sleep", "1000"]);
        a.wait_for_counts("k", 1, 0);
        let mut new = if root {
            Process::spawn(&mut b.run(&["--replace", "k", "true"]))
        } else {
            as_other(&b, &["--replace", "k", "true"])
        };
        assert_eq!((holder.wait(), new.wait()), (128 + Signal::SIGTERM as i32, 0));
    }
}
