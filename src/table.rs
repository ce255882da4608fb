//! The lock table: who holds what, who waits, who is next, who is told what, and when a hold expires.
//!
//! A state machine without input or output: events come in as method calls with the time as an argument, and what is to
//! be done comes out as [`Effect`]s, to be carried out in order. It owns no socket, file, clock or process and draws no
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
//! A lock exists while a request for it does.

mod list;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod view;

use std::collections::BTreeSet;
use std::hash::{BuildHasher, DefaultHasher, Hasher};
use std::num::NonZeroU32;

use hashbrown::HashTable;
use slab::Slab;

use crate::proto::v1::State;
use crate::proto::v2::{LockRequest, Mode};
use crate::proto::{LockId, Outcome, Token};
use list::{Links, List};
pub use view::{LockView, RequestView};

/// Milliseconds of a monotonic clock. Where it starts does not matter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

/// A connected client, as the caller numbers them. The table keeps four bytes for each number up to the highest in
/// use, so numbers should be used again; not before [`Table::gone`] was called for the last one that had it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(pub u32);

/// What the caller has to do: tell `client` something about `lock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effect {
    /// Who is to be told.
    pub client: ClientId,
    /// The lock that it asked for.
    pub lock: LockId,
    /// What.
    pub what: What,
}

/// What a client is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It holds the lock now.
    Granted(Token),
    /// It waits, behind this many others of the queue.
    Waiting {
        /// 0 for a once waiter.
        ahead: u32,
    },
    /// The holder that it waited for is done. The client is idle again.
    Finished(Outcome, Token),
    /// The lock is held and it did not want to wait. The client is idle again.
    Busy,
    /// It held the lock for longer than the limit: it is released, and the connection is to be closed.
    Expired,
}

/// Names a request while it exists. (Never zero, so that an `Option` of it is no larger.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct RequestId(NonZeroU32);

impl RequestId {
    fn new(index: usize) -> RequestId {
        let number = u32::try_from(index + 1).expect("fewer requests than descriptors");
        RequestId(NonZeroU32::new(number).expect("one more than an index"))
    }

    fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Not decided until all that had already happened is in.
    Deferred,
    Waiting,
    Holding,
}

/// One client's request for one lock, from the asking to the release.
struct Request {
    client: ClientId,
    /// Index of its lock.
    lock: u32,
    links: Links,
    stage: Stage,
    /// Of a holder, its token. Of a waiter, its place in the order of arrival.
    order: u64,
    /// When it was granted, or when it asked.
    since: Millis,
    /// What a protocol 2 client asked for. `None`: protocol 1, which knows only one kind of request.
    asked: Option<Box<LockRequest>>,
}

impl Request {
    fn slots(&self) -> u32 {
        self.asked.as_ref().map_or(1, |asked| asked.slots)
    }

    fn shared(&self) -> bool {
        self.asked.as_ref().is_some_and(|asked| asked.shared)
    }
}

/// One lock that somebody holds or waits for.
struct Lock {
    id: LockId,
    hash: u64,
    holders: List,
    v1_waiters: List,
    once_waiters: List,
    queue: List,
    holding: u32,
    queued: u32,
    /// How many requests, of all stages, name this lock. It goes when they are gone.
    requests: u32,
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
    /// When protocol 1 holds end.
    deadlines: BTreeSet<(Millis, RequestId)>,
    hold_limit: Option<Millis>,
    next_token: u64,
    next_arrival: u64,
}

impl Table {
    /// An empty table.
    ///
    /// - `hash_key`: a number that clients cannot guess, so that they cannot choose locks that collide.
    /// - `first_token`: of the first grant. Larger than any that was given before, on any earlier day.
    /// - `hold_limit`: how long a protocol 1 owner may hold.
    pub fn new(hash_key: u64, first_token: Token, hold_limit: Option<Millis>) -> Table {
        Table {
            hasher: KeyedHasher(hash_key),
            by_id: HashTable::new(),
            locks: Slab::new(),
            requests: Slab::new(),
            request_of: Vec::new(),
            deferred: List::default(),
            deadlines: BTreeSet::new(),
            hold_limit,
            next_token: first_token.0,
            next_arrival: 0,
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
    pub fn lock_v1(&mut self, now: Millis, client: ClientId, lock: LockId, effects: &mut Vec<Effect>) {
        let id = self.add_request(now, client, lock, None);
        if self.admits(id) {
            self.grant(now, id, effects);
        } else {
            self.wait(id, effects);
        }
    }

    /// An idle protocol 2 client asks for a lock.
    pub fn lock(
        &mut self,
        now: Millis,
        client: ClientId,
        asked: Box<LockRequest>,
        effects: &mut Vec<Effect>,
    ) {
        let undecided = asked.nowait || asked.mode == Mode::Once;
        let id = self.add_request(now, client, asked.key.id(), Some(asked));
        if self.admits(id) {
            self.grant(now, id, effects);
        } else if undecided {
            self.deferred.push_back(&mut self.requests, id);
        } else {
            self.wait(id, effects);
        }
    }

    /// A client that holds a lock releases it. Nothing happens if it holds none.
    pub fn release(&mut self, now: Millis, client: ClientId, outcome: Outcome, effects: &mut Vec<Effect>) {
        if let Some(id) = self.request(client)
            && self.requests[id.index()].stage == Stage::Holding
        {
            self.end_hold(now, id, outcome, effects);
        }
    }

    /// The client's stream has ended, or is to be closed: whatever it holds or waits for is given up.
    pub fn gone(&mut self, now: Millis, client: ClientId, effects: &mut Vec<Effect>) {
        let Some(id) = self.request(client) else { return };
        let request = &self.requests[id.index()];
        match request.stage {
            Stage::Holding => {
                let became_the_command = request.asked.as_ref().is_some_and(|asked| asked.exec);
                let outcome = if became_the_command { Outcome::Unknown } else { Outcome::Vanished };
                self.end_hold(now, id, outcome, effects);
            }
            Stage::Waiting => {
                let lock = request.lock;
                self.leave_line(id);
                self.remove_request(id);
                // An exclusive waiter at the head of the queue may have held back shared ones.
                self.admit_queue(now, lock, effects);
                self.remove_if_unused(lock);
            }
            Stage::Deferred => {
                let lock = request.lock;
                self.deferred.unlink(&mut self.requests, id);
                self.remove_request(id);
                self.remove_if_unused(lock);
            }
        }
    }

    /// All that had happened before the deferred requests came is in the table: decides them, in order of arrival.
    pub fn settle(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        while let Some(id) = self.deferred.head() {
            self.deferred.unlink(&mut self.requests, id);
            let request = &self.requests[id.index()];
            if self.admits(id) {
                self.grant(now, id, effects);
            } else if request.asked.as_ref().is_some_and(|asked| asked.nowait) {
                effects.push(self.effect(id, What::Busy));
                self.remove_request(id);
            } else {
                self.wait(id, effects);
            }
        }
    }

    /// True when there are requests that wait for [`Table::settle`].
    pub fn has_deferred(&self) -> bool {
        !self.deferred.is_empty()
    }

    /// Ends the holds whose time is up.
    pub fn expire(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            effects.push(self.effect(id, What::Expired));
            self.end_hold(now, id, Outcome::Vanished, effects);
        }
    }

    /// When [`Table::expire`] is next needed.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// True when nobody holds anything or waits for anything.
    pub fn is_empty(&self) -> bool {
        self.locks.is_empty()
    }

    fn request(&self, client: ClientId) -> Option<RequestId> {
        self.request_of.get(client.0 as usize).copied().flatten()
    }

    fn effect(&self, id: RequestId, what: What) -> Effect {
        let request = &self.requests[id.index()];
        Effect { client: request.client, lock: self.locks[request.lock as usize].id, what }
    }

    /// Where everything about admission is decided: a request gets in when nobody queues before it, and those who hold
    /// the lock let it in beside them.
    fn admits(&self, id: RequestId) -> bool {
        let request = &self.requests[id.index()];
        let lock = &self.locks[request.lock as usize];
        (lock.queue.is_empty() || lock.queue.head() == Some(id)) && self.holders_admit(lock, request)
    }

    fn holders_admit(&self, lock: &Lock, request: &Request) -> bool {
        // One holder speaks for all: they are all shared or all not, and an exclusive one is alone.
        let Some(holder) = lock.holders.head() else { return true };
        let holder = &self.requests[holder.index()];
        if holder.shared() || request.shared() {
            return holder.shared() && request.shared();
        }
        holder.slots() > 1 && lock.holding < request.slots()
    }

    /// The one place where a lock is given. (Where each lock must also be won from other hosts, the step between
    /// "admitted here" and "held" belongs here.)
    fn grant(&mut self, now: Millis, id: RequestId, effects: &mut Vec<Effect>) {
        let token = self.next_token;
        self.next_token += 1;
        let request = &mut self.requests[id.index()];
        request.stage = Stage::Holding;
        request.order = token;
        request.since = now;
        if let (None, Some(limit)) = (&request.asked, self.hold_limit) {
            self.deadlines.insert((Millis(now.0 + limit.0), id));
        }
        let lock = &mut self.locks[request.lock as usize];
        lock.holding += 1;
        lock.holders.push_back(&mut self.requests, id);
        effects.push(self.effect(id, What::Granted(Token(token))));
    }

    fn wait(&mut self, id: RequestId, effects: &mut Vec<Effect>) {
        let request = &mut self.requests[id.index()];
        request.stage = Stage::Waiting;
        let mode = request.asked.as_ref().map(|asked| asked.mode);
        let lock = &mut self.locks[request.lock as usize];
        let ahead = match mode {
            Some(Mode::Queue) => lock.queued,
            _ => 0,
        };
        if mode == Some(Mode::Queue) {
            lock.queued += 1;
        }
        lock.line(mode).push_back(&mut self.requests, id);
        effects.push(self.effect(id, What::Waiting { ahead }));
    }

    /// Takes a waiting request out of its line.
    fn leave_line(&mut self, id: RequestId) {
        let request = &self.requests[id.index()];
        let mode = request.asked.as_ref().map(|asked| asked.mode);
        let lock = &mut self.locks[request.lock as usize];
        if mode == Some(Mode::Queue) {
            lock.queued -= 1;
        }
        lock.line(mode).unlink(&mut self.requests, id);
    }

    fn end_hold(&mut self, now: Millis, id: RequestId, outcome: Outcome, effects: &mut Vec<Effect>) {
        let request = &self.requests[id.index()];
        let (index, token) = (request.lock, Token(request.order));
        if let (None, Some(limit)) = (&request.asked, self.hold_limit) {
            self.deadlines.remove(&(Millis(request.since.0 + limit.0), id));
        }
        let lock = &mut self.locks[index as usize];
        lock.holding -= 1;
        lock.holders.unlink(&mut self.requests, id);
        self.remove_request(id);

        self.tell_line(index, None, outcome, token, effects);
        if outcome == Outcome::Vanished {
            self.succeed(now, index, effects);
        } else {
            self.tell_line(index, Some(Mode::Once), outcome, token, effects);
        }
        self.admit_queue(now, index, effects);
        self.remove_if_unused(index);
    }

    /// Tells everybody in a line that a holder is done, and sends them home.
    fn tell_line(
        &mut self,
        lock: u32,
        mode: Option<Mode>,
        outcome: Outcome,
        token: Token,
        effects: &mut Vec<Effect>,
    ) {
        while let Some(id) = self.locks[lock as usize].line(mode).head() {
            effects.push(self.effect(id, What::Finished(outcome, token)));
            self.leave_line(id);
            self.remove_request(id);
        }
    }

    /// A holder vanished: the oldest protocol 2 waiter, once or queue, takes its place.
    fn succeed(&mut self, now: Millis, lock: u32, effects: &mut Vec<Effect>) {
        let Lock { once_waiters, queue, .. } = &self.locks[lock as usize];
        let arrival = |id: &RequestId| self.requests[id.index()].order;
        // The head of the queue needs no help: `admit_queue` comes next.
        let Some(oldest) = [once_waiters.head(), queue.head()].into_iter().flatten().min_by_key(arrival)
        else {
            return;
        };
        let lock = &self.locks[lock as usize];
        if self.holders_admit(lock, &self.requests[oldest.index()]) {
            self.leave_line(oldest);
            self.grant(now, oldest, effects);
        }
    }

    /// Lets in as many from the head of the queue as the holders admit.
    fn admit_queue(&mut self, now: Millis, lock: u32, effects: &mut Vec<Effect>) {
        while let Some(id) = self.locks[lock as usize].queue.head()
            && self.admits(id)
        {
            self.leave_line(id);
            self.grant(now, id, effects);
        }
    }

    fn add_request(
        &mut self,
        now: Millis,
        client: ClientId,
        lock: LockId,
        asked: Option<Box<LockRequest>>,
    ) -> RequestId {
        debug_assert!(self.request(client).is_none(), "a client has one request at a time");
        let index = self.find_or_add_lock(lock);
        self.locks[index as usize].requests += 1;
        let order = self.next_arrival;
        self.next_arrival += 1;
        let id = RequestId::new(self.requests.insert(Request {
            client,
            lock: index,
            links: Links::default(),
            stage: Stage::Deferred,
            order,
            since: now,
            asked,
        }));
        let client = client.0 as usize;
        if client >= self.request_of.len() {
            self.request_of.resize(client + 1, None);
        }
        self.request_of[client] = Some(id);
        id
    }

    /// Forgets a request that is in no list any more.
    fn remove_request(&mut self, id: RequestId) {
        let request = self.requests.remove(id.index());
        self.request_of[request.client.0 as usize] = None;
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
        self.locks.remove(index as usize);
    }
}

impl Lock {
    /// The line in which a waiter of this mode waits. `None` is protocol 1.
    fn line(&mut self, mode: Option<Mode>) -> &mut List {
        match mode {
            None => &mut self.v1_waiters,
            Some(Mode::Once) => &mut self.once_waiters,
            Some(Mode::Queue) => &mut self.queue,
        }
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
