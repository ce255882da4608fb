//! Accepting connections, up to the limits of the daemon and of each user.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use log::{debug, error, warn};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::admission::{Access, Admission, Limit, RESERVED};
use super::connection::Connection;
use super::listener::{self, Listener};
use super::source::Source;
use super::{Config, Error, WhenFull};
use crate::addr::{self, Peer, Reason};
use crate::place;
use crate::table::Timestamp;

/// After the kernel has refused a descriptor and no connection was closed since, how long to wait before the next attempt.
const RETRY: Duration = Duration::from_secs(1);
/// How often the log repeats a warning.
const WARNING_EVERY: Duration = Duration::from_secs(60);

/// The listeners, and the limits on connections.
pub(super) struct Acceptor {
    listeners: Vec<Listener>,
    pub(super) admission: Admission,
    when_full: WhenFull,
    /// All clients come through forwarders.
    remote: bool,
    generation: u32,
    state: Accepting,
    warned_last: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accepting {
    Yes,
    /// The limit of connections is reached, and clients are to wait until one is closed.
    Full,
    /// The kernel has no more descriptors: wait until a connection is closed, or until this time.
    Refused(Timestamp),
}

/// A connection that was let in.
pub(super) struct Accepted<'a> {
    pub(super) connection: Connection,
    /// The address of the listener, for the log.
    pub(super) listener: &'a str,
    /// The client's address over TCP, and whether it is to speak TLS.
    pub(super) from: Option<(IpAddr, bool)>,
}

impl Acceptor {
    /// An acceptor that accepts nothing until [`Acceptor::resume`].
    pub(super) fn new(config: &Config, listeners: Vec<Listener>) -> io::Result<Acceptor> {
        Ok(Acceptor {
            listeners,
            admission: Admission::new(config, raise_descriptor_limit()?),
            when_full: config.when_full,
            remote: config.remote,
            generation: 0,
            state: Accepting::Full,
            warned_last: None,
        })
    }

    /// Accepts one connection. One beyond the limits may do less than others, see [`Access`]. Returns `None` if there is nothing
    /// more to accept for now.
    ///
    /// # Errors
    /// As epoll_ctl(2) gives them.
    pub(super) fn accept(
        &mut self,
        index: usize,
        now: Timestamp,
        epoll: &Epoll,
    ) -> io::Result<Option<Accepted<'_>>> {
        while self.state == Accepting::Yes {
            if self.when_full == WhenFull::Wait && self.admission.is_full() {
                self.pause(Accepting::Full, epoll)?;
                break;
            }
            match self.listeners[index].accept() {
                Ok((fd, from)) => {
                    let connection = self.admit(index, fd, now);
                    let listener = &self.listeners[index];
                    let from = from.map(|address| (address, listener.is_tls()));
                    return Ok(Some(Accepted { connection, listener: listener.name(), from }));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if listener::is_per_connection_error(&e) => debug!("accept: {}", Reason(&e)),
                Err(e) => {
                    if self.warns_again(now) {
                        warn!("cannot accept: {}; trying again when there is room", Reason(&e));
                    }
                    self.pause(Accepting::Refused(now.plus(RETRY)), epoll)?;
                }
            }
        }
        Ok(None)
    }

    fn admit(&mut self, index: usize, fd: OwnedFd, now: Timestamp) -> Connection {
        let peer = if self.listeners[index].is_unix() { addr::peer(&fd).ok().map(known) } else { None };
        let access = self.admission.admit(peer);
        if let Access::NoLock(limit) | Access::None(limit) = access
            && self.warns_again(now)
        {
            match (limit, peer) {
                (Limit::User, Some(peer)) => warn!("refused a connection: uid {} has too many", peer.uid),
                _ => warn!("refused a connection: there are too many"),
            }
        }
        // Generation 0 and the top bit are reserved; a number is reused only after 2^31 connections.
        self.generation = self.generation % (u32::MAX / 2) + 1;
        let mut connection = Connection::new(fd, peer, self.generation, access);
        connection.forwarded = self.remote;
        connection
    }

    /// Returns the files that the sockets need.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.listeners.iter().flat_map(Listener::files).collect()
    }

    /// Puts back the files that were removed.
    ///
    /// # Errors
    /// When one cannot be put back.
    pub(super) fn restore_files(&mut self, epoll: &Epoll) -> Result<(), Error> {
        for (index, listener) in self.listeners.iter_mut().enumerate() {
            if listener.restore_files()? && self.state == Accepting::Yes {
                let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Listener(index).pack());
                epoll.add(listener.as_fd(), event).map_err(|e| Error::Os("watch a socket", e.into()))?;
            }
        }
        Ok(())
    }

    /// When to try again after the kernel refused a descriptor.
    pub(super) fn retry_at(&self) -> Option<Timestamp> {
        match self.state {
            Accepting::Refused(until) => Some(until),
            Accepting::Yes | Accepting::Full => None,
        }
    }

    /// Returns `true` if it is time to try again.
    pub(super) fn is_due(&self, now: Timestamp) -> bool {
        self.retry_at().is_some_and(|until| until <= now)
    }

    /// Begins to accept, or continues to.
    pub(super) fn resume(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.state = Accepting::Yes;
        for (index, listener) in self.listeners.iter().enumerate() {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Listener(index).pack());
            epoll.add(listener.as_fd(), event)?;
        }
        Ok(())
    }

    fn pause(&mut self, why: Accepting, epoll: &Epoll) -> io::Result<()> {
        debug!("not accepting: {why:?}");
        self.state = why;
        self.listeners.iter().try_for_each(|listener| Ok(epoll.delete(listener.as_fd())?))
    }

    /// A connection was closed: there may be room for another.
    pub(super) fn closed(&mut self, connection: &Connection, epoll: &Epoll) {
        self.admission.leave(connection.access, connection.peer());
        self.make_room(epoll);
    }

    /// The process of a holder that was not connected is not watched any more.
    pub(super) fn forgotten(&mut self, uid: Option<u32>, epoll: &Epoll) {
        self.admission.release(uid);
        self.make_room(epoll);
    }

    fn make_room(&mut self, epoll: &Epoll) {
        if self.state != Accepting::Yes
            && let Err(e) = self.resume(epoll)
        {
            error!("cannot accept any more: {}", Reason(&e));
        }
    }

    fn warns_again(&mut self, now: Timestamp) -> bool {
        let quiet = self.warned_last.is_some_and(|last| now < last.plus(WARNING_EVERY));
        if !quiet {
            self.warned_last = Some(now);
        }
        !quiet
    }
}

/// The kernel shows one number for all users that this user namespace does not know: it says nothing about who they are.
fn known(peer: Peer) -> Peer {
    if place::is_unmapped(peer.uid) { Peer { uid: Peer::UNMAPPED, ..peer } } else { peer }
}

/// Checks that this process may have enough open files to serve at all, before any client relies on it.
pub(super) fn check_descriptor_limit() -> Result<(), Error> {
    let limit = raise_descriptor_limit().map_err(|e| Error::Os("read the limit of open files", e))?;
    if limit <= RESERVED {
        return Err(Error::Descriptors { limit, needed: RESERVED + 1 });
    }
    Ok(())
}

/// Raises the limit of open files as far as possible, and returns it.
fn raise_descriptor_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => Ok(hard),
        Err(e) => {
            warn!("cannot raise the limit of open files from {soft} to {hard}: {e}");
            Ok(soft)
        }
    }
}
