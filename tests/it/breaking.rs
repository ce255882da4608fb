//! `kmutex break`: who may do it, and what becomes of the holder.

use std::process::Stdio;

use crate::harness::{Daemon, KMUTEX, Process, finish, open_to_all, tool, wait_until};
use crate::other_user::OtherUser;

#[test]
fn the_holder_is_stopped_and_the_next_waiter_gets_the_lock() {
    let daemon = Daemon::start();
    let mut run = daemon.run(&["k", "sleep", "1000"]);
    let mut holder = Process::spawn(run.stderr(Stdio::piped()));
    daemon.wait_for_counts("k", 1, 0);
    let mut next = Process::spawn(&mut daemon.run(&["--queue", "k", "true"]));
    daemon.wait_for_counts("k", 1, 1);
    finish(&mut daemon.kmutex(&["break", "--yes", "k"])).assert_silent(0);
    assert_eq!(holder.wait(), 74);
    assert!(holder.stderr().contains("broken by `kmutex break`"));
    assert_eq!(next.wait(), 0);
    let uid = nix::unistd::Uid::current();
    assert!(daemon.wait_for_log("breaks the lock \"k\"").contains(&format!("uid {uid}")), "who did it");
}

#[test]
fn a_holder_of_protocol_1_is_closed() {
    let daemon = Daemon::start();
    let mut old = daemon.wire();
    // The MD5 of "hello".
    let key = 0x5d41402abc4b2a76b9719d911017c592_u128.to_be_bytes();
    old.send(key).expect("O");
    finish(&mut daemon.kmutex(&["break", "-y", "hello"])).assert_silent(0);
    old.expect_closed();
}

#[test]
fn a_free_lock_cannot_be_broken() {
    let daemon = Daemon::start();
    finish(&mut daemon.kmutex(&["break", "--yes", "k"])).assert_error(65, &["no client holds", "\"k\""]);
    finish(&mut daemon.kmutex(&["break", "--yes", ""])).assert_error(65, &["key"]);
    let folder = tempfile::tempdir().unwrap();
    let mut nowhere = std::process::Command::new(KMUTEX);
    nowhere.args(["break", "--yes", "k", "--sock"]).arg(folder.path().join("sock"));
    finish(&mut nowhere).assert_error(69, &["cannot connect"]);
}

#[test]
fn without_a_terminal_it_must_be_said() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    finish(&mut daemon.kmutex(&["break", "k"])).assert_error(64, &["--yes"]);
    assert_eq!(holder.finish(0), 0);
}

#[test]
fn on_a_terminal_it_asks() {
    let daemon = Daemon::start();
    let on_terminal = |answer: &str| {
        // script(1) gives it a terminal, and types the answer.
        let line = format!("printf '{answer}\\n' | script -qec '{KMUTEX} break k' /dev/null");
        let mut shell = tool("sh");
        shell.args(["-c", &line]).env("KMUTEX_SOCK", daemon.sock());
        finish(&mut shell)
    };
    let holder = daemon.hold_with(&["--on-lost", "continue"], "k");
    let no = on_terminal("n");
    assert_eq!(no.code, 77, "{no:?}");
    let pid = holder.process.pid().to_string();
    for words in ["break the lock \"k\", held by \"sh -c", &pid, "[y/N]"] {
        assert!(no.stdout.contains(words), "{words}: {no:?}");
    }
    assert_eq!(daemon.counts("k"), (1, 0));
    assert_eq!(on_terminal("y").code, 0);
    assert_eq!(daemon.counts("k"), (0, 0));
    assert_eq!(holder.finish(0), 74);
}

#[test]
#[ignore = "needs root, to act as two users"]
fn only_root_the_daemons_user_and_the_holders_may() {
    let other = OtherUser::new();
    let daemon = Daemon::with(&["--mode", "666"]);
    open_to_all(daemon.folder());
    let as_other = |args: &[&str]| {
        let mut command = other.command(other.kmutex());
        command.args(args).arg("--sock").arg(daemon.sock());
        command
    };
    // Root's lock, and that user.
    let holder = daemon.hold("k");
    finish(&mut as_other(&["break", "--yes", "k"])).assert_error(77, &["not permitted", "\"k\""]);
    assert_eq!(daemon.counts("k"), (1, 0));
    assert_eq!(holder.finish(0), 0);
    // That user's lock, and that user; and root.
    for root in [false, true] {
        let mut run = as_other(&["run"]);
        let mut holder = Process::spawn(run.args(["k", "sleep", "1000"]).stderr(Stdio::null()));
        daemon.wait_for_counts("k", 1, 0);
        let mut breaker =
            if root { daemon.kmutex(&["break", "-y", "k"]) } else { as_other(&["break", "-y", "k"]) };
        finish(&mut breaker).assert_silent(0);
        assert_eq!(holder.wait(), 74);
    }
    // That user's daemon and that user, root's lock.
    let sock = other.folder().join("sock");
    let _theirs = other.serve(other.command(other.kmutex()), &sock, &[]);
    let mut run = std::process::Command::new(KMUTEX);
    run.args(["run", "--trust-uid", &OtherUser::UID.to_string(), "--sock"]).arg(&sock);
    let mut holder = Process::spawn(run.args(["k", "sleep", "1000"]).stderr(Stdio::null()));
    let mut breaker = other.command(other.kmutex());
    breaker.args(["break", "-y", "k", "--sock"]).arg(&sock);
    wait_until("the lock to be held and broken", || finish(&mut breaker).code == 0);
    assert_eq!(holder.wait(), 74);
}
