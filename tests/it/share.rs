//! `--share`: the callers that waited get the result of the run.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::harness::*;
use crate::other_user::OtherUser;

/// A holder of `k` whose command writes `first`, waits for its input, and then runs `rest`.
fn holder(daemon: &Daemon, options: &[&str], rest: &str) -> Process {
    let script = format!("echo first; echo error >&2; read go; {rest}");
    let mut command = daemon.run(&[&["--share"], options, &["k", "--", "sh", "-c", &script]].concat());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = Process::spawn(&mut command);
    process.wait_for_line("first");
    process
}

/// Lets the command of a holder go on, and returns kmutex's exit status.
fn finish_holder(holder: &mut Process) -> i32 {
    drop(holder.child.stdin.take());
    holder.wait()
}

/// A waiter whose own command would write `ran` and exit with 9.
fn waiter(daemon: &Daemon, options: &[&str]) -> Command {
    daemon.run(&[options, &["k", "--", "sh", "-c", "echo ran; exit 9"]].concat())
}

/// Waits until so many wait for `k`. The first count may include a request that the daemon has not decided about yet; what it
/// answers after that comes behind its decision.
fn wait_for_waiters(daemon: &Daemon, waiting: u64) {
    daemon.wait_for_counts("k", 1, waiting);
    daemon.status();
}

/// Starts a waiter, and returns what it leaves behind once `then` is done.
fn waiting(daemon: &Daemon, options: &[&str], then: impl FnOnce()) -> Finished {
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| finish(&mut waiter(daemon, options)));
        wait_for_waiters(daemon, 1);
        then();
        waiter.join().unwrap()
    })
}

/// The outputs that a process has open.
fn outputs_of(daemon: &Daemon) -> usize {
    let links = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let targets = links.filter_map(|link| fs::read_link(link.ok()?.path()).ok());
    targets.filter(|target| target.to_string_lossy().contains("kmutex-output")).count()
}

fn runs(folder: &Path) -> usize {
    fs::read_to_string(folder.join("runs")).unwrap_or_default().lines().count()
}

#[test]
fn a_waiter_gets_both_streams_and_the_status_and_does_not_run() {
    let daemon = Daemon::start();
    for (rest, status) in [("printf 'a\\0b'; exit 3", 3), ("kill -9 $$", 137), ("exit 0", 0)] {
        let mut holding = holder(&daemon, &[], rest);
        let waiter = waiting(&daemon, &["--share"], || assert_eq!(finish_holder(&mut holding), status));
        let tail = if status == 3 { "a\0b" } else { "" };
        assert_eq!(
            (waiter.code, waiter.stdout, waiter.stderr),
            (status, format!("first\n{tail}"), "error\n".into())
        );
    }
    wait_until("no output to be left", || outputs_of(&daemon) == 0);
    let left = fs::read_dir(daemon.folder()).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| !name.to_string_lossy().starts_with("sock")).collect();
    assert_eq!(left, ["log"], "no file is left over");
}

#[test]
#[ignore = "takes many seconds"]
fn two_hundred_callers_get_the_same_bytes_of_one_run() {
    let daemon = Daemon::start();
    // It ends when all others wait for it.
    let make = "#!/bin/sh
        echo run >> runs
        head -c 3000000 /dev/urandom
        until \"$KMUTEX\" status --json k | grep -q '\"waiting\":199'; do sleep 0.1; done
        exit 4\n";
    write_script(&daemon.folder().join("make-page"), make);
    let caller = "\"$KMUTEX\" run --share k -- ./make-page | md5sum | { read hash rest; echo \"$hash\"; }
        echo \"${PIPESTATUS[0]}\"";
    let callers = (0..200).map(|_| {
        let mut command = tool("bash");
        command.args(["-c", caller]).current_dir(daemon.folder()).env("KMUTEX", KMUTEX);
        command.env("KMUTEX_SOCK", daemon.sock()).stdin(Stdio::null()).stdout(Stdio::piped());
        Process::spawn(&mut command)
    });
    let mut callers: Vec<Process> = callers.collect();
    let mut lines: Vec<String> =
        callers.iter_mut().flat_map(|caller| [caller.line().unwrap(), caller.line().unwrap()]).collect();
    lines.sort_unstable();
    lines.dedup();
    assert!(lines.len() == 2 && lines.contains(&"4".into()), "{lines:?}");
    assert_eq!(runs(daemon.folder()), 1);
}

#[test]
fn if_the_holder_is_killed_half_way_a_waiter_takes_over_and_nothing_is_torn() {
    let daemon = Daemon::start();
    let mut holding = holder(&daemon, &["--close"], "");
    let waiter = waiting(&daemon, &["--share"], || {
        holding.signal(Signal::SIGKILL);
        holding.wait();
    });
    assert_eq!((waiter.code, waiter.stdout.as_str(), waiter.stderr.as_str()), (9, "ran\n", ""));
}

#[test]
fn if_the_holder_is_interrupted_a_waiter_takes_over_and_nothing_is_torn() {
    let daemon = Daemon::start();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut holding = holder(&daemon, &[], "exit 0");
        let waiter = waiting(&daemon, &["--share"], || {
            holding.signal(signal);
            assert_eq!(holding.wait(), 128 + signal as i32);
        });
        assert_eq!((waiter.code, waiter.stdout.as_str(), waiter.stderr.as_str()), (9, "ran\n", ""));
    }
}

#[test]
fn half_an_output_of_a_run_that_was_stopped_is_not_given() {
    let daemon = Daemon::start();
    // It ends when a waiter waits, however long after it was told to stop.
    let script = "trap 'touch stopped' TERM; echo first; until test -e go; do sleep 0.01; done";
    let options = ["--share", "--max-hold", "0.1", "--kill-after", "1h", "k", "sh", "-c", script];
    let mut holding = Process::spawn(daemon.run(&options).stdout(Stdio::piped()).stderr(Stdio::null()));
    holding.wait_for_line("first");
    let waiter = waiting(&daemon, &["--share"], || {
        wait_until("it to be stopped", || daemon.folder().join("stopped").exists());
        fs::write(daemon.folder().join("go"), "").unwrap();
        assert_eq!(holding.wait(), 124);
    });
    waiter.assert_error(79, &["stopped before its end"]);
    let mut holding = holder(&daemon, &[], "exit 0");
    let waiter = waiting(&daemon, &["--share"], || {
        finish(&mut daemon.run(&["--replace", "k", "true"])).assert_silent(0);
        assert_eq!(holding.wait(), 128 + 15);
    });
    waiter.assert_error(79, &["stopped before its end"]);
}

#[test]
fn a_stopped_waiter_holds_up_neither_the_holder_nor_the_others() {
    let daemon = Daemon::start();
    let mut holding = holder(&daemon, &[], "head -c 3000000 /dev/zero; exit 3");
    let pipe = || Stdio::piped();
    let mut stopped = Process::spawn(waiter(&daemon, &["--share"]).stdout(pipe()).stderr(Stdio::null()));
    wait_for_waiters(&daemon, 1);
    stopped.signal(Signal::SIGSTOP);
    let mut other = Process::spawn(waiter(&daemon, &["--share"]).stdout(Stdio::null()).stderr(Stdio::null()));
    wait_for_waiters(&daemon, 2);
    drop(holding.child.stdin.take());
    let mut all = Vec::new();
    holding.child.stdout.take().unwrap().read_to_end(&mut all).unwrap();
    assert_eq!((holding.wait(), other.wait()), (3, 3));
    stopped.signal(Signal::SIGCONT);
    let mut its = Vec::new();
    stopped.child.stdout.take().unwrap().read_to_end(&mut its).unwrap();
    assert_eq!(stopped.wait(), 3);
    assert_eq!(its, [b"first\n", &all[..]].concat());
}

#[test]
fn live_output_comes_from_its_beginning_and_while_it_is_made() {
    let daemon = Daemon::start();
    let script = "echo one; read go; echo two; read go; printf three; exit 3";
    let mut holding = Process::spawn(
        daemon.run(&["--share", "k", "sh", "-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()),
    );
    holding.wait_for_line("one");
    let mut first = Process::spawn(waiter(&daemon, &["--share=live"]).stdout(Stdio::piped()));
    first.wait_for_line("one");
    let go = |holding: &mut Process| {
        std::io::Write::write_all(holding.child.stdin.as_mut().unwrap(), b"\n").unwrap()
    };
    go(&mut holding);
    first.wait_for_line("two");
    let mut second = Process::spawn(waiter(&daemon, &["--share=live"]).stdout(Stdio::piped()));
    second.wait_for_line("one");
    second.wait_for_line("two");
    go(&mut holding);
    assert_eq!((holding.wait(), first.line().unwrap_or_default()), (3, String::new()));
    assert_eq!((first.wait(), second.wait()), (3, 3));
}

#[test]
fn a_waiter_with_live_output_says_that_the_holder_has_disappeared() {
    let daemon = Daemon::start();
    let holding = holder(&daemon, &["--close"], "");
    let mut waiters = [(); 2].map(|()| {
        let mut command = waiter(&daemon, &["--share=live"]);
        Process::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
    });
    waiters.iter_mut().for_each(|waiter| drop(waiter.wait_for_line("first")));
    holding.signal(Signal::SIGKILL);
    for waiter in &mut waiters {
        assert_eq!(waiter.wait(), 74);
        let said = waiter.stderr();
        assert!(said.contains("not complete: the holder disappeared"), "{said}");
    }
    assert_eq!(daemon.counts("k"), (0, 0));
    // One that has written nothing yet takes over.
    let script = "touch runs; read go";
    let mut silent =
        Process::spawn(daemon.run(&["--share", "--close", "k", "sh", "-c", script]).stdin(Stdio::piped()));
    wait_until("the command runs", || daemon.folder().join("runs").exists());
    let waiter = waiting(&daemon, &["--share=live"], || {
        silent.signal(Signal::SIGKILL);
        silent.wait();
    });
    assert_eq!((waiter.code, waiter.stdout.as_str()), (9, "ran\n"));
}

#[test]
fn a_caller_that_reads_no_further_ends_its_command_and_harms_no_waiter() {
    let daemon = Daemon::start();
    let command = "read go < fifo; exec yes";
    assert!(Command::new("mkfifo").arg(daemon.folder().join("fifo")).status().unwrap().success());
    let mut holding = Process::spawn(
        daemon.run(&["--share", "k", "sh", "-c", command]).stdout(Stdio::piped()).stderr(Stdio::null()),
    );
    daemon.wait_for_counts("k", 1, 0);
    let waiter = waiting(&daemon, &["--share"], || {
        fs::write(daemon.folder().join("fifo"), "\n").unwrap();
        assert_eq!(holding.line().as_deref(), Some("y"));
        drop(holding.child.stdout.take());
        assert_eq!(holding.wait(), 128 + 13);
    });
    assert_eq!((waiter.code, waiter.stdout.as_str()), (9, "ran\n"));
}

#[test]
fn a_waiter_whose_output_is_not_read_dies_of_sigpipe_as_the_command_would() {
    let daemon = Daemon::start();
    let mut holding = holder(&daemon, &[], "head -c 300000 /dev/zero");
    let mut waiting =
        Process::spawn(waiter(&daemon, &["--share"]).stdout(Stdio::piped()).stderr(Stdio::null()));
    wait_for_waiters(&daemon, 1);
    drop(waiting.child.stdout.take());
    drop(holding.child.stdin.take());
    holding.child.stdout.take().unwrap().read_to_end(&mut Vec::new()).unwrap();
    assert_eq!((holding.wait(), waiting.wait()), (0, 128 + 13));
}

#[test]
fn a_full_disk_is_an_error_of_its_own_caller_alone() {
    let daemon = Daemon::start();
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    let script = "read go; echo out; exit 3";
    let mut command = daemon.run(&["--share", "k", "sh", "-c", script]);
    let mut holding = Process::spawn(command.stdin(Stdio::piped()).stdout(full()).stderr(Stdio::piped()));
    daemon.wait_for_counts("k", 1, 0);
    let waiter = waiting(&daemon, &["--share"], || {
        assert_eq!(finish_holder(&mut holding), 71);
        assert!(holding.stderr().contains("No space left"));
    });
    assert_eq!((waiter.code, waiter.stdout.as_str()), (3, "out\n"));
}

#[test]
fn an_output_that_is_too_long_or_not_given_is_79_with_the_reason() {
    let daemon = Daemon::start();
    let mut holding = holder(&daemon, &["--share-max", "10"], "echo 0123456789; exit 3");
    let long = waiting(&daemon, &["--share"], || {
        drop(holding.child.stdin.take());
        assert_eq!(holding.line().as_deref(), Some("0123456789"), "its own caller gets all");
        assert_eq!(holding.wait(), 3);
    });
    long.assert_error(79, &["longer than --share-max"]);
    let plain = daemon.hold("k");
    let waiter =
        waiting(&daemon, &["--share", "--finished-exit-code", "5"], || assert_eq!(plain.finish(0), 0));
    waiter.assert_error(5, &["without --share"]);
    // And the other way round: a waiter that does not ask for the result.
    let mut holding = holder(&daemon, &[], "exit 0");
    waiting(&daemon, &[], || assert_eq!(finish_holder(&mut holding), 0)).assert_silent(79);
}

#[test]
#[ignore = "needs root, to hide /proc"]
fn without_proc_the_command_runs_and_its_output_is_not_given() {
    let daemon = Daemon::start();
    let script =
        "mount -t tmpfs none /proc && \"$KMUTEX\" run --share k -- sh -c 'echo first; read go; exit 3'";
    let mut command = tool("unshare");
    command.args(["--mount", "sh", "-c", script]).env("KMUTEX_SOCK", daemon.sock()).env("KMUTEX", KMUTEX);
    let mut holding = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    holding.wait_for_line("first");
    let waiter = waiting(&daemon, &["--share"], || assert_eq!(finish_holder(&mut holding), 3));
    waiter.assert_error(79, &["cannot be passed on"]);
}

#[test]
fn a_command_that_cannot_be_started_is_an_error_as_without_sharing() {
    let daemon = Daemon::start();
    finish(&mut daemon.run(&["--share", "k", "/no/such/program"])).assert_error(127, &["/no/such/program"]);
    assert_eq!(daemon.counts("k"), (0, 0));
}

#[test]
fn a_remembered_result_is_replayed_until_its_time_or_the_daemon_is_gone() {
    let mut daemon = Daemon::start();
    let script = "echo run >> runs; printf 'a\\0b'; echo error >&2; exit 0";
    let run = |daemon: &Daemon, fresh| {
        finish(&mut daemon.run(&["--share", "--fresh", fresh, "k", "sh", "-c", script]))
    };
    for _ in 0..3 {
        let all = run(&daemon, "1h");
        assert_eq!((all.code, all.stdout.as_str(), all.stderr.as_str()), (0, "a\0b", "error\n"));
        assert_eq!(runs(daemon.folder()), 1);
    }
    assert_eq!(outputs_of(&daemon), 1);
    finish(&mut daemon.run(&["--fresh", "1h", "k", "false"])).assert_silent(79);
    finish(&mut daemon.kmutex(&["forget", "k"])).assert_silent(0);
    assert_eq!(outputs_of(&daemon), 0);
    run(&daemon, "1h");
    assert_eq!(runs(daemon.folder()), 2);
    daemon.restart(&[]);
    // The run is remembered, its result is not.
    finish(&mut daemon.run(&["--fresh", "1h", "k", "false"])).assert_silent(79);
    run(&daemon, "1h");
    assert_eq!(runs(daemon.folder()), 3);
    finish(&mut daemon.kmutex(&["forget", "k"])).assert_silent(0);
    run(&daemon, "0.2");
    assert_eq!(outputs_of(&daemon), 1);
    wait_until("its time to be over", || outputs_of(&daemon) == 0);
}

#[test]
fn a_failure_is_replayed_with_its_status_for_its_own_time() {
    let daemon = Daemon::start();
    let args =
        ["--share", "--fresh", "1h", "--fresh-failure", "1h", "--status-file", "report", "k", "sh", "-c"];
    for _ in 0..2 {
        let all = finish(daemon.run(&args).arg("echo run >> runs; echo out; exit 3"));
        assert_eq!((all.code, all.stdout.as_str()), (3, "out\n"));
    }
    assert_eq!(runs(daemon.folder()), 1);
    let report = fs::read_to_string(daemon.folder().join("report")).unwrap();
    assert!(
        report.contains(r#""verdict":"fresh""#) && report.contains(r#""outcome":{"exit":3}"#),
        "{report}"
    );
}

#[test]
fn an_older_result_is_given_at_once_while_one_caller_runs_anew_in_the_background() {
    let daemon = Daemon::start();
    assert!(Command::new("mkfifo").arg(daemon.folder().join("fifo")).status().unwrap().success());
    let script = "echo run >> runs; wc -l < runs; test $(wc -l < runs) = 1 || read go < fifo";
    let ask = |fresh| {
        finish(&mut daemon.run(&["--share", "--fresh", fresh, "--stale", "2h", "k", "sh", "-c", script]))
    };
    assert_eq!(ask("0.001").assert_silent(0), "1\n");
    for _ in 0..5 {
        assert_eq!(ask("0.001").assert_silent(0), "1\n");
    }
    wait_until("the run in the background", || runs(daemon.folder()) == 2);
    daemon.wait_for_counts("k", 1, 0);
    fs::write(daemon.folder().join("fifo"), "\n").unwrap();
    daemon.wait_for_counts("k", 0, 0);
    assert_eq!(ask("1h").assert_silent(0), "2\n");
    assert_eq!(runs(daemon.folder()), 2, "five callers, and one of them ran anew");
}

#[test]
fn if_the_run_in_the_background_fails_the_older_result_stays() {
    let daemon = Daemon::start();
    let ask = |script| {
        finish(&mut daemon.run(&["--share", "--fresh", "0.001", "--stale", "1h", "k", "sh", "-c", script]))
    };
    assert_eq!(ask("echo good").assert_silent(0), "good\n");
    for count in 1..=2 {
        assert_eq!(ask("echo run >> runs; echo bad; exit 3").assert_silent(0), "good\n");
        wait_until("the run in the background", || runs(daemon.folder()) == count);
        daemon.wait_for_counts("k", 0, 0);
    }
}

#[test]
fn the_oldest_results_go_when_there_are_too_many_bytes() {
    let daemon = Daemon::with(&["--share-total", "300K"]);
    let ask = |key: &str| {
        let script = format!("echo {key} >> runs; head -c 100000 /dev/zero");
        let mut command = daemon.run(&["--share", "--fresh", "1h", key, "sh", "-c", &script]);
        assert_eq!(finish(&mut command).stdout.len(), 100_000);
    };
    ["a", "b", "a", "c", "b", "a"].into_iter().for_each(ask);
    assert_eq!(outputs_of(&daemon), 3);
    ["d", "c", "b", "a"].into_iter().for_each(ask);
    assert_eq!(fs::read_to_string(daemon.folder().join("runs")).unwrap(), "a\nb\nc\nd\na\n");
    assert_eq!(outputs_of(&daemon), 3);
}

#[test]
fn a_daemon_that_is_restarted_during_the_run_passes_the_result_on_all_the_same() {
    let mut daemon = Daemon::start();
    let mut holding = holder(&daemon, &[], "echo last; exit 3");
    let mut waiters = ["--share", "--share=live"]
        .map(|share| Process::spawn(waiter(&daemon, &[share]).stdout(Stdio::piped()).stderr(Stdio::null())));
    wait_for_waiters(&daemon, 2);
    waiters[1].wait_for_line("first");
    daemon.restart(&[]);
    wait_for_waiters(&daemon, 2);
    wait_until("the holder to give its output again", || outputs_of(&daemon) == 1);
    assert_eq!(finish_holder(&mut holding), 3);
    assert_eq!((waiters[0].line().as_deref(), waiters[0].line().as_deref()), (Some("first"), Some("last")));
    assert_eq!((waiters[1].line().as_deref(), waiters[1].line()), (Some("last"), None));
    assert_eq!((waiters[0].wait(), waiters[1].wait()), (3, 3));
}

#[test]
fn coalescing_requests_get_the_result_of_the_run_that_began_after_them() {
    let daemon = Daemon::start();
    let script = "echo run >> runs; n=$(wc -l < runs); test $n = 2 || read go; echo $n";
    let mut first = Process::spawn(
        daemon
            .run(&["--share", "--coalesce", "k", "sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::null()),
    );
    wait_until("the command runs", || runs(daemon.folder()) == 1);
    let mut others: Vec<Process> = (1..=3)
        .map(|count| {
            let mut command = daemon.run(&["--share", "--coalesce", "k", "sh", "-c", script]);
            let process = Process::spawn(command.stdout(Stdio::piped()));
            wait_for_waiters(&daemon, count);
            process
        })
        .collect();
    assert_eq!(finish_holder(&mut first), 0);
    for other in &mut others {
        assert_eq!((other.line().as_deref(), other.wait()), (Some("2"), 0));
    }
    assert_eq!(runs(daemon.folder()), 2);
}

#[test]
fn what_the_command_leaves_behind_is_not_waited_for() {
    let daemon = Daemon::start();
    let script = "sleep 1000 & echo $! > pid; echo done";
    let mut holding =
        Process::spawn(daemon.run(&["--share", "k", "sh", "-c", script]).stdout(Stdio::piped()));
    assert_eq!((holding.line().as_deref(), holding.wait()), (Some("done"), 0));
    drop(KillOnDrop::new(&fs::read_to_string(daemon.folder().join("pid")).unwrap()));
}

#[test]
fn over_tcp_a_result_of_up_to_64_kib_is_passed_on() {
    let daemon = Daemon::start();
    let port = free_port();
    let mut over_tcp = Process::spawn(
        Command::new(KMUTEX)
            .args(["serve", "--ready-fd", "1", "--sock", &format!("127.0.0.1:{port}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null()),
    );
    over_tcp.wait_for_line("");
    let run = |name: &str, script: &str| {
        let mut command =
            daemon.run(&["--sock", &format!("127.0.0.1:{port}"), "--share", "k", "sh", "-c", script]);
        let out = fs::File::create(daemon.folder().join(name)).unwrap();
        Process::spawn(command.stdout(out).stderr(Stdio::piped()))
    };
    for (bytes, code) in [(65_536, 3), (65_537, 79)] {
        let holds = format!(
            "touch began; until test -e go; do sleep 0.01; done; head -c {bytes} /dev/urandom; exit 3"
        );
        let mut holding = run("one", &holds);
        wait_until("the command runs", || daemon.folder().join("began").exists());
        let mut waiters = ["two", "three"].map(|name| run(name, "echo ran"));
        let status = || {
            let sock = format!("127.0.0.1:{port}");
            finish(&mut daemon.kmutex(&["status", "--json", "--sock", &sock])).assert_silent(0)
        };
        wait_until("the waiters", || status().contains("\"waiting\":2"));
        // As in `wait_for_waiters`.
        status();
        fs::write(daemon.folder().join("go"), "").unwrap();
        assert_eq!(holding.wait(), 3);
        let all = fs::read(daemon.folder().join("one")).unwrap();
        for (waiter, name) in waiters.iter_mut().zip(["two", "three"]) {
            assert_eq!(waiter.wait(), code);
            let its = fs::read(daemon.folder().join(name)).unwrap();
            assert!(if code == 3 {
                its == all
            } else {
                its.is_empty() && waiter.stderr().contains("64 KiB")
            });
        }
        ["go", "began"].iter().for_each(|name| fs::remove_file(daemon.folder().join(name)).unwrap());
    }
}

/// A TCP address whose port was free a moment ago.
#[cfg(feature = "etcd")]
pub fn free_addr() -> String {
    format!("127.0.0.1:{}", free_port())
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
#[ignore = "acts as two users, which only root can"]
fn the_result_is_for_the_same_user_and_roots_for_all_only_where_the_daemon_says_so() {
    for (options, is_given) in
        [(&["--mode", "666"][..], false), (&["--mode", "666", "--share-across-users"], true)]
    {
        let daemon = Daemon::with(options);
        open_to_all(daemon.folder());
        let user = OtherUser::new();
        let other = |share: &str| {
            let mut command = user.command(user.kmutex());
            command.args(["run", "--trust-uid", "0", share, "k", "sh", "-c", "echo ran; exit 9"]);
            command.env("KMUTEX_SOCK", daemon.sock());
            command
        };
        for share in ["--share", "--share=live"] {
            let mut holding = holder(&daemon, &[], "exit 3");
            let its = std::thread::scope(|scope| {
                let waiter = scope.spawn(|| finish(&mut other(share)));
                wait_for_waiters(&daemon, 1);
                assert_eq!(finish_holder(&mut holding), 3);
                waiter.join().unwrap()
            });
            match is_given {
                true => assert_eq!((its.code, its.stdout.as_str()), (3, "first\n")),
                false => its.assert_error(79, &["another user's"]),
            }
        }
        // Nor does the other user give anything to root, or find what root's run has left.
        let mine =
            finish(&mut daemon.run(&["--share", "--fresh", "1h", "k", "echo", "root's"])).assert_silent(0);
        assert_eq!(mine, "root's\n");
        let its = finish(&mut other("--share"));
        assert_eq!((its.code, its.stdout.as_str()), (9, "ran\n"));
    }
}

#[test]
fn what_a_hostile_holder_passes_is_no_result_and_blocks_nothing() {
    let daemon = Daemon::start();
    let sparse = kmutex::output::OutputFile::new().unwrap();
    fs::File::from(sparse.as_fd().try_clone_to_owned().unwrap()).set_len(1 << 40).unwrap();
    let (pipe, _writer) = std::io::pipe().unwrap();
    let folder = fs::File::open("/").unwrap();
    let garbage = {
        let path = daemon.folder().join("garbage");
        fs::write(&path, "no output").unwrap();
        fs::File::open(path).unwrap()
    };
    for passed in
        [Some(pipe.as_fd()), Some(folder.as_fd()), Some(sparse.as_fd()), Some(garbage.as_fd()), None]
    {
        let mut holding = daemon.wire();
        holding.open(r#"{"type":"lock","key":"k","share":"whole"}"#).answer_of("granted");
        let mut waiters = ["--share", "--share=live"].map(|share| {
            Process::spawn(waiter(&daemon, &[share]).stdout(Stdio::piped()).stderr(Stdio::piped()))
        });
        wait_for_waiters(&daemon, 2);
        match passed {
            Some(passed) => holding.send_with("{\"type\":\"output\"}\n", passed),
            None => drop(holding.request(r#"{"type":"output"}"#)),
        }
        holding.request(r#"{"type":"grown"}"#).request(r#"{"type":"piece","stream":1,"data":"%"}"#);
        holding.request(r#"{"type":"release","outcome":{"exit":0}}"#);
        while holding.answer()["type"] != "released" {}
        assert_eq!(waiters[0].wait(), 79, "{passed:?}");
        let code = waiters[1].wait();
        assert!(matches!(code, 79 | 74), "{passed:?}: {code}, {}", waiters[1].stderr());
        assert_eq!(waiters[0].line(), None);
    }
    wait_until("nothing to be left", || outputs_of(&daemon) == 0);
    // A client that passes a descriptor with anything else, or holds nothing.
    let mut stranger = daemon.wire();
    stranger.open(r#"{"type":"ping"}"#).answer_of("pong");
    stranger.send_with("{\"type\":\"output\"}\n{\"type\":\"ping\"}\n", folder.as_fd());
    stranger.answer_of("pong");
}

#[test]
fn a_release_counts_though_its_client_is_gone_before_an_earlier_request_is_answered() {
    let daemon = Daemon::start();
    let (mut holding, mut waiting) = (daemon.wire(), daemon.wire());
    holding.open(r#"{"type":"lock","key":"k"}"#).answer_of("granted");
    waiting.open(r#"{"type":"lock","key":"k"}"#).answer_of("waiting");
    kill(daemon.pid(), Signal::SIGSTOP).unwrap();
    // The kernel lets the daemon read no further than a descriptor at a time.
    holding.send_with("{\"type\":\"nonsense\"}\n", fs::File::open("/").unwrap().as_fd());
    holding.request(r#"{"type":"release","outcome":{"exit":3}}"#);
    drop(holding);
    kill(daemon.pid(), Signal::SIGCONT).unwrap();
    assert_eq!(waiting.answer_of("finished")["outcome"]["exit"], 3);
}

#[test]
fn a_waiter_that_does_not_read_what_it_is_told_grows_nothing() {
    let daemon = Daemon::start();
    let mut holding = daemon.wire();
    holding.open(r#"{"type":"lock","key":"k","share":"whole"}"#).answer_of("granted");
    let mut file = kmutex::output::OutputFile::new().unwrap();
    file.append(kmutex::output::Stream::Stdout, b"x").unwrap();
    holding.send_with("{\"type\":\"output\"}\n", file.for_readers().unwrap().as_fd());
    let mut deaf = daemon.wire();
    deaf.open(r#"{"type":"lock","key":"k","share":"live"}"#).answer_of("waiting");
    holding.answer_of("followed");
    for _ in 0..30_000 {
        holding.request(r#"{"type":"grown"}"#);
    }
    holding.request(r#"{"type":"ping"}"#).answer_of("pong");
    deaf.answer_of("output");
    deaf.answer_of("grown");
}

#[test]
fn waiters_that_are_told_in_later_turns_get_the_result_too() {
    let daemon = Daemon::start();
    let mut holding = daemon.wire();
    holding.open(r#"{"type":"lock","key":"k","share":"whole"}"#).answer_of("granted");
    let file = kmutex::output::OutputFile::of(b"x", b"").unwrap();
    holding.send_with("{\"type\":\"output\"}\n", file.as_fd());
    let mut waiters: Vec<_> = (0..400).map(|_| daemon.wire()).collect();
    for waiter in &mut waiters {
        waiter.open(r#"{"type":"lock","key":"k","share":"whole"}"#);
    }
    waiters.iter_mut().for_each(|waiter| drop(waiter.answer_of("waiting")));
    holding.request(r#"{"type":"release","outcome":{"exit":0}}"#).answer_of("released");
    for waiter in &mut waiters {
        assert_eq!(waiter.answer_of("finished")["output"], "descriptor");
    }
    wait_until("no output to be left", || outputs_of(&daemon) == 0);
}

#[test]
fn what_cannot_be_meant_together_is_refused() {
    let daemon = Daemon::start();
    for options in [
        &["--share", "--no-fork"][..],
        &["--share", "--queue"],
        &["--share", "--newest"],
        &["--share", "--replace"],
        &["--share", "--replace-after", "1"],
        &["--share", "--shared"],
        &["--share", "--slots", "2"],
        &["--share=live", "--coalesce"],
        &["--share=half"],
        &["--share", "--stale", "1h"],
        &["--fresh", "1m", "--stale", "1h"],
        &["--share", "--fresh", "1h", "--stale", "1h"],
        &["--share", "--fresh", "1h", "--stale", "1m"],
        &["--share", "--share-max", "64X"],
        &["--share", "--share-max", "99999999999999G"],
    ] {
        finish(&mut daemon.run(&[options, &["k", "true"]].concat())).assert_error(64, &[]);
    }
    finish(&mut daemon.run(&["--share", "-k", "a", "-k", "b", "true"])).assert_error(64, &["several -k"]);
    let refused = r#"{"type":"lock","key":"k","share":"whole","SLOT":true}"#;
    for field in ["\"slots\":2,\"x\"", "\"shared\"", "\"exec\""] {
        let mut wire = daemon.wire();
        wire.open(&refused.replace("\"SLOT\"", field));
        assert_eq!(wire.answer_of("error")["code"], "bad_request", "{field}");
    }
    let mut wire = daemon.wire();
    wire.open(r#"{"type":"lock","key":"k","stale_ms":5}"#);
    assert_eq!(wire.answer_of("error")["code"], "bad_request");
}

#[test]
fn a_program_shares_results_too() {
    use kmutex::addr::Addr;
    use kmutex::client::{Client, LockOptions, LockReply};
    use kmutex::proto::Outcome;

    let daemon = Daemon::start();
    let client = || Client::connect(&Addr::Unix(daemon.sock())).unwrap();
    let options = LockOptions {
        share: true,
        fresh: Duration::from_millis(1),
        stale: Duration::from_secs(60),
        ..Default::default()
    };
    let mut mine = client();
    let guard = mine.lock_with("k", &options).unwrap().unwrap();
    assert!(guard.stale().is_none());
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| client().lock_with("k", &options).unwrap().unwrap_err());
        wait_for_waiters(&daemon, 1);
        guard.finish_with(Outcome::Exit(0), b"out\0", b"err").unwrap();
        let LockReply::Shared(run) = waiter.join().unwrap() else { panic!("no result") };
        assert_eq!((run.outcome, run.past.is_none()), (Outcome::Exit(0), true));
        assert_eq!((run.stdout().unwrap(), run.stderr().unwrap()), (b"out\0".to_vec(), b"err".to_vec()));
    });
    // It is old by now: one client runs anew, and the next one has the result at once.
    std::thread::sleep(Duration::from_millis(2));
    let guard = mine.lock_with("k", &options).unwrap().unwrap();
    assert_eq!(guard.stale().unwrap().stdout().unwrap(), b"out\0");
    let mut other = client();
    let LockReply::Shared(run) = other.lock_with("k", &options).unwrap().unwrap_err() else {
        panic!("no result")
    };
    assert!(run.past.is_some());
    drop(guard);
}
