//! A lock that is held, and goes on being held when the daemon is restarted: the connection is made anew, and the same
//! request, named by its nonce, resumes the same grant.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::lease::Lease;
use super::retry::{PAUSE_MAX, PAUSE_MIN};
use super::{Error, Session, Target};
use crate::clock;
use crate::proto::v2::{Answer, LockRequest, Request};
use crate::proto::{Key, Outcome, Token};

/// How long to look for a daemon to release a lock to.
pub const RELEASE_WAIT: Duration = Duration::from_secs(2);
/// A command that has ended by then need not be told of: most have.
const NAME_CHILD_AFTER: Duration = Duration::from_millis(100);
/// How long connecting may take. (A Unix socket accepts at once, unless many wait before it.)
const CONNECT_WAIT: Duration = Duration::from_secs(1);

/// A lock that is held. Dropping it closes the connection, and the lock goes with it.
#[derive(Debug)]
pub struct HeldLock {
    target: Target,
    /// What resumes it.
    request: LockRequest,
    token: Token,
    link: Link,
    /// When to tell the daemon of the child, if it does not end before.
    name_child_at: Option<Instant>,
    /// How long it may be relied on without the daemon's word, if that has an end.
    lease: Option<Lease>,
}

/// How the daemon is reached at the moment.
#[derive(Debug)]
enum Link {
    Up(Session),
    /// Asked to resume, and not answered yet.
    Resuming(Session),
    /// The daemon is away. Nobody else can get the lock while it is, so there is no hurry.
    Down {
        retry_at: Instant,
        pause: Duration,
    },
}

impl HeldLock {
    /// A lock that was just granted to `request` with this token, on this session.
    pub fn new(target: Target, request: LockRequest, mut session: Session, token: Token) -> HeldLock {
        let request = LockRequest { holds: Some(token), ..request };
        let lease = session.lease.take();
        HeldLock { target, request, token, link: Link::Up(session), name_child_at: None, lease }
    }

    /// Which lock.
    pub fn key(&self) -> &Key {
        &self.request.key
    }

    /// The fencing token.
    pub fn token(&self) -> Token {
        self.token
    }

    /// What becomes readable when [`HeldLock::poll`] should be called. `None`: while the daemon is away.
    pub fn readable(&self) -> Option<BorrowedFd<'_>> {
        match &self.link {
            Link::Up(session) | Link::Resuming(session) => Some(session.as_fd()),
            Link::Down { .. } => None,
        }
    }

    /// When [`HeldLock::poll`] should be called although nothing is readable.
    pub fn poll_at(&self) -> Option<Instant> {
        let due = match self.link {
            Link::Down { retry_at, .. } => Some(retry_at),
            Link::Up(_) | Link::Resuming(_) => self.name_child_at,
        };
        due.into_iter().chain(self.lease.as_ref().map(Lease::due)).min()
    }

    /// When the lock is lost: how long to stop in, before another host can have it. `None`: it may have it already, or
    /// there is none.
    pub fn stop_within(&self) -> Option<Duration> {
        self.lease.as_ref().map(Lease::margin)
    }

    /// A process has inherited the lock, which therefore lasts as long as it lives too. The daemon is told with the next
    /// resumption, or when [`HeldLock::poll`] is called after a moment.
    ///
    /// (Until then the process has the connection itself, which tells the daemon of its end. Were this client and the
    /// daemon both killed before it is told, the next daemon would have to look for the process.)
    pub fn set_child(&mut self, pid: u32) {
        self.request.child = Some(pid);
        self.name_child_at = Some(Instant::now() + NAME_CHILD_AFTER);
    }

    fn name_child_if_due(&mut self) {
        if let Some(pid) = self.request.child
            && self.name_child_at.take_if(|time| *time <= Instant::now()).is_some()
            && let Link::Up(session) = &mut self.link
            && session.send(&Request::Child { pid }).is_err()
        {
            self.link = Link::down();
        }
    }

    /// Hears what the daemon says, and resumes if it was restarted. Does not wait for an answer.
    ///
    /// # Errors
    /// [`Error::Lost`] when the lock was lost.
    pub fn poll(&mut self) -> Result<(), Error> {
        self.name_child_if_due();
        self.check_lease()?;
        loop {
            match std::mem::replace(&mut self.link, Link::down()) {
                Link::Up(mut session) => match session.try_receive() {
                    Ok(None) => {
                        self.link = Link::Up(session);
                        return Ok(());
                    }
                    Ok(Some(Answer::Lost { why })) => return Err(Error::Lost(why.as_str().into())),
                    Ok(Some(Answer::Pong { lease })) => {
                        if let Some(mine) = &mut self.lease {
                            mine.answered(lease);
                        }
                        self.link = Link::Up(session);
                    }
                    // An answer to the naming of the child from a daemon that does not know that, at worst.
                    Ok(Some(_)) => self.link = Link::Up(session),
                    Err(_) => {}
                },
                Link::Resuming(mut session) => match session.try_receive() {
                    Ok(None) => {
                        self.link = Link::Resuming(session);
                        return Ok(());
                    }
                    Ok(Some(Answer::Granted { token, lease })) if token == self.token => {
                        if let Some(mine) = &mut self.lease {
                            mine.answered(lease);
                        }
                        self.link = Link::Up(session)
                    }
                    Ok(Some(Answer::Lost { why })) => return Err(Error::Lost(why.as_str().into())),
                    Ok(Some(other)) => return Err(Error::Lost(Error::unexpected(other).to_string())),
                    Err(_) => {
                        self.link = Link::Down { retry_at: Instant::now() + PAUSE_MIN, pause: PAUSE_MIN }
                    }
                },
                Link::Down { retry_at, pause } if retry_at > Instant::now() => {
                    self.link = Link::Down { retry_at, pause };
                    return Ok(());
                }
                Link::Down { pause, .. } => match self.resume() {
                    Ok(session) => {
                        self.name_child_at = None;
                        self.link = Link::Resuming(session);
                    }
                    Err(_) => {
                        let pause = (pause * 2).min(PAUSE_MAX);
                        self.link = Link::Down { retry_at: Instant::now() + pause, pause };
                    }
                },
            }
        }
    }

    /// Releases the lock with what those who wait are to be told. If the daemon is away, waits so long for it to come
    /// back. The confirmation is not waited for: whatever anybody asks of the daemon from now on, it reads after this.
    ///
    /// # Errors
    /// [`Error::Lost`] when the lock was lost before, [`Error::Closed`] when the daemon did not come back.
    pub fn release(&mut self, outcome: Outcome, wait: Duration) -> Result<Session, Error> {
        let give_up = Instant::now() + wait;
        loop {
            if let Link::Up(session) = &mut self.link
                && session.send(&Request::Release { outcome }).is_ok()
            {
                match std::mem::replace(&mut self.link, Link::down()) {
                    Link::Up(session) => return Ok(session),
                    _ => unreachable!("it was up a moment ago"),
                }
            }
            if Instant::now() >= give_up {
                return Err(Error::Closed);
            }
            if let Link::Up(_) = self.link {
                self.link = Link::down();
            }
            self.poll()?;
            self.wait(give_up)?;
        }
    }

    /// Waits until there is something to poll to, or until `deadline`.
    fn wait(&self, deadline: Instant) -> Result<(), Error> {
        match &self.link {
            Link::Up(_) => Ok(()),
            Link::Resuming(session) => match session.wait_readable(deadline) {
                Err(Error::TimedOut) => Ok(()),
                other => other,
            },
            Link::Down { retry_at, .. } => {
                let until = (*retry_at).min(deadline);
                std::thread::sleep(until.saturating_duration_since(Instant::now()));
                Ok(())
            }
        }
    }

    fn check_lease(&mut self) -> Result<(), Error> {
        let Some(lease) = &mut self.lease else { return Ok(()) };
        if lease.is_over() {
            let why = "the daemon has not said for too long that this host has it still";
            return Err(Error::Lost(why.into()));
        }
        if let Link::Up(session) = &mut self.link
            && lease.ping_due()
            && session.send(&Request::Ping).is_err()
        {
            self.link = Link::down();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<Session, Error> {
        let mut session = Session::connect(&self.target, Some(Instant::now() + CONNECT_WAIT))?;
        if let Some(lease) = &mut self.lease {
            lease.asked(clock::now());
        }
        session.send(&Request::Lock(Box::new(self.request.clone())))?;
        Ok(session)
    }
}

impl Link {
    /// Away since just now: to be looked for at once.
    fn down() -> Link {
        Link::Down { retry_at: Instant::now(), pause: PAUSE_MIN }
    }
}
