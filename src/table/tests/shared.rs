//! The rules of results that are shared.

use super::*;
use crate::proto::v2::Share;

const USER: u64 = 7;
const OTHER: u64 = 8;

fn share(sharer: u64) -> LockRequest {
    LockRequest { share: Some(Share::Whole), fresh_ms: 100, sharer, ..once() }
}

fn stale(sharer: u64) -> LockRequest {
    LockRequest { stale_ms: 1_000, ..share(sharer) }
}

fn told_fresh(client: u32, token: u64) -> (u32, NotificationKind) {
    (client, NotificationKind::Fresh(Token(token)))
}

impl Fixture {
    /// Client 1 runs, and succeeds with a result.
    fn ran(asked: LockRequest) -> Fixture {
        let mut fixture = Fixture::new();
        assert_eq!(fixture.ask(1, asked), [granted(1, 100)]);
        fixture.table.has_result(ClientId(1));
        fixture.release(1, Outcome::Exit(0));
        fixture
    }
}

#[test]
fn a_run_counts_for_a_request_that_shares_only_if_its_result_is_there_for_that_user() {
    let mut fixture = Fixture::ran(share(USER));
    assert_eq!(fixture.ask(2, share(USER)), [told_fresh(2, 100)]);
    assert_eq!(fixture.ask(2, share(OTHER)), [granted(2, 101)]);
    fixture.disconnected(2);
    assert_eq!(fixture.ask(2, LockRequest { share: None, ..share(OTHER) }), [told_fresh(2, 100)]);
    fixture.table.result_dropped(key().id(), Token(100));
    assert_eq!(fixture.ask(2, share(USER)), [granted(2, 102)]);
}

#[test]
fn a_run_without_a_result_counts_for_others_alone() {
    let mut fixture = Fixture::new();
    fixture.ask(1, share(USER));
    fixture.release(1, Outcome::Exit(0));
    assert_eq!(fixture.ask(2, share(USER)), [granted(2, 101)]);
    fixture.disconnected(2);
    assert_eq!(fixture.ask(2, LockRequest { share: None, ..share(USER) }), [told_fresh(2, 100)]);
}

#[test]
fn a_later_run_without_a_result_leaves_the_result_there_until_it_is_forgotten() {
    let mut fixture = Fixture::ran(share(USER));
    fixture.ask(2, share(OTHER));
    fixture.release(2, Outcome::Exit(0));
    assert_eq!(fixture.ask(3, share(USER)), [told_fresh(3, 100)]);
    assert!(fixture.table.forget(key().id(), &mut Effects::default()));
    assert_eq!(fixture.ask(3, share(USER)), [granted(3, 102)]);
}

#[test]
fn a_result_for_every_user_is_for_every_user_but_for_no_stranger() {
    let mut fixture = Fixture::ran(share(EVERY_USER));
    assert_eq!(fixture.ask(2, share(OTHER)), [told_fresh(2, 100)]);
    assert_eq!(fixture.ask(2, share(0)), [granted(2, 101)]);
}

#[test]
fn an_older_result_will_do_for_all_but_the_one_that_runs_anew() {
    let mut fixture = Fixture::ran(stale(USER));
    fixture.now = Timestamp(5_500);
    let asked = stale(USER);
    assert_eq!(
        fixture.table.stale_run(fixture.now, key().id(), &asked).map(|run| run.token),
        Some(Token(100))
    );
    assert_eq!(fixture.ask(2, stale(USER)), [granted(2, 101)], "it runs anew");
    for asked in [stale(USER), LockRequest { nowait: true, ..stale(USER) }] {
        fixture.ask(3, asked);
        assert_eq!(fixture.settle(), [told_fresh(3, 100)]);
    }
    // A request that wants a fresh result waits for it.
    fixture.ask(3, share(USER));
    assert_eq!(fixture.settle(), [waiting(3, 0)]);
    fixture.ask(4, stale(OTHER));
    assert_eq!(fixture.settle(), [waiting(4, 0)]);
    fixture.now = Timestamp(5_999);
    fixture.ask(5, stale(USER));
    assert_eq!(fixture.settle(), [told_fresh(5, 100)]);
    fixture.now = Timestamp(6_000);
    fixture.ask(5, stale(USER));
    assert_eq!(fixture.settle(), [waiting(5, 0)], "it is too old by now");
}
