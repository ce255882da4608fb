//! A host: a daemon with its socket and its journal, in a network of its own; and what has happened to it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::TTL_SECS;
use crate::etcd_harness::Place;
use crate::harness::{KMUTEX, Process, wait_for, wait_until};
use crate::record::now;

pub struct Host {
    pub number: usize,
    pub place: Place,
    folder: PathBuf,
    /// Where the daemon finds etcd.
    endpoints: String,
    /// The members of etcd, beginning with that of this host.
    members: String,
    daemon: Mutex<Option<Process>>,
    /// When the daemon said that what it held is lost.
    losses: Arc<Mutex<Vec<f64>>>,
    outages: Mutex<Vec<Outage>>,
}

/// A time in which something was wrong with a host.
#[derive(Clone, Copy, Debug)]
pub struct Outage {
    pub what: HostFault,
    pub from: f64,
    /// Infinity: it is.
    pub to: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostFault {
    /// The daemon is dead.
    Dead,
    /// The daemon is stopped.
    Stopped,
    /// It has no network.
    Cut,
}

impl Host {
    /// With a daemon that serves.
    pub fn start(number: usize, place: Place, folder: PathBuf, endpoints: String, members: String) -> Host {
        fs::create_dir(&folder).unwrap();
        let host = Host {
            number,
            place,
            folder,
            endpoints,
            members,
            daemon: Mutex::default(),
            losses: Arc::default(),
            outages: Mutex::default(),
        };
        host.start_daemon();
        host
    }

    pub fn sock(&self) -> PathBuf {
        self.folder.join("sock")
    }

    fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// `PROGRAM ...` on this host, with its daemon.
    pub fn tool(&self, program: &str) -> Command {
        let mut command = self.place.tool(program);
        command.env("KMUTEX_SOCK", self.sock()).env_remove("RUST_LOG").stdin(Stdio::null());
        command
    }

    /// etcdctl on this host.
    pub fn etcdctl(&self) -> Command {
        let mut command = self.tool("etcdctl");
        command.env("ETCDCTL_API", "3").env("ETCDCTL_ENDPOINTS", &self.members);
        command
    }

    /// As a supervisor does: one that ends because another has the socket is started again. (A client that finds no daemon
    /// starts one, which has the socket until it finds that it is not to serve here.)
    fn start_daemon(&self) {
        let process = wait_for("a daemon to serve", || {
            let mut process = self.spawn_daemon();
            wait_until("a daemon to serve, or to end", || {
                self.is_served_by(process.pid()) || !process.is_running()
            });
            if process.is_running() {
                return Some(process);
            }
            let code = process.wait();
            assert_eq!(code, 75, "a daemon does not start; {}", self.last_words());
            None
        });
        *self.daemon.lock().unwrap() = Some(process);
    }

    fn is_served_by(&self, pid: Pid) -> bool {
        let claim = fs::read_to_string(self.folder.join("sock.lock")).unwrap_or_default();
        claim == format!("{pid}\n") && UnixStream::connect(self.sock()).is_ok()
    }

    fn spawn_daemon(&self) -> Process {
        let mut command = self.tool(KMUTEX);
        command.args(["serve", "--log-level", "debug", "--grace", "2", "--etcd", &self.endpoints]);
        command.args(["--etcd-ttl", &TTL_SECS.to_string(), "--sock"]).arg(self.sock());
        let mut process = Process::spawn(command.stderr(Stdio::piped()));
        self.keep_log(process.child.stderr.take().expect("it is piped"));
        process
    }

    /// Each line with the time, until the daemon ends.
    fn keep_log(&self, said: ChildStderr) {
        let mut log = File::options().append(true).create(true).open(self.log()).unwrap();
        let losses = self.losses.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(said).lines().map_while(Result::ok) {
                let now = now();
                if line.contains(" is lost") {
                    losses.lock().unwrap().push(now);
                }
                // The test is over if it cannot be written, and its folder gone.
                let _ = writeln!(log, "{now:.6} {line}");
            }
        });
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        log.lines().last().unwrap_or("it says nothing").into()
    }

    /// What the daemon has logged in this time.
    pub fn logged(&self, from: f64, to: f64) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let time = |line: &str| line.split(' ').next().and_then(|time| time.parse().ok()).unwrap_or(from);
        let lines = log.lines().filter(|line| (from..=to).contains(&time(line)));
        lines.flat_map(|line| [line, "\n"]).collect()
    }

    /// Kills the daemon, as `kill -9` does.
    pub fn kill_daemon(&self) {
        self.begin(HostFault::Dead);
        let mut process = self.daemon.lock().unwrap().take().expect("it runs");
        process.signal(Signal::SIGKILL);
        assert_eq!(process.wait(), 128 + 9, "{}", self.last_words());
    }

    /// Starts it again, with what is in its journal.
    pub fn revive_daemon(&self) {
        self.start_daemon();
        self.end(HostFault::Dead);
    }

    /// Stops the daemon, as if the machine slept.
    pub fn stop_daemon(&self) {
        self.begin(HostFault::Stopped);
        self.signal(Signal::SIGSTOP);
    }

    pub fn continue_daemon(&self) {
        self.signal(Signal::SIGCONT);
        self.end(HostFault::Stopped);
    }

    fn signal(&self, signal: Signal) {
        self.daemon.lock().unwrap().as_ref().expect("it runs").signal(signal);
    }

    /// The daemon runs, without interruption since it was started the last time.
    pub fn is_well(&self) -> bool {
        self.daemon.lock().unwrap().as_mut().is_some_and(Process::is_running)
    }

    /// Noted before it begins.
    pub fn begin(&self, what: HostFault) {
        self.outages.lock().unwrap().push(Outage { what, from: now(), to: f64::INFINITY });
    }

    /// Noted when it has ended.
    pub fn end(&self, what: HostFault) {
        let mut outages = self.outages.lock().unwrap();
        let outage = outages.iter_mut().rev().find(|outage| outage.what == what).expect("it began");
        outage.to = now();
    }

    pub fn outages(&self) -> Vec<Outage> {
        self.outages.lock().unwrap().clone()
    }

    /// When the daemon said that what it held is lost.
    pub fn losses(&self) -> Vec<f64> {
        self.losses.lock().unwrap().clone()
    }
}
