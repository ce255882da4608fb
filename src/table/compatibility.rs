//! Which requests may hold a lock beside each other: what its holders admit, and on how many slots requests must agree.

use super::lock::Lock;
use super::request::{Request, RequestId, Stage};
use super::{Effects, NotificationKind, Table};

impl Table {
    /// Decides on admission, alone: a request is admitted if no queued request comes before it and the holders admit it.
    pub(super) fn admits(&self, id: RequestId) -> bool {
        if self.is_clustered {
            // Etcd decides: see `Table::cluster_granted`.
            return false;
        }
        let request = &self.store[id];
        let lock = &self.store[request.lock];
        // Coalescing requests never overtake each other: a newcomer waits with them for the next run.
        (lock.extra().queue.is_empty() || lock.extra().queue.head() == Some(id))
            && (lock.extra().coalescing.is_empty() || lock.extra().coalescing.tail() == Some(id))
            && self.holders_admit(lock, request)
    }

    pub(super) fn holders_admit(&self, lock: &Lock, request: &Request) -> bool {
        // One holder stands for all: either all are shared or none is, and an exclusive holder is alone.
        let Some(holder) = lock.holders.head() else { return true };
        let holder = &self.store[holder].terms;
        if holder.shared || request.terms.shared {
            return holder.shared && request.terms.shared;
        }
        holder.slots > 1
            && lock.weight_held + u64::from(request.terms.weight_or_one()) <= u64::from(request.terms.slots)
    }

    /// Before a grant: the request does not hold already, and the present holders admit it. (An offer is a place among them.)
    pub(super) fn may_join_holders(&self, id: RequestId) -> bool {
        let request = &self.store[id];
        matches!(request.stage, Stage::Offered(_))
            || (request.token().is_none()
                && (self.is_clustered || self.holders_admit(&self.store[request.lock], request)))
    }

    /// Before a wait: there is a holder, or a queued request comes first.
    pub(super) fn must_wait(&self, id: RequestId) -> bool {
        let lock = &self.store[self.store[id].lock];
        !lock.holders.is_empty() || !lock.extra().queue.is_empty() || !lock.extra().coalescing.is_empty()
    }

    /// Refuses a request with a weight if another request with a weight for the same lock says another number of slots: the
    /// two would not mean the same thing. Returns `false` if this is no such request.
    pub(super) fn refuse_if_slots_differ(&mut self, id: RequestId, effects: &mut Effects) -> bool {
        let request = &self.store[id];
        let slots = request.terms.slots;
        if !self.must_agree(id) {
            return false;
        }
        let lock = &self.store[request.lock];
        let lists = [
            lock.holders,
            lock.extra().queue,
            lock.extra().once_waiters,
            lock.extra().undecided,
            lock.extra().stalled,
        ];
        let mut requests = lists.into_iter().flat_map(|list| self.store.members(list));
        let other = requests.find(|&other| other != id && self.must_agree(other));
        let differs = other.is_some_and(|other| self.store[other].terms.slots != slots);
        if let Some(other) = other.filter(|_| differs) {
            let slots = self.store[other].terms.slots;
            self.notify(
                id,
                NotificationKind::SlotsDiffer { slots, other: self.store[other].client() },
                effects,
            );
        }
        differs
    }

    /// Returns `true` if a request must say the same number of slots as the others: where a weight counts, and among hosts.
    fn must_agree(&self, id: RequestId) -> bool {
        let terms = &self.store[id].terms;
        terms.weight.is_some() || (self.is_clustered && terms.slots > 1 && !terms.shared)
    }
}
