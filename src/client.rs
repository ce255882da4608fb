//! The blocking client: connecting, starting a daemon where there is none, asking for a lock, releasing it.
//!
//! [`Client`] is for programs that hold locks themselves. [`Session`] is one connection of protocol 2, for those that
//! need more of it, as `kmutex run` and `kmutex status` do.
//!
//! The cache loop, which is what the keyed mutex is for: only one of many computes what is missing, the others wait for
//! it and find it there.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let addr = kmutex::addr::Addr::Unix(folder.path().join("kmutex.sock"));
//! # let config = kmutex::daemon::Config::new(vec![addr.clone()]);
//! # std::thread::spawn(move || kmutex::daemon::serve(&config).unwrap());
//! # while kmutex::Client::connect(&addr).is_err() { std::thread::yield_now() }
//! use std::collections::HashMap;
//!
//! let mut cache = HashMap::new();
//! let mut client = kmutex::Client::connect(&addr)?;
//!
//! let report = loop {
//!     if let Some(report) = cache.get("report") {
//!         break report;
//!     }
//!     // `None`: another holder was here. What we need is in the cache now; if it is not, we try again.
//!     if let Some(lock) = client.lock("report")? {
//!         cache.insert("report", "computed once".to_string());
//!         lock.release()?;
//!     }
//! };
//! assert_eq!(report, "computed once");
//! # Ok(())
//! # }
//! ```

mod autostart;
mod session;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Instant;

use crate::addr::{self, Addr};
use crate::exit::Exit;
use crate::proto::v2::{Answer, LockRequest, Mode, Party, Request};
use crate::proto::{Key, KeyError, Outcome, Token};
pub use session::Session;

/// Which daemon to connect to, and on what terms.
#[derive(Clone, Debug)]
pub struct Dial {
    /// Where it is.
    pub addr: Addr,
    /// Whose daemon to trust, besides one's own and root's.
    pub trusted_uids: Vec<u32>,
    /// Start one on a Unix socket where there is none.
    pub autostart: bool,
}

impl Dial {
    /// A daemon that must be there already.
    pub fn new(addr: Addr) -> Dial {
        Dial { addr, trusted_uids: Vec::new(), autostart: false }
    }
}

/// How a lock request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// The lock is held, with this token, for as long as the session lives.
    Granted(Token),
    /// The holder that was waited for is done.
    Finished(Outcome, Token),
    /// Somebody holds it, and the request said not to wait.
    Busy(Vec<Party>),
}

/// Asks for a lock and waits for the verdict, until `deadline` at the most. The session holds the lock if it was
/// granted.
///
/// A daemon that ended before it answered has given nothing, so the request is put to the next one.
///
/// # Errors
/// [`Error::TimedOut`] at the deadline; others when no daemon can be reached or trusted, or it does not speak the
/// protocol.
pub fn lock(
    dial: &Dial,
    request: &LockRequest,
    deadline: Option<Instant>,
) -> Result<(Session, Verdict), Error> {
    const DAEMONS_MAX: u32 = 1000;
    for _ in 0..DAEMONS_MAX {
        let mut session = Session::connect(dial, deadline)?;
        match session.lock(request, deadline) {
            Err(Error::Closed) => {}
            verdict => return verdict.map(|verdict| (session, verdict)),
        }
    }
    Err(Error::Closed)
}

/// A client of one daemon, for a program that takes one lock at a time.
///
/// A lock that others wait for is theirs to hear of when it is released: whoever asked meanwhile is told that somebody
/// was here. `crate::client` shows the loop that this is for.
#[derive(Debug)]
pub struct Client {
    dial: Dial,
    session: Option<Session>,
    held: Option<Token>,
    reconnects: bool,
}

impl Client {
    /// Connects to a daemon.
    ///
    /// # Errors
    /// When it cannot be reached or is not trusted.
    pub fn connect(addr: &Addr) -> Result<Client, Error> {
        Client::dial(Dial::new(addr.clone()))
    }

    /// Connects to a daemon on other terms.
    ///
    /// # Errors
    /// When it cannot be reached, started or trusted.
    pub fn dial(dial: Dial) -> Result<Client, Error> {
        let session = Session::connect(&dial, None)?;
        Ok(Client { dial, session: Some(session), held: None, reconnects: true })
    }

    /// Whether to connect anew, in [`Client::acquire`], after the daemon closed the connection. It does, unless it is
    /// told not to.
    pub fn set_reconnect(&mut self, reconnects: bool) {
        self.reconnects = reconnects;
    }

    /// Takes the lock of `key` and returns a guard that releases it when dropped. `None`: somebody else held it, and has
    /// released it by now; whatever was to be computed under the lock has been.
    ///
    /// # Errors
    /// As [`Client::acquire`].
    pub fn lock(&mut self, key: &str) -> Result<Option<Guard<'_>>, Error> {
        Ok(self.acquire(key)?.map(|token| Guard { client: self, token }))
    }

    /// The same without a guard: whoever calls it calls [`Client::release`] too. The token is the fencing token.
    ///
    /// # Errors
    /// When the key is none, this client holds a lock already, or the daemon cannot be reached.
    pub fn acquire(&mut self, key: &str) -> Result<Option<Token>, Error> {
        if self.is_locked() {
            return Err(Error::AlreadyHolding);
        }
        let request = LockRequest::new(Key::new(key).map_err(Error::Key)?, Mode::Once);
        let verdict = self.ask(&request)?;
        self.held = match verdict {
            Verdict::Granted(token) => Some(token),
            Verdict::Finished(..) | Verdict::Busy(_) => None,
        };
        Ok(self.held)
    }

    /// Releases the lock that this client holds; it does nothing if it holds none.
    ///
    /// # Errors
    /// When the connection was lost. The lock was lost with it.
    pub fn release(&mut self) -> Result<(), Error> {
        if self.held.take().is_none() {
            return Ok(());
        }
        let session = self.session.as_mut().ok_or(Error::Closed)?;
        let released = session.send(&Request::Release { outcome: Outcome::Unknown }).and_then(|()| {
            match session.receive(None)? {
                Answer::Released => Ok(()),
                other => Err(Error::unexpected(other)),
            }
        });
        if released.is_err() {
            self.session = None;
        }
        released
    }

    /// True between an acquisition and its release.
    pub fn is_locked(&self) -> bool {
        self.held.is_some()
    }

    fn ask(&mut self, request: &LockRequest) -> Result<Verdict, Error> {
        if let Some(session) = &mut self.session {
            match session.lock(request, None) {
                Err(Error::Closed) if self.reconnects => {}
                Ok(verdict) => return Ok(verdict),
                Err(error) => {
                    self.session = None;
                    return Err(error);
                }
            }
        } else if !self.reconnects {
            return Err(Error::Closed);
        }
        self.session = None;
        let (session, verdict) = lock(&self.dial, request, None)?;
        self.session = Some(session);
        Ok(verdict)
    }
}

/// A held lock. It is released when this is dropped; [`Guard::release`] tells whether that went well.
#[derive(Debug)]
pub struct Guard<'a> {
    client: &'a mut Client,
    token: Token,
}

impl Guard<'_> {
    /// The fencing token: larger than that of every earlier holder.
    pub fn token(&self) -> Token {
        self.token
    }

    /// Releases the lock.
    ///
    /// # Errors
    /// As [`Client::release`].
    pub fn release(self) -> Result<(), Error> {
        self.client.release()
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // If the connection is lost the lock is gone with it, which is what was wanted.
        let _ = self.client.release();
    }
}

/// Why a client cannot go on.
#[derive(Debug)]
pub enum Error {
    /// The daemon's address is wrong, or it cannot be reached.
    Addr(addr::Error),
    /// No daemon can be started.
    Autostart {
        /// Where.
        path: PathBuf,
        /// What the daemon or the operating system said.
        why: String,
        /// The exit code that fits.
        exit: Exit,
    },
    /// The daemon belongs to somebody who is not trusted.
    Untrusted {
        /// Where.
        addr: Addr,
        /// Whose it is.
        uid: u32,
        /// The same, for people, if it is known.
        user: Option<String>,
    },
    /// The daemon closed the connection.
    Closed,
    /// The deadline came first.
    TimedOut,
    /// The daemon does not answer a question that needs no waiting.
    Silent,
    /// The daemon says what no daemon may.
    Protocol(String),
    /// The daemon refused the request.
    Refused(String),
    /// The kernel refused something.
    Io(&'static str, io::Error),
    /// The key is none.
    Key(KeyError),
    /// This client holds a lock already, and can hold only one.
    AlreadyHolding,
}

impl Error {
    fn unexpected(answer: Answer) -> Error {
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
            Error::Closed | Error::Silent => Exit::Unavailable,
            Error::TimedOut => Exit::Busy,
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

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Addr(error) => error.fmt(f),
            Error::Autostart { path, why, .. } => {
                write!(f, "cannot start a daemon on {}: {why}", path.display())
            }
            Error::Untrusted { addr, uid, user } => {
                let user = user.as_deref().unwrap_or("of no name");
                write!(
                    f,
                    "not trusting the daemon on {addr}: it belongs to uid {uid} ({user}); see --trust-uid"
                )
            }
            Error::Closed => f.write_str("the daemon closed the connection"),
            Error::TimedOut => f.write_str("timed out"),
            Error::Silent => f.write_str("the daemon does not answer"),
            Error::Protocol(what) => write!(f, "the daemon does not speak protocol 2: {what}"),
            Error::Refused(message) => write!(f, "the daemon refused: {message}"),
            Error::Io(doing, error) => write!(f, "cannot {doing}: {}", addr::Reason(error)),
            Error::Key(error) => error.fmt(f),
            Error::AlreadyHolding => f.write_str("this client holds a lock already"),
        }
    }
}

impl std::error::Error for Error {}
