//! What must be true when a client is told something, and after each step.

use super::{Client, Host, Watch, World};
use crate::cluster::FoundResult;
use crate::cluster::queue::LockQueue;
use crate::proto::{LockId, Outcome, Token};
use crate::table::{Sharing, Verdict};

impl World {
    /// Checks that the other clients that can believe, with reason, that they hold the lock admit this one. `era`: of the store
    /// that the host knew when it granted or offered it.
    pub(super) fn check_grant(
        &mut self,
        host: usize,
        key: usize,
        (sharing, token): (Sharing, Token),
        era: u64,
    ) {
        let mut beside = Vec::new();
        for (number, other) in self.hosts.iter().enumerate() {
            let is_good = other.cluster.good_until().is_some_and(|until| until.0 > self.now)
                && (number == host || self.hosts[host].unaware_until <= self.now);
            let holds = other.clients.iter().filter_map(|client| match client {
                // Nor does it count what a host granted that could not know that the store went back.
                Client::Holding { key: of, sharing, unaware_until, .. } if *of == key => {
                    Some(*sharing).filter(|_| number == host || *unaware_until <= self.now)
                }
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
        let until = self.hosts[host].cluster.good_until();
        assert!(until.is_some_and(|until| until.0 > self.now), "given without a lease");
        // An offer may stand since before the store went back, which the host has not noticed yet.
        if era == self.store.era {
            assert_eq!(before, None, "given beside another program's hold");
            // An offer of a shared lock may be taken after a later place was granted.
            let may_be_lower = sharing != Sharing::Exclusive;
            assert!(may_be_lower || token > self.tokens[key], "tokens do not grow");
            self.tokens[key] = token.max(self.tokens[key]);
        }
        self.note(with, 1);
    }

    /// Checks that no run is repeated that counts for a request. For one that wants a result, a run without does not count.
    pub(super) fn check_not_fresh(
        &self,
        host: usize,
        lock: LockId,
        fresh_ms: u64,
        user: Option<u64>,
        era: u64,
    ) {
        if user.is_some() {
            return;
        }
        let Some((token, counts_for)) = self.store.last_success(lock) else { return };
        let (age, counts_for) = (self.now - self.began[&(lock, token)].0, counts_for.min(fresh_ms));
        // A host that has not noticed yet that the store went back knows what was true before.
        let is_open = self.hosts[host].watch.as_ref().is_some_and(|watch| watch.era == self.store.era);
        if is_open && era == self.store.era {
            assert!(age >= counts_for, "a run that began {age} ms ago is repeated");
        }
    }

    /// Checks that of all hosts one newest request waits, when every host knows all.
    pub(super) fn check_newest(&self) {
        let length = self.store.history_length();
        let knows_all = |host: &Host| {
            let sees_all =
                |watch: &Watch| watch.era == self.store.era && !watch.is_dead && watch.position == length;
            host.watch.as_ref().is_some_and(sees_all)
                && host.flights.is_empty()
                && host.lease.is_some()
                && !host.is_cut(self.now)
                && host.frozen_until <= self.now
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
    pub(super) fn check_batch(&mut self, lock: LockId, token: Token, since: u64) {
        self.note("batch", 1);
        let mut runs = self.began.range((lock, token)..=(lock, Token(u64::MAX)));
        assert!(runs.any(|(_, &(_, step))| step >= since), "no run began since step {since}, when it asked");
    }

    /// Checks that a client which shares results is told the outcome and the result of one run.
    pub(super) fn check_result(
        &mut self,
        host: usize,
        (lock, token): (LockId, Token),
        outcome: Outcome,
        user: u64,
    ) {
        let Some(FoundResult { result, .. }) = self.hosts[host].found.get(&token) else {
            let is_own = self.runs.get(&(lock, token)).is_some_and(|(by, _)| *by == host);
            assert!(is_own, "the daemon has not heard whether there is a result");
            return;
        };
        let content = result.as_ref().map(|result| (result.sharer, result.content.as_deref()));
        let Some((sharer, Ok(content))) = content else {
            let later = self.began.range((lock, Token(token.0 + 1))..=(lock, Token(u64::MAX))).next();
            let has_shared = self.runs.get(&(lock, token)).is_some_and(|(_, shares)| *shares);
            // In a store that went back, a later run may have a lower token.
            let must_be_there = self.calm && self.store.era == 0 && has_shared && later.is_none();
            assert!(!must_be_there, "the result of {token:?} is not found");
            return self.note("no result", 1);
        };
        let (of, ended) = read_content(content);
        assert_eq!(ended, outcome, "told the result of {of:?} with the outcome of {token:?}");
        assert!(of >= token, "told the result of a run before the one that it waited for");
        self.note(if sharer == user { "result" } else { "another user's result" }, 1);
    }
}

fn read_content(content: &[u8]) -> (Token, Outcome) {
    let (token, status) = content.split_at(8);
    (Token(u64::from_be_bytes(token.try_into().unwrap())), Outcome::Exit(status[0]))
}
