//! Holds that outlive the daemon's knowledge of their holder: restored from the journal, resumed by the holder, or ended
//! without it. And one that ends against the holder's will.

use super::{
    ClientId, Details, Effects, JournalEntry, Links, Loss, NotificationKind, Request, RequestId, Stage,
    Table, Terms, Timestamp, WaitList,
};
use crate::proto::v2::LockRequest;
use crate::proto::{LockId, Nonce, Outcome, Token};

/// A hold as it survives a restart of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldState {
    /// Which lock.
    pub lock: LockId,
    /// The token of its grant.
    pub token: Token,
    /// On what terms.
    pub terms: Terms,
    /// What its holder can resume it with.
    pub nonce: Option<Nonce>,
    /// Whose it is.
    pub uid: Option<u32>,
    /// When it ends at the latest.
    pub until: Option<Timestamp>,
}

/// A nonce was sent that is somebody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonceMismatch;

impl Table {
    /// A lock that was held when the last daemon ended is held still, by a holder that is not connected. Called before
    /// any client is; `since` is when it was granted. It ends when its holder resumes and releases it, at `held.until`,
    /// or with [`Table::orphan_ended`]. False: it cannot be, because others hold the lock already.
    pub fn restore(&mut self, since: Timestamp, held: HoldState) -> bool {
        let index = self.find_or_add_lock(held.lock);
        let beside = |other: &Terms| {
            let mine = &held.terms;
            other.shared == mine.shared && (mine.shared || (other.slots > 1 && mine.slots > 1))
        };
        let holder = self.locks[index as usize].holders.head();
        if holder.is_some_and(|holder| !beside(&self.requests[holder.index()].terms)) {
            return false;
        }
        let line = if held.terms.protocol == 1 { WaitList::V1 } else { WaitList::Queue };
        let details = Details { nonce: held.nonce, uid: held.uid, asked: None };
        let id = self.insert_request(Request {
            client: None,
            lock: index,
            links: Links::default(),
            stage: Stage::Holding,
            line,
            terms: held.terms,
            order: held.token.0,
            since,
            deadline: held.until.unwrap_or(Timestamp::NEVER),
            details: (line != WaitList::V1).then(|| Box::new(details)),
        });
        if let Some(until) = held.until {
            self.deadlines.insert((until, id));
        }
        if let Some(nonce) = held.nonce {
            self.nonces.insert(nonce, id);
        }
        let lock = &mut self.locks[index as usize];
        lock.holding += 1;
        lock.holders.push_back(&mut self.requests, id);
        self.orphans.insert(held.token, id);
        true
    }

    /// A client is gone, but what it holds goes on being held, until [`Table::orphan_ended`] or a resumption. Nothing
    /// happens if it holds nothing.
    pub fn detach(&mut self, client: ClientId) {
        if let Some(id) = self.request(client)
            && self.requests[id.index()].stage == Stage::Holding
        {
            let request = &mut self.requests[id.index()];
            request.client = None;
            self.orphans.insert(Token(request.order), id);
            self.request_of[client.0 as usize] = None;
        }
    }

    /// A holder that has not resumed is given until `until` to do so. Nothing happens if it has less time already.
    pub fn limit_orphan(&mut self, token: Token, until: Timestamp) {
        if let Some(&id) = self.orphans.get(&token)
            && until < self.requests[id.index()].deadline
        {
            let request = &mut self.requests[id.index()];
            self.deadlines.remove(&(request.deadline, id));
            request.deadline = until;
            self.deadlines.insert((until, id));
        }
    }

    /// A holder that has not resumed never will: its process has ended.
    pub fn orphan_ended(&mut self, now: Timestamp, token: Token, effects: &mut Effects) {
        if let Some(&id) = self.orphans.get(&token) {
            let outcome = self.requests[id.index()].outcome_of_silence();
            self.end_hold(now, id, outcome, effects);
        }
    }

    /// A holder that is not connected is done. Nothing happens if there is none with this token.
    pub fn release_orphan(&mut self, now: Timestamp, token: Token, outcome: Outcome, effects: &mut Effects) {
        if let Some(&id) = self.orphans.get(&token) {
            self.end_hold(now, id, outcome, effects);
        }
    }

    /// Takes a lock from all who hold it here, and lets whoever is next have it.
    pub fn break_lock(&mut self, now: Timestamp, lock: LockId, effects: &mut Effects) {
        let Some(index) = self.index_of(lock) else { return };
        if self.held_here(lock).is_none() {
            return;
        }
        // Listed first: those who are let in on the way are not to be broken in turn.
        let holders: Vec<RequestId> = self.locks[index].holders.iter(&self.requests).collect();
        for id in holders {
            self.notify(id, NotificationKind::Lost(Loss::Broken), effects);
            self.end_hold(now, id, Outcome::Vanished, effects);
        }
    }

    /// A request comes again, on a new connection.
    pub(super) fn resume(
        &mut self,
        id: RequestId,
        client: ClientId,
        uid: Option<u32>,
        asked: Box<LockRequest>,
        effects: &mut Effects,
    ) -> Result<(), NonceMismatch> {
        let request = &mut self.requests[id.index()];
        let details = request.details.as_mut().expect("only protocol 2 has nonces");
        let token = (request.stage == Stage::Holding).then_some(Token(request.order));
        let same_lock = self.locks[request.lock as usize].id == asked.key.id();
        if details.uid != uid || !same_lock || (asked.holds.is_some() && asked.holds != token) {
            return Err(NonceMismatch);
        }
        self.nested_gone(id);
        let request = &mut self.requests[id.index()];
        let details = request.details.as_mut().expect("only protocol 2 has nonces");
        details.asked = Some(asked);
        if request.client.is_none() && request.deadline != Timestamp::NEVER {
            // It was given so long to come back, and it has.
            self.deadlines.remove(&(request.deadline, id));
            request.deadline = Timestamp::NEVER;
        }
        match (request.client, token) {
            (Some(old), _) => {
                self.notify(id, NotificationKind::Superseded, effects);
                self.request_of[old.0 as usize] = None;
            }
            (None, Some(token)) => drop(self.orphans.remove(&token)),
            (None, None) => unreachable!("only holds are restored"),
        }
        self.attach(id, client);
        self.nested_asked(id);
        match self.requests[id.index()].stage {
            Stage::Holding => {
                self.nested_granted(id);
                let token = Token(self.requests[id.index()].order);
                effects.record.push(JournalEntry::Resumed(client));
                self.notify(id, NotificationKind::Granted(token), effects);
            }
            Stage::Waiting => self.notify_waiting(id, effects),
            Stage::Deferred | Stage::Undecided => {}
        }
        Ok(())
    }
}
