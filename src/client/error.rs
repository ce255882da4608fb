//! What can go wrong for a client, in words for its user and as an exit code.

use std::io;
use std::path::PathBuf;

use crate::addr::{self, Addr, Reason};
use crate::exit::Exit;
use crate::proto::KeyError;
use crate::proto::v2::Answer;

/// Why a client cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The daemon's address is wrong, or it cannot be reached.
    #[error(transparent)]
    Addr(addr::Error),
    /// No daemon can be started.
    #[error("cannot start a daemon on {}: {why}", path.display())]
    Autostart {
        /// Where.
        path: PathBuf,
        /// What the daemon or the operating system said.
        why: String,
        /// The exit code that fits.
        exit: Exit,
    },
    /// The daemon belongs to somebody who is not trusted.
    #[error("not trusting the daemon on {addr}: it belongs to uid {uid} ({}); see --trust-uid", user.as_deref().unwrap_or("of no name"))]
    Untrusted {
        /// Where.
        addr: Addr,
        /// Whose it is.
        uid: u32,
        /// The same, for people, if it is known.
        user: Option<String>,
    },
    /// The daemon closed the connection.
    #[error("the daemon closed the connection")]
    Closed,
    /// The lock was lost while it was held.
    #[error("the lock was lost: {0}")]
    Lost(String),
    /// The deadline came first.
    #[error("timed out")]
    TimedOut,
    /// The daemon does not answer a question that needs no waiting.
    #[error("the daemon does not answer")]
    Silent,
    /// The daemon says what no daemon may.
    #[error("the daemon does not speak protocol 2: {0}")]
    Protocol(String),
    /// The daemon gives no lock at the moment, because it cannot record it.
    #[error("the daemon cannot record the lock: {0}")]
    Unrecorded(String),
    /// Whether the lock is free cannot be told, because the other hosts cannot be asked.
    #[error("{0}")]
    Unavailable(String),
    /// The daemon shares its locks with other hosts, and has not this kind.
    #[error("{0}")]
    PerHost(String),
    /// To wait for this lock would be to wait for ever: the daemon says who waits for whom.
    #[error("it would wait for ever: {0}")]
    Deadlock(String),
    /// The daemon refused the request.
    #[error("the daemon refused: {0}")]
    Refused(String),
    /// The kernel refused something.
    #[error("cannot {}: {}", .0, Reason(.1))]
    Io(&'static str, #[source] io::Error),
    /// The key is none.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// This client holds a lock already, and can hold only one.
    #[error("this client holds a lock already")]
    AlreadyHolding,
}

impl Error {
    pub(super) fn not_version_2() -> Error {
        Error::Protocol("it answers like a daemon of protocol 1".into())
    }

    pub(crate) fn unexpected(answer: Answer) -> Error {
        match answer {
            Answer::Error { message, .. } => Error::Refused(message),
            other => Error::Protocol(format!("unexpected answer {other:?}")),
        }
    }

    /// The exit code for it.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Addr(error) => error.exit(),
            Error::Autostart { exit, .. } => *exit,
            Error::Untrusted { .. } => Exit::NotPermitted,
            Error::Closed | Error::Silent | Error::Unrecorded(_) | Error::Unavailable(_) => Exit::Unavailable,
            Error::PerHost(_) => Exit::Usage,
            Error::Lost(_) => Exit::Lost,
            Error::TimedOut | Error::Deadlock(_) => Exit::Busy,
            Error::Protocol(_) | Error::Refused(_) => Exit::Protocol,
            Error::Io(..) => Exit::Os,
            Error::Key(_) => Exit::BadData,
            Error::AlreadyHolding => Exit::Internal,
        }
    }
}

impl From<addr::Error> for Error {
    fn from(error: addr::Error) -> Error {
        match error {
            addr::Error::Io { error, .. } if error.kind() == io::ErrorKind::TimedOut => Error::TimedOut,
            other => Error::Addr(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn an_error_names_its_source_for_programs() {
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let addr = Addr::Unix("/run/k.sock".into());
        let error = Error::Addr(addr::Error::Io { doing: "connect to", addr, error: refused() });
        let source = error.source().and_then(|source| source.downcast_ref::<io::Error>());
        assert_eq!(source.map(io::Error::kind), Some(io::ErrorKind::ConnectionRefused));
        let error = Error::Io("write to the daemon", refused());
        assert!(error.source().is_some_and(|source| source.is::<io::Error>()));
        assert!(Error::Closed.source().is_none());
    }
}
