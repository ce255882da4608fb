//! The queue of one lock among the hosts: its line as far as it is known, this host's place in it, and what to ask next.

use std::collections::BTreeMap;

use super::{
    Asked, Entry, Failure, LeaseName, OutcomeRecord, Owner, QueueOp, QueueSnapshot, Revision, WatchEvent,
};
use crate::proto::{LockId, Outcome, Token};
use crate::table::{ArrivalMark, Effects, Table, Timestamp};

#[derive(Debug, Default)]
pub(super) struct LockQueue {
    /// The first holds.
    line: BTreeMap<Revision, Entry>,
    /// The revision that the line is true of. `None`: it is not known.
    as_of: Option<Revision>,
    /// The last revision that something was heard of before the line was known.
    missed: Revision,
    /// It must be read before anything else, because it is not certain what has been done.
    must_read: bool,
    /// How the last hold ended that anybody has told of.
    last: Option<OutcomeRecord>,
    /// The hold of another host that the table knows of.
    told: Option<Told>,
    /// What this host's place is called, and what the one is called that may have taken its stead.
    mine: Option<String>,
    next: Option<String>,
    /// The place is to be given up.
    leaves: Option<Leaving>,
    asked: Option<Asked>,
    /// Those who had come before the last question that was answered.
    mark: Option<ArrivalMark>,
}

#[derive(Clone, Copy, Debug)]
struct Told {
    token: Token,
    is_kmutex: bool,
}

#[derive(Clone, Copy, Debug)]
struct Leaving {
    token: Token,
    record: Option<OutcomeRecord>,
}

impl LockQueue {
    /// One of which something is known, and nothing certain.
    pub(super) fn unread() -> LockQueue {
        LockQueue { must_read: true, ..LockQueue::default() }
    }

    pub(super) fn first(&self) -> Option<&Entry> {
        self.line.first_key_value().map(|(_, entry)| entry)
    }

    /// A hold of this host has ended.
    pub(super) fn ended(&mut self, token: Token, outcome: Outcome) {
        // After a restart it may not be known yet what the place is called, nor whether it is there.
        if self.mine.is_some() || self.as_of.is_none() {
            // To say nothing is to say that the holder has vanished.
            let record = (outcome != Outcome::Vanished).then_some(OutcomeRecord { token, outcome });
            self.leaves = Some(Leaving { token, record });
        }
    }

    pub(super) fn lose_place(&mut self) {
        (self.mine, self.next, self.leaves) = (None, None, None);
    }

    /// What happened up to this revision is not known.
    pub(super) fn forget_line(&mut self, revision: Revision) {
        self.as_of = None;
        self.missed = revision;
        self.must_read = true;
    }

    pub(super) fn watch_event(&mut self, revision: Revision, what: WatchEvent) {
        let Some(as_of) = self.as_of else {
            self.missed = self.missed.max(revision);
            return;
        };
        // Several events may have the same revision; what is done twice is done once.
        if revision < as_of {
            return;
        }
        self.as_of = Some(revision);
        match what {
            WatchEvent::Added(entry) => drop(self.line.insert(entry.revision, entry)),
            WatchEvent::Removed(place) => self.line.retain(|_, entry| entry.place != place),
            WatchEvent::Outcome(record) => self.last = Some(record),
        }
    }

    pub(super) fn asked(&mut self, id: u64, mark: ArrivalMark, what: &QueueOp) {
        self.asked = Some(Asked { id, mark });
        match what {
            QueueOp::Read => {}
            QueueOp::TryAcquire { place, .. } | QueueOp::Enqueue { place, .. } => {
                self.mine = Some(place.clone())
            }
            QueueOp::Release { next, .. } => self.next = next.as_ref().map(|(place, _)| place.clone()),
        }
    }

    pub(super) fn answered(&mut self, id: u64, line: QueueSnapshot) {
        let Some(asked) = self.asked.take_if(|asked| asked.id == id) else { return };
        if self.as_of.is_none_or(|as_of| as_of <= line.revision) {
            self.as_of = Some(line.revision);
            self.line = line.entries.into_iter().map(|one| (one.revision, one)).collect();
            self.last = line.last;
        }
        self.must_read = self.missed > line.revision;
        self.missed = Revision(0);
        if self.must_read {
            self.as_of = None;
        }
        self.mark = Some(asked.mark);
        self.find_place();
    }

    /// What this host's place is by now.
    fn find_place(&mut self) {
        if let Some(next) = self.next.take()
            && self.revision_of(&next).is_some()
        {
            self.mine = Some(next);
            self.leaves = None;
        } else if let Some(mine) = &self.mine {
            if self.revision_of(mine).is_none() {
                self.lose_place();
            }
        } else if let Some(Leaving { token, .. }) = self.leaves {
            match self.line.get(&Revision(token.0 as i64)) {
                Some(place) => self.mine = Some(place.place.clone()),
                None => self.lose_place(),
            }
        }
    }

    fn revision_of(&self, place: &str) -> Option<Revision> {
        self.line.values().find(|entry| entry.place == place).map(|entry| entry.revision)
    }

    /// There is no answer to a question. Returns the mark of those whom it concerned.
    pub(super) fn not_answered(&mut self, id: u64, failure: Failure) -> Option<ArrivalMark> {
        let asked = self.asked.take_if(|asked| asked.id == id)?;
        if failure == Failure::Unknown || self.as_of.is_none() {
            self.must_read = true;
        } else {
            self.find_place();
        }
        Some(asked.mark)
    }

    /// Tells the table what is true of the other hosts, and what this one has won.
    pub(super) fn update_table(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        lock: LockId,
        effects: &mut Effects,
    ) {
        if self.must_read || self.as_of.is_none() {
            return;
        }
        let first = self.first().map(|first| (Token(first.revision.0 as u64), first.owner.is_some()));
        if let Some(held) = table.held_here(lock) {
            match self.line.get(&Revision(held.0 as i64)) {
                Some(place) if self.mine.is_none() => self.mine = Some(place.place.clone()),
                Some(_) => {}
                // Somebody has removed it.
                None => {
                    self.lose_place();
                    table.revoke(now, lock, effects);
                }
            }
            return;
        }
        if let Some(told) = self.told
            && first.is_none_or(|(token, _)| token != told.token)
        {
            self.told = None;
            table.remote_hold_ended(now, lock, self.outcome_of(told), effects);
        }
        let Some((token, is_kmutex)) = first else { return };
        let place = self.first().map(|first| &first.place);
        if self.next.is_some() && place == self.next.as_ref() {
            // The watch was faster than the answer, which will say that this is mine.
        } else if self.mine.is_some() && place == self.mine.as_ref() {
            if self.leaves.is_none() && !table.cluster_granted(now, lock, token, effects) {
                self.leaves = Some(Leaving { token, record: None });
            }
        } else if table.find(lock).is_some() {
            self.told = Some(Told { token, is_kmutex });
            table.remote_hold_seen(now, lock, token, self.mark.unwrap_or(ArrivalMark::NONE), effects);
        }
    }

    /// How a hold ended whose place is gone.
    fn outcome_of(&self, told: Told) -> Outcome {
        match self.last {
            // Either its own word, or that of one who came after it, which will do for those who waited.
            Some(last) if last.token >= told.token => last.outcome,
            _ if told.is_kmutex => Outcome::Vanished,
            _ => Outcome::Unknown,
        }
    }

    /// What is to be asked now. A new place would be called `place`.
    pub(super) fn question(
        &mut self,
        table: &Table,
        lock: LockId,
        lease: &LeaseName,
        place: String,
    ) -> Option<QueueOp> {
        if self.asked.is_some() {
            return None;
        }
        let needs = table.cluster_needs(lock);
        if self.must_read || (self.as_of.is_none() && table.held_here(lock).is_some()) {
            return Some(QueueOp::Read);
        }
        let owner = || {
            let key = table.find(lock).and_then(|lock| lock.key().map(String::from));
            let entry = table.first_in_line(lock);
            Box::new(entry.map(|one| Owner::of(key.as_deref(), &one)).unwrap_or_default())
        };
        if let Some(orphan_entry) = self.orphan_entry(lease) {
            let (place, revision) = (orphan_entry.place.clone(), orphan_entry.revision);
            return Some(QueueOp::Release { place, revision, record: None, next: None });
        }
        let Some((mine, revision)) = self.place() else {
            return match needs {
                _ if needs.queue_place => Some(QueueOp::Enqueue { place, owner: owner() }),
                _ if needs.free_or_busy || needs.takeover => {
                    Some(QueueOp::TryAcquire { place, owner: owner() })
                }
                _ => None,
            };
        };
        let held = table.held_here(lock).is_some();
        if self.leaves.is_none() && !held && !needs.queue_place {
            // Nobody waits for their turn any more. From here on there is no way back: a question to give up a place may
            // come through late, when it was long taken for lost.
            self.leaves = Some(Leaving { token: Token(revision.0 as u64), record: None });
        }
        match self.leaves {
            Some(Leaving { record, .. }) => {
                let next = needs.queue_place.then(|| (place, owner()));
                Some(QueueOp::Release { place: mine, revision, record, next })
            }
            None if needs.free_or_busy && !held => Some(QueueOp::Read),
            None => None,
        }
    }

    /// True when there is something to ask, or will be.
    pub(super) fn needs(&self, table: &Table, lock: LockId, lease: Option<&LeaseName>) -> bool {
        self.asked.is_none()
            && (self.must_read
                || self.leaves.is_some()
                || !table.cluster_needs(lock).is_nothing()
                || (self.as_of.is_none() && table.held_here(lock).is_some())
                || (self.mine.is_some() && table.held_here(lock).is_none())
                || self.has_orphan_entry(lease))
    }

    /// True when nothing is left to do or to know.
    pub(super) fn is_over(&self, table: &Table, lock: LockId, lease: Option<&LeaseName>) -> bool {
        self.asked.is_none()
            && !self.must_read
            && self.mine.is_none()
            && table.find(lock).is_none()
            && !self.has_orphan_entry(lease)
    }

    fn place(&self) -> Option<(String, Revision)> {
        let mine = self.mine.clone()?;
        let revision = self.revision_of(&mine)?;
        Some((mine, revision))
    }

    fn has_orphan_entry(&self, lease: Option<&LeaseName>) -> bool {
        lease.is_some_and(|lease| self.orphan_entry(lease).is_some())
    }

    /// A place of this host that is not the one it knows of.
    fn orphan_entry(&self, lease: &LeaseName) -> Option<&Entry> {
        let is_mine = |entry: &&Entry| Some(&entry.place) == self.mine.as_ref();
        self.line.values().filter(|entry| lease.is_of(&entry.place)).find(|one| !is_mine(one))
    }
}
