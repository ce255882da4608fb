//! Which store answers: the id of its cluster, and the highest revision that was seen.
//!
//! A store never goes back by itself. If it does, its data directory was replaced, a snapshot was restored, a virtual
//! machine was rolled back, or its disk lost what it had confirmed. What was read from the store before is worth nothing
//! then, so the caller must be told before it relies on the new answers.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// What each answer of etcd says about its store. A zero means that the answer does not say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) cluster_id: u64,
    pub(super) revision: i64,
}

/// How current the revision in an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Currency {
    /// It is at least as new as every answer that was given before the request was sent (etcd's linearizable reads, and
    /// transactions).
    Linearizable,
    /// A member that lags behind the others may have given it (leases, watches).
    Local,
}

/// What an answer reveals about the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    Same,
    /// The member lags behind, or the store went back: only a linearizable read can tell.
    Behind,
}

/// The store went back, or it is another one; the text says which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Changed(pub(super) String);

/// What is known of the store; threads share it.
#[derive(Debug, Default)]
pub(super) struct Store(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    seen: Seen,
    /// How the last change showed.
    change: String,
}

/// A snapshot of what is known, to be taken before a request is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// How many times the store has changed.
    pub(super) generation: u64,
    header: Header,
}

impl Store {
    pub(super) fn seen(&self) -> Seen {
        self.lock().seen
    }

    /// Compares an answer with what was known when its request was sent (`before`). If the store has changed, the new one
    /// becomes the known one, so that each change is found once, and answers that were under way are rejected.
    ///
    /// # Errors
    /// [`Changed`] if the answer cannot be used, because it or what was known before is of another store.
    pub(super) fn check(&self, before: Seen, header: Header, currency: Currency) -> Result<Finding, Changed> {
        let mut state = self.lock();
        if before.generation != state.seen.generation {
            return Err(Changed(state.change.clone()));
        }
        let known = state.seen.header;
        let is_other =
            known.cluster_id != 0 && header.cluster_id != 0 && known.cluster_id != header.cluster_id;
        let is_lower = header.revision != 0 && header.revision < before.header.revision;
        if is_other || (is_lower && currency == Currency::Linearizable) {
            return Err(state.change_to(
                header,
                if is_other {
                    format!("it is cluster {:x}, and was cluster {:x}", header.cluster_id, known.cluster_id)
                } else {
                    format!("it is at revision {}, and was at {}", header.revision, before.header.revision)
                },
            ));
        }
        if header.cluster_id != 0 {
            state.seen.header.cluster_id = header.cluster_id;
        }
        state.seen.header.revision = known.revision.max(header.revision);
        Ok(if is_lower { Finding::Behind } else { Finding::Same })
    }

    /// The caller has found that the store went back, by other means than a revision.
    pub(super) fn went_back(&self, before: Seen, header: Header) -> Changed {
        let mut state = self.lock();
        if before.generation == state.seen.generation {
            return state.change_to(header, "its history is not what it was".into());
        }
        Changed(state.change.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No thread panics in here.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn change_to(&mut self, header: Header, why: String) -> Changed {
        self.seen = Seen { generation: self.seen.generation + 1, header };
        self.change.clone_from(&why);
        Changed(why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Currency::{Linearizable, Local};

    fn header(cluster_id: u64, revision: i64) -> Header {
        Header { cluster_id, revision }
    }

    #[test]
    fn a_lower_revision_counts_only_if_a_linearizable_answer_has_it() {
        let store = Store::default();
        let check = |header, currency| store.check(store.seen(), header, currency);
        assert_eq!(check(header(1, 10), Linearizable), Ok(Finding::Same));
        assert_eq!(check(header(1, 9), Local), Ok(Finding::Behind));
        assert_eq!(check(header(1, 10), Linearizable), Ok(Finding::Same));
        assert!(check(header(1, 9), Linearizable).is_err());
        // The new store is the known one from now on.
        assert_eq!(check(header(1, 9), Linearizable), Ok(Finding::Same));
    }

    #[test]
    fn another_cluster_is_another_store_whatever_its_revision() {
        for currency in [Linearizable, Local] {
            let store = Store::default();
            store.check(store.seen(), header(u64::MAX, 10), currency).unwrap();
            store.check(store.seen(), header(0, 10), currency).unwrap();
            let Changed(why) = store.check(store.seen(), header(2, 11), currency).unwrap_err();
            assert!(why.contains("ffffffffffffffff"), "{why}");
        }
    }

    #[test]
    fn an_answer_that_overtakes_another_is_no_step_back() {
        let store = Store::default();
        let before = store.seen();
        store.check(before, header(1, 12), Linearizable).unwrap();
        assert_eq!(store.check(before, header(1, 11), Linearizable), Ok(Finding::Same));
        assert!(store.check(store.seen(), header(1, 11), Linearizable).is_err());
    }

    #[test]
    fn answers_that_were_under_way_when_the_store_changed_are_rejected() {
        let store = Store::default();
        store.check(store.seen(), header(1, 10), Linearizable).unwrap();
        let before = store.seen();
        store.check(before, header(1, 1), Linearizable).unwrap_err();
        assert!(store.check(before, header(1, 10), Linearizable).is_err());
        assert_eq!(store.check(store.seen(), header(1, 1), Linearizable), Ok(Finding::Same));
    }
}
