//! The loop: waits for sockets, applies what comes to the table, records what changed, and sends what the table decides.
//!
//! Each turn reads what is ready, then writes the journal, then the answers: one write for each client that has output,
//! however many requests were in one read. No turn takes long: what there is no time for is left to the next one.

mod effects;
mod flush;
mod holders;
mod input;
mod remote;
mod share;
mod start;
mod status;
mod tcp;
mod v1;
mod v2;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};

use self::tcp::ForeignWarnings;
use super::accept::Acceptor;
use super::batch::Batch;
use super::cluster::Clustering;
use super::connection::ConnectionId;
use super::connections::Connections;
use super::failpoint;
use super::files::Files;
use super::gate::Gate;
use super::leases::PeerLeases;
use super::listing::Listing;
use super::log::Limiter;
use super::lookup::Lookup;
use super::orphans::Orphans;
use super::outputs::Outputs;
use super::predecessor::Predecessor;
use super::recorder::Recorder;
use super::reserve::Reservations;
use super::search::Search;
use super::sharers::Sharers;
use super::source::Source;
use super::users::Users;
use crate::clock;
use crate::table::{ArrivalMark, ClientId, Effects, Table, Timestamp};

/// How long a turn may take events and requests before it goes on to record and to send.
const TURN_MAX: Duration = Duration::from_millis(5);
/// Reading the clock takes a while, compared with most events. One that takes long looks at the clock itself.
const EVENTS_BETWEEN_CLOCKS: usize = 4;
/// How much is read from one connection before the other connections get their turn.
const READ_BYTES_MAX: usize = 16 * 1024;

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
    sharers: Sharers,
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
            let mut handled = 0;
            while !self.is_behind()
                && let Some(event) = batch.next()
            {
                handled += 1;
                if let Some(reason) = self.handle(event, &mut buffer)? {
                    return Ok(reason);
                }
                if !batch.is_handled() && handled % EVENTS_BETWEEN_CLOCKS == 0 && self.is_over(TURN_MAX) {
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

    fn peer_uid(&self, client: ClientId) -> Option<u32> {
        self.connections[client].uid()
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
}
