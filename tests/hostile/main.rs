//! One daemon for all users. Three of them do their worst, at random, while root and a fourth user run jobs and the daemon is killed
//! now and then: the jobs get their locks at once, and no lock is lost, broken or given twice.
//!
//! A binary of its own, because it runs itself again as other users. It takes 10 seconds, or as many as `KMUTEX_HOSTILE_SECS` says;
//! `KMUTEX_HOSTILE_SEED` repeats the choices of a run.
#![cfg(feature = "failpoints")]
#![allow(unreachable_pub)]

#[allow(dead_code)]
#[path = "../it/harness.rs"]
mod harness;

mod attacks;
mod jobs;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::{Daemon, KMUTEX, Process, finish, open_to_all, tool};
use nix::unistd::Uid;

const ROOT: u32 = 0;
/// The user whose jobs run beside root's.
const BOB: u32 = 65_521;
/// The users who do their worst.
const HOSTILE: [u32; 3] = [65_522, 65_523, 65_524];
/// How soon a job has its lock, in all but one of a hundred cases.
const GRANT_MAX: Duration = Duration::from_millis(100);
/// The same in a short run, which is no measurement: the machine may have other work.
const GRANT_MAX_SHORT: Duration = Duration::from_secs(2);
/// How often the daemon is killed: so seldom that the jobs which wait for the next one are fewer than one in a hundred.
const RESTART_EVERY: Duration = Duration::from_secs(5);
const TURN_MAX: Duration = Duration::from_millis(20);
const MEMORY_MAX_KIB: u64 = 64 * 1024;

/// What a process of this binary is told by its environment: what to do, where, and a seed.
const ROLE: &str = "KMUTEX_HOSTILE_ROLE";
const SOCK: &str = "KMUTEX_HOSTILE_SOCK";
const SEED: &str = "KMUTEX_HOSTILE_SEED";
/// How long it goes on; a run with this is a measurement.
const SECS: &str = "KMUTEX_HOSTILE_SECS";

#[test]
#[ignore = "needs root, to act as several users"]
fn hostile_users_keep_no_job_from_its_lock() {
    assert!(
        Uid::effective().is_root(),
        "this test acts as several users, which only root can: run it as root"
    );
    let (seed, span) = (number(SEED).unwrap_or_else(|| std::process::id().into()), number(SECS));
    let span = Duration::from_secs(span.unwrap_or(10));
    println!("{SEED}={seed} for {span:?}");
    let mut scene = Scene::start();
    let mut long_job = scene.long_job();
    let jobs: Vec<Process> = [ROOT, BOB].iter().map(|&uid| scene.act("jobs", uid, seed)).collect();
    let attackers: Vec<Process> =
        HOSTILE.iter().map(|&uid| scene.act("attacks", uid, seed + u64::from(uid))).collect();
    let end = Instant::now() + span;
    while Instant::now() < end {
        std::thread::sleep(RESTART_EVERY);
        assert!(long_job.is_running(), "a lock was lost or broken, and its command stopped");
        scene.restart();
    }
    attackers.into_iter().for_each(|attacker| drop(finish_well(attacker)));
    let waits = jobs.into_iter().map(finish_well).collect::<Vec<_>>();
    drop(long_job.child.stdin.take());
    assert_eq!(long_job.wait(), 0, "its lock was lost or broken");
    scene.check_daemon();
    waits.iter().for_each(|lines| assert_quick(lines));
}

/// A process of this binary, which acts as another user.
#[test]
#[ignore = "a part of the other test, which starts it"]
fn act() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let sock = PathBuf::from(std::env::var_os(SOCK).unwrap());
    let seed = number(SEED).unwrap();
    match role.as_str() {
        "jobs" => jobs::run(&sock),
        _ => attacks::run(&sock, seed),
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}

const OPTIONS: [&str; 4] = ["--mode", "666", "--log-level", "info"];

/// Has a daemon say how long its turns take.
fn measured(daemon: &mut Command) -> &mut Command {
    daemon.env("KMUTEX_MEASURE_TURNS", "1")
}

/// The daemon, and copies of the programs that other users can execute.
struct Scene {
    daemon: Daemon,
    programs: tempfile::TempDir,
}

impl Scene {
    fn start() -> Scene {
        let daemon = Daemon::made(&OPTIONS, measured);
        open_to_all(daemon.folder());
        let programs = tempfile::tempdir().unwrap();
        fs::set_permissions(programs.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for (from, name) in [(std::env::current_exe().unwrap(), "test"), (KMUTEX.into(), "kmutex")] {
            fs::copy(from, programs.path().join(name)).unwrap();
        }
        Scene { daemon, programs }
    }

    /// Kills the daemon, and starts the next one at once.
    fn restart(&mut self) {
        self.check_daemon();
        self.daemon.kill();
        self.daemon.restart_made(&OPTIONS, measured);
    }

    /// A command of root's that runs all the time.
    fn long_job(&self) -> Process {
        let mut command = self.daemon.run(&["@root/long", "--", "sh", "-c", "echo holding; exec cat"]);
        let mut process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        process.wait_for_line("holding");
        process
    }

    /// This binary, as another user, until its standard input ends.
    fn act(&self, role: &str, uid: u32, seed: u64) -> Process {
        // What hostile users do costs processor time, which is theirs to take; the daemon is what is tried here.
        let mut command = tool("nice");
        command.args(["-n", if role == "jobs" { "0" } else { "19" }]).arg(self.programs.path().join("test"));
        command.args(["act", "--exact", "--include-ignored", "--nocapture", "--test-threads=1"]);
        command.env(ROLE, role).env(SOCK, self.daemon.sock()).env(SEED, seed.to_string()).current_dir("/");
        if uid != ROOT {
            command.uid(uid).gid(uid);
        }
        let mut process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        while !process.line().expect("the process says that it is ready").ends_with("ready") {}
        process
    }

    /// What must be true of every daemon at its end.
    fn check_daemon(&self) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.daemon.pid())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(peak < MEMORY_MAX_KIB, "the daemon took {peak} KiB");
        let log = self.daemon.log();
        let turns = log.lines().filter_map(|line| line.split_once("longest turn: "));
        let longest = turns.map(|(_, took)| took.trim_end_matches(" us").parse().unwrap()).max();
        let longest = Duration::from_micros(longest.unwrap_or(0));
        println!("a daemon took {peak} KiB at most, and {longest:?} for its longest turn");
        assert!(longest < TURN_MAX, "a turn took {longest:?}");
    }
}

/// Lets a process end. Returns what it has said since it was ready.
fn finish_well(mut process: Process) -> Vec<String> {
    drop(process.child.stdin.take());
    let mut lines = Vec::new();
    while let Some(line) = process.line() {
        lines.push(line);
    }
    assert_eq!(process.wait(), 0, "{}", lines.join("\n"));
    lines
}

/// Checks how long the jobs of a user waited. A thread that only sleeps for a millisecond shows how long this machine keeps a process
/// from running; the daemon is not to blame for that.
fn assert_quick(lines: &[String]) {
    let millis = |name: &str| -> Vec<f64> {
        let mut all: Vec<f64> =
            lines.iter().filter_map(|line| line.strip_prefix(name)?.trim().parse().ok()).collect();
        all.sort_by(f64::total_cmp);
        all
    };
    let worst_of_most = |all: &[f64]| all[(all.len() - 1) * 99 / 100];
    let (waits, pauses) = (millis("wait "), millis("pause "));
    assert!(waits.len() >= 100, "the jobs got their locks only {} times", waits.len());
    let (wait, pause) = (worst_of_most(&waits), worst_of_most(&pauses));
    println!("{} locks, 99% within {wait:.1} ms; 99% of the pauses within {pause:.1} ms", waits.len());
    let grant_max = if number(SECS).is_some() { GRANT_MAX } else { GRANT_MAX_SHORT };
    let limit = grant_max.as_secs_f64() * 1000.0 + 3.0 * pause;
    assert!(wait < limit, "99% of the jobs waited for up to {wait:.1} ms");
}

/// `kmutex ARGS` for the daemon of `sock`: its exit status.
fn kmutex(sock: &Path, args: &[&str]) -> i32 {
    let program = std::env::current_exe().unwrap().with_file_name("kmutex");
    finish(Command::new(program).args(args).env("KMUTEX_SOCK", sock).stdin(Stdio::null())).code
}
