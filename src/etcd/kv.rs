//! Requests to etcd and its answers, in etcd's own terms (its API reference: KV, Lease, Watch). Data only; `codec` encodes
//! it.

/// Identifies a lease. 0 is no lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

/// A lease that was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its id.
    pub id: LeaseId,
    /// How long it lasts without a keep-alive. etcd may give more than was asked for: its least is somewhat above the
    /// time of an election.
    pub ttl_secs: u64,
}

/// The answer to a keep-alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptAlive {
    /// The new time to live. 0: the lease is gone.
    pub ttl_secs: u64,
    /// The revision of the store when etcd answered.
    pub revision: i64,
    /// `true` if the revision is lower than one that was seen before: the member lags, or the store went back.
    pub is_behind: bool,
}

/// How much of a lease's time is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeToLive {
    /// For how long it was granted.
    pub granted_secs: u64,
    /// How many whole seconds are left.
    pub left_secs: u64,
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
    /// The lease of the key: etcd deletes the key when the lease ends. 0: none.
    pub lease: LeaseId,
}

/// Compares, and then does one of two lists of operations, all at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// All of these must be true for `then`.
    pub compare: Vec<Compare>,
    /// Done if the comparisons are true. No key may be put twice.
    pub then: Vec<Op>,
    /// Done if they are not.
    pub or_else: Vec<Op>,
}

/// A comparison of a [`Txn`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key was created at this revision. 0: there is no such key.
    CreateRevision {
        /// The key.
        key: Vec<u8>,
        /// The revision.
        revision: i64,
    },
    /// The key was last put at this revision. 0: there is no such key.
    ModRevision {
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
        /// The lease of the key. `None`: the key stays until it is deleted.
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

/// The answer to a [`Txn`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TxnReply {
    /// The revision of the store after it.
    pub revision: i64,
    /// `true` if etcd did [`Txn::then`], `false` if it did [`Txn::or_else`].
    pub succeeded: bool,
    /// The results of the [`Op::Range`]s of that list, in order.
    pub ranges: Vec<Vec<KeyValue>>,
}

/// The answer to a [`Range`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeReply {
    /// The revision of the store that was read.
    pub revision: i64,
    /// The keys.
    pub kvs: Vec<KeyValue>,
    /// `true` if there are more keys than the limit.
    pub more: bool,
}

/// One message of a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchReply {
    /// The revision of the store. 0 if etcd gives none, as when it cancels.
    pub revision: i64,
    /// The first message: the watch has begun.
    pub created: bool,
    /// The last message: why etcd ends the watch. Empty if etcd gives no reason.
    pub canceled: Option<String>,
    /// Not 0: the revision from which the watch should begin is compacted, and this is the first one that is not.
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
    /// Returns the revision at which it happened.
    pub fn revision(&self) -> i64 {
        match self {
            Event::Put(key) => key.mod_revision,
            Event::Delete { mod_revision, .. } => *mod_revision,
        }
    }
}
