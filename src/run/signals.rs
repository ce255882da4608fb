//! The signals that kmutex is sent while a command runs. Every signal that can be blocked is blocked, and read from a
//! signalfd(2), so that no disposition changes, and the command starts with the dispositions that kmutex was started with.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use nix::libc::{SIGCHLD, SIGCONT};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};

use crate::{any_signal, startup};

/// How long a command may take to stop.
const STOP_WAIT: Duration = Duration::from_millis(500);

/// The blocked signals of this process. Dropping it leaves them blocked.
///
/// SIGTSTP is read by itself, because a stop and a continue that follow each other closely are hard to tell apart: each wipes
/// out the other while that is pending, and so would the SIGTSTP by which kmutex stops after its command. Before SIGTSTP is
/// read, kmutex therefore sends SIGTTOU to itself, which stays pending in its place. A SIGCONT that comes before that has wiped
/// out the SIGTSTP, which is seen; one that comes later wipes out the SIGTTOU, and kmutex does not stop. (This is for programs. No
/// person types so fast, and shells show by which signal a job was stopped.)
#[derive(Debug)]
pub(super) struct Signals {
    /// All signals but SIGTSTP, and but SIGTTOU while that is in the place of one.
    fd: SignalFd,
    /// SIGTSTP.
    stops: SignalFd,
    /// SIGTTOU is pending, or was wiped out. Until then the command should have stopped; if not, it handles the signal.
    holds_stop_until: Option<Instant>,
    /// What was blocked before.
    mask: SigSet,
    /// The signals that were read so far, as [`startup::bit`].
    received: u64,
}

/// One signal that was sent to kmutex.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Received {
    /// Its number.
    pub(super) signal: i32,
    /// Who sent it.
    pub(super) sender: Sender,
}

/// Who sent a signal (sigaction(2), si_code).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sender {
    /// The kernel: a key at the terminal, a hang-up, the end of a child.
    Kernel,
    /// A process; 0 stands for one of another PID namespace.
    Process(i32),
}

impl Signals {
    /// Blocks all signals, and begins to collect them.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub(super) fn block() -> io::Result<Signals> {
        let mask = startup::mask(any_signal::block_all()?);
        if startup::ignores(SIGCHLD) {
            // A process that ignores SIGCHLD is not told how its children end (wait(2)). The handler never runs.
            signal_hook::flag::register(SIGCHLD, Arc::new(AtomicBool::new(false)))?;
        }
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let fd = SignalFd::with_flags(&SigSet::empty(), flags)?;
        let stops = SignalFd::with_flags(&SigSet::from(Signal::SIGTSTP), flags)?;
        let signals = Signals { fd, stops, holds_stop_until: None, mask, received: 0 };
        any_signal::read_all_but(&signals.fd, &[Signal::SIGTSTP])?;
        Ok(signals)
    }

    /// Returns the mask of blocked signals that kmutex was started with.
    pub(super) fn inherited_mask(&self) -> &SigSet {
        &self.mask
    }

    /// Returns the descriptors that become readable when signals have come: SIGTSTP is at the second.
    pub(super) fn readable(&self) -> [BorrowedFd<'_>; 2] {
        [self.fd.as_fd(), self.stops.as_fd()]
    }

    /// Returns the next signal that has come, lowest number first, but no SIGTSTP. What kmutex was started to ignore it goes on
    /// ignoring.
    ///
    /// # Errors
    /// As read(2).
    pub(super) fn next(&mut self) -> nix::Result<Option<Received>> {
        while let Some(info) = self.fd.read_signal()? {
            let received = Received::from(&info);
            // The kernel keeps a signal that is blocked even if it is ignored.
            if startup::ignores(received.signal) {
                continue;
            }
            if received.signal == SIGCONT {
                self.forget_stop()?;
            }
            self.received |= startup::bit(received.signal);
            return Ok(Some(received));
        }
        Ok(None)
    }

    /// Returns the SIGTSTP that has come, or a SIGCONT that has come after it.
    ///
    /// # Errors
    /// As signalfd(2) and read(2).
    pub(super) fn next_stop(&mut self) -> nix::Result<Option<Received>> {
        any_signal::read_all_but(&self.fd, &[Signal::SIGTSTP, Signal::SIGTTOU])?;
        nix::sys::signal::raise(Signal::SIGTTOU)?;
        self.holds_stop_until = Some(Instant::now() + STOP_WAIT);
        let received = self.stops.read_signal()?.map(|info| Received::from(&info));
        match received {
            Some(received) if startup::ignores(received.signal) => {
                self.forget_stop()?;
                Ok(None)
            }
            Some(received) => {
                if received.sender == Sender::Kernel {
                    self.forget_stop()?;
                }
                Ok(Some(received))
            }
            None => {
                self.forget_stop()?;
                Ok(Some(Received { signal: SIGCONT, sender: Sender::Process(0) }))
            }
        }
    }

    /// Returns when [`Signals::forget_late_stop`] should be called.
    pub(super) fn due(&self) -> Option<Instant> {
        self.holds_stop_until
    }

    /// Gives up to wait for a command that was sent SIGTSTP and does not stop.
    ///
    /// # Errors
    /// As signalfd(2).
    pub(super) fn forget_late_stop(&mut self) -> nix::Result<()> {
        match self.holds_stop_until {
            Some(time) if time <= Instant::now() => self.forget_stop(),
            _ => Ok(()),
        }
    }

    fn forget_stop(&mut self) -> nix::Result<()> {
        if self.holds_stop_until.take().is_some() {
            // A SIGTTOU that is left is read as any other signal, and is kmutex's own.
            any_signal::read_all_but(&self.fd, &[Signal::SIGTSTP])?;
        }
        Ok(())
    }

    /// Stops this process as the command was stopped, so that a shell sees the whole job stop. Returns when it is continued, or
    /// at once if it was continued since the stop, or nothing could continue it (an orphaned process group, PID 1).
    ///
    /// # Errors
    /// As sigprocmask(2).
    pub(super) fn stop_by(&mut self, signal: Signal) -> nix::Result<()> {
        let signal = match self.holds_stop_until {
            Some(_) => Signal::SIGTTOU,
            None => {
                nix::sys::signal::raise(signal)?;
                signal
            }
        };
        let one = SigSet::from(signal);
        // It takes effect here.
        one.thread_unblock()?;
        one.thread_block()?;
        self.forget_stop()
    }

    /// Returns `true` if kmutex was sent this signal.
    ///
    /// # Errors
    /// As read(2).
    pub(super) fn has_received(&mut self, signal: i32) -> nix::Result<bool> {
        // A key at the terminal is sent to kmutex before a command that dies of it can be waited for: the kernel signals the
        // whole group under the lock that an ending process needs.
        while self.next()?.is_some() {}
        Ok(self.received & startup::bit(signal) != 0)
    }
}

impl From<&siginfo> for Received {
    fn from(info: &siginfo) -> Received {
        // Positive codes are the kernel's (SI_FROMKERNEL in its source).
        let sender = if info.ssi_code > 0 { Sender::Kernel } else { Sender::Process(info.ssi_pid as i32) };
        Received { signal: info.ssi_signo as i32, sender }
    }
}
