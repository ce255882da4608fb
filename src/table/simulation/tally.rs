//! How often the simulation met what its invariants are about.

/// How often the situations came up on which the rules bear. A simulation that never met one proves nothing of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Tally {
    pub(super) deferrals: u64,
    pub(super) refusals: u64,
    pub(super) expiries: u64,
    pub(super) grants_to_waiters: u64,
    /// Offers that were taken, that were withdrawn, and that were taken when they had been withdrawn.
    pub(super) offers: [u64; 3],
    /// Of `slots`, of shared.
    pub(super) grants_beside_others: [u64; 2],
    /// By once waiters, by queue waiters.
    pub(super) successions: [u64; 2],
    /// Of once, queue and protocol 1 waiters.
    pub(super) waits: [u64; 3],
    /// To once, to protocol 1 waiters.
    pub(super) finished: [u64; 2],
}

impl Tally {
    fn counts(&mut self) -> impl Iterator<Item = &mut u64> {
        let Tally { deferrals, refusals, expiries, grants_to_waiters, .. } = self;
        let single = [deferrals, refusals, expiries, grants_to_waiters];
        let pairs = [&mut self.grants_beside_others, &mut self.successions, &mut self.finished];
        let triples = self.waits.iter_mut().chain(&mut self.offers);
        single.into_iter().chain(pairs.into_iter().flatten()).chain(triples)
    }

    pub(super) fn assert_nothing_was_missed(mut self) {
        let least = self.counts().map(|count| *count).min();
        assert!(least > Some(500), "some situation hardly came up: {self:?}");
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, mut other: Tally) {
        self.counts().zip(other.counts()).for_each(|(sum, count)| *sum += *count);
    }
}
