//! Locks that shells hold: `kmutex lock` and `kmutex unlock`.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::harness::{Daemon, Finished, KMUTEX, Process, finish, tool, wait_until};
use crate::other_user::OtherUser;

/// A shell that runs a script, with the daemon's socket and the program in its environment.
fn shell(daemon: &Daemon, program: &str, script: &str) -> Command {
    let mut shell = tool(program);
    shell.args(["-c", script]).env("KMUTEX_SOCK", daemon.sock()).env("KMUTEX", KMUTEX);
    shell.current_dir(daemon.folder());
    shell
}

fn sh(daemon: &Daemon, script: &str) -> Finished {
    finish(shell(daemon, "sh", script).stdin(Stdio::null()))
}

/// A shell that holds `k` until its input ends.
fn holder(daemon: &Daemon, program: &str) -> Process {
    let mut shell = shell(daemon, program, "\"$KMUTEX\" lock k && echo holding; read line; exit 3");
    let mut process = Process::spawn(shell.stdin(Stdio::piped()).stdout(Stdio::piped()));
    process.wait_for_line("holding");
    process
}

fn is_free(daemon: &Daemon) -> bool {
    daemon.run(&["-n", "k", "true"]).status().unwrap().code() == Some(0)
}

#[test]
fn a_shell_holds_a_lock_until_it_unlocks_it() {
    for program in ["sh", "bash", "dash"] {
        let daemon = Daemon::start();
        let script = r#"
            "$KMUTEX" lock k || exit 1
            "$KMUTEX" run --sock "$KMUTEX_SOCK" -n k true; echo $?
            "$KMUTEX" unlock k || exit 2
            "$KMUTEX" run -n k true; echo $?
        "#;
        let done = finish(shell(&daemon, program, script).stdin(Stdio::null()));
        assert_eq!(done.assert_silent(0), "75\n0\n", "{program}");
    }
}

#[test]
fn the_end_of_the_shell_is_the_end_of_the_lock_and_of_the_work() {
    let daemon = Daemon::start();
    let mut holder = holder(&daemon, "sh");
    let status = &daemon.status()[0]["holders"][0];
    assert_eq!(status["pid"], holder.pid().as_raw());
    assert!(
        status["orphan"].is_null() && status["command"].as_str().unwrap().starts_with("sh -c"),
        "{status}"
    );
    let mut once = Process::spawn(&mut daemon.run(&["k", "true"]));
    daemon.wait_for_counts("k", 1, 1);
    let mut queue = Process::spawn(&mut daemon.run(&["--queue", "k", "true"]));
    daemon.wait_for_counts("k", 1, 2);
    holder.signal(Signal::SIGKILL);
    holder.wait();
    assert_eq!((once.wait(), queue.wait()), (79, 0));
}

#[test]
fn in_once_mode_the_second_shell_is_told_that_it_is_done() {
    let daemon = Daemon::start();
    let mut holder = holder(&daemon, "sh");
    let mut second = Process::spawn(&mut shell(&daemon, "sh", r#""$KMUTEX" lock k || exit; echo not here"#));
    daemon.wait_for_counts("k", 1, 1);
    drop(holder.child.stdin.take());
    assert_eq!((holder.wait(), second.wait()), (3, 79));
    assert_eq!(
        sh(&daemon, r#""$KMUTEX" lock --finished-exit-code 9 -n k"#).assert_silent(0),
        "",
        "it is free"
    );
}

#[test]
fn a_shells_lock_outlives_the_daemon() {
    let mut daemon = Daemon::start();
    let mut holder = holder(&daemon, "sh");
    for _ in 0..2 {
        daemon.restart(&["--grace", "0"]);
        assert!(!is_free(&daemon));
        let status = &daemon.status()[0]["holders"][0];
        assert_eq!(status["pid"], holder.pid().as_raw());
        assert!(status["orphan"].is_null(), "no client has to resume: {status}");
    }
    let pid = holder.pid().to_string();
    assert_eq!(finish(&mut daemon.kmutex(&["unlock", "--pid", &pid, "k"])).assert_silent(0), "");
    assert!(is_free(&daemon));
    drop(holder.child.stdin.take());
    holder.wait();
}

#[test]
fn what_a_shell_does_not_hold_it_cannot_unlock() {
    let daemon = Daemon::start();
    sh(&daemon, r#""$KMUTEX" unlock k"#).assert_error(77, &["does not hold", "\"k\""]);
    let run = daemon.hold("k");
    sh(&daemon, r#""$KMUTEX" unlock k"#).assert_error(77, &["does not hold"]);
    run.finish(0);
    let mut holder = holder(&daemon, "sh");
    sh(&daemon, r#""$KMUTEX" unlock k"#).assert_error(77, &["does not hold"]);
    assert!(!is_free(&daemon));
    drop(holder.child.stdin.take());
    holder.wait();
}

#[test]
fn a_shell_that_holds_a_lock_is_not_made_to_wait_for_itself() {
    let daemon = Daemon::start();
    for options in ["", "--queue", "-n"] {
        let script = format!(r#""$KMUTEX" lock k || exit 1; "$KMUTEX" lock {options} k"#);
        sh(&daemon, &script).assert_error(75, &["\"k\"", "held by process", "already"]);
    }
}

#[test]
fn options_are_those_of_run() {
    let daemon = Daemon::start();
    let mut first = holder(&daemon, "sh");
    assert_eq!(sh(&daemon, r#""$KMUTEX" lock -w 0.2 k"#).assert_silent(75), "");
    assert_eq!(sh(&daemon, r#""$KMUTEX" lock -n -E 9 k"#).assert_silent(9), "");
    drop(first.child.stdin.take());
    first.wait();
    let script = r#""$KMUTEX" lock -s k && "$KMUTEX" run -s -n k echo shared"#;
    assert_eq!(sh(&daemon, script).assert_silent(0), "shared\n");
    let script = r#""$KMUTEX" lock --note "job 7" k && "$KMUTEX" status --json k"#;
    assert!(sh(&daemon, script).assert_silent(0).contains("\"note\":\"job 7\""));
}

#[test]
fn a_process_that_cannot_hold_is_named() {
    let daemon = Daemon::with(&["--sock", "127.0.0.1:0"]);
    let line = daemon.wait_for_log("serving on 127.0.0.1:");
    let addr = line.rsplit(' ').next().unwrap();
    for command in ["lock", "unlock"] {
        finish(&mut daemon.kmutex(&[command, "--sock", addr, "k"])).assert_error(64, &["Unix socket", addr]);
        finish(&mut daemon.kmutex(&[command, "--pid", "4194305", "k"])).assert_error(65, &["--pid 4194305"]);
        finish(&mut daemon.kmutex(&[command, "--pid", "0", "k"])).assert_error(64, &["--pid"]);
    }
}

#[test]
#[ignore = "needs root, to act as two users"]
fn a_process_of_another_user_cannot_hold() {
    let other = OtherUser::new();
    let sock = other.folder().join("sock");
    let _daemon = other.serve(other.command(other.kmutex()), &sock, &[]);
    let mut lock = other.command(other.kmutex());
    lock.args(["lock", "--pid", &std::process::id().to_string(), "k", "--sock"]).arg(&sock);
    finish(&mut lock).assert_error(77, &["process", "belongs to uid 0"]);
}

#[test]
#[ignore = "needs zsh and dash"]
fn a_lock_for_a_process_that_is_about_to_go_is_refused() {
    let daemon = Daemon::start();
    // Each of these stands between the script and kmutex, and ends at once.
    let between = [
        "timeout 60 \"$KMUTEX\" lock k",
        "strace -o /dev/null \"$KMUTEX\" lock k",
        "echo k | xargs \"$KMUTEX\" lock",
        "setpriv --no-new-privs \"$KMUTEX\" run other \"$KMUTEX\" lock k",
        "(\"$KMUTEX\" lock k; exit $?)",
        "x=$(\"$KMUTEX\" lock k; exit $?)",
        "{ \"$KMUTEX\" lock k; echo $? >&3; } 3>status | cat; exit $(cat status)",
    ];
    for shell in ["bash", "dash", "zsh"] {
        for command in between {
            // dash and zsh run some of these without another process, and then the lock is the script's.
            let script = format!("{command}; code=$?; \"$KMUTEX\" status --keys; exit $code");
            let mut command_line = tool(shell);
            command_line.args(["-c", &script]).env("KMUTEX", KMUTEX).env("KMUTEX_SOCK", daemon.sock());
            let finished = finish(command_line.current_dir(daemon.folder()).stdin(Stdio::null()));
            match finished.code {
                // xargs has a status of its own.
                64 | 123 => {
                    assert!(
                        finished.stderr.contains("so the lock would not last; name the process"),
                        "{finished:?}"
                    );
                    assert_eq!(finished.stdout, "", "{shell}: {command}");
                }
                code => assert_eq!(
                    (code, finished.stdout.as_str()),
                    (0, "k\n"),
                    "{shell}: {command}: {finished:?}"
                ),
            }
            daemon.wait_for_counts("k", 0, 0);
        }
    }
}

#[test]
#[ignore = "needs zsh and dash"]
fn the_way_out_of_a_refusal_works() {
    let daemon = Daemon::start();
    for shell in ["bash", "dash", "zsh"] {
        let script = "timeout 60 \"$KMUTEX\" lock --pid $$ k && (\"$KMUTEX\" lock --pid $$ l; exit $?) && \"$KMUTEX\" status --keys";
        let mut command = tool(shell);
        command.args(["-c", script]).env("KMUTEX", KMUTEX).env("KMUTEX_SOCK", daemon.sock());
        let said = finish(command.current_dir(daemon.folder()).stdin(Stdio::null())).assert_silent(0);
        assert_eq!(said, "k\nl\n", "{shell}");
        daemon.wait_for_counts("k", 0, 0);
        daemon.wait_for_counts("l", 0, 0);
    }
}

#[test]
fn a_lock_for_a_parent_that_has_gone_is_refused() {
    let daemon = Daemon::start();
    // The parent of this process ends first.
    let script = r#"(until test -e go; do sleep 0.01; done; exec "$KMUTEX" lock k 2> said; ) & exit 0"#;
    let mut command = Command::new("setsid");
    command.args(["-w", "sh", "-c", script]).env("KMUTEX", KMUTEX).env("KMUTEX_SOCK", daemon.sock());
    finish(command.current_dir(daemon.folder()).stdin(Stdio::null())).assert_silent(0);
    fs::write(daemon.folder().join("go"), "").unwrap();
    wait_until("the refusal", || {
        fs::read_to_string(daemon.folder().join("said"))
            .is_ok_and(|said| said.contains("has ended, so the lock would not last"))
    });
    assert_eq!(daemon.counts("k"), (0, 0));
}
