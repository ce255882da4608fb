//! The rules one by one, for reading. That they hold together is `simulation.rs`'s to show.

mod nested;
mod offers;
mod resume;
mod several;
mod shared;
mod single_flight;

use super::*;
use crate::proto::Key;
use crate::proto::v2::Mode;
use std::time::Duration;

const KEY: &str = "nightly";
const LIMIT: Duration = Duration::from_secs(30);

/// A table and a clock that stands still unless a test moves it. Every call returns what clients are told by it.
struct Fixture {
    table: Table,
    now: Timestamp,
}

impl Fixture {
    fn new() -> Fixture {
        Fixture {
            table: Table::new(Config {
                hash_key: 1,
                first_token: Token(100),
                hold_limit: Some(LIMIT),
                is_clustered: false,
                remember_max: 3,
            }),
            now: Timestamp(5_000),
        }
    }

    fn notified(
        &mut self,
        call: impl FnOnce(&mut Table, Timestamp, &mut Effects),
    ) -> Vec<(u32, NotificationKind)> {
        let mut effects = Effects::default();
        call(&mut self.table, self.now, &mut effects);
        let notified =
            effects.notifications.into_iter().map(|Notification { client, kind, .. }| match kind {
                // Places have a test of their own.
                NotificationKind::Waiting { ahead, .. } => waiting(client.0, ahead),
                what => (client.0, what),
            });
        notified.collect()
    }

    fn v1(&mut self, client: u32) -> Vec<(u32, NotificationKind)> {
        self.notified(|table, now, effects| table.lock_v1(now, ClientId(client), key().id(), effects))
    }

    fn ask(&mut self, client: u32, asked: LockRequest) -> Vec<(u32, NotificationKind)> {
        self.notified(|table, now, effects| {
            table
                .lock(now, ClientId(client), None, Box::new(asked), effects)
                .expect("it names no other's request");
        })
    }

    fn release(&mut self, client: u32, outcome: Outcome) -> Vec<(u32, NotificationKind)> {
        self.notified(|table, now, effects| table.release(now, ClientId(client), outcome, effects))
    }

    fn disconnected(&mut self, client: u32) -> Vec<(u32, NotificationKind)> {
        self.notified(|table, now, effects| table.disconnected(now, ClientId(client), effects))
    }

    fn settle(&mut self) -> Vec<(u32, NotificationKind)> {
        self.notified(|table, now, effects| {
            if let Some(mark) = table.deferred() {
                table.settle(now, mark, effects);
            }
        })
    }
}

fn key() -> Key {
    Key::new(KEY).unwrap()
}

fn once() -> LockRequest {
    LockRequest::new(key(), Mode::Once)
}

fn queue() -> LockRequest {
    LockRequest::new(key(), Mode::Queue)
}

fn shared() -> LockRequest {
    LockRequest { shared: true, ..queue() }
}

fn slots(slots: u32) -> LockRequest {
    LockRequest { slots, ..queue() }
}

fn granted(client: u32, token: u64) -> (u32, NotificationKind) {
    (client, NotificationKind::Granted(Token(token)))
}

fn waiting(client: u32, ahead: u32) -> (u32, NotificationKind) {
    (client, NotificationKind::Waiting { ahead, place: 0 })
}

fn finished(client: u32, outcome: Outcome, token: u64) -> (u32, NotificationKind) {
    (client, NotificationKind::Finished(outcome, Token(token)))
}

#[test]
fn a_lock_that_is_held_and_no_more_is_small() {
    assert!(size_of::<Lock>() <= 56, "a lock takes {} bytes", size_of::<Lock>());
    assert!(size_of::<Request>() <= 88, "a request takes {} bytes", size_of::<Request>());
}

#[test]
fn both_protocols_ask_for_the_same_lock() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.v1(1), [granted(1, 100)]);
    assert_eq!(fixture.ask(2, queue()), [waiting(2, 0)]);
    assert_eq!(fixture.release(1, Outcome::Unknown), [granted(2, 101)]);
}

#[test]
fn a_release_tells_its_waiters_and_moves_the_queue_on_by_one() {
    let mut fixture = Fixture::new();
    fixture.ask(1, once());
    fixture.ask(2, once());
    assert_eq!(fixture.settle(), [waiting(2, 0)]);
    fixture.v1(3);
    fixture.ask(4, queue());
    assert_eq!(fixture.ask(5, queue()), [waiting(5, 1)]);
    let exit = Outcome::Exit(3);
    assert_eq!(fixture.release(1, exit), [finished(3, exit, 100), finished(2, exit, 100), granted(4, 101)]);
}

#[test]
fn a_refusal_waits_until_everything_pending_is_processed() {
    let nowait = || LockRequest { nowait: true, ..queue() };
    let mut fixture = Fixture::new();
    fixture.ask(1, once());
    assert_eq!(fixture.ask(2, nowait()), []);
    assert_eq!(fixture.ask(3, nowait()), []);
    assert_eq!(fixture.release(1, Outcome::Exit(0)), []);
    assert_eq!(fixture.settle(), [granted(2, 101), (3, NotificationKind::Busy)]);
    assert_eq!(fixture.table.state(ClientId(3)), State::Idle);
}

#[test]
fn a_once_waiter_is_not_told_of_a_release_that_came_before_it_waited() {
    let mut fixture = Fixture::new();
    fixture.ask(1, once());
    fixture.ask(2, once());
    assert_eq!(fixture.release(1, Outcome::Exit(0)), []);
    assert_eq!(fixture.settle(), [granted(2, 101)]);
}

#[test]
fn a_vanished_holder_is_succeeded_by_the_oldest_waiter_alone() {
    let mut fixture = Fixture::new();
    fixture.ask(1, once());
    fixture.v1(2);
    fixture.ask(3, once());
    fixture.ask(4, once());
    fixture.settle();
    fixture.ask(5, queue());
    assert_eq!(fixture.disconnected(1), [finished(2, Outcome::Vanished, 100), granted(3, 101)]);
    let exit = Outcome::Exit(0);
    assert_eq!(fixture.release(3, exit), [finished(4, exit, 101), granted(5, 102)]);
}

#[test]
fn a_vanished_holder_is_succeeded_by_the_head_of_the_queue_when_that_is_older() {
    let mut fixture = Fixture::new();
    fixture.ask(1, once());
    fixture.ask(2, queue());
    fixture.ask(3, once());
    fixture.settle();
    assert_eq!(fixture.disconnected(1), [granted(2, 101)]);
}

#[test]
fn an_exec_holders_end_counts_as_unknown() {
    let mut fixture = Fixture::new();
    fixture.ask(1, LockRequest { exec: true, ..once() });
    fixture.ask(2, once());
    fixture.settle();
    assert_eq!(fixture.disconnected(1), [finished(2, Outcome::Unknown, 100)]);
}

#[test]
fn a_shared_request_does_not_overtake_a_queued_exclusive_one() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.ask(1, shared()), [granted(1, 100)]);
    assert_eq!(fixture.ask(2, shared()), [granted(2, 101)]);
    assert_eq!(fixture.ask(3, queue()), [waiting(3, 0)]);
    assert_eq!(fixture.ask(4, shared()), [waiting(4, 1)]);
    assert_eq!(fixture.release(1, Outcome::Exit(0)), []);
    assert_eq!(fixture.release(2, Outcome::Exit(0)), [granted(3, 102)]);
}

#[test]
fn a_queued_exclusive_request_that_is_given_up_holds_back_no_other() {
    let mut fixture = Fixture::new();
    fixture.ask(1, shared());
    fixture.ask(2, queue());
    fixture.ask(3, shared());
    fixture.ask(4, shared());
    assert_eq!(fixture.disconnected(2), [granted(3, 101), granted(4, 102)]);
}

#[test]
fn slots_let_so_many_in() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.ask(1, slots(2)), [granted(1, 100)]);
    assert_eq!(fixture.ask(2, slots(2)), [granted(2, 101)]);
    assert_eq!(fixture.ask(3, slots(2)), [waiting(3, 0)]);
    assert_eq!(fixture.disconnected(1), [granted(3, 102)]);
}

#[test]
fn an_exclusive_holder_is_alone_however_many_slots_others_ask_for() {
    let mut fixture = Fixture::new();
    fixture.ask(1, queue());
    assert_eq!(fixture.ask(2, slots(4)), [waiting(2, 0)]);
    assert_eq!(fixture.release(1, Outcome::Exit(0)), [granted(2, 101)]);
    assert_eq!(fixture.v1(3), [waiting(3, 0)]);
}

#[test]
fn only_a_protocol_1_hold_expires() {
    let mut fixture = Fixture::new();
    fixture.ask(1, queue());
    assert_eq!(fixture.table.next_deadline(), None);
    fixture.release(1, Outcome::Exit(0));

    fixture.v1(2);
    fixture.ask(3, queue());
    let deadline = fixture.now.plus(LIMIT);
    assert_eq!(fixture.table.next_deadline(), Some(deadline));
    fixture.now = Timestamp(deadline.0 - 1);
    assert_eq!(fixture.notified(Table::expire), []);
    fixture.now = deadline;
    assert_eq!(fixture.notified(Table::expire), [(2, NotificationKind::Expired), granted(3, 102)]);
    assert_eq!(fixture.table.next_deadline(), None);
}

#[test]
fn a_lock_is_forgotten_with_its_last_request() {
    let mut fixture = Fixture::new();
    fixture.ask(1, once());
    fixture.ask(2, once());
    fixture.release(1, Outcome::Exit(0));
    assert!(!fixture.table.is_empty(), "an undecided request keeps it");
    fixture.disconnected(2);
    assert!(fixture.table.is_empty());
    assert!(fixture.table.find(key().id()).is_none());
}
