//! Locks over TCP have a lease: what a client must say for it, and what becomes of the lock when it does not.

use std::fs;
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{Daemon, KMUTEX, Wire, finish, wait_until};

const ONCE: &str = r#"{"type":"lock","key":"k","nonce":"1"}"#;
const QUEUE: &str = r#"{"type":"lock","key":"k","mode":"queue"}"#;

fn serve(options: &[&str]) -> Daemon {
    Daemon::with(&[&["--sock", "127.0.0.1:0"], options].concat())
}

fn sock(daemon: &Daemon) -> String {
    daemon.wait_for_log("serving on 127.0.0.1:").rsplit(' ').next().unwrap().into()
}

fn wire(daemon: &Daemon) -> Wire<TcpStream> {
    Wire::new(TcpStream::connect(sock(daemon)).unwrap())
}

#[test]
fn a_lock_over_tcp_is_granted_with_a_lease_unless_the_client_becomes_the_command() {
    let daemon = serve(&["--peer-timeout", "60"]);
    let mut holder = wire(&daemon);
    holder.send(*crate::harness::PREAMBLE).request(ONCE);
    assert_eq!(holder.answer_of("hello")["peer_timeout_ms"], 60_000);
    let lease = json!({"good_ms": 40_000, "margin_ms": 20_000});
    assert_eq!(holder.answer_of("granted")["lease"], lease);
    assert_eq!(holder.request(r#"{"type":"ping"}"#).answer_of("pong")["lease"], lease);
    holder.request(r#"{"type":"release"}"#).answer_of("released");
    assert!(holder.request(r#"{"type":"ping"}"#).answer_of("pong")["lease"].is_null(), "it holds nothing");
    let exec = wire(&daemon).open(r#"{"type":"lock","key":"k","exec":true}"#).answer_of("granted");
    assert!(exec["lease"].is_null(), "it will send no pings: {exec}");
    let mut local = daemon.wire();
    assert!(local.open(r#"{"type":"lock","key":"local"}"#).answer_of("granted")["lease"].is_null());
}

#[test]
fn a_holder_that_sends_no_pings_loses_its_lock_and_one_that_does_keeps_it() {
    let daemon = serve(&["--peer-timeout", "1.5"]);
    let (mut silent, mut alive, mut waiter) = (wire(&daemon), wire(&daemon), daemon.wire());
    silent.open(ONCE).answer_of("granted");
    let granted = Instant::now();
    alive.open(r#"{"type":"lock","key":"alive"}"#).answer_of("granted");
    waiter.open(QUEUE).answer_of("waiting");
    let pinged = std::thread::spawn(move || {
        while granted.elapsed() < Duration::from_secs(4) {
            alive.request(r#"{"type":"ping"}"#);
            assert!(!alive.answer_of("pong")["lease"].is_null());
            std::thread::sleep(Duration::from_millis(100));
        }
        alive
    });
    waiter.answer_of("granted");
    assert!(granted.elapsed() > Duration::from_millis(1400), "{:?}", granted.elapsed());
    assert_eq!(silent.answer_of("lost")["why"], "no ping in time");
    silent.expect_closed();
    daemon.wait_for_log("its lock is free");
    let mut alive = pinged.join().unwrap();
    alive.request(r#"{"type":"release"}"#).answer_of("released");
}

/// A reset connection says nothing of the client, which may come back. (The client here leaves an answer unread, so that its end
/// resets the connection.)
#[test]
fn the_lock_of_a_connection_that_failed_is_kept_until_the_lease_is_over() {
    let daemon = serve(&["--peer-timeout", "3"]);
    let hold = || {
        let mut holder = wire(&daemon);
        let token = holder.open(ONCE).answer_of("granted")["token"].clone();
        holder.request(r#"{"type":"ping"}"#);
        // The answer has arrived, and stays unread.
        let stream = holder.into_stream();
        wait_until("the answer", || stream.peek(&mut [0; 1]).unwrap() == 1);
        token
    };
    let token = hold();
    daemon.wait_for_log("may come back");
    assert_eq!(daemon.status()[0]["holders"][0]["orphan"], true);
    let mut again = wire(&daemon);
    again.open(&json!({"type": "lock", "key": "k", "nonce": "1", "holds": token}).to_string());
    assert_eq!(again.answer_of("granted")["token"], token);
    again.request(r#"{"type":"release"}"#).answer_of("released");

    hold();
    let failed = Instant::now();
    let mut waiter = daemon.wire();
    waiter.open(QUEUE).answer_of("waiting");
    waiter.answer_of("granted");
    assert!(failed.elapsed() > Duration::from_secs(1), "{:?}", failed.elapsed());
}

#[test]
fn the_end_of_a_holders_process_frees_its_lock_at_once() {
    let daemon = serve(&["--peer-timeout", "3600"]);
    let mut holder = wire(&daemon);
    holder.open(ONCE).answer_of("granted");
    drop(holder);
    daemon.wait_for_counts("k", 0, 0);
}

#[test]
fn connections_that_hold_nothing_wake_no_daemon() {
    let daemon = serve(&["--peer-timeout", "1"]);
    let mut idle = [wire(&daemon), wire(&daemon), wire(&daemon)];
    idle[0].open(r#"{"type":"ping"}"#).answer_of("pong");
    idle[1].open(ONCE).answer_of("granted");
    idle[1].request(r#"{"type":"release"}"#).answer_of("released");
    let switches = || {
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        status.lines().find(|line| line.starts_with("voluntary_ctxt")).unwrap().to_string()
    };
    let mut before = switches();
    wait_until("the daemon to sleep", || {
        std::thread::sleep(Duration::from_millis(50));
        std::mem::replace(&mut before, switches()) == before
    });
    // Longer than a peer timeout.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(switches(), before);
}

#[test]
fn without_a_peer_timeout_there_are_no_leases() {
    let daemon = serve(&["--peer-timeout", "0"]);
    let mut holder = wire(&daemon);
    holder.send(*crate::harness::PREAMBLE).request(ONCE);
    assert!(holder.answer_of("hello")["peer_timeout_ms"].is_null());
    assert!(holder.answer_of("granted")["lease"].is_null());
    for bad in ["0.5", "2d", "-1", "soon"] {
        let mut command = Command::new(KMUTEX);
        command.args(["serve", "--sock", "127.0.0.1:0", "--peer-timeout", bad]);
        let done = finish(&mut command);
        assert_eq!(done.code, 64, "{bad}: {done:?}");
        assert!(done.stderr.contains("--peer-timeout"), "{done:?}");
    }
}

#[test]
fn a_command_over_tcp_runs_for_longer_than_its_lease() {
    let daemon = serve(&["--peer-timeout", "1"]);
    let mut run = daemon.run(&["--sock", &sock(&daemon), "k", "--", "sleep", "3"]);
    finish(&mut run).assert_silent(0);
}
