//! What can go wrong with etcd: at one endpoint ([`Failure`]), and in a whole call ([`Error`]). What matters most to the
//! caller is whether etcd may have done what the call asked for.

use crate::proto::text::is_harmful;
use std::fmt;

use super::Endpoint;
use super::store::Changed;

/// The longest text of etcd's that is passed on, in characters.
const MESSAGE_CHARS_MAX: usize = 300;

/// gRPC's status codes, as far as they mean something here.
const NOT_FOUND: i64 = 5;
/// The codes with which an answer is final: etcd has looked at the request and did not carry it out. What it says with
/// any other (Unavailable, DeadlineExceeded, Unknown, ...) may be said while the request is on its way.
const FINAL: [i64; 8] = [3, NOT_FOUND, 6, PERMISSION_DENIED, 8, 9, 11, UNAUTHENTICATED];
const PERMISSION_DENIED: i64 = 7;
const UNAUTHENTICATED: i64 = 16;

/// Why a call did not get its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The client could not connect to any endpoint. etcd has surely done nothing.
    Unreachable {
        /// Each endpoint with what happened there.
        why: String,
    },
    /// The request was sent, and no complete answer came. etcd may have done it, or may still do it.
    Unknown {
        /// Each endpoint with what happened there.
        why: String,
    },
    /// etcd refused. It has surely done nothing.
    Refused {
        /// gRPC's status code.
        code: i64,
        /// What etcd said.
        message: String,
    },
    /// The answer is not one of etcd. The request may have been done.
    BadReply {
        /// Each endpoint with what happened there.
        why: String,
    },
    /// The store went back, or it is another one: what was read from it before is not true any more. What was asked for may
    /// have been done.
    StoreChanged {
        /// How that shows.
        why: String,
    },
}

/// The kinds of trouble that an administrator has to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// No endpoint answers.
    Unreachable,
    /// The members have no leader.
    NoLeader,
    /// The user has no permission, or is not known.
    NoPermission,
    /// The store is full.
    NoSpace,
    /// etcd refuses for another reason.
    Refused,
    /// What answers is no etcd.
    NoEtcd,
    /// The store went back.
    StoreChanged,
}

impl Error {
    /// Returns `true` if etcd refused because the lease has ended.
    pub fn is_lease_gone(&self) -> bool {
        matches!(self, Error::Refused { code, message } if says_lease_gone(*code, message))
    }

    /// Returns the kind of trouble.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Unreachable { why } | Error::Unknown { why } if why.contains("no leader") => {
                Kind::NoLeader
            }
            Error::Unreachable { .. } | Error::Unknown { .. } => Kind::Unreachable,
            Error::Refused { code, message } => refusal_kind(*code, message),
            Error::BadReply { .. } => Kind::NoEtcd,
            Error::StoreChanged { .. } => Kind::StoreChanged,
        }
    }

    /// Returns the error of a call that failed at each of these endpoints.
    pub(super) fn of(failures: &[(&Endpoint, Failure)]) -> Error {
        let each = failures.iter().map(|(endpoint, failure)| format!("{endpoint}: {failure}"));
        let why = each.collect::<Vec<_>>().join("; ");
        let any = |kind: fn(&Failure) -> bool| failures.iter().any(|(_, failure)| kind(failure));
        if any(|failure| matches!(failure, Failure::NoAnswer { .. } | Failure::Refused { .. })) {
            Error::Unknown { why }
        } else if any(|failure| matches!(failure, Failure::BadReply(_))) {
            Error::BadReply { why }
        } else {
            Error::Unreachable { why }
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unreachable { why } => write!(f, "cannot reach etcd: {why}"),
            Error::Unknown { why } => write!(f, "no answer from etcd: {why}"),
            Error::Refused { message, .. } => write!(f, "etcd refused: {message}"),
            Error::BadReply { why } => write!(f, "not the answer of an etcd: {why}"),
            Error::StoreChanged { why } => write!(f, "the store went back: {why}"),
        }
    }
}

impl std::error::Error for Error {}

/// Why one attempt at one endpoint has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It could not be connected to: nothing was sent.
    NotSent(String),
    /// It was sent to, and there was no whole answer, or one that leaves open what was done.
    NoAnswer {
        why: String,
        /// The connection ended before a byte of an answer.
        was_closed: bool,
    },
    /// It has refused.
    Refused { code: i64, message: String },
    /// It has answered what makes no sense.
    BadReply(String),
}

impl Failure {
    pub(super) fn no_answer(why: impl Into<String>) -> Failure {
        Failure::NoAnswer { why: why.into(), was_closed: false }
    }

    /// From what etcd itself says is wrong.
    pub(super) fn from_etcd(code: i64, message: &str) -> Failure {
        let message = one_line(message);
        match FINAL.contains(&code) {
            true => Failure::Refused { code, message },
            false => Failure::no_answer(message),
        }
    }

    pub(super) fn is_lease_gone(&self) -> bool {
        matches!(self, Failure::Refused { code, message } if says_lease_gone(*code, message))
    }

    /// True when another token may help: this one has ended (they last five minutes, and not beyond a restart of the
    /// member), users or roles have changed since it was given, or there is none and should be.
    pub(super) fn is_stale_token(&self) -> bool {
        let Failure::Refused { code, message } = self else { return false };
        let says = |text: &str| message.contains(text);
        *code == UNAUTHENTICATED
            || says("invalid auth token")
            || says("revision of auth store is old")
            || says("user name is empty")
    }

    /// Returns `true` if etcd has no users at all.
    pub(super) fn is_auth_disabled(&self) -> bool {
        matches!(self, Failure::Refused { message, .. } if message.contains("authentication is not enabled"))
    }

    /// The error of a call that was refused and had not been tried elsewhere before.
    pub(super) fn into_error(self, endpoint: &Endpoint) -> Error {
        match self {
            Failure::Refused { code, message } => Error::Refused { code, message },
            other => Error::of(&[(endpoint, other)]),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::NotSent(why) | Failure::NoAnswer { why, .. } | Failure::BadReply(why) => {
                f.write_str(why)
            }
            Failure::Refused { message, .. } => write!(f, "refused: {message}"),
        }
    }
}

fn refusal_kind(code: i64, message: &str) -> Kind {
    let says = |text: &str| message.contains(text);
    if code == PERMISSION_DENIED
        || code == UNAUTHENTICATED
        || ["permission denied", "auth token", "user name is empty", "authentication failed"]
            .into_iter()
            .any(says)
    {
        Kind::NoPermission
    } else if says("database space exceeded") {
        Kind::NoSpace
    } else {
        Kind::Refused
    }
}

impl From<Changed> for Error {
    fn from(Changed(why): Changed) -> Error {
        Error::StoreChanged { why }
    }
}

fn says_lease_gone(code: i64, message: &str) -> bool {
    code == NOT_FOUND && message.contains("requested lease not found")
}

/// Makes a text from the network fit for one line of a terminal or a log.
pub(super) fn one_line(text: &str) -> String {
    let plain = text.trim().chars().map(|c| if is_harmful(c) { ' ' } else { c });
    plain.take(MESSAGE_CHARS_MAX).collect()
}

/// Makes the first letter lower case: the system's messages begin with a capital letter, which is odd after a colon.
pub(super) fn lower(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_ascii_lowercase());
    first.into_iter().chain(chars).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(failures: &[Failure]) -> Error {
        let endpoints: Vec<Endpoint> =
            (1..=failures.len()).map(|n| format!("http://e{n}:1").parse().unwrap()).collect();
        Error::of(&endpoints.iter().zip(failures.iter().cloned()).collect::<Vec<_>>())
    }

    #[test]
    fn one_attempt_that_may_have_been_done_makes_all_unknown() {
        let not_sent = || Failure::NotSent("connection refused".into());
        let bad = || Failure::BadReply("HTTP status 404".into());
        assert!(matches!(errors(&[not_sent(), not_sent()]), Error::Unreachable { .. }));
        assert!(matches!(errors(&[not_sent(), bad()]), Error::BadReply { .. }));
        assert!(matches!(errors(&[Failure::no_answer("x"), not_sent(), bad()]), Error::Unknown { .. }));
    }

    #[test]
    fn a_text_names_each_endpoint_in_one_line() {
        let error = errors(&[Failure::NotSent("connection refused".into()), Failure::no_answer("too slow")]);
        assert_eq!(
            error.to_string(),
            "no answer from etcd: http://e1:1: connection refused; http://e2:1: too slow"
        );
        let refused =
            Failure::from_etcd(7, "permission\ndenied\x1b[1m\n").into_error(&"http://e".parse().unwrap());
        assert_eq!(refused.to_string(), "etcd refused: permission denied [1m");
        let Failure::NoAnswer { why, .. } = Failure::from_etcd(14, &"x".repeat(1_000_000)) else { panic!() };
        assert_eq!(why.len(), MESSAGE_CHARS_MAX);
    }

    #[test]
    fn only_a_final_code_is_a_refusal() {
        for code in [1, 2, 4, 10, 13, 14, 15, 0, -1, i64::MAX] {
            assert!(matches!(Failure::from_etcd(code, "x"), Failure::NoAnswer { .. }), "{code}");
        }
        for code in [3, 5, 7, 8, 9, 11, 16] {
            assert!(matches!(Failure::from_etcd(code, "x"), Failure::Refused { .. }), "{code}");
        }
        let refused = |code, text: &str| Error::Refused { code, message: text.into() };
        assert!(refused(5, "etcdserver: requested lease not found").is_lease_gone());
        assert!(!refused(5, "etcdserver: key not found").is_lease_gone());
    }
}
