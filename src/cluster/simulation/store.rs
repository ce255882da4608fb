//! A model of etcd, as far as the hosts can tell.

use std::collections::{BTreeMap, BTreeSet};

use super::super::{
    ClusterRequest, Entry, EntryKey, Failure, LeaseName, OutcomeRecord, OwnResult, Owner, QueueOp,
    QueueSnapshot, ResultOf, Revision, RunRecord, SeenNewest, SharedResult, WatchEvent,
};
use crate::proto::{LockId, Outcome, Token};
use crate::table::Timestamp;

/// How long the record of a newest request stays.
pub(super) const NEWEST_MS: u64 = 2_500;

#[derive(Clone, Default)]
pub(super) struct Store {
    revision: i64,
    entries: BTreeMap<(LockId, EntryKey), (Entry, Option<String>)>,
    records: BTreeMap<LockId, OutcomeRecord>,
    /// By lock, with the time at which each is gone.
    newest: BTreeMap<LockId, (SeenNewest, u64)>,
    /// By lock, and whether they succeeded.
    runs: BTreeMap<(LockId, bool), StoredRun>,
    /// At most one with each record.
    results: BTreeMap<LockId, Vec<SharedResult>>,
    /// When each expires.
    pub(super) leases: BTreeMap<String, u64>,
    history: Vec<(Revision, LockId, WatchEvent)>,
    /// The events before this one are forgotten.
    compacted: usize,
    /// How many times the store went back.
    pub(super) era: u64,
    /// It is being started, and answers nothing until then.
    pub(super) down_until: u64,
}

#[derive(Clone)]
struct StoredRun {
    record: RunRecord,
    put: u64,
    until: u64,
}

impl Store {
    pub(super) fn revision(&self) -> Revision {
        Revision(self.revision)
    }

    /// Carries out a request, as one transaction.
    pub(super) fn carry_out(
        &mut self,
        ask: &ClusterRequest,
        lease: &LeaseName,
        now: u64,
    ) -> Result<QueueSnapshot, Failure> {
        let is_leased = self.leases.contains_key(&lease.0);
        let lock = ask.lock;
        match &ask.op {
            QueueOp::Read => {}
            QueueOp::TryAcquire { entry_key, owner, .. } | QueueOp::Enqueue { entry_key, owner } => {
                let tries = matches!(ask.op, QueueOp::TryAcquire { .. });
                let unless_run = matches!(ask.op, QueueOp::TryAcquire { unless_run: true, .. });
                let has_run = self.runs.keys().any(|(of, _)| *of == lock);
                let is_free = if tries {
                    self.line(lock).entries.is_empty() && !(unless_run && has_run)
                } else {
                    !self.entries.contains_key(&(lock, entry_key.clone()))
                };
                if is_free {
                    if !is_leased {
                        return Err(Failure::LeaseGone);
                    }
                    self.revision += 1;
                    self.put(lock, entry_key, Some((**owner).clone()), Some(lease.0.clone()));
                }
            }
            QueueOp::Describe { entry_key, revision, owner } => {
                let there = self.entries.get_mut(&(lock, entry_key.clone()));
                if let Some((entry, _)) = there.filter(|(entry, _)| entry.revision == *revision) {
                    if !is_leased {
                        return Err(Failure::LeaseGone);
                    }
                    entry.owner = Some((**owner).clone());
                    let entry = entry.clone();
                    self.revision += 1;
                    self.note(lock, WatchEvent::Added(entry));
                }
            }
            QueueOp::RecordNewest { record, replaced, entry } => {
                let seen = self.newest.get(&lock).map_or(Revision(0), |(seen, _)| seen.revision);
                if seen == *replaced {
                    if !is_leased {
                        return Err(Failure::LeaseGone);
                    }
                    self.revision += 1;
                    let seen = SeenNewest { revision: self.revision(), record: Some(record.clone()) };
                    self.newest.insert(lock, (seen.clone(), now + NEWEST_MS));
                    self.note(lock, WatchEvent::Newest(Some(seen)));
                    if let Some((entry_key, owner)) = entry {
                        self.put(lock, entry_key, Some((**owner).clone()), Some(lease.0.clone()));
                    }
                }
            }
            QueueOp::Release { entry_key, revision, record, run, result, next } => {
                let there = self.entries.get(&(lock, entry_key.clone()));
                if there.is_some_and(|(entry, _)| entry.revision == *revision) {
                    if !is_leased && (record.is_some() || next.is_some()) {
                        return Err(Failure::LeaseGone);
                    }
                    self.revision += 1;
                    let counts = run.as_ref().is_some_and(|run| RunRecord::of(run, Timestamp(now)).is_some());
                    if let (Some(record), Some(result)) = (record, result) {
                        self.put_result(lock, result, counts.then_some(record.outcome));
                    }
                    if let Some(record) = record {
                        self.records.insert(lock, *record);
                        self.note(lock, WatchEvent::Outcome(*record));
                    }
                    if let Some(record) = run.as_ref().and_then(|run| RunRecord::of(run, Timestamp(now))) {
                        self.put_run(lock, record, now);
                    }
                    self.remove(lock, entry_key);
                    if let Some((entry_key, owner)) = next {
                        self.put(lock, entry_key, Some((**owner).clone()), Some(lease.0.clone()));
                    }
                }
            }
        }
        let results = ask.wants_results.then(|| self.results.get(&lock).cloned().unwrap_or_default());
        let results = results.unwrap_or_default();
        Ok(QueueSnapshot { runs: self.runs_of(ask, now), results, ..self.line(lock) })
    }

    /// `counts`: how the run ended, if it counts for a while.
    fn put_result(&mut self, lock: LockId, result: &OwnResult, counts: Option<Outcome>) {
        let of = match counts.filter(|_| result.content.is_ok()) {
            None => ResultOf::Done,
            Some(Outcome::Exit(0)) => ResultOf::Success,
            Some(_) => ResultOf::Failure,
        };
        let sharer = u64::from(result.user.uid.unwrap());
        let result = SharedResult { of, token: result.token, sharer, content: result.content.clone() };
        self.note(lock, WatchEvent::Result(result.clone()));
        self.drop_result(lock, of);
        self.results.entry(lock).or_default().push(result);
    }

    fn drop_result(&mut self, lock: LockId, of: ResultOf) {
        if let Some(results) = self.results.get_mut(&lock) {
            results.retain(|result| result.of != of);
        }
    }

    fn put_run(&mut self, lock: LockId, record: RunRecord, now: u64) {
        self.note(lock, WatchEvent::Ran(record.clone()));
        let until = now + record.ttl_secs() * 1000;
        self.runs.insert((lock, record.outcome == Outcome::Exit(0)), StoredRun { record, put: now, until });
    }

    /// Returns the runs with their ages, as the leases of their records tell.
    fn runs_of(&self, ask: &ClusterRequest, now: u64) -> Vec<RunRecord> {
        let runs = self.runs.iter().filter(|((lock, _), _)| *lock == ask.lock);
        let runs = runs.map(|(_, run)| {
            let mut record = run.record.clone();
            if !ask.known_runs.contains(&record.token) {
                record.grow_older((run.until - run.put) / 1000, (run.until - now) / 1000);
            }
            record
        });
        runs.collect()
    }

    /// Returns the token of the last run that succeeded, and for how long it counts.
    pub(super) fn last_success(&self, lock: LockId) -> Option<(Token, u64)> {
        self.runs.get(&(lock, true)).map(|run| (run.record.token, run.record.counts_for_ms))
    }

    /// The runs of a lock are forgotten. Returns `true` if there was one.
    pub(super) fn forget(&mut self, lock: LockId) -> bool {
        self.revision += 1;
        let known = [true, false].into_iter().filter(|kind| self.runs.remove(&(lock, *kind)).is_some());
        let known: Vec<bool> = known.collect();
        self.results.remove(&lock);
        for &is_success in &known {
            self.note(lock, WatchEvent::RunGone { is_success });
        }
        !known.is_empty()
    }

    /// The record of the newest request is gone.
    pub(super) fn forget_newest(&mut self, lock: LockId) {
        if self.newest.remove(&lock).is_some() {
            self.revision += 1;
            self.note(lock, WatchEvent::Newest(None));
        }
    }

    /// An election gives the leases of the records their whole time again.
    pub(super) fn elect(&mut self, now: u64) {
        self.runs.values_mut().for_each(|run| run.until = now + (run.until - run.put));
    }

    pub(super) fn line(&self, lock: LockId) -> QueueSnapshot {
        let mut entries: Vec<Entry> = self
            .entries
            .iter()
            .filter(|((of, _), _)| *of == lock)
            .map(|(_, (entry, _))| entry.clone())
            .collect();
        entries.sort_by_key(|entry| entry.revision);
        let last = self.records.get(&lock).copied();
        let newest = self.newest.get(&lock).map(|(seen, _)| seen.clone());
        QueueSnapshot { revision: self.revision(), entries, last, newest, ..QueueSnapshot::default() }
    }

    /// Another program makes an entry, or removes it.
    pub(super) fn other_program(&mut self, lock: LockId) {
        self.revision += 1;
        match self.has_other_program(lock) {
            true => self.remove(lock, &other()),
            false => self.put(lock, &other(), None, None),
        }
    }

    pub(super) fn has_other_program(&self, lock: LockId) -> bool {
        self.entries.contains_key(&(lock, other()))
    }

    /// Goes back to an earlier store, which is started then.
    pub(super) fn go_back_to(&mut self, earlier: Store) {
        *self = Store { era: self.era + 1, ..earlier };
    }

    /// Is started anew, which takes until `up`. Leases have their whole time again then.
    pub(super) fn restart(&mut self, up: u64, ttl: u64) {
        self.down_until = up;
        self.leases.values_mut().for_each(|end| *end = up + ttl);
    }

    /// Grants or renews a lease.
    pub(super) fn renew(&mut self, lease: &LeaseName, is_new: bool, end: u64) -> Result<Revision, Failure> {
        match self.leases.get_mut(&lease.0) {
            Some(until) => *until = end,
            None if is_new => drop(self.leases.insert(lease.0.clone(), end)),
            None => return Err(Failure::LeaseGone),
        }
        Ok(self.revision())
    }

    /// Something is written that concerns no lock.
    pub(super) fn sign_of_life(&mut self) -> Revision {
        self.revision += 1;
        self.revision()
    }

    /// Returns the entries of a lease in the queues of these locks, by their tokens.
    pub(super) fn presence(&self, locks: &[LockId], lease: &LeaseName) -> BTreeSet<(LockId, Token)> {
        let is_its =
            |lock: &LockId, of: &Option<String>| locks.contains(lock) && of.as_ref() == Some(&lease.0);
        let entries = self.entries.iter().filter(|((lock, _), (_, of))| is_its(lock, of));
        entries.map(|((lock, _), (entry, _))| (*lock, Token(entry.revision.0 as u64))).collect()
    }

    /// Returns `true` if this happened.
    pub(super) fn has_happened(&self, event: &(Revision, LockId, WatchEvent)) -> bool {
        self.history.contains(event)
    }

    /// Ends the leases that have expired, and returns how many.
    pub(super) fn expire(&mut self, now: u64) -> u64 {
        if now < self.down_until {
            return 0;
        }
        let over: Vec<_> =
            self.runs.iter().filter(|(_, run)| run.until <= now).map(|(key, _)| *key).collect();
        for (lock, is_success) in over {
            self.revision += 1;
            self.runs.remove(&(lock, is_success));
            self.drop_result(lock, if is_success { ResultOf::Success } else { ResultOf::Failure });
            self.note(lock, WatchEvent::RunGone { is_success });
        }
        let over: Vec<LockId> =
            self.newest.iter().filter(|(_, (_, until))| *until <= now).map(|(lock, _)| *lock).collect();
        over.into_iter().for_each(|lock| self.forget_newest(lock));
        let due: Vec<String> =
            self.leases.iter().filter(|(_, at)| **at <= now).map(|(name, _)| name.clone()).collect();
        due.iter().for_each(|lease| self.revoke(lease));
        due.len() as u64
    }

    pub(super) fn revoke(&mut self, lease: &str) {
        self.leases.remove(lease);
        let entries = self.entries.iter().filter(|(_, (_, of))| of.as_deref() == Some(lease));
        let entries: Vec<(LockId, EntryKey)> = entries.map(|(entry, _)| entry.clone()).collect();
        self.revision += 1;
        entries.iter().for_each(|(lock, entry_key)| self.remove(*lock, entry_key));
    }

    /// Returns what happened since `position`, which is moved on. `None`: it is forgotten.
    pub(super) fn watch(&self, position: &mut usize) -> Option<&[(Revision, LockId, WatchEvent)]> {
        if *position < self.compacted || *position > self.history.len() {
            *position = self.history.len();
            return None;
        }
        let news = &self.history[*position..];
        // The events of one revision come together.
        *position = self.history.len();
        Some(news)
    }

    pub(super) fn history_length(&self) -> usize {
        self.history.len()
    }

    /// Returns the locks in whose queues a lease has entries.
    pub(super) fn locks_of(&self, lease: &str) -> Vec<LockId> {
        let entries = self.entries.iter().filter(|(_, (_, of))| of.as_deref() == Some(lease));
        entries.map(|((lock, _), _)| *lock).collect()
    }

    pub(super) fn compact(&mut self) {
        self.compacted = self.history.len();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn put(&mut self, lock: LockId, entry_key: &EntryKey, owner: Option<Owner>, lease: Option<String>) {
        let entry = Entry { entry_key: entry_key.clone(), revision: self.revision(), owner };
        self.entries.insert((lock, entry_key.clone()), (entry.clone(), lease));
        self.note(lock, WatchEvent::Added(entry));
    }

    fn remove(&mut self, lock: LockId, entry_key: &EntryKey) {
        self.entries.remove(&(lock, entry_key.clone()));
        self.note(lock, WatchEvent::Removed(entry_key.clone()));
    }

    fn note(&mut self, lock: LockId, event: WatchEvent) {
        self.history.push((self.revision(), lock, event));
    }
}

/// The key of an entry of another program; its bytes are no text.
fn other() -> EntryKey {
    EntryKey(vec![0xff, 0xfe])
}
