//! Time, rng, and clients that ask, release, die and overstay.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use super::super::rng::Rng;
use super::super::{
    ClientId, Config, Effects, Notification, NotificationKind, RequestView, Table, Timestamp,
};
use super::model::{Event, Model, Stage, Wish};
use super::tally::Tally;
use crate::proto::v1::State;
use crate::proto::v2::Mode;
use crate::proto::{LockId, Outcome, Token};

const COLD_KEYS: usize = 1000;
/// How often everything is compared, and not only the locks that a step had to do with.
const STEPS_PER_FULL_CHECK: u64 = 64;
/// How much of the past is shown when an invariant breaks.
const EVENTS_SHOWN: usize = 12;

/// How this world is inclined. Every figure but the first three is a percentage.
struct Odds {
    hot_keys: u64,
    slots_max: u64,
    events_per_settle_max: u64,
    cold: u64,
    v1: u64,
    queue: u64,
    nowait: u64,
    shared: u64,
    exec: u64,
    /// A holder goes without releasing.
    death: u64,
    /// A waiter gives up.
    despair: u64,
    /// A client knows offers.
    offers: u64,
    /// A client that is offered a lock is stopped.
    stopped: u64,
    /// Time leaps.
    leap: u64,
}

impl Odds {
    fn draw(rng: &mut Rng) -> Odds {
        Odds {
            hot_keys: 1 + rng.below(8),
            slots_max: 1 + rng.below(4),
            events_per_settle_max: 1 + rng.below(30),
            cold: rng.below(60),
            v1: rng.below(70),
            queue: rng.below(100),
            nowait: rng.below(40),
            shared: rng.below(80),
            exec: rng.below(30),
            death: rng.below(80),
            despair: rng.below(20),
            offers: 30 + rng.below(70),
            stopped: rng.below(80),
            leap: rng.below(4),
        }
    }
}

pub(super) struct World {
    seed: u64,
    step: u64,
    past: VecDeque<(Timestamp, Event)>,
    rng: Rng,
    odds: Odds,
    now: Timestamp,
    table: Table,
    model: Model,
    /// Which protocol each client speaks, until another comes under its number.
    speaks_v1: Vec<bool>,
    effects: Effects,
}

impl World {
    pub(super) fn new(seed: u64) -> World {
        let mut rng = Rng(seed);
        let odds = Odds::draw(&mut rng);
        let clients = 3 + rng.below(500) as u32;
        let hold_limit = rng.percent(80).then(|| Duration::from_millis(1 + rng.below(2_000)));
        let (hash_key, first_token) = (rng.next_u64(), Token(rng.below(1 << 52)));
        World {
            seed,
            step: 0,
            past: VecDeque::new(),
            now: Timestamp(rng.below(1_000_000)),
            table: Table::new(Config {
                hash_key,
                first_token,
                hold_limit,
                is_clustered: false,
                remember_max: 5,
            }),
            model: Model::new(clients, odds.hot_keys as usize + COLD_KEYS, hold_limit),
            speaks_v1: (0..clients).map(|_| rng.percent(odds.v1)).collect(),
            effects: Effects::default(),
            rng,
            odds,
        }
    }

    /// Lives for so many steps, and then until everybody has an answer.
    pub(super) fn run(mut self, steps: u64) -> Tally {
        let mut until_settle = 0;
        while self.step < steps {
            self.pass_time();
            if until_settle == 0 {
                until_settle = 1 + self.rng.below(self.odds.events_per_settle_max);
                self.act(Event::Settle);
            } else if self.table.next_deadline().is_some_and(|at| at <= self.now) && self.rng.percent(70) {
                self.act(Event::Expire);
            } else {
                until_settle -= 1;
                let event = self.draw_event();
                self.act(event);
            }
        }
        self.drain();
        self.model.seen
    }

    /// No client gives up any more, and every holder ends: then every waiter must be answered.
    fn drain(&mut self) {
        self.act(Event::Settle);
        for _ in 0..=self.model.clients.len() {
            for client in 0..self.model.clients.len() as u32 {
                match self.model.client(client).stage {
                    Stage::Holding(_) => {
                        let event = self.end_of_hold(client);
                        self.act(event);
                    }
                    Stage::Offered | Stage::Stalled => self.act(Event::Take { client }),
                    _ => {}
                }
            }
        }
        assert!(
            self.model.clients.iter().all(|client| client.stage == Stage::Idle),
            "a client waits for ever"
        );
        self.check_everything();
        assert!(self.table.is_empty(), "a lock outlives all requests");
        assert_eq!(self.table.next_deadline(), None, "a deadline outlives all holds");
    }

    fn pass_time(&mut self) {
        let next = self.table.next_deadline().filter(|&at| at > self.now);
        self.now = match next {
            Some(at) if self.rng.percent(1) => Timestamp(at.0 - self.rng.below(2)),
            _ if self.rng.percent(self.odds.leap) => Timestamp(self.now.0 + self.rng.below(3_000)),
            _ => Timestamp(self.now.0 + self.rng.below(3)),
        };
    }

    fn draw_event(&mut self) -> Event {
        if self.rng.percent(2) {
            return Event::Expire;
        }
        let hot = self.rng.below(self.odds.hot_keys) as usize;
        let holders = &self.model.locks[hot].holders;
        // Among hundreds of waiters a holder would hardly ever be drawn, and nothing would move.
        if !holders.is_empty() && self.rng.percent(25) {
            let client = holders[self.rng.below(holders.len() as u64) as usize];
            return match self.model.client(client).stage {
                Stage::Offered => self.answer_offer(client),
                _ => self.end_of_hold(client),
            };
        }
        let client = self.rng.below(self.model.clients.len() as u64) as u32;
        match self.model.client(client).stage {
            Stage::Idle if self.rng.percent(85) => self.ask(client),
            Stage::Holding(_) if self.rng.percent(30) => self.end_of_hold(client),
            Stage::Offered => self.answer_offer(client),
            Stage::Stalled if self.rng.percent(50) => Event::Take { client },
            Stage::Undecided | Stage::Waiting | Stage::Stalled if self.rng.percent(self.odds.despair) => {
                Event::Gone { client }
            }
            Stage::Idle if self.rng.percent(50) => Event::Gone { client },
            Stage::Idle | Stage::Waiting | Stage::Holding(_) if self.rng.percent(10) => {
                Event::Take { client }
            }
            // What only a confused client does, and what must change nothing.
            Stage::Idle | Stage::Undecided | Stage::Waiting | Stage::Stalled => {
                Event::Release { client, outcome: Outcome::Exit(0) }
            }
            Stage::Holding(_) => Event::Expire,
        }
    }

    fn ask(&mut self, client: u32) -> Event {
        let (rng, odds) = (&mut self.rng, &self.odds);
        let cold = rng.percent(odds.cold);
        let key = if cold { odds.hot_keys + rng.below(COLD_KEYS as u64) } else { rng.below(odds.hot_keys) };
        let shared = rng.percent(odds.shared);
        let wish = Wish {
            v1: false,
            mode: if rng.percent(odds.queue) { Mode::Queue } else { Mode::Once },
            shared,
            slots: if shared { 1 } else { 1 + rng.below(odds.slots_max) as u32 },
            nowait: rng.percent(odds.nowait),
            exec: rng.percent(odds.exec),
            offers: rng.percent(odds.offers),
        };
        let wish = if self.speaks_v1[client as usize] { Wish::V1 } else { wish };
        Event::Ask { client, key: key as usize, wish }
    }

    /// Most clients answer an offer; one that is stopped does not, until it is continued.
    fn answer_offer(&mut self, client: u32) -> Event {
        if self.rng.percent(self.odds.stopped) { Event::Expire } else { Event::Take { client } }
    }

    fn end_of_hold(&mut self, client: u32) -> Event {
        if self.rng.percent(self.odds.death) {
            return Event::Gone { client };
        }
        let number = self.rng.below(256) as u8;
        let outcome = match self.rng.below(4) {
            0 => Outcome::Signal(number),
            1 => Outcome::Unknown,
            // Nothing keeps a client from saying so itself.
            2 if number < 32 => Outcome::Vanished,
            _ => Outcome::Exit(number),
        };
        Event::Release { client, outcome }
    }

    /// One step: the event goes into the table and the model, what comes out of the table must please the model.
    fn act(&mut self, event: Event) {
        self.step += 1;
        self.past.push_back((self.now, event));
        if self.past.len() > EVENTS_SHOWN {
            self.past.pop_front();
        }
        self.model.begin(self.now, event);
        let mut effects = std::mem::take(&mut self.effects);
        self.feed(event, &mut effects);
        self.model.record(&effects.record);
        effects.notifications.iter().for_each(|notification| self.model.hear(event, notification));
        self.model.end(event);
        self.check_touched(&effects.notifications);
        if self.step.is_multiple_of(STEPS_PER_FULL_CHECK) {
            self.check_everything();
        }
        if let Event::Gone { client } = event {
            self.speaks_v1[client as usize] = self.rng.percent(self.odds.v1);
        }
        let expired = |notification: Notification| {
            (notification.kind == NotificationKind::Expired).then_some(notification.client.0)
        };
        let closed: Vec<u32> = effects.notifications.drain(..).filter_map(expired).collect();
        effects.record.clear();
        self.effects = effects;
        closed.into_iter().for_each(|client| self.act(Event::Gone { client }));
    }

    fn feed(&mut self, event: Event, effects: &mut Effects) {
        let (table, now) = (&mut self.table, self.now);
        match event {
            Event::Ask { client, key, wish } => {
                let (client, lock) = (ClientId(client), &self.model.locks[key]);
                match wish.v1 {
                    true => table.lock_v1(now, client, lock.id, effects),
                    false => {
                        let asked = Box::new(wish.request(lock.key.clone()));
                        table.lock(now, client, None, asked, effects).expect("it names no other's request");
                    }
                }
            }
            Event::Release { client, outcome } => table.release(now, ClientId(client), outcome, effects),
            Event::Gone { client } => table.disconnected(now, ClientId(client), effects),
            Event::Take { client } => table.take(now, ClientId(client), effects),
            Event::Settle => {
                if let Some(mark) = table.deferred() {
                    table.settle(now, mark, effects);
                }
            }
            Event::Expire => table.expire(now, effects),
        }
    }

    fn check_touched(&self, notifications: &[Notification]) {
        assert_eq!(self.table.deferred().is_some(), !self.model.deferred.is_empty());
        let deadline = self.model.deadlines.first().map(|&(at, _)| at);
        assert_eq!(self.table.next_deadline(), deadline, "the next deadline is wrong");
        notifications.iter().for_each(|notification| self.check_client(notification.client.0));
        self.model.touched.iter().for_each(|&key| self.check_lock(key));
    }

    fn check_everything(&self) {
        (0..self.model.clients.len() as u32).for_each(|client| self.check_client(client));
        (0..self.model.locks.len()).for_each(|key| self.check_lock(key));
        self.check_enumeration();
        self.table.audit();
    }

    fn check_client(&self, client: u32) {
        let believed = self.model.client(client);
        let state = match believed.stage {
            Stage::Idle => State::Idle,
            Stage::Undecided | Stage::Waiting | Stage::Offered | Stage::Stalled => State::Waiting,
            Stage::Holding(_) => State::Owner,
        };
        assert_eq!(self.table.state(ClientId(client)), state, "the state of client {client}");
        let request =
            self.table.request_of(ClientId(client)).map(|(lock, request)| (lock.id(), request.client));
        let asked =
            (state != State::Idle).then(|| (self.model.locks[believed.key].id, Some(ClientId(client))));
        assert_eq!(request, asked, "the request of client {client}");
    }

    /// What a status would show of a lock is what its clients believe.
    fn check_lock(&self, key: usize) {
        let lock = &self.model.locks[key];
        let Some(view) = self.table.find(lock.id) else {
            assert!(lock.is_unused(), "a lock that is in use is not found");
            return;
        };
        assert!(!lock.is_unused(), "a lock is found that no client uses");
        assert_eq!(view.id(), lock.id);
        let is_offered = |client: &u32| self.model.client(*client).stage == Stage::Offered;
        let (offered, holders): (Vec<u32>, Vec<u32>) =
            lock.holders.iter().partition(|client| is_offered(client));
        let waiters = [&offered, &lock.queue, &lock.once, &lock.v1, &lock.stalled];
        let waiters: Vec<u32> = waiters.into_iter().flatten().copied().collect();
        self.check_views(view.holders(), &holders);
        self.check_views(view.waiters(), &waiters);
        assert_eq!(view.holding() as usize, holders.len(), "the count of holders");
        assert_eq!(view.waiting() as usize, waiters.len() + lock.undecided.len(), "the count of waiters");
        let told = holders.iter().chain(&waiters).any(|&client| !self.model.client(client).wish.v1);
        assert_eq!(view.key(), told.then_some(lock.key.as_str()), "the key that is shown");
    }

    fn check_views<'a>(&self, shown: impl Iterator<Item = RequestView<'a>>, believed: &[u32]) {
        let mut believed = believed.iter();
        for view in shown {
            let ClientId(number) = view.client.expect("no client resumes here");
            assert_eq!(Some(&number), believed.next(), "another client is shown");
            let client = self.model.client(number);
            let token = match client.stage {
                Stage::Holding(token) => Some(token),
                _ => None,
            };
            assert_eq!(
                (view.held.map(|held| held.token), view.since),
                (token, client.since),
                "of client {number}"
            );
            let shown = view.asked.map(|asked| (asked.mode, asked.shared, asked.slots, asked.exec));
            let Wish { v1, mode, shared, slots, exec, .. } = client.wish;
            assert_eq!(shown, (!v1).then_some((mode, shared, slots, exec)), "of client {number}");
        }
        assert_eq!(believed.next(), None, "a client is not shown");
    }

    fn check_enumeration(&self) {
        let mut shown = BTreeSet::<LockId>::new();
        let mut cursor = 0;
        while let Some((view, next)) = self.table.next_lock(cursor) {
            assert!(shown.insert(view.id()), "a lock is shown twice");
            cursor = next;
        }
        let used = self.model.locks.iter().filter(|lock| !lock.is_unused());
        assert!(
            shown.into_iter().eq(used.map(|lock| lock.id).collect::<BTreeSet<_>>()),
            "a lock is not shown"
        );
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let World { seed, step, past, .. } = self;
            eprintln!("\nseed {seed} broke at step {step}. The last events:");
            past.iter().for_each(|(now, event)| eprintln!("  {:>8} {event:?}", now.0));
            eprintln!("Replay it: KMUTEX_SIM_SEED={seed} cargo test simulation");
        }
    }
}
