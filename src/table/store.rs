//! What the table keeps, and where: locks by identity, requests by client, and the lists that requests are in.
//!
//! A request is in exactly one list, the one that its [`Stage`] names; only a new one is in none, and one whose client has just gone
//! on after a stop, until the event that brought it is over. The counts of a lock follow from that. No rule about locks is decided here.

use std::hash::{DefaultHasher, Hasher};
use std::ops::{Index, IndexMut};

use hashbrown::HashTable;
use slab::Slab;

use super::list::List;
use super::lock::Lock;
use super::request::{LockIndex, Request, RequestId, Stage, WaitList};
use super::{ClientId, Token};
use crate::proto::LockId;

pub(super) struct Store {
    hasher: KeyedHasher,
    by_id: HashTable<LockIndex>,
    locks: Slab<Lock>,
    requests: Slab<Request>,
    /// By the client's number.
    request_of: Vec<Option<RequestId>>,
    deferred: List,
}

impl Store {
    /// An empty store. `hash_key` is a number that clients cannot guess.
    pub(super) fn new(hash_key: u64) -> Store {
        Store {
            hasher: KeyedHasher::new(hash_key),
            by_id: HashTable::new(),
            locks: Slab::new(),
            requests: Slab::new(),
            request_of: Vec::new(),
            deferred: List::default(),
        }
    }

    /// Returns `true` if there is no lock, and so no request.
    pub(super) fn is_empty(&self) -> bool {
        self.locks.is_empty()
    }

    pub(super) fn find(&self, id: LockId) -> Option<LockIndex> {
        self.by_id.find(self.hasher.hash(id), |&index| self[index].id == id).copied()
    }

    pub(super) fn find_or_add(&mut self, id: LockId) -> LockIndex {
        let hash = self.hasher.hash(id);
        if let Some(&index) = self.by_id.find(hash, |&index| self[index].id == id) {
            return index;
        }
        let index = LockIndex::new(self.locks.insert(Lock::new(id, hash)));
        self.by_id.insert_unique(hash, index, |&index| self.locks[index.get()].hash);
        index
    }

    /// Forgets a lock that no request names any more.
    pub(super) fn remove_if_unused(&mut self, index: LockIndex) {
        let lock = &self[index];
        if lock.requests > 0 {
            return;
        }
        match self.by_id.find_entry(lock.hash, |&other| other == index) {
            Ok(entry) => entry.remove(),
            Err(_) => unreachable!("every lock is found by its identity"),
        };
        self.locks.remove(index.get());
    }

    /// Returns the first lock at `cursor` or behind it. A slab has few gaps, and its capacity bounds the walk.
    pub(super) fn next_lock(&self, cursor: usize) -> Option<LockIndex> {
        (cursor..self.locks.capacity()).find(|&index| self.locks.contains(index)).map(LockIndex::new)
    }

    /// Returns the request of a client, which has one at most.
    pub(super) fn request_of(&self, client: ClientId) -> Option<RequestId> {
        self.request_of.get(client.0 as usize).copied().flatten()
    }

    /// Returns the oldest of the deferred requests.
    pub(super) fn first_deferred(&self) -> Option<RequestId> {
        self.deferred.head()
    }

    /// Returns the members of a list of this store, in order.
    pub(super) fn members(&self, list: List) -> impl Iterator<Item = RequestId> + '_ {
        list.iter(&self.requests)
    }

    /// Adds a request, which has no client yet, to the list of its stage.
    pub(super) fn insert(&mut self, request: Request) -> RequestId {
        debug_assert!(request.client().is_none(), "Store::attach gives a request its client");
        self[request.lock].requests += 1;
        let id = RequestId::new(self.requests.insert(request));
        self.link(id);
        id
    }

    /// Removes a request from its list and forgets it.
    pub(super) fn remove(&mut self, id: RequestId) -> Request {
        self.unlink(id);
        let request = self.requests.remove(id.index());
        if let Some(client) = request.client() {
            self.request_of[client.0 as usize] = None;
        }
        self[request.lock].requests -= 1;
        request
    }

    /// Moves a request to the list of its new stage.
    pub(super) fn move_to(&mut self, id: RequestId, stage: Stage) {
        self.unlink(id);
        self[id].stage = stage;
        self.link(id);
    }

    /// Gives a request without a client to a client without a request.
    pub(super) fn attach(&mut self, id: RequestId, client: ClientId) {
        debug_assert!(self.request_of(client).is_none(), "a client has one request at a time");
        self[id].owner = Some(client.into());
        let number = client.0 as usize;
        if number >= self.request_of.len() {
            self.request_of.resize(number + 1, None);
        }
        self.request_of[number] = Some(id);
    }

    /// Takes a request from its client, if it has one.
    pub(super) fn detach(&mut self, id: RequestId) -> Option<ClientId> {
        let client = ClientId::from(self[id].owner.take()?);
        self.request_of[client.0 as usize] = None;
        Some(client)
    }

    /// Waiting requests stand in the order of arrival, holders in the order of their grants and offers.
    fn link(&mut self, id: RequestId) {
        let Request { lock, stage, wait_list, terms, .. } = self.requests[id.index()];
        if stage == Stage::New {
            return;
        }
        let weight = u64::from(terms.weight_or_one());
        let lock = &mut self.locks[lock.get()];
        match stage {
            Stage::New => unreachable!("a new request is in no list"),
            Stage::Deferred => self.deferred.insert_by_place(&mut self.requests, id),
            Stage::Undecided => lock.extra_mut().undecided.insert_by_place(&mut self.requests, id),
            Stage::Waiting => {
                let lock = lock.extra_mut();
                lock.queued += u32::from(wait_list == WaitList::Queue);
                lock.waiters_mut(wait_list).insert_by_place(&mut self.requests, id);
            }
            Stage::Stalled => lock.extra_mut().stalled.insert_by_place(&mut self.requests, id),
            Stage::Holding(_) | Stage::Offered(_) => {
                lock.holding += u32::from(matches!(stage, Stage::Holding(_)));
                lock.weight_held += weight;
                lock.holders.push_back(&mut self.requests, id);
            }
        }
    }

    fn unlink(&mut self, id: RequestId) {
        let Request { lock, stage, wait_list, terms, .. } = self.requests[id.index()];
        let weight = u64::from(terms.weight_or_one());
        let lock = &mut self.locks[lock.get()];
        lock.forget_newest(id);
        let list = match stage {
            Stage::New => return,
            Stage::Deferred => &mut self.deferred,
            Stage::Undecided => &mut lock.extra_mut().undecided,
            Stage::Waiting => {
                let lock = lock.extra_mut();
                lock.queued -= u32::from(wait_list == WaitList::Queue);
                lock.waiters_mut(wait_list)
            }
            Stage::Stalled => &mut lock.extra_mut().stalled,
            Stage::Holding(_) | Stage::Offered(_) => {
                lock.holding -= u32::from(matches!(stage, Stage::Holding(_)));
                lock.weight_held -= weight;
                &mut lock.holders
            }
        };
        list.unlink(&mut self.requests, id);
    }

    /// Returns the token of a holder; `None` for any other request.
    pub(super) fn token_of(&self, id: RequestId) -> Option<Token> {
        self[id].token()
    }
}

impl Index<RequestId> for Store {
    type Output = Request;

    fn index(&self, id: RequestId) -> &Request {
        &self.requests[id.index()]
    }
}

impl IndexMut<RequestId> for Store {
    fn index_mut(&mut self, id: RequestId) -> &mut Request {
        &mut self.requests[id.index()]
    }
}

impl Index<LockIndex> for Store {
    type Output = Lock;

    fn index(&self, index: LockIndex) -> &Lock {
        &self.locks[index.get()]
    }
}

impl IndexMut<LockIndex> for Store {
    fn index_mut(&mut self, index: LockIndex) -> &mut Lock {
        &mut self.locks[index.get()]
    }
}

/// The standard library's hash function with a secret in front. (Its own `RandomState` draws the secret itself, and the
/// table would no longer be a function of its input.)
struct KeyedHasher(DefaultHasher);

impl KeyedHasher {
    fn new(secret: u64) -> KeyedHasher {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(secret);
        KeyedHasher(hasher)
    }

    fn hash(&self, id: LockId) -> u64 {
        let mut hasher = self.0.clone();
        hasher.write(&id.0);
        hasher.finish()
    }
}

/// What must hold of the store, whatever has happened to it.
#[cfg(any(test, fuzzing))]
impl Store {
    /// Panics when lists, counts and indices contradict each other. Returns every request with its lock and itself.
    pub(super) fn audit(&self) -> Vec<(RequestId, &Request)> {
        assert_eq!(self.by_id.len(), self.locks.len(), "every lock is found by its identity, once");
        let mut listed = self.audit_list(self.deferred, |request| request.stage == Stage::Deferred);
        let deferred = listed.clone();
        for (index, lock) in &self.locks {
            listed.extend(self.audit_lock(LockIndex::new(index), lock, &deferred));
        }
        assert_eq!(listed.len(), self.requests.len(), "every request is in one list");
        self.audit_clients();
        listed.into_iter().map(|id| (id, &self[id])).collect()
    }

    fn audit_lock(&self, index: LockIndex, lock: &Lock, deferred: &[RequestId]) -> Vec<RequestId> {
        let found = self.by_id.find(lock.hash, |&other| other == index);
        assert!(found.is_some(), "a lock is not found by its identity");
        let is_holder = |request: &Request| matches!(request.stage, Stage::Holding(_) | Stage::Offered(_));
        let mut listed = self.audit_list(lock.holders, is_holder);
        let holding = listed.iter().filter(|id| self[**id].token().is_some());
        assert_eq!(lock.holding as usize, holding.count(), "the count of holders is wrong");
        let weights = listed.iter().map(|id| u64::from(self[*id].terms.weight_or_one()));
        assert_eq!(lock.weight_held, weights.sum::<u64>(), "the sum of weights is wrong");
        for list in [WaitList::V1, WaitList::Once, WaitList::Queue, WaitList::Coalesce] {
            let is_its = |request: &Request| request.stage == Stage::Waiting && request.wait_list == list;
            let waiters = self.audit_list(lock.waiters(list), is_its);
            if list == WaitList::Queue {
                assert_eq!(lock.extra().queued as usize, waiters.len(), "the count of the queue is wrong");
            }
            listed.extend(waiters);
        }
        listed.extend(self.audit_list(lock.extra().stalled, |request| request.stage == Stage::Stalled));
        listed.extend(self.audit_list(lock.extra().undecided, |request| request.stage == Stage::Undecided));
        let is_here = |id: &RequestId| self[*id].lock == index;
        assert!(listed.iter().all(is_here), "a request is listed by the lock of another request");
        let deferred = deferred.iter().filter(|id| is_here(id)).count();
        assert_eq!(lock.requests as usize, listed.len() + deferred, "the count of requests is wrong");
        assert!(lock.requests > 0, "a lock exists, and no request for it does");
        listed
    }

    fn audit_list(&self, list: List, is_member: impl Fn(&Request) -> bool) -> Vec<RequestId> {
        let ids = list.audit(&self.requests);
        assert!(ids.iter().all(|id| is_member(&self[*id])), "a list holds a request of another list");
        let is_holding = |id: &RequestId| matches!(self[*id].stage, Stage::Holding(_) | Stage::Offered(_));
        let is_sorted = ids.is_sorted_by_key(|id| self[*id].place);
        assert!(is_sorted || ids.iter().all(is_holding), "a list is not in the order of arrival");
        ids
    }

    fn audit_clients(&self) {
        for (number, id) in self.request_of.iter().enumerate() {
            if let Some(id) = id {
                let client = Some(ClientId(number as u32));
                assert_eq!(self[*id].client(), client, "a client has the request of another client");
            }
        }
        let with_client = self.requests.iter().filter(|(_, request)| request.client().is_some()).count();
        assert_eq!(self.request_of.iter().flatten().count(), with_client, "a client lacks its request");
    }
}
