//! Passing descriptors to another process through a Unix socket (SCM_RIGHTS, unix(7)), in one place for the client and the
//! daemon. Each message carries at most one.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// The room for one descriptor. The kernel closes further ones that a peer sends.
const SPACE: usize = rustix::cmsg_space!(ScmRights(1));

/// Sends bytes, and a descriptor with the first of them. Returns how many bytes the kernel took, which does not
/// wait.
///
/// # Errors
/// Those of sendmsg(2).
pub(crate) fn send(socket: impl AsFd, bytes: &[u8], descriptor: BorrowedFd<'_>) -> nix::Result<usize> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    let is_pushed = control.push(SendAncillaryMessage::ScmRights(&descriptors));
    debug_assert!(is_pushed, "there is room for one");
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags).map_err(errno)
}

/// Receives bytes, and the descriptor that came with them, which is closed on exec.
///
/// # Errors
/// Those of recvmsg(2).
pub(crate) fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    waits: bool,
) -> nix::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = if waits { RecvFlags::CMSG_CLOEXEC } else { RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT };
    let received = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags).map_err(errno)?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok((received.bytes, descriptor))
}

fn errno(error: rustix::io::Errno) -> nix::Error {
    nix::Error::from_raw(error.raw_os_error())
}
