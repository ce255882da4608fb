//! How this host stands among the hosts that share their locks: a line for each lock, in etcd, in which the first holds.
//!
//! A state machine like the table, without input or output: it is told what the table needs ([`ClusterNotice`]), what etcd has
//! answered ([`Cluster::answered`]) and what the watch has seen ([`Cluster::watch_event`]); it tells the table who holds what
//! elsewhere and what this host has won, and says what etcd is to be asked next ([`Cluster::take_requests`]). Nothing here
//! knows of connections, threads or encodings, so that `cluster/simulation.rs` can drive three hosts through every
//! kind of failure.
//!
//! The rules (`docs/cluster.md` has them for users):
//! - A host has at most one place in the line of a lock, and at most one question about it under way. Its own clients
//!   wait in its own table.
//! - Each question ends with reading the line, so that its answer is a whole truth as of some revision; what the watch
//!   sees later is applied to that. Which question came through and which did not is not remembered but read.
//! - A place is given up in the transaction that says how the hold ended. One that goes without a word belonged to a
//!   holder that vanished.
//! - What a place is called is never used again. A place of this host that it does not know of (a question that was
//!   given up for lost, and came through after all) is removed.

mod queue;
#[cfg(test)]
mod simulation;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::proto::v2::{ClientInfo, Mode, ShortText};
use crate::proto::{LockId, Outcome, Protocol, Token};
use crate::table::{ArrivalMark, ClusterNotice, Effects, RequestView, Table, Timestamp};
use queue::LockQueue;

/// When etcd cannot be asked, how long until it is asked again.
const PAUSE: Duration = Duration::from_millis(500);

/// A revision of etcd's store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub i64);

/// Names a lease: its number in hexadecimal digits, with which the names of all its places begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseName(pub String);

impl LeaseName {
    /// What a place is called: nobody else calls one so.
    fn place(&self, number: u64) -> String {
        format!("{}.{number:x}", self.0)
    }

    fn is_of(&self, place: &str) -> bool {
        place.strip_prefix(&*self.0).is_some_and(|rest| rest.starts_with('.'))
    }
}

/// Who has a place, for people on other hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The lock's key, if it is known here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The machine of the daemon.
    pub host: ShortText,
    /// The user's id on that machine, as its kernel knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// The protocol that the client speaks.
    pub protocol: Protocol,
    /// What it waits for, if it has to.
    #[serde(default)]
    pub mode: Mode,
    /// What it has told of itself.
    #[serde(default)]
    pub who: ClientInfo,
    /// When the place was taken: milliseconds since 1970, by the clock of that machine.
    #[serde(default)]
    pub since_ms: u64,
}

/// How a hold has ended: what a host leaves behind for those who waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutcomeRecord {
    /// Which hold.
    pub token: Token,
    /// How.
    pub outcome: Outcome,
}

/// A place in the line of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What the place is called.
    pub place: String,
    /// When it was taken. The lowest of a line holds the lock, and this is its token.
    pub revision: Revision,
    /// Whose it is. `None`: not kmutex's.
    pub owner: Option<Owner>,
}

/// The line of a lock, as it was at a revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueSnapshot {
    /// When.
    pub revision: Revision,
    /// Who stands in it.
    pub entries: Vec<Entry>,
    /// How the last hold ended that somebody has told of.
    pub last: Option<OutcomeRecord>,
}

/// What the watch has seen of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// Somebody has taken a place.
    Added(Entry),
    /// The place of this name is gone.
    Removed(String),
    /// A host recorded how a hold ended.
    Outcome(OutcomeRecord),
}

/// A question to etcd, about the line of one lock. The answer is its [`QueueSnapshot`] afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRequest {
    /// To be named in the answer.
    pub id: u64,
    /// Which lock.
    pub lock: LockId,
    /// What.
    pub what: QueueOp,
}

/// What etcd is to do before it reads the line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueOp {
    /// Nothing.
    Read,
    /// Take this place if nobody has one.
    TryAcquire {
        /// What it is called.
        place: String,
        /// Whose it is.
        owner: Box<Owner>,
    },
    /// Take this place behind all others.
    Enqueue {
        /// What it is called.
        place: String,
        /// Whose it is.
        owner: Box<Owner>,
    },
    /// Give up this place, if it is the one that was taken at this revision, and all in one:
    Release {
        /// What it is called.
        place: String,
        /// When it was taken.
        revision: Revision,
        /// How the hold ended, to be left behind.
        record: Option<OutcomeRecord>,
        /// Where to stand next, behind all others.
        next: Option<(String, Box<Owner>)>,
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

/// The standing of this host in all lines that concern it.
pub struct Cluster {
    /// `None`: there is none at the moment, so that nothing can be asked.
    lease: Option<LeaseName>,
    /// Until when the lease, and so all that is held here, may be relied upon.
    good_until: Timestamp,
    queues: BTreeMap<LockId, LockQueue>,
    /// Those to be looked at.
    dirty_locks: BTreeSet<LockId>,
    /// Those that have something to ask, and cannot at the moment.
    pending: BTreeSet<LockId>,
    requests: Vec<ClusterRequest>,
    /// The last question did not come through: when to try again, with one question first.
    retry_at: Option<Timestamp>,
    next_id: u64,
    next_place: u64,
}

impl Cluster {
    /// Nothing is known yet. Places are numbered from `first_place`, which must be higher than any number before.
    pub fn new(first_place: u64) -> Cluster {
        Cluster {
            lease: None,
            good_until: Timestamp(0),
            queues: BTreeMap::new(),
            dirty_locks: BTreeSet::new(),
            pending: BTreeSet::new(),
            requests: Vec::new(),
            retry_at: None,
            next_id: 0,
            next_place: first_place,
        }
    }

    /// There is a lease, new or kept alive, which may be relied on until then.
    pub fn leased(&mut self, lease: LeaseName, good_until: Timestamp) {
        if self.lease.as_ref() != Some(&lease) {
            self.lease = Some(lease);
            self.good_until = good_until;
        }
        self.good_until = self.good_until.max(good_until);
        self.can_ask_again();
    }

    /// The lease is gone, or may soon be: whatever this host holds, it holds no more.
    pub fn lost_lease(&mut self, table: &mut Table, now: Timestamp, effects: &mut Effects) {
        self.lease = None;
        let mut held = Vec::new();
        let mut cursor = 0;
        while let Some((lock, next)) = table.next_lock(cursor) {
            held.extend(table.held_here(lock.id()).map(|_| lock.id()));
            cursor = next;
        }
        for lock in held {
            table.revoke(now, lock, effects);
        }
        for (lock, queue) in &mut self.queues {
            queue.lose_place();
            // The next lease may be of another store, whose revisions begin anew.
            queue.forget_line(Revision(0));
            self.dirty_locks.insert(*lock);
        }
    }

    /// Until when what is held here may be relied on. `None`: it may not.
    pub fn good_until(&self) -> Option<Timestamp> {
        self.lease.as_ref().map(|_| self.good_until)
    }

    /// When to try again to ask what could not be asked.
    pub fn retry_at(&self) -> Option<Timestamp> {
        self.retry_at.filter(|_| self.lease.is_some() && !self.pending.is_empty())
    }

    /// True while questions do not come through.
    pub fn is_away(&self) -> bool {
        self.retry_at.is_some()
    }

    /// No question comes through at the moment, whatever it is.
    pub fn cannot_ask(&mut self, now: Timestamp) {
        self.retry_at = Some(now.plus(PAUSE));
    }

    fn can_ask_again(&mut self) {
        if self.lease.is_some() {
            self.retry_at = None;
            self.dirty_locks.append(&mut self.pending);
        }
    }

    /// Takes note of what has changed in the table.
    pub fn notify(&mut self, notice: ClusterNotice) {
        let lock = match notice {
            ClusterNotice::Needs(lock) => lock,
            ClusterNotice::Ended(lock, token, outcome) => {
                if let Some(queue) = self.queues.get_mut(&lock) {
                    queue.ended(token, outcome);
                }
                lock
            }
        };
        self.dirty_locks.insert(lock);
    }

    /// The watch has seen this of a lock, at this revision.
    pub fn watch_event(&mut self, lock: LockId, revision: Revision, what: WatchEvent) {
        if let Some(queue) = self.queues.get_mut(&lock) {
            queue.watch_event(revision, what);
        } else if let (WatchEvent::Added(entry), Some(lease)) = (&what, &self.lease)
            && lease.is_of(&entry.place)
        {
            // Given up for lost, and come through after all. It is looked into.
            self.queues.insert(lock, LockQueue::unread());
        } else {
            return;
        }
        self.dirty_locks.insert(lock);
    }

    /// In the lines of these locks this host's lease has places, whether it knows of them or not.
    pub fn has_places(&mut self, locks: impl IntoIterator<Item = LockId>) {
        for lock in locks {
            self.queues.entry(lock).or_insert_with(LockQueue::unread);
            self.dirty_locks.insert(lock);
        }
    }

    /// The watch has missed something up to this revision, and sees all that comes after.
    pub fn watch_gap(&mut self, revision: Revision) {
        for (lock, queue) in &mut self.queues {
            queue.forget_line(revision);
            self.dirty_locks.insert(*lock);
        }
    }

    /// A question was answered, or not.
    pub fn answered(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        (lock, id): (LockId, u64),
        answer: Result<QueueSnapshot, Failure>,
        effects: &mut Effects,
    ) {
        let Some(queue) = self.queues.get_mut(&lock) else { return };
        self.dirty_locks.insert(lock);
        match answer {
            Ok(line) => {
                queue.answered(id, line);
                self.can_ask_again();
            }
            Err(failure) => {
                if let Some(mark) = queue.not_answered(id, failure) {
                    table.unavailable(lock, mark, effects);
                }
                if failure != Failure::LeaseGone {
                    self.cannot_ask(now);
                }
            }
        }
    }

    /// Looks at all that was dirty_locks: tells the table what is true, and makes up the questions that follow.
    pub fn poll(&mut self, table: &mut Table, now: Timestamp, effects: &mut Effects) {
        let may_probe = self.retry_at.is_none_or(|at| at <= now);
        if may_probe {
            self.dirty_locks.append(&mut self.pending);
        }
        for lock in std::mem::take(&mut self.dirty_locks) {
            self.queues.entry(lock).or_default().update_table(table, now, lock, effects);
            // One question tells whether the others have a rng.
            let has_probed = self.is_away() && !self.requests.is_empty();
            if self.lease.is_some() && may_probe && !has_probed {
                self.ask(table, lock);
            } else if self.queues[&lock].needs(table, lock, self.lease.as_ref()) {
                self.pending.insert(lock);
                if self.is_away() {
                    table.unavailable(lock, table.mark(), effects);
                }
            }
            if self.queues[&lock].is_over(table, lock, self.lease.as_ref()) {
                self.queues.remove(&lock);
            }
        }
        if self.is_away() && !self.requests.is_empty() {
            self.retry_at = Some(now.plus(PAUSE));
        }
    }

    /// What etcd is to be asked.
    pub fn take_requests(&mut self) -> Vec<ClusterRequest> {
        std::mem::take(&mut self.requests)
    }

    /// True when [`Cluster::poll`] has something to look at now.
    pub fn has_work(&self, now: Timestamp) -> bool {
        !self.dirty_locks.is_empty() || self.retry_at().is_some_and(|at| at <= now)
    }

    /// Who has the first place of a lock, as far as it is known.
    pub fn holder(&self, lock: LockId) -> Option<&Entry> {
        self.queues.get(&lock)?.first()
    }

    fn ask(&mut self, table: &Table, lock: LockId) {
        let (Some(queue), Some(lease)) = (self.queues.get_mut(&lock), &self.lease) else { return };
        let place = lease.place(self.next_place);
        let Some(what) = queue.question(table, lock, lease, place) else { return };
        self.next_place += 1;
        self.next_id += 1;
        queue.asked(self.next_id, table.mark(), &what);
        self.requests.push(ClusterRequest { id: self.next_id, lock, what });
    }
}

impl QueueOp {
    /// For whom a place is to be taken.
    pub fn owner_mut(&mut self) -> Option<&mut Owner> {
        match self {
            QueueOp::TryAcquire { owner, .. }
            | QueueOp::Enqueue { owner, .. }
            | QueueOp::Release { next: Some((_, owner)), .. } => Some(owner),
            QueueOp::Read | QueueOp::Release { .. } => None,
        }
    }
}

impl Owner {
    /// On behalf of a request. Host and time are for the caller to fill in.
    fn of(key: Option<&str>, request: &RequestView<'_>) -> Owner {
        let asked = request.asked;
        Owner {
            key: key.map(Into::into),
            uid: request.uid,
            protocol: request.terms.protocol,
            mode: asked.map_or(Mode::Once, |asked| asked.mode),
            who: asked.map(|asked| asked.who.clone()).unwrap_or_default(),
            ..Owner::default()
        }
    }
}

/// A question that is under way, and what it may have done.
#[derive(Debug)]
struct Asked {
    id: u64,
    /// Those who had come when it was asked.
    mark: ArrivalMark,
}
