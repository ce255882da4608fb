//! Requests of which the newest wins: an older one that waits is superseded, and the holder can be asked to stop.
//!
//! The holder keeps the lock until it has stopped: a newer command never starts beside an older one.

use std::time::Duration;

use super::{Effects, LockIndex, NotificationKind, Request, RequestId, Stage, Table, Timestamp};
use crate::proto::{LockId, Protocol};

impl Table {
    /// A newest request is about to wait: the one that waits already is superseded.
    pub(super) fn supersede(&mut self, id: RequestId, effects: &mut Effects) {
        if !self.store[id].asked().is_some_and(|asked| asked.newest) {
            return;
        }
        let lock = self.store[id].lock;
        if let Some(older) = self.store[lock].extra_mut().newest.replace(id).filter(|&older| older != id) {
            self.notify(older, NotificationKind::NewerRequest, effects);
            self.remove_request(older);
        }
    }

    /// A newest request is about to wait at a place that it kept: it gives way if a newer one waits already. Returns `false` if
    /// it does not.
    pub(super) fn gives_way(&mut self, id: RequestId, effects: &mut Effects) -> bool {
        let request = &self.store[id];
        let is_newer = |other: RequestId| self.store[other].place > request.place;
        let gives_way = request.asked().is_some_and(|asked| asked.newest)
            && self.store[request.lock].extra().newest.is_some_and(is_newer);
        if gives_way {
            self.notify(id, NotificationKind::NewerRequest, effects);
            self.remove_request(id);
        }
        gives_way
    }

    /// A newest request is about to be granted: an older one, which has let it pass, is superseded.
    pub(super) fn supersede_stalled(&mut self, id: RequestId, effects: &mut Effects) {
        let older = self.store[self.store[id].lock].extra().newest;
        if older.is_some_and(|older| self.store[older].place < self.store[id].place) {
            self.supersede(id, effects);
        }
    }

    /// A request waits that replaces the holder after some time: that time begins.
    pub(super) fn begin_replacing(&mut self, now: Timestamp, id: RequestId, effects: &mut Effects) {
        let request = &self.store[id];
        let Some(after) = request.asked().and_then(|asked| asked.replace_after_ms) else { return };
        let at = request.since.plus(Duration::from_millis(after));
        if at <= now {
            return self.stop_holders(self.store[id].lock, effects);
        }
        self.store[id].deadline = at;
        self.deadlines.insert((at, id));
    }

    /// The time of the holder is over, which a waiting request gave it.
    pub(super) fn replace_now(&mut self, id: RequestId, effects: &mut Effects) {
        self.clear_deadline(id);
        self.stop_holders(self.store[id].lock, effects);
    }

    /// A holder is back: asks it again to stop, if the newest request has waited long enough.
    pub(super) fn stop_if_due(&mut self, lock: LockIndex, effects: &mut Effects) {
        let is_due = |id: RequestId| {
            let request = &self.store[id];
            let replaces = request.asked().is_some_and(|asked| asked.replace_after_ms.is_some());
            replaces && request.stage == Stage::Waiting && request.deadline == Timestamp::NEVER
        };
        if self.store[lock].extra().newest.is_some_and(is_due) {
            self.stop_holders(lock, effects);
        } else {
            self.stop_replaced(lock, effects);
        }
    }

    fn stop_holders(&self, lock: LockIndex, effects: &mut Effects) {
        self.stop_holders_if(lock, |_| true, effects);
    }

    pub(super) fn stop_holders_if(
        &self,
        lock: LockIndex,
        is_meant: impl Fn(&Request) -> bool,
        effects: &mut Effects,
    ) {
        for holder in self.store.members(self.store[lock].holders) {
            let request = &self.store[holder];
            let may_be_stopped = request.asked().is_some_and(|asked| !asked.no_replace);
            if request.token().is_some() && may_be_stopped && is_meant(request) {
                self.notify(holder, NotificationKind::Stop, effects);
            }
        }
    }

    /// Returns `true` if the user `uid` may stop the holders of a lock: each of them is that user's, or cannot be stopped
    /// anyway.
    pub fn may_replace(&self, lock: LockId, uid: Option<u32>) -> bool {
        let Some(index) = self.store.find(lock) else { return true };
        let lock = &self.store[index];
        self.store.members(lock.holders).all(|holder| {
            let request = &self.store[holder];
            let its = request.details.as_ref().and_then(|details| details.uid);
            let is_remote = lock.extra().remote_holder == Some(holder);
            is_remote || request.terms.protocol == Protocol::V1 || (uid.is_some() && its == uid)
        })
    }
}
