//! The blocking client: connects, starts a daemon where there is none, acquires a lock, releases it.
//!
//! [`Client`] is for programs that hold locks themselves. [`Session`] is one connection of protocol 2, for programs that
//! need the protocol itself, as `kmutex run` and `kmutex status` do.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `client/session.rs` | one connection: requests out, answers in, deadlines |
//! | `client/transport.rs` | the stream under it: a socket, or TLS over one |
//! | `client/credentials.rs` | the client's name and secret |
//! | `client/retry.rs` | asking for a lock across restarts of the daemon |
//! | `client/held_lock.rs` | a lock that outlives the daemon that granted it |
//! | `client/connecting.rs` | connecting without waiting for it |
//! | `client/options.rs` | how a program asks for a lock |
//! | `client/shared.rs` | the result of a run that another client shares |
//! | `client/lease.rs` | how long a lock is safe without news from the daemon |
//! | `client/autostart.rs` | starting a daemon where there is none |
//! | `client/error.rs` | what can go wrong, in words and as an exit code |
//!
//! The cache loop, which a keyed mutex is made for: one of many programs computes the missing value; the others wait and then
//! find it in the cache.
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
//!     // `None`: another holder has just finished. The value is in the cache now; if it is not, the loop tries again.
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
mod connecting;
mod credentials;
mod error;
mod held_lock;
mod lease;
mod options;
mod retry;
mod session;
mod shared;
mod transport;

use crate::proto::Pid;
use std::ffi::OsStr;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::addr::Addr;
use crate::output::OutputFile;
use crate::place::{self, Missing};
use crate::proto::v2::{LockUser, RunStatus};
use crate::proto::{Key, Nonce, Outcome, Token};
pub use error::Error;
pub use held_lock::{HeldLock, RELEASE_WAIT};
pub use options::LockOptions;
pub use retry::lock;
use session::ANSWER_WAIT;
pub use session::{NoObserver, PROMPT_WAIT, Session, WaitObserver};
pub use shared::SharedRun;

/// Which daemon to connect to, and under which conditions.
#[derive(Clone, Debug)]
pub struct Target {
    /// The daemon's address.
    pub addr: Addr,
    /// The uids whose daemons the client trusts, besides its own and root's.
    pub trusted_uids: Vec<u32>,
    /// Start a daemon if none listens on the Unix socket.
    pub autostart: bool,
    /// A file with the client's name and secret, for daemons that are reached over TCP.
    pub auth_file: Option<PathBuf>,
    /// The certificates of the client, and the authorities that it trusts, for `tls://` addresses.
    #[cfg(feature = "tls")]
    pub tls: crate::tls::ClientFiles,
}

impl Target {
    /// A daemon that must be running already.
    pub fn new(addr: Addr) -> Target {
        Target {
            addr,
            trusted_uids: Vec::new(),
            autostart: false,
            auth_file: None,
            #[cfg(feature = "tls")]
            tls: crate::tls::ClientFiles::default(),
        }
    }
}

impl Target {
    /// The daemon that every command of kmutex uses: the one at `given`, or else in `$KMUTEX_SOCK`, or else the machine's, or
    /// else one that was started on KeyedMutex's socket, or else the user's own ([`crate::place`]). With `autostart`, the
    /// user's own is started if it is missing.
    ///
    /// # Errors
    /// When the address is bad, or there is no place for the user's own daemon.
    pub fn find(given: Option<&OsStr>, trusted_uids: Vec<u32>, autostart: bool) -> Result<Target, Error> {
        let missing = if autostart { Missing::Make } else { Missing::Name };
        let place = place::find(given, &trusted_uids, missing)?;
        Ok(Target { trusted_uids, autostart: autostart && place.starts, ..Target::new(place.addr) })
    }
}

/// How a lock request ended.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum LockReply {
    /// The session holds the lock, under this fencing token, as long as it lives.
    Granted(Token),
    /// The holder that this request waited for has finished, with this outcome and this token.
    Finished(Outcome, Token),
    /// The lock is held by these, and the request said not to wait.
    Busy(Vec<LockUser>),
    /// A run that is over did the work recently enough for this request ([`LockRequest::fresh_ms`](crate::proto::v2::LockRequest::fresh_ms)).
    Fresh(RunStatus),
    /// The result of a run that this request waited for, or that counts for it ([`LockOptions::share`]).
    Shared(SharedRun),
    /// The request wanted the result of that run, and the client that ran it did not give it.
    Withheld {
        /// How the run ended.
        outcome: Outcome,
        /// The token of its lock.
        token: Token,
        /// Why there is no result.
        why: String,
    },
    /// A newer request took the place of this one ([`LockRequest::newest`](crate::proto::v2::LockRequest::newest)).
    Superseded,
    /// The lock is held by a process that this request runs under ([`LockRequest::within`](crate::proto::v2::LockRequest::within)).
    HeldAbove,
}

/// Returns a number that no other process can guess, made from the random keys that the standard library takes from the
/// operating system.
pub fn nonce() -> Nonce {
    let draw = || u128::from(RandomState::new().hash_one(std::process::id()));
    Nonce(draw() << 64 | draw())
}

/// A client of one daemon, for a program that takes one lock at a time.
///
/// On release, the clients that asked while this one held the lock get `None`. `crate::client` shows the loop that this is
/// made for.
#[derive(Debug)]
pub struct Client {
    target: Target,
    state: State,
    reconnects: bool,
    /// What came with the last grant.
    stale: Option<SharedRun>,
}

#[derive(Debug)]
enum State {
    /// The client holds nothing. `None`: the daemon has closed the connection.
    Idle(Option<Session>),
    /// The client holds a lock.
    Holding(HeldLock),
    /// The client has released a lock with this outcome but could not tell the daemon, which it does before anything else.
    ReleasePending(HeldLock, Outcome),
}

impl Client {
    /// Connects to the daemon at `addr`.
    ///
    /// # Errors
    /// When no daemon answers there, or its user is not trusted.
    pub fn connect(addr: &Addr) -> Result<Client, Error> {
        Client::connect_to(Target::new(addr.clone()))
    }

    /// Connects to a daemon as `target` says.
    ///
    /// # Errors
    /// When no daemon answers there or can be started, or its user is not trusted.
    pub fn connect_to(target: Target) -> Result<Client, Error> {
        let session = Session::connect_within(&target, ANSWER_WAIT)?;
        Ok(Client { target, state: State::Idle(Some(session)), reconnects: true, stale: None })
    }

    /// Whether the client reconnects, and resumes its lock, after the daemon closed the connection. The default is `true`.
    pub fn set_reconnect(&mut self, reconnects: bool) {
        self.reconnects = reconnects;
    }

    /// Acquires the lock of `key`. Returns a guard that releases the lock when dropped, or `None` if another client held the
    /// lock and released it while this one waited: the work under the lock is done.
    ///
    /// # Errors
    /// As [`Client::acquire`].
    pub fn lock(&mut self, key: &str) -> Result<Option<Guard<'_>>, Error> {
        Ok(self.acquire(key)?.map(|token| Guard { client: self, token, stale: None }))
    }

    /// Acquires the lock of `key` without a guard: the caller calls [`Client::release`]. Returns the fencing token, or `None`
    /// as [`Client::lock`] does.
    ///
    /// # Errors
    /// When the key is invalid, this client holds a lock already, or the daemon cannot be reached.
    pub fn acquire(&mut self, key: &str) -> Result<Option<Token>, Error> {
        match self.acquire_with(key, &LockOptions::default())? {
            LockReply::Granted(token) => Ok(Some(token)),
            _ => Ok(None),
        }
    }

    /// Acquires the lock of `key` as `options` say. Returns a guard that releases the lock when dropped, or else how the
    /// request ended. A program that names `fresh` ends its work with [`Guard::finish`], so that later requests learn of it.
    ///
    /// # Errors
    /// As [`Client::acquire`]; [`Error::TimedOut`] when the time to wait is over.
    pub fn lock_with(
        &mut self,
        key: &str,
        options: &LockOptions,
    ) -> Result<Result<Guard<'_>, LockReply>, Error> {
        Ok(match self.acquire_with(key, options)? {
            LockReply::Granted(token) => {
                let stale = self.stale.take();
                Ok(Guard { client: self, token, stale })
            }
            reply => Err(reply),
        })
    }

    /// Acquires a lock without a guard.
    fn acquire_with(&mut self, key: &str, options: &LockOptions) -> Result<LockReply, Error> {
        let key = Key::new(key).map_err(Error::Key)?;
        let deadline =
            options.wait.filter(|wait| !wait.is_zero()).and_then(|wait| Instant::now().checked_add(wait));
        let mut request = options.request(key);
        request.nonce = Some(nonce());
        request.who.pid = Pid::new(std::process::id());
        let (mut session, reply) = match std::mem::replace(&mut self.state, State::Idle(None)) {
            State::Holding(hold) => {
                self.state = State::Holding(hold);
                return Err(Error::AlreadyHolding);
            }
            State::ReleasePending(hold, outcome) => {
                self.finish_release(hold, outcome)?;
                return self.acquire_with(request.key.as_str(), options);
            }
            State::Idle(Some(mut session)) => match session.lock(&request, deadline, &mut NoObserver) {
                Err(Error::Closed) if self.reconnects => {
                    lock(&self.target, &request, deadline, &mut NoObserver)?
                }
                reply => (session, reply?),
            },
            State::Idle(None) if self.reconnects => lock(&self.target, &request, deadline, &mut NoObserver)?,
            State::Idle(None) => return Err(Error::Closed),
        };
        self.stale = session.take_stale();
        self.state = match reply {
            LockReply::Granted(token) => {
                State::Holding(HeldLock::new(self.target.clone(), request, session, token))
            }
            _ => State::Idle(Some(session)),
        };
        Ok(reply)
    }

    /// Releases the lock that this client holds, if it holds one.
    ///
    /// # Errors
    /// [`Error::Lost`] when the lock was lost earlier: another client may have held it during the work. Other errors when the
    /// daemon cannot be reached now: the client releases the lock before it acquires the next one.
    pub fn release(&mut self) -> Result<(), Error> {
        self.release_with(Outcome::Unknown)
    }

    fn release_with(&mut self, outcome: Outcome) -> Result<(), Error> {
        match std::mem::replace(&mut self.state, State::Idle(None)) {
            State::Holding(hold) => self.finish_release(hold, outcome),
            other => {
                self.state = other;
                Ok(())
            }
        }
    }

    /// Returns `true` while the client holds a lock.
    pub fn is_locked(&self) -> bool {
        matches!(self.state, State::Holding(_))
    }

    /// Checks, without waiting, that the client still holds its lock, and resumes it if the daemon was restarted. A program
    /// that holds a lock for a long time calls this regularly: over TCP, and with etcd, several times in 10 seconds, or else the lock
    /// is lost when its lease is over.
    ///
    /// # Errors
    /// [`Error::Lost`] when the lock was lost.
    pub fn check(&mut self) -> Result<(), Error> {
        match &mut self.state {
            State::Holding(hold) if self.reconnects => hold.poll(),
            _ => Ok(()),
        }
    }

    fn finish_release(&mut self, mut hold: HeldLock, outcome: Outcome) -> Result<(), Error> {
        let give_up = Instant::now() + if self.reconnects { RELEASE_WAIT } else { Duration::ZERO };
        let mut told = false;
        loop {
            let left = give_up.saturating_duration_since(Instant::now());
            let heard = hold.release(outcome, left);
            let was_told = told;
            told |= heard.is_ok();
            match heard.and_then(|mut session| session.confirm_release().map(|()| session)) {
                Ok(session) => {
                    self.state = State::Idle(Some(session));
                    return Ok(());
                }
                // The daemon read the release before it died.
                Err(Error::Lost(_)) if was_told => return Ok(()),
                Err(error @ Error::Lost(_)) => return Err(error),
                Err(Error::Closed) if Instant::now() < give_up => {}
                Err(error) => {
                    self.state = State::ReleasePending(hold, outcome);
                    return Err(error);
                }
            }
        }
    }
}

/// A held lock. Dropping the guard releases the lock; [`Guard::release`] also returns the errors.
#[derive(Debug)]
pub struct Guard<'a> {
    client: &'a mut Client,
    token: Token,
    stale: Option<SharedRun>,
}

impl Guard<'_> {
    /// Returns the fencing token, which is larger than that of every earlier holder.
    pub fn token(&self) -> Token {
        self.token
    }

    /// Returns the earlier result to use meanwhile, for [`LockOptions::stale`].
    pub fn stale(&self) -> Option<&SharedRun> {
        self.stale.as_ref()
    }

    /// Releases the lock as [`Guard::finish`] does, and gives the clients that waited with [`LockOptions::share`] a result: what
    /// the work wrote to standard output and standard error.
    ///
    /// # Errors
    /// As [`Client::release`]; [`Error::Io`] if the result cannot be kept in memory.
    pub fn finish_with(self, outcome: Outcome, stdout: &[u8], stderr: &[u8]) -> Result<(), Error> {
        let file = OutputFile::of(stdout, stderr).map_err(|e| Error::Io("keep the result", e))?;
        if let State::Holding(hold) = &mut self.client.state {
            hold.give_output(file);
            hold.output_is_complete();
        }
        self.client.release_with(outcome)
    }

    /// Releases the lock.
    ///
    /// # Errors
    /// As [`Client::release`].
    pub fn release(self) -> Result<(), Error> {
        self.client.release()
    }

    /// Releases the lock and states how the work ended: [`Outcome::Exit`] with 0 is a success, which counts for later requests
    /// that name [`LockOptions::fresh`].
    ///
    /// # Errors
    /// As [`Client::release`].
    pub fn finish(self, outcome: Outcome) -> Result<(), Error> {
        self.client.release_with(outcome)
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // If the connection is gone, the lock is released already.
        let _ = self.client.release();
    }
}
