//! Protocol 1, byte by byte, on both kinds of socket.

use std::fs;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::harness::{Daemon, Stream, Wire, wait_for, wait_until};

const KEY: &[u8; 16] = b"0123456789abcdef";
const OTHER: &[u8; 16] = b"fedcba9876543210";

/// Connects to one daemon, again and again.
type Dial<'a> = &'a dyn Fn() -> Wire<Box<dyn Stream>>;

/// Runs a scenario on a Unix socket and on TCP, each with a daemon of its own.
fn on_both(options: &[&str], scenario: impl Fn(&Daemon, Dial<'_>)) {
    let unix = Daemon::with(options);
    scenario(&unix, &|| Wire::new(Box::new(UnixStream::connect(unix.sock()).unwrap())));

    let tcp = Daemon::with(&[options, &["--sock", "127.0.0.1:0"]].concat());
    let line = tcp.wait_for_log("serving on 127.0.0.1:");
    let addr = line.rsplit(' ').next().unwrap();
    scenario(&tcp, &|| Wire::new(Box::new(TcpStream::connect(addr).unwrap())));
}

#[test]
fn a_free_lock_is_answered_with_o() {
    on_both(&[], |_, dial| {
        dial().send(KEY).expect("O").send("R").send(KEY).expect("O");
    });
}

#[test]
fn a_key_may_come_in_pieces_cut_anywhere() {
    on_both(&[], |daemon, dial| {
        for cut in 1..16 {
            let mut client = dial();
            client.send(&KEY[..cut]);
            // Another client's answer shows that the daemon has read the first piece by now. (Without the release, the next such
            // client could be read before the end of this one.)
            let mut other = dial();
            other.send(OTHER).expect("O").send("R").end();
            other.expect_closed();
            client.send(&KEY[cut..]).expect("O").send("R").end();
            client.expect_closed();
        }
        assert_eq!(daemon.status(), Vec::<serde_json::Value>::new());
    });
}

#[test]
fn messages_may_come_glued_and_are_answered_with_one_write() {
    on_both(&[], |_, dial| {
        let glued = [KEY.as_slice(), b"R", OTHER, b"R", KEY, b"R"].concat();
        // Several writes may by chance be read as one, but not each time.
        for _ in 0..50 {
            assert_eq!(dial().send(&glued).read_once(), "OOO");
        }
    });
}

#[test]
fn waiters_are_told_of_the_release_and_ask_again() {
    on_both(&[], |daemon, dial| {
        let mut owner = dial();
        owner.send(KEY).expect("O");
        let mut waiters: Vec<_> = (0..3).map(|_| dial()).collect();
        for waiter in &mut waiters {
            waiter.send(KEY);
        }
        daemon.wait_for_logs("wait: ", 3);
        owner.send("R");
        for waiter in &mut waiters {
            waiter.expect("R");
        }
        // All are idle again, the owner too: the first to ask is the next owner.
        waiters[1].send(KEY).expect("O");
        owner.send(KEY);
        daemon.wait_for_logs("wait: ", 4);
        waiters[1].send("R");
        owner.expect("R");
    });
}

#[test]
fn an_owner_that_sends_anything_else_is_released_and_closed() {
    on_both(&[], |daemon, dial| {
        for (byte, round) in [0u8, b'O', b'r', b'\n', 255].into_iter().zip(1..) {
            let (mut owner, mut waiter) = (dial(), dial());
            owner.send(KEY).expect("O");
            waiter.send(KEY);
            daemon.wait_for_logs("wait: ", round);
            owner.send([byte]);
            owner.expect_closed();
            waiter.expect("R").send(KEY).expect("O");
            waiter.end();
            waiter.expect_closed();
        }
    });
}

#[test]
fn an_owner_that_ends_its_stream_is_released() {
    on_both(&[], |daemon, dial| {
        let (mut owner, mut waiter) = (dial(), dial());
        owner.send(KEY).expect("O");
        waiter.send(KEY);
        daemon.wait_for_log("wait: ");
        drop(owner);
        waiter.expect("R");
    });
}

#[test]
fn a_waiter_that_sends_anything_is_closed() {
    on_both(&[], |_, dial| {
        let mut owner = dial();
        owner.send(KEY).expect("O");
        for glued in ["R", "x", "0123456789abcdef"] {
            let mut waiter = dial();
            waiter.send([KEY.as_slice(), glued.as_bytes()].concat());
            waiter.expect_closed();
        }
        // It has done the owner no harm.
        owner.send("R").send(KEY).expect("O");
    });
}

#[test]
fn clients_may_die_in_every_state() {
    on_both(&[], |daemon, dial| {
        let mut owner = dial();
        owner.send(KEY).expect("O");
        drop(dial());
        dial().send(&KEY[..7]);
        dial().send(OTHER).expect("O");
        dial().send(KEY);
        daemon.wait_for_logs("close: ", 4);
        dial().send(OTHER).expect("O");
        owner.send("R").send(KEY).expect("O");
    });
}

#[test]
fn an_owner_that_holds_for_too_long_is_released_and_closed() {
    on_both(&["-t", "0.1"], |daemon, dial| {
        let (mut owner, mut waiter) = (dial(), dial());
        owner.send(KEY).expect("O");
        waiter.send(KEY);
        owner.expect_closed();
        waiter.expect("R");
        daemon.wait_for_log("expire: ");
        waiter.send(KEY).expect("O");
    });
}

#[test]
fn a_limit_of_zero_is_no_limit() {
    // For how many milliseconds the daemon waits at the most for something to happen, while a lock is held.
    let wait_ms = |options: &[&str]| {
        let daemon = Daemon::with(options);
        let mut owner = daemon.wire();
        owner.send(KEY).expect("O");
        // The number of the system call and its arguments, of which epoll_wait(2) takes the time as its fourth.
        let call = format!("/proc/{}/syscall", daemon.pid());
        wait_for("the daemon to wait", || {
            let call = fs::read_to_string(&call).unwrap();
            let wait = call.split(' ').nth(4)?.strip_prefix("0x")?;
            Some(u64::from_str_radix(wait, 16).unwrap() as i32)
        })
    };
    assert_eq!(wait_ms(&["-t", "0"]), -1, "for ever");
    assert!((1..=7_000).contains(&wait_ms(&["-t", "7"])));
    assert!((7_001..=30_000).contains(&wait_ms(&[])), "the default");
}

#[test]
fn ten_thousand_clients_hold_and_thousands_wait() {
    const HOLDERS: u32 = 7_000;
    const WAITERS: usize = 3_000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    assert!(hard > 11_000, "this needs 11,000 descriptors, and the hard limit is {hard}");

    let daemon = Daemon::start();
    let mut holders: Vec<_> = (0..HOLDERS)
        .map(|number| {
            let mut holder = daemon.wire();
            let mut key = [7; 16];
            key[..4].copy_from_slice(&number.to_le_bytes());
            holder.send(key).expect("O");
            holder
        })
        .collect();
    let mut waiters: Vec<_> = (0..WAITERS).map(|_| daemon.wire()).collect();
    holders[0].send("R").send(KEY).expect("O");
    for waiter in &mut waiters {
        waiter.send(KEY);
    }
    let id = "30313233343536373839616263646566";
    let waiting =
        || daemon.status().into_iter().find(|lock| lock["id"] == id).map(|lock| lock["waiting"].clone());
    wait_until("all waiters", || waiting() == Some(WAITERS.into()));
    holders[0].send("R");
    for waiter in &mut waiters {
        waiter.expect("R");
    }
    // The others hold what they held.
    for holder in &mut holders[1..] {
        holder.send("R").send(OTHER);
    }
    holders[1].expect("O");
}
