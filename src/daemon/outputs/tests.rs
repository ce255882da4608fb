//! That outputs are bounded, and given to the right clients only.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::*;
use crate::output::{Output, Stream};
use crate::proto::Outcome;
use crate::proto::v2::OutputAt;
use crate::table::{EVERY_USER, Run};

fn outputs(bytes_max: u64, descriptors_max: usize) -> Outputs {
    Outputs::new(bytes_max, descriptors_max)
}

fn file(bytes: &[u8], is_sealed: bool) -> OwnedFd {
    let mut file = OutputFile::new().unwrap();
    file.append(Stream::Stdout, bytes).unwrap();
    if is_sealed {
        file.seal().unwrap();
    }
    file.for_readers().unwrap()
}

fn run(lock: u8, token: u64) -> Run {
    Run {
        lock: LockId([lock; 16]),
        token: Token(token),
        began_ms: 0,
        counts_for: Duration::from_millis(100),
        outcome: Outcome::Exit(0),
        uid: Some(5),
        by: "".into(),
    }
}

/// A run that ends at 10 with so long an output.
fn ran(outputs: &mut Outputs, lock: u8, token: u64, bytes: usize) -> Vec<Dropped> {
    let mut dropped = outputs.add_file(Token(token), 6, Some(file(&vec![0; bytes], true)));
    assert!(outputs.complete(Token(token)));
    assert_eq!(outputs.hold_ended(Token(token)), []);
    dropped.extend(outputs.keep(&run(lock, token), Timestamp(10)));
    outputs.all_told();
    dropped
}

fn is_kept(outputs: &Outputs, token: u64) -> bool {
    let kept = outputs.kept.get(&Token(token));
    kept.is_some_and(|kept| outputs.of_kept(kept.lock, Token(token), 6, true).descriptor.is_some())
}

#[test]
fn the_oldest_goes_when_there_are_too_many_bytes_or_descriptors() {
    let mut outputs = outputs(250, 4);
    assert_eq!(ran(&mut outputs, 1, 1, 92), []);
    assert_eq!(ran(&mut outputs, 2, 2, 92), []);
    assert_eq!(ran(&mut outputs, 3, 3, 92), [(LockId([1; 16]), Token(1))]);
    assert!(!is_kept(&outputs, 1) && is_kept(&outputs, 2) && is_kept(&outputs, 3));
    assert_eq!(ran(&mut outputs, 4, 4, 300), [(LockId([4; 16]), Token(4))], "it is too long by itself");
    assert!(is_kept(&outputs, 2) && is_kept(&outputs, 3));
    assert_eq!(ran(&mut outputs, 5, 5, 0), []);
    assert_eq!(ran(&mut outputs, 6, 6, 0), []);
    assert_eq!(ran(&mut outputs, 7, 7, 0), [(LockId([2; 16]), Token(2))]);
}

#[test]
fn holders_alone_are_bounded_too() {
    let mut outputs = outputs(1000, 2);
    for token in 1..=3 {
        outputs.add_file(Token(token), 6, Some(file(b"x", true)));
    }
    assert!(outputs.complete(Token(2)));
    assert!(!outputs.complete(Token(3)), "there is no descriptor for it");
}

#[test]
fn a_kept_output_ends_with_its_time_or_with_a_newer_one() {
    let mut outputs = outputs(1000, 9);
    ran(&mut outputs, 1, 1, 5);
    ran(&mut outputs, 2, 2, 5);
    assert_eq!(ran(&mut outputs, 1, 3, 5), [(LockId([1; 16]), Token(1))]);
    assert!(!is_kept(&outputs, 1) && is_kept(&outputs, 3));
    assert_eq!(outputs.next_deadline(), Some(Timestamp(100)));
    assert_eq!(outputs.expire(Timestamp(99)), []);
    assert!(is_kept(&outputs, 2));
    assert_eq!(outputs.expire(Timestamp(100)).len(), 2);
    assert!(outputs.is_empty() && outputs.kept_bytes == 0 && outputs.next_deadline().is_none());
}

#[test]
fn only_a_sealed_file_in_memory_is_a_result() {
    let mut outputs = outputs(1000, 9);
    outputs.add_file(Token(1), 6, Some(file(b"x", false)));
    outputs.add_file(Token(2), 6, Some(std::io::pipe().unwrap().0.into()));
    outputs.add_file(Token(3), 6, Some(std::fs::File::open("/").unwrap().into()));
    outputs.add_file(Token(4), 6, None);
    for token in 1..=4 {
        assert!(!outputs.complete(Token(token)), "{token}");
        assert!(matches!(outputs.of_run(Token(token), 6, true).at, OutputAt::Withheld(_)));
    }
}

#[test]
fn a_result_is_its_users_own() {
    let mut outputs = outputs(1000, 9);
    let (root, user, other) = (EVERY_USER, 6, 8);
    outputs.add_file(Token(1), user, Some(file(b"x", true)));
    outputs.add_file(Token(2), root, Some(file(b"x", true)));
    let gets =
        |outputs: &Outputs, token, sharer| outputs.of_run(Token(token), sharer, true).descriptor.is_some();
    assert!(gets(&outputs, 1, user) && !gets(&outputs, 1, other) && !gets(&outputs, 1, root));
    assert!(gets(&outputs, 2, user) && gets(&outputs, 2, other), "root gives its results to all");
}

fn from_elsewhere(token: u64, run: Option<Run>) -> RemoteResult {
    let content = Ok(output::row(&[(Stream::Stdout, vec![7; 100])]).into());
    RemoteResult { token: Token(token), sharer: 6, content, run }
}

#[test]
fn a_result_of_another_host_is_there_until_the_waiters_are_told_or_its_run_counts_no_more() {
    let mut outputs = outputs(1000, 9);
    let now = Timestamp(10);
    outputs.add_remote(from_elsewhere(1, None), now);
    assert!(outputs.of_run(Token(1), 6, true).descriptor.is_some());
    assert_eq!(outputs.of_run(Token(1), 6, false).pieces.len(), 1);
    assert!(outputs.of_run(Token(1), 7, true).descriptor.is_none());
    outputs.all_told();
    assert!(matches!(outputs.of_run(Token(1), 6, true).at, OutputAt::Withheld(_)));
    outputs.add_remote(from_elsewhere(2, Some(run(1, 2))), now);
    outputs.all_told();
    assert!(is_kept(&outputs, 2));
    outputs.drop_result(LockId([2; 16]), Token(2));
    assert!(is_kept(&outputs, 2), "that is another lock");
    outputs.drop_result(LockId([1; 16]), Token(2));
    assert!(outputs.is_empty());
}

#[test]
fn a_result_for_which_there_is_no_room_is_given_once() {
    let mut outputs = outputs(50, 9);
    let dropped = outputs.add_remote(from_elsewhere(2, Some(run(1, 2))), Timestamp(10));
    assert_eq!(dropped, [(LockId([1; 16]), Token(2))]);
    assert!(outputs.of_kept(LockId([1; 16]), Token(2), 6, true).descriptor.is_some());
    assert!(outputs.of_kept(LockId([1; 16]), Token(2), 7, true).descriptor.is_none());
    outputs.all_told();
    assert!(outputs.of_kept(LockId([1; 16]), Token(2), 6, true).descriptor.is_none());
}

#[test]
fn a_result_that_names_the_token_of_another_run_takes_the_place_of_none() {
    let mut outputs = outputs(1000, 9);
    outputs.add_file(Token(1), 6, Some(file(b"holder's", true)));
    outputs.add_remote(from_elsewhere(1, None), Timestamp(10));
    assert_eq!(outputs.for_other_hosts(Token(1)).unwrap().unwrap().len(), 8 + 8);
    ran(&mut outputs, 2, 5, 30);
    outputs.add_remote(from_elsewhere(5, Some(run(3, 5))), Timestamp(10));
    assert_eq!(outputs.kept[&Token(5)].bytes, 38);
    assert!(outputs.of_kept(LockId([3; 16]), Token(5), 6, true).descriptor.is_none());
}

#[test]
fn other_hosts_are_given_short_outputs_and_the_reasons_why_not() {
    let mut outputs = outputs(1000, 9);
    let given = |outputs: &Outputs, token| outputs.for_other_hosts(Token(token));
    outputs.add_file(Token(1), 6, Some(file(&vec![7; SENT_BYTES_MAX], true)));
    outputs.add_file(Token(2), 6, Some(file(&vec![7; SENT_BYTES_MAX + 1], true)));
    outputs.add_file(Token(3), 6, Some(file(&vec![7; 20 * SENT_BYTES_MAX], true)));
    outputs.withhold(Token(4), 6, "because".into());
    let row = given(&outputs, 1).unwrap().unwrap();
    assert_eq!(Output::from_bytes(row).read(Stream::Stdout).unwrap(), vec![7; SENT_BYTES_MAX]);
    for token in [2, 3] {
        assert!(given(&outputs, token).unwrap().unwrap_err().as_str().contains("longer than 64 KiB"));
    }
    assert_eq!(given(&outputs, 4).unwrap().unwrap_err().as_str(), "because");
    assert_eq!(given(&outputs, 5), None);
}

#[test]
fn what_comes_through_a_connection_is_bounded() {
    let mut outputs = outputs(1 << 20, 9);
    let data = STANDARD.encode(vec![7; SENT_BYTES_MAX / 4]);
    for _ in 0..4 {
        outputs.add_piece(Token(1), 6, 1, &data);
    }
    assert!(outputs.complete(Token(1)));
    let delivery = outputs.of_run(Token(1), 6, false);
    assert_eq!((delivery.at, delivery.pieces.len()), (OutputAt::Pieces, 4));
    outputs.add_piece(Token(1), 6, 2, "AA==");
    assert!(!outputs.complete(Token(1)));
    outputs.add_piece(Token(2), 6, 1, "no base64!");
    assert!(!outputs.complete(Token(2)));
    for _ in 0..=PIECES_MAX {
        outputs.add_piece(Token(3), 6, 1, "AA==");
    }
    assert!(!outputs.complete(Token(3)));
}
