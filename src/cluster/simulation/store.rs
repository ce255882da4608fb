//! Etcd, as far as the hosts can tell.

use std::collections::BTreeMap;

use super::super::{
    ClusterRequest, Entry, Failure, LeaseName, OutcomeRecord, QueueOp, QueueSnapshot, Revision, WatchEvent,
};
use crate::proto::LockId;

#[derive(Default)]
pub(super) struct Store {
    revision: i64,
    /// By lock and name.
    places: BTreeMap<(LockId, String), (Entry, Option<String>)>,
    records: BTreeMap<LockId, OutcomeRecord>,
    /// When each expires.
    pub(super) leases: BTreeMap<String, u64>,
    history: Vec<(Revision, LockId, WatchEvent)>,
    /// What lies before is forgotten.
    compacted: usize,
}

impl Store {
    pub(super) fn revision(&self) -> Revision {
        Revision(self.revision)
    }

    /// Carries out a question, as one transaction.
    pub(super) fn carry_out(
        &mut self,
        ask: &ClusterRequest,
        lease: &LeaseName,
    ) -> Result<QueueSnapshot, Failure> {
        let is_leased = self.leases.contains_key(&lease.0);
        let lock = ask.lock;
        match &ask.what {
            QueueOp::Read => {}
            QueueOp::TryAcquire { place, owner } | QueueOp::Enqueue { place, owner } => {
                let tries = matches!(ask.what, QueueOp::TryAcquire { .. });
                let is_free = if tries {
                    self.line(lock).entries.is_empty()
                } else {
                    !self.places.contains_key(&(lock, place.clone()))
                };
                if is_free {
                    if !is_leased {
                        return Err(Failure::LeaseGone);
                    }
                    self.revision += 1;
                    self.put(lock, place, Some((**owner).clone()), Some(lease.0.clone()));
                }
            }
            QueueOp::Release { place, revision, record, next } => {
                let there = self.places.get(&(lock, place.clone()));
                if there.is_some_and(|(entry, _)| entry.revision == *revision) {
                    if !is_leased && (record.is_some() || next.is_some()) {
                        return Err(Failure::LeaseGone);
                    }
                    self.revision += 1;
                    if let Some(record) = record {
                        self.records.insert(lock, *record);
                        self.note(lock, WatchEvent::Outcome(*record));
                    }
                    self.remove(lock, place);
                    if let Some((place, owner)) = next {
                        self.put(lock, place, Some((**owner).clone()), Some(lease.0.clone()));
                    }
                }
            }
        }
        Ok(self.line(lock))
    }

    pub(super) fn line(&self, lock: LockId) -> QueueSnapshot {
        let mut entries: Vec<Entry> = self
            .places
            .iter()
            .filter(|((of, _), _)| *of == lock)
            .map(|(_, (entry, _))| entry.clone())
            .collect();
        entries.sort_by_key(|entry| entry.revision);
        QueueSnapshot { revision: self.revision(), entries, last: self.records.get(&lock).copied() }
    }

    /// Somebody who is no kmutex takes a place, or gives it up.
    pub(super) fn other_program(&mut self, lock: LockId) {
        self.revision += 1;
        match self.places.contains_key(&(lock, "other".into())) {
            true => self.remove(lock, "other"),
            false => self.put(lock, "other", None, None),
        }
    }

    pub(super) fn has_other_program(&self, lock: LockId) -> bool {
        self.places.contains_key(&(lock, "other".into()))
    }

    /// Ends the leases whose time is up, and returns how many.
    pub(super) fn expire(&mut self, now: u64) -> u64 {
        let due: Vec<String> =
            self.leases.iter().filter(|(_, at)| **at <= now).map(|(name, _)| name.clone()).collect();
        due.iter().for_each(|lease| self.revoke(lease));
        due.len() as u64
    }

    pub(super) fn revoke(&mut self, lease: &str) {
        self.leases.remove(lease);
        let places = self.places.iter().filter(|(_, (_, of))| of.as_deref() == Some(lease));
        let places: Vec<(LockId, String)> = places.map(|(place, _)| place.clone()).collect();
        self.revision += 1;
        places.iter().for_each(|(lock, place)| self.remove(*lock, place));
    }

    /// What has happened since `position`, which is moved on. `None`: it is forgotten.
    pub(super) fn watch(&self, position: &mut usize) -> Option<&[(Revision, LockId, WatchEvent)]> {
        if *position < self.compacted {
            *position = self.history.len();
            return None;
        }
        let news = &self.history[*position..];
        // What belongs to one revision comes together.
        *position = self.history.len();
        Some(news)
    }

    /// In which lines a lease has places.
    pub(super) fn places_of(&self, lease: &str) -> Vec<LockId> {
        let places = self.places.iter().filter(|(_, (_, of))| of.as_deref() == Some(lease));
        places.map(|((lock, _), _)| *lock).collect()
    }

    pub(super) fn compact(&mut self) {
        self.compacted = self.history.len();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    fn put(&mut self, lock: LockId, place: &str, owner: Option<super::super::Owner>, lease: Option<String>) {
        let entry = Entry { place: place.into(), revision: self.revision(), owner };
        self.places.insert((lock, place.into()), (entry.clone(), lease));
        self.note(lock, WatchEvent::Added(entry));
    }

    fn remove(&mut self, lock: LockId, place: &str) {
        self.places.remove(&(lock, place.into()));
        self.note(lock, WatchEvent::Removed(place.into()));
    }

    fn note(&mut self, lock: LockId, what: WatchEvent) {
        self.history.push((self.revision(), lock, what));
    }
}
