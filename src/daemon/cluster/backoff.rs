//! How long to wait before something is tried again: longer each time, and not as long as other hosts wait.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use crate::etcd::{Error, Kind};

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// The pauses between attempts: 0.1 s and then twice as long each time, up to 5 s; each shortened by chance by up to a
/// quarter, so that hosts that failed together do not come back together.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
    longest: Duration,
    chance: RandomState,
    draws: u64,
}

impl Backoff {
    pub(super) fn new() -> Backoff {
        Backoff::up_to(LONGEST)
    }

    /// Waits no longer than `longest`, where that is less than 5 s.
    pub(super) fn up_to(longest: Duration) -> Backoff {
        let longest = longest.clamp(FIRST, LONGEST);
        Backoff { next: FIRST, longest, chance: RandomState::new(), draws: 0 }
    }

    /// Returns how long to wait now.
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        self.draws += 1;
        let chance = (self.chance.hash_one(self.draws) % 1000) as u32;
        pause - pause * chance / 4000
    }

    /// The last attempt has succeeded.
    pub(super) fn reset(&mut self) {
        self.next = FIRST;
    }
}

/// Returns the longest pause before something is tried again that failed so. An etcd that does not answer is asked more
/// often, because what is held depends on how soon it is noticed that etcd is back.
pub(super) fn pause_max(error: &Error, ttl_secs: u64) -> Duration {
    match error.kind() {
        Kind::Unreachable | Kind::NoLeader => Duration::from_secs(ttl_secs) / 10,
        _ => Duration::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_begin_anew_after_a_success() {
        let mut backoff = Backoff::new();
        let pauses: Vec<u128> = (0..20).map(|_| backoff.pause().as_millis()).collect();
        let exact = (0..20).map(|n| (100 << n).min(5_000));
        for (pause, exact) in pauses.iter().zip(exact) {
            assert!(*pause <= exact && *pause >= exact * 3 / 4, "{pauses:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= FIRST);
    }

    #[test]
    fn two_hosts_do_not_wait_equally_long() {
        let pauses = || {
            let mut backoff = Backoff::up_to(Duration::from_secs(1));
            (0..10).map(|_| backoff.pause()).collect::<Vec<_>>()
        };
        assert_ne!(pauses(), pauses());
    }
}
