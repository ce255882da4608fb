//! What the clients of a host do: ask, take what is offered, release, or go away.

use super::{CLIENTS, Client, HOSTS, KEYS, UNSTOPPABLE, World, uid_of};
use crate::cluster::{OwnResult, RunUser};
use crate::proto::v2::{LockRequest, Mode, Share};
use crate::proto::{Outcome, Token};
use crate::table::{ClientId, Sharing, Terms, Timestamp};

/// How long an offer stands.
const OFFER_MS: u64 = 1_000;

impl World {
    /// One client of a host does something.
    pub(super) fn act(&mut self, host: usize) {
        let (now, moment) = (Timestamp(self.now), self.moment());
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
                        self.newest[key].left(host, client, moment);
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
    pub(super) fn take(&mut self, host: usize, client: usize) {
        let (now, id) = (Timestamp(self.now), ClientId(client as u32));
        if let Client::Asking { offered, .. } = &mut self.hosts[host].clients[client]
            && let Some((at, _)) = *offered
        {
            self.note(if self.now >= at + OFFER_MS { "taken late" } else { "taken" }, 1);
        }
        let before = self.hosts[host].clients[client];
        self.feed(host, |table, _, effects| table.take(now, id, effects));
        // It was withdrawn.
        if let Client::Asking { offered: was, .. } = before
            && let Client::Asking { offered, .. } = &mut self.hosts[host].clients[client]
            && *offered == was
        {
            *offered = None;
        }
    }

    /// A client releases its lock.
    pub(super) fn release(&mut self, host: usize, client: usize, outcome: Outcome) {
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
                self.newest[key].asks(host, (client, None), self.step);
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
        let replace_after_ms = (newest && self.rng.percent(50)).then(|| self.rng.below(200));
        let since = self.step;
        if newest {
            self.newest[key].asks(host, (client, replace_after_ms.map(|_| uid_of(client))), since);
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
            replace_after_ms,
            share: user.map(|_| Share::Whole),
            sharer: user.unwrap_or_default(),
            ..LockRequest::new(lock, mode)
        };
        self.lock(host, client, asked);
    }

    fn lock(&mut self, host: usize, client: usize, asked: LockRequest) {
        let (now, id) = (Timestamp(self.now), ClientId(client as u32));
        let asked = Box::new(LockRequest { no_replace: client == UNSTOPPABLE, ..asked });
        self.feed(host, |table, _, effects| {
            table.lock(now, id, Some(uid_of(client)), asked, effects).expect("it names no other's request");
        });
    }
}

/// The result of a run that ended so.
fn content(token: Token, outcome: Outcome) -> Vec<u8> {
    let Outcome::Exit(status) = outcome else { unreachable!("no client is killed here") };
    [&token.0.to_be_bytes()[..], &[status]].concat()
}
