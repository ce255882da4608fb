//! The holders of protocol 2 by their tokens, for requests that are made under a lock.

use hashbrown::HashTable;

use super::RequestId;
use crate::proto::Token;

#[derive(Default)]
pub(super) struct Holders(HashTable<(Token, RequestId)>);

impl Holders {
    pub(super) fn get(&self, token: Token) -> Option<RequestId> {
        self.0.find(hash(token), |&(other, _)| other == token).map(|&(_, id)| id)
    }

    pub(super) fn insert(&mut self, token: Token, id: RequestId) {
        self.0.insert_unique(hash(token), (token, id), |&(token, _)| hash(token));
    }

    /// Removes the holder with this token, if there is one.
    pub(super) fn remove(&mut self, token: Token) {
        if let Ok(entry) = self.0.find_entry(hash(token), |&(other, _)| other == token) {
            entry.remove();
        }
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn iter(&self) -> impl Iterator<Item = (Token, RequestId)> + '_ {
        self.0.iter().copied()
    }
}

/// The daemon gives the tokens, one after the other: no client can choose tokens whose hashes collide. The factor, which is
/// odd, keeps neighbours apart and spreads them over the high bits, too.
fn hash(token: Token) -> u64 {
    token.0.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}
