//! Holds that outlive their connection: restored from the journal, resumed by the holder, ended without it, or broken.

use super::{
    ArrivalMark, ClientId, Details, Effects, JournalEntry, Links, Loss, NotificationKind, Request, RequestId,
    Stage, Table, Terms, Timestamp, WaitList,
};
use crate::proto::v2::LockRequest;
use crate::proto::{LockId, Nonce, Outcome, Protocol, Token};

/// A hold as it survives a restart of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldState {
    /// The lock.
    pub lock: LockId,
    /// The token of the grant.
    pub token: Token,
    /// The terms of the request.
    pub terms: Terms,
    /// The nonce with which the holder can resume.
    pub nonce: Option<Nonce>,
    /// The holder's uid.
    pub uid: Option<u32>,
    /// When the hold ends at the latest.
    pub until: Option<Timestamp>,
}

/// The nonce belongs to another client's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonceMismatch;

impl Table {
    /// Restores a lock that was held when the previous daemon ended, for a holder that is not connected; `since` is when
    /// it was granted. The caller restores before it connects clients. The hold ends when its holder resumes and releases
    /// it, at `held.until`, or with [`Table::orphan_ended`]. Returns `false` if holders restored before exclude it.
    pub fn restore(&mut self, since: Timestamp, held: HoldState) -> bool {
        let lock = self.store.find_or_add(held.lock);
        let beside = |other: &Terms| {
            let mine = &held.terms;
            other.shared == mine.shared && (mine.shared || (other.slots > 1 && mine.slots > 1))
        };
        let holder = self.store[lock].holders.head();
        if holder.is_some_and(|holder| !beside(&self.store[holder].terms)) {
            return false;
        }
        let (wait_list, details) = match held.terms.protocol {
            Protocol::V1 => (WaitList::V1, None),
            Protocol::V2 => {
                let details = Details { nonce: held.nonce, uid: held.uid, asked: None, has_result: false };
                (WaitList::Queue, Some(Box::new(details)))
            }
        };
        let id = self.store.insert(Request {
            owner: None,
            lock,
            links: Links::default(),
            stage: Stage::Holding(held.token),
            wait_list,
            terms: held.terms,
            place: 0,
            since,
            // Which waiters came before it is not known any more: none counts as that.
            began: ArrivalMark::NONE,
            deadline: held.until.unwrap_or(Timestamp::NEVER),
            details,
        });
        if let Some(until) = held.until.filter(|&until| until != Timestamp::NEVER) {
            self.deadlines.insert((until, id));
        }
        if let Some(nonce) = held.nonce {
            self.nonces.insert(nonce, id);
        }
        self.orphans.insert(held.token, id);
        if held.terms.protocol == Protocol::V2 {
            self.holders.insert(held.token, id);
        }
        true
    }

    /// A client is gone, but its lock stays held until [`Table::orphan_ended`] or a resumption. Nothing happens if it holds
    /// no lock.
    pub fn detach(&mut self, client: ClientId) {
        if let Some(id) = self.store.request_of(client)
            && let Some(token) = self.store.token_of(id)
        {
            self.store.detach(id);
            self.orphans.insert(token, id);
        }
    }

    /// Gives a holder that has not resumed until `until` to do so. Nothing happens if it has less time already.
    pub fn limit_orphan(&mut self, token: Token, until: Timestamp) {
        if let Some(&id) = self.orphans.get(&token)
            && until < self.store[id].deadline
        {
            self.deadlines.remove(&(self.store[id].deadline, id));
            self.store[id].deadline = until;
            self.deadlines.insert((until, id));
        }
    }

    /// A holder that has not resumed never will: its process has ended.
    pub fn orphan_ended(&mut self, now: Timestamp, token: Token, effects: &mut Effects) {
        if let Some(&id) = self.orphans.get(&token) {
            let outcome = self.store[id].outcome_of_silence();
            self.end_hold(now, id, outcome, effects);
        }
    }

    /// Releases the lock of a holder that is not connected. Nothing happens if there is none with this token.
    pub fn release_orphan(&mut self, now: Timestamp, token: Token, outcome: Outcome, effects: &mut Effects) {
        if let Some(&id) = self.orphans.get(&token) {
            self.end_hold(now, id, outcome, effects);
        }
    }

    /// Takes a lock from all its holders of this host, and grants it to the next waiter.
    pub fn break_lock(&mut self, now: Timestamp, lock: LockId, effects: &mut Effects) {
        let Some(index) = self.store.find(lock) else { return };
        let remote = self.store[index].extra().remote_holder;
        let is_here = |id: &RequestId| self.store.token_of(*id).is_some() && Some(*id) != remote;
        // Listed first: a holder that is admitted on the way keeps the lock.
        let holders: Vec<RequestId> = self.store.members(self.store[index].holders).filter(is_here).collect();
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
        let token = self.store.token_of(id);
        let request = &self.store[id];
        let same_lock = self.store[request.lock].id == asked.key.id();
        let same_uid = request.details.as_ref().is_some_and(|details| details.uid == uid);
        if !same_uid || !same_lock || (asked.holds.is_some() && asked.holds != token) {
            return Err(NonceMismatch);
        }
        self.nested_gone(id);
        let request = &mut self.store[id];
        request.details.as_mut().expect("only protocol 2 has nonces").asked = Some(asked);
        if request.client().is_none() && request.deadline != Timestamp::NEVER {
            // The holder came back within its time.
            self.deadlines.remove(&(request.deadline, id));
            request.deadline = Timestamp::NEVER;
        }
        match (request.client(), token) {
            (Some(_), _) => {
                self.notify(id, NotificationKind::Superseded, effects);
                self.store.detach(id);
            }
            (None, Some(token)) => drop(self.orphans.remove(&token)),
            (None, None) => unreachable!("only holds are restored"),
        }
        self.store.attach(id, client);
        self.nested_asked(id);
        match self.store[id].stage {
            Stage::Holding(token) => {
                self.nested_granted(id);
                effects.record.push(JournalEntry::Resumed(client));
                self.notify(id, NotificationKind::Granted(token), effects);
                self.note_fresh(id);
                self.stop_if_due(self.store[id].lock, effects);
            }
            Stage::Waiting => self.notify_waiting(id, effects),
            Stage::Offered(_) | Stage::Stalled => self.notify(id, NotificationKind::Offered, effects),
            Stage::New | Stage::Deferred | Stage::Undecided => {}
        }
        Ok(())
    }
}
