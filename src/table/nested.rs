//! Requests that are made under another lock, by the command that runs under it: `kmutex run A -- kmutex run B -- make`.
//! The holder of A cannot release before the request for B has come to its end, so that two such holders can wait for
//! each other for ever. The request that would close such a cycle is refused.

use std::collections::{BTreeMap, BTreeSet};

use super::{Effects, NotificationKind, RequestId, Stage, Table};
use crate::proto::{LockId, Token};

/// How many holders and requests a search for a cycle looks at. If there are more, the request is granted or waits as if
/// there were no cycle: no web of requests may keep the daemon busy.
const STEPS_MAX: usize = 1_000;

/// The requests that were made under another lock.
#[derive(Default)]
pub(super) struct Nested {
    /// By the token that each was made under.
    under: BTreeSet<(Token, RequestId)>,
    /// Those that hold, by their own tokens.
    holding: BTreeMap<Token, RequestId>,
}

/// A step of a cycle: this lock is held, with this token, by one who waits for the next.
pub type Step = (LockId, Token);

impl Table {
    pub(super) fn nested_asked(&mut self, id: RequestId) {
        if let Some(within) = self.within(id) {
            self.nested.under.insert((within, id));
        }
    }

    pub(super) fn nested_granted(&mut self, id: RequestId) {
        if self.within(id).is_some() {
            self.nested.holding.insert(Token(self.requests[id.index()].order), id);
        }
    }

    pub(super) fn nested_gone(&mut self, id: RequestId) {
        if let Some(within) = self.within(id) {
            let request = &self.requests[id.index()];
            self.nested.under.remove(&(within, id));
            if request.stage == Stage::Holding {
                self.nested.holding.remove(&Token(request.order));
            }
        }
    }

    fn within(&self, id: RequestId) -> Option<Token> {
        self.requests[id.index()].asked()?.within
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

    /// Refuses a request for a lock that is held by one above it, which it would wait for until that one has waited for
    /// it. False: it is none.
    pub(super) fn refuse_if_held_above(&mut self, id: RequestId, effects: &mut Effects) -> bool {
        let Some(within) = self.within(id) else { return false };
        let above = self.above(within);
        let lock = &self.locks[self.requests[id.index()].lock as usize];
        let is_above =
            |holder: RequestId| above.binary_search(&Token(self.requests[holder.index()].order)).is_ok();
        let held = lock.holders.iter(&self.requests).any(is_above);
        if held {
            self.notify(id, NotificationKind::HeldAbove, effects);
        }
        held
    }

    /// Refuses a request that would wait for one who waits for it. False: it is none.
    pub(super) fn refuse_if_cyclic(&mut self, id: RequestId, effects: &mut Effects) -> bool {
        let Some(within) = self.within(id) else { return false };
        let lock = self.locks[self.requests[id.index()].lock as usize].id;
        let is_cyclic = self.cycle(within, lock).is_some();
        if is_cyclic {
            self.notify(id, NotificationKind::Deadlock(within), effects);
        }
        is_cyclic
    }

    /// Who would wait for whom if one that runs under the token `within` waited for `lock`: the holder of `lock`, what
    /// that one waits for, and so on, to a lock that is held above the one who asks. `None`: it would not wait for ever.
    pub fn cycle(&self, within: Token, lock: LockId) -> Option<Vec<Step>> {
        let above = self.above(within);
        let search = Search { above, seen: BTreeSet::new(), steps: 0, path: Vec::new() };
        let index = self.index_of(lock)?;
        search.through(self, index)
    }
}

/// A search, depth first, through those who wait for each other.
struct Search {
    /// Where it is to arrive; sorted.
    above: Vec<Token>,
    seen: BTreeSet<Token>,
    /// How many holders and requests it has looked at.
    steps: usize,
    path: Vec<Step>,
}

impl Search {
    fn through(mut self, table: &Table, lock: usize) -> Option<Vec<Step>> {
        self.lock(table, lock).then_some(self.path)
    }

    /// Through all who hold a lock.
    fn lock(&mut self, table: &Table, index: usize) -> bool {
        let lock = &table.locks[index];
        for holder in lock.holders.iter(&table.requests) {
            if self.is_over() {
                return false;
            }
            if self.token(table, lock.id, Token(table.requests[holder.index()].order)) {
                return true;
            }
        }
        false
    }

    fn is_over(&mut self) -> bool {
        self.steps += 1;
        self.steps > STEPS_MAX
    }

    /// Through all that is asked for under a token.
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
            let request = &table.requests[id.index()];
            let index = request.lock as usize;
            let arrived = match request.stage {
                Stage::Holding => self.token(table, table.locks[index].id, Token(request.order)),
                Stage::Waiting => self.lock(table, index),
                Stage::Deferred | Stage::Undecided => false,
            };
            if arrived {
                return true;
            }
        }
        false
    }
}
