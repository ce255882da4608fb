//! Clients and a daemon on several machines, each a network namespace: what becomes of a lock when one of the machines is cut off,
//! frozen, switched off or replaced. In each scene the old command has ended before the next one starts.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::etcd_harness::Place;
use crate::harness::{KMUTEX, Process, wait_for, wait_until};
use crate::net::{Cut, Net};

/// The peer timeout of the daemon.
const TIMEOUT: Duration = Duration::from_secs(6);
/// By when the next command has started.
const NEXT: Duration = Duration::from_secs(8);
/// For what depends on how busy the machine is.
const SLACK: Duration = Duration::from_secs(4);

const DAEMON: usize = 0;
const HOLDER: usize = 1;
const WAITER: usize = 2;
/// Not in use, until it replaces the daemon's machine.
const REPLACEMENT: usize = 3;

/// The daemon's machine, a holder's and a waiter's.
struct Scene {
    net: Net,
    folder: TempDir,
    daemon: Option<Process>,
    holder: Process,
    /// The holder's command.
    command: Pid,
    waiter: Process,
}

/// Says when it starts, and whether the process named in the file is still alive then.
const NEXT_COMMAND: &str = r#"
    state=$(sed -n 's/^State:.//p' "/proc/$(cat command)/status" 2> /dev/null || true)
    case $state in (''|Z*|X*) echo gone ;; (*) echo "alive: $state" ;; esac
"#;

impl Scene {
    /// The holder holds the lock, and the waiter waits for it.
    fn new() -> Scene {
        let (net, folder) = (Net::new(4), tempfile::tempdir().unwrap());
        leave_journal(&folder.path().join("journal"));
        let daemon = serve(&net.place(DAEMON), folder.path(), "journal");
        let script = "echo $$ > command.new; mv command.new command; echo holding; exec sleep 1000";
        let mut holder = run(&net, HOLDER, folder.path(), &["k", "--", "sh", "-c", script]);
        holder.wait_for_line("holding");
        let command = fs::read_to_string(folder.path().join("command")).unwrap();
        let waiter = run(&net, WAITER, folder.path(), &["--queue", "k", "--", "sh", "-c", NEXT_COMMAND]);
        let scene = Scene {
            net,
            folder,
            daemon: Some(daemon),
            holder,
            command: Pid::from_raw(command.trim().parse().unwrap()),
            waiter,
        };
        wait_until("the waiter", || scene.status().contains("\"waiting\":1"));
        scene
    }

    fn status(&self) -> String {
        let mut status = kmutex(&self.net, DAEMON, self.folder.path(), &["status", "--json"]);
        String::from_utf8(status.output().unwrap().stdout).unwrap()
    }

    /// The next command starts within the peer timeout and two seconds, and finds that the old one is gone.
    fn next_command_starts(&mut self, since: Instant) {
        let line = self.waiter.line();
        assert_eq!(line.as_deref(), Some("gone"), "the old command: {}", self.daemon_log());
        assert!(since.elapsed() < NEXT + SLACK, "{:?}: {}", since.elapsed(), self.daemon_log());
        assert_eq!(self.waiter.wait(), 0);
    }

    fn daemon_log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // It may have ended.
        let _ = kill(self.command, Signal::SIGKILL);
    }
}

/// Leaves a journal in which nothing is held, so that a daemon knows that there is nothing to wait for.
fn leave_journal(path: &Path) {
    let mut command = Command::new(KMUTEX);
    command.args(["serve", "--no-log", "--sock", "127.0.0.1:0", "--ready-fd", "1", "--state"]).arg(path);
    let mut daemon = Process::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()));
    daemon.wait_for_line("");
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
}

fn serve(place: &Place, folder: &Path, state: &str) -> Process {
    let mut command = place.tool("env");
    command.arg(KMUTEX).args(["serve", "--open", "--log-level", "debug", "--ready-fd", "1"]);
    command.args(["--peer-timeout", &TIMEOUT.as_secs().to_string(), "--state", state]);
    command.args(["--sock", &sock(place)]).current_dir(folder).stdin(Stdio::null()).stdout(Stdio::piped());
    let log = fs::OpenOptions::new().append(true).create(true).open(folder.join("log")).unwrap();
    let mut daemon = Process::spawn(command.stderr(log));
    daemon.wait_for_line("");
    daemon
}

fn sock(place: &Place) -> String {
    format!("{}:7000", place.address)
}

fn kmutex(net: &Net, host: usize, folder: &Path, args: &[&str]) -> Command {
    let mut command = net.place(host).tool("env");
    command.arg(KMUTEX).args(args).env("KMUTEX_SOCK", sock(&net.place(DAEMON))).current_dir(folder);
    command.stdin(Stdio::null());
    command
}

fn run(net: &Net, host: usize, folder: &Path, args: &[&str]) -> Process {
    let mut command = kmutex(net, host, folder, &[&["run"], args].concat());
    let log = fs::OpenOptions::new().append(true).create(true).open(folder.join("log")).unwrap();
    Process::spawn(command.stdout(Stdio::piped()).stderr(log))
}

#[test]
#[ignore = "needs root, for network namespaces"]
fn a_holder_that_is_cut_off_has_ended_its_command_before_the_next_one_starts() {
    let mut scene = Scene::new();
    let cut = Instant::now();
    scene.net.cut(HOLDER, Cut::Port);
    scene.next_command_starts(cut);
    assert_eq!(scene.holder.wait(), 74, "{}", scene.daemon_log());
}

#[test]
#[ignore = "needs root, for network namespaces"]
fn the_lock_of_a_machine_that_was_switched_off_is_free_after_the_peer_timeout() {
    let mut scene = Scene::new();
    let off = Instant::now();
    // Nothing of the end of its processes gets out.
    scene.net.cut(HOLDER, Cut::Port);
    kill(scene.command, Signal::SIGKILL).unwrap();
    scene.holder.signal(Signal::SIGKILL);
    scene.holder.wait();
    scene.next_command_starts(off);
}

#[test]
#[ignore = "needs root, for network namespaces"]
fn a_frozen_holder_stops_its_command_as_soon_as_it_wakes() {
    let mut scene = Scene::new();
    kill(scene.command, Signal::SIGSTOP).unwrap();
    scene.holder.signal(Signal::SIGSTOP);
    let frozen = Instant::now();
    let line = scene.waiter.line().unwrap();
    assert!(line.starts_with("alive: T"), "a frozen machine cannot end it: {line:?}");
    assert!(frozen.elapsed() < NEXT + SLACK, "{}", scene.daemon_log());
    let woken = Instant::now();
    kill(scene.command, Signal::SIGCONT).unwrap();
    scene.holder.signal(Signal::SIGCONT);
    assert_eq!(scene.holder.wait(), 74, "{}", scene.daemon_log());
    assert!(woken.elapsed() < Duration::from_secs(1) + SLACK, "{:?}", woken.elapsed());
}

/// Also the waiter keeps its place, although nothing tells it that its daemon is gone.
#[test]
#[ignore = "needs root, for network namespaces"]
fn when_the_daemons_machine_is_replaced_the_old_command_has_ended_before_the_next_one_starts() {
    let mut scene = Scene::new();
    scene.net.replace(DAEMON, REPLACEMENT);
    let replaced = Instant::now();
    let place = Place { address: scene.net.place(DAEMON).address, ..scene.net.place(REPLACEMENT) };
    scene.daemon = Some(serve(&place, scene.folder.path(), "journal of another machine"));
    // A client that comes first to the new daemon does not get ahead.
    let late = run(&scene.net, REPLACEMENT, scene.folder.path(), &["-n", "k", "true"]).wait();
    assert_eq!(late, 69, "it cannot be decided yet: {}", scene.daemon_log());
    scene.next_command_starts(replaced);
    assert_eq!(scene.holder.wait(), 74, "{}", scene.daemon_log());
}

#[test]
#[ignore = "needs root, for network namespaces"]
fn a_waiter_whose_machine_is_gone_leaves_the_line() {
    let scene = Scene::new();
    scene.net.cut(WAITER, Cut::Port);
    wait_until("the waiter's request is gone", || scene.status().contains("\"waiting\":0"));
}

/// Of protocol 1, and of a client that becomes the command, the kernel knows alone.
#[test]
#[ignore = "needs root, for network namespaces, and socat"]
fn a_lock_without_a_lease_ends_when_the_machine_is_gone() {
    let scene = Scene::new();
    let mut socat = scene.net.place(HOLDER).tool("socat");
    socat.args(["-", &format!("TCP:{}", sock(&scene.net.place(DAEMON)))]);
    let mut old = Process::spawn(socat.stdin(Stdio::piped()).stdout(Stdio::piped()));
    old.child.stdin.as_mut().unwrap().write_all(b"an old identity!").unwrap();
    let exec = ["-F", "exec", "--", "sh", "-c", "echo holding; exec sleep 1000"];
    let mut command = run(&scene.net, HOLDER, scene.folder.path(), &exec);
    command.wait_for_line("holding");
    wait_until("both hold", || scene.status().matches("\"holding\":1").count() == 3);
    scene.net.cut(HOLDER, Cut::Port);
    wait_until("neither holds", || !scene.status().contains("\"holding\":1,"));
}

#[test]
#[ignore = "needs root, for network namespaces"]
fn an_interruption_that_is_shorter_than_the_peer_timeout_harms_no_holder() {
    let mut scene = Scene::new();
    scene.net.cut(HOLDER, Cut::Port);
    // Half a ping interval.
    std::thread::sleep(TIMEOUT / 6);
    scene.net.restore(HOLDER, Cut::Port);
    let restored = Instant::now();
    wait_for("two peer timeouts", || (restored.elapsed() > 2 * TIMEOUT).then_some(()));
    assert!(scene.holder.is_running(), "{}", scene.daemon_log());
    kill(scene.command, Signal::SIGTERM).unwrap();
    assert_eq!(scene.holder.wait(), 128 + 15);
    assert_eq!(scene.waiter.line().as_deref(), Some("gone"));
}
