//! What goes wrong in `kmutex run`: each exit code of kmutex's own, and the one line that says why.
//!
//! 70 (a bug in kmutex) has no test, since there is no known way to get it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use crate::harness::*;
use crate::other_user::OtherUser;

const USAGE: i32 = 64;
const BAD_DATA: i32 = 65;
const UNAVAILABLE: i32 = 69;
const OS: i32 = 71;
const LOST: i32 = 74;
const PROTOCOL: i32 = 76;
const NOT_PERMITTED: i32 = 77;
const CANNOT_EXECUTE: i32 = 126;
const NOT_FOUND: i32 = 127;

/// A file that the command leaves if it runs after all.
const PROOF: &str = "ran";

#[test]
fn a_wrong_command_line_is_64() {
    let daemon = Daemon::start();
    let long = format!("/{}", "x".repeat(107));
    let cases: [(&[&str], &[&str]); 21] = [
        (&["-E", "300", "k", "touch", PROOF], &["300", "--conflict-exit-code"]),
        (&["-E", "-1", "k", "touch", PROOF], &["-1", "--conflict-exit-code"]),
        (&["-E", "", "k", "touch", PROOF], &["--conflict-exit-code"]),
        (&["--finished-exit-code", "256", "k", "touch", PROOF], &["256", "--finished-exit-code"]),
        (&["-w", "-1", "k", "touch", PROOF], &["-1", "--wait", "seconds"]),
        (&["-w", "x", "k", "touch", PROOF], &["'x'", "--wait", "seconds"]),
        (&["-w", "nan", "k", "touch", PROOF], &["nan", "--wait", "seconds"]),
        (&["-w", "", "k", "touch", PROOF], &["--wait", "seconds"]),
        (&["-s", "-x", "k", "touch", PROOF], &["--shared", "--exclusive"]),
        (&["-s", "--slots", "2", "k", "touch", PROOF], &["--shared", "--slots"]),
        (&["-x", "--slots", "2", "k", "touch", PROOF], &["--exclusive", "--slots"]),
        (&["--slots", "0", "k", "touch", PROOF], &["'0'", "--slots"]),
        (&["--slots", "1000001", "k", "touch", PROOF], &["1000001", "--slots"]),
        (&["-F", "-o", "k", "touch", PROOF], &["--no-fork", "--close"]),
        (&["-c", "touch ran", "k", "touch", PROOF], &["--command"]),
        (&["--no-such-option", "k", "touch", PROOF], &["--no-such-option"]),
        (&["k"], &["nothing to run"]),
        (&[], &["KEY"]),
        (&["--sock", "65536", "k", "touch", PROOF], &["65536", "port"]),
        (&["--sock", "", "k", "touch", PROOF], &["empty"]),
        (&["--sock", &long, "k", "touch", PROOF], &["108 bytes", "107"]),
    ];
    for (args, words) in cases {
        finish(&mut daemon.run(args)).assert_error(USAGE, words);
    }
    finish(&mut daemon.kmutex::<&str>(&[])).assert_error(USAGE, &["subcommand"]);
    finish(&mut daemon.kmutex(&["walk"])).assert_error(USAGE, &["walk"]);
    assert!(!daemon.folder().join(PROOF).exists());
}

#[test]
fn a_key_that_is_none_is_65() {
    let daemon = Daemon::start();
    let (long, long_text) = ("k".repeat(1025), "é".repeat(513));
    let not_utf8 = OsString::from_vec(b"k\xff".to_vec());
    let cases: [(&OsStr, &[&str]); 4] = [
        (OsStr::new(""), &["key", "empty"]),
        (OsStr::new(&long), &["key", "1025 bytes", "1024"]),
        (OsStr::new(&long_text), &["key", "1026 bytes", "1024"]),
        (&not_utf8, &["key", "UTF-8"]),
    ];
    for (key, words) in cases {
        finish(&mut daemon.run(&[key, OsStr::new("touch"), OsStr::new(PROOF)])).assert_error(BAD_DATA, words);
    }
    assert!(!daemon.folder().join(PROOF).exists());
    assert!(!daemon.log().contains("connect:"), "no daemon was asked:\n{}", daemon.log());
}

#[test]
fn no_daemon_is_69() {
    let mut daemon = Daemon::start();
    let sock = daemon.sock();
    daemon.kill();
    let name = sock.to_str().unwrap();
    // The socket of a daemon that is dead, and then none at all.
    finish(&mut daemon.run(&["k", "touch", PROOF])).assert_error(UNAVAILABLE, &[name, "refused"]);
    fs::remove_file(&sock).unwrap();
    finish(&mut daemon.run(&["k", "touch", PROOF])).assert_error(UNAVAILABLE, &[name, "No such file"]);
    let inside = daemon.folder().join("log/sock");
    let mut run = daemon.run(&["k", "touch", PROOF]);
    finish(run.env("KMUTEX_SOCK", &inside))
        .assert_error(UNAVAILABLE, &[inside.to_str().unwrap(), "Not a directory"]);
    assert!(!daemon.folder().join(PROOF).exists());
    assert!(!sock.exists(), "--no-autostart starts none");
}

#[test]
fn a_daemon_that_closes_without_a_word_is_69() {
    let server = FakeServer::start(|_| {});
    finish(&mut server.run(&["k", "true"])).assert_error(UNAVAILABLE, &["closed"]);
}

#[test]
fn a_daemon_that_does_not_speak_protocol_2_is_76() {
    let hello = r#"{"type":"hello","version":"9","pid":1}"#;
    let cases: [(Vec<u8>, &[&str]); 8] = [
        // Protocol 1 takes the preamble for a key.
        (b"O".to_vec(), &["protocol 1"]),
        (b"220 mail.example ESMTP\r\n".to_vec(), &["protocol"]),
        (b"{\"type\":\n".to_vec(), &["protocol 2"]),
        (b"{\"type\":\"\x1b[2J\nhello\"}\n".to_vec(), &["protocol 2"]),
        (b"[1]\n".to_vec(), &["protocol"]),
        ([b"{".to_vec(), vec![b'a'; 70_000]].concat(), &["longer than 65536 bytes"]),
        (format!("{hello}\n{{\"type\":\"pong\"}}\n").into(), &["protocol 2", "unexpected"]),
        (
            format!("{hello}\n{{\"type\":\"error\",\"code\":\"x\",\"message\":\"no locks today\"}}\n").into(),
            &["no locks today"],
        ),
    ];
    for (answer, words) in cases {
        let server = FakeServer::start(move |stream| {
            // The client may close before it has read everything.
            let _ = stream.write_all(&answer);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        finish(&mut server.run(&["k", "true"])).assert_error(PROTOCOL, words);
    }
}

#[test]
fn a_daemon_that_says_nothing_is_not_waited_for_longer_than_was_asked() {
    let server = FakeServer::start(|stream| {
        let _ = stream.read_to_end(&mut Vec::new());
    });
    finish(&mut server.run(&["-w", "0.2", "k", "true"])).assert_silent(75);
}

#[test]
fn a_place_where_no_daemon_can_be_started_is_69() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "precious").unwrap();
    let nowhere = folder.path().join("no/such/folder/sock");
    for (path, words) in [(&nowhere, "No such file"), (&file, "not a socket")] {
        let mut command = Command::new(KMUTEX);
        command.args(["run", "--sock"]).arg(path).args(["k", "touch"]).arg(folder.path().join(PROOF));
        finish(&mut command).assert_error(UNAVAILABLE, &[path.to_str().unwrap(), words]);
    }
    assert!(!folder.path().join(PROOF).exists());
    assert_eq!(fs::read_to_string(file).unwrap(), "precious");
}

#[test]
fn a_command_that_is_not_there_is_127() {
    let daemon = Daemon::start();
    let script = daemon.folder().join("script");
    write_script(&script, "#!/no/such/interpreter\n");
    for how in [&[][..], &["-o"], &["-F"]] {
        for command in
            ["no-such-command", "/no/such/command", "./no-such-command", "", script.to_str().unwrap()]
        {
            let mut run = daemon.run(&[how, &["k", "--", command, "argument"]].concat());
            finish(&mut run).assert_error(NOT_FOUND, &[command, "No such file"]);
        }
    }
    daemon.wait_for_counts("k", 0, 0);
}

#[test]
fn a_command_that_cannot_be_executed_is_126() {
    let daemon = Daemon::start();
    let file = daemon.folder().join("file");
    fs::write(&file, "#!/bin/sh\n").unwrap();
    let inside = file.join("inside");
    for how in [&[][..], &["-o"], &["-F"]] {
        for (command, why) in [
            (&*file, "Permission denied"),
            (daemon.folder(), "Permission denied"),
            (&*inside, "Not a directory"),
        ] {
            let command = command.to_str().unwrap();
            let mut run = daemon.run(&[how, &["k", "--", command]].concat());
            finish(&mut run).assert_error(CANNOT_EXECUTE, &[command, why]);
        }
    }
    daemon.wait_for_counts("k", 0, 0);
}

#[test]
fn who_waits_for_a_command_that_cannot_be_executed_is_told() {
    let daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut broken = Process::spawn(daemon.run(&["--queue", "k", "/"]).stderr(Stdio::null()));
    daemon.wait_for_counts("k", 1, 1);
    let mut next = Process::spawn(&mut daemon.run(&["--queue", "k", "true"]));
    daemon.wait_for_counts("k", 1, 2);
    holder.finish(0);
    assert_eq!((broken.wait(), next.wait()), (CANNOT_EXECUTE, 0));
    daemon.wait_for_log("exit 126");
}

#[test]
fn what_has_control_characters_is_named_without_them() {
    let daemon = Daemon::start();
    finish(&mut daemon.run(&["k", "a\nb\x1b[2Jc"])).assert_error(NOT_FOUND, &["a?b?[2Jc"]);
    finish(&mut daemon.run(&["--a\nb", "k", "true"])).assert_error(USAGE, &["--a"]);
    finish(&mut daemon.run(&["--sock", "/a\n\nb", "k", "true"])).assert_error(UNAVAILABLE, &["/a??b"]);
}

#[test]
fn an_error_that_cannot_be_printed_keeps_its_exit_code() {
    let daemon = Daemon::start();
    let run = |args: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Process::spawn(daemon.run(args).stderr(writer)).wait()
    };
    assert_eq!(run(&["", "true"]), BAD_DATA);
    assert_eq!(run(&["k", "/"]), CANNOT_EXECUTE);
    assert_eq!(run(&["--verbose", "k", "sh", "-c", "exit 3"]), 3);
}

#[test]
fn what_the_kernel_refuses_is_71() {
    let daemon = Daemon::start();
    let mut command = Command::new("sh");
    // The lock's descriptor is the fourth, and there may be no fifth.
    command.args(["-c", r#"ulimit -n 4 && exec "$0" run --no-autostart k true"#, KMUTEX]);
    let finished = finish(command.env("KMUTEX_SOCK", daemon.sock()).stdin(Stdio::null()));
    finished.assert_error(OS, &["cannot", "open files"]);
    daemon.wait_for_counts("k", 0, 0);
}

#[test]
fn a_lock_that_is_lost_is_74() {
    for (on_lost, ends) in [("kill", "stopping the command"), ("continue", "goes on without it")] {
        let mut daemon = Daemon::start();
        let mut command = daemon.run(&["--on-lost", on_lost, "k", "sh", "-c"]);
        command.arg("trap 'echo stopped; exit 5' TERM; echo holding; read line; echo went on");
        let mut process =
            Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()));
        process.wait_for_line("holding");
        daemon.kill();
        let journal = format!("{}.journal", daemon.sock().display());
        fs::remove_file(&journal).unwrap_or_else(|e| panic!("{journal}: {e}"));
        daemon.restart(&[]);
        let mut stderr = BufReader::new(process.child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        assert!(line.starts_with("kmutex: ") && line.contains("lost") && line.contains(ends), "{line}");
        if on_lost == "continue" {
            drop(process.child.stdin.take());
        }
        assert_eq!(process.line().unwrap(), if on_lost == "kill" { "stopped" } else { "went on" });
        assert_eq!(process.wait(), LOST);
        assert_eq!(std::io::read_to_string(stderr).unwrap(), "");
    }
}

#[test]
#[ignore = "needs root, to act as two users"]
fn a_socket_that_one_may_not_use_is_77() {
    let other = OtherUser::new();
    let folder = other.folder();
    let sock = folder.join("sock");
    let _daemon = other.serve(Command::new(other.kmutex()), &sock, &["--mode", "600"]);
    let mut command = other.command(other.kmutex());
    command.args(["run", "--sock"]).arg(&sock).args(["k", "true"]);
    finish(&mut command).assert_error(NOT_PERMITTED, &[sock.to_str().unwrap(), "Permission denied"]);
}

#[test]
#[ignore = "needs root, to act as two users"]
fn a_daemon_of_another_user_is_trusted_only_with_trust_uid() {
    let other = OtherUser::new();
    let folder = other.folder();
    let sock = folder.join("sock");
    let _daemon = other.serve(other.command(other.kmutex()), &sock, &["--mode", "666"]);
    let run = |options: &[&str]| {
        let mut command = Command::new(KMUTEX);
        command.args(["run", "--sock"]).arg(&sock).args(options).args(["k", "true"]);
        finish(&mut command)
    };
    let uid = OtherUser::UID.to_string();
    let whose = format!("uid {uid}");
    run(&[]).assert_error(NOT_PERMITTED, &[sock.to_str().unwrap(), &whose, "--trust-uid"]);
    run(&["--trust-uid", "1"]).assert_error(NOT_PERMITTED, &[&whose]);
    run(&["--trust-uid", &uid]).assert_silent(0);
    run(&["--trust-uid", "1", "--trust-uid", &uid]).assert_silent(0);
    let mut status = Command::new(KMUTEX);
    status.args(["status", "--sock"]).arg(&sock);
    finish(&mut status).assert_error(NOT_PERMITTED, &[&whose]);
}

#[test]
#[ignore = "needs root, to act as two users"]
fn roots_daemon_is_trusted_by_everybody() {
    let other = OtherUser::new();
    let folder = other.folder();
    let sock = folder.join("sock");
    let _daemon = other.serve(Command::new(other.kmutex()), &sock, &["--mode", "666"]);
    let mut command = other.command(other.kmutex());
    command.args(["run", "--sock"]).arg(&sock).args(["k", "sh", "-c", "exit 4"]);
    finish(&mut command).assert_silent(4);
}

/// A server that is no daemon, in a folder of its own. It does the same with each connection, and ends with the test.
struct FakeServer {
    folder: tempfile::TempDir,
}

impl FakeServer {
    fn start(serve: impl Fn(&mut std::os::unix::net::UnixStream) + Send + 'static) -> FakeServer {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("sock")).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&mut stream.unwrap());
            }
        });
        FakeServer { folder }
    }

    fn run(&self, args: &[&str]) -> Command {
        let mut command = Command::new(KMUTEX);
        command.args(["run", "--no-autostart", "--sock"]).arg(self.folder.path().join("sock")).args(args);
        command.stdin(Stdio::null());
        command
    }
}

#[test]
fn the_version_says_which_features_the_binary_has() {
    let output = Command::new(env!("CARGO_BIN_EXE_kmutex")).arg("--version").output().unwrap();
    let version = String::from_utf8(output.stdout).unwrap();
    assert_eq!(version, concat!("kmutex ", env!("CARGO_PKG_VERSION"), " (etcd)\n"));
}
