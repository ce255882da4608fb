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

/// A run on another host.
fn remote_run(token: u64) -> Run {
    Run {
        lock: key().id(),
        token: Token(token),
        began_ms: 5_000,
        counts_for: std::time::Duration::from_millis(1_000),
        outcome: Outcome::Exit(0),
        uid: None,
        by: "".into(),
    }
}

impl Fixture {
    /// The table hears of a run on another host, with its result.
    fn hear_of(&mut self, token: u64, sharer: u64) -> bool {
        let (run, mut effects) = (remote_run(token), Effects::default());
        let is_new = self.table.remote_result_seen(&run, sharer);
        self.table.remote_run_seen(self.now, run, &[], &mut effects);
        is_new
    }
}

#[test]
fn a_result_of_another_host_is_given_until_its_run_is_gone_or_the_store_went_back() {
    type End = fn(&mut Table, &mut Effects);
    let ends: [End; 3] = [
        |table, effects| table.remote_run_gone(key().id(), true, effects),
        |table, effects| table.remote_runs_read(Timestamp(5_000), key().id(), Vec::new(), &[], effects),
        Table::drop_runs,
    ];
    for end in ends {
        let mut fixture = Fixture::new();
        assert!(fixture.hear_of(50, USER));
        assert_eq!(fixture.ask(2, share(USER)), [told_fresh(2, 50)]);
        assert_eq!(fixture.ask(2, share(OTHER)), [granted(2, 100)]);
        fixture.disconnected(2);
        let mut effects = Effects::default();
        end(&mut fixture.table, &mut effects);
        assert_eq!(effects.results_gone, [(key().id(), Token(50))]);
        // A run without a result, which may even have the same token.
        fixture.table.remote_run_seen(fixture.now, remote_run(50), &[], &mut effects);
        assert_eq!(fixture.ask(2, share(USER)), [granted(2, 101)]);
    }
}

#[test]
fn of_two_results_the_newer_one_is_given() {
    let mut fixture = Fixture::new();
    assert!(fixture.hear_of(50, USER));
    assert!(!fixture.hear_of(50, USER), "it is there");
    assert!(fixture.hear_of(60, USER) && !fixture.hear_of(40, USER));
    assert_eq!(fixture.ask(2, share(USER)), [told_fresh(2, 60)]);
    let mut effects = Effects::default();
    fixture.table.result_superseded(key().id(), true, Token(60), &mut effects);
    assert_eq!(effects.results_gone, []);
    fixture.table.result_superseded(key().id(), true, Token(61), &mut effects);
    assert_eq!(effects.results_gone, [(key().id(), Token(60))]);
    assert_eq!(fixture.ask(2, share(USER)), [granted(2, 100)]);
}

#[test]
fn a_result_of_root_alone_is_roots_where_roots_number_stands_for_all() {
    assert!(is_result_for(ROOT_ALONE, EVERY_USER) && is_result_for(EVERY_USER, USER));
    assert!(!is_result_for(ROOT_ALONE, USER) && !is_result_for(USER, EVERY_USER));
}
