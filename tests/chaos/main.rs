//! Daemons, clients and commands are killed all the time, and still no two clients that exclude each other are in a critical
//! section together.
//!
//! For a while (`KMUTEX_CHAOS_SECS`, 60), 40 clients of all kinds and both protocols lock a few keys, and note in a log
//! when they enter and leave. The daemon is killed several times a second, and comes back by itself or is started anew;
//! commands and their kmutex are killed too. Then a checker reads the log. `KMUTEX_CHAOS_SEED` plays a seed again, as far
//! as the machine's own chance lets it.
#![allow(unreachable_pub)]

mod checker;
#[path = "../it/harness.rs"]
#[allow(dead_code)]
mod harness;
mod record;
#[path = "../../src/table/rng.rs"]
#[allow(dead_code)]
mod rng;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use harness::{Autostarted, KMUTEX, Process, tool, wait_for, wait_until};
use record::{CLIENT, Record, command_line, settings};
use rng::Rng;

const CLIENTS: u64 = 40;

/// A kind of client: options for `kmutex run`, its key, how the checker is to see it, and what it may exit with.
struct Role {
    options: &'static [&'static str],
    key: &'static str,
    kind: &'static str,
    codes: &'static [i32],
    /// The test may kill kmutex itself; the command keeps the lock.
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
    // Without the descriptor only kmutex holds the lock, so killing it lets others in.
    Role { options: &["--queue", "-o"], key: "b", kind: "exclusive", codes: &[0], orphans: false },
];

struct Arena {
    folder: PathBuf,
    seed: u64,
    record: Record,
}

impl Arena {
    fn sock(&self) -> PathBuf {
        self.folder.join("sock")
    }

    /// Runs one client after the other until the test is over.
    fn keep_busy(&self, number: u64) {
        let mut rng = Rng(self.seed ^ (number << 32));
        while !self.record.is_over() {
            let name = self.record.name();
            let micros = (1_000 + rng.below(20_000)).to_string();
            if rng.below(8) == 0 {
                self.one_owner(&name, &micros);
            } else {
                let role = &ROLES[rng.below(ROLES.len() as u64) as usize];
                self.one_run(&name, role, &micros, &mut rng);
            }
        }
    }

    fn one_run(&self, name: &str, role: &Role, micros: &str, rng: &mut Rng) {
        let mut command = Command::new(KMUTEX);
        command.arg("run").args(role.options).args([role.key, "--", "perl", CLIENT, "section"]);
        command.arg(&self.record.log).args([name, role.key, role.kind, micros]);
        command.env("KMUTEX_SOCK", self.sock()).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut process = Process::spawn(&mut command);
        let victim = rng.below(20);
        if victim == 0 && role.orphans && !role.options.contains(&"-F") {
            // At any moment: while kmutex connects, waits, holds or releases.
            std::thread::sleep(Duration::from_micros(rng.below(30_000)));
            self.record.note(&format!("{name}'s kmutex is killed"));
            process.signal(Signal::SIGKILL);
            self.record.count("a kmutex is killed");
        }
        let code = process.wait();
        let said = process.stderr();
        let killed = code == 137;
        self.record.count(format!("{:?} ends with {code}", role.options));
        // The time of `-w` is also that of starting a daemon, which may be killed as often as it is started.
        let is_late =
            code == 69 && role.options.contains(&"-w") && said.contains("it does not start in time");
        if !killed && !is_late && !role.codes.contains(&code) {
            self.record.find(format!("{name} {:?} ended with {code}: {said}", role.options));
        }
    }

    /// A client of protocol 1.
    fn one_owner(&self, name: &str, micros: &str) {
        let mut command = tool("perl");
        command
            .args([CLIENT, "owner"])
            .arg(&self.record.log)
            .args([name, "a", "exclusive", micros])
            .arg(self.sock());
        let code = Process::spawn(&mut command).wait();
        self.record.count(format!("protocol 1 ends with {code}"));
        if ![0, 79, 137].contains(&code) {
            self.record.find(format!("{name} of protocol 1 ended with {code}"));
        }
    }

    /// Kills the daemon again and again, and starts every second one; clients start the others.
    fn kill_daemons(&self) {
        let mut rng = Rng(self.seed ^ 1);
        while !self.record.is_over() {
            // This waits for nothing: it is the schedule of the faults.
            std::thread::sleep(Duration::from_millis(100 + rng.below(300)));
            let Some(pid) = daemon(&self.sock()) else { continue };
            self.record.note(&format!("daemon {pid} is killed"));
            kill_it(pid);
            self.record.count("a daemon is killed");
            if rng.below(2) == 0 {
                let mut command = Command::new(KMUTEX);
                command
                    .args(["serve", "--detach", "--idle-exit", "60", "--grace", "2", "--sock"])
                    .arg(self.sock());
                // The daemon may be refused if a client was quicker.
                let status = command.stderr(Stdio::null()).status().unwrap();
                self.record.count(format!("a daemon is started: {status}"));
            }
        }
    }

    /// Kills commands in their sections.
    fn kill_commands(&self) {
        let mut rng = Rng(self.seed ^ 2);
        while !self.record.is_over() {
            std::thread::sleep(Duration::from_millis(20 + rng.below(60)));
            let text = self.record.read();
            let Some(last) = text.lines().rev().find(|line| line.starts_with("enter ")) else { continue };
            let words: Vec<&str> = last.split(' ').collect();
            let (name, pid) = (words[1], words[5].parse().unwrap());
            if text.contains(&format!("leave {name} ")) || !command_line(pid).contains(name) {
                continue;
            }
            // The note comes first: until then the client is inside.
            self.record.write(&format!("killed {name} - - - {pid}"));
            kill_it(pid);
            self.record.count("a command is killed");
        }
    }
}

/// Returns the daemon that serves a path at the moment.
fn daemon(sock: &Path) -> Option<i32> {
    let pid = fs::read_to_string(sock.with_extension("lock")).ok()?.trim().parse().ok()?;
    let serves = command_line(pid).contains("serve") && command_line(pid).contains(&*sock.to_string_lossy());
    serves.then_some(pid)
}

fn kill_it(pid: i32) {
    // The process may have ended by itself meanwhile.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

#[test]
#[ignore = "takes a minute: KMUTEX_CHAOS_SECS"]
fn no_client_enters_beside_another_whatever_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let (seed, span) = settings();
    let arena = Arena { folder: folder.path().into(), seed, record: Record::new(folder.path().join("log")) };
    let _stop = Autostarted(arena.sock());
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let arena = &arena;
            scope.spawn(move || arena.keep_busy(number));
        }
        scope.spawn(|| arena.record.ends_if_this_fails(|| arena.kill_daemons()));
        scope.spawn(|| arena.record.ends_if_this_fails(|| arena.kill_commands()));
        arena.record.run_for(span);
    });

    // Commands whose kmutex was killed are not children of this test; they end by themselves.
    let log = wait_for("the last to leave", || {
        let log = arena.record.read();
        let ended = !matches!(checker::check(&log), Err(error) if error.contains("never leaves"));
        ended.then_some(log)
    });
    let sections =
        checker::check(&log).unwrap_or_else(|broken| panic!("{broken}\n{}", checker::excerpt(&log, &broken)));
    println!("{sections} sections");
    arena.record.print_tally();
    let findings = arena.record.findings();
    assert!(findings.is_empty(), "{findings:#?}");

    // Nothing is stuck: every lock can be acquired, and in the end all are free.
    let kmutex =
        |args: &[&str]| Command::new(KMUTEX).args(args).env("KMUTEX_SOCK", arena.sock()).output().unwrap();
    for key in ["a", "b", "s", "n"] {
        assert_eq!(
            kmutex(&["run", "-w", "20", "--queue", key, "true"]).status.code(),
            Some(0),
            "{key} is stuck"
        );
    }
    wait_until("all locks to be free", || kmutex(&["status", "--json"]).stdout.is_empty());

    for what in ["a daemon is killed", "a command is killed", "a kmutex is killed"] {
        let count = arena.record.counted(what);
        assert!(count >= span.as_secs() / 4, "{what}: only {count} times");
    }
    assert!(sections as u64 > 10 * span.as_secs(), "{sections} sections are too few to prove anything");
}
