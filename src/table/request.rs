//! Requests, their stages and terms.

use std::num::NonZeroU32;

use super::{ArrivalMark, ClientId, HoldState, Timestamp};
use crate::proto::v2::{LockRequest, Mode};
use crate::proto::{LockId, Nonce, Outcome, Protocol, Token};

/// The terms of a request that matter while it holds the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The protocol of the client.
    pub protocol: Protocol,
    /// Other shared holders may hold the lock too, as with `flock -s`.
    pub shared: bool,
    /// The client becomes the command: the end of its stream is the end of the work.
    pub exec: bool,
    /// A command inherits the lock.
    pub inherits: bool,
    /// The request is admitted while fewer than so many hold the lock.
    pub slots: u32,
    /// How many of the slots it takes, if it says so.
    pub weight: Option<NonZeroU32>,
}

impl Terms {
    /// The terms of protocol 1, which knows one kind of lock.
    pub const V1: Terms =
        Terms { protocol: Protocol::V1, shared: false, exec: false, inherits: false, slots: 1, weight: None };
}

impl From<&LockRequest> for Terms {
    fn from(asked: &LockRequest) -> Terms {
        let LockRequest { shared, exec, inherits, slots, weight, .. } = *asked;
        Terms { protocol: Protocol::V2, shared, exec, inherits, slots, weight }
    }
}

impl Terms {
    /// Returns how many slots it takes.
    pub fn weight_or_one(&self) -> u32 {
        self.weight.map_or(1, NonZeroU32::get)
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

/// A client's number as a request keeps it. (Never zero, so that an `Option` of it is no larger, in each of very many requests.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner(NonZeroU32);

impl From<ClientId> for Owner {
    fn from(client: ClientId) -> Owner {
        Owner(client.0.checked_add(1).and_then(NonZeroU32::new).expect("fewer clients than descriptors"))
    }
}

impl From<Owner> for ClientId {
    fn from(owner: Owner) -> ClientId {
        ClientId(owner.0.get() - 1)
    }
}

/// Names a lock while it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LockIndex(u32);

impl LockIndex {
    pub(super) fn new(index: usize) -> LockIndex {
        LockIndex(u32::try_from(index).expect("fewer locks than descriptors"))
    }

    pub(super) fn get(self) -> usize {
        self.0 as usize
    }
}

/// How far a request has come; it says which list the request is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// New, and in no list: the event that brought it decides where it goes.
    New,
    /// Undecided until every event that came before it is in the table.
    Deferred,
    /// Undecided until etcd has answered.
    Undecided,
    /// In its [`WaitList`].
    Waiting,
    /// Its client has waited, and is to say that it still wants the lock. The token is etcd's, for a clustered lock; for
    /// any other, the table draws one when the client answers.
    Offered(Token),
    /// Its client has not answered an offer in time, and keeps its place for when it does.
    Stalled,
    /// Holds the lock, under this token.
    Holding(Token),
}

/// The line in which a request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitList {
    V1,
    Once,
    Queue,
    Coalesce,
}

impl From<Mode> for WaitList {
    fn from(mode: Mode) -> WaitList {
        match mode {
            Mode::Once => WaitList::Once,
            Mode::Queue => WaitList::Queue,
            Mode::Coalesce => WaitList::Coalesce,
        }
    }
}

/// A request's neighbours in the list that it is in.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Links {
    pub(super) prev: Option<RequestId>,
    pub(super) next: Option<RequestId>,
}

/// One client's request for one lock, from the request to the release.
pub(super) struct Request {
    /// `None`: the holder has not resumed since a restart of the daemon, or it is another host's.
    pub(super) owner: Option<Owner>,
    pub(super) lock: LockIndex,
    pub(super) links: Links,
    pub(super) stage: Stage,
    pub(super) wait_list: WaitList,
    pub(super) terms: Terms,
    /// The place in the order of arrival.
    pub(super) place: u64,
    /// When the lock was granted or, before that, requested.
    pub(super) since: Timestamp,
    /// Of a holder: behind all requests that came before its grant, or before the offer that it took.
    pub(super) began: ArrivalMark,
    /// When the hold or the offer ends at the latest, or when a waiter that replaces the holder has it stopped;
    /// [`Timestamp::NEVER`] unless there is a limit.
    pub(super) deadline: Timestamp,
    /// What only requests of protocol 2 have.
    pub(super) details: Option<Box<Details>>,
}

/// What only requests of protocol 2 have.
pub(super) struct Details {
    pub(super) nonce: Option<Nonce>,
    /// The uid of the client as the kernel states it; only on Unix sockets.
    pub(super) uid: Option<u32>,
    /// The request as it came. `None`: the holder has not resumed since a restart of the daemon.
    pub(super) asked: Option<Box<LockRequest>>,
    /// Of a holder: the result of its run is there, for others.
    pub(super) has_result: bool,
}

impl Request {
    /// Returns the client, if the request has one.
    pub(super) fn client(&self) -> Option<ClientId> {
        self.owner.map(ClientId::from)
    }

    pub(super) fn asked(&self) -> Option<&LockRequest> {
        self.details.as_ref()?.asked.as_deref()
    }

    /// Returns the uid of the client, if it speaks protocol 2 on a Unix socket.
    pub(super) fn uid(&self) -> Option<u32> {
        self.details.as_ref()?.uid
    }

    /// Returns the user who can have the result of a holder's run, if there is one.
    pub(super) fn result_for(&self) -> Option<u64> {
        let details = self.details.as_ref().filter(|details| details.has_result)?;
        Some(details.asked.as_ref()?.sharer)
    }

    /// Returns the token of a holder.
    pub(super) fn token(&self) -> Option<Token> {
        match self.stage {
            Stage::Holding(token) => Some(token),
            Stage::New
            | Stage::Deferred
            | Stage::Undecided
            | Stage::Waiting
            | Stage::Offered(_)
            | Stage::Stalled => None,
        }
    }

    /// Returns the hold of a holder; `lock`: what it holds.
    pub(super) fn hold(&self, lock: LockId) -> Option<HoldState> {
        let details = self.details.as_deref();
        Some(HoldState {
            lock,
            token: self.token()?,
            terms: self.terms,
            nonce: details.and_then(|details| details.nonce),
            uid: details.and_then(|details| details.uid),
            until: (self.deadline != Timestamp::NEVER).then_some(self.deadline),
        })
    }

    /// Returns the outcome of a hold that ended without a release.
    pub(super) fn outcome_of_silence(&self) -> Outcome {
        if self.terms.exec { Outcome::Unknown } else { Outcome::Vanished }
    }
}
