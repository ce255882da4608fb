//! Looking at the table: for status answers, and for telling a waiter who holds the lock.

use std::hash::BuildHasher;

use slab::Slab;

use super::list::List;
use super::{ClientId, HoldState, Lock, Request, RequestId, Stage, Table, Terms, Timestamp};
use crate::proto::v2::{LISTED_MAX, LockRequest};
use crate::proto::{LockId, Token};

/// A lock that somebody holds or waits for.
#[derive(Clone, Copy)]
pub struct LockView<'a> {
    lock: &'a Lock,
    requests: &'a Slab<Request>,
    /// Those of whom it is not decided yet whether they have to wait.
    undecided: List,
    /// The hold of another host.
    remote: Option<RequestId>,
}

/// A holder or a waiter.
pub struct RequestView<'a> {
    /// Who it is. `None`: it was not heard of since a restart of the daemon, or is another host's.
    pub client: Option<ClientId>,
    /// Whose client it is, if it speaks protocol 2 and that is known.
    pub uid: Option<u32>,
    /// When it was granted the lock, or asked for it.
    pub since: Timestamp,
    /// What a protocol 2 client asked, if it has.
    pub asked: Option<&'a LockRequest>,
    /// Of a holder: the hold.
    pub held: Option<HoldState>,
    /// On what terms it holds or waits.
    pub terms: Terms,
    /// It is the hold of another host.
    pub is_remote: bool,
}

impl Table {
    /// The lock with this identity, if there is one.
    pub fn find(&self, id: LockId) -> Option<LockView<'_>> {
        Some(self.view(self.index_of(id)?))
    }

    pub(super) fn index_of(&self, id: LockId) -> Option<usize> {
        let hash = self.hasher.hash_one(id.0);
        self.by_id.find(hash, |&index| self.locks[index as usize].id == id).map(|&index| index as usize)
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
        Some((view, view.request(id)))
    }

    fn view(&self, index: usize) -> LockView<'_> {
        let (undecided, remote) = (self.undecided(index as u32), self.remote_holder(index as u32));
        LockView { lock: &self.locks[index], requests: &self.requests, undecided, remote }
    }
}

impl<'a> LockView<'a> {
    /// The lock's identity.
    pub fn id(&self) -> LockId {
        self.lock.id
    }

    /// The lock's key, when one of its holders or waiters has told it.
    pub fn key(&self) -> Option<&'a str> {
        // The first of a line knows it, unless it is of protocol 1 (then all of its line are) or has not resumed yet.
        let lines = [self.lock.holders, self.lock.once_waiters, self.lock.queue, self.undecided];
        let first = lines.into_iter().flat_map(|line| line.iter(self.requests).take(LISTED_MAX));
        first.filter_map(|id| self.requests[id.index()].asked()).map(|asked| asked.key.as_str()).next()
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
        let this = *self;
        self.lock.holders.iter(self.requests).map(move |id| this.request(id))
    }

    /// Those who wait: the queue, then the once waiters, then those of protocol 1, then those of whom the other hosts have
    /// not said whether they have to; in each the oldest first.
    pub fn waiters(&self) -> impl Iterator<Item = RequestView<'a>> {
        let (requests, this) = (self.requests, *self);
        let lines = [self.lock.queue, self.lock.once_waiters, self.lock.v1_waiters, self.undecided];
        lines.into_iter().flat_map(move |line| line.iter(requests)).map(move |id| this.request(id))
    }

    pub(super) fn request(&self, id: RequestId) -> RequestView<'a> {
        let request = &self.requests[id.index()];
        let details = request.details.as_deref();
        let uid = details.and_then(|details| details.uid);
        let held = (request.stage == Stage::Holding).then(|| HoldState {
            lock: self.lock.id,
            token: Token(request.order),
            terms: request.terms,
            nonce: details.and_then(|details| details.nonce),
            uid,
            until: (request.deadline != Timestamp::NEVER).then_some(request.deadline),
        });
        RequestView {
            client: request.client,
            uid,
            since: request.since,
            asked: request.asked(),
            held,
            terms: request.terms,
            is_remote: self.remote == Some(id),
        }
    }
}
