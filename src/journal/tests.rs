use std::num::NonZeroU32;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::proto::{LockId, Nonce, Outcome, Protocol};
use crate::table::Terms;

const BOOT: BootId = *b"this very boot!!";

fn any_record() -> impl Strategy<Value = HoldRecord> {
    let protocol = prop_oneof![Just(Protocol::V1), Just(Protocol::V2)];
    let terms = (protocol, any::<[bool; 3]>(), 1..=u32::MAX).prop_map(
        |(protocol, [shared, exec, inherits], slots)| Terms {
            protocol,
            shared,
            exec,
            inherits,
            slots,
            weight: None,
        },
    );
    let ends = (
        proptest::option::of(any::<u128>().prop_map(Nonce)),
        proptest::option::of(any::<u32>()),
        proptest::option::of(any::<u64>().prop_map(Timestamp)),
    );
    (any::<[u8; 16]>(), any::<u64>(), terms, ends, any::<[u32; 2]>(), any::<[u64; 3]>()).prop_map(
        |(lock, token, terms, (nonce, uid, until), [pid, child], [granted, recorded, started])| HoldRecord {
            held: HoldState { lock: LockId(lock), token: Token(token), terms, nonce, uid, until },
            pid: Pid::new(pid),
            child: Pid::new(child).map(|pid| Process { pid, started: Timestamp(started) }),
            granted: Timestamp(granted),
            recorded: Timestamp(recorded),
        },
    )
}

fn record(token: u64) -> HoldRecord {
    HoldRecord {
        held: HoldState {
            lock: LockId([token as u8; 16]),
            token: Token(token),
            terms: Terms::V1,
            nonce: Some(Nonce(u128::from(token) << 100)),
            uid: Some(1000),
            until: Some(Timestamp(5)),
        },
        pid: Pid::new(77),
        child: None,
        granted: Timestamp(3),
        recorded: Timestamp(4),
    }
}

fn holds(records: &[HoldRecord]) -> Snapshot {
    Snapshot { holds: records.to_vec(), runs: Vec::new() }
}

fn run(token: u64, by: &str) -> RunRecord {
    let run = Run {
        lock: LockId([token as u8; 16]),
        token: Token(token),
        began_ms: -5,
        counts_for: Duration::from_secs(60),
        outcome: if token.is_multiple_of(2) { Outcome::Exit(0) } else { Outcome::Signal(9) },
        uid: Some(1000),
        by: by.into(),
    };
    RunRecord { run, began_unix_ms: 7_000 }
}

#[test]
fn a_run_is_read_as_it_was_written_unless_it_was_forgotten() {
    let (_folder, path, mut journal) = journal();
    let runs = [run(2, "alice@host"), run(3, ""), run(4, &"é".repeat(28))];
    runs.iter().for_each(|run| journal.run(run));
    journal.forget_run(Token(3));
    journal.write().unwrap();
    let kept = vec![runs[0].clone(), runs[2].clone()];
    assert_eq!(load(&path, &BOOT).content.runs, kept);
    journal.compact(&Snapshot { holds: vec![record(9)], runs: kept.clone() }).unwrap();
    assert_eq!(load(&path, &BOOT).content, Snapshot { holds: vec![record(9)], runs: kept.clone() });
    let other = load(&path, b"some other boot!");
    assert_eq!((other.content, other.is_of_this_boot), (Snapshot { holds: vec![], runs: kept }, false));
}

#[test]
fn a_weight_is_read_as_it_was_written() {
    let (_folder, path, mut journal) = journal();
    let mut heavy = record(1);
    heavy.held.until = None;
    heavy.held.terms = Terms { protocol: Protocol::V2, slots: 16, weight: NonZeroU32::new(3), ..Terms::V1 };
    journal.grant(&heavy);
    journal.write().unwrap();
    assert_eq!(load(&path, &BOOT).content.holds, [heavy]);
}

/// A journal's file of three grants, the second of which has ended.
fn sample() -> Vec<u8> {
    let mut bytes = header(&BOOT.into(), &[0; 16]).to_vec();
    for token in 1..=3 {
        encode(Entry::Grant(&record(token)), &mut bytes);
    }
    encode(Entry::End(Token(2)), &mut bytes);
    bytes
}

/// A journal in a folder of its own.
fn journal() -> (tempfile::TempDir, PathBuf, Journal) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let journal = Journal::create(&path, BOOT, ClusterLease::Local, &Snapshot::default()).unwrap();
    (folder, path, journal)
}

proptest! {
    #[test]
    fn what_is_written_is_read(records in proptest::collection::vec(any_record(), 0..20)) {
        let (_folder, path, mut journal) = journal();
        records.iter().for_each(|record| journal.grant(record));
        journal.write().unwrap();
        let last: BTreeMap<Token, HoldRecord> = records.into_iter().map(|record| (record.held.token, record)).collect();
        let loaded = load(&path, &BOOT);
        prop_assert_eq!(loaded.complaint, None);
        prop_assert_eq!(loaded.last_token, last.keys().next_back().copied());
        prop_assert_eq!(loaded.content.holds, last.into_values().collect::<Vec<_>>());
    }

    #[test]
    fn no_bytes_can_panic_it(bytes in proptest::collection::vec(any::<u8>(), 0..1000)) {
        parse(&bytes, &BOOT);
        let behind_a_header = [header(&BOOT.into(), &[0; 16]).as_slice(), &bytes].concat();
        prop_assert!(parse(&behind_a_header, &BOOT).content.holds.is_empty());
    }
}

#[test]
fn a_hold_that_has_ended_is_not_held() {
    let loaded = parse(&sample(), &BOOT);
    assert_eq!(loaded.content.holds, [record(1), record(3)]);
    assert_eq!(loaded.last_token, Some(Token(3)));
    assert_eq!(loaded.complaint, None);
}

#[test]
fn a_journal_that_is_cut_anywhere_is_used_as_far_as_it_goes() {
    let whole = sample();
    for length in 0..whole.len() {
        let loaded = parse(&whole[..length], &BOOT);
        let entries = (length / RECORD_BYTES).saturating_sub(1);
        let expected: Vec<HoldRecord> = (1..=entries.min(3) as u64).map(record).collect();
        assert_eq!(loaded.content.holds, expected, "cut at {length}");
        assert_eq!(loaded.complaint.is_some(), length % RECORD_BYTES != 0, "cut at {length}");
    }
}

#[test]
fn a_bit_that_flips_anywhere_costs_its_record_and_no_other() {
    let whole = sample();
    for bit in 0..whole.len() * 8 {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let loaded = parse(&damaged, &BOOT);
        let expected = match bit / 8 / RECORD_BYTES {
            0 => vec![],
            1 => vec![record(3)],
            // The grant that is damaged had ended.
            2 => vec![record(1), record(3)],
            3 => vec![record(1)],
            // Its end is damaged, so it is held still: too long rather than twice.
            _ => vec![record(1), record(2), record(3)],
        };
        assert_eq!(loaded.content.holds, expected, "bit {bit}");
        assert!(loaded.complaint.is_some(), "bit {bit}");
    }
}

#[test]
fn another_boots_journal_says_nothing_and_is_no_cause_for_complaint() {
    assert_eq!(parse(&sample(), b"some other boot!"), Loaded::default());
}

#[test]
fn another_versions_journal_is_not_used() {
    let mut other = sample();
    other[14] = b'2';
    let sum = crc32fast::hash(&other[..84]);
    other[84..88].copy_from_slice(&sum.to_le_bytes());
    let loaded = parse(&other, &BOOT);
    assert!(loaded.content.holds.is_empty());
    assert!(loaded.complaint.unwrap().contains("version"));
}

#[test]
fn only_a_file_of_ours_alone_is_read() {
    let (folder, path, mut journal) = journal();
    journal.grant(&record(1));
    journal.write().unwrap();
    let refused = |path: &Path, why: &str| {
        let loaded = load(path, &BOOT);
        assert!(loaded.content.holds.is_empty(), "{why}");
        let complaint = loaded.complaint.unwrap();
        assert!(complaint.contains(why), "{complaint}");
    };
    assert_eq!(load(&path, &BOOT).content.holds.len(), 1);
    assert_eq!(load(&folder.path().join("nothing"), &BOOT), Loaded::default());

    let link = folder.path().join("link");
    symlink(&path, &link).unwrap();
    refused(&link, "symbolic link");
    refused(folder.path(), "not a plain file");
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    refused(&fifo, "not a plain file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
    refused(&path, "mode 620");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
#[ignore = "needs root, to give a file to another user"]
fn a_journal_of_another_user_is_refused() {
    let (_folder, path, mut journal) = journal();
    journal.grant(&record(1));
    journal.write().unwrap();
    std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
    let loaded = load(&path, &BOOT);
    assert!(loaded.content.holds.is_empty());
    let complaint = loaded.complaint.unwrap();
    assert!(complaint.contains("belongs to uid 12345"), "{complaint}");
}

#[test]
fn a_write_that_fails_leaves_all_as_it_was() {
    let (_folder, path, mut journal) = journal();
    journal.grant(&record(1));
    journal.write().unwrap();
    let good = std::mem::replace(&mut journal.file, File::options().write(true).open("/dev/full").unwrap());
    journal.grant(&record(2));
    journal.end(Token(1));
    assert_eq!(journal.write().unwrap_err().kind(), io::ErrorKind::StorageFull);
    journal.mark_stale();
    assert!(journal.is_stale() && !journal.is_dirty());
    journal.file = good;
    journal.compact(&holds(&[record(8)])).unwrap();
    assert!(!journal.is_stale());
    let loaded = load(&path, &BOOT);
    assert_eq!(loaded.content.holds, [record(8)], "only what is true");
    assert_eq!(loaded.complaint, None, "nothing half is left behind");
}

#[test]
fn a_journal_that_is_written_anew_forgets_the_past() {
    let (folder, path, mut journal) = journal();
    // What a daemon that died on the way left behind.
    fs::write(folder.path().join("journal.new"), "half").unwrap();
    while !journal.needs_compaction() {
        for token in 1..=1000 {
            journal.grant(&record(token));
            journal.end(Token(token));
        }
        journal.write().unwrap();
    }
    assert!(fs::metadata(&path).unwrap().len() > SIZE_MIN);
    journal.compact(&holds(&[record(1001)])).unwrap();
    assert!(!journal.needs_compaction());
    assert_eq!(fs::metadata(&path).unwrap().len(), 2 * RECORD_BYTES as u64);
    journal.grant(&record(1002));
    journal.write().unwrap();
    assert_eq!(load(&path, &BOOT).content.holds, [record(1001), record(1002)]);
    assert!(!folder.path().join("journal.new").exists());
    journal.remove().unwrap();
    assert!(!path.exists());
}

#[test]
fn where_a_journal_cannot_be_written_anew_the_old_one_goes_on() {
    let (folder, path, mut journal) = journal();
    journal.grant(&record(1));
    journal.write().unwrap();
    // In the way of the new file, and not to be removed like one.
    fs::create_dir(folder.path().join("journal.new")).unwrap();
    assert!(journal.compact(&holds(&[])).is_err());
    journal.grant(&record(2));
    journal.write().unwrap();
    assert_eq!(load(&path, &BOOT).content.holds, [record(1), record(2)]);
}

#[test]
fn that_locks_are_clustered_outlives_the_locks_and_the_boot() {
    let (_folder, path, mut journal) = journal();
    journal.set_lease(ClusterLease::Id(7));
    journal.grant(&record(1));
    journal.write().unwrap();
    let loaded = load(&path, &BOOT);
    assert_eq!((loaded.lease, loaded.content.holds), (ClusterLease::Id(7), vec![record(1)]));
    journal.compact(&holds(&[])).unwrap();
    assert_eq!(load(&path, &BOOT).lease, ClusterLease::Id(7));
    // The lease is of that boot, that there was one is not.
    let loaded = load(&path, b"another boot !!!");
    assert_eq!((loaded.lease, loaded.content.holds, loaded.complaint), (ClusterLease::None, vec![], None));
    journal.set_lease(ClusterLease::None);
    journal.write().unwrap();
    assert_eq!(load(&path, &BOOT).lease, ClusterLease::None);
}

#[test]
fn that_no_lock_is_granted_for_a_while_outlives_the_daemon_and_the_boot() {
    let (_folder, path, mut journal) = journal();
    journal.set_lease(ClusterLease::Quarantine(Timestamp(5)));
    journal.write().unwrap();
    assert_eq!(load(&path, &BOOT).lease, ClusterLease::Quarantine(Timestamp(5)));
    assert_eq!(load(&path, b"another boot !!!").lease, ClusterLease::Quarantine(Timestamp::NEVER));
    journal.compact(&holds(&[])).unwrap();
    assert_eq!(load(&path, &BOOT).lease, ClusterLease::Quarantine(Timestamp(5)));
    journal.set_lease(ClusterLease::Id(7));
    journal.write().unwrap();
    assert_eq!(load(&path, &BOOT).lease, ClusterLease::Id(7));
}

#[test]
fn a_journal_of_one_hosts_locks_names_no_lease() {
    assert_eq!(parse(&sample(), &BOOT).lease, ClusterLease::Local);
    assert_eq!(parse(&sample(), b"another boot !!!"), Loaded::default());
}

#[test]
fn a_copy_of_a_journal_has_neither_the_lease_nor_what_was_held_under_it() {
    let folder = tempfile::tempdir().unwrap();
    let [path, copy] = ["journal", "copy"].map(|name| folder.path().join(name));
    let held = record(7);
    drop(Journal::create(&path, BOOT, ClusterLease::Id(5), &holds(std::slice::from_ref(&held))).unwrap());
    fs::copy(&path, &copy).unwrap();
    let own = load(&path, &BOOT);
    assert_eq!((own.lease, own.content.holds.len(), own.complaint), (ClusterLease::Id(5), 1, None));
    let copied = load(&copy, &BOOT);
    assert_eq!((copied.lease, copied.content.holds.len()), (ClusterLease::None, 0));
    assert!(copied.complaint.unwrap().contains("another path"));
    // By another name it is the same file.
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(folder.path(), &link).unwrap();
    assert_eq!(load(&link.join("journal"), &BOOT).lease, ClusterLease::Id(5));
    // What is this host's alone may be moved.
    drop(Journal::create(&path, BOOT, ClusterLease::Local, &holds(std::slice::from_ref(&held))).unwrap());
    fs::copy(&path, &copy).unwrap();
    assert_eq!(load(&copy, &BOOT).content.holds, [held]);
}

#[test]
fn a_command_is_recorded_with_its_hold_and_the_pid_namespace_with_both() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let child = Process { pid: Pid::new(78).unwrap(), started: Timestamp(12_345) };
    let named = HoldRecord { child: Some(child), ..record(2) };
    let era = Era { boot: BOOT, namespace: 4_026_531_836 };
    let mut journal = Journal::create(&path, era, ClusterLease::Local, &holds(&[record(1)])).unwrap();
    journal.grant(&named);
    journal.write().unwrap();
    let loaded = load(&path, &BOOT);
    assert_eq!(loaded.content.holds, [record(1), named.clone()]);
    assert_eq!(loaded.namespace, era.namespace);
    journal.compact(&loaded.content).unwrap();
    assert_eq!(load(&path, &BOOT), loaded);
    // Recorded again without a command, it has none.
    journal.grant(&record(2));
    journal.end(Token(1));
    journal.write().unwrap();
    assert_eq!(load(&path, &BOOT).content.holds, [record(2)]);
}
