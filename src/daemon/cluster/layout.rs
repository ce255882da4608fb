//! How queues are laid out in etcd: the names of keys, and what their values say. It is the layout of etcd's own lock
//! recipe, so that other programs take part (`etcdctl lock PREFIX/<identity>`).
//!
//! ```text
//! PREFIX/<identity>/<lease>.<number>   an entry: the one with the lowest create revision holds, and the ones it admits
//! PREFIX/<identity>.done               how the last hold ended that a host recorded
//! PREFIX/<identity>.success            the last run that succeeded, as long as it counts for a request
//! PREFIX/<identity>.failure            the last run that failed, likewise
//! PREFIX/hosts/<lease>                 a host's sign of life, by which it checks its watch
//! ```
//!
//! The identity is the MD5 of the lock's key; the lease and the number are hexadecimal. Keys of another form are ignored. An
//! entry with a value that kmutex did not write counts as an entry of another program.

use serde::{Deserialize, Serialize};

use crate::cluster::{Entry, EntryKey, Owner, QueueOp, QueueSnapshot, Revision, RunRecord, WatchEvent};
use crate::etcd::{self, Compare, KeyValue, LeaseId, Op, Range, Sort, Txn};
use crate::proto::{KEY_BYTES_MAX, LockId, Outcome};

/// What all keys begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    prefix: String,
}

/// With which lease something is put.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leases {
    /// Entries.
    pub(super) entries: LeaseId,
    /// Records, which outlive the entry.
    pub(super) records: LeaseId,
}

/// A run's record, and the lease under which it counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LeasedRun {
    pub(super) record: RunRecord,
    pub(super) lease: LeaseId,
}

impl Layout {
    pub(super) fn new(prefix: &str) -> Layout {
        Layout { prefix: prefix.trim_end_matches('/').into() }
    }

    /// Returns the range of all keys.
    pub(super) fn everything(&self) -> (Vec<u8>, Vec<u8>) {
        (format!("{}/", self.prefix).into(), format!("{}0", self.prefix).into())
    }

    /// Returns a key before all places of a lock, and behind those of the locks before it.
    pub(super) fn first_key(&self, lock: LockId) -> Vec<u8> {
        self.of(lock, "/").into()
    }

    /// Returns a key of this host that no other program writes.
    pub(super) fn sign_of_life(&self, lease: LeaseId) -> Vec<u8> {
        format!("{}/hosts/{:x}", self.prefix, lease.0).into()
    }

    /// Returns what reads the queue of a lock.
    pub(super) fn queue(&self, lock: LockId) -> Range {
        let (key, end) = (self.of(lock, ".").into(), self.of(lock, "0").into());
        Range { key, end, sort: Sort::CreateRevision, ..Range::default() }
    }

    /// Returns the key of the last run of a lock that ended so.
    fn run_key(&self, lock: LockId, is_success: bool) -> Vec<u8> {
        self.of(lock, if is_success { SUCCESS } else { FAILURE }).into()
    }

    /// Returns what puts the record of a run.
    fn put_run(&self, lock: LockId, run: &LeasedRun) -> Op {
        Op::Put {
            key: self.run_key(lock, run.record.outcome == Outcome::Exit(0)),
            value: json(&run.record),
            lease: Some(run.lease),
        }
    }

    /// Returns the transaction that deletes the records of these runs, if they are still the last ones.
    pub(super) fn forget(&self, lock: LockId, runs: &[KeyValue]) -> Txn {
        let key = |run: &KeyValue| run.key.clone();
        let compare = |run| Compare::CreateRevision { key: key(run), revision: run.create_revision };
        Txn {
            compare: runs.iter().map(compare).collect(),
            then: runs.iter().map(|run| Op::Delete { key: key(run) }).collect(),
            or_else: vec![Op::Range(self.queue(lock))],
        }
    }

    /// Returns `true` if the key is one of a run, whatever its value is.
    pub(super) fn is_run(&self, key: &KeyValue) -> bool {
        matches!(self.parse(&key.key), Some((_, Part::Run { .. })))
    }

    /// Returns the record of a run that a key is.
    pub(super) fn run(&self, key: &KeyValue) -> Option<LeasedRun> {
        let (_, Part::Run { .. }) = self.parse(&key.key)? else { return None };
        Some(LeasedRun { record: value(&key.value)?, lease: key.lease })
    }

    /// Returns the transaction that does `op` and then reads the queue. `run` is the record of the run that `op` releases.
    pub(super) fn txn(&self, lock: LockId, op: &QueueOp, leases: Leases, run: Option<&LeasedRun>) -> Txn {
        let queue = || Op::Range(self.queue(lock));
        let put = |entry_key: &EntryKey, owner: &Owner| Op::Put {
            key: self.entry_of(lock, entry_key),
            value: json(owner),
            lease: Some(leases.entries),
        };
        let (compare, mut then) = match op {
            QueueOp::Read => (Vec::new(), Vec::new()),
            QueueOp::TryAcquire { entry_key, owner, unless_run } => {
                let (key, end) = (self.of(lock, "/").into(), self.of(lock, "0").into());
                let mut compare = vec![Compare::Empty { key, end }];
                if *unless_run {
                    let none = |key| Compare::CreateRevision { key, revision: 0 };
                    compare.extend([true, false].map(|is_success| none(self.run_key(lock, is_success))));
                }
                (compare, vec![put(entry_key, owner)])
            }
            QueueOp::Enqueue { entry_key, owner } => {
                let key = self.entry_of(lock, entry_key);
                (vec![Compare::CreateRevision { key, revision: 0 }], vec![put(entry_key, owner)])
            }
            QueueOp::Release { entry_key, revision, record, next, .. } => {
                let key = self.entry_of(lock, entry_key);
                let mut then = vec![Op::Delete { key: key.clone() }];
                then.extend(record.as_ref().map(|record| Op::Put {
                    key: self.of(lock, ".done").into(),
                    value: json(record),
                    lease: Some(leases.records),
                }));
                then.extend(run.map(|run| self.put_run(lock, run)));
                then.extend(next.as_ref().map(|(entry_key, owner)| put(entry_key, owner)));
                (vec![Compare::CreateRevision { key, revision: revision.0 }], then)
            }
        };
        then.push(queue());
        Txn { compare, then, or_else: vec![queue()] }
    }

    /// Returns the queue that these keys are, without the runs.
    pub(super) fn snapshot(&self, revision: i64, keys: &[KeyValue]) -> QueueSnapshot {
        let mut snapshot = QueueSnapshot { revision: Revision(revision), ..QueueSnapshot::default() };
        for key in keys {
            match self.parse(&key.key) {
                Some((_, Part::Entry(entry_key))) => snapshot.entries.extend(entry(entry_key, key)),
                Some((_, Part::Record)) => snapshot.last = value(&key.value),
                Some((_, Part::Run { .. })) | None => {}
            }
        }
        snapshot
    }

    /// Returns what the watch saw, of which lock, and at which revision.
    pub(super) fn watch_event(&self, event: &etcd::Event) -> Option<(LockId, Revision, WatchEvent)> {
        let (key, revision) = match event {
            etcd::Event::Put(key) => (&key.key, key.mod_revision),
            etcd::Event::Delete { key, mod_revision } => (key, *mod_revision),
        };
        let (lock, part) = self.parse(key)?;
        let seen = match (event, part) {
            (etcd::Event::Put(key), Part::Entry(entry_key)) => WatchEvent::Added(entry(entry_key, key)?),
            (etcd::Event::Put(key), Part::Record) => WatchEvent::Outcome(value(&key.value)?),
            (etcd::Event::Put(key), Part::Run { .. }) => WatchEvent::Ran(self.run(key)?.record),
            (etcd::Event::Delete { .. }, Part::Entry(entry_key)) => WatchEvent::Removed(entry_key),
            (etcd::Event::Delete { .. }, Part::Run { is_success }) => WatchEvent::RunGone { is_success },
            (etcd::Event::Delete { .. }, Part::Record) => return None,
        };
        Some((lock, Revision(revision), seen))
    }

    /// Returns the lock in whose queue a key is.
    pub(super) fn lock_of(&self, key: &[u8]) -> Option<LockId> {
        self.parse(key).map(|(lock, _)| lock)
    }

    /// Returns the entry of any queue that a key is.
    pub(super) fn entry(&self, key: &KeyValue) -> Option<(LockId, Entry)> {
        match self.parse(&key.key)? {
            (lock, Part::Entry(entry_key)) => Some((lock, entry(entry_key, key)?)),
            (_, Part::Record | Part::Run { .. }) => None,
        }
    }

    fn of(&self, lock: LockId, rest: &str) -> String {
        format!("{}/{lock}{rest}", self.prefix)
    }

    fn entry_of(&self, lock: LockId, entry_key: &EntryKey) -> Vec<u8> {
        [self.of(lock, "/").as_bytes(), &entry_key.0].concat()
    }

    fn parse(&self, key: &[u8]) -> Option<(LockId, Part)> {
        let rest = key.strip_prefix(self.prefix.as_bytes())?.strip_prefix(b"/")?;
        let (digits, rest) = rest.split_at_checked(32)?;
        let digits = std::str::from_utf8(digits).ok()?;
        if !digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let lock = LockId(u128::from_str_radix(digits, 16).ok()?.to_be_bytes());
        match rest {
            b".done" => Some((lock, Part::Record)),
            run if run == SUCCESS.as_bytes() => Some((lock, Part::Run { is_success: true })),
            run if run == FAILURE.as_bytes() => Some((lock, Part::Run { is_success: false })),
            [b'/', entry_key @ ..] => Some((lock, Part::Entry(EntryKey(entry_key.into())))),
            _ => None,
        }
    }
}

enum Part {
    Entry(EntryKey),
    Record,
    Run { is_success: bool },
}

/// How the keys of runs end.
const SUCCESS: &str = ".success";
const FAILURE: &str = ".failure";

fn entry(entry_key: EntryKey, key: &KeyValue) -> Option<Entry> {
    // It becomes a token.
    let revision = (key.create_revision > 0).then_some(Revision(key.create_revision))?;
    let owner = value::<Owner>(&key.value).map(|mut owner| {
        owner.key.take_if(|key| key.len() > KEY_BYTES_MAX);
        owner
    });
    Some(Entry { entry_key, revision, owner })
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("what is put has no part that JSON lacks")
}

fn value<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    serde_json::from_slice(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::OutcomeRecord;
    use crate::proto::{Key, Outcome, Protocol, Token};

    fn put(key: &str, value: &[u8], create_revision: i64) -> KeyValue {
        let (key, value) = (key.into(), value.into());
        KeyValue { key, value, create_revision, mod_revision: create_revision, lease: LeaseId(0) }
    }

    #[test]
    fn the_layout_is_that_of_the_lock_recipe() {
        let layout = Layout::new("kmutex/");
        let lock = Key::new("message digest").unwrap().id();
        let owner = Box::new(Owner { protocol: Protocol::V2, host: "h".into(), ..Owner::default() });
        let leases = Leases { entries: LeaseId(10), records: LeaseId(11) };
        let op = QueueOp::Enqueue { entry_key: EntryKey(b"a.1".to_vec()), owner: owner.clone() };
        let Txn { compare, then, or_else } = layout.txn(lock, &op, leases, None);
        let key = b"kmutex/f96b697d7cb7938d525a2f31aaf161d0/a.1".to_vec();
        assert_eq!(compare, [Compare::CreateRevision { key: key.clone(), revision: 0 }]);
        let [Op::Put { key: put, value, lease }, range] = &then[..] else { panic!("{then:?}") };
        assert_eq!((put, *lease), (&key, Some(LeaseId(10))));
        assert_eq!(serde_json::from_slice::<Owner>(value).unwrap(), *owner);
        assert_eq!(&or_else[..], std::slice::from_ref(range), "in any case, the line is read");
    }

    #[test]
    fn a_record_is_put_with_the_lease_that_outlives_the_place() {
        let layout = Layout::new("p");
        let lock = Key::new("k").unwrap().id();
        let record = OutcomeRecord { token: Token(5), outcome: Outcome::Exit(3) };
        let op = QueueOp::Release {
            entry_key: EntryKey(b"a.1".to_vec()),
            revision: Revision(5),
            record: Some(record),
            run: None,
            next: None,
        };
        let txn = layout.txn(lock, &op, Leases { entries: LeaseId(1), records: LeaseId(2) }, None);
        let put = txn.then.iter().find_map(|op| match op {
            Op::Put { key, value, lease } => {
                Some(KeyValue { lease: lease.unwrap(), ..put(std::str::from_utf8(key).unwrap(), value, 9) })
            }
            _ => None,
        });
        let put = put.unwrap();
        assert_eq!(put.lease, LeaseId(2));
        assert_eq!(layout.snapshot(9, &[put]).last, Some(record));
    }

    #[test]
    fn entries_whose_keys_are_no_text_stay_apart() {
        let layout = Layout::new("p");
        let id = "f96b697d7cb7938d525a2f31aaf161d0";
        let key = |end: &[u8]| [format!("p/{id}/").as_bytes(), end].concat();
        let keys = [&[0xff][..], &[0xfe], b"\xef\xbf\xbd", b"", b"a/b", b"\0"];
        let values = keys.map(|end| KeyValue { key: key(end), ..put("", b"", 7) });
        let snapshot = layout.snapshot(9, &values);
        let found: Vec<&[u8]> = snapshot.entries.iter().map(|entry| &entry.entry_key.0[..]).collect();
        assert_eq!(found, keys);
        for end in keys {
            let removed = layout.watch_event(&etcd::Event::Delete { key: key(end), mod_revision: 9 });
            assert_eq!(removed.unwrap().2, WatchEvent::Removed(EntryKey(end.to_vec())));
        }
    }

    #[test]
    fn what_is_not_ours_is_passed_over_or_another_programs() {
        let layout = Layout::new("p");
        let id = "f96b697d7cb7938d525a2f31aaf161d0";
        for key in [
            "",
            "p",
            "p/",
            "q/x",
            &format!("p{id}/a"),
            &format!("p/{id}"),
            &format!("p/{id}0/a"),
            &format!("p/{}/a", id.to_uppercase()),
            "p/short/a",
        ] {
            assert_eq!(layout.watch_event(&etcd::Event::Put(put(key, b"", 1))), None, "{key:?}");
        }
        for value in [&b""[..], b"text", b"[]", b"{}", b"{\"host\":1}", &[0xff; 9]] {
            let heard = layout.watch_event(&etcd::Event::Put(put(&format!("p/{id}/a"), value, 7)));
            let Some((_, Revision(7), WatchEvent::Added(entry))) = heard else { panic!("{heard:?}") };
            assert_eq!(entry.owner, None, "{value:?}");
            assert_eq!(layout.watch_event(&etcd::Event::Put(put(&format!("p/{id}.done"), value, 7))), None);
        }
        assert_eq!(
            layout.watch_event(&etcd::Event::Put(put(&format!("p/{id}/a"), b"", 0))),
            None,
            "no revision is 0"
        );
    }
}
