//! Asks for a lock until there is a reply, across restarts of the daemon, and decides when to try again.

use std::time::{Duration, Instant};

use super::{Error, LockReply, PROMPT_WAIT, Session, Target, WaitObserver};
use crate::addr::Addr;
use crate::proto::v2::LockRequest;

/// Asks for a lock and waits for the reply, at most until `deadline`. The returned session holds the lock if the reply is
/// [`LockReply::Granted`].
///
/// A daemon that ends before it answers has granted nothing: the client repeats the request to the next daemon, where it
/// keeps its place in the queue.
///
/// # Errors
/// [`Error::TimedOut`] at the deadline; [`Error::Silent`] if a request that does not wait has no reply within [`PROMPT_WAIT`],
/// whatever the daemon does; others when no daemon can be reached or trusted, or it does not speak the
/// protocol.
pub fn lock(
    target: &Target,
    request: &LockRequest,
    deadline: Option<Instant>,
    observer: &mut dyn WaitObserver,
) -> Result<(Session, LockReply), Error> {
    if !request.nowait {
        return lock_until(target, request, deadline, observer);
    }
    lock_until(target, request, Some(Instant::now() + PROMPT_WAIT), observer).map_err(|error| match error {
        // The request does not wait for the lock, and so it did not time out.
        Error::TimedOut => Error::Silent,
        other => other,
    })
}

fn lock_until(
    target: &Target,
    request: &LockRequest,
    deadline: Option<Instant>,
    observer: &mut dyn WaitObserver,
) -> Result<(Session, LockReply), Error> {
    let mut request = request.clone();
    let mut retry = Retry::new(None);
    loop {
        let until = retry.attempt_until(target, deadline);
        let mut session = match Session::connect(target, until) {
            Err(Error::TimedOut) if until != deadline && !retry.is_away() => return Err(Error::Silent),
            Err(Error::TimedOut) if until != deadline => continue,
            Err(e) if retry.is_worth(&e) => {
                retry.pause(deadline)?;
                continue;
            }
            other => other?,
        };
        match session.lock(&request, deadline, observer) {
            Err(Error::Closed) => {
                // A daemon that let this client wait was in order.
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

/// How long a client that was connected when its daemon ended waits for the next daemon.
const SUCCESSOR_WAIT: Duration = Duration::from_secs(30);
/// How long one attempt to connect to another machine may take, and how long while a successor of the daemon is awaited.
const CONNECT_WAIT: Duration = Duration::from_secs(30);
const ATTEMPT_WAIT: Duration = Duration::from_secs(3);
/// The client gives up after so many daemons have closed the connection without an answer.
const SILENT_MAX: u32 = 10;

/// Decides when to try again to reach a daemon.
struct Retry {
    /// Until when there may be no daemon. `None`: there must be one.
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
            Error::Addr(error) => error.is_absent() || error.is_of_network(),
            // There was a daemon before, and perhaps this client cannot start its successor, but another one can.
            Error::Autostart { .. } | Error::SocketGone { .. } => true,
            #[cfg(feature = "tls")]
            Error::Tls { error, .. } => error.is_passing(),
            _ => false,
        };
        is_away && self.is_away()
    }

    /// Returns `true` if there may be no daemon for now.
    fn is_away(&self) -> bool {
        self.away_until.is_some_and(|until| Instant::now() < until)
    }

    /// Returns until when to try to connect once. The kernel would wait for minutes for a machine that is gone.
    fn attempt_until(&self, target: &Target, deadline: Option<Instant>) -> Option<Instant> {
        if let Addr::Unix(_) = target.addr {
            return deadline;
        }
        let limit = Instant::now() + if self.is_away() { ATTEMPT_WAIT } else { CONNECT_WAIT };
        Some(deadline.map_or(limit, |deadline| deadline.min(limit)))
    }

    fn count(&mut self) -> Result<(), Error> {
        self.closed += 1;
        if self.closed > SILENT_MAX { Err(Error::Closed) } else { Ok(()) }
    }

    /// Sleeps, since no event tells when a daemon is back; each pause is twice as long as the one before, up to a limit.
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

/// The first and the longest pause between two attempts.
pub(super) const PAUSE_MIN: Duration = Duration::from_millis(5);
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(1);
