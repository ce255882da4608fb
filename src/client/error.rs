//! Why a client fails, in words for its user and as an exit code.

use std::io;
use std::path::PathBuf;

use crate::addr::{self, Addr, Reason};
use crate::exit::Exit;
use crate::place;
use crate::proto::KeyError;
use crate::proto::v2::{Answer, ErrorCode};

/// Why a client failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The daemon's address is invalid, or no daemon can be reached there.
    #[error(transparent)]
    Addr(addr::Error),
    /// There is no place for a daemon.
    #[error(transparent)]
    Place(#[from] place::Error),
    /// The client cannot start a daemon.
    #[error("cannot start a daemon on {}: {why}", path.display())]
    Autostart {
        /// The socket.
        path: PathBuf,
        /// The error message of the daemon or of the operating system.
        why: String,
    },
    /// A daemon serves this socket, but no client can reach it.
    #[error("the daemon with pid {pid} serves {}, but its socket is gone: stop that daemon, or restart it", path.display())]
    SocketGone {
        /// The socket.
        path: PathBuf,
        /// The daemon.
        pid: u32,
    },
    /// The daemon runs as a user whom the client does not trust.
    #[error("not trusting the daemon on {addr}: it belongs to uid {uid} ({}); see --trust-uid", user.as_deref().unwrap_or("unknown user"))]
    Untrusted {
        /// The daemon's address.
        addr: Addr,
        /// The daemon's uid.
        uid: u32,
        /// The name of that user, if there is one.
        user: Option<String>,
    },
    /// The daemon runs as a user who has no uid in the client's user namespace.
    #[error(
        "not trusting the daemon on {addr}: its user has no uid in this user namespace (user_namespaces(7)), and could be any user"
    )]
    Unmapped {
        /// The daemon's address.
        addr: Addr,
    },
    /// The daemon closed the connection.
    #[error("the daemon closed the connection")]
    Closed,
    /// The lock was lost while it was held.
    #[error("the lock was lost: {0}")]
    Lost(String),
    /// Part of an output was written, and the rest will not come.
    #[error("the output so far is not complete: {0}")]
    Torn(String),
    /// The output of a run cannot be written.
    #[error("cannot write the output: {}", Reason(.0))]
    Delivery(#[source] io::Error),
    /// The deadline passed.
    #[error("timed out")]
    TimedOut,
    /// The daemon did not answer in time a request that it answers at once.
    #[error("the daemon does not answer")]
    Silent,
    /// The daemon sent what protocol 2 does not allow.
    #[error("the daemon does not speak protocol 2: {0}")]
    Protocol(String),
    /// The daemon grants no locks now, because it cannot write its journal.
    #[error("the daemon cannot record the lock: {0}")]
    Unrecorded(String),
    /// The daemon serves too many clients; or it cannot tell whether another host holds the lock, because etcd cannot be reached.
    #[error("{0}")]
    Unavailable(String),
    /// The daemon's locks are clustered, and it has no clustered locks of this kind.
    #[error("{0}")]
    PerHost(String),
    /// Another client that names a weight says another number of slots.
    #[error("{0}")]
    SlotsDiffer(String),
    /// The user of this client may not do that.
    #[error("not permitted: {0}")]
    NotPermitted(String),
    /// Waiting for this lock would never end. The message lists the clients that wait for each other.
    #[error("deadlock: {0}")]
    Deadlock(String),
    /// The daemon refused the request.
    #[error("the daemon refused: {0}")]
    Refused(String),
    /// The file with the client's name and secret cannot be used.
    #[error("cannot use --auth-file {}: {}", path.display(), Reason(error))]
    AuthFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// Other users have access to the file with the client's name and secret.
    #[error("not using --auth-file {}: other users have access to it (mode {mode:03o}); chmod 600 it", path.display())]
    ExposedAuthFile {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// There is no secure connection.
    #[cfg(feature = "tls")]
    #[error("{}", describe_tls(addr, error))]
    Tls {
        /// The daemon's address.
        addr: Addr,
        /// Why.
        error: crate::tls::Error,
    },
    /// The kernel refused something.
    #[error("cannot {}: {}", .0, Reason(.1))]
    Io(&'static str, #[source] io::Error),
    /// The key is invalid.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// This client holds a lock already; it can hold one at a time.
    #[error("this client holds a lock already")]
    AlreadyHolding,
}

impl Error {
    pub(super) fn not_version_2() -> Error {
        Error::Protocol("it answers like a daemon of protocol 1".into())
    }

    /// What the daemon answered to a lock request.
    pub(super) fn of_lock(code: ErrorCode, message: String) -> Error {
        match code {
            ErrorCode::CannotRecord => Error::Unrecorded(message),
            ErrorCode::Deadlock => Error::Deadlock(message),
            ErrorCode::Unavailable => Error::Unavailable(message),
            ErrorCode::PerHost => Error::PerHost(message),
            ErrorCode::SlotsDiffer => Error::SlotsDiffer(message),
            code => Error::unexpected(Answer::Error { code, message }),
        }
    }

    pub(crate) fn unexpected(answer: Answer) -> Error {
        match answer {
            Answer::Error { code: ErrorCode::TooMany, message } => Error::Unavailable(message),
            Answer::Error { code: ErrorCode::NotPermitted, message } => Error::NotPermitted(message),
            Answer::Error { message, .. } => Error::Refused(message),
            other => Error::Protocol(format!("unexpected answer {other:?}")),
        }
    }

    /// Returns the exit code for this error.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Addr(error) => error.exit(),
            Error::Place(error) => error.exit(),
            Error::Autostart { .. } | Error::SocketGone { .. } => Exit::Unavailable,
            Error::Untrusted { .. }
            | Error::Unmapped { .. }
            | Error::NotPermitted(_)
            | Error::ExposedAuthFile { .. } => Exit::NotPermitted,
            Error::AuthFile { .. } => Exit::Usage,
            #[cfg(feature = "tls")]
            Error::Tls { error, .. } => error.exit(),
            Error::Closed | Error::Silent | Error::Unrecorded(_) | Error::Unavailable(_) => Exit::Unavailable,
            Error::PerHost(_) | Error::SlotsDiffer(_) => Exit::Usage,
            Error::Lost(_) | Error::Torn(_) => Exit::Lost,
            Error::TimedOut | Error::Deadlock(_) => Exit::Busy,
            Error::Protocol(_) | Error::Refused(_) => Exit::Protocol,
            Error::Io(..) | Error::Delivery(_) => Exit::Os,
            Error::Key(_) => Exit::BadData,
            Error::AlreadyHolding => Exit::Internal,
        }
    }
}

#[cfg(feature = "tls")]
fn describe_tls(addr: &Addr, error: &crate::tls::Error) -> String {
    match error.is_local() {
        true => error.to_string(),
        false => format!("no secure connection to {addr}: {error}"),
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
