//! The end of a hold: which waiters are told that it is over, and which requests hold next.

use super::offers::UNDRAWN;
use super::request::{LockIndex, RequestId, WaitList};
use super::{
    ArrivalMark, ClientId, ClusterNotice, Effects, JournalEntry, NotificationKind, Table, Timestamp,
};
use crate::proto::{Outcome, Protocol, Token};

impl Table {
    /// A client that holds a lock releases it. Nothing happens if it holds none.
    pub fn release(&mut self, now: Timestamp, client: ClientId, outcome: Outcome, effects: &mut Effects) {
        if let Some(id) = self.store.request_of(client)
            && self.store.token_of(id).is_some()
        {
            self.end_hold(now, id, outcome, effects);
        }
    }

    pub(super) fn end_hold(
        &mut self,
        now: Timestamp,
        id: RequestId,
        outcome: Outcome,
        effects: &mut Effects,
    ) {
        let request = &self.store[id];
        let token = request.token().expect("only a holder's hold ends");
        effects.record.push(JournalEntry::Ended(token));
        if self.is_clustered {
            effects.notices.push(ClusterNotice::Ended(self.store[request.lock].id, token, outcome));
        }
        self.end_hold_unrecorded(now, id, outcome, effects);
    }

    pub(super) fn end_hold_unrecorded(
        &mut self,
        now: Timestamp,
        id: RequestId,
        outcome: Outcome,
        effects: &mut Effects,
    ) {
        let request = &self.store[id];
        let token = request.token().expect("only a holder's hold ends");
        let (lock, began, protocol) = (request.lock, request.began, request.terms.protocol);
        // Another host records its runs itself.
        if self.store[lock].take_remote_holder(id).is_none() {
            self.remember(now, id, outcome, effects);
        }
        if self.store[id].client().is_none() {
            self.orphans.remove(&token);
        }
        if protocol == Protocol::V2 {
            self.holders.remove(token);
        }
        self.remove_request(id);
        debug_assert!(!self.orphans.contains_key(&token), "an ended hold leaves nothing behind");
        if !self.store[lock].is_plain() {
            self.finish_and_admit(now, lock, began, outcome, token, effects);
        }
        debug_assert!(!self.has_idle_queue(lock), "the head of a queue waits for a free lock");
        self.store.remove_if_unused(lock);
    }

    /// A hold is over: tells the waiters that it is the work of, and admits the next ones.
    fn finish_and_admit(
        &mut self,
        now: Timestamp,
        lock: LockIndex,
        began: ArrivalMark,
        outcome: Outcome,
        token: Token,
        effects: &mut Effects,
    ) {
        self.finish_waiters(lock, WaitList::V1, outcome, token, effects);
        if outcome == Outcome::Vanished {
            self.promote_oldest_waiter(now, lock, effects);
        } else {
            self.finish_waiters(lock, WaitList::Once, outcome, token, effects);
            self.finish_batch(lock, began, outcome, token, effects);
            self.finish_stalled(lock, began, outcome, token, effects);
            self.finish_fresh_waiters(now, lock, effects);
        }
        self.admit_queue(now, lock, effects);
    }

    /// After the end of a hold: the head of the queue waits although the lock is free.
    fn has_idle_queue(&self, lock: LockIndex) -> bool {
        let lock = &self.store[lock];
        !self.is_clustered
            && lock.holders.is_empty()
            && !(lock.extra().queue.is_empty() && lock.extra().coalescing.is_empty())
    }

    /// Tells every waiter of a line that the holder finished, and removes it.
    pub(super) fn finish_waiters(
        &mut self,
        lock: LockIndex,
        list: WaitList,
        outcome: Outcome,
        token: Token,
        effects: &mut Effects,
    ) {
        while let Some(id) = self.store[lock].waiters(list).head() {
            self.notify(id, NotificationKind::Finished(outcome, token), effects);
            self.remove_request(id);
        }
    }

    /// A run is over: tells the coalescing waiters that came before it began.
    fn finish_batch(
        &mut self,
        lock: LockIndex,
        began: ArrivalMark,
        outcome: Outcome,
        token: Token,
        effects: &mut Effects,
    ) {
        while let Some(id) = self.store[lock].extra().coalescing.head()
            && self.store[id].place < began.0
        {
            self.notify(id, NotificationKind::Finished(outcome, token), effects);
            self.remove_request(id);
        }
    }

    /// A holder vanished: the oldest protocol 2 waiter takes its place; of coalescing waiters the newest.
    pub(super) fn promote_oldest_waiter(&mut self, now: Timestamp, lock: LockIndex, effects: &mut Effects) {
        while !self.is_clustered
            && let Some(next) = self.next_of(lock, &[WaitList::Once, WaitList::Queue, WaitList::Coalesce])
            && self.holders_admit(&self.store[lock], &self.store[next])
        {
            if !self.finish_if_fresh(now, next, effects) {
                return self.grant_or_offer(now, next, UNDRAWN, effects);
            }
        }
    }

    /// Returns the request that is next among some lines of a lock: the oldest, or, where that coalesces, the newest of the
    /// coalescing requests, whose arguments are current.
    fn next_of(&self, lock: LockIndex, lists: &[WaitList]) -> Option<RequestId> {
        let lock = &self.store[lock];
        let heads = lists.iter().filter_map(|&list| lock.waiters(list).head());
        let oldest = heads.min_by_key(|&id| self.store[id].place)?;
        match self.store[oldest].wait_list {
            WaitList::Coalesce => lock.extra().coalescing.tail(),
            _ => Some(oldest),
        }
    }

    /// Grants or offers the lock to as many waiting requests as the holders admit: from the head of the queue, and the newest of the
    /// coalescing ones.
    pub(super) fn admit_queue(&mut self, now: Timestamp, lock: LockIndex, effects: &mut Effects) {
        while !self.is_clustered
            && let Some(id) = self.next_of(lock, &[WaitList::Queue, WaitList::Coalesce])
            && self.holders_admit(&self.store[lock], &self.store[id])
        {
            if !self.finish_if_fresh(now, id, effects) {
                self.grant_or_offer(now, id, UNDRAWN, effects);
            }
        }
    }
}
