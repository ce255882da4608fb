//! What a host records of a run that counts for a while, for the requests of all hosts.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::proto::v2::ShortText;
use crate::proto::{LockId, Outcome, Token};
use crate::table::{Run, Timestamp};

/// A run that counts for a while. It says how old it was when its record's lease began, and never a time of day: the clocks of
/// hosts differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The token of the lock that it ran under.
    pub token: Token,
    /// How it ended.
    pub outcome: Outcome,
    /// How long before it began.
    pub age_ms: u64,
    /// How long after its beginning it counts.
    pub counts_for_ms: u64,
    /// Who ran it, for people: `USER@HOST`.
    #[serde(default)]
    pub by: ShortText,
}

impl RunRecord {
    /// Describes a run as it is now. `None`: it does not count any more.
    pub fn of(run: &Run, now: Timestamp) -> Option<RunRecord> {
        let (age, counts_for) = (run.age(now), run.counts_for);
        (age < counts_for).then(|| RunRecord {
            token: run.token,
            outcome: run.outcome,
            age_ms: age.as_millis() as u64,
            counts_for_ms: counts_for.as_millis() as u64,
            by: run.by.clone(),
        })
    }

    /// Returns for how many more whole seconds it counts, rounded up.
    pub fn ttl_secs(&self) -> u64 {
        self.counts_for_ms.saturating_sub(self.age_ms).div_ceil(1000)
    }

    /// The record's lease was granted for some seconds, of which so many whole ones are left. The run is never taken for older
    /// than it is.
    pub fn grow_older(&mut self, granted_secs: u64, left_secs: u64) {
        let elapsed = granted_secs.saturating_sub(left_secs.saturating_add(1));
        self.age_ms = self.age_ms.saturating_add(elapsed.saturating_mul(1000));
    }

    /// Returns the run, by this host's clock. Its user's number says nothing here.
    pub(super) fn run(self, lock: LockId, now: Timestamp) -> Run {
        let at = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
        Run {
            lock,
            token: self.token,
            began_ms: at(now.0).saturating_sub(at(self.age_ms)),
            counts_for: Duration::from_millis(self.counts_for_ms),
            outcome: self.outcome,
            uid: None,
            by: self.by,
        }
    }
}
