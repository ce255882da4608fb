//! Many requests for the same work. What counts here is how many runs there were, and that no request missed its change.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::etcd::Etcd;
use crate::report::{Row, Target};
use crate::servers::Server;
use crate::{Result, fail};

/// How many requests come, how long all of them take to come, and how long a run takes.
const REQUESTS: u64 = 1_000;
const SPREAD: Duration = Duration::from_secs(10);
const RUN: &str = "1";
/// How many hosts there are, if they share their locks.
const HOSTS: usize = 3;

/// On one host.
pub fn measure(program: &Path) -> Result<Row> {
    let daemon = Server::kmutex(program)?;
    daemon.unpin()?;
    Ok(row("one host", coalesced(program, &[daemon.sock()])?))
}

/// On hosts that share their locks through etcd, each with as many of the requests.
pub fn measure_hosts(program: &Path) -> Result<Row> {
    let etcd = Etcd::start(1)?;
    let daemons: Vec<Server> =
        (0..HOSTS).map(|_| Server::sharing(program, &etcd.urls())).collect::<Result<_>>()?;
    let socks: Vec<PathBuf> = daemons.iter().map(Server::sock).collect();
    Ok(row(&format!("{HOSTS} hosts"), coalesced(program, &socks)?))
}

fn row(place: &str, runs: u64) -> Row {
    let spread = SPREAD.as_secs();
    let what =
        format!("runs for {REQUESTS} requests with `--coalesce` in {spread} s, of {RUN} s each, {place}");
    Row::new(&what, runs as f64, None, "", Target::AtMost(12.0))
}

/// Each request first makes a change: it counts a file up. The job copies that file when it begins. A request that returns
/// while the copy is older than its change has missed it, which is an error.
///
/// The requests go to the daemons with these sockets by turns. Returns how many runs there were.
fn coalesced(program: &Path, socks: &[PathBuf]) -> Result<u64> {
    let folder = tempfile::tempdir()?;
    let (source, copy, runs) =
        (folder.path().join("source"), folder.path().join("copy"), folder.path().join("runs"));
    // Each file is renamed into its place, so that no reader finds half of one.
    let job = format!(
        "echo >>'{runs}'; cp '{source}' '{copy}.new'; mv '{copy}.new' '{copy}'; sleep {RUN}",
        runs = runs.display(),
        source = source.display(),
        copy = copy.display()
    );
    let next = source.with_extension("new");
    let change = |number: u64| -> Result<()> {
        fs::write(&next, number.to_string())?;
        Ok(fs::rename(&next, &source)?)
    };
    let request = |number: u64| -> Result<()> {
        let mut command = Command::new(program);
        let sock = &socks[number as usize % socks.len()];
        command.args(["run", "--coalesce", "--sock"]).arg(sock).args(["build", "sh", "-c", &job]);
        let status = command.status()?;
        if !matches!(status.code(), Some(0 | 79)) {
            return fail(format!("kmutex run --coalesce: {status}"));
        }
        let copied: u64 = fs::read_to_string(&copy)?.parse()?;
        if copied < number {
            fail(format!("request {number} returned with the work of {copied}"))
        } else {
            Ok(())
        }
    };
    let began = Instant::now();
    thread::scope(|scope| {
        let request = &request;
        let mut requests = Vec::new();
        for number in 1..=REQUESTS {
            let due = SPREAD.mul_f64(number as f64 / REQUESTS as f64);
            thread::sleep(due.saturating_sub(began.elapsed()));
            change(number)?;
            requests.push(scope.spawn(move || request(number)));
        }
        requests.into_iter().try_for_each(|request| request.join().map_err(|_| "a request panicked")?)
    })?;
    Ok(fs::read_to_string(&runs)?.lines().count() as u64)
}
