//! What the loop and the threads that speak with etcd say to each other.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use nix::sys::eventfd::EventFd;

use super::layout::Leases;
use super::trouble::Source;
use crate::cluster::{ClusterRequest, Failure, QueueSnapshot, Revision, RunRecord, WatchEvent};
use crate::daemon::connection::ConnectionId;
use crate::daemon::listing::Page;
use crate::etcd::{self, LeaseId};
use crate::proto::{Key, LockId, Token};
use crate::table::Timestamp;

/// What the loop wants of etcd.
#[derive(Debug)]
pub(super) enum Command {
    Request(ClusterRequest, Leases),
    /// Find out in which queues a lease has entries.
    ListEntries(LeaseId),
    /// Grant a lease for records.
    GrantRecordsLease,
    /// Take the lock from its holder, for a client.
    Break(ConnectionId, LockId),
    /// Forget the runs of a lock, for a client: all of them, or only if they have these tokens.
    Forget {
        to: ConnectionId,
        lock: LockId,
        may: Option<Vec<Token>>,
    },
    /// End a lease that this host has lost.
    Revoke(LeaseId),
    /// Write something that the watch must see.
    SignOfLife(LeaseId),
}

/// What a client wants to read.
#[derive(Debug)]
pub(super) enum Reading {
    /// The locks of all hosts, from this key on.
    Page(Vec<u8>),
    /// One lock.
    Lock(LockId),
    /// The runs of the lock with this key that count.
    Runs(Key),
}

/// What a thread reports. `generation` counts the changes of the store (`etcd::Client::generation`).
#[derive(Debug)]
pub(super) enum Event {
    /// The lease lives, and did when this was requested, at `sent`. `is_prompt`: as [`crate::cluster::Renewal`] has it.
    Leased {
        lease: LeaseId,
        sent: Timestamp,
        ttl_secs: u64,
        revision: i64,
        is_prompt: bool,
        generation: u64,
    },
    LeaseGone(LeaseId),
    /// A request failed.
    Trouble(Source, etcd::Error),
    /// The store went back, for the so manieth time.
    StoreChanged {
        why: String,
        generation: u64,
    },
    /// `lease`: the one under which the request was made.
    Answer {
        lock: LockId,
        id: u64,
        lease: LeaseId,
        answer: Result<QueueSnapshot, Failure>,
        source: Source,
        trouble: Option<etcd::Error>,
        generation: u64,
    },
    /// The places that a lease has in the queues of some locks, by their tokens; `None`: they could not be read.
    Presence {
        id: u64,
        answer: Option<BTreeSet<(LockId, Token)>>,
        generation: u64,
    },
    Entries(Vec<LockId>),
    /// Where this lease has entries could not be found out a while ago.
    NoEntries(LeaseId),
    /// Records may be put with this lease for `RECORDS_TTL_SECS` after `sent`.
    RecordsLease {
        lease: LeaseId,
        sent: Timestamp,
    },
    /// This lease for records may be gone.
    RecordsGone(LeaseId),
    /// etcd has ended a lease that is lost, or could not be asked to.
    Revoked {
        lease: LeaseId,
        is_done: bool,
    },
    /// The watch must see this revision. `None`: nothing could be written.
    SignOfLife(Option<i64>),
    /// The watch sees everything after this revision. `hang_ups`: how often watches had been ended before.
    WatchOpened {
        revision: Revision,
        hang_ups: u64,
        generation: u64,
    },
    /// What the watch saw, and up to which revision.
    Watch {
        revision: i64,
        events: Vec<(LockId, Revision, WatchEvent)>,
        generation: u64,
    },
    WatchEnded(Option<etcd::Error>),
    Page {
        to: ConnectionId,
        page: Result<Page, etcd::Error>,
    },
    /// The runs of a lock that count, as of a revision; `None`: they could not be read.
    Runs {
        to: ConnectionId,
        key: Key,
        runs: Option<(Revision, Vec<RunRecord>)>,
        generation: u64,
    },
    /// The runs of a lock were forgotten; `false`: the client may not do that.
    Forgotten {
        to: ConnectionId,
        lock: LockId,
        forgotten: Result<bool, etcd::Error>,
    },
    /// A lock was broken; `false`: it was not held.
    Broken {
        to: ConnectionId,
        broken: Result<bool, etcd::Error>,
    },
}

impl Event {
    /// Returns how many times the store had changed when this was found out, if that matters.
    pub(super) fn generation(&self) -> Option<u64> {
        match self {
            Event::Leased { generation, .. }
            | Event::StoreChanged { generation, .. }
            | Event::Answer { generation, .. }
            | Event::Presence { generation, .. }
            | Event::WatchOpened { generation, .. }
            | Event::Runs { generation, .. }
            | Event::Watch { generation, .. } => Some(*generation),
            _ => None,
        }
    }
}

/// Where the threads report to.
#[derive(Clone)]
pub(super) struct Reporter {
    wake: Arc<EventFd>,
    events: SyncSender<Event>,
}

impl Reporter {
    /// Reports into `events`, and wakes the loop with `wake`.
    pub(super) fn new(wake: Arc<EventFd>, events: SyncSender<Event>) -> Reporter {
        Reporter { wake, events }
    }

    pub(super) fn send(&self, event: Event) {
        // The loop has ended, or is awake already.
        if self.events.send(event).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}
