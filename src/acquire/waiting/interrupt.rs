//! The signals that end a wait for a lock, where dying of them at once is not enough: a line is to be cleared first, or this
//! process is PID 1, which the kernel does not end.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::pipe2;

use crate::{exit, startup};

/// A thread that waits for the signals. Dropping it ends the thread, and restores the signal mask, but not that of PID 1: what
/// comes until the command runs is the command's.
pub(super) struct Interrupt {
    /// Closing it ends the thread.
    end: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Interrupt {
    /// Watches the signals: when one comes, writes `farewell` to standard error and ends this process. `None`: the kernel grants
    /// no descriptor or thread, and signals act as they always do.
    pub(super) fn watch(farewell: &'static str) -> Option<Interrupt> {
        let enders = startup::block_wait_enders().ok()?;
        let watched = SignalFd::with_flags(&enders, SfdFlags::SFD_CLOEXEC)
            .and_then(|signals| Ok((signals, pipe2(OFlag::O_CLOEXEC)?)));
        let Ok((signals, (reader, writer))) = watched else {
            restore_mask();
            return None;
        };
        let thread = std::thread::Builder::new().spawn(move || wait_and_end(&signals, &reader, farewell));
        match thread {
            Ok(thread) => Some(Interrupt { end: Some(writer), thread: Some(thread) }),
            Err(_) => {
                restore_mask();
                None
            }
        }
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has ended the process.
            let _ = thread.join();
        }
        if !startup::is_init() {
            restore_mask();
        }
    }
}

fn restore_mask() {
    // The mask was readable and writable before.
    let _ = SigSet::thread_get_mask().and_then(|now| startup::mask(now).thread_set_mask());
}

/// Returns when the wait has ended without a signal.
fn wait_and_end(signals: &SignalFd, end: &OwnedFd, farewell: &str) {
    let mut fds = [signals.as_fd(), end.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    while let Err(nix::Error::EINTR) = poll(&mut fds, PollTimeout::NONE) {}
    if fds[0].any() == Some(true)
        && let Ok(Some(info)) = signals.read_signal()
    {
        let signal = info.ssi_signo as i32;
        let _ = write!(io::stderr(), "{farewell}");
        startup::die_of(signal);
        std::process::exit(exit::of_signal(signal as u8).into());
    }
}
