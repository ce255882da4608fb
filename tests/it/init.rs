//! kmutex as PID 1, which the kernel treats differently: what nothing handles is dropped, and every orphan is its child. That is
//! what a container's ENTRYPOINT is.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::*;

/// `kmutex run ARGS...` as PID 1 of a namespace, and its process id here.
fn start(daemon: &Daemon, args: &[&str]) -> Process {
    let mut command = tool("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", KMUTEX, "run"]).args(args);
    command.current_dir(daemon.folder()).env("KMUTEX_SOCK", daemon.sock()).stdin(Stdio::null());
    Process::spawn(&mut command)
}

/// The one child of a process.
fn child_of(process: &Process) -> Pid {
    let children = format!("/proc/{pid}/task/{pid}/children", pid = process.pid());
    wait_for("the child", || Some(Pid::from_raw(fs::read_to_string(&children).ok()?.trim().parse().ok()?)))
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn a_wait_is_ended_by_a_signal() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let daemon = Daemon::start();
        let holder = daemon.hold("k");
        let mut process = start(&daemon, &["--queue", "k", "touch", "ran"]);
        daemon.wait_for_counts("k", 1, 1);
        kill(child_of(&process), signal).unwrap();
        assert_eq!(process.wait(), 128 + signal as i32);
        daemon.wait_for_counts("k", 1, 0);
        assert!(!daemon.folder().join("ran").exists());
        holder.finish(0);
    }
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn a_stop_of_the_container_reaches_the_command_and_its_status_is_told() {
    // As `docker stop` does: TERM to PID 1 alone.
    let scripts = [
        ("exec perl -e 'open F, q(>started); close F; sleep 1 while 1'", 143),
        ("trap 'exit 7' TERM; echo > started; while :; do sleep 0.01; done", 7),
    ];
    for (script, code) in scripts {
        for options in [&[][..], &["-o"], &["--tree"]] {
            let daemon = Daemon::start();
            let mut process = start(&daemon, &[options, &["k", "sh", "-c", script]].concat());
            wait_until("the command to run", || daemon.folder().join("started").exists());
            kill(child_of(&process), Signal::SIGTERM).unwrap();
            assert_eq!(process.wait(), code, "{options:?}: {script}");
            daemon.wait_for_counts("k", 0, 0);
        }
    }
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn every_signal_reaches_the_command() {
    let daemon = Daemon::start();
    let count = r#"use strict; open my $log, ">>", "signals" or die;
        $SIG{$_} = sub { syswrite $log, "$_[0]\n" } for qw(ALRM WINCH PWR USR1 HUP URG IO RTMIN NUM37);
        open my $started, ">", "started"; sleep 1 until -e "end"; exit 5"#;
    let mut process = start(&daemon, &["k", "perl", "-e", count]);
    wait_until("the command to run", || daemon.folder().join("started").exists());
    let signals = daemon.folder().join("signals");
    for (number, name) in [
        (14, "ALRM"),
        (28, "WINCH"),
        (30, "PWR"),
        (10, "USR1"),
        (1, "HUP"),
        (23, "URG"),
        (29, "IO"),
        (34, "RTMIN"),
        (37, "NUM37"),
    ] {
        finish(Command::new("kill").arg(format!("-{number}")).arg(child_of(&process).to_string()))
            .assert_silent(0);
        wait_until(name, || fs::read_to_string(&signals).unwrap().lines().any(|line| line == name));
    }
    fs::write(daemon.folder().join("end"), "").unwrap();
    kill(child_of(&process), Signal::SIGUSR1).unwrap();
    assert_eq!(process.wait(), 5);
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn orphans_are_reaped() {
    // Each is left behind by its parent at once, and ends.
    let script = r#"for i in 1 2 3 4 5 6 7 8; do sh -c 'true & true & exit'; done
        zombies() { for stat in /proc/[0-9]*/stat; do cat "$stat" 2>/dev/null; done | grep -c ' Z '; }
        until [ "$(zombies)" = 0 ]; do sleep 0.01; done; exit 6"#;
    for options in [&[][..], &["--tree"]] {
        let daemon = Daemon::start();
        assert_eq!(start(&daemon, &[options, &["k", "sh", "-c", script]].concat()).wait(), 6, "{options:?}");
    }
}
