//! How lines are laid out in etcd: what the keys are called, and what their values say. It is the layout of etcd's own
//! lock recipe, so that others take part in it (`etcdctl lock PREFIX/<identity>`).
//!
//! ```text
//! PREFIX/<identity>/<lease>.<number>   a place: the one with the lowest create revision holds
//! PREFIX/<identity>.done               how the last hold ended that somebody has told of
//! ```
//!
//! The identity is the MD5 of the lock's key, the lease and the number are hexadecimal. A key that has another form, or a
//! value that is not ours, is somebody else's business: it is passed over, or counts as a place of another program.

use serde::Deserialize;

use crate::cluster::{Entry, Owner, QueueOp, QueueSnapshot, Revision, WatchEvent};
use crate::etcd::{self, Compare, KeyValue, LeaseId, Op, Range, Sort, Txn};
use crate::proto::{KEY_BYTES_MAX, LockId};

/// What all keys begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    prefix: String,
}

/// With which lease something is put.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leases {
    /// Places.
    pub(super) places: LeaseId,
    /// Records, which should outlive the place.
    pub(super) records: LeaseId,
}

impl Layout {
    pub(super) fn new(prefix: &str) -> Layout {
        Layout { prefix: prefix.trim_end_matches('/').into() }
    }

    /// All that is ours, and the end of it.
    pub(super) fn everything(&self) -> (Vec<u8>, Vec<u8>) {
        (format!("{}/", self.prefix).into(), format!("{}0", self.prefix).into())
    }

    /// Returns a key before all places of a lock, and behind those of the locks before it.
    pub(super) fn first_key(&self, lock: LockId) -> Vec<u8> {
        self.of(lock, "/").into()
    }

    /// As one transaction, after which the line is read.
    pub(super) fn txn(&self, lock: LockId, question: &QueueOp, leases: Leases) -> Txn {
        let line = || {
            let (key, end) = (self.of(lock, ".").into(), self.of(lock, "0").into());
            Op::Range(Range { key, end, limit: 0, sort: Sort::CreateRevision })
        };
        let put = |place: &str, owner: &Owner| Op::Put {
            key: self.place(lock, place),
            value: serde_json::to_vec(owner).expect("an owner has no part that JSON lacks"),
            lease: Some(leases.places),
        };
        let (compare, mut then) = match question {
            QueueOp::Read => (Vec::new(), Vec::new()),
            QueueOp::TryAcquire { place, owner } => {
                let (key, end) = (self.of(lock, "/").into(), self.of(lock, "0").into());
                (vec![Compare::Empty { key, end }], vec![put(place, owner)])
            }
            QueueOp::Enqueue { place, owner } => {
                let key = self.place(lock, place);
                (vec![Compare::CreateRevision { key, revision: 0 }], vec![put(place, owner)])
            }
            QueueOp::Release { place, revision, record, next } => {
                let key = self.place(lock, place);
                let mut then = vec![Op::Delete { key: key.clone() }];
                then.extend(record.as_ref().map(|record| Op::Put {
                    key: self.of(lock, ".done").into(),
                    value: serde_json::to_vec(record).expect("a record has no part that JSON lacks"),
                    lease: Some(leases.records),
                }));
                then.extend(next.as_ref().map(|(place, owner)| put(place, owner)));
                (vec![Compare::CreateRevision { key, revision: revision.0 }], then)
            }
        };
        then.push(line());
        Txn { compare, then, or_else: vec![line()] }
    }

    /// A line that was read.
    pub(super) fn line(&self, revision: i64, keys: Vec<KeyValue>) -> QueueSnapshot {
        let mut line = QueueSnapshot { revision: Revision(revision), ..QueueSnapshot::default() };
        for key in keys {
            match self.parse(&key.key) {
                Some((_, Part::Place(place))) => line.entries.extend(entry(place, &key)),
                Some((_, Part::Record)) => line.last = value(&key.value),
                None => {}
            }
        }
        line
    }

    /// What the watch has seen, of which lock, and at which revision.
    pub(super) fn watch_event(&self, event: &etcd::Event) -> Option<(LockId, Revision, WatchEvent)> {
        let (key, revision) = match event {
            etcd::Event::Put(key) => (&key.key, key.mod_revision),
            etcd::Event::Delete { key, mod_revision } => (key, *mod_revision),
        };
        let (lock, part) = self.parse(key)?;
        let heard = match (event, part) {
            (etcd::Event::Put(key), Part::Place(place)) => WatchEvent::Added(entry(place, key)?),
            (etcd::Event::Put(key), Part::Record) => WatchEvent::Outcome(value(&key.value)?),
            (etcd::Event::Delete { .. }, Part::Place(place)) => WatchEvent::Removed(place),
            (etcd::Event::Delete { .. }, Part::Record) => return None,
        };
        Some((lock, Revision(revision), heard))
    }

    /// The lock in whose line a key is a place.
    pub(super) fn lock_of(&self, key: &[u8]) -> Option<LockId> {
        self.parse(key).map(|(lock, _)| lock)
    }

    /// One place of any line.
    pub(super) fn entry(&self, key: &KeyValue) -> Option<(LockId, Entry)> {
        match self.parse(&key.key)? {
            (lock, Part::Place(place)) => Some((lock, entry(place, key)?)),
            (_, Part::Record) => None,
        }
    }

    fn of(&self, lock: LockId, rest: &str) -> String {
        format!("{}/{lock}{rest}", self.prefix)
    }

    fn place(&self, lock: LockId, place: &str) -> Vec<u8> {
        self.of(lock, &format!("/{place}")).into()
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
            [b'/', place @ ..] => Some((lock, Part::Place(String::from_utf8_lossy(place).into()))),
            _ => None,
        }
    }
}

enum Part {
    Place(String),
    Record,
}

fn entry(place: String, key: &KeyValue) -> Option<Entry> {
    // It is to be a token.
    let revision = (key.create_revision > 0).then_some(Revision(key.create_revision))?;
    let owner = value::<Owner>(&key.value).map(|mut owner| {
        owner.key.take_if(|key| key.len() > KEY_BYTES_MAX);
        owner
    });
    Some(Entry { place, revision, owner })
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
        let leases = Leases { places: LeaseId(10), records: LeaseId(11) };
        let question = QueueOp::Enqueue { place: "a.1".into(), owner: owner.clone() };
        let Txn { compare, then, or_else } = layout.txn(lock, &question, leases);
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
        let question =
            QueueOp::Release { place: "a.1".into(), revision: Revision(5), record: Some(record), next: None };
        let txn = layout.txn(lock, &question, Leases { places: LeaseId(1), records: LeaseId(2) });
        let put = txn.then.iter().find_map(|op| match op {
            Op::Put { key, value, lease } => {
                Some(KeyValue { lease: lease.unwrap(), ..put(std::str::from_utf8(key).unwrap(), value, 9) })
            }
            _ => None,
        });
        let put = put.unwrap();
        assert_eq!(put.lease, LeaseId(2));
        assert_eq!(layout.line(9, vec![put]).last, Some(record));
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
