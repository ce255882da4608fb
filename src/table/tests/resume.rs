//! The rules of holds that outlive the daemon's knowledge of their holder.

use std::num::NonZeroU32;

use super::*;
use crate::proto::Nonce;

const NONCE: Nonce = Nonce(0xfeed);
const UID: Option<u32> = Some(1000);

impl Fixture {
    fn ask_as(
        &mut self,
        client: u32,
        uid: Option<u32>,
        asked: LockRequest,
    ) -> Result<Vec<(u32, NotificationKind)>, NonceMismatch> {
        let mut result = Ok(());
        let notified = self.notified(|table, now, effects| {
            result = table.lock(now, ClientId(client), uid, Box::new(asked), effects);
        });
        result.map(|()| notified)
    }

    fn restore(&mut self, held: HoldState) -> bool {
        self.table.restore(Timestamp(0), held)
    }

    fn orphan_ended(&mut self, token: u64) -> Vec<(u32, NotificationKind)> {
        self.notified(|table, now, effects| table.orphan_ended(now, Token(token), effects))
    }
}

/// A hold as the journal tells of it.
fn held(token: u64) -> HoldState {
    let terms = Terms::from(&queue());
    HoldState { lock: key().id(), token: Token(token), terms, nonce: Some(NONCE), uid: UID, until: None }
}

fn resuming(token: u64) -> LockRequest {
    LockRequest { nonce: Some(NONCE), holds: Some(Token(token)), ..queue() }
}

#[test]
fn a_restored_hold_is_held_until_it_is_resumed_and_released() {
    let mut fixture = Fixture::new();
    assert!(fixture.restore(held(7)));
    assert_eq!(fixture.ask(2, queue()), [waiting(2, 0)]);
    assert_eq!(fixture.ask_as(1, UID, resuming(7)), Ok(vec![granted(1, 7)]));
    assert_eq!(fixture.orphan_ended(7), [], "it is no orphan any more");
    assert_eq!(fixture.release(1, Outcome::Exit(0)), [granted(2, 100)]);
}

#[test]
fn a_restored_hold_whose_process_ends_has_vanished() {
    let mut fixture = Fixture::new();
    fixture.restore(held(7));
    fixture.ask(1, once());
    fixture.ask(2, once());
    fixture.settle();
    assert_eq!(
        fixture.orphan_ended(7),
        [granted(1, 100)],
        "one of the waiters, and not a word to the others"
    );
    assert_eq!(fixture.ask_as(3, UID, resuming(7)), Ok(vec![(3, NotificationKind::Lost(Loss::Unknown))]));
}

#[test]
fn a_restored_hold_of_a_client_that_became_its_command_ends_with_an_outcome() {
    let mut fixture = Fixture::new();
    let terms = Terms { exec: true, ..held(7).terms };
    fixture.restore(HoldState { terms, ..held(7) });
    fixture.ask(1, once());
    fixture.settle();
    assert_eq!(fixture.orphan_ended(7), [finished(1, Outcome::Unknown, 7)]);
}

#[test]
fn a_restored_hold_with_a_limit_ends_then_unless_it_is_resumed() {
    let until = Timestamp(9_000);
    let mut fixture = Fixture::new();
    fixture.restore(HoldState { until: Some(until), ..held(7) });
    fixture.ask(2, queue());
    fixture.now = until;
    assert_eq!(fixture.notified(Table::expire), [granted(2, 100)]);

    let mut fixture = Fixture::new();
    fixture.restore(HoldState { until: Some(until), ..held(7) });
    fixture.ask_as(1, UID, resuming(7)).unwrap();
    assert_eq!(fixture.table.next_deadline(), None);
}

#[test]
fn an_orphan_may_be_given_less_time_and_never_more() {
    let mut fixture = Fixture::new();
    fixture.restore(held(7));
    fixture.table.limit_orphan(Token(7), Timestamp(9_000));
    assert_eq!(fixture.table.next_deadline(), Some(Timestamp(9_000)));
    fixture.table.limit_orphan(Token(7), Timestamp(20_000));
    assert_eq!(fixture.table.next_deadline(), Some(Timestamp(9_000)));
    fixture.table.limit_orphan(Token(8), Timestamp(1));
    assert_eq!(fixture.table.next_deadline(), Some(Timestamp(9_000)));
    assert_eq!(fixture.ask_as(1, UID, resuming(7)), Ok(vec![granted(1, 7)]));
    assert_eq!(fixture.table.next_deadline(), None);
}

#[test]
fn of_two_holds_that_cannot_be_together_only_the_first_is_restored() {
    let mut fixture = Fixture::new();
    let mut restore = |token, asked: LockRequest, nonce| {
        let terms = Terms::from(&asked);
        fixture.restore(HoldState { terms, nonce: Some(Nonce(nonce)), ..held(token) })
    };
    assert!(restore(1, shared(), 1));
    assert!(restore(2, shared(), 2));
    assert!(!restore(3, queue(), 3));
    assert!(!restore(4, slots(2), 4));
}

#[test]
fn a_hold_is_resumed_only_by_whose_it_is_and_as_what_it_is() {
    let mut fixture = Fixture::new();
    fixture.restore(held(7));
    let other_key = LockRequest { key: Key::new("weekly").unwrap(), ..resuming(7) };
    for (uid, asked) in [(Some(1001), resuming(7)), (None, resuming(7)), (UID, resuming(8)), (UID, other_key)]
    {
        assert_eq!(fixture.ask_as(1, uid, asked), Err(NonceMismatch));
    }
    assert_eq!(fixture.ask_as(1, UID, resuming(7)), Ok(vec![granted(1, 7)]));
}

#[test]
fn a_second_connection_takes_over_from_the_first() {
    let mut fixture = Fixture::new();
    let asked = LockRequest { nonce: Some(NONCE), ..queue() };
    fixture.ask_as(1, UID, asked).unwrap();
    assert_eq!(
        fixture.ask_as(2, UID, resuming(100)),
        Ok(vec![(1, NotificationKind::Superseded), granted(2, 100)])
    );
    assert_eq!(fixture.disconnected(1), [], "it has no request any more");
    fixture.ask(3, queue());
    assert_eq!(fixture.release(2, Outcome::Exit(0)), [granted(3, 101)]);
}

#[test]
fn a_detached_hold_goes_on_without_its_client() {
    let mut fixture = Fixture::new();
    fixture.ask(1, queue());
    fixture.ask(2, queue());
    fixture.table.detach(ClientId(1));
    assert_eq!(fixture.disconnected(1), []);
    fixture.table.detach(ClientId(2));
    assert_eq!(fixture.orphan_ended(100), [granted(2, 101)], "one that only waits cannot be detached");
}

#[test]
fn clients_that_waited_before_come_before_later_ones() {
    let mut fixture = Fixture::new();
    fixture.restore(held(7));
    fixture.ask(10, queue());
    // In the order of their places, not of their arrival, and before new clients.
    for (client, place) in [(12, 22), (11, 21)] {
        fixture.ask(client, LockRequest { place: Some(place), nonce: Some(Nonce(place.into())), ..queue() });
    }
    assert_eq!(fixture.orphan_ended(7), [granted(11, 100)]);
    assert_eq!(fixture.disconnected(11), [granted(12, 101)]);
    assert_eq!(fixture.disconnected(12), [granted(10, 102)]);
}

#[test]
fn a_lock_that_is_broken_is_the_next_ones() {
    let mut fixture = Fixture::new();
    fixture.ask(1, shared());
    fixture.ask(2, shared());
    fixture.ask(3, queue());
    let notified = fixture.notified(|table, now, effects| table.break_lock(now, key().id(), effects));
    assert_eq!(
        notified,
        [
            (1, NotificationKind::Lost(Loss::Broken)),
            (2, NotificationKind::Lost(Loss::Broken)),
            granted(3, 100 + 2)
        ]
    );
    assert_eq!(fixture.release(1, Outcome::Exit(0)), [], "it holds nothing");
    let unheard_of = Key::new("weekly").unwrap().id();
    assert_eq!(fixture.notified(|table, now, effects| table.break_lock(now, unheard_of, effects)), []);
}

/// A journal is not trusted: its checksum may be right, and its content absurd.
#[test]
fn a_restored_hold_leaves_nothing_behind_whatever_its_journal_says() {
    let absurd = Terms { slots: u32::MAX, weight: NonZeroU32::new(u32::MAX), ..held(7).terms };
    let limited = HoldState { until: Some(Timestamp::NEVER), ..held(7) };
    let heavy = |token| HoldState { terms: absurd, nonce: None, ..held(token) };
    let of_protocol_1 = HoldState { terms: Terms::V1, nonce: None, ..held(7) };
    for holds in [vec![limited], vec![heavy(7), heavy(8)], vec![of_protocol_1]] {
        let mut fixture = Fixture::new();
        for &hold in &holds {
            assert!(fixture.restore(hold), "{hold:?}");
            fixture.table.audit();
        }
        assert_eq!(fixture.table.next_deadline(), None);
        for hold in &holds {
            fixture.orphan_ended(hold.token.0);
            fixture.table.audit();
        }
        assert!(fixture.table.is_empty());
        // A request under a lock that has ended is like any other.
        let nested = LockRequest { within: Some(Token(7)), ..queue() };
        assert_eq!(fixture.ask_as(1, UID, nested), Ok(vec![granted(1, 100)]));
    }
}

#[test]
fn a_holder_that_is_back_is_asked_to_stop_for_its_users_request_on_another_host() {
    for (user, is_asked) in [(UID, true), (Some(0), true), (Some(1001), false), (None, false)] {
        let mut fixture = Fixture::new();
        fixture.restore(held(7));
        let told = fixture.notified(|table, _, effects| table.replaced_for(key().id(), user, effects));
        assert_eq!(told, [], "it is not here");
        let mut expected = vec![granted(1, 7)];
        expected.extend(is_asked.then_some((1, NotificationKind::Stop)));
        assert_eq!(fixture.ask_as(1, UID, resuming(7)), Ok(expected), "{user:?}");
        let told = fixture.notified(|table, _, effects| table.replaced_for(key().id(), user, effects));
        assert_eq!(told, [], "it has been told");
    }
}
