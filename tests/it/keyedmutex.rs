//! The daemon in the place of KeyedMutex's: with a client in another language, and under the old name.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::harness::{Daemon, KMUTEX, Process, Wire, tool, wait_until};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/keyedmutex.pl");

fn perl(sock: &str, args: &[&str]) -> Command {
    let mut command = tool("perl");
    command.arg(SCRIPT).arg(sock).args(args);
    command
}

/// A Perl client that is told what to do.
struct Talker(Process);

impl Talker {
    fn new(sock: &str) -> Talker {
        Talker(Process::spawn(perl(sock, &["talk"]).stdin(Stdio::piped()).stdout(Stdio::piped())))
    }

    fn say(&mut self, line: &str) {
        writeln!(self.0.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    fn ask(&mut self, line: &str) -> String {
        self.say(line);
        self.0.line().expect("the client has an answer to everything")
    }
}

#[test]
#[ignore = "takes many seconds"]
fn perl_clients_exclude_each_other() {
    let daemon = Daemon::with(&["--sock", "127.0.0.1:0"]);
    let line = daemon.wait_for_log("serving on 127.0.0.1:");
    let addr = line.rsplit(' ').next().unwrap();
    let (file, sock) = (daemon.folder().join("counter"), daemon.sock());
    fs::write(&file, "0").unwrap();
    let socks = [sock.to_str().unwrap(), addr, sock.to_str().unwrap(), addr];
    let counters =
        socks.map(|sock| Process::spawn(&mut perl(sock, &["count", file.to_str().unwrap(), "200"])));
    for mut counter in counters {
        assert_eq!(counter.wait(), 0);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "800");
}

#[test]
fn a_perl_client_is_told_that_another_was_here() {
    let daemon = Daemon::start();
    let sock = daemon.sock();
    let (mut first, mut second) = (Talker::new(sock.to_str().unwrap()), Talker::new(sock.to_str().unwrap()));
    assert_eq!(first.ask("lock report"), "owner");
    assert_eq!(first.ask("locked"), "yes");
    second.say("lock report");
    daemon.wait_for_log("wait: ");
    assert_eq!(first.ask("drop"), "dropped");
    assert_eq!(second.0.line().unwrap(), "another");
    assert_eq!(second.ask("lock report"), "owner");
}

#[test]
fn a_perl_client_and_kmutex_run_exclude_each_other() {
    let daemon = Daemon::start();
    let mut client = Talker::new(daemon.sock().to_str().unwrap());
    assert_eq!(client.ask("lock report"), "owner");
    assert_eq!(daemon.run(&["-n", "report", "true"]).status().unwrap().code(), Some(75));
    let mut waiter = Process::spawn(&mut daemon.run(&["report", "true"]));
    daemon.wait_for_log("wait: ");
    assert_eq!(client.ask("drop"), "dropped");
    assert_eq!(waiter.wait(), 79);

    let holder = daemon.hold("report");
    client.say("lock report");
    daemon.wait_for_logs("wait: ", 2);
    assert_eq!(holder.finish(0), 0);
    assert_eq!(client.0.line().unwrap(), "another");
}

#[test]
fn a_perl_client_connects_again_after_the_daemon_closed_it() {
    let daemon = Daemon::with(&["-t", "0.05"]);
    let mut client = Talker::new(daemon.sock().to_str().unwrap());
    assert_eq!(client.ask("lock report"), "owner");
    daemon.wait_for_log("expire: ");
    assert_eq!(client.ask("drop"), "dropped");
    assert_eq!(client.ask("lock report"), "owner");
    daemon.wait_for_logs("expire: ", 2);
    client.ask("drop");
    client.ask("reconnect 0");
    assert_eq!(client.ask("lock report"), "gone");
}

/// The binary under the old name, in a folder of its own.
fn keyedmutexd(args: &[&str]) -> (tempfile::TempDir, Command) {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("keyedmutexd");
    symlink(KMUTEX, &program).unwrap();
    let mut command = Command::new(program);
    command.args(args).current_dir(folder.path()).stdout(Stdio::piped());
    (folder, command)
}

#[test]
fn under_the_old_name_it_has_the_old_options_and_defaults() {
    for flag in ["--help", "-h"] {
        let (_folder, mut command) = keyedmutexd(&[flag]);
        let output = command.output().unwrap();
        assert!(output.status.success());
        let help = String::from_utf8(output.stdout).unwrap();
        for text in [
            "-f, --force",
            "-s, --socket <PATH|PORT>",
            "[default: /tmp/keyedmutexd.sock]",
            "-m, --maxconn <N>",
            "[default: 32]",
            "-t, --timeout <SECS>",
            "[default: 30]",
            "--no-log",
            "--version",
        ] {
            assert!(help.contains(text), "{text:?} is not in {help}");
        }
    }
    let (_folder, mut command) = keyedmutexd(&["--version"]);
    let output = command.output().unwrap();
    assert!(output.status.success());
    let version = String::from_utf8(output.stdout).unwrap();
    assert_eq!(version, concat!("keyedmutexd ", env!("CARGO_PKG_VERSION"), " (etcd)\n"));
    let (_folder, mut command) = keyedmutexd(&["--sock", "x"]);
    assert_eq!(command.output().unwrap().status.code(), Some(64), "it has no options of kmutex's");
}

#[test]
fn under_the_old_name_it_logs_each_event_to_standard_output() {
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        let (folder, mut command) = keyedmutexd(&["-f", "-s", "old.sock", "-m", "5", "-t", "9"]);
        let mut daemon = Process::spawn(&mut command);
        assert!(daemon.line().unwrap().contains("serving on"));
        let sock = folder.path().join("old.sock");
        let mut client = Talker::new(sock.to_str().unwrap());
        assert_eq!(client.ask("lock report"), "owner");
        for event in ["connect: ", "grant: "] {
            let line = daemon.line().unwrap();
            assert!(line.contains(event), "{line}");
        }
        daemon.signal(signal);
        assert_eq!(daemon.wait(), 0, "with a client connected");
        assert!(!sock.exists());
    }
}

#[test]
fn under_the_old_name_clients_beyond_the_limit_wait() {
    let (folder, mut command) = keyedmutexd(&["-s", "old.sock", "-m", "2"]);
    let mut daemon = Process::spawn(&mut command);
    assert!(daemon.line().unwrap().contains("serving on"));
    let sock = folder.path().join("old.sock");
    let wire = || Wire::new(UnixStream::connect(&sock).unwrap());
    let mut inside = [wire(), wire()];
    inside[0].send([7; 16]).expect("O");
    inside[1].send([7; 16]);
    let mut outside = wire();
    outside.send([8; 16]);
    while !daemon.line().unwrap().contains("not accepting: Full") {}
    drop(inside);
    outside.expect("O");
}

#[test]
fn under_the_old_name_it_can_be_silent() {
    let (folder, mut command) = keyedmutexd(&["-s", "old.sock", "--no-log"]);
    let mut daemon = Process::spawn(&mut command);
    let sock = folder.path().join("old.sock");
    wait_until("the socket", || sock.exists());
    // It is there before the loop is, which a signal ends in order.
    assert_eq!(Talker::new(sock.to_str().unwrap()).ask("lock report"), "owner");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
    assert_eq!(daemon.line(), None);
}
