//! Asking for a lock on behalf of somebody at a command line: what is asked, how long is waited, and what becomes of it
//! when somebody else was there first.

mod waiting;

use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::addr::{self, Addr};
use crate::client::{self, LockReply, Session, Target};
use crate::exit;
use crate::proto::v2::{LockRequest, Mode, Who};
use crate::proto::{Key, Outcome, Token};
use waiting::Display;

/// Which lock, and how to ask for it.
#[derive(Clone, Debug)]
pub struct Acquire {
    /// Where the lock is.
    pub target: Target,
    /// Which lock.
    pub key: Key,
    /// What to do when somebody else holds the lock.
    pub mode: Mode,
    /// Share the lock.
    pub shared: bool,
    /// Take it while fewer than so many hold it.
    pub slots: u32,
    /// How long to wait.
    pub wait: Wait,
    /// What to do when the holder that was waited for has failed.
    pub on_peer_failure: OnPeerFailure,
    /// What others are to see of it.
    pub note: String,
    /// Tell what is done on standard error.
    pub verbose: bool,
}

/// How long to wait for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Until it comes.
    Forever,
    /// Not at all.
    Never,
    /// So long at the most.
    For(Duration),
}

/// What to do when the holder that was waited for has failed: it ended with a status other than 0, or died of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnPeerFailure {
    /// Exit with 79 all the same
    Skip,
    /// Ask for the lock again, so that one of those who waited runs the command next
    Retry,
    /// Exit as that holder did, also when it did not fail
    Adopt,
}

/// What became of it.
#[derive(Debug)]
pub enum Acquired {
    /// The lock is held, as long as the session lives.
    Granted {
        /// As it was granted.
        request: Box<LockRequest>,
        /// The connection.
        session: Session,
        /// The fencing token.
        token: Token,
    },
    /// Another holder was done first.
    Finished {
        /// How that one ended.
        outcome: Outcome,
        /// The token that it held.
        token: Token,
        /// The status to end with as well, if that was asked for.
        status: Option<u8>,
    },
    /// Somebody else holds it, and there was no waiting, or no more.
    Busy,
    /// It is held by one under whose lock this runs.
    HeldAbove,
}

impl Acquire {
    /// The request, for a command as people are to read it.
    pub fn request(&self, command: String) -> LockRequest {
        let user = ["USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok());
        let host = nix::unistd::gethostname().unwrap_or_default();
        LockRequest {
            shared: self.shared,
            slots: self.slots,
            nowait: self.wait == Wait::Never,
            within: self.within(),
            who: Who {
                pid: std::process::id(),
                host: (&*host.to_string_lossy()).into(),
                user: user.unwrap_or_default().into(),
                command: command.into(),
                note: self.note.as_str().into(),
            },
            ..LockRequest::new(self.key.clone(), self.mode)
        }
    }

    /// The token of the lock under which this process runs itself, if it is of the same daemon.
    fn within(&self) -> Option<Token> {
        let sock = std::env::var_os(addr::VARIABLE)?;
        let here = self.target.addr.absolute().ok()?;
        if Addr::parse(&sock).ok()?.absolute().ok()? != here {
            return None;
        }
        Some(Token(std::env::var(Token::VARIABLE).ok()?.parse().ok()?))
    }

    /// Asks, waits, and asks again if a holder failed and that is what was wanted. The time to wait began at `asked`.
    ///
    /// # Errors
    /// When no daemon can be reached, or it refuses.
    pub fn acquire(&self, request: &LockRequest, asked: Instant) -> Result<Acquired, client::Error> {
        let deadline = match self.wait {
            Wait::For(limit) => asked.checked_add(limit),
            Wait::Forever | Wait::Never => None,
        };
        loop {
            let request = LockRequest { nonce: Some(client::nonce()), ..request.clone() };
            let mut display = Display::new(self.key.as_str(), self.verbose);
            let reply = client::lock(&self.target, &request, deadline, &mut display);
            drop(display);
            let (session, reply) = match reply {
                Err(client::Error::TimedOut) => return Ok(Acquired::Busy),
                other => other?,
            };
            match reply {
                LockReply::Busy(_) => return Ok(Acquired::Busy),
                LockReply::HeldAbove => return Ok(Acquired::HeldAbove),
                LockReply::Finished(outcome, token) => match (self.on_peer_failure, outcome) {
                    (OnPeerFailure::Retry, Outcome::Exit(1..) | Outcome::Signal(_)) => {
                        self.say(|| format!("the holder has failed ({outcome}); asking again"));
                    }
                    (OnPeerFailure::Adopt, outcome) => {
                        let status = match outcome {
                            Outcome::Exit(status) => Some(status),
                            Outcome::Signal(number) => Some(exit::of_signal(number)),
                            Outcome::Unknown | Outcome::Vanished => None,
                        };
                        return Ok(Acquired::Finished { outcome, token, status });
                    }
                    _ => return Ok(Acquired::Finished { outcome, token, status: None }),
                },
                LockReply::Granted(token) => {
                    let waited = asked.elapsed().as_secs_f64();
                    self.say(|| format!("got the lock {:?} after {waited:.6} s", self.key.as_str()));
                    return Ok(Acquired::Granted { request: Box::new(request), session, token });
                }
            }
        }
    }

    /// Says something on standard error, if that is wanted.
    pub fn say(&self, what: impl FnOnce() -> String) {
        if self.verbose {
            crate::message::print(what());
        }
    }
}
