//! The daemon and the floor as processes, each on its own processor.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::{Result, fail};

/// Where servers run, and where the load does.
const SERVERS: usize = 0;
const LOAD: usize = 1;

/// A server, which is killed when this is dropped.
pub struct Server {
    child: Child,
    folder: TempDir,
}

impl Server {
    /// The daemon under test, as it serves by default.
    pub fn kmutex(program: &Path) -> Result<Server> {
        Server::start(|sock| serve(program, sock))?.pinned()
    }

    /// The same, sharing its locks through etcd. It has several threads, and runs on any processor.
    pub fn sharing(program: &Path, urls: &str) -> Result<Server> {
        Server::start(|sock| {
            let mut command = serve(program, sock);
            command.args(["--etcd", urls]);
            command
        })
    }

    /// Another server on a processor of its own. It listens on the socket that `command` is given, and perhaps elsewhere.
    pub fn started(command: impl FnOnce(&Path) -> Command) -> Result<Server> {
        Server::start(command)?.pinned()
    }

    /// The floor.
    pub fn floor() -> Result<Server> {
        let program = std::env::current_exe()?;
        Server::start(|sock| {
            let mut command = Command::new(program);
            command.arg("floor").arg(sock);
            command
        })?
        .pinned()
    }

    /// The daemon that kmutex replaces, with its log on, as it is by default. (It flushes the log as stdio does with a file.)
    pub fn original(program: &Path) -> Result<Server> {
        let log = tempfile::tempfile()?;
        Server::start(|sock| {
            let mut command = Command::new(program);
            command.arg("-s").arg(sock).args(["-m", "256"]).stdout(log);
            command
        })?
        .pinned()
    }

    fn start(command: impl FnOnce(&Path) -> Command) -> Result<Server> {
        let folder = tempfile::tempdir()?;
        let sock = folder.path().join("sock");
        let child = command(&sock).stderr(Stdio::null()).stdin(Stdio::null()).spawn()?;
        let server = Server { child, folder };
        let give_up = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(&sock).is_err() {
            if Instant::now() > give_up {
                return fail("the server does not come up");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(server)
    }

    fn pinned(self) -> Result<Server> {
        pin(self.pid(), SERVERS)?;
        Ok(self)
    }

    /// Lets it run on any processor.
    pub fn unpin(&self) -> Result<()> {
        any(self.pid())
    }

    /// Where its socket is, and what else it keeps.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn sock(&self) -> PathBuf {
        self.folder().join("sock")
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// How much time of processors it has taken, in microseconds (proc(5), /proc/PID/stat).
    pub fn processor_time(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        // Behind the name, which may have blanks in it: the state is the third field, these are the 14th and the 15th.
        let rest = stat.rsplit(") ").next().unwrap_or_default();
        let ticks: Vec<f64> = rest.split(' ').skip(11).take(2).filter_map(|text| text.parse().ok()).collect();
        // The kernel counts in hundredths of a second, whatever its own clock is.
        Ok(ticks.iter().sum::<f64>() * 1e4)
    }

    /// A number of `/proc/PID/status`: a size in KiB, or a count.
    pub fn status(&self, field: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let Some(number) = line.and_then(|line| line.split_whitespace().next()?.parse().ok()) else {
            return fail(format!("no {field} in /proc/PID/status"));
        };
        Ok(number)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself, which its user has noticed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(program: &Path, sock: &Path) -> Command {
    let mut command = Command::new(program);
    // No hold limit: locks are to be held while others are measured.
    command.args(["serve", "-t", "0", "--sock"]).arg(sock);
    command
}

/// Puts this process, which makes the load, on its processor.
pub fn pin_load() -> Result<()> {
    pin(Pid::this(), LOAD)
}

/// Lets this process, and what it starts, run on any processor again.
pub fn unpin_load() -> Result<()> {
    any(Pid::this())
}

fn any(pid: Pid) -> Result<()> {
    let mut all = CpuSet::new();
    (0..CpuSet::count()).try_for_each(|cpu| all.set(cpu))?;
    Ok(sched_setaffinity(pid, &all)?)
}

fn pin(pid: Pid, processor: usize) -> Result<()> {
    let mut one = CpuSet::new();
    one.set(processor)?;
    Ok(sched_setaffinity(pid, &one)?)
}
