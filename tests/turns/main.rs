//! No turn of the daemon's loop takes longer than 20 ms of processor time, whatever clients send.
//!
//! A binary of its own, because each scene needs nearly all descriptors that a process may have; so the scenes run one
//! after the other.
#![cfg(feature = "failpoints")]
#![allow(unreachable_pub)]

#[allow(dead_code)]
#[path = "../it/harness.rs"]
mod harness;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use harness::{Daemon, PREAMBLE, TIMEOUT, Wire};
use kmutex::journal::{ClusterLease, HoldRecord, Journal, Snapshot};
use kmutex::proto::{Key, Protocol, Token};
use kmutex::table::{HoldState, Terms, Timestamp};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The longest that a turn may take.
const TURN_MAX: Duration = Duration::from_millis(20);
/// For how long clients do their worst in each scene.
const SCENE: Duration = Duration::from_secs(2);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A daemon whose turns are measured.
struct Measured {
    daemon: Daemon,
    _turn: MutexGuard<'static, ()>,
}

impl Measured {
    fn start(options: &[&str]) -> Measured {
        Measured::with_journal(options, |_| {})
    }

    /// `prepare` may put a journal where the daemon looks for one.
    fn with_journal(options: &[&str], prepare: impl FnOnce(&Path)) -> Measured {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
        assert!(hard >= 18_000, "this needs 18,000 descriptors, and the hard limit is {hard}");
        let level: &[&str] = if options.contains(&"--log-level") { &[] } else { &["--log-level", "info"] };
        let options = [level, options].concat();
        let daemon = Daemon::made(&options, |command| {
            prepare(command.get_current_dir().expect("the daemon has a private folder"));
            command.env("KMUTEX_MEASURE_TURNS", "1")
        });
        Measured { daemon, _turn: turn }
    }

    /// Returns the longest turn so far.
    fn longest(&self) -> Duration {
        let log = self.daemon.log();
        let last = log.lines().filter_map(|line| line.split_once("longest turn: ")).next_back();
        let micros = last.expect("turns are measured").1.trim_end_matches(" us").parse().unwrap();
        Duration::from_micros(micros)
    }

    #[track_caller]
    fn assert_no_long_turn(&self) {
        let longest = self.longest();
        println!("the longest turn took {longest:?}");
        assert!(longest < TURN_MAX, "a turn took {longest:?}");
    }
}

/// Sends `requests` again and again on many connections, and reads what comes, until the scene is over.
fn flood(daemon: &Daemon, connections: usize, requests: &str) {
    let mut streams: Vec<UnixStream> = (0..connections)
        .map(|_| {
            let mut stream = UnixStream::connect(daemon.sock()).unwrap();
            stream.write_all(PREAMBLE).unwrap();
            stream.set_nonblocking(true).unwrap();
            stream
        })
        .collect();
    let end = Instant::now() + SCENE;
    let mut sent = vec![0; connections];
    let mut buffer = vec![0; 256 * 1024];
    let mut answers = 0;
    while Instant::now() < end {
        for (stream, sent) in streams.iter_mut().zip(&mut sent) {
            // Where the socket is full, or closed by the daemon, the next round goes on.
            if let Ok(bytes) = stream.write(&requests.as_bytes()[*sent..]) {
                *sent = (*sent + bytes) % requests.len();
            }
            answers += stream.read(&mut buffer).unwrap_or(0);
        }
    }
    assert!(answers > connections * 16, "the daemon answers the flood");
}

/// Counts the lines of a status that is read to its end.
fn lines_to_the_end(stream: &mut UnixStream) -> u64 {
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let end = b"{\"type\":\"end\"}\n";
    let (mut buffer, mut last, mut lines) = (vec![0; 256 * 1024], Vec::new(), 0);
    while !last.ends_with(end) {
        let bytes = stream.read(&mut buffer).unwrap();
        assert!(bytes > 0, "the daemon closed");
        lines += buffer[..bytes].iter().filter(|&&byte| byte == b'\n').count() as u64;
        last.extend_from_slice(&buffer[..bytes]);
        last.drain(..last.len().saturating_sub(end.len()));
    }
    lines
}

fn hold(daemon: &Daemon, request: &str) -> Wire<UnixStream> {
    let mut wire = daemon.wire();
    wire.open(request).answer_of("granted");
    wire
}

#[test]
#[ignore = "takes seconds of full load and nearly all descriptors"]
fn pipelined_status_requests_of_many_clients_do_not_stall_it() {
    let scene = Measured::start(&[]);
    let note = "n".repeat(250);
    let lock = format!(
        r#"{{"type":"lock","key":"k","slots":100,"who":{{"note":"{note}","host":"{note}","command":"{note}"}}}}"#
    );
    let _holders: Vec<_> = (0..12).map(|_| hold(&scene.daemon, &lock)).collect();
    flood(&scene.daemon, 64, &"{\"type\":\"status\",\"key\":\"k\"}\n".repeat(600));
    flood(&scene.daemon, 64, &"{\"type\":\"status\"}\n".repeat(600));
    scene.assert_no_long_turn();
}

#[test]
#[ignore = "takes seconds of full load and nearly all descriptors"]
fn a_client_that_reads_nothing_makes_it_keep_little() {
    let scene = Measured::start(&[]);
    let note = "n".repeat(250);
    let lock = format!(
        r#"{{"type":"lock","key":"k","slots":100,"who":{{"note":"{note}","host":"{note}","command":"{note}"}}}}"#
    );
    let _holders: Vec<_> = (0..12).map(|_| hold(&scene.daemon, &lock)).collect();
    let requests = "{\"type\":\"status\",\"key\":\"k\"}\n".repeat(600);
    let mut deaf: Vec<_> = (0..250).map(|_| UnixStream::connect(scene.daemon.sock()).unwrap()).collect();
    for stream in &mut deaf {
        stream.set_nonblocking(true).unwrap();
        stream.write_all(&[PREAMBLE, requests.as_bytes()].concat()).unwrap();
    }
    hold(&scene.daemon, r#"{"type":"lock","key":"of another client"}"#);
    let status = std::fs::read_to_string(format!("/proc/{}/status", scene.daemon.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 64 * 1024, "the daemon has had {peak} KiB");
    scene.assert_no_long_turn();
}

#[test]
#[ignore = "takes seconds of full load and nearly all descriptors"]
fn the_search_for_cycles_among_thousands_is_short() {
    const EACH: usize = 8_000;
    let scene = Measured::start(&[]);
    let daemon = &scene.daemon;
    let holder = r#"{"type":"lock","key":"many","mode":"queue","slots":8000}"#;
    let mut holders: Vec<_> = (0..EACH).map(|_| daemon.wire()).collect();
    let tokens: Vec<u64> = holders
        .iter_mut()
        .map(|wire| wire.open(holder).answer_of("granted")["token"].as_u64().unwrap())
        .collect();
    // Each waits, under a lock of its own, for the lock that all hold.
    let mut waiters: Vec<_> = (0..EACH).map(|_| daemon.wire()).collect();
    for (wire, token) in waiters.iter_mut().zip(&tokens) {
        wire.open(&format!(r#"{{"type":"lock","key":"many","mode":"queue","slots":8000,"within":{token}}}"#));
    }
    for wire in &mut waiters {
        let answer = wire.answer();
        assert!(answer["type"] == "waiting" || answer["type"] == "error", "{answer}");
    }
    let token = tokens[EACH / 2];
    let requests =
        format!("{{\"type\":\"lock\",\"key\":\"many\",\"mode\":\"queue\",\"slots\":2,\"within\":{token}}}\n");
    flood(daemon, 16, &requests.repeat(100));
    scene.assert_no_long_turn();
}

/// All of them are told at once. Waiters of both kinds, each with a request behind its first one.
#[test]
#[ignore = "takes seconds of full load and nearly all descriptors"]
fn the_end_of_a_run_that_thousands_wait_for_is_told_in_several_turns() {
    const EACH: usize = 8_000;
    let scene = Measured::start(&[]);
    let daemon = &scene.daemon;
    let mut holder = hold(daemon, r#"{"type":"lock","key":"run"}"#);
    let mut waiters: Vec<_> = (0..EACH).map(|_| daemon.wire()).collect();
    for wire in &mut waiters {
        wire.open(r#"{"type":"lock","key":"run"}"#).answer_of("waiting");
    }
    // A client that sends more requests behind its release is answered in order.
    holder.send(
        [r#"{"type":"release"}"#, r#"{"type":"lock","key":"run"}"#, r#"{"type":"ping"}"#, ""].join("\n"),
    );
    for answer in ["released", "granted", "pong"] {
        holder.answer_of(answer);
    }
    for wire in &mut waiters {
        wire.answer_of("finished");
        // Each waits again, for the next run.
        wire.request(r#"{"type":"lock","key":"run"}"#);
    }
    for wire in &mut waiters {
        wire.answer_of("waiting");
    }
    // The holder vanishes, and so do half of the waiters, while the others are told who is next.
    drop(holder);
    waiters.truncate(EACH / 2);
    waiters[0].answer_of("granted");
    waiters[0].request(r#"{"type":"release"}"#).answer_of("released");
    for wire in &mut waiters[1..] {
        wire.answer_of("finished");
    }
    scene.assert_no_long_turn();
}

#[test]
#[ignore = "takes seconds of full load and nearly all descriptors"]
fn a_flood_of_connections_does_not_stall_it() {
    let scene = Measured::start(&[]);
    let end = Instant::now() + SCENE;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while Instant::now() < end {
                    let streams: Vec<_> =
                        (0..500).filter_map(|_| UnixStream::connect(scene.daemon.sock()).ok()).collect();
                    for mut stream in streams {
                        // The daemon may be behind; what counts is that it has much to do.
                        let _ = stream.write_all(&[PREAMBLE, &b"{\"type\":\"ping\"}\n"[..]].concat());
                    }
                }
            });
        }
    });
    hold(&scene.daemon, r#"{"type":"lock","key":"of another client"}"#);
    scene.assert_no_long_turn();
}

#[test]
#[ignore = "takes seconds of full load and nearly all descriptors"]
fn twenty_thousand_locks_are_listed_to_fifty_readers() {
    const LOCKS: u64 = 20_000;
    let scene = Measured::with_journal(&["--grace", "600"], |folder| {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let boot = u128::from_str_radix(&boot.trim().replace('-', ""), 16).unwrap().to_be_bytes();
        // No process holds them, so they stay held until the time is up.
        let records: Vec<HoldRecord> = (1..=LOCKS)
            .map(|number| HoldRecord {
                held: HoldState {
                    lock: Key::new(format!("key {number}")).unwrap().id(),
                    token: Token(number),
                    terms: Terms { protocol: Protocol::V2, ..Terms::V1 },
                    nonce: None,
                    uid: None,
                    until: None,
                },
                pid: None,
                child: None,
                granted: Timestamp(1),
                recorded: Timestamp(1),
            })
            .collect();
        Journal::create(
            &folder.join("sock.journal"),
            boot,
            ClusterLease::Local,
            &Snapshot { holds: records, runs: Vec::new() },
        )
        .unwrap();
    });
    let mut readers: Vec<_> = (0..50).map(|_| UnixStream::connect(scene.daemon.sock()).unwrap()).collect();
    for reader in &mut readers {
        reader.write_all(&[PREAMBLE, &b"{\"type\":\"status\"}\n"[..]].concat()).unwrap();
    }
    for reader in &mut readers {
        // The greeting, the locks and the end.
        assert_eq!(lines_to_the_end(reader), LOCKS + 2);
    }
    scene.assert_no_long_turn();
}

#[test]
#[ignore = "takes seconds of full load and nearly all descriptors"]
fn a_flood_of_what_is_logged_does_not_stall_it() {
    let requests = "{\"type\":\"lock\",\"key\":\"k\"}\n{\"type\":\"break\",\"key\":\"k\"}\n".repeat(300);
    let scene = Measured::start(&[]);
    flood(&scene.daemon, 64, &requests);
    scene.assert_no_long_turn();
    drop(scene);
    let scene = Measured::start(&["--log-level", "debug"]);
    flood(&scene.daemon, 64, &requests);
    scene.assert_no_long_turn();
}
