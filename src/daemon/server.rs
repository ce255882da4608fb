//! The loop: waits for sockets, applies what comes to the table, records what changed, and sends what the table decides.
//!
//! Each turn reads what is ready, then writes the journal, then the answers: one write for each client that has output,
//! however many requests were in one read. No turn takes long: what there is no time for is left to the next one.

mod share;
mod tcp;
mod v1;
mod v2;

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ::log::{debug, info, warn};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

use self::tcp::ForeignWarnings;
use super::accept::Acceptor;
use super::admission::{ANSWERED_MAX, Access};
use super::batch::Batch;
use super::cluster::Clustering;
use super::connection::{ConnectionId, Interest, Protocol, Sent};
use super::connections::Connections;
use super::files::Files;
use super::gate::Gate;
use super::leases::PeerLeases;
use super::listener::Listener;
use super::listing::Listing;
use super::log::Limiter;
use super::lookup::Lookup;
use super::named::Named;
use super::orphans::{Orphans, Successor};
use super::outputs::Outputs;
use super::predecessor::Predecessor;
use super::processes::Liveness;
use super::recorder::{Grant, Recorder};
use super::remote::{RemoteReply, RemoteRequest};
use super::reserve::Reservations;
use super::search::Search;
use super::source::Source;
use super::users::Users;
use super::{Config, failpoint, log};
use crate::addr::Reason;
use crate::clock;
use crate::journal::{ClusterLease, HoldRecord, Snapshot};
use crate::proto::Token;
use crate::proto::v2::{ErrorCode, error};
use crate::table::{
    self, ArrivalMark, ClientId, ClusterNotice, Effects, JournalEntry, Notification, NotificationKind, Table,
    Timestamp,
};

/// How often the log says that runs are forgotten.
const WARN_EVERY: Duration = Duration::from_secs(60);
/// How long a turn may take events and requests before it goes on to record and to send.
const TURN_MAX: Duration = Duration::from_millis(5);
/// How long it may take until it stops sending.
const FLUSH_MAX: Duration = Duration::from_millis(10);
/// Reading the clock takes a while, compared with sending a few bytes, or with telling a client something.
const SENDS_BETWEEN_CLOCKS: usize = 16;
const NOTIFICATIONS_BETWEEN_CLOCKS: usize = 64;
/// How many requests of one connection are handled before the other connections have their turn.
const REQUESTS_AT_ONCE_MAX: usize = 64;
/// The same, in bytes of answers: a connection that has so much to read is not answered any more requests until then.
const ANSWERS_AT_ONCE_BYTES: usize = 8 * 1024;
/// How many requests of one connection are handled even if the turn takes long, so that most clients are answered with one
/// write on a busy machine, too.
const REQUESTS_AT_ONCE_MIN: usize = 8;
/// How many connections a listener accepts before the other sources get their turn.
const ACCEPTS_MAX: usize = 64;
/// How much is read from one connection before the other connections get their turn.
const READ_BYTES_MAX: usize = 16 * 1024;
/// How often a connection is read that cannot be sent anything any more. A client sends little before it closes.
const READS_OF_REST_MAX: usize = 16;
/// Why a connection is closed whose requests the daemon cannot keep.
const INPUT_FULL: &str = "input buffers full";

pub(super) struct Server {
    epoll: Epoll,
    /// The pipe of the signals that end the daemon, and that of the signal to read files again.
    signals: UnixStream,
    reload: UnixStream,
    gate: Gate,
    reservations: Reservations,
    users: Users,
    search: Search,
    /// Locks are held, or were, that an earlier daemon recorded.
    has_restored: bool,
    peers: PeerLeases,
    predecessor: Predecessor,
    /// Clients on other machines can connect.
    is_exposed: bool,
    acceptor: Acceptor,
    connections: Connections,
    table: Table,
    recorder: Recorder,
    orphans: Orphans,
    /// The results that clients share.
    outputs: Outputs,
    /// Reused, so that effects are not allocated anew each time.
    effects: Effects,
    /// Shares the locks with other hosts; `None`: they are this host's alone.
    cluster: Option<Clustering>,
    /// Reused, for what arrives through TLS.
    #[cfg(feature = "tls")]
    plaintext: Vec<u8>,
    foreign_warnings: ForeignWarnings,
    /// Lists of the locks of all hosts that clients are being sent.
    listings: BTreeMap<ClientId, Listing>,
    /// How many connections are to be closed at the end of the turn.
    closing: usize,
    /// Connections that are only told that there are too many, the oldest first.
    refused: VecDeque<ConnectionId>,
    /// Keeps clients from filling the log.
    limiter: Limiter,
    /// What the table is to decide when all events that were ready at some moment are handled: the requests before this mark.
    mark: Option<ArrivalMark>,
    /// The last turn has left something to the next one.
    has_work: bool,
    /// When the last warning about forgotten runs was.
    warned_of_runs: Option<Timestamp>,
    /// When this turn began, by the clock that counts from boot.
    now: Timestamp,
    started: Timestamp,
    grace: Duration,
    peer_timeout: Duration,
    /// A status shows the commands of all users to all users.
    shows_commands: bool,
    idle_exit: Option<Duration>,
    /// Since when no client is connected.
    idle_since: Option<Timestamp>,
    files: Files,
}

impl Server {
    /// A server that takes over what `recorder` says was held before.
    ///
    /// # Errors
    /// If the kernel refuses a descriptor.
    pub(super) fn new(
        config: &Config,
        listeners: Vec<Listener>,
        recorder: Recorder,
        mut gate: Gate,
        cluster: Option<Clustering>,
    ) -> io::Result<Server> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let signals = signal_pipe(&[SIGHUP, SIGINT, SIGTERM], &epoll, Source::Signals)?;
        let reload = signal_pipe(&[SIGUSR1], &epoll, Source::Reload)?;
        gate.start(&epoll)?;
        if let Some(cluster) = &cluster {
            cluster.register(&epoll)?;
        }
        // The time of day makes tokens grow across restarts, even without a journal; a million grants a second would
        // not catch up with it.
        let micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_micros() as u64);
        let last = recorder.last_token().map_or(0, |token| token.0);
        let now = clock::now();
        let first_token = Token(micros.max(last + 1));
        let is_exposed = config.remote || listeners.iter().any(Listener::is_exposed);
        let is_unknown = is_exposed && cluster.is_none() && !recorder.knows_past();
        let acceptor = Acceptor::new(config, listeners)?;
        let descriptors = acceptor.admission.outputs_max();
        let outputs =
            Outputs::new(config.share_total, descriptors, config.share_across_users, cluster.is_some());
        let server = Server {
            epoll,
            signals,
            reload,
            gate,
            reservations: Reservations::new(config.reservations.clone(), cluster.is_some()),
            users: Users::default(),
            search: Search::default(),
            has_restored: false,
            peers: PeerLeases::new(config.peer_timeout),
            predecessor: Predecessor::new(is_unknown, config.peer_timeout, now, first_token),
            is_exposed,
            #[cfg(feature = "tls")]
            plaintext: Vec::new(),
            foreign_warnings: ForeignWarnings::new(),
            acceptor,
            connections: Connections::default(),
            table: Table::new(table::Config {
                hash_key: RandomState::new().hash_one(0),
                first_token,
                hold_limit: config.hold_limit,
                is_clustered: cluster.is_some(),
                remember_max: config.remember_max,
            }),
            recorder,
            orphans: Orphans::default(),
            outputs,
            effects: Effects::default(),
            cluster,
            listings: BTreeMap::new(),
            closing: 0,
            refused: VecDeque::new(),
            limiter: Limiter::default(),
            mark: None,
            has_work: false,
            warned_of_runs: None,
            now,
            started: now,
            grace: config.grace,
            peer_timeout: config.peer_timeout.unwrap_or_default(),
            shows_commands: config.shows_commands,
            idle_exit: config.idle_exit,
            idle_since: Some(now),
            files: Files::new(),
        };
        server.begin()
    }

    /// Watches the daemon's files, takes over what was held before, and begins to accept clients.
    fn begin(mut self) -> io::Result<Server> {
        if let Some(descriptor) = self.files.watch.descriptor() {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Files.pack());
            self.epoll.add(descriptor, event)?;
        }
        self.files.watch.watch(&self.file_paths());
        // What was removed before the watch began.
        self.look_at_files();
        self.restore_holds()?;
        self.join_cluster();
        self.acceptor.resume(&self.epoll)?;
        Ok(self)
    }

    /// Gives the table what the previous daemon recorded, except for holds that have ended since.
    fn restore_holds(&mut self) -> io::Result<()> {
        let Snapshot { holds: mut inherited, runs } = self.recorder.take_inherited();
        runs.into_iter().for_each(|record| self.table.restore_run(self.now, record.run));
        // The latest first: if the end of a hold could not be recorded, a later hold of the same lock proves that it ended.
        inherited.sort_by_key(|record| std::cmp::Reverse(record.held.token));
        for record in inherited {
            let token = record.held.token;
            if !self.restore(record)? {
                self.recorder.hold_ended(token);
            }
        }
        match self.orphans.len() {
            0 => {}
            count => info!("{count} locks were held when the previous daemon ended, and still are"),
        }
        Ok(())
    }

    /// Returns `false` if the hold has ended.
    fn restore(&mut self, record: HoldRecord) -> io::Result<bool> {
        let may_watch = self.acceptor.admission.may_watch_restored();
        // A client on another machine, which has no uid here, runs its command until its lease is over.
        let is_remote = record.pid.is_none() && record.held.uid.is_none();
        let grace = if is_remote { self.grace.max(self.peer_timeout) } else { self.grace };
        match Orphans::examine(record, self.now.plus(grace), may_watch) {
            Some(survivor) if self.table.restore(survivor.granted(), survivor.held) => {
                if survivor.is_watched() {
                    self.acceptor.admission.keep(survivor.held.uid);
                }
                self.orphans.restore(survivor, &self.epoll)?;
                self.has_restored = true;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Begins to share the locks with other hosts, also the locks that are held already.
    fn join_cluster(&mut self) {
        let Some(cluster) = &mut self.cluster else { return };
        let mut cursor = 0;
        while let Some((lock, next)) = self.table.next_lock(cursor) {
            cluster.notify(ClusterNotice::Needs(lock.id()));
            cursor = next;
        }
        if !self.recorder.lease().is_clustered() {
            // This keeps a later daemon from serving here without sharing the locks.
            self.recorder.set_lease(ClusterLease::None);
            self.commit();
        }
    }

    /// Serves until a signal arrives or the daemon was idle for long enough; returns which.
    ///
    /// A turn ends after [`TURN_MAX`], whatever clients send: the rest of its events, requests and output is left to the
    /// next turns, which take no new events before.
    pub(super) fn run(&mut self) -> io::Result<&'static str> {
        let mut batch = Batch::new();
        let mut timer = failpoint::TurnTimer::new();
        let mut buffer = vec![0; READ_BYTES_MAX].into_boxed_slice();
        loop {
            if batch.is_handled() {
                if self.mark.is_none() {
                    self.mark = self.table.deferred();
                    batch.start_round();
                }
                batch.wait(&self.epoll, self.timeout())?;
            }
            self.now = clock::now();
            timer.start();
            self.notify_clients();
            if !self.is_behind() {
                self.poll_cluster();
            }
            while !self.is_behind()
                && let Some(event) = batch.next()
            {
                if let Some(reason) = self.handle(event, &mut buffer)? {
                    return Ok(reason);
                }
                if !batch.is_handled() && self.is_over(TURN_MAX) {
                    break;
                }
            }
            if !self.is_behind() {
                self.handle_postponed();
            }
            if !self.is_behind() && batch.is_round_complete(self.connections.len()) {
                self.settle();
            }
            if !self.is_behind() {
                self.expire();
            }
            if self.files.look_at().is_some_and(|at| at <= self.now) {
                self.look_at_files();
            }
            self.poll_gate();
            self.end_leases();
            self.flush_turn();
            if !self.is_behind() {
                self.outputs.all_told();
            }
            if self.acceptor.is_due(self.now) {
                self.acceptor.resume(&self.epoll)?;
            }
            timer.stop();
            if self.idle_deadline().is_some_and(|deadline| deadline <= self.now) {
                return Ok("idle");
            }
            if self.files.are_lost() && self.table.is_empty() {
                return Ok("its files are another daemon's, or gone");
            }
        }
    }

    /// Handles one readiness event. Returns why the daemon is to end, if it is.
    fn handle(&mut self, event: EpollEvent, buffer: &mut [u8]) -> io::Result<Option<&'static str>> {
        match Source::unpack(event.data()) {
            Source::Signals if self.is_signalled() => return Ok(Some("received a signal")),
            Source::Signals => {}
            Source::Listener(index) => self.accept(index, buffer)?,
            Source::Connection(id) => self.connection_ready(id, event.events(), buffer),
            Source::Orphan(token) => self.orphan_ready(token),
            Source::Files => self.look_at_files(),
            // The clustering is polled in each turn.
            Source::Cluster => {}
            Source::Reload => self.reload(),
            Source::Verifier => self.gate.verifier_ready(),
            Source::Users => self.users_ready(),
            Source::Search => self.search_ready(),
        }
        Ok(None)
    }

    /// Returns `true` if this turn has taken longer than `limit`. (The clock has a resolution of a millisecond.)
    fn is_over(&self, limit: Duration) -> bool {
        clock::now() >= self.now.plus(limit)
    }

    /// Decides the requests that were deferred before the round of events that is complete now.
    fn settle(&mut self) {
        while let Some(mark) = self.mark {
            if !self.apply(|table, now, effects| table.settle_next(now, mark, effects)) {
                self.mark = None;
            } else if self.is_over(TURN_MAX) {
                return;
            }
        }
    }

    fn file_paths(&self) -> Vec<PathBuf> {
        [self.acceptor.files(), self.recorder.files()].concat()
    }

    /// Puts back the daemon's files, if they were removed. While that fails, no lock is granted.
    fn look_at_files(&mut self) {
        self.files.watch.drain();
        let lookup = Lookup {
            table: &self.table,
            connections: &self.connections,
            orphans: &self.orphans,
            cluster: self.cluster.as_ref(),
            now: self.now,
        };
        let found = self.acceptor.restore_files(&self.epoll);
        // If another daemon serves now, the journal is its own.
        let found = found.and_then(|()| self.recorder.restore_files(|| lookup.records()));
        let files = self.file_paths();
        let grants = self.files.looked(found, self.now, &files);
        self.recorder.set_refusing(!grants);
    }

    /// Ends in good order: what is still held stays in the journal, for the next daemon.
    pub(super) fn finish(mut self) {
        self.poll_cluster();
        if self.cluster.as_mut().is_some_and(|cluster| cluster.stop(&self.table)) {
            self.recorder.set_lease(ClusterLease::None);
        }
        self.commit();
        // To the next daemon of an exposed port, a journal without holds says that there are none.
        if !self.is_exposed && self.table.is_empty() && self.table.runs(self.now).next().is_none() {
            self.recorder.remove();
        }
    }

    /// Returns how long the loop may sleep.
    fn timeout(&self) -> EpollTimeout {
        if self.mark.is_some() || self.has_work || self.is_behind() {
            return EpollTimeout::ZERO;
        }
        let deadlines = [
            self.table.next_deadline(),
            self.idle_deadline(),
            self.acceptor.retry_at(),
            self.cluster.as_ref().and_then(Clustering::deadline),
            self.connections.next_deadline(),
            self.limiter.next_report(),
            self.files.look_at(),
            self.gate.next_deadline(),
            self.peers.next_deadline(),
            self.outputs.next_deadline(),
        ];
        match deadlines.into_iter().flatten().min() {
            None => EpollTimeout::NONE,
            Some(deadline) => {
                let millis = deadline.0.saturating_sub(clock::now().0).min(i32::MAX as u64);
                EpollTimeout::try_from(millis).expect("it is at most i32::MAX")
            }
        }
    }

    fn idle_deadline(&self) -> Option<Timestamp> {
        let (since, limit) = (self.idle_since?, self.idle_exit?);
        (self.table.is_empty() && self.outputs.is_empty()).then(|| since.plus(limit))
    }

    /// Returns `true` if a signal has arrived: each of them ends the daemon.
    fn is_signalled(&mut self) -> bool {
        let mut byte = [0];
        matches!(self.signals.read(&mut byte), Ok(1..))
    }

    /// A signal asks for the certificates and names to be read again.
    fn reload(&mut self) {
        if matches!(self.reload.read(&mut [0; 16]), Ok(1..)) {
            self.gate.reload();
        }
    }

    /// Ends holds and connections whose time is up.
    fn expire(&mut self) {
        while self.table.next_deadline().is_some_and(|deadline| deadline <= self.now) {
            self.apply(|table, now, effects| table.expire_next(now, effects));
            if self.is_over(TURN_MAX) {
                return;
            }
        }
        let dropped = self.outputs.expire(self.now);
        self.results_dropped(dropped);
        self.limiter.report(self.now);
        while let Some(client) = self.connections.pop_overdue(self.now) {
            let why = match self.connections[client].postponed {
                true => "does not read its answers",
                false => "incomplete message for too long",
            };
            self.close_after_flush(client, why);
        }
    }

    fn accept(&mut self, index: usize, buffer: &mut [u8]) -> io::Result<()> {
        if self.closing > 0 && self.acceptor.admission.has_reached_a_limit() {
            // A client that has gone does not count against one that came later.
            self.flush_turn();
        }
        for _ in 0..ACCEPTS_MAX {
            let Some(accepted) = self.acceptor.accept(index, self.now, &self.epoll)? else { break };
            let client = self.connections.insert(accepted.connection);
            self.idle_since = None;
            debug!("connect: {} on {}", self.connections.describe(client), accepted.listener);
            if accepted.from.is_none_or(|from| self.admit(client, from)) {
                self.register(client, buffer);
            }
            if self.is_behind() || self.is_over(TURN_MAX) {
                break;
            }
        }
        Ok(())
    }

    fn register(&mut self, client: ClientId, buffer: &mut [u8]) {
        let event =
            EpollEvent::new(EpollFlags::EPOLLIN, Source::Connection(self.connections.id(client)).pack());
        if let Err(e) = self.epoll.add(&self.connections[client], event) {
            if self.limiter.allows(log::Event::Unwatched, self.peer_uid(client), self.now) {
                warn!("cannot watch a connection: {e}");
            }
            return self.close_after_flush(client, "cannot be watched");
        }
        if let Access::None(_) = self.connections[client].access {
            self.refused(client);
        }
        // Most clients have sent their request by now, so that they need not wait for another turn.
        self.read(client, buffer);
    }

    /// Keeps few of the connections that are only told that there are too many: a further one takes the place of the oldest.
    fn refused(&mut self, client: ClientId) {
        self.refused.push_back(self.connections.id(client));
        if self.refused.len() > ANSWERED_MAX
            && let Some(oldest) = self.refused.pop_front().and_then(|id| self.connections.find(id))
        {
            self.close_after_flush(oldest, "too many connections");
        }
    }

    fn connection_ready(&mut self, id: ConnectionId, events: EpollFlags, buffer: &mut [u8]) {
        // The event may have been waiting behind the one that closed its connection.
        let Some(client) = self.connections.find(id) else { return };
        if events.intersects(EpollFlags::EPOLLOUT) {
            self.connections.mark_dirty(client);
        }
        if self.connections[client].is_paused() {
            // The kernel reports these whether they are wanted or not.
            if events.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
                self.disconnected(client, "disconnected");
            }
        } else if self.connections[client].postponed {
            // It is read when its requests are handled. Only sending can tell that it has disconnected.
            if events.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                self.connections.mark_dirty(client);
            }
        } else if events.intersects(!EpollFlags::EPOLLOUT) {
            self.read(client, buffer);
        }
    }

    fn read(&mut self, client: ClientId, buffer: &mut [u8]) {
        let connection = &self.connections[client];
        if connection.closing || connection.is_paused() {
            return;
        }
        match connection.read(buffer) {
            Ok((0, _)) if connection.forwarded => self.disconnected(client, "end of stream"),
            Ok((0, _)) => self.end_of_stream(client, "end of stream"),
            #[cfg(feature = "tls")]
            Ok((bytes, _)) if connection.is_tls() => self.received_tls(client, &buffer[..bytes]),
            Ok((bytes, descriptor)) => {
                self.connections.received = descriptor;
                self.received(client, &buffer[..bytes]);
                // No request was for it.
                self.connections.received = None;
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Err(e) => self.disconnected(client, e.desc()),
        }
    }

    /// Reads what a client on this host sent before it closed its connection: perhaps the release of its lock.
    fn read_rest(&mut self, client: ClientId) {
        let mut buffer = [0; 4096];
        for _ in 0..READS_OF_REST_MAX {
            let connection = &self.connections[client];
            if connection.is_remote() || connection.postponed || connection.closing {
                return;
            }
            self.read(client, &mut buffer);
        }
    }

    fn received(&mut self, client: ClientId, bytes: &[u8]) {
        let connection = &mut self.connections[client];
        if connection.continues_line(bytes) {
            if !self.connections.buffer(client, bytes) {
                self.close_after_flush(client, INPUT_FULL);
            }
            return;
        }
        if connection.input.is_empty() {
            return self.handle_requests(client, bytes, Timestamp::NEVER);
        }
        let (mut input, deadline) = self.connections.take_input(client);
        input.extend_from_slice(bytes);
        self.handle_requests(client, &input, deadline);
    }

    /// Continues with requests that were postponed: each connection once, and at least one of them in each turn.
    fn handle_postponed(&mut self) {
        for _ in 0..self.connections.postponed() {
            if self.is_behind() {
                return;
            }
            let Some(client) = self.connections.pop_postponed() else { return };
            let (input, _) = self.connections.take_input(client);
            self.handle_requests(client, &input, Timestamp::NEVER);
            if self.is_over(TURN_MAX) {
                return;
            }
        }
    }

    /// Handles requests as far as this connection may in one turn, and keeps the rest. `deadline`: when the message must
    /// have arrived whole that `input` begins with.
    fn handle_requests(&mut self, client: ClientId, input: &[u8], mut deadline: Timestamp) {
        let mut rest = input;
        let mut handled = 0;
        while !self.connections[client].closing {
            if self.connections[client].is_paused() {
                // There is no deadline for what the client has sent whole.
                if !self.connections.buffer(client, rest) {
                    self.close_after_flush(client, INPUT_FULL);
                }
                return;
            }
            if handled > 0 && !rest.is_empty() && self.must_postpone(client, handled) {
                if !self.connections.postpone(client, rest, self.now) {
                    self.close_after_flush(client, INPUT_FULL);
                }
                return;
            }
            let taken = match self.connections[client].protocol {
                Protocol::V1 => self.received_v1(client, &mut rest),
                Protocol::V2 { .. } => self.received_v2(client, &mut rest),
            };
            if !taken {
                break;
            }
            handled += 1;
            deadline = Timestamp::NEVER;
        }
        if !rest.is_empty()
            && !self.connections[client].closing
            && !self.connections.buffer_partial(client, rest, deadline, self.now)
        {
            self.close_after_flush(client, INPUT_FULL);
        }
    }

    /// Returns `true` if the other connections have their turn before this one goes on.
    fn must_postpone(&mut self, client: ClientId, handled: usize) -> bool {
        self.is_behind()
            || handled >= REQUESTS_AT_ONCE_MAX
            || self.connections[client].output().len() >= ANSWERS_AT_ONCE_BYTES
            || (handled >= REQUESTS_AT_ONCE_MIN && self.is_over(TURN_MAX))
    }

    /// The client's stream has ended.
    fn end_of_stream(&mut self, client: ClientId, why: &str) {
        if !self.connections[client].closing {
            self.hand_over_to_child(client);
            self.close_after_flush(client, why);
        }
    }

    /// The client's stream has ended, perhaps while it held a lock that its command has inherited. If the command lives,
    /// although no process has this connection any more (the command has closed it, or the lock was resumed since), the
    /// command keeps the lock.
    fn hand_over_to_child(&mut self, client: ClientId) {
        let Some(record) = self.lookup().record_of_client(client) else { return };
        let process = match self.connections[client].set_child(None) {
            None => return,
            Some(Named::Foreign(process)) => {
                // It counts from now on as the process of a holder that is not connected.
                self.acceptor.admission.release(record.held.uid);
                Ok(process)
            }
            Some(Named::Known(child)) => match Liveness::of_named(child) {
                Ok(Liveness::Alive(process)) => Ok(process),
                Ok(Liveness::Exited | Liveness::Unknown) => return,
                Err(e) => Err(e),
            },
        };
        let (token, uid) = (record.held.token, record.held.uid);
        self.table.detach(client);
        self.acceptor.admission.keep(uid);
        let name = self.connections.describe(client);
        match self.orphans.hand_over(record, process, &self.epoll) {
            Ok(()) => debug!("the command of {name} lives and keeps token {token}"),
            Err(e) => self.unwatched(token, uid, &e),
        }
    }

    /// The watched process of a holder has ended.
    fn orphan_ready(&mut self, token: Token) {
        match self.orphans.process_exited(token, &self.epoll) {
            Ok(None) => {}
            Ok(Some(successor)) => self.succeeded(token, successor),
            Err(e) => self.unwatched(token, None, &e),
        }
    }

    /// Carries on with a hold whose client has ended.
    fn succeeded(&mut self, token: Token, successor: Successor) {
        match successor {
            Successor::Command => {}
            Successor::None => {
                debug!("the process of token {token} has ended");
                self.apply(|table, now, effects| table.orphan_ended(now, token, effects));
            }
            Successor::Unknown => self.table.limit_orphan(token, self.now.plus(self.grace)),
            Successor::Sought(record) => {
                let begun = self.search.begin(record, &self.epoll);
                self.searches_begun(begun);
            }
        }
    }

    /// A search for a command is over.
    fn search_ready(&mut self) {
        let Some((token, found)) = self.search.ready() else { return };
        let begun = self.search.start_next();
        self.searches_begun(begun);
        // The hold may have been broken meanwhile.
        if self.orphans.record(token).is_some() {
            match found.and_then(|found| self.orphans.found(token, found, &self.epoll)) {
                Ok(successor) => self.succeeded(token, successor),
                Err(e) => self.unwatched(token, None, &e),
            }
        }
    }

    fn searches_begun(&mut self, begun: io::Result<()>) {
        if let Err(e) = begun {
            self.search.give_up().into_iter().for_each(|token| self.unwatched(token, None, &e));
        }
    }

    /// The process that keeps a lock cannot be watched, so its lock has a time limit from now on. (It is safer to hold a lock
    /// for too long than to grant it twice.)
    fn unwatched(&mut self, token: Token, uid: Option<u32>, error: &io::Error) {
        self.table.limit_orphan(token, self.now.plus(self.grace));
        if self.limiter.allows(log::Event::Unwatched, uid, self.now) {
            warn!("cannot watch the command of token {token}: {}", Reason(error));
        }
    }

    fn peer_uid(&self, client: ClientId) -> Option<u32> {
        self.connections[client].uid()
    }

    /// The holder that was not connected has come back, or its hold has ended.
    fn forget_orphan(&mut self, token: Token) {
        if let Some(uid) = self.orphans.forget(token) {
            self.acceptor.forgotten(uid, &self.epoll);
        }
    }

    fn lookup(&self) -> Lookup<'_> {
        Lookup {
            table: &self.table,
            connections: &self.connections,
            orphans: &self.orphans,
            cluster: self.cluster.as_ref(),
            now: self.now,
        }
    }

    /// Lets the clustering do what is due: handle what its threads report, give up what its lease no longer covers, and
    /// ask etcd what the table needs.
    fn poll_cluster(&mut self) {
        while let Some(cluster) = &mut self.cluster
            && let Some(replies) = cluster.poll(&mut self.table, self.now, &mut self.effects)
        {
            self.dispatch_effects();
            replies.into_iter().for_each(|reply| self.remote_reply(reply));
            if self.is_over(FLUSH_MAX) {
                self.has_work = true;
                return;
            }
        }
    }

    fn remote_reply(&mut self, reply: RemoteReply) {
        match reply {
            RemoteReply::RecordLease(lease) => self.recorder.set_lease(lease),
            RemoteReply::Answer { to, answer } => {
                if let Some(client) = self.connections.find(to) {
                    self.connections.answer(client, &answer);
                }
            }
            RemoteReply::Status { to, key } => {
                if let Some(client) = self.connections.find(to) {
                    self.answer_status_of(client, &key);
                }
            }
            RemoteReply::Page { to, page } => {
                let Some(client) = self.connections.find(to) else { return };
                match page {
                    Ok(page) => {
                        self.listings.entry(client).or_insert_with(Listing::new).add(page);
                        self.connections.mark_dirty(client);
                    }
                    Err(message) => {
                        self.listings.remove(&client);
                        self.connections.answer(client, &error(ErrorCode::Unavailable, message));
                    }
                }
            }
        }
    }

    fn request_remote(&mut self, client: ClientId, request: RemoteRequest) {
        let from = self.connections.id(client);
        if let Some(cluster) = &mut self.cluster {
            cluster.request(from, request);
        }
    }

    /// Lets the table handle an event, and carries out its effects.
    fn apply<T>(&mut self, event: impl FnOnce(&mut Table, Timestamp, &mut Effects) -> T) -> T {
        let result = event(&mut self.table, self.now, &mut self.effects);
        self.dispatch_effects();
        result
    }

    /// Notes what the table wants recorded, then writes what it wants clients to be told into their output.
    fn dispatch_effects(&mut self) {
        if let Some(cluster) = &mut self.cluster {
            self.effects.notices.drain(..).for_each(|notice| cluster.notify(notice));
        }
        // Taken and put back, so that neither is allocated anew each time.
        let mut record = std::mem::take(&mut self.effects.record);
        for change in record.drain(..) {
            self.record(change);
        }
        self.effects.record = record;
        self.notify_clients();
        self.warn_of_dropped_runs();
    }

    /// Tells clients what the table has decided. If that takes too long, the rest is left to the next turns, which handle no event of
    /// a client before ([`Server::is_behind`]).
    fn notify_clients(&mut self) {
        if !self.is_behind() {
            return;
        }
        let mut notifications = std::mem::take(&mut self.effects.notifications);
        let mut told = 0;
        while let Some(&notification) = notifications.get(told) {
            if told > 0 && told % NOTIFICATIONS_BETWEEN_CLOCKS == 0 && self.is_over(TURN_MAX) {
                break;
            }
            told += 1;
            // A client may have gone meanwhile, or its grant may have been taken back.
            if self.connections.contains(notification.client)
                && !self.connections[notification.client].closing
            {
                self.notify(notification);
            }
        }
        match notifications.len() {
            all if all == told => notifications.clear(),
            _ => drop(notifications.drain(..told)),
        }
        // To tell one client may have had effects on others.
        if self.is_behind() {
            notifications.append(&mut self.effects.notifications);
        }
        self.effects.notifications = notifications;
    }

    fn notify(&mut self, notification: Notification) {
        if log::is_verbose() {
            log::notification(self.lookup(), notification);
        }
        match self.connections[notification.client].protocol {
            Protocol::V1 => self.notify_v1(notification),
            Protocol::V2 { .. } => self.notify_v2(notification),
        }
        match notification.kind {
            NotificationKind::Expired => self.close_after_flush(notification.client, "hold limit exceeded"),
            NotificationKind::Superseded => {
                self.close_after_flush(notification.client, "resumed on another connection")
            }
            _ => {}
        }
    }

    /// Returns `true` if clients wait to be told what was decided earlier. No client is answered anything else before.
    fn is_behind(&self) -> bool {
        !self.effects.notifications.is_empty()
    }

    /// Warns that the table forgot runs that still counted: once in a while, since that goes on.
    fn warn_of_dropped_runs(&mut self) {
        let dropped = std::mem::take(&mut self.effects.runs_dropped);
        if dropped > 0 && self.warned_of_runs.is_none_or(|last| self.now >= last.plus(WARN_EVERY)) {
            warn!("more locks than --remember-max have runs that count: the oldest are forgotten");
            self.warned_of_runs = Some(self.now);
        }
    }

    /// Notes a change, to be written to the journal with the others of this turn.
    fn record(&mut self, change: JournalEntry) {
        match change {
            JournalEntry::Granted(client) => {
                // The client is told of the grant next, behind its present output.
                let output_before = self.connections[client].output().len();
                self.recorder.granted(Grant { client, output_before });
                self.connections[client].recorded = self.now;
                self.record_hold(client);
            }
            JournalEntry::Resumed(client) => {
                if let Some((_, request)) = self.table.request_of(client)
                    && let Some(held) = &request.held
                {
                    let token = held.token;
                    self.forget_orphan(token);
                }
                self.connections[client].recorded = self.now;
                self.record_hold(client);
            }
            JournalEntry::Ended(token) => {
                self.forget_orphan(token);
                self.recorder.hold_ended(token);
                self.output_ended(token);
            }
            JournalEntry::Ran(lock, token) => {
                let runs = self.table.last_runs(self.now, lock);
                let run = runs.into_iter().flatten().find(|run| run.token == token).cloned();
                if let Some(run) = run {
                    self.recorder.run(&self.lookup().run_record(&run));
                    let dropped = self.outputs.keep(&run, self.now);
                    self.results_dropped(dropped);
                }
            }
            JournalEntry::RunForgotten(lock, token) => {
                self.recorder.forget_run(token);
                let dropped = self.outputs.forget(lock);
                self.results_dropped(dropped);
            }
        }
    }

    /// Notes what a client holds now.
    fn record_hold(&mut self, client: ClientId) {
        if let Some(record) = self.lookup().record_of_client(client) {
            self.recorder.hold(&record);
        }
    }

    /// Notes the process that keeps a client's lock when the client is gone. A process outside of the namespace takes a
    /// descriptor, which counts as a connection of the client's user does.
    fn set_child(&mut self, client: ClientId, child: Option<Named>) {
        let uid = self.peer_uid(client);
        if let Some(Named::Foreign(_)) = child {
            self.acceptor.admission.keep(uid);
        }
        if let Some(Named::Foreign(_)) = self.connections[client].set_child(child) {
            self.acceptor.forgotten(uid, &self.epoll);
        }
    }

    /// Releases everything of a client that has gone or must go. Its connection is closed at the end of the turn, after
    /// its output.
    fn close_after_flush(&mut self, client: ClientId, why: &str) {
        let connection = &mut self.connections[client];
        if connection.closing {
            return;
        }
        connection.closing = true;
        self.closing += 1;
        debug!("close: {}: {why}", self.connections.describe(client));
        self.connections.mark_dirty(client);
        self.apply(|table, now, effects| table.disconnected(now, client, effects));
    }

    /// Records what has changed in this turn, then sends the output; what there is no time for is left to the next turn.
    fn flush_turn(&mut self) {
        self.has_work = false;
        loop {
            self.poll_cluster();
            self.commit();
            let (gone, is_done) = self.flush();
            // Clients that turn out to be gone release what they had. The journal must say so before any client hears of
            // it, so they are not closed on the way.
            for (client, why) in gone {
                self.read_rest(client);
                self.disconnected(client, why);
            }
            if !self.connections.has_work() {
                return;
            }
            if !is_done || self.is_over(FLUSH_MAX) || !self.connections.has_dirty() {
                self.has_work = true;
                return;
            }
        }
    }

    /// Writes what was noted to the journal. If that fails, the locks of this turn are not granted.
    fn commit(&mut self) {
        if self.files.are_unwatched() && self.recorder.has_grants() {
            self.look_at_files();
        }
        loop {
            let lookup = Lookup {
                table: &self.table,
                connections: &self.connections,
                orphans: &self.orphans,
                cluster: self.cluster.as_ref(),
                now: self.now,
            };
            let refused = self.recorder.commit(|| lookup.records());
            if refused.is_empty() {
                return;
            }
            refused.into_iter().for_each(|grant| self.take_back(grant));
        }
    }

    /// Takes back what a client was granted in this turn, before the client is told.
    fn take_back(&mut self, grant: Grant) {
        let connection = &self.connections[grant.client];
        if connection.closing {
            return;
        }
        let protocol = connection.protocol;
        self.connections.truncate_output(grant.client, grant.output_before);
        if let Protocol::V2 { .. } = protocol {
            self.connections.answer(grant.client, &v2::cannot_record());
        }
        self.close_after_flush(grant.client, "its lock cannot be recorded");
    }

    /// Sends output, and closes the connections that are to be closed. Returns the clients that cannot be sent anything,
    /// and why; and `false` if it has stopped because this turn takes too long.
    fn flush(&mut self) -> (Vec<(ClientId, &'static str)>, bool) {
        let mut gone = Vec::new();
        let mut sends = 0;
        while let Some(client) = self.connections.pop_dirty() {
            if self.continue_status(client) {
                sends += SENDS_BETWEEN_CLOCKS;
            }
            failpoint::hit("before-send");
            let sent = self.connections.send(client);
            failpoint::hit("after-send");
            if self.connections[client].closing {
                self.close(client);
            } else if let Some(why) = self.sent(client, sent) {
                gone.push((client, why));
            }
            sends += 1;
            if sends >= SENDS_BETWEEN_CLOCKS {
                sends = 0;
                if self.is_over(FLUSH_MAX) {
                    return (gone, false);
                }
            }
        }
        (gone, true)
    }

    /// Returns why the client must go, if it must.
    fn sent(&mut self, client: ClientId, sent: Sent) -> Option<&'static str> {
        match sent {
            Sent::Gone => {
                self.connections[client].output().clear();
                return Some("disconnected");
            }
            Sent::Part if !self.connections.left_unread(client, self.now) => {
                return Some("output buffers full");
            }
            Sent::Part if self.connections[client].postponed || self.connections[client].is_paused() => {
                self.set_interest(client, Interest::Output);
            }
            Sent::Part => self.set_interest(client, Interest::Both),
            Sent::All => {
                self.connections.all_read(client);
                let interest = match self.has_more_status(client) {
                    _ if self.connections[client].is_paused() => Interest::Nothing,
                    true => Interest::Both,
                    false => Interest::Input,
                };
                self.set_interest(client, interest);
            }
        }
        None
    }

    /// Sets what the loop is woken for.
    fn set_interest(&mut self, client: ClientId, interest: Interest) {
        let id = self.connections.id(client);
        let connection = &mut self.connections[client];
        if connection.interest == interest {
            return;
        }
        connection.interest = interest;
        let flags = match interest {
            Interest::Input => EpollFlags::EPOLLIN,
            Interest::Both => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
            Interest::Output => EpollFlags::EPOLLOUT,
            Interest::Nothing => EpollFlags::empty(),
        };
        let mut event = EpollEvent::new(flags, Source::Connection(id).pack());
        if let Err(e) = self.epoll.modify(&*connection, &mut event) {
            // Its output is sent with its next answer, or never.
            if self.limiter.allows(log::Event::Unwatched, self.peer_uid(client), self.now) {
                warn!("cannot watch {}: {e}", self.connections.describe(client));
            }
        }
    }

    fn close(&mut self, client: ClientId) {
        // Closing removes the descriptor from the epoll set too: no other descriptor refers to this open file (epoll(7),
        // question 6).
        let id = self.connections.id(client);
        self.peers.end(client);
        if self.listings.remove(&client).is_some()
            && let Some(cluster) = &mut self.cluster
        {
            cluster.forget(id);
        }
        let mut connection = self.connections.remove(client);
        connection.end();
        if let Some(identity) = connection.identity.as_deref_mut() {
            self.gate.closed(id, identity);
        }
        self.closing -= 1;
        if let Some(Named::Foreign(_)) = connection.child() {
            self.acceptor.forgotten(connection.uid(), &self.epoll);
        }
        if self.connections.is_empty() {
            self.idle_since = Some(self.now);
        }
        self.acceptor.closed(&connection, &self.epoll);
    }
}

/// Returns a pipe that becomes readable with these signals.
fn signal_pipe(signals: &[i32], epoll: &Epoll, source: Source) -> io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    reader.set_nonblocking(true)?;
    for &signal in signals {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    epoll.add(&reader, EpollEvent::new(EpollFlags::EPOLLIN, source.pack()))?;
    Ok(reader)
}
