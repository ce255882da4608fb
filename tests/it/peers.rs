//! What waiters do when the holder fails, and what they report to people and programs.

use std::fs;
use std::process::Stdio;

use crate::harness::{Daemon, Process, finish, tool, wait_until};

/// Returns the exit codes of three waiters for a holder that ends with `status`, and how many of them ran.
fn waiters(options: &[&str], status: u8) -> (Vec<i32>, usize) {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut waiting: Vec<_> = (0..3)
        .map(|_| {
            let mut run = daemon.run(options);
            Process::spawn(run.args(["k", "sh", "-c", "echo ran >> runs; exit 7"]))
        })
        .collect();
    daemon.wait_for_counts("k", 1, 3);
    holder.finish(status);
    let mut codes: Vec<_> = waiting.iter_mut().map(Process::wait).collect();
    codes.sort_unstable();
    let runs = fs::read_to_string(daemon.folder().join("runs")).unwrap_or_default();
    (codes, runs.lines().count())
}

#[test]
fn by_default_a_failure_counts_as_done() {
    assert_eq!(waiters(&[], 3), (vec![79; 3], 0));
    assert_eq!(waiters(&["--on-peer-failure", "skip"], 3), (vec![79; 3], 0));
}

#[test]
fn with_retry_one_after_the_other_runs_until_one_succeeds() {
    assert_eq!(waiters(&["--on-peer-failure", "retry"], 0), (vec![79; 3], 0));
    // Each of them fails too.
    assert_eq!(waiters(&["--on-peer-failure", "retry"], 3), (vec![7; 3], 3));
}

#[test]
fn with_retry_those_behind_the_one_that_succeeds_are_done() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut waiting: Vec<_> = (0..3)
        .map(|_| {
            let mut run = daemon.run(&["--on-peer-failure", "retry", "k", "sh", "-c"]);
            // Long enough that the others have asked again: until they wait.
            let script =
                "until \"$KMUTEX\" status --json k | grep -q '\"waiting\":2'; do :; done; echo ran >> runs";
            Process::spawn(run.arg(script).env("KMUTEX", crate::harness::KMUTEX))
        })
        .collect();
    daemon.wait_for_counts("k", 1, 3);
    holder.finish(1);
    let mut codes: Vec<_> = waiting.iter_mut().map(Process::wait).collect();
    codes.sort_unstable();
    assert_eq!(codes, [0, 79, 79]);
    assert_eq!(fs::read_to_string(daemon.folder().join("runs")).unwrap(), "ran\n");
}

#[test]
fn with_adopt_the_holders_status_is_everybodys() {
    assert_eq!(waiters(&["--on-peer-failure", "adopt"], 3), (vec![3; 3], 0));
    assert_eq!(waiters(&["--on-peer-failure", "adopt"], 0), (vec![0; 3], 0));
    let daemon = Daemon::start();
    let mut holder =
        Process::spawn(daemon.run(&["k", "sh", "-c", "read x; kill -9 $$"]).stdin(Stdio::piped()));
    daemon.wait_for_counts("k", 1, 0);
    let mut waiter = Process::spawn(&mut daemon.run(&["--on-peer-failure", "adopt", "k", "true"]));
    daemon.wait_for_counts("k", 1, 1);
    drop(holder.child.stdin.take());
    assert_eq!((holder.wait(), waiter.wait()), (137, 137));
}

#[test]
fn a_holder_of_protocol_1_counts_as_done() {
    for what in ["skip", "retry", "adopt"] {
        let daemon = Daemon::start();
        let mut old = daemon.wire();
        // The MD5 of "hello".
        old.send(0x5d41402abc4b2a76b9719d911017c592_u128.to_be_bytes()).expect("O");
        let mut waiter = Process::spawn(&mut daemon.run(&["--on-peer-failure", what, "hello", "true"]));
        daemon.wait_for_log("wait: ");
        old.send("R");
        assert_eq!(waiter.wait(), 79, "{what}");
    }
}

#[test]
fn verbose_says_who_holds_the_lock() {
    let daemon = Daemon::start();
    let holder = daemon.hold_with(&["--note", "https://ci/job/7"], "k");
    let mut run = daemon.run(&["--verbose", "--queue", "k", "true"]);
    let mut waiter = Process::spawn(run.stderr(Stdio::piped()));
    daemon.wait_for_counts("k", 1, 1);
    let pid = holder.process.pid();
    assert_eq!(holder.finish(0), 0);
    assert_eq!(waiter.wait(), 0);
    let said = waiter.stderr();
    let first = said.lines().next().unwrap();
    let wanted = [r#"kmutex: waiting for "k", held by "sh -c"#, &format!("(pid {pid}, "), "https://ci/job/7"];
    for words in wanted {
        assert!(first.contains(words), "{words:?} is missing: {said}");
    }
    assert!(said.contains("acquired the lock"), "{said}");
}

#[test]
fn on_a_terminal_a_line_tells_after_a_second_who_holds_the_lock() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let first = Process::spawn(&mut daemon.run(&["--queue", "k", "true"]));
    daemon.wait_for_counts("k", 1, 1);
    let line = format!("{} run --queue k echo mine", crate::harness::KMUTEX);
    let screen = daemon.folder().join("screen");
    let mut script = tool("script");
    script.args(["-qfec", &line]).arg(&screen).env("KMUTEX_SOCK", daemon.sock()).env("TERM", "xterm");
    let mut waiter = Process::spawn(script.stdin(Stdio::piped()).stdout(Stdio::null()));
    let shown = || fs::read_to_string(&screen).unwrap_or_default();
    wait_until("two looks at the holder", || {
        shown().matches("\rkmutex: waiting for \"k\", 1 ahead, held by").count() >= 2
    });
    assert!(shown().contains("waiting for \"k\", 1 ahead"), "{:?}", shown());
    holder.finish(0);
    assert_eq!(waiter.wait(), 0);
    assert!(shown().contains("\r\u{1b}[Kmine"), "the line is cleared first: {:?}", shown());
    drop(first);
}

#[test]
fn without_a_terminal_nothing_is_said_of_waiting() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut run = daemon.run(&["-w", "1.5", "--queue", "k", "true"]);
    finish(&mut run).assert_silent(75);
    drop(holder);
}

fn report(daemon: &Daemon, options: &[&str], command: &[&str]) -> serde_json::Value {
    let file = daemon.folder().join("report");
    let mut run = daemon.run(&["--status-file"]);
    run.arg(&file).args(options).arg("k").args(command).stderr(Stdio::null());
    Process::spawn(&mut run).wait();
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

#[test]
fn a_report_tells_programs_what_happened() {
    let daemon = Daemon::start();
    let ran = report(&daemon, &[], &["sh", "-c", "exit 3"]);
    assert_eq!((&ran["verdict"], &ran["key"]), (&"ran".into(), &"k".into()));
    assert_eq!(ran["outcome"]["exit"], 3);
    assert!(ran["token"].as_u64().is_some() && ran["error"].is_null(), "{ran}");
    let error = report(&daemon, &[], &["/no/such/program"]);
    assert_eq!(error["verdict"], "error");
    assert!(error["error"].as_str().unwrap().contains("/no/such/program"), "{error}");

    let holder = daemon.hold("k");
    assert_eq!(report(&daemon, &["-n"], &["true"])["verdict"], "busy");
    assert!(report(&daemon, &["-w", "0.2"], &["true"])["waited_ms"].as_u64() >= Some(200));
    let file = daemon.folder().join("other");
    let mut run = daemon.run(&["--status-fd", "3", "k", "true"]);
    // A shell opens the descriptor.
    let mut shell = tool("sh");
    shell.args(["-c", r#"exec "$@" 3> other"#, "sh"]).arg(run.get_program()).args(run.get_args());
    shell.current_dir(daemon.folder()).env("KMUTEX_SOCK", daemon.sock());
    let mut waiter = Process::spawn(&mut shell);
    daemon.wait_for_counts("k", 1, 1);
    holder.finish(5);
    assert_eq!(waiter.wait(), 79);
    let finished: serde_json::Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!((&finished["verdict"], &finished["outcome"]["exit"]), (&"finished".into(), &5.into()));
    finish(&mut run).assert_error(64, &["--status-fd 3"]);
    finish(daemon.run(&["--status-file", "/no/such/folder/file", "k", "true"]).stdin(Stdio::null()))
        .assert_error(73, &["/no/such/folder/file"]);
}

#[test]
fn a_tree_holds_the_lock_until_all_of_it_has_ended() {
    let daemon = Daemon::start();
    let script = "exec 3<&0; (read line <&3) & echo $!; exit 3";
    let start = |options: &[&str]| {
        let mut run = daemon.run(options);
        run.args(["k", "sh", "-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        Process::spawn(&mut run)
    };
    let mut alone = start(&[]);
    assert_eq!(alone.wait(), 3, "without --tree only the command counts");
    let mut tree = start(&["--tree"]);
    tree.line().unwrap();
    assert_eq!(daemon.run(&["-n", "k", "true"]).status().unwrap().code(), Some(75));
    assert!(tree.is_running());
    drop(tree.child.stdin.take());
    assert_eq!(tree.wait(), 3);
}

#[test]
fn sigterm_and_a_lost_lock_reach_the_whole_tree() {
    for lost in [false, true] {
        let daemon = Daemon::start();
        // What is left behind has another parent, another group and another session.
        let script = "setsid sh -c 'trap \"echo got TERM >> terms; exit\" TERM; echo ready; while :; do sleep 0.01; done' & exit 0";
        let mut run = daemon.run(&["--tree", "k", "sh", "-c", script]);
        let mut tree = Process::spawn(run.stdout(Stdio::piped()).stderr(Stdio::null()));
        tree.wait_for_line("ready");
        if lost {
            finish(&mut daemon.kmutex(&["break", "--yes", "k"])).assert_silent(0);
        } else {
            tree.signal(nix::sys::signal::Signal::SIGTERM);
        }
        assert_eq!(tree.wait(), if lost { 74 } else { 0 });
        assert_eq!(fs::read_to_string(daemon.folder().join("terms")).unwrap(), "got TERM\n");
    }
}
