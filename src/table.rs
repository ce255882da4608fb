//! The lock table: who holds what, who waits, who is next, who is told what, and when a hold expires.
//!
//! A state machine without input or output: events come in as method calls with the time as an argument, and what is to
//! be done comes out as [`Notification`]s, to be carried out in order. It owns no socket, file, clock or process and draws no
//! random numbers, so that `table/simulation.rs` can drive it through millions of steps.
//!
//! The rules (`docs/protocol.md` has them for users):
//! - A lock has holders and three waiting lines: protocol 1 waiters, *once* waiters, and the *queue*.
//! - A release tells every protocol 1 and every once waiter that somebody is done, then moves the queue on.
//! - A holder that vanished has finished nothing: the oldest protocol 2 waiter, once or queue, takes its place.
//! - Nobody is told "busy", and no once waiter begins to wait, before all that had already happened is in the table:
//!   such requests are *deferred* until the caller says so with [`Table::settle`]. Otherwise the second of two commands
//!   run one after the other could be read before the first one's release, and would be told that it lost a race that
//!   never was.
//!
//! - Resuming: a daemon that was restarted is told what was held ([`Table::restore`]); such a hold has no client until
//!   its holder's request comes again, with the same nonce.
//! - Where hosts share their locks, nothing is given here that was not won from the others: `remote.rs`.
//!
//! A lock exists while a request for it does.

mod effect;
mod list;
mod nested;
mod remote;
mod request;
mod resume;
#[cfg(test)]
pub(crate) mod rng;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, DefaultHasher, Hasher};

use hashbrown::HashTable;
use slab::Slab;

use crate::proto::v1::State;
use crate::proto::v2::{LockRequest, Mode};
use crate::proto::{LockId, Nonce, Outcome, Token};
pub use effect::{ClusterNotice, Effects, JournalEntry, Loss, Notification, NotificationKind};
use list::{Links, List};
use nested::Nested;
pub use nested::Step;
pub use remote::ClusterNeeds;
use remote::RemoteLocks;
pub use request::Terms;
use request::{Details, Lock, Request, RequestId, Stage, WaitList};
pub use resume::{HoldState, NonceMismatch};
pub use view::{LockView, RequestView};

/// Milliseconds of a monotonic clock. Where it starts does not matter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// No moment: later than all.
    pub const NEVER: Timestamp = Timestamp(u64::MAX);

    /// So much later.
    pub fn plus(self, span: Timestamp) -> Timestamp {
        Timestamp(self.0.saturating_add(span.0))
    }
}

/// A connected client, as the caller numbers them. The table keeps four bytes for each number up to the highest in
/// use, so numbers should be used again; not before [`Table::disconnected`] was called for the last one that had it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(pub u32);

/// A moment in the order of arrival: it lies behind the requests that had arrived, and before those to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ArrivalMark(u64);

impl ArrivalMark {
    /// Before all requests.
    pub const NONE: ArrivalMark = ArrivalMark(0);
}

/// The locks and the requests for them.
pub struct Table {
    hasher: KeyedHasher,
    by_id: HashTable<u32>,
    locks: Slab<Lock>,
    requests: Slab<Request>,
    /// By client number.
    request_of: Vec<Option<RequestId>>,
    deferred: List,
    /// When holds end that may not last.
    deadlines: BTreeSet<(Timestamp, RequestId)>,
    /// Those of protocol 2 by what they can be resumed with.
    nonces: BTreeMap<Nonce, RequestId>,
    /// Holds that have not resumed.
    orphans: BTreeMap<Token, RequestId>,
    nested: Nested,
    /// Where each lock must be won from other hosts, what is known of them.
    remote_locks: Option<RemoteLocks>,
    hold_limit: Option<Timestamp>,
    next_token: u64,
    first_arrival: u64,
    next_arrival: u64,
}

/// What the rules depend on, from outside.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// A number that clients cannot guess, so that they cannot choose locks that collide.
    pub hash_key: u64,
    /// The token of the first grant: larger than any that was given before, on any earlier day.
    pub first_token: Token,
    /// How long a protocol 1 owner may hold.
    pub hold_limit: Option<Timestamp>,
    /// Other hosts have the same locks: each must be won from them before it is given here.
    pub is_clustered: bool,
}

impl Table {
    /// An empty table.
    pub fn new(config: Config) -> Table {
        Table {
            hasher: KeyedHasher(config.hash_key),
            by_id: HashTable::new(),
            locks: Slab::new(),
            requests: Slab::new(),
            request_of: Vec::new(),
            deferred: List::default(),
            deadlines: BTreeSet::new(),
            nonces: BTreeMap::new(),
            orphans: BTreeMap::new(),
            nested: Nested::default(),
            remote_locks: config.is_clustered.then(RemoteLocks::default),
            hold_limit: config.hold_limit,
            next_token: config.first_token.0,
            // Tokens and places both grow across restarts, and have the same reason to.
            first_arrival: config.first_token.0,
            next_arrival: config.first_token.0,
        }
    }

    /// What the client is to the table, in protocol 1's terms (which fit protocol 2 as well).
    pub fn state(&self, client: ClientId) -> State {
        match self.request(client) {
            None => State::Idle,
            Some(id) if self.requests[id.index()].stage == Stage::Holding => State::Owner,
            Some(_) => State::Waiting,
        }
    }

    /// An idle protocol 1 client asks for a lock.
    pub fn lock_v1(&mut self, now: Timestamp, client: ClientId, lock: LockId, effects: &mut Effects) {
        let id = self.add_request(now, client, lock, WaitList::V1, Terms::V1, None);
        if self.admits(id) {
            self.grant(now, id, effects);
        } else {
            self.wait_or_query(id, effects);
        }
    }

    /// An idle protocol 2 client asks for a lock, or resumes an earlier request. `uid` is whose client it is, as far as
    /// the kernel tells.
    ///
    /// # Errors
    /// When the nonce is that of somebody else's request.
    pub fn lock(
        &mut self,
        now: Timestamp,
        client: ClientId,
        uid: Option<u32>,
        asked: Box<LockRequest>,
        effects: &mut Effects,
    ) -> Result<(), NonceMismatch> {
        if let Some(&id) = asked.nonce.and_then(|nonce| self.nonces.get(&nonce)) {
            return self.resume(id, client, uid, asked, effects);
        }
        let lock = asked.key.id();
        if asked.holds.is_some() {
            effects.notifications.push(Notification {
                client,
                lock,
                kind: NotificationKind::Lost(Loss::Unknown),
            });
            return Ok(());
        }
        let line = if asked.mode == Mode::Once { WaitList::Once } else { WaitList::Queue };
        // Whoever had a place before the daemon was restarted has it still.
        let place = asked.place.filter(|&place| place < self.first_arrival);
        let undecided = place.is_none() && (asked.nowait || line == WaitList::Once);
        let (terms, nonce) = (Terms::from(&*asked), asked.nonce);
        let details = Box::new(Details { nonce, uid, asked: Some(asked) });
        let id = self.add_request(now, client, lock, line, terms, Some(details));
        if let Some(place) = place {
            self.requests[id.index()].order = place;
        }
        if let Some(nonce) = nonce {
            self.nonces.insert(nonce, id);
        }
        self.nested_asked(id);
        if self.admits(id) {
            self.grant(now, id, effects);
        } else if self.refuse_if_held_above(id, effects) {
            let lock = self.requests[id.index()].lock;
            self.remove_request(id);
            self.request_left(lock, effects);
        } else if undecided {
            self.deferred.push_back(&mut self.requests, id);
        } else {
            self.wait_or_query(id, effects);
        }
        Ok(())
    }

    /// A client that holds a lock releases it. Nothing happens if it holds none.
    pub fn release(&mut self, now: Timestamp, client: ClientId, outcome: Outcome, effects: &mut Effects) {
        if let Some(id) = self.request(client)
            && self.requests[id.index()].stage == Stage::Holding
        {
            self.end_hold(now, id, outcome, effects);
        }
    }

    /// The client's stream has ended, or is to be closed: whatever it holds or waits for is given up.
    pub fn disconnected(&mut self, now: Timestamp, client: ClientId, effects: &mut Effects) {
        let Some(id) = self.request(client) else { return };
        let request = &self.requests[id.index()];
        match request.stage {
            Stage::Holding => {
                let outcome = request.outcome_of_silence();
                self.end_hold(now, id, outcome, effects);
            }
            Stage::Waiting => {
                let lock = request.lock;
                self.leave_line(id);
                self.remove_request(id);
                // An exclusive waiter at the head of the queue may have held back shared ones.
                self.admit_queue(now, lock, effects);
                self.request_left(lock, effects);
            }
            Stage::Deferred | Stage::Undecided => {
                let (lock, stage) = (request.lock, request.stage);
                match stage {
                    Stage::Undecided => self.unlink_undecided(id),
                    _ => self.deferred.unlink(&mut self.requests, id),
                }
                self.remove_request(id);
                self.request_left(lock, effects);
            }
        }
    }

    /// All that had happened before `mark` was taken is in the table: decides the requests that were deferred until
    /// then, in order of arrival.
    pub fn settle(&mut self, now: Timestamp, mark: ArrivalMark, effects: &mut Effects) {
        while self.settle_next(now, mark, effects) {}
    }

    /// Decides one of the requests that [`Table::settle`] would decide. Returns `false` if there is none.
    pub fn settle_next(&mut self, now: Timestamp, mark: ArrivalMark, effects: &mut Effects) -> bool {
        let Some(id) = self.deferred.head() else { return false };
        if self.requests[id.index()].order >= mark.0 {
            return false;
        }
        self.deferred.unlink(&mut self.requests, id);
        if self.admits(id) {
            self.grant(now, id, effects);
        } else if self.needs_cluster(id) {
            self.query_cluster(id, effects);
        } else {
            self.wait_or_refuse(id, effects);
        }
        true
    }

    /// Lets a request wait, for which the lock is not to be had now, or sends it away if it does not want to wait.
    fn wait_or_refuse(&mut self, id: RequestId, effects: &mut Effects) {
        if self.requests[id.index()].asked().is_some_and(|asked| asked.nowait) {
            self.notify(id, NotificationKind::Busy, effects);
            self.remove_request(id);
        } else {
            self.wait(id, effects);
        }
    }

    /// A mark behind all requests that are deferred now, for [`Table::settle`]. None: there are none.
    pub fn deferred(&self) -> Option<ArrivalMark> {
        self.deferred.head().map(|_| ArrivalMark(self.next_arrival))
    }

    /// Ends the holds whose time is up.
    pub fn expire(&mut self, now: Timestamp, effects: &mut Effects) {
        while self.expire_next(now, effects) {}
    }

    /// Ends one of the holds that [`Table::expire`] would end. Returns `false` if there is none.
    pub fn expire_next(&mut self, now: Timestamp, effects: &mut Effects) -> bool {
        let Some(&(deadline, id)) = self.deadlines.first() else { return false };
        if deadline > now {
            return false;
        }
        self.notify(id, NotificationKind::Expired, effects);
        self.end_hold(now, id, Outcome::Vanished, effects);
        true
    }

    /// When [`Table::expire`] is next needed.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// True when nobody holds anything or waits for anything.
    pub fn is_empty(&self) -> bool {
        self.locks.is_empty()
    }

    fn request(&self, client: ClientId) -> Option<RequestId> {
        self.request_of.get(client.0 as usize).copied().flatten()
    }

    /// Tells a request's client something, if it has one at the moment.
    fn notify(&self, id: RequestId, kind: NotificationKind, effects: &mut Effects) {
        let request = &self.requests[id.index()];
        if let Some(client) = request.client {
            let lock = self.locks[request.lock as usize].id;
            effects.notifications.push(Notification { client, lock, kind });
        }
    }

    /// Where everything about admission is decided: a request gets in when nobody queues before it, and those who hold
    /// the lock let it in beside them.
    fn admits(&self, id: RequestId) -> bool {
        if self.remote_locks.is_some() {
            // Not for us alone to say: see `Table::cluster_granted`.
            return false;
        }
        let request = &self.requests[id.index()];
        let lock = &self.locks[request.lock as usize];
        (lock.queue.is_empty() || lock.queue.head() == Some(id)) && self.holders_admit(lock, request)
    }

    fn holders_admit(&self, lock: &Lock, request: &Request) -> bool {
        // One holder speaks for all: they are all shared or all not, and an exclusive one is alone.
        let Some(holder) = lock.holders.head() else { return true };
        let holder = &self.requests[holder.index()].terms;
        if holder.shared || request.terms.shared {
            return holder.shared && request.terms.shared;
        }
        holder.slots > 1 && lock.holding < request.terms.slots
    }

    /// Gives a lock under the next token.
    fn grant(&mut self, now: Timestamp, id: RequestId, effects: &mut Effects) {
        let token = self.next_token;
        self.next_token += 1;
        self.grant_as(now, id, token, effects);
    }

    /// The one place where a lock is given.
    fn grant_as(&mut self, now: Timestamp, id: RequestId, token: u64, effects: &mut Effects) {
        let request = &mut self.requests[id.index()];
        request.stage = Stage::Holding;
        request.order = token;
        request.since = now;
        if let (WaitList::V1, Some(limit)) = (request.line, self.hold_limit) {
            request.deadline = now.plus(limit);
            self.deadlines.insert((request.deadline, id));
        }
        let lock = &mut self.locks[request.lock as usize];
        lock.holding += 1;
        lock.holders.push_back(&mut self.requests, id);
        self.nested_granted(id);
        effects.record.extend(self.requests[id.index()].client.map(JournalEntry::Granted));
        self.notify(id, NotificationKind::Granted(Token(token)), effects);
    }

    fn wait(&mut self, id: RequestId, effects: &mut Effects) {
        if self.refuse_if_cyclic(id, effects) {
            self.remove_request(id);
            return;
        }
        let request = &mut self.requests[id.index()];
        request.stage = Stage::Waiting;
        let (line, resumed) = (request.line, request.order < self.first_arrival);
        let lock = &mut self.locks[request.lock as usize];
        if line == WaitList::Queue {
            lock.queued += 1;
        }
        if resumed {
            lock.line(line).insert_by_order(&mut self.requests, id);
        } else {
            lock.line(line).push_back(&mut self.requests, id);
        }
        self.notify_waiting(id, effects);
    }

    fn notify_waiting(&self, id: RequestId, effects: &mut Effects) {
        let request = &self.requests[id.index()];
        let lock = &self.locks[request.lock as usize];
        let ahead = match request.line {
            // It is the last one, but for those with a place from before a restart.
            WaitList::Queue if lock.queue.tail() == Some(id) => lock.queued - 1,
            WaitList::Queue => {
                lock.queue.iter(&self.requests).take_while(|&other| other != id).count() as u32
            }
            WaitList::V1 | WaitList::Once => 0,
        };
        self.notify(id, NotificationKind::Waiting { ahead, place: request.order }, effects);
    }

    /// Takes a waiting request out of its line.
    fn leave_line(&mut self, id: RequestId) {
        let request = &self.requests[id.index()];
        let line = request.line;
        let lock = &mut self.locks[request.lock as usize];
        if line == WaitList::Queue {
            lock.queued -= 1;
        }
        lock.line(line).unlink(&mut self.requests, id);
    }

    fn end_hold(&mut self, now: Timestamp, id: RequestId, outcome: Outcome, effects: &mut Effects) {
        let request = &self.requests[id.index()];
        let (index, token) = (request.lock, Token(request.order));
        effects.record.push(JournalEntry::Ended(token));
        if self.remote_locks.is_some() {
            effects.notices.push(ClusterNotice::Ended(self.locks[index as usize].id, token, outcome));
        }
        self.end_hold_unrecorded(now, id, outcome, effects);
    }

    fn end_hold_unrecorded(
        &mut self,
        now: Timestamp,
        id: RequestId,
        outcome: Outcome,
        effects: &mut Effects,
    ) {
        let request = &self.requests[id.index()];
        let (index, token) = (request.lock, Token(request.order));
        if request.deadline != Timestamp::NEVER {
            self.deadlines.remove(&(request.deadline, id));
        }
        if request.client.is_none() {
            self.orphans.remove(&token);
        }
        let lock = &mut self.locks[index as usize];
        lock.holding -= 1;
        lock.holders.unlink(&mut self.requests, id);
        self.remove_request(id);

        self.finish_waiters(index, WaitList::V1, outcome, token, effects);
        if outcome == Outcome::Vanished {
            self.promote_oldest_waiter(now, index, effects);
        } else {
            self.finish_waiters(index, WaitList::Once, outcome, token, effects);
        }
        self.admit_queue(now, index, effects);
        self.remove_if_unused(index);
    }

    /// Tells everybody in a line that a holder is done, and sends them home.
    fn finish_waiters(
        &mut self,
        lock: u32,
        line: WaitList,
        outcome: Outcome,
        token: Token,
        effects: &mut Effects,
    ) {
        while let Some(id) = self.locks[lock as usize].line(line).head() {
            self.notify(id, NotificationKind::Finished(outcome, token), effects);
            self.leave_line(id);
            self.remove_request(id);
        }
    }

    /// A holder vanished: the oldest protocol 2 waiter, once or queue, takes its place.
    fn promote_oldest_waiter(&mut self, now: Timestamp, lock: u32, effects: &mut Effects) {
        let Lock { once_waiters, queue, .. } = &self.locks[lock as usize];
        let arrival = |id: &RequestId| self.requests[id.index()].order;
        // The head of the queue needs no help: `admit_queue` comes next.
        let Some(oldest) = [once_waiters.head(), queue.head()].into_iter().flatten().min_by_key(arrival)
        else {
            return;
        };
        let lock = &self.locks[lock as usize];
        if self.remote_locks.is_none() && self.holders_admit(lock, &self.requests[oldest.index()]) {
            self.leave_line(oldest);
            self.grant(now, oldest, effects);
        }
    }

    /// Lets in as many from the head of the queue as the holders admit.
    fn admit_queue(&mut self, now: Timestamp, lock: u32, effects: &mut Effects) {
        while let Some(id) = self.locks[lock as usize].queue.head()
            && self.admits(id)
        {
            self.leave_line(id);
            self.grant(now, id, effects);
        }
    }

    fn add_request(
        &mut self,
        now: Timestamp,
        client: ClientId,
        lock: LockId,
        line: WaitList,
        terms: Terms,
        details: Option<Box<Details>>,
    ) -> RequestId {
        let order = self.next_arrival;
        self.next_arrival += 1;
        let lock = self.find_or_add_lock(lock);
        let id = self.insert_request(Request {
            client: None,
            lock,
            links: Links::default(),
            stage: Stage::Deferred,
            line,
            terms,
            order,
            since: now,
            deadline: Timestamp::NEVER,
            details,
        });
        self.attach(id, client);
        id
    }

    fn insert_request(&mut self, request: Request) -> RequestId {
        self.locks[request.lock as usize].requests += 1;
        RequestId::new(self.requests.insert(request))
    }

    /// Makes a request a client's, which has none.
    fn attach(&mut self, id: RequestId, client: ClientId) {
        debug_assert!(self.request(client).is_none(), "a client has one request at a time");
        self.requests[id.index()].client = Some(client);
        let client = client.0 as usize;
        if client >= self.request_of.len() {
            self.request_of.resize(client + 1, None);
        }
        self.request_of[client] = Some(id);
    }

    /// Forgets a request that is in no list any more.
    fn remove_request(&mut self, id: RequestId) {
        self.nested_gone(id);
        let request = self.requests.remove(id.index());
        if let Some(client) = request.client {
            self.request_of[client.0 as usize] = None;
        }
        if let Some(nonce) = request.details.and_then(|details| details.nonce) {
            self.nonces.remove(&nonce);
        }
        self.locks[request.lock as usize].requests -= 1;
    }

    fn find_or_add_lock(&mut self, id: LockId) -> u32 {
        let hash = self.hasher.hash_one(id.0);
        if let Some(&index) = self.by_id.find(hash, |&index| self.locks[index as usize].id == id) {
            return index;
        }
        let index = self.locks.insert(Lock {
            id,
            hash,
            holders: List::default(),
            v1_waiters: List::default(),
            once_waiters: List::default(),
            queue: List::default(),
            holding: 0,
            queued: 0,
            requests: 0,
        });
        let index = u32::try_from(index).expect("fewer locks than descriptors");
        self.by_id.insert_unique(hash, index, |&index| self.locks[index as usize].hash);
        index
    }

    fn remove_if_unused(&mut self, index: u32) {
        let lock = &self.locks[index as usize];
        if lock.requests > 0 {
            return;
        }
        match self.by_id.find_entry(lock.hash, |&other| other == index) {
            Ok(entry) => entry.remove(),
            Err(_) => unreachable!("every lock is found by its identity"),
        };
        self.forget_remote(index);
        self.locks.remove(index as usize);
    }
}

/// The standard library's hash function with a secret in front. (Its own `RandomState` would draw that by itself, and
/// the table would no longer be a function of its input.)
struct KeyedHasher(u64);

impl BuildHasher for KeyedHasher {
    type Hasher = DefaultHasher;
    fn build_hasher(&self) -> DefaultHasher {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.0);
        hasher
    }
}
