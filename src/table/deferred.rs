//! Deferred requests: they are decided only when every event that came before them is in the table.

use super::request::RequestId;
use super::{ArrivalMark, Effects, NotificationKind, Table, Timestamp};

impl Table {
    /// Returns a mark behind all requests that are deferred now, for [`Table::settle`], or `None` if there are none.
    pub fn deferred(&self) -> Option<ArrivalMark> {
        self.store.first_deferred().map(|_| self.mark())
    }

    /// Decides the deferred requests that came before `mark`, in order of arrival: every event that came before the mark is
    /// in the table.
    pub fn settle(&mut self, now: Timestamp, mark: ArrivalMark, effects: &mut Effects) {
        while self.settle_next(now, mark, effects) {}
    }

    /// Decides one of the requests that [`Table::settle`] would decide. Returns `false` if there is none.
    pub fn settle_next(&mut self, now: Timestamp, mark: ArrivalMark, effects: &mut Effects) -> bool {
        let first = self.store.first_deferred().filter(|&id| self.store[id].place < mark.0);
        let Some(id) = first else { return false };
        let lock = self.store[id].lock;
        if self.finish_if_fresh(now, id, effects) {
            self.request_left(lock, effects);
        } else if self.admits(id) {
            self.grant(now, id, effects);
        } else if self.needs_cluster(id) {
            self.query_cluster(id, effects);
        } else {
            self.wait_or_refuse(now, id, effects);
        }
        true
    }

    /// Lets a request wait, or refuses it if it came with `nowait`.
    pub(super) fn wait_or_refuse(&mut self, now: Timestamp, id: RequestId, effects: &mut Effects) {
        if self.finish_if_stale(now, id, effects) {
            return;
        }
        if self.store[id].asked().is_some_and(|asked| asked.nowait) {
            self.notify(id, NotificationKind::Busy, effects);
            self.remove_request(id);
        } else {
            self.wait(now, id, effects);
        }
    }
}
