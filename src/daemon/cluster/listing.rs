//! Listing what all hosts hold, for `kmutex status --cluster`: what is read from etcd, key by key, becomes whole locks.

use super::party::party;
use crate::cluster::{self, Entry, Revision, RunRecord};
use crate::proto::v2::{LISTED_MAX, LockStatus, LockUser, RunStatus};
use crate::proto::{LockId, Outcome};
use crate::table::Sharing;

/// Locks that were read in the order of their keys. The last one may be incomplete.
#[derive(Default)]
pub(super) struct Locks {
    complete: Vec<LockStatus>,
    last: Option<Incomplete>,
}

struct Incomplete {
    lock: LockId,
    /// The first few in the order of the line.
    entries: Vec<Entry>,
    /// What all of them share.
    line: Vec<(Revision, Sharing)>,
}

impl Locks {
    pub(super) fn add(&mut self, lock: LockId, entry: Entry) {
        match &mut self.last {
            Some(last) if last.lock == lock => last.add(entry),
            _ => {
                self.complete.extend(self.last.take().map(Incomplete::status));
                let line = vec![(entry.revision, entry.sharing())];
                self.last = Some(Incomplete { lock, entries: vec![entry], line });
            }
        }
    }

    /// Returns `true` if at least one lock is complete.
    pub(super) fn has_complete(&self) -> bool {
        !self.complete.is_empty()
    }

    /// Returns the complete locks, and the one that may be incomplete.
    pub(super) fn complete(self) -> (Vec<LockStatus>, Option<LockId>) {
        (self.complete, self.last.map(|last| last.lock))
    }

    /// Returns the only lock that was read, with its runs, of which there may be more than there are places.
    pub(super) fn finish_with(self, lock: LockId, runs: Vec<RunRecord>) -> Vec<LockStatus> {
        let mut locks = self.finish();
        if locks.is_empty() && !runs.is_empty() {
            locks.push(LockStatus { id: lock.to_string(), ..LockStatus::default() });
        }
        if let [status] = &mut locks[..] {
            (status.last_success, status.last_failure) = (last_run(&runs, true), last_run(&runs, false));
        }
        locks
    }

    /// Returns all locks: there is nothing more to read.
    pub(super) fn finish(mut self) -> Vec<LockStatus> {
        self.complete.extend(self.last.take().map(Incomplete::status));
        self.complete
    }
}

/// Returns the last run of a lock that ended so, as far as it counts.
fn last_run(runs: &[RunRecord], is_success: bool) -> Option<Box<RunStatus>> {
    let run = runs.iter().find(|run| (run.outcome == Outcome::Exit(0)) == is_success)?;
    let RunRecord { token, outcome, age_ms, by, .. } = run.clone();
    Some(Box::new(RunStatus { outcome, token, age_ms, by }))
}

impl Incomplete {
    fn add(&mut self, entry: Entry) {
        self.line.push((entry.revision, entry.sharing()));
        self.entries.push(entry);
        self.entries.sort_by_key(|entry| entry.revision);
        self.entries.truncate(2 * LISTED_MAX);
    }

    fn status(mut self) -> LockStatus {
        self.line.sort_by_key(|(revision, _)| *revision);
        let holding = cluster::holding(self.line.iter().map(|(_, sharing)| *sharing));
        let (held, waiting) = self.entries.split_at(holding.min(self.entries.len()));
        let key = self.entries.iter().find_map(|entry| entry.owner.as_ref()?.key.clone());
        let waiters = waiting.iter().take(LISTED_MAX).map(|entry| {
            let mode = entry.owner.as_ref().map(|owner| owner.mode);
            LockUser { token: None, mode, ..party(entry) }
        });
        LockStatus {
            id: self.lock.to_string(),
            holders: held.iter().take(LISTED_MAX).map(party).collect(),
            holding: holding as u32,
            waiters: waiters.collect(),
            waiting: (self.line.len() - holding) as u32,
            key,
            last_success: None,
            last_failure: None,
        }
    }
}
