//! `kmutex lock` and `kmutex unlock`: a lock that a shell holds, or any process that is not kmutex. The daemon watches
//! that process, and the lock ends with it at the latest.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use nix::unistd::{Uid, getppid};

use crate::acquire::{Acquire, Acquired};
use crate::addr::{Addr, Reason};
use crate::client::{self, Session, Target};
use crate::exit::Exit;
use crate::lookup;
use crate::proto::v2::{Answer, ErrorCode, LockRequest, Request};
use crate::proto::{Key, Outcome, Token};

/// What became of a lock that was to be taken for a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockResult {
    /// The process holds it, with this fencing token.
    Held(Token),
    /// Another holder was done first; the status to end with as well, if that was asked for.
    Finished(Option<u8>),
    /// Somebody else holds it, and there was no waiting, or no more.
    Busy,
}

/// Takes a lock for a process, by default for the one that has started this one.
///
/// # Errors
/// When there is no such process, it is somebody else's, or the lock cannot be had.
pub fn lock(request: &Acquire, pid: Option<u32>) -> Result<LockResult, Error> {
    let pid = holder(&request.target, pid)?;
    let wire = LockRequest {
        // Nobody says how the process ends, so its end is that of the work.
        exec: true,
        child: Some(pid),
        ..request.request(command_of(pid))
    };
    match request.acquire(&wire, Instant::now())? {
        Acquired::Granted { session, token, .. } => {
            // Whatever the shell asks of the daemon next, the lock is known to be its.
            session.leave()?;
            Ok(LockResult::Held(token))
        }
        Acquired::Finished { status, .. } => Ok(LockResult::Finished(status)),
        Acquired::Busy => Ok(LockResult::Busy),
        Acquired::HeldAbove => Err(client::Error::Deadlock(format!(
            "the lock {:?} is held by process {pid} already, or by what it runs under",
            request.key.as_str()
        ))
        .into()),
    }
}

/// Releases a lock that [`lock`] has taken for that process.
///
/// # Errors
/// When that process does not hold it, or there is no daemon.
pub fn unlock(target: &Target, key: Key, pid: Option<u32>) -> Result<(), Error> {
    let pid = holder(target, pid)?;
    let mut session = Session::connect(target, None)?;
    match session.call(&Request::Unlock { key: key.clone(), pid, outcome: Outcome::Unknown })? {
        Answer::Released => Ok(()),
        Answer::Error { code: ErrorCode::NotHeld, .. } => Err(Error::NotHeld(key, pid)),
        other => Err(client::Error::unexpected(other).into()),
    }
}

/// The process that is to hold: one of this user, on this machine.
fn holder(target: &Target, pid: Option<u32>) -> Result<u32, Error> {
    if !matches!(target.addr, Addr::Unix(_)) {
        return Err(Error::NotHere(target.addr.clone()));
    }
    let pid = pid.unwrap_or(getppid().as_raw() as u32);
    let owner = std::fs::metadata(format!("/proc/{pid}")).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::NoProcess(pid),
        _ => Error::Process(pid, e),
    })?;
    let me = Uid::effective();
    if !me.is_root() && owner.uid() != me.as_raw() {
        return Err(Error::NotYours(pid, owner.uid()));
    }
    Ok(pid)
}

/// The command line of a process, for people (proc(5), /proc/PID/cmdline).
fn command_of(pid: u32) -> String {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).trim_end_matches('\0').replace('\0', " ")
}

/// Why a process has no lock, or keeps it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The lock cannot be had.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The daemon is on another machine, perhaps, and can watch no process here.
    #[error("a process can hold locks of a daemon on a Unix socket only, and {0} is none")]
    NotHere(Addr),
    /// There is no such process.
    #[error("--pid {0}: there is no such process")]
    NoProcess(u32),
    /// The process is this user's.
    #[error("--pid {}: the process is not yours, but that of uid {} ({})", .0, .1, user_name(*.1))]
    NotYours(u32, u32),
    /// Nothing can be told of the process.
    #[error("--pid {}: cannot look at the process: {}", .0, Reason(.1))]
    Process(u32, #[source] io::Error),
    /// The process does not hold the lock.
    #[error("process {} does not hold the lock {:?}", .1, .0.as_str())]
    NotHeld(Key, u32),
}

impl Error {
    /// The exit code for it.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Client(error) => error.exit(),
            Error::NotHere(_) => Exit::Usage,
            Error::NoProcess(_) => Exit::BadData,
            Error::NotYours(..) | Error::NotHeld(..) => Exit::NotPermitted,
            Error::Process(..) => Exit::Os,
        }
    }
}

fn user_name(uid: u32) -> String {
    lookup::user(uid).unwrap_or_else(|| "of no name".into())
}
