//! The rules of requests that are made under another lock.

use super::*;

fn of(key: &str) -> LockRequest {
    LockRequest::new(Key::new(key).unwrap(), Mode::Queue)
}

fn within(token: u64, key: &str) -> LockRequest {
    LockRequest { within: Some(Token(token)), ..of(key) }
}

fn deadlock(client: u32, within: u64) -> (u32, NotificationKind) {
    (client, NotificationKind::Deadlock(Token(within)))
}

#[test]
fn a_lock_that_is_held_above_is_refused_at_once_in_every_mode() {
    let mut fixture = Fixture::new();
    fixture.ask(1, of("a"));
    fixture.ask(2, within(100, "b"));
    for asked in [
        within(100, "a"),
        within(101, "a"),
        LockRequest { mode: Mode::Once, ..within(101, "a") },
        LockRequest { nowait: true, ..within(101, "a") },
    ] {
        assert_eq!(fixture.ask(3, asked), [(3, NotificationKind::HeldAbove)]);
    }
    assert_eq!(fixture.ask(3, within(99, "a")), [waiting(3, 0)], "a token that is not above");
}

#[test]
fn the_request_that_closes_a_cycle_of_two_is_refused_and_no_other() {
    let mut fixture = Fixture::new();
    fixture.ask(1, of("a"));
    fixture.ask(2, of("b"));
    assert_eq!(fixture.ask(3, within(100, "b")), [waiting(3, 0)]);
    assert_eq!(fixture.ask(4, within(101, "a")), [deadlock(4, 101)]);
    // The one that is refused can release what it holds.
    assert_eq!(fixture.release(2, Outcome::Exit(75)), [granted(3, 102)]);
}

#[test]
fn a_cycle_of_three_with_a_lock_in_between_is_seen_and_told() {
    let mut fixture = Fixture::new();
    fixture.ask(1, of("a"));
    fixture.ask(2, of("b"));
    fixture.ask(3, of("c"));
    // Under b runs d, and under d a client waits for c.
    fixture.ask(4, within(101, "d"));
    fixture.ask(5, within(103, "c"));
    fixture.ask(6, within(100, "b"));
    assert_eq!(fixture.ask(7, within(102, "a")), [deadlock(7, 102)]);
    let id = |key: &str| Key::new(key).unwrap().id();
    let cycle = fixture.table.cycle(Token(102), id("a")).unwrap();
    let steps = [("a", 100), ("b", 101), ("d", 103), ("c", 102)];
    assert_eq!(cycle, steps.map(|(key, token)| (id(key), Token(token))));
    assert_eq!(fixture.table.cycle(Token(102), id("unheard of")), None);
}

#[test]
fn a_once_request_is_refused_when_it_would_begin_to_wait() {
    let mut fixture = Fixture::new();
    fixture.ask(1, of("a"));
    fixture.ask(2, of("b"));
    fixture.ask(3, within(100, "b"));
    assert_eq!(fixture.ask(4, LockRequest { mode: Mode::Once, ..within(101, "a") }), []);
    assert_eq!(fixture.settle(), [deadlock(4, 101)]);
    assert_eq!(fixture.ask(5, LockRequest { nowait: true, ..within(101, "a") }), []);
    assert_eq!(
        fixture.settle(),
        [(5, NotificationKind::Busy)],
        "one that does not wait cannot wait for ever"
    );
}

#[test]
fn what_is_over_is_in_no_cycle() {
    let mut fixture = Fixture::new();
    fixture.ask(1, of("a"));
    fixture.ask(2, of("b"));
    fixture.ask(3, within(100, "b"));
    assert_eq!(fixture.disconnected(3), []);
    assert_eq!(fixture.ask(4, within(101, "a")), [waiting(4, 0)]);
    assert_eq!(fixture.release(1, Outcome::Exit(0)), [granted(4, 102)]);
    assert!(fixture.table.cycle(Token(101), Key::new("a").unwrap().id()).is_none());
    fixture.disconnected(4);
    fixture.disconnected(2);
    assert!(fixture.table.is_empty());
}

#[test]
fn a_token_of_another_user_closes_no_cycle() {
    let mut fixture = Fixture::new();
    let mut ask = |client: u32, uid: u32, asked: LockRequest| {
        fixture.notified(|table, now, effects| {
            table.lock(now, ClientId(client), Some(uid), Box::new(asked), effects).unwrap();
        })
    };
    ask(1, 1001, of("a"));
    ask(2, 1002, of("b"));
    // User 1003 names the token of user 1001, as if the holder of "a" waited for "b".
    assert_eq!(ask(3, 1003, within(100, "b")), [waiting(3, 0)]);
    assert_eq!(ask(4, 1002, within(101, "a")), [waiting(4, 0)], "nothing waits for user 1002");
    assert_eq!(ask(5, 1003, within(100, "a")), [waiting(5, 1)], "user 1003 does not hold it");
    // The user who holds the token, and root (as in `kmutex run a -- sudo kmutex run a`), may name it.
    assert_eq!(ask(6, 1001, within(100, "a")), [(6, NotificationKind::HeldAbove)]);
    assert_eq!(ask(7, 0, within(100, "a")), [(7, NotificationKind::HeldAbove)]);
}
