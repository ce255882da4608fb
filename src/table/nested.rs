//! Requests that are made under another lock, by the command that runs under it: `kmutex run A -- kmutex run B -- make`.
//! The holder of A cannot release before the request for B has ended, so two such holders can wait for each other for ever.
//! The request that would close such a cycle is refused.

use std::collections::{BTreeMap, BTreeSet};

use super::{Effects, LockIndex, NotificationKind, RequestId, Stage, Table};
use crate::proto::{LockId, Token};

/// How many holders and requests a search for a cycle looks at. If there are more, the request is granted or waits as if
/// there were no cycle: no web of requests may keep the daemon busy.
const STEPS_MAX: usize = 1_000;

/// The requests that were made under another lock.
#[derive(Default)]
pub(super) struct Nested {
    /// The requests by the token that each was made under.
    under: BTreeSet<(Token, RequestId)>,
    /// The holders among them by their own tokens.
    holding: BTreeMap<Token, RequestId>,
}

/// A step of a cycle: the lock, and the token of its holder, which waits for the next step's lock.
pub type Step = (LockId, Token);

impl Table {
    /// Returns `true` if a request of user `uid` may count as made under the lock with this token: the lock is held, and by
    /// the same user, or root asks. Otherwise one user could make it look as if another user's holder waited.
    pub(super) fn may_run_under(&self, within: Token, uid: Option<u32>) -> bool {
        let holder = self.holders.get(within).map(|id| &self.store[id]);
        holder.is_some_and(|holder| uid == Some(0) || holder.uid() == uid)
    }

    pub(super) fn nested_asked(&mut self, id: RequestId) {
        if let Some(within) = self.within(id) {
            self.nested.under.insert((within, id));
        }
    }

    pub(super) fn nested_granted(&mut self, id: RequestId) {
        if self.within(id).is_some() {
            let token = self.store.token_of(id).expect("a granted request holds");
            self.nested.holding.insert(token, id);
        }
    }

    pub(super) fn nested_gone(&mut self, id: RequestId) {
        if let Some(within) = self.within(id) {
            self.nested.under.remove(&(within, id));
            if let Some(token) = self.store.token_of(id) {
                self.nested.holding.remove(&token);
            }
        }
    }

    fn within(&self, id: RequestId) -> Option<Token> {
        self.store[id].asked()?.within
    }

    /// Returns the token that a request was made under, the token which that one was made under, and so on; sorted.
    fn above(&self, within: Token) -> Vec<Token> {
        let mut above = vec![within];
        let mut last = within;
        while let Some(&id) = self.nested.holding.get(&last)
            && let Some(next) = self.within(id)
            && above.len() < STEPS_MAX
        {
            above.push(next);
            last = next;
        }
        above.sort_unstable();
        above
    }

    /// Refuses a request for a lock that is held above it: the two would wait for each other. Returns `false` if the lock is
    /// not held above it.
    pub(super) fn refuse_if_held_above(&mut self, id: RequestId, effects: &mut Effects) -> bool {
        let Some(within) = self.within(id) else { return false };
        let above = self.above(within);
        let lock = &self.store[self.store[id].lock];
        let is_above =
            |holder| self.store.token_of(holder).is_some_and(|token| above.binary_search(&token).is_ok());
        let held = self.store.members(lock.holders).any(is_above);
        if held {
            self.notify(id, NotificationKind::HeldAbove, effects);
        }
        held
    }

    /// Refuses a request that would close a cycle of waiters. Returns `false` if it would close none.
    pub(super) fn refuse_if_cyclic(&mut self, id: RequestId, effects: &mut Effects) -> bool {
        let Some(within) = self.within(id) else { return false };
        let lock = self.store[self.store[id].lock].id;
        let is_cyclic = self.cycle(within, lock).is_some();
        if is_cyclic {
            self.notify(id, NotificationKind::Deadlock(within), effects);
        }
        is_cyclic
    }

    /// Returns the cycle that a request for `lock` under the token `within` would close: the holder of `lock`, the lock that
    /// this holder waits for, and so on, to a lock that is held above the request. `None`: there would be no cycle.
    pub fn cycle(&self, within: Token, lock: LockId) -> Option<Vec<Step>> {
        let above = self.above(within);
        let search = Search { above, seen: BTreeSet::new(), steps: 0, path: Vec::new() };
        let index = self.store.find(lock)?;
        search.through(self, index)
    }
}

/// A search, depth first, through holders that wait for each other.
struct Search {
    /// Where it is to arrive; sorted.
    above: Vec<Token>,
    seen: BTreeSet<Token>,
    /// How many holders and requests it has looked at.
    steps: usize,
    path: Vec<Step>,
}

impl Search {
    fn through(mut self, table: &Table, lock: LockIndex) -> Option<Vec<Step>> {
        self.lock(table, lock).then_some(self.path)
    }

    /// Searches through the holders of a lock.
    fn lock(&mut self, table: &Table, index: LockIndex) -> bool {
        let lock = &table.store[index];
        for token in table.store.members(lock.holders).filter_map(|holder| table.store.token_of(holder)) {
            if self.is_over() {
                return false;
            }
            if self.token(table, lock.id, token) {
                return true;
            }
        }
        false
    }

    fn is_over(&mut self) -> bool {
        self.steps += 1;
        self.steps > STEPS_MAX
    }

    /// Searches through the requests that were made under a token.
    fn token(&mut self, table: &Table, lock: LockId, token: Token) -> bool {
        if !self.seen.insert(token) {
            return false;
        }
        self.path.push((lock, token));
        let arrived = self.above.binary_search(&token).is_ok() || self.requests_under(table, token);
        if !arrived {
            self.path.pop();
        }
        arrived
    }

    fn requests_under(&mut self, table: &Table, token: Token) -> bool {
        for &(under, id) in table.nested.under.range((token, RequestId::FIRST)..) {
            if under != token || self.is_over() {
                return false;
            }
            let request = &table.store[id];
            let arrived = match request.stage {
                Stage::Holding(token) => self.token(table, table.store[request.lock].id, token),
                Stage::Waiting | Stage::Stalled => self.lock(table, request.lock),
                Stage::New | Stage::Deferred | Stage::Undecided | Stage::Offered(_) => false,
            };
            if arrived {
                return true;
            }
        }
        false
    }
}
