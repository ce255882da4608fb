//! One connection of protocol 2.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::Uid;
use rustix::process::{PidfdFlags, pidfd_open};

use super::credentials::Credentials;
use super::lease::Lease;
use super::shared::SharedRun;
use super::transport::{Input, Transport, silent};
use super::{Error, LockReply, Target, autostart};
use crate::addr::{self, Addr};
use crate::clock;
use crate::keepalive;
use crate::lock_file;
use crate::lookup;
use crate::output::{self, Output};
use crate::place;
use crate::proto::v2::{
    Answer, ErrorCode, FRAME_BYTES_MAX, LeaseTerms, LockRequest, LockStatus, LockUser, Mode, OutputAt,
    PREAMBLE, Request, RunStatus, Stale, decode_answer, encode, encode_proven,
};
use crate::proto::{Key, Nonce, Outcome, Token};
use crate::timestamp::Timestamp;

/// How long a daemon may take to answer a request that it answers at once.
pub(super) const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// The same for a user who asked not to wait (`--nonblock`), or only looks: such a command ends within 3 seconds, whatever the
/// daemon does.
pub const PROMPT_WAIT: Duration = Duration::from_millis(2500);

/// After how long without a word the daemon's machine counts as gone, if the daemon does not say.
const PEER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the client reads at once what has arrived: often enough for a whole frame.
const READS_AT_ONCE_MAX: usize = 20;

/// Follows a request that waits: shows who holds the lock.
pub trait WaitObserver {
    /// Returns after how long to ask the daemon again who holds the lock; `None`: never.
    fn pause(&self) -> Option<Duration>;

    /// The request waits: `holders` hold the lock, and `ahead` requests of the queue come first.
    fn on_waiting(&mut self, holders: &[LockUser], ahead: u32);

    /// The output of the run with this token can be read while it grows; only for a request with
    /// [`Share::Live`](crate::proto::v2::Share::Live).
    ///
    /// # Errors
    /// What ends the wait.
    fn on_output(&mut self, _token: Token, _output: Output) -> Result<(), Error> {
        Ok(())
    }

    /// There is more of it.
    ///
    /// # Errors
    /// What ends the wait.
    fn on_grown(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// It will never be complete.
    ///
    /// # Errors
    /// What ends the wait.
    fn on_torn(&mut self) -> Result<(), Error> {
        Ok(())
    }
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

/// Whether the kernel watches the daemon's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PeerWatch {
    /// The daemon is on this machine.
    Needless,
    /// It will, before the client next waits: most locks are free, and then there is no wait.
    Due(Duration),
    /// It does.
    Begun,
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
            input: Input::default(),
            searched: 0,
            pieces: Vec::new(),
            stale: None,
            stage: Stage::Silent,
            is_local: matches!(target.addr, Addr::Unix(_)),
            place: None,
            lease: None,
            proof: None,
            answer_wait: ANSWER_WAIT,
            peer: match target.addr {
                Addr::Unix(_) => PeerWatch::Needless,
                _ => PeerWatch::Due(PEER_TIMEOUT),
            },
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

    /// Takes in what concerns the output of a run that has not ended.
    fn output_answer(&mut self, answer: Answer, observer: &mut dyn WaitObserver) -> Result<(), Error> {
        match answer {
            Answer::Output { token } => match self.input.descriptors.pop_front() {
                Some(descriptor) => observer.on_output(token, Output::from_descriptor(descriptor)),
                None => Ok(()),
            },
            Answer::Grown => observer.on_grown(),
            Answer::Torn => observer.on_torn(),
            Answer::Piece { stream, data } => self.add_piece(stream, &data),
            other => Err(Error::unexpected(other)),
        }
    }

    /// Returns the result of a run, or that it is not given.
    fn result(
        &mut self,
        outcome: Outcome,
        token: Token,
        past: Option<RunStatus>,
        at: Option<OutputAt>,
    ) -> LockReply {
        match self.output(at) {
            Ok(output) => LockReply::Shared(SharedRun { outcome, token, past, output }),
            Err(why) => LockReply::Withheld { outcome, token, why },
        }
    }

    /// Returns the output that came with an answer, or why there is none.
    fn output(&mut self, at: Option<OutputAt>) -> Result<Output, String> {
        let pieces = std::mem::take(&mut self.pieces);
        match at {
            None => Err("the daemon cannot share results".into()),
            Some(OutputAt::Withheld(why)) => Err(why.as_str().into()),
            Some(OutputAt::Pieces) => Ok(Output::from_bytes(pieces)),
            Some(OutputAt::Descriptor) => match self.input.descriptors.pop_front() {
                Some(descriptor) => Ok(Output::from_descriptor(descriptor)),
                None => Err("its descriptor did not arrive: there are too many open files".into()),
            },
        }
    }

    fn shared_run(&mut self, stale: Stale) -> Option<Box<SharedRun>> {
        let output = self.output(Some(stale.output)).ok()?;
        let (outcome, token) = (stale.run.outcome, stale.run.token);
        Some(Box::new(SharedRun { outcome, token, past: Some(stale.run), output }))
    }

    /// Takes the result to use while this session holds the lock and its caller runs anew, if the daemon gave one.
    pub fn take_stale(&mut self) -> Option<SharedRun> {
        self.stale.take().map(|stale| *stale)
    }

    fn add_piece(&mut self, stream: u8, data: &str) -> Result<(), Error> {
        let piece = output::encode_piece(stream, data);
        let piece = piece.ok_or_else(|| Error::Protocol("a piece of an output is wrong".into()))?;
        if self.pieces.len() + piece.len() > 2 * output::SENT_BYTES_MAX {
            return Err(Error::Protocol("an output is longer than it may be".into()));
        }
        self.pieces.extend_from_slice(&piece);
        Ok(())
    }

    /// Returns `true` if descriptors can be passed to the daemon.
    pub(super) fn passes_descriptors(&self) -> bool {
        self.is_local
    }

    /// Sends a request, and passes a descriptor with it.
    ///
    /// # Errors
    /// [`Error::Closed`] when the daemon is gone.
    pub(super) fn send_with(&mut self, request: &Request, descriptor: BorrowedFd<'_>) -> Result<(), Error> {
        let message = self.message(request);
        self.transport.write_with(&message, descriptor, self.answer_wait)
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
        self.answer_until(Instant::now() + self.answer_wait)
    }

    /// Returns the next answer, if it comes until `limit`.
    ///
    /// # Errors
    /// As [`Session::answer`].
    pub fn answer_until(&mut self, limit: Instant) -> Result<Answer, Error> {
        self.receive(Some(limit)).map_err(silent)
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

    /// Returns until when the daemon must have greeted the client, if it may be gone without a word.
    fn greeting_limit(&self) -> Option<Instant> {
        match (self.stage, self.peer) {
            (Stage::Opening, PeerWatch::Due(timeout)) => Some(Instant::now() + timeout),
            _ => None,
        }
    }

    /// Has the kernel watch the daemon's machine from now on, if the daemon has greeted the client and is on another one.
    fn watch_peer(&mut self) {
        if let PeerWatch::Due(timeout) = self.peer
            && !matches!(self.stage, Stage::Silent | Stage::Opening)
        {
            // It would fail only for a socket of another kind.
            let _ = keepalive::set(&self.transport, timeout);
            self.peer = PeerWatch::Begun;
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
    if uid == 0 || target.trusted_uids.contains(&uid) {
        return Ok(());
    }
    // The kernel shows one number for all users that this user namespace does not know, perhaps this process's own among them.
    if place::is_unmapped(uid) {
        return Err(Error::Unmapped { addr: target.addr.clone() });
    }
    if uid == Uid::effective().as_raw() {
        return Ok(());
    }
    Err(Error::Untrusted { addr: target.addr.clone(), uid, user: lookup::user(uid) })
}

/// Fails when the time is up, for a client that reads answers until one of a certain kind comes.
fn check_limit(limit: Instant) -> Result<(), Error> {
    if limit <= Instant::now() { Err(Error::Silent) } else { Ok(()) }
}
