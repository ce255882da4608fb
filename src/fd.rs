//! Descriptors that this process was started with, named by their numbers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// Duplicates the descriptor `number`, which came from outside: safe Rust cannot use it as it is.
///
/// # Errors
/// When the descriptor is not open.
pub fn dup(number: u32) -> io::Result<File> {
    let raw = i32::try_from(number).map_err(|_| io::Error::from(nix::Error::EBADF))?;
    // By pidfd_getfd(2): opening /dev/fd/N fails for a socket, and for the pipe of a supervisor that runs as another user.
    if let Ok(process) = pidfd_open(getpid(), PidfdFlags::empty()) {
        if process.as_raw_fd() == raw {
            // The number was free until pidfd_open took it.
            return Err(nix::Error::EBADF.into());
        }
        match pidfd_getfd(process, raw, PidfdGetfdFlags::empty()) {
            // A kernel or a sandbox without that system call.
            Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => {}
            other => return Ok(other?.into()),
        }
    }
    File::options().write(true).open(format!("/dev/fd/{number}"))
}
