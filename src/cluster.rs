//! This host among the hosts that cluster their locks: each lock has a queue in etcd, and its first entry holds the lock. If
//! it is shared, or has slots, so do the entries behind it that it admits ([`holding`]).
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

mod entry;
mod newest;
mod queue;
mod reliance;
mod replaced;
mod request;
mod run_record;
mod shared_result;
#[cfg(test)]
mod simulation;
mod turn;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::proto::{LockId, Token};
use crate::table::{ArrivalMark, ClusterNotice, Effects, NotificationKind, Run, Table, Timestamp};
pub use entry::{Entry, EntryKey, LeaseName, Owner, Revision, holding};
pub use newest::{NewestRecord, SeenNewest};
use queue::{LockQueue, Standing};
use reliance::{Held, Reliance};
pub use reliance::{PresenceRequest, Renewal};
pub use replaced::Replaces;
pub use request::{ClusterRequest, Failure, OutcomeRecord, QueueOp, QueueSnapshot, WatchEvent};
pub use run_record::RunRecord;
pub use shared_result::{Content, FoundResult, OwnResult, ResultOf, RunUser, SharedResult};

/// When etcd cannot be asked, how long until it is asked again.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a request that does not wait is kept while this host has no lease or no watch.
const PATIENCE: Duration = Duration::from_millis(700);

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

/// A request that is under way.
#[derive(Debug)]
struct Asked {
    id: u64,
    /// Behind the clients that had come when it was made.
    mark: ArrivalMark,
    /// What it reads may be of a store that went back since.
    is_doubtful: bool,
}
