//! The queue of one lock among the hosts: its entries as far as they are known, which of them are this host's, and the next
//! request.

use std::collections::{BTreeMap, BTreeSet};

use super::newest::Newest;
use super::replaced::{Replaced, Replaces};
use super::turn::Turn;
use super::{
    Asked, Entry, EntryKey, Failure, FoundResult, LeaseName, OutcomeRecord, Owner, QueueOp, QueueSnapshot,
    Revision, SharedResult, WatchEvent,
};
use crate::proto::v2::Mode;
use crate::proto::{LockId, Outcome, Token};
use crate::table::{ArrivalMark, Effects, Run, SeenLine, Sharing, Table, Timestamp, Verdict};

/// What a host needs to be granted a lock, and to keep it.
#[derive(Clone, Copy)]
pub(super) struct Standing<'a> {
    pub(super) lease: Option<&'a LeaseName>,
    /// What is granted can be relied on, and the watch is open.
    pub(super) may_grant: bool,
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
    /// This host's entries, and the one that a request under way may make. At most one of them waits; the others hold.
    own: BTreeSet<EntryKey>,
    /// The lock's key, if the client of one of this host's entries said it.
    name: Option<String>,
    /// The entries of this host that are to be released, by their tokens, and what is to be recorded. No record means that
    /// the holder vanished.
    leaving: BTreeMap<Token, Option<OutcomeRecord>>,
    asked: Option<Asked>,
    /// Whether the runs that count are known, since the first answer.
    knows_runs: bool,
    /// Behind the clients that had come before the last request that was answered.
    mark: Option<ArrivalMark>,
    turn: Turn,
    /// Results that came since the table was told of the line last, for clients that want one.
    results: Vec<SharedResult>,
    newest: Newest,
    replaced: Replaced,
    /// The place that a request under way gives up for a new one, and the key of that.
    next: Option<(Token, EntryKey)>,
}

#[derive(Clone, Copy, Debug)]
struct Told {
    token: Token,
    is_kmutex: bool,
    is_of_earlier_store: bool,
    /// It holds alone, so that a later hold can only end after it.
    is_alone: bool,
    /// How it ended, if the watch has shown it.
    outcome: Option<Outcome>,
}

impl LockQueue {
    /// A queue of which something is known, and nothing certain.
    pub(super) fn unread() -> LockQueue {
        LockQueue { must_read: true, ..LockQueue::default() }
    }

    /// Returns the first entry that the table takes for the hold of another host, or else the first of all.
    pub(super) fn first(&self) -> Option<&Entry> {
        let told = |told: Told| self.entries.values().find(|entry| token(entry) == told.token);
        self.told.and_then(told).or_else(|| self.entries.values().next())
    }

    /// Returns `true` if an entry that is not this host's holds.
    pub(super) fn is_held_elsewhere(&self) -> bool {
        let holders = super::holding(self.entries.values().map(Entry::sharing));
        self.entries.values().take(holders).any(|entry| !self.own.contains(&entry.entry_key))
    }

    /// Returns the first entry that says this number of slots.
    pub(super) fn entry_with(&self, slots: u32) -> Option<&Entry> {
        let says =
            |entry: &&Entry| matches!(entry.sharing(), Sharing::Slots { slots: its, .. } if its == slots);
        self.entries.values().find(says)
    }

    /// Returns `true` if the entries are known.
    pub(super) fn is_current(&self) -> bool {
        self.as_of.is_some() && !self.must_read
    }

    /// Returns `true` if what was read as of this revision is not older than what is known.
    pub(super) fn may_learn(&self, revision: Revision) -> bool {
        self.as_of.unwrap_or(self.missed) <= revision
    }

    /// Returns how holds of this host ended of which etcd has not confirmed that it knows.
    pub(super) fn untold(&self) -> impl Iterator<Item = (Option<&str>, OutcomeRecord)> {
        self.leaving.values().flatten().map(|record| (self.name.as_deref(), *record))
    }

    /// Returns the tokens of the holds whose ends etcd may not know yet.
    pub(super) fn untold_tokens(&self) -> Vec<Token> {
        self.entries.values().map(token).chain(self.leaving.keys().copied()).collect()
    }

    /// A hold of this host has ended.
    pub(super) fn ended(&mut self, token: Token, outcome: Outcome) {
        // After a restart, the key of the entry may not be known yet, nor whether the entry exists.
        if !self.own.is_empty() || self.as_of.is_none() {
            let record = (outcome != Outcome::Vanished).then_some(OutcomeRecord { token, outcome });
            self.leaving.insert(token, record);
        }
    }

    /// Returns the result of a run that counts, if it came with the run and is not here already, and tells the table of it.
    pub(super) fn counting_result(&self, table: &mut Table, run: &Run) -> Option<FoundResult> {
        let is_its = |result: &&SharedResult| result.token == run.token && result.content.is_ok();
        let result = self.results.iter().find(is_its)?;
        let is_new = table.remote_result_seen(run, result.sharer);
        is_new.then(|| FoundResult { token: run.token, run: Some(run.clone()), result: Some(result.clone()) })
    }

    /// The table has been told of the line, if it is known. The result of a hold whose end only the watch has shown stays with that.
    pub(super) fn drop_results(&mut self) {
        let ended = self.told.filter(|told| told.outcome.is_some()).map(|told| told.token);
        self.results.retain(|result| Some(result.token) == ended);
        self.results.shrink_to_fit();
    }

    /// A result came. It takes the place of the one with the same record, unless that is of the hold whose end the table is to be
    /// told of.
    fn note_result(&mut self, result: SharedResult) {
        let told = self.told.map(|told| told.token);
        self.results.retain(|known| known.of != result.of || told == Some(known.token));
        if !self.results.iter().any(|known| known.of == result.of && known.token == result.token) {
            self.results.push(result);
        }
    }

    pub(super) fn lose_entries(&mut self) {
        self.own.clear();
        self.leaving.clear();
    }

    /// What happened up to this revision is not known: the queue must be read, by a request that is made after this.
    pub(super) fn forget_entries(&mut self, revision: Revision) {
        self.as_of = None;
        self.missed = revision;
        self.must_read = true;
        if let Some(asked) = &mut self.asked {
            asked.is_doubtful = true;
        }
    }

    /// Nothing that was read, or is being read, is true any more.
    pub(super) fn forget_store(&mut self) {
        self.forget_entries(Revision(0));
        self.entries.clear();
        if let Some(told) = &mut self.told {
            told.is_of_earlier_store = true;
        }
        (self.last, self.asked, self.mark, self.turn) = (None, None, None, Turn::default());
        self.results = Vec::new();
        self.newest.forget_store();
    }

    pub(super) fn watch_event(&mut self, revision: Revision, event: WatchEvent, lease: Option<&LeaseName>) {
        if let WatchEvent::Newest(seen) = &event {
            self.newest.recognize(seen.as_ref(), lease);
        }
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
            WatchEvent::Outcome(record) => {
                self.last = Some(record);
                let is_its = |told: &&mut Told| told.token == record.token && !told.is_of_earlier_store;
                if let Some(told) = self.told.as_mut().filter(is_its) {
                    told.outcome = Some(record.outcome);
                }
            }
            WatchEvent::Result(result) => self.note_result(result),
            WatchEvent::Newest(seen) => self.newest.see(seen, lease),
            // The table knows.
            WatchEvent::Ran(_) | WatchEvent::RunGone { .. } => {}
        }
        self.note_turn(self.mark);
    }

    /// The queue has changed. `mark` is that of an answer from before the change.
    fn note_turn(&mut self, mark: Option<ArrivalMark>) {
        let first = self.entries.values().next().map(|first| {
            let is_batch = first.owner.as_ref().is_some_and(|owner| owner.mode == Mode::Coalesce);
            (token(first), is_batch)
        });
        self.turn.changes_to(first, self.as_of.unwrap_or(self.missed), mark.unwrap_or(ArrivalMark::NONE));
    }

    fn insert(&mut self, entry: Entry) {
        self.entries.insert((entry.revision, entry.entry_key.clone()), entry);
    }

    pub(super) fn asked(&mut self, id: u64, mark: ArrivalMark, op: &QueueOp) {
        self.asked = Some(Asked { id, mark, is_doubtful: false });
        let made = match op {
            QueueOp::Read | QueueOp::Describe { .. } => None,
            QueueOp::TryAcquire { entry_key, owner, .. } | QueueOp::Enqueue { entry_key, owner } => {
                Some((entry_key, owner))
            }
            QueueOp::RecordNewest { entry, .. } => {
                entry.as_ref().map(|(entry_key, owner)| (entry_key, owner))
            }
            QueueOp::Release { next, revision, .. } => {
                self.next = next.as_ref().map(|(next, _)| (Token(revision.0 as u64), next.clone()));
                self.turn.leaves(mark);
                next.as_ref().map(|(entry_key, owner)| (entry_key, owner))
            }
        };
        if let Some((entry_key, owner)) = made {
            self.own.insert(entry_key.clone());
            self.name.clone_from(&owner.key);
        }
    }

    /// Returns `true` if the answer is not older than what the watch has shown.
    pub(super) fn answered(&mut self, id: u64, snapshot: QueueSnapshot, lease: Option<&LeaseName>) -> bool {
        let Some(asked) = self.asked.take_if(|asked| asked.id == id) else { return false };
        self.knows_runs = true;
        self.newest.recognize(snapshot.newest.as_ref(), lease);
        let mut is_news = self.as_of.is_none_or(|as_of| as_of <= snapshot.revision);
        if is_news {
            self.as_of = Some(snapshot.revision);
            self.entries.clear();
            snapshot.entries.into_iter().for_each(|entry| self.insert(entry));
            self.last = snapshot.last;
            snapshot.results.into_iter().for_each(|result| self.note_result(result));
            self.newest.see(snapshot.newest, lease);
        }
        self.must_read = asked.is_doubtful || self.missed > snapshot.revision;
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

    /// Finds out which of this host's entries there are by now.
    fn find_own(&mut self, lease: Option<&LeaseName>) {
        let leaving = self.leaving.keys().filter_map(|token| self.own_entry_of(*token, lease));
        let (left, keys): (Vec<Token>, Vec<EntryKey>) =
            leaving.map(|entry| (token(entry), entry.entry_key.clone())).unzip();
        self.leaving.retain(|token, _| left.contains(token));
        self.own.extend(keys);
        let entries = &self.entries;
        self.own.retain(|own| entries.values().any(|entry| entry.entry_key == *own));
        if let Some((left, next)) = self.next.take()
            && self.own.contains(&next)
        {
            self.turn.has_left(left);
        }
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
        found: &mut Vec<FoundResult>,
        effects: &mut Effects,
    ) {
        if !self.is_current() {
            return;
        }
        if self.asked.is_none() {
            self.find_own(standing.lease);
        }
        self.revoke_missing(table, now, lock, standing, effects);
        if let Some(told) = self.told
            && (told.is_of_earlier_store || !self.entries.values().any(|entry| token(entry) == told.token))
        {
            self.told = None;
            let (outcome, of) = self.outcome_of(told);
            if outcome != Outcome::Vanished && table.awaits_result(lock) {
                let result = self.results.iter().find(|result| result.token == of).cloned();
                found.push(FoundResult { token: told.token, run: None, result });
            }
            table.remote_hold_ended(now, lock, outcome, effects);
        }
        self.turn.settle(self.last);
        // Before a grant: a request that is not the newest of all hosts any more gets nothing.
        self.newest.tell(table, lock, standing.lease, effects);
        // After the table has been told of the end: the newcomers lose to this grant, and not to that hold.
        let is_undecided = self.grant_admitted(table, now, lock, standing, effects);
        self.stop_replaced(table, now, lock, effects);
        if !is_undecided && (!table.cluster_needs(lock).is_nothing() || self.told.is_some()) {
            self.tell_line(table, now, lock, effects);
        }
    }

    /// Asks holders of this host to stop whose time is over, which a waiting request of another host gave them.
    fn stop_replaced(&mut self, table: &mut Table, now: Timestamp, lock: LockId, effects: &mut Effects) {
        let holding = super::holding(self.entries.values().map(Entry::sharing));
        let waiting = self.entries.values().skip(holding);
        self.replaced.see(waiting.filter(|entry| !self.own.contains(&entry.entry_key)), now);
        let due = self.replaced.stop_at().filter(|(_, at)| *at <= now && table.is_held_here(lock));
        table.replaced_for(lock, due.map(|(user, _)| user), effects);
    }

    /// Returns when holders of this host are to be asked to stop.
    pub(super) fn stop_at(&self) -> Option<Timestamp> {
        self.replaced.stop_at().map(|(_, at)| at)
    }

    /// What is held here without an entry was removed by a user, or the store went back.
    fn revoke_missing(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        lock: LockId,
        standing: Standing<'_>,
        effects: &mut Effects,
    ) {
        let held: Vec<Token> = table.held_here(lock).collect();
        for token in held {
            match self.own_entry_of(token, standing.lease).map(|entry| entry.entry_key.clone()) {
                Some(entry_key) => drop(self.own.insert(entry_key)),
                None => table.revoke(now, lock, token, effects),
            }
        }
    }

    /// Grants a place of this host that the entries before it admit. Returns `true` if there is one that cannot be granted
    /// at the moment.
    fn grant_admitted(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        lock: LockId,
        standing: Standing<'_>,
        effects: &mut Effects,
    ) -> bool {
        let Some(entry) = self.idle_entry(table, lock) else { return false };
        let (token, sharing) = (token(entry), entry.sharing());
        match sharing.verdict(self.before(entry)) {
            Verdict::Admitted if !standing.may_grant => return true,
            Verdict::Admitted => {
                if self.steps_aside(table, lock, token)
                    || !table.cluster_granted(now, lock, (token, sharing), effects)
                {
                    self.leaving.insert(token, None);
                }
            }
            Verdict::Differs(slots) => {
                table.refuse_slots(lock, sharing, slots, effects);
                self.leaving.insert(token, None);
            }
            Verdict::Excluded => {}
        }
        false
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
    /// request counts on it, or the newer batch might give up its place at the same time. A shared place may have been held
    /// before it was the first.
    fn first_began(&self, first: &Entry) -> ArrivalMark {
        let is_alone = first.sharing() == Sharing::Exclusive;
        if !is_alone || (self.turn.is_batch() && self.has_newer_batch(token(first))) {
            ArrivalMark::NONE
        } else {
            self.turn.began()
        }
    }

    /// Tells the table who holds the lock, and what that means for its requests.
    fn tell_line(&mut self, table: &mut Table, now: Timestamp, lock: LockId, effects: &mut Effects) {
        let is_other = |entry: &&Entry| !self.own.contains(&entry.entry_key);
        let other = self.entries.values().next().filter(is_other);
        if self.told.is_none() && table.find(lock).is_some() {
            self.told = other.map(|entry| Told {
                token: token(entry),
                is_kmutex: entry.owner.is_some(),
                is_of_earlier_store: false,
                is_alone: entry.sharing() == Sharing::Exclusive,
                outcome: None,
            });
        }
        // A place of this host that is being given up is in the way of none of its clients.
        let staying = || self.entries.values().filter(|entry| !self.leaving.contains_key(&token(entry)));
        let line = SeenLine {
            other: other.map(|entry| (token(entry), entry.sharing(), self.first_began(entry))),
            mark: self.mark.unwrap_or(ArrivalMark::NONE),
            verdict: &|sharing| sharing.verdict(staying().map(Entry::sharing)),
        };
        table.line_seen(now, lock, &line, effects);
        if self.entries.is_empty() {
            table.free_seen(lock, effects);
        }
    }

    /// Returns what the entries before this one share.
    fn before(&self, entry: &Entry) -> impl Iterator<Item = Sharing> + '_ {
        let to = (entry.revision, entry.entry_key.clone());
        self.entries.range(..to).map(|(_, entry)| entry.sharing())
    }

    /// Returns the entry of this host that waits, or holds without a holder. A request that is under way may have made
    /// it already.
    fn idle_entry(&self, table: &Table, lock: LockId) -> Option<&Entry> {
        let is_idle = |entry: &&Entry| {
            let token = token(entry);
            self.own.contains(&entry.entry_key)
                && !self.leaving.contains_key(&token)
                && !table.held_here(lock).any(|held| held == token)
        };
        self.entries.values().find(is_idle)
    }

    /// Returns how a hold ended whose entry is gone, and the token of the hold that ended so.
    fn outcome_of(&self, told: Told) -> (Outcome, Token) {
        if let Some(outcome) = told.outcome {
            return (outcome, told.token);
        }
        match self.last {
            // The records of this store say nothing of it.
            _ if told.is_of_earlier_store => (Outcome::Vanished, told.token),
            // Either the holder's own record, or that of a later holder, which serves the waiters as well.
            Some(last) if last.token == told.token || (told.is_alone && last.token > told.token) => {
                (last.outcome, last.token)
            }
            _ if told.is_kmutex => (Outcome::Vanished, told.token),
            _ => (Outcome::Unknown, told.token),
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
        let is_held = table.is_held_here(lock);
        if self.must_read || (self.as_of.is_none() && is_held) {
            return Some(QueueOp::Read);
        }
        let request = table.first_in_line(lock);
        let sharing = request.as_ref().map_or(Sharing::Exclusive, |one| Sharing::from(&one.terms));
        let owner = || {
            let key = table.find(lock).and_then(|lock| lock.key().map(String::from));
            let owner = request.map(|one| Owner::of(key.as_deref(), &one)).unwrap_or_default();
            Box::new(Owner { replaces: table.replacer(lock).and_then(Replaces::of), ..owner })
        };
        if let Some(orphan) = self.orphan_entry(lease) {
            let (entry_key, revision) = (orphan.entry_key.clone(), orphan.revision);
            // If the journal has the run under it, only the release did not reach etcd before the daemon was started again.
            let token = Token(revision.0 as u64);
            let run = table.run_under(now, lock, token).cloned().map(Box::new);
            let record = run.as_ref().map(|run| OutcomeRecord { token, outcome: run.outcome });
            return Some(QueueOp::Release { entry_key, revision, record, run, result: None, next: None });
        }
        let idle = self.idle_entry(table, lock).map(|entry| (token(entry), entry.sharing()));
        if let Some((token, sharing)) = idle
            && !(needs.queue_place && table.awaits_turn(lock, sharing))
        {
            // No client waits for its turn any more. From here on there is no way back: a request to release an entry may
            // arrive late, when it was long given up for lost.
            self.leaving.insert(token, None);
        }
        let left = |(token, record): (&Token, &Option<OutcomeRecord>)| {
            Some((*token, *record, self.own_entry_of(*token, Some(lease))?))
        };
        if let Some((token, record, entry)) = self.leaving.iter().find_map(left) {
            let is_waiting = idle.is_some_and(|(idle, _)| idle != token);
            let next = (needs.queue_place && !is_waiting).then(|| (entry_key, owner()));
            let run =
                record.and_then(|record| table.run_under(now, lock, record.token).cloned()).map(Box::new);
            let (entry_key, revision) = (entry.entry_key.clone(), entry.revision);
            return Some(QueueOp::Release { entry_key, revision, record, run, result: None, next });
        }
        let Some(as_of) = self.as_of.or((!needs.rank).then_some(Revision(0))) else {
            return Some(QueueOp::Read);
        };
        if let Some((record, replaced)) = self.newest.next_record(table, lock, lease, as_of) {
            // Behind a holder of this host, a request needs no place.
            let needs_entry = needs.rank && idle.is_none() && !is_held;
            let entry = needs_entry.then(|| (entry_key, owner()));
            return Some(QueueOp::RecordNewest { record, replaced, entry });
        }
        if let Some(op) = self.describe(table, lock) {
            return Some(op);
        }
        if idle.is_some() {
            return needs.free_or_busy.then_some(QueueOp::Read);
        }
        let joins = self.as_of.is_some()
            && !self.entries.is_empty()
            && sharing.verdict(self.entries.values().map(Entry::sharing)) == Verdict::Admitted;
        match needs {
            // A place that is given up at once, because the work is done, would be in the way of others.
            _ if needs.free_or_busy && needs.fresh && !self.knows_runs => {
                Some(QueueOp::TryAcquire { entry_key, owner: owner(), unless_run: true })
            }
            _ if needs.queue_place || (needs.free_or_busy && joins) => {
                Some(QueueOp::Enqueue { entry_key, owner: owner() })
            }
            _ if needs.free_or_busy || needs.takeover => {
                Some(QueueOp::TryAcquire { entry_key, owner: owner(), unless_run: false })
            }
            _ if needs.holder && self.as_of.is_none() => Some(QueueOp::Read),
            _ => None,
        }
    }

    /// Returns what says anew whether a request at this host's waiting entry replaces the holders, if that has changed.
    fn describe(&self, table: &Table, lock: LockId) -> Option<QueueOp> {
        let Entry { entry_key, revision, owner: Some(owner) } = self.idle_entry(table, lock)? else {
            return None;
        };
        let replaces = table.replacer(lock).and_then(Replaces::of);
        (owner.replaces != replaces).then(|| QueueOp::Describe {
            entry_key: entry_key.clone(),
            revision: *revision,
            owner: Box::new(Owner { replaces, ..owner.clone() }),
        })
    }

    /// Returns `true` if there is something to ask, or will be.
    pub(super) fn needs(&self, table: &Table, lock: LockId, lease: Option<&LeaseName>) -> bool {
        self.asked.is_none()
            && (self.must_read
                || !self.leaving.is_empty()
                || !table.cluster_needs(lock).is_nothing()
                || (self.as_of.is_none() && table.is_held_here(lock))
                || self.idle_entry(table, lock).is_some()
                || self.newest.has_lapsed(table, lock)
                || self.has_orphan_entry(lease))
    }

    /// Returns `true` if nothing is left to do or to know.
    pub(super) fn is_over(&self, table: &Table, lock: LockId, lease: Option<&LeaseName>) -> bool {
        self.asked.is_none()
            && !self.must_read
            && self.own.is_empty()
            && table.find(lock).is_none()
            && !self.has_orphan_entry(lease)
    }

    fn has_orphan_entry(&self, lease: Option<&LeaseName>) -> bool {
        lease.is_some_and(|lease| self.orphan_entry(lease).is_some())
    }

    /// Returns an entry of this host that is not known to it.
    fn orphan_entry(&self, lease: &LeaseName) -> Option<&Entry> {
        let is_known = |entry: &&Entry| self.own.contains(&entry.entry_key);
        self.entries.values().filter(|entry| lease.owns(&entry.entry_key)).find(|entry| !is_known(entry))
    }
}

/// Returns the token of the hold that an entry is, or will be.
fn token(entry: &Entry) -> Token {
    Token(entry.revision.0 as u64)
}
