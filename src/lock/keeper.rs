//! The keeper: the process in the background that holds a lock for a descriptor. It is what becomes of `kmutex lock --fd` when
//! that has acquired the lock: the parent exits, and the child goes on.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::descriptor::{Descriptor, Marker};
use crate::any_signal;
use crate::client::{self, HeldLock, RELEASE_WAIT};
use crate::proto::Outcome;

/// Leaves the caller with status 0, and holds the lock as long as the description that is marked with it.
///
/// # Errors
/// When no process can be started: then in the caller's.
pub(super) fn keep(mut hold: HeldLock, descriptor: Descriptor, marker: Marker) -> io::Result<()> {
    if let Err(e) = detach() {
        // Nothing was done under the lock. If the daemon is down, the lock ends with this process.
        let _ = hold.release(Outcome::Vanished, RELEASE_WAIT);
        return Err(e);
    }
    // From here on no process reads what this one could say.
    let Some(connection) = hold.readable() else { return Ok(()) };
    let watch = descriptor.watch(marker, &connection)?;
    if hold.reconnect(RELEASE_WAIT).is_ok() && wait(&mut hold, &watch.gone).is_ok() {
        // As with any process that ends without a word, its work counts as done.
        let _ = hold.release_recorded(Outcome::Unknown, RELEASE_WAIT);
    }
    Ok(())
}

/// Becomes a process that no terminal and no signal to a group concerns, with nothing of the caller's.
fn detach() -> io::Result<()> {
    any_signal::block_all()?;
    Ok(nix::unistd::daemon(false, false)?)
}

/// Waits until the description is gone.
fn wait(hold: &mut HeldLock, gone: &impl AsFd) -> Result<(), client::Error> {
    loop {
        hold.poll()?;
        let timeout = hold.poll_at().map_or(PollTimeout::NONE, |time| {
            let left = time.saturating_duration_since(Instant::now());
            // Rounded up, since poll(2) counts whole milliseconds, and would return too early.
            let millis = left.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
            PollTimeout::try_from(millis).expect("it is from 0 to i32::MAX")
        });
        let fds = [Some(gone.as_fd()), hold.readable()];
        let mut fds: Vec<PollFd<'_>> =
            fds.into_iter().flatten().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => continue,
            other => other.map_err(|e| client::Error::Io("wait", e.into()))?,
        };
        if fds[0].any().unwrap_or(false) {
            return Ok(());
        }
    }
}
