//! One connection of protocol 2: requests out, answers in.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `session/connect.rs` | connecting to a daemon that is trusted |
//! | `session/peer_watch.rs` | noticing that the daemon's machine is gone |
//! | `session/wait.rs` | asking for a lock, and waiting for it |
//! | `session/wait_observer.rs` | what a client does meanwhile |
//! | `session/results.rs` | the results of other clients' runs |
//! | `session/status.rs` | asking for the status of one lock |

mod connect;
mod peer_watch;
mod results;
mod status;
mod wait;
mod wait_observer;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, shutdown};
use rustix::process::{PidfdFlags, pidfd_open};

use super::Error;
use super::credentials::Credentials;
use super::lease::Lease;
use super::shared::SharedRun;
use super::transport::{Input, Transport, silent};
use crate::proto::Nonce;
use crate::proto::v2::{Answer, FRAME_BYTES_MAX, PREAMBLE, Request, decode_answer, encode, encode_proven};
use peer_watch::PeerWatch;
pub use wait_observer::{NoObserver, WaitObserver};

/// How long a daemon may take to answer a request that it answers at once.
pub(super) const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// The same for a user who asked not to wait (`--nonblock`), or only looks: such a command ends within 3 seconds, whatever the
/// daemon does.
pub const PROMPT_WAIT: Duration = Duration::from_millis(2500);

/// How often the client reads at once what has arrived: often enough for a whole frame.
const READS_AT_ONCE_MAX: usize = 20;

/// One connection of protocol 2. Dropping it closes the connection, which releases its lock or withdraws its request.
#[derive(Debug)]
pub struct Session {
    transport: Transport,
    /// The client's name and secret, which go out with the preamble.
    credentials: Option<Box<Credentials>>,
    /// Bytes that have arrived and are not decoded yet.
    input: Input,
    /// How many of these bytes are known to contain no end of a line.
    searched: usize,
    /// The parts of an output that have arrived, in the form that a file of it has.
    pieces: Vec<u8>,
    /// The result to use while the session holds the lock and its caller runs anew.
    stale: Option<Box<SharedRun>>,
    stage: Stage,
    /// The daemon is reached through a Unix socket.
    is_local: bool,
    /// The place in the order of arrival that the daemon stated, if it let the request wait.
    place: Option<u64>,
    /// What proves that a request comes from this client, and not from a command that has inherited the connection.
    proof: Option<Nonce>,
    /// How long the daemon may take to answer a request that it answers at once.
    answer_wait: Duration,
    /// How the connection is kept from lasting for ever when the daemon's machine is gone.
    peer: PeerWatch,
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
        self.answer_until(Instant::now() + self.answer_wait)
    }

    /// Returns the next answer, if it comes until `limit`.
    ///
    /// # Errors
    /// As [`Session::answer`].
    pub fn answer_until(&mut self, limit: Instant) -> Result<Answer, Error> {
        self.receive(Some(limit)).map_err(silent)
    }

    /// Sends a request.
    ///
    /// # Errors
    /// [`Error::Closed`] when the daemon is gone.
    pub fn send(&mut self, request: &Request) -> Result<(), Error> {
        let process = self.process_in(request);
        if self.is_local && process.is_none() && matches!(request, Request::Child { .. }) {
            // It has ended, and needs no lock.
            return Ok(());
        }
        let message = self.message(request);
        match process {
            None => self.transport.write_all(&message, self.answer_wait),
            Some(process) => self.transport.write_with(&message, process.as_fd(), self.answer_wait),
        }
    }

    /// Sends a request, and passes a descriptor with it.
    ///
    /// # Errors
    /// [`Error::Closed`] when the daemon is gone.
    pub(super) fn send_with(&mut self, request: &Request, descriptor: BorrowedFd<'_>) -> Result<(), Error> {
        let message = self.message(request);
        self.transport.write_with(&message, descriptor, self.answer_wait)
    }

    /// Returns a request as it is to be sent next.
    fn message(&mut self, request: &Request) -> Vec<u8> {
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
        message
    }

    /// Returns a descriptor of the process that a request names: its number may mean another process to the daemon.
    fn process_in(&self, request: &Request) -> Option<OwnedFd> {
        let pid = match request {
            Request::Lock(asked) => asked.child?,
            Request::Child { pid } | Request::Unlock { pid, .. } => *pid,
            _ => return None,
        };
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid.get()).ok()?)?;
        // A process that has ended needs no lock, and no daemon takes a number in its place.
        pidfd_open(pid, PidfdFlags::empty()).ok().filter(|_| self.is_local)
    }

    /// Returns `true` if descriptors can be passed to the daemon.
    pub(super) fn passes_descriptors(&self) -> bool {
        self.is_local
    }

    /// Waits for the next answer, at most until `deadline`. Checks the greeting and skips it.
    ///
    /// # Errors
    /// [`Error::TimedOut`] at the deadline, [`Error::Closed`] when the daemon is gone.
    pub fn receive(&mut self, deadline: Option<Instant>) -> Result<Answer, Error> {
        let is_over = |at: Option<Instant>| at.is_some_and(|at| at <= Instant::now());
        let mut has_read = false;
        let greeting = self.greeting_limit();
        loop {
            if let Some(answer) = self.take()? {
                return Ok(answer);
            }
            let until = match self.stage {
                Stage::Opening => [deadline, greeting].into_iter().flatten().min(),
                _ => deadline,
            };
            self.watch_peer();
            // A part of an answer, however small, may always be there.
            let read = match has_read && is_over(until) {
                true => Err(Error::TimedOut),
                false => self.transport.read(&mut self.input, until),
            };
            match read {
                Err(Error::TimedOut) if !is_over(deadline) => return Err(Error::Closed),
                other => other?,
            }
            has_read = true;
        }
    }

    /// Returns the next answer, if it has arrived. Reads no more than there is in a frame: what is left keeps the descriptor
    /// readable.
    ///
    /// # Errors
    /// [`Error::Closed`] when the daemon is gone.
    pub(super) fn try_receive(&mut self) -> Result<Option<Answer>, Error> {
        for _ in 0..READS_AT_ONCE_MAX {
            if let Some(answer) = self.take()? {
                return Ok(Some(answer));
            }
            if !self.transport.try_read(&mut self.input)? {
                return Ok(None);
            }
        }
        self.take()
    }

    /// Returns `true` if there may be an answer among the bytes that were read, which no longer make the descriptor readable.
    pub(super) fn has_unread(&self) -> bool {
        self.input.bytes.len() > self.searched
    }

    /// Decodes one answer from the bytes that have arrived.
    fn take(&mut self) -> Result<Option<Answer>, Error> {
        // Not memchr's search: it would first detect the processor's features, which costs more than it saves.
        while let Some(end) = self.input.bytes[self.searched..].iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.input.bytes.drain(..=self.searched + end).collect();
            self.searched = 0;
            if line[0] != b'{' {
                return Err(Error::not_version_2());
            }
            match (self.stage, decode_answer(&line).map_err(Error::Protocol)?) {
                (Stage::Open, answer) => return Ok(Some(answer)),
                (Stage::Opening, Answer::Hello { peer_timeout_ms, .. }) => {
                    self.greeted(peer_timeout_ms);
                }
                (Stage::Authenticating, Answer::Welcome) => self.stage = Stage::Open,
                (_, answer) => return Err(Error::unexpected(answer)),
            }
        }
        self.searched = self.input.bytes.len();
        match self.input.bytes.first() {
            Some(&byte) if byte != b'{' => Err(Error::not_version_2()),
            _ if self.input.bytes.len() > FRAME_BYTES_MAX => {
                Err(Error::Protocol(format!("its line is longer than {FRAME_BYTES_MAX} bytes")))
            }
            _ => Ok(None),
        }
    }

    fn greeted(&mut self, peer_timeout_ms: Option<u64>) {
        if let (PeerWatch::Due(_), Some(millis)) = (self.peer, peer_timeout_ms) {
            self.peer = PeerWatch::Due(Duration::from_millis(millis));
        }
        self.stage = if self.credentials.is_some() { Stage::Authenticating } else { Stage::Open };
    }

    pub(super) fn wait_readable(&self, deadline: Instant) -> Result<(), Error> {
        self.transport.wait_readable(Some(deadline))
    }

    /// Waits until the daemon confirms a release.
    ///
    /// # Errors
    /// [`Error::Lost`] when the lock was lost before, [`Error::Closed`] when the daemon is gone, [`Error::Silent`] when it does
    /// not confirm in time.
    pub(super) fn confirm_release(&mut self) -> Result<(), Error> {
        let limit = Instant::now() + self.answer_wait;
        loop {
            match self.answer_until(limit)? {
                Answer::Released => return Ok(()),
                // Sent before the daemon read the release.
                Answer::Pong { .. } | Answer::Stop { .. } => check_limit(limit)?,
                Answer::Lost { why } => return Err(Error::Lost(why.as_str().into())),
                other => return Err(Error::unexpected(other)),
            }
        }
    }

    /// Returns the place in the order of arrival that the daemon stated, if it let this session wait.
    pub(super) fn place(&self) -> Option<u64> {
        self.place
    }

    /// Ends the stream, and returns when the daemon has read the end. (If the daemon dies first, its journal has the lock.)
    ///
    /// # Errors
    /// [`Error::Silent`] when the daemon does not react.
    pub fn leave(mut self) -> Result<(), Error> {
        // An error means that the connection is closed already.
        let _ = shutdown(self.transport.as_fd().as_raw_fd(), Shutdown::Write);
        let limit = Instant::now() + self.answer_wait;
        loop {
            match self.answer_until(limit) {
                Ok(_) => check_limit(limit)?,
                Err(Error::Silent) => return Err(Error::Silent),
                Err(_) => return Ok(()),
            }
        }
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }
}

/// Fails when the time is up, for a client that reads answers until one of a certain kind comes.
fn check_limit(limit: Instant) -> Result<(), Error> {
    if limit <= Instant::now() { Err(Error::Silent) } else { Ok(()) }
}
