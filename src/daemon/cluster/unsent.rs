//! The results of this host's runs until etcd has them: a release may have to be repeated.
//!
//! A result never holds up a release: if etcd does not answer a request that has it, the next one goes without.

use std::collections::BTreeMap;

use crate::cluster::OwnResult;
use crate::proto::{LockId, Token};

/// How long all results together may be, in bytes.
const BYTES_MAX: usize = 8 * 1024 * 1024;

/// The results.
#[derive(Default)]
pub(super) struct Unsent {
    results: BTreeMap<(LockId, Token), Waiting>,
    bytes: usize,
}

struct Waiting {
    result: OwnResult,
    was_sent: bool,
}

impl Unsent {
    /// A run is about to be released.
    pub(super) fn add(&mut self, lock: LockId, mut result: OwnResult) {
        let bytes = bytes(&result);
        if self.bytes + bytes > BYTES_MAX {
            result.content = Err("its host has too many results that etcd does not know yet".into());
        }
        self.bytes += self::bytes(&result);
        let token = result.token;
        if let Some(old) = self.results.insert((lock, token), Waiting { result, was_sent: false }) {
            self.bytes -= self::bytes(&old.result);
        }
    }

    /// Returns the result to send with the release of a hold.
    pub(super) fn for_request(&mut self, lock: LockId, token: Token) -> Option<Box<OwnResult>> {
        let waiting = self.results.get_mut(&(lock, token))?;
        waiting.was_sent = true;
        Some(Box::new(waiting.result.clone()))
    }

    /// Etcd has not answered a request for a lock.
    pub(super) fn not_answered(&mut self, lock: LockId) {
        let of_lock = (lock, Token(0))..=(lock, Token(u64::MAX));
        for (_, waiting) in self.results.range_mut(of_lock).filter(|(_, waiting)| waiting.was_sent) {
            self.bytes -= bytes(&waiting.result);
            waiting.result.content = Err("etcd did not take it in time".into());
        }
    }

    /// Drops all but the results of these holds.
    pub(super) fn retain(&mut self, is_untold: impl Fn(LockId, Token) -> bool) {
        self.results.retain(|&(lock, token), waiting| {
            let stays = is_untold(lock, token);
            if !stays {
                self.bytes -= bytes(&waiting.result);
            }
            stays
        });
    }
}

fn bytes(result: &OwnResult) -> usize {
    result.content.as_ref().map_or(0, |content| content.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::RunUser;

    const LOCK: LockId = LockId([1; 16]);

    fn result(token: u64, bytes: usize) -> OwnResult {
        OwnResult { token: Token(token), user: RunUser::default(), content: Ok(vec![0; bytes].into()) }
    }

    fn is_sent(unsent: &mut Unsent, token: u64) -> Option<bool> {
        unsent.for_request(LOCK, Token(token)).map(|result| result.content.is_ok())
    }

    #[test]
    fn a_request_that_is_not_answered_has_its_result_no_more() {
        let mut unsent = Unsent::default();
        unsent.add(LOCK, result(1, 10));
        unsent.not_answered(LOCK);
        assert_eq!(is_sent(&mut unsent, 1), Some(true), "that was another request");
        assert_eq!(is_sent(&mut unsent, 1), Some(true));
        unsent.not_answered(LockId([2; 16]));
        assert_eq!(is_sent(&mut unsent, 1), Some(true));
        unsent.not_answered(LOCK);
        assert_eq!(is_sent(&mut unsent, 1), Some(false));
        assert_eq!((is_sent(&mut unsent, 2), unsent.bytes), (None, 0));
    }

    #[test]
    fn there_is_a_limit_to_all_results_and_each_goes_when_it_is_told() {
        let mut unsent = Unsent::default();
        unsent.add(LOCK, result(1, BYTES_MAX - 10));
        unsent.add(LOCK, result(2, 11));
        unsent.add(LOCK, result(3, 10));
        assert_eq!([1, 2, 3].map(|token| is_sent(&mut unsent, token)), [Some(true), Some(false), Some(true)]);
        unsent.retain(|lock, token| lock == LOCK && token == Token(3));
        assert_eq!([1, 2, 3].map(|token| is_sent(&mut unsent, token)), [None, None, Some(true)]);
        assert_eq!(unsent.bytes, 10);
        unsent.add(LOCK, result(3, 4));
        assert_eq!(unsent.bytes, 4);
    }
}
