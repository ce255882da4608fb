//! What happens in a chaos test: the log for the checker, with the notes for people in it; what is wrong; and how often each
//! thing has happened.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Where each client notes its critical section.
pub const CLIENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/chaos/client.pl");

/// The record of one run of a test.
pub struct Record {
    /// For the checker.
    pub log: PathBuf,
    over: AtomicBool,
    names: AtomicU64,
    /// What is wrong, in the order in which the test found it.
    findings: Mutex<Vec<String>>,
    /// How often each thing happened: a test in which nothing happens proves nothing.
    tally: Mutex<BTreeMap<String, u64>>,
}

impl Record {
    /// Returns an empty record. The file `log` must not exist.
    pub fn new(log: PathBuf) -> Record {
        let (over, names) = (AtomicBool::new(false), AtomicU64::new(0));
        Record { log, over, names, findings: Mutex::default(), tally: Mutex::default() }
    }

    /// Adds a line to the log, with the time.
    pub fn write(&self, words: &str) {
        let mut log = OpenOptions::new().append(true).create(true).open(&self.log).unwrap();
        log.write_all(format!("{words} {:.9}\n", now()).as_bytes()).unwrap();
    }

    /// Returns the log so far.
    pub fn read(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Adds a note for people; the checker skips it.
    pub fn note(&self, what: &str) {
        self.write(&format!("# {what}"));
    }

    /// Returns a name that no other client has.
    pub fn name(&self) -> String {
        format!("c{}", self.names.fetch_add(1, Ordering::Relaxed))
    }

    /// Counts that `what` happened once more.
    pub fn count(&self, what: impl Into<String>) {
        *self.tally.lock().unwrap().entry(what.into()).or_default() += 1;
    }

    /// Returns how often `what` happened.
    pub fn counted(&self, what: &str) -> u64 {
        self.tally.lock().unwrap().get(what).copied().unwrap_or(0)
    }

    /// Prints how often each thing happened.
    pub fn print_tally(&self) {
        for (what, count) in self.tally.lock().unwrap().iter() {
            println!("{count:7} {what}");
        }
    }

    /// Records that something is wrong.
    pub fn find(&self, what: String) {
        self.findings.lock().unwrap().push(what);
    }

    /// Returns everything that is wrong.
    pub fn findings(&self) -> Vec<String> {
        self.findings.lock().unwrap().clone()
    }

    /// Returns `true` when clients and faults must end.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Does `work`. If it panics, the test ends soon.
    pub fn ends_if_this_fails(&self, work: impl FnOnce()) {
        struct Guard<'a>(&'a Record);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.find("the test itself does not get on".into());
                }
            }
        }
        let _guard = Guard(self);
        work();
    }

    /// Lets the test run for `span`, or until something is wrong.
    pub fn run_for(&self, span: Duration) {
        let end = now() + span.as_secs_f64();
        while now() < end && self.findings.lock().unwrap().is_empty() {
            std::thread::sleep(Duration::from_millis(100));
        }
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Returns the time in seconds, by the clock that the clients use too.
pub fn now() -> f64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as f64 + now.tv_nsec() as f64 / 1e9
}

/// Returns the seed and the duration, from the environment.
pub fn settings() -> (u64, Duration) {
    let seed = number_from("KMUTEX_CHAOS_SEED").unwrap_or_else(|| std::process::id().into());
    let span = Duration::from_secs(number_from("KMUTEX_CHAOS_SECS").unwrap_or(60));
    println!("KMUTEX_CHAOS_SEED={seed} for {span:?}");
    (seed, span)
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}

/// Returns the command line of a process, or an empty text if there is no such process.
pub fn command_line(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}
