//! What is the same each time it is counted: instructions, system calls, bytes. A test may fail over these.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::resource::{UsageWho, getrusage};

use kmutex::proto::{Key, Outcome, Token, v2::LockRequest, v2::Mode};
use kmutex::table::{ClientId, Config, Effects, Table, Timestamp};
use serde::{Deserialize, Serialize};

use crate::load::{self, Protocol};
use crate::{Result, fail, project, slim_bytes};

/// How much more than committed is too much.
const GROWTH_MAX: f64 = 1.1;
/// The same for page faults: how many pages the kernel maps at one fault depends on the kernel and on its page cache.
const FAULTS_GROWTH_MAX: f64 = 1.25;
const FAULTS: &str = "page faults: kmutex run -n, refused";
/// The C library that all of this is built with: see `packaging/build-target`.
const LIBC: &str = if cfg!(target_env = "musl") { "musl" } else { "glibc" };
/// Rounds that are counted, after the rounds that warm up.
const ROUNDS: u64 = 2_000;
const WARM_UP: u64 = 500;

/// What was counted, by name.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Counts(BTreeMap<String, f64>);

pub fn measure(program: &Path) -> Result<Counts> {
    let mut counts = BTreeMap::new();
    let mut note = |what: &str, count: f64| {
        println!("{what}: {count}");
        counts.insert(what.to_string(), count);
    };
    note(
        "instructions: lock and release in the table",
        per_round(|rounds| {
            let mut command = callgrind();
            instructions(command.arg(std::env::current_exe()?).args(["table", &rounds.to_string()]))
        })?,
    );
    for (name, protocol) in [("1", Protocol::V1), ("2", Protocol::V2)] {
        let what = format!("instructions: lock and release in the daemon, protocol {name}");
        note(&what, per_round(|rounds| daemon_instructions(program, protocol, rounds))?);
        let what = format!("system calls: lock and release in the daemon, protocol {name}");
        note(&what, per_round(|rounds| daemon_calls(program, protocol, rounds))?);
    }
    note("system calls: kmutex run", run_calls(program)?);
    note(FAULTS, refused_faults(program)?);
    note("relocations: binary", relocations(&fs::read(program)?)? as f64);
    note("bytes: binary", fs::metadata(program)?.len() as f64);
    note("bytes: binary without the feature etcd", slim_bytes()? as f64);
    Ok(Counts(counts))
}

/// What one round more costs.
fn per_round(mut count: impl FnMut(u64) -> Result<u64>) -> Result<f64> {
    let (few, many) = (count(WARM_UP)?, count(WARM_UP + ROUNDS)?);
    Ok(((many - few) as f64 / ROUNDS as f64 * 100.0).round() / 100.0)
}

/// Locks and releases in a table, where others hold locks too. This is what is counted, in a process of its own.
pub fn table_rounds(rounds: u64) {
    let config = Config {
        hash_key: 1,
        first_token: Token(1),
        hold_limit: None,
        is_clustered: false,
        remember_max: 100_000,
    };
    let mut table = Table::new(config);
    let mut effects = Effects::default();
    for client in 1..100 {
        let asked = LockRequest::new(Key::new(format!("key {client}")).expect("it is one"), Mode::Queue);
        let _ = table.lock(Timestamp(1), ClientId(client), None, Box::new(asked), &mut effects);
    }
    let lock = Key::new("one of many").expect("it is one").id();
    for _ in 0..rounds {
        effects.notifications.clear();
        effects.record.clear();
        table.lock_v1(Timestamp(2), ClientId(0), lock, &mut effects);
        table.release(Timestamp(3), ClientId(0), Outcome::Unknown, &mut effects);
        assert_eq!(effects.notifications.len(), 1);
    }
}

fn callgrind() -> Command {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command
}

/// Runs a command to its end under callgrind: the instructions that it took.
fn instructions(command: &mut Command) -> Result<u64> {
    let output = command.output().map_err(|e| format!("valgrind: {e}"))?;
    collected(&String::from_utf8_lossy(&output.stderr))
}

fn collected(said: &str) -> Result<u64> {
    let count = said.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok());
    count.map_or_else(|| fail(format!("callgrind says no count: {said}")), Ok)
}

/// A daemon under a tool, which ends it, while one connection locks and releases.
fn daemon_under(tool: &mut Command, program: &Path, protocol: Protocol, rounds: u64) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let sock = folder.path().join("sock");
    tool.arg(program).args(["serve", "--ready-fd", "1", "-t", "0", "--sock"]).arg(&sock);
    let mut child = tool.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut ready = [0];
    child.stdout.take().ok_or("it is piped")?.read_exact(&mut ready)?;
    let done = load::saturate(&sock, protocol, 1, rounds);
    // The daemon's own process: under strace it is another than the tool's.
    let pid = fs::read_to_string(folder.path().join("sock.lock"))?.trim().parse()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM)?;
    let output = child.wait_with_output()?;
    done?;
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn daemon_instructions(program: &Path, protocol: Protocol, rounds: u64) -> Result<u64> {
    collected(&daemon_under(&mut callgrind(), program, protocol, rounds)?)
}

fn strace(output: &Path) -> Command {
    let mut command = Command::new("strace");
    command.arg("-o").arg(output);
    command
}

fn daemon_calls(program: &Path, protocol: Protocol, rounds: u64) -> Result<u64> {
    let output = tempfile::NamedTempFile::new()?;
    daemon_under(&mut strace(output.path()), program, protocol, rounds)?;
    Ok(fs::read_to_string(output.path())?.lines().count() as u64)
}

/// The system calls of a whole `kmutex run`, not those of its command: the fewest of several runs. On a busy machine a command takes
/// longer than kmutex waits until it names the command to the daemon.
fn run_calls(program: &Path) -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let sock = folder.path().join("sock");
    let mut daemon = Command::new(program);
    daemon.args(["serve", "--ready-fd", "1", "--no-log", "--sock"]).arg(&sock).stdout(Stdio::piped());
    let mut daemon = daemon.spawn()?;
    daemon.stdout.take().ok_or("it is piped")?.read_exact(&mut [0])?;
    let output = folder.path().join("calls");
    let count = || -> Result<usize> {
        let mut command = strace(&output);
        command.arg(program).args(["run", "--sock"]).arg(&sock).args(["key", "true"]);
        if !command.status()?.success() {
            return fail("kmutex run failed under strace");
        }
        let calls = fs::read_to_string(&output)?;
        Ok(calls.lines().filter(|line| !line.starts_with("---") && !line.starts_with("+++")).count())
    };
    let fewest = (0..9).map(|_| count()).try_fold(usize::MAX, |fewest, calls| Ok(fewest.min(calls?)));
    daemon.kill()?;
    daemon.wait()?;
    fewest.map(|calls| calls as f64)
}

/// The minor page faults of a `kmutex run` that is refused, which runs no command: the fewest of several runs. The program lies
/// in memory, where its pages are cached one by one; on a disk they may be cached in larger pieces, one day more than another.
fn refused_faults(program: &Path) -> Result<f64> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let copy = folder.path().join("kmutex");
    fs::copy(program, &copy)?;
    let program = copy.as_path();
    let sock = folder.path().join("sock");
    let mut daemon = Command::new(program);
    daemon.args(["serve", "--ready-fd", "1", "--no-log", "--sock"]).arg(&sock).stdout(Stdio::piped());
    let mut daemon = daemon.spawn()?;
    daemon.stdout.take().ok_or("it is piped")?.read_exact(&mut [0])?;
    let run = |options: &[&str], command: &[&str]| {
        let mut run = Command::new(program);
        run.args(["run", "--sock"]).arg(&sock).args(options).arg("key").args(command);
        run
    };
    let mut holder = run(&[], &["sh", "-c", "echo; read end"]);
    let mut holder = holder.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    holder.stdout.take().ok_or("it is piped")?.read_exact(&mut [0])?;
    let mut fewest = i64::MAX;
    for _ in 0..9 {
        let before = getrusage(UsageWho::RUSAGE_CHILDREN)?.minor_page_faults();
        let status = run(&["-n"], &["true"]).env_remove("LANG").status()?;
        fewest = fewest.min(getrusage(UsageWho::RUSAGE_CHILDREN)?.minor_page_faults() - before);
        if status.code() != Some(75) {
            return fail(format!("kmutex run -n: {status}, and not 75"));
        }
    }
    drop(holder.stdin.take());
    holder.wait()?;
    daemon.kill()?;
    daemon.wait()?;
    Ok(fewest as f64)
}

/// The relocations that a program applies to itself when it starts: the entries of its sections of type SHT_RELA (elf(5), 64 bits,
/// little endian).
fn relocations(program: &[u8]) -> Result<u64> {
    let number = |at: usize, bytes: usize| -> Result<u64> {
        let field = program.get(at..at + bytes).ok_or("the program is no ELF file")?;
        Ok(field.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    };
    let (sections, size, count) =
        (number(0x28, 8)? as usize, number(0x3a, 2)? as usize, number(0x3c, 2)? as usize);
    let mut entries = 0;
    for at in (0..count).map(|section| sections + section * size) {
        const SHT_RELA: u64 = 4;
        if number(at + 4, 4)? == SHT_RELA {
            entries += number(at + 0x20, 8)? / number(at + 0x38, 8)?.max(1);
        }
    }
    Ok(entries)
}

fn growth_max(what: &str) -> f64 {
    if what == FAULTS { FAULTS_GROWTH_MAX } else { GROWTH_MAX }
}

impl Counts {
    fn path() -> PathBuf {
        project().join("benches/counts.json")
    }

    /// Replaces the committed counts of this C library by these.
    pub fn save(self) -> Result<()> {
        let mut all = Counts::committed()?;
        all.insert(LIBC.into(), self);
        let mut file = fs::File::create(Counts::path())?;
        Ok(writeln!(file, "{}", serde_json::to_string_pretty(&all)?)?)
    }

    /// Those of each C library.
    fn committed() -> Result<BTreeMap<String, Counts>> {
        Ok(serde_json::from_slice(&fs::read(Counts::path())?)?)
    }

    /// Fails if anything has grown too much since [`Counts::save`].
    pub fn check(&self) -> Result<()> {
        let committed = Counts::committed()?.remove(LIBC).unwrap_or_default();
        let mut grown = Vec::new();
        for (what, count) in &self.0 {
            match committed.0.get(what) {
                Some(before) if *count <= before * growth_max(what) => {}
                Some(before) => grown.push(format!("{what}: {count}, and was {before}")),
                None => grown.push(format!("{what} is not in counts.json")),
            }
        }
        if grown.is_empty() { Ok(()) } else { fail(grown.join("; ")) }
    }
}
