//! The daemon before this one, where nothing is left of it: its machine was replaced, or it kept no journal. Clients on other
//! machines may still run commands under locks that it granted, until their leases are over. Until then, each lock that is asked
//! for counts as held by an unknown client.

use std::time::Duration;

use log::info;

use crate::proto::{LockId, Protocol, Token};
use crate::table::{HoldState, Terms, Timestamp};

/// How many locks may count as held at the same time.
const PRESUMED_MAX: u64 = 100_000;

/// What is not known of an earlier daemon.
pub(super) struct Predecessor {
    /// Until when its clients may hold locks.
    until: Timestamp,
    /// Below the tokens that this daemon gives.
    first_token: u64,
    presumed: u64,
}

impl Predecessor {
    /// `is_unknown`: nothing tells which locks it gave to clients that have leases of `timeout`, if they have leases.
    pub(super) fn new(
        is_unknown: bool,
        timeout: Option<Duration>,
        now: Timestamp,
        first_token: Token,
    ) -> Predecessor {
        match timeout {
            Some(timeout) if is_unknown => Predecessor::unknown(now, timeout, first_token),
            _ => Predecessor::known(),
        }
    }

    /// A daemon of which everything is known.
    fn known() -> Predecessor {
        Predecessor { until: Timestamp(0), first_token: 0, presumed: 0 }
    }

    /// A daemon of which nothing is known but that its clients have leases of `timeout`, which end from now on.
    fn unknown(now: Timestamp, timeout: Duration, first_token: Token) -> Predecessor {
        let seconds = timeout.as_secs();
        info!("clients of an earlier daemon may hold locks: granting none for {seconds} s (--peer-timeout)");
        Predecessor { until: now.plus(timeout), first_token: first_token.0, presumed: 0 }
    }

    /// Returns for how long its clients may hold locks, if they still may.
    pub(super) fn remaining(&self, now: Timestamp) -> Option<Duration> {
        Some(self.until.since(now)).filter(|left| !left.is_zero())
    }

    /// Returns a hold that stands for what a client of that daemon may hold; `None`: there are too many of them.
    pub(super) fn presume(&mut self, lock: LockId) -> Option<HoldState> {
        if self.presumed >= PRESUMED_MAX {
            return None;
        }
        self.presumed += 1;
        let token = Token(self.first_token.saturating_sub(self.presumed));
        let terms = Terms { protocol: Protocol::V2, ..Terms::V1 };
        Some(HoldState { lock, token, terms, nonce: None, uid: None, until: Some(self.until) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_presumed_ends_with_the_last_lease_and_is_bounded() {
        let mut before = Predecessor::unknown(Timestamp(5), Duration::from_secs(30), Token(1_000_000));
        assert_eq!(before.remaining(Timestamp(30_004)), Some(Duration::from_millis(1)));
        assert_eq!(before.remaining(Timestamp(30_005)), None);
        let lock = LockId([1; 16]);
        let (first, second) = (before.presume(lock).unwrap(), before.presume(lock).unwrap());
        assert_eq!(first.until, Some(Timestamp(30_005)));
        assert!(second.token < first.token && first.token < Token(1_000_000));
        assert_eq!(
            (0..2 * PRESUMED_MAX).filter_map(|_| before.presume(lock)).count() as u64,
            PRESUMED_MAX - 2
        );
        assert_eq!(Predecessor::known().remaining(Timestamp(0)), None);
    }
}
