//! The client's view of a lease: how long a lock is safe without news from the daemon. The client asks for a renewal at
//! regular intervals and measures on its own clock, since a daemon that is stopped or dead cannot say that the lease is over.

use std::time::{Duration, Instant};

use crate::clock;
use crate::proto::v2::LeaseTerms;
use crate::timestamp::Timestamp;

/// How often to look at the clock. While a machine sleeps, the clock that poll(2) waits by stands still, and that of a lease does
/// not: the work must stop soon after the machine wakes.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A lease, as the client knows it.
#[derive(Debug)]
pub(super) struct Lease {
    good_until: Timestamp,
    margin: Duration,
    /// When the unanswered ping was sent.
    asked: Option<Timestamp>,
    ask_at: Instant,
}

/// What the client does for its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    Ping,
    /// The last ping was not answered in time. The way to the daemon may have been interrupted, and a new connection is quicker
    /// then than the one that waits to send again.
    Reconnect,
}

impl Lease {
    /// The lease that the daemon stated in answer to a ping sent at `sent`.
    pub(super) fn new(sent: Timestamp, terms: LeaseTerms) -> Lease {
        let margin = Duration::from_millis(terms.margin_ms);
        Lease {
            good_until: sent.plus(Duration::from_millis(terms.good_ms)),
            margin,
            asked: None,
            ask_at: Instant::now() + margin,
        }
    }

    /// Returns `true` when another host may get the lock.
    pub(super) fn is_over(&self) -> bool {
        self.good_until <= clock::now()
    }

    /// Returns when to ask again (`asks`: the daemon can be asked), to give up, or to look whether it is time for that.
    pub(super) fn due(&self, asks: bool) -> Instant {
        let left = self.good_until.since(clock::now());
        let look_at = Instant::now() + left.min(LOOK_EVERY);
        if asks { look_at.min(self.ask_at) } else { look_at }
    }

    /// Returns the time between the end of the lease as the client counts it and the first moment at which another host can
    /// get the lock: the command has to stop within it.
    pub(super) fn margin(&self) -> Duration {
        self.margin
    }

    /// Returns what is due, which the caller does at once. There is one unanswered ping at a time.
    pub(super) fn take_due(&mut self) -> Due {
        if self.ask_at > Instant::now() {
            return Due::Nothing;
        }
        // The answer should come at once. There is time yet for another connection.
        self.ask_at = Instant::now() + self.margin / 2;
        if self.asked.is_some() {
            return Due::Reconnect;
        }
        self.asked = Some(clock::now());
        Due::Ping
    }

    /// Notes that a request to resume the lock was sent, which the daemon answers with a lease too.
    pub(super) fn asked(&mut self, sent: Timestamp) {
        self.asked = Some(sent);
    }

    /// Takes in the answer to a ping. `None`: the daemon stated no lease.
    pub(super) fn answered(&mut self, terms: Option<LeaseTerms>) {
        if let (Some(sent), Some(terms)) = (self.asked.take(), terms) {
            self.good_until = self.good_until.max(sent.plus(Duration::from_millis(terms.good_ms)));
            self.ask_at = Instant::now() + self.margin;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ping_that_is_not_answered_is_followed_by_another_connection_before_the_lease_is_over() {
        let sent = clock::now();
        let mut lease = Lease::new(sent, LeaseTerms { good_ms: 4000, margin_ms: 200 });
        assert_eq!(lease.take_due(), Due::Nothing);
        lease.ask_at = Instant::now();
        assert_eq!(lease.take_due(), Due::Ping);
        assert_eq!(lease.take_due(), Due::Nothing, "there is one ping at a time");
        assert!(lease.ask_at <= Instant::now() + Duration::from_millis(100));
        lease.ask_at = Instant::now();
        assert_eq!(lease.take_due(), Due::Reconnect);
        lease.answered(Some(LeaseTerms { good_ms: 4000, margin_ms: 200 }));
        lease.ask_at = Instant::now();
        assert_eq!(lease.take_due(), Due::Ping);
    }

    #[test]
    fn a_lease_that_cannot_be_renewed_now_does_not_keep_its_holder_busy() {
        let mut lease = Lease::new(clock::now(), LeaseTerms { good_ms: 60_000, margin_ms: 30_000 });
        lease.ask_at = Instant::now();
        assert!(lease.due(true) <= Instant::now());
        assert!(lease.due(false) > Instant::now() + LOOK_EVERY / 2);
    }
}
