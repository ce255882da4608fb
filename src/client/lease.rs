//! How long a lock may be relied on that was won from other hosts. The daemon keeps a lease for all that its host holds;
//! this end asks it from time to time how long that is good, since a daemon that was stopped, or died, cannot say that it is
//! over.

use std::time::{Duration, Instant};

use crate::clock;
use crate::proto::v2::LeaseTerms;
use crate::table::Millis;

/// What is known of the daemon's lease.
#[derive(Debug)]
pub(super) struct Lease {
    good_until: Millis,
    margin: Duration,
    /// When the question was sent that is not answered yet.
    asked: Option<Millis>,
    ask_at: Instant,
}

impl Lease {
    /// As it was told in answer to a question that was sent then.
    pub(super) fn new(sent: Millis, terms: LeaseTerms) -> Lease {
        let margin = Duration::from_millis(terms.margin_ms);
        Lease {
            good_until: sent.plus(Millis(terms.good_ms)),
            margin,
            asked: None,
            ask_at: Instant::now() + margin,
        }
    }

    /// True when the lock may not be relied on any more.
    pub(super) fn is_over(&self) -> bool {
        self.good_until <= clock::now()
    }

    /// When to look after it again.
    pub(super) fn due(&self) -> Instant {
        let left = self.good_until.0.saturating_sub(clock::now().0);
        self.ask_at.min(Instant::now() + Duration::from_millis(left))
    }

    /// The time that is left to stop in when it is over: another host cannot have the lock before.
    pub(super) fn margin(&self) -> Duration {
        self.margin
    }

    /// True when it is time to ask the daemon, which the caller does at once. One question at a time.
    pub(super) fn ping_due(&mut self) -> bool {
        if self.ask_at > Instant::now() {
            return false;
        }
        self.ask_at = Instant::now() + self.margin;
        let is_due = self.asked.is_none();
        if is_due {
            self.asked = Some(clock::now());
        }
        is_due
    }

    /// A question was sent with the request to resume the lock.
    pub(super) fn asked(&mut self, sent: Millis) {
        self.asked = Some(sent);
    }

    /// A question was answered, or, with nothing to say, not.
    pub(super) fn answered(&mut self, terms: Option<LeaseTerms>) {
        if let (Some(sent), Some(terms)) = (self.asked.take(), terms) {
            self.good_until = self.good_until.max(sent.plus(Millis(terms.good_ms)));
        }
    }
}
