//! The script that runs kmutex, as a witness: if a signal of a sender outside of the process group kills it too, the signal was
//! sent to the whole group, or to each process, and the command has got it itself.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Pid, getpgid, getpgrp, getppid};
use rustix::process::{PidfdFlags, pidfd_open};

use super::descendants;

/// How long a process may take to die of a signal that it does not handle.
const DEATH_WAIT_MS: u8 = 10;
/// How long ago it may have died.
const RECENT: Duration = Duration::from_millis(50);

/// The parent of this process.
#[derive(Debug)]
pub(super) struct Witness {
    parent: Pid,
    /// Readable when it has ended.
    process: OwnedFd,
    ended: Option<Instant>,
    /// The signal that it seems to have died of was received, so that each further one counts.
    is_spent: bool,
}

impl Witness {
    /// Returns the parent, if it is of this process's group.
    pub(super) fn find() -> Option<Witness> {
        let parent = getppid();
        if getpgid(Some(parent)) != Ok(getpgrp()) {
            return None;
        }
        let process =
            pidfd_open(rustix::process::Pid::from_raw(parent.as_raw())?, PidfdFlags::empty()).ok()?;
        // If it ended before that, its number may be another process's.
        (getppid() == parent).then_some(Witness { parent, process, ended: None, is_spent: false })
    }

    /// Returns the descriptor that becomes readable when [`Witness::note_end`] should be called.
    pub(super) fn readable(&self) -> Option<BorrowedFd<'_>> {
        self.ended.is_none().then(|| self.process.as_fd())
    }

    /// Notes when the parent ends.
    pub(super) fn note_end(&mut self) {
        if self.ended.is_none() && self.is_readable(PollTimeout::ZERO) {
            self.ended = Some(Instant::now());
        }
    }

    /// Returns `true` if a signal that this process has just received seems to have killed the parent. Waits for that, if it
    /// would.
    pub(super) fn is_killed_by(&mut self, signal: i32) -> bool {
        if !descendants::is_fatal(signal) {
            return false;
        }
        self.note_end();
        if self.ended.is_none() && descendants::dies_of(self.parent, signal) {
            self.is_readable(PollTimeout::from(DEATH_WAIT_MS));
            self.note_end();
        }
        let is_recent = self.ended.is_some_and(|time| time.elapsed() < RECENT);
        is_recent && !std::mem::replace(&mut self.is_spent, true)
    }

    fn is_readable(&self, timeout: PollTimeout) -> bool {
        loop {
            match poll(&mut [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)], timeout) {
                Err(Errno::EINTR) => {}
                other => return other == Ok(1),
            }
        }
    }
}
