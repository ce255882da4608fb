//! The child: starting the command, waiting for its end, and keeping up the locks meanwhile.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::process::{WaitOptions, wait, waitpid};

use super::command::Command;
use super::forward::{Forwarding, JobControl};
use super::signals::Signals;
use super::tee::Tee;
use crate::any_signal;
use crate::client::{self, HeldLock};
use crate::describe;
use crate::proto::{self, Outcome};
use crate::startup;
use crate::timestamp::millis;

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
    /// kmutex stopped it, while it held the lock.
    pub(super) stopped: Option<StopReason>,
    /// It died of a signal that kmutex was sent too.
    pub(super) died_with_kmutex: bool,
}

/// Why kmutex stops a command that holds the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopReason {
    /// It held the lock for too long.
    MaxHold,
    /// A newer request replaces it.
    Replaced,
}

/// What kmutex does while the command runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    /// The command has the locks' descriptors.
    pub(super) inherits: bool,
    /// When the lock is lost: SIGTERM, and SIGKILL after so long. `None`: the command goes on.
    pub(super) kill_after: Option<Duration>,
    /// The command ends when all its descendants have.
    pub(super) tree: bool,
    /// When the command is stopped while it holds the lock: SIGTERM, and SIGKILL after so long.
    pub(super) stop_within: Duration,
    /// How long it may hold the lock.
    pub(super) max_hold: Option<Duration>,
    /// After how long kmutex and the daemon warn.
    pub(super) warn_after: Option<Duration>,
}

/// Runs a command to its end, and keeps up the locks meanwhile.
pub(super) fn run(
    command: &Command<'_>,
    holds: &mut [HeldLock],
    mut tee: Option<&mut Tee>,
    options: Options,
) -> Result<ChildExit, Error> {
    let granted = Instant::now();
    if options.tree || options.max_hold.is_some() {
        adopt_orphans().map_err(|e| Error::Os("keep track of the command's descendants", e))?;
    }
    let (mut child, mut signals) = start(command, holds, &mut tee, options)?;
    let mut lock = LockState::Held;
    let mut limits = Limits::new(granted, options);
    loop {
        child.wait().map_err(|e| Error::Os("wait for the command", e.into()))?;
        if let Some(signal) = child.stopped_by.take() {
            child.stop(signal, &mut signals).map_err(|e| Error::Os("stop with the command", e.into()))?;
            continue;
        }
        if let Some(outcome) = child.end() {
            let died_with_kmutex = match outcome {
                Outcome::Signal(signal) => signals.has_received(signal.into()),
                _ => Ok(false),
            };
            let died_with_kmutex = died_with_kmutex.map_err(|e| Error::Os("read a signal", e.into()))?;
            return Ok(ChildExit {
                outcome,
                lost: lock != LockState::Held,
                died_with_kmutex,
                stopped: limits.stopped,
            });
        }
        let due = limits.due().into_iter().chain(tee.as_ref().and_then(|tee| tee.due())).min();
        let news = tee.as_ref().and_then(|tee| tee.news());
        let ready = wait_for_event(&signals, holds, [news, child.forwarding.script()], lock, due)
            .map_err(|e| Error::Os("wait", e.into()))?;
        signals.forget_late_stop().map_err(|e| Error::Os("read a signal", e.into()))?;
        if ready.stop {
            child.forward_stop(&mut signals).map_err(|e| Error::Os("pass on a signal", e.into()))?;
        }
        if ready.signal {
            child.forward(&mut signals).map_err(|e| Error::Os("pass on a signal", e.into()))?;
        }
        if ready.due {
            child.forwarding.watch_script();
        }
        if ready.due
            && lock == LockState::Held
            && let Err(error) = holds.iter_mut().try_for_each(HeldLock::poll)
        {
            let limit = holds.iter().filter_map(HeldLock::stop_within).min();
            lock = child.on_lost(&error, options.kill_after, limit);
        }
        if let (Some(tee), [hold]) = (&mut tee, &mut *holds)
            && lock == LockState::Held
        {
            tee.tell(hold);
        }
        if lock == LockState::Held {
            limits.check(holds, &mut child.forwarding).map_err(|e| Error::Os("stop the command", e))?;
        }
        if let LockState::KillAt(time) = lock
            && time <= Instant::now()
        {
            child.forwarding.signal_all(Signal::SIGKILL);
            lock = LockState::Lost;
        }
    }
}

/// Blocks the signals, starts the command, and notes for the daemon that it inherits the locks, if it does.
fn start(
    command: &Command<'_>,
    holds: &mut [HeldLock],
    tee: &mut Option<&mut Tee>,
    options: Options,
) -> Result<(Child, Signals), Error> {
    // Before the child is there, so that no signal is lost between the two.
    let signals = Signals::block().map_err(|e| Error::Os("catch signals", e))?;
    if let Some(tee) = tee {
        tee.start().map_err(|e| Error::Os("read the command's output", e))?;
    }
    let output = tee.as_ref().and_then(|tee| tee.writes());
    let pid = command.spawn(signals.inherited_mask(), output).map_err(Error::Spawn)?;
    if let Some(tee) = tee {
        tee.command_is_started();
    }
    if options.inherits {
        for hold in holds {
            hold.set_child(proto::Pid::new(pid.as_raw() as u32).expect("a child has a process id"));
        }
    }
    let child = Child {
        forwarding: Forwarding::new(pid, options.tree),
        outcome: None,
        is_over: false,
        stopped_by: None,
    };
    Ok((child, signals))
}

/// What has become of the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LockState {
    Held,
    /// It is lost. At that time, SIGKILL goes to the processes that are left.
    KillAt(Instant),
    /// It is lost, and there is nothing more to do about it.
    Lost,
}

/// What there is to do.
#[derive(Clone, Copy, Debug, Default)]
struct Ready {
    signal: bool,
    /// SIGTSTP.
    stop: bool,
    /// About the locks, or the script that runs kmutex.
    due: bool,
}

/// Waits for a signal, for the daemon, or for the time of what is due.
fn wait_for_event(
    signals: &Signals,
    holds: &[HeldLock],
    [news, script]: [Option<BorrowedFd<'_>>; 2],
    lock: LockState,
    limit: Option<Instant>,
) -> nix::Result<Ready> {
    let holds = if lock == LockState::Held { holds } else { &[] };
    let time = match lock {
        LockState::Held => holds.iter().filter_map(HeldLock::poll_at).chain(limit).min(),
        LockState::KillAt(time) => Some(time),
        LockState::Lost => None,
    };
    let time = time.into_iter().chain(signals.due()).min();
    let timeout = time.map_or(PollTimeout::NONE, |time| {
        let left = time.saturating_duration_since(Instant::now());
        // Rounded up, since poll(2) counts whole milliseconds, and would return too early.
        let millis = left.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
        PollTimeout::try_from(millis).expect("it is from 0 to i32::MAX")
    });
    let daemons = holds.iter().filter_map(HeldLock::readable);
    let news = news.filter(|_| lock == LockState::Held);
    let fds = signals.readable().into_iter().chain(daemons).chain(news).chain(script);
    let mut fds: Vec<PollFd<'_>> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    // A connection that was made anew may have taken this process's first thread.
    any_signal::block_unnamed()?;
    match poll(&mut fds, timeout) {
        Err(Errno::EINTR) => return Ok(Ready::default()),
        other => other?,
    };
    let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
    let is_time = time.is_some_and(|time| time <= Instant::now());
    Ok(Ready { signal: ready(&fds[0]), stop: ready(&fds[1]), due: is_time || fds[2..].iter().any(ready) })
}

/// How long the command may hold the lock, and how it is stopped while it does.
struct Limits {
    granted: Instant,
    warn_at: Option<Instant>,
    stop_at: Option<Instant>,
    max_hold: Duration,
    stop_within: Duration,
    /// When SIGKILL goes to the processes that are left.
    kill_at: Option<Instant>,
    stopped: Option<StopReason>,
}

impl Limits {
    fn new(granted: Instant, options: Options) -> Limits {
        Limits {
            granted,
            warn_at: options.warn_after.and_then(|after| granted.checked_add(after)),
            stop_at: options.max_hold.and_then(|limit| granted.checked_add(limit)),
            max_hold: options.max_hold.unwrap_or_default(),
            stop_within: options.stop_within,
            kill_at: None,
            stopped: None,
        }
    }

    /// Returns when [`Limits::check`] has something to do.
    fn due(&self) -> Option<Instant> {
        [self.warn_at, self.stop_at, self.kill_at].into_iter().flatten().min()
    }

    /// Warns and stops the command when that is due, or when the daemon asks for it.
    fn check(&mut self, holds: &mut [HeldLock], forwarding: &mut Forwarding) -> io::Result<()> {
        let now = Instant::now();
        let is_due = |time: &mut Instant| *time <= now;
        if self.warn_at.take_if(is_due).is_some() {
            for hold in &mut *holds {
                hold.overdue(now - self.granted);
                let held = describe::span(millis(now - self.granted));
                crate::message::print(format_args!("holding the lock {:?} for {held}", hold.key().as_str()));
            }
        }
        if self.stop_at.take_if(is_due).is_some() {
            let limit = describe::span(millis(self.max_hold));
            self.stop(StopReason::MaxHold, &format!("the lock was held for --max-hold {limit}"), forwarding)?;
        }
        if let Some(why) = holds.iter_mut().find_map(HeldLock::take_stop) {
            self.stop(StopReason::Replaced, &why, forwarding)?;
        }
        if self.kill_at.is_some_and(|time| time <= now) {
            forwarding.signal_all(Signal::SIGKILL);
            // A process may have been started meanwhile.
            self.kill_at = now.checked_add(KILL_AGAIN);
        }
        Ok(())
    }

    /// Stops the command with its descendants. The lock is held until they have all ended.
    fn stop(&mut self, reason: StopReason, why: &str, forwarding: &mut Forwarding) -> io::Result<()> {
        if self.stopped.is_some() {
            return Ok(());
        }
        crate::message::print(format_args!("{why}; stopping the command"));
        adopt_orphans()?;
        forwarding.make_tree();
        forwarding.signal_all(Signal::SIGTERM);
        self.stopped = Some(reason);
        self.stop_at = None;
        self.kill_at = Instant::now().checked_add(self.stop_within);
        Ok(())
    }
}

/// How often SIGKILL is sent to the processes that are left.
const KILL_AGAIN: Duration = Duration::from_millis(100);

struct Child {
    forwarding: Forwarding,
    /// How the command itself has ended.
    outcome: Option<Outcome>,
    /// No descendant is left either.
    is_over: bool,
    /// It was stopped as a job.
    stopped_by: Option<Signal>,
}

impl Child {
    /// Returns how the command has ended, if its descendants need not be waited for, or none is left.
    fn end(&self) -> Option<Outcome> {
        self.outcome.filter(|_| self.is_over || !self.forwarding.is_tree())
    }

    /// Takes note of what has changed in the child's state, without waiting.
    fn wait(&mut self) -> nix::Result<()> {
        let options = WaitOptions::NOHANG | WaitOptions::UNTRACED | WaitOptions::CONTINUED;
        // Not nix's, which has no words for a command that died of a real-time signal.
        let pid = rustix::process::Pid::from_raw(self.forwarding.command().as_raw());
        // PID 1 is the parent of every process whose own parent has ended.
        let reaps_all = self.forwarding.is_tree() || startup::is_init();
        loop {
            let waited = if reaps_all { wait(options) } else { waitpid(pid, options) };
            let status = match waited {
                // A process that the command has left behind.
                Ok(Some((other, _))) if Some(other) != pid => continue,
                Ok(Some((_, status))) => status,
                Ok(None) => return Ok(()),
                Err(rustix::io::Errno::INTR) => continue,
                // No process is left.
                Err(rustix::io::Errno::CHILD) if self.outcome.is_some() => {
                    self.is_over = true;
                    return Ok(());
                }
                Err(e) => return Err(Errno::from_raw(e.raw_os_error())),
            };
            let exit = status.exit_status().map(|status| Outcome::Exit(status as u8));
            let signal = status.terminating_signal().map(|signal| Outcome::Signal(signal as u8));
            if let Some(outcome) = exit.or(signal) {
                self.outcome = Some(outcome);
                self.forwarding.command_has_ended();
                self.stopped_by = None;
                if self.end().is_some() {
                    return Ok(());
                }
            }
            if let Some(signal) = status.stopping_signal().and_then(job_control_stop) {
                self.stopped_by = Some(signal);
                self.forwarding.job = JobControl::Stopped;
            }
            if status.continued() {
                self.stopped_by = None;
                self.forwarding.command_was_continued();
            }
        }
    }

    /// The command was stopped as a job: kmutex stops as well, unless it was told to continue meanwhile.
    fn stop(&mut self, signal: Signal, signals: &mut Signals) -> nix::Result<()> {
        // The stop of this process would wipe out a SIGCONT that is pending.
        self.forward(signals)?;
        if self.forwarding.job == JobControl::Stopped { signals.stop_by(signal) } else { Ok(()) }
    }

    fn forward(&mut self, signals: &mut Signals) -> nix::Result<()> {
        while let Some(received) = signals.next()? {
            // A command that has ended by now is not to be sent what is meant for the processes that it has left.
            self.wait()?;
            self.forwarding.forward(received)?;
        }
        Ok(())
    }

    fn forward_stop(&mut self, signals: &mut Signals) -> nix::Result<()> {
        match signals.next_stop()? {
            Some(received) => self.forwarding.forward(received),
            None => Ok(()),
        }
    }

    /// The lock was lost: does what the user chose for that case. `limit`: how long until another host may have it.
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
                // The message comes second: writing it may take long, and another holder may have the lock soon.
                self.forwarding.signal_all(Signal::SIGTERM);
                crate::message::print(format_args!("{error}; stopping the command"));
                // Killed with some of that time to spare.
                let after = limit.map_or(after, |limit| after.min(limit * 4 / 5));
                Instant::now().checked_add(after).map_or(LockState::Lost, LockState::KillAt)
            }
        }
    }
}

/// Makes this process the parent of all processes below it whose own parents end (prctl(2), PR_SET_CHILD_SUBREAPER).
fn adopt_orphans() -> io::Result<()> {
    Ok(nix::sys::prctl::set_child_subreaper(true)?)
}

/// Returns the signal if it is one by which a terminal stops a job. A process that any other signal stopped will be continued
/// by its sender, which has nothing to do with kmutex.
fn job_control_stop(signal: i32) -> Option<Signal> {
    let signal = Signal::try_from(signal).ok()?;
    matches!(signal, Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU).then_some(signal)
}
