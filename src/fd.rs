//! Descriptors that this process was started with, named by their numbers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::resource::{Resource, getrlimit};
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

/// Closes all files but the standard ones, so that no process waits for the end of a pipe that this
/// one keeps open.
///
/// # Errors
/// As getrlimit(2), where /proc is missing.
pub(crate) fn close_inherited() -> io::Result<()> {
    let numbers: Vec<i32> = match std::fs::read_dir("/proc/self/fd") {
        Ok(folder) => folder.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect(),
        // Without /proc: every number that may be open.
        Err(_) => {
            let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
            (3..i32::try_from(soft).unwrap_or(i32::MAX).min(65_536)).collect()
        }
    };
    for number in numbers {
        if number > 2 {
            // The descriptor of the directory itself is closed already; closing any other one cannot lose data.
            let _ = nix::unistd::close(number);
        }
    }
    Ok(())
}
