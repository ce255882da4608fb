//! More clients than the daemon, or one user, may have; and what clients leave behind.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{
    Daemon, KMUTEX, PREAMBLE, Process, TIMEOUT, Wire, finish, open_process, send_with, tool, wait_until,
};
use crate::other_user::OtherUser;

const PING: &str = r#"{"type":"ping"}"#;
const FULL: &str = "the daemon serves as many clients as it can";

fn lock(key: &str) -> String {
    format!(r#"{{"type":"lock","key":"{key}"}}"#)
}

/// A process that runs until this is dropped, to leave locks to.
fn sleeper() -> Process {
    Process::spawn(Command::new("sleep").arg("1000").stdin(Stdio::null()).stdout(Stdio::null()))
}

/// Takes a lock for a process, and leaves it to that process.
fn leave_lock(daemon: &Daemon, key: &str, process: &Process) {
    let mut wire = daemon.wire();
    let pid = process.pid();
    let request = format!(r#"{{"type":"lock","key":"{key}","exec":true,"child":{pid}}}"#);
    wire.request_with(PREAMBLE, &request, pid).answer_of("hello");
    wire.answer_of("granted");
    drop(wire);
    wait_until("the process to hold the lock", || {
        daemon.status().iter().any(|lock| lock["key"] == key && lock["holders"][0]["pid"] == pid.as_raw())
            && daemon.log().matches("lives and keeps token").count() > 0
    });
}

#[test]
fn a_client_beyond_the_limit_is_told_and_exits_with_69() {
    let daemon = Daemon::with(&["-m", "2"]);
    let mut inside = [daemon.wire(), daemon.wire()];
    inside[0].open(&lock("k")).answer_of("granted");
    inside[1].open(PING).answer_of("pong");
    for options in [&["k"][..], &["-n", "k"], &["-w", "100", "k"], &["--queue", "other"]] {
        finish(daemon.run(options).args(["--", "true"])).assert_error(69, &[FULL]);
    }
    // A client of protocol 1 is disconnected.
    daemon.wire().send(b"0123456789abcdef").expect_closed();
    // Clients that say nothing do not keep others from being told.
    let silent: Vec<_> = (0..50).map(|_| daemon.wire()).collect();
    finish(&mut daemon.run(&["k", "--", "true"])).assert_error(69, &[FULL]);
    drop(silent);
    assert_eq!(daemon.log().matches("refused a connection").count(), 1, "it says so once");
    drop(inside);
    wait_until("room", || daemon.run(&["k", "--", "true"]).stderr(Stdio::null()).status().unwrap().success());
}

#[test]
#[ignore = "needs prlimit"]
fn of_two_that_would_run_once_the_second_does_not_run_because_the_daemon_is_full() {
    // With so few descriptors there is room for one connection.
    let folder = tempfile::tempdir().unwrap();
    let sock = folder.path().join("sock");
    let mut daemon = tool("prlimit");
    daemon.args(["--nofile=33:33", KMUTEX, "serve", "--no-log", "--ready-fd", "1", "--sock"]).arg(&sock);
    let mut daemon = Process::spawn(daemon.stdin(Stdio::null()).stdout(Stdio::piped()));
    daemon.wait_for_line("");
    let mut first = Wire::new(UnixStream::connect(&sock).unwrap());
    first.open(&lock("k")).answer_of("granted");
    let mut second = Command::new(KMUTEX);
    second.args(["run", "--sock"]).arg(&sock).args(["k", "--", "echo", "ran"]);
    finish(&mut second).assert_error(69, &[FULL]);
}

#[test]
fn at_the_limit_administrators_see_and_break_locks() {
    let daemon = Daemon::with(&["-m", "1"]);
    let mut holder = daemon.wire();
    holder.open(&lock("k")).answer_of("granted");
    assert_eq!(daemon.status()[0]["key"], "k");
    finish(&mut daemon.kmutex(&["break", "--yes", "k"])).assert_silent(0);
    holder.answer_of("lost");
    let mut limited = daemon.wire();
    let error = limited.open(&lock("k")).answer_of("error");
    assert_eq!(error["code"], "too_many");
    limited.expect_closed();
}

#[test]
#[ignore = "needs root"]
fn a_user_beyond_the_own_limit_is_told_and_others_are_served() {
    let daemon = Daemon::with(&["--mode", "666", "--max-per-uid", "2"]);
    crate::harness::open_to_all(daemon.folder());
    let user = OtherUser::new();
    let run = |key: &str| {
        let mut command = user.command(user.kmutex());
        let root = nix::unistd::Uid::effective();
        command.args(["run", &format!("--trust-uid={root}"), "--sock"]).arg(daemon.sock()).args([key, "--"]);
        command
    };
    let hold = |key: &str| {
        let mut command = run(key);
        let mut process = Process::spawn(
            command.args(["sh", "-c", "echo holding; exec sleep 1000"]).stdout(Stdio::piped()),
        );
        process.wait_for_line("holding");
        process
    };
    let holders = [hold("a"), hold("b")];
    finish(run("c").arg("true"))
        .assert_error(69, &["this user has as many connections as one user may have"]);
    finish(&mut daemon.run(&["c", "--", "true"])).assert_silent(0);
    for mut holder in holders {
        holder.signal(Signal::SIGTERM);
        assert_eq!(holder.wait(), 128 + 15);
    }
    wait_until("room", || run("c").arg("true").stderr(Stdio::null()).status().unwrap().success());
}

#[test]
fn locks_that_are_left_to_processes_count_as_connections() {
    let daemon = Daemon::with(&["-m", "3"]);
    let process = sleeper();
    for key in ["a", "b", "c"] {
        leave_lock(&daemon, key, &process);
    }
    finish(&mut daemon.run(&["d", "--", "true"])).assert_error(69, &[FULL]);
    // The end of the process gives back its locks and its room.
    drop(process);
    wait_until("room", || daemon.run(&["d", "--", "true"]).stderr(Stdio::null()).status().unwrap().success());
    assert!(daemon.status().is_empty());
}

#[test]
#[ignore = "needs prlimit"]
fn a_daemon_that_is_restarted_with_few_descriptors_starts_and_keeps_the_locks() {
    const LOCKS: usize = 60;
    let mut daemon = Daemon::start();
    let process = sleeper();
    for number in 0..LOCKS {
        leave_lock(&daemon, &format!("key {number}"), &process);
    }
    daemon.kill();
    let mut next = tool("prlimit");
    next.args([
        "--nofile=48:48",
        KMUTEX,
        "serve",
        "--no-log",
        "--ready-fd",
        "1",
        "--grace",
        "1000",
        "--sock",
    ]);
    let mut next = Process::spawn(next.arg(daemon.sock()).stdin(Stdio::null()).stdout(Stdio::piped()));
    next.wait_for_line("");
    assert_eq!(daemon.status().len(), LOCKS);
    finish(&mut daemon.run(&["other", "--", "true"])).assert_silent(0);
}

#[test]
fn a_command_that_leaves_a_process_behind_does_not_keep_its_connection_open() {
    let daemon = Daemon::with(&["-m", "4"]);
    let pids = daemon.folder().join("pids");
    for _ in 0..8 {
        let script = format!("sleep 1000 > /dev/null 2>&1 & echo $! >> {}", pids.display());
        finish(&mut daemon.run(&["--queue", "k", "--", "sh", "-c", &script])).assert_silent(0);
    }
    let pids = std::fs::read_to_string(pids).unwrap();
    assert_eq!(pids.lines().count(), 8);
    for pid in pids.lines() {
        kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
    }
}

#[test]
fn a_user_cannot_fill_the_log() {
    let daemon = Daemon::with(&["--log-level", "info"]);
    let mut wire = daemon.wire();
    wire.open(PING).answer_of("pong");
    let request = format!("{}\n{{\"type\":\"break\",\"key\":\"k\"}}\n", lock("k")).repeat(100);
    for _ in 0..100 {
        wire.send(&request);
        for _ in 0..100 {
            wire.answer_of("granted");
            wire.answer_of("lost");
            wire.answer_of("broken");
        }
    }
    let line = daemon.wait_for_log("more lines like that left out");
    assert!(line.contains("(Break, uid "), "{line}");
    let broken = daemon.log().matches("breaks the lock").count();
    assert!((1..100).contains(&broken), "{broken} lines of 10,000 breaks");
}

#[test]
fn a_stream_that_ends_with_a_reset_leaves_the_lock_to_the_command_too() {
    for unread_by in ["the daemon", "the client"] {
        let daemon = Daemon::start();
        let process = sleeper();
        let mut stream = UnixStream::connect(daemon.sock()).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let requests = format!(
            "{{\"type\":\"lock\",\"key\":\"k\",\"inherits\":true}}\n{{\"type\":\"child\",\"pid\":{}}}\n{PING}\n",
            process.pid()
        );
        let descriptor = open_process(process.pid());
        send_with(&stream, &[PREAMBLE, requests.as_bytes()].concat(), descriptor.as_fd());
        let mut answers = String::new();
        while !answers.contains("pong") {
            let mut buffer = [0; 4096];
            let bytes = stream.read(&mut buffer).unwrap();
            assert!(bytes > 0, "{answers}");
            answers.push_str(std::str::from_utf8(&buffer[..bytes]).unwrap());
        }
        assert!(answers.contains("granted"), "{answers}");
        match unread_by {
            // The answer that is not read makes the kernel reset the stream when it is closed (unix(7)).
            "the client" => {
                stream.write_all(format!("{PING}\n").as_bytes()).unwrap();
                wait_until("the answer", || {
                    nix::sys::socket::recv(
                        std::os::fd::AsRawFd::as_raw_fd(&stream),
                        &mut [0],
                        nix::sys::socket::MsgFlags::MSG_PEEK | nix::sys::socket::MsgFlags::MSG_DONTWAIT,
                    )
                    .is_ok()
                });
                drop(stream);
                daemon.wait_for_log("reset by peer");
            }
            // The daemon finds out when it sends the answer.
            _ => {
                kill(daemon.pid(), Signal::SIGSTOP).unwrap();
                stream.write_all(format!("{PING}\n").as_bytes()).unwrap();
                drop(stream);
                kill(daemon.pid(), Signal::SIGCONT).unwrap();
            }
        }
        daemon.wait_for_log("lives and keeps token");
        finish(&mut daemon.run(&["-n", "k", "--", "true"])).assert_silent(75);
        drop(process);
        finish(&mut daemon.run(&["--queue", "k", "--", "true"])).assert_silent(0);
    }
}
