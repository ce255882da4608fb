//! Files that this process was started with, named by the number of their descriptor.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// A second descriptor of an open file whose number came from outside, which there is no safe way to use as it is.
///
/// # Errors
/// When it is not open.
pub fn dup(number: u32) -> io::Result<File> {
    let raw = i32::try_from(number).map_err(|_| io::Error::from(nix::Error::EBADF))?;
    // Asked of the kernel: to open it by its name fails for the pipe of a supervisor that is another user, and for a
    // socket.
    if let Ok(process) = pidfd_open(getpid(), PidfdFlags::empty()) {
        if process.as_raw_fd() == raw {
            // That number was free until now.
            return Err(nix::Error::EBADF.into());
        }
        match pidfd_getfd(process, raw, PidfdGetfdFlags::empty()) {
            // A kernel, or a sandbox, without that call.
            Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => {}
            other => return Ok(other?.into()),
        }
    }
    File::options().write(true).open(format!("/dev/fd/{number}"))
}
