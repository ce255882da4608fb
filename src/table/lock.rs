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
    pub(super) holding: u32,
    /// The number of requests for this lock, of every stage. The lock goes with the last of them.
    pub(super) requests: u32,
    /// The sum of the weights of the holders and of the requests that the lock is offered to.
    pub(super) weight_held: u64,
    /// `None` for most of very many locks: they are held, and that is all.
    extra: Option<Box<Extra>>,
}

/// What only locks have that are waited for, shared with other hosts, or held for work that counts for a while.
pub(super) struct Extra {
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
    /// Of a clustered lock: a waiting request of another host, of this user, replaces the holders, and their time is over.
    pub(super) replaced_for: Option<u32>,
    /// Of a clustered lock: which of these requests etcd has in the order of those of all hosts.
    pub(super) ranked: ArrivalMark,
    pub(super) queued: u32,
    /// The longest times for which requests for this lock want a success and a failure to count.
    pub(super) fresh_ms: u64,
    pub(super) fresh_failure_ms: u64,
    /// A request for this lock wants the result of a run.
    pub(super) shares: bool,
    /// The hold of another host, which is among the holders.
    pub(super) remote_holder: Option<RequestId>,
}

impl Lock {
    pub(super) fn new(id: LockId, hash: u64) -> Lock {
        Lock { id, hash, holders: List::EMPTY, holding: 0, requests: 0, weight_held: 0, extra: None }
    }

    /// Returns `true` if the lock is held, and that is all: the end of a hold concerns no other request.
    pub(super) fn is_plain(&self) -> bool {
        self.extra.is_none()
    }

    pub(super) fn extra(&self) -> &Extra {
        self.extra.as_deref().unwrap_or(&Extra::NONE)
    }

    /// The same to change it; it begins with [`Extra::NONE`].
    pub(super) fn extra_mut(&mut self) -> &mut Extra {
        self.extra.get_or_insert_with(|| Box::new(Extra::NONE))
    }

    /// Returns the hold of another host, if this request is it, and forgets that it is.
    pub(super) fn take_remote_holder(&mut self, id: RequestId) -> Option<RequestId> {
        self.extra.as_mut()?.remote_holder.take_if(|remote| *remote == id)
    }

    /// Notes that a request does not wait any more as the newest.
    pub(super) fn forget_newest(&mut self, id: RequestId) {
        if let Some(extra) = &mut self.extra {
            extra.newest.take_if(|newest| *newest == id);
        }
    }

    pub(super) fn waiters(&self, list: WaitList) -> List {
        let extra = self.extra();
        match list {
            WaitList::V1 => extra.v1_waiters,
            WaitList::Once => extra.once_waiters,
            WaitList::Queue => extra.queue,
            WaitList::Coalesce => extra.coalescing,
        }
    }
}

impl Extra {
    const NONE: Extra = Extra {
        undecided: List::EMPTY,
        v1_waiters: List::EMPTY,
        once_waiters: List::EMPTY,
        queue: List::EMPTY,
        coalescing: List::EMPTY,
        stalled: List::EMPTY,
        newest: None,
        replaced_for: None,
        ranked: ArrivalMark::NONE,
        queued: 0,
        fresh_ms: 0,
        fresh_failure_ms: 0,
        shares: false,
        remote_holder: None,
    };

    pub(super) fn waiters_mut(&mut self, list: WaitList) -> &mut List {
        match list {
            WaitList::V1 => &mut self.v1_waiters,
            WaitList::Once => &mut self.once_waiters,
            WaitList::Queue => &mut self.queue,
            WaitList::Coalesce => &mut self.coalescing,
        }
    }
}
