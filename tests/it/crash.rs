//! The crash matrix: the daemon dies before and after each write of its journal and each send, while there are a holder,
//! waiters and a newcomer. Another daemon takes its place, and no client notices.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::harness::{Daemon, KillOnDrop, Process, wait_until};

/// Far less than a test may take: as an ordinary user, a daemon that cannot find the command of a holder keeps the lock for
/// this time, because a process of root, whose environment it cannot read, may be that command.
const GRACE: [&str; 2] = ["--grace", "5"];

/// A daemon that dies at a certain moment, and is followed by one that does not.
struct Fixture {
    daemon: Daemon,
    died: bool,
}

impl Fixture {
    /// `moment` is `PLACE:N`: the Nth time that the daemon comes to a place.
    fn new(moment: &str) -> Fixture {
        let daemon = Daemon::made(&GRACE, |command| command.env("KMUTEX_FAILPOINT", moment));
        Fixture { daemon, died: false }
    }

    /// Waits until `look` says true, with a daemon there.
    fn wait_until(&mut self, what: &str, mut look: impl FnMut(&Daemon) -> bool) {
        wait_until(what, || {
            self.tend();
            look(&self.daemon)
        });
    }

    fn tend(&mut self) {
        if !self.daemon.process().is_running() {
            self.daemon.restart(&GRACE);
            self.died = true;
        }
    }

    fn wait(&mut self, process: &mut Process) -> i32 {
        self.wait_until("the end of a client", |_| !process.is_running());
        process.wait()
    }

    /// Starts one more client, and waits until so many wait.
    fn waiter(&mut self, waiters: usize, name: &str, options: &[&str]) -> Process {
        self.with_a_daemon(|fixture| {
            let mut process = Process::spawn(&mut fixture.client(name, options, ""));
            fixture.wait_until("one more to wait", |daemon| {
                // The log begins anew with each daemon, to which all who wait come back.
                !process.is_running() || daemon.log().matches("wait: ").count() == waiters
            });
            if process.is_running() { Ok(process) } else { Err(process.wait()) }
        })
    }

    /// Runs one more client to its end.
    fn run(&mut self, name: &str, options: &[&str]) -> i32 {
        self.with_a_daemon(|fixture| {
            let mut process = Process::spawn(&mut fixture.client(name, options, ""));
            match fixture.wait(&mut process) {
                69 => Err(69),
                code => Ok(code),
            }
        })
    }

    /// Does it once more if it came when no daemon was there, which is once at the most.
    fn with_a_daemon<T>(&mut self, mut act: impl FnMut(&mut Fixture) -> Result<T, i32>) -> T {
        if let Ok(done) = act(self) {
            return done;
        }
        wait_until("the daemon to die", || {
            self.tend();
            self.died
        });
        act(self).unwrap_or_else(|code| panic!("it ends with {code} though there is a daemon"))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.daemon.folder().join(name)
    }

    /// A client whose command notes its token, and that it is not alone if it is not.
    fn client(&self, name: &str, options: &[&str], then: &str) -> Command {
        let script = format!(
            "mkdir inside || echo {name} is not alone >> violations; echo $KMUTEX_TOKEN >> tokens; \
             echo > {name}; {then} rmdir inside"
        );
        let mut command = self.daemon.run(options);
        command.args(["k", "--", "sh", "-c", &script]);
        command
    }
}

/// Plays it all with a daemon that dies then. False: it never came to that.
fn survives(moment: &str) -> bool {
    let mut fixture = Fixture::new(moment);
    let mut holder = fixture.client("holder", &["--queue"], "read line;");
    let mut holder = Process::spawn(holder.stdin(Stdio::piped()));
    let holding = fixture.file("holder");
    fixture.wait_until("the holder to hold", |_| holding.exists());

    let mut once = fixture.waiter(1, "once", &[]);
    let mut queue = fixture.waiter(2, "queue", &["--queue"]);
    // One that does not want to wait does not wait for another daemon either.
    assert_eq!(fixture.run("newcomer", &["-n"]), 75, "{moment}");

    assert!(!fixture.file("queue").exists() && !fixture.file("once").exists(), "{moment}");
    drop(holder.child.stdin.take());
    assert_eq!(fixture.wait(&mut holder), 0, "{moment}");
    let once = fixture.wait(&mut once);
    // If the daemon died before it told the waiter that the holder is done, the waiter does the work again.
    assert!(once == 79 || once == 0 && fixture.died, "{moment}: {once}");
    assert_eq!(once == 0, fixture.file("once").exists(), "{moment}");
    assert_eq!(fixture.wait(&mut queue), 0, "{moment}");
    assert!(fixture.file("queue").exists(), "{moment}");

    assert_eq!(fixture.run("last", &["--queue"]), 0, "{moment}");
    fixture.wait_until("nothing to be held", |daemon| {
        let status = daemon.kmutex(&["status", "--json"]).output().unwrap();
        status.status.success() && status.stdout.is_empty()
    });
    let violations = fs::read_to_string(fixture.file("violations")).unwrap_or_default();
    assert_eq!(violations, "", "{moment}");
    let tokens = fs::read_to_string(fixture.file("tokens")).unwrap();
    let tokens: Vec<u64> = tokens.lines().map(|token| token.parse().unwrap()).collect();
    assert!(tokens.is_sorted_by(|a, b| a < b), "{moment}: {tokens:?}");
    fixture.died
}

/// Lets the daemon die the first time, the second time and so on, until it is not reached any more.
fn survives_always(place: &str, at_least: u32) {
    const TIMES_MAX: u32 = 100;
    let times = (1..TIMES_MAX).take_while(|time| survives(&format!("{place}:{time}"))).count() as u32;
    assert!((at_least..TIMES_MAX - 1).contains(&times), "{place} was reached {times} times");
}

#[test]
fn the_daemon_may_die_before_each_write_of_the_journal() {
    survives_always("before-journal", 5);
}

#[test]
fn the_daemon_may_die_after_each_write_of_the_journal() {
    survives_always("after-journal", 5);
}

#[test]
fn the_daemon_may_die_before_each_send() {
    survives_always("before-send", 6);
}

#[test]
fn the_daemon_may_die_after_each_send() {
    survives_always("after-send", 6);
}

/// The daemon never hears of the command, because both it and kmutex are killed before that.
#[test]
fn a_command_of_which_no_daemon_has_heard_keeps_its_lock() {
    let mut daemon = Daemon::made(&[], |command| command.env("KMUTEX_FAILPOINT", "child:1"));
    let mut command = daemon.run(&["k", "--", "sh", "-c", "sleep 1000 & echo $! $$; wait"]);
    let mut run = Process::spawn(command.stdout(Stdio::piped()));
    let pids = run.line().unwrap();
    let (below, child) = pids.split_once(' ').unwrap();
    let (_below, child) = (KillOnDrop::new(below), KillOnDrop::new(child));
    assert_eq!(daemon.process().wait(), 128 + 9);
    run.signal(Signal::SIGKILL);
    run.wait();

    daemon.restart(&["--grace", "0"]);
    assert_eq!(daemon.status()[0]["holders"][0]["orphan"], true);
    assert_eq!(daemon.run(&["-n", "k", "true"]).status().unwrap().code(), Some(75));
    child.kill();
    // Not when what it started ends, which has the same environment.
    assert_eq!(daemon.run(&["--queue", "k", "true"]).status().unwrap().code(), Some(0));
}

/// The same with several locks.
#[test]
fn a_command_of_which_no_daemon_has_heard_keeps_all_its_locks() {
    let mut daemon = Daemon::made(&[], |command| command.env("KMUTEX_FAILPOINT", "child:1"));
    let mut command = daemon.run(&["-k", "a", "-k", "b", "--", "sh", "-c", "echo $$; exec sleep 1000"]);
    let mut run = Process::spawn(command.stdout(Stdio::piped()));
    let child = KillOnDrop::new(&run.line().unwrap());
    assert_eq!(daemon.process().wait(), 128 + 9);
    run.signal(Signal::SIGKILL);
    run.wait();
    daemon.restart(&["--grace", "0"]);
    for key in ["a", "b"] {
        assert_eq!(daemon.run(&["-n", key, "true"]).status().unwrap().code(), Some(75), "{key}");
    }
    child.kill();
    for key in ["a", "b"] {
        assert_eq!(daemon.run(&["--queue", key, "true"]).status().unwrap().code(), Some(0), "{key}");
    }
}

/// The same, but kmutex is killed only when another daemon waits for it.
#[test]
fn a_command_of_which_no_daemon_has_heard_keeps_its_lock_when_kmutex_is_killed_later() {
    let mut daemon = Daemon::made(&[], |command| command.env("KMUTEX_FAILPOINT", "child:1"));
    let mut command = daemon.run(&["k", "--", "sh", "-c", "echo $$; exec sleep 1000"]);
    let mut run = Process::spawn(command.stdout(Stdio::piped()));
    let child = KillOnDrop::new(&run.line().unwrap());
    assert_eq!(daemon.process().wait(), 128 + 9);
    run.signal(Signal::SIGSTOP);
    daemon.restart(&["--grace", "0"]);
    assert_eq!(daemon.status()[0]["holders"][0]["orphan"], true);
    run.signal(Signal::SIGKILL);
    run.wait();
    assert_eq!(daemon.run(&["-n", "k", "true"]).status().unwrap().code(), Some(75));
    child.kill();
    assert_eq!(daemon.run(&["--queue", "k", "true"]).status().unwrap().code(), Some(0));
}
