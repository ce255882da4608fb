//! A daemon that is started automatically serves all callers: it has nothing of what the first one happened to have.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::KMUTEX;
use crate::harness::{Autostarted, Process, finish, wait_for, wait_until};

struct Place {
    folder: tempfile::TempDir,
    _stop: Autostarted,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        let _stop = Autostarted(folder.path().join("sock"));
        Place { folder, _stop }
    }

    /// A shell script with a copy of the program as `./kmutex`.
    fn sh(&self, script: &str) -> Command {
        let program = self.folder.path().join("kmutex");
        if !program.exists() {
            // By another process: a file that this one has open for writing cannot be executed by its children.
            finish(Command::new("cp").arg(KMUTEX).arg(&program)).assert_silent(0);
        }
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env("KMUTEX_SOCK", self.folder.path().join("sock"));
        command
    }

    fn daemon(&self) -> Pid {
        let read = || fs::read_to_string(self.folder.path().join("sock.lock")).ok()?.trim().parse().ok();
        Pid::from_raw(wait_for("the daemon's pid", read))
    }
}

fn proc(pid: Pid, name: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap()
}

fn field(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("{name} in {text}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn signals_that_the_first_caller_ignores_or_blocks_have_their_usual_meanings() {
    let place = Place::new();
    let block =
        r#"use POSIX; my $s = POSIX::SigSet->new; $s->fillset; sigprocmask(SIG_BLOCK, $s); exec @ARGV"#;
    let script = format!(
        "trap '' HUP INT QUIT TERM USR1 USR2 CHLD ALRM XFSZ TSTP TTOU; exec perl -e '{block}' ./kmutex run k -- true"
    );
    finish(&mut place.sh(&script)).assert_silent(0);
    let status = proc(place.daemon(), "status");
    // Rust's runtime ignores SIGPIPE, and the C library two signals of its own, 32 and 33.
    let ignored = u64::from_str_radix(&field(&status, "SigIgn:"), 16).unwrap();
    assert_eq!(ignored & !0x1_8000_1000, 0, "{ignored:x}");
    assert_eq!(field(&status, "SigBlk:"), "0000000000000000");
    kill(place.daemon(), Signal::SIGTERM).unwrap();
    wait_until("its end", || !place.folder.path().join("sock").exists());
}

#[test]
fn a_first_caller_that_ignores_sigchld_gets_its_lock() {
    let place = Place::new();
    let said = finish(&mut place.sh("trap '' CHLD; exec ./kmutex run k -- echo ran"));
    assert_eq!(said.assert_silent(0), "ran\n");
    // And is told what is wrong, if something is.
    let script = "trap '' CHLD; exec ./kmutex run --sock /nowhere/sock k -- true";
    finish(&mut place.sh(script)).assert_error(69, &["/nowhere/sock", "No such file"]);
}

#[test]
#[ignore = "needs root, which may raise a priority"]
fn limits_priority_folder_and_environment_are_not_the_first_callers() {
    let place = Place::new();
    let script = "ulimit -S -f 1; ulimit -S -n 40; ulimit -S -t 100; ulimit -S -v 4000000; export SECRET=1 KMUTEX_TOKEN=5; cd /usr; exec nice -n 7 \"$OLDPWD/kmutex\" run k -- true";
    finish(&mut place.sh(script)).assert_silent(0);
    let daemon = place.daemon();
    let limits = proc(daemon, "limits");
    for limit in ["Max file size", "Max cpu time", "Max address space", "Max open files"] {
        let line = field(&limits, limit);
        let mut values = line.split(' ');
        assert_eq!(values.next(), values.next(), "{limit}: {line}");
    }
    let stat = proc(daemon, "stat");
    let nice = stat.rsplit_once(") ").unwrap().1.split(' ').nth(16).unwrap();
    assert_eq!(nice, "0", "the tests run as root, which may raise a priority");
    assert_eq!(fs::read_link(format!("/proc/{daemon}/cwd")).unwrap().to_str(), Some("/"));
    let environment = proc(daemon, "environ");
    let names: Vec<&str> =
        environment.split_terminator('\0').map(|entry| entry.split('=').next().unwrap()).collect();
    assert_eq!(names, ["PATH"]);
}

#[test]
fn after_an_upgrade_clients_start_the_new_program() {
    let place = Place::new();
    let mut run = place.sh("exec ./kmutex run k -- sh -c 'echo running; read line'");
    let mut run = Process::spawn(run.stdin(Stdio::piped()).stdout(Stdio::piped()));
    run.wait_for_line("running");
    let first = place.daemon();
    // As package managers do.
    finish(&mut place.sh("cp kmutex new && mv new kmutex")).assert_silent(0);
    kill(first, Signal::SIGKILL).unwrap();
    wait_until("another daemon", || place.daemon() != first);
    let exe = fs::read_link(format!("/proc/{}/exe", place.daemon())).unwrap();
    assert_eq!(exe, place.folder.path().join("kmutex"));
    // Where the program has gone and nothing took its place, the one that runs goes on.
    let second = place.daemon();
    fs::remove_file(place.folder.path().join("kmutex")).unwrap();
    kill(second, Signal::SIGKILL).unwrap();
    wait_until("a third daemon", || place.daemon() != second);
    drop(run.child.stdin.take());
    run.wait();
}
