//! The library, as a program uses it that takes its locks itself.

use kmutex::addr::Addr;
use kmutex::client::{Client, Error, LockOptions, LockReply};
use kmutex::proto::Outcome;
use std::time::Duration;

use crate::harness::{Daemon, Process, wait_until};

fn client(daemon: &Daemon) -> Client {
    Client::connect(&Addr::Unix(daemon.sock())).unwrap()
}

#[test]
fn a_client_gets_the_lock_or_is_told_that_another_had_it() {
    let daemon = Daemon::start();
    let mut mine = client(&daemon);
    let first = mine.lock("page").unwrap().expect("it is free");
    let first_token = first.token();
    daemon.wait_for_counts("page", 1, 0);

    std::thread::scope(|scope| {
        let other = scope.spawn(|| client(&daemon).lock("page").unwrap().is_none());
        daemon.wait_for_counts("page", 1, 1);
        first.release().unwrap();
        assert!(other.join().unwrap(), "the work is done");
    });
    let second = mine.lock("page").unwrap().expect("it is free again");
    assert!(second.token() > first_token);
}

#[test]
fn a_guard_that_is_dropped_releases() {
    let daemon = Daemon::start();
    let mut mine = client(&daemon);
    drop(mine.lock("page").unwrap());
    let mut other = client(&daemon);
    assert!(other.lock("page").unwrap().is_some());
}

#[test]
fn without_a_guard_the_caller_releases() {
    let daemon = Daemon::start();
    let mut mine = client(&daemon);
    let token = mine.acquire("page").unwrap();
    assert!(token.is_some() && mine.is_locked());
    assert!(matches!(mine.acquire("another"), Err(Error::AlreadyHolding)));
    assert!(mine.is_locked(), "it still holds the first");
    mine.release().unwrap();
    assert!(!mine.is_locked());
    mine.release().unwrap();
    assert!(matches!(mine.acquire(""), Err(Error::Key(_))));
}

#[test]
fn when_a_client_is_dropped_a_waiter_takes_over() {
    let daemon = Daemon::start();
    let mut mine = client(&daemon);
    mine.acquire("page").unwrap();
    let mut run = Process::spawn(&mut daemon.run(&["page", "true"]));
    daemon.wait_for_counts("page", 1, 1);
    drop(mine);
    assert_eq!(run.wait(), 0);
}

#[test]
fn a_lock_outlives_the_daemon() {
    let mut daemon = Daemon::start();
    let mut mine = client(&daemon);
    let token = mine.acquire("page").unwrap();
    daemon.restart(&[]);
    assert_eq!(daemon.status()[0]["holders"][0]["orphan"], true);
    wait_until("the lock to be resumed", || {
        mine.check().unwrap();
        daemon.status()[0]["holders"][0]["orphan"].is_null()
    });
    assert_eq!(daemon.status()[0]["holders"][0]["token"], token.unwrap().0);
    mine.release().unwrap();
    assert!(daemon.status().is_empty());
}

#[test]
fn a_release_that_finds_no_daemon_is_made_good_later() {
    let mut daemon = Daemon::start();
    let mut mine = client(&daemon);
    mine.acquire("page").unwrap();
    daemon.kill();
    assert!(matches!(mine.release(), Err(Error::Closed)));
    daemon.restart(&[]);
    assert!(mine.acquire("page").unwrap().is_some());
}

#[test]
fn a_lock_that_the_new_daemon_does_not_know_is_lost() {
    let mut daemon = Daemon::start();
    let mut mine = client(&daemon);
    mine.acquire("page").unwrap();
    daemon.kill();
    std::fs::remove_file(daemon.folder().join("sock.journal")).unwrap();
    daemon.restart(&[]);
    wait_until("the loss to be told", || matches!(mine.check(), Err(Error::Lost(_))));
}

#[test]
fn one_that_does_not_reconnect_is_told_that_the_daemon_is_gone() {
    let mut daemon = Daemon::start();
    let mut mine = client(&daemon);
    mine.set_reconnect(false);
    daemon.restart(&[]);
    assert!(matches!(mine.acquire("page"), Err(Error::Closed)));
    assert!(matches!(mine.acquire("page"), Err(Error::Closed)));
    mine.set_reconnect(true);
    assert!(mine.acquire("page").unwrap().is_some());
}

#[test]
fn what_a_program_finishes_counts_for_later_requests() {
    let daemon = Daemon::start();
    let options = LockOptions { fresh: Duration::from_secs(3600), ..LockOptions::default() };
    let mut mine = client(&daemon);
    let lock = mine.lock_with("page", &options).unwrap().expect("it is free");
    lock.finish(Outcome::Exit(0)).unwrap();
    match mine.lock_with("page", &options).unwrap() {
        Err(LockReply::Fresh(run)) => assert_eq!(run.outcome, Outcome::Exit(0)),
        other => panic!("{other:?}"),
    }
    assert!(!mine.is_locked());
    assert!(mine.lock("page").unwrap().is_some(), "without fresh, the lock is free");
    let mut other = client(&daemon);
    let hold = mine.lock("busy").unwrap();
    let never = LockOptions { wait: Some(Duration::ZERO), ..LockOptions::default() };
    assert!(matches!(other.lock_with("busy", &never), Ok(Err(LockReply::Busy(_)))));
    drop(hold);
}
