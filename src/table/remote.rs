//! Locks that other hosts have too. Nothing is granted here before the caller says that this host has won the lock from
//! the others ([`Table::cluster_granted`]); what the others hold is in the table as a hold without a client, so that those who wait
//! for it are told of its end like those who wait for a hold of this host.
//!
//! A request for a lock that nobody holds here is *undecided* until an answer to a question that was asked after the
//! request came ([`ArrivalMark`]). An older answer will not do: the lock may be free by now, and whoever asked would be told
//! that it lost a race that never was. Behind a hold of this host, this host's own word is enough.
//!
//! This knows neither who the others are nor how they are asked: see `cluster.rs`.

use std::collections::BTreeMap;

use super::list::{Links, List};
use super::{
    ArrivalMark, ClusterNotice, Effects, JournalEntry, Loss, NotificationKind, Request, RequestId,
    RequestView, Stage, Table, Terms, Timestamp, WaitList,
};
use crate::proto::v2::Mode;
use crate::proto::{LockId, Outcome, Token};

/// What is known of the other hosts, and who waits for word of them; by the index of the lock.
#[derive(Default)]
pub(super) struct RemoteLocks(BTreeMap<u32, RemoteLock>);

#[derive(Default)]
struct RemoteLock {
    /// The hold of another host.
    holder: Option<RequestId>,
    /// In order of arrival.
    undecided: List,
}

/// What the requests for a lock need of the other hosts. Nothing, as long as it is held here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterNeeds {
    /// Somebody waits for their queue_place: this host needs a place in the line of hosts.
    pub queue_place: bool,
    /// Somebody waits to hear whether the lock is free.
    pub free_or_busy: bool,
    /// Somebody would take the place of a holder that has vanished.
    pub takeover: bool,
}

impl ClusterNeeds {
    /// True when nobody here needs anything.
    pub fn is_nothing(self) -> bool {
        self == ClusterNeeds::default()
    }
}

impl Table {
    /// What those who ask for a lock here need of the other hosts.
    pub fn cluster_needs(&self, lock: LockId) -> ClusterNeeds {
        let Some(index) = self.index_of(lock) else { return ClusterNeeds::default() };
        let lock = &self.locks[index];
        let remote = self.remote(index as u32);
        let holder = self.remote_holder(index as u32);
        if lock.holders.head() != holder {
            return ClusterNeeds::default();
        }
        let queues = |id: RequestId| {
            self.requests[id.index()].asked().is_some_and(|asked| asked.mode == Mode::Queue && !asked.nowait)
        };
        let undecided = remote.map(|remote| remote.undecided).unwrap_or_default();
        ClusterNeeds {
            queue_place: !lock.queue.is_empty() || undecided.iter(&self.requests).any(queues),
            free_or_busy: !undecided.is_empty(),
            takeover: holder.is_none() && !lock.once_waiters.is_empty(),
        }
    }

    /// The token under which a lock is held here, by this host.
    pub fn held_here(&self, lock: LockId) -> Option<Token> {
        let index = self.index_of(lock)?;
        let holder = self.locks[index].holders.head()?;
        (self.remote_holder(index as u32) != Some(holder)).then(|| Token(self.requests[holder.index()].order))
    }

    /// Who would have the lock if this host won it now: the oldest of those who ask for it.
    pub fn first_in_line(&self, lock: LockId) -> Option<RequestView<'_>> {
        let view = self.find(lock)?;
        Some(view.request(self.first(self.index_of(lock)?)?))
    }

    /// A mark behind all requests that have come.
    pub fn mark(&self) -> ArrivalMark {
        ArrivalMark(self.next_arrival)
    }

    /// This host has won a lock that nobody holds: the oldest of those who ask has it, under this token. False: nobody
    /// asks any more.
    pub fn cluster_granted(
        &mut self,
        now: Timestamp,
        lock: LockId,
        token: Token,
        effects: &mut Effects,
    ) -> bool {
        let Some(index) = self.index_of(lock) else { return false };
        debug_assert!(self.locks[index].holders.is_empty(), "what is won is free");
        let Some(first) = self.first(index) else { return false };
        match self.requests[first.index()].stage {
            Stage::Undecided => self.unlink_undecided(first),
            _ => self.leave_line(first),
        }
        self.grant_as(now, first, token.0, effects);
        // Whoever else asks is beaten by one who is beside them, whenever they came.
        self.decide(index, ArrivalMark(u64::MAX), effects);
        true
    }

    /// Another host holds a lock, under this token. Those who asked before `mark` need not be told anything newer. Nothing
    /// happens if nobody here asks for it.
    pub fn remote_hold_seen(
        &mut self,
        now: Timestamp,
        lock: LockId,
        token: Token,
        mark: ArrivalMark,
        effects: &mut Effects,
    ) {
        let Some(index) = self.index_of(lock) else { return };
        let known = self.remote_holder(index as u32);
        debug_assert_eq!(self.locks[index].holders.head(), known, "two hosts do not hold a lock");
        if known.is_none() {
            let id = self.insert_request(Request {
                client: None,
                lock: index as u32,
                links: Links::default(),
                stage: Stage::Holding,
                line: WaitList::Queue,
                terms: Terms { protocol: 2, ..Terms::V1 },
                order: token.0,
                since: now,
                deadline: Timestamp::NEVER,
                details: None,
            });
            let lock = &mut self.locks[index];
            lock.holding += 1;
            lock.holders.push_back(&mut self.requests, id);
            self.remote_mut(index as u32).holder = Some(id);
        }
        self.decide(index, mark, effects);
        self.remove_if_deserted(index as u32);
    }

    /// The hold of another host has ended so. Nothing happens if none is known of.
    pub fn remote_hold_ended(
        &mut self,
        now: Timestamp,
        lock: LockId,
        outcome: Outcome,
        effects: &mut Effects,
    ) {
        if let Some(index) = self.index_of(lock)
            && let Some(id) = self.remote_mut(index as u32).holder.take()
        {
            self.end_hold_unrecorded(now, id, outcome, effects);
        }
    }

    /// The other hosts could not be asked: whoever asked before `mark` and does not want to wait is told so.
    pub fn unavailable(&mut self, lock: LockId, mark: ArrivalMark, effects: &mut Effects) {
        let Some(index) = self.index_of(lock) else { return };
        for id in self.undecided_before(index, mark) {
            if self.requests[id.index()].asked().is_some_and(|asked| asked.nowait) {
                self.unlink_undecided(id);
                self.notify(id, NotificationKind::Unavailable, effects);
                self.remove_request(id);
                effects.notices.push(ClusterNotice::Needs(lock));
            }
        }
        self.remove_if_deserted(index as u32);
    }

    /// A lock that is held here is this host's no more. Its place among the hosts is not for this host to give up: the
    /// holder may need the time that is left of it to stop.
    pub fn revoke(&mut self, now: Timestamp, lock: LockId, effects: &mut Effects) {
        if self.held_here(lock).is_some()
            && let Some(index) = self.index_of(lock)
            && let Some(id) = self.locks[index].holders.head()
        {
            self.notify(id, NotificationKind::Lost(Loss::LeaseLost), effects);
            effects.record.push(JournalEntry::Ended(Token(self.requests[id.index()].order)));
            effects.notices.push(ClusterNotice::Needs(lock));
            self.end_hold_unrecorded(now, id, Outcome::Vanished, effects);
        }
    }

    /// True when a request for this lock cannot be decided here.
    pub(super) fn needs_cluster(&self, id: RequestId) -> bool {
        let index = self.requests[id.index()].lock;
        self.remote_locks.is_some() && self.locks[index as usize].holders.head() == self.remote_holder(index)
    }

    /// Keeps a request until there is word of the other hosts.
    pub(super) fn query_cluster(&mut self, id: RequestId, effects: &mut Effects) {
        let index = self.requests[id.index()].lock;
        self.requests[id.index()].stage = Stage::Undecided;
        let mut undecided = self.remote_mut(index).undecided;
        undecided.insert_by_order(&mut self.requests, id);
        self.remote_mut(index).undecided = undecided;
        effects.notices.push(ClusterNotice::Needs(self.locks[index as usize].id));
    }

    pub(super) fn wait_or_query(&mut self, id: RequestId, effects: &mut Effects) {
        if self.needs_cluster(id) {
            self.query_cluster(id, effects);
        } else {
            self.wait(id, effects);
        }
    }

    pub(super) fn unlink_undecided(&mut self, id: RequestId) {
        let index = self.requests[id.index()].lock;
        let mut undecided = self.remote_mut(index).undecided;
        undecided.unlink(&mut self.requests, id);
        self.remote_mut(index).undecided = undecided;
    }

    /// The hold of another host, if there is one.
    pub(super) fn remote_holder(&self, index: u32) -> Option<RequestId> {
        self.remote(index)?.holder
    }

    /// Those of a lock who are undecided.
    pub(super) fn undecided(&self, index: u32) -> List {
        self.remote(index).map(|remote| remote.undecided).unwrap_or_default()
    }

    /// Somebody has left a lock.
    pub(super) fn request_left(&mut self, index: u32, effects: &mut Effects) {
        if self.remote_locks.is_some() {
            effects.notices.push(ClusterNotice::Needs(self.locks[index as usize].id));
        }
        self.remove_if_deserted(index);
    }

    /// A lock goes with the last who asks for it here. What another host holds is no reason to keep it.
    fn remove_if_deserted(&mut self, index: u32) {
        if self.locks[index as usize].requests == 1
            && let Some(id) = self.remote_holder(index)
        {
            self.remote_mut(index).holder = None;
            let lock = &mut self.locks[index as usize];
            lock.holding -= 1;
            lock.holders.unlink(&mut self.requests, id);
            self.remove_request(id);
        }
        self.remove_if_unused(index);
    }

    /// Forgets what was known of a lock that goes.
    pub(super) fn forget_remote(&mut self, index: u32) {
        if let Some(remote_locks) = &mut self.remote_locks {
            remote_locks.0.remove(&index);
        }
    }

    /// The lock is held: those of the undecided who asked before `mark` wait for its end, or go.
    fn decide(&mut self, index: usize, mark: ArrivalMark, effects: &mut Effects) {
        for id in self.undecided_before(index, mark) {
            self.unlink_undecided(id);
            self.wait_or_refuse(id, effects);
        }
    }

    fn undecided_before(&self, index: usize, mark: ArrivalMark) -> Vec<RequestId> {
        let undecided = self.undecided(index as u32);
        undecided.iter(&self.requests).filter(|id| self.requests[id.index()].order < mark.0).collect()
    }

    /// The oldest of all who would take the lock.
    fn first(&self, index: usize) -> Option<RequestId> {
        let lock = &self.locks[index];
        let heads = [self.undecided(index as u32).head(), lock.queue.head(), lock.once_waiters.head()];
        heads.into_iter().flatten().min_by_key(|id| self.requests[id.index()].order)
    }

    fn remote(&self, index: u32) -> Option<&RemoteLock> {
        self.remote_locks.as_ref()?.0.get(&index)
    }

    fn remote_mut(&mut self, index: u32) -> &mut RemoteLock {
        self.remote_locks.as_mut().expect("only where there are other hosts").0.entry(index).or_default()
    }
}
