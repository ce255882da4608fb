//! Signals of any number. nix knows the standard signals by name, and its sets are those of the C library, which in musl cannot
//! contain signal 34: musl sends it to the threads of a program that changes its user, which kmutex never does. Programs with
//! glibc know it as SIGRTMIN, and may wait for it. So the kernel is given sets that are made of bits.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::thread::{Builder, JoinHandle};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;
use uapi::c::sigset_t;

use crate::startup::bit;

/// Sends a signal to a process.
///
/// # Errors
/// As kill(2).
pub(crate) fn send(pid: Pid, signal: i32) -> nix::Result<()> {
    uapi::kill(pid.as_raw(), signal).map_err(errno)
}

/// Makes a signalfd(2) read all signals but these.
///
/// # Errors
/// As signalfd(2).
pub(crate) fn read_all_but(fd: &SignalFd, signals: &[Signal]) -> nix::Result<()> {
    let not_read = signals.iter().fold(0, |bits, &signal| bits | bit(signal as i32));
    uapi::signalfd_mod(fd.as_fd().as_raw_fd(), &set(!not_read)).map_err(errno)
}

/// Blocks every signal that can be blocked. Returns what was blocked before, as far as the C library knows it.
///
/// # Errors
/// As sigprocmask(2).
pub(crate) fn block_all() -> nix::Result<SigSet> {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    block_unnamed()?;
    Ok(before)
}

/// Blocks what the C library's set of all signals does not contain. This is called again after each posix_spawn(3), which puts back
/// the mask as far as musl knows it.
///
/// # Errors
/// As sigprocmask(2).
pub(crate) fn block_unnamed() -> nix::Result<()> {
    match cfg!(target_env = "musl") {
        true => uapi::pthread_sigmask(uapi::c::SIG_BLOCK, Some(&set(bit(34))), None).map_err(errno),
        false => Ok(()),
    }
}

/// Starts a thread while all signals are blocked, and blocks them in both: when a process starts its first thread, musl unblocks what
/// it keeps for itself.
///
/// # Errors
/// As pthread_create(3).
pub(crate) fn start_thread<T: Send + 'static>(
    thread: Builder,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let handle = thread.spawn(move || {
        // It fails for no mask that there is.
        let _ = block_unnamed();
        work()
    })?;
    block_unnamed()?;
    Ok(handle)
}

/// Signal 1 is bit 0, as for the kernel, which looks at the first 8 bytes.
fn set(bits: u64) -> sigset_t {
    let mut set = [0_u64; size_of::<sigset_t>() / size_of::<u64>()];
    set[0] = bits;
    uapi::pod_read(&set[..]).expect("it has the size of one")
}

fn errno(error: uapi::Errno) -> Errno {
    Errno::from_raw(error.0)
}
