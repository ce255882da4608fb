//! What the daemon answers, and the reading and writing of it.

use serde::{Deserialize, Serialize};

use super::{LockStatus, LockUser, RunStatus, ShortText, encode};
use crate::proto::{Outcome, Token};

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
#[non_exhaustive]
pub enum Answer {
    /// The greeting, once, in answer to the preamble.
    Hello {
        /// Of the daemon.
        version: String,
        /// Of the daemon.
        pid: u32,
        /// After so many milliseconds without a word, the machine at the other end of this connection counts as gone; only over
        /// TCP.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        peer_timeout_ms: Option<u64>,
    },
    /// The daemon knows the client by the name that it gave.
    Welcome,
    /// You hold the lock.
    Granted {
        /// The fencing token of this grant.
        token: Token,
        /// How long it may be relied on, where hosts share their locks, and over TCP.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease: Option<LeaseTerms>,
        /// The result to use meanwhile, for a request with `stale_ms`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stale: Option<Box<Stale>>,
    },
    /// Another client holds it; you are waiting.
    Waiting {
        /// The holders, [`LISTED_MAX`](super::LISTED_MAX) at the most.
        holders: Vec<LockUser>,
        /// How many queue waiters come before you.
        ahead: u32,
        /// Your place in the order of arrival, to resume with.
        place: u64,
    },
    /// You may have the lock that you wait for: answer with [`Request::Take`](super::Request::Take).
    /// Without that answer another waiter gets it.
    Offered,
    /// The holder that you waited for is done. You hold nothing.
    Finished {
        /// How it ended.
        outcome: Outcome,
        /// The token that it held.
        token: Token,
        /// The output, for a request with `share`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        output: Option<OutputAt>,
    },
    /// Another client holds it and you did not want to wait. You hold nothing.
    Busy {
        /// The holders, [`LISTED_MAX`](super::LISTED_MAX) at the most.
        holders: Vec<LockUser>,
    },
    /// You hold the lock no more, whatever you do.
    Lost {
        /// Why, for people.
        why: ShortText,
    },
    /// The work was done recently enough for the request. You hold nothing.
    Fresh {
        /// The run that did it.
        run: RunStatus,
        /// The output, for a request with `share`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        output: Option<OutputAt>,
    },
    /// You wait with `share` `live`: the output of the run that you wait for is in the file whose descriptor comes with
    /// this, and grows.
    Output {
        /// The token of that run.
        token: Token,
    },
    /// That output is longer than it was.
    Grown,
    /// The run whose output you follow will never be complete. You wait for the next one.
    Torn,
    /// You hold the lock, and a waiter follows your output: say when it has [`Request::Grown`](super::Request::Grown).
    Followed,
    /// The next part of an output.
    Piece {
        /// The stream: 1 or 2.
        stream: u8,
        /// What was written to it, as base64.
        data: String,
    },
    /// A newer request wants the lock instead of this one. You hold nothing.
    Superseded,
    /// You hold the lock, and another client wants it: stop, then release.
    Stop {
        /// Why, for people.
        why: ShortText,
    },
    /// What was remembered of the lock's runs is forgotten.
    Forgotten,
    /// You have released.
    Released,
    /// The lock that you wanted broken is, if anybody held it.
    Broken,
    /// One lock of a status.
    Lock(LockStatus),
    /// The status is complete.
    End,
    /// The answer to a ping.
    Pong {
        /// How long what you hold may be relied on, where hosts share their locks, and over TCP.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease: Option<LeaseTerms>,
    },
    /// The request was not carried out.
    Error {
        /// What kind of error, for programs.
        code: ErrorCode,
        /// What is wrong, for people.
        message: String,
    },
}

/// Where the output of a run is that is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OutputAt {
    /// In the file whose descriptor comes with this.
    Descriptor,
    /// In the [`Answer::Piece`]s before this.
    Pieces,
    /// Not for this client; this says why, for people.
    Withheld(ShortText),
}

/// An earlier result, for a client that runs anew.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stale {
    /// The run.
    pub run: RunStatus,
    /// Its output.
    pub output: OutputAt,
}

/// How long a lock may be relied on that is clustered, or that a client on another machine holds. A client without newer word from the daemon stops
/// then, as if the lock were lost: the daemon may have been stopped, and other hosts get the lock when its lease ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseTerms {
    /// For so many milliseconds after the request was sent that this is the answer to (a ping), or, without one, after
    /// this was sent.
    pub good_ms: u64,
    /// How long it then takes at the least until another host can have the lock, in milliseconds: the time to stop in.
    pub margin_ms: u64,
}

/// The kinds of error, for programs. See `docs/protocol.md` for which of them end the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// The line is no JSON object, or is too long. The connection is closed.
    BadFrame,
    /// The type of the message is not known.
    UnknownType,
    /// A field is missing or wrong.
    BadRequest,
    /// The key is empty or too long.
    BadKey,
    /// A lock request while one is under way on this connection, or a release while none is held.
    WrongState,
    /// It is not for you to ask.
    NotPermitted,
    /// What is to be broken, or given back, is not held.
    NotHeld,
    /// The lock is held by one under whose lock this was asked.
    HeldAbove,
    /// Two would wait for each other. The message says who.
    Deadlock,
    /// The daemon cannot record the lock, so it does not give it. The connection is closed.
    CannotRecord,
    /// Another client that names a weight says another number of slots.
    SlotsDiffer,
    /// The other hosts cannot be asked whether the lock is free, and the request was not to wait.
    Unavailable,
    /// Hosts that share their locks have exclusive ones only.
    PerHost,
    /// The daemon, or this user, has too many connections. The connection is closed.
    TooMany,
    /// The port speaks TLS, and the client does not. The connection is closed.
    TlsRequired,
    /// What a newer daemon may say.
    #[serde(other)]
    Other,
}

/// An [`Answer::Error`].
pub fn error(code: ErrorCode, message: impl Into<String>) -> Answer {
    // serde quotes what it did not expect, which may be as long as a frame.
    Answer::Error { code, message: ShortText::from(message.into()).into() }
}

/// Reads one answer from one line, with or without its newline.
///
/// # Errors
/// What is wrong with it, for people.
pub fn decode_answer(line: &[u8]) -> Result<Answer, String> {
    serde_json::from_slice(line).map_err(|e| format!("not an answer of protocol 2: {e}"))
}

/// Appends an answer and its newline to a buffer, as [`encode`] does.
pub fn encode_answer(answer: &Answer, buffer: &mut Vec<u8>) {
    match answer {
        // A daemon answers little else, and serde takes several times as long for it.
        Answer::Released => buffer.extend_from_slice(b"{\"type\":\"released\"}\n"),
        Answer::Granted { token, lease: None, stale: None } => {
            buffer.extend_from_slice(b"{\"type\":\"granted\",\"token\":");
            buffer.extend_from_slice(itoa::Buffer::new().format(token.0).as_bytes());
            buffer.extend_from_slice(b"}\n");
        }
        _ => encode(answer, buffer),
    }
}
