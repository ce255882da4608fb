//! Measures kmutex: against flock(1), and against the least that any such daemon must do (`floor.rs`).
//!
//! - `bench run`: times, as ratios in one run; writes results.json, and the table in docs/performance.md.
//! - `bench cluster`: of these times, those of locks that are shared through etcd; the others stay as they were.
//! - `bench flight`: of these, how many runs there are for many requests; it prints them.
//! - `bench network`: of these, locks over TCP and TLS, and redis; it prints them.
//! - `bench share`: of these, the results of one run for many callers, and bkt; it prints them.
//! - `bench plot`: the pictures of docs/performance.md, from results.json.
//! - `bench count [--check]`: instructions, system calls and bytes, which are the same each time: writes counts.json, or
//!   fails where one has grown by more than a tenth.

mod cluster;
mod commands;
mod counts;
mod etcd;
mod floor;
mod load;
mod network;
mod plot;
mod report;
mod servers;
mod shared_results;
mod single_flight;
mod times;

use std::path::{Path, PathBuf};

type Failure = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Failure>;

fn fail<T>(why: impl Into<String>) -> Result<T> {
    Err(why.into().into())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["run"] => times::measure(&kmutex()?)?.save(),
        ["cluster"] => {
            let cluster = cluster::measure(&kmutex()?)?;
            report::Report { cluster, ..report::Report::load()? }.save()
        }
        ["network"] => network::measure(&kmutex()?).map(drop),
        ["share"] => shared_results::measure(&kmutex()?).map(drop),
        ["flight"] => {
            single_flight::measure(&kmutex()?)?;
            single_flight::measure_hosts(&kmutex()?).map(drop)
        }
        ["plot"] => plot::draw(&report::Report::load()?),
        ["count"] => counts::measure(&kmutex()?)?.save(),
        ["count", "--check"] => counts::measure(&kmutex()?)?.check(),
        // The processes that are measured.
        ["floor", sock] => floor::serve(Path::new(sock)),
        ["table", rounds] => {
            counts::table_rounds(rounds.parse()?);
            Ok(())
        }
        _ => fail("usage: bench run | cluster | network | share | flight | plot | count [--check]"),
    }
}

/// The project's folder.
fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The program, as `make` builds it.
fn kmutex() -> Result<PathBuf> {
    built("target/kmutex", "make")
}

/// How large the program is without the feature etcd.
fn slim_bytes() -> Result<u64> {
    Ok(built("target/kmutex-slim", "make build-slim")?.metadata()?.len())
}

fn built(path: &str, how: &str) -> Result<PathBuf> {
    let program = project().join(path);
    if !program.is_file() {
        return fail(format!("there is no {}: run {how} first", program.display()));
    }
    Ok(program)
}

/// Raises the limit of open files as far as it goes, and returns it.
fn raise_descriptor_limit() -> Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// The value below which this part of all lies.
fn percentile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() as f64 * part) as usize).min(sorted.len() - 1)]
}
