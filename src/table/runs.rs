//! Runs that are over and still count: when the work of a lock was last done, for requests that name how fresh it must be.
//!
//! Only the end of a run is remembered, never its beginning, so that a crash blocks nothing. A failure does not undo the
//! success before it: the last of each is kept. What is kept is bounded, and the oldest goes first.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Effects, JournalEntry, LockIndex, NotificationKind, Request, RequestId, Table, Timestamp};
use crate::proto::v2::{LockRequest, ShortText};
use crate::proto::{LockId, Outcome, Token};

/// A run that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The lock that it ran under.
    pub lock: LockId,
    /// The token of that lock.
    pub token: Token,
    /// When it began: milliseconds of the table's clock, less than 0 if that was before the clock started.
    pub began_ms: i64,
    /// How long after its beginning it counts for the most patient request.
    pub counts_for: Duration,
    /// How it ended.
    pub outcome: Outcome,
    /// The user who ran it, as the kernel states it.
    pub uid: Option<u32>,
    /// Who ran it, for people: `USER@HOST`.
    pub by: ShortText,
}

impl Run {
    /// Returns how long ago it began.
    pub fn age(&self, now: Timestamp) -> Duration {
        let now = i64::try_from(now.0).unwrap_or(i64::MAX);
        Duration::from_millis(u64::try_from(now.saturating_sub(self.began_ms)).unwrap_or(0))
    }

    /// Returns `true` if it succeeded.
    pub fn is_success(&self) -> bool {
        self.outcome == Outcome::Exit(0)
    }

    fn is_over(&self, now: Timestamp) -> bool {
        self.age(now) >= self.counts_for
    }
}

/// The last runs of one lock.
#[derive(Default)]
struct LastRuns {
    success: Option<Box<Run>>,
    failure: Option<Box<Run>>,
    /// The [`Runs::epoch`] in which they were known to be the last ones.
    epoch: u64,
}

/// The runs that still count.
pub(super) struct Runs {
    by_lock: BTreeMap<LockId, LastRuns>,
    /// In the order of their tokens.
    by_token: BTreeSet<(Token, LockId)>,
    max: usize,
    /// A run whose time is over stays until its record is gone from etcd: an election may have given the record more time, and
    /// what is read of it must not count again.
    keeps_until_gone: bool,
    /// Counts how often all of them came into doubt: other hosts may have run or forgotten since.
    epoch: u64,
}

impl Runs {
    pub(super) fn new(max: usize, keeps_until_gone: bool) -> Runs {
        Runs { by_lock: BTreeMap::new(), by_token: BTreeSet::new(), max, keeps_until_gone, epoch: 1 }
    }

    /// Returns a run that is known to be the last one.
    pub(super) fn certain(&self, lock: LockId, is_success: bool) -> Option<&Run> {
        let last = self.by_lock.get(&lock).filter(|last| last.epoch == self.epoch)?;
        if is_success { last.success.as_deref() } else { last.failure.as_deref() }
    }

    pub(super) fn get(&self, lock: LockId, is_success: bool) -> Option<&Run> {
        let last = self.by_lock.get(&lock)?;
        if is_success { last.success.as_deref() } else { last.failure.as_deref() }
    }

    /// Returns `false` if a newer run is known already.
    fn insert(&mut self, run: Run) -> bool {
        let last = self.by_lock.entry(run.lock).or_default();
        last.epoch = self.epoch;
        let slot = if run.is_success() { &mut last.success } else { &mut last.failure };
        if slot.as_ref().is_some_and(|known| known.token >= run.token) {
            return false;
        }
        self.by_token.insert((run.token, run.lock));
        if let Some(old) = slot.replace(Box::new(run)) {
            self.by_token.remove(&(old.token, old.lock));
        }
        true
    }

    pub(super) fn is_certain(&self, lock: LockId) -> bool {
        self.by_lock.get(&lock).is_some_and(|last| last.epoch == self.epoch)
    }

    /// From now on, other hosts may have run or forgotten.
    pub(super) fn doubt(&mut self) {
        self.epoch += 1;
    }

    pub(super) fn clear(&mut self) {
        self.by_lock.clear();
        self.by_token.clear();
    }

    /// What is remembered of a lock is true.
    pub(super) fn confirm(&mut self, lock: LockId) {
        if let Some(last) = self.by_lock.get_mut(&lock) {
            last.epoch = self.epoch;
        }
    }

    /// Takes the place of the last run of its kind. The same run is at least as old as it was known to be.
    pub(super) fn replace(&mut self, mut run: Run, untold: &[Token]) {
        if let Some(known) = self.get(run.lock, run.is_success()) {
            let token = known.token;
            if token == run.token {
                run.began_ms = run.began_ms.min(known.began_ms);
                run.uid = known.uid;
            } else if untold.contains(&token) {
                return;
            }
            self.remove(token, run.lock);
        }
        // A record that was put by hand may name the token of a run of the other kind.
        self.remove(run.token, run.lock);
        self.by_token.insert((run.token, run.lock));
        let last = self.by_lock.entry(run.lock).or_default();
        last.epoch = self.epoch;
        let slot = if run.is_success() { &mut last.success } else { &mut last.failure };
        *slot = Some(Box::new(run));
    }

    /// Forgets the last run of a kind, unless it has one of these tokens. Returns `false` then.
    pub(super) fn forget(&mut self, lock: LockId, is_success: bool, except: &[Token]) -> bool {
        let Some(token) = self.get(lock, is_success).map(|run| run.token) else { return true };
        if except.contains(&token) {
            return false;
        }
        self.remove(token, lock);
        true
    }

    fn remove(&mut self, token: Token, lock: LockId) {
        self.by_token.remove(&(token, lock));
        if let Some(last) = self.by_lock.get_mut(&lock) {
            last.success.take_if(|run| run.token == token);
            last.failure.take_if(|run| run.token == token);
            if last.success.is_none() && last.failure.is_none() {
                self.by_lock.remove(&lock);
            }
        }
    }

    /// Forgets the oldest runs: first the ones that count for no request any more, then the ones beyond the limit. Returns how many
    /// were forgotten although they counted.
    pub(super) fn trim(&mut self, now: Timestamp) -> usize {
        let mut forgotten = 0;
        while let Some(&(token, lock)) = self.by_token.first() {
            let runs = [self.get(lock, true), self.get(lock, false)];
            let is_over =
                runs.into_iter().flatten().find(|run| run.token == token).is_none_or(|run| run.is_over(now));
            if (!is_over || self.keeps_until_gone) && self.by_lock.len() <= self.max {
                break;
            }
            forgotten += usize::from(!is_over);
            self.remove(token, lock);
        }
        forgotten
    }
}

impl Table {
    /// Returns the last run of a lock that succeeded and the last that failed, if they are remembered.
    pub fn last_runs(&self, now: Timestamp, lock: LockId) -> [Option<&Run>; 2] {
        [true, false].map(|is_success| self.runs.get(lock, is_success).filter(|run| !run.is_over(now)))
    }

    /// Remembers a run that the journal tells of. What is clustered counts only after etcd was asked.
    pub fn restore_run(&mut self, now: Timestamp, run: Run) {
        let lock = run.lock;
        self.runs.insert(run);
        if self.is_clustered
            && let Some(last) = self.runs.by_lock.get_mut(&lock)
        {
            last.epoch = 0;
        }
        self.runs.trim(now);
    }

    /// Forgets the runs of a lock. Returns `false` if none is remembered.
    pub fn forget(&mut self, lock: LockId, effects: &mut Effects) -> bool {
        let tokens = [true, false].map(|is_success| self.runs.get(lock, is_success).map(|run| run.token));
        for token in tokens.into_iter().flatten() {
            self.runs.remove(token, lock);
            effects.record.push(JournalEntry::RunForgotten(lock, token));
        }
        tokens.iter().any(Option::is_some)
    }

    /// Returns all runs that still count, for the journal.
    pub fn runs(&self, now: Timestamp) -> impl Iterator<Item = &Run> {
        let runs = self.runs.by_lock.values().flat_map(|last| [&last.success, &last.failure]);
        runs.filter_map(|run| run.as_deref()).filter(move |run| !run.is_over(now))
    }

    /// Returns the run that did the work recently enough for a request.
    pub(super) fn fresh_run(&self, now: Timestamp, lock: LockId, asked: &LockRequest) -> Option<&Run> {
        if asked.fresh_ms == 0 && asked.fresh_failure_ms == 0 {
            return None;
        }
        if asked.share.is_some() {
            return self.fresh_result(now, lock, asked);
        }
        let counts = |is_success: bool, within_ms: u64| {
            let run = self.runs.certain(lock, is_success)?;
            (run.age(now) < Duration::from_millis(within_ms)).then_some(run)
        };
        counts(true, asked.fresh_ms).or_else(|| counts(false, asked.fresh_failure_ms))
    }

    /// If the work was done recently enough for a request that stands before its grant: tells its client, and removes the
    /// request.
    pub(super) fn finish_if_fresh(&mut self, now: Timestamp, id: RequestId, effects: &mut Effects) -> bool {
        let lock = self.store[self.store[id].lock].id;
        let Some(run) = self.store[id].asked().and_then(|asked| self.fresh_run(now, lock, asked)) else {
            return false;
        };
        self.notify(id, NotificationKind::Fresh(run.token), effects);
        self.remove_request(id);
        true
    }

    /// Notes for how long a request wants the present run to count, and whether it wants a result.
    pub(super) fn note_fresh(&mut self, id: RequestId) {
        let Some(asked) = self.store[id].asked() else { return };
        let (fresh_ms, fresh_failure_ms) = (asked.fresh_ms.max(asked.stale_ms), asked.fresh_failure_ms);
        if asked.share.is_some() {
            let index = self.store[id].lock;
            self.store[index].extra_mut().shares = true;
        }
        if fresh_ms > 0 || fresh_failure_ms > 0 {
            let index = self.store[id].lock;
            let lock = self.store[index].extra_mut();
            lock.fresh_ms = lock.fresh_ms.max(fresh_ms);
            lock.fresh_failure_ms = lock.fresh_failure_ms.max(fresh_failure_ms);
        }
    }

    /// Remembers a hold that ends, if a request named how long it counts.
    pub(super) fn remember(
        &mut self,
        now: Timestamp,
        id: RequestId,
        outcome: Outcome,
        effects: &mut Effects,
    ) {
        let request = &self.store[id];
        let lock = &self.store[request.lock];
        let counts_for_ms = match outcome {
            Outcome::Exit(0) => lock.extra().fresh_ms,
            Outcome::Exit(_) | Outcome::Signal(_) => lock.extra().fresh_failure_ms,
            Outcome::Unknown | Outcome::Vanished => 0,
        };
        let Some(token) = request.token().filter(|_| counts_for_ms > 0) else { return };
        let run = Run {
            lock: lock.id,
            token,
            began_ms: i64::try_from(request.since.0).unwrap_or(i64::MAX),
            counts_for: Duration::from_millis(counts_for_ms),
            outcome,
            uid: request.details.as_ref().and_then(|details| details.uid),
            by: who(request),
        };
        let result = request.result_for().map(|sharer| (run.clone(), sharer));
        if !run.is_over(now) && self.runs.insert(run) {
            result.into_iter().for_each(|(run, sharer)| self.results.insert(run, sharer));
            effects.record.push(JournalEntry::Ran(lock.id, token));
            effects.runs_dropped += self.runs.trim(now);
        }
    }

    /// A run is remembered: tells the queued requests that it counts for.
    pub(super) fn finish_fresh_waiters(&mut self, now: Timestamp, lock: LockIndex, effects: &mut Effects) {
        let lock = self.store[lock].extra();
        if lock.fresh_ms == 0 && lock.fresh_failure_ms == 0 {
            return;
        }
        let lists = [lock.queue, lock.stalled];
        let waiters: Vec<RequestId> = lists.into_iter().flat_map(|list| self.store.members(list)).collect();
        for id in waiters {
            self.finish_if_fresh(now, id, effects);
        }
    }
}

/// `USER@HOST`, as far as the client told.
fn who(request: &Request) -> ShortText {
    let Some(asked) = request.asked() else { return ShortText::default() };
    let (user, host) = (asked.who.user.as_str(), asked.who.host.as_str());
    // The journal keeps this much.
    let mut text = if host.is_empty() { user.to_string() } else { format!("{user}@{host}") };
    text.truncate(text.floor_char_boundary(RUN_BY_BYTES_MAX));
    text.into()
}

/// The longest name of a runner, in bytes.
pub const RUN_BY_BYTES_MAX: usize = 56;
