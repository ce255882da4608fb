//! Coalescing requests (`--coalesce`) of several hosts that share their locks through etcd.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::cluster::{standing, steady_hosts};
use crate::etcd_harness::Etcd;
use crate::harness::*;

const FINISHED: i32 = 79;

/// The file that the requests change, and what the runs make of it.
struct Work {
    folder: PathBuf,
    changes: Mutex<u64>,
}

impl Work {
    fn of(daemon: &Daemon) -> Work {
        Work { folder: daemon.folder().to_path_buf(), changes: Mutex::new(0) }
    }

    /// Makes the next change, whole and after the changes before it.
    fn change(&self) -> u64 {
        let mut changes = self.changes.lock().unwrap();
        *changes += 1;
        let next = self.folder.join("source.new");
        fs::write(&next, changes.to_string()).unwrap();
        fs::rename(&next, self.folder.join("source")).unwrap();
        *changes
    }

    /// A request for a run that reads the source when it begins, and that is done with it when it has ended.
    fn request(&self, daemon: &Daemon, then: &str) -> Process {
        let script = format!(
            "cd {}; echo ran >> runs; cp source copy.$$; {then}; mv copy.$$ copy",
            self.folder.display()
        );
        Process::spawn(&mut daemon.run(&["--coalesce", "k", "sh", "-c", &script]))
    }

    fn copied(&self) -> u64 {
        fs::read_to_string(self.folder.join("copy")).unwrap().parse().unwrap()
    }

    fn runs(&self) -> usize {
        fs::read_to_string(self.folder.join("runs")).unwrap().lines().count()
    }
}

fn until_exists(file: &Path) -> String {
    format!("until test -e {}; do sleep 0.01; done", file.display())
}

/// Each host has requests during a run on the first host. One run follows, which does for all of them, on the host whose place
/// is the newest of all in line.
#[test]
#[ignore = "needs etcd"]
fn one_run_does_for_the_requests_that_all_hosts_had_during_a_run() {
    let etcd = Etcd::single();
    let daemons: [Daemon; 3] = steady_hosts(&etcd);
    let work = Work::of(&daemons[0]);
    for round in 1..=5 {
        let go = work.folder.join(format!("go-{round}"));
        work.change();
        let mut first = work.request(&daemons[0], &until_exists(&go));
        wait_until("the run has begun", || {
            fs::read_to_string(work.folder.join("runs"))
                .is_ok_and(|runs| runs.lines().count() == 2 * round - 1)
        });
        let mut requests = Vec::new();
        for (host, daemon) in daemons.iter().enumerate() {
            for count in 1..=3 {
                work.change();
                requests.push(work.request(daemon, "true"));
                daemon.wait_for_counts("k", 1, count);
            }
            // The host of the holder has its place already.
            wait_until("a place", || standing(&etcd, "k") == host + 1);
        }
        let changes = *work.changes.lock().unwrap();
        fs::write(&go, "").unwrap();
        assert_eq!(first.wait(), 0);
        let codes: Vec<i32> = requests.iter_mut().map(Process::wait).collect();
        assert_eq!(codes, [&[FINISHED; 8][..], &[0]].concat(), "round {round}");
        assert_eq!((work.copied(), work.runs()), (changes, 2 * round), "round {round}");
        wait_until("nothing stands in line", || standing(&etcd, "k") == 0);
    }
}

/// The batch of the host that ran has its place only after the other host's batch, whose run begins at the same moment.
#[test]
#[ignore = "needs etcd"]
fn the_run_of_another_host_that_follows_does_for_the_requests_of_this_one() {
    let etcd = Etcd::single();
    let [a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let work = Work::of(&a);
    let go = |name: &str| work.folder.join(name);
    work.change();
    let mut first = work.request(&a, &until_exists(&go("first")));
    wait_until("the run has begun", || work.folder.join("runs").exists());
    let mut of_b = work.request(&b, &until_exists(&go("second")));
    wait_until("two places", || standing(&etcd, "k") == 2);
    work.change();
    let mut of_a = work.request(&a, "false");
    a.wait_for_counts("k", 1, 1);
    fs::write(go("first"), "").unwrap();
    assert_eq!(first.wait(), 0);
    wait_until("the batch of the first host has given up its place", || {
        work.runs() == 2 && standing(&etcd, "k") == 1
    });
    fs::write(go("second"), "").unwrap();
    assert_eq!((of_b.wait(), of_a.wait()), (0, FINISHED));
    assert_eq!((work.copied(), work.runs()), (2, 2));
}

/// Requests of all hosts over some seconds: when one returns, its change is in the copy.
fn changes_and_requests(daemons: &[Daemon], work: &Work, count: u32, over: Duration) {
    let began = Instant::now();
    std::thread::scope(|scope| {
        for number in 0..count {
            let due = over * number / count;
            let daemon = &daemons[number as usize % daemons.len()];
            scope.spawn(move || {
                // The changes come when they come, and the test does not wait for anything here.
                std::thread::sleep(due.saturating_sub(began.elapsed()));
                let change = work.change();
                let code = work.request(daemon, "sleep 0.3").wait();
                assert!(matches!(code, 0 | FINISHED), "change {change}: exit status {code}");
                let copied = work.copied();
                assert!(copied >= change, "change {change} is missed: {copied}");
            });
        }
    });
}

/// KMUTEX_CHANGES says how many.
#[test]
#[ignore = "needs etcd, and some seconds"]
fn no_request_of_any_host_returns_before_a_run_that_began_after_it() {
    let etcd = Etcd::single();
    let daemons: [Daemon; 3] = steady_hosts(&etcd);
    let work = Work::of(&daemons[0]);
    let count = std::env::var("KMUTEX_CHANGES").map_or(60, |count| count.parse().expect("a number"));
    changes_and_requests(&daemons, &work, count, Duration::from_secs(3));
    let runs = work.runs();
    println!("{runs} runs for {count} requests");
    assert!(runs < count as usize / 2, "{runs} runs for {count} requests");
    wait_until("nothing stands in line", || standing(&etcd, "k") == 0);
}
