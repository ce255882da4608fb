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
    ArrivalMark, ClusterNotice, Effects, JournalEntry, Lock, LockIndex, Loss, NotificationKind, Request,
    RequestId, RequestView, Sharing, Stage, Table, Terms, Timestamp, UNDRAWN, Verdict, WaitList,
};
use crate::proto::v2::Mode;
use crate::proto::{LockId, Outcome, Protocol, Token};

/// What the requests for a lock need of etcd: hardly anything while the lock is held here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterNeeds {
    /// A request waits for its turn: this host needs a place in the lock's queue of hosts.
    pub queue_place: bool,
    /// A request waits to learn whether the lock is free.
    pub free_or_busy: bool,
    /// One of these would be content with a run that is over.
    pub fresh: bool,
    /// Etcd must rank a request among the newest of all hosts before it waits or holds.
    pub rank: bool,
    /// A once waiter would take the place of a holder that has vanished.
    pub takeover: bool,
    /// A protocol 1 waiter waits for the end of a hold, and the table knows of none: its host has given up the place that
    /// was in its way.
    pub holder: bool,
}

impl ClusterNeeds {
    /// Returns `true` if no request needs anything.
    pub fn is_nothing(self) -> bool {
        self == ClusterNeeds::default()
    }
}

/// The line of a lock among the hosts, as the table is told of it.
pub struct SeenLine<'a> {
    /// The first hold, if it is not this host's, and the mark of the requests that came before it began.
    pub other: Option<(Token, Sharing, ArrivalMark)>,
    /// What was read since then: the requests that came before it can be decided.
    pub mark: ArrivalMark,
    /// What the line means for a request that joins it now.
    pub verdict: &'a dyn Fn(Sharing) -> Verdict,
}

impl Table {
    /// Returns what the requests for a lock need of etcd.
    pub fn cluster_needs(&self, lock: LockId) -> ClusterNeeds {
        let Some(index) = self.store.find(lock) else { return ClusterNeeds::default() };
        let lock = &self.store[index];
        let own = self.own_holder(lock);
        let rank = self.unranked_of(index).is_some();
        if own.is_some_and(|own| Sharing::from(&self.store[own].terms) == Sharing::Exclusive) {
            let free_or_busy = !lock.extra().undecided.is_empty();
            return ClusterNeeds { rank, free_or_busy, ..ClusterNeeds::default() };
        }
        let is_queued = |id: RequestId| self.is_queued(id) && !self.is_unranked(id);
        ClusterNeeds {
            rank,
            queue_place: self.store.members(lock.extra().queue).any(is_queued)
                || self.has_next_batch(index)
                || self.store.members(lock.extra().undecided).any(is_queued),
            free_or_busy: !lock.extra().undecided.is_empty(),
            fresh: !lock.extra().undecided.is_empty()
                && (lock.extra().fresh_ms > 0 || lock.extra().fresh_failure_ms > 0),
            takeover: lock.holders.is_empty() && !lock.extra().once_waiters.is_empty(),
            holder: lock.holders.is_empty() && !lock.waiters(WaitList::V1).is_empty(),
        }
    }

    /// Returns `true` if a coalescing request waits for a run that has not begun.
    fn has_next_batch(&self, index: LockIndex) -> bool {
        let lock = &self.store[index];
        let began = lock.extra().remote_holder.map_or(ArrivalMark::NONE, |holder| self.store[holder].began);
        lock.extra().coalescing.tail().is_some_and(|newest| self.store[newest].place >= began.0)
    }

    /// Returns `true` if a grant to this host would be the run of a batch, and any other host's batch would do as well.
    pub fn is_batch_next(&self, lock: LockId) -> bool {
        let Some(index) = self.store.find(lock) else { return false };
        let lock = &self.store[index];
        let is_coalescing = |id: RequestId| self.store[id].wait_list == WaitList::Coalesce;
        lock.extra().queue.is_empty()
            && lock.extra().undecided.is_empty()
            && self.oldest_request(index, Sharing::Exclusive).is_some_and(is_coalescing)
    }

    /// Returns `true` if an undecided request will wait for its turn.
    fn is_queued(&self, id: RequestId) -> bool {
        self.store[id].asked().is_some_and(|asked| asked.mode != Mode::Once && !asked.nowait)
    }

    /// Returns the first holder, or request that the lock is offered to, of this host.
    fn own_holder(&self, lock: &Lock) -> Option<RequestId> {
        self.store.members(lock.holders).find(|&id| lock.extra().remote_holder != Some(id))
    }

    /// Returns the tokens under which this host holds a lock, or offers it to waiters.
    pub fn held_here(&self, lock: LockId) -> impl Iterator<Item = Token> + '_ {
        let lock = self.store.find(lock).map(|index| &self.store[index]);
        let (list, remote) = lock.map(|lock| (lock.holders, lock.extra().remote_holder)).unwrap_or_default();
        let holders = self.store.members(list).filter(move |id| remote != Some(*id));
        holders.filter_map(|holder| match self.store[holder].stage {
            Stage::Holding(token) => Some(token),
            Stage::Offered(token) => Some(token).filter(|_| self.is_clustered),
            _ => None,
        })
    }

    /// Returns `true` if this host holds a lock, or offers it to a waiter.
    pub fn is_held_here(&self, lock: LockId) -> bool {
        self.held_here(lock).next().is_some()
    }

    /// Returns the request that needs a place in the line of hosts first.
    pub fn first_in_line(&self, lock: LockId) -> Option<RequestView<'_>> {
        let index = self.store.find(lock)?;
        let lock = &self.store[index];
        // A place that is made for an unranked request would be of no use for the others.
        let is_ranked = |id: &RequestId| !self.is_unranked(*id);
        let undecided = || self.store.members(lock.extra().undecided).filter(is_ranked);
        let queued = undecided().find(|&id| self.is_queued(id));
        let in_queue = self.store.members(lock.extra().queue).find(is_ranked);
        let queued = [in_queue, lock.extra().coalescing.tail(), queued].into_iter().flatten();
        let by_place = |id: &RequestId| self.store[*id].place;
        let first = queued.min_by_key(by_place).or_else(|| undecided().next());
        let first = first
            .or(lock.extra().once_waiters.head())
            .or(lock.extra().undecided.head())
            .or(lock.extra().queue.head())?;
        Some(self.view(index).request(first))
    }

    /// Returns `true` if a request for a lock waits that shares it so.
    pub fn awaits_turn(&self, lock: LockId, sharing: Sharing) -> bool {
        self.store.find(lock).is_some_and(|index| self.oldest_request(index, sharing).is_some())
    }

    /// Returns a mark behind all requests that have come.
    pub fn mark(&self) -> ArrivalMark {
        ArrivalMark(self.next_arrival)
    }

    /// Etcd has granted a place among the holders to this host: the oldest request that shares the lock so gets it, under
    /// this token. Returns `false` if no request is left.
    pub fn cluster_granted(
        &mut self,
        now: Timestamp,
        lock: LockId,
        (token, sharing): (Token, Sharing),
        effects: &mut Effects,
    ) -> bool {
        let Some(index) = self.store.find(lock) else { return false };
        let mut oldest = self.oldest_request(index, sharing);
        while let Some(id) = oldest
            && self.finish_if_fresh(now, id, effects)
        {
            oldest = self.oldest_request(index, sharing);
        }
        let Some(oldest) = oldest else {
            self.store.remove_if_unused(index);
            return false;
        };
        self.grant_or_offer(now, oldest, token, effects);
        if sharing == Sharing::Exclusive {
            // The remaining requests lose to this grant, regardless of arrival order.
            self.decide(now, index, ArrivalMark(u64::MAX), &|_| Verdict::Excluded, effects);
        }
        effects.notices.push(ClusterNotice::Needs(lock));
        true
    }

    /// The place of this host that waits says another number of slots than one before it, which says `slots`: refuses the
    /// requests that say the same.
    pub fn refuse_slots(&mut self, lock: LockId, sharing: Sharing, slots: u32, effects: &mut Effects) {
        let Some(index) = self.store.find(lock) else { return };
        while let Some(id) = self.oldest_request(index, sharing) {
            self.notify(id, NotificationKind::SlotsDiffer { slots, other: None }, effects);
            self.remove_request(id);
        }
        self.request_left(index, effects);
    }

    /// No place in the line of a lock is taken: there is no hold whose end its protocol 1 waiters could wait for.
    pub fn free_seen(&mut self, lock: LockId, effects: &mut Effects) {
        if let Some(index) = self.store.find(lock)
            && self.store[index].holders.is_empty()
        {
            // They ask again, and are not told a token.
            self.finish_waiters(index, WaitList::V1, Outcome::Vanished, UNDRAWN, effects);
            self.store.remove_if_unused(index);
        }
    }

    /// The line of a lock is known. Nothing happens if no request of this host is for the lock.
    pub fn line_seen(&mut self, now: Timestamp, lock: LockId, line: &SeenLine<'_>, effects: &mut Effects) {
        let Some(index) = self.store.find(lock) else { return };
        if let (Some((_, _, began)), Some(id)) = (line.other, self.store[index].extra().remote_holder) {
            // An answer may show that more requests came before it began.
            self.store[id].began = self.store[id].began.max(began);
        } else if let Some((token, sharing, began)) = line.other {
            let id = self.store.insert(Request {
                owner: None,
                lock: index,
                links: Links::default(),
                stage: Stage::Holding(token),
                wait_list: WaitList::Queue,
                terms: terms_of(sharing),
                place: 0,
                since: now,
                began,
                deadline: Timestamp::NEVER,
                details: None,
            });
            self.store[index].extra_mut().remote_holder = Some(id);
        }
        self.decide(now, index, line.mark, line.verdict, effects);
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
            && let Some(id) = self.store[index].extra().remote_holder
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

    /// This host has lost a lock that is held here, under this token. Its place in etcd stays: the holder may need the time
    /// that is left of the lease to stop.
    pub fn revoke(&mut self, now: Timestamp, lock: LockId, token: Token, effects: &mut Effects) {
        let Some(index) = self.store.find(lock) else { return };
        let list = self.store[index].holders;
        let has_token = |id: &RequestId| matches!(self.store[*id].stage, Stage::Holding(its) | Stage::Offered(its) if its == token);
        let Some(id) = self.store.members(list).find(has_token) else { return };
        if let Stage::Offered(_) = self.store[id].stage {
            return self.withdraw_offer(now, id, effects);
        }
        self.notify(id, NotificationKind::Lost(Loss::LeaseLost), effects);
        effects.record.push(JournalEntry::Ended(token));
        effects.notices.push(ClusterNotice::Needs(lock));
        self.end_hold_unrecorded(now, id, Outcome::Vanished, effects);
    }

    /// Returns `true` if only etcd can decide a request.
    pub(super) fn needs_cluster(&self, id: RequestId) -> bool {
        let own = self.own_holder(&self.store[self.store[id].lock]);
        let excludes = |own: RequestId| Sharing::from(&self.store[own].terms) == Sharing::Exclusive;
        self.is_clustered && (!own.is_some_and(excludes) || self.is_unranked(id))
    }

    /// Keeps a request until etcd has answered.
    pub(super) fn query_cluster(&mut self, id: RequestId, effects: &mut Effects) {
        self.store.move_to(id, Stage::Undecided);
        effects.notices.push(ClusterNotice::Needs(self.store[self.store[id].lock].id));
    }

    pub(super) fn wait_or_query(&mut self, now: Timestamp, id: RequestId, effects: &mut Effects) {
        if !self.needs_cluster(id) {
            self.wait(now, id, effects);
        } else if self.is_unranked(id) && self.refuse_if_cyclic(id, effects) {
            // Requests of other hosts would have given way to it.
            let lock = self.store[id].lock;
            self.remove_request(id);
            self.request_left(lock, effects);
        } else {
            self.query_cluster(id, effects);
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
            && let Some(id) = self.store[index].extra().remote_holder
        {
            self.store[index].take_remote_holder(id);
            self.remove_request(id);
        }
        self.store.remove_if_unused(index);
    }

    /// The undecided requests that came before `mark` and are not admitted wait for the end of a hold, or are refused. The
    /// others need a place in the line.
    fn decide(
        &mut self,
        now: Timestamp,
        index: LockIndex,
        mark: ArrivalMark,
        verdict: &dyn Fn(Sharing) -> Verdict,
        effects: &mut Effects,
    ) {
        for id in self.undecided_before(index, mark) {
            match verdict(Sharing::from(&self.store[id].terms)) {
                Verdict::Admitted => {}
                Verdict::Differs(slots) => {
                    self.notify(id, NotificationKind::SlotsDiffer { slots, other: None }, effects);
                    self.remove_request(id);
                }
                Verdict::Excluded => {
                    if !self.finish_if_fresh(now, id, effects) {
                        self.wait_or_refuse(now, id, effects);
                    }
                }
            }
        }
    }

    fn undecided_before(&self, index: LockIndex, mark: ArrivalMark) -> Vec<RequestId> {
        let undecided = self.store.members(self.store[index].extra().undecided);
        undecided.filter(|&id| self.store[id].place < mark.0 && !self.is_unranked(id)).collect()
    }

    /// Returns the oldest request that shares the lock so and does not hold it.
    fn oldest_request(&self, index: LockIndex, sharing: Sharing) -> Option<RequestId> {
        let lock = &self.store[index];
        let is_such =
            |id: &RequestId| Sharing::from(&self.store[*id].terms) == sharing && !self.is_unranked(*id);
        let lists =
            [lock.extra().undecided, lock.extra().queue, lock.extra().once_waiters, lock.extra().coalescing];
        let firsts = lists.into_iter().filter_map(|list| self.store.members(list).find(is_such));
        let oldest = firsts.min_by_key(|&id| self.store[id].place)?;
        let is_coalescing =
            self.store[oldest].wait_list == WaitList::Coalesce && self.store[oldest].stage == Stage::Waiting;
        if is_coalescing { lock.extra().coalescing.tail() } else { Some(oldest) }
    }
}

fn terms_of(sharing: Sharing) -> Terms {
    let terms = Terms { protocol: Protocol::V2, ..Terms::V1 };
    match sharing {
        Sharing::Exclusive => terms,
        Sharing::Shared => Terms { shared: true, ..terms },
        Sharing::Slots { slots, .. } => Terms { slots, ..terms },
    }
}
