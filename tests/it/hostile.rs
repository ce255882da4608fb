//! Daemons that flood, trickle, break off or say nothing: no client waits longer for them than it meant to, and signals reach
//! the command all the same.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::{KMUTEX, Process, finish};

/// Far less than for ever, on a busy machine too.
const SOON: Duration = Duration::from_secs(20);
const HELLO: &str = r#"{"type":"hello","version":"9","pid":1}"#;
const WAITING: &str = r#"{"type":"waiting","holders":[],"ahead":0,"place":1}"#;
const GRANTED: &str = r#"{"type":"granted","token":1}"#;
const PONG: &str = r#"{"type":"pong"}"#;
const LOCK: &str = r#"{"type":"lock","key":"k","id":"00","holders":[],"holding":0,"waiters":[],"waiting":0}"#;

/// What a daemon does with each connection, after the request.
type Serve = fn(&mut UnixStream) -> io::Result<()>;

/// A daemon that does the same with each connection, and ends with the test.
struct FakeDaemon {
    folder: tempfile::TempDir,
}

impl FakeDaemon {
    fn start(serve: Serve) -> FakeDaemon {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("sock")).unwrap();
        let serve = Arc::new(serve);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, serve) = (stream.unwrap(), serve.clone());
                // The client closes when it has had enough.
                std::thread::spawn(move || read_request(&mut stream).and_then(|()| serve(&mut stream)));
            }
        });
        FakeDaemon { folder }
    }

    fn kmutex(&self, args: &[&str]) -> Command {
        let mut command = Command::new(KMUTEX);
        command.args(args).env("KMUTEX_SOCK", self.folder.path().join("sock")).current_dir(&self.folder);
        command.stdin(Stdio::null());
        command
    }
}

/// Tries each of these daemons, all at the same time.
fn each(daemons: &[(&str, Serve)], attempt: impl Fn(&str, &FakeDaemon) + Sync) {
    std::thread::scope(|scope| {
        for (what, serve) in daemons {
            scope.spawn(|| attempt(what, &FakeDaemon::start(*serve)));
        }
    });
}

fn read_request(stream: &mut UnixStream) -> io::Result<()> {
    stream.read(&mut [0; 4096]).map(drop)
}

fn line(stream: &mut UnixStream, text: &str) -> io::Result<()> {
    stream.write_all(format!("{text}\n").as_bytes())
}

/// Sends the same lines again and again, as fast as the client reads.
fn flood(stream: &mut UnixStream, text: &str) -> io::Result<()> {
    let many = format!("{text}\n").repeat(200);
    loop {
        stream.write_all(many.as_bytes())?;
    }
}

/// Sends a line that never ends, one byte at a time.
fn trickle(stream: &mut UnixStream) -> io::Result<()> {
    stream.write_all(b"{\"type\":\"")?;
    loop {
        stream.write_all(b"a")?;
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn say_nothing(stream: &mut UnixStream) -> io::Result<()> {
    stream.read_to_end(&mut Vec::new()).map(drop)
}

/// How daemons may behave, with a name for the failure of a test.
const DAEMONS: [(&str, Serve); 8] = [
    ("floods with waiting", |s| line(s, HELLO).and_then(|()| flood(s, WAITING))),
    ("floods with locks", |s| line(s, HELLO).and_then(|()| flood(s, LOCK))),
    ("floods with ends", |s| line(s, HELLO).and_then(|()| flood(s, r#"{"type":"end"}"#))),
    ("trickles", |s| line(s, HELLO).and_then(|()| trickle(s))),
    ("trickles from the beginning", trickle),
    ("says half a line", |s| s.write_all(&HELLO.as_bytes()[..20]).and_then(|()| say_nothing(s))),
    ("lets wait and closes", |s| line(s, HELLO).and_then(|()| line(s, WAITING))),
    ("says nothing", say_nothing),
];

#[test]
fn a_request_that_does_not_wait_ends_within_3_seconds_whatever_the_daemon_does() {
    each(&DAEMONS, |what, daemon| {
        let began = Instant::now();
        let ended = finish(&mut daemon.kmutex(&["run", "-n", "k", "true"]));
        assert_eq!(ended.code, 69, "a daemon that {what}: {ended:?}");
        // The machine may be busy.
        assert!(began.elapsed() < Duration::from_secs(8), "a daemon that {what}: {:?}", began.elapsed());
    });
}

#[test]
fn a_time_to_wait_ends_whatever_the_daemon_does() {
    each(&DAEMONS, |what, daemon| {
        let began = Instant::now();
        let ended = finish(&mut daemon.kmutex(&["run", "-w", "0.5", "k", "true"]));
        assert_eq!(ended.code, 75, "a daemon that {what}: {ended:?}");
        assert!(began.elapsed() < SOON, "a daemon that {what}");
    });
}

#[test]
fn no_other_command_waits_for_a_daemon_that_never_comes_to_the_point() {
    let commands = [&["status"][..], &["status", "k"], &["break", "--yes", "k"], &["forget", "k"]];
    each(&DAEMONS, |what, daemon| {
        // A status may be long.
        let commands = commands.iter().filter(|args| args[0] != "status" || !what.contains("locks"));
        for args in commands {
            let began = Instant::now();
            let ended = finish(&mut daemon.kmutex(args));
            let is_end = [0, 69, 76].contains(&ended.code);
            assert!(is_end && began.elapsed() < SOON, "{args:?}, a daemon that {what}: {ended:?}");
        }
    });
}

/// Daemons that grant the lock and then do not leave the client in peace.
const GRANTING: [(&str, Serve); 4] = [
    ("floods with pongs", |s| grant(s).and_then(|()| flood(s, PONG))),
    ("floods with unknown lines", |s| grant(s).and_then(|()| flood(s, LOCK))),
    ("trickles", |s| grant(s).and_then(|()| trickle(s))),
    ("closes", |s| grant(s)),
];

fn grant(stream: &mut UnixStream) -> io::Result<()> {
    line(stream, HELLO).and_then(|()| line(stream, GRANTED))
}

#[test]
fn signals_reach_the_command_whatever_the_daemon_does() {
    each(&GRANTING, |what, daemon| {
        let script = "trap 'exit 3' TERM; echo running; while :; do sleep 0.1; done";
        let mut command = daemon.kmutex(&["run", "k", "--", "sh", "-c", script]);
        let mut run = Process::spawn(command.stdout(Stdio::piped()).stderr(Stdio::null()));
        run.wait_for_line("running");
        let began = Instant::now();
        run.signal(Signal::SIGTERM);
        let code = run.wait();
        assert!(code == 3 || code == 74, "a daemon that {what}: {code}");
        assert!(began.elapsed() < SOON, "a daemon that {what}");
    });
}

#[test]
fn the_limit_of_a_hold_is_kept_whatever_the_daemon_does() {
    each(&GRANTING, |what, daemon| {
        let began = Instant::now();
        let ended = finish(&mut daemon.kmutex(&["run", "--max-hold", "0.5", "k", "--", "sleep", "1000"]));
        assert!(began.elapsed() < SOON, "a daemon that {what}");
        assert_ne!(ended.code, 0, "a daemon that {what}: {ended:?}");
    });
}

#[test]
fn a_lease_ends_in_time_while_the_daemon_floods() {
    let daemon = FakeDaemon::start(|stream| {
        line(stream, HELLO)?;
        line(stream, r#"{"type":"granted","token":1,"lease":{"good_ms":2000,"margin_ms":1000}}"#)?;
        flood(stream, PONG)
    });
    let began = Instant::now();
    let ended = finish(&mut daemon.kmutex(&["run", "k", "--", "sleep", "1000"]));
    assert_eq!(ended.code, 74, "{ended:?}");
    assert!((Duration::from_secs(1)..SOON).contains(&began.elapsed()), "{:?}", began.elapsed());
}
