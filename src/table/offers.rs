//! Offers. The client of a request that had to wait may be stopped by now (Ctrl-Z, SIGSTOP, a debugger), and a lock that is
//! granted to it would keep all others waiting. So the table offers the lock, and grants it when the client takes the offer.
//!
//! An offer excludes others as a hold does. If the client does not take it in time, the request stalls: the lock goes to the
//! next one, and the client keeps its place for when it goes on. It then takes the offer that it has, so that no second one
//! is made before that; whether the offer still stands, only the answer tells it.

use std::time::Duration;

use super::{
    ArrivalMark, ClientId, Effects, LockIndex, NotificationKind, RequestId, Stage, Table, Timestamp, WaitList,
};
use crate::proto::{Outcome, Token};

/// How long an offer stands.
const OFFER_MAX: Duration = Duration::from_secs(1);
/// The token of an offer of a lock that is not clustered: tokens grow in the order of the grants, so it is drawn later.
pub(super) const UNDRAWN: Token = Token(0);

impl Table {
    /// A client takes the lock that it was offered. Nothing happens if it was offered none.
    pub fn take(&mut self, now: Timestamp, client: ClientId, effects: &mut Effects) {
        let Some(id) = self.store.request_of(client) else { return };
        match self.store[id].stage {
            Stage::Offered(token) => {
                self.grant_offered(now, id, token, effects);
                self.stop_if_due(self.store[id].lock, effects);
            }
            Stage::Stalled => self.goes_on(now, id, effects),
            _ => {}
        }
    }

    /// Grants a lock to a request whose turn it is, or offers it if the client may be stopped and knows offers.
    pub(super) fn grant_or_offer(
        &mut self,
        now: Timestamp,
        id: RequestId,
        token: Token,
        effects: &mut Effects,
    ) {
        let request = &self.store[id];
        let takes_offers = request.asked().is_some_and(|asked| asked.offers);
        if request.stage != Stage::Waiting || !takes_offers {
            return self.grant_offered(now, id, token, effects);
        }
        debug_assert!(self.may_join_holders(id), "a lock is offered beside holders that exclude the request");
        self.clear_deadline(id);
        self.store.move_to(id, Stage::Offered(token));
        let until = now.plus(OFFER_MAX);
        // The batch is closed: a coalescing request that comes from now on waits for the next run.
        let began = self.mark();
        let request = &mut self.store[id];
        (request.deadline, request.began) = (until, began);
        self.deadlines.insert((until, id));
        self.notify(id, NotificationKind::Offered, effects);
    }

    fn grant_offered(&mut self, now: Timestamp, id: RequestId, token: Token, effects: &mut Effects) {
        match token {
            UNDRAWN => self.grant(now, id, effects),
            token => self.grant_as(now, id, token, effects),
        }
    }

    /// A client has not taken an offer in time: the others go on without it.
    pub(super) fn withdraw_offer(&mut self, now: Timestamp, id: RequestId, effects: &mut Effects) {
        self.clear_deadline(id);
        let lock = self.store[id].lock;
        let is_newest = self.store[id].asked().is_some_and(|asked| asked.newest);
        if is_newest && self.store[lock].extra().newest.is_some() {
            self.notify(id, NotificationKind::NewerRequest, effects);
            self.remove_request(id);
        } else {
            self.store.move_to(id, Stage::Stalled);
            if is_newest {
                self.store[lock].extra_mut().newest = Some(id);
            }
        }
        self.offer_ended(now, lock, effects);
    }

    /// An offer was not taken: the lock goes to the oldest of the other waiters, as if a holder had vanished.
    pub(super) fn offer_ended(&mut self, now: Timestamp, lock: LockIndex, effects: &mut Effects) {
        // Protocol 1 waiters ask again, and are not told a token.
        self.finish_waiters(lock, WaitList::V1, Outcome::Vanished, UNDRAWN, effects);
        self.promote_oldest_waiter(now, lock, effects);
        self.admit_queue(now, lock, effects);
        self.request_left(lock, effects);
    }

    /// A client takes an offer that was withdrawn: it has not been stopped for ever, and goes back to its place.
    fn goes_on(&mut self, now: Timestamp, id: RequestId, effects: &mut Effects) {
        let lock = self.store[id].lock;
        if self.finish_if_fresh(now, id, effects) {
            return self.request_left(lock, effects);
        }
        self.store.move_to(id, Stage::New);
        if !self.is_clustered
            && self.precedes_queue(id)
            && self.holders_admit(&self.store[lock], &self.store[id])
        {
            self.grant(now, id, effects);
        } else {
            self.wait_or_query(now, id, effects);
        }
    }

    /// Returns `true` if no queued request is older.
    fn precedes_queue(&self, id: RequestId) -> bool {
        let request = &self.store[id];
        let head = self.store[request.lock].extra().queue.head();
        head.is_none_or(|head| request.place < self.store[head].place)
    }

    /// A run is over: tells the stalled waiters that it is the work of.
    pub(super) fn finish_stalled(
        &mut self,
        lock: LockIndex,
        began: ArrivalMark,
        outcome: Outcome,
        token: Token,
        effects: &mut Effects,
    ) {
        let is_done = |id: &RequestId| match self.store[*id].wait_list {
            WaitList::Once => true,
            WaitList::Coalesce => self.store[*id].place < began.0,
            WaitList::Queue | WaitList::V1 => false,
        };
        let done: Vec<RequestId> =
            self.store.members(self.store[lock].extra().stalled).filter(is_done).collect();
        for id in done {
            self.notify(id, NotificationKind::Finished(outcome, token), effects);
            self.remove_request(id);
        }
    }
}
