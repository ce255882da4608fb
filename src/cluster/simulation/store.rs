//! Etcd, as far as the hosts can tell.

use std::collections::BTreeMap;

use super::super::{Ask, Contender, Failure, Heard, LeaseName, Line, Question, Record, Revision};
use crate::proto::LockId;

#[derive(Default)]
pub(super) struct Store {
    revision: i64,
    /// By lock and name.
    places: BTreeMap<(LockId, String), (Contender, Option<String>)>,
    records: BTreeMap<LockId, Record>,
    /// When each expires.
    pub(super) leases: BTreeMap<String, u64>,
    history: Vec<(Revision, LockId, Heard)>,
    /// What lies before is forgotten.
    compacted: usize,
}

impl Store {
    pub(super) fn revision(&self) -> Revision {
        Revision(self.revision)
    }

    /// Carries out a question, as one transaction.
    pub(super) fn carry_out(&mut self, ask: &Ask, lease: &LeaseName) -> Result<Line, Failure> {
        let is_leased = self.leases.contains_key(&lease.0);
        let lock = ask.lock;
        match &ask.what {
            Question::Read => {}
            Question::Try { place, claim } | Question::Stand { place, claim } => {
                let tries = matches!(ask.what, Question::Try { .. });
                let is_free = if tries {
                    self.line(lock).contenders.is_empty()
                } else {
                    !self.places.contains_key(&(lock, place.clone()))
                };
                if is_free {
                    if !is_leased {
                        return Err(Failure::LeaseGone);
                    }
                    self.revision += 1;
                    self.put(lock, place, Some((**claim).clone()), Some(lease.0.clone()));
                }
            }
            Question::Leave { place, revision, record, next } => {
                let there = self.places.get(&(lock, place.clone()));
                if there.is_some_and(|(contender, _)| contender.revision == *revision) {
                    if !is_leased && (record.is_some() || next.is_some()) {
                        return Err(Failure::LeaseGone);
                    }
                    self.revision += 1;
                    if let Some(record) = record {
                        self.records.insert(lock, *record);
                        self.note(lock, Heard::Recorded(*record));
                    }
                    self.remove(lock, place);
                    if let Some((place, claim)) = next {
                        self.put(lock, place, Some((**claim).clone()), Some(lease.0.clone()));
                    }
                }
            }
        }
        Ok(self.line(lock))
    }

    pub(super) fn line(&self, lock: LockId) -> Line {
        let mut contenders: Vec<Contender> = self
            .places
            .iter()
            .filter(|((of, _), _)| *of == lock)
            .map(|(_, (contender, _))| contender.clone())
            .collect();
        contenders.sort_by_key(|contender| contender.revision);
        Line { revision: self.revision(), contenders, last: self.records.get(&lock).copied() }
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
    pub(super) fn watch(&self, position: &mut usize) -> Option<&[(Revision, LockId, Heard)]> {
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

    fn put(&mut self, lock: LockId, place: &str, claim: Option<super::super::Claim>, lease: Option<String>) {
        let contender = Contender { place: place.into(), revision: self.revision(), claim };
        self.places.insert((lock, place.into()), (contender.clone(), lease));
        self.note(lock, Heard::Joined(contender));
    }

    fn remove(&mut self, lock: LockId, place: &str) {
        self.places.remove(&(lock, place.into()));
        self.note(lock, Heard::Left(place.into()));
    }

    fn note(&mut self, lock: LockId, what: Heard) {
        self.history.push((self.revision(), lock, what));
    }
}
