//! The daemon as a service: the units, sockets that are listened on already, telling that it serves.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::harness::{Daemon, KMUTEX, Process, TIMEOUT, Wire, finish, tool, wait_for, wait_until};

const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/systemd");
const KEY: &[u8; 16] = b"0123456789abcdef";

/// The units, with the path of the program under test.
fn units() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["kmutex.service", "kmutex.socket"] {
        let unit = fs::read_to_string(Path::new(UNITS).join(name)).unwrap();
        fs::write(folder.path().join(name), unit.replace("/usr/local/bin/kmutex", KMUTEX)).unwrap();
    }
    folder
}

#[test]
#[ignore = "needs systemd's tools"]
fn systemd_finds_nothing_wrong_with_the_units() {
    let folder = units();
    let mut verify = tool("systemd-analyze");
    verify
        .args(["verify", "--man=no"])
        .args(["kmutex.service", "kmutex.socket"].map(|name| folder.path().join(name)));
    let output = verify.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
}

#[test]
#[ignore = "needs systemd's tools"]
fn the_service_is_as_closed_as_it_can_be() {
    let folder = units();
    let mut security = tool("systemd-analyze");
    // Tenths of systemd's measure, of which 100 is the most exposed.
    security.args(["security", "--offline=true", "--threshold=15", "--no-pager"]);
    let output = security.arg(folder.path().join("kmutex.service")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Everything that the unit's command line says is there to be said.
#[test]
fn the_services_command_line_is_understood() {
    let unit = fs::read_to_string(Path::new(UNITS).join("kmutex.service")).unwrap();
    let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let args: Vec<&str> = line.split_whitespace().skip(1).collect();
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(KMUTEX);
    command.args(args).args(["--idle-exit", "0", "--sock", "s"]).current_dir(folder.path());
    assert_eq!(Process::spawn(command.stderr(Stdio::null())).wait(), 0);
}

#[test]
fn it_serves_an_inherited_socket_and_a_restart_loses_no_lock() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let notify = UnixDatagram::bind(path("notify")).unwrap();
    notify.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut manager = tool("perl");
    manager.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/activate.pl"));
    manager.args([path("sock"), path("notify"), path("log")]).args([KMUTEX, "serve", "--log-level", "debug"]);
    let mut manager = Process::spawn(manager.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let mut start = || {
        writeln!(manager.child.stdin.as_mut().unwrap()).unwrap();
        manager.line().unwrap();
        let mut message = [0; 100];
        let bytes = notify.recv(&mut message).unwrap();
        assert_eq!(&message[..bytes], b"READY=1\n");
    };
    let kmutex = |args: &[&str]| {
        let mut command = Command::new(KMUTEX);
        command.args(args).env("KMUTEX_SOCK", path("sock")).stdin(Stdio::piped());
        command
    };
    start();
    let mut command = kmutex(&["run", "k", "--", "sh", "-c", "echo running; read line; exit 6"]);
    let mut run = Process::spawn(command.stdout(Stdio::piped()));
    run.wait_for_line("running");
    start();
    assert_eq!(kmutex(&["run", "-n", "k", "true"]).status().unwrap().code(), Some(75));
    wait_until("the holder to resume", || {
        let status = kmutex(&["status", "--json"]).output().unwrap();
        !String::from_utf8_lossy(&status.stdout).contains("orphan")
    });
    drop(run.child.stdin.take());
    assert_eq!(run.wait(), 6);
    drop(manager.child.stdin.take());
    assert_eq!(manager.wait(), 0);
    assert!(path("sock").exists(), "it is not the daemon's to remove");
}

#[test]
#[ignore = "needs systemd's tools"]
fn systemds_own_activation_works() {
    let folder = tempfile::tempdir().unwrap();
    let sock = folder.path().join("sock");
    let mut activate = tool("systemd-socket-activate");
    activate.arg("--listen").arg(&sock).args([KMUTEX, "serve"]).stderr(Stdio::null());
    let mut daemon = Process::spawn(&mut activate);
    let stream = wait_for("the socket", || UnixStream::connect(&sock).ok());
    Wire::new(stream).send(KEY).expect("O");
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
    assert!(sock.exists());
}

#[test]
fn it_tells_on_a_descriptor_that_it_serves() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("exec {KMUTEX} serve --no-log --ready-fd 5 --sock s 5>&1 >/dev/null");
    let mut command = Command::new("sh");
    command.args(["-c", &script]).current_dir(folder.path()).stdout(Stdio::piped());
    let mut daemon = Process::spawn(&mut command);
    let mut said = String::new();
    // To its end: it is closed when it has been written to.
    daemon.child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "\n");
    Wire::new(UnixStream::connect(folder.path().join("s")).unwrap()).send(KEY).expect("O");
}

#[test]
fn a_descriptor_that_is_not_open_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(KMUTEX);
    let output =
        command.args(["serve", "--no-log", "--ready-fd", "77", "--sock", "s"]).current_dir(folder.path());
    let output = output.output().unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(64), "{line}");
    assert_eq!(line, "kmutex: bad --ready-fd 77: Bad file descriptor\n");
    assert!(!folder.path().join("s").exists());
}

#[test]
fn one_user_may_have_only_so_many_connections() {
    let daemon = Daemon::with(&["--max-per-uid", "2"]);
    let (mut one, mut two) = (daemon.wire(), daemon.wire());
    one.send(KEY).expect("O");
    two.send(KEY);
    daemon.wait_for_log("wait: ");
    for _ in 0..2 {
        daemon.wire().send(KEY).expect_closed();
    }
    daemon.wait_for_log("has too many");
    assert_eq!(daemon.log().matches("has too many").count(), 1, "it says so once");
    finish(&mut daemon.run(&["other", "true"])).assert_error(69, &["this user has as many connections"]);
    // One that goes makes room.
    drop(one);
    two.expect("R");
    daemon.wait_for_log("close: ");
    wait_until("room", || daemon.run(&["other", "true"]).status().unwrap().code() == Some(0));
}
