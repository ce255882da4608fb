//! The loop: waits for sockets, applies what comes to the table, records what changed, and sends what the table decides.
//!
//! Each turn reads all that is ready, then writes the journal, then the answers: one write for each client that has
//! output, however many requests were in one read.

mod v1;
mod v2;

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ::log::{debug, info, warn};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::accept::Acceptor;
use super::cluster::Clustering;
use super::connection::{ConnectionId, OUTPUT_BYTES_MAX, Protocol, Sent};
use super::connections::Connections;
use super::listener::Listener;
use super::listing::Listing;
use super::lookup::Lookup;
use super::orphans::{Orphans, Successor};
use super::processes::Liveness;
use super::recorder::{Grant, Recorder};
use super::remote::{RemoteReply, RemoteRequest};
use super::source::Source;
use super::{Config, failpoint, log, millis};
use crate::addr::Reason;
use crate::clock;
use crate::journal::HoldRecord;
use crate::proto::Token;
use crate::proto::v2::{ErrorCode, error};
use crate::table::{
    self, ClientId, ClusterNotice, Effects, JournalEntry, NotificationKind, Table, Timestamp,
};

/// How many events are taken from the kernel at a time.
const EVENTS_MAX: usize = 256;
/// How many connections a listener accepts before the other sources get their turn.
const ACCEPTS_MAX: usize = 64;
/// How much is read from one connection before the other connections get their turn.
const READ_BYTES_MAX: usize = 16 * 1024;

pub(super) struct Server {
    epoll: Epoll,
    signals: UnixStream,
    acceptor: Acceptor,
    connections: Connections,
    table: Table,
    recorder: Recorder,
    orphans: Orphans,
    /// Reused, so that effects are not allocated anew each time.
    effects: Effects,
    /// Shares the locks with other hosts; `None`: they are this host's alone.
    cluster: Option<Clustering>,
    /// Lists of the locks of all hosts that clients are being sent.
    listings: BTreeMap<ClientId, Listing>,
    /// The time of this turn, by the clock that counts from boot.
    now: Timestamp,
    started: Timestamp,
    grace: Timestamp,
    idle_exit: Option<Duration>,
    /// Since when no client is connected.
    idle_since: Option<Timestamp>,
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
        cluster: Option<Clustering>,
    ) -> io::Result<Server> {
        let (signals, writer) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
        }
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&signals, EpollEvent::new(EpollFlags::EPOLLIN, Source::Signals.pack()))?;
        if let Some(cluster) = &cluster {
            cluster.register(&epoll)?;
        }
        // The time of day makes tokens grow across restarts, even without a journal; a million grants a second would
        // not catch up with it.
        let micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_micros() as u64);
        let last = recorder.last_token().map_or(0, |token| token.0);
        let now = clock::now();
        let mut server = Server {
            epoll,
            signals,
            acceptor: Acceptor::new(config, listeners)?,
            connections: Connections::default(),
            table: Table::new(table::Config {
                hash_key: RandomState::new().hash_one(0),
                first_token: Token(micros.max(last + 1)),
                hold_limit: config.hold_limit.map(millis),
                is_clustered: cluster.is_some(),
            }),
            recorder,
            orphans: Orphans::default(),
            effects: Effects::default(),
            cluster,
            listings: BTreeMap::new(),
            now,
            started: now,
            grace: millis(config.grace),
            idle_exit: config.idle_exit,
            idle_since: Some(now),
        };
        server.restore_holds()?;
        server.join_cluster();
        server.acceptor.resume(&server.epoll)?;
        Ok(server)
    }

    /// Gives the table what the previous daemon recorded, except for holds that have ended since.
    fn restore_holds(&mut self) -> io::Result<()> {
        let mut inherited = self.recorder.take_inherited();
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
        match Orphans::examine(record, self.now.plus(self.grace))? {
            Some(survivor) if self.table.restore(survivor.granted(), survivor.held) => {
                self.orphans.restore(survivor, &self.epoll)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Begins to share the locks, including those that are held already.
    fn join_cluster(&mut self) {
        let Some(cluster) = &mut self.cluster else { return };
        let mut cursor = 0;
        while let Some((lock, next)) = self.table.next_lock(cursor) {
            cluster.notify(ClusterNotice::Needs(lock.id()));
            cursor = next;
        }
        if self.recorder.lease().is_none() {
            // This keeps a later daemon from serving here without sharing the locks.
            self.recorder.set_lease(0);
            self.commit();
        }
    }

    /// Serves until a signal arrives or the daemon was idle for long enough; returns which.
    pub(super) fn run(&mut self) -> io::Result<&'static str> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let mut buffer = vec![0; READ_BYTES_MAX].into_boxed_slice();
        let mut turns_full = 0;
        loop {
            let mark = self.table.deferred();
            let timeout = if mark.is_some() { EpollTimeout::ZERO } else { self.timeout() };
            let ready = match self.epoll.wait(&mut events, timeout) {
                Err(nix::Error::EINTR) => 0,
                other => other?,
            };
            self.now = clock::now();
            self.poll_cluster();
            for event in &events[..ready] {
                match Source::unpack(event.data()) {
                    Source::Signals if self.is_signalled() => return Ok("received a signal"),
                    Source::Signals => {}
                    Source::Listener(index) => self.accept(index, &mut buffer)?,
                    Source::Connection(id) => self.connection_ready(id, event.events(), &mut buffer),
                    Source::Orphan(token) => self.orphan_ready(token),
                    // The clustering has been polled.
                    Source::Cluster => {}
                }
            }
            // A turn with room for more events has seen all that was ready when it began. With more than one turn's
            // worth, the kernel goes round, so that after enough full turns all has been seen as well.
            turns_full = if ready < EVENTS_MAX { 0 } else { turns_full + 1 };
            if let Some(mark) = mark
                && (turns_full == 0 || turns_full > self.connections.len() / EVENTS_MAX + 1)
            {
                turns_full = 0;
                self.apply(|table, now, effects| table.settle(now, mark, effects));
            }
            self.expire();
            self.flush_turn();
            if self.acceptor.is_due(self.now) {
                self.acceptor.resume(&self.epoll)?;
            }
            if self.idle_deadline().is_some_and(|deadline| deadline <= self.now) {
                return Ok("idle");
            }
        }
    }

    /// Ends in good order: what is still held stays in the journal, for the next daemon.
    pub(super) fn finish(mut self) {
        self.poll_cluster();
        if self.cluster.as_mut().is_some_and(|cluster| cluster.stop(&self.table)) {
            self.recorder.set_lease(0);
        }
        self.commit();
        if self.table.is_empty() {
            self.recorder.remove();
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let deadlines = [
            self.table.next_deadline(),
            self.idle_deadline(),
            self.acceptor.retry_at(),
            self.cluster.as_ref().and_then(Clustering::deadline),
            self.connections.next_deadline(),
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
        self.table.is_empty().then(|| since.plus(millis(limit)))
    }

    /// Returns `true` if a signal has arrived: each of them ends the daemon.
    fn is_signalled(&mut self) -> bool {
        let mut byte = [0];
        matches!(self.signals.read(&mut byte), Ok(1..))
    }

    fn expire(&mut self) {
        self.apply(|table, now, effects| table.expire(now, effects));
        while let Some(client) = self.connections.pop_overdue(self.now) {
            self.close_after_flush(client, "incomplete message for too long");
        }
    }

    fn accept(&mut self, index: usize, buffer: &mut [u8]) -> io::Result<()> {
        for _ in 0..ACCEPTS_MAX {
            let open = self.connections.len();
            let Some(accepted) = self.acceptor.accept(index, open, self.now, &self.epoll)? else { break };
            let client = self.connections.insert(accepted.connection);
            self.idle_since = None;
            debug!("connect: {} on {}", self.connections.describe(client), accepted.listener);
            self.register(client, buffer);
        }
        Ok(())
    }

    fn register(&mut self, client: ClientId, buffer: &mut [u8]) {
        let event =
            EpollEvent::new(EpollFlags::EPOLLIN, Source::Connection(self.connections.id(client)).pack());
        if let Err(e) = self.epoll.add(&self.connections[client], event) {
            warn!("cannot watch a connection: {e}");
            return self.close_after_flush(client, "cannot be watched");
        }
        // Most clients have sent their request by now, so that they need not wait for another turn.
        self.read(client, buffer);
    }

    fn connection_ready(&mut self, id: ConnectionId, events: EpollFlags, buffer: &mut [u8]) {
        // The event may have been waiting behind the one that closed its connection.
        let Some(client) = self.connections.find(id) else { return };
        if events.intersects(EpollFlags::EPOLLOUT) {
            self.connections.mark_dirty(client);
        }
        if events.intersects(!EpollFlags::EPOLLOUT) {
            self.read(client, buffer);
        }
    }

    fn read(&mut self, client: ClientId, buffer: &mut [u8]) {
        let connection = &mut self.connections[client];
        if connection.closing {
            return;
        }
        match connection.read(buffer) {
            Ok(0) => {
                self.hand_over_to_child(client);
                self.close_after_flush(client, "end of stream");
            }
            Ok(bytes) => self.received(client, &buffer[..bytes]),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Err(e) => self.close_after_flush(client, e.desc()),
        }
    }

    /// Takes the requests out of what has arrived, and keeps the beginning of a request that has not arrived whole.
    fn received(&mut self, client: ClientId, bytes: &[u8]) {
        let connection = &mut self.connections[client];
        if connection.continues_line(bytes) {
            connection.input.extend_from_slice(bytes);
            return;
        }
        let (earlier, mut deadline) = self.connections.take_partial(client);
        let joined;
        let mut rest = bytes;
        if !earlier.is_empty() {
            joined = [&earlier, bytes].concat();
            rest = &joined;
        }
        while !self.connections[client].closing {
            let taken = match self.connections[client].protocol {
                Protocol::V1 => self.received_v1(client, &mut rest),
                Protocol::V2 { .. } => self.received_v2(client, &mut rest),
            };
            if !taken {
                if !rest.is_empty() && !self.connections[client].closing {
                    self.connections.buffer_partial(client, rest, deadline, self.now);
                }
                break;
            }
            deadline = Timestamp::NEVER;
        }
    }

    /// The client's stream has ended, perhaps while it held a lock that its command has inherited. If the command lives,
    /// although no process has this connection any more (the command has closed it, or the lock was resumed since), the
    /// command keeps the lock.
    fn hand_over_to_child(&mut self, client: ClientId) {
        let child = self.connections[client].child;
        if child == 0 {
            return;
        }
        let Some(record) = self.lookup().record_of_client(client) else { return };
        let Ok(Liveness::Alive(process)) = Liveness::of_process(child, self.now) else { return };
        let token = record.held.token;
        self.table.detach(client);
        let name = self.connections.describe(client);
        match self.orphans.hand_over(record, process, &self.epoll) {
            Ok(()) => debug!("the command of {name} lives and keeps token {token}"),
            // It is safer to hold a lock for too long than to grant it twice.
            Err(e) => warn!("cannot watch the command of token {token}: {}", Reason(&e)),
        }
    }

    /// The watched process of a holder has ended.
    fn orphan_ready(&mut self, token: Token) {
        match self.orphans.process_exited(token, &self.epoll) {
            Ok(None | Some(Successor::Command)) => {}
            Ok(Some(Successor::None)) => {
                debug!("the process of token {token} has ended");
                self.apply(|table, now, effects| table.orphan_ended(now, token, effects));
            }
            Ok(Some(Successor::Unknown)) => self.table.limit_orphan(token, self.now.plus(self.grace)),
            // It is safer to hold a lock for too long than to grant it twice.
            Err(e) => warn!("cannot watch the command of token {token}: {}", Reason(&e)),
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
        let mut notifications = std::mem::take(&mut self.effects.notifications);
        for entry in record.drain(..) {
            self.record(entry);
        }
        for notification in notifications.drain(..) {
            if log::is_verbose() {
                log::notification(self.lookup(), notification);
            }
            match self.connections[notification.client].protocol {
                Protocol::V1 => self.notify_v1(notification),
                Protocol::V2 { .. } => self.notify_v2(notification),
            }
            match notification.kind {
                NotificationKind::Expired => {
                    self.close_after_flush(notification.client, "hold limit exceeded")
                }
                NotificationKind::Superseded => {
                    self.close_after_flush(notification.client, "resumed on another connection")
                }
                _ => {}
            }
        }
        (self.effects.record, self.effects.notifications) = (record, notifications);
    }

    /// Notes a change, to be written to the journal with the others of this turn.
    fn record(&mut self, change: JournalEntry) {
        match change {
            JournalEntry::Granted(client) => {
                // The client is told of the grant next, behind its present output.
                let output_before = self.connections[client].output().len();
                self.recorder.granted(Grant { client, output_before });
                self.record_hold(client);
            }
            JournalEntry::Resumed(client) => {
                if let Some((_, request)) = self.table.request_of(client)
                    && let Some(held) = &request.held
                {
                    self.orphans.forget(held.token);
                }
                self.record_hold(client);
            }
            JournalEntry::Ended(token) => {
                self.orphans.forget(token);
                self.recorder.hold_ended(token);
            }
        }
    }

    /// Notes what a client holds now.
    fn record_hold(&mut self, client: ClientId) {
        if let Some(record) = self.lookup().record_of_client(client) {
            self.recorder.hold(&record);
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
        debug!("close: {}: {why}", self.connections.describe(client));
        self.connections.mark_dirty(client);
        self.apply(|table, now, effects| table.disconnected(now, client, effects));
    }

    /// Records what has changed in this turn, then sends the output.
    fn flush_turn(&mut self) {
        loop {
            self.poll_cluster();
            self.commit();
            if !self.connections.has_dirty() {
                return;
            }
            // Clients that turn out to be gone release what they had. The journal must say so before any client hears of
            // it, so they are not closed on the way.
            for (client, why) in self.flush() {
                self.close_after_flush(client, why);
            }
        }
    }

    /// Writes what was noted to the journal. If that fails, the locks of this turn are not granted.
    fn commit(&mut self) {
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
        let connection = &mut self.connections[grant.client];
        if connection.closing {
            return;
        }
        connection.output().truncate(grant.output_before);
        if let Protocol::V2 { .. } = connection.protocol {
            self.connections.answer(grant.client, &v2::cannot_record());
        }
        self.close_after_flush(grant.client, "its lock cannot be recorded");
    }

    /// Sends output, and closes the connections that are to be closed. Returns the clients that cannot be sent anything,
    /// and why.
    fn flush(&mut self) -> Vec<(ClientId, &'static str)> {
        let mut gone = Vec::new();
        let mut dirty = self.connections.take_dirty();
        for client in dirty.drain(..) {
            self.connections[client].dirty = false;
            self.continue_status(client);
            let connection = &mut self.connections[client];
            failpoint::hit("before-send");
            let sent = connection.send();
            failpoint::hit("after-send");
            if connection.closing {
                self.close(client);
                continue;
            }
            match sent {
                Sent::Gone => {
                    connection.output().clear();
                    gone.push((client, "disconnected"));
                }
                Sent::Part if connection.output().len() > OUTPUT_BYTES_MAX => {
                    gone.push((client, "output buffer full"));
                }
                Sent::Part => self.watch_output(client, true),
                Sent::All => self.watch_output(client, self.has_more_status(client)),
            }
        }
        self.connections.reuse(dirty);
        gone
    }

    /// Sets whether the loop is woken when the connection can be written to.
    fn watch_output(&mut self, client: ClientId, blocked: bool) {
        let id = self.connections.id(client);
        let connection = &mut self.connections[client];
        if connection.blocked == blocked {
            return;
        }
        connection.blocked = blocked;
        let output = if blocked { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN | output, Source::Connection(id).pack());
        if let Err(e) = self.epoll.modify(&*connection, &mut event) {
            // Its output is sent with its next answer, or never.
            warn!("cannot watch {} for output: {e}", self.connections.describe(client));
        }
    }

    fn close(&mut self, client: ClientId) {
        // Closing removes the descriptor from the epoll set too: no other descriptor refers to this open file (epoll(7),
        // question 6).
        let connection = self.connections.remove(client);
        self.listings.remove(&client);
        if self.connections.is_empty() {
            self.idle_since = Some(self.now);
        }
        self.acceptor.closed(connection.peer(), &self.epoll);
    }
}
