//! The hosts and their clients, and what becomes of them.

mod checks;
mod clients;
mod trouble;

use std::collections::{BTreeMap, BTreeSet};

use super::super::{
    Cluster, ClusterRequest, Failure, FoundResult, LeaseName, OwnResult, PresenceRequest, QueueOp,
    QueueSnapshot, Renewal, Revision, WatchEvent,
};
use super::newest::{Moment, NewestRequests};
use super::store::{NEWEST_MS, Store};
use crate::proto::v2::Mode;
use crate::proto::{Key, LockId, Outcome, Token};
use crate::table::rng::Rng;
use crate::table::{self, Effects, NotificationKind, Sharing, Table, Timestamp};

const HOSTS: usize = 3;
const CLIENTS: u32 = 6;
const KEYS: u64 = 3;
pub(super) const TTL: u64 = 1_000;
/// For how long only renewals may pass between a host and etcd, at the most.
pub(super) const ONLY_RENEWS_MAX: u64 = 2 * TTL;
const MARGIN: u64 = 250;

/// The client of each host that says, as a holder, that it is not to be asked to stop.
const UNSTOPPABLE: usize = 5;

/// Two users and root have clients on each host.
fn uid_of(client: usize) -> u32 {
    [1000, 1001, 0][client % 3]
}

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
        /// When it was offered the lock, and the era of the store that the host knew.
        offered: Option<(u64, u64)>,
        sharing: Sharing,
        /// The user whose results it shares.
        user: Option<u64>,
    },
    Holding {
        key: usize,
        sharing: Sharing,
        user: Option<u64>,
        token: Token,
        /// The host could not know until then that the store went back.
        unaware_until: u64,
    },
}

struct Host {
    table: Table,
    cluster: Cluster,
    clients: Vec<Client>,
    effects: Effects,
    lease: Option<String>,
    leases_had: u64,
    /// When the keeper of the lease asks next, if it does not wait for an answer.
    next_keep: Option<u64>,
    /// When it sent what was answered last. `None`: an attempt has failed since.
    renewed: Option<u64>,
    watch: Option<Watch>,
    /// The era of the store in which the last watch was opened.
    era: u64,
    /// The revision of the last renewal; when the host last wrote something that the watch must see, and its revision.
    renewed_at: Revision,
    checked: u64,
    sign: Option<Revision>,
    /// When its watch last showed it every change.
    watched_at: u64,
    /// The highest revision that the host saw, and the last entry that it saw being made.
    seen: Revision,
    last_added: Option<(Revision, LockId, WatchEvent)>,
    /// The host asks for no lease until then, because the store went back.
    quarantined_until: u64,
    /// The host cannot know until then that the store went back.
    unaware_until: u64,
    /// It cannot reach etcd until then, or with nothing but renewals of its lease.
    cut_until: u64,
    only_renews_until: u64,
    /// It does nothing at all until then; or its clients ask for nothing and end nothing.
    frozen_until: u64,
    quiet_until: u64,
    flights: Vec<Flight>,
    /// The results of its own runs, for etcd.
    own_results: BTreeMap<(LockId, Token), OwnResult>,
    /// What clients are about to be told of other hosts' runs.
    found: BTreeMap<Token, FoundResult>,
    /// The results that are there for later requests, and for whom.
    kept: BTreeMap<(LockId, Token), u64>,
}

/// A watch that the host takes for open.
struct Watch {
    era: u64,
    position: usize,
    /// Up to where it has shown everything.
    shown: Revision,
    /// Its connection is gone without a sign, and shows nothing more than what was on its way.
    is_dead: bool,
    on_its_way: Vec<(Revision, LockId, WatchEvent)>,
}

#[derive(Clone)]
enum Question {
    Queue(ClusterRequest),
    Presence(PresenceRequest),
    Grant,
    Renew,
}

#[derive(Clone)]
enum Reply {
    Queue(QueueSnapshot),
    Presence(Revision, BTreeSet<(LockId, Token)>),
    Renewed(Revision),
}

impl Reply {
    fn revision(&self) -> Revision {
        match self {
            Reply::Queue(snapshot) => snapshot.revision,
            Reply::Presence(revision, _) | Reply::Renewed(revision) => *revision,
        }
    }
}

/// A question on its way, or its answer.
#[derive(Clone)]
struct Flight {
    question: Question,
    lease: LeaseName,
    sent: u64,
    /// What the host had seen when it sent the request.
    seen: Revision,
    /// When etcd gets it. `None`: it has, or never will.
    arrives: Option<u64>,
    /// When the host hears of it. `None`: it has given up waiting.
    returns: Option<u64>,
    answer: Result<Reply, Failure>,
}

pub(super) struct World {
    seed: u64,
    rng: Rng,
    now: u64,
    step: u64,
    store: Store,
    /// The store some time ago, and a moment ago, to which it may go back, and when it was so.
    earlier: (Store, u64),
    recent: (Store, u64),
    /// Other programs write to the store until then, and not about locks.
    busy_until: u64,
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
            next_keep: Some(0),
            renewed: Some(0),
            watch: None,
            era: 0,
            renewed_at: Revision(0),
            checked: 0,
            sign: None,
            watched_at: 1,
            seen: Revision(0),
            last_added: None,
            quarantined_until: 0,
            unaware_until: 0,
            cut_until: 0,
            only_renews_until: 0,
            frozen_until: 0,
            quiet_until: 0,
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
            earlier: (Store::default(), 0),
            recent: (Store::default(), 0),
            busy_until: 0,
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
                if self.hosts[host].quiet_until <= self.now {
                    self.act(host);
                }
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
        if self.now < self.busy_until && self.now >= self.store.down_until && self.rng.percent(60) {
            self.store.sign_of_life();
        }
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
        let now = self.now;
        for flight in &mut self.hosts[host].flights {
            if flight.arrives.is_none_or(|at| at > now) {
                continue;
            }
            flight.arrives = None;
            if now < self.store.down_until {
                flight.answer = Err(Failure::NotDone);
                continue;
            }
            let end = now + TTL;
            flight.answer = match &flight.question {
                Question::Queue(ask) => self.store.carry_out(ask, &flight.lease, now).map(Reply::Queue),
                Question::Presence(request) => {
                    let there = self.store.presence(&request.locks, &flight.lease);
                    Ok(Reply::Presence(self.store.revision(), there))
                }
                Question::Grant => self.store.renew(&flight.lease, true, end).map(Reply::Renewed),
                Question::Renew => self.store.renew(&flight.lease, false, end).map(Reply::Renewed),
            };
            if let Question::Queue(ClusterRequest { lock, op: QueueOp::Release { .. }, .. }) =
                &flight.question
            {
                // For other hosts, this is when it ends.
                let key = self.keys.iter().position(|key| key.id() == *lock).unwrap();
                self.ended[key] = self.step;
            }
            // What is said after the host has given up is not heard.
            if flight.returns.is_none() {
                *self.seen.entry("late question").or_default() += 1;
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
        let cut = self.hosts[host].is_cut(now);
        if !cut && self.hosts[host].watch.as_ref().is_some_and(|w| w.era != self.store.era && !w.is_dead) {
            // etcd was restarted, which ends its connections.
            self.hang_up(host);
        }
        self.keep_lease(host);
        if !cut && now >= self.store.down_until && self.rng.percent(30) {
            self.watch(host);
        }
        let mut has_changed = false;
        let mut flights = std::mem::take(&mut self.hosts[host].flights);
        let returned = flights.extract_if(.., |flight| flight.returns.is_some_and(|at| at <= now));
        let returned: Vec<Flight> = returned.collect();
        self.hosts[host].flights.append(&mut flights);
        for flight in returned {
            if flight.arrives.is_some() {
                self.hosts[host].flights.push(Flight { returns: None, ..flight.clone() });
            }
            if flight.answer.as_ref().is_ok_and(|reply| reply.revision() < flight.seen) {
                self.store_changed(host);
                has_changed = true;
            }
            if !has_changed {
                self.land(host, flight);
            }
        }
        self.settle(host);
    }

    /// A host gets an answer, or gives up waiting for it.
    fn land(&mut self, host: usize, Flight { question, lease, sent, answer, .. }: Flight) {
        let now = Timestamp(self.now);
        if let Ok(reply) = &answer {
            let this = &mut self.hosts[host];
            this.seen = this.seen.max(reply.revision());
        }
        match (question, answer) {
            (Question::Grant | Question::Renew, answer) => self.renewed(host, lease, sent, answer),
            (Question::Presence(PresenceRequest { id, .. }), answer) => {
                let there = match answer {
                    Ok(Reply::Presence(_, there)) => Some(there),
                    _ => None,
                };
                self.note("read again", u64::from(there.is_some()));
                self.feed(host, |table, cluster, effects| {
                    cluster.presence_answered(table, now, (id, there), effects);
                });
            }
            (Question::Queue(ask), answer) => {
                if matches!(answer, Err(Failure::LeaseGone)) {
                    self.lose_lease(host);
                }
                let answer = answer.map(|reply| match reply {
                    Reply::Queue(snapshot) => snapshot,
                    _ => unreachable!("it asked for a queue"),
                });
                self.feed(host, |table, cluster, effects| {
                    cluster.answered(table, now, (ask.lock, ask.id), answer, effects);
                });
            }
        }
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
            self.send(host, Question::Queue(ask));
        }
        for request in self.hosts[host].cluster.take_presence_requests() {
            self.send(host, Question::Presence(request));
        }
    }

    fn send(&mut self, host: usize, mut question: Question) {
        if let Question::Queue(ClusterRequest { lock, op, .. }) = &mut question
            && let QueueOp::Release { record: Some(record), result, .. } = op
        {
            let own = self.hosts[host].own_results.get(&(*lock, record.token));
            *result = own.cloned().map(Box::new);
        }
        if let Question::Queue(ClusterRequest { op, .. }) = &question
            && let QueueOp::Release { record: None, next: Some((_, owner)), .. } = op
            && owner.mode == Mode::Coalesce
        {
            self.note("stepped aside", 1);
        }
        if let Question::Queue(ClusterRequest { op: QueueOp::RecordNewest { record, .. }, .. }) = &question {
            let what = if record.rank.is_some() { "recorded again" } else { "recorded" };
            self.note(what, 1);
        }
        let lease = LeaseName(match question {
            Question::Grant => format!("{host}{:03}", self.hosts[host].leases_had),
            _ => self.hosts[host].lease.clone().expect("nothing is asked without a lease"),
        });
        let seen = self.hosts[host].seen;
        let soon = self.now + 1 + self.rng.below(20);
        let back = soon + self.rng.below(20);
        let this = &self.hosts[host];
        let is_renewal = matches!(question, Question::Renew);
        let cut = if is_renewal { this.cut_until > self.now } else { this.is_cut(self.now) };
        let kind = if self.calm { 99 } else { self.rng.below(100) };
        let (arrives, returns, answer) = match kind {
            _ if cut => (None, Some(soon), Err(Failure::NotDone)),
            // It is done, or is done late, and the host does not hear of it.
            0..3 => (Some(soon), Some(back.max(soon + 1) + 100), Err(Failure::Unknown)),
            3..6 => (Some(soon + 400), Some(soon + 100), Err(Failure::Unknown)),
            6..9 => (None, Some(soon + 100), Err(Failure::Unknown)),
            // It is done, and the host hears of it late.
            9..12 => (Some(soon), Some(back + 300), Err(Failure::Unknown)),
            _ => (Some(soon), Some(back), Err(Failure::Unknown)),
        };
        if (0..3).contains(&kind) {
            self.note("lost answer", 1);
        }
        let flight = Flight { question, lease, sent: self.now, seen, arrives, returns, answer };
        let flights = &mut self.hosts[host].flights;
        if (0..6).contains(&kind) {
            // It arrives, and only that; the host hears nothing of it.
            flights.push(Flight { returns: None, ..flight.clone() });
            flights.push(Flight { arrives: None, ..flight });
        } else {
            flights.push(flight);
        }
    }

    /// The keeper of the lease asks for one, or for its renewal, if it is time.
    fn keep_lease(&mut self, host: usize) {
        let now = self.now;
        let this = &mut self.hosts[host];
        if this.next_keep.is_none_or(|at| at > now) || this.quarantined_until > now {
            return;
        }
        this.next_keep = None;
        let is_new = this.lease.is_none();
        this.leases_had += u64::from(is_new);
        self.send(host, if is_new { Question::Grant } else { Question::Renew });
    }

    /// The lease was renewed, or granted, or it was not.
    fn renewed(&mut self, host: usize, lease: LeaseName, sent: u64, answer: Result<Reply, Failure>) {
        let now = self.now;
        let this = &mut self.hosts[host];
        this.next_keep = Some(sent + TTL / 3);
        let revision = match answer {
            Ok(reply) => reply.revision(),
            Err(failure) => {
                (this.next_keep, this.renewed) = (Some(now + 20), None);
                if failure == Failure::LeaseGone && this.lease.as_ref() == Some(&lease.0) {
                    self.lose_lease(host);
                }
                return;
            }
        };
        let is_new = this.lease.is_none() && lease.0 == format!("{host}{:03}", this.leases_had);
        if !is_new && this.lease.as_ref() != Some(&lease.0) {
            this.next_keep = Some(now);
            return;
        }
        this.lease = Some(lease.0.clone());
        let is_prompt = this.renewed.is_some_and(|before| sent <= before + TTL / 2);
        this.renewed = Some(sent);
        let renewal = Renewal { lease, good_until: Timestamp(sent + TTL - MARGIN), revision, is_prompt };
        if this.watch.as_ref().is_some_and(|watch| watch.era != self.store.era) {
            self.note("renewed unawares", 1);
        }
        let mut must_reopen = false;
        self.feed(host, |table, cluster, _| must_reopen = cluster.leased(table, Timestamp(now), renewal));
        if must_reopen {
            self.hang_up(host);
        }
        self.check_watch(host, revision);
        if !self.calm && self.rng.percent(4) {
            self.note("cut again", 1);
            self.hosts[host].cut_until = now + self.rng.below(2 * TTL);
        }
    }

    /// As the daemon does it: now and then it writes something that the watch must see.
    fn check_watch(&mut self, host: usize, revision: Revision) {
        let this = &mut self.hosts[host];
        let Some(watch) = &this.watch else { return };
        let is_silent = this.renewed_at > watch.shown;
        this.renewed_at = revision;
        if let Some(sign) = this.sign.take() {
            if watch.shown < sign {
                self.note("silent", 1);
                self.hang_up(host);
            }
        } else if is_silent && self.now >= this.checked + 2 * TTL {
            this.checked = self.now;
            if this.is_cut(self.now) {
                return self.hang_up(host);
            }
            this.sign = Some(self.store.sign_of_life());
        }
    }

    /// The watch has ended, or the host ends it.
    fn hang_up(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        (this.watch, this.sign) = (None, None);
        this.cluster.watch_ended(Timestamp(self.now));
    }

    fn lose_lease(&mut self, host: usize) {
        let now = Timestamp(self.now);
        let this = &mut self.hosts[host];
        this.next_keep = this.next_keep.map(|_| 0);
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
        (this.lease, this.watch, this.last_added, this.sign) = (None, None, None, None);
        (this.seen, this.renewed_at, this.quarantined_until) = (revision, Revision(0), now + TTL);
        this.next_keep = Some(now);
        // What is under way arrives, and its answer is rejected.
        this.flights.retain_mut(|flight| {
            flight.returns = None;
            flight.arrives.is_some()
        });
        self.feed(host, |table, cluster, effects| cluster.store_changed(table, Timestamp(now), effects));
    }

    fn watch(&mut self, host: usize) {
        let revision = self.store.revision();
        let this = &mut self.hosts[host];
        if this.watch.is_none() {
            let is_same = this.last_added.as_ref().is_none_or(|last| self.store.has_happened(last));
            if revision < this.seen || !is_same {
                return self.store_changed(host);
            }
            this.era = self.store.era;
            this.watch = Some(Watch {
                era: this.era,
                position: usize::MAX,
                shown: revision,
                is_dead: false,
                on_its_way: Vec::new(),
            });
        }
        let watch = this.watch.as_mut().unwrap();
        if watch.is_dead {
            let news = std::mem::take(&mut watch.on_its_way);
            self.newest.iter_mut().for_each(|requests| requests.missed(host));
            return self.show(host, news);
        }
        let news = self.store.watch(&mut watch.position).map(<[_]>::to_vec);
        watch.shown = revision;
        this.seen = this.seen.max(revision);
        match news {
            None => {
                let lease = self.hosts[host].lease.clone().unwrap_or_default();
                let locks = self.store.locks_of(&lease);
                self.feed(host, |table, cluster, _| {
                    cluster.watch_opened(table, revision);
                    cluster.has_entries(locks);
                });
            }
            Some(news) => {
                self.show(host, news);
                self.hosts[host].cluster.watch_shown(revision);
            }
        }
        if self.hosts[host].watched_at + NEWEST_MS <= self.now {
            self.newest.iter_mut().for_each(|requests| requests.missed(host));
        }
        self.hosts[host].watched_at = self.now;
    }

    /// The watch of a host shows these events.
    fn show(&mut self, host: usize, news: Vec<(Revision, LockId, WatchEvent)>) {
        let now = Timestamp(self.now);
        for event in news {
            let (revision, lock, what) = event.clone();
            if let WatchEvent::Added(_) = what {
                self.hosts[host].last_added = Some(event);
            }
            self.feed(host, |table, cluster, effects| {
                cluster.watch_event(table, now, (lock, revision, what), effects);
                cluster.watch_shown(revision);
            });
            let this = &mut self.hosts[host];
            this.seen = this.seen.max(revision);
        }
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
        let (before, moment) = (self.hosts[host].clients[client], self.moment());
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
                    self.newest[key].began(host, client, moment);
                    self.note("newest", 1);
                }
                let era = match before {
                    Client::Asking { offered: Some((_, era)), .. } => era,
                    _ => self.hosts[host].era,
                };
                self.check_grant(host, key, (sharing, token), era);
                // Beside others, one may end its run while the next one's offer stands.
                if sharing == Sharing::Exclusive {
                    self.check_not_fresh(host, lock, fresh_ms, user, era);
                }
                self.runs.insert((lock, token), (host, user.is_some()));
                self.began.insert((lock, token), (self.now, self.step));
                let unaware_until = self.hosts[host].unaware_until;
                Client::Holding { key, sharing, user, token, unaware_until }
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
                    offered: Some((self.now, self.hosts[host].era)),
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
                // What a host that cannot know that the store went back has seen of the end of a run may come again.
                if let Client::Asking { coalesces: true, .. } = before
                    && outcome != Outcome::Unknown
                    && self.hosts[host].unaware_until <= self.now
                {
                    self.check_batch(lock, token, since);
                }
                if outcome != Outcome::Vanished {
                    assert!(
                        self.ended[key] >= since,
                        "client {client} of host {host} asked for key {key} at {since}, and is told that {token:?} ended \
                         ({outcome}), which was before that"
                    );
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
                // The watch of a host that is cut off or frozen is late, a dead one is noticed late, and each election makes
                // the record seem younger.
                assert!(
                    age <= fresh_ms + 2_000 + 16 * TTL,
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
                    || this.watch.as_ref().is_none_or(|watch| watch.era != self.store.era);
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
                let is_elsewhere = self.newest[key].gives_way(host, client, moment);
                self.note(if is_elsewhere { "superseded from elsewhere" } else { "superseded" }, 1);
                Client::Idle
            }
            NotificationKind::Stop => {
                assert!(matches!(before, Client::Holding { .. }), "one that holds nothing is asked to stop");
                assert_ne!(client, UNSTOPPABLE, "one that may not be stopped is asked to stop");
                let is_elsewhere = self.newest[key].replacing.stops(host, uid_of(client), self.now);
                self.note(if is_elsewhere { "stopped from elsewhere" } else { "stopped" }, 1);
                before
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
            self.newest[key].left(host, client, moment);
        }
        self.hosts[host].clients[client] = after;
    }

    /// Everything works again, and each holder ends: then every client must be answered.
    fn drain(&mut self) {
        self.calm = true;
        for host in &mut self.hosts {
            (host.cut_until, host.only_renews_until, host.frozen_until) = (0, 0, 0);
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

    fn moment(&self) -> Moment {
        Moment { step: self.step, time: self.now }
    }

    fn note(&mut self, what: &'static str, times: u64) {
        *self.seen.entry(what).or_default() += times;
    }
}

impl Host {
    /// Returns `true` if nothing passes between the host and etcd, besides renewals perhaps.
    fn is_cut(&self, now: u64) -> bool {
        self.cut_until.max(self.only_renews_until) > now
    }

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
