//! Everything is killed, all the time, and still nobody is in a critical section who should not be.
//!
//! For a while (`KMUTEX_CHAOS_SECS`, 60), 40 clients of all kinds and both protocols lock a few keys, and note in a log
//! when they enter and leave. The daemon is killed several times a second, and comes back by itself or is started anew;
//! commands and their kmutex are killed too. Then a checker reads the log. `KMUTEX_CHAOS_SEED` plays a seed again, as far
//! as the machine's own chance lets it.
#![allow(unreachable_pub)]

#[path = "../../src/table/chance.rs"]
#[allow(dead_code)]
mod chance;
mod checker;
#[path = "../it/harness.rs"]
#[allow(dead_code)]
mod harness;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use chance::Chance;
use harness::{Autostarted, KMUTEX, Process, tool, wait_for, wait_until};

const CLIENTS: u64 = 40;
const CLIENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/chaos/client.pl");

/// A kind of client: options for `kmutex run`, its key, how the checker is to see it, and what it may exit with.
struct Role {
    options: &'static [&'static str],
    key: &'static str,
    kind: &'static str,
    codes: &'static [i32],
    /// kmutex itself may be killed: the command keeps the lock.
    orphans: bool,
}

const fn role(
    options: &'static [&'static str],
    key: &'static str,
    kind: &'static str,
    codes: &'static [i32],
) -> Role {
    Role { options, key, kind, codes, orphans: true }
}

const ROLES: [Role; 11] = [
    role(&[], "a", "exclusive", &[0, 79]),
    role(&[], "b", "exclusive", &[0, 79]),
    role(&["--queue"], "a", "exclusive", &[0]),
    role(&["--queue"], "b", "exclusive", &[0]),
    role(&["--queue", "-F"], "a", "exclusive", &[0]),
    role(&["-n"], "b", "exclusive", &[0, 75]),
    role(&["-w", "0.3", "--queue"], "a", "exclusive", &[0, 75]),
    role(&["--queue", "--shared"], "s", "shared", &[0]),
    role(&["--queue"], "s", "exclusive", &[0]),
    role(&["--queue", "--slots", "2"], "n", "slots2", &[0]),
    // Without the descriptor the lock is kmutex's alone: to kill that is to let others in.
    Role { options: &["--queue", "-o"], key: "b", kind: "exclusive", codes: &[0], orphans: false },
];

struct Arena {
    folder: PathBuf,
    seed: u64,
    over: AtomicBool,
    names: AtomicU64,
    /// What is wrong, as it is found.
    findings: Mutex<Vec<String>>,
    /// How often each thing happened: a test in which nothing happens proves nothing.
    tally: Mutex<BTreeMap<String, u64>>,
}

impl Arena {
    fn sock(&self) -> PathBuf {
        self.folder.join("sock")
    }

    fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// Adds a line to the log, with the time.
    fn write(&self, words: &str) {
        let mut log = OpenOptions::new().append(true).create(true).open(self.log()).unwrap();
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
        let line = format!("{words} {}.{:09}\n", now.tv_sec(), now.tv_nsec());
        log.write_all(line.as_bytes()).unwrap();
    }

    /// Notes for people what the checker has no use for.
    fn note(&self, what: &str) {
        self.write(&format!("# {what}"));
    }

    fn count(&self, what: impl Into<String>) {
        *self.tally.lock().unwrap().entry(what.into()).or_default() += 1;
    }

    fn find(&self, what: String) {
        self.findings.lock().unwrap().push(what);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// One client after the other, until it is over.
    fn keep_busy(&self, number: u64) {
        let mut chance = Chance(self.seed ^ (number << 32));
        while !self.is_over() {
            let name = format!("c{}", self.names.fetch_add(1, Ordering::Relaxed));
            let micros = (1_000 + chance.below(20_000)).to_string();
            if chance.below(8) == 0 {
                self.one_owner(&name, &micros);
            } else {
                let role = &ROLES[chance.below(ROLES.len() as u64) as usize];
                self.one_run(&name, role, &micros, &mut chance);
            }
        }
    }

    fn one_run(&self, name: &str, role: &Role, micros: &str, chance: &mut Chance) {
        let mut command = Command::new(KMUTEX);
        command.arg("run").args(role.options).args([role.key, "--", "perl", CLIENT, "section"]);
        command.arg(self.log()).args([name, role.key, role.kind, micros]);
        command.env("KMUTEX_SOCK", self.sock()).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut process = Process::spawn(&mut command);
        let victim = chance.below(20);
        if victim == 0 && role.orphans && !role.options.contains(&"-F") {
            // At any moment: while it connects, waits, holds, releases.
            std::thread::sleep(Duration::from_micros(chance.below(30_000)));
            self.note(&format!("{name}'s kmutex is killed"));
            process.signal(Signal::SIGKILL);
            self.count("a kmutex is killed");
        }
        let code = process.wait();
        let said = process.stderr();
        let killed = code == 137;
        self.count(format!("{:?} ends with {code}", role.options));
        if !killed && !role.codes.contains(&code) {
            self.find(format!("{name} {:?} ended with {code}: {said}", role.options));
        }
    }

    /// A client of protocol 1.
    fn one_owner(&self, name: &str, micros: &str) {
        let mut command = tool("perl");
        command
            .args([CLIENT, "owner"])
            .arg(self.log())
            .args([name, "a", "exclusive", micros])
            .arg(self.sock());
        let code = Process::spawn(&mut command).wait();
        self.count(format!("protocol 1 ends with {code}"));
        if ![0, 79, 137].contains(&code) {
            self.find(format!("{name} of protocol 1 ended with {code}"));
        }
    }

    /// Kills the daemon, again and again, and starts every second one; the others are started by clients.
    fn kill_daemons(&self) {
        let mut chance = Chance(self.seed ^ 1);
        while !self.is_over() {
            // Not to wait for anything: this is when it happens.
            std::thread::sleep(Duration::from_millis(100 + chance.below(300)));
            let Some(pid) = daemon(&self.sock()) else { continue };
            self.note(&format!("daemon {pid} is killed"));
            kill_it(pid);
            self.count("a daemon is killed");
            if chance.below(2) == 0 {
                let mut command = Command::new(KMUTEX);
                command
                    .args(["serve", "--detach", "--idle-exit", "60", "--grace", "2", "--sock"])
                    .arg(self.sock());
                // It may be refused, where a client was quicker.
                let status = command.stderr(Stdio::null()).status().unwrap();
                self.count(format!("a daemon is started: {status}"));
            }
        }
    }

    /// Kills commands in their sections.
    fn kill_commands(&self) {
        let mut chance = Chance(self.seed ^ 2);
        while !self.is_over() {
            std::thread::sleep(Duration::from_millis(20 + chance.below(60)));
            let text = fs::read_to_string(self.log()).unwrap_or_default();
            let Some(last) = text.lines().rev().find(|line| line.starts_with("enter ")) else { continue };
            let words: Vec<&str> = last.split(' ').collect();
            let (name, pid) = (words[1], words[5].parse().unwrap());
            if text.contains(&format!("leave {name} ")) || !command_line(pid).contains(name) {
                continue;
            }
            // Noted before it is done: until then, it is inside.
            self.write(&format!("killed {name} - - - {pid}"));
            kill_it(pid);
            self.count("a command is killed");
        }
    }
}

/// The daemon that serves a path at the moment.
fn daemon(sock: &Path) -> Option<i32> {
    let pid = fs::read_to_string(sock.with_extension("lock")).ok()?.trim().parse().ok()?;
    let serves = command_line(pid).contains("serve") && command_line(pid).contains(&*sock.to_string_lossy());
    serves.then_some(pid)
}

fn command_line(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

fn kill_it(pid: i32) {
    // It may have ended by itself since it was looked at.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}

#[test]
fn nobody_enters_who_should_not_whatever_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let seed = number_from("KMUTEX_CHAOS_SEED").unwrap_or_else(|| std::process::id().into());
    let span = Duration::from_secs(number_from("KMUTEX_CHAOS_SECS").unwrap_or(60));
    println!("KMUTEX_CHAOS_SEED={seed} for {span:?}");
    let arena = Arena {
        folder: folder.path().into(),
        seed,
        over: AtomicBool::new(false),
        names: AtomicU64::new(0),
        findings: Mutex::default(),
        tally: Mutex::default(),
    };
    let _stop = Autostarted(arena.sock());
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let arena = &arena;
            scope.spawn(move || arena.keep_busy(number));
        }
        scope.spawn(|| arena.kill_daemons());
        scope.spawn(|| arena.kill_commands());
        let end = Instant::now() + span;
        while Instant::now() < end && arena.findings.lock().unwrap().is_empty() {
            std::thread::sleep(Duration::from_millis(100));
        }
        arena.over.store(true, Ordering::Relaxed);
    });

    // Those whose kmutex was killed are nobody's children; they end by themselves.
    let log = wait_for("the last to leave", || {
        let log = fs::read_to_string(arena.log()).unwrap();
        let ended = !matches!(checker::check(&log), Err(error) if error.contains("never leaves"));
        ended.then_some(log)
    });
    let sections =
        checker::check(&log).unwrap_or_else(|broken| panic!("{broken}\n{}", checker::excerpt(&log, &broken)));
    println!("{sections} sections");
    for (what, count) in arena.tally.lock().unwrap().iter() {
        println!("{count:7} {what}");
    }
    let findings = arena.findings.lock().unwrap();
    assert!(findings.is_empty(), "{findings:#?}");

    // Nothing is stuck: every key can be had, and then nobody has any.
    let kmutex =
        |args: &[&str]| Command::new(KMUTEX).args(args).env("KMUTEX_SOCK", arena.sock()).output().unwrap();
    for key in ["a", "b", "s", "n"] {
        assert_eq!(
            kmutex(&["run", "-w", "20", "--queue", key, "true"]).status.code(),
            Some(0),
            "{key} is stuck"
        );
    }
    wait_until("nobody to hold anything", || kmutex(&["status", "--json"]).stdout.is_empty());

    for what in ["a daemon is killed", "a command is killed", "a kmutex is killed"] {
        let count = arena.tally.lock().unwrap().get(what).copied().unwrap_or(0);
        assert!(count >= span.as_secs() / 4, "{what}: only {count} times");
    }
    assert!(sections as u64 > 10 * span.as_secs(), "{sections} sections are too few to prove anything");
}
