//! Times. The machine may do other things meanwhile, so all are measured by turns, A B A B, and only medians and ratios
//! of one run are compared.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use crate::cluster;
use crate::commands::{Environment, Timed, alternate};
use crate::load::{self, Protocol};
use crate::network;
use crate::report::{Distribution, Report, Row, Target, Throughput};
use crate::servers::{Server, pin_load, unpin_load};
use crate::shared_results;
use crate::single_flight;
use crate::{Result, fail, median, raise_descriptor_limit, slim_bytes};

/// How often each of two commands is run.
const RUNS: usize = 1_000;
/// How often each load is repeated.
const TURNS: usize = 7;
const ROUNDS: u64 = 200_000;
const IDLE: u64 = 19_000;
const WAITERS: u64 = 10_000;

/// All of the table.
pub fn measure(program: &Path) -> Result<Report> {
    let limit = raise_descriptor_limit()?;
    if limit < IDLE + 500 {
        return fail(format!("{limit} open files are too few for {IDLE} connections: raise the hard limit"));
    }
    network::check()?;
    shared_results::check()?;
    let mut report = Report { machine: machine()?, ..Report::default() };
    commands(program, &mut report)?;
    pin_load()?;
    throughput(program, &mut report)?;
    idle(program, &mut report)?;
    herd(program, &mut report)?;
    curves(program, &mut report)?;
    let (bytes, slim) = (fs::metadata(program)?.len() as f64, slim_bytes()? as f64);
    report.row("binary without the feature etcd", slim / 1e6, None, "MB", Target::AtMost(2.0));
    report.row("binary with / without it", bytes / 1e6, Some(slim / 1e6), "MB", Target::Open);
    report.rows.push(single_flight::measure(program)?);
    report.rows.extend(shared_results::measure(program)?);
    report.rows.extend(network::measure(program)?);
    report.cluster = cluster::measure(program)?;
    Ok(report)
}

impl Report {
    fn row(&mut self, what: &str, ours: f64, theirs: Option<f64>, unit: &str, target: Target) {
        self.rows.push(Row::new(what, ours, theirs, unit, target));
    }
}

fn machine() -> Result<String> {
    let info = fs::read_to_string("/proc/cpuinfo")?;
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let cores = std::thread::available_parallelism()?;
    Ok(format!("{}, {cores} processors, Linux {}", name.map_or("unknown", |(_, name)| name), kernel.trim()))
}

/// `kmutex run` and flock(1), as users start them. Nothing is pinned.
fn commands(program: &Path, report: &mut Report) -> Result<()> {
    unpin_load()?;
    let daemon = Server::kmutex(program)?;
    daemon.unpin()?;
    for (environment, name, target) in
        [(Environment::Cron, "without LANG", 1.0), (Environment::Login, "LANG=C.UTF-8", 0.85)]
    {
        commands_in(environment, name, Target::AtMost(target), program, &daemon, report)?;
    }
    Ok(())
}

fn commands_in(
    environment: Environment,
    name: &str,
    target: Target,
    program: &Path,
    daemon: &Server,
    report: &mut Report,
) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("file");
    let (kmutex, sock, file) = (&*program.to_string_lossy(), daemon.sock(), &*file.to_string_lossy());
    let sock = &*sock.to_string_lossy();
    let ours = |options: &[&str], code| {
        let words = [&[kmutex, "run", "--sock", sock], options, &["key", "true"]].concat();
        Timed::new(&words, code, environment)
    };
    let theirs = |options: &[&str], code| {
        Timed::new(&[&["flock"], options, &[file, "true"]].concat(), code, environment)
    };
    let mut row = |what: &str, [ours, theirs]: &[Vec<f64>; 2]| {
        report.row(&format!("{what}, {name}"), median(ours), Some(median(theirs)), "µs", target);
    };

    let run = alternate(RUNS, &ours(&[], 0)?, &theirs(&[], 0)?)?;
    row("`kmutex run K true` / `flock f true`", &run);
    let exec = alternate(RUNS, &ours(&["-F"], 0)?, &theirs(&["-F"], 0)?)?;
    row("`kmutex run -F K true` / `flock -F f true`", &exec);

    let mut holders = [
        std::process::Command::new(kmutex).args(["run", "--sock", sock, "key", "sleep", "1000"]).spawn()?,
        std::process::Command::new("flock").args(["-F", file, "sleep", "1000"]).spawn()?,
    ];
    sleep(Duration::from_millis(200));
    let refused = ours(&["-n"], 75).and_then(|ours| alternate(RUNS, &ours, &theirs(&["-n"], 1)?));
    for holder in &mut holders {
        // SIGTERM, so that kmutex ends its command too.
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(holder.id() as i32),
            nix::sys::signal::Signal::SIGTERM,
        )?;
        holder.wait()?;
    }
    row("`kmutex run -n` refused / `flock -n` refused", &refused?);
    if environment == Environment::Login {
        let named = [
            ("kmutex run", &run[0]),
            ("flock", &run[1]),
            ("kmutex run -F", &exec[0]),
            ("flock -F", &exec[1]),
        ];
        report.commands = named.map(|(name, values)| Distribution::new(name, values)).into();
    }
    Ok(())
}

/// Runs all of them by turns: the medians.
fn by_turns<const N: usize>(turns: usize, mut act: impl FnMut(usize) -> Result<f64>) -> Result<[f64; N]> {
    let mut values: [Vec<f64>; N] = std::array::from_fn(|_| Vec::new());
    for _ in 0..turns {
        for (number, values) in values.iter_mut().enumerate() {
            values.push(act(number)?);
        }
    }
    Ok(values.map(|values| median(&values)))
}

fn throughput(program: &Path, report: &mut Report) -> Result<()> {
    let (daemon, floor) = (Server::kmutex(program)?, Server::floor()?);
    let [floor, ours, second] = by_turns(TURNS, |which| match which {
        0 => load::saturate(&floor.sock(), Protocol::V1, 64, ROUNDS),
        1 => load::saturate(&daemon.sock(), Protocol::V1, 64, ROUNDS),
        _ => load::saturate(&daemon.sock(), Protocol::V2, 64, ROUNDS),
    })?;
    let per_second = "a second";
    let at_least = Target::AtLeast;
    report.row(
        "protocol 1, 64 connections, journal on / floor",
        ours,
        Some(floor),
        per_second,
        at_least(0.97),
    );
    report.row("protocol 2 / protocol 1", second, Some(ours), per_second, at_least(0.85));
    let Some(original) = std::env::var_os("KEYEDMUTEXD") else {
        eprintln!("the keyedmutexd of KeyedMutex is not measured: $KEYEDMUTEXD does not name it");
        return Ok(());
    };
    let original = Server::original(Path::new(&original))?;
    let [ours, theirs] = by_turns(TURNS, |which| {
        let server = if which == 0 { &daemon } else { &original };
        load::saturate(&server.sock(), Protocol::V1, 64, ROUNDS)
    })?;
    let what = "protocol 1, 64 connections, journal on / keyedmutexd 0.04, log on";
    report.row(what, ours, Some(theirs), per_second, at_least(1.2));
    Ok(())
}

fn idle(program: &Path, report: &mut Report) -> Result<()> {
    let (alone, crowded) = (Server::kmutex(program)?, Server::kmutex(program)?);
    let before = crowded.status("RssAnon")?;
    let idle = load::idle(&crowded.sock(), IDLE)?;
    let grown = (crowded.status("RssAnon")? - before) as f64 * 1024.0 / IDLE as f64;
    let wakes = crowded.status("voluntary_ctxt_switches")?;
    sleep(Duration::from_secs(10));
    let wakes = crowded.status("voluntary_ctxt_switches")? - wakes;
    let [without, with] = by_turns(TURNS, |which| {
        let server = [&alone, &crowded][which];
        load::saturate(&server.sock(), Protocol::V1, 64, ROUNDS)
    })?;
    let what = "the same with 19,000 idle connections that hold a lock each / without";
    report.row(what, with, Some(without), "a second", Target::AtLeast(0.9));
    report.row("memory a connection", grown, None, "bytes", Target::AtMost(256.0));
    report.row("wake-ups of an idle daemon in 10 s", wakes as f64, None, "", Target::AtMost(0.0));
    drop(idle);
    Ok(())
}

fn herd(program: &Path, report: &mut Report) -> Result<()> {
    let [ours, floor] = by_turns(TURNS, |which| {
        // A new daemon each time, so that none has to close ten thousand connections meanwhile.
        let server = if which == 0 { Server::kmutex(program)? } else { Server::floor()? };
        Ok(load::herd(&server.sock(), WAITERS, which == 1)?.as_secs_f64() * 1e3)
    })?;
    report.row("telling 10,000 waiters / floor", ours, Some(floor), "ms", Target::AtMost(1.2));
    Ok(())
}

fn curves(program: &Path, report: &mut Report) -> Result<()> {
    let (daemon, floor) = (Server::kmutex(program)?, Server::floor()?);
    for connections in [1, 4, 16, 64, 256, 1_024, 4_096, 19_000] {
        let rounds = (connections * 10).clamp(30_000, 100_000);
        let [floor, protocol1, protocol2] = by_turns(3, |which| match which {
            0 => load::saturate(&floor.sock(), Protocol::V1, connections, rounds),
            1 => load::saturate(&daemon.sock(), Protocol::V1, connections, rounds),
            _ => load::saturate(&daemon.sock(), Protocol::V2, connections, rounds),
        })?;
        eprintln!("{connections} connections: {floor:.0} {protocol1:.0} {protocol2:.0}");
        report.throughput.push(Throughput { connections, floor, protocol1, protocol2 });
    }
    let mut took = [Vec::new(), Vec::new()];
    for _ in 0..TURNS {
        took[0].extend(load::latencies(&daemon.sock(), 10_000)?);
        took[1].extend(load::latencies(&floor.sock(), 10_000)?);
    }
    report.latencies = vec![Distribution::new("kmutex", &took[0]), Distribution::new("floor", &took[1])];
    Ok(())
}
