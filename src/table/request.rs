//! What the table keeps: requests, and the locks that they are for.

use std::num::NonZeroU32;

use super::list::{Links, List};
use super::{ClientId, Timestamp};
use crate::proto::v2::LockRequest;
use crate::proto::{LockId, Nonce, Outcome};

/// The terms of a request that matter while the lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// 1 or 2.
    pub protocol: u8,
    /// Others who share may hold it too.
    pub shared: bool,
    /// The client becomes the command: the end of its stream is the end of the work.
    pub exec: bool,
    /// A command inherits the lock.
    pub inherits: bool,
    /// It may be had while fewer than so many hold it.
    pub slots: u32,
}

impl Terms {
    /// Those of protocol 1, which knows only one kind of lock.
    pub const V1: Terms = Terms { protocol: 1, shared: false, exec: false, inherits: false, slots: 1 };
}

impl From<&LockRequest> for Terms {
    fn from(asked: &LockRequest) -> Terms {
        let LockRequest { shared, exec, inherits, slots, .. } = *asked;
        Terms { protocol: 2, shared, exec, inherits, slots }
    }
}

/// Names a request while it exists. (Never zero, so that an `Option` of it is no larger.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RequestId(NonZeroU32);

impl RequestId {
    /// The first in order.
    pub(super) const FIRST: RequestId = RequestId(NonZeroU32::MIN);

    pub(super) fn new(index: usize) -> RequestId {
        let number = u32::try_from(index + 1).expect("fewer requests than descriptors");
        RequestId(NonZeroU32::new(number).expect("one more than an index"))
    }

    pub(super) fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Not decided until all that had already happened is in.
    Deferred,
    /// Not decided until the other hosts have been asked.
    Undecided,
    Waiting,
    Holding,
}

/// In which line a request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitList {
    V1,
    Once,
    Queue,
}

/// One client's request for one lock, from the asking to the release.
pub(super) struct Request {
    /// `None`: it has not resumed, after a restart of the daemon.
    pub(super) client: Option<ClientId>,
    /// Index of its lock.
    pub(super) lock: u32,
    pub(super) links: Links,
    pub(super) stage: Stage,
    pub(super) line: WaitList,
    pub(super) terms: Terms,
    /// Of a holder, its token. Of a waiter, its place in the order of arrival.
    pub(super) order: u64,
    /// When it was granted, or when it asked.
    pub(super) since: Timestamp,
    /// When its hold ends at the latest; [`Timestamp::NEVER`] unless there is a limit.
    pub(super) deadline: Timestamp,
    /// What only protocol 2 has.
    pub(super) details: Option<Box<Details>>,
}

/// What there is to a request of protocol 2.
pub(super) struct Details {
    pub(super) nonce: Option<Nonce>,
    /// Whose request it is, as the kernel says; only on Unix sockets.
    pub(super) uid: Option<u32>,
    /// As it was asked. `None`: it has not resumed, after a restart of the daemon.
    pub(super) asked: Option<Box<LockRequest>>,
}

/// One lock that somebody holds or waits for.
pub(super) struct Lock {
    pub(super) id: LockId,
    pub(super) hash: u64,
    pub(super) holders: List,
    pub(super) v1_waiters: List,
    pub(super) once_waiters: List,
    pub(super) queue: List,
    pub(super) holding: u32,
    pub(super) queued: u32,
    /// How many requests, of all stages, name this lock. It goes when they are gone.
    pub(super) requests: u32,
}

impl Lock {
    pub(super) fn line(&mut self, line: WaitList) -> &mut List {
        match line {
            WaitList::V1 => &mut self.v1_waiters,
            WaitList::Once => &mut self.once_waiters,
            WaitList::Queue => &mut self.queue,
        }
    }
}

impl Request {
    pub(super) fn asked(&self) -> Option<&LockRequest> {
        self.details.as_ref()?.asked.as_deref()
    }

    /// How the hold ended when nobody says.
    pub(super) fn outcome_of_silence(&self) -> Outcome {
        if self.terms.exec { Outcome::Unknown } else { Outcome::Vanished }
    }
}
