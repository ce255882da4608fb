//! A moment on the clock that the daemon and its clients use. A value without a clock, so that the pure parts can have it.

use std::time::Duration;

/// Milliseconds of a monotonic clock; where it starts does not matter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Later than every moment.
    pub const NEVER: Timestamp = Timestamp(u64::MAX);

    /// Returns the moment `span` later, or [`Timestamp::NEVER`] if the clock does not reach that far.
    pub fn plus(self, span: Duration) -> Timestamp {
        Timestamp(self.0.saturating_add(millis(span)))
    }

    /// Returns the moment `span` earlier, or the first of all.
    pub fn minus(self, span: Duration) -> Timestamp {
        Timestamp(self.0.saturating_sub(millis(span)))
    }

    /// Returns the time from `earlier` until now; none if `earlier` is later.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// Returns a span of time in whole milliseconds, or the longest that can be said.
pub fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_too_far_away_is_never() {
        assert_eq!(Timestamp(5).plus(Duration::from_millis(7)), Timestamp(12));
        assert_eq!(Timestamp(5).plus(Duration::MAX), Timestamp::NEVER);
        assert_eq!(Timestamp(5).minus(Duration::from_millis(7)), Timestamp(0));
        assert_eq!(Timestamp(12).since(Timestamp(5)), Duration::from_millis(7));
        assert_eq!(Timestamp(5).since(Timestamp(12)), Duration::ZERO);
    }
}
