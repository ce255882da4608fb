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

/// Of one run of a test.
pub struct Record {
    /// For the checker.
    pub log: PathBuf,
    over: AtomicBool,
    names: AtomicU64,
    /// What is wrong, as it is found.
    findings: Mutex<Vec<String>>,
    /// How often each thing happened: a test in which nothing happens proves nothing.
    tally: Mutex<BTreeMap<String, u64>>,
}

impl Record {
    /// Of nothing yet. `log` is a file that is not there.
    pub fn new(log: PathBuf) -> Record {
        let (over, names) = (AtomicBool::new(false), AtomicU64::new(0));
        Record { log, over, names, findings: Mutex::default(), tally: Mutex::default() }
    }

    /// Adds a line to the log, with the time.
    pub fn write(&self, words: &str) {
        let mut log = OpenOptions::new().append(true).create(true).open(&self.log).unwrap();
        log.write_all(format!("{words} {:.9}\n", now()).as_bytes()).unwrap();
    }

    /// All that it says so far.
    pub fn read(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Notes for people what the checker has no use for.
    pub fn note(&self, what: &str) {
        self.write(&format!("# {what}"));
    }

    /// What nobody else is called.
    pub fn name(&self) -> String {
        format!("c{}", self.names.fetch_add(1, Ordering::Relaxed))
    }

    /// Something has happened once more.
    pub fn count(&self, what: impl Into<String>) {
        *self.tally.lock().unwrap().entry(what.into()).or_default() += 1;
    }

    /// How often.
    pub fn counted(&self, what: &str) -> u64 {
        self.tally.lock().unwrap().get(what).copied().unwrap_or(0)
    }

    /// For people.
    pub fn print_tally(&self) {
        for (what, count) in self.tally.lock().unwrap().iter() {
            println!("{count:7} {what}");
        }
    }

    /// Something is wrong.
    pub fn find(&self, what: String) {
        self.findings.lock().unwrap().push(what);
    }

    /// All that is wrong.
    pub fn findings(&self) -> Vec<String> {
        self.findings.lock().unwrap().clone()
    }

    /// True when clients and faults are to come to their end.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Does it; if that panics, nobody goes on for long.
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

    /// Lets it go on for so long, or until something is wrong.
    pub fn run_for(&self, span: Duration) {
        let end = now() + span.as_secs_f64();
        while now() < end && self.findings.lock().unwrap().is_empty() {
            std::thread::sleep(Duration::from_millis(100));
        }
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Seconds, by the clock that the clients note too.
pub fn now() -> f64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as f64 + now.tv_nsec() as f64 / 1e9
}

/// The seed, and for how long: from the environment.
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

/// What a process was started with. Empty: there is none.
pub fn command_line(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}
