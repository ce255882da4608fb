//! Every step of every client ends in time, also when the daemon does not even accept connections.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};

use crate::harness::{Daemon, KMUTEX, finish};

/// Far less than for ever, on a busy machine too.
const SOON: Duration = Duration::from_secs(20);

/// A socket that has as many waiting connections as it may have, none of which is ever accepted.
struct FullBacklog {
    folder: tempfile::TempDir,
    _sockets: Vec<OwnedFd>,
}

impl FullBacklog {
    fn new() -> FullBacklog {
        let folder = tempfile::tempdir().unwrap();
        let addr = UnixAddr::new(&folder.path().join("sock")).unwrap();
        let new = |flags| {
            socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | flags, None).unwrap()
        };
        let listener = new(SockFlag::empty());
        bind(listener.as_raw_fd(), &addr).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let mut sockets = vec![listener];
        loop {
            let client = new(SockFlag::SOCK_NONBLOCK);
            match connect(client.as_raw_fd(), &addr) {
                Ok(()) => sockets.push(client),
                Err(e) => {
                    assert_eq!(e, nix::Error::EAGAIN);
                    return FullBacklog { folder, _sockets: sockets };
                }
            }
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn kmutex(&self, args: &[&str]) -> Command {
        let mut command = Command::new(KMUTEX);
        command.args(args).current_dir(self.path()).env("KMUTEX_SOCK", self.path().join("sock"));
        command
    }
}

#[test]
#[ignore = "takes many seconds"]
fn a_full_backlog_keeps_no_client_for_longer_than_it_may_wait() {
    let full = FullBacklog::new();
    let silent: [&[&str]; 5] = [
        &["run", "-n", "k", "true"],
        &["run", "-n", "--no-autostart", "k", "true"],
        &["status"],
        &["break", "--yes", "k"],
        &["unlock", "k"],
    ];
    for args in silent {
        let began = Instant::now();
        finish(&mut full.kmutex(args)).assert_error(69, &["does not answer"]);
        assert!(began.elapsed() < SOON, "{args:?}");
    }
    let began = Instant::now();
    finish(&mut full.kmutex(&["run", "-w", "1", "k", "true"])).assert_silent(75);
    assert!((Duration::from_secs(1)..SOON).contains(&began.elapsed()));
    finish(&mut full.kmutex(&["serve", "--no-log"])).assert_error(75, &["another daemon does"]);
}

#[test]
#[ignore = "takes many seconds"]
fn a_daemon_that_was_stopped_keeps_no_client_for_longer_than_it_may_wait() {
    let daemon = Daemon::start();
    nix::sys::signal::kill(daemon.pid(), Signal::SIGSTOP).unwrap();
    let silent: [&[&str]; 2] = [&["run", "-n", "k", "true"], &["status"]];
    for args in silent {
        let began = Instant::now();
        finish(&mut daemon.kmutex(args)).assert_error(69, &["does not answer"]);
        assert!(began.elapsed() < SOON, "{args:?}");
    }
    finish(&mut daemon.kmutex(&["run", "-w", "1", "k", "true"])).assert_silent(75);
    nix::sys::signal::kill(daemon.pid(), Signal::SIGCONT).unwrap();
    finish(&mut daemon.run(&["k", "true"])).assert_silent(0);
}

/// The daemon cannot put it back while it is stopped.
#[test]
fn a_socket_that_was_deleted_under_its_daemon_is_named_with_the_daemons_pid() {
    let daemon = Daemon::start();
    nix::sys::signal::kill(daemon.pid(), Signal::SIGSTOP).unwrap();
    std::fs::remove_file(daemon.sock()).unwrap();
    let words =
        [format!("pid {}", daemon.pid()), "its socket is gone".into(), daemon.sock().display().to_string()];
    for args in [&["run", "k", "true"][..], &["run", "--no-autostart", "k", "true"], &["status"]] {
        let began = Instant::now();
        let said = finish(&mut daemon.kmutex(args));
        assert!(began.elapsed() < Duration::from_secs(8), "{args:?}");
        said.assert_error(69, &words.each_ref().map(String::as_str));
    }
    nix::sys::signal::kill(daemon.pid(), Signal::SIGCONT).unwrap();
}
