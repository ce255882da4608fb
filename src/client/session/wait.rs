//! Asking for a lock, and waiting until the request is granted or ends otherwise.

use std::time::{Duration, Instant};

use super::{PROMPT_WAIT, Session, WaitObserver, check_limit};
use crate::client::lease::Lease;
use crate::client::transport::silent;
use crate::client::{Error, LockReply};
use crate::clock;
use crate::proto::v2::{Answer, ErrorCode, LeaseTerms, LockRequest, LockStatus, Mode, Request};
use crate::timestamp::Timestamp;

/// A lock request under way.
struct LockWait {
    /// When it was sent.
    sent: Timestamp,
    deadline: Option<Instant>,
    /// The daemon has let it wait.
    has_waited: bool,
    /// How many requests of the queue come first.
    ahead: u32,
    /// When to ask again who holds the lock.
    look_at: Option<Instant>,
}

impl LockWait {
    fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= Instant::now())
    }
}

impl Session {
    /// Asks for a lock and waits for the reply, at most until `deadline`; a request with `nowait` has [`PROMPT_WAIT`] if there is
    /// no deadline.
    ///
    /// # Errors
    /// [`Error::TimedOut`] at the deadline, [`Error::Silent`] for a request with `nowait`. The caller drops the session then, since
    /// the reply may still come.
    pub fn lock(
        &mut self,
        request: &LockRequest,
        deadline: Option<Instant>,
        observer: &mut dyn WaitObserver,
    ) -> Result<LockReply, Error> {
        let mut wait = LockWait {
            sent: clock::now(),
            deadline: deadline.or_else(|| request.nowait.then(|| Instant::now() + PROMPT_WAIT)),
            has_waited: false,
            ahead: 0,
            look_at: None,
        };
        self.input.expects_descriptors = request.share.is_some();
        let offers = !request.nowait;
        self.send(&Request::Lock(Box::new(LockRequest { offers, ..request.clone() })))?;
        loop {
            let at = [wait.deadline, wait.look_at].into_iter().flatten().min();
            let reply = match self.receive(at) {
                Err(Error::TimedOut) if !wait.is_over() => {
                    self.look(request, &mut wait, observer).map(|()| None)
                }
                Err(e) => Err(e),
                Ok(answer) => self.lock_reply(request, answer, &mut wait, observer),
            };
            match reply {
                Err(e) if request.nowait => return Err(silent(e)),
                Err(e) => return Err(e),
                Ok(Some(reply)) => return Ok(reply),
                // A daemon that goes on sending must not keep the client from its deadline.
                Ok(None) if wait.is_over() => {
                    return Err(if request.nowait { Error::Silent } else { Error::TimedOut });
                }
                Ok(None) => {}
            }
        }
    }

    /// Asks who holds the lock that this session waits for.
    fn look(
        &mut self,
        request: &LockRequest,
        wait: &mut LockWait,
        observer: &dyn WaitObserver,
    ) -> Result<(), Error> {
        wait.look_at = next_look(observer);
        self.send(&Request::Status { key: Some(request.key.clone()), cluster: false })
    }

    /// Takes in one answer to a lock request. Returns `None` if the request goes on waiting.
    fn lock_reply(
        &mut self,
        request: &LockRequest,
        answer: Answer,
        wait: &mut LockWait,
        observer: &mut dyn WaitObserver,
    ) -> Result<Option<LockReply>, Error> {
        Ok(Some(match answer {
            Answer::Granted { token, lease, stale } => {
                self.stale = stale.and_then(|stale| self.shared_run(*stale));
                if let Some(terms) = lease {
                    self.begin_lease(terms, wait)?;
                }
                LockReply::Granted(token)
            }
            Answer::Offered => {
                if !wait.is_over() {
                    // The daemon grants the lock after it has read this.
                    (wait.has_waited, wait.sent) = (false, clock::now());
                    self.send(&Request::Take)?;
                }
                return Ok(None);
            }
            Answer::Finished { outcome, token, output } if request.share.is_some() => {
                self.result(outcome, token, None, output)
            }
            Answer::Finished { outcome, token, .. } => LockReply::Finished(outcome, token),
            Answer::Busy { holders } => LockReply::Busy(holders),
            Answer::Fresh { run, output } if request.share.is_some() => {
                self.result(run.outcome, run.token, Some(run), output)
            }
            Answer::Fresh { run, .. } => LockReply::Fresh(run),
            answer @ (Answer::Output { .. } | Answer::Grown | Answer::Torn | Answer::Piece { .. }) => {
                return self.output_answer(answer, observer).map(|()| None);
            }
            Answer::Superseded => LockReply::Superseded,
            Answer::Waiting { place, holders, ahead } => {
                self.place = Some(place);
                (wait.has_waited, wait.ahead) = (true, ahead);
                observer.on_waiting(&holders, ahead);
                wait.look_at = next_look(observer);
                return Ok(None);
            }
            Answer::Lock(status) => {
                wait.ahead = ahead_of_me(&status, request).unwrap_or(wait.ahead);
                observer.on_waiting(&status.holders, wait.ahead);
                return Ok(None);
            }
            Answer::End => return Ok(None),
            Answer::Error { code: ErrorCode::HeldAbove, .. } => LockReply::HeldAbove,
            Answer::Error { code, message } => return Err(Error::of_lock(code, message)),
            other => return Err(Error::unexpected(other)),
        }))
    }

    /// Begins the lease of a lock that was just granted under these terms. Of a lock that was granted at once, it is known when
    /// the grant was sent at the earliest. After a wait it is not (this process may have slept before it read the grant), so the
    /// daemon is asked once more.
    fn begin_lease(&mut self, terms: LeaseTerms, wait: &LockWait) -> Result<(), Error> {
        let quick = Duration::from_millis(terms.good_ms) / 4;
        if !wait.has_waited && clock::now() < wait.sent.plus(quick) {
            self.lease = Some(Lease::new(wait.sent, terms));
            return Ok(());
        }
        let limit = Instant::now() + self.answer_wait;
        self.measure_lease(wait.deadline.map_or(limit, |deadline| deadline.min(limit)))
    }

    fn measure_lease(&mut self, limit: Instant) -> Result<(), Error> {
        let sent = clock::now();
        self.send(&Request::Ping)?;
        loop {
            match self.answer_until(limit)? {
                Answer::Pong { lease: Some(terms) } => {
                    self.lease = Some(Lease::new(sent, terms));
                    return Ok(());
                }
                // The answer to a status request that was sent during the wait.
                Answer::Lock(_) | Answer::End => {}
                Answer::Lost { why } => return Err(Error::Lost(why.as_str().into())),
                other => return Err(Error::unexpected(other)),
            }
            check_limit(limit)?;
        }
    }
}

fn next_look(observer: &dyn WaitObserver) -> Option<Instant> {
    Some(Instant::now() + observer.pause()?)
}

/// Returns how many requests of the queue come before this process, if the daemon lists it.
fn ahead_of_me(status: &LockStatus, request: &LockRequest) -> Option<u32> {
    let me = status.waiters.iter().position(|waiter| waiter.who.pid == request.who.pid)?;
    let queue = status.waiters[..me].iter().filter(|waiter| waiter.mode == Some(Mode::Queue));
    Some(if request.mode == Mode::Queue { queue.count() as u32 } else { 0 })
}
