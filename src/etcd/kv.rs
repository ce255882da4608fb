//! What is asked of etcd and what it answers, in etcd's own terms (its API reference: KV, Lease, Watch). Data alone: how
//! it is written out is `codec`'s matter.

/// Identifies a lease. 0 is no lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

/// A lease that was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// What etcd calls it.
    pub id: LeaseId,
    /// How long it lasts without a keep-alive. etcd may give more than was asked for: its least is somewhat above the
    /// time of an election.
    pub ttl_secs: u64,
}

/// What became of a lease that was to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptAlive {
    /// How long it lasts from now on. 0: there is no such lease any more.
    pub ttl_secs: u64,
    /// The revision of the store when etcd answered.
    pub revision: i64,
    /// The member that answered is behind what was seen of the store before: it lags, or the store went back.
    pub is_behind: bool,
}

/// A key with its value, at one revision of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
    /// The revision at which the key was put where there was none.
    pub create_revision: i64,
    /// The revision at which it was last put.
    pub mod_revision: i64,
    /// The lease that it ends with. 0: none.
    pub lease: LeaseId,
}

/// Compares, and then carries out one of two lists of operations; all of it at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// What must hold, all of it.
    pub compare: Vec<Compare>,
    /// What is done if it does. No key may be put twice.
    pub then: Vec<Op>,
    /// What is done if it does not.
    pub or_else: Vec<Op>,
}

/// What must hold for [`Txn::then`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key was created at this revision. 0: there is no such key.
    CreateRevision {
        /// The key.
        key: Vec<u8>,
        /// The revision.
        revision: i64,
    },
    /// There is no key from `key` up to, and without, `end`.
    Empty {
        /// The first.
        key: Vec<u8>,
        /// The one behind the last.
        end: Vec<u8>,
    },
}

/// One operation of a [`Txn`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Gives a key a value.
    Put {
        /// The key.
        key: Vec<u8>,
        /// Its value.
        value: Vec<u8>,
        /// What it ends with. `None`: it stays until it is deleted.
        lease: Option<LeaseId>,
    },
    /// Removes a key, if there is one.
    Delete {
        /// The key.
        key: Vec<u8>,
    },
    /// Reads keys.
    Range(Range),
}

/// Which keys to read, and in which order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub key: Vec<u8>,
    /// The one behind the last. Empty: `key` alone.
    pub end: Vec<u8>,
    /// How many at the most. 0: all of them.
    pub limit: u64,
    /// As of which revision of the store. 0: as of now.
    pub revision: i64,
    /// In which order.
    pub sort: Sort,
}

/// The order of what is read; always ascending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// By the keys' bytes.
    #[default]
    Key,
    /// The oldest first.
    CreateRevision,
}

/// What came of a [`Txn`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TxnReply {
    /// The revision of the store after it.
    pub revision: i64,
    /// Which list was carried out: [`Txn::then`] if true.
    pub succeeded: bool,
    /// What the [`Op::Range`]s of that list have found, in their order.
    pub ranges: Vec<Vec<KeyValue>>,
}

/// What a [`Range`] has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeReply {
    /// The revision of the store that was read.
    pub revision: i64,
    /// The keys.
    pub kvs: Vec<KeyValue>,
    /// True when there are more than were asked for.
    pub more: bool,
}

/// One message of a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchReply {
    /// The revision of the store. 0 where etcd gives none, which is when it cancels.
    pub revision: i64,
    /// The first message: the watch has begun.
    pub created: bool,
    /// The last message: why the watch is over. etcd may give no reason, then this is empty.
    pub canceled: Option<String>,
    /// Not 0: what the watch was to begin with is forgotten, and this is the first revision that is not.
    pub compact_revision: i64,
    /// What happened, oldest first. The events of one transaction come in one message.
    pub events: Vec<Event>,
}

/// What happened to a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It was put.
    Put(KeyValue),
    /// It was deleted, or ended with its lease.
    Delete {
        /// The key.
        key: Vec<u8>,
        /// The revision of its end.
        mod_revision: i64,
    },
}

impl Event {
    /// The revision at which it happened.
    pub fn revision(&self) -> i64 {
        match self {
            Event::Put(key) => key.mod_revision,
            Event::Delete { mod_revision, .. } => *mod_revision,
        }
    }
}
