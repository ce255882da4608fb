//! The newest request of several hosts that share their locks through etcd: `--newest` and `--replace`.

use std::fs;

use crate::cluster::{name, restart_steady, standing, steady_hosts};
use crate::etcd_harness::Etcd;
use crate::harness::*;

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
