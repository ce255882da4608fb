//! A read-only view of the table: for status answers, and to tell a waiter who holds the lock.

use super::{ClientId, HoldState, Lock, LockIndex, RequestId, Store, Table, Terms, Timestamp, WaitList};
use crate::proto::v2::{LISTED_MAX, LockRequest};
use crate::proto::{LockId, Token};

/// A lock that is held or awaited.
#[derive(Clone, Copy)]
pub struct LockView<'a> {
    lock: &'a Lock,
    store: &'a Store,
}

/// A holder or a waiter.
pub struct RequestView<'a> {
    /// The client. `None`: the holder has not resumed since a restart of the daemon, or it is another host's.
    pub client: Option<ClientId>,
    /// The client's uid, if it speaks protocol 2 over a Unix socket.
    pub uid: Option<u32>,
    /// When the lock was granted or, before that, requested.
    pub since: Timestamp,
    /// The request of a protocol 2 client, unless it has not resumed.
    pub asked: Option<&'a LockRequest>,
    /// The hold, for a holder.
    pub held: Option<HoldState>,
    /// The terms of the request.
    pub terms: Terms,
    /// The hold is another host's.
    pub is_remote: bool,
}

impl Table {
    /// Returns the lock with this identity, if there is one.
    pub fn find(&self, id: LockId) -> Option<LockView<'_>> {
        Some(self.view(self.store.find(id)?))
    }

    /// Returns the first lock at `cursor` or behind it, and the cursor of the one after it. Begin with 0. A lock that comes
    /// or goes between two calls may be seen or not; one that stays is seen once.
    pub fn next_lock(&self, cursor: usize) -> Option<(LockView<'_>, usize)> {
        let index = self.store.next_lock(cursor)?;
        Some((self.view(index), index.get() + 1))
    }

    /// Returns the request of a client, if it has one, and the lock that it is for.
    pub fn request_of(&self, client: ClientId) -> Option<(LockView<'_>, RequestView<'_>)> {
        let id = self.store.request_of(client)?;
        let view = self.view(self.store[id].lock);
        Some((view, view.request(id)))
    }

    /// Returns what a client holds, if it holds a lock, and since when it has held it.
    pub fn hold_of(&self, client: ClientId) -> Option<(HoldState, Timestamp)> {
        let request = &self.store[self.store.request_of(client)?];
        Some((request.hold(self.store[request.lock].id)?, request.since))
    }

    /// Returns the client that holds a lock under this token, if it is connected.
    pub fn holder_of(&self, token: Token) -> Option<ClientId> {
        self.store[self.holders.get(token)?].client()
    }

    pub(super) fn view(&self, index: LockIndex) -> LockView<'_> {
        LockView { lock: &self.store[index], store: &self.store }
    }
}

impl<'a> LockView<'a> {
    /// Returns the lock's identity.
    pub fn id(&self) -> LockId {
        self.lock.id
    }

    /// Returns the lock's key, if one of its holders or waiters stated it. (Protocol 1 sends only a hash of it.)
    pub fn key(&self) -> Option<&'a str> {
        // The first of a list knows the key, unless it speaks protocol 1 (then its whole list does) or has not resumed yet.
        let lists = [
            self.lock.holders,
            self.lock.extra().once_waiters,
            self.lock.extra().queue,
            self.lock.extra().coalescing,
            self.lock.extra().undecided,
            self.lock.extra().stalled,
        ];
        let first = lists.into_iter().flat_map(|list| self.store.members(list).take(LISTED_MAX));
        first.filter_map(|id| self.store[id].asked()).map(|asked| asked.key.as_str()).next()
    }

    /// Returns the number of holders.
    pub fn holding(&self) -> u32 {
        self.lock.holding
    }

    /// Returns the number of waiters.
    pub fn waiting(&self) -> u32 {
        self.lock.requests - self.lock.holding
    }

    /// Returns the holders, the oldest first.
    pub fn holders(&self) -> impl Iterator<Item = RequestView<'a>> {
        let this = *self;
        let is_holder = |id: &RequestId| this.store.token_of(*id).is_some();
        self.store.members(self.lock.holders).filter(is_holder).map(move |id| this.request(id))
    }

    /// Returns the waiters: the requests that the lock is offered to, then the queue, then the coalescing waiters, then the
    /// once waiters, then the protocol 1 waiters, then the requests that wait for an answer of etcd, then the waiters that
    /// have not answered an offer; in each the oldest first.
    pub fn waiters(&self) -> impl Iterator<Item = RequestView<'a>> {
        let (store, this) = (self.store, *self);
        let waiters = [WaitList::Queue, WaitList::Coalesce, WaitList::Once, WaitList::V1]
            .map(|list| self.lock.waiters(list));
        let lists = waiters.into_iter().chain([self.lock.extra().undecided, self.lock.extra().stalled]);
        let offered = store.members(self.lock.holders).filter(|&id| store.token_of(id).is_none());
        offered.chain(lists.flat_map(move |list| store.members(list))).map(move |id| this.request(id))
    }

    pub(super) fn request(&self, id: RequestId) -> RequestView<'a> {
        let request = &self.store[id];
        RequestView {
            client: request.client(),
            uid: request.uid(),
            since: request.since,
            asked: request.asked(),
            held: request.hold(self.lock.id),
            terms: request.terms,
            is_remote: self.lock.extra().remote_holder == Some(id),
        }
    }
}
