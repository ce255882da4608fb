//! The time in which no lock is granted, because the store of etcd went back: other hosts may not have noticed it yet, and
//! their commands must be stopped before anything is granted that they hold. That takes as long as a lease lives.
//!
//! The journal has the end of that time, so that a daemon that is started meanwhile waits for the rest of it.

use std::time::{Duration, Instant};

use crate::clock;
use crate::journal::ClusterLease;
use crate::table::Timestamp;

/// No lease is longer (`--etcd-ttl`).
const LEASE_MAX: Duration = Duration::from_secs(86_400);

pub(super) struct Quarantine {
    until: Timestamp,
}

impl Quarantine {
    /// What the previous daemon left of it, according to the journal. `ttl`: how long a lease lives.
    pub(super) fn resumed(recorded: ClusterLease, now: Timestamp, ttl: Duration) -> Quarantine {
        let until = match recorded {
            ClusterLease::Quarantine(until) if until.since(now) <= LEASE_MAX => until,
            // The moment is of another boot, or damaged.
            ClusterLease::Quarantine(_) => now.plus(ttl),
            ClusterLease::Local | ClusterLease::None | ClusterLease::Id(_) => Timestamp(0),
        };
        Quarantine { until }
    }

    /// The store went back, as was found out now.
    pub(super) fn begin(&mut self, now: Timestamp, ttl: Duration) {
        self.until = now.plus(ttl);
    }

    /// Returns how much of it is left, if any is.
    pub(super) fn left(&self, now: Timestamp) -> Option<Duration> {
        Some(self.until.since(now)).filter(|left| !left.is_zero())
    }

    /// Returns its end by the clock that the threads have.
    pub(super) fn end(&self) -> Instant {
        Instant::now() + self.until.since(clock::now())
    }

    /// Returns what the journal is to say while this host has no lease.
    pub(super) fn record(&self, now: Timestamp) -> ClusterLease {
        match self.left(now) {
            Some(_) => ClusterLease::Quarantine(self.until),
            None => ClusterLease::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_millis(1000);

    #[test]
    fn the_next_daemon_waits_for_the_rest_of_it() {
        let mut first = Quarantine::resumed(ClusterLease::Id(7), Timestamp(100), TTL);
        assert_eq!((first.left(Timestamp(100)), first.record(Timestamp(100))), (None, ClusterLease::None));
        first.begin(Timestamp(200), TTL);
        let recorded = first.record(Timestamp(700));
        let next = Quarantine::resumed(recorded, Timestamp(900), TTL);
        assert_eq!(next.left(Timestamp(900)), Some(Duration::from_millis(300)));
        assert_eq!((next.left(Timestamp(1200)), next.record(Timestamp(1200))), (None, ClusterLease::None));
    }

    #[test]
    fn after_a_boot_the_whole_of_it_is_left() {
        for until in [Timestamp::NEVER, Timestamp(1 << 63)] {
            let next = Quarantine::resumed(ClusterLease::Quarantine(until), Timestamp(5), TTL);
            assert_eq!(next.left(Timestamp(5)), Some(TTL));
            assert_eq!(next.record(Timestamp(5)), ClusterLease::Quarantine(Timestamp(1005)));
        }
    }
}
