//! A smaller world, of clients that say how fresh the work must be, form batches, want only the newest, or have a weight. What
//! they are told is checked against these rules:
//!
//! - Two runs of a fresh key that succeed never begin less than the duration apart.
//! - A coalescing request is followed by a run that began after it, and at most one run is pending.
//! - Of the newest requests at most one waits. The weights of the holders stay within the slots.
//! - A result that is shared is told as fresh only while it is there, and an older one only while another client runs anew. A client
//!   for which an older one will do does not wait.
//! - A client that can run does not wait, and no client waits for ever.

use super::super::rng::Rng;
use super::super::{ClientId, Config, Effects, NotificationKind, Table, Timestamp};
use crate::proto::v2::{LockRequest, Mode, Share};
use crate::proto::{Key, Outcome, Token};

const CLIENTS: usize = 24;
const SLOTS: u32 = 8;
const FRESH_MS: u64 = 400;
/// How old a result may be while another client runs anew.
const STALE_MS: u64 = 4_000;
const USER: u64 = 1;
/// How long an offer stands.
const OFFER_MS: u64 = 1_000;
/// One key for each kind of request.
const KINDS: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Idle,
    Waiting,
    /// It may have the lock if it says so until then. (It may be stopped.)
    Offered {
        until: u64,
    },
    Holding(Token),
}

#[derive(Clone, Copy, Debug)]
struct Client {
    stage: Stage,
    kind: usize,
    weight: u32,
    /// When it asked, counted in steps.
    asked: u64,
    /// When it was granted, in steps and in milliseconds.
    began: u64,
    began_at: u64,
    /// When it was offered the lock, in steps.
    offered: u64,
}

/// A run that is over, by its token.
#[derive(Clone, Copy, Debug)]
struct Run {
    token: Token,
    began: u64,
    began_at: u64,
    outcome: Outcome,
}

struct World {
    rng: Rng,
    table: Table,
    now: u64,
    step: u64,
    clients: Vec<Client>,
    /// Of each kind.
    runs: Vec<Vec<Run>>,
    grants: [u64; KINDS],
    ends_told: [u64; KINDS],
    /// The run whose result is kept.
    result: Option<Run>,
    /// How often an older result was told.
    stale_told: u64,
}

impl World {
    fn new(seed: u64) -> World {
        let config = Config {
            hash_key: seed,
            first_token: Token(1),
            hold_limit: None,
            is_clustered: false,
            remember_max: 10,
        };
        let idle =
            Client { stage: Stage::Idle, kind: 0, weight: 1, asked: 0, began: 0, began_at: 0, offered: 0 };
        World {
            rng: Rng(seed),
            table: Table::new(config),
            now: 1_000,
            step: 0,
            clients: vec![idle; CLIENTS],
            runs: vec![Vec::new(); KINDS],
            grants: [0; KINDS],
            ends_told: [0; KINDS],
            result: None,
            stale_told: 0,
        }
    }

    fn run(mut self, steps: u64) -> ([u64; KINDS], [u64; KINDS], u64) {
        for _ in 0..steps {
            // Time leaps now and then, so that offers end.
            self.now += self.rng.below(20) + if self.rng.percent(1) { OFFER_MS } else { 0 };
            self.apply(|table, now, effects| table.expire(now, effects));
            if self.rng.below(500) == 0
                && let Some(run) = self.result.take()
            {
                self.table.result_dropped(key(4).id(), run.token);
            }
            let client = self.rng.below(CLIENTS as u64) as usize;
            match self.clients[client].stage {
                Stage::Idle => self.ask(client),
                Stage::Holding(_) => self.end(client),
                Stage::Waiting if self.rng.percent(5) => self.disconnect(client),
                Stage::Offered { .. } if self.rng.percent(30) => self.take(client),
                Stage::Offered { .. } if self.rng.percent(3) => self.disconnect(client),
                Stage::Waiting | Stage::Offered { .. } => {}
            }
            self.settle();
        }
        // Every holder ends: every waiter is answered.
        for _ in 0..2 * CLIENTS {
            for client in 0..CLIENTS {
                match self.clients[client].stage {
                    Stage::Holding(_) => self.end(client),
                    Stage::Offered { .. } => self.take(client),
                    Stage::Idle | Stage::Waiting => {}
                }
            }
        }
        assert!(self.clients.iter().all(|client| client.stage == Stage::Idle), "a client waits for ever");
        assert!(self.table.is_empty());
        (self.grants, self.ends_told, self.stale_told)
    }

    fn ask(&mut self, client: usize) {
        let kind = self.rng.below(KINDS as u64) as usize;
        let key = key(kind);
        let queues = self.rng.percent(50);
        let mode = if queues { Mode::Queue } else { Mode::Once };
        let weight = 1 + self.rng.below(SLOTS.into()) as u32;
        let asked = match kind {
            0 => LockRequest { fresh_ms: FRESH_MS, ..LockRequest::new(key, mode) },
            1 => LockRequest::new(key, Mode::Coalesce),
            2 => LockRequest {
                newest: true,
                replace_after_ms: self.rng.percent(30).then(|| self.rng.below(100)),
                ..LockRequest::new(key, Mode::Queue)
            },
            4 => LockRequest {
                share: Some(Share::Whole),
                sharer: USER,
                fresh_ms: FRESH_MS,
                stale_ms: STALE_MS,
                ..LockRequest::new(key, Mode::Once)
            },
            _ => LockRequest {
                slots: SLOTS,
                weight: std::num::NonZeroU32::new(weight),
                ..LockRequest::new(key, Mode::Queue)
            },
        };
        let asked = LockRequest { offers: self.rng.percent(50), ..asked };
        let weight = if kind == 3 { weight } else { 1 };
        let believed = &mut self.clients[client];
        *believed =
            Client { stage: Stage::Waiting, kind, weight, asked: self.step, offered: u64::MAX, ..*believed };
        self.apply(|table, now, effects| {
            table.lock(now, ClientId(client as u32), None, Box::new(asked), effects).unwrap();
        });
    }

    fn end(&mut self, client: usize) {
        if self.rng.percent(20) {
            return self.disconnect(client);
        }
        let outcome = Outcome::Exit(u8::from(self.rng.percent(30)));
        if self.clients[client].kind == 4 && outcome == Outcome::Exit(0) && self.rng.percent(85) {
            self.table.has_result(ClientId(client as u32));
            let Client { stage, began, began_at, .. } = self.clients[client];
            if let Stage::Holding(token) = stage
                && self.now - began_at < STALE_MS
            {
                self.result = Some(Run { token, began, began_at, outcome });
            }
        }
        self.ended(client, outcome);
        self.apply(|table, now, effects| table.release(now, ClientId(client as u32), outcome, effects));
    }

    fn take(&mut self, client: usize) {
        self.clients[client].stage = Stage::Waiting;
        self.apply(|table, now, effects| table.take(now, ClientId(client as u32), effects));
    }

    fn disconnect(&mut self, client: usize) {
        self.ended(client, Outcome::Vanished);
        self.apply(|table, now, effects| table.disconnected(now, ClientId(client as u32), effects));
    }

    /// Takes note of the end of a run, if the client had one.
    fn ended(&mut self, client: usize, outcome: Outcome) {
        let Client { stage, kind, began, began_at, .. } = self.clients[client];
        if let Stage::Holding(token) = stage {
            self.runs[kind].push(Run { token, began, began_at, outcome });
        }
        self.clients[client].stage = Stage::Idle;
    }

    fn settle(&mut self) {
        self.apply(|table, now, effects| {
            if let Some(mark) = table.deferred() {
                table.settle(now, mark, effects);
            }
        });
    }

    fn apply(&mut self, event: impl FnOnce(&mut Table, Timestamp, &mut Effects)) {
        self.step += 1;
        let mut effects = Effects::default();
        event(&mut self.table, Timestamp(self.now), &mut effects);
        for notification in effects.notifications {
            self.told(notification.client.0 as usize, notification.kind);
        }
        self.check();
    }

    fn told(&mut self, client: usize, what: NotificationKind) {
        let Client { kind, asked, .. } = self.clients[client];
        match what {
            NotificationKind::Granted(token) => {
                self.granted(client);
                let now = self.now;
                let believed = &mut self.clients[client];
                (believed.stage, believed.began, believed.began_at) = (Stage::Holding(token), self.step, now);
            }
            NotificationKind::Offered => {
                let (step, until) = (self.step, self.now + OFFER_MS);
                let believed = &mut self.clients[client];
                (believed.stage, believed.offered) = (Stage::Offered { until }, step);
            }
            NotificationKind::Finished(outcome, token) => {
                let run = self.runs[kind].iter().find(|run| run.token == token).expect("it is over");
                assert_eq!(run.outcome, outcome);
                assert!(
                    kind != 1 || run.began > asked,
                    "a coalescing request is told of a run that came before it"
                );
                self.answered(client);
            }
            NotificationKind::Fresh(token) if kind == 4 => {
                let run = self.result.expect("the result is there");
                assert_eq!(run.token, token, "the last result is told");
                let age = self.now - run.began_at;
                let others = self.clients.iter().enumerate().filter(|(other, _)| *other != client);
                let runs_anew =
                    others.map(|(_, other)| other).any(|other| other.kind == 4 && self.excludes(other.stage));
                assert!(age < FRESH_MS || (age < STALE_MS && runs_anew), "a result of {age} ms is told");
                self.stale_told += u64::from(age >= FRESH_MS);
                self.answered(client);
            }
            NotificationKind::Fresh(token) => {
                let run = self.runs[kind].iter().find(|run| run.token == token).expect("it is over");
                assert_eq!((kind, run.outcome), (0, Outcome::Exit(0)), "what failed is not fresh");
                assert!(self.now - run.began_at < FRESH_MS, "an old run is told as fresh");
                self.answered(client);
            }
            NotificationKind::NewerRequest => {
                let is_newer = |other: &Client| other.kind == 2 && other.asked > asked;
                assert!(kind == 2 && self.clients.iter().any(is_newer), "no newer request has come");
                self.answered(client);
            }
            NotificationKind::Stop => assert!(kind == 2 && self.clients[client].stage != Stage::Waiting),
            NotificationKind::Waiting { .. } => {
                let result = self.result.filter(|run| kind == 4 && self.now - run.began_at < STALE_MS);
                assert!(result.is_none(), "a client waits for which a result is there");
            }
            other => panic!("{other:?}"),
        }
    }

    fn answered(&mut self, client: usize) {
        self.ends_told[self.clients[client].kind] += 1;
        self.clients[client].stage = Stage::Idle;
    }

    /// Returns `true` if a client at this stage keeps others from the lock.
    fn excludes(&self, stage: Stage) -> bool {
        match stage {
            Stage::Holding(_) => true,
            Stage::Offered { until } => self.now < until,
            Stage::Idle | Stage::Waiting => false,
        }
    }

    fn granted(&mut self, client: usize) {
        let kind = self.clients[client].kind;
        self.grants[kind] += 1;
        if kind == 0 {
            let last = self.runs[0]
                .iter()
                .filter(|run| run.outcome == Outcome::Exit(0))
                .map(|run| run.began_at)
                .max();
            assert!(last.is_none_or(|last| self.now - last >= FRESH_MS), "a fresh key runs again too early");
        }
        if kind == 4 {
            let is_old = self.result.is_none_or(|run| self.now - run.began_at >= FRESH_MS);
            assert!(is_old, "a client runs although a fresh result is there");
        }
        if kind == 1 {
            let Client { asked, offered, .. } = self.clients[client];
            let in_batch = asked + 1..offered;
            // One that did not take an offer in time has let the others pass.
            let is_next = |other: &Client| other.stage == Stage::Waiting && other.offered == u64::MAX;
            let is_newer =
                |other: &Client| other.kind == 1 && is_next(other) && in_batch.contains(&other.asked);
            assert!(!self.clients.iter().any(is_newer), "of a batch the newest runs");
        }
    }

    fn check(&self) {
        self.table.audit();
        for kind in 0..KINDS {
            let of_kind = self.clients.iter().filter(|client| client.kind == kind);
            let waiting = of_kind.clone().filter(|client| client.stage == Stage::Waiting);
            let held: u32 =
                of_kind.filter(|client| self.excludes(client.stage)).map(|client| client.weight).sum();
            assert!(held <= if kind == 3 { SLOTS } else { 1 }, "more is held than there is");
            if kind == 2 {
                assert!(waiting.clone().count() <= 1, "two of the newest wait");
            }
            let first = waiting.min_by_key(|client| client.asked);
            if let Some(first) = first.filter(|_| self.table.deferred().is_none()) {
                let is_free = if kind == 3 { held + first.weight <= SLOTS } else { held == 0 };
                assert!(!is_free, "the first of kind {kind} waits, and could run");
            }
        }
    }
}

fn key(kind: usize) -> Key {
    Key::new(format!("kind {kind}")).unwrap()
}

#[test]
fn single_flight_keeps_its_promises() {
    for seed in 0..30 {
        let (grants, told, stale) = World::new(seed).run(4_000);
        let least = grants.into_iter().chain(told[..3].iter().copied()).chain([told[4], stale]).min();
        assert!(least > Some(5), "some situation hardly came up with seed {seed}: {grants:?}, {told:?}");
    }
}
