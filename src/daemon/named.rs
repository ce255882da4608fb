//! Processes that clients name: the command that has inherited a lock, or the shell that a lock is taken for. A client sends a
//! descriptor of the process (pidfd_open(2), SCM_RIGHTS in unix(7)), because its number may mean another process here: the client
//! may be in another pid namespace, and the number may come round.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use rustix::cmsg_space;
use rustix::fs::{fstat, fstatfs};
use rustix::io::IoSliceMut;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Pid;

use super::processes::{namespace, start_time, stat_field};
use crate::addr::Peer;
use crate::journal::Process;
use crate::proto;

/// How many files may wait to be closed.
const DISCARDED_MAX: usize = 1024;

/// A process that a client has named, and may name.
#[derive(Debug)]
pub(super) enum Named {
    /// The daemon can find it again by its number.
    Known(Process),
    /// It is outside of the daemon's pid namespace, or the daemon cannot see it. Only the descriptor tells of its end.
    Foreign(OwnedFd),
}

impl Named {
    /// Returns the process as the journal keeps it, if it can.
    pub(super) fn known(&self) -> Option<Process> {
        match self {
            Named::Known(process) => Some(*process),
            Named::Foreign(_) => None,
        }
    }

    /// Returns `true` if `descriptor` is of the same process, which is outside of the daemon's namespace.
    pub(super) fn is_foreign(&self, descriptor: &OwnedFd) -> bool {
        match (self, inode(descriptor)) {
            (Named::Foreign(mine), Some(other)) => inode(mine) == Some(other),
            _ => false,
        }
    }
}

/// Reads what has arrived on a Unix socket, without waiting, and the descriptor of a process that came with it, or of any file
/// if `takes_files`.
pub(super) fn read(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    takes_files: bool,
) -> nix::Result<(usize, Option<OwnedFd>)> {
    // The kernel passes at most so many descriptors with a message (unix(7)). With room for fewer it would close the others itself,
    // in this process, and closing a socket may take as long as its sender has set (SO_LINGER, socket(7)).
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let read = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags);
    let bytes = read.map_err(|e| nix::Error::from_raw(e.raw_os_error()))?.bytes;
    let mut wanted = None;
    for message in control.drain() {
        let RecvAncillaryMessage::ScmRights(descriptors) = message else { continue };
        for descriptor in descriptors {
            match wanted.is_none() && (takes_files || number(&descriptor).is_some()) {
                true => wanted = Some(descriptor),
                false => discard(descriptor),
            }
        }
    }
    Ok((bytes, wanted))
}

/// Closes what a client should not have sent. Closing a file of a file system in user space may take as long as its server likes, so
/// a thread does it.
fn discard(descriptor: OwnedFd) {
    static THREAD: OnceLock<Option<SyncSender<OwnedFd>>> = OnceLock::new();
    let linger = nix::libc::linger { l_onoff: 0, l_linger: 0 };
    if setsockopt(&descriptor, sockopt::Linger, &linger).is_ok() {
        return;
    }
    let thread = THREAD.get_or_init(|| {
        let (sender, receiver) = sync_channel(DISCARDED_MAX);
        let thread = std::thread::Builder::new().name("discard".into());
        thread.spawn(move || receiver.into_iter().for_each(drop)).ok().map(|_| sender)
    });
    if let Some(thread) = thread {
        // If the thread has too much to do, the loop closes it.
        let _ = thread.try_send(descriptor);
    }
}

/// Why a process is not named that has ended.
pub(super) const ENDED: &str = "the process has ended";

/// Checks that a client may leave its lock to a process, and finds out how to find that again.
///
/// # Errors
/// Why it may not.
pub(super) fn check(descriptor: OwnedFd, peer: Peer) -> Result<Named, &'static str> {
    let number = number(&descriptor).ok_or("the descriptor is not that of a process")?;
    let Some(pid) = number.filter(|_| namespace().is_some()) else {
        return match is_alive(&descriptor) {
            true => Ok(Named::Foreign(descriptor)),
            false => Err(ENDED),
        };
    };
    let facts = Facts::of(pid);
    // The number was that of this process while the facts were read.
    if !is_alive(&descriptor) {
        return Err(ENDED);
    }
    let (Some(facts), Some(started)) = (facts, start_time(pid)) else {
        return Ok(Named::Foreign(descriptor));
    };
    let is_child = peer.pid != 0 && facts.parent == peer.pid;
    if !is_child && peer.uid != 0 && !facts.uids.contains(&peer.uid) {
        return Err("the process belongs to another user");
    }
    if facts.is_init && !is_shell_of(peer, pid) {
        return Err("process 1 of a machine or container cannot hold a lock");
    }
    let pid = proto::Pid::new(pid.as_raw_nonzero().get() as u32).ok_or("the process has no number")?;
    Ok(Named::Known(Process { pid, started }))
}

/// What /proc tells of a process.
struct Facts {
    /// The real and the effective user.
    uids: Vec<u32>,
    parent: u32,
    /// It is the first process of its pid namespace.
    is_init: bool,
}

impl Facts {
    fn of(pid: Pid) -> Option<Facts> {
        let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
        let numbers = |field: &str| -> Option<Vec<u32>> {
            let line = status.lines().find_map(|line| line.strip_prefix(field))?;
            line.split_ascii_whitespace().map(|number| number.parse().ok()).collect()
        };
        Some(Facts {
            uids: numbers("Uid:")?.into_iter().take(2).collect(),
            parent: *numbers("PPid:")?.first()?,
            is_init: numbers("NSpid:")?.last() == Some(&1),
        })
    }
}

/// Returns `true` if a process is the parent of the client, in the same session: a script that a container runs as its first
/// process, and not an init that has adopted the client.
fn is_shell_of(peer: Peer, pid: Pid) -> bool {
    const PARENT: usize = 4;
    const SESSION: usize = 6;
    let Some(client) = i32::try_from(peer.pid).ok().and_then(Pid::from_raw) else { return false };
    let session = stat_field(pid, SESSION);
    stat_field(client, PARENT) == u64::try_from(pid.as_raw_nonzero().get()).ok()
        && session.is_some()
        && stat_field(client, SESSION) == session
}

/// Returns `true` if the process has not ended: a descriptor of one that has is readable (pidfd_open(2)).
fn is_alive(process: &OwnedFd) -> bool {
    matches!(poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO), Ok(0))
}

/// Returns the number of a process in the namespace of /proc; `Some(None)`: it has none there, or has ended. `None`: the descriptor is
/// not that of a process.
fn number(descriptor: &OwnedFd) -> Option<Option<Pid>> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd())).ok()?;
    let number: i32 = info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
    Some(if number > 0 { Pid::from_raw(number) } else { None })
}

/// Returns what tells the process of a descriptor from all others, as far as the kernel does (since Linux 6.9).
fn inode(descriptor: &OwnedFd) -> Option<u64> {
    const PIDFS: i64 = 0x5049_4446;
    let is_pidfs = fstatfs(descriptor).is_ok_and(|stat| stat.f_type == PIDFS);
    is_pidfs.then(|| fstat(descriptor).ok().map(|stat| stat.st_ino))?
}
