//! Locks under locks: no run waits for itself, and no two wait for each other.

use std::process::{Command, Stdio};

use crate::harness::{Daemon, KMUTEX, Process, finish, wait_until};

/// A run under a run: `kmutex run OUTER -- sh -c SCRIPT`, where `$KMUTEX` is the program.
fn under(daemon: &Daemon, options: &[&str], key: &str, script: &str) -> Command {
    let mut run = daemon.run(options);
    run.args([key, "--", "sh", "-c", script]).env("KMUTEX", KMUTEX);
    run
}

#[test]
fn a_run_under_a_run_of_the_same_key_fails_at_once_and_says_why() {
    let daemon = Daemon::start();
    for options in ["", "--queue", "-n"] {
        let script = format!("\"$KMUTEX\" run {options} k true");
        finish(&mut under(&daemon, &[], "k", &script))
            .assert_error(75, &["\"k\"", "held by the command", "--reentrant"]);
    }
    let deep = r#""$KMUTEX" run other -- sh -c '"$KMUTEX" run --queue k true'"#;
    finish(&mut under(&daemon, &[], "k", deep)).assert_error(75, &["\"k\"", "held by the command"]);
}

#[test]
fn a_reentrant_run_goes_on_under_the_outer_lock() {
    let daemon = Daemon::start();
    let script = r#""$KMUTEX" run --reentrant k -- sh -c 'echo inner; exit 4'"#;
    let inner = finish(&mut under(&daemon, &[], "k", script));
    assert_eq!((inner.code, inner.stdout.as_str()), (4, "inner\n"), "{inner:?}");
    // A script that also runs by itself takes the lock then.
    let alone = ["--reentrant", "k", "sh", "-c", r#""$KMUTEX" status --keys"#];
    let mut alone = daemon.run(&alone);
    let said = finish(alone.env_remove("KMUTEX_TOKEN").env("KMUTEX", KMUTEX)).assert_silent(0);
    assert_eq!(said, "k\n");
    let script = r#""$KMUTEX" run --reentrant --status-file report k sh -c 'exit 5'; cat report"#;
    let report = finish(&mut under(&daemon, &[], "k", script)).assert_silent(0);
    assert!(report.contains(r#""verdict":"ran","outcome":{"exit":5},"token":null"#), "{report}");
    // If no run above holds the lock, --reentrant changes nothing.
    let script = r#""$KMUTEX" run --reentrant free -- sh -c '"$KMUTEX" status --json free'"#;
    assert!(finish(&mut under(&daemon, &[], "k", script)).assert_silent(0).contains("\"holding\":1"));
}

#[test]
fn a_token_of_another_daemon_means_nothing() {
    let (outer, inner) = (Daemon::start(), Daemon::start());
    let script = format!(r#""$KMUTEX" run --sock {} k echo fine"#, inner.sock().display());
    assert_eq!(finish(&mut under(&outer, &[], "k", &script)).assert_silent(0), "fine\n");
}

#[test]
fn a_shared_lock_may_be_shared_again() {
    let daemon = Daemon::start();
    let script = r#""$KMUTEX" run -s k echo fine"#;
    assert_eq!(finish(&mut under(&daemon, &["-s"], "k", script)).assert_silent(0), "fine\n");
}

#[test]
fn of_two_that_would_wait_for_each_other_the_second_is_refused() {
    let daemon = Daemon::start();
    let start = |outer: &str, inner: &str| {
        let script = format!("echo outer; read line; exec \"$KMUTEX\" run --queue {inner} echo inner");
        let mut run = under(&daemon, &[], outer, &script);
        run.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process::spawn(&mut run);
        process.wait_for_line("outer");
        process
    };
    let (mut first, mut second) = (start("a", "b"), start("b", "a"));
    drop(first.child.stdin.take());
    daemon.wait_for_counts("b", 1, 1);
    drop(second.child.stdin.take());
    assert_eq!(second.wait(), 75);
    let said = second.stderr();
    for words in ["deadlock", "\"a\" is held by pid", "\"b\" is held by pid", "which waits"] {
        assert!(said.contains(words), "{words:?} is missing: {said}");
    }
    assert_eq!(said.lines().count(), 1);
    // So the first gets what it waits for.
    first.wait_for_line("inner");
    assert_eq!(first.wait(), 0);
}

#[test]
fn a_cycle_is_seen_across_a_restart_of_the_daemon() {
    let mut daemon = Daemon::start();
    let script = "echo outer; read line; exec \"$KMUTEX\" run --no-autostart --queue b echo inner";
    let mut run = under(&daemon, &[], "a", script);
    let mut first = Process::spawn(run.stdin(Stdio::piped()).stdout(Stdio::piped()));
    first.wait_for_line("outer");
    let mut run =
        under(&daemon, &[], "b", "echo outer; read line; \"$KMUTEX\" run --no-autostart --queue a true");
    let mut second = Process::spawn(run.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()));
    second.wait_for_line("outer");
    drop(first.child.stdin.take());
    daemon.wait_for_counts("b", 1, 1);
    daemon.restart(&[]);
    wait_until("all to have come back", || {
        daemon.counts("b") == (1, 1)
            && daemon.status().iter().all(|lock| lock["holders"][0]["orphan"].is_null())
    });
    drop(second.child.stdin.take());
    assert_eq!(second.wait(), 75);
    assert_eq!(first.wait(), 0);
}
