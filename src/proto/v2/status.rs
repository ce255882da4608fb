//! What a status says of locks: their holders and waiters, and the runs that are remembered.

use serde::{Deserialize, Serialize};

use super::{ClientInfo, Mode, ShortText};
use crate::proto::{Outcome, Protocol, Token};

/// One lock, for a status.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LockStatus {
    /// Its key, when a protocol 2 client has named it. Protocol 1 sends only the hash.
    pub key: Option<String>,
    /// The MD5 of its key, in hexadecimal digits.
    pub id: String,
    /// The holders, [`LISTED_MAX`](super::LISTED_MAX) at the most.
    pub holders: Vec<LockUser>,
    /// How many hold it.
    pub holding: u32,
    /// The first waiters, [`LISTED_MAX`](super::LISTED_MAX) at the most.
    pub waiters: Vec<LockUser>,
    /// How many wait.
    pub waiting: u32,
    /// The last run that succeeded and is remembered; only in the status of one lock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_success: Option<Box<RunStatus>>,
    /// The last run that failed and is remembered; only in the status of one lock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<Box<RunStatus>>,
}

/// A holder or a waiter, for other people to read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockUser {
    /// The protocol that it speaks: 1 or 2.
    pub protocol: Protocol,
    /// Its user id, as the kernel knows it; only on Unix sockets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// What it said of itself. On Unix sockets the pid is the kernel's.
    #[serde(flatten)]
    pub who: ClientInfo,
    /// For how long it has held the lock, or waited for it, in milliseconds.
    pub for_ms: u64,
    /// Of a holder: the token of its grant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
    /// Of a waiter: what it waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// It shares the lock.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// The daemon was restarted, and has not heard of this holder since.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub orphan: bool,
}

/// A run that is over, as far as it is remembered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunStatus {
    /// How it ended.
    pub outcome: Outcome,
    /// The token of its lock.
    pub token: Token,
    /// How long ago it began, in milliseconds.
    pub age_ms: u64,
    /// Who ran it: `USER@HOST`.
    pub by: ShortText,
}
