//! Offers to requests that had to wait.

use super::*;

fn offers(asked: LockRequest) -> LockRequest {
    LockRequest { offers: true, ..asked }
}

fn offered(client: u32) -> (u32, NotificationKind) {
    (client, NotificationKind::Offered)
}

impl Fixture {
    fn take(&mut self, client: u32) -> Vec<(u32, NotificationKind)> {
        self.notified(|table, now, effects| table.take(now, ClientId(client), effects))
    }

    /// A second passes.
    fn expire(&mut self) -> Vec<(u32, NotificationKind)> {
        self.now = self.now.plus(Duration::from_secs(1));
        self.notified(|table, now, effects| table.expire(now, effects))
    }
}

#[test]
fn a_free_lock_is_granted_and_one_that_was_waited_for_is_offered() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.ask(1, offers(queue())), [granted(1, 100)]);
    fixture.ask(2, offers(queue()));
    assert_eq!(fixture.release(1, Outcome::Unknown), [offered(2)]);
    assert_eq!(fixture.ask(3, queue()), [waiting(3, 0)], "the offer is a place among the holders");
    fixture.ask(4, LockRequest { nowait: true, ..queue() });
    assert_eq!(fixture.settle(), [(4, NotificationKind::Busy)]);
    assert_eq!(fixture.take(2), [granted(2, 101)]);
    assert_eq!(fixture.expire(), [], "the offer was taken");
}

#[test]
fn a_client_that_does_not_answer_keeps_its_place() {
    let mut fixture = Fixture::new();
    fixture.ask(1, queue());
    for client in 2..=4 {
        fixture.ask(client, offers(queue()));
    }
    assert_eq!(fixture.release(1, Outcome::Unknown), [offered(2)]);
    assert_eq!(fixture.expire(), [offered(3)]);
    assert_eq!(fixture.take(3), [granted(3, 101)]);
    assert_eq!(fixture.take(2), [waiting(2, 0)], "it is before the one that came later");
    assert_eq!(fixture.release(3, Outcome::Unknown), [offered(2)]);
}

#[test]
fn a_lock_that_is_free_is_granted_to_the_client_that_goes_on() {
    let mut fixture = Fixture::new();
    fixture.ask(1, queue());
    fixture.ask(2, offers(queue()));
    fixture.release(1, Outcome::Unknown);
    assert_eq!(fixture.expire(), []);
    assert_eq!(fixture.table.next_deadline(), None, "there is a timer only while an offer stands");
    assert_eq!(fixture.take(2), [granted(2, 101)]);
}

#[test]
fn a_stopped_once_waiter_is_told_of_the_run_that_another_did() {
    let mut fixture = Fixture::new();
    fixture.ask(1, once());
    fixture.ask(2, offers(once()));
    fixture.ask(3, once());
    fixture.settle();
    assert_eq!(fixture.disconnected(1), [offered(2)]);
    assert_eq!(fixture.expire(), [granted(3, 101)]);
    assert_eq!(fixture.release(3, Outcome::Exit(0)), [finished(2, Outcome::Exit(0), 101)]);
    assert_eq!(fixture.take(2), [], "it says so to no lock");
}

#[test]
fn of_the_newest_a_stopped_one_gives_way() {
    let newest = || offers(LockRequest { newest: true, ..queue() });
    let mut fixture = Fixture::new();
    fixture.ask(1, queue());
    fixture.ask(2, newest());
    assert_eq!(fixture.release(1, Outcome::Unknown), [offered(2)]);
    fixture.expire();
    assert_eq!(fixture.ask(3, newest()), [(2, NotificationKind::NewerRequest), granted(3, 101)]);
}
