//! Clustered locks, which other hosts can hold too. The table grants nothing here before the caller says that etcd has
//! granted the lock to this host ([`Table::cluster_granted`]). What another host holds is in the table as a hold without a
//! client, so that its waiters learn of its end like the waiters of a hold of this host.
//!
//! A request for a lock that is not held here is *undecided* until an answer of etcd that was requested after the request
//! came ([`ArrivalMark`]). An older answer will not do: the lock may be free by now, and the client would lose a race that
//! never was. Behind a hold of this host, the table decides by itself.
//!
//! This file knows neither the other hosts nor etcd: see `cluster.rs`.

use super::request::Links;
use super::{
    ArrivalMark, ClusterNotice, Effects, JournalEntry, LockIndex, Loss, NotificationKind, Request, RequestId,
    RequestView, Stage, Table, Terms, Timestamp, WaitList,
};
use crate::proto::v2::Mode;
use crate::proto::{LockId, Outcome, Protocol, Token};

/// What the requests for a lock need of etcd: nothing while the lock is held here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterNeeds {
    /// A request waits for its turn: this host needs a place in the lock's queue of hosts.
    pub queue_place: bool,
    /// A request waits to learn whether the lock is free.
    pub free_or_busy: bool,
    /// One of these would be content with a run that is over.
    pub fresh: bool,
    /// A once waiter would take the place of a holder that has vanished.
    pub takeover: bool,
}

impl ClusterNeeds {
    /// Returns `true` if no request needs anything.
    pub fn is_nothing(self) -> bool {
        self == ClusterNeeds::default()
    }
}

impl Table {
    /// Returns what the requests for a lock need of etcd.
    pub fn cluster_needs(&self, lock: LockId) -> ClusterNeeds {
        let Some(index) = self.store.find(lock) else { return ClusterNeeds::default() };
        let lock = &self.store[index];
        if lock.holders.head() != lock.remote_holder {
            return ClusterNeeds::default();
        }
        let is_queued = |id: RequestId| {
            self.store[id].asked().is_some_and(|asked| asked.mode != Mode::Once && !asked.nowait)
        };
        ClusterNeeds {
            queue_place: !lock.queue.is_empty()
                || self.has_next_batch(index)
                || self.store.members(lock.undecided).any(is_queued),
            free_or_busy: !lock.undecided.is_empty(),
            fresh: !lock.undecided.is_empty() && (lock.fresh_ms > 0 || lock.fresh_failure_ms > 0),
            takeover: lock.remote_holder.is_none() && !lock.once_waiters.is_empty(),
        }
    }

    /// Returns `true` if a coalescing request waits for a run that has not begun.
    fn has_next_batch(&self, index: LockIndex) -> bool {
        let lock = &self.store[index];
        let began = lock.remote_holder.map_or(ArrivalMark::NONE, |holder| self.store[holder].began);
        lock.coalescing.tail().is_some_and(|newest| self.store[newest].place >= began.0)
    }

    /// Returns `true` if a grant to this host would be the run of a batch, and any other host's batch would do as well.
    pub fn is_batch_next(&self, lock: LockId) -> bool {
        let Some(index) = self.store.find(lock) else { return false };
        let lock = &self.store[index];
        let is_coalescing = |id: RequestId| self.store[id].wait_list == WaitList::Coalesce;
        lock.queue.is_empty()
            && lock.undecided.is_empty()
            && self.oldest_request(index).is_some_and(is_coalescing)
    }

    /// Returns the token under which this host holds a lock, or offers it to a waiter.
    pub fn held_here(&self, lock: LockId) -> Option<Token> {
        let lock = &self.store[self.store.find(lock)?];
        let holder = lock.holders.head().filter(|&holder| lock.remote_holder != Some(holder))?;
        match self.store[holder].stage {
            Stage::Holding(token) => Some(token),
            Stage::Offered(token) => Some(token).filter(|_| self.is_clustered),
            _ => None,
        }
    }

    /// Returns the request that would get the lock if etcd granted it to this host now: the oldest.
    pub fn first_in_line(&self, lock: LockId) -> Option<RequestView<'_>> {
        let index = self.store.find(lock)?;
        Some(self.view(index).request(self.oldest_request(index)?))
    }

    /// Returns a mark behind all requests that have come.
    pub fn mark(&self) -> ArrivalMark {
        ArrivalMark(self.next_arrival)
    }

    /// Etcd has granted a free lock to this host: the oldest request gets it, under this token. Returns `false` if no
    /// request is left.
    pub fn cluster_granted(
        &mut self,
        now: Timestamp,
        lock: LockId,
        token: Token,
        effects: &mut Effects,
    ) -> bool {
        let Some(index) = self.store.find(lock) else { return false };
        debug_assert!(self.store[index].holders.is_empty(), "etcd grants a lock that is free");
        let mut oldest = self.oldest_request(index);
        while let Some(id) = oldest
            && self.finish_if_fresh(now, id, effects)
        {
            oldest = self.oldest_request(index);
        }
        let Some(oldest) = oldest else {
            self.store.remove_if_unused(index);
            return false;
        };
        self.grant_or_offer(now, oldest, token, effects);
        // The remaining requests lose to this grant, regardless of arrival order.
        self.decide(now, index, ArrivalMark(u64::MAX), effects);
        true
    }

    /// Another host holds a lock, under this token, as of an answer that was requested at `mark`. The requests that came before
    /// `began` came before that hold began. Nothing happens if no request of this host is for the lock.
    pub fn remote_hold_seen(
        &mut self,
        now: Timestamp,
        lock: LockId,
        token: Token,
        (mark, began): (ArrivalMark, ArrivalMark),
        effects: &mut Effects,
    ) {
        let Some(index) = self.store.find(lock) else { return };
        let known = self.store[index].remote_holder;
        debug_assert_eq!(self.store[index].holders.head(), known, "two hosts do not hold a lock");
        if let Some(id) = known {
            // An answer may show that more requests came before it began.
            self.store[id].began = self.store[id].began.max(began);
        } else {
            let id = self.store.insert(Request {
                client: None,
                lock: index,
                links: Links::default(),
                stage: Stage::Holding(token),
                wait_list: WaitList::Queue,
                terms: Terms { protocol: Protocol::V2, ..Terms::V1 },
                place: 0,
                since: now,
                began,
                deadline: Timestamp::NEVER,
                details: None,
            });
            self.store[index].remote_holder = Some(id);
        }
        self.decide(now, index, mark, effects);
        self.remove_if_deserted(index);
    }

    /// The hold of another host has ended with this outcome. Nothing happens if the table knows of none.
    pub fn remote_hold_ended(
        &mut self,
        now: Timestamp,
        lock: LockId,
        outcome: Outcome,
        effects: &mut Effects,
    ) {
        if let Some(index) = self.store.find(lock)
            && let Some(id) = self.store[index].remote_holder
        {
            self.end_hold_unrecorded(now, id, outcome, effects);
        }
    }

    /// Etcd cannot be reached: the requests that came before `mark` and do not wait learn that.
    pub fn unavailable(&mut self, lock: LockId, mark: ArrivalMark, effects: &mut Effects) {
        let Some(index) = self.store.find(lock) else { return };
        for id in self.undecided_before(index, mark) {
            if self.store[id].asked().is_some_and(|asked| asked.nowait) {
                self.notify(id, NotificationKind::Unavailable, effects);
                self.remove_request(id);
                effects.notices.push(ClusterNotice::Needs(lock));
            }
        }
        self.remove_if_deserted(index);
    }

    /// This host has lost a lock that is held here. Its place in etcd stays: the holder may need the time that is left of
    /// the lease to stop.
    pub fn revoke(&mut self, now: Timestamp, lock: LockId, effects: &mut Effects) {
        if let Some(token) = self.held_here(lock)
            && let Some(index) = self.store.find(lock)
            && let Some(id) = self.store[index].holders.head()
        {
            if let Stage::Offered(_) = self.store[id].stage {
                return self.withdraw_offer(now, id, effects);
            }
            self.notify(id, NotificationKind::Lost(Loss::LeaseLost), effects);
            effects.record.push(JournalEntry::Ended(token));
            effects.notices.push(ClusterNotice::Needs(lock));
            self.end_hold_unrecorded(now, id, Outcome::Vanished, effects);
        }
    }

    /// Returns `true` if only etcd can decide a request.
    pub(super) fn needs_cluster(&self, id: RequestId) -> bool {
        let lock = &self.store[self.store[id].lock];
        self.is_clustered && lock.holders.head() == lock.remote_holder
    }

    /// Keeps a request until etcd has answered.
    pub(super) fn query_cluster(&mut self, id: RequestId, effects: &mut Effects) {
        self.store.move_to(id, Stage::Undecided);
        effects.notices.push(ClusterNotice::Needs(self.store[self.store[id].lock].id));
    }

    pub(super) fn wait_or_query(&mut self, now: Timestamp, id: RequestId, effects: &mut Effects) {
        if self.needs_cluster(id) {
            self.query_cluster(id, effects);
        } else {
            self.wait(now, id, effects);
        }
    }

    /// A request for a lock has been removed without a hold.
    pub(super) fn request_left(&mut self, index: LockIndex, effects: &mut Effects) {
        if self.is_clustered {
            effects.notices.push(ClusterNotice::Needs(self.store[index].id));
        }
        self.remove_if_deserted(index);
    }

    /// A lock goes with the last request of this host; the hold of another host is no reason to keep it.
    fn remove_if_deserted(&mut self, index: LockIndex) {
        if self.store[index].requests == 1
            && let Some(id) = self.store[index].remote_holder.take()
        {
            self.remove_request(id);
        }
        self.store.remove_if_unused(index);
    }

    /// The lock is held: the undecided requests that came before `mark` wait for its end, or are refused.
    fn decide(&mut self, now: Timestamp, index: LockIndex, mark: ArrivalMark, effects: &mut Effects) {
        for id in self.undecided_before(index, mark) {
            if !self.finish_if_fresh(now, id, effects) {
                self.wait_or_refuse(now, id, effects);
            }
        }
    }

    fn undecided_before(&self, index: LockIndex, mark: ArrivalMark) -> Vec<RequestId> {
        let undecided = self.store.members(self.store[index].undecided);
        undecided.filter(|&id| self.store[id].place < mark.0).collect()
    }

    fn oldest_request(&self, index: LockIndex) -> Option<RequestId> {
        let lock = &self.store[index];
        let lists = [lock.undecided, lock.queue, lock.once_waiters, lock.coalescing];
        let heads = lists.iter().filter_map(|list| list.head());
        let oldest = heads.min_by_key(|&id| self.store[id].place)?;
        let is_coalescing =
            self.store[oldest].wait_list == WaitList::Coalesce && self.store[oldest].stage == Stage::Waiting;
        if is_coalescing { lock.coalescing.tail() } else { Some(oldest) }
    }
}
