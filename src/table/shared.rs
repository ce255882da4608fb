//! Results that are shared: which runs that are over have one, for which user, and results that are good enough while another
//! client runs anew. The results themselves are the caller's.
//!
//! A run without a result does not take the place of one with a result.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{ClientId, Effects, NotificationKind, RequestId, Run, Table, Timestamp};
use crate::proto::v2::LockRequest;
use crate::proto::{LockId, Token};

/// Stands for all users, as the one whose result a run gives. (The caller gives each user a number, and 0 to none.)
pub const EVERY_USER: u64 = u64::MAX;
/// Stands for the one user whose number is [`EVERY_USER`] where that user's results are for all, if a result is not.
pub const ROOT_ALONE: u64 = 1;

/// Returns `true` if the result of the user with one number is for the user with the other number.
pub fn is_result_for(of: u64, user: u64) -> bool {
    of == user || of == EVERY_USER || (of == ROOT_ALONE && user == EVERY_USER)
}

/// The last runs of each lock that have a result: one that succeeded, and one that failed.
#[derive(Default)]
pub(super) struct Results(BTreeMap<LockId, [Option<Box<WithResult>>; 2]>);

struct WithResult {
    run: Run,
    /// Who can have it.
    sharer: u64,
}

impl WithResult {
    fn gives_to(&self, sharer: u64) -> bool {
        sharer != 0 && is_result_for(self.sharer, sharer)
    }
}

impl Results {
    pub(super) fn insert(&mut self, run: Run, sharer: u64) {
        let (lock, index) = (run.lock, usize::from(!run.is_success()));
        self.0.entry(lock).or_default()[index] = Some(Box::new(WithResult { run, sharer }));
    }

    fn get(&self, lock: LockId, is_success: bool) -> Option<&WithResult> {
        self.0.get(&lock)?[usize::from(!is_success)].as_deref()
    }

    /// Returns the token of the run whose result is there.
    pub(super) fn token(&self, lock: LockId, is_success: bool) -> Option<Token> {
        self.get(lock, is_success).map(|one| one.run.token)
    }

    /// Drops the result of a run with a token before this.
    pub(super) fn drop_before(
        &mut self,
        lock: LockId,
        is_success: bool,
        token: Token,
        effects: &mut Effects,
    ) {
        if let Some(old) = self.token(lock, is_success).filter(|&old| old < token) {
            self.remove(lock, old);
            effects.results_gone.push((lock, old));
        }
    }

    /// Drops all results.
    pub(super) fn clear(&mut self, effects: &mut Effects) {
        let all = std::mem::take(&mut self.0).into_iter();
        let tokens =
            all.flat_map(|(lock, both)| both.into_iter().flatten().map(move |one| (lock, one.run.token)));
        effects.results_gone.extend(tokens);
    }

    fn remove(&mut self, lock: LockId, token: Token) {
        let Some(both) = self.0.get_mut(&lock) else { return };
        for one in &mut *both {
            one.take_if(|one| one.run.token == token);
        }
        if both.iter().all(Option::is_none) {
            self.0.remove(&lock);
        }
    }
}

impl Table {
    /// The result of the run under a client's lock is there: later requests can have it if the run is remembered.
    pub fn has_result(&mut self, client: ClientId) {
        if let Some(id) = self.store.request_of(client)
            && let Some(details) = &mut self.store[id].details
        {
            details.has_result = true;
        }
    }

    /// The result of a run is not kept any more.
    pub fn result_dropped(&mut self, lock: LockId, token: Token) {
        self.results.remove(lock, token);
    }

    /// Returns the run with this token, if its result is kept.
    pub fn run_with_result(&self, lock: LockId, token: Token) -> Option<&Run> {
        let both = self.results.0.get(&lock)?;
        both.iter().flatten().map(|one| &one.run).find(|run| run.token == token)
    }

    /// Returns the run whose result is recent enough for a request.
    pub(super) fn fresh_result(&self, now: Timestamp, lock: LockId, asked: &LockRequest) -> Option<&Run> {
        self.result(now, lock, true, asked.sharer, asked.fresh_ms)
            .or_else(|| self.result(now, lock, false, asked.sharer, asked.fresh_failure_ms))
    }

    /// Returns the run whose result is good enough for a request while another client runs anew.
    pub fn stale_run(&self, now: Timestamp, lock: LockId, asked: &LockRequest) -> Option<&Run> {
        self.result(now, lock, true, asked.sharer, asked.stale_ms)
    }

    fn result(
        &self,
        now: Timestamp,
        lock: LockId,
        is_success: bool,
        sharer: u64,
        within_ms: u64,
    ) -> Option<&Run> {
        // If the last run is forgotten, so are the ones before it.
        self.runs.certain(lock, is_success)?;
        let one = self.results.get(lock, is_success).filter(|one| one.gives_to(sharer))?;
        (one.run.age(now) < Duration::from_millis(within_ms)).then_some(&one.run)
    }

    /// A request is about to wait. If an earlier result is good enough meanwhile: tells its client, and removes the request.
    pub(super) fn finish_if_stale(&mut self, now: Timestamp, id: RequestId, effects: &mut Effects) -> bool {
        let lock = self.store[self.store[id].lock].id;
        let asked = self.store[id].asked().filter(|asked| asked.stale_ms > 0);
        let Some(run) = asked.and_then(|asked| self.stale_run(now, lock, asked)) else { return false };
        self.notify(id, NotificationKind::Fresh(run.token), effects);
        self.remove_request(id);
        true
    }
}
