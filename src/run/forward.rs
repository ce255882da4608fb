//! Which signals are passed on to the command.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::libc::*;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, getpgid, getpgrp, getsid};

use super::descendants;
use super::signals::{Received, Sender};
use super::witness::Witness;
use crate::any_signal;
use crate::startup::bit;

/// The policy of passing signals on: every signal reaches the command, and none reaches it twice where kmutex can tell.
///
/// - What the kernel sends for a key or a change at the terminal, it sends to the foreground process group. A command in
///   kmutex's group has its own; a command that has moved to another group (as timeout(1) does) gets kmutex's.
/// - When a terminal hangs up, the kernel tells the session leader alone. If that is kmutex, it passes the hang-up on.
/// - What the command or one of its descendants sends to their own group, the command has got itself. (sudo(8) has this rule.)
/// - A process of kmutex's group that ignores a signal and sends it spares itself: it sends to the group. (timeout(1) does so,
///   after it has sent the signal to its child alone.)
/// - A shell that continues a job sends SIGCONT to the group. The kernel signals the newest process of a group first, so a
///   command that was stopped has been continued before kmutex runs again.
/// - A sender from outside of the group that has killed the script around kmutex with the same signal has sent it to the group,
///   or to each process.
/// - All other signals are meant for the command. A sender from outside that signals the whole group looks like one that
///   signals kmutex alone, if no such script is there to tell. Then a command that handles the signal gets it twice, unless the
///   first is still pending when the second comes. No signal is lost, unless a sender kills the script and kmutex at the same
///   time, and spares the command.
#[derive(Debug)]
pub(super) struct Forwarding {
    command: Pid,
    pub(super) job: JobControl,
    /// The descendants are waited for too.
    tree: bool,
    /// The command's process is no more.
    ended: bool,
    /// The signals that could not be sent and were reported, as [`bit`].
    denied: u64,
    /// The script that runs kmutex, once the command has run for a while.
    witness: Option<Witness>,
}

/// Where the command stands as a job of a shell's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobControl {
    Running,
    /// Stopped from the terminal, and kmutex with it.
    Stopped,
    /// Continued since, which kmutex has not been told of yet.
    Continued,
}

impl Forwarding {
    /// `tree`: the job is the command with its descendants.
    pub(super) fn new(command: Pid, tree: bool) -> Forwarding {
        Forwarding { command, job: JobControl::Running, tree, ended: false, denied: 0, witness: None }
    }

    pub(super) fn command(&self) -> Pid {
        self.command
    }

    pub(super) fn is_tree(&self) -> bool {
        self.tree
    }

    /// From now on the job is the command with its descendants.
    pub(super) fn make_tree(&mut self) {
        self.tree = true;
    }

    pub(super) fn command_has_ended(&mut self) {
        self.ended = true;
    }

    pub(super) fn command_was_continued(&mut self) {
        if self.job == JobControl::Stopped {
            self.job = JobControl::Continued;
        }
    }

    /// Passes a signal on, if the policy says so.
    pub(super) fn forward(&mut self, received: Received) -> nix::Result<()> {
        let Received { signal, sender } = received;
        if self.ended {
            self.forward_to_rest(received);
            return Ok(());
        }
        if self.has_its_own(received) {
            return Ok(());
        }
        if signal == SIGCONT {
            let job = std::mem::replace(&mut self.job, JobControl::Running);
            if job == JobControl::Continued || (job == JobControl::Stopped && self.is_continued()?) {
                return Ok(());
            }
        }
        if self.tree && signal == SIGTERM && sender != Sender::Kernel {
            self.signal_all(Signal::SIGTERM);
            return Ok(());
        }
        self.send(signal)
    }

    /// Returns `true` if the command was sent the same signal as kmutex.
    fn has_its_own(&mut self, received: Received) -> bool {
        match (received.sender, received.signal) {
            (Sender::Kernel, SIGCHLD) => true,
            (Sender::Kernel, SIGINT | SIGQUIT | SIGTSTP | SIGTTIN | SIGTTOU | SIGWINCH) => {
                self.shares_group()
            }
            (Sender::Kernel, SIGHUP | SIGCONT) => self.shares_group() && getsid(None) != Ok(Pid::this()),
            // The others that the kernel sends concern one process: an alarm that was set before kmutex was executed.
            (Sender::Kernel, _) => false,
            (Sender::Process(pid), signal) => {
                let sender = Pid::from_raw(pid);
                self.is_sent_to_group(sender, signal) || self.has_killed_script(sender, signal)
            }
        }
    }

    /// Returns `true` if a process that has sent a signal to kmutex has sent it to the command too.
    fn is_sent_to_group(&self, sender: Pid, signal: i32) -> bool {
        if sender == self.command || sender == Pid::this() {
            return true;
        }
        sender.as_raw() > 0
            && self.shares_group()
            && getpgid(Some(sender)) == Ok(getpgrp())
            && (descendants::is_below(sender, self.command) || descendants::spares_itself(sender, signal))
    }

    /// Returns `true` if a signal of a sender outside of the group has killed the script that runs kmutex too.
    fn has_killed_script(&mut self, sender: Pid, signal: i32) -> bool {
        // Of a sender that has ended by now nothing is known: it may be the script's own, which may end by itself.
        let is_outside = sender.as_raw() == 0 || getpgid(Some(sender)).is_ok_and(|group| group != getpgrp());
        if !is_outside || !self.shares_group() {
            return false;
        }
        self.watch_script();
        self.witness.as_mut().is_some_and(|script| script.is_killed_by(signal))
    }

    /// Watches the script that runs kmutex. Called now and then, but not at the start, which should be quick.
    pub(super) fn watch_script(&mut self) {
        match &mut self.witness {
            Some(script) => script.note_end(),
            None => self.witness = Witness::find(),
        }
    }

    /// Returns the descriptor that becomes readable when [`Forwarding::watch_script`] should be called.
    pub(super) fn script(&self) -> Option<BorrowedFd<'_>> {
        self.witness.as_ref()?.readable()
    }

    fn shares_group(&self) -> bool {
        getpgid(Some(self.command)) == Ok(getpgrp())
    }

    /// With `--tree`, after the command itself has ended: what would end the command ends what it has left behind.
    fn forward_to_rest(&self, received: Received) {
        if let SIGHUP | SIGINT | SIGQUIT | SIGTERM = received.signal
            && let Ok(signal) = Signal::try_from(received.signal)
        {
            // A process of the terminal's foreground group has its own.
            let skips_group = received.sender == Sender::Kernel && getsid(None) != Ok(Pid::this());
            let except = skips_group.then(getpgrp);
            descendants::signal_below(Pid::this(), signal, except);
        }
    }

    /// Signals the command and its descendants, as far as they can be found.
    pub(super) fn signal_all(&self, signal: Signal) {
        match self.tree {
            true => descendants::signal_below(Pid::this(), signal, None),
            false => descendants::signal_tree(self.command, signal),
        }
    }

    /// Sends a signal to the command. Its process is not reaped yet, so its number is not another process's.
    fn send(&mut self, signal: i32) -> nix::Result<()> {
        match any_signal::send(self.command, signal) {
            Err(Errno::EPERM) => {
                if self.denied & bit(signal) == 0 {
                    self.denied |= bit(signal);
                    crate::message::print(format_args!(
                        "cannot pass {} on to the command: it runs as another user",
                        name(signal)
                    ));
                }
                Ok(())
            }
            Err(Errno::ESRCH) => Ok(()),
            other => other,
        }
    }

    /// Returns `true` if the command runs again after it was stopped. Leaves its end for `wait` to find.
    fn is_continued(&self) -> nix::Result<bool> {
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WCONTINUED;
        Ok(matches!(waitid(Id::Pid(self.command), flags)?, WaitStatus::Continued(_)))
    }
}

fn name(signal: i32) -> String {
    Signal::try_from(signal).map_or_else(|_| format!("signal {signal}"), |signal| signal.to_string())
}
