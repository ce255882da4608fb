//! One connection of protocol 2.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::Uid;

use super::credentials::Credentials;
use super::lease::Lease;
use super::transport::Transport;
use super::{Error, LockReply, Target, autostart};
use crate::addr::{self, Addr};
use crate::clock;
use crate::lock_file;
use crate::lookup;
use crate::proto::v2::{
    Answer, ErrorCode, FRAME_BYTES_MAX, LockRequest, LockStatus, LockUser, Mode, PREAMBLE, Request,
    decode_answer, encode, encode_proven,
};
use crate::proto::{Key, Nonce};

/// How long a daemon may take to answer a request that it answers at once.
pub(super) const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// The same for a user who asked not to wait (`--nonblock`), or only looks.
pub const PROMPT_WAIT: Duration = Duration::from_secs(3);

/// Follows a request that waits: shows who holds the lock.
pub trait WaitObserver {
    /// Returns after how long to ask the daemon again who holds the lock; `None`: never.
    fn pause(&self) -> Option<Duration>;

    /// The request waits: `holders` hold the lock, and `ahead` requests of the queue come first.
    fn on_waiting(&mut self, holders: &[LockUser], ahead: u32);
}

/// Ignores everything.
#[derive(Debug)]
pub struct NoObserver;

impl WaitObserver for NoObserver {
    fn pause(&self) -> Option<Duration> {
        None
    }

    fn on_waiting(&mut self, _holders: &[LockUser], _ahead: u32) {}
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

/// One connection of protocol 2. Dropping it closes the connection, which releases its lock or withdraws its request.
#[derive(Debug)]
pub struct Session {
    transport: Transport,
    /// The client's name and secret, which go out with the preamble.
    credentials: Option<Box<Credentials>>,
    /// Bytes that have arrived and are not decoded yet.
    input: Vec<u8>,
    stage: Stage,
    /// The place in the order of arrival that the daemon stated, if it let the request wait.
    place: Option<u64>,
    /// What proves that a request comes from this client, and not from a command that has inherited the connection.
    proof: Option<Nonce>,
    /// How long the daemon may take to answer a request that it answers at once.
    answer_wait: Duration,
    /// The lease of the lock that the session holds, if it has one.
    pub(super) lease: Option<Lease>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The client has sent nothing: the preamble goes out with the first request, so that the two cost one round trip.
    Silent,
    /// The client has sent the preamble; the greeting has not arrived.
    Opening,
    /// The greeting has arrived; what the daemon thinks of the client's name has not.
    Authenticating,
    Open,
}

impl Session {
    /// Connects, and starts a daemon first if there is none and `target` says so. Sends nothing yet.
    ///
    /// # Errors
    /// When there is no daemon, or its user is not trusted; [`Error::TimedOut`] at the deadline.
    pub fn connect(target: &Target, deadline: Option<Instant>) -> Result<Session, Error> {
        let fd = match (target.addr.connect(deadline), &target.addr) {
            (Err(e), Addr::Unix(path)) if target.autostart && e.is_absent() => {
                autostart::start_and_connect(path, deadline)?
            }
            (Err(e), Addr::Unix(path)) if e.is_absent() => {
                return Err(match lock_file::pid_without_socket(path) {
                    Some(pid) => Error::SocketGone { path: path.clone(), pid },
                    None => e.into(),
                });
            }
            (other, _) => other?,
        };
        check_trust(target, &fd)?;
        let credentials = match (&target.addr, &target.auth_file) {
            // The kernel tells who connects to a Unix socket.
            (Addr::Unix(_), _) | (_, None) => None,
            (_, Some(path)) => Some(Box::new(Credentials::read(path)?)),
        };
        let transport = Transport::begin(target, fd, deadline)?;
        Ok(Session {
            transport,
            credentials,
            input: Vec::new(),
            stage: Stage::Silent,
            place: None,
            lease: None,
            proof: None,
            answer_wait: ANSWER_WAIT,
        })
    }

    /// Connects as [`Session::connect`] does, for requests that the daemon answers at once: connecting and each answer may
    /// take `limit`.
    ///
    /// # Errors
    /// As [`Session::connect`], and [`Error::Silent`] when connecting takes longer.
    pub fn connect_within(target: &Target, limit: Duration) -> Result<Session, Error> {
        let session = Session::connect(target, Some(Instant::now() + limit)).map_err(silent)?;
        Ok(Session { answer_wait: limit, ..session })
    }

    /// Asks for a lock and waits for the reply, at most until `deadline`.
    ///
    /// # Errors
    /// [`Error::TimedOut`] at the deadline. The caller drops the session then, since the reply may still come.
    pub fn lock(
        &mut self,
        request: &LockRequest,
        deadline: Option<Instant>,
        observer: &mut dyn WaitObserver,
    ) -> Result<LockReply, Error> {
        self.send(&Request::Lock(Box::new(request.clone())))?;
        let limit = Instant::now() + PROMPT_WAIT;
        let mut ahead = 0;
        let mut look_at = None;
        loop {
            let answer = match (deadline, look_at) {
                // The daemon answers a request with `nowait` at once.
                (None, None) if request.nowait => self.receive(Some(limit)).map_err(silent),
                (Some(deadline), Some(look_at)) => self.receive(Some(deadline.min(look_at))),
                (one, other) => self.receive(one.or(other)),
            };
            return Ok(match answer {
                Err(Error::TimedOut) if deadline.is_none_or(|deadline| Instant::now() < deadline) => {
                    look_at = next_look(observer);
                    self.send(&Request::Status { key: Some(request.key.clone()), cluster: false })?;
                    continue;
                }
                Err(e) => return Err(e),
                Ok(Answer::Granted { token, lease }) => {
                    if lease.is_some() {
                        self.measure_lease()?;
                    }
                    LockReply::Granted(token)
                }
                Ok(Answer::Finished { outcome, token }) => LockReply::Finished(outcome, token),
                Ok(Answer::Busy { holders }) => LockReply::Busy(holders),
                Ok(Answer::Fresh { run }) => LockReply::Fresh(run),
                Ok(Answer::Superseded) => LockReply::Superseded,
                Ok(Answer::Waiting { place, holders, ahead: before }) => {
                    self.place = Some(place);
                    ahead = before;
                    observer.on_waiting(&holders, ahead);
                    look_at = next_look(observer);
                    continue;
                }
                Ok(Answer::Lock(status)) => {
                    ahead = ahead_of_me(&status, request).unwrap_or(ahead);
                    observer.on_waiting(&status.holders, ahead);
                    continue;
                }
                Ok(Answer::End) => continue,
                Ok(Answer::Error { code: ErrorCode::CannotRecord, message }) => {
                    return Err(Error::Unrecorded(message));
                }
                Ok(Answer::Error { code: ErrorCode::Deadlock, message }) => {
                    return Err(Error::Deadlock(message));
                }
                Ok(Answer::Error { code: ErrorCode::Unavailable, message }) => {
                    return Err(Error::Unavailable(message));
                }
                Ok(Answer::Error { code: ErrorCode::PerHost, message }) => {
                    return Err(Error::PerHost(message));
                }
                Ok(Answer::Error { code: ErrorCode::SlotsDiffer, message }) => {
                    return Err(Error::SlotsDiffer(message));
                }
                Ok(Answer::Error { code: ErrorCode::NotPermitted, message }) => {
                    return Err(Error::NotPermitted(message));
                }
                Ok(Answer::Error { code: ErrorCode::HeldAbove, .. }) => LockReply::HeldAbove,
                Ok(other) => return Err(Error::unexpected(other)),
            });
        }
    }

    /// Asks for the lease of the lock that was just granted. (The grant states it too, but not when it was sent: this
    /// process may have slept before it read the grant.)
    fn measure_lease(&mut self) -> Result<(), Error> {
        let sent = clock::now();
        self.send(&Request::Ping)?;
        loop {
            match self.answer()? {
                Answer::Pong { lease: Some(terms) } => {
                    self.lease = Some(Lease::new(sent, terms));
                    return Ok(());
                }
                // The answer to a status request that was sent during the wait.
                Answer::Lock(_) | Answer::End => {}
                Answer::Lost { why } => return Err(Error::Lost(why.as_str().into())),
                other => return Err(Error::unexpected(other)),
            }
        }
    }

    /// Ends the stream, and returns when the daemon has read the end. (If the daemon dies first, its journal has the lock.)
    ///
    /// # Errors
    /// [`Error::Silent`] when the daemon does not react.
    pub fn leave(mut self) -> Result<(), Error> {
        // An error means that the connection is closed already.
        let _ = shutdown(self.transport.as_fd().as_raw_fd(), Shutdown::Write);
        loop {
            match self.answer() {
                Ok(_) => {}
                Err(Error::Silent) => return Err(Error::Silent),
                Err(_) => return Ok(()),
            }
        }
    }

    /// Returns the place in the order of arrival that the daemon stated, if it let this session wait.
    pub(super) fn place(&self) -> Option<u64> {
        self.place
    }

    /// Sends a request that the daemon answers at once, and returns the answer.
    ///
    /// # Errors
    /// [`Error::Silent`] when no answer comes, [`Error::Closed`] when the daemon is gone.
    pub fn call(&mut self, request: &Request) -> Result<Answer, Error> {
        self.send(request)?;
        self.answer()
    }

    /// Returns the next answer to a request that the daemon answers at once.
    ///
    /// # Errors
    /// [`Error::Silent`] when no answer comes, [`Error::Closed`] when the daemon is gone.
    pub fn answer(&mut self) -> Result<Answer, Error> {
        self.receive(Some(Instant::now() + self.answer_wait)).map_err(silent)
    }

    /// Returns the status of one lock, or `None` if it has no holder and no waiter.
    ///
    /// # Errors
    /// As [`Session::call`].
    pub fn status_of(&mut self, key: &Key) -> Result<Option<LockStatus>, Error> {
        let first = self.call(&Request::Status { key: Some(key.clone()), cluster: false })?;
        self.one_status(first)
    }

    /// Returns the status of one lock among all hosts of the cluster; the host's own if the daemon does not cluster its
    /// locks.
    ///
    /// # Errors
    /// As [`Session::call`], and [`Error::Unavailable`] if the daemon cannot ask etcd.
    pub fn status_in_cluster(&mut self, key: &Key) -> Result<Option<LockStatus>, Error> {
        let here = self.status_of(key)?;
        if here.as_ref().is_some_and(|status| status.holding > 0) {
            return Ok(here);
        }
        match self.call(&Request::Status { key: Some(key.clone()), cluster: true })? {
            Answer::Error { code: ErrorCode::BadRequest, .. } => Ok(here),
            Answer::Error { code: ErrorCode::Unavailable, message } => Err(Error::Unavailable(message)),
            first => self.one_status(first),
        }
    }

    /// Reads the status of one lock to its end.
    fn one_status(&mut self, first: Answer) -> Result<Option<LockStatus>, Error> {
        let status = match first {
            Answer::End => return Ok(None),
            Answer::Lock(status) => status,
            other => return Err(Error::unexpected(other)),
        };
        match self.answer()? {
            Answer::End => Ok(Some(status)),
            other => Err(Error::unexpected(other)),
        }
    }

    /// Waits until the daemon confirms a release.
    ///
    /// # Errors
    /// [`Error::Lost`] when the lock was lost before, [`Error::Closed`] when the daemon is gone.
    pub(super) fn confirm_release(&mut self) -> Result<(), Error> {
        loop {
            return match self.answer()? {
                Answer::Released => Ok(()),
                // Sent before the daemon read the release.
                Answer::Pong { .. } | Answer::Stop { .. } => continue,
                Answer::Lost { why } => Err(Error::Lost(why.as_str().into())),
                other => Err(Error::unexpected(other)),
            };
        }
    }

    /// Sends a request.
    ///
    /// # Errors
    /// [`Error::Closed`] when the daemon is gone.
    pub fn send(&mut self, request: &Request) -> Result<(), Error> {
        let mut message = Vec::with_capacity(512);
        if self.stage == Stage::Silent {
            message.extend_from_slice(&PREAMBLE);
            self.stage = Stage::Opening;
            if let Some(Credentials { name, secret }) = self.credentials.as_deref() {
                encode(&Request::Auth { name: name.clone(), secret: secret.clone() }, &mut message);
            }
        }
        match self.proof {
            Some(nonce) => encode_proven(request, nonce, &mut message),
            None => encode(request, &mut message),
        }
        if let Request::Lock(lock) = request {
            // From now on a command may have this connection too, and the daemon takes no request without a proof.
            self.proof = lock.nonce.filter(|_| lock.inherits || lock.exec);
        }
        self.transport.write_all(&message)
    }

    /// Waits for the next answer, at most until `deadline`. Checks the greeting and skips it.
    ///
    /// # Errors
    /// [`Error::TimedOut`] at the deadline, [`Error::Closed`] when the daemon is gone.
    pub fn receive(&mut self, deadline: Option<Instant>) -> Result<Answer, Error> {
        loop {
            if let Some(answer) = self.take()? {
                return Ok(answer);
            }
            self.transport.read(&mut self.input, deadline)?;
        }
    }

    /// Returns the next answer, if it has arrived.
    ///
    /// # Errors
    /// [`Error::Closed`] when the daemon is gone.
    pub(super) fn try_receive(&mut self) -> Result<Option<Answer>, Error> {
        loop {
            if let Some(answer) = self.take()? {
                return Ok(Some(answer));
            }
            if !self.transport.try_read(&mut self.input)? {
                return Ok(None);
            }
        }
    }

    /// Decodes one answer from the bytes that have arrived.
    fn take(&mut self) -> Result<Option<Answer>, Error> {
        // Not memchr's search: it would first detect the processor's features, which costs more than it saves.
        while let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.input.drain(..=end).collect();
            if line[0] != b'{' {
                return Err(Error::not_version_2());
            }
            match (self.stage, decode_answer(&line).map_err(Error::Protocol)?) {
                (Stage::Open, answer) => return Ok(Some(answer)),
                (Stage::Opening, Answer::Hello { .. }) if self.credentials.is_some() => {
                    self.stage = Stage::Authenticating;
                }
                (Stage::Opening, Answer::Hello { .. }) | (Stage::Authenticating, Answer::Welcome) => {
                    self.stage = Stage::Open;
                }
                (_, answer) => return Err(Error::unexpected(answer)),
            }
        }
        match self.input.first() {
            Some(&byte) if byte != b'{' => Err(Error::not_version_2()),
            _ if self.input.len() > FRAME_BYTES_MAX => {
                Err(Error::Protocol(format!("its line is longer than {FRAME_BYTES_MAX} bytes")))
            }
            _ => Ok(None),
        }
    }

    pub(super) fn wait_readable(&self, deadline: Instant) -> Result<(), Error> {
        self.transport.wait_readable(Some(deadline))
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }
}

/// The daemon decides who gets a lock, so its user must be one who could as well replace this program: its own user, root,
/// or a uid that the user named. The kernel does not tell who serves a TCP port.
fn check_trust(target: &Target, fd: &OwnedFd) -> Result<(), Error> {
    let Addr::Unix(_) = target.addr else { return Ok(()) };
    let uid = addr::peer(fd).map_err(|e| Error::Io("find out who serves the socket", e))?.uid;
    if uid == 0 || uid == Uid::effective().as_raw() || target.trusted_uids.contains(&uid) {
        return Ok(());
    }
    Err(Error::Untrusted { addr: target.addr.clone(), uid, user: lookup::user(uid) })
}

/// An answer that was due at once did not come.
fn silent(error: Error) -> Error {
    match error {
        Error::TimedOut => Error::Silent,
        other => other,
    }
}
