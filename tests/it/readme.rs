//! What README.md and docs/ print works as printed.
//!
//! A ```` ```console ```` block is a session: `$ ` begins a command, and what follows, up to the next, is what it prints.
//! `cat` of a Makefile, or of what begins with `#!`, shows what is in a file, so the test makes that file; `crontab -l`
//! shows lines whose commands the test runs; `…` in what is printed stands for anything.
//!
//! The two commands in README.md's ```` ```sh ```` block are run by `.ci/run`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Stdio;

use crate::harness::{Autostarted, KMUTEX, tool};

const README: &str = include_str!("../../README.md");
const PROTOCOL: &str = include_str!("../../docs/protocol.md");
#[cfg(feature = "tls")]
const TCP: &str = include_str!("../../docs/tcp.md");
#[cfg(feature = "etcd")]
const CLUSTER: &str = include_str!("../../docs/cluster.md");

/// What the recipes call, and do not show.
const PROGRAMS: [(&str, &str); 4] = [
    ("report", "echo reported >> report.log"),
    // It takes until the other two wait for it.
    (
        "make-page",
        "until kmutex status --json page | grep -q '\"waiting\":2'; do sleep 0.01; done
         echo 'made once' >> made.log; echo 'a page that took long to make'",
    ),
    ("build-index", "echo \"$(ls \"$1\" | wc -l) document\""),
    ("deploy", "echo \"deployed to $1\""),
];

#[test]
fn the_sessions_of_the_readme_work_as_printed() {
    tool("make");
    let folder = tempfile::tempdir().unwrap();
    for (name, body) in PROGRAMS {
        write_program(&folder.path().join(name), &format!("#!/bin/sh\n{body}\n"));
    }
    fs::create_dir(folder.path().join("documents")).unwrap();
    fs::write(folder.path().join("documents/one"), "").unwrap();
    assert_eq!(play(README, folder.path()), 12, "sessions");
    let reported = fs::read_to_string(folder.path().join("report.log")).unwrap();
    assert_eq!(reported, "reported\n", "by the line of the crontab");
}

#[test]
#[ignore = "needs socat and openssl"]
fn the_sessions_of_the_protocols_page_work_as_printed() {
    tool("socat");
    tool("openssl");
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(play(PROTOCOL, folder.path()), 2, "sessions");
}

#[cfg(feature = "tls")]
#[test]
fn the_session_of_the_page_on_tcp_works_as_printed() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(play(TCP, folder.path()), 1, "sessions");
}

#[cfg(feature = "etcd")]
#[test]
#[ignore = "needs etcd"]
fn the_session_of_the_clusters_page_works_as_printed() {
    tool("etcd");
    tool("etcdctl");
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(play(CLUSTER, folder.path()), 1, "sessions");
}

#[test]
fn the_two_commands_that_begin_the_readme_are_run_by_ci() {
    let ci = include_str!("../../.ci/run");
    for command in [r#"run hello -- echo "it works""#, "make test"] {
        assert!(README.contains(command), "{command}");
        assert!(ci.contains(command), "{command}");
    }
}

/// Plays all sessions of a page, in one folder, and returns how many there were.
fn play(page: &str, folder: &Path) -> usize {
    let bin = folder.join("bin");
    fs::create_dir(&bin).unwrap();
    symlink(KMUTEX, bin.join("kmutex")).unwrap();
    symlink(KMUTEX, bin.join("keyedmutexd")).unwrap();
    let _daemon = Autostarted(folder.join("k.sock"));
    let sessions = page.split("```console\n").skip(1).map(|block| block.split("```").next().unwrap());
    sessions.map(|session| play_session(session, folder)).count()
}

fn play_session(session: &str, folder: &Path) {
    let (mut script, mut expected) = (String::new(), String::new());
    for (command, output) in steps(session) {
        match command.strip_prefix("cat ") {
            Some(file) if file == "Makefile" || output.starts_with("#!") => {
                write_program(&folder.join(file), &output);
                continue;
            }
            _ => {}
        }
        if command == "crontab -l" {
            for entry in output.lines() {
                script += entry.splitn(6, ' ').nth(5).expect("five fields and a command");
                script += "\n";
            }
        } else {
            script += &format!("{command}\n");
            expected += &output;
        }
    }
    let path = format!("{}:{}", folder.join("bin").display(), std::env::var("PATH").unwrap());
    let mut shell = tool("bash");
    // With job control, as in an interactive shell, but without the shell's own reports of jobs.
    shell.args(["-c", &format!("set -m; exec 3>&2 2>&1; {script}")]).current_dir(folder).env("PATH", path);
    shell.env("KMUTEX_SOCK", folder.join("k.sock")).stdin(Stdio::null());
    let output = shell.output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(matches(&printed, &expected), "{script}\nprinted:\n{printed}\nexpected:\n{expected}");
}

/// The commands of a session, each with what it prints.
fn steps(session: &str) -> Vec<(&str, String)> {
    let mut steps: Vec<(&str, String)> = Vec::new();
    for line in session.lines() {
        match (line.strip_prefix("$ "), steps.last_mut()) {
            (Some(command), _) => steps.push((command, String::new())),
            (None, Some((_, output))) => *output += &format!("{line}\n"),
            (None, None) => panic!("a session begins with a command: {line}"),
        }
    }
    steps
}

fn write_program(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Compares line by line; `…` stands for anything. What the shell reports of its jobs is not shown.
fn matches(printed: &str, expected: &str) -> bool {
    let printed: Vec<&str> = printed.lines().filter(|line| !line.starts_with('[')).collect();
    printed.len() == expected.lines().count() && printed.iter().zip(expected.lines()).all(|(p, e)| fits(p, e))
}

fn fits(printed: &str, expected: &str) -> bool {
    let mut parts = expected.split('…');
    let Some(mut rest) = printed.strip_prefix(parts.next().unwrap_or("")) else { return false };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    // A `…` at the end takes what is left.
    rest.is_empty() || expected.ends_with('…')
}

#[test]
fn the_comparison_sees_what_is_different() {
    assert!(matches("[1] 17\na 1 b\nc\n", "a … b\nc\n"));
    assert!(matches("a 1 b 2\n", "a … b …\n"));
    assert!(!matches("a 1 c\n", "a … b\n"));
    assert!(!matches("a 1 b x\n", "a … b\n"));
    assert!(!matches("a\n", "a\nb\n"));
    assert!(!matches("a\nb\n", "a\n"));
}
