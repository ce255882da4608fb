//! What a client asks: the requests, and the fields of a request for a lock.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use super::{ClientInfo, ShortText};
use crate::proto::{Key, Nonce, Outcome, Pid, Secret, Token};

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
#[non_exhaustive]
pub enum Request {
    /// The client is this name. Comes before every other request, if the daemon wants it.
    Auth {
        /// The name.
        name: String,
        /// Its secret.
        secret: Secret,
    },
    /// I want this lock.
    Lock(Box<LockRequest>),
    /// I still want the lock that I was offered. Answered with [`Answer::Granted`](super::Answer::Granted) if the
    /// offer still stands.
    Take,
    /// I am done with the lock that I hold.
    Release {
        /// How it ended.
        outcome: Outcome,
    },
    /// The lock that I hold has been inherited by this process: it lasts as long as it lives, too. Not answered.
    Child {
        /// Its process id.
        pid: Pid,
    },
    /// This process, for which the lock was taken by a client that has gone since, is done with it.
    Unlock {
        /// The lock.
        key: Key,
        /// The process, as it was named in [`LockRequest::child`].
        pid: Pid,
        /// How it ended.
        outcome: Outcome,
    },
    /// Forget when this lock's work was last done: the next request runs.
    Forget {
        /// The lock.
        key: Key,
    },
    /// Take this lock from its holders.
    Break {
        /// The lock.
        key: Key,
    },
    /// Which locks are there? One, or all.
    Status {
        /// The one that is wanted.
        #[serde(skip_serializing_if = "Option::is_none")]
        key: Option<Key>,
        /// The locks that all clustered hosts hold.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        cluster: bool,
    },
    /// The lock that I hold is held for longer than I meant to. Not answered; the daemon logs it.
    Overdue {
        /// For how long it has been held, in milliseconds.
        held_ms: u64,
    },
    /// The output of the command that runs under my lock is in the file whose descriptor comes with this. Not answered.
    Output,
    /// The next part of that output. Only for small outputs, where no descriptor can be passed. Not answered.
    Piece {
        /// The stream: 1 or 2.
        stream: u8,
        /// What was written to it, as base64.
        data: String,
    },
    /// No other client gets that output. Not answered.
    Withhold {
        /// Why, for people.
        why: ShortText,
    },
    /// The output is longer than it was when I last said so. Not answered.
    Grown,
    /// Are you there?
    Ping,
}

/// One request for one lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LockRequest {
    /// The lock that is wanted.
    pub key: Key,
    /// Names this request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nonce: Option<Nonce>,
    /// What to wait for if another client holds it.
    pub mode: Mode,
    /// Others who also said so may hold it beside me.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// I take it while fewer than this many hold it. 1 is the ordinary, exclusive lock.
    #[serde(skip_serializing_if = "is_one")]
    pub slots: u32,
    /// Do not wait at all.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub nowait: bool,
    /// The client becomes the command (`kmutex run --no-fork`): no process is left to release, so the end of the stream is
    /// the end of the work, with the outcome `unknown`, and not a holder that vanished.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub exec: bool,
    /// When I have waited and it is my turn, offer me the lock, and grant it when I answer with [`Request::Take`]: I may be
    /// stopped by then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub offers: bool,
    /// A command will inherit the connection, and I shall name it with [`Request::Child`]: the lock lasts as long as
    /// either of us lives, even if I am killed before I can name it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub inherits: bool,
    /// The token of the lock under which the command runs that asks. Its holder waits for me, so I cannot wait for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within: Option<Token>,
    /// When a hold is resumed: the token of its grant. The lock is not asked for anew if the daemon knows nothing of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holds: Option<Token>,
    /// When a hold is resumed: the process that has inherited the lock, as in [`Request::Child`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub child: Option<Pid>,
    /// When waiting is resumed: the place that the daemon before gave.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<u64>,
    /// A run that succeeded counts for this request if it began less than so many milliseconds ago; 0: none does.
    #[serde(skip_serializing_if = "is_zero")]
    pub fresh_ms: u64,
    /// A run that failed counts for this request if it began less than so many milliseconds ago; 0: none does.
    #[serde(skip_serializing_if = "is_zero")]
    pub fresh_failure_ms: u64,
    /// Of the requests with this flag that wait, only the newest goes on waiting.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub newest: bool,
    /// The holder is asked to stop if it still holds the lock after so many milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replace_after_ms: Option<u64>,
    /// As a holder, the client is never asked to stop.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_replace: bool,
    /// How many of the slots the client takes. All clients that say so must agree about `slots`. `None`: one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<NonZeroU32>,
    /// The result of the run is for the clients that wait for it: as a waiter I want it, as a holder I give it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<Share>,
    /// The result of a run that succeeded is good enough while another client runs anew, if it began less than so many
    /// milliseconds ago; 0: none is.
    #[serde(skip_serializing_if = "is_zero")]
    pub stale_ms: u64,
    /// Stands for the user whose results the client may have. Filled in by the daemon; 0: none.
    #[serde(skip)]
    pub sharer: u64,
    /// Who asks, for other people to read.
    pub who: ClientInfo,
}

impl LockRequest {
    /// An exclusive request that waits, with nothing said of who asks.
    pub fn new(key: Key, mode: Mode) -> LockRequest {
        LockRequest {
            key,
            nonce: None,
            mode,
            shared: false,
            slots: 1,
            nowait: false,
            exec: false,
            offers: false,
            inherits: false,
            within: None,
            holds: None,
            child: None,
            place: None,
            fresh_ms: 0,
            fresh_failure_ms: 0,
            newest: false,
            replace_after_ms: None,
            no_replace: false,
            weight: None,
            share: None,
            stale_ms: 0,
            sharer: 0,
            who: ClientInfo::default(),
        }
    }
}

// By reference, because serde calls them so.
fn is_zero(millis: &u64) -> bool {
    *millis == 0
}

fn is_one(slots: &u32) -> bool {
    *slots == 1
}

/// What a waiter waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Mode {
    /// To hear that the holder is done: its work need not be done again.
    #[default]
    Once,
    /// For its turn.
    Queue,
    /// To hear that a run is done that began after the request came. Of all requests that wait so, the newest runs.
    Coalesce,
}

/// When a waiter gets the result of the run that it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Share {
    /// At its end, as a whole.
    Whole,
    /// As it comes.
    Live,
}
