//! A model of etcd, as far as the hosts can tell.

use std::collections::BTreeMap;

use super::super::{
    ClusterRequest, Entry, EntryKey, Failure, LeaseName, OutcomeRecord, Owner, QueueOp, QueueSnapshot,
    Revision, WatchEvent,
};
use crate::proto::LockId;

#[derive(Clone, Default)]
pub(super) struct Store {
    revision: i64,
    entries: BTreeMap<(LockId, EntryKey), (Entry, Option<String>)>,
    records: BTreeMap<LockId, OutcomeRecord>,
    /// When each expires.
    pub(super) leases: BTreeMap<String, u64>,
    history: Vec<(Revision, LockId, WatchEvent)>,
    /// The events before this one are forgotten.
    compacted: usize,
    /// How many times the store went back.
    pub(super) era: u64,
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
    ) -> Result<QueueSnapshot, Failure> {
        let is_leased = self.leases.contains_key(&lease.0);
        let lock = ask.lock;
        match &ask.op {
            QueueOp::Read => {}
            QueueOp::TryAcquire { entry_key, owner } | QueueOp::Enqueue { entry_key, owner } => {
                let tries = matches!(ask.op, QueueOp::TryAcquire { .. });
                let is_free = if tries {
                    self.line(lock).entries.is_empty()
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
            QueueOp::Release { entry_key, revision, record, next } => {
                let there = self.entries.get(&(lock, entry_key.clone()));
                if there.is_some_and(|(entry, _)| entry.revision == *revision) {
                    if !is_leased && (record.is_some() || next.is_some()) {
                        return Err(Failure::LeaseGone);
                    }
                    self.revision += 1;
                    if let Some(record) = record {
                        self.records.insert(lock, *record);
                        self.note(lock, WatchEvent::Outcome(*record));
                    }
                    self.remove(lock, entry_key);
                    if let Some((entry_key, owner)) = next {
                        self.put(lock, entry_key, Some((**owner).clone()), Some(lease.0.clone()));
                    }
                }
            }
        }
        Ok(self.line(lock))
    }

    pub(super) fn line(&self, lock: LockId) -> QueueSnapshot {
        let mut entries: Vec<Entry> = self
            .entries
            .iter()
            .filter(|((of, _), _)| *of == lock)
            .map(|(_, (entry, _))| entry.clone())
            .collect();
        entries.sort_by_key(|entry| entry.revision);
        QueueSnapshot { revision: self.revision(), entries, last: self.records.get(&lock).copied() }
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

    /// Goes back to an earlier store. Leases begin anew there, as they do when etcd starts.
    pub(super) fn go_back_to(&mut self, mut earlier: Store, lease_end: u64) {
        earlier.leases.values_mut().for_each(|end| *end = lease_end);
        earlier.era = self.era + 1;
        *self = earlier;
    }

    /// Returns `true` if this happened.
    pub(super) fn has_happened(&self, event: &(Revision, LockId, WatchEvent)) -> bool {
        self.history.contains(event)
    }

    /// Ends the leases that have expired, and returns how many.
    pub(super) fn expire(&mut self, now: u64) -> u64 {
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
