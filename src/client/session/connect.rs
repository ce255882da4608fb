//! Connecting: starts a daemon where there is none, and checks that its user is trusted.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::unistd::Uid;

use super::peer_watch::{PEER_TIMEOUT, PeerWatch};
use super::{ANSWER_WAIT, Session, Stage};
use crate::addr::{self, Addr};
use crate::client::credentials::Credentials;
use crate::client::transport::{Input, Transport, silent};
use crate::client::{Error, Target, autostart};
use crate::lock_file;
use crate::lookup;
use crate::place;

impl Session {
    /// Connects, and starts a daemon first if there is none and `target` says so. Sends nothing yet.
    ///
    /// # Errors
    /// When there is no daemon, or its user is not trusted; [`Error::TimedOut`] at the deadline.
    pub fn connect(target: &Target, deadline: Option<Instant>) -> Result<Session, Error> {
        let fd = match (target.addr.connect(deadline), &target.addr) {
            (Err(e), Addr::Unix(path)) if target.autostart && e.is_absent() => {
                autostart::start_and_connect(path, deadline)?
            }
            (Err(e), Addr::Unix(path)) if e.is_absent() => {
                return Err(match lock_file::pid_without_socket(path) {
                    Some(pid) => Error::SocketGone { path: path.clone(), pid },
                    None => e.into(),
                });
            }
            (other, _) => other?,
        };
        check_trust(target, &fd)?;
        let credentials = match (&target.addr, &target.auth_file) {
            // The kernel tells who connects to a Unix socket.
            (Addr::Unix(_), _) | (_, None) => None,
            (_, Some(path)) => Some(Box::new(Credentials::read(path)?)),
        };
        let transport = Transport::begin(target, fd, deadline)?;
        Ok(Session {
            transport,
            credentials,
            input: Input::default(),
            searched: 0,
            pieces: Vec::new(),
            stale: None,
            stage: Stage::Silent,
            is_local: matches!(target.addr, Addr::Unix(_)),
            place: None,
            lease: None,
            proof: None,
            answer_wait: ANSWER_WAIT,
            peer: match target.addr {
                Addr::Unix(_) => PeerWatch::Needless,
                _ => PeerWatch::Due(PEER_TIMEOUT),
            },
        })
    }

    /// Connects as [`Session::connect`] does, for requests that the daemon answers at once: connecting and each answer may
    /// take `limit`.
    ///
    /// # Errors
    /// As [`Session::connect`], and [`Error::Silent`] when connecting takes longer.
    pub fn connect_within(target: &Target, limit: Duration) -> Result<Session, Error> {
        let session = Session::connect(target, Some(Instant::now() + limit)).map_err(silent)?;
        Ok(Session { answer_wait: limit, ..session })
    }
}

/// The daemon decides who gets a lock, so its user must be one who could as well replace this program: its own user, root,
/// or a uid that the user named. The kernel does not tell who serves a TCP port.
fn check_trust(target: &Target, fd: &OwnedFd) -> Result<(), Error> {
    let Addr::Unix(_) = target.addr else { return Ok(()) };
    let uid = addr::peer(fd).map_err(|e| Error::Io("find out who serves the socket", e))?.uid;
    if uid == 0 || target.trusted_uids.contains(&uid) {
        return Ok(());
    }
    // The kernel shows one number for all users that this user namespace does not know, perhaps this process's own among them.
    if place::is_unmapped(uid) {
        return Err(Error::Unmapped { addr: target.addr.clone() });
    }
    if uid == Uid::effective().as_raw() {
        return Ok(());
    }
    Err(Error::Untrusted { addr: target.addr.clone(), uid, user: lookup::user(uid) })
}
