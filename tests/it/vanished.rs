//! Holders that disappear without a word: a lock ends with its last user, and one of the waiters does the work that was not
//! finished.

use std::io::Write;
use std::process::Stdio;

use nix::sys::signal::Signal;

use crate::harness::*;

const FINISHED: i32 = 79;

/// Waiters in once mode, whose command says that it runs, and ends with the status that it reads. They wait in this
/// order.
fn waiters(daemon: &Daemon, count: u64) -> Vec<Process> {
    let already = daemon.counts("k").1;
    let script = "echo running; read status; exit $status";
    let start = |number| {
        let mut command = daemon.run(&["k", "sh", "-c", script]);
        let process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        daemon.wait_for_counts("k", 1, already + number + 1);
        process
    };
    (0..count).map(start).collect()
}

/// Waits until this one holds the lock, lets it end with this status, and waits for that.
fn run_to_its_end(daemon: &Daemon, waiter: &mut Process, others: u64, status: i32) {
    waiter.wait_for_line("running");
    assert_eq!(daemon.counts("k"), (1, others), "one of them, not all");
    writeln!(waiter.child.stdin.take().unwrap(), "{status}").unwrap();
    assert_eq!(waiter.wait(), status);
}

fn assert_did_not_run(waiters: &mut [Process]) {
    for waiter in waiters {
        assert_eq!(waiter.wait(), FINISHED);
        assert_eq!(waiter.line(), None, "it did not run");
    }
}

fn kill_9(process: &mut Process) {
    process.signal(Signal::SIGKILL);
    assert_eq!(process.wait(), 128 + 9);
}

#[test]
fn when_a_holder_vanishes_one_of_the_waiters_does_the_work() {
    let daemon = Daemon::start();
    let mut holder = daemon.hold_with(&["-o"], "k");
    let mut waiters = waiters(&daemon, 4);
    kill_9(&mut holder.process);
    run_to_its_end(&daemon, &mut waiters[0], 3, 7);
    assert_did_not_run(&mut waiters[1..]);
    assert_eq!(daemon.counts("k"), (0, 0));
}

#[test]
fn when_that_one_vanishes_too_it_is_the_next_ones_turn() {
    let daemon = Daemon::start();
    let mut holder = daemon.hold_with(&["-o"], "k");
    let mut waiters = waiters(&daemon, 3);
    kill_9(&mut holder.process);
    waiters[0].wait_for_line("running");
    kill_9(&mut waiters[0]);
    // Its command has the lock still, and ends now.
    drop(waiters[0].child.stdin.take());
    run_to_its_end(&daemon, &mut waiters[1], 1, 0);
    assert_did_not_run(&mut waiters[2..]);
}

#[test]
fn a_killed_kmutex_has_not_vanished_while_its_command_lives() {
    let daemon = Daemon::start();
    let mut holder = daemon.hold("k");
    let mut waiters = waiters(&daemon, 3);
    kill_9(&mut holder.process);
    finish(&mut daemon.run(&["-n", "k", "true"])).assert_silent(75);
    assert_eq!(daemon.counts("k"), (1, 3), "no waiter got the lock");
    // The end of its input ends the command.
    drop(holder.process.child.stdin.take());
    run_to_its_end(&daemon, &mut waiters[0], 2, 0);
    assert_did_not_run(&mut waiters[1..]);
}

#[test]
fn the_oldest_waiter_takes_over_whatever_it_waits_for() {
    let daemon = Daemon::start();
    let mut holder = daemon.hold_with(&["-o"], "k");
    let mut queue = Process::spawn(daemon.run(&["--queue", "k", "echo", "queue"]).stdout(Stdio::piped()));
    daemon.wait_for_counts("k", 1, 1);
    let mut once = waiters(&daemon, 2);
    kill_9(&mut holder.process);
    assert_eq!((queue.line().as_deref(), queue.wait()), (Some("queue"), 0));
    assert_did_not_run(&mut once);
}

#[test]
fn what_became_the_command_has_finished_when_that_ends() {
    let daemon = Daemon::start();
    for signal in [None, Some(Signal::SIGKILL)] {
        let mut holder = daemon.hold_with(&["-F"], "k");
        let mut waiters = waiters(&daemon, 2);
        match signal {
            Some(signal) => holder.process.signal(signal),
            None => drop(holder.process.child.stdin.take()),
        }
        holder.process.wait();
        assert_did_not_run(&mut waiters);
    }
}

#[test]
fn who_waited_is_told_though_something_was_left_in_the_background() {
    let daemon = Daemon::start();
    let mut command = daemon.run(&["k", "sh", "-c", "sleep 600 & echo $!; echo holding; read line; exit 0"]);
    let mut holder = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let pid = holder.wait_for_line("holding").concat();
    let _sleeper = KillOnDrop::new(&pid);
    let mut waiters = waiters(&daemon, 2);
    drop(holder.child.stdin.take());
    assert_eq!(holder.wait(), 0);
    assert_did_not_run(&mut waiters);
    finish(&mut daemon.run(&["-n", "k", "true"])).assert_silent(0);
}

#[test]
fn who_stops_waiting_gives_up_its_place() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let queue = |script: &str| {
        let waiting = daemon.counts("k").1;
        let process = Process::spawn(&mut daemon.run(&["--queue", "k", "sh", "-c", script]));
        daemon.wait_for_counts("k", 1, waiting + 1);
        process
    };
    let (mut first, mut second) = (queue("exit 1"), queue("exit 2"));
    first.signal(Signal::SIGTERM);
    assert_eq!(first.wait(), 128 + 15);
    daemon.wait_for_counts("k", 1, 1);
    holder.finish(0);
    assert_eq!(second.wait(), 2);
}
