//! A lock: its holders, and the lists of its waiters.

use super::ArrivalMark;
use super::list::List;
use super::request::{RequestId, WaitList};
use crate::proto::LockId;

/// A lock that is held or awaited.
pub(super) struct Lock {
    pub(super) id: LockId,
    pub(super) hash: u64,
    /// The holders, and the requests that the lock is offered to.
    pub(super) holders: List,
    /// The requests that wait for an answer of etcd.
    pub(super) undecided: List,
    v1_waiters: List,
    pub(super) once_waiters: List,
    pub(super) queue: List,
    pub(super) coalescing: List,
    /// The waiters that have not answered an offer.
    pub(super) stalled: List,
    /// The request that waits of those of which only the newest does.
    pub(super) newest: Option<RequestId>,
    /// Of a clustered lock: which of these requests etcd has in the order of those of all hosts.
    pub(super) ranked: ArrivalMark,
    /// The longest times for which requests for this lock want a success and a failure to count.
    pub(super) fresh_ms: u64,
    pub(super) fresh_failure_ms: u64,
    /// A request for this lock wants the result of a run.
    pub(super) shares: bool,
    pub(super) holding: u32,
    /// The sum of the weights of the holders and of the requests that the lock is offered to.
    pub(super) weight_held: u64,
    pub(super) queued: u32,
    /// The number of requests for this lock, of every stage. The lock goes with the last of them.
    pub(super) requests: u32,
    /// The hold of another host, which is among the holders.
    pub(super) remote_holder: Option<RequestId>,
}

impl Lock {
    pub(super) fn new(id: LockId, hash: u64) -> Lock {
        Lock {
            id,
            hash,
            holders: List::default(),
            undecided: List::default(),
            v1_waiters: List::default(),
            once_waiters: List::default(),
            queue: List::default(),
            coalescing: List::default(),
            stalled: List::default(),
            newest: None,
            ranked: ArrivalMark::NONE,
            fresh_ms: 0,
            fresh_failure_ms: 0,
            shares: false,
            holding: 0,
            weight_held: 0,
            queued: 0,
            requests: 0,
            remote_holder: None,
        }
    }

    pub(super) fn waiters(&self, list: WaitList) -> List {
        match list {
            WaitList::V1 => self.v1_waiters,
            WaitList::Once => self.once_waiters,
            WaitList::Queue => self.queue,
            WaitList::Coalesce => self.coalescing,
        }
    }

    pub(super) fn waiters_mut(&mut self, list: WaitList) -> &mut List {
        match list {
            WaitList::V1 => &mut self.v1_waiters,
            WaitList::Once => &mut self.once_waiters,
            WaitList::Queue => &mut self.queue,
            WaitList::Coalesce => &mut self.coalescing,
        }
    }
}
