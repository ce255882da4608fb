//! Clients over TCP: their TLS sessions, their names and secrets, and clients that speak another protocol altogether.

use std::os::fd::AsFd;
use std::time::Duration;

use ::log::{debug, warn};

use super::Server;
use crate::clock;
use crate::daemon::gate::Verdict;
use crate::daemon::identity::Identity;
#[cfg(feature = "tls")]
use crate::daemon::identity::Standing;
use crate::daemon::{leases, log, processes};
use crate::journal::HoldRecord;
use crate::proto::v1::{Foreign, State};
#[cfg(feature = "tls")]
use crate::proto::v2::error;
use crate::proto::v2::{Answer, ClientInfo, ErrorCode, LeaseTerms, LockRequest};
use crate::proto::{LockId, Secret};
use crate::table::{ClientId, Timestamp};
#[cfg(feature = "tls")]
use crate::tls::{Stream, is_hello};

/// How many lines a second the log has at most about clients that speak another protocol.
const WARNINGS_MAX: u32 = 20;

/// Counts those lines.
#[derive(Debug)]
pub(super) struct ForeignWarnings {
    since: Timestamp,
    count: u32,
}

impl ForeignWarnings {
    pub(super) fn new() -> ForeignWarnings {
        ForeignWarnings { since: Timestamp(0), count: 0 }
    }

    /// Returns `true` if there may be another line.
    fn may_warn(&mut self, now: Timestamp) -> bool {
        if self.since.plus(Duration::from_secs(1)) <= now {
            *self = ForeignWarnings { since: now, count: 0 };
        }
        self.count += 1;
        self.count <= WARNINGS_MAX
    }
}

impl Server {
    /// Begins with a client over TCP. Returns `false` if it cannot be served.
    pub(super) fn admit(&mut self, client: ClientId, from: (std::net::IpAddr, bool)) -> bool {
        match self.gate.admit(client, from.0, from.1, self.now) {
            Ok(identity) => {
                self.connections[client].set_identity(identity);
                true
            }
            Err(e) => {
                warn!("cannot begin a TLS session: {e}");
                self.close_after_flush(client, "no TLS session");
                false
            }
        }
    }

    /// Closes clients that have not said in time who they are, and tells others what became of their attempts.
    pub(super) fn poll_gate(&mut self) {
        while let Some(client) = self.gate.pop_overdue(self.now) {
            self.close_after_flush(client, "has not said who it is");
        }
        while let Some((id, name)) = self.gate.poll(self.now) {
            if let Some(client) = self.connections.find(id) {
                self.authenticated(client, name);
            }
        }
    }

    /// Begins the lease of a lock that is granted to a client, if the client is on another machine. A client that becomes the
    /// command sends no pings: its lock lasts as long as its connection.
    pub(super) fn begin_lease(&mut self, client: ClientId) {
        let becomes_command = self.table.request_of(client).is_none_or(|(_, request)| request.terms.exec);
        if self.connections[client].is_remote() && !becomes_command {
            self.peers.begin(client, clock::now());
        }
    }

    /// Returns the peer timeout that a client is told, if it is on another machine.
    pub(super) fn stated_peer_timeout(&self, client: ClientId) -> Option<Duration> {
        Some(self.peer_timeout).filter(|timeout| !timeout.is_zero() && self.connections[client].is_remote())
    }

    /// Returns how long a client may rely on the lock that it holds, if that has a limit.
    pub(super) fn lease_terms(&self, client: ClientId) -> Option<LeaseTerms> {
        leases::both(self.lookup().lease_terms(), self.peers.terms(client))
    }

    /// Makes a request that of the client's name, if it has one: no other name resumes it, and it runs under no lock of another name.
    pub(super) fn bind_to_name(&self, client: ClientId, asked: &mut LockRequest) {
        let Some(name) = self.connections[client].name() else { return };
        asked.who.user = name.into();
        asked.nonce = asked.nonce.map(|nonce| nonce.of(name));
        asked.within = asked.within.filter(|&token| {
            let holder = self.table.holder_of(token);
            holder.is_some_and(|holder| self.connections[holder].name() == Some(name))
        });
    }

    /// Notes that a client on a Unix socket is not the process at the other end of the connection: then that is a forwarder, such as
    /// sshd. A client that does not say which process it is counts as local, unless `--remote` says otherwise.
    pub(super) fn note_forwarder(&mut self, client: ClientId, who: &ClientInfo) {
        let connection = &mut self.connections[client];
        if let (Some(peer), Some(pid)) = (connection.peer(), who.pid)
            && !connection.forwarded
            && peer.pid != 0
            && peer.pid != pid.get()
            && !processes::has_number(peer.pid, pid)
        {
            connection.forwarded = true;
            debug!("{} is a forwarder", self.connections.describe(client));
        }
    }

    /// Frees the locks of clients that have not sent a ping in time.
    pub(super) fn end_leases(&mut self) {
        while let Some(client) = self.peers.pop_over(self.now) {
            if self.connections[client].closing || self.table.state(client) != State::Owner {
                continue;
            }
            if self.limiter.allows(log::Event::PeerLost, None, self.now) {
                let name = self.connections.describe(client);
                warn!("no word from {name} for the peer timeout: its lock is free");
            }
            self.connections.answer(client, &Answer::Lost { why: "no ping in time".into() });
            self.close_after_flush(client, "no ping in time");
        }
    }

    /// The connection has failed. That says nothing of a client on another machine that holds a lock with a lease: the lock is
    /// kept until the client comes back or its lease is over.
    pub(super) fn disconnected(&mut self, client: ClientId, why: &str) {
        if !self.connections[client].closing
            && let Some(until) = self.peers.end(client)
            && let Some(record) = self.lookup().record_of_client(client)
        {
            debug!("{} may come back: its lock is kept", self.connections.describe(client));
            let token = record.held.token;
            self.table.detach(client);
            self.orphans.await_return(record);
            self.table.limit_orphan(token, until);
        }
        self.end_of_stream(client, why);
    }

    /// Counts a free lock as held as long as clients of an unknown daemon before this one may hold it. Returns why the request
    /// cannot be decided then, if it does not wait.
    pub(super) fn presume_held(&mut self, lock: LockId, waits: bool) -> Result<(), String> {
        let Some(left) = self.predecessor.remaining(self.now) else { return Ok(()) };
        if self.table.find(lock).is_some_and(|lock| lock.holding() > 0) {
            return Ok(());
        }
        let seconds = left.as_secs() + 1;
        let refusal = format!("clients of an earlier daemon may hold the lock for another {seconds} s");
        let Some(held) = self.predecessor.presume(lock).filter(|_| waits) else { return Err(refusal) };
        let record = HoldRecord { held, pid: None, child: None, granted: self.now, recorded: self.now };
        self.table.restore(self.now, held);
        self.orphans.await_return(record);
        Ok(())
    }

    fn authenticated(&mut self, client: ClientId, name: Option<Box<str>>) {
        let Some(identity) = self.connections[client].identity_mut() else { return };
        let Some(name) = name else {
            warn!(
                "{} gave a wrong name or secret, from {}",
                self.connections.describe(client),
                self.address(client)
            );
            self.refuse(client, ErrorCode::NotPermitted, "wrong name or secret");
            return self.close_after_flush(client, "wrong name or secret");
        };
        self.gate.admitted(client, identity, Some(name));
        self.connections.answer(client, &Answer::Welcome);
        // What the client has sent behind its secret.
        let (input, _) = self.connections.take_input(client);
        self.handle_requests(client, &input, Timestamp::NEVER);
    }

    /// The client says who it is.
    pub(super) fn authenticate(&mut self, client: ClientId, name: String, secret: Secret) {
        let id = self.connections.id(client);
        let Some(identity) = self.connections[client].identity_mut() else {
            // On a Unix socket the kernel says who it is; elsewhere the daemon does not want to know.
            return self.connections.answer(client, &Answer::Welcome);
        };
        if let Some(known) = identity.name() {
            let message = format!("auth: this connection is that of {known:?} already");
            return match known == name {
                true => self.connections.answer(client, &Answer::Welcome),
                false => self.refuse(client, ErrorCode::WrongState, message),
            };
        }
        match self.gate.authenticate(id, identity, name, secret) {
            Verdict::Admitted => self.connections.answer(client, &Answer::Welcome),
            // Nothing more is read from it for now.
            Verdict::Pending => self.connections.mark_dirty(client),
            Verdict::Crowded => {
                let message = "too many clients of this address are saying who they are";
                self.refuse(client, ErrorCode::Unavailable, message);
                self.close_after_flush(client, message);
            }
        }
    }

    /// Returns `true` if the client may make requests. One that must say first who it is, is closed.
    pub(super) fn is_admitted(&mut self, client: ClientId) -> bool {
        if self.identity(client).is_none_or(Identity::is_admitted) {
            return true;
        }
        let message = "this daemon wants a name that it knows: by --auth-file, or by a certificate";
        self.refuse(client, ErrorCode::NotPermitted, message);
        self.close_after_flush(client, "has not said who it is");
        false
    }

    /// Returns `true` if a client of protocol 1 may use this lock.
    pub(super) fn may_lock_by_id(&self, client: ClientId, lock: LockId) -> bool {
        self.identity(client)
            .is_none_or(|identity| identity.is_admitted() && self.gate.may_lock_by_id(identity, lock))
    }

    pub(super) fn identity(&self, client: ClientId) -> Option<&Identity> {
        self.connections[client].identity()
    }

    /// Closes a client that speaks another protocol, such as a browser. Clients of TLS are told so in theirs.
    pub(super) fn foreign(&mut self, client: ClientId, what: Foreign) {
        let (words, alert): (_, &[u8]) = match what {
            Foreign::Http => ("HTTP", &[]),
            Foreign::Tls => ("TLS", &Foreign::TLS_ALERT),
        };
        self.connections[client].output().extend_from_slice(alert);
        self.warn_foreign(client, words);
        self.close_after_flush(client, "speaks another protocol");
    }

    fn warn_foreign(&mut self, client: ClientId, words: &str) {
        let name = self.connections.describe(client);
        if self.foreign_warnings.may_warn(self.now) {
            warn!("closed {name} from {}: it speaks {words} to a port that does not", self.address(client));
        } else {
            debug!("{name} speaks {words} to a port that does not");
        }
    }

    /// Returns where a client over TCP is, for the log.
    fn address(&self, client: ClientId) -> String {
        let fd = self.connections[client].as_fd().try_clone_to_owned();
        // A client may have reset its connection, or come over a Unix socket.
        let peer = fd.and_then(|fd| std::net::TcpStream::from(fd).peer_addr());
        peer.map_or("an unknown address".into(), |peer| peer.to_string())
    }

    /// Decrypts what has arrived of a TLS stream, and takes the requests out of it.
    #[cfg(feature = "tls")]
    pub(super) fn received_tls(&mut self, client: ClientId, bytes: &[u8]) {
        let connection = &mut self.connections[client];
        let Some(identity) = connection.identity_mut() else { return };
        let Some(tls) = &mut identity.tls else { return };
        if !tls.has_begun() && !is_hello(bytes) {
            return self.refuse_plain(client, bytes);
        }
        let mut plaintext = std::mem::take(&mut self.plaintext);
        let stream = tls.receive(bytes, &mut plaintext);
        if identity.standing == Standing::Handshaking && !tls.is_handshaking() {
            self.gate.handshake_over(client, identity);
        }
        if self.connections[client].wants_write() {
            self.connections.mark_dirty(client);
        }
        if !plaintext.is_empty() {
            self.received(client, &plaintext);
            plaintext.clear();
        }
        self.plaintext = plaintext;
        match stream {
            Ok(Stream::Open) => {}
            Ok(Stream::Ended) => self.end_of_stream(client, "end of stream"),
            Err(e) => {
                debug!("{}: TLS: {e}", self.connections.describe(client));
                self.close_after_flush(client, "TLS error");
            }
        }
    }

    /// Closes a client that does not speak TLS to a port that does. A kmutex client is told why.
    #[cfg(feature = "tls")]
    fn refuse_plain(&mut self, client: ClientId, bytes: &[u8]) {
        if let Some(identity) = self.connections[client].identity_mut() {
            // What follows is not encrypted.
            identity.tls = None;
        }
        match crate::proto::v1::foreign(bytes) {
            Some(what) => self.foreign(client, what),
            None => {
                if bytes[0] == crate::proto::v2::PREAMBLE[0] {
                    let message = "this port speaks TLS: connect to tls://HOST:PORT";
                    self.connections.answer(client, &error(ErrorCode::TlsRequired, message));
                }
                self.close_after_flush(client, "does not speak TLS");
            }
        }
    }
}
