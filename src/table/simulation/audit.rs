//! What must hold of the table's own insides, whatever has happened to it.

use super::super::list::List;
use super::super::{Millis, RequestId, Stage, Table};
use crate::proto::v2::Mode;

impl Table {
    /// Panics when the table's parts contradict each other.
    pub(super) fn audit(&self) {
        assert_eq!(self.by_id.len(), self.locks.len(), "every lock is found by its identity, once");
        let mut listed = self.audit_list(self.deferred, Stage::Deferred).len();
        let mut deferred = vec![0; self.locks.capacity()];
        self.deferred.iter(&self.requests).for_each(|id| deferred[self.lock_of(id)] += 1);
        for (index, _) in &self.locks {
            listed += self.audit_lock(index, deferred[index]);
        }
        assert_eq!(listed, self.requests.len(), "every request is in one list");
        self.audit_clients();
        self.audit_deadlines();
    }

    fn audit_lock(&self, index: usize, deferred: usize) -> usize {
        let lock = &self.locks[index];
        let found = self.by_id.find(lock.hash, |&other| other as usize == index);
        assert!(found.is_some(), "a lock is not found by its identity");
        let holders = self.audit_list(lock.holders, Stage::Holding);
        let lines =
            [(lock.v1_waiters, None), (lock.once_waiters, Some(Mode::Once)), (lock.queue, Some(Mode::Queue))];
        let lines = lines.map(|(line, mode)| {
            let ids = self.audit_list(line, Stage::Waiting);
            let order = |id: &RequestId| self.requests[id.index()].order;
            assert!(ids.is_sorted_by_key(order), "a line is not in the order of arrival");
            let asked = |id: &RequestId| self.requests[id.index()].asked.as_ref().map(|asked| asked.mode);
            assert!(ids.iter().all(|id| asked(id) == mode), "a request waits in the wrong line");
            ids
        });
        let all = holders.iter().chain(lines.iter().flatten());
        assert!(all.clone().all(|&id| self.lock_of(id) == index), "a request is listed by another's lock");
        assert_eq!(lock.holding as usize, holders.len(), "the count of holders is wrong");
        assert_eq!(lock.queued as usize, lines[2].len(), "the count of the queue is wrong");
        let listed = all.count();
        assert_eq!(lock.requests as usize, listed + deferred, "the count of requests is wrong");
        assert!(lock.requests > 0, "a lock exists, and no request for it does");
        listed
    }

    fn audit_list(&self, list: List, stage: Stage) -> Vec<RequestId> {
        let ids = list.audit(&self.requests);
        assert!(
            ids.iter().all(|id| self.requests[id.index()].stage == stage),
            "a list holds another's request"
        );
        ids
    }

    fn audit_clients(&self) {
        let known = self.request_of.iter().enumerate().filter_map(|(client, id)| Some((client, (*id)?)));
        let mut count = 0;
        for (client, id) in known {
            assert_eq!(self.requests[id.index()].client.0 as usize, client, "a client has another's request");
            count += 1;
        }
        assert_eq!(count, self.requests.len(), "a request has no client");
    }

    fn audit_deadlines(&self) {
        let limited = |(_, request): &(usize, &super::super::Request)| {
            request.stage == Stage::Holding && request.asked.is_none() && self.hold_limit.is_some()
        };
        let mut count = 0;
        for (index, request) in self.requests.iter().filter(limited) {
            let deadline = Millis(request.since.0 + self.hold_limit.unwrap_or_default().0);
            assert!(self.deadlines.contains(&(deadline, RequestId::new(index))), "a hold has no deadline");
            count += 1;
        }
        assert_eq!(count, self.deadlines.len(), "a deadline outlives its hold");
    }

    fn lock_of(&self, id: RequestId) -> usize {
        self.requests[id.index()].lock as usize
    }
}
