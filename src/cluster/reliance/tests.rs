//! One host, of which each renewal and each answer is given by hand: which renewals count.

use std::collections::BTreeSet;

use super::super::{Cluster, Entry, Failure, LeaseName, QueueOp, QueueSnapshot, Revision, WatchEvent};
use super::{LOCKS_MAX, PresenceRequest, Renewal};
use crate::proto::v2::{LockRequest, Mode};
use crate::proto::{Key, LockId, Token};
use crate::table::{self, ClientId, Effects, HoldState, NotificationKind, Table, Terms, Timestamp};

const LEASE: &str = "7";
/// How long after it was sent a renewal is good.
const GOOD_MS: u64 = 7_500;

struct Host {
    table: Table,
    cluster: Cluster,
    effects: Effects,
    now: u64,
    /// The store's revision.
    revision: i64,
    clients: u32,
}

impl Host {
    /// A host with a lease and a watch.
    fn new() -> Host {
        let mut host = Host::without_lease();
        host.renew();
        host.open_watch();
        host
    }

    fn without_lease() -> Host {
        let config = table::Config {
            remember_max: 10,
            hash_key: 1,
            first_token: Token(1_000_000),
            hold_limit: None,
            is_clustered: true,
        };
        let (table, cluster) = (Table::new(config), Cluster::new(1, Timestamp(1)));
        Host { table, cluster, effects: Effects::default(), now: 1_000, revision: 100, clients: 0 }
    }

    /// The lease is renewed as it is while nothing is wrong. Returns until when that is good.
    fn renew(&mut self) -> u64 {
        assert!(!self.renew_with(true), "there is nothing wrong with the watch");
        self.now + GOOD_MS
    }

    /// The lease is renewed after an interruption. Returns until when that may be good.
    fn renew_late(&mut self) -> u64 {
        assert!(self.renew_with(false), "the watch must be opened anew");
        self.now + GOOD_MS
    }

    fn renew_with(&mut self, is_prompt: bool) -> bool {
        let good_until = Timestamp(self.now + GOOD_MS);
        let (lease, revision) = (LeaseName(LEASE.into()), Revision(self.revision));
        self.cluster.leased(
            &self.table,
            Timestamp(self.now),
            Renewal { lease, good_until, revision, is_prompt },
        )
    }

    fn open_watch(&mut self) {
        self.cluster.watch_opened(&mut self.table, Revision(self.revision));
    }

    /// Polls, and returns the one request that is due.
    fn poll(&mut self) -> (LockId, u64, QueueOp) {
        let now = Timestamp(self.now);
        self.cluster.poll(&mut self.table, now, &mut self.effects);
        let [request] = &self.cluster.take_requests()[..] else { panic!("one request is due") };
        (request.lock, request.id, request.op.clone())
    }

    fn ask(&mut self, key: &str) {
        let (now, id) = (Timestamp(self.now), ClientId(self.clients));
        self.clients += 1;
        let asked = Box::new(LockRequest::new(Key::new(key).unwrap(), Mode::Queue));
        self.table.lock(now, id, None, asked, &mut self.effects).unwrap();
        self.effects.notices.drain(..).for_each(|notice| self.cluster.notify(notice));
    }

    /// A client asks for a lock, and the store makes a place for it.
    fn acquire(&mut self, key: &str) -> (LockId, u64, QueueSnapshot) {
        self.ask(key);
        let (lock, id, mut op) = self.poll();
        self.revision += 1;
        let owner = op.owner_mut().cloned();
        let (QueueOp::TryAcquire { entry_key, .. } | QueueOp::Enqueue { entry_key, .. }) = op else {
            panic!("{op:?}")
        };
        let revision = Revision(self.revision);
        let entries = vec![Entry { entry_key, revision, owner }];
        (lock, id, QueueSnapshot { revision, entries, ..QueueSnapshot::default() })
    }

    fn answer(&mut self, lock: LockId, id: u64, answer: Result<QueueSnapshot, Failure>) {
        let now = Timestamp(self.now);
        self.cluster.answered(&mut self.table, now, (lock, id), answer, &mut self.effects);
    }

    /// A client gets a lock, and the watch shows it.
    fn hold(&mut self, key: &str) -> (LockId, Token) {
        let (lock, id, snapshot) = self.acquire(key);
        let entry = snapshot.entries[0].clone();
        self.answer(lock, id, Ok(snapshot));
        let event = (lock, entry.revision, WatchEvent::Added(entry));
        self.cluster.watch_event(&mut self.table, Timestamp(self.now), event, &mut self.effects);
        self.cluster.watch_shown(Revision(self.revision));
        self.cluster.poll(&mut self.table, Timestamp(self.now), &mut self.effects);
        let token = self.table.held_here(lock).next().expect("it is granted");
        (lock, token)
    }

    /// Returns the requests to read what is held.
    fn reads(&mut self) -> Vec<PresenceRequest> {
        self.cluster.take_presence_requests()
    }

    fn read_is(&mut self, id: u64, there: Option<&[(LockId, Token)]>) {
        let there = there.map(|there| there.iter().copied().collect::<BTreeSet<_>>());
        self.cluster.presence_answered(&mut self.table, Timestamp(self.now), (id, there), &mut self.effects);
    }

    fn good_until(&self) -> Option<u64> {
        self.cluster.good_until().map(|until| until.0)
    }

    fn has_lost(&mut self) -> bool {
        self.effects.notifications.drain(..).any(|told| matches!(told.kind, NotificationKind::Lost(_)))
    }
}

/// A host that holds one lock, whose store has gone back while the host was cut off, and has overtaken since: the watch may have
/// died without a sign. Returns until when the host relied on its lock before.
fn overtaken() -> (Host, (LockId, Token), u64) {
    let mut host = Host::new();
    let held = host.hold("k");
    let good_until = host.renew();
    host.now += 5_000;
    host.revision += 10;
    (host, held, good_until)
}

#[test]
fn while_the_watch_shows_everything_a_renewal_counts_without_a_request() {
    let mut host = Host::new();
    host.hold("k");
    for _ in 0..3 {
        host.now += 3_333;
        let until = host.renew();
        assert_eq!((host.good_until(), host.reads()), (Some(until), vec![]));
    }
}

#[test]
fn after_an_interruption_a_renewal_counts_when_what_is_held_was_read_since() {
    let (mut host, held, before) = overtaken();
    let until = host.renew_late();
    assert_eq!(host.good_until(), Some(before), "the renewal alone says nothing");
    let [PresenceRequest { id, locks }] = &host.reads()[..] else { panic!("one request") };
    assert_eq!(*locks, [held.0]);
    // What is relied on begins with the request for the renewal, and not with this answer.
    host.now += 700;
    host.read_is(*id, Some(&[held]));
    assert_eq!(host.good_until(), Some(until));
    assert!(!host.has_lost());
}

#[test]
fn what_a_store_that_has_overtaken_has_no_more_is_lost_at_once() {
    let (mut host, (lock, _), before) = overtaken();
    host.renew_late();
    let [PresenceRequest { id, .. }] = host.reads()[..] else { panic!("one request") };
    // Another host has a place there.
    host.read_is(id, Some(&[]));
    assert!(host.has_lost());
    assert!(!host.table.is_held_here(lock));
    assert!(host.good_until() >= Some(before), "nothing is held that it would be wrong for");
}

#[test]
fn a_host_that_is_cut_off_again_does_not_rely_on_the_renewal() {
    let (mut host, held, before) = overtaken();
    host.renew_late();
    let [PresenceRequest { id, .. }] = host.reads()[..] else { panic!("one request") };
    host.read_is(id, None);
    assert_eq!(host.good_until(), Some(before));
    // An answer to the request that was given up is of no use.
    host.read_is(id, Some(&[held]));
    assert_eq!(host.good_until(), Some(before));
    // The next renewal is read for again.
    host.now += 500;
    let until = host.renew_late();
    let [PresenceRequest { id, .. }] = host.reads()[..] else { panic!("one request") };
    host.read_is(id, Some(&[held]));
    assert_eq!(host.good_until(), Some(until));
}

#[test]
fn a_watch_that_has_not_shown_the_revision_of_the_renewal_shows_nothing() {
    let (mut host, held, before) = overtaken();
    // The cut fell between two renewals.
    let until = host.renew();
    assert_eq!(host.good_until(), Some(before));
    let [PresenceRequest { id, .. }] = host.reads()[..] else { panic!("one request") };
    host.read_is(id, Some(&[held]));
    assert_eq!(host.good_until(), Some(until));
}

#[test]
fn a_watch_that_was_opened_anew_shows_nothing_before_what_is_held_was_read() {
    let (mut host, held, before) = overtaken();
    host.cluster.watch_ended(Timestamp(host.now));
    host.open_watch();
    host.renew();
    assert_eq!((host.good_until(), host.reads().len()), (Some(before), 1));
    let (lock, id, op) = host.poll();
    assert_eq!((lock, op), (held.0, QueueOp::Read));
    let entry_key = LeaseName(LEASE.into()).entry_key(1);
    let entry = Entry { entry_key, revision: Revision(held.1.0 as i64), owner: None };
    let revision = Revision(host.revision);
    host.answer(lock, id, Ok(QueueSnapshot { revision, entries: vec![entry], ..QueueSnapshot::default() }));
    assert_eq!(host.good_until(), Some(before), "the queue may have been read before the renewal");
    host.now += 3_333;
    // One that the watch shows counts before the read for the one before is answered.
    let until = host.renew();
    assert_eq!(host.good_until(), Some(until));
}

#[test]
fn a_renewal_that_comes_while_another_is_read_for_is_read_for_next() {
    let (mut host, held, _) = overtaken();
    let first = host.renew_late();
    let [PresenceRequest { id, .. }] = host.reads()[..] else { panic!("one request") };
    host.now += 500;
    let second = host.renew();
    assert_eq!(host.reads(), [], "one after the other");
    host.read_is(id, Some(&[held]));
    assert_eq!(host.good_until(), Some(first), "the read was sent before the second renewal");
    let [PresenceRequest { id, .. }] = host.reads()[..] else { panic!("one request") };
    host.read_is(id, Some(&[held]));
    assert_eq!(host.good_until(), Some(second));
}

#[test]
fn many_holds_are_read_in_chunks_and_the_renewal_counts_after_the_last() {
    let mut host = Host::new();
    let held: Vec<_> = (0..=LOCKS_MAX).map(|number| host.hold(&format!("key {number}"))).collect();
    let before = host.renew();
    host.now += 5_000;
    let until = host.renew_late();
    let reads = host.reads();
    let mut sizes: Vec<usize> = reads.iter().map(|read| read.locks.len()).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [1, LOCKS_MAX]);
    for (number, read) in reads.iter().enumerate() {
        assert_eq!(host.good_until(), Some(before), "after {number} answers");
        let its: Vec<_> = held.iter().filter(|(lock, _)| read.locks.contains(lock)).copied().collect();
        host.read_is(read.id, Some(&its));
    }
    assert_eq!(host.good_until(), Some(until));
    assert!(!host.has_lost());
}

#[test]
fn a_lease_that_was_resumed_is_not_relied_on_before_what_is_held_was_read() {
    let mut host = Host::without_lease();
    let (lock, token) = (Key::new("k").unwrap().id(), Token(90));
    let held = HoldState { lock, token, terms: Terms::V1, nonce: None, uid: None, until: None };
    assert!(host.table.restore(Timestamp(1), held));
    let until = host.renew();
    assert_eq!(host.good_until(), None);
    let [PresenceRequest { id, .. }] = host.reads()[..] else { panic!("one request") };
    // What another client asks for waits so long.
    host.open_watch();
    let (other, ask, snapshot) = host.acquire("other");
    host.answer(other, ask, Ok(snapshot));
    host.cluster.poll(&mut host.table, Timestamp(host.now), &mut host.effects);
    assert!(!host.table.is_held_here(other), "granted without a lease that can be relied on");
    host.read_is(id, Some(&[(lock, token)]));
    host.cluster.poll(&mut host.table, Timestamp(host.now), &mut host.effects);
    assert_eq!(host.good_until(), Some(until));
    assert!(host.table.is_held_here(lock) && host.table.is_held_here(other));
}

#[test]
fn an_answer_to_a_request_from_before_the_watch_was_opened_grants_nothing() {
    let mut host = Host::new();
    let (lock, id, snapshot) = host.acquire("k");
    // The store goes back, and has reached the same revision again when the watch is opened.
    host.cluster.watch_ended(Timestamp(host.now));
    host.open_watch();
    host.answer(lock, id, Ok(snapshot));
    assert_eq!(host.poll().2, QueueOp::Read);
    assert!(!host.table.is_held_here(lock));
}
