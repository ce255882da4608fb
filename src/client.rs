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
mod held_lock;
mod lease;
mod session;

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::addr::{self, Addr};
use crate::exit::Exit;
use crate::proto::v2::{Answer, LockRequest, Mode, Party};
use crate::proto::{Key, KeyError, Nonce, Outcome, Token};
pub use held_lock::{HeldLock, RELEASE_WAIT};
pub use session::{NoObserver, Session, WaitObserver};

/// Which daemon to connect to, and on what terms.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where it is.
    pub addr: Addr,
    /// Whose daemon to trust, besides one's own and root's.
    pub trusted_uids: Vec<u32>,
    /// Start one on a Unix socket where there is none.
    pub autostart: bool,
}

impl Target {
    /// A daemon that must be there already.
    pub fn new(addr: Addr) -> Target {
        Target { addr, trusted_uids: Vec::new(), autostart: false }
    }
}

/// How a lock request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum LockReply {
    /// The lock is held, with this token, for as long as the session lives.
    Granted(Token),
    /// The holder that was waited for is done.
    Finished(Outcome, Token),
    /// Somebody holds it, and the request said not to wait.
    Busy(Vec<Party>),
    /// It is held by the one under whose lock the request was made ([`LockRequest::within`]).
    HeldAbove,
}

/// Asks for a lock and waits for the reply, until `deadline` at the most. The session holds the lock if it was
/// granted.
///
/// A daemon that ends before it has answered has given nothing: the request is put to the next one, and whoever waited
/// has the same place in the queue there.
///
/// # Errors
/// [`Error::TimedOut`] at the deadline; others when no daemon can be reached or trusted, or it does not speak the
/// protocol.
pub fn lock(
    target: &Target,
    request: &LockRequest,
    deadline: Option<Instant>,
    observer: &mut dyn WaitObserver,
) -> Result<(Session, LockReply), Error> {
    let mut request = request.clone();
    let mut retry = Retry::new(None);
    loop {
        let mut session = match Session::connect(target, deadline) {
            Err(e) if retry.is_worth(&e) => {
                retry.pause(deadline)?;
                continue;
            }
            other => other?,
        };
        match session.lock(&request, deadline, observer) {
            Err(Error::Closed) => {
                // One that let us wait has been a good daemon.
                if let Some(place) = session.place() {
                    request.place = Some(place);
                    retry = Retry::new(None);
                }
                if !request.nowait {
                    retry.away_until = Some(Instant::now() + SUCCESSOR_WAIT);
                }
                retry.count()?;
                retry.pause(deadline)?;
            }
            reply => return reply.map(|reply| (session, reply)),
        }
    }
}

/// How long those who were connected to a daemon when it ended wait for the next one.
const SUCCESSOR_WAIT: Duration = Duration::from_secs(30);
/// How many daemons may close the connection without a word before one gives up.
const SILENT_MAX: u32 = 10;

/// When to try again to reach a daemon.
struct Retry {
    /// Until when it may be away altogether. `None`: not at all.
    away_until: Option<Instant>,
    pause: Duration,
    closed: u32,
}

impl Retry {
    fn new(away_until: Option<Instant>) -> Retry {
        Retry { away_until, pause: PAUSE_MIN, closed: 0 }
    }

    fn is_worth(&self, error: &Error) -> bool {
        let is_away = match error {
            Error::Addr(error) => session::is_nobody_there(error),
            // There was one that is not for us to start.
            Error::Autostart { exit, .. } => *exit == Exit::Unavailable,
            _ => false,
        };
        is_away && self.away_until.is_some_and(|until| Instant::now() < until)
    }

    fn count(&mut self) -> Result<(), Error> {
        self.closed += 1;
        if self.closed > SILENT_MAX { Err(Error::Closed) } else { Ok(()) }
    }

    /// There is no event that tells when a daemon is back, so this sleeps; longer from time to time.
    fn pause(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        let left =
            deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return Err(Error::TimedOut);
        }
        std::thread::sleep(self.pause.min(left));
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        Ok(())
    }
}

/// The first pause before trying again, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// A number that nobody else has chosen, nor can guess: from the keys that the standard library draws from the system.
pub fn nonce() -> Nonce {
    let draw = || u128::from(RandomState::new().hash_one(std::process::id()));
    Nonce(draw() << 64 | draw())
}

/// A client of one daemon, for a program that takes one lock at a time.
///
/// A lock that others wait for is theirs to hear of when it is released: whoever asked meanwhile is told that somebody
/// was here. `crate::client` shows the loop that this is for.
#[derive(Debug)]
pub struct Client {
    target: Target,
    state: State,
    reconnects: bool,
}

#[derive(Debug)]
enum State {
    /// It holds nothing. There is a connection, unless the daemon closed it.
    Idle(Option<Session>),
    /// It holds a lock.
    Holding(HeldLock),
    /// It has released a lock and could not say so: the daemon is to be told before anything else.
    ReleasePending(HeldLock),
}

impl Client {
    /// Connects to a daemon.
    ///
    /// # Errors
    /// When it cannot be reached or is not trusted.
    pub fn connect(addr: &Addr) -> Result<Client, Error> {
        Client::connect_to(Target::new(addr.clone()))
    }

    /// Connects to a daemon on other terms.
    ///
    /// # Errors
    /// When it cannot be reached, started or trusted.
    pub fn connect_to(target: Target) -> Result<Client, Error> {
        let session = Session::connect(&target, None)?;
        Ok(Client { target, state: State::Idle(Some(session)), reconnects: true })
    }

    /// Whether to connect anew after the daemon closed the connection, and to resume the lock if one is held. It does,
    /// unless it is told not to.
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
        let key = Key::new(key).map_err(Error::Key)?;
        let mut request = LockRequest::new(key, Mode::Once);
        request.nonce = Some(nonce());
        request.who.pid = std::process::id();
        let (session, reply) = match std::mem::replace(&mut self.state, State::Idle(None)) {
            State::Holding(hold) => {
                self.state = State::Holding(hold);
                return Err(Error::AlreadyHolding);
            }
            State::ReleasePending(hold) => {
                self.finish_release(hold)?;
                return self.acquire(request.key.as_str());
            }
            State::Idle(Some(mut session)) => match session.lock(&request, None, &mut NoObserver) {
                Err(Error::Closed) if self.reconnects => lock(&self.target, &request, None, &mut NoObserver)?,
                reply => (session, reply?),
            },
            State::Idle(None) if self.reconnects => lock(&self.target, &request, None, &mut NoObserver)?,
            State::Idle(None) => return Err(Error::Closed),
        };
        if let LockReply::Granted(token) = reply {
            self.state = State::Holding(HeldLock::new(self.target.clone(), request, session, token));
            return Ok(Some(token));
        }
        self.state = State::Idle(Some(session));
        Ok(None)
    }

    /// Releases the lock that this client holds; it does nothing if it holds none.
    ///
    /// # Errors
    /// [`Error::Lost`] when the lock was lost before: whatever was done under it may not have been done alone. Others
    /// when the daemon cannot be told at the moment: it is told before the next lock is taken.
    pub fn release(&mut self) -> Result<(), Error> {
        match std::mem::replace(&mut self.state, State::Idle(None)) {
            State::Holding(hold) => self.finish_release(hold),
            other => {
                self.state = other;
                Ok(())
            }
        }
    }

    /// True between an acquisition and its release.
    pub fn is_locked(&self) -> bool {
        matches!(self.state, State::Holding(_))
    }

    /// Looks, without waiting, whether the lock that is held is held still, and takes it up again if the daemon was
    /// restarted meanwhile. A program that holds a lock for long calls this from time to time.
    ///
    /// # Errors
    /// [`Error::Lost`] when the lock was lost.
    pub fn check(&mut self) -> Result<(), Error> {
        match &mut self.state {
            State::Holding(hold) if self.reconnects => hold.poll(),
            _ => Ok(()),
        }
    }

    fn finish_release(&mut self, mut hold: HeldLock) -> Result<(), Error> {
        let give_up = Instant::now() + if self.reconnects { RELEASE_WAIT } else { Duration::ZERO };
        let mut told = false;
        loop {
            let left = give_up.saturating_duration_since(Instant::now());
            let heard = hold.release(Outcome::Unknown, left);
            let was_told = told;
            told |= heard.is_ok();
            match heard.and_then(|mut session| session.confirm_release().map(|()| session)) {
                Ok(session) => {
                    self.state = State::Idle(Some(session));
                    return Ok(());
                }
                // That daemon had heard of it before it died.
                Err(Error::Lost(_)) if was_told => return Ok(()),
                Err(error @ Error::Lost(_)) => return Err(error),
                Err(Error::Closed) if Instant::now() < give_up => {}
                Err(error) => {
                    self.state = State::ReleasePending(hold);
                    return Err(error);
                }
            }
        }
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
    /// The lock was lost while it was held.
    Lost(String),
    /// The deadline came first.
    TimedOut,
    /// The daemon does not answer a question that needs no waiting.
    Silent,
    /// The daemon says what no daemon may.
    Protocol(String),
    /// The daemon gives no lock at the moment, because it cannot record it.
    Unrecorded(String),
    /// Whether the lock is free cannot be told, because the other hosts cannot be asked.
    Unavailable(String),
    /// The daemon shares its locks with other hosts, and has not this kind.
    PerHost(String),
    /// To wait for this lock would be to wait for ever: the daemon says who waits for whom.
    Deadlock(String),
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
    fn not_version_2() -> Error {
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
            Error::Lost(why) => write!(f, "the lock was lost: {why}"),
            Error::TimedOut => f.write_str("timed out"),
            Error::Silent => f.write_str("the daemon does not answer"),
            Error::Protocol(what) => write!(f, "the daemon does not speak protocol 2: {what}"),
            Error::Unrecorded(message) => write!(f, "the daemon cannot record the lock: {message}"),
            Error::Unavailable(message) | Error::PerHost(message) => f.write_str(message),
            Error::Deadlock(cycle) => write!(f, "it would wait for ever: {cycle}"),
            Error::Refused(message) => write!(f, "the daemon refused: {message}"),
            Error::Io(doing, error) => write!(f, "cannot {doing}: {}", addr::Reason(error)),
            Error::Key(error) => error.fmt(f),
            Error::AlreadyHolding => f.write_str("this client holds a lock already"),
        }
    }
}

impl std::error::Error for Error {}
