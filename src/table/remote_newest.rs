//! Requests for clustered locks of which only the newest of all hosts goes on waiting, and which can replace a holder of any host.
//!
//! etcd has the order of these requests, and a request is *ranked* when it is part of that. Before that it neither waits nor
//! holds: it is undecided, also behind a holder of this host. This file does not know what other hosts have: the caller says
//! which requests are ranked, and which give way.

use super::{ArrivalMark, Effects, LockIndex, NotificationKind, RequestId, RequestView, Stage, Table};
use crate::proto::LockId;

/// The user who may replace every holder, on every host.
const ROOT: u32 = 0;

impl ArrivalMark {
    /// Returns the mark behind the request with this place.
    pub fn behind(place: u64) -> ArrivalMark {
        ArrivalMark(place.saturating_add(1))
    }
}

impl Table {
    /// Returns the place of the newest request of a lock that is not ranked.
    pub fn unranked(&self, lock: LockId) -> Option<u64> {
        self.unranked_of(self.store.find(lock)?)
    }

    pub(super) fn unranked_of(&self, index: LockIndex) -> Option<u64> {
        let unranked = self.newest_requests(index).filter(|&id| self.is_unranked(id));
        unranked.map(|id| self.store[id].place).max()
    }

    /// Returns the place of the ranked request that waits for its turn.
    pub fn newest_waiter(&self, lock: LockId) -> Option<u64> {
        let waiter = self.store[self.store.find(lock)?].extra().newest?;
        (!self.is_unranked(waiter)).then(|| self.store[waiter].place)
    }

    /// Returns `true` if one of these requests, which does not hold yet, has this place.
    pub fn has_newest_at(&self, lock: LockId, place: u64) -> bool {
        let index = self.store.find(lock);
        index.is_some_and(|index| self.newest_requests(index).any(|id| self.store[id].place == place))
    }

    /// The requests that came before `mark` are ranked, and no others.
    pub fn set_ranked(&mut self, lock: LockId, mark: ArrivalMark) {
        if let Some(index) = self.store.find(lock)
            && self.store[index].extra().ranked != mark
        {
            self.store[index].extra_mut().ranked = mark;
        }
    }

    /// Returns a mark behind the requests that kept their places from an earlier daemon.
    pub fn first_mark(&self) -> ArrivalMark {
        ArrivalMark(self.first_arrival)
    }

    /// Another host has a newer request than these, which came before `mark`: they are superseded.
    pub fn supersede_before(&mut self, lock: LockId, mark: ArrivalMark, effects: &mut Effects) {
        let Some(index) = self.store.find(lock) else { return };
        let older: Vec<RequestId> =
            self.newest_requests(index).filter(|&id| self.store[id].place < mark.0).collect();
        for &id in &older {
            self.notify(id, NotificationKind::NewerRequest, effects);
            self.remove_request(id);
        }
        if !older.is_empty() {
            self.request_left(index, effects);
        }
    }

    /// Returns the request that waits, or will, for its turn in place of the holders, and its place.
    pub fn replacer(&self, lock: LockId) -> Option<(RequestView<'_>, u64)> {
        let index = self.store.find(lock)?;
        let is_waiting = |id: &RequestId| self.store[*id].stage != Stage::Stalled;
        let newest = self.newest_requests(index).filter(is_waiting).max_by_key(|&id| self.store[id].place)?;
        let request = self.view(index).request(newest);
        let replaces = request.asked.is_some_and(|asked| asked.replace_after_ms.is_some());
        replaces.then_some((request, self.store[newest].place))
    }

    /// A waiting request of another host replaces the holders of this host, and has given them its time: the ones of the same
    /// user are asked to stop; those of all users, if it is root's. `None`: there is no such request.
    pub fn replaced_for(&mut self, lock: LockId, user: Option<u32>, effects: &mut Effects) {
        let Some(index) = self.store.find(lock) else { return };
        if self.store[index].extra().replaced_for != user {
            self.store[index].extra_mut().replaced_for = user;
            self.stop_replaced(index, effects);
        }
    }

    pub(super) fn stop_replaced(&self, index: LockIndex, effects: &mut Effects) {
        let Some(user) = self.store[index].extra().replaced_for else { return };
        self.stop_holders_if(index, |holder| user == ROOT || holder.uid() == Some(user), effects);
    }

    /// Returns the requests that are undecided, and the one that waits.
    fn newest_requests(&self, index: LockIndex) -> impl Iterator<Item = RequestId> + '_ {
        let lock = &self.store[index];
        let undecided = self.store.members(lock.extra().undecided).filter(|&id| self.is_newest(id));
        undecided.chain(lock.extra().newest)
    }

    fn is_newest(&self, id: RequestId) -> bool {
        self.store[id].asked().is_some_and(|asked| asked.newest && !asked.nowait)
    }

    /// Returns `true` if etcd must rank a request before it waits or holds.
    pub(super) fn is_unranked(&self, id: RequestId) -> bool {
        self.is_clustered
            && self.store[id].place >= self.store[self.store[id].lock].extra().ranked.0
            && self.is_newest(id)
    }
}
