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
mod error;
mod held_lock;
mod lease;
mod retry;
mod session;

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use crate::addr::Addr;
use crate::proto::v2::{LockRequest, Mode, Party};
use crate::proto::{Key, Nonce, Outcome, Token};
pub use error::Error;
pub use held_lock::{HeldLock, RELEASE_WAIT};
pub use retry::lock;
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
