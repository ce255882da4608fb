//! The lock table: who holds each lock, who waits, who is next, which client learns what, and when a hold expires.
//!
//! A state machine without input or output: events come in as method calls with the time as an argument, and the results
//! come out as [`Effects`], which the caller carries out in order. The table owns no socket, file, clock or process and draws
//! no random numbers, so that `table/simulation.rs` can drive it through millions of steps.
//!
//! The rules (`docs/protocol.md` has them for users):
//! - A lock has holders and four waiting lines: protocol 1 waiters, *once* waiters, the *queue*, and *coalescing* waiters.
//! - A release tells every protocol 1 waiter and every once waiter that the holder finished, then moves the queue on.
//! - A holder that vanished has finished nothing: the oldest protocol 2 waiter, once or queue, takes its place.
//! - A *coalescing* waiter waits for the end of a run that began after it came. When a run ends, the newest waiter that it
//!   does not satisfy runs, and the others wait for that run.
//! - The table answers "busy", and lets a once waiter wait, only when every event that came before is in the table: such
//!   requests are *deferred* until the caller calls [`Table::settle`]. Otherwise the second of two commands run one after
//!   the other could be read before the release of the first, and would lose a race that never was.
//! - A request that had to wait is *offered* the lock, if its client knows offers; it has the lock once its client takes the
//!   offer. A client that does not, because it is stopped, lets the others pass, and keeps its place.
//! - Resuming: [`Table::restore`] tells a restarted daemon's table what was held. Such a hold has no client until its holder
//!   sends its request again, with the same nonce.
//! - Clustered locks are granted only after etcd has granted them to this host: `remote.rs`.
//!
//! A lock exists while a request for it does.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `store.rs` | locks by identity, requests by client, and the list that each request is in |
//! | `list.rs` | first-in, first-out lists, threaded through the requests |
//! | `request.rs` | a request, its stages and terms |
//! | `compatibility.rs` | which requests may hold a lock beside each other |
//! | `deferred.rs` | requests that are decided when every event before them is in the table |
//! | `release.rs` | the end of a hold: which waiters are told, and which requests hold next |
//! | `lock.rs` | a lock: its holders, and the lists of its waiters |
//! | `effect.rs` | what comes out: notifications, journal entries, notices for the clustering |
//! | `runs.rs` | runs that are over and still count, for requests that name how fresh the work must be |
//! | `holders.rs` | the holders of protocol 2 by their tokens |
//! | `offers.rs` | offers to requests that had to wait, since their clients may be stopped by now |
//! | `sharing.rs` | with whom a request shares a lock, for clustered locks |
//! | `shared.rs` | runs whose results other clients can have |
//! | `newest.rs` | requests of which the newest wins, and holders that are asked to stop |
//! | `resume.rs` | holds that outlive their connection: restored, resumed, ended, broken |
//! | `nested.rs` | requests under another lock, and the cycles that they could close |
//! | `remote.rs` | clustered locks: what other hosts hold, and what this host may grant |
//! | `remote_newest.rs` | requests for clustered locks of which the newest of all hosts wins |
//! | `remote_runs.rs` | runs of clustered locks that count |
//! | `view.rs` | a read-only view for status answers |
//! | `audit.rs` | what must hold of all these parts, for tests and fuzz targets |

#[cfg(any(test, fuzzing))]
mod audit;
mod compatibility;
mod deferred;
mod effect;
mod holders;
mod list;
mod lock;
mod nested;
mod newest;
mod offers;
mod release;
mod remote;
mod remote_newest;
mod remote_runs;
mod request;
mod resume;
#[cfg(test)]
pub(crate) mod rng;
mod runs;
mod shared;
mod sharing;
#[cfg(test)]
mod simulation;
mod store;
#[cfg(test)]
mod tests;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::proto::v1::State;
use crate::proto::v2::LockRequest;
use crate::proto::{LockId, Nonce, Outcome, Protocol, Token};
pub use crate::timestamp::Timestamp;
pub use effect::{ClusterNotice, Effects, JournalEntry, Loss, Notification, NotificationKind};
use holders::Holders;
use lock::Lock;
use nested::Nested;
pub use nested::Step;
use offers::UNDRAWN;
pub use remote::{ClusterNeeds, SeenLine};
pub use request::Terms;
use request::{Details, Links, LockIndex, Request, RequestId, Stage, WaitList};
pub use resume::{HoldState, NonceMismatch};
use runs::Runs;
pub use runs::{RUN_BY_BYTES_MAX, Run};
use shared::Results;
pub use shared::{EVERY_USER, ROOT_ALONE, is_result_for};
pub use sharing::{Sharing, Verdict};
use store::Store;
pub use view::{LockView, RequestView};

/// A connected client, as the caller numbers them. The table keeps four bytes for each number up to the highest in
/// use, so numbers should be used again; not before [`Table::disconnected`] was called for the last one that had it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(pub u32);

/// A moment in the order of arrival: behind every request that has come, and before every request to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ArrivalMark(u64);

impl ArrivalMark {
    /// Before all requests.
    pub const NONE: ArrivalMark = ArrivalMark(0);
}

/// The locks and the requests for them.
pub struct Table {
    store: Store,
    /// When holds with a time limit end.
    deadlines: BTreeSet<(Timestamp, RequestId)>,
    /// Requests of protocol 2 by the nonce that resumes them.
    nonces: BTreeMap<Nonce, RequestId>,
    /// Holds that have not resumed.
    orphans: BTreeMap<Token, RequestId>,
    nested: Nested,
    /// Runs that are over and still count.
    runs: Runs,
    /// Which of them have a result that others can have.
    results: Results,
    /// The holders of protocol 2 by their tokens.
    holders: Holders,
    /// The locks are clustered: etcd says which host may grant one.
    is_clustered: bool,
    hold_limit: Option<Duration>,
    next_token: u64,
    first_arrival: u64,
    next_arrival: u64,
}

/// What the rules depend on, from outside.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// A number that clients cannot guess, so that they cannot choose locks whose hashes collide.
    pub hash_key: u64,
    /// The token of the first grant: larger than that of every earlier grant, on any earlier day.
    pub first_token: Token,
    /// How long a protocol 1 owner may hold.
    pub hold_limit: Option<Duration>,
    /// The locks are clustered: the table grants one only after [`Table::cluster_granted`].
    pub is_clustered: bool,
    /// Of how many locks the table remembers when their work was last done.
    pub remember_max: usize,
}

impl Table {
    /// An empty table.
    pub fn new(config: Config) -> Table {
        Table {
            store: Store::new(config.hash_key),
            deadlines: BTreeSet::new(),
            nonces: BTreeMap::new(),
            orphans: BTreeMap::new(),
            nested: Nested::default(),
            runs: Runs::new(config.remember_max, config.is_clustered),
            results: Results::default(),
            holders: Holders::default(),
            is_clustered: config.is_clustered,
            hold_limit: config.hold_limit,
            next_token: config.first_token.0,
            // Tokens and places both grow across restarts, for the same reason.
            first_arrival: config.first_token.0,
            next_arrival: config.first_token.0,
        }
    }

    /// Returns the state of a client in protocol 1's terms, which fit protocol 2 as well.
    pub fn state(&self, client: ClientId) -> State {
        match self.store.request_of(client) {
            None => State::Idle,
            Some(id) if self.store.token_of(id).is_some() => State::Owner,
            Some(_) => State::Waiting,
        }
    }

    /// An idle protocol 1 client asks for a lock.
    pub fn lock_v1(&mut self, now: Timestamp, client: ClientId, lock: LockId, effects: &mut Effects) {
        let id = self.add_request(now, client, lock, WaitList::V1, Terms::V1, None, None);
        if self.admits(id) {
            self.grant(now, id, effects);
        } else {
            self.wait_or_query(now, id, effects);
        }
    }

    /// An idle protocol 2 client asks for a lock, or resumes an earlier request. `uid` is the client's user as the kernel
    /// states it, on a Unix socket.
    ///
    /// # Errors
    /// When the nonce belongs to another client's request.
    pub fn lock(
        &mut self,
        now: Timestamp,
        client: ClientId,
        uid: Option<u32>,
        mut asked: Box<LockRequest>,
        effects: &mut Effects,
    ) -> Result<(), NonceMismatch> {
        asked.within = asked.within.filter(|&token| self.may_run_under(token, uid));
        if let Some(&id) = asked.nonce.and_then(|nonce| self.nonces.get(&nonce)) {
            return self.resume(id, client, uid, asked, effects);
        }
        let lock = asked.key.id();
        if asked.holds.is_some() {
            let kind = NotificationKind::Lost(Loss::Unknown);
            effects.notifications.push(Notification { client, lock, kind });
            return Ok(());
        }
        if let Some(run) = self.fresh_run(now, lock, &asked) {
            let kind = NotificationKind::Fresh(run.token);
            effects.notifications.push(Notification { client, lock, kind });
            return Ok(());
        }
        let wait_list = WaitList::from(asked.mode);
        // A client that had a place before the daemon was restarted keeps it.
        let place = asked.place.filter(|&place| place < self.first_arrival);
        let is_deferred = place.is_none() && (asked.nowait || wait_list == WaitList::Once);
        let (terms, nonce) = (Terms::from(&*asked), asked.nonce);
        let details = Box::new(Details { nonce, uid, asked: Some(asked), has_result: false });
        let id = self.add_request(now, client, lock, wait_list, terms, place, Some(details));
        if let Some(nonce) = nonce {
            self.nonces.insert(nonce, id);
        }
        self.nested_asked(id);
        self.note_fresh(id);
        if self.refuse_if_slots_differ(id, effects) {
            let lock = self.store[id].lock;
            self.remove_request(id);
            self.request_left(lock, effects);
        } else if self.admits(id) {
            self.grant(now, id, effects);
        } else if self.refuse_if_held_above(id, effects) {
            let lock = self.store[id].lock;
            self.remove_request(id);
            self.request_left(lock, effects);
        } else if is_deferred {
            self.store.move_to(id, Stage::Deferred);
        } else {
            self.wait_or_query(now, id, effects);
        }
        Ok(())
    }

    /// The client's stream has ended, or the daemon closes it: the client gives up what it holds or waits for.
    pub fn disconnected(&mut self, now: Timestamp, client: ClientId, effects: &mut Effects) {
        let Some(id) = self.store.request_of(client) else { return };
        let request = &self.store[id];
        let (lock, stage) = (request.lock, request.stage);
        if let Stage::Holding(_) = stage {
            let outcome = request.outcome_of_silence();
            return self.end_hold(now, id, outcome, effects);
        }
        self.remove_request(id);
        if let Stage::Offered(_) = stage {
            return self.offer_ended(now, lock, effects);
        }
        if stage == Stage::Waiting {
            // An exclusive waiter at the head of the queue may have held back shared ones.
            self.admit_queue(now, lock, effects);
        }
        self.request_left(lock, effects);
    }

    /// Ends the holds and the offers whose time limit has passed, and asks holders to stop whose time is over.
    pub fn expire(&mut self, now: Timestamp, effects: &mut Effects) {
        while self.expire_next(now, effects) {}
    }

    /// Ends one of the holds that [`Table::expire`] would end. Returns `false` if there is none.
    pub fn expire_next(&mut self, now: Timestamp, effects: &mut Effects) -> bool {
        let Some(&(deadline, id)) = self.deadlines.first() else { return false };
        if deadline > now {
            return false;
        }
        match self.store[id].stage {
            Stage::Holding(_) => {
                self.notify(id, NotificationKind::Expired, effects);
                self.end_hold(now, id, Outcome::Vanished, effects);
            }
            Stage::Offered(_) => self.withdraw_offer(now, id, effects),
            _ => self.replace_now(id, effects),
        }
        true
    }

    /// Returns when [`Table::expire`] is next needed.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// Returns `true` if no lock is held or awaited.
    pub fn is_empty(&self) -> bool {
        self.store.is_empty()
    }

    /// Tells a request's client something, if the request has a client.
    fn notify(&self, id: RequestId, kind: NotificationKind, effects: &mut Effects) {
        let request = &self.store[id];
        if let Some(client) = request.client() {
            let lock = self.store[request.lock].id;
            effects.notifications.push(Notification { client, lock, kind });
        }
    }

    /// Grants a lock under the next token.
    fn grant(&mut self, now: Timestamp, id: RequestId, effects: &mut Effects) {
        let token = Token(self.next_token);
        self.next_token += 1;
        self.grant_as(now, id, token, effects);
    }

    /// The one place where a lock is granted.
    fn grant_as(&mut self, now: Timestamp, id: RequestId, token: Token, effects: &mut Effects) {
        debug_assert!(self.may_join_holders(id), "a lock is granted beside holders that exclude the request");
        self.clear_deadline(id);
        self.supersede_stalled(id, effects);
        let began = match self.store[id].stage {
            Stage::Offered(_) => self.store[id].began,
            _ => self.mark(),
        };
        self.store.move_to(id, Stage::Holding(token));
        let request = &mut self.store[id];
        (request.since, request.began) = (now, began);
        if let (WaitList::V1, Some(limit)) = (request.wait_list, self.hold_limit) {
            request.deadline = now.plus(limit);
            self.deadlines.insert((request.deadline, id));
        }
        if request.terms.protocol == Protocol::V2 {
            self.holders.insert(token, id);
        }
        self.nested_granted(id);
        effects.record.extend(self.store[id].client().map(JournalEntry::Granted));
        self.notify(id, NotificationKind::Granted(token), effects);
        debug_assert_eq!(self.store.token_of(id), Some(token), "a granted request holds");
    }

    fn wait(&mut self, now: Timestamp, id: RequestId, effects: &mut Effects) {
        if self.finish_if_stale(now, id, effects) {
            return;
        }
        if self.refuse_if_cyclic(id, effects) {
            self.remove_request(id);
            return;
        }
        if self.gives_way(id, effects) {
            return;
        }
        debug_assert!(
            self.is_clustered || self.must_wait(id),
            "a request waits for a lock that its holders would let it have"
        );
        self.store.move_to(id, Stage::Waiting);
        self.supersede(id, effects);
        self.notify_waiting(id, effects);
        self.begin_replacing(now, id, effects);
    }

    fn notify_waiting(&self, id: RequestId, effects: &mut Effects) {
        let request = &self.store[id];
        let lock = &self.store[request.lock];
        let ahead = match request.wait_list {
            // It is the last one, unless it kept a place from before a restart.
            WaitList::Queue if lock.extra().queue.tail() == Some(id) => lock.extra().queued - 1,
            WaitList::Queue => {
                self.store.members(lock.extra().queue).take_while(|&other| other != id).count() as u32
            }
            WaitList::V1 | WaitList::Once | WaitList::Coalesce => 0,
        };
        self.notify(id, NotificationKind::Waiting { ahead, place: request.place }, effects);
    }

    fn clear_deadline(&mut self, id: RequestId) {
        let deadline = std::mem::replace(&mut self.store[id].deadline, Timestamp::NEVER);
        if deadline != Timestamp::NEVER {
            self.deadlines.remove(&(deadline, id));
        }
    }

    /// Adds a request, at its place from before a restart or behind all others.
    #[expect(clippy::too_many_arguments, reason = "they are the parts of one request")]
    fn add_request(
        &mut self,
        now: Timestamp,
        client: ClientId,
        lock: LockId,
        wait_list: WaitList,
        terms: Terms,
        place: Option<u64>,
        details: Option<Box<Details>>,
    ) -> RequestId {
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        let lock = self.store.find_or_add(lock);
        let id = self.store.insert(Request {
            owner: None,
            lock,
            links: Links::default(),
            stage: Stage::New,
            wait_list,
            terms,
            place: place.unwrap_or(arrival),
            since: now,
            began: ArrivalMark::NONE,
            deadline: Timestamp::NEVER,
            details,
        });
        self.store.attach(id, client);
        id
    }

    /// Forgets a request, wherever it stands.
    fn remove_request(&mut self, id: RequestId) {
        self.nested_gone(id);
        self.clear_deadline(id);
        let request = self.store.remove(id);
        if let Some(nonce) = request.details.and_then(|details| details.nonce) {
            self.nonces.remove(&nonce);
        }
    }
}
