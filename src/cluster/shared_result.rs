//! Results of runs that hosts share: what a holder's host records in etcd, and what the other hosts find there.
//!
//! A result is recorded in the transaction that records the outcome, and has the token of that hold. So no client is told the
//! outcome of one run with the result of another. The content is opaque here.

use crate::proto::Token;
use crate::proto::v2::ShortText;
use crate::table::Run;

/// A row of pieces, or why there is none.
pub type Content = Result<Box<[u8]>, ShortText>;

/// With which record a result is, and goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultOf {
    /// The last hold with a known end.
    Done,
    /// The last run that counts and succeeded.
    Success,
    /// The last run that counts and failed.
    Failure,
}

/// The user of a run, as the daemon of its host knows the user: by uid, or over TCP by name, if the client has one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunUser {
    /// The uid, as the kernel states it.
    pub uid: Option<u32>,
    /// The name.
    pub name: Option<String>,
    /// The result is for all users.
    pub for_all: bool,
}

/// What a host records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnResult {
    /// The hold that the run was made under.
    pub token: Token,
    /// Who may have it.
    pub user: RunUser,
    /// What it is.
    pub content: Content,
}

/// What a host finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedResult {
    /// With which record.
    pub of: ResultOf,
    /// The hold that the run was made under.
    pub token: Token,
    /// Stands for the user who may have it, as in the table.
    pub sharer: u64,
    /// What it is.
    pub content: Content,
}

/// A result of which clients of this host are about to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundResult {
    /// The token that they are told.
    pub token: Token,
    /// The run, if it counts for later requests too.
    pub run: Option<Run>,
    /// `None`: there is none of that run.
    pub result: Option<SharedResult>,
}
