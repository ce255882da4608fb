//! What must hold of the table's own insides, whatever has happened to it.

use super::super::list::List;
use super::super::{ClientId, RequestId, Stage, Table, Timestamp, WaitList};

impl Table {
    /// Panics when the table's parts contradict each other.
    pub(crate) fn audit(&self) {
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
        let lines = [
            (lock.v1_waiters, WaitList::V1),
            (lock.once_waiters, WaitList::Once),
            (lock.queue, WaitList::Queue),
        ];
        let lines = lines.map(|(line, kind)| {
            let ids = self.audit_list(line, Stage::Waiting);
            let order = |id: &RequestId| self.requests[id.index()].order;
            assert!(ids.is_sorted_by_key(order), "a line is not in the order of arrival");
            let its = |id: &RequestId| self.requests[id.index()].line;
            assert!(ids.iter().all(|id| its(id) == kind), "a request waits in the wrong line");
            ids
        });
        let undecided = self.audit_list(self.undecided(index as u32), Stage::Undecided);
        let all = holders.iter().chain(lines.iter().flatten()).chain(&undecided);
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
            assert_eq!(
                self.requests[id.index()].client,
                Some(ClientId(client as u32)),
                "a client has another's request"
            );
            count += 1;
        }
        let elsewhere = self.locks.iter().filter(|(index, _)| self.remote_holder(*index as u32).is_some());
        let others = self.orphans.len() + elsewhere.count();
        assert_eq!(count + others, self.requests.len(), "a request has no client");
    }

    fn audit_deadlines(&self) {
        let limited = |(_, request): &(usize, &super::super::Request)| {
            request.stage == Stage::Holding && request.deadline != Timestamp::NEVER
        };
        let mut count = 0;
        for (index, request) in self.requests.iter().filter(limited) {
            assert!(
                self.deadlines.contains(&(request.deadline, RequestId::new(index))),
                "a hold has no deadline"
            );
            count += 1;
        }
        assert_eq!(count, self.deadlines.len(), "a deadline outlives its hold");
    }

    fn lock_of(&self, id: RequestId) -> usize {
        self.requests[id.index()].lock as usize
    }
}
