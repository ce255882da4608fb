//! `kmutex status`: what people see, and what programs read.

use std::process::{Command, Stdio};

use crate::harness::{Daemon, KMUTEX, Process, finish};

/// The rows of the table, cut into words.
fn table(daemon: &Daemon, args: &[&str]) -> Vec<Vec<String>> {
    let text = finish(daemon.kmutex(&["status"]).args(args)).assert_silent(0);
    text.lines().map(|line| line.split_whitespace().map(String::from).collect()).collect()
}

#[test]
fn the_table_tells_who_holds_and_who_waits() {
    let daemon = Daemon::start();
    let holder = daemon.hold("nightly");
    let waiter = Process::spawn(&mut daemon.run(&["--queue", "nightly", "true"]));
    daemon.wait_for_counts("nightly", 1, 1);
    let other = daemon.hold("another key");
    let rows = table(&daemon, &[]);
    assert_eq!(rows[0], ["KEY", "STATE", "PID", "USER", "HOST", "FOR", "COMMAND"]);
    // Sorted by key; of one key the holders first.
    assert_eq!(rows[1][..4], ["another", "key", "holds", &other.process.pid().to_string()]);
    assert_eq!(rows[2][..3], ["nightly", "holds", &holder.process.pid().to_string()]);
    assert_eq!(rows[3][..3], ["nightly", "waits", &waiter.pid().to_string()]);
    assert_eq!(rows[3][6..], ["true"]);
    assert_eq!(rows[2][5].chars().last(), Some('s'), "{rows:?}");
    assert_eq!(rows.len(), 4);
    let alone = table(&daemon, &["nightly"]);
    // But for the time, which passes.
    let without_time = |row: &Vec<String>| [&row[..5], &row[6..]].concat();
    assert!(
        alone[1..].iter().map(without_time).eq(rows[2..].iter().map(without_time)),
        "one key alone: {alone:?}"
    );
    assert_eq!(table(&daemon, &["unheard of"]), [rows[0].clone()]);
}

#[test]
fn json_is_one_object_a_lock() {
    let daemon = Daemon::start();
    assert_eq!(finish(&mut daemon.kmutex(&["status", "--json"])).assert_silent(0), "");
    let holder = daemon.hold("nightly");
    let lock = &daemon.status()[0];
    assert_eq!(lock["key"], "nightly");
    assert_eq!((lock["holding"].as_u64(), lock["waiting"].as_u64()), (Some(1), Some(0)));
    let party = &lock["holders"][0];
    assert_eq!(party["pid"], holder.process.pid().as_raw());
    assert_eq!(party["protocol"], 2);
    assert_eq!(party["uid"], nix::unistd::Uid::current().as_raw());
    assert!(party["token"].as_u64().is_some_and(|token| token > 0), "{party}");
    assert!(party["for_ms"].as_u64().is_some(), "{party}");
    assert_eq!(lock["id"].as_str().map(str::len), Some(32), "the MD5 of the key, in hexadecimal digits");
}

#[test]
fn a_lock_of_protocol_1_has_no_name() {
    let daemon = Daemon::start();
    let mut old = daemon.wire();
    old.send(b"0123456789abcdef").expect("O");
    let rows = table(&daemon, &[]);
    assert_eq!(rows[1][..2], ["30313233343536373839616263646566", "holds"]);
    assert_eq!(rows[1][6..], ["(protocol", "1)"]);
}

#[test]
fn no_terminal_obeys_what_is_in_a_key_or_a_command() {
    let daemon = Daemon::start();
    let key = "a\x1b[31m\tb";
    let mut run = daemon.run(&[key, "--", "sh", "-c", "echo holding; read line # \x1b]0;title\x07"]);
    let mut holder = Process::spawn(run.stdin(Stdio::piped()).stdout(Stdio::piped()));
    holder.wait_for_line("holding");
    let text = finish(&mut daemon.kmutex(&["status"])).assert_silent(0);
    assert!(!text.contains(|char: char| char.is_control() && char != '\n'), "{text:?}");
    assert!(text.contains("a?[31m?b"), "{text}");
    assert_eq!(daemon.status()[0]["key"], key, "programs get it as it is");
}

#[test]
fn without_a_daemon_there_is_no_status_and_none_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(KMUTEX);
    command.args(["status", "--sock"]).arg(folder.path().join("sock"));
    finish(&mut command).assert_error(69, &["cannot connect", "sock"]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn an_output_that_cannot_be_written_is_71() {
    let daemon = Daemon::start();
    let mut command = daemon.kmutex(&["status"]);
    command.stdout(std::fs::File::options().write(true).open("/dev/full").unwrap()).stderr(Stdio::piped());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(71));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "kmutex: cannot write the status: No space left on device\n");
}

/// As with any tool in front of `head`: it ends, and does not complain.
#[test]
fn a_reader_that_has_enough_ends_it_quietly() {
    let daemon = Daemon::start();
    let mut clients: Vec<_> = (0..2_000).map(|_| daemon.wire()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.open(&format!(r#"{{"type":"lock","key":"key {number}"}}"#)).answer_of("granted");
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = daemon.kmutex(&["status", "--json"]);
    let output = command.stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr)), (Some(0), "".into()));
    assert_eq!(daemon.status().len(), 2_000);
}

#[test]
fn the_keys_alone_are_one_a_line() {
    let daemon = Daemon::start();
    let _holders = ["b b", "a", "two\nlines"].map(|key| daemon.hold(key));
    let text = finish(&mut daemon.kmutex(&["status", "--keys"])).assert_silent(0);
    let mut keys: Vec<_> = text.lines().collect();
    keys.sort_unstable();
    assert_eq!(keys, ["a", "b b"]);
}

#[test]
fn watching_goes_on_across_a_restart_of_the_daemon() {
    let mut daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut command = daemon.kmutex(&["status", "--watch"]);
    let mut watch = Process::spawn(command.stdout(Stdio::piped()));
    let next = |watch: &mut Process, words: &str| while !watch.line().unwrap().contains(words) {};
    next(&mut watch, "k    holds");
    daemon.kill();
    next(&mut watch, "kmutex: cannot connect");
    daemon.restart(&[]);
    next(&mut watch, "k    holds");
    drop(holder);
    let folder = tempfile::tempdir().unwrap();
    let mut nowhere = Command::new(KMUTEX);
    nowhere.args(["status", "--watch", "--sock"]).arg(folder.path().join("sock"));
    finish(&mut nowhere).assert_error(69, &["cannot connect"]);
}

#[test]
fn on_a_terminal_it_is_watched_in_place() {
    let daemon = Daemon::start();
    let _holder = daemon.hold("k");
    let screen = daemon.folder().join("screen");
    let mut script = crate::harness::tool("script");
    script
        .args(["-qfec", &format!("{KMUTEX} status --watch")])
        .arg(&screen)
        .env("KMUTEX_SOCK", daemon.sock());
    let _watch = Process::spawn(script.stdin(Stdio::piped()).stdout(Stdio::null()));
    crate::harness::wait_until("two looks", || {
        std::fs::read_to_string(&screen).unwrap_or_default().matches("\u{1b}[HKEY").count() >= 2
    });
}
