//! No client can make the daemon keep much, or wait for long.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::harness::{Daemon, PREAMBLE, wait_until};

const KEY: &[u8; 16] = b"0123456789abcdef";
/// How long a message may take from its first byte to its last.
const MESSAGE_WAIT: Duration = Duration::from_secs(10);

/// Sends a byte whenever `pause` has passed, until the daemon closes. Returns when that was.
fn trickle(mut stream: UnixStream, byte: &[u8], pause: Duration) -> Instant {
    stream.set_read_timeout(Some(pause)).unwrap();
    let give_up = Instant::now() + 3 * MESSAGE_WAIT;
    while Instant::now() < give_up {
        match stream.read(&mut [0; 100]) {
            Ok(0) => return Instant::now(),
            // The greeting.
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return Instant::now(),
        }
        // Where the daemon has closed meanwhile, the next read says so.
        let _ = stream.write(byte);
    }
    panic!("the daemon does not close");
}

#[test]
#[ignore = "takes many seconds"]
fn half_a_message_is_waited_for_for_ten_seconds_however_it_comes() {
    let daemon = Daemon::start();
    let (mut owner, mut waiter) = (daemon.wire(), daemon.wire());
    owner.send(KEY).expect("O");
    waiter.send(KEY);
    let began = Instant::now();
    let half = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(daemon.sock()).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    };
    // A key, a preamble, a line; and each of them a byte now and then.
    let key = (half(&KEY[..15]), &b""[..]);
    let preamble = (half(&PREAMBLE[..7]), &b""[..]);
    let line = (half(&[&PREAMBLE[..], b"{\"type\":"].concat()), &b""[..]);
    let slow_key = (half(b""), &b"k"[..]);
    let slow_line = (half(&PREAMBLE[..]), &b"{"[..]);
    let ends = std::thread::scope(|scope| {
        let clients = [key, preamble, line, slow_key, slow_line];
        let threads =
            clients.map(|(stream, byte)| scope.spawn(move || trickle(stream, byte, MESSAGE_WAIT / 10)));
        threads.map(|thread| thread.join().unwrap() - began)
    });
    for end in ends {
        assert!((MESSAGE_WAIT..2 * MESSAGE_WAIT).contains(&end), "{ends:?}");
    }
    assert_eq!(daemon.log().matches("incomplete message for too long").count(), 5);
    owner.send("R");
    waiter.expect("R");
}

/// Private memory of the daemon, in KiB (proc(5), RssAnon).
fn memory(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
#[ignore = "takes many seconds"]
fn what_one_client_sends_does_not_make_the_daemon_grow() {
    let daemon = Daemon::start();
    let mut client = daemon.wire();
    client.open(r#"{"type":"ping"}"#).answer_of("pong");
    let long = "n".repeat(60_000);
    let mut a_round = |number: usize| {
        // Long notes and lines, unknown fields, errors, a new key and a new nonce each time.
        let nonce = format!("{number:x}");
        client.request(&format!(
            r#"{{"type":"lock","key":"key {number}","nonce":"{nonce}","who":{{"note":"{long}"}}}}"#
        ));
        client.answer_of("granted");
        client.request(&format!(r#"{{"type":"ping","x":"{long}"}}"#)).answer_of("pong");
        client.request(&format!(r#"{{"type":"{long}"}}"#)).answer_of("error");
        client.request(r#"{"type":"child","pid":4294967295}"#).answer_of("error");
        client.request(r#"{"type":"release"}"#).answer_of("released");
    };
    for number in 0..100 {
        a_round(number);
    }
    let before = memory(&daemon);
    for number in 100..2_000 {
        a_round(number);
    }
    // 340 MB later.
    let after = memory(&daemon);
    assert!(after < before + 256, "it had {before} KiB, and has {after} KiB");
}

#[test]
fn a_message_that_is_not_finished_costs_what_it_is_long_at_most() {
    const CLIENTS: u64 = 100;
    let daemon = Daemon::start();
    daemon.wire().open(r#"{"type":"ping"}"#).answer_of("pong");
    let before = memory(&daemon);
    let half = [&PREAMBLE[..], b"{\"x\":\"", &[b'x'; 64_000]].concat();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut client = daemon.wire();
            client.send(&half);
            client
        })
        .collect();
    let each = || (memory(&daemon) - before) / CLIENTS;
    wait_until("all to be read", || each() >= 62);
    assert!(each() < 160, "{} KiB", each());
    drop(clients);
}
