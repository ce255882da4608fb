//! This host among the hosts that cluster their locks: each lock has a queue in etcd, and its first entry holds the lock. If
//! it is shared, or has slots, so do the entries behind it that it admits ([`Sharing::verdict`]).
//!
//! A state machine without input or output, like the table. It is told what the table needs ([`ClusterNotice`]), what etcd
//! answered ([`Cluster::answered`]), and what the watch saw ([`Cluster::watch_event`]). It tells the table what other hosts
//! hold and what this host was granted, and makes the next requests to etcd ([`Cluster::take_requests`]). It knows no
//! connections, threads or encodings, so that `cluster/simulation.rs` can drive three hosts through every kind of failure.
//!
//! The rules (`docs/cluster.md` has them for users):
//! - A host has at most one entry in the queue of a lock that waits, and one for each of its holders; and at most one request
//!   about them under way. Its own clients wait in its own table.
//! - An entry holds if the entries before it, in the order in which they were made, admit it. As entries are made behind all
//!   others, that cannot change before it goes, so a queue that is not the newest will do to decide it.
//! - Each request ends with reading the queue, so its answer is the whole truth as of some revision; later events of the
//!   watch are applied to that. What a request did is read, never assumed.
//! - An entry is released in the transaction that records how the hold ended. An entry that goes without a record belonged
//!   to a holder that vanished.
//! - The result of a run goes into etcd in that same transaction, if its holder shares it. What a client is told of a run and its
//!   result has the same token ([`FoundResult`]). No result is kept here for longer than the table takes to decide.
//! - The key of an entry is never used again. An entry of this host that it does not know (from a request that was given up
//!   for lost, and arrived after all) is removed.
//! - What is held is relied on for as long as the last renewal of the lease that counts says. `reliance.rs` has the rule.
//! - Of the requests with `--newest` of all hosts, only the newest waits (`newest.rs`).
//! - A holder is asked to stop by its own host, when a request behind it in the queue replaces it (`replaced.rs`).
//! - When the store goes back, nothing that was read before counts any more ([`Cluster::store_changed`]).

mod newest;
mod queue;
mod reliance;
mod replaced;
mod run_record;
mod shared_result;
#[cfg(test)]
mod simulation;
mod turn;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::proto::v2::{ClientInfo, Mode, ShortText};
use crate::proto::{LockId, Outcome, Protocol, Token};
use crate::table::{
    ArrivalMark, ClusterNotice, Effects, NotificationKind, RequestView, Run, Sharing, Table, Timestamp,
    Verdict,
};
pub use newest::{NewestRecord, SeenNewest};
use queue::{LockQueue, Standing};
use reliance::{Held, Reliance};
pub use reliance::{PresenceRequest, Renewal};
pub use replaced::Replaces;
pub use run_record::RunRecord;
pub use shared_result::{Content, FoundResult, OwnResult, ResultOf, RunUser, SharedResult};

/// When etcd cannot be asked, how long until it is asked again.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a request that does not wait is kept while this host has no lease or no watch.
const PATIENCE: Duration = Duration::from_millis(700);

/// A revision of etcd's store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub i64);

/// The last part of an entry's key in etcd. Other programs may have put any bytes there.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryKey(pub Vec<u8>);

impl fmt::Debug for EntryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&String::from_utf8_lossy(&self.0), f)
    }
}

/// Names a lease: its number in hexadecimal digits, with which the keys of all its entries begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseName(pub String);

impl LeaseName {
    /// Returns the key of a new entry, which no other daemon uses.
    fn entry_key(&self, number: u64) -> EntryKey {
        EntryKey(format!("{}.{number:x}", self.0).into())
    }

    /// Returns `true` if a daemon with this lease made the entry.
    fn owns(&self, entry_key: &EntryKey) -> bool {
        let rest = entry_key.0.strip_prefix(self.0.as_bytes()).and_then(|rest| rest.strip_prefix(b"."));
        rest.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_hexdigit))
    }
}

/// Who an entry belongs to, for people on other hosts.
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
    /// What the client waits for, if it has to wait.
    #[serde(default)]
    pub mode: Mode,
    /// It may hold beside other shared ones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// How many may hold at a time, if they all say the same number. 0: one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub slots: u32,
    /// How many of the slots it takes. 0: one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub weight: u32,
    /// A request that waits at this entry replaces the holders before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<Replaces>,
    /// What the client says about itself.
    #[serde(default)]
    pub who: ClientInfo,
    /// When the entry was made: milliseconds since 1970, by the clock of that machine.
    #[serde(default)]
    pub since_ms: u64,
}

/// How a hold ended: what a host records for the waiters of other hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutcomeRecord {
    /// The hold.
    pub token: Token,
    /// How it ended.
    pub outcome: Outcome,
}

/// An entry in the queue of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The last part of its key in etcd.
    pub entry_key: EntryKey,
    /// When it was made. It is the token of the hold.
    pub revision: Revision,
    /// Who it belongs to. `None`: to another program than kmutex.
    pub owner: Option<Owner>,
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

/// This host's part in all queues that concern it.
pub struct Cluster {
    /// `None`: this host has no lease at the moment, so it cannot ask anything.
    lease: Option<LeaseName>,
    reliance: Reliance,
    is_watching: bool,
    /// The revision up to which the watch has shown each change.
    shown: Revision,
    /// Since when there is no lease or no watch.
    unusable_since: Option<Timestamp>,
    /// [`PATIENCE`] has run out since then.
    is_overdue: bool,
    queues: BTreeMap<LockId, LockQueue>,
    /// Entries by which requests were refused, of queues that the last poll forgot.
    refused_by: BTreeMap<LockId, Entry>,
    /// The last revision at which the watch saw a change of the runs of any lock.
    last_run_event: Revision,
    /// The locks to look at.
    dirty_locks: BTreeSet<LockId>,
    /// When holders of this host are to be asked to stop, because another host's request replaces them.
    stops: BTreeSet<(Timestamp, LockId)>,
    /// The locks that need a request which cannot be made at the moment.
    pending: BTreeSet<LockId>,
    requests: Vec<ClusterRequest>,
    /// The results that the effects speak of.
    found: Vec<FoundResult>,
    /// The last request failed: when to try again, with one request first.
    retry_at: Option<Timestamp>,
    next_id: u64,
    next_entry: u64,
}

impl Cluster {
    /// A host that knows nothing yet. Entries are numbered from `first_entry`, which must be higher than any number before.
    pub fn new(first_entry: u64, now: Timestamp) -> Cluster {
        Cluster {
            lease: None,
            reliance: Reliance::default(),
            is_watching: false,
            shown: Revision(0),
            unusable_since: Some(now),
            is_overdue: false,
            queues: BTreeMap::new(),
            refused_by: BTreeMap::new(),
            last_run_event: Revision(0),
            dirty_locks: BTreeSet::new(),
            stops: BTreeSet::new(),
            pending: BTreeSet::new(),
            requests: Vec::new(),
            found: Vec::new(),
            retry_at: None,
            next_id: 0,
            next_entry: first_entry,
        }
    }

    /// The host has a lease, new or renewed. Returns `true` if the watch must be opened anew: contact with etcd was interrupted, and its
    /// connection may have died without a sign.
    pub fn leased(&mut self, table: &Table, now: Timestamp, renewal: Renewal) -> bool {
        if self.lease.as_ref() != Some(&renewal.lease) {
            self.lease = Some(renewal.lease);
            self.reliance.reset();
        }
        if !renewal.is_prompt {
            self.watch_ended(now);
        }
        let held = held(table);
        let is_shown = |(lock, _): &Held| self.queues.get(lock).is_some_and(LockQueue::is_current);
        let is_shown = self.is_watching && renewal.revision <= self.shown && held.iter().all(is_shown);
        self.relies_on(|reliance| reliance.renewed(renewal.good_until, held, is_shown));
        self.can_ask_again();
        !renewal.is_prompt
    }

    /// A [`PresenceRequest`] was answered with the tokens of this host's entries in the queues of its locks, or failed.
    pub fn presence_answered(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        (id, answer): (u64, Option<BTreeSet<(LockId, Token)>>),
        effects: &mut Effects,
    ) {
        let held = held(table);
        for (lock, token) in self.relies_on(|reliance| reliance.answered(id, answer.as_ref(), held)) {
            table.revoke(now, lock, token, effects);
            self.queues.entry(lock).or_default().forget_entries(self.shown);
            self.dirty_locks.insert(lock);
        }
    }

    /// Returns the requests to read what is held that are due.
    pub fn take_presence_requests(&mut self) -> Vec<PresenceRequest> {
        self.reliance.take_requests()
    }

    /// While nothing can be relied on, nothing is granted: if that is over, all queues are looked at.
    fn relies_on<T>(&mut self, change: impl FnOnce(&mut Reliance) -> T) -> T {
        let before = self.reliance.good_until();
        let changed = change(&mut self.reliance);
        if before.is_none() && self.reliance.good_until().is_some() {
            self.dirty_locks.extend(self.queues.keys());
        }
        changed
    }

    /// The lease is gone, or may soon be: this host has lost what it held.
    pub fn lost_lease(&mut self, table: &mut Table, now: Timestamp, effects: &mut Effects) {
        self.lease = None;
        self.reliance.reset();
        self.is_unusable(now);
        for (lock, token) in held(table) {
            table.revoke(now, lock, token, effects);
        }
        for (lock, queue) in &mut self.queues {
            queue.lose_entries();
            queue.forget_entries(Revision(0));
            self.dirty_locks.insert(*lock);
        }
    }

    /// The store went back, or it is another one: the lease and everything that was read are worth nothing.
    pub fn store_changed(&mut self, table: &mut Table, now: Timestamp, effects: &mut Effects) {
        self.lost_lease(table, now, effects);
        self.is_watching = false;
        (self.shown, self.last_run_event) = (Revision(0), Revision(0));
        table.drop_runs(effects);
        self.queues.values_mut().for_each(LockQueue::forget_store);
    }

    /// Returns `true` if a hold of this host has ended, and etcd may not know yet how.
    pub fn is_untold(&self, lock: LockId, token: Token) -> bool {
        self.queues.get(&lock).is_some_and(|queue| queue.untold().any(|(_, record)| record.token == token))
    }

    /// Returns how the holds ended that other hosts have not been told about.
    pub fn untold(&self) -> impl Iterator<Item = (String, OutcomeRecord)> {
        self.queues.iter().flat_map(|(lock, queue)| {
            let name_of =
                |name: Option<&str>| name.map_or_else(|| lock.to_string(), |name| format!("{name:?}"));
            queue.untold().map(move |(name, record)| (name_of(name), record))
        })
    }

    /// Returns until when what is held here can be relied on. `None`: it cannot.
    pub fn good_until(&self) -> Option<Timestamp> {
        self.reliance.good_until()
    }

    /// Returns `true` if the lease was renewed for longer than this, whether that counts or not.
    pub fn is_renewed(&self, now: Timestamp) -> bool {
        self.reliance.is_renewed(now)
    }

    /// Returns when [`Cluster::poll`] has something to do even if nothing happens.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let retry_at = match self.unusable_since {
            _ if self.pending.is_empty() => None,
            Some(since) => (!self.is_overdue).then(|| since.plus(PATIENCE)),
            None => self.retry_at,
        };
        let stop_at = self.stops.first().map(|(at, _)| *at);
        [retry_at, stop_at].into_iter().flatten().min()
    }

    /// Returns `true` if this host has a lease and a watch.
    pub fn is_usable(&self) -> bool {
        self.lease.is_some() && self.is_watching
    }

    /// Returns `true` if etcd does not answer.
    pub fn is_away(&self) -> bool {
        self.retry_at.is_some() || self.is_overdue
    }

    /// No request gets through at the moment.
    pub fn cannot_ask(&mut self, now: Timestamp) {
        self.retry_at = Some(now.plus(PAUSE));
    }

    fn can_ask_again(&mut self) {
        if self.is_usable() {
            (self.retry_at, self.unusable_since, self.is_overdue) = (None, None, false);
            self.dirty_locks.append(&mut self.pending);
        }
    }

    fn is_unusable(&mut self, now: Timestamp) {
        self.unusable_since.get_or_insert(now);
    }

    /// Takes note of what changed in the table.
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

    /// The watch has shown each change up to this revision.
    pub fn watch_shown(&mut self, revision: Revision) {
        self.shown = self.shown.max(revision);
    }

    /// The watch saw this of a lock, at this revision.
    pub fn watch_event(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        (lock, revision, event): (LockId, Revision, WatchEvent),
        effects: &mut Effects,
    ) {
        let untold = self.queues.get(&lock).map(LockQueue::untold_tokens).unwrap_or_default();
        if let WatchEvent::Ran(_) | WatchEvent::RunGone { .. } = event {
            self.last_run_event = revision;
        }
        match &event {
            WatchEvent::Ran(record) => {
                let run = record.clone().run(lock, now);
                if let Some(queue) = self.queues.get(&lock) {
                    self.found.extend(queue.counting_result(table, &run));
                }
                table.remote_run_seen(now, run, &untold, effects);
            }
            WatchEvent::RunGone { is_success } => table.remote_run_gone(lock, *is_success, effects),
            WatchEvent::Result(result) if !table.awaits_result(lock) => {
                return result_missed(table, lock, result, effects);
            }
            WatchEvent::Result(_)
            | WatchEvent::Added(_)
            | WatchEvent::Removed(_)
            | WatchEvent::Outcome(_)
            | WatchEvent::Newest(_) => {}
        }
        self.queue_event(lock, revision, event);
    }

    /// The runs of a lock that count were read, as of this revision.
    pub fn runs_read(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        (lock, revision): (LockId, Revision),
        runs: Vec<RunRecord>,
        effects: &mut Effects,
    ) {
        let queue = self.queues.get(&lock);
        if revision >= self.last_run_event && queue.is_none_or(|queue| queue.may_learn(revision)) {
            let runs = runs.into_iter().map(|record| record.run(lock, now)).collect();
            let untold = queue.map(LockQueue::untold_tokens).unwrap_or_default();
            table.remote_runs_read(now, lock, runs, &untold, effects);
            if !self.is_watching {
                table.doubt_runs();
            }
        }
    }

    fn queue_event(&mut self, lock: LockId, revision: Revision, event: WatchEvent) {
        if let Some(queue) = self.queues.get_mut(&lock) {
            queue.watch_event(revision, event, self.lease.as_ref());
        } else if let (WatchEvent::Added(entry), Some(lease)) = (&event, &self.lease)
            && lease.owns(&entry.entry_key)
        {
            // The request that made it was given up for lost, and arrived after all.
            self.queues.insert(lock, LockQueue::unread());
        } else {
            return;
        }
        self.dirty_locks.insert(lock);
    }

    /// The lease of this host has entries in the queues of these locks.
    pub fn has_entries(&mut self, locks: impl IntoIterator<Item = LockId>) {
        for lock in locks {
            self.queues.entry(lock).or_insert_with(LockQueue::unread);
            self.dirty_locks.insert(lock);
        }
    }

    /// A watch is open, which sees everything after this revision. What happened before it is not known.
    pub fn watch_opened(&mut self, table: &mut Table, revision: Revision) {
        self.is_watching = true;
        self.shown = revision;
        table.doubt_runs();
        for (lock, queue) in &mut self.queues {
            queue.forget_entries(revision);
            self.dirty_locks.insert(*lock);
        }
        self.can_ask_again();
    }

    /// The watch has ended.
    pub fn watch_ended(&mut self, now: Timestamp) {
        self.is_watching = false;
        self.is_unusable(now);
    }

    /// A request was answered, or failed.
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
            Ok(mut snapshot) => {
                let runs = std::mem::take(&mut snapshot.runs);
                let is_news = queue.answered(id, snapshot, self.lease.as_ref());
                if is_news && self.is_watching {
                    let runs: Vec<Run> = runs.into_iter().map(|record| record.run(lock, now)).collect();
                    self.found.extend(runs.iter().filter_map(|run| queue.counting_result(table, run)));
                    table.remote_runs_read(now, lock, runs, &queue.untold_tokens(), effects);
                }
                self.can_ask_again();
            }
            Err(failure) => {
                if let Some(mark) = queue.not_answered(id, failure, self.lease.as_ref()) {
                    table.unavailable(lock, mark, effects);
                }
                if failure != Failure::LeaseGone {
                    self.cannot_ask(now);
                }
            }
        }
    }

    /// Looks at all dirty locks: tells the table what is true, and makes the requests that follow.
    pub fn poll(&mut self, table: &mut Table, now: Timestamp, effects: &mut Effects) {
        let may_probe = self.is_usable() && self.retry_at.is_none_or(|at| at <= now);
        self.is_overdue |= self.unusable_since.is_some_and(|since| since.plus(PATIENCE) <= now);
        if may_probe || self.is_overdue {
            self.dirty_locks.append(&mut self.pending);
        }
        self.refused_by.clear();
        let may_grant = self.is_watching && self.good_until().is_some_and(|until| until > now);
        self.note_due_stops(now);
        for lock in std::mem::take(&mut self.dirty_locks) {
            let standing = Standing { lease: self.lease.as_ref(), may_grant };
            let queue = self.queues.entry(lock).or_default();
            let stop_at = queue.stop_at();
            queue.update_table(table, now, lock, standing, &mut self.found, effects);
            queue.drop_results();
            if queue.stop_at() != stop_at {
                stop_at.map(|at| self.stops.remove(&(at, lock)));
                self.stops.extend(queue.stop_at().map(|at| (at, lock)));
            }
            // One request tells whether the others have a chance.
            let has_probed = self.is_away() && !self.requests.is_empty();
            if may_probe && !has_probed {
                self.ask(table, now, lock);
            } else if self.queues[&lock].needs(table, lock, self.lease.as_ref()) {
                self.pending.insert(lock);
                if self.is_away() {
                    table.unavailable(lock, table.mark(), effects);
                }
            }
            if self.queues[&lock].is_over(table, lock, self.lease.as_ref()) {
                self.forget(lock, effects);
            }
        }
        if self.is_away() && !self.requests.is_empty() {
            self.retry_at = Some(now.plus(PAUSE));
        }
    }

    fn note_due_stops(&mut self, now: Timestamp) {
        while let Some(&(at, lock)) = self.stops.first()
            && at <= now
        {
            self.stops.pop_first();
            self.dirty_locks.insert(lock);
        }
    }

    /// Forgets a queue, but not yet the entry that a client is to be told of.
    fn forget(&mut self, lock: LockId, effects: &Effects) {
        let Some(queue) = self.queues.remove(&lock) else { return };
        queue.stop_at().map(|at| self.stops.remove(&(at, lock)));
        let slots = effects.notifications.iter().rev().find_map(|told| match told.kind {
            NotificationKind::SlotsDiffer { slots, .. } if told.lock == lock => Some(slots),
            _ => None,
        });
        if let Some(entry) = slots.and_then(|slots| queue.entry_with(slots)) {
            self.refused_by.insert(lock, entry.clone());
        }
    }

    /// Returns the requests that are due.
    pub fn take_requests(&mut self) -> Vec<ClusterRequest> {
        std::mem::take(&mut self.requests)
    }

    /// Returns the results that the effects speak of, to be had before those are carried out.
    pub fn take_results(&mut self) -> Vec<FoundResult> {
        std::mem::take(&mut self.found)
    }

    /// Returns `true` if [`Cluster::poll`] has something to look at now.
    pub fn has_work(&self, now: Timestamp) -> bool {
        !self.dirty_locks.is_empty() || self.next_deadline().is_some_and(|at| at <= now)
    }

    /// Returns a holder of a lock, if possible on another host, as far as it is known.
    pub fn holder(&self, lock: LockId) -> Option<&Entry> {
        self.queues.get(&lock)?.first()
    }

    /// Returns `true` if another host, or another program, holds a lock, as far as it is known.
    pub fn is_held_elsewhere(&self, lock: LockId) -> bool {
        self.queues.get(&lock).is_some_and(LockQueue::is_held_elsewhere)
    }

    /// Returns the first entry of a lock that says this number of slots. After a poll that had a request refused for it, the
    /// entry is there until the next poll.
    pub fn entry_with(&self, lock: LockId, slots: u32) -> Option<&Entry> {
        let known = self.queues.get(&lock).and_then(|queue| queue.entry_with(slots));
        known.or_else(|| self.refused_by.get(&lock))
    }

    fn ask(&mut self, table: &Table, now: Timestamp, lock: LockId) {
        let (Some(queue), Some(lease)) = (self.queues.get_mut(&lock), &self.lease) else { return };
        let entry_key = lease.entry_key(self.next_entry);
        let Some(op) = queue.next_op(table, now, lock, lease, entry_key) else { return };
        self.next_entry += 1;
        self.next_id += 1;
        queue.asked(self.next_id, table.mark(), &op);
        let (known_runs, wants_results) = (table.known_runs(lock), table.awaits_result(lock));
        self.requests.push(ClusterRequest { id: self.next_id, lock, op, known_runs, wants_results });
    }
}

/// Returns every hold of this host.
fn held(table: &Table) -> BTreeSet<Held> {
    let mut held = BTreeSet::new();
    let mut cursor = 0;
    while let Some((lock, next)) = table.next_lock(cursor) {
        held.extend(table.held_here(lock.id()).map(|token| (lock.id(), token)));
        cursor = next;
    }
    held
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

impl Owner {
    /// The owner of an entry for a request. The caller fills in host and time.
    fn of(key: Option<&str>, request: &RequestView<'_>) -> Owner {
        let asked = request.asked;
        let (shared, slots, weight) = match Sharing::from(&request.terms) {
            Sharing::Exclusive => (false, 0, 0),
            Sharing::Shared => (true, 0, 0),
            Sharing::Slots { slots, weight } => (false, slots, if weight == 1 { 0 } else { weight }),
        };
        Owner {
            shared,
            slots,
            weight,
            key: key.map(Into::into),
            uid: request.uid,
            protocol: request.terms.protocol,
            mode: asked.map_or(Mode::Once, |asked| asked.mode),
            who: asked.map(|asked| asked.who.clone()).unwrap_or_default(),
            ..Owner::default()
        }
    }
}

/// Returns how many of the entries of a line hold, which are the first ones.
pub fn holding(line: impl IntoIterator<Item = Sharing>) -> usize {
    let mut holding = 0;
    // All holders are of one kind.
    let mut together = None;
    for sharing in line {
        if sharing.verdict(together) != Verdict::Admitted {
            break;
        }
        holding += 1;
        together = Some(match (sharing, together) {
            (Sharing::Slots { slots, weight }, Some(Sharing::Slots { weight: taken, .. })) => {
                Sharing::Slots { slots, weight: weight.saturating_add(taken) }
            }
            _ => sharing,
        });
    }
    holding
}

impl Entry {
    /// Returns with whom it shares the lock. An entry of another program is exclusive.
    pub fn sharing(&self) -> Sharing {
        match &self.owner {
            Some(Owner { shared: true, .. }) => Sharing::Shared,
            Some(Owner { slots, weight, .. }) if *slots > 1 => {
                Sharing::Slots { slots: *slots, weight: (*weight).max(1) }
            }
            _ => Sharing::Exclusive,
        }
    }
}

/// A host has given a result that no client here waits for. If an older one is kept for later requests, it is out of date.
fn result_missed(table: &mut Table, lock: LockId, result: &SharedResult, effects: &mut Effects) {
    let is_success = match result.of {
        ResultOf::Done => return,
        ResultOf::Success => true,
        ResultOf::Failure => false,
    };
    if result.content.is_ok() {
        table.result_superseded(lock, is_success, result.token, effects);
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A request that is under way.
#[derive(Debug)]
struct Asked {
    id: u64,
    /// Behind the clients that had come when it was made.
    mark: ArrivalMark,
    /// What it reads may be of a store that went back since.
    is_doubtful: bool,
}
