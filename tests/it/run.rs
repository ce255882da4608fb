//! `kmutex run`: who runs and who does not, in which order, for how long they wait, and what the command is given.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::harness::*;

/// What other scripts rely on: these two numbers are in the manual.
const FINISHED: i32 = 79;
const BUSY: i32 = 75;

#[test]
fn who_waits_once_does_not_run_and_exits_with_79() {
    let daemon = Daemon::start();
    for status in [0, 3] {
        let holder = daemon.hold("k");
        let waiter = |_| Process::spawn(daemon.run(&["k", "touch", "ran"]).stderr(Stdio::piped()));
        let waiters: Vec<Process> = (0..3).map(waiter).collect();
        daemon.wait_for_counts("k", 1, 3);
        assert_eq!(holder.finish(status), i32::from(status));
        for mut waiter in waiters {
            assert_eq!(waiter.wait(), FINISHED, "the holder's status {status} makes no difference");
            assert_eq!(std::io::read_to_string(waiter.child.stderr.take().unwrap()).unwrap(), "");
        }
        assert!(!daemon.folder().join("ran").exists());
        assert_eq!(daemon.counts("k"), (0, 0));
    }
}

#[test]
fn the_exit_code_of_who_did_not_run_can_be_chosen() {
    let daemon = Daemon::start();
    for code in [0, 5, 255] {
        let holder = daemon.hold("k");
        let option = format!("--finished-exit-code={code}");
        let mut waiter = Process::spawn(&mut daemon.run(&[&option, "k", "false"]));
        daemon.wait_for_counts("k", 1, 1);
        holder.finish(0);
        assert_eq!(waiter.wait(), code);
    }
}

#[test]
fn a_queue_is_served_in_order_of_arrival() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut waiters = Vec::new();
    for number in 0..6 {
        let script = format!("echo {number} >> order");
        waiters.push(Process::spawn(&mut daemon.run(&["--queue", "k", "sh", "-c", &script])));
        daemon.wait_for_counts("k", 1, number + 1);
    }
    holder.finish(0);
    for mut waiter in waiters {
        assert_eq!(waiter.wait(), 0);
    }
    assert_eq!(fs::read_to_string(daemon.folder().join("order")).unwrap(), "0\n1\n2\n3\n4\n5\n");
}

#[test]
fn once_and_queue_wait_side_by_side() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut once = Process::spawn(&mut daemon.run(&["k", "touch", "once"]));
    let mut queue = Process::spawn(&mut daemon.run(&["--queue", "k", "touch", "queue"]));
    daemon.wait_for_counts("k", 1, 2);
    holder.finish(0);
    assert_eq!((once.wait(), queue.wait()), (FINISHED, 0));
    assert!(!daemon.folder().join("once").exists());
    assert!(daemon.folder().join("queue").exists());
}

#[test]
fn other_keys_are_other_locks() {
    let daemon = Daemon::start();
    let _holder = daemon.hold("k");
    finish(&mut daemon.run(&["-n", "K", "true"])).assert_silent(0);
    finish(&mut daemon.run(&["-n", "k ", "true"])).assert_silent(0);
    finish(&mut daemon.run(&["-n", "k", "true"])).assert_silent(BUSY);
}

#[test]
fn who_does_not_want_to_wait_is_refused_at_once() {
    let daemon = Daemon::start();
    let _holder = daemon.hold("k");
    let ways: [&[&str]; 7] = [
        &["-n"],
        &["--nb"],
        &["--nonblock"],
        &["-w", "0"],
        &["--wait", "0.0"],
        &["--timeout=0"],
        &["-n", "--queue"],
    ];
    for way in ways {
        for (code, number) in [(&[][..], BUSY), (&["-E", "0"], 0), (&["--conflict-exit-code", "255"], 255)] {
            let args = [way, code, &["k", "touch", "ran"]].concat();
            finish(&mut daemon.run(&args)).assert_silent(number);
        }
    }
    assert!(!daemon.folder().join("ran").exists());
    assert_eq!(daemon.counts("k"), (1, 0), "who was refused does not wait");
}

#[test]
fn who_waits_for_a_time_is_refused_when_it_is_up() {
    let daemon = Daemon::start();
    let _holder = daemon.hold("k");
    for (options, code) in
        [(&["-w", "0.25"][..], BUSY), (&["--queue", "--timeout", ".25"], BUSY), (&["-w0.25", "-E4"], 4)]
    {
        let begin = Instant::now();
        finish(&mut daemon.run(&[options, &["k", "touch", "ran"]].concat())).assert_silent(code);
        assert!(begin.elapsed() >= Duration::from_millis(250), "too early: {:?}", begin.elapsed());
    }
    assert!(!daemon.folder().join("ran").exists());
    daemon.wait_for_counts("k", 1, 0);
}

#[test]
fn a_time_to_wait_that_is_long_enough_changes_nothing() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut once = Process::spawn(&mut daemon.run(&["-w", "600", "k", "false"]));
    let mut queue = Process::spawn(&mut daemon.run(&["-w", "600", "--queue", "k", "sh", "-c", "exit 7"]));
    // More seconds than any clock counts: that is for ever.
    let mut ages = Process::spawn(&mut daemon.run(&["-w", "1e19", "k", "false"]));
    daemon.wait_for_counts("k", 1, 3);
    holder.finish(0);
    assert_eq!((once.wait(), queue.wait(), ages.wait()), (FINISHED, 7, FINISHED));
}

#[test]
fn one_after_the_other_never_collide() {
    let daemon = Daemon::start();
    for _ in 0..200 {
        finish(&mut daemon.run(&["-n", "k", "true"])).assert_silent(0);
    }
    for _ in 0..200 {
        finish(&mut daemon.run(&["k", "true"])).assert_silent(0);
    }
}

#[test]
fn a_lock_can_be_shared() {
    let daemon = Daemon::start();
    let first = daemon.hold_with(&["-s"], "k");
    let second = daemon.hold_with(&["--shared"], "k");
    assert_eq!(daemon.counts("k"), (2, 0));
    for exclusive in [&["-n"][..], &["-n", "-x"], &["-n", "-e"], &["-n", "--exclusive"], &["-n", "--slots=9"]]
    {
        finish(&mut daemon.run(&[exclusive, &["k", "true"]].concat())).assert_silent(BUSY);
    }
    let mut writer = Process::spawn(&mut daemon.run(&["-x", "--queue", "k", "true"]));
    daemon.wait_for_counts("k", 2, 1);
    // A writer that waits comes before the readers that come later.
    finish(&mut daemon.run(&["-s", "-n", "k", "true"])).assert_silent(BUSY);
    first.finish(0);
    daemon.wait_for_counts("k", 1, 1);
    second.finish(0);
    assert_eq!(writer.wait(), 0);
    let exclusive = daemon.hold_with(&["-x"], "k");
    finish(&mut daemon.run(&["-s", "-n", "k", "true"])).assert_silent(BUSY);
    exclusive.finish(0);
}

#[test]
fn slots_let_that_many_in() {
    let daemon = Daemon::start();
    let first = daemon.hold_with(&["--slots", "2"], "k");
    let second = daemon.hold_with(&["--slots", "2"], "k");
    finish(&mut daemon.run(&["--slots", "2", "-n", "k", "true"])).assert_silent(BUSY);
    let mut third = Process::spawn(&mut daemon.run(&["--slots", "2", "--queue", "k", "sh", "-c", "exit 6"]));
    daemon.wait_for_counts("k", 2, 1);
    first.finish(0);
    assert_eq!(third.wait(), 6);
    finish(&mut daemon.run(&["-n", "k", "true"])).assert_silent(BUSY);
    second.finish(0);
}

/// Each argument on a line of its own; `\0` ends an argument, since an argument may have a newline in it.
const PRINT_ARGUMENTS: &str = r#"print map "$_\0", @ARGV"#;

#[test]
fn the_command_gets_its_arguments_as_they_are() {
    let daemon = Daemon::start();
    let arguments: [&str; 13] = [
        "-n",
        "--",
        "--queue",
        "",
        "  two  words ",
        "*",
        "$HOME",
        "-c",
        "a\nb",
        "'\"\\",
        "-",
        "--version",
        "é",
    ];
    let mut expected = arguments.map(|text| format!("{text}\0")).concat().into_bytes();
    expected.extend(b"\xff\xfe\0");
    for separator in [&["--"][..], &[]] {
        let mut command =
            daemon.run(&[&["k"][..], separator, &["perl", "-e", PRINT_ARGUMENTS, "--"]].concat());
        command.args(arguments).arg(OsString::from_vec(b"\xff\xfe".to_vec()));
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&expected));
    }
}

#[test]
fn options_may_stand_behind_the_key_but_not_behind_the_command() {
    let daemon = Daemon::start();
    let _holder = daemon.hold("k");
    finish(&mut daemon.run(&["k", "-n", "true"])).assert_silent(BUSY);
    finish(&mut daemon.run(&["k", "-n", "-E", "3", "--", "true"])).assert_silent(3);
    assert_eq!(finish(&mut daemon.run(&["free", "echo", "-n", "hi"])).assert_silent(0), "hi");
    assert_eq!(
        finish(&mut daemon.run(&["--", "-key", "sh", "-c", "echo $KMUTEX_KEY"])).assert_silent(0),
        "-key\n"
    );
}

#[test]
fn a_shell_command_is_run_with_the_users_shell() {
    let daemon = Daemon::start();
    let shell = daemon.folder().join("shell");
    write_script(&shell, "#!/bin/sh\nprintf '%s|' my-shell \"$@\"\n");
    let command = "echo $((40 + 2)) && exit 9";
    for option in ["-c", "--command"] {
        let mut run = daemon.run(&["k", option, command]);
        let said = finish(run.env("SHELL", &shell)).assert_silent(0);
        assert_eq!(said, format!("my-shell|-c|{command}|"));
        assert_eq!(finish(run.env_remove("SHELL")).assert_silent(9), "42\n", "without $SHELL it is /bin/sh");
        assert_eq!(finish(run.env("SHELL", "")).assert_silent(9), "42\n", "nor is an empty one of use");
    }
}

#[test]
fn the_exit_status_is_the_commands_own() {
    let daemon = Daemon::start();
    for status in 0..=255 {
        finish(&mut daemon.run(&["k", "sh", "-c", &format!("exit {status}")])).assert_silent(status);
    }
}

#[test]
fn the_exit_status_of_a_command_that_died_of_a_signal_is_128_and_the_signal() {
    let daemon = Daemon::start();
    // Signals that dump a core, signals that kmutex passes on, and real-time signals, which have no names.
    for signal in [1, 2, 3, 6, 7, 9, 10, 11, 12, 13, 14, 15, 34, 50, 64] {
        let script = format!("ulimit -c 0; exec perl -e 'kill {signal}, $$; exit 0'");
        finish(&mut daemon.run(&["k", "sh", "-c", &script])).assert_silent(128 + signal);
        finish(&mut daemon.run(&["-n", "k", "true"])).assert_silent(0);
    }
}

#[test]
fn the_command_knows_its_key_its_token_and_the_socket() {
    let daemon = Daemon::start();
    let print = ["perl", "-e", r#"print "$ENV{KMUTEX_KEY}|$ENV{KMUTEX_TOKEN}|$ENV{KMUTEX_SOCK}""#];
    let mut last = 0;
    for sock in [&["--sock", "sock"][..], &["--sock", "./sock"], &[]] {
        let key = "a key, with = and \n and é";
        let said = finish(&mut daemon.run(&[sock, &[key], &print].concat())).assert_silent(0);
        let parts: Vec<&str> = said.split('|').collect();
        assert_eq!(parts[0], key);
        let token: u64 = parts[1].parse().unwrap();
        assert!(token > last, "tokens grow: {token} after {last}");
        last = token;
        assert_eq!(fs::canonicalize(parts[2]).unwrap(), fs::canonicalize(daemon.sock()).unwrap());
        assert!(parts[2].starts_with('/'), "it is of use in any directory: {}", parts[2]);
    }
}

#[test]
fn a_run_within_a_run_finds_the_same_daemon_from_anywhere() {
    let daemon = Daemon::start();
    let script =
        format!("cd / && {KMUTEX} run --no-autostart -n inner true && {KMUTEX} run -n outer true 2>&1");
    let mut outer = daemon.run(&["--sock", "sock", "outer", "sh", "-c", &script]);
    let inner = finish(outer.env_remove("KMUTEX_SOCK"));
    assert_eq!(inner.code, 75, "{inner:?}");
    assert!(inner.stdout.contains("\"outer\" is held by the command that this is part of"), "{inner:?}");
}

#[test]
fn the_socket_of_a_tcp_daemon_is_told_as_it_was_given() {
    let daemon = Daemon::with(&["--sock", "0"]);
    let line = daemon.wait_for_log("serving on 127.0.0.1:");
    let port = line.rsplit(':').next().unwrap().trim();
    for sock in [port.to_string(), format!("127.0.0.1:{port}")] {
        let said =
            finish(&mut daemon.run(&["--sock", &sock, "k", "printenv", "KMUTEX_SOCK"])).assert_silent(0);
        assert_eq!(said.trim_end(), sock);
    }
}

#[test]
fn tokens_grow() {
    let daemon = Daemon::start();
    let mut last = 0;
    for key in ["a", "b", "a", "b", "a"] {
        let said = finish(&mut daemon.run(&[key, "printenv", "KMUTEX_TOKEN"])).assert_silent(0);
        let token: u64 = said.trim_end().parse().unwrap();
        assert!(token > last, "{token} after {last}");
        last = token;
    }
}

#[test]
fn input_output_and_error_are_the_commands() {
    let daemon = Daemon::start();
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let copy = r#"binmode $_ for *STDIN, *STDOUT, *STDERR; local $/; $_ = <STDIN>; print STDOUT $_; print STDERR $_"#;
    let (mut stdout, mut stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let mut command = daemon.run(&["k", "perl", "-e", copy]);
    command.stdin(Stdio::piped()).stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
    let mut process = Process::spawn(&mut command);
    process.child.stdin.take().unwrap().write_all(&bytes).unwrap();
    assert_eq!(process.wait(), 0);
    for file in [&mut stdout, &mut stderr] {
        assert!(read_from_start(file) == bytes, "what comes out is not what went in");
    }
}

#[test]
fn it_says_what_it_does_when_asked() {
    let daemon = Daemon::start();
    let finished = finish(&mut daemon.run(&["--verbose", "a \"key\"", "echo", "some", "words"]));
    assert_eq!((finished.code, finished.stdout.as_str()), (0, "some words\n"));
    let lines: Vec<&str> = finished.stderr.lines().collect();
    let [got, running] = lines[..] else { panic!("two lines: {lines:?}") };
    let seconds = got
        .strip_prefix(r#"kmutex: acquired the lock "a \"key\"" after "#)
        .and_then(|s| s.strip_suffix(" s"));
    assert!(seconds.is_some_and(|s| s.parse::<f64>().is_ok()), "{got}");
    assert_eq!(running, "kmutex: running echo some words");
}

#[test]
fn it_says_each_thing_in_one_line() {
    let daemon = Daemon::start();
    let finished = finish(&mut daemon.run(&["--verbose", "k", "sh", "-c", "# two\n: lines\x1b[2J"]));
    assert_eq!(finished.code, 0);
    assert_eq!(finished.stderr.lines().count(), 2, "{finished:?}");
    assert!(!finished.stderr.contains('\x1b'), "{finished:?}");
}

#[test]
fn a_key_may_be_1024_bytes_of_anything_that_is_text() {
    let daemon = Daemon::start();
    for key in ["k".repeat(1024), "é".repeat(512), "\u{1}\n\t".into(), " ".into()] {
        let said =
            finish(&mut daemon.run(&[OsStr::new(&key), OsStr::new("printenv"), OsStr::new("KMUTEX_KEY")]));
        assert_eq!(said.assert_silent(0), format!("{key}\n"));
    }
}
