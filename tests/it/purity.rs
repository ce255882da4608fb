//! The lock table, the standing among hosts and the protocols stay pure: no sockets, files, processes, clocks or randomness, and no import from
//! the parts of the crate that have them. Rust does not check that, so this does.

use std::fs;
use std::path::{Path, PathBuf};

/// What the pure part may use of the standard library. `io::Write` is for buffers in memory.
const STD_ALLOWED: [&str; 14] = [
    "borrow",
    "cmp",
    "collections",
    "error",
    "fmt",
    "hash",
    "io::Write",
    "iter",
    "mem",
    "num",
    "ops",
    "slice",
    "str",
    "time::Duration",
];
/// What it may use of this crate.
const CRATE_ALLOWED: [&str; 4] = ["cluster", "proto", "table", "timestamp"];
/// Words that have no business there, wherever they come from. (The standard maps draw their hash keys at random.)
const FORBIDDEN: &str = "env_logger eprint eprintln fastrand getrandom HashMap HashSet include_bytes include_str Instant \
    libc log mio nix option_env print println rand RandomState rustix signal_hook socket2 SystemTime tokio";

#[test]
fn the_table_the_standing_and_the_protocols_are_pure() {
    let files = pure_files();
    assert!(files.len() >= 6, "the walk found too little: {files:?}");
    let faults: Vec<String> = files.iter().flat_map(|path| faults_of_file(path)).collect();
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn the_check_sees_what_is_impure() {
    for line in [
        "use std::net::TcpStream;",
        "use std::fs;",
        "use std::os::fd::OwnedFd;",
        "std::process::exit(1);",
        "std::thread::spawn(f);",
        "std::env::var(name)",
        "use std::time::Instant;",
        "use std::{fmt, fs};",
        "use std::io;",
        "use std::io::Read;",
        "use ::std::fs;",
        "use core::time;",
        "let now = Instant::now();",
        "now: SystemTime,",
        "hasher: RandomState,",
        "HashMap::with_hasher(RandomState::new())",
        "use std::collections::HashMap;",
        "nix::unistd::getpid()",
        "rustix::process::getpid()",
        "libc::getpid()",
        "log::info!(\"x\");",
        "use log::info;",
        "getrandom::fill(&mut bytes)",
        "println!(\"x\");",
        "use crate::daemon;",
        "use crate::{proto, daemon};",
        "use crate::*;",
        "use crate::protocols::Key;",
        "use super::super::daemon;",
    ] {
        assert!(!faults(line).is_empty(), "{line}");
    }
}

#[test]
fn the_check_lets_the_rest_pass() {
    for line in [
        "use std::collections::{BTreeSet, VecDeque};",
        "pub fn encode(buffer: impl std::io::Write) {",
        "use crate::proto::v2::{LockRequest, Mode};",
        "use super::{Key, Nonce};",
        "let catalog = prologue(login, random, printed);",
        "mut x // says Instant, log::info! and std::fs",
        "/// A `SystemTime` is not used here.",
    ] {
        assert_eq!(faults(line), [""; 0], "{line}");
    }
}

#[test]
fn a_program_that_uses_the_library_alone_gets_no_clap_env_logger_or_rustls() {
    let tree = |features: &str| {
        let output = std::process::Command::new(env!("CARGO"))
            .args([
                "tree",
                "--offline",
                "--locked",
                "--edges",
                "normal",
                "--prefix",
                "none",
                "--no-default-features",
            ])
            .args(["--features", features])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let has = |tree: &str, name: &str| tree.lines().any(|line| line.split(' ').next() == Some(name));
    let (library, daemon, all) = (tree(""), tree("daemon"), tree("cli,etcd"));
    for name in ["clap", "env_logger", "rustls"] {
        assert!(!has(&library, name) && !has(&daemon, name), "{name}:\n{library}\n{daemon}");
        assert!(has(&all, name), "{name} is in no build, so this test tests nothing:\n{all}");
    }
}

/// Returns the source files of the pure part, without the files that only hold tests.
fn pure_files() -> Vec<PathBuf> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    let mut pending: Vec<PathBuf> =
        ["cluster.rs", "cluster", "table.rs", "table", "proto.rs", "proto", "timestamp.rs"]
            .iter()
            .map(|name| src.join(name))
            .collect();
    while let Some(path) = pending.pop() {
        let stem = path.file_stem().expect("a path in src has a name").to_string_lossy();
        if stem.starts_with("simulation") || stem.starts_with("tests") {
            continue;
        }
        if path.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            files.push(path);
        }
    }
    files
}

fn faults_of_file(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    // In a file at the top `super` is the whole crate, but for its test module, to which it is the file.
    let is_top = path.parent().is_some_and(|folder| folder.ends_with("src"));
    let escapes = |line: &str| is_top && line.contains("use super::") && !line.contains("use super::*;");
    let faults_at = |(line, number)| {
        let escape = escapes(line).then(|| line.trim().to_string());
        faults(line)
            .into_iter()
            .chain(escape)
            .map(move |fault| format!("{}:{number}: {fault}", path.display()))
    };
    text.lines().zip(1..).flat_map(faults_at).collect()
}

/// What is impure in one line.
fn faults(line: &str) -> Vec<String> {
    let code = line.split("//").next().unwrap_or_default();
    let mut faults = Vec::new();
    for (root, allowed) in [("std", &STD_ALLOWED[..]), ("core", &STD_ALLOWED), ("crate", &CRATE_ALLOWED)] {
        for path in paths_from(code, root) {
            if !allowed.iter().any(|allowed| starts_with_path(path, allowed)) {
                faults.push(format!("{root}::{path}"));
            }
        }
    }
    if code.contains("super::super") {
        faults.push("super::super (write crate::, which is checked)".into());
    }
    let words = code.split(|c: char| !is_word(c));
    faults.extend(words.filter(|word| forbidden(word)).map(String::from));
    faults
}

fn forbidden(word: &str) -> bool {
    FORBIDDEN.split_whitespace().any(|forbidden| forbidden == word)
}

/// What follows `root::` wherever it stands in the code.
fn paths_from<'a>(code: &'a str, root: &str) -> Vec<&'a str> {
    let prefix = format!("{root}::");
    let starts = code.match_indices(&prefix).filter(|&(at, _)| !code[..at].ends_with(is_word));
    starts.map(|(at, _)| &code[at + prefix.len()..]).collect()
}

/// True for `fmt` and `fmt::Display`, not for `fmtx`.
fn starts_with_path(path: &str, allowed: &str) -> bool {
    path.strip_prefix(allowed).is_some_and(|rest| !rest.starts_with(is_word))
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}
