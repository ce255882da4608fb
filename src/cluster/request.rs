//! What is asked of etcd about the queue of a lock, what etcd answers, and what the watch shows.

use serde::{Deserialize, Serialize};

use super::{Entry, EntryKey, NewestRecord, OwnResult, Owner, Revision, RunRecord, SeenNewest, SharedResult};
use crate::proto::{LockId, Outcome, Token};
use crate::table::Run;

/// How a hold ended: what a host records for the waiters of other hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutcomeRecord {
    /// The hold.
    pub token: Token,
    /// How it ended.
    pub outcome: Outcome,
}

/// The queue of a lock at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueSnapshot {
    /// The revision.
    pub revision: Revision,
    /// The entries, in any order.
    pub entries: Vec<Entry>,
    /// How the last hold ended that a host recorded.
    pub last: Option<OutcomeRecord>,
    /// The runs that still count, with their ages by now.
    pub runs: Vec<RunRecord>,
    /// The results of runs, if they were asked for.
    pub results: Vec<SharedResult>,
    /// The record of the newest request.
    pub newest: Option<SeenNewest>,
}

/// What the watch saw of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// An entry was made.
    Added(Entry),
    /// The entry with this key is gone.
    Removed(EntryKey),
    /// A host recorded how a hold ended.
    Outcome(OutcomeRecord),
    /// A host recorded a run that counts for a while.
    Ran(RunRecord),
    /// A host recorded the result of a run, before it recorded that run or outcome.
    Result(SharedResult),
    /// The record of the last run that succeeded, or that failed, is gone.
    RunGone {
        /// The one that succeeded.
        is_success: bool,
    },
    /// A host recorded the newest request, or the record is gone.
    Newest(Option<SeenNewest>),
}

/// A request to etcd about the queue of one lock. The answer is the [`QueueSnapshot`] afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRequest {
    /// Identifies the request in the answer.
    pub id: u64,
    /// The lock.
    pub lock: LockId,
    /// What etcd does before it reads the queue.
    pub op: QueueOp,
    /// The runs of this lock whose ages are known here.
    pub known_runs: Vec<Token>,
    /// A client here may want the result of a run.
    pub wants_results: bool,
}

/// What etcd does before it reads a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueOp {
    /// Nothing.
    Read,
    /// Make this entry if the queue is empty.
    TryAcquire {
        /// Its key.
        entry_key: EntryKey,
        /// Who it belongs to.
        owner: Box<Owner>,
        /// Only if no run is recorded that may count.
        unless_run: bool,
    },
    /// Make this entry behind all others.
    Enqueue {
        /// Its key.
        entry_key: EntryKey,
        /// Who it belongs to.
        owner: Box<Owner>,
    },
    /// Record the newest request, if the record is as this host has read it.
    RecordNewest {
        /// What is recorded.
        record: NewestRecord,
        /// The revision of the record that it replaces. 0: there is none.
        replaced: Revision,
        /// The first entry of this host, behind all others.
        entry: Option<(EntryKey, Box<Owner>)>,
    },
    /// Say something else of this entry, if it is the one that was made at this revision.
    Describe {
        /// Its key.
        entry_key: EntryKey,
        /// When it was made.
        revision: Revision,
        /// What is said of it.
        owner: Box<Owner>,
    },
    /// Remove this entry, if it is the one that was made at this revision, and all in one:
    Release {
        /// Its key.
        entry_key: EntryKey,
        /// When it was made.
        revision: Revision,
        /// How the hold ended, to be recorded.
        record: Option<OutcomeRecord>,
        /// The run that ended, if it counts for a while.
        run: Option<Box<Run>>,
        /// The result of that run, or of the hold. The caller fills it in, if there is one.
        result: Option<Box<OwnResult>>,
        /// The next entry of this host, behind all others.
        next: Option<(EntryKey, Box<Owner>)>,
    },
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Nothing was done.
    NotDone,
    /// It may have been done, or may yet be.
    Unknown,
    /// Nothing was done, because the lease is gone.
    LeaseGone,
}

impl QueueOp {
    /// Returns the owner of the entry that it makes.
    pub fn owner_mut(&mut self) -> Option<&mut Owner> {
        match self {
            QueueOp::TryAcquire { owner, .. }
            | QueueOp::Enqueue { owner, .. }
            | QueueOp::RecordNewest { entry: Some((_, owner)), .. }
            | QueueOp::Release { next: Some((_, owner)), .. } => Some(owner),
            QueueOp::Read
            | QueueOp::Describe { .. }
            | QueueOp::RecordNewest { .. }
            | QueueOp::Release { .. } => None,
        }
    }
}
