//! The child: starting it, passing signals on to it, and waiting for it.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Command;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use signal_hook::consts::*;
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook::low_level::siginfo::{Cause, Origin};

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

/// Runs a command to its end and returns how it ended: an exit status or a signal.
pub(super) fn run(command: &mut Command) -> Result<Outcome, Error> {
    // Before the child is there, so that no signal is lost between the two.
    let mut signals = Signals::catch().map_err(|e| Error::Os("catch signals", e))?;
    let pid = spawn(command).map_err(Error::Spawn)?;
    let mut child = Child { pid, stopped: false };
    loop {
        if let Some(outcome) = child.wait().map_err(|e| Error::Os("wait for the command", e.into()))? {
            return Ok(outcome);
        }
        for origin in signals.next().map_err(|e| Error::Os("wait for signals", e.into()))? {
            if let Some(outcome) =
                child.signal(&origin).map_err(|e| Error::Os("pass on a signal", e.into()))?
            {
                return Ok(outcome);
            }
        }
    }
}

/// Starts the command. As execvp(3) does, a file that the kernel cannot execute is given to the shell.
fn spawn(command: &mut Command) -> io::Result<Pid> {
    let child = match command.spawn() {
        Err(e) if e.raw_os_error() == Some(nix::libc::ENOEXEC) => {
            let mut by_shell = Command::new("/bin/sh");
            by_shell.arg(command.get_program()).args(command.get_args());
            by_shell.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            by_shell.spawn()
        }
        other => other,
    }?;
    Ok(Pid::from_raw(child.id() as i32))
}

struct Child {
    pid: Pid,
    stopped: bool,
}

impl Child {
    /// Takes what there is to know of the child's state, without waiting. `Some`: it has ended.
    fn wait(&mut self) -> nix::Result<Option<Outcome>> {
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED | WaitPidFlag::WCONTINUED;
        loop {
            match waitpid(self.pid, Some(flags)) {
                Ok(WaitStatus::Exited(_, status)) => return Ok(Some(Outcome::Exit(status as u8))),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Some(Outcome::Signal(signal as u8))),
                Ok(WaitStatus::Stopped(_, signal)) => {
                    self.stopped = true;
                    follow_stop(signal)?;
                }
                Ok(WaitStatus::Continued(_)) => self.stopped = false,
                Ok(_) => return Ok(None),
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The policy of passing signals on: each reaches the command exactly once. `Some`: it has ended meanwhile.
    ///
    /// - What the kernel sends (Ctrl-C, Ctrl-\, Ctrl-Z, a hangup), it sends to all of the terminal's foreground process
    ///   group, and the command is in the same group as kmutex: it has got its own.
    /// - What the command sends to its whole group, it has sent to itself.
    /// - A shell that continues a job sends SIGCONT to the group. The kernel then goes through the group from its newest
    ///   process to its oldest, so a command that was stopped has been continued before kmutex runs again.
    /// - All else was sent to kmutex alone, and is meant for the command.
    fn signal(&mut self, origin: &Origin) -> nix::Result<Option<Outcome>> {
        let by_command = origin.process.is_some_and(|process| process.pid == self.pid.as_raw());
        if origin.signal == SIGCHLD || origin.cause == Cause::Kernel || by_command {
            return Ok(None);
        }
        if origin.signal == SIGCONT && self.stopped {
            if let Some(outcome) = self.wait()? {
                return Ok(Some(outcome));
            }
            if !self.stopped {
                return Ok(None);
            }
        }
        // It is not reaped before `wait` says so, and until then its process id is nobody else's.
        match kill(self.pid, Signal::try_from(origin.signal)?) {
            Ok(()) | Err(nix::Error::ESRCH) => Ok(None),
            // The command has changed its user. What it may not be sent cannot be passed on.
            Err(nix::Error::EPERM) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// The command was stopped from the terminal: kmutex stops too, so that the shell sees the job stop. (A SIGSTOP is sent
/// to one process by somebody who will continue that one, and says nothing to kmutex.)
fn follow_stop(signal: Signal) -> nix::Result<()> {
    match signal {
        Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU => kill(Pid::this(), Signal::SIGSTOP),
        _ => Ok(()),
    }
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

    /// Waits for at least one signal.
    fn next(&mut self) -> nix::Result<impl Iterator<Item = Origin>> {
        loop {
            let mut fds = [PollFd::new(self.0.get_read().as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => return Ok(self.0.pending()),
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// The signals that this process was told to ignore before it began, as a set of bits: signal 1 is bit 0 (proc(5),
/// SigIgn). Rust offers no safe call to ask the kernel itself; where there is no /proc, it is taken to be none.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}
