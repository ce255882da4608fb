//! `kmutex lock` and `kmutex unlock`: a lock that a shell holds, or any other process. The daemon watches that process and
//! releases the lock when it ends.
//!
//! - `caller`: the process that asks, and whether it will last.
//! - `descriptor`: an open file in the place of the process.
//! - `keeper`: the process that holds the lock as long as that file is open.

mod caller;
mod descriptor;
mod keeper;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Uid, getppid};
use rustix::process::{PidfdFlags, pidfd_open};

use crate::acquire::{Acquire, Acquired};
use crate::addr::{Addr, Reason};
use crate::client::{self, HeldLock, RELEASE_WAIT, Session, Target};
use crate::exit::Exit;
use crate::lookup;
use crate::proto::v2::{Answer, ErrorCode, LockRequest, Request};
use crate::proto::{Key, Outcome, Pid, Token};
pub use caller::Unsuitable;
use descriptor::Descriptor;
pub use descriptor::Unusable;

/// How `kmutex lock` ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockResult {
    /// The process holds it, with this fencing token.
    Held(Token),
    /// Another holder finished first; this is the exit status to adopt, with `--on-peer-failure adopt`.
    Finished(Option<u8>),
    /// A newer request took the place of this one (`--newest`).
    Superseded,
    /// The lock is held, and the request did not wait, or timed out.
    Busy,
}

/// What a lock lasts as long as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// The parent of this process, if that is a shell that goes on.
    Caller,
    /// The process with this id.
    Process(u32),
    /// The open file that this descriptor refers to.
    Descriptor(u32),
}

impl Lifetime {
    /// From the values of `--pid` and `--fd`, of which at most one is given.
    pub fn new(pid: Option<u32>, fd: Option<u32>) -> Lifetime {
        match (pid, fd) {
            (_, Some(fd)) => Lifetime::Descriptor(fd),
            (Some(pid), None) => Lifetime::Process(pid),
            (None, None) => Lifetime::Caller,
        }
    }
}

/// Acquires a lock that lasts as long as `lifetime`. With a descriptor, the caller's process ends here, with status 0, when the
/// lock is acquired; the process that returns is another.
///
/// # Errors
/// When there is no such process or descriptor, it belongs to another user, or the lock cannot be acquired.
pub fn lock(request: &Acquire, lifetime: Lifetime) -> Result<LockResult, Error> {
    match lifetime {
        Lifetime::Descriptor(number) => lock_for_descriptor(request, number),
        Lifetime::Caller => lock_for_process(request, None),
        Lifetime::Process(pid) => lock_for_process(request, Some(pid)),
    }
}

fn lock_for_process(request: &Acquire, pid: Option<u32>) -> Result<LockResult, Error> {
    let parent = if pid.is_none() { Some(caller::find()?) } else { None };
    let process = open(pid)?;
    let pid = holder(&request.target, pid)?;
    let wire = LockRequest {
        // No message says how the process ends, so its end is the end of the work.
        exec: true,
        child: Some(pid),
        ..request.request(command_of(pid))
    };
    match request.acquire(&wire, Instant::now())? {
        Acquired::Granted { mut session, token, .. } => {
            let has_ended = process.is_some_and(|process| !is_alive(&process));
            if has_ended || parent.is_some_and(|parent| !caller::is_still(parent)) {
                // Its number, by which the session named it, may be another process's by now.
                session.send(&Request::Release { outcome: Outcome::Vanished })?;
                return Err(if parent.is_some() {
                    Unsuitable::Ended.into()
                } else {
                    Error::NoProcess(pid.get())
                });
            }
            // The daemon knows that the shell holds the lock before the shell can make its next request.
            session.leave()?;
            Ok(LockResult::Held(token))
        }
        other => not_granted(request, other, &format!("process {pid}")),
    }
}

fn lock_for_descriptor(request: &Acquire, number: u32) -> Result<LockResult, Error> {
    let unusable = |e| Error::Descriptor(number, e);
    let descriptor = Descriptor::new(number).map_err(unusable)?;
    if descriptor.find(&request.key).map_err(|e| unusable(e.into()))?.is_some() {
        return not_granted(request, Acquired::HeldAbove, &format!("descriptor {number}"));
    }
    let wire = LockRequest {
        // No message says how the work ended.
        exec: true,
        ..request.request(Pid::new(getppid().as_raw() as u32).map(command_of).unwrap_or_default())
    };
    match request.acquire(&wire, Instant::now())? {
        Acquired::Granted { request: granted, session, token } => {
            let mut hold = HeldLock::new(request.target.clone(), *granted, session, token);
            let marker = descriptor.mark(&request.key).map_err(|e| {
                // Nothing was done under the lock. If the daemon is down, the lock ends with this process.
                let _ = hold.release(Outcome::Vanished, RELEASE_WAIT);
                unusable(e)
            })?;
            keeper::keep(hold, descriptor, marker).map_err(Error::Keeper)?;
            Ok(LockResult::Held(token))
        }
        other => not_granted(request, other, &format!("descriptor {number}")),
    }
}

/// Returns what became of a request that was not granted. `holder` would have held the lock.
fn not_granted(request: &Acquire, acquired: Acquired, holder: &str) -> Result<LockResult, Error> {
    match acquired {
        Acquired::Granted { .. } => unreachable!("the caller has dealt with it"),
        Acquired::Finished { status, .. } | Acquired::Fresh { status, .. } => {
            Ok(LockResult::Finished(status))
        }
        // A shell has no output of its own: it does not ask for a result.
        Acquired::Shared { .. } | Acquired::Withheld { .. } => Ok(LockResult::Finished(None)),
        Acquired::Superseded => Ok(LockResult::Superseded),
        Acquired::Busy => Ok(LockResult::Busy),
        Acquired::HeldAbove => Err(client::Error::Deadlock(format!(
            "the lock {:?} is held by {holder} already, or by a process that it runs under",
            request.key.as_str()
        ))
        .into()),
    }
}

/// Releases a lock that [`lock`] acquired for the same lifetime.
///
/// # Errors
/// When the lock is not held that way, or there is no daemon.
pub fn unlock(target: &Target, key: Key, lifetime: Lifetime) -> Result<(), Error> {
    match lifetime {
        Lifetime::Descriptor(number) => unlock_descriptor(key, number),
        Lifetime::Caller => unlock_process(target, key, None),
        Lifetime::Process(pid) => unlock_process(target, key, Some(pid)),
    }
}

/// Takes the marker from the open file, and waits until its keeper has released the lock.
fn unlock_descriptor(key: Key, number: u32) -> Result<(), Error> {
    let unusable = |e| Error::Descriptor(number, e);
    let descriptor = Descriptor::new(number).map_err(unusable)?;
    let Some(marker) = descriptor.find(&key).map_err(|e| unusable(e.into()))? else {
        return Err(Error::NotHeldOpen(key, number));
    };
    descriptor.unmark(marker).map_err(|e| unusable(e.into()))?;
    match descriptor.wait_for_keeper(marker, 2 * RELEASE_WAIT) {
        Err(e) if e.kind() == io::ErrorKind::TimedOut => Err(Error::Stuck(number)),
        other => other.map_err(|e| unusable(e.into())),
    }
}

fn unlock_process(target: &Target, key: Key, pid: Option<u32>) -> Result<(), Error> {
    let pid = holder(target, pid)?;
    let mut session = Session::connect_within(target, 3 * client::PROMPT_WAIT)?;
    match session.call(&Request::Unlock { key: key.clone(), pid, outcome: Outcome::Unknown })? {
        Answer::Released => Ok(()),
        Answer::Error { code: ErrorCode::NotHeld, .. } => Err(Error::NotHeld(key, pid)),
        other => Err(client::Error::unexpected(other).into()),
    }
}

/// Returns the process that holds the lock, which must be on this machine and belong to this user.
fn holder(target: &Target, pid: Option<u32>) -> Result<Pid, Error> {
    if !matches!(target.addr, Addr::Unix(_)) {
        return Err(Error::NotHere(target.addr.clone()));
    }
    let given = pid;
    let pid = given.unwrap_or(getppid().as_raw() as u32);
    let owner = std::fs::metadata(format!("/proc/{pid}")).map_err(|e| match (e.kind(), given) {
        _ if !std::fs::exists("/proc/self").unwrap_or(false) => Error::NoProc,
        (io::ErrorKind::NotFound, Some(_)) => Error::NoProcess(pid),
        // Its number is of another process namespace, or 0: the parent is outside of this one.
        (io::ErrorKind::NotFound, None) => Error::NoParent,
        _ => Error::Process(pid, e),
    })?;
    let me = Uid::effective();
    if !me.is_root() && owner.uid() != me.as_raw() {
        return Err(Error::NotYours(pid, owner.uid()));
    }
    Pid::new(pid).ok_or(Error::NoProcess(pid))
}

/// Opens a process, by default the parent of this one, before anything is found out about it. `None`: the kernel has no pidfds, or
/// there is no such process, which is said later.
fn open(pid: Option<u32>) -> Result<Option<OwnedFd>, Error> {
    let number = pid.map_or(nix::unistd::getppid().as_raw(), |pid| pid as i32);
    let Some(process) = rustix::process::Pid::from_raw(number) else { return Ok(None) };
    match pidfd_open(process, PidfdFlags::empty()) {
        Ok(process) => Ok(Some(process)),
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => Ok(None),
        Err(e) => Err(Error::Process(number as u32, e.into())),
    }
}

/// Returns `true` if a process has not ended: a descriptor of one that has is readable (pidfd_open(2)).
fn is_alive(process: &OwnedFd) -> bool {
    matches!(poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO), Ok(0))
}

/// Returns the command line of a process (proc(5), /proc/PID/cmdline).
fn command_of(pid: Pid) -> String {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).trim_end_matches('\0').replace('\0', " ")
}

/// Why a lock cannot be acquired or released for a process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The client failed.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The daemon may be on another machine, where it cannot watch a process of this one.
    #[error("kmutex lock needs a daemon on a Unix socket, not {0}")]
    NotHere(Addr),
    /// No process is named, and the parent is not one to hold a lock.
    #[error(
        "{0}, so the lock would not last; name the process that is to hold it, as in --pid $$, or an open file: --fd 9 KEY 9>FILE"
    )]
    Unsuitable(#[from] Unsuitable),
    /// There is no such process.
    #[error("--pid {0}: there is no such process")]
    NoProcess(u32),
    /// The calling process cannot be named.
    #[error("the calling process is outside of this process namespace; see --pid")]
    NoParent,
    /// Nothing tells about processes.
    #[error("kmutex lock needs /proc, which is not mounted")]
    NoProc,
    /// The process belongs to the user with this uid.
    #[error("process {} belongs to uid {} ({}), and cannot hold a lock for this user; see --pid", .0, .1, user_name(*.1))]
    NotYours(u32, u32),
    /// The kernel does not tell about the process.
    #[error("cannot inspect process {}: {}", .0, Reason(.1))]
    Process(u32, #[source] io::Error),
    /// The descriptor cannot have a lock.
    #[error("--fd {0}: {1}")]
    Descriptor(u32, #[source] Unusable),
    /// No process can be started that holds the lock.
    #[error("cannot start a process that holds the lock: {}", Reason(.0))]
    Keeper(#[source] io::Error),
    /// The process that holds the lock is stopped, or has lost the daemon.
    #[error("the process that holds the lock for descriptor {0} does not release it in time")]
    Stuck(u32),
    /// The open file does not hold the lock.
    #[error("descriptor {} does not hold the lock {:?}", .1, .0.as_str())]
    NotHeldOpen(Key, u32),
    /// The process does not hold the lock.
    #[error("process {} does not hold the lock {:?}", .1, .0.as_str())]
    NotHeld(Key, Pid),
}

impl Error {
    /// Returns the exit code for this error.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Client(error) => error.exit(),
            Error::NotHere(_) | Error::Unsuitable(_) => Exit::Usage,
            Error::Descriptor(_, Unusable::Os(_)) => Exit::Os,
            Error::Descriptor(..) => Exit::Usage,
            Error::Keeper(_) | Error::Stuck(_) => Exit::Os,
            Error::NoProcess(_) => Exit::BadData,
            Error::NoParent | Error::NoProc => Exit::Os,
            Error::NotYours(..) | Error::NotHeld(..) | Error::NotHeldOpen(..) => Exit::NotPermitted,
            Error::Process(..) => Exit::Os,
        }
    }
}

fn user_name(uid: u32) -> String {
    lookup::user(uid).unwrap_or_else(|| "unknown user".into())
}
