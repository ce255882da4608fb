//! How queues are laid out in etcd: the names of keys, and what their values say. It is the layout of etcd's own lock
//! recipe, so that other programs take part (`etcdctl lock PREFIX/<identity>`).
//!
//! ```text
//! PREFIX/<identity>/<lease>.<number>   an entry: the one with the lowest create revision holds, and the ones it admits
//! PREFIX/<identity>.done               how the last hold ended that a host recorded
//! PREFIX/<identity>.success            the last run that succeeded, as long as it counts for a request
//! PREFIX/<identity>.failure            the last run that failed, likewise
//! PREFIX/results/<identity>.done       the result of the hold that the record with the same ending is about; likewise
//!                                      with .success and .failure
//! PREFIX/<identity>.newest             the newest of the requests with `--newest`
//! PREFIX/hosts/<lease>                 a host's sign of life, by which it checks its watch
//! ```
//!
//! The identity is the MD5 of the lock's key; the lease and the number are hexadecimal. Keys of another form are ignored. An
//! entry with a value that kmutex did not write counts as an entry of another program.

use serde::{Deserialize, Serialize};

use super::stored_result;
use crate::cluster::{
    Entry, EntryKey, OwnResult, Owner, QueueOp, QueueSnapshot, ResultOf, Revision, RunRecord, SeenNewest,
    SharedResult, WatchEvent,
};
use crate::daemon::sharers::Sharers;
use crate::etcd::{self, Compare, KeyValue, LeaseId, Op, Range, Sort, Txn};
use crate::proto::{KEY_BYTES_MAX, LockId, Outcome};

/// What all keys begin with.
#[derive(Clone)]
pub(super) struct Layout {
    prefix: String,
    sharers: Sharers,
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
    pub(super) fn new(prefix: &str, sharers: Sharers) -> Layout {
        Layout { prefix: prefix.trim_end_matches('/').into(), sharers }
    }

    /// Returns the range of all keys.
    pub(super) fn everything(&self) -> (Vec<u8>, Vec<u8>) {
        (format!("{}/", self.prefix).into(), format!("{}0", self.prefix).into())
    }

    /// Returns the range of all queues, with their records. No identity has a digit behind `f`.
    pub(super) fn queues(&self) -> (Vec<u8>, Vec<u8>) {
        (format!("{}/", self.prefix).into(), format!("{}/g", self.prefix).into())
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

    /// Returns what reads the entries of one lease in the queue of a lock.
    pub(super) fn entries_of(&self, lock: LockId, lease: LeaseId) -> Range {
        let end = |last: char| self.of(lock, &format!("/{:x}{last}", lease.0)).into();
        Range { key: end('.'), end: end('/'), ..Range::default() }
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

    /// Returns the key of a result.
    fn result_key(&self, lock: LockId, of: ResultOf) -> Vec<u8> {
        let ending = match of {
            ResultOf::Done => DONE,
            ResultOf::Success => SUCCESS,
            ResultOf::Failure => FAILURE,
        };
        format!("{}/{RESULTS}{lock}{ending}", self.prefix).into()
    }

    /// Returns what puts a result, with the record of its run or of its hold. One that is withheld leaves an earlier one of a run
    /// where it is.
    fn put_result(&self, lock: LockId, result: &OwnResult, run: Option<&LeasedRun>, leases: Leases) -> Op {
        let (of, lease) = match run.filter(|_| result.content.is_ok()) {
            Some(run) if run.record.outcome == Outcome::Exit(0) => (ResultOf::Success, run.lease),
            Some(run) => (ResultOf::Failure, run.lease),
            None => (ResultOf::Done, leases.records),
        };
        let value = stored_result::encode(result);
        Op::Put { key: self.result_key(lock, of), value, lease: Some(lease) }
    }

    /// Returns the results of a lock that these keys are.
    pub(super) fn results<'a>(
        &self,
        lock: LockId,
        keys: impl IntoIterator<Item = &'a KeyValue>,
    ) -> Vec<SharedResult> {
        let result = |key: &KeyValue| {
            let (of, what) = self.result_of(&key.key)?;
            (of == lock).then(|| stored_result::decode(what, &key.value, &self.sharers))?
        };
        keys.into_iter().filter_map(result).collect()
    }

    /// Returns the transaction that deletes the records of these runs, if they are still the last ones, and all results.
    pub(super) fn forget(&self, lock: LockId, runs: &[KeyValue]) -> Txn {
        let key = |run: &KeyValue| run.key.clone();
        let compare = |run| Compare::CreateRevision { key: key(run), revision: run.create_revision };
        let results = RESULTS_OF.map(|of| Op::Delete { key: self.result_key(lock, of) });
        Txn {
            compare: runs.iter().map(compare).collect(),
            then: runs.iter().map(|run| Op::Delete { key: key(run) }).chain(results).collect(),
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

    /// Returns the transaction that does `op` and then reads the queue. `run` is the record of the run that `op` releases. The first
    /// range of its reply is the queue; [`Layout::with_results`] adds others.
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
            QueueOp::Describe { entry_key, revision, owner } => {
                let key = self.entry_of(lock, entry_key);
                (vec![Compare::CreateRevision { key, revision: revision.0 }], vec![put(entry_key, owner)])
            }
            QueueOp::RecordNewest { record, replaced, entry } => {
                let key = self.of(lock, NEWEST).into_bytes();
                let mut compare = vec![Compare::ModRevision { key: key.clone(), revision: replaced.0 }];
                let mut then = vec![Op::Put { key, value: json(record), lease: Some(leases.records) }];
                if let Some((entry_key, owner)) = entry {
                    let key = self.entry_of(lock, entry_key);
                    compare.push(Compare::CreateRevision { key, revision: 0 });
                    then.push(put(entry_key, owner));
                }
                (compare, then)
            }
            QueueOp::Release { entry_key, revision, record, result, next, .. } => {
                let key = self.entry_of(lock, entry_key);
                // A watch sees the result before the end that it belongs to.
                let result = result.as_ref().map(|result| self.put_result(lock, result, run, leases));
                let mut then: Vec<Op> = result.into_iter().collect();
                then.push(Op::Delete { key: key.clone() });
                then.extend(record.as_ref().map(|record| Op::Put {
                    key: self.of(lock, DONE).into(),
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

    /// Adds to a transaction of [`Layout::txn`] that the results are read too.
    pub(super) fn with_results(&self, lock: LockId, mut txn: Txn) -> Txn {
        let reads =
            RESULTS_OF.map(|of| Op::Range(Range { key: self.result_key(lock, of), ..Range::default() }));
        txn.then.extend(reads.clone());
        txn.or_else.extend(reads);
        txn
    }

    /// Returns the queue that these keys are, without the runs.
    pub(super) fn snapshot(&self, revision: i64, keys: &[KeyValue]) -> QueueSnapshot {
        let mut snapshot = QueueSnapshot { revision: Revision(revision), ..QueueSnapshot::default() };
        for key in keys {
            match self.parse(&key.key) {
                Some((_, Part::Entry(entry_key))) => snapshot.entries.extend(entry(entry_key, key)),
                Some((_, Part::Record)) => snapshot.last = value(&key.value),
                Some((_, Part::Newest)) => snapshot.newest = Some(newest(key)),
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
        if let (etcd::Event::Put(put), Some((lock, of))) = (event, self.result_of(key)) {
            let result = stored_result::decode(of, &put.value, &self.sharers)?;
            return Some((lock, Revision(revision), WatchEvent::Result(result)));
        }
        let (lock, part) = self.parse(key)?;
        let seen = match (event, part) {
            (etcd::Event::Put(key), Part::Entry(entry_key)) => WatchEvent::Added(entry(entry_key, key)?),
            (etcd::Event::Put(key), Part::Record) => WatchEvent::Outcome(value(&key.value)?),
            (etcd::Event::Put(key), Part::Run { .. }) => WatchEvent::Ran(self.run(key)?.record),
            (etcd::Event::Put(key), Part::Newest) => WatchEvent::Newest(Some(newest(key))),
            (etcd::Event::Delete { .. }, Part::Newest) => WatchEvent::Newest(None),
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
            (_, Part::Record | Part::Newest | Part::Run { .. }) => None,
        }
    }

    fn of(&self, lock: LockId, rest: &str) -> String {
        format!("{}/{lock}{rest}", self.prefix)
    }

    fn entry_of(&self, lock: LockId, entry_key: &EntryKey) -> Vec<u8> {
        [self.of(lock, "/").as_bytes(), &entry_key.0].concat()
    }

    /// Returns of which lock a key is a result, and with which record.
    fn result_of(&self, key: &[u8]) -> Option<(LockId, ResultOf)> {
        let rest = key.strip_prefix(self.prefix.as_bytes())?.strip_prefix(b"/")?;
        let (lock, rest) = split_identity(rest.strip_prefix(RESULTS.as_bytes())?)?;
        let of = RESULTS_OF.into_iter().zip([DONE, SUCCESS, FAILURE]);
        let (of, _) = of.into_iter().find(|(_, ending)| rest == ending.as_bytes())?;
        Some((lock, of))
    }

    fn parse(&self, key: &[u8]) -> Option<(LockId, Part)> {
        let rest = key.strip_prefix(self.prefix.as_bytes())?.strip_prefix(b"/")?;
        let (lock, rest) = split_identity(rest)?;
        match rest {
            done if done == DONE.as_bytes() => Some((lock, Part::Record)),
            newest if newest == NEWEST.as_bytes() => Some((lock, Part::Newest)),
            run if run == SUCCESS.as_bytes() => Some((lock, Part::Run { is_success: true })),
            run if run == FAILURE.as_bytes() => Some((lock, Part::Run { is_success: false })),
            [b'/', entry_key @ ..] => Some((lock, Part::Entry(EntryKey(entry_key.into())))),
            _ => None,
        }
    }
}

fn split_identity(key: &[u8]) -> Option<(LockId, &[u8])> {
    let (digits, rest) = key.split_at_checked(32)?;
    let digits = std::str::from_utf8(digits).ok()?;
    if !digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    Some((LockId(u128::from_str_radix(digits, 16).ok()?.to_be_bytes()), rest))
}

enum Part {
    Entry(EntryKey),
    Record,
    Newest,
    Run { is_success: bool },
}

/// How the key of the newest request's record ends.
const NEWEST: &str = ".newest";

/// What the keys of results begin with. They are not between those of a queue, which is read often.
const RESULTS: &str = "results/";
const RESULTS_OF: [ResultOf; 3] = [ResultOf::Done, ResultOf::Success, ResultOf::Failure];
/// How the keys of records, and of their results, end.
const DONE: &str = ".done";
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

fn newest(key: &KeyValue) -> SeenNewest {
    SeenNewest { revision: Revision(key.mod_revision), record: value(&key.value) }
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

    fn layout(prefix: &str) -> Layout {
        Layout::new(prefix, Sharers::new(false))
    }

    fn put(key: &str, value: &[u8], create_revision: i64) -> KeyValue {
        let (key, value) = (key.into(), value.into());
        KeyValue { key, value, create_revision, mod_revision: create_revision, lease: LeaseId(0) }
    }

    #[test]
    fn the_layout_is_that_of_the_lock_recipe() {
        let layout = layout("kmutex/");
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
        let layout = layout("p");
        let lock = Key::new("k").unwrap().id();
        let record = OutcomeRecord { token: Token(5), outcome: Outcome::Exit(3) };
        let op = QueueOp::Release {
            entry_key: EntryKey(b"a.1".to_vec()),
            revision: Revision(5),
            record: Some(record),
            run: None,
            result: None,
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
    fn a_result_is_put_before_the_end_that_it_belongs_to_and_beside_its_record() {
        let layout = layout("p");
        let lock = Key::new("k").unwrap().id();
        let leases = Leases { entries: LeaseId(1), records: LeaseId(2) };
        let run = |status| {
            let outcome = Outcome::Exit(status);
            let (token, by) = (Token(5), "".into());
            let record = RunRecord { token, outcome, age_ms: 0, counts_for_ms: 9_000, by };
            LeasedRun { record, lease: LeaseId(3) }
        };
        let row = Ok(vec![1, 0, 0, 0, 0, 0, 0, 1, b'x'].into());
        let cases = [
            (row.clone(), None, ResultOf::Done, 2),
            (row.clone(), Some(run(0)), ResultOf::Success, 3),
            (row, Some(run(1)), ResultOf::Failure, 3),
            (Err("".into()), Some(run(0)), ResultOf::Done, 2),
        ];
        for (content, run, of, lease) in cases {
            let result = OwnResult { token: Token(5), user: crate::cluster::RunUser::default(), content };
            let op = QueueOp::Release {
                entry_key: EntryKey(b"a.1".to_vec()),
                revision: Revision(5),
                record: Some(OutcomeRecord { token: Token(5), outcome: Outcome::Exit(0) }),
                run: None,
                result: Some(Box::new(result.clone())),
                next: None,
            };
            let txn = layout.txn(lock, &op, leases, run.as_ref());
            let [Op::Put { key, value, lease: with }, Op::Delete { .. }, ..] = &txn.then[..] else {
                panic!("{txn:?}")
            };
            assert_eq!(with, &Some(LeaseId(lease)));
            let key = KeyValue { key: key.clone(), ..put("", value, 9) };
            let seen = layout.watch_event(&etcd::Event::Put(key.clone())).unwrap();
            let (_, Revision(9), WatchEvent::Result(found)) = &seen else { panic!("{seen:?}") };
            assert_eq!((found.of, &found.content), (of, &result.content));
            assert_eq!(layout.results(lock, [&key]), std::slice::from_ref(found));
            assert_eq!(layout.results(Key::new("other").unwrap().id(), [&key]), []);
            let deleted = etcd::Event::Delete { key: key.key.clone(), mod_revision: 10 };
            assert_eq!(layout.watch_event(&deleted), None);
            // What reads a queue, or lists all of them, does not read the results.
            assert!(key.key > layout.queue(lock).end && key.key > layout.queues().1);
            let all = layout.everything();
            assert!(key.key > all.0 && key.key < all.1);
            let forget = layout.forget(lock, &[]);
            assert!(forget.then.contains(&Op::Delete { key: key.key.clone() }));
            let read = Op::Range(Range { key: key.key, ..Range::default() });
            let txn = layout.with_results(lock, txn);
            assert!(txn.then.contains(&read) && txn.or_else.contains(&read));
        }
    }

    #[test]
    fn entries_whose_keys_are_no_text_stay_apart() {
        let layout = layout("p");
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
        let layout = layout("p");
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
