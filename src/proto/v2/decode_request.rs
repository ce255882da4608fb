//! Reading requests: one line of a client becomes a [`Request`] that is right from then on, or the error to answer with.

use std::borrow::Cow;
use std::num::NonZeroU32;

use serde::Deserialize;

use super::{Answer, ClientInfo, ErrorCode, LockRequest, Mode, Request, SLOTS_MAX, Share, ShortText, error};
use crate::proto::{Key, Nonce, Outcome, Pid, Secret, Token};

/// Reads one request from one line, with or without its newline.
///
/// # Errors
/// The answer that the client is to be sent: always an [`Answer::Error`].
pub fn decode_request(line: &[u8]) -> Result<Request, Answer> {
    // Half of all requests may be this one, and serde takes several times as long for it.
    if line.trim_ascii_end() == b"{\"type\":\"release\"}" {
        return Ok(Request::Release { outcome: Outcome::Unknown });
    }
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

/// A text as it stands in the line, if there is nothing in it to unescape. (serde borrows no `Option<Cow<str>>`.)
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

fn key(Text(text): Text<'_>) -> Result<Key, Answer> {
    Key::new(text).map_err(|e| error(ErrorCode::BadKey, e.to_string()))
}
