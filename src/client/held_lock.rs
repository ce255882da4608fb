//! A held lock that survives a restart of the daemon: the client reconnects and sends the same request again, and the
//! daemon recognises its grant by the nonce.

use crate::proto::Pid;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::connecting::Connecting;
use super::lease::{Due, Lease};
use super::retry::{PAUSE_MAX, PAUSE_MIN};
use super::transport::wait_for;
use super::{Error, Session, Target};
use crate::addr::Addr;
use crate::clock;
use crate::output::{self, Output};
use crate::proto::v2::{Answer, ErrorCode, LockRequest, Request};
use crate::proto::{Key, Outcome, Token};
use crate::timestamp::millis;

/// How long a client tries to reach a daemon in order to release a lock.
pub const RELEASE_WAIT: Duration = Duration::from_secs(2);
/// The daemon learns the command's pid after this time, since most commands end sooner.
const NAME_CHILD_AFTER: Duration = Duration::from_millis(100);
/// How many answers are taken in at a time.
const ANSWERS_AT_ONCE_MAX: usize = 64;
/// How long connecting to another machine may take, while the client does other things.
const REMOTE_CONNECT_WAIT: Duration = Duration::from_secs(5);
/// How long connecting may take. (A Unix socket accepts at once, unless its backlog is full.)
const CONNECT_WAIT: Duration = Duration::from_secs(1);
/// The longest piece of an output that is sent through a connection, in bytes.
const PIECE_BYTES_MAX: usize = 16 * 1024;

/// A held lock. Dropping it closes the connection, which releases the lock.
#[derive(Debug)]
pub struct HeldLock {
    target: Target,
    /// The request that resumes the lock.
    request: LockRequest,
    token: Token,
    link: Link,
    /// When to tell the daemon the command's pid, unless the command ends before.
    name_child_at: Option<Instant>,
    /// How long the lock is safe without news from the daemon. `None`: as long as the connection lasts.
    lease: Option<Lease>,
    /// The daemon has asked the holder to stop, and why.
    stop: Option<String>,
    /// A connection on which the daemon does not answer. It stays open until the lock is resumed on another one: its end would
    /// release the lock.
    stuck: Option<Session>,
    /// The output of the run under the lock, for the clients that wait for its result.
    output: Option<GivenOutput>,
    /// A client reads that as it comes.
    is_followed: bool,
}

/// The output of a run, for others.
#[derive(Debug)]
enum GivenOutput {
    /// In this file, which is open for reading only, as far as it has come.
    File(OwnedFd),
    /// The same; the run is over.
    Complete(OwnedFd),
    /// Others do not get it, and why.
    Withheld(String),
}

/// The state of the connection.
#[derive(Debug)]
enum Link {
    Up(Session),
    /// A thread connects; the client asks to resume on the connection that it makes.
    Connecting(Connecting),
    /// The client has asked to resume; the daemon has not answered yet.
    Resuming(Session),
    /// There is no daemon. While there is none, no other client can get the lock, so there is no hurry.
    Down {
        retry_at: Instant,
        pause: Duration,
    },
}

impl HeldLock {
    /// A lock that the daemon has just granted to `request`, under this token, on this session.
    pub fn new(target: Target, request: LockRequest, mut session: Session, token: Token) -> HeldLock {
        let request = LockRequest { holds: Some(token), ..request };
        let lease = session.lease.take();
        HeldLock {
            target,
            request,
            token,
            link: Link::Up(session),
            name_child_at: None,
            lease,
            stop: None,
            stuck: None,
            output: None,
            is_followed: false,
        }
    }

    /// Returns the key of the lock.
    pub fn key(&self) -> &Key {
        &self.request.key
    }

    /// Returns the fencing token.
    pub fn token(&self) -> Token {
        self.token
    }

    /// Returns why the holder is to stop and release, if the daemon has asked for that since the last call. The lock is held
    /// until it is released.
    pub fn take_stop(&mut self) -> Option<String> {
        self.stop.take()
    }

    /// Gives the output of the run under the lock to the clients that share its result: the file may still grow.
    pub fn give_output(&mut self, file: OwnedFd) {
        self.output = Some(GivenOutput::File(file));
        self.tell_of_output();
    }

    /// The output is complete. The release tells the clients.
    pub fn output_is_complete(&mut self) {
        self.output = match self.output.take() {
            Some(GivenOutput::File(file)) => Some(GivenOutput::Complete(file)),
            other => other,
        };
    }

    /// Other clients do not get the output.
    pub fn withhold_output(&mut self, why: String) {
        self.output = Some(GivenOutput::Withheld(why));
        self.tell_of_output();
    }

    /// Returns `true` if a client wants to know when the output has grown.
    pub fn is_followed(&self) -> bool {
        self.is_followed
    }

    /// The output has grown.
    pub fn output_has_grown(&mut self) {
        if let Link::Up(session) = &mut self.link
            && session.send(&Request::Grown).is_err()
        {
            self.link = Link::down();
        }
    }

    fn tell_of_output(&mut self) {
        if let Link::Up(session) = &mut self.link
            && tell_of_output(session, self.output.as_ref()).is_err()
        {
            self.link = Link::down();
        }
    }

    /// Tells the daemon, for its log, that the lock is held for longer than its holder meant to.
    pub fn overdue(&mut self, held: Duration) {
        if let Link::Up(session) = &mut self.link
            && session.send(&Request::Overdue { held_ms: millis(held) }).is_err()
        {
            self.link = Link::down();
        }
    }

    /// Returns the descriptor that becomes readable when [`HeldLock::poll`] has something to do, or `None` while there is no
    /// daemon.
    pub fn readable(&self) -> Option<BorrowedFd<'_>> {
        match &self.link {
            Link::Up(session) | Link::Resuming(session) => Some(session.as_fd()),
            Link::Connecting(connecting) => Some(connecting.as_fd()),
            Link::Down { .. } => None,
        }
    }

    /// Returns when [`HeldLock::poll`] has something to do even if nothing is readable.
    pub fn poll_at(&self) -> Option<Instant> {
        let is_up = matches!(self.link, Link::Up(_));
        let due = match &self.link {
            Link::Down { retry_at, .. } => Some(*retry_at),
            Link::Up(session) | Link::Resuming(session) if session.has_unread() => Some(Instant::now()),
            Link::Up(_) | Link::Resuming(_) => self.name_child_at,
            Link::Connecting(_) => None,
        };
        due.into_iter().chain(self.lease.as_ref().map(|lease| lease.due(is_up))).min()
    }

    /// Returns, for a lost lock, how much time is left to stop the work before another host can get the lock; `None` if
    /// another holder may have it already, or the lock has no lease.
    pub fn stop_within(&self) -> Option<Duration> {
        self.lease.as_ref().map(Lease::margin)
    }

    /// In a process that was forked from the one that connected: connects anew, so that the daemon knows this one. If that does
    /// not work in time, the old connection stays.
    ///
    /// # Errors
    /// [`Error::Lost`] when the lock was lost.
    pub fn reconnect(&mut self, wait: Duration) -> Result<(), Error> {
        self.request.who.pid = Pid::new(std::process::id());
        let give_up = Instant::now() + wait;
        let old = std::mem::replace(&mut self.link, Link::down());
        loop {
            self.poll()?;
            if let Link::Up(_) = self.link {
                return Ok(());
            }
            if Instant::now() >= give_up {
                self.link = old;
                return Ok(());
            }
            self.wait(give_up)?;
        }
    }

    /// Notes that process `pid` has inherited the lock, which therefore also lasts as long as that process. The client tells
    /// the daemon when it resumes, or when [`HeldLock::poll`] is called after a moment.
    ///
    /// (Until then the inherited connection tells the daemon when the process ends. If this client and the daemon were both
    /// killed before that, the next daemon would have to search for the process.)
    pub fn set_child(&mut self, pid: Pid) {
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

    /// Reads what the daemon has sent, and resumes the lock if the daemon was restarted. Does not wait for an answer, and reads
    /// only so much at a time: a daemon that goes on sending must not keep the caller from other things, such as signals.
    ///
    /// # Errors
    /// [`Error::Lost`] when the lock was lost.
    pub fn poll(&mut self) -> Result<(), Error> {
        self.name_child_if_due();
        self.check_lease()?;
        for _ in 0..ANSWERS_AT_ONCE_MAX {
            let (link, goes_on) = match std::mem::replace(&mut self.link, Link::down()) {
                Link::Up(session) => self.poll_up(session)?,
                Link::Resuming(session) => self.poll_resuming(session)?,
                Link::Connecting(connecting) => self.poll_connecting(connecting),
                Link::Down { retry_at, pause } => self.poll_down(retry_at, pause),
            };
            self.link = link;
            if !goes_on {
                break;
            }
        }
        Ok(())
    }

    /// Takes in one answer. The flag says whether there may be more to do.
    fn poll_up(&mut self, mut session: Session) -> Result<(Link, bool), Error> {
        match session.try_receive() {
            Ok(None) => return Ok((Link::Up(session), false)),
            Ok(Some(Answer::Lost { why })) => return Err(Error::Lost(why.as_str().into())),
            Ok(Some(Answer::Pong { lease })) => {
                if let Some(mine) = &mut self.lease {
                    mine.answered(lease);
                }
            }
            Ok(Some(Answer::Stop { why })) => self.stop = Some(why.as_str().into()),
            Ok(Some(Answer::Followed)) => self.is_followed = true,
            // At worst an error from an older daemon, which does not know the request that names the child.
            Ok(Some(_)) => {}
            Err(_) => return Ok((Link::down(), true)),
        }
        Ok((Link::Up(session), true))
    }

    fn poll_resuming(&mut self, mut session: Session) -> Result<(Link, bool), Error> {
        match session.try_receive() {
            Ok(None) => Ok((Link::Resuming(session), false)),
            Ok(Some(Answer::Granted { token, lease, .. })) if token == self.token => {
                if let Some(mine) = &mut self.lease {
                    mine.answered(lease);
                }
                self.stuck = None;
                let is_told = tell_of_output(&mut session, self.output.as_ref()).is_ok();
                Ok((if is_told { Link::Up(session) } else { Link::down() }, true))
            }
            Ok(Some(Answer::Lost { why })) => Err(Error::Lost(why.as_str().into())),
            // A daemon with too many clients has not decided about the lock.
            Ok(Some(Answer::Error { code: ErrorCode::TooMany | ErrorCode::Unavailable, .. })) => {
                Ok((Link::down_for(PAUSE_MAX), true))
            }
            Ok(Some(other)) => Err(Error::Lost(Error::unexpected(other).to_string())),
            Err(_) => Ok((Link::down_for(PAUSE_MIN), true)),
        }
    }

    fn poll_down(&mut self, retry_at: Instant, pause: Duration) -> (Link, bool) {
        if retry_at > Instant::now() {
            return (Link::Down { retry_at, pause }, false);
        }
        let next = (pause * 2).min(PAUSE_MAX);
        if let Addr::Unix(_) = self.target.addr {
            let session = Session::connect(&self.target, Some(Instant::now() + CONNECT_WAIT));
            return (self.resume(session, next), true);
        }
        match Connecting::begin(self.target.clone(), REMOTE_CONNECT_WAIT) {
            Ok(connecting) => (Link::Connecting(connecting), true),
            Err(_) => (Link::down_for(next), true),
        }
    }

    fn poll_connecting(&mut self, connecting: Connecting) -> (Link, bool) {
        match connecting.result() {
            None => (Link::Connecting(connecting), false),
            Some(session) => (self.resume(session, PAUSE_MAX), true),
        }
    }

    /// Asks to resume the lock on a new connection, or tries again after `pause`.
    fn resume(&mut self, session: Result<Session, Error>, pause: Duration) -> Link {
        if let Some(lease) = &mut self.lease {
            lease.asked(clock::now());
        }
        let request = Request::Lock(Box::new(self.request.clone()));
        match session.and_then(|mut session| session.send(&request).map(|()| session)) {
            Ok(session) => {
                self.name_child_at = None;
                Link::Resuming(session)
            }
            Err(_) => Link::down_for(pause),
        }
    }

    /// Releases the lock and gives the waiters this outcome. If there is no daemon, waits up to `wait` for one. Does not wait
    /// for the confirmation: the daemon reads every later request of any client after this one.
    ///
    /// # Errors
    /// [`Error::Lost`] when the lock was lost earlier, [`Error::Closed`] when no daemon came back in time.
    pub fn release(&mut self, outcome: Outcome, wait: Duration) -> Result<Session, Error> {
        let give_up = Instant::now() + wait;
        loop {
            if let Link::Up(session) = &mut self.link
                && send_output(session, self.output.as_ref()).is_ok()
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

    /// Releases the lock as [`HeldLock::release`] does, and waits until a daemon has recorded that, if one comes back in time:
    /// for a run that later requests count on.
    ///
    /// # Errors
    /// As [`HeldLock::release`].
    pub fn release_recorded(&mut self, outcome: Outcome, wait: Duration) -> Result<(), Error> {
        let give_up = Instant::now() + wait;
        let mut is_told = false;
        loop {
            let left = give_up.saturating_duration_since(Instant::now());
            let released = self.release(outcome, left);
            let was_told = is_told;
            is_told |= released.is_ok();
            match released.and_then(|mut session| session.confirm_release()) {
                Ok(()) => return Ok(()),
                // The daemon read the release before it died.
                Err(Error::Lost(_)) if was_told => return Ok(()),
                Err(Error::Closed) if Instant::now() < give_up => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns `true` if later requests may count on the run under this lock.
    pub fn is_remembered(&self) -> bool {
        self.request.fresh_ms > 0 || self.request.fresh_failure_ms > 0
    }

    /// Waits until there is something to poll to, or until `deadline`.
    fn wait(&self, deadline: Instant) -> Result<(), Error> {
        match &self.link {
            Link::Up(_) => Ok(()),
            Link::Resuming(session) => match session.wait_readable(deadline) {
                Err(Error::TimedOut) => Ok(()),
                other => other,
            },
            Link::Connecting(connecting) => match wait_for(connecting, PollFlags::POLLIN, Some(deadline)) {
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
            let why = "no lease renewal from the daemon in time";
            return Err(Error::Lost(why.into()));
        }
        let Link::Up(session) = &mut self.link else { return Ok(()) };
        match lease.take_due() {
            Due::Nothing => {}
            Due::Ping if session.send(&Request::Ping).is_ok() => {}
            Due::Ping => self.link = Link::down(),
            // On this machine the daemon itself is slow.
            Due::Reconnect if matches!(self.target.addr, Addr::Unix(_)) => {}
            Due::Reconnect => {
                if let Link::Up(session) = std::mem::replace(&mut self.link, Link::down()) {
                    self.stuck = Some(session);
                }
            }
        }
        Ok(())
    }
}

/// Tells the daemon what it is to do with an output.
fn tell_of_output(session: &mut Session, output: Option<&GivenOutput>) -> Result<(), Error> {
    match output {
        Some(GivenOutput::Withheld(why)) => session.send(&Request::Withhold { why: why.as_str().into() }),
        Some(GivenOutput::File(file) | GivenOutput::Complete(file)) if session.passes_descriptors() => {
            session.send_with(&Request::Output, file.as_fd())
        }
        // It is sent when it is complete.
        _ => Ok(()),
    }
}

/// Sends an output that is complete, where no descriptor can be passed.
fn send_output(session: &mut Session, output: Option<&GivenOutput>) -> Result<(), Error> {
    let Some(GivenOutput::Complete(file)) = output.filter(|_| !session.passes_descriptors()) else {
        return Ok(());
    };
    let file = file.try_clone().map(Output::from_descriptor);
    let why = match file.and_then(|file| output::pieces(&file, PIECE_BYTES_MAX)) {
        Ok(Some(pieces)) => {
            return pieces.iter().try_for_each(|(stream, bytes)| {
                session.send(&Request::Piece { stream: stream.number(), data: output::to_base64(bytes) })
            });
        }
        Ok(None) => "the output is longer than 64 KiB, and its holder is not on the daemon's host".into(),
        Err(e) => format!("the output cannot be read: {e}"),
    };
    session.send(&Request::Withhold { why: why.as_str().into() })
}

impl Link {
    /// The connection has just closed: the client tries at once to reconnect.
    fn down() -> Link {
        Link::Down { retry_at: Instant::now(), pause: PAUSE_MIN }
    }

    fn down_for(pause: Duration) -> Link {
        Link::Down { retry_at: Instant::now() + pause, pause }
    }
}
