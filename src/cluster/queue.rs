//! The queue of one lock among the hosts: its entries as far as they are known, this host's own entry, and the next
//! request.

use std::collections::BTreeMap;

use super::turn::Turn;
use super::{
    Asked, Entry, EntryKey, Failure, LeaseName, OutcomeRecord, Owner, QueueOp, QueueSnapshot, Revision,
    WatchEvent,
};
use crate::proto::v2::Mode;
use crate::proto::{LockId, Outcome, Token};
use crate::table::{ArrivalMark, Effects, Table, Timestamp};

/// What a host needs to be granted a lock, and to keep it.
#[derive(Clone, Copy)]
pub(super) struct Standing<'a> {
    pub(super) lease: Option<&'a LeaseName>,
    pub(super) is_watching: bool,
}

#[derive(Debug, Default)]
pub(super) struct LockQueue {
    /// In the order in which they hold the lock. One transaction of another program may make several entries.
    entries: BTreeMap<(Revision, EntryKey), Entry>,
    /// The revision that the entries are true of. `None`: they are not known.
    as_of: Option<Revision>,
    /// The last revision of an event that came while the entries were not known.
    missed: Revision,
    /// The queue must be read before anything else, because it is not certain what was done.
    must_read: bool,
    /// How the last hold ended that a host recorded.
    last: Option<OutcomeRecord>,
    /// The hold of another host that the table knows.
    told: Option<Told>,
    /// This host's entry, and the one that may have replaced it.
    own: Option<EntryKey>,
    next: Option<EntryKey>,
    /// The lock's key, if the client of this host's entry said it.
    name: Option<String>,
    /// This host's entry is to be released.
    leaving: Option<Leaving>,
    asked: Option<Asked>,
    /// Whether the runs that count are known, since the first answer.
    knows_runs: bool,
    /// Behind the clients that had come before the last request that was answered.
    mark: Option<ArrivalMark>,
    turn: Turn,
}

#[derive(Clone, Copy, Debug)]
struct Told {
    token: Token,
    is_kmutex: bool,
    is_of_earlier_store: bool,
}

#[derive(Clone, Copy, Debug)]
struct Leaving {
    token: Token,
    record: Option<OutcomeRecord>,
}

impl LockQueue {
    /// A queue of which something is known, and nothing certain.
    pub(super) fn unread() -> LockQueue {
        LockQueue { must_read: true, ..LockQueue::default() }
    }

    pub(super) fn first(&self) -> Option<&Entry> {
        self.entries.first_key_value().map(|(_, entry)| entry)
    }

    /// Returns `true` if the entries are known.
    pub(super) fn is_current(&self) -> bool {
        self.as_of.is_some() && !self.must_read
    }

    /// Returns `true` if what was read as of this revision is not older than what is known.
    pub(super) fn may_learn(&self, revision: Revision) -> bool {
        self.as_of.unwrap_or(self.missed) <= revision
    }

    /// Returns how a hold of this host ended, if etcd has not confirmed that it knows.
    pub(super) fn untold(&self) -> Option<(Option<&str>, OutcomeRecord)> {
        Some((self.name.as_deref(), self.leaving?.record?))
    }

    /// Returns the tokens of the holds whose ends etcd may not know yet.
    pub(super) fn untold_tokens(&self) -> Vec<Token> {
        let standing = self.entries.values().map(|entry| Token(entry.revision.0 as u64));
        standing.chain(self.leaving.map(|leaving| leaving.token)).collect()
    }

    /// A hold of this host has ended.
    pub(super) fn ended(&mut self, token: Token, outcome: Outcome) {
        // After a restart, the key of the entry may not be known yet, nor whether the entry exists.
        if self.own.is_some() || self.as_of.is_none() {
            // No record means that the holder vanished.
            let record = (outcome != Outcome::Vanished).then_some(OutcomeRecord { token, outcome });
            self.leaving = Some(Leaving { token, record });
        }
    }

    pub(super) fn lose_entry(&mut self) {
        (self.own, self.next, self.leaving) = (None, None, None);
    }

    /// What happened up to this revision is not known.
    pub(super) fn forget_entries(&mut self, revision: Revision) {
        self.as_of = None;
        self.missed = revision;
        self.must_read = true;
    }

    /// Nothing that was read, or is being read, is true any more.
    pub(super) fn forget_store(&mut self) {
        self.forget_entries(Revision(0));
        self.entries.clear();
        if let Some(told) = &mut self.told {
            told.is_of_earlier_store = true;
        }
        (self.last, self.asked, self.mark, self.turn) = (None, None, None, Turn::default());
    }

    pub(super) fn watch_event(&mut self, revision: Revision, event: WatchEvent) {
        let Some(as_of) = self.as_of else {
            self.missed = self.missed.max(revision);
            return;
        };
        // Several events may have the same revision. To apply one twice changes nothing.
        if revision < as_of {
            return;
        }
        self.as_of = Some(revision);
        match event {
            WatchEvent::Added(entry) => self.insert(entry),
            WatchEvent::Removed(entry_key) => self.entries.retain(|_, entry| entry.entry_key != entry_key),
            WatchEvent::Outcome(record) => self.last = Some(record),
            // The table knows.
            WatchEvent::Ran(_) | WatchEvent::RunGone { .. } => {}
        }
        self.note_turn(self.mark);
    }

    /// The queue has changed. `mark` is that of an answer from before the change.
    fn note_turn(&mut self, mark: Option<ArrivalMark>) {
        let first = self.first().map(|first| {
            let is_batch = first.owner.as_ref().is_some_and(|owner| owner.mode == Mode::Coalesce);
            (Token(first.revision.0 as u64), is_batch)
        });
        self.turn.changes_to(first, self.as_of.unwrap_or(self.missed), mark.unwrap_or(ArrivalMark::NONE));
    }

    fn insert(&mut self, entry: Entry) {
        self.entries.insert((entry.revision, entry.entry_key.clone()), entry);
    }

    pub(super) fn asked(&mut self, id: u64, mark: ArrivalMark, op: &QueueOp) {
        self.asked = Some(Asked { id, mark });
        match op {
            QueueOp::Read => {}
            QueueOp::TryAcquire { entry_key, owner, .. } | QueueOp::Enqueue { entry_key, owner } => {
                self.own = Some(entry_key.clone());
                self.name.clone_from(&owner.key);
            }
            QueueOp::Release { next, .. } => {
                self.next = next.as_ref().map(|(entry_key, _)| entry_key.clone());
                self.turn.leaves(mark);
            }
        }
    }

    /// Returns `true` if the answer is not older than what the watch has shown.
    pub(super) fn answered(&mut self, id: u64, snapshot: QueueSnapshot, lease: Option<&LeaseName>) -> bool {
        let Some(asked) = self.asked.take_if(|asked| asked.id == id) else { return false };
        self.knows_runs = true;
        let mut is_news = self.as_of.is_none_or(|as_of| as_of <= snapshot.revision);
        if is_news {
            self.as_of = Some(snapshot.revision);
            self.entries.clear();
            snapshot.entries.into_iter().for_each(|entry| self.insert(entry));
            self.last = snapshot.last;
        }
        self.must_read = self.missed > snapshot.revision;
        self.missed = Revision(0);
        if self.must_read {
            self.as_of = None;
            is_news = false;
        }
        self.note_turn(self.mark);
        self.mark = Some(asked.mark);
        self.find_own(lease);
        is_news
    }

    /// Finds out which entry is this host's by now.
    fn find_own(&mut self, lease: Option<&LeaseName>) {
        if let Some(next) = self.next.take()
            && self.revision_of(&next).is_some()
        {
            self.own = Some(next);
            if let Some(left) = self.leaving.take() {
                self.turn.has_left(left.token);
            }
        } else if let Some(own) = &self.own {
            if self.revision_of(own).is_none() {
                self.lose_entry();
            }
        } else if let Some(Leaving { token, .. }) = self.leaving {
            match self.own_entry_of(token, lease) {
                Some(entry) => self.own = Some(entry.entry_key.clone()),
                None => self.lose_entry(),
            }
        }
    }

    fn revision_of(&self, entry_key: &EntryKey) -> Option<Revision> {
        self.entries.values().find(|entry| entry.entry_key == *entry_key).map(|entry| entry.revision)
    }

    /// Returns the entry with this token, if a daemon with this lease made it.
    fn own_entry_of(&self, token: Token, lease: Option<&LeaseName>) -> Option<&Entry> {
        let lease = lease?;
        let from = (Revision(token.0 as i64), EntryKey(Vec::new()));
        let same = self.entries.range(from..).take_while(|((revision, _), _)| revision.0 == token.0 as i64);
        same.map(|(_, entry)| entry).find(|entry| lease.owns(&entry.entry_key))
    }

    /// A request failed. Returns the mark of the clients that it concerned.
    pub(super) fn not_answered(
        &mut self,
        id: u64,
        failure: Failure,
        lease: Option<&LeaseName>,
    ) -> Option<ArrivalMark> {
        let asked = self.asked.take_if(|asked| asked.id == id)?;
        if failure == Failure::Unknown || self.as_of.is_none() {
            self.must_read = true;
        } else {
            self.find_own(lease);
        }
        Some(asked.mark)
    }

    /// Tells the table what is true of the other hosts, and what this host was granted.
    pub(super) fn update_table(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        lock: LockId,
        standing: Standing<'_>,
        effects: &mut Effects,
    ) {
        if !self.is_current() {
            return;
        }
        if let Some(held) = table.held_here(lock) {
            match self.own_entry_of(held, standing.lease).map(|entry| entry.entry_key.clone()) {
                Some(entry_key) if self.own.is_none() => self.own = Some(entry_key),
                Some(_) => {}
                // A user removed it, or the store went back.
                None => {
                    self.lose_entry();
                    table.revoke(now, lock, effects);
                }
            }
            return;
        }
        let first = self.first().map(|first| (Token(first.revision.0 as u64), first.owner.is_some()));
        if let Some(told) = self.told
            && (told.is_of_earlier_store || first.is_none_or(|(token, _)| token != told.token))
        {
            self.told = None;
            table.remote_hold_ended(now, lock, self.outcome_of(told), effects);
        }
        self.turn.settle(self.last);
        let Some((token, is_kmutex)) = first else { return };
        let entry_key = self.first().map(|first| &first.entry_key);
        if self.next.is_some() && entry_key == self.next.as_ref() {
            // The watch was faster than the answer, which will say that this entry is this host's.
        } else if self.own.is_some() && entry_key == self.own.as_ref() {
            if self.leaving.is_none()
                && standing.is_watching
                && (self.steps_aside(table, lock, token) || !table.cluster_granted(now, lock, token, effects))
            {
                self.leaving = Some(Leaving { token, record: None });
            }
        } else if table.find(lock).is_some() {
            self.told = Some(Told { token, is_kmutex, is_of_earlier_store: false });
            let mark = self.mark.unwrap_or(ArrivalMark::NONE);
            table.remote_hold_seen(now, lock, token, (mark, self.first_began(token)), effects);
        }
    }

    /// Returns `true` if this host's batch is not the newest: another host, whose requests are newer, runs for both.
    fn steps_aside(&self, table: &Table, lock: LockId, own: Token) -> bool {
        table.is_batch_next(lock) && self.has_newer_batch(own)
    }

    /// Returns `true` if a batch that had come when the last hold ended is newer than the one with this token.
    fn has_newer_batch(&self, token: Token) -> bool {
        self.entries.values().any(|entry| {
            let is_batch = entry.owner.as_ref().is_some_and(|owner| owner.mode == Mode::Coalesce);
            is_batch && entry.revision.0 as u64 > token.0 && self.turn.had_come(entry.revision)
        })
    }

    /// Returns the mark of the requests that came before the first place's hold began. Perhaps it is about to step aside: then no
    /// request counts on it, or the newer batch might give up its place at the same time.
    fn first_began(&self, token: Token) -> ArrivalMark {
        if self.turn.is_batch() && self.has_newer_batch(token) {
            ArrivalMark::NONE
        } else {
            self.turn.began()
        }
    }

    /// Returns how a hold ended whose entry is gone.
    fn outcome_of(&self, told: Told) -> Outcome {
        match self.last {
            // The records of this store say nothing of it.
            _ if told.is_of_earlier_store => Outcome::Vanished,
            // Either the holder's own record, or that of a later holder, which serves the waiters as well.
            Some(last) if last.token >= told.token => last.outcome,
            _ if told.is_kmutex => Outcome::Vanished,
            _ => Outcome::Unknown,
        }
    }

    /// Returns what to ask next. A new entry would get the key `entry_key`.
    pub(super) fn next_op(
        &mut self,
        table: &Table,
        now: Timestamp,
        lock: LockId,
        lease: &LeaseName,
        entry_key: EntryKey,
    ) -> Option<QueueOp> {
        if self.asked.is_some() {
            return None;
        }
        let needs = table.cluster_needs(lock);
        let is_held = table.held_here(lock).is_some();
        if self.must_read || (self.as_of.is_none() && is_held) {
            return Some(QueueOp::Read);
        }
        let owner = || {
            let key = table.find(lock).and_then(|lock| lock.key().map(String::from));
            let request = table.first_in_line(lock);
            Box::new(request.map(|one| Owner::of(key.as_deref(), &one)).unwrap_or_default())
        };
        if let Some(orphan) = self.orphan_entry(lease) {
            let (entry_key, revision) = (orphan.entry_key.clone(), orphan.revision);
            // If the journal has the run under it, only the release did not reach etcd before the daemon was started again.
            let token = Token(revision.0 as u64);
            let run = table.run_under(now, lock, token).cloned().map(Box::new);
            let record = run.as_ref().map(|run| OutcomeRecord { token, outcome: run.outcome });
            return Some(QueueOp::Release { entry_key, revision, record, run, next: None });
        }
        let Some((own, revision)) = self.own_entry() else {
            return match needs {
                // A place that is given up at once, because the work is done, would be in the way of others.
                _ if needs.free_or_busy && needs.fresh && !self.knows_runs => {
                    Some(QueueOp::TryAcquire { entry_key, owner: owner(), unless_run: true })
                }
                _ if needs.queue_place => Some(QueueOp::Enqueue { entry_key, owner: owner() }),
                _ if needs.free_or_busy || needs.takeover => {
                    Some(QueueOp::TryAcquire { entry_key, owner: owner(), unless_run: false })
                }
                _ => None,
            };
        };
        if self.leaving.is_none() && !is_held && !needs.queue_place {
            // No client waits for its turn any more. From here on there is no way back: a request to release an entry may
            // arrive late, when it was long given up for lost.
            self.leaving = Some(Leaving { token: Token(revision.0 as u64), record: None });
        }
        match self.leaving {
            Some(Leaving { record, .. }) => {
                let next = needs.queue_place.then(|| (entry_key, owner()));
                let run =
                    record.and_then(|record| table.run_under(now, lock, record.token).cloned()).map(Box::new);
                Some(QueueOp::Release { entry_key: own, revision, record, run, next })
            }
            None if needs.free_or_busy && !is_held => Some(QueueOp::Read),
            None => None,
        }
    }

    /// Returns `true` if there is something to ask, or will be.
    pub(super) fn needs(&self, table: &Table, lock: LockId, lease: Option<&LeaseName>) -> bool {
        let is_held = table.held_here(lock).is_some();
        self.asked.is_none()
            && (self.must_read
                || self.leaving.is_some()
                || !table.cluster_needs(lock).is_nothing()
                || (self.as_of.is_none() && is_held)
                || (self.own.is_some() && !is_held)
                || self.has_orphan_entry(lease))
    }

    /// Returns `true` if nothing is left to do or to know.
    pub(super) fn is_over(&self, table: &Table, lock: LockId, lease: Option<&LeaseName>) -> bool {
        self.asked.is_none()
            && !self.must_read
            && self.own.is_none()
            && table.find(lock).is_none()
            && !self.has_orphan_entry(lease)
    }

    fn own_entry(&self) -> Option<(EntryKey, Revision)> {
        let own = self.own.clone()?;
        let revision = self.revision_of(&own)?;
        Some((own, revision))
    }

    fn has_orphan_entry(&self, lease: Option<&LeaseName>) -> bool {
        lease.is_some_and(|lease| self.orphan_entry(lease).is_some())
    }

    /// Returns an entry of this host that is not the one that it knows.
    fn orphan_entry(&self, lease: &LeaseName) -> Option<&Entry> {
        let is_own = |entry: &&Entry| Some(&entry.entry_key) == self.own.as_ref();
        self.entries.values().filter(|entry| lease.owns(&entry.entry_key)).find(|entry| !is_own(entry))
    }
}
