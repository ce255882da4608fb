//! `kmutex run -k KEY -k KEY`: several locks, all or none.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::harness::{Daemon, KMUTEX, Process, finish};

fn run(daemon: &Daemon, options: &[&str], keys: &[&str], command: &[&str]) -> Command {
    let mut run = daemon.run(options);
    for key in keys {
        run.args(["-k", key]);
    }
    run.arg("--").args(command);
    run
}

#[test]
fn all_of_them_are_held_while_the_command_runs() {
    let daemon = Daemon::start();
    let mut holder = run(&daemon, &[], &["b", "a"], &["sh", "-c", "echo $KMUTEX_KEY; read line; exit 5"]);
    let mut holder = Process::spawn(holder.stdin(Stdio::piped()).stdout(Stdio::piped()));
    assert_eq!(holder.line().unwrap(), "b", "the last in order is that of $KMUTEX_TOKEN");
    assert_eq!((daemon.counts("a"), daemon.counts("b")), ((1, 0), (1, 0)));
    let mut once = Process::spawn(&mut daemon.run(&["a", "true"]));
    let mut queue = Process::spawn(&mut daemon.run(&["--queue", "b", "true"]));
    daemon.wait_for_counts("a", 1, 1);
    daemon.wait_for_counts("b", 1, 1);
    drop(holder.child.stdin.take());
    assert_eq!((holder.wait(), once.wait(), queue.wait()), (5, 79, 0));
    assert!(daemon.status().is_empty());
    assert_eq!(finish(&mut run(&daemon, &[], &["a"], &["echo", "-n", "one"])).assert_silent(0), "one");
    assert_eq!(
        finish(daemon.run(&["-k", "a", "-k", "b", "-c", "echo shell"]).stdin(Stdio::null())).assert_silent(0),
        "shell\n"
    );
}

#[test]
fn if_one_cannot_be_acquired_none_is_held_and_no_waiter_is_told_finished() {
    let daemon = Daemon::start();
    let holder = daemon.hold("b");
    finish(&mut run(&daemon, &["-n"], &["a", "b"], &["true"])).assert_silent(75);
    finish(&mut run(&daemon, &["-w", "0.1"], &["a", "b"], &["true"])).assert_silent(75);
    let mut both = Process::spawn(&mut run(&daemon, &[], &["a", "b"], &["true"]));
    daemon.wait_for_counts("b", 1, 1);
    let mut other = Process::spawn(&mut daemon.run(&["a", "true"]));
    daemon.wait_for_counts("a", 1, 1);
    assert_eq!(holder.finish(0), 0);
    assert_eq!(both.wait(), 79, "the work of b is done");
    assert_eq!(other.wait(), 0, "that of a is not");
    assert!(daemon.status().is_empty());
    // The same with -F, where the end of kmutex would otherwise have been the end of the work.
    let holder = daemon.hold("b");
    let mut both = Process::spawn(&mut run(&daemon, &["-F", "-w", "0.5"], &["a", "b"], &["true"]));
    daemon.wait_for_counts("a", 1, 0);
    let mut other = Process::spawn(&mut daemon.run(&["a", "true"]));
    assert_eq!((both.wait(), other.wait()), (75, 0));
    drop(holder);
}

#[test]
fn the_order_in_which_they_are_named_does_not_matter() {
    let daemon = Daemon::start();
    let keys = [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"], ["c", "a", "b"]];
    let script = "mkdir inside || echo not alone >> violations; echo x >> runs; rmdir inside";
    let mut all: Vec<_> = (0..40)
        .map(|number| {
            Process::spawn(&mut run(&daemon, &["--queue"], &keys[number % 4], &["sh", "-c", script]))
        })
        .collect();
    assert!(all.iter_mut().all(|process| process.wait() == 0));
    let read = |name| fs::read_to_string(daemon.folder().join(name)).unwrap_or_default();
    assert_eq!((read("runs").lines().count(), read("violations")), (40, String::new()));
}

#[test]
fn they_outlive_the_daemon_and_are_lost_together() {
    let mut daemon = Daemon::start();
    let mut holder = run(&daemon, &[], &["a", "b"], &["sh", "-c", "echo holding; read line"]);
    let mut holder =
        Process::spawn(holder.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()));
    holder.wait_for_line("holding");
    daemon.restart(&[]);
    for key in ["a", "b"] {
        crate::harness::wait_until("both to be resumed", || {
            let status = daemon.status();
            status.iter().any(|lock| lock["key"] == key && lock["holders"][0]["orphan"].is_null())
        });
    }
    finish(&mut daemon.kmutex(&["break", "-y", "a"])).assert_silent(0);
    assert_eq!(holder.wait(), 74);
    daemon.wait_for_counts("b", 0, 0);
}

#[test]
fn a_command_whose_kmutex_was_killed_keeps_all_of_them() {
    let daemon = Daemon::start();
    let mut holder = run(&daemon, &[], &["a", "b"], &["sh", "-c", "echo holding; read line"]);
    let mut holder = Process::spawn(holder.stdin(Stdio::piped()).stdout(Stdio::piped()));
    holder.wait_for_line("holding");
    holder.signal(Signal::SIGKILL);
    holder.wait();
    for key in ["a", "b"] {
        assert_eq!(daemon.run(&["-n", key, "true"]).status().unwrap().code(), Some(75), "{key}");
    }
    drop(holder.child.stdin.take());
    assert_eq!(daemon.run(&["--queue", "a", "true"]).status().unwrap().code(), Some(0));
}

#[test]
fn each_of_them_is_held_above_what_runs_under_them() {
    let daemon = Daemon::start();
    for key in ["a", "b"] {
        let script = format!("{KMUTEX} run --queue {key} true");
        finish(&mut run(&daemon, &[], &["a", "b"], &["sh", "-c", &script]))
            .assert_error(75, &[key, "held by the command"]);
        let script = format!("{KMUTEX} run --reentrant -k {key} -k free echo fine");
        assert_eq!(
            finish(&mut run(&daemon, &[], &["a", "b"], &["sh", "-c", &script])).assert_silent(0),
            "fine\n"
        );
    }
}

#[test]
fn what_is_missing_is_named() {
    let daemon = Daemon::start();
    finish(&mut daemon.run(&["-k", "a", "-k", "b"])).assert_error(64, &["nothing to run"]);
    finish(&mut daemon.run(&["-k", "a", "-c", "true", "b", "true"])).assert_error(64, &["COMMAND"]);
    finish(&mut daemon.run(&["-k", "a", "-k", "", "--", "true"])).assert_error(65, &["key"]);
    finish(&mut daemon.run(&["-k", "a", "-k", "b", "-k", "a", "--", "true"]))
        .assert_error(64, &["-k", "\"a\"", "twice"]);
    finish(&mut daemon.run::<&str>(&[])).assert_error(64, &["KEY"]);
}
