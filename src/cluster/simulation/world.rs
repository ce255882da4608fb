//! The hosts and their clients, and what becomes of them.

use std::collections::BTreeMap;

use super::super::queue::LockQueue;
use super::super::{
    Cluster, ClusterRequest, Failure, FoundResult, LeaseName, OwnResult, QueueOp, QueueSnapshot, Revision,
    RunUser, WatchEvent,
};
use super::newest::NewestRequests;
use super::store::{NEWEST_MS, Store};
use crate::proto::v2::{LockRequest, Mode, Share};
use crate::proto::{Key, LockId, Outcome, Token};
use crate::table::rng::Rng;
use crate::table::{self, ClientId, Effects, NotificationKind, Sharing, Table, Terms, Timestamp, Verdict};

const HOSTS: usize = 3;
const CLIENTS: u32 = 6;
const KEYS: u64 = 3;
const TTL: u64 = 1_000;
const MARGIN: u64 = 250;

/// How long an offer stands.
const OFFER_MS: u64 = 1_000;

/// How often each thing came up.
pub(super) type Seen = BTreeMap<&'static str, u64>;

#[derive(Clone, Copy, Debug)]
enum Client {
    Idle,
    /// Since this step.
    Asking {
        key: usize,
        since: u64,
        nowait: bool,
        coalesces: bool,
        newest: bool,
        fresh_ms: u64,
        /// When it was offered the lock.
        offered: Option<u64>,
        sharing: Sharing,
        /// The user whose results it shares.
        user: Option<u64>,
    },
    Holding {
        key: usize,
        sharing: Sharing,
        user: Option<u64>,
        token: Token,
    },
}

struct Host {
    table: Table,
    cluster: Cluster,
    clients: Vec<Client>,
    effects: Effects,
    lease: Option<String>,
    leases_had: u64,
    next_keep: u64,
    watched: usize,
    /// When its watch last showed it every change.
    watched_at: u64,
    /// The era of the store in which the watch was opened; `None`: there is no watch.
    watch_era: Option<u64>,
    /// The highest revision that the host saw, and the last entry that it saw being made.
    seen: Revision,
    last_added: Option<(Revision, LockId, WatchEvent)>,
    /// The host asks for no lease until then, because the store went back.
    quarantined_until: u64,
    /// The host cannot know until then that the store went back.
    unaware_until: u64,
    /// It cannot reach etcd until then.
    cut_until: u64,
    /// It does nothing at all until then.
    frozen_until: u64,
    flights: Vec<Flight>,
    /// The results of its own runs, for etcd.
    own_results: BTreeMap<(LockId, Token), OwnResult>,
    /// What clients are about to be told of other hosts' runs.
    found: BTreeMap<Token, FoundResult>,
    /// The results that are there for later requests, and for whom.
    kept: BTreeMap<(LockId, Token), u64>,
}

/// A question on its way, or its answer.
struct Flight {
    ask: ClusterRequest,
    lease: LeaseName,
    /// What the host had seen when it sent the request.
    seen: Revision,
    /// When etcd gets it. `None`: it has, or never will.
    arrives: Option<u64>,
    /// When the host hears of it. `None`: it has given up waiting.
    returns: Option<u64>,
    answer: Result<QueueSnapshot, Failure>,
}

pub(super) struct World {
    seed: u64,
    rng: Rng,
    now: u64,
    step: u64,
    store: Store,
    /// The store some time ago, to which it may go back.
    earlier: Store,
    hosts: Vec<Host>,
    keys: Vec<Key>,
    /// By key: the last token, the last step at which a hold had an end, the last at which anybody stood in line.
    tokens: Vec<Token>,
    ended: Vec<u64>,
    occupied: Vec<u64>,
    /// When the run with each token began: the time, and the step.
    began: BTreeMap<(LockId, Token), (u64, u64)>,
    /// The hosts of the runs, and whether they share their results.
    runs: BTreeMap<(LockId, Token), (usize, bool)>,
    /// By key.
    newest: Vec<NewestRequests>,
    calm: bool,
    seen: Seen,
}

impl World {
    pub(super) fn new(seed: u64) -> World {
        let host = |number: u64| Host {
            table: Table::new(table::Config {
                remember_max: 100,
                hash_key: seed,
                first_token: Token(1_000_000 * (number + 1)),
                hold_limit: None,
                is_clustered: true,
            }),
            cluster: Cluster::new(number << 32, Timestamp(1)),
            clients: vec![Client::Idle; CLIENTS as usize],
            effects: Effects::default(),
            lease: None,
            leases_had: 0,
            next_keep: 0,
            watched: 0,
            watched_at: 1,
            watch_era: None,
            seen: Revision(0),
            last_added: None,
            quarantined_until: 0,
            unaware_until: 0,
            cut_until: 0,
            frozen_until: 0,
            flights: Vec::new(),
            own_results: BTreeMap::new(),
            found: BTreeMap::new(),
            kept: BTreeMap::new(),
        };
        World {
            seed,
            rng: Rng(seed),
            now: 1,
            step: 0,
            store: Store::default(),
            earlier: Store::default(),
            hosts: (0..HOSTS as u64).map(host).collect(),
            keys: (0..KEYS).map(|n| Key::new(format!("key {n}")).unwrap()).collect(),
            tokens: vec![Token(0); KEYS as usize],
            ended: vec![0; KEYS as usize],
            occupied: vec![0; KEYS as usize],
            began: BTreeMap::new(),
            runs: BTreeMap::new(),
            newest: (0..KEYS).map(|_| NewestRequests::default()).collect(),
            calm: seed.is_multiple_of(5),
            seen: Seen::new(),
        }
    }

    pub(super) fn run(mut self, steps: u64) -> Seen {
        for _ in 0..steps {
            self.step();
            let host = self.rng.below(HOSTS as u64) as usize;
            if self.hosts[host].frozen_until <= self.now {
                self.act(host);
                self.settle(host);
            }
            if !self.calm {
                self.trouble();
            }
        }
        self.drain();
        std::mem::take(&mut self.seen)
    }

    /// Time passes; etcd, the links and the daemons do their part.
    fn step(&mut self) {
        self.step += 1;
        self.now += self.rng.below(8);
        let expired = self.store.expire(self.now);
        self.note("expired", expired);
        if expired > 0 {
            self.ended.fill(self.step);
        }
        for host in 0..HOSTS {
            self.carry(host);
            if self.hosts[host].frozen_until <= self.now {
                self.turn(host);
            }
        }
        self.check_newest();
        for (key, occupied) in self.keys.iter().zip(&mut self.occupied) {
            if !self.store.line(key.id()).entries.is_empty() {
                *occupied = self.step;
            }
        }
    }

    /// Questions arrive at etcd.
    fn carry(&mut self, host: usize) {
        for flight in &mut self.hosts[host].flights {
            if flight.arrives.is_some_and(|at| at <= self.now) {
                flight.arrives = None;
                flight.answer = self.store.carry_out(&flight.ask, &flight.lease, self.now);
                if let QueueOp::Release { .. } = flight.ask.op {
                    // For other hosts, this is when it ends.
                    let key = self.keys.iter().position(|key| key.id() == flight.ask.lock).unwrap();
                    self.ended[key] = self.step;
                }
                // What is said after the host has given up is not heard.
                if flight.returns.is_none() {
                    *self.seen.entry("late question").or_default() += 1;
                }
            }
        }
    }

    /// One turn of a daemon's loop.
    fn turn(&mut self, host: usize) {
        let now = self.now;
        // Before anything else: may what is held be relied on still?
        if self.hosts[host].cluster.good_until().is_some_and(|until| until.0 <= now) {
            self.lose_lease(host);
        }
        if self.hosts[host].watch_era.is_some_and(|era| era != self.store.era) {
            // etcd was restarted, which ends its connections.
            self.hosts[host].watch_era = None;
            self.hosts[host].cluster.watch_ended(Timestamp(now));
        }
        self.keep_lease(host);
        let cut = self.hosts[host].cut_until > now;
        if !cut && self.rng.percent(30) {
            self.watch(host);
        }
        let mut flights = std::mem::take(&mut self.hosts[host].flights);
        let mut has_changed = false;
        flights.retain_mut(|flight| {
            if flight.returns.is_some_and(|at| at <= now) {
                flight.returns = None;
                let answer = flight.answer.clone();
                let revision = answer.as_ref().map_or(Revision(i64::MAX), |snapshot| snapshot.revision);
                if revision < flight.seen {
                    self.store_changed(host);
                    has_changed = true;
                }
                if has_changed {
                    return flight.arrives.is_some();
                }
                if answer.is_ok() {
                    self.hosts[host].seen = self.hosts[host].seen.max(revision);
                }
                if answer == Err(Failure::LeaseGone) {
                    self.lose_lease(host);
                }
                let about = (flight.ask.lock, flight.ask.id);
                self.feed(host, |table, cluster, effects| {
                    cluster.answered(table, Timestamp(now), about, answer, effects);
                });
            }
            flight.arrives.is_some() || flight.returns.is_some()
        });
        self.hosts[host].flights = flights;
        self.settle(host);
    }

    fn settle(&mut self, host: usize) {
        let now = Timestamp(self.now);
        if let Some(mark) = self.hosts[host].table.deferred() {
            self.feed(host, |table, _, effects| table.settle(now, mark, effects));
        }
        self.feed(host, |table, _, effects| table.expire(now, effects));
        let mut rounds = 0;
        while self.hosts[host].cluster.has_work(now) {
            self.feed(host, |table, cluster, effects| cluster.poll(table, now, effects));
            rounds += 1;
            assert!(rounds < 20, "it does not come to rest");
        }
        let Host { cluster, own_results, .. } = &mut self.hosts[host];
        own_results.retain(|&(lock, token), _| cluster.is_untold(lock, token));
        for ask in cluster.take_requests() {
            self.send(host, ask);
        }
    }

    fn send(&mut self, host: usize, mut ask: ClusterRequest) {
        if let QueueOp::Release { record: Some(record), result, .. } = &mut ask.op {
            let own = self.hosts[host].own_results.get(&(ask.lock, record.token));
            *result = own.cloned().map(Box::new);
        }
        if let QueueOp::Release { record: None, next: Some((_, owner)), .. } = &ask.op
            && owner.mode == Mode::Coalesce
        {
            self.note("stepped aside", 1);
        }
        if let QueueOp::RecordNewest { record, .. } = &ask.op {
            let what = if record.rank.is_some() { "recorded again" } else { "recorded" };
            self.note(what, 1);
        }
        let lease = LeaseName(self.hosts[host].lease.clone().expect("nothing is asked without a lease"));
        let seen = self.hosts[host].seen;
        let soon = self.now + 1 + self.rng.below(20);
        let back = soon + self.rng.below(20);
        let cut = self.hosts[host].cut_until > self.now;
        let kind = if self.calm { 99 } else { self.rng.below(100) };
        let (arrives, returns, answer) = match kind {
            _ if cut => (None, Some(soon), Err(Failure::NotDone)),
            // It is done, or is done late, and the host does not hear of it.
            0..3 => (Some(soon), Some(back.max(soon + 1) + 100), Err(Failure::Unknown)),
            3..6 => (Some(soon + 400), Some(soon + 100), Err(Failure::Unknown)),
            6..9 => (None, Some(soon + 100), Err(Failure::Unknown)),
            _ => (Some(soon), Some(back), Err(Failure::Unknown)),
        };
        if (0..3).contains(&kind) {
            self.note("lost answer", 1);
        }
        if (0..6).contains(&kind) {
            // It arrives, and only that; the host hears nothing of it.
            let (ask, lease, answer) = (ask.clone(), lease.clone(), answer.clone());
            self.hosts[host].flights.push(Flight { ask, lease, seen, arrives, returns: None, answer });
        }
        let arrives = arrives.filter(|_| !(0..6).contains(&kind));
        self.hosts[host].flights.push(Flight { ask, lease, seen, arrives, returns, answer });
    }

    fn keep_lease(&mut self, host: usize) {
        let now = self.now;
        if self.hosts[host].cut_until > now || self.hosts[host].next_keep > now {
            return;
        }
        if self.hosts[host].quarantined_until > now {
            return;
        }
        if self.store.revision() < self.hosts[host].seen {
            return self.store_changed(host);
        }
        let this = &mut self.hosts[host];
        this.next_keep = now + TTL / 3;
        let name = match &this.lease {
            Some(name) if self.store.leases.contains_key(name) => name.clone(),
            Some(_) => return self.lose_lease(host),
            None => {
                this.leases_had += 1;
                let name = format!("{host}{:03}", this.leases_had);
                this.lease = Some(name.clone());
                name
            }
        };
        self.store.leases.insert(name.clone(), now + TTL);
        let this = &mut self.hosts[host];
        this.cluster.leased(&this.table, LeaseName(name), Timestamp(now + TTL - MARGIN));
    }

    fn lose_lease(&mut self, host: usize) {
        let now = Timestamp(self.now);
        self.hosts[host].next_keep = 0;
        if let Some(lease) = self.hosts[host].lease.take()
            && self.rng.percent(30)
            && self.hosts[host].cluster.good_until().is_some_and(|until| until.0 + MARGIN <= now.0)
        {
            self.store.revoke(&lease);
            self.ended.fill(self.step);
        }
        self.feed(host, |table, cluster, effects| cluster.lost_lease(table, now, effects));
    }

    /// The host has found that the store went back.
    fn store_changed(&mut self, host: usize) {
        self.note("noticed", 1);
        let (now, revision) = (self.now, self.store.revision());
        let this = &mut self.hosts[host];
        (this.lease, this.watch_era, this.last_added) = (None, None, None);
        (this.seen, this.quarantined_until) = (revision, now + TTL);
        // What is under way arrives, and its answer is rejected.
        this.flights.iter_mut().for_each(|flight| flight.returns = None);
        self.feed(host, |table, cluster, effects| cluster.store_changed(table, Timestamp(now), effects));
    }

    fn watch(&mut self, host: usize) {
        let revision = self.store.revision();
        let this = &mut self.hosts[host];
        if this.watch_era.is_none() {
            let is_same = this.last_added.as_ref().is_none_or(|last| self.store.has_happened(last));
            if revision < this.seen || !is_same {
                return self.store_changed(host);
            }
            this.watch_era = Some(self.store.era);
            this.watched = usize::MAX;
        }
        let mut position = this.watched;
        match self.store.watch(&mut position) {
            None => {
                let lease = self.hosts[host].lease.clone().unwrap_or_default();
                let locks = self.store.locks_of(&lease);
                self.feed(host, |table, cluster, _| {
                    cluster.watch_opened(table, revision);
                    cluster.has_entries(locks);
                });
            }
            Some(news) => {
                let now = Timestamp(self.now);
                let news = news.to_vec();
                for event in news {
                    let (revision, lock, what) = event.clone();
                    if let WatchEvent::Added(_) = what {
                        self.hosts[host].last_added = Some(event);
                    }
                    self.feed(host, |table, cluster, effects| {
                        cluster.watch_event(table, now, (lock, revision, what), effects);
                    });
                }
            }
        }
        if self.hosts[host].watched_at + NEWEST_MS <= self.now {
            self.newest.iter_mut().for_each(|requests| requests.missed(host));
        }
        let this = &mut self.hosts[host];
        (this.watched, this.watched_at) = (position, self.now);
        this.seen = this.seen.max(revision);
    }

    /// Hands something to a host, and hears what its clients are told.
    fn feed(&mut self, host: usize, event: impl FnOnce(&mut Table, &mut Cluster, &mut Effects)) {
        let this = &mut self.hosts[host];
        let mut effects = std::mem::take(&mut this.effects);
        event(&mut this.table, &mut this.cluster, &mut effects);
        effects.notices.drain(..).for_each(|notice| this.cluster.notify(notice));
        this.hear_of_results(&mut effects);
        for notification in effects.notifications.drain(..) {
            self.hear(host, notification.client.0 as usize, notification.lock, notification.kind);
        }
        self.hosts[host].table.audit();
        self.hosts[host].effects = effects;
    }

    fn hear(&mut self, host: usize, client: usize, lock: LockId, kind: NotificationKind) {
        let before = self.hosts[host].clients[client];
        let (key, since) = match before {
            Client::Idle => panic!("an idle client is told {kind:?}"),
            Client::Asking { key, since, .. } => (key, since),
            Client::Holding { key, .. } => (key, self.step),
        };
        assert_eq!(self.keys[key].id(), lock);
        let after = match kind {
            NotificationKind::Granted(token) => {
                let Client::Asking { fresh_ms, sharing, newest, user, .. } = before else {
                    panic!("a holder is granted a lock")
                };
                if newest {
                    self.newest[key].began(host, client, self.step);
                    self.note("newest", 1);
                }
                self.check_grant(host, key, sharing, token);
                // Beside others, one may end its run while the next one's offer stands.
                if sharing == Sharing::Exclusive {
                    self.check_not_fresh(host, lock, fresh_ms, user);
                }
                self.runs.insert((lock, token), (host, user.is_some()));
                self.began.insert((lock, token), (self.now, self.step));
                Client::Holding { key, sharing, user, token }
            }
            NotificationKind::Offered => {
                self.note("offered", 1);
                let Client::Asking { fresh_ms, coalesces, newest, sharing, user, .. } = before else {
                    panic!("a holder is offered a lock")
                };
                Client::Asking {
                    key,
                    since,
                    nowait: false,
                    coalesces,
                    newest,
                    fresh_ms,
                    offered: Some(self.now),
                    sharing,
                    user,
                }
            }
            NotificationKind::Waiting { .. } => {
                self.note("waiting", 1);
                if let Client::Asking { newest: true, .. } = before {
                    self.newest[key].waits(host, client, self.step);
                }
                before
            }
            NotificationKind::Finished(outcome, token) => {
                if let Client::Asking { coalesces: true, .. } = before
                    && outcome != Outcome::Unknown
                {
                    self.check_batch(lock, token, since);
                }
                if outcome != Outcome::Vanished {
                    assert!(self.ended[key] >= since, "told of an end that came before it asked");
                    self.note("finished", 1);
                }
                if let Client::Asking { user: Some(user), .. } = before {
                    self.check_result(host, (lock, token), outcome, user);
                }
                Client::Idle
            }
            NotificationKind::Fresh(token) => {
                let Client::Asking { fresh_ms, user, .. } = before else {
                    panic!("a holder is told of a run")
                };
                if user.is_some() {
                    let sharer = self.hosts[host].kept.get(&(lock, token)).copied();
                    assert_eq!(sharer, user, "told of a run whose result is not there, or not its user's");
                    let (by, _) = self.runs[&(lock, token)];
                    self.note(if by == host { "own result" } else { "result of another host" }, 1);
                }
                let age = self.now - self.began[&(lock, token)].0;
                // The watch of a host that is cut off or frozen is late.
                assert!(
                    age <= fresh_ms + 2_000 + 4 * TTL,
                    "a run counts that is {age} ms old, for {fresh_ms} ms"
                );
                self.note("fresh", 1);
                Client::Idle
            }
            NotificationKind::Busy => {
                let this = &self.hosts[host];
                // A host that has not noticed yet that the store went back knows what was true before.
                let is_held = !self.store.line(lock).entries.is_empty()
                    || this.table.is_held_here(lock)
                    || this.watch_era != Some(self.store.era);
                assert!(
                    is_held || self.occupied[key] >= since,
                    "told that a lock is held which was free all the time"
                );
                self.note("busy", 1);
                Client::Idle
            }
            NotificationKind::Unavailable => {
                assert!(matches!(before, Client::Asking { nowait: true, .. }), "one that waits is sent away");
                self.note("unavailable", 1);
                Client::Idle
            }
            NotificationKind::Lost(_) => {
                assert!(matches!(before, Client::Holding { .. }), "one that holds nothing loses it");
                self.note("lost", 1);
                self.ended[key] = self.step;
                Client::Idle
            }
            NotificationKind::NewerRequest => {
                let is_elsewhere = self.newest[key].gives_way(host, client, self.step);
                self.note(if is_elsewhere { "superseded from elsewhere" } else { "superseded" }, 1);
                Client::Idle
            }
            NotificationKind::SlotsDiffer { slots, .. } => {
                let Client::Asking { sharing: Sharing::Slots { slots: its, .. }, .. } = before else {
                    panic!("refused for its slots, of which it said none: {before:?}");
                };
                assert_ne!(slots, its, "refused though it agrees");
                self.note("slots differ", 1);
                Client::Idle
            }
            other => panic!("no client is told {other:?} here"),
        };
        if let (Client::Asking { newest: true, .. }, Client::Idle) = (before, after) {
            self.newest[key].left(host, client, self.step);
        }
        self.hosts[host].clients[client] = after;
    }

    /// Checks that of all hosts one newest request waits, when every host knows all.
    fn check_newest(&self) {
        let length = self.store.history_length();
        let knows_all = |host: &Host| {
            host.watch_era == Some(self.store.era)
                && host.watched == length
                && host.flights.is_empty()
                && host.lease.is_some()
                && host.cut_until.max(host.frozen_until) <= self.now
        };
        if !self.hosts.iter().all(knows_all) {
            return;
        }
        for (key, requests) in self.keys.iter().zip(&self.newest) {
            let has_read = |host: &Host| host.cluster.queues.get(&key.id()).is_none_or(LockQueue::is_current);
            if !self.hosts.iter().all(has_read) {
                continue;
            }
            let waits = |host: usize, client: usize| {
                matches!(self.hosts[host].clients[client], Client::Asking { offered: None, .. })
            };
            assert!(requests.waiting(waits) <= 1, "two of the newest wait at the same time");
        }
    }

    /// Checks that a run has begun since a coalescing request came.
    fn check_batch(&mut self, lock: LockId, token: Token, since: u64) {
        self.note("batch", 1);
        let mut runs = self.began.range((lock, token)..=(lock, Token(u64::MAX)));
        assert!(runs.any(|(_, &(_, step))| step >= since), "no run began since step {since}, when it asked");
    }

    /// Checks that a client which shares results is told the outcome and the result of one run.
    fn check_result(&mut self, host: usize, (lock, token): (LockId, Token), outcome: Outcome, user: u64) {
        let Some(FoundResult { result, .. }) = self.hosts[host].found.get(&token) else {
            let is_own = self.runs.get(&(lock, token)).is_some_and(|(by, _)| *by == host);
            assert!(is_own, "the daemon has not heard whether there is a result");
            return;
        };
        let content = result.as_ref().map(|result| (result.sharer, result.content.as_deref()));
        let Some((sharer, Ok(content))) = content else {
            let later = self.began.range((lock, Token(token.0 + 1))..=(lock, Token(u64::MAX))).next();
            let has_shared = self.runs.get(&(lock, token)).is_some_and(|(_, shares)| *shares);
            assert!(!(self.calm && has_shared && later.is_none()), "the result of {token:?} is not found");
            return self.note("no result", 1);
        };
        let (of, ended) = read_content(content);
        assert_eq!(ended, outcome, "told the result of {of:?} with the outcome of {token:?}");
        assert!(of >= token, "told the result of a run before the one that it waited for");
        self.note(if sharer == user { "result" } else { "another user's result" }, 1);
    }

    /// A client releases its lock.
    fn release(&mut self, host: usize, client: usize, outcome: Outcome) {
        let Client::Holding { key, user, token, .. } = self.hosts[host].clients[client] else { return };
        self.ended[key] = self.step;
        let (now, id, lock) = (Timestamp(self.now), ClientId(client as u32), self.keys[key].id());
        let this = &mut self.hosts[host];
        this.clients[client] = Client::Idle;
        if let Some(user) = user {
            let user_of_run = RunUser { uid: Some(user as u32), ..RunUser::default() };
            let content = Ok(content(token, outcome).into());
            this.own_results.insert((lock, token), OwnResult { token, user: user_of_run, content });
            this.kept.insert((lock, token), user);
            this.table.has_result(id);
        }
        self.feed(host, |table, _, effects| table.release(now, id, outcome, effects));
    }

    /// Checks that no run is repeated that counts for a request. For one that wants a result, a run without does not count.
    fn check_not_fresh(&self, host: usize, lock: LockId, fresh_ms: u64, user: Option<u64>) {
        if user.is_some() {
            return;
        }
        let Some((token, counts_for)) = self.store.last_success(lock) else { return };
        let (age, counts_for) = (self.now - self.began[&(lock, token)].0, counts_for.min(fresh_ms));
        // A host that has not noticed yet that the store went back knows what was true before.
        if self.hosts[host].watch_era == Some(self.store.era) {
            assert!(age >= counts_for, "a run that began {age} ms ago is repeated");
        }
    }

    /// Checks that the other clients that can believe, with reason, that they hold the lock admit this one.
    fn check_grant(&mut self, host: usize, key: usize, sharing: Sharing, token: Token) {
        let mut beside = Vec::new();
        for (number, other) in self.hosts.iter().enumerate() {
            let is_good = other.cluster.good_until().is_some_and(|until| until.0 > self.now)
                && (number == host || self.hosts[host].unaware_until <= self.now);
            let holds = other.clients.iter().filter_map(|client| match client {
                Client::Holding { key: of, sharing, .. } if *of == key => Some(*sharing),
                _ => None,
            });
            beside.extend(holds.filter(|_| is_good));
        }
        assert_eq!(
            sharing.verdict(beside.iter().copied()),
            Verdict::Admitted,
            "host {host} gives key {key} to one beside {beside:?}"
        );
        let with = match sharing {
            Sharing::Exclusive => "granted",
            Sharing::Shared if beside.is_empty() => "granted shared",
            Sharing::Shared => "granted beside shared",
            Sharing::Slots { .. } if beside.is_empty() => "granted a slot",
            Sharing::Slots { .. } => "granted a slot beside others",
        };
        let line = self.store.line(self.keys[key].id());
        let before = line.entries.iter().find(|one| one.owner.is_none() && one.revision.0 < token.0 as i64);
        // A host that has not noticed yet that the store went back knows what was true before.
        if self.hosts[host].watch_era == Some(self.store.era) {
            assert_eq!(before, None, "given beside another program's hold");
        }
        let until = self.hosts[host].cluster.good_until();
        assert!(until.is_some_and(|until| until.0 > self.now), "given without a lease");
        // An offer may stand since before the store went back, which the host has not noticed yet.
        if token.0 as i64 <= line.revision.0 {
            // An offer of a shared lock may be taken after a later place was granted.
            let may_be_lower = sharing != Sharing::Exclusive;
            assert!(may_be_lower || token > self.tokens[key], "tokens do not grow");
            self.tokens[key] = token.max(self.tokens[key]);
        }
        self.note(with, 1);
    }

    /// One client of a host does something.
    fn act(&mut self, host: usize) {
        let now = Timestamp(self.now);
        let client = self.rng.below(u64::from(CLIENTS)) as usize;
        let id = ClientId(client as u32);
        match self.hosts[host].clients[client] {
            Client::Idle => self.ask(host, client),
            // Some are stopped for a while.
            Client::Asking { offered: Some(_), .. } if self.rng.percent(10) => self.take(host, client),
            Client::Asking { offered: Some(_), .. } if self.rng.percent(90) => {}
            Client::Asking { key, newest, .. } => {
                if self.rng.percent(5) {
                    if newest {
                        self.newest[key].left(host, client, self.step);
                    }
                    self.hosts[host].clients[client] = Client::Idle;
                    self.feed(host, |table, _, effects| table.disconnected(now, id, effects));
                }
            }
            Client::Holding { key, .. } => {
                if self.rng.percent(40) {
                    if self.rng.percent(20) {
                        self.ended[key] = self.step;
                        self.hosts[host].clients[client] = Client::Idle;
                        self.note("vanished", 1);
                        self.feed(host, |table, _, effects| table.disconnected(now, id, effects));
                    } else {
                        let outcome = Outcome::Exit(if self.rng.percent(20) { 3 } else { 0 });
                        self.release(host, client, outcome);
                    }
                }
            }
        }
    }

    /// A client takes an offer, which may have been withdrawn.
    fn take(&mut self, host: usize, client: usize) {
        let (now, id) = (Timestamp(self.now), ClientId(client as u32));
        if let Client::Asking { offered, .. } = &mut self.hosts[host].clients[client]
            && let Some(at) = offered.take()
        {
            self.note(if self.now >= at + OFFER_MS { "taken late" } else { "taken" }, 1);
        }
        self.feed(host, |table, _, effects| table.take(now, id, effects));
    }

    fn ask(&mut self, host: usize, client: usize) {
        if self.rng.percent(3) {
            return self.ask_everywhere();
        }
        let key = self.rng.below(KEYS) as usize;
        self.ask_for(host, client, key);
    }

    /// A newest request comes to each host at the same time.
    fn ask_everywhere(&mut self) {
        let key = self.rng.below(KEYS) as usize;
        for host in 0..HOSTS {
            let idle = self.hosts[host].clients.iter().position(|client| matches!(client, Client::Idle));
            if let Some(client) = idle.filter(|_| self.hosts[host].frozen_until <= self.now) {
                self.newest[key].asks(host, client, self.step);
                self.hosts[host].clients[client] = Client::Asking {
                    key,
                    since: self.step,
                    nowait: false,
                    coalesces: false,
                    newest: true,
                    fresh_ms: 0,
                    offered: None,
                    sharing: Sharing::Exclusive,
                    user: None,
                };
                let asked =
                    LockRequest { newest: true, ..LockRequest::new(self.keys[key].clone(), Mode::Queue) };
                self.lock(host, client, asked);
                self.settle(host);
            }
        }
    }

    fn lock(&mut self, host: usize, client: usize, asked: LockRequest) {
        let (now, id) = (Timestamp(self.now), ClientId(client as u32));
        self.feed(host, |table, _, effects| {
            table.lock(now, id, None, Box::new(asked), effects).expect("it names no other's request");
        });
    }

    fn ask_for(&mut self, host: usize, client: usize, key: usize) {
        let (now, id) = (Timestamp(self.now), ClientId(client as u32));
        let lock = self.keys[key].clone();
        let nowait = self.rng.percent(20);
        let kind = self.rng.below(10);
        let coalesces = kind > 7;
        let fresh_ms = if kind % 2 == 1 && !coalesces && self.rng.percent(60) {
            1_000 + self.rng.below(4_000)
        } else {
            0
        };
        // One key has more readers, and one more slots.
        let (shared, slots) = match (key, self.rng.below(10)) {
            _ if kind == 0 || coalesces => (false, 1),
            (1, ..8) | (_, 0) => (true, 1),
            (2, 1..8) | (_, 1) => (false, 2),
            (_, 8) if self.rng.percent(30) => (false, 3),
            _ => (false, 1),
        };
        let sharing = Sharing::from(&Terms { shared, slots, ..Terms::V1 });
        let nowait = nowait && kind != 0;
        let newest =
            (6..8).contains(&kind) && !nowait && sharing == Sharing::Exclusive && self.rng.percent(80);
        let since = self.step;
        if newest {
            self.newest[key].asks(host, client, since);
        }
        let shares = kind != 0 && sharing == Sharing::Exclusive && self.rng.percent(50);
        let user = shares.then(|| 1 + u64::from(self.rng.percent(20)));
        self.hosts[host].clients[client] =
            Client::Asking { key, since, nowait, coalesces, newest, fresh_ms, offered: None, sharing, user };
        if kind == 0 {
            return self.feed(host, |table, _, effects| table.lock_v1(now, id, lock.id(), effects));
        }
        let mode = match kind {
            ..6 => Mode::Once,
            6..8 => Mode::Queue,
            _ => Mode::Coalesce,
        };
        let offers = self.rng.percent(70);
        let asked = LockRequest {
            nowait,
            offers,
            fresh_ms,
            shared,
            slots,
            newest,
            share: user.map(|_| Share::Whole),
            sharer: user.unwrap_or_default(),
            ..LockRequest::new(lock, mode)
        };
        self.lock(host, client, asked);
    }

    fn trouble(&mut self) {
        let host = self.rng.below(HOSTS as u64) as usize;
        match self.rng.below(2_000) {
            0..4 => {
                self.note("cut", 1);
                self.hosts[host].cut_until = self.now + self.rng.below(3 * TTL);
            }
            4..8 => {
                self.note("frozen", 1);
                self.hosts[host].frozen_until = self.now + self.rng.below(3 * TTL);
            }
            26..28 => {
                self.note("election", 1);
                self.store.elect(self.now);
            }
            28..30 => {
                let lock = self.keys[self.rng.below(KEYS) as usize].id();
                let forgotten = self.store.forget(lock);
                self.note("forgotten", u64::from(forgotten));
            }
            30..40 => {
                // A user deletes it.
                let key = self.rng.below(KEYS) as usize;
                self.store.forget_newest(self.keys[key].id());
                self.newest[key].forget_order();
            }
            8..10 => {
                self.note("compacted", 1);
                self.store.compact();
            }
            20..24 => self.earlier = self.store.clone(),
            24..26 => self.go_back(),
            10..20 => {
                self.note("other program", 1);
                let lock = self.keys[self.rng.below(KEYS) as usize].id();
                self.store.other_program(lock);
                if !self.store.has_other_program(lock) {
                    let key = self.keys.iter().position(|key| key.id() == lock).unwrap();
                    self.ended[key] = self.step;
                }
            }
            _ => {}
        }
    }

    /// The store goes back: to what it was some time ago, or to nothing.
    fn go_back(&mut self) {
        let is_emptied = self.rng.percent(30);
        let earlier = if is_emptied { Store::default() } else { self.earlier.clone() };
        let target = earlier.revision();
        if target == self.store.revision() {
            return;
        }
        self.note(if is_emptied { "emptied" } else { "rolled back" }, 1);
        let until = self.now + TTL;
        self.store.go_back_to(earlier, until);
        for host in &mut self.hosts {
            let last = host.last_added.as_ref().map_or(Revision(0), |(revision, ..)| *revision);
            if host.seen.min(last) <= target {
                host.unaware_until = until;
            }
        }
        self.newest.iter_mut().for_each(NewestRequests::forget_order);
        self.tokens.fill(Token(0));
        self.ended.fill(self.step);
        self.occupied.fill(self.step);
    }

    /// Everything works again, and each holder ends: then every client must be answered.
    fn drain(&mut self) {
        self.calm = true;
        for host in &mut self.hosts {
            (host.cut_until, host.frozen_until) = (0, 0);
        }
        for key in self.keys.clone() {
            if self.store.has_other_program(key.id()) {
                self.store.other_program(key.id());
            }
        }
        for key in &mut self.ended {
            *key = self.step;
        }
        for round in 0.. {
            self.step();
            for host in 0..HOSTS {
                for client in 0..CLIENTS as usize {
                    if let Client::Asking { offered: Some(_), .. } = self.hosts[host].clients[client] {
                        self.take(host, client);
                    }
                    if let Client::Holding { .. } = self.hosts[host].clients[client] {
                        self.release(host, client, Outcome::Exit(0));
                        self.settle(host);
                    }
                }
            }
            let idle = self.hosts.iter().all(|host| host.clients.iter().all(|c| matches!(c, Client::Idle)));
            if idle && self.store.is_empty() && self.hosts.iter().all(|host| host.cluster.queues.is_empty()) {
                return;
            }
            assert!(round < 5_000, "a client waits for ever, or a place is never given up");
        }
    }

    fn note(&mut self, what: &'static str, times: u64) {
        *self.seen.entry(what).or_default() += times;
    }
}

impl Host {
    /// Takes in the results of other hosts, and drops what is not to be kept, as the daemon does before it tells its clients.
    fn hear_of_results(&mut self, effects: &mut Effects) {
        let found = self.cluster.take_results().into_iter().map(|found| (found.token, found));
        self.found = found.collect();
        for FoundResult { token, run, result } in self.found.values() {
            if let (Some(run), Some(result)) = (run, result) {
                assert!(run.token == *token && result.token == *token, "a run with the result of another");
                self.kept.insert((run.lock, *token), result.sharer);
            }
        }
        for gone in effects.results_gone.drain(..) {
            self.kept.remove(&gone);
        }
        effects.record.clear();
    }
}

/// The result of a run that ended so.
fn content(token: Token, outcome: Outcome) -> Vec<u8> {
    let Outcome::Exit(status) = outcome else { unreachable!("no client is killed here") };
    [&token.0.to_be_bytes()[..], &[status]].concat()
}

fn read_content(content: &[u8]) -> (Token, Outcome) {
    let (token, status) = content.split_at(8);
    (Token(u64::from_be_bytes(token.try_into().unwrap())), Outcome::Exit(status[0]))
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("\nseed {} broke at step {}, time {}", self.seed, self.step, self.now);
            for (number, host) in self.hosts.iter().enumerate() {
                eprintln!("  host {number}: lease {:?}, {:?}", host.lease, host.clients);
                eprintln!("    {:?}", host.cluster.queues);
            }
            eprintln!("Replay it: KMUTEX_SIM_SEED={} cargo test --lib clustered_hosts", self.seed);
        }
    }
}
