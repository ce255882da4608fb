//! Protocol 2: one JSON object a line, after a preamble that stands where protocol 1 has a key.

use std::borrow::Cow;
use std::io::Write;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

pub use super::text::ShortText;
use super::{Key, Nonce, Outcome, Pid, Protocol, Secret, Token};

/// What a client sends first, in place of a protocol 1 key.
pub const PREAMBLE: [u8; 16] = *b"\0kmutex proto 2\n";
/// The longest frame, in bytes, its newline included.
pub const FRAME_BYTES_MAX: usize = 64 * 1024;
/// How many holders, and how many waiters, one frame lists at the most: as many as fit in it however long their texts
/// are. The counts beside the lists are always whole.
pub const LISTED_MAX: usize = 12;
/// The most holders that `slots` can ask for.
pub const SLOTS_MAX: u32 = 1_000_000;

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
    /// I still want the lock that I was offered. Answered with [`Answer::Granted`] if the offer still stands.
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

/// Who asks for a lock, as the client tells it. For people to read: nothing is decided by it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClientInfo {
    /// The process id, if it is known.
    #[serde(with = "pid_or_zero")]
    pub pid: Option<Pid>,
    /// The machine's name.
    #[serde(skip_serializing_if = "ShortText::is_empty")]
    pub host: ShortText,
    /// The user's name.
    #[serde(skip_serializing_if = "ShortText::is_empty")]
    pub user: ShortText,
    /// The command that runs, or will run, under the lock.
    #[serde(skip_serializing_if = "ShortText::is_empty")]
    pub command: ShortText,
    /// Whatever the user wants others to see.
    #[serde(skip_serializing_if = "ShortText::is_empty")]
    pub note: ShortText,
}

/// A process id that is 0 on the wire when it is not known.
mod pid_or_zero {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Pid;

    pub(super) fn serialize<S: Serializer>(pid: &Option<Pid>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(Pid::number(*pid))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Pid>, D::Error> {
        u32::deserialize(deserializer).map(Pid::new)
    }
}

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
        /// The holders, [`LISTED_MAX`] at the most.
        holders: Vec<LockUser>,
        /// How many queue waiters come before you.
        ahead: u32,
        /// Your place in the order of arrival, to resume with.
        place: u64,
    },
    /// You may have the lock that you wait for: answer with [`Request::Take`]. Without that answer another waiter gets it.
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
        /// The holders, [`LISTED_MAX`] at the most.
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
    /// You hold the lock, and a waiter follows your output: say when it has [`Request::Grown`].
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

/// One lock, for a status.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LockStatus {
    /// Its key, when a protocol 2 client has named it. Protocol 1 sends only the hash.
    pub key: Option<String>,
    /// The MD5 of its key, in hexadecimal digits.
    pub id: String,
    /// The holders, [`LISTED_MAX`] at the most.
    pub holders: Vec<LockUser>,
    /// How many hold it.
    pub holding: u32,
    /// The first waiters, [`LISTED_MAX`] at the most.
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

/// A text as it stands in the line, if there is nothing in it to unescape. (serde borrows no `Option<Cow<str>>`.)
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Every field of every request. One flat struct, because serde would copy a tagged enum twice on the daemon's hot path.
#[derive(Deserialize)]
struct Frame<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    key: Option<Text<'a>>,
    nonce: Option<Nonce>,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    shared: bool,
    slots: Option<u32>,
    #[serde(default)]
    nowait: bool,
    #[serde(default)]
    exec: bool,
    #[serde(default)]
    offers: bool,
    #[serde(default)]
    inherits: bool,
    within: Option<Token>,
    #[serde(default)]
    who: ClientInfo,
    holds: Option<Token>,
    child: Option<u32>,
    place: Option<u64>,
    #[serde(default)]
    fresh_ms: u64,
    #[serde(default)]
    fresh_failure_ms: u64,
    #[serde(default)]
    newest: bool,
    replace_after_ms: Option<u64>,
    #[serde(default)]
    no_replace: bool,
    weight: Option<u32>,
    share: Option<Share>,
    #[serde(default)]
    stale_ms: u64,
    stream: Option<u8>,
    data: Option<String>,
    #[serde(default)]
    why: ShortText,
    held_ms: Option<u64>,
    outcome: Option<Outcome>,
    pid: Option<u32>,
    #[serde(default)]
    cluster: bool,
    name: Option<String>,
    secret: Option<Secret>,
}

/// Reads one request from one line, with or without its newline.
///
/// # Errors
/// The answer that the client is to be sent: always an [`Answer::Error`].
pub fn decode_request(line: &[u8]) -> Result<Request, Answer> {
    // serde would read a struct from an array as well.
    if line.trim_ascii_start().first() != Some(&b'{') {
        return Err(error(ErrorCode::BadFrame, "the line is not a JSON object"));
    }
    // All at once, which is quicker than text by text.
    let Ok(line) = std::str::from_utf8(line) else {
        return Err(error(ErrorCode::BadFrame, "the line is not a JSON object: it is not UTF-8"));
    };
    let frame: Frame<'_> = serde_json::from_str(line).map_err(|e| match e.classify() {
        serde_json::error::Category::Data => error(ErrorCode::BadRequest, e.to_string()),
        _ => error(ErrorCode::BadFrame, format!("the line is not a JSON object: {e}")),
    })?;
    match &*frame.kind {
        "lock" => Ok(Request::Lock(frame.into_lock()?)),
        "release" => Ok(Request::Release { outcome: frame.outcome.unwrap_or(Outcome::Unknown) }),
        "take" => Ok(Request::Take),
        "child" => match frame.pid.and_then(Pid::new) {
            Some(pid) => Ok(Request::Child { pid }),
            None => Err(error(ErrorCode::BadRequest, "child: pid is missing")),
        },
        "unlock" => match (frame.key, frame.pid.and_then(Pid::new)) {
            (Some(text), Some(pid)) => Ok(Request::Unlock {
                key: key(text)?,
                pid,
                outcome: frame.outcome.unwrap_or(Outcome::Unknown),
            }),
            _ => Err(error(ErrorCode::BadRequest, "unlock: key or pid is missing")),
        },
        "forget" => match frame.key {
            Some(text) => Ok(Request::Forget { key: key(text)? }),
            None => Err(error(ErrorCode::BadRequest, "forget: key is missing")),
        },
        "overdue" => match frame.held_ms {
            Some(held_ms) => Ok(Request::Overdue { held_ms }),
            None => Err(error(ErrorCode::BadRequest, "overdue: held_ms is missing")),
        },
        "break" => match frame.key {
            Some(text) => Ok(Request::Break { key: key(text)? }),
            None => Err(error(ErrorCode::BadRequest, "break: key is missing")),
        },
        "output" => Ok(Request::Output),
        "piece" => match (frame.stream, frame.data) {
            (Some(stream @ 1..=2), Some(data)) => Ok(Request::Piece { stream, data }),
            _ => Err(error(ErrorCode::BadRequest, "piece: stream or data is missing")),
        },
        "withhold" => Ok(Request::Withhold { why: frame.why }),
        "grown" => Ok(Request::Grown),
        "status" => Ok(Request::Status { key: frame.key.map(key).transpose()?, cluster: frame.cluster }),
        "ping" => Ok(Request::Ping),
        "auth" => match (frame.name, frame.secret) {
            (Some(name), Some(secret)) => Ok(Request::Auth { name, secret }),
            _ => Err(error(ErrorCode::BadRequest, "auth: name or secret is missing")),
        },
        kind => {
            let kind = ShortText::from(kind);
            Err(error(ErrorCode::UnknownType, format!("no such request: {:?}", kind.as_str())))
        }
    }
}

impl Frame<'_> {
    fn into_lock(self) -> Result<Box<LockRequest>, Answer> {
        let Some(text) = self.key else {
            return Err(error(ErrorCode::BadRequest, "lock: key is missing"));
        };
        let slots = self.slots.unwrap_or(1);
        if !(1..=SLOTS_MAX).contains(&slots) {
            return Err(error(ErrorCode::BadRequest, format!("lock: slots is not from 1 to {SLOTS_MAX}")));
        }
        if self.shared && slots > 1 {
            return Err(error(ErrorCode::BadRequest, "lock: shared and slots exclude each other"));
        }
        let is_plural = self.shared || slots > 1;
        if is_plural && (self.fresh_ms > 0 || self.fresh_failure_ms > 0 || self.mode == Mode::Coalesce) {
            let message = "lock: fresh and coalesce need a lock with one holder, not shared or slots";
            return Err(error(ErrorCode::BadRequest, message));
        }
        if is_plural && (self.newest || self.replace_after_ms.is_some()) {
            let message = "lock: newest and replace need a lock with one holder, not shared or slots";
            return Err(error(ErrorCode::BadRequest, message));
        }
        if self.share.is_some() && (is_plural || self.exec) {
            let message = "lock: share needs a lock with one holder that waits for its command, not shared, slots or exec";
            return Err(error(ErrorCode::BadRequest, message));
        }
        if self.stale_ms > 0 && self.share.is_none() {
            return Err(error(ErrorCode::BadRequest, "lock: stale_ms needs share"));
        }
        if self.newest && self.mode != Mode::Queue {
            return Err(error(ErrorCode::BadRequest, "lock: newest needs the mode queue"));
        }
        if self.replace_after_ms.is_some() && !self.newest {
            return Err(error(ErrorCode::BadRequest, "lock: replace_after_ms needs newest"));
        }
        let weight = match self.weight {
            None => None,
            Some(weight) if (1..=slots).contains(&weight) => NonZeroU32::new(weight),
            Some(_) => return Err(error(ErrorCode::BadRequest, "lock: weight is not from 1 to slots")),
        };
        let key = key(text)?;
        Ok(Box::new(LockRequest {
            key,
            nonce: self.nonce,
            mode: self.mode,
            shared: self.shared,
            slots,
            nowait: self.nowait,
            exec: self.exec,
            offers: self.offers,
            inherits: self.inherits,
            within: self.within,
            holds: self.holds,
            child: self.child.and_then(Pid::new),
            place: self.place,
            fresh_ms: self.fresh_ms,
            fresh_failure_ms: self.fresh_failure_ms,
            newest: self.newest,
            replace_after_ms: self.replace_after_ms,
            no_replace: self.no_replace,
            weight,
            share: self.share,
            stale_ms: self.stale_ms,
            sharer: 0,
            who: self.who,
        }))
    }
}

fn key(Text(text): Text<'_>) -> Result<Key, Answer> {
    Key::new(text).map_err(|e| error(ErrorCode::BadKey, e.to_string()))
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

/// Returns the proof in a request: the nonce of the lock request on the same connection.
pub fn proof(line: &[u8]) -> Option<Nonce> {
    #[derive(Deserialize)]
    struct Proof {
        proof: Option<Nonce>,
    }
    serde_json::from_slice::<Proof>(line).ok()?.proof
}

/// Appends a request with its proof, which [`proof`] returns, and a newline to a buffer in memory.
pub fn encode_proven(request: &Request, nonce: Nonce, buffer: &mut Vec<u8>) {
    encode(request, &mut *buffer);
    // In the place of the closing brace and the newline.
    buffer.truncate(buffer.len() - 2);
    buffer.extend_from_slice(format!(",\"proof\":\"{}\"}}\n", String::from(nonce)).as_bytes());
}

/// Appends an answer and its newline to a buffer, as [`encode`] does.
pub fn encode_answer(answer: &Answer, buffer: &mut Vec<u8>) {
    match answer {
        // A daemon answers little else, and serde takes several times as long for it.
        Answer::Released => buffer.extend_from_slice(b"{\"type\":\"released\"}\n"),
        Answer::Granted { token, lease: None, stale: None } => {
            writeln!(buffer, r#"{{"type":"granted","token":{token}}}"#)
                .expect("memory takes what is written");
        }
        _ => encode(answer, buffer),
    }
}

/// Appends a message and its newline to a buffer in memory.
pub fn encode(message: &impl Serialize, mut buffer: impl Write) {
    serde_json::to_writer(&mut buffer, message).expect("a message has no part that JSON lacks");
    buffer.write_all(b"\n").expect("memory takes what is written");
}

#[cfg(test)]
mod tests;
