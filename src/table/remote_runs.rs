//! Runs of clustered locks that count: etcd has the records of all hosts, and the table keeps what it was told of them.
//!
//! A record's age is what etcd's lease says, or what passed by this host's clock since the record came: the longer of the
//! two, because an election gives every lease its whole time again. What was missed while there was no watch is in doubt, and
//! counts only after the lock was read.

use super::{Effects, Run, Table, Timestamp};
use crate::proto::{LockId, Token};

impl Table {
    /// What is remembered may not be true any more: it counts only after [`Table::remote_runs_read`].
    pub fn doubt_runs(&mut self) {
        self.runs.doubt();
    }

    /// The store of the records went back, or it is another one: another run may get the token of one that is remembered.
    pub fn drop_runs(&mut self, effects: &mut Effects) {
        self.runs.clear();
        self.results.clear(effects);
    }

    /// Returns `true` if a request for a lock may want the result of a run on another host.
    pub fn awaits_result(&self, lock: LockId) -> bool {
        self.store.find(lock).is_some_and(|index| self.store[index].extra().shares)
    }

    /// A host has given the result of a run, which is about to be remembered, to the user with this number. Returns `false` if that
    /// result, or a newer one, is here already.
    pub fn remote_result_seen(&mut self, run: &Run, sharer: u64) -> bool {
        let is_new = self.results.token(run.lock, run.is_success()).is_none_or(|token| token < run.token);
        if is_new {
            self.results.insert(run.clone(), sharer);
        }
        is_new
    }

    /// A host has given a newer result than the one with a token before this, and no request here is for the lock.
    pub fn result_superseded(&mut self, lock: LockId, is_success: bool, by: Token, effects: &mut Effects) {
        self.results.drop_before(lock, is_success, by, effects);
    }

    /// These are all runs of a lock that count, as far as etcd knows. It may not know yet of one with a token
    /// of `untold`.
    pub fn remote_runs_read(
        &mut self,
        now: Timestamp,
        lock: LockId,
        runs: Vec<Run>,
        untold: &[Token],
        effects: &mut Effects,
    ) {
        for is_success in [true, false] {
            if !runs.iter().any(|run| run.is_success() == is_success)
                && self.runs.forget(lock, is_success, untold)
            {
                self.results.drop_before(lock, is_success, Token(u64::MAX), effects);
            }
        }
        self.runs.confirm(lock);
        for run in runs {
            self.remote_run_seen(now, run, untold, effects);
        }
        self.finish_undecided_if_fresh(now, lock, effects);
    }

    /// A host has recorded a run, of a lock of which nothing was missed.
    pub fn remote_run_seen(&mut self, now: Timestamp, run: Run, untold: &[Token], effects: &mut Effects) {
        let lock = run.lock;
        self.runs.replace(run, untold);
        effects.runs_dropped += self.runs.trim(now);
        if let Some(index) = self.store.find(lock) {
            self.finish_fresh_waiters(now, index, effects);
            self.request_left(index, effects);
        }
    }

    /// The record of a run has been deleted, or its time is over.
    pub fn remote_run_gone(&mut self, lock: LockId, is_success: bool, effects: &mut Effects) {
        self.runs.forget(lock, is_success, &[]);
        self.results.drop_before(lock, is_success, Token(u64::MAX), effects);
    }

    /// Returns the tokens of the runs of a lock whose ages are known.
    pub fn known_runs(&self, lock: LockId) -> Vec<Token> {
        [true, false]
            .into_iter()
            .filter_map(|is_success| self.runs.get(lock, is_success))
            .map(|run| run.token)
            .collect()
    }

    /// Returns `true` if the last runs of a lock are remembered and not in doubt.
    pub fn knows_runs(&self, lock: LockId) -> bool {
        self.runs.is_certain(lock)
    }

    /// Returns the run that was made under a token, if it still counts.
    pub fn run_under(&self, now: Timestamp, lock: LockId, token: Token) -> Option<&Run> {
        self.last_runs(now, lock).into_iter().flatten().find(|run| run.token == token)
    }

    fn finish_undecided_if_fresh(&mut self, now: Timestamp, lock: LockId, effects: &mut Effects) {
        let Some(index) = self.store.find(lock) else { return };
        let undecided: Vec<_> = self.store.members(self.store[index].extra().undecided).collect();
        for id in undecided {
            self.finish_if_fresh(now, id, effects);
        }
        self.request_left(index, effects);
    }
}
