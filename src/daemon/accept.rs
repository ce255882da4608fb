//! Taking connections, as many as there may be, and no more of one user's than that user may have.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use log::{debug, error, warn};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::Config;
use super::connection::Connection;
use super::listener::{self, Listener};
use super::server::{Server, Source, millis};
use crate::addr::{self, Peer, Reason};
use crate::table::Millis;

/// How many connections are accepted before those that are there get their turn again.
const ACCEPTS_MAX: usize = 64;
/// Descriptors that are kept free of connections: standard ones, listeners, the journal, name lookups.
const DESCRIPTORS_RESERVED: u64 = 32;
/// After the kernel refused a descriptor, and none of ours was closed since, when to ask again.
const RETRY: Duration = Duration::from_secs(1);
/// How often the log says so.
const WARNING_EVERY: Duration = Duration::from_secs(60);

/// The listeners, and the limits on what they let in.
pub(super) struct Acceptor {
    listeners: Vec<Listener>,
    connections_max: usize,
    per_uid_max: Option<u32>,
    per_uid: HashMap<u32, u32>,
    generation: u32,
    state: Accepting,
    warned_last: Option<Millis>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accepting {
    Yes,
    /// There are as many connections as there may be: until one of them goes.
    Full,
    /// The kernel has no descriptor to give: until a connection goes, or until then.
    Refused(Millis),
}

impl Acceptor {
    /// Accepts nothing until [`Acceptor::resume`].
    pub(super) fn new(config: &Config, listeners: Vec<Listener>) -> io::Result<Acceptor> {
        let descriptors = raise_descriptor_limit()?.saturating_sub(DESCRIPTORS_RESERVED).max(1);
        let wanted = config.connections_max.map_or(usize::MAX, |n| n as usize);
        Ok(Acceptor {
            listeners,
            connections_max: wanted.min(usize::try_from(descriptors).unwrap_or(usize::MAX)),
            per_uid_max: config.per_uid_max,
            per_uid: HashMap::new(),
            generation: 0,
            state: Accepting::Full,
            warned_last: None,
        })
    }

    /// When to try again after a refusal.
    pub(super) fn retry_at(&self) -> Option<Millis> {
        match self.state {
            Accepting::Refused(until) => Some(until),
            Accepting::Yes | Accepting::Full => None,
        }
    }

    /// True when it is time to try again.
    pub(super) fn is_due(&self, now: Millis) -> bool {
        self.retry_at().is_some_and(|until| until <= now)
    }

    /// Begins to accept, or begins again.
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

    /// A connection was closed: there is room for another.
    pub(super) fn closed(&mut self, peer: Option<Peer>, epoll: &Epoll) {
        if let Some(Peer { uid, .. }) = peer
            && let Some(count) = self.per_uid.get_mut(&uid)
        {
            *count -= 1;
            if *count == 0 {
                self.per_uid.remove(&uid);
            }
        }
        if self.state != Accepting::Yes
            && let Err(e) = self.resume(epoll)
        {
            error!("cannot accept any more: {}", Reason(&e));
        }
    }

    /// Counts a connection of this user. False: that user has as many as may be.
    fn admit(&mut self, peer: Option<Peer>) -> bool {
        let Some(Peer { uid, .. }) = peer else { return true };
        let count = self.per_uid.entry(uid).or_insert(0);
        if self.per_uid_max.is_some_and(|max| *count >= max) {
            return false;
        }
        *count += 1;
        true
    }

    fn warns_again(&mut self, now: Millis) -> bool {
        let quiet = self.warned_last.is_some_and(|last| now < last.plus(millis(WARNING_EVERY)));
        if !quiet {
            self.warned_last = Some(now);
        }
        !quiet
    }
}

impl Server {
    pub(super) fn accept(&mut self, index: usize, buffer: &mut [u8]) -> io::Result<()> {
        for _ in 0..ACCEPTS_MAX {
            if self.acceptor.state != Accepting::Yes {
                break;
            }
            if self.connections.len() >= self.acceptor.connections_max {
                return self.acceptor.pause(Accepting::Full, &self.epoll);
            }
            match self.acceptor.listeners[index].accept() {
                Ok(fd) => self.register(index, fd, buffer),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if listener::is_per_connection_error(&e) => debug!("accept: {}", Reason(&e)),
                Err(e) => {
                    if self.acceptor.warns_again(self.now) {
                        warn!("cannot accept: {}; trying again when there is room", Reason(&e));
                    }
                    let until = self.now.plus(millis(RETRY));
                    return self.acceptor.pause(Accepting::Refused(until), &self.epoll);
                }
            }
        }
        Ok(())
    }

    fn register(&mut self, index: usize, fd: OwnedFd, buffer: &mut [u8]) {
        let is_unix = self.acceptor.listeners[index].is_unix();
        let peer = if is_unix { addr::peer(&fd).ok() } else { None };
        if !self.acceptor.admit(peer) {
            if self.acceptor.warns_again(self.now) {
                warn!("refused a connection: uid {} has too many", peer.map_or(0, |peer| peer.uid));
            }
            return;
        }
        // 0 is not for connections, nor is the highest bit. Two thousand million connections later a number may come
        // again.
        self.acceptor.generation = self.acceptor.generation % (u32::MAX / 2) + 1;
        let generation = self.acceptor.generation;
        let client = self.add_connection(Connection::new(fd, peer, generation));
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Connection(client, generation).pack());
        if let Err(e) = self.epoll.add(&self.connections[client.0 as usize], event) {
            warn!("cannot watch a connection: {e}");
            return self.close_after_flush(client, "it cannot be watched");
        }
        debug!("connect: {} on {}", self.name(client), self.acceptor.listeners[index].name());
        // Most clients have sent their request by now, and need not wait for another turn.
        self.read(client, buffer);
    }
}

/// Raises the limit of open files as far as it goes, and returns it.
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
