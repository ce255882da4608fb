//! What disturbs the hosts and etcd.

use super::{Client, HOSTS, Host, KEYS, ONLY_RENEWS_MAX, TTL, World};
use crate::cluster::Revision;
use crate::cluster::simulation::store::Store;
use crate::proto::Token;

/// How long etcd takes to start, at the most.
const START_MAX: u64 = 100;

impl World {
    pub(super) fn trouble(&mut self) {
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
                self.newest[key].forget_order(self.step);
            }
            8..10 => {
                self.note("compacted", 1);
                self.store.compact();
            }
            20..24 => self.earlier = (self.store.clone(), self.now),
            142..144 => self.busy_until = self.now + self.rng.below(TTL),
            40..140 => self.recent = (self.store.clone(), self.now),
            24..26 => self.go_back(),
            140..142 => {
                self.note("restarted", 1);
                let era = self.store.era + 1;
                self.store.era = era;
                self.restart(self.now);
            }
            144..146 => self.hosts[host].only_renews_until = self.now + self.rng.below(ONLY_RENEWS_MAX),
            146..152 => self.go_back_unseen(),
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

    /// etcd is started anew, with the store as it was at `taken`. That ends the watches, except that a host which is cut off may not
    /// hear of it.
    fn restart(&mut self, taken: u64) {
        let now = self.now;
        self.newest.iter_mut().for_each(|requests| requests.replacing.restarted(taken, now));
        for host in &mut self.hosts {
            let is_cut = host.is_cut(now);
            if let Some(watch) = &mut host.watch
                && !watch.is_dead
                && is_cut
                && self.rng.percent(70)
            {
                let news = self.store.watch(&mut watch.position);
                watch.on_its_way = news.unwrap_or_default().to_vec();
                watch.is_dead = true;
                *self.seen.entry("dead watch").or_default() += 1;
            }
        }
        self.store.restart(now + self.rng.below(START_MAX), TTL);
    }

    /// The store goes back: to what it was some time ago, or to nothing.
    fn go_back(&mut self) {
        let kind = self.rng.below(10);
        let (earlier, taken) = match kind {
            0..2 => (Store::default(), self.now),
            2..6 => self.earlier.clone(),
            _ => self.recent.clone(),
        };
        if earlier.revision() != self.store.revision() {
            self.note(if kind < 2 { "emptied" } else { "rolled back" }, 1);
            // Then it may overtake what the hosts have seen.
            self.busy_until = self.now + self.rng.below(2) * TTL / 2;
            self.go_back_to(earlier, taken);
        }
    }

    /// The store goes back to where the lease of a host lives and something that it holds is not there, and overtakes what the host
    /// saw. Meanwhile its clients go on, and only renewals pass between it and etcd.
    fn go_back_unseen(&mut self) {
        let choices =
            (0..HOSTS).flat_map(|host| [&self.earlier, &self.recent].map(|earlier| (host, earlier)));
        let choices = choices.filter(|(host, (earlier, _))| loses_unseen(&self.hosts[*host], earlier));
        let choices: Vec<(usize, &(Store, u64))> = choices.collect();
        if choices.is_empty() {
            return;
        }
        let (host, earlier) = choices[self.rng.below(choices.len() as u64) as usize];
        let (earlier, taken) = earlier.clone();
        let this = &mut self.hosts[host];
        this.only_renews_until = self.now + ONLY_RENEWS_MAX;
        this.quiet_until = this.only_renews_until;
        self.note("went back unseen", 1);
        self.busy_until = self.now + TTL / 2;
        self.go_back_to(earlier, taken);
    }

    fn go_back_to(&mut self, earlier: Store, taken: u64) {
        let target = earlier.revision();
        let until = self.now + TTL;
        for host in &mut self.hosts {
            let last = host.last_added.as_ref().map_or(Revision(0), |(revision, ..)| *revision);
            if host.seen.min(last) <= target {
                host.unaware_until = until;
            }
        }
        let step = self.step;
        self.newest.iter_mut().for_each(|requests| requests.forget_order(step));
        self.restart(taken);
        let down_until = self.store.down_until;
        self.store.go_back_to(earlier);
        self.store.restart(down_until, TTL);
        self.tokens.fill(Token(0));
        self.ended.fill(self.step);
        self.occupied.fill(self.step);
    }
}

/// Returns `true` if the lease of a host lives in this store, and something that the host holds is not there.
fn loses_unseen(host: &Host, earlier: &Store) -> bool {
    let is_new = |token: Token| token.0 as i64 > earlier.revision().0;
    let loses = |client: &Client| matches!(*client, Client::Holding { token, .. } if is_new(token));
    let lives = host.lease.as_ref().is_some_and(|lease| earlier.leases.contains_key(lease));
    lives && host.clients.iter().any(loses)
}
