//! Runs that count, batches, the newest, limits of time, and weights: at the command line.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::*;

const FINISHED: i32 = 79;

/// A command that appends a line to the file `runs`.
const COUNT: [&str; 3] = ["sh", "-c", "echo ran >> runs"];

fn runs(daemon: &Daemon) -> usize {
    fs::read_to_string(daemon.folder().join("runs")).unwrap_or_default().lines().count()
}

fn run_with(daemon: &Daemon, options: &[&str], command: &[&str]) -> Finished {
    finish(&mut daemon.run(&[options, &["k"], command].concat()))
}

#[test]
fn a_run_that_succeeded_counts_for_as_long_as_fresh_says() {
    let daemon = Daemon::start();
    run_with(&daemon, &["--fresh", "1h"], &COUNT).assert_silent(0);
    for options in [&["--fresh=60m"][..], &["--fresh", "1h", "--queue"], &["--fresh", "7d", "--nonblock"]] {
        run_with(&daemon, options, &COUNT).assert_silent(FINISHED);
    }
    run_with(&daemon, &["--fresh", "1h", "--finished-exit-code", "0"], &COUNT).assert_silent(0);
    run_with(&daemon, &["--fresh", "1h", "--on-peer-failure", "adopt"], &COUNT).assert_silent(0);
    assert_eq!(runs(&daemon), 1);
    run_with(&daemon, &[], &COUNT).assert_silent(0);
    run_with(&daemon, &["--fresh", "0.001"], &COUNT).assert_silent(0);
    assert_eq!(runs(&daemon), 3, "without --fresh, and when it is too long ago, the command runs");
}

#[test]
fn a_failure_is_never_fresh_unless_a_request_says_so() {
    let daemon = Daemon::start();
    for _ in 0..2 {
        run_with(&daemon, &["--fresh", "1h"], &["sh", "-c", "exit 3"]).assert_silent(3);
    }
    let failure = ["--fresh-failure", "1h"];
    run_with(&daemon, &failure, &["sh", "-c", "exit 3"]).assert_silent(3);
    run_with(&daemon, &failure, &COUNT).assert_silent(FINISHED);
    let adopt = ["--fresh-failure", "1h", "--on-peer-failure", "adopt"];
    run_with(&daemon, &adopt, &COUNT).assert_silent(3);
    run_with(&daemon, &["--fresh", "1h"], &COUNT).assert_silent(0);
    run_with(&daemon, &["--fresh-failure", "1h"], &["false"]).assert_silent(FINISHED);
    assert_eq!(runs(&daemon), 1);
}

#[test]
fn work_of_a_service_whose_environment_names_no_user_is_reported_with_its_user() {
    let daemon = Daemon::start();
    let without_name =
        |command: &mut std::process::Command| finish(command.env_remove("USER").env_remove("LOGNAME"));
    without_name(&mut daemon.run(&["--fresh", "1h", "k", "true"])).assert_silent(0);
    let told = without_name(&mut daemon.run(&["--fresh", "1h", "--verbose", "k", "true"]));
    let uid = nix::unistd::Uid::effective();
    let user = if uid.is_root() { "root".to_string() } else { uid.to_string() };
    assert!(told.stderr.contains(&format!(" ago by {user}@")), "{}", told.stderr);
}

#[test]
fn what_was_done_is_reported_with_its_age_and_by_whom() {
    let daemon = Daemon::start();
    let fresh = |command: &mut std::process::Command| {
        command.env("USER", "alice");
        finish(command)
    };
    fresh(&mut daemon.run(&["--fresh", "1h", "k", "true"])).assert_silent(0);
    let told = fresh(&mut daemon.run(&["--fresh", "1h", "--verbose", "k", "true"]));
    assert!(told.stderr.contains("done 0 s ago by alice@"), "{}", told.stderr);
    let report = finish(&mut daemon.run(&["--fresh", "1h", "--status-fd", "1", "k", "true"]));
    let report: serde_json::Value = serde_json::from_str(&report.stdout).unwrap();
    assert_eq!((&report["verdict"], &report["outcome"]["exit"]), (&"fresh".into(), &0.into()));
    let status = finish(&mut daemon.kmutex(&["status", "k"]));
    assert!(status.stdout.contains("last success: done 0 s ago by alice@"), "{}", status.stdout);
    let status = finish(&mut daemon.kmutex(&["status", "--json", "k"]));
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!((&status["holding"], &status["last_success"]["token"]), (&0.into(), &report["token"]));
}

#[test]
fn what_was_done_survives_the_daemon_until_it_is_forgotten() {
    let mut daemon = Daemon::start();
    run_with(&daemon, &["--fresh", "1h"], &COUNT).assert_silent(0);
    daemon.kill();
    daemon.restart(&[]);
    run_with(&daemon, &["--fresh", "1h"], &COUNT).assert_silent(FINISHED);
    // An end in good order, with nothing held.
    daemon.process().signal(Signal::SIGTERM);
    assert_eq!(daemon.process().wait(), 0);
    daemon.restart(&[]);
    run_with(&daemon, &["--fresh", "1h"], &COUNT).assert_silent(FINISHED);
    finish(&mut daemon.kmutex(&["forget", "k"])).assert_silent(0);
    daemon.kill();
    daemon.restart(&[]);
    run_with(&daemon, &["--fresh", "1h"], &COUNT).assert_silent(0);
    assert_eq!(runs(&daemon), 2);
    finish(&mut daemon.kmutex(&["forget", "another"])).assert_silent(0);
}

#[test]
fn the_oldest_runs_are_forgotten_when_there_are_too_many() {
    let daemon = Daemon::with(&["--remember-max", "2"]);
    for key in ["a", "b", "c"] {
        finish(&mut daemon.run(&["--fresh", "1h", key, "true"])).assert_silent(0);
    }
    daemon.wait_for_log("--remember-max");
    finish(&mut daemon.run(&["--fresh", "1h", "b", "true"])).assert_silent(FINISHED);
    finish(&mut daemon.run(&["--fresh", "1h", "a", "true"])).assert_silent(0);
}

#[test]
fn a_change_that_comes_during_a_run_is_in_the_next_run_and_a_batch_is_one_run() {
    let daemon = Daemon::start();
    let source = daemon.folder().join("source");
    fs::write(&source, "1").unwrap();
    // A build reads its source when it begins.
    let build = "cp source copy; until test -e go; do sleep 0.01; done; mv copy built; echo ran >> runs";
    let coalesce = || Process::spawn(&mut daemon.run(&["--coalesce", "k", "sh", "-c", build]));
    let mut first = coalesce();
    wait_until("the first run begins", || daemon.folder().join("copy").exists());
    fs::write(&source, "2").unwrap();
    let mut batch: Vec<Process> = (0..3).map(|_| coalesce()).collect();
    daemon.wait_for_counts("k", 1, 3);
    fs::write(daemon.folder().join("go"), "").unwrap();
    assert_eq!(first.wait(), 0);
    let mut codes: Vec<i32> = batch.iter_mut().map(Process::wait).collect();
    codes.sort_unstable();
    assert_eq!(codes, [0, FINISHED, FINISHED]);
    assert_eq!(fs::read_to_string(daemon.folder().join("built")).unwrap(), "2");
    assert_eq!(runs(&daemon), 2);
}

#[test]
fn only_the_newest_waits() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut older =
        Process::spawn(&mut daemon.run(&["--queue", "--newest", "--status-file", "report", "k", "false"]));
    daemon.wait_for_counts("k", 1, 1);
    let mut newer = Process::spawn(&mut daemon.run(&[&["--queue", "--newest", "k"][..], &COUNT].concat()));
    assert_eq!(older.wait(), FINISHED);
    let report = fs::read_to_string(daemon.folder().join("report")).unwrap();
    assert!(report.contains(r#""verdict":"superseded""#), "{report}");
    holder.finish(0);
    assert_eq!((newer.wait(), runs(&daemon)), (0, 1));
}

#[test]
#[ignore = "takes many seconds"]
fn an_old_holder_is_dead_before_the_new_one_starts() {
    let daemon = Daemon::start();
    // The command takes its time to stop, and so does a process that it has left to itself.
    let old = "(trap 'sleep 0.3; rm -f alive' TERM; touch alive; while :; do sleep 0.05; done) & wait";
    let mut old = Process::spawn(daemon.run(&["k", "sh", "-c", old]).stderr(Stdio::piped()));
    wait_until("the old command runs", || daemon.folder().join("alive").exists());
    let new = ["--replace", "k", "sh", "-c", "test ! -e alive"];
    let finished = finish(&mut daemon.run(&new));
    assert_eq!(old.wait(), 128 + Signal::SIGTERM as i32);
    finished.assert_silent(0);
}

#[test]
fn a_holder_gets_its_time_before_it_is_replaced_and_may_refuse() {
    let daemon = Daemon::start();
    let began = Instant::now();
    let mut old = Process::spawn(daemon.run(&["k", "sleep", "60"]).stderr(Stdio::null()));
    daemon.wait_for_counts("k", 1, 0);
    finish(&mut daemon.run(&["--replace-after", "0.5", "k", "true"])).assert_silent(0);
    assert!(began.elapsed() >= Duration::from_millis(500));
    assert_eq!(old.wait(), 128 + Signal::SIGTERM as i32);

    let protected = daemon.hold_with(&["--no-replace"], "k");
    let mut waiter = Process::spawn(&mut daemon.run(&["--replace", "k", "true"]));
    daemon.wait_for_counts("k", 1, 1);
    assert!(waiter.is_running());
    assert_eq!(protected.finish(0), 0);
    assert_eq!(waiter.wait(), 0);
}

#[test]
fn a_command_that_holds_the_lock_for_too_long_is_stopped_with_its_descendants() {
    let daemon = Daemon::start();
    let stubborn = "trap '' TERM; sh -c 'trap \"\" TERM; touch alive; sleep 60' & wait";
    let options = ["--max-hold", "0.3", "--kill-after", "0.2", "--status-file", "report", "k"];
    let mut holder =
        Process::spawn(daemon.run(&[&options[..], &["sh", "-c", stubborn]].concat()).stderr(Stdio::piped()));
    wait_until("the command runs", || daemon.folder().join("alive").exists());
    let mut waiter = Process::spawn(&mut daemon.run(&["--on-peer-failure", "adopt", "k", "false"]));
    assert_eq!(holder.wait(), 124);
    assert!(holder.stderr().contains("stopping the command"));
    assert_eq!(waiter.wait(), 124, "for the waiters the holder has failed");
    let report = fs::read_to_string(daemon.folder().join("report")).unwrap();
    assert!(report.contains(r#""verdict":"timeout""#), "{report}");
}

#[test]
fn the_time_that_a_command_may_hold_the_lock_begins_when_it_has_it() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut waiter = Process::spawn(&mut daemon.run(&["--queue", "--max-hold", "3", "k", "true"]));
    daemon.wait_for_counts("k", 1, 1);
    std::thread::sleep(Duration::from_secs(3));
    holder.finish(0);
    assert_eq!(waiter.wait(), 0);
}

#[test]
fn a_long_hold_is_warned_of_here_and_in_the_daemons_log() {
    let daemon = Daemon::start();
    let mut holder =
        Process::spawn(daemon.run(&["--warn-after", "0.2", "k", "sleep", "1.5"]).stderr(Stdio::piped()));
    daemon.wait_for_log("has held \"k\" for");
    assert_eq!(holder.wait(), 0);
    let told = holder.stderr();
    assert_eq!(told.lines().filter(|line| line.contains("holding the lock \"k\" for")).count(), 1, "{told}");
}

#[test]
fn weights_are_added_up_and_all_must_agree_about_the_slots() {
    let daemon = Daemon::start();
    let heavy = daemon.hold_with(&["--slots", "4", "--weight", "3"], "k");
    let light = daemon.hold_with(&["--slots", "4", "--weight", "1"], "k");
    finish(&mut daemon.run(&["--slots", "4", "--weight", "1", "-n", "k", "true"])).assert_silent(75);
    let other = finish(&mut daemon.run(&["--slots", "5", "--weight", "1", "-n", "k", "true"]));
    other.assert_error(64, &["4 slots", "agree"]);
    let mut waiter =
        Process::spawn(&mut daemon.run(&["--queue", "--slots", "4", "--weight", "2", "k", "true"]));
    daemon.wait_for_counts("k", 2, 1);
    light.finish(0);
    daemon.wait_for_counts("k", 1, 1);
    assert!(waiter.is_running(), "three and two are more than four");
    heavy.finish(0);
    assert_eq!(waiter.wait(), 0);
}

#[test]
fn what_cannot_be_meant_together_is_refused() {
    let daemon = Daemon::start();
    for options in [
        &["--fresh", "1h", "--shared"][..],
        &["--fresh", "1h", "--slots", "2"],
        &["--coalesce", "--shared"],
        &["--coalesce", "--slots", "2"],
        &["--coalesce", "--queue"],
        &["--coalesce", "--fresh", "1h"],
        &["--replace", "--shared"],
        &["--replace", "--slots", "2"],
        &["--replace", "--nonblock"],
        &["--max-hold", "1", "--no-fork"],
        &["--weight", "2"],
        &["--weight", "3", "--slots", "2"],
        &["--fresh", "0"],
        &["--fresh", "-1"],
        &["--fresh", "1w"],
        &["--wait", "10 m"],
        &["--wait", "m"],
        &["--max-hold", "infd"],
    ] {
        run_with(&daemon, options, &["true"]).assert_error(64, &[]);
    }
    for option in [&["--fresh", "1h"][..], &["--coalesce"], &["--replace"], &["--newest"]] {
        let args = [option, &["-k", "a", "-k", "b", "true"]].concat();
        finish(&mut daemon.run(&args)).assert_error(64, &["several -k"]);
    }
}

#[test]
fn a_duration_is_seconds_or_has_a_unit() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    for wait in ["0.05", "0.05s", "0.001m", "0.00001h", "0.000001d"] {
        run_with(&daemon, &["-w", wait], &["true"]).assert_silent(75);
    }
    holder.finish(0);
}
