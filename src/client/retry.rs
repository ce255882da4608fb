//! Asking for a lock until there is a reply, whatever happens to the daemon meanwhile: when to try again, and when not.

use std::time::{Duration, Instant};

use super::{Error, LockReply, Session, Target, WaitObserver};
use crate::exit::Exit;
use crate::proto::v2::LockRequest;

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
            Error::Addr(error) => error.is_absent(),
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
pub(super) const PAUSE_MIN: Duration = Duration::from_millis(5);
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(1);
