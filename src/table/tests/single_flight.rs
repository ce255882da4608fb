//! The rules of runs that count, batches, the newest and weights.

use std::num::NonZeroU32;

use super::*;

fn fresh(millis: u64) -> LockRequest {
    LockRequest { fresh_ms: millis, ..once() }
}

fn coalesce() -> LockRequest {
    LockRequest::new(key(), Mode::Coalesce)
}

fn newest() -> LockRequest {
    LockRequest { newest: true, ..queue() }
}

fn replace(after: u64) -> LockRequest {
    LockRequest { replace_after_ms: Some(after), ..newest() }
}

fn weighted(slots: u32, weight: u32) -> LockRequest {
    LockRequest { slots, weight: NonZeroU32::new(weight), ..queue() }
}

fn told_fresh(client: u32, token: u64) -> (u32, NotificationKind) {
    (client, NotificationKind::Fresh(Token(token)))
}

impl Fixture {
    fn after(&mut self, millis: u64) {
        self.now = self.now.plus(Duration::from_millis(millis));
    }
}

#[test]
fn a_success_counts_from_its_beginning_for_as_long_as_the_request_says() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.ask(1, fresh(1_000)), [granted(1, 100)]);
    fixture.after(600);
    fixture.release(1, Outcome::Exit(0));
    assert_eq!(fixture.ask(2, fresh(1_000)), [told_fresh(2, 100)]);
    assert_eq!(fixture.ask(2, LockRequest { mode: Mode::Queue, ..fresh(1_000) }), [told_fresh(2, 100)]);
    assert_eq!(fixture.ask(2, fresh(500)), [granted(2, 101)], "it began 600 ms ago");
    fixture.disconnected(2);
    fixture.after(399);
    assert_eq!(fixture.ask(3, fresh(1_000)), [told_fresh(3, 100)]);
    fixture.after(1);
    assert_eq!(fixture.ask(3, fresh(1_000)), [granted(3, 102)]);
}

#[test]
fn only_a_success_counts_and_a_failure_does_not_undo_it() {
    let mut fixture = Fixture::new();
    for outcome in [Outcome::Exit(1), Outcome::Signal(9), Outcome::Unknown, Outcome::Vanished] {
        fixture.ask(1, fresh(1_000));
        fixture.release(1, outcome);
        assert!(matches!(fixture.ask(1, fresh(1_000))[..], [(1, NotificationKind::Granted(_))]), "{outcome}");
        fixture.disconnected(1);
    }
    assert_eq!(fixture.ask(1, fresh(1_000)), [granted(1, 108)]);
    fixture.release(1, Outcome::Exit(0));
    fixture.after(10);
    fixture.ask(2, LockRequest { fresh_failure_ms: 50, ..once() });
    fixture.release(2, Outcome::Exit(3));
    assert_eq!(fixture.ask(3, fresh(1_000)), [told_fresh(3, 108)]);
    assert_eq!(fixture.ask(3, LockRequest { fresh_failure_ms: 20, ..once() }), [told_fresh(3, 109)]);
}

#[test]
fn a_run_is_remembered_if_its_holder_or_a_waiter_says_for_how_long() {
    let mut fixture = Fixture::new();
    fixture.ask(1, once());
    fixture.release(1, Outcome::Exit(0));
    assert_eq!(fixture.table.runs(fixture.now).count(), 0, "no request has said so");
    fixture.ask(1, once());
    fixture.ask(2, LockRequest { mode: Mode::Queue, ..fresh(1_000) });
    assert_eq!(
        fixture.release(1, Outcome::Exit(0)),
        [told_fresh(2, 101)],
        "its turn comes, and the work is done"
    );
    assert!(fixture.table.is_empty());
}

#[test]
fn the_oldest_runs_are_forgotten_and_so_is_what_a_user_forgets() {
    let mut fixture = Fixture::new();
    let of = |number: u32| LockRequest {
        fresh_ms: 1_000,
        ..LockRequest::new(Key::new(format!("key {number}")).unwrap(), Mode::Once)
    };
    for number in 1..=4 {
        fixture.ask(number, of(number));
        fixture.release(number, Outcome::Exit(0));
    }
    assert_eq!(fixture.ask(1, of(1)), [granted(1, 104)], "three are remembered");
    assert_eq!(fixture.ask(2, of(2)), [told_fresh(2, 101)]);
    fixture.notified(|table, _, effects| assert!(table.forget(of(2).key.id(), effects)));
    assert_eq!(fixture.ask(2, of(2)), [granted(2, 105)]);
    fixture.after(1_000);
    assert_eq!(fixture.table.runs(fixture.now).count(), 0, "they count no more");
}

#[test]
fn of_a_batch_the_newest_runs_and_the_others_wait_for_that_run() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.ask(1, coalesce()), [granted(1, 100)]);
    for client in 2..=4 {
        assert_eq!(fixture.ask(client, coalesce()), [waiting(client, 0)]);
    }
    fixture.ask(9, once());
    fixture.settle();
    let ended = fixture.release(1, Outcome::Exit(0));
    assert_eq!(ended, [finished(9, Outcome::Exit(0), 100), granted(4, 101)]);
    assert_eq!(fixture.ask(5, coalesce()), [waiting(5, 0)], "that run began before it came");
    let ended = fixture.release(4, Outcome::Exit(7));
    assert_eq!(
        ended,
        [finished(2, Outcome::Exit(7), 101), finished(3, Outcome::Exit(7), 101), granted(5, 102)]
    );
}

#[test]
fn when_the_runner_of_a_batch_vanishes_the_next_newest_runs() {
    let mut fixture = Fixture::new();
    fixture.ask(1, coalesce());
    for client in 2..=4 {
        fixture.ask(client, coalesce());
    }
    fixture.release(1, Outcome::Exit(0));
    assert_eq!(fixture.disconnected(4), [granted(3, 102)]);
    assert_eq!(fixture.release(3, Outcome::Exit(0)), [finished(2, Outcome::Exit(0), 102)]);
}

#[test]
fn a_newer_request_takes_the_place_of_an_older_one_that_waits() {
    let mut fixture = Fixture::new();
    fixture.ask(1, queue());
    fixture.ask(2, newest());
    fixture.ask(3, queue());
    let told = fixture.ask(4, newest());
    assert_eq!(told, [(2, NotificationKind::NewerRequest), waiting(4, 1)]);
    assert_eq!(fixture.release(1, Outcome::Exit(0)), [granted(3, 101)], "a plain request keeps its turn");
    assert_eq!(fixture.release(3, Outcome::Exit(0)), [granted(4, 102)]);
}

#[test]
fn one_that_kept_its_place_from_before_a_restart_gives_way_to_a_newer_one() {
    let mut fixture = Fixture::new();
    fixture.ask(1, queue());
    fixture.ask(2, newest());
    let kept = fixture.ask(3, LockRequest { place: Some(50), ..newest() });
    assert_eq!(kept, [(3, NotificationKind::NewerRequest)]);
    assert_eq!(fixture.release(1, Outcome::Exit(0)), [granted(2, 101)]);
}

#[test]
fn a_holder_that_is_replaced_is_asked_to_stop_and_keeps_the_lock_until_it_has() {
    let mut fixture = Fixture::new();
    fixture.ask(1, queue());
    assert_eq!(fixture.ask(2, replace(0)), [waiting(2, 0), (1, NotificationKind::Stop)]);
    assert_eq!(fixture.release(1, Outcome::Signal(15)), [granted(2, 101)]);
    assert_eq!(fixture.ask(3, replace(500)), [waiting(3, 0)]);
    assert_eq!(fixture.table.next_deadline(), Some(fixture.now.plus(Duration::from_millis(500))));
    fixture.after(500);
    let told = fixture.notified(|table, now, effects| table.expire(now, effects));
    assert_eq!(told, [(2, NotificationKind::Stop)]);
    assert_eq!(fixture.table.next_deadline(), None);
    assert_eq!(fixture.disconnected(2), [granted(3, 102)]);
}

#[test]
fn a_holder_that_may_not_be_replaced_is_not_asked_to_stop() {
    let mut fixture = Fixture::new();
    fixture.ask(1, LockRequest { no_replace: true, ..queue() });
    assert_eq!(fixture.ask(2, replace(0)), [waiting(2, 0)]);
    assert_eq!(fixture.ask(3, replace(0)), [(2, NotificationKind::NewerRequest), waiting(3, 0)]);
}

#[test]
fn the_weights_of_the_holders_stay_within_the_slots_and_a_heavy_waiter_blocks_lighter_ones() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.ask(1, weighted(4, 3)), [granted(1, 100)]);
    assert_eq!(fixture.ask(2, weighted(4, 2)), [waiting(2, 0)]);
    assert_eq!(fixture.ask(3, weighted(4, 1)), [waiting(3, 1)], "it would fit, and came later");
    assert_eq!(fixture.release(1, Outcome::Exit(0)), [granted(2, 101), granted(3, 102)]);
}

#[test]
fn callers_with_a_weight_must_agree_about_the_slots() {
    let mut fixture = Fixture::new();
    fixture.ask(1, weighted(4, 1));
    let refused = NotificationKind::SlotsDiffer { slots: 4, other: Some(ClientId(1)) };
    assert_eq!(fixture.ask(2, weighted(8, 1)), [(2, refused)]);
    assert_eq!(fixture.ask(2, slots(8)), [granted(2, 101)], "without a weight its own number counts");
}
