//! `kmutex run` without a daemon starts one, and only one, that is detached from the caller and exits when it is idle.

use std::collections::HashSet;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::harness::*;

/// A socket path without a daemon. Dropping this kills the daemons that clients started there.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Place {
        Place { folder: tempfile::tempdir().unwrap() }
    }

    fn sock(&self) -> PathBuf {
        self.folder.path().join("sock")
    }

    /// `kmutex run` there.
    fn run(&self, args: &[&str]) -> Command {
        let mut command = Command::new(KMUTEX);
        command.arg("run").args(args).env("KMUTEX_SOCK", self.sock()).current_dir(self.folder.path());
        command.stdin(Stdio::null());
        command
    }

    /// A shell script with the program as `$KMUTEX`, there.
    fn shell(&self, script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).env("KMUTEX", KMUTEX).env("KMUTEX_SOCK", self.sock());
        command.current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    /// What `kmutex status --json` prints there. Empty if no daemon answers.
    fn status(&self) -> String {
        let mut command = Command::new(KMUTEX);
        command.args(["status", "--json"]).env("KMUTEX_SOCK", self.sock());
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    }

    /// Returns all processes whose command line says that they serve this place.
    fn daemons(&self) -> Vec<Pid> {
        let sock = self.sock();
        let serves = |pid: &Pid| {
            let line = command_line(*pid);
            line.get(1).is_some_and(|word| word == "serve") && line.iter().any(|word| Path::new(word) == sock)
        };
        processes().into_iter().filter(serves).collect()
    }

    /// The one daemon that is there.
    fn daemon(&self) -> Pid {
        let daemons = self.daemons();
        let [daemon] = daemons[..] else { panic!("one daemon: {daemons:?}") };
        let lock_file = fs::read_to_string(self.folder.path().join("sock.lock")).unwrap();
        assert_eq!(lock_file.trim(), daemon.to_string(), "the lock file names it");
        let mut wire = Wire::new(UnixStream::connect(self.sock()).unwrap());
        wire.send([PREAMBLE, &b"{\"type\":\"ping\"}\n"[..]].concat());
        assert_eq!(wire.answer_of("hello")["pid"], daemon.as_raw(), "it answers");
        daemon
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for daemon in self.daemons() {
            // It may just have ended.
            let _ = kill(daemon, Signal::SIGKILL);
        }
    }
}

fn processes() -> Vec<Pid> {
    let names = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter_map(|name| name.parse().ok()).map(Pid::from_raw).collect()
}

/// Nothing, if the process has ended.
fn command_line(pid: Pid) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    text.split_terminator('\0').map(String::from).collect()
}

/// The fields of /proc/PID/stat behind the name: state, parent, group, session, terminal.
fn stat(pid: Pid) -> Vec<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.split_whitespace().map(String::from).collect()
}

#[test]
fn the_first_run_starts_a_daemon_and_the_next_ones_use_it() {
    let place = Place::new();
    assert_eq!(finish(&mut place.run(&["k", "echo", "it works"])).assert_silent(0), "it works\n");
    let daemon = place.daemon();
    for _ in 0..3 {
        finish(&mut place.run(&["k", "true"])).assert_silent(0);
    }
    assert_eq!(place.daemon(), daemon);
    let line = command_line(daemon);
    let idle = line.iter().position(|word| word == "--idle-exit").expect("it ends itself");
    assert_eq!(line[idle + 1], "60", "after a minute");
}

#[test]
fn fifty_at_the_same_moment_start_one_daemon_and_run_one_after_the_other() {
    let place = Place::new();
    // Each leaves before the next enters, or a line is out of order.
    let script = r#"echo "enter $$" >> log; echo "leave $$" >> log"#;
    let start = |_| {
        let mut command = place.run(&["--queue", "k", "sh", "-c", script]);
        Process::spawn(command.stderr(Stdio::piped()))
    };
    let mut clients: Vec<Process> = (0..50).map(start).collect();
    for client in &mut clients {
        assert_eq!(client.wait(), 0);
        assert_eq!(std::io::read_to_string(client.child.stderr.take().unwrap()).unwrap(), "");
    }
    place.daemon();
    let log = fs::read_to_string(place.folder.path().join("log")).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 100);
    for pair in lines.chunks(2) {
        let pid = pair[0].strip_prefix("enter ").unwrap_or_else(|| panic!("{log}"));
        assert_eq!(pair[1], format!("leave {pid}"), "{log}");
    }
}

#[test]
fn of_fifty_at_the_same_moment_one_does_the_work_and_the_others_hear_that_it_was_done() {
    let place = Place::new();
    let file = |name: &str| place.folder.path().join(name);
    // The command lasts until all the others wait for its end.
    let script = "echo ran >> log; until test -e go; do sleep 0.01; done";
    let start = |_| Process::spawn(&mut place.run(&["k", "sh", "-c", script]));
    let mut clients: Vec<Process> = (0..50).map(start).collect();
    wait_until("49 waiters", || place.status().contains(r#""waiting":49"#));
    fs::write(file("go"), "").unwrap();
    let mut codes: Vec<i32> = clients.iter_mut().map(Process::wait).collect();
    codes.sort_unstable();
    assert_eq!((codes[0], &codes[1..]), (0, &[79; 49][..]));
    assert_eq!(fs::read_to_string(file("log")).unwrap(), "ran\n");
    place.daemon();
}

#[test]
fn a_pipe_that_it_was_started_in_closes() {
    let place = Place::new();
    // All three are pipes whose ends would stay open if the daemon had them.
    let mut command = place.shell(r#""$KMUTEX" run k -- true; echo done >&2"#);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "done\n");
    place.daemon();
    let place = Place::new();
    let mut pipeline = place.shell(r#""$KMUTEX" run k -- echo through | cat"#);
    assert_eq!(finish(&mut pipeline).assert_silent(0), "through\n");
    place.daemon();
}

#[test]
fn it_inherits_nothing_from_its_starter() {
    let place = Place::new();
    let script = r#"
        exec 3</ 4</etc 5</usr 6</bin 7</tmp 8</var 9</proc
        cd /usr
        "$KMUTEX" run k -- true
    "#;
    let mut shell = Process::spawn(&mut place.shell(script));
    let sock = place.sock();
    let starter = shell.pid();
    assert_eq!(shell.wait(), 0);
    let daemon = place.daemon();
    assert_eq!(fs::read_link(format!("/proc/{daemon}/cwd")).unwrap(), Path::new("/"));
    let folder = fs::read_dir(format!("/proc/{daemon}/fd")).unwrap();
    for entry in folder.map(Result::unwrap) {
        let number: i32 = entry.file_name().to_str().unwrap().parse().unwrap();
        // The descriptor may be closed by now: a connection of this test.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.to_str().unwrap();
        let own = ["socket:", "anon_inode:", sock.to_str().unwrap()];
        // The claim on the socket (src/daemon/claim.rs) is in a directory that no other user can open.
        let claimed = ["/run/kmutex", "/tmp/kmutex-", sock.parent().unwrap().to_str().unwrap()];
        match number {
            0..=2 => assert_eq!(target, "/dev/null", "descriptor {number}"),
            _ => assert!(
                own.iter().chain(&claimed).any(|own| target.starts_with(own)),
                "descriptor {number} is {target}"
            ),
        }
    }
    let own_session = stat(Pid::this())[3].clone();
    let stat = stat(daemon);
    let (parent, session, terminal) = (&stat[1], &stat[3], &stat[4]);
    // (Its leader has ended, if the C library is musl: that daemon(3) forks twice, so that this process cannot even get a terminal.)
    assert_ne!(*session, own_session, "a session of its own");
    assert_eq!(terminal, "0", "and no terminal");
    assert_ne!(*parent, starter.to_string());
    assert_ne!(*parent, std::process::id().to_string(), "nor is it a child of this test");
}

#[test]
fn a_terminal_that_it_was_started_in_closes() {
    let place = Place::new();
    let mut command = Command::new("script");
    command.args(["-q", "-e", "-c", r#""$KMUTEX" run k -- sh -c 'test -t 0 && exit 3'"#, "typescript"]);
    command
        .env("KMUTEX", KMUTEX)
        .env("KMUTEX_SOCK", place.sock())
        .env("SHELL", "/bin/sh")
        .current_dir(place.folder.path());
    // Its output ends when no process has the terminal open any more.
    let mut process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    while process.line().is_some() {}
    assert_eq!(process.wait(), 3);
    assert_eq!(stat(place.daemon())[4], "0");
}

#[test]
fn a_command_that_kmutex_becomes_has_no_child_that_it_does_not_know() {
    let place = Place::new();
    let script = r#"$pid = wait; print "$pid ", scalar(() = split " ", `cat /proc/$$/task/$$/children`)"#;
    for option in ["-F", "-o"] {
        // `cat` itself is a child while it looks.
        assert_eq!(
            finish(&mut place.run(&[option, "k", "perl", "-e", script])).assert_silent(0),
            "-1 1",
            "{option}"
        );
        let daemon = place.daemon();
        kill(daemon, Signal::SIGKILL).unwrap();
        wait_until("the daemon to be gone", || place.daemons().is_empty());
    }
}

#[test]
fn none_is_started_when_that_is_not_wanted() {
    let place = Place::new();
    let sock = place.sock();
    finish(&mut place.run(&["--no-autostart", "k", "true"])).assert_error(69, &[sock.to_str().unwrap()]);
    assert_eq!(place.daemons(), []);
    assert_eq!(fs::read_dir(place.folder.path()).unwrap().count(), 0);
}

#[test]
fn none_is_started_on_tcp() {
    // The port of a client: while the client lives, no process can listen there.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let port = client.local_addr().unwrap().port().to_string();
    let place = Place::new();
    for sock in [port.clone(), format!("127.0.0.1:{port}"), format!("localhost:{port}")] {
        finish(&mut place.run(&["--sock", &sock, "k", "true"])).assert_error(69, &[&sock, "refused"]);
    }
    assert!(!processes().into_iter().any(|pid| command_line(pid).contains(&port)));
}

#[test]
fn the_socket_of_a_daemon_that_was_killed_is_replaced() {
    let place = Place::new();
    let mut seen = HashSet::new();
    for _ in 0..3 {
        finish(&mut place.run(&["k", "true"])).assert_silent(0);
        let daemon = place.daemon();
        assert!(seen.insert(daemon), "a new one");
        kill(daemon, Signal::SIGKILL).unwrap();
        wait_until("the daemon to be gone", || place.daemons().is_empty());
        assert!(place.sock().exists(), "it could not remove its socket");
    }
    // So it is when the lock file has gone too.
    fs::remove_file(place.folder.path().join("sock.lock")).unwrap();
    finish(&mut place.run(&["k", "true"])).assert_silent(0);
    place.daemon();
}

#[test]
fn a_run_that_does_not_wait_starts_a_daemon_too() {
    for option in [&["-n"][..], &["-w", "0"], &["-w", "30"]] {
        let place = Place::new();
        finish(&mut place.run(&[option, &["k", "true"]].concat())).assert_silent(0);
        place.daemon();
    }
}

#[test]
fn a_time_to_wait_goes_on_when_clients_start_another_daemon() {
    let place = Place::new();
    let mut holder = place.run(&["k", "--", "sh", "-c", "echo holding; read line; exit 0"]);
    let mut holder = Process::spawn(holder.stdin(Stdio::piped()).stdout(Stdio::piped()));
    holder.wait_for_line("holding");
    let first = place.daemon();
    let begun = Instant::now();
    let mut waiter = Process::spawn(&mut place.run(&["-w", "1.5", "k", "true"]));
    wait_until("the waiter", || place.status().contains(r#""waiting":1"#));
    kill(first, Signal::SIGKILL).unwrap();
    wait_until("another daemon", || matches!(place.daemons()[..], [daemon] if daemon != first));
    assert_eq!(waiter.wait(), 75);
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(1500), "{took:?}");
    drop(holder.child.stdin.take());
    assert_eq!(holder.wait(), 0);
}

#[test]
#[ignore = "takes many seconds"]
fn a_run_that_meets_a_daemon_that_is_just_ending_does_not_fail() {
    let place = Place::new();
    for round in 0..100 {
        // It serves for a moment; the runs come before, at, and after its end, from round to round.
        let mut serve = Command::new(KMUTEX);
        serve.args(["serve", "--detach", "--idle-exit", "0.003", "--sock"]).arg(place.sock());
        let code = finish(serve.stdin(Stdio::null())).code;
        assert!(code == 0 || code == 75, "{code}");
        for _ in 0..round * 3000 {
            std::hint::spin_loop();
        }
        for _ in 0..3 {
            finish(&mut place.run(&["k", "true"])).assert_silent(0);
        }
        // If one of the runs has started a daemon, that one would stay.
        for daemon in place.daemons() {
            // It may just have ended.
            let _ = kill(daemon, Signal::SIGTERM);
        }
    }
}

/// A daemon that dies while it starts may be an accident, so the client starts another one, but not for ever.
#[cfg(feature = "failpoints")]
#[test]
#[ignore = "takes many seconds"]
fn a_daemon_that_is_killed_whenever_it_starts_is_given_up() {
    let place = Place::new();
    let mut run = place.run(&["k", "true"]);
    finish(run.env("KMUTEX_FAILPOINT", "start:1")).assert_error(69, &["cannot connect"]);
    finish(&mut place.run(&["k", "true"])).assert_silent(0);
}
