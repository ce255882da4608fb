//! Listing what all hosts hold, for `kmutex status --cluster`: what is read from etcd, key by key, becomes whole locks.

use crate::cluster::Contender;
use crate::daemon::cluster::party;
use crate::proto::LockId;
use crate::proto::v2::{LISTED_MAX, LockStatus};

/// Locks that were read in the order of their keys. The last one may be incomplete.
#[derive(Default)]
pub(super) struct Locks {
    complete: Vec<LockStatus>,
    last: Option<Incomplete>,
}

struct Incomplete {
    lock: LockId,
    /// The first few in the order of the line.
    contenders: Vec<Contender>,
    count: u32,
}

impl Locks {
    pub(super) fn add(&mut self, lock: LockId, contender: Contender) {
        match &mut self.last {
            Some(last) if last.lock == lock => last.add(contender),
            _ => {
                self.complete.extend(self.last.take().map(Incomplete::status));
                self.last = Some(Incomplete { lock, contenders: vec![contender], count: 1 });
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

    /// Returns all locks: there is nothing more to read.
    pub(super) fn finish(mut self) -> Vec<LockStatus> {
        self.complete.extend(self.last.take().map(Incomplete::status));
        self.complete
    }
}

impl Incomplete {
    fn add(&mut self, contender: Contender) {
        self.count += 1;
        self.contenders.push(contender);
        self.contenders.sort_by_key(|contender| contender.revision);
        self.contenders.truncate(LISTED_MAX + 1);
    }

    fn status(self) -> LockStatus {
        let key = self.contenders.iter().find_map(|contender| contender.claim.as_ref()?.key.clone());
        let mut parties = self.contenders.iter().map(party);
        let holders = parties.by_ref().take(1).collect();
        let modes =
            self.contenders[1..].iter().map(|contender| contender.claim.as_ref().map(|claim| claim.mode));
        let waiters = parties.zip(modes).map(|(mut party, mode)| {
            (party.token, party.mode) = (None, mode);
            party
        });
        LockStatus {
            id: self.lock.to_string(),
            holders,
            holding: 1,
            waiters: waiters.collect(),
            waiting: self.count - 1,
            key,
        }
    }
}
