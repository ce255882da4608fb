//! The child: starting it, passing signals on to it, and waiting for it.

use crate::proto;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{AccessFlags, Pid, access};
use rustix::process::{WaitOptions, wait, waitpid};
use signal_hook::consts::*;
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook::low_level::siginfo::{Cause, Origin};

use super::descendants;
use crate::client::{self, HeldLock};
use crate::proto::Outcome;

/// What reaches the command when it is sent to kmutex.
const PASSED_ON: [i32; 8] = [SIGTERM, SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGTSTP, SIGCONT];

/// Why a command did not run to its end.
pub(super) enum Error {
    /// It cannot be started.
    Spawn(io::Error),
    /// The kernel refused something.
    Os(&'static str, io::Error),
}

/// How a command ended.
pub(super) struct ChildExit {
    /// An exit status or a signal.
    pub(super) outcome: Outcome,
    /// The lock was lost before that.
    pub(super) lost: bool,
}

/// Runs a command to its end, and keeps up the locks meanwhile. `inherits`: the command has the locks' descriptors. `tree`:
/// its end is that of all that it has started. `kill_after`: when the lock is lost, SIGTERM, and SIGKILL after so long; `None`:
/// the command goes on.
pub(super) fn run(
    command: &mut Command,
    holds: &mut [HeldLock],
    inherits: bool,
    kill_after: Option<Duration>,
    tree: bool,
) -> Result<ChildExit, Error> {
    if tree {
        adopt_orphans().map_err(|e| Error::Os("keep track of all that the command starts", e))?;
    }
    // Before the child is there, so that no signal is lost between the two.
    let mut signals = Signals::catch().map_err(|e| Error::Os("catch signals", e))?;
    let pid = spawn(command).map_err(Error::Spawn)?;
    if inherits {
        for hold in &mut *holds {
            hold.set_child(proto::Pid::new(pid.as_raw() as u32).expect("a child has a process id"));
        }
    }
    let mut child = Child { pid, job: JobControl::Running, tree, outcome: None };
    let mut lock = LockState::Held;
    loop {
        if let Some(outcome) = child.wait().map_err(|e| Error::Os("wait for the command", e.into()))? {
            return Ok(ChildExit { outcome, lost: lock != LockState::Held });
        }
        let (signalled, polled) =
            wait_for_event(&signals, holds, lock).map_err(|e| Error::Os("wait", e.into()))?;
        if signalled {
            for origin in signals.0.pending() {
                child.signal(&origin).map_err(|e| Error::Os("pass on a signal", e.into()))?;
            }
        }
        if polled
            && lock == LockState::Held
            && let Err(error) = holds.iter_mut().try_for_each(HeldLock::poll)
        {
            let limit = holds.iter().filter_map(HeldLock::stop_within).min();
            lock = child.on_lost(&error, kill_after, limit);
        }
        if let LockState::KillAt(time) = lock
            && time <= Instant::now()
        {
            child.signal_all(Signal::SIGKILL);
            lock = LockState::Lost;
        }
    }
}

/// What has become of the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LockState {
    Held,
    /// It is lost. What is left of the command then is killed.
    KillAt(Instant),
    /// It is lost, and there is nothing more to do about it.
    Lost,
}

/// Waits until there are signals, until there is something of the daemon's to poll to, or until it is time to kill.
fn wait_for_event(signals: &Signals, holds: &[HeldLock], lock: LockState) -> nix::Result<(bool, bool)> {
    let holds = if lock == LockState::Held { holds } else { &[] };
    let time = match lock {
        LockState::Held => holds.iter().filter_map(HeldLock::poll_at).min(),
        LockState::KillAt(time) => Some(time),
        LockState::Lost => None,
    };
    let timeout = time.map_or(PollTimeout::NONE, |time| {
        let left = time.saturating_duration_since(Instant::now());
        // Rounded up, since poll(2) counts whole milliseconds, and would return too early.
        let millis = left.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
        PollTimeout::try_from(millis).expect("it is from 0 to i32::MAX")
    });
    let daemons = holds.iter().filter_map(HeldLock::readable);
    let mut fds = vec![PollFd::new(signals.0.get_read().as_fd(), PollFlags::POLLIN)];
    fds.extend(daemons.map(|daemon| PollFd::new(daemon, PollFlags::POLLIN)));
    match poll(&mut fds, timeout) {
        Err(nix::Error::EINTR) => return Ok((false, false)),
        other => other?,
    };
    let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
    let is_time = time.is_some_and(|time| time <= Instant::now());
    Ok((ready(&fds[0]), is_time || fds[1..].iter().any(ready)))
}

/// Starts the command. As execvp(3) does, a file that the kernel cannot execute is given to the shell.
fn spawn(command: &mut Command) -> io::Result<Pid> {
    let child = match command.spawn() {
        Err(e) if e.raw_os_error() == Some(nix::libc::ENOEXEC) => {
            let mut by_shell = Command::new("/bin/sh");
            by_shell.arg(find(command.get_program())).args(command.get_args());
            by_shell.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            by_shell.spawn()
        }
        other => other,
    }?;
    Ok(Pid::from_raw(child.id() as i32))
}

/// Where a program is that was found in `$PATH`: the shell, given the bare name, would look for a file here.
fn find(program: &OsStr) -> PathBuf {
    if program.as_encoded_bytes().contains(&b'/') {
        return program.into();
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::env::split_paths(&folders).map(|folder| folder.join(program));
    let is_it = |path: &PathBuf| path.is_file() && access(path, AccessFlags::X_OK).is_ok();
    candidates.find(is_it).unwrap_or_else(|| program.into())
}

struct Child {
    pid: Pid,
    job: JobControl,
    /// It is over when all that it has started is.
    tree: bool,
    /// How the command itself has ended.
    outcome: Option<Outcome>,
}

/// Where the command stands as a job of a shell's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum JobControl {
    Running,
    /// Stopped from the terminal, and kmutex with it.
    Stopped,
    /// Continued since, which kmutex has not been told of yet.
    Continued,
}

impl Child {
    /// Takes what there is to know of the child's state, without waiting. `Some`: it is over.
    fn wait(&mut self) -> nix::Result<Option<Outcome>> {
        let options = WaitOptions::NOHANG | WaitOptions::UNTRACED | WaitOptions::CONTINUED;
        // Not nix's, which has no words for a command that died of a real-time signal.
        let pid = rustix::process::Pid::from_raw(self.pid.as_raw());
        loop {
            let waited = if self.tree { wait(options) } else { waitpid(pid, options) };
            let status = match waited {
                // One that the command has left behind.
                Ok(Some((other, _))) if Some(other) != pid => continue,
                Ok(Some((_, status))) => status,
                Ok(None) => return Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                // Nobody is left.
                Err(rustix::io::Errno::CHILD) if self.outcome.is_some() => return Ok(self.outcome),
                Err(e) => return Err(nix::Error::from_raw(e.raw_os_error())),
            };
            let exit = status.exit_status().map(|status| Outcome::Exit(status as u8));
            let signal = status.terminating_signal().map(|signal| Outcome::Signal(signal as u8));
            if let Some(outcome) = exit.or(signal) {
                self.outcome = Some(outcome);
                if self.tree {
                    continue;
                }
                return Ok(self.outcome);
            }
            // By any other signal it was stopped by somebody who will continue this one process: nothing to do with
            // kmutex.
            if status.stopping_signal().is_some_and(is_job_control_stop) {
                self.job = JobControl::Stopped;
                // So that the shell sees the whole job stop. Returns when kmutex is continued.
                kill(Pid::this(), Signal::SIGSTOP)?;
            }
            if status.continued() && self.job == JobControl::Stopped {
                self.job = JobControl::Continued;
            }
        }
    }

    /// Signals the command and what it has started, as far as that can be found.
    fn signal_all(&self, signal: Signal) {
        match self.tree {
            true => descendants::signal_below(Pid::this(), signal),
            false => descendants::signal_tree(self.pid, signal),
        }
    }

    /// The policy of passing signals on: each reaches the command exactly once.
    ///
    /// - What the kernel sends (Ctrl-C, Ctrl-\, Ctrl-Z, a hangup), it sends to all of the terminal's foreground process
    ///   group, and the command is in the same group as kmutex: it has got its own.
    /// - What the command sends to its whole group, it has sent to itself.
    /// - A shell that continues a job sends SIGCONT to the group. The kernel then goes through the group from its newest
    ///   process to its oldest, so a command that was stopped has been continued before kmutex runs again.
    /// - All else was sent to kmutex alone, and is meant for the command.
    fn signal(&mut self, origin: &Origin) -> nix::Result<()> {
        let by_command = origin.process.is_some_and(|process| process.pid == self.pid.as_raw());
        if origin.signal == SIGCHLD || origin.cause == Cause::Kernel || by_command {
            return Ok(());
        }
        if origin.signal == SIGCONT {
            let job = std::mem::replace(&mut self.job, JobControl::Running);
            if job == JobControl::Continued || (job == JobControl::Stopped && self.is_continued()?) {
                return Ok(());
            }
        }
        if self.tree && origin.signal == SIGTERM {
            self.signal_all(Signal::SIGTERM);
            return Ok(());
        }
        if self.outcome.is_some() {
            return Ok(());
        }
        // It is not reaped before `wait` says so, and until then its process id is nobody else's.
        match kill(self.pid, Signal::try_from(origin.signal)?) {
            // It has ended, or has changed its user: what it may not be sent cannot be passed on.
            Ok(()) | Err(nix::Error::ESRCH | nix::Error::EPERM) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// True when the command runs again after it was stopped. Leaves its end for `wait` to find.
    fn is_continued(&self) -> nix::Result<bool> {
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WCONTINUED;
        Ok(matches!(waitid(Id::Pid(self.pid), flags)?, WaitStatus::Continued(_)))
    }

    /// The lock was lost: does what was asked for that case. `limit`: how long until another host may have it.
    fn on_lost(
        &self,
        error: &client::Error,
        kill_after: Option<Duration>,
        limit: Option<Duration>,
    ) -> LockState {
        match kill_after {
            None => {
                crate::message::print(format_args!("{error}; the command goes on without it"));
                LockState::Lost
            }
            Some(after) => {
                crate::message::print(format_args!("{error}; stopping the command"));
                self.signal_all(Signal::SIGTERM);
                // Killed with some of that time to spare.
                let after = limit.map_or(after, |limit| after.min(limit * 4 / 5));
                Instant::now().checked_add(after).map_or(LockState::Lost, LockState::KillAt)
            }
        }
    }
}

/// Makes this process the parent of all whose parents end below it (prctl(2), PR_SET_CHILD_SUBREAPER).
fn adopt_orphans() -> io::Result<()> {
    Ok(nix::sys::prctl::set_child_subreaper(true)?)
}

/// True for the signals by which a terminal stops a job.
fn is_job_control_stop(signal: i32) -> bool {
    matches!(signal, SIGTSTP | SIGTTIN | SIGTTOU)
}

/// The signals that kmutex is sent, and those about its child, each with its origin.
struct Signals(SignalDelivery<UnixStream, WithOrigin>);

impl Signals {
    /// Signals that are ignored stay so, and the command inherits that: `nohup kmutex run` protects the command.
    fn catch() -> io::Result<Signals> {
        let (reader, writer) = UnixStream::pair()?;
        let ignored = ignored_signals();
        let wanted = PASSED_ON.into_iter().filter(|&number| ignored & 1 << (number - 1) == 0);
        let signals = wanted.chain([SIGCHLD]).collect::<Vec<i32>>();
        Ok(Signals(SignalDelivery::with_pipe(reader, writer, WithOrigin::default(), signals)?))
    }
}

/// The signals that this process was told to ignore before it began, as a set of bits: signal 1 is bit 0 (proc(5),
/// SigIgn). Rust offers no safe call to ask the kernel itself; where there is no /proc, it is taken to be none.
fn ignored_signals() -> u64 {
    let mut buffer = [0; 4096];
    // One read: the file is made up anew for each, and is never as long as this.
    let read = File::open("/proc/self/status").and_then(|mut file| file.read(&mut buffer));
    let status = String::from_utf8_lossy(&buffer[..read.unwrap_or(0)]);
    let bits = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}
