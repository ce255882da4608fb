//! Acquiring a lock for a command line: which lock, how long to wait, and what to do when another holder finished first.

mod following;
mod waiting;

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::unistd::Uid;

use crate::addr::{self, Addr};
use crate::client::{self, LockReply, Session, SharedRun, Target};
use crate::describe;
use crate::exit;
use crate::output::Reader;
use crate::proto::v2::{ClientInfo, LockRequest, Mode, RunStatus, Share};
use crate::proto::{Key, Outcome, Pid, Token};
use crate::timestamp::millis;
use following::Following;
use waiting::Display;

/// Which lock to acquire, and how.
#[derive(Clone, Debug)]
pub struct Acquire {
    /// The daemon that has the lock.
    pub target: Target,
    /// The key of the lock.
    pub key: Key,
    /// What to do when another holder finishes first.
    pub mode: Mode,
    /// Hold the lock together with other shared holders, as `flock -s` does.
    pub shared: bool,
    /// How many may hold the lock at the same time.
    pub slots: u32,
    /// How long to wait.
    pub wait: Wait,
    /// What to do when the holder that was waited for has failed.
    pub on_peer_failure: OnPeerFailure,
    /// A run that succeeded counts if it began less than so long ago.
    pub fresh: Duration,
    /// A run that failed counts if it began less than so long ago.
    pub fresh_failure: Duration,
    /// A newer request of this kind takes the place of this one while it waits.
    pub newest: bool,
    /// The holder is asked to stop after so long.
    pub replace_after: Option<Duration>,
    /// No request may have this holder stopped.
    pub no_replace: bool,
    /// How many of the slots to take.
    pub weight: Option<NonZeroU32>,
    /// The result of the run is for every request that waits for it.
    pub share: Option<Share>,
    /// An older result counts while another client runs anew, if its run began less than so long ago.
    pub stale: Duration,
    /// The text that waiters and `kmutex status` show for this request.
    pub note: String,
    /// Report each step on standard error.
    pub verbose: bool,
}

/// How long to wait for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Until the daemon replies.
    Forever,
    /// Not at all.
    Never,
    /// At most so long.
    For(Duration),
}

/// What a waiter does if the holder failed: it exited with a status other than 0, or died of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnPeerFailure {
    /// Exit with 79, as after a success
    Skip,
    /// Acquire the lock again, so that one of the waiters runs the command next
    Retry,
    /// Exit with the holder's status, also if it succeeded
    Adopt,
}

/// How the request for a lock ended.
#[derive(Debug)]
pub enum Acquired {
    /// The session holds the lock, as long as it lives.
    Granted {
        /// The request as the daemon granted it.
        request: Box<LockRequest>,
        /// The connection.
        session: Session,
        /// The fencing token.
        token: Token,
    },
    /// Another holder finished first.
    Finished {
        /// The outcome of that holder.
        outcome: Outcome,
        /// The token of that holder.
        token: Token,
        /// The exit status to adopt, with [`OnPeerFailure::Adopt`].
        status: Option<u8>,
    },
    /// A run that is over did the work recently enough.
    Fresh {
        /// That run.
        run: RunStatus,
        /// The exit status to adopt, with [`OnPeerFailure::Adopt`].
        status: Option<u8>,
    },
    /// The result of another run.
    Shared {
        /// That run.
        run: SharedRun,
        /// The part of its output that was not written yet.
        rest: Reader,
    },
    /// Another holder finished first, and its result is not for this caller.
    Withheld {
        /// The outcome of that holder.
        outcome: Outcome,
        /// The token of that holder.
        token: Token,
        /// Why.
        why: String,
    },
    /// A newer request took the place of this one.
    Superseded,
    /// The lock is held, and the request did not wait, or timed out.
    Busy,
    /// The lock is held by a process that this one runs under.
    HeldAbove,
}

/// Returns the name of this process' user, as the environment has it. A service may have none there; then it is the number, and
/// root's name is known.
fn user_name() -> String {
    let name = ["USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok());
    name.filter(|name| !name.is_empty()).unwrap_or_else(|| match Uid::effective() {
        uid if uid.is_root() => "root".into(),
        uid => uid.to_string(),
    })
}

impl Acquire {
    /// Returns the request to send; `command` is the command line that `kmutex status` shows.
    pub fn request(&self, command: String) -> LockRequest {
        let host = nix::unistd::gethostname().unwrap_or_default();
        LockRequest {
            shared: self.shared,
            slots: self.slots,
            nowait: self.wait == Wait::Never,
            within: self.within(),
            fresh_ms: millis(self.fresh),
            fresh_failure_ms: millis(self.fresh_failure),
            newest: self.newest,
            replace_after_ms: self.replace_after.map(millis),
            no_replace: self.no_replace,
            weight: self.weight,
            share: self.share,
            stale_ms: millis(self.stale),
            who: ClientInfo {
                pid: Pid::new(std::process::id()),
                host: (&*host.to_string_lossy()).into(),
                user: user_name().into(),
                command: command.into(),
                note: self.note.as_str().into(),
            },
            ..LockRequest::new(self.key.clone(), self.mode)
        }
    }

    /// Returns the token of the lock under which this process runs, if that lock belongs to the same daemon.
    fn within(&self) -> Option<Token> {
        let sock = std::env::var_os(addr::VARIABLE)?;
        let here = self.target.addr.absolute().ok()?;
        if Addr::parse(&sock).ok()?.absolute().ok()? != here {
            return None;
        }
        Some(Token(std::env::var(Token::VARIABLE).ok()?.parse().ok()?))
    }

    /// Asks and waits, and asks again after a failed holder with [`OnPeerFailure::Retry`]. The time to wait began at `asked`.
    ///
    /// # Errors
    /// When no daemon can be reached, or the daemon refuses.
    pub fn acquire(&self, request: &LockRequest, asked: Instant) -> Result<Acquired, client::Error> {
        let deadline = match self.wait {
            Wait::For(limit) => asked.checked_add(limit),
            Wait::Forever | Wait::Never => None,
        };
        loop {
            let request = LockRequest { nonce: Some(client::nonce()), ..request.clone() };
            let display = Display::new(self.key.as_str(), self.verbose);
            let mut following = Following::new(display);
            let reply = client::lock(&self.target, &request, deadline, &mut following);
            following.hide();
            let (session, reply) = match reply {
                Err(client::Error::TimedOut) => return Ok(Acquired::Busy),
                other => other?,
            };
            match reply {
                LockReply::Busy(_) => return Ok(Acquired::Busy),
                LockReply::HeldAbove => return Ok(Acquired::HeldAbove),
                LockReply::Superseded => {
                    self.report(|| "a newer request takes the place of this one".into());
                    return Ok(Acquired::Superseded);
                }
                LockReply::Shared(run) => {
                    let is_failure = matches!(run.outcome, Outcome::Exit(1..) | Outcome::Signal(_));
                    if is_failure && run.past.is_none() && self.on_peer_failure == OnPeerFailure::Retry {
                        following.end("the holder failed")?;
                        self.report(|| format!("the holder failed ({}); retrying", run.outcome));
                        continue;
                    }
                    run.past.iter().for_each(|past| self.report(|| describe::run(past)));
                    let rest = following.rest(run.token, &run.output)?;
                    return Ok(Acquired::Shared { run, rest });
                }
                LockReply::Withheld { outcome, token, why } => {
                    following.end(&why)?;
                    return Ok(Acquired::Withheld { outcome, token, why });
                }
                LockReply::Fresh(run) => {
                    self.report(|| describe::run(&run));
                    let status = self.adopted(run.outcome);
                    return Ok(Acquired::Fresh { run, status });
                }
                LockReply::Finished(outcome, token) => match (self.on_peer_failure, outcome) {
                    (OnPeerFailure::Retry, Outcome::Exit(1..) | Outcome::Signal(_)) => {
                        self.report(|| format!("the holder failed ({outcome}); retrying"));
                    }
                    _ => return Ok(Acquired::Finished { outcome, token, status: self.adopted(outcome) }),
                },
                LockReply::Granted(token) => {
                    following.granted()?;
                    let waited = asked.elapsed().as_secs_f64();
                    self.report(|| format!("acquired the lock {:?} after {waited:.6} s", self.key.as_str()));
                    return Ok(Acquired::Granted { request: Box::new(request), session, token });
                }
            }
        }
    }

    /// Returns the exit status that stands for another run's outcome, with [`OnPeerFailure::Adopt`].
    fn adopted(&self, outcome: Outcome) -> Option<u8> {
        match outcome {
            _ if self.on_peer_failure != OnPeerFailure::Adopt => None,
            Outcome::Exit(status) => Some(status),
            Outcome::Signal(number) => Some(exit::of_signal(number)),
            Outcome::Unknown | Outcome::Vanished => None,
        }
    }

    /// Prints a message on standard error, with `--verbose`.
    pub fn report(&self, what: impl FnOnce() -> String) {
        if self.verbose {
            crate::message::print(what());
        }
    }
}
