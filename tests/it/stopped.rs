//! Waiters that are stopped (Ctrl-Z, SIGSTOP): the lock goes past them, and they keep their places. And the offers of
//! protocol 2, by which the daemon finds that out.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::harness::*;
use crate::signals::state_of;

const QUEUE: &str = r#"{"type":"lock","key":"k","mode":"queue"}"#;
const OFFERS: &str = r#"{"type":"lock","key":"k","mode":"queue","offers":true}"#;
const ONCE: &str = r#"{"type":"lock","key":"k","offers":true}"#;
const TAKE: &str = r#"{"type":"take"}"#;
const RELEASE: &str = r#"{"type":"release","outcome":{"exit":0}}"#;

/// A queued `kmutex run` that waits for `k`, and then writes its name into the file `order`.
fn waiter(daemon: &Daemon, name: &str, waiting: u64) -> Process {
    let command = format!("echo {name} >> order");
    let process = Process::spawn(&mut daemon.run(&["--queue", "k", "sh", "-c", &command]));
    daemon.wait_for_counts("k", 1, waiting);
    process
}

fn stop(process: &Process) {
    process.signal(Signal::SIGSTOP);
    wait_until("it to be stopped", || state_of(process.pid()) == 'T');
}

fn order(daemon: &Daemon) -> String {
    fs::read_to_string(daemon.folder().join("order")).unwrap_or_default()
}

#[test]
fn stopped_waiters_let_the_others_pass_and_keep_their_places() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut waiters: Vec<Process> = (1..=4).map(|n| waiter(&daemon, &n.to_string(), n)).collect();
    stop(&waiters[0]);
    stop(&waiters[1]);
    holder.finish(0);
    assert_eq!((waiters[2].wait(), waiters[3].wait()), (0, 0));
    assert_eq!(order(&daemon), "3\n4\n");
    // They still wait, and the lock is free for others at once.
    daemon.wait_for_counts("k", 0, 2);
    let holder = daemon.hold("k");
    let mut last = waiter(&daemon, "last", 3);
    waiters[1].signal(Signal::SIGCONT);
    waiters[0].signal(Signal::SIGCONT);
    daemon.wait_for_logs("wait: ", 4 + 1 + 2);
    holder.finish(0);
    assert_eq!((waiters[0].wait(), waiters[1].wait(), last.wait()), (0, 0, 0));
    assert_eq!(order(&daemon), "3\n4\n1\n2\nlast\n");
}

#[test]
fn a_stopped_waiter_gets_a_free_lock_when_it_goes_on() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut only = waiter(&daemon, "only", 1);
    stop(&only);
    holder.finish(0);
    // It comes when the offer has ended.
    daemon.hold("k").finish(0);
    assert_eq!(order(&daemon), "");
    only.signal(Signal::SIGCONT);
    assert_eq!(only.wait(), 0);
    assert_eq!(order(&daemon), "only\n");
    daemon.wait_for_counts("k", 0, 0);
}

#[test]
fn a_stopped_waiter_does_not_take_over_from_a_holder_that_vanished() {
    let daemon = Daemon::start();
    let holder = daemon.hold_with(&["-o"], "k");
    let mut once: Vec<Process> = (1..=2)
        .map(|n| {
            let command = format!("echo {n} >> order");
            let process = Process::spawn(&mut daemon.run(&["k", "sh", "-c", &command]));
            daemon.wait_for_counts("k", 1, n);
            process
        })
        .collect();
    stop(&once[0]);
    kill(holder.process.pid(), Signal::SIGKILL).unwrap();
    assert_eq!(once[1].wait(), 0);
    assert_eq!(order(&daemon), "2\n");
    once[0].signal(Signal::SIGCONT);
    assert_eq!(once[0].wait(), 79, "the work is done");
}

#[test]
fn a_waiter_that_is_stopped_at_the_terminal_goes_on_in_its_turn() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let script = r#"
        set -m
        "$KMUTEX" run --queue k sh -c 'echo first >> order'
        echo $? > stopped
        until test -e go; do sleep 0.01; done
        fg > /dev/null
        exit $?
    "#;
    let mut terminal = crate::terminal::terminal(&daemon, "bash", script);
    daemon.wait_for_counts("k", 1, 1);
    let first = daemon.status()[0]["waiters"][0]["pid"].as_i64().unwrap();
    let first = Pid::from_raw(first as i32);
    wait_until("the job to be in the foreground", || crate::terminal::is_in_foreground(first));
    crate::terminal::type_in(&mut terminal, "\x1a");
    wait_until("the shell to see the job stopped", || {
        fs::read_to_string(daemon.folder().join("stopped")).is_ok_and(|status| status == "148\n")
    });
    let mut second = waiter(&daemon, "second", 2);
    holder.finish(0);
    assert_eq!(second.wait(), 0);
    assert_eq!(order(&daemon), "second\n");
    fs::write(daemon.folder().join("go"), "").unwrap();
    assert_eq!(terminal.wait(), 0);
    assert_eq!(order(&daemon), "second\nfirst\n");
}

#[test]
fn a_slow_client_does_not_start_on_an_offer_that_was_withdrawn() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut slow = waiter(&daemon, "slow", 1);
    stop(&slow);
    let mut next = daemon.run(&["--queue", "k", "sh", "-c", "echo holding; read line; echo next >> order"]);
    let mut next = Process::spawn(next.stdin(Stdio::piped()).stdout(Stdio::piped()));
    daemon.wait_for_counts("k", 1, 2);
    holder.finish(0);
    next.wait_for_line("holding");
    slow.signal(Signal::SIGCONT);
    // It takes the offer, and is told to wait.
    daemon.wait_for_logs("wait: ", 3);
    assert_eq!(order(&daemon), "");
    drop(next.child.stdin.take());
    assert_eq!((next.wait(), slow.wait()), (0, 0));
    assert_eq!(order(&daemon), "next\nslow\n");
}

#[test]
fn the_time_to_wait_goes_on_while_a_waiter_is_stopped() {
    let daemon = Daemon::start();
    let _holder = daemon.hold("k");
    let mut waiter = Process::spawn(&mut daemon.run(&["--queue", "-w", "0.5", "k", "true"]));
    daemon.wait_for_counts("k", 1, 1);
    stop(&waiter);
    let until = Instant::now() + Duration::from_millis(500);
    wait_until("its time to be over", || Instant::now() >= until);
    waiter.signal(Signal::SIGCONT);
    assert_eq!(waiter.wait(), 75);
}

#[test]
fn an_offer_is_taken_and_then_granted() {
    let daemon = Daemon::start();
    let (mut holder, mut waiter) = (daemon.wire(), daemon.wire());
    let first = holder.open(QUEUE).answer_of("granted")["token"].as_u64().unwrap();
    waiter.open(OFFERS).answer_of("waiting");
    holder.request(RELEASE).answer_of("released");
    assert_eq!(waiter.answer(), json!({"type": "offered"}));
    // It holds nothing yet.
    assert_eq!(daemon.counts("k"), (0, 1));
    waiter.request(r#"{"type":"release"}"#).answer_of("error");
    let token = waiter.request(TAKE).answer_of("granted")["token"].as_u64().unwrap();
    assert!(token > first);
    // Once more means nothing, nor does it elsewhere.
    waiter.request(TAKE).request(RELEASE).answer_of("released");
    waiter.request(TAKE).request(OFFERS).answer_of("granted");
}

#[test]
fn an_offer_that_is_not_taken_goes_to_the_next() {
    let daemon = Daemon::start();
    let [mut holder, mut slow, mut next, mut once, mut old] = [(); 5].map(|()| daemon.wire());
    holder.open(QUEUE).answer_of("granted");
    slow.open(OFFERS).answer_of("waiting");
    next.open(OFFERS).answer_of("waiting");
    holder.request(RELEASE).answer_of("released");
    let begin = Instant::now();
    slow.answer_of("offered");
    // These come while the lock is offered.
    once.open(ONCE).answer_of("waiting");
    let key = kmutex::proto::Key::new("k").unwrap();
    old.send(key.id().0);
    daemon.wait_for_logs("wait: ", 4);
    next.answer_of("offered");
    assert!(begin.elapsed() >= Duration::from_millis(900), "{:?}", begin.elapsed());
    // A client of protocol 1 is told to ask again.
    old.expect("R");
    next.request(TAKE).answer_of("granted");
    slow.request(TAKE).answer_of("waiting");
    next.request(RELEASE).answer_of("released");
    once.answer_of("finished");
    slow.answer_of("offered");
    slow.request(TAKE).answer_of("granted");
}

#[test]
fn clients_that_do_not_know_offers_are_granted_plainly() {
    let daemon = Daemon::start();
    let (mut holder, mut waiter) = (daemon.wire(), daemon.wire());
    holder.open(OFFERS).answer_of("granted");
    waiter.open(QUEUE).answer_of("waiting");
    holder.request(RELEASE).answer_of("released");
    waiter.answer_of("granted");
}

#[test]
fn a_client_that_goes_leaves_its_offer_to_the_next() {
    let daemon = Daemon::start();
    let [mut holder, mut first, mut second] = [(); 3].map(|()| daemon.wire());
    holder.open(QUEUE).answer_of("granted");
    first.open(OFFERS).answer_of("waiting");
    second.open(ONCE).answer_of("waiting");
    holder.end();
    first.answer_of("offered");
    drop(first);
    second.answer_of("offered");
    second.request(TAKE).answer_of("granted");
}

#[test]
fn an_offer_survives_neither_the_daemon_nor_does_the_waiter_lose_its_place() {
    let mut daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut first = waiter(&daemon, "first", 1);
    let mut second = waiter(&daemon, "second", 2);
    stop(&first);
    stop(&second);
    holder.finish(0);
    daemon.wait_for_log("offer: ");
    daemon.restart(&[]);
    let holder = daemon.hold("k");
    second.signal(Signal::SIGCONT);
    daemon.wait_for_counts("k", 1, 1);
    first.signal(Signal::SIGCONT);
    daemon.wait_for_counts("k", 1, 2);
    holder.finish(0);
    assert_eq!((first.wait(), second.wait()), (0, 0));
    assert_eq!(order(&daemon), "first\nsecond\n");
}
