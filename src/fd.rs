//! Descriptors that this process was started with, named by their numbers.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
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

/// Returns another descriptor of the open file that the descriptor `number` refers to: not of the same file opened anew.
///
/// # Errors
/// When the descriptor is not open.
pub fn share(number: u32) -> io::Result<File> {
    let raw = i32::try_from(number).map_err(|_| io::Error::from(nix::Error::EBADF))?;
    if !std::fs::exists(format!("/dev/fd/{raw}"))? {
        // The numbers that are free now are about to be taken.
        return Err(nix::Error::EBADF.into());
    }
    // By way of a socket: pidfd_getfd(2) is forbidden in many containers.
    let (sender, receiver) = UnixStream::pair()?;
    let rights = [raw];
    sendmsg::<()>(
        sender.as_raw_fd(),
        &[IoSlice::new(&[0])],
        &[ControlMessage::ScmRights(&rights)],
        MsgFlags::empty(),
        None,
    )?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(&receiver, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let received = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    received.map(|descriptor: OwnedFd| descriptor.into()).ok_or_else(|| nix::Error::EMFILE.into())
}

/// Returns a path that opens the same file anew.
pub fn path(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Closes all descriptors but the standard ones and these, so that no process waits for the end of a pipe that this one keeps
/// open.
///
/// # Errors
/// As getrlimit(2), where /proc is missing.
pub fn close_all_but(kept: &[RawFd]) -> io::Result<()> {
    let numbers: Vec<RawFd> = match std::fs::read_dir("/proc/self/fd") {
        Ok(folder) => folder.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect(),
        // Without /proc: every number that may be open.
        Err(_) => {
            let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
            (3..i32::try_from(soft).unwrap_or(i32::MAX).min(65_536)).collect()
        }
    };
    for number in numbers {
        if number > 2 && !kept.contains(&number) {
            // The descriptor of the directory itself is closed already; closing any other one cannot lose data.
            let _ = nix::unistd::close(number);
        }
    }
    Ok(())
}
