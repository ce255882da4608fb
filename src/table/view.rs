//! Looking at the table: for status answers, and for telling a waiter who holds the lock.

use std::hash::BuildHasher;

use slab::Slab;

use super::{ClientId, Lock, Millis, Request, RequestId, Table};
use crate::proto::v2::LockRequest;
use crate::proto::{LockId, Token};

/// A lock that somebody holds or waits for.
#[derive(Clone, Copy)]
pub struct LockView<'a> {
    lock: &'a Lock,
    requests: &'a Slab<Request>,
}

/// A holder or a waiter.
pub struct RequestView<'a> {
    /// Who it is.
    pub client: ClientId,
    /// When it was granted the lock, or asked for it.
    pub since: Millis,
    /// Of a holder: the token of its grant.
    pub token: Option<Token>,
    /// What a protocol 2 client asked. `None`: it speaks protocol 1.
    pub asked: Option<&'a LockRequest>,
}

impl Table {
    /// The lock with this identity, if there is one.
    pub fn find(&self, id: LockId) -> Option<LockView<'_>> {
        let hash = self.hasher.hash_one(id.0);
        let index = self.by_id.find(hash, |&index| self.locks[index as usize].id == id)?;
        Some(self.view(*index as usize))
    }

    /// The first lock at `cursor` or behind it, and the cursor of the one after it. Begin with 0. Locks that come or go
    /// between two calls may be seen or not; one that stays is seen once.
    pub fn next_lock(&self, cursor: usize) -> Option<(LockView<'_>, usize)> {
        // A slab has few gaps, and its capacity bounds the walk.
        let index = (cursor..self.locks.capacity()).find(|&index| self.locks.contains(index))?;
        Some((self.view(index), index + 1))
    }

    /// The request of a client, if it has one, and the lock that it is for.
    pub fn request_of(&self, client: ClientId) -> Option<(LockView<'_>, RequestView<'_>)> {
        let id = self.request(client)?;
        let view = self.view(self.requests[id.index()].lock as usize);
        let request = view.request(id, None);
        Some((view, request))
    }

    fn view(&self, index: usize) -> LockView<'_> {
        LockView { lock: &self.locks[index], requests: &self.requests }
    }
}

impl<'a> LockView<'a> {
    /// The lock's identity.
    pub fn id(&self) -> LockId {
        self.lock.id
    }

    /// The lock's key, when one of its holders or waiters has told it.
    pub fn key(&self) -> Option<&'a str> {
        // Each of these lines is of one protocol: one of protocol 1 that holds is alone.
        let heads = [self.lock.holders, self.lock.once_waiters, self.lock.queue].map(|line| line.head());
        let mut asked = heads.into_iter().flatten().filter_map(|id| self.requests[id.index()].asked.as_ref());
        asked.next().map(|asked| asked.key.as_str())
    }

    /// How many hold it.
    pub fn holding(&self) -> u32 {
        self.lock.holding
    }

    /// How many wait for it.
    pub fn waiting(&self) -> u32 {
        self.lock.requests - self.lock.holding
    }

    /// Those who hold it, the oldest first.
    pub fn holders(&self) -> impl Iterator<Item = RequestView<'a>> {
        let (requests, this) = (self.requests, *self);
        self.lock.holders.iter(requests).map(move |id| {
            let token = Token(requests[id.index()].order);
            this.request(id, Some(token))
        })
    }

    /// Those who wait: the queue, then the once waiters, then those of protocol 1; in each the oldest first.
    pub fn waiters(&self) -> impl Iterator<Item = RequestView<'a>> {
        let (requests, this) = (self.requests, *self);
        let lines = [self.lock.queue, self.lock.once_waiters, self.lock.v1_waiters];
        lines.into_iter().flat_map(move |line| line.iter(requests)).map(move |id| this.request(id, None))
    }

    fn request(&self, id: RequestId, token: Option<Token>) -> RequestView<'a> {
        let request = &self.requests[id.index()];
        RequestView { client: request.client, since: request.since, token, asked: request.asked.as_deref() }
    }
}
