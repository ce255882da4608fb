//! The loop: waits for sockets, feeds what comes to the table, records what changed, and sends what the table decides.
//!
//! Each turn reads all that is ready, then writes the journal, then the answers: one write for each client that has
//! something to be told, however many requests were found in one read.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::{debug, warn};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use slab::Slab;

use super::Config;
use super::accept::Acceptor;
#[cfg(feature = "etcd")]
use super::cluster::Sharing;
use super::connection::{Connection, OUTPUT_BYTES_MAX, Protocol, Sent};
use super::failpoint;
use super::listener::Listener;
use super::recorder::Recorder;
use crate::clock;
use crate::proto::Token;
use crate::table::{self, ClientId, Effects, Millis, Stir, Table, What};

/// How many events are taken from the kernel at a time.
const EVENTS_MAX: usize = 256;
/// How much is read from one connection before the others get their turn.
const READ_BYTES_MAX: usize = 16 * 1024;
/// How long the rest of a message may take to arrive.
const MESSAGE_WAIT: Millis = Millis(10_000);

pub(super) struct Server {
    pub(super) epoll: Epoll,
    signals: UnixStream,
    pub(super) acceptor: Acceptor,
    pub(super) connections: Slab<Connection>,
    pub(super) table: Table,
    pub(super) recorder: Recorder,
    pub(super) effects: Effects,
    /// What other hosts have to do with it.
    #[cfg(feature = "etcd")]
    pub(super) sharing: Option<Box<Sharing>>,
    /// What has changed in the table that they may have to be asked or told.
    pub(super) stirred: Vec<Stir>,
    /// Those with output, or closing: they are seen to at the end of the turn.
    dirty: Vec<ClientId>,
    /// When those are cut off that have sent part of a message.
    unfinished: BTreeSet<(Millis, ClientId)>,
    /// Each turn's time, of the clock that counts from boot.
    pub(super) now: Millis,
    pub(super) started: Millis,
    pub(super) grace: Millis,
    idle_exit: Option<Duration>,
    /// Since when nobody is connected.
    idle_since: Option<Millis>,
}

/// What an event is about, packed into the 64 bits that the kernel keeps with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Signals,
    Listener(usize),
    Connection(ClientId, u32),
    /// The process of a holder that is not connected.
    Orphan(Token),
    /// The threads that speak with etcd.
    Cluster,
}

impl Source {
    const ORPHAN: u64 = 1 << 63;
    const CLUSTER: u32 = u32::MAX;

    /// Generation 0 marks what is no connection. Neither generations nor tokens reach the highest bit.
    pub(super) fn pack(self) -> u64 {
        match self {
            Source::Signals => 0,
            Source::Cluster => u64::from(Source::CLUSTER),
            Source::Listener(index) => index as u64 + 1,
            Source::Connection(client, generation) => u64::from(generation) << 32 | u64::from(client.0),
            Source::Orphan(token) => Source::ORPHAN | token.0,
        }
    }

    fn unpack(bits: u64) -> Source {
        let (generation, low) = ((bits >> 32) as u32, bits as u32);
        match (generation, low) {
            _ if bits & Source::ORPHAN != 0 => Source::Orphan(Token(bits & !Source::ORPHAN)),
            (0, 0) => Source::Signals,
            (0, Source::CLUSTER) => Source::Cluster,
            (0, number) => Source::Listener(number as usize - 1),
            _ => Source::Connection(ClientId(low), generation),
        }
    }
}

impl Server {
    /// `recorder` knows what was held before; the table learns it from there.
    pub(super) fn new(config: &Config, listeners: Vec<Listener>, recorder: Recorder) -> io::Result<Server> {
        let (signals, writer) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
        }
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&signals, EpollEvent::new(EpollFlags::EPOLLIN, Source::Signals.pack()))?;
        // The time of day makes tokens grow across restarts, even without a journal; a million grants a second would
        // not catch up with it.
        let micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_micros() as u64);
        let last = recorder.last_token().map_or(0, |token| token.0);
        let now = clock::now();
        let mut server = Server {
            epoll,
            signals,
            acceptor: Acceptor::new(config, listeners)?,
            connections: Slab::new(),
            table: Table::new(table::Config {
                hash_key: RandomState::new().hash_one(0),
                first_token: Token(micros.max(last + 1)),
                hold_limit: config.hold_limit.map(millis),
                is_shared: config.is_sharing(),
            }),
            recorder,
            effects: Effects::default(),
            #[cfg(feature = "etcd")]
            sharing: None,
            stirred: Vec::new(),
            dirty: Vec::new(),
            unfinished: BTreeSet::new(),
            now,
            started: now,
            grace: millis(config.grace),
            idle_exit: config.idle_exit,
            idle_since: Some(now),
        };
        server.restore_orphans()?;
        server.acceptor.resume(&server.epoll)?;
        Ok(server)
    }

    /// Serves, and returns why it ended.
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
            self.check_lease();
            for event in &events[..ready] {
                match Source::unpack(event.data()) {
                    Source::Signals if self.is_signalled() => return Ok("a signal asks for it"),
                    Source::Signals => {}
                    Source::Listener(index) => self.accept(index, &mut buffer)?,
                    Source::Connection(client, generation) => {
                        self.connection_ready(client, generation, event.events(), &mut buffer);
                    }
                    Source::Orphan(token) => self.orphan_ready(token),
                    Source::Cluster => self.sharing_ready(),
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
                return Ok("nobody needs it");
            }
        }
    }

    /// Ends in good order: what is still held is in the journal, for the next one.
    pub(super) fn finish(mut self) {
        self.stop_sharing();
        if self.table.is_empty() {
            self.recorder.remove();
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let unfinished = self.unfinished.first().map(|&(deadline, _)| deadline);
        let deadlines = [
            self.table.next_deadline(),
            self.idle_deadline(),
            self.acceptor.retry_at(),
            self.sharing_deadline(),
            unfinished,
        ];
        match deadlines.into_iter().flatten().min() {
            None => EpollTimeout::NONE,
            Some(deadline) => {
                let millis = deadline.0.saturating_sub(clock::now().0).min(i32::MAX as u64);
                EpollTimeout::try_from(millis).expect("it is at most i32::MAX")
            }
        }
    }

    fn idle_deadline(&self) -> Option<Millis> {
        let (since, limit) = (self.idle_since?, self.idle_exit?);
        self.table.is_empty().then(|| since.plus(millis(limit)))
    }

    /// True when a signal has arrived: each of them ends the daemon.
    fn is_signalled(&mut self) -> bool {
        let mut byte = [0];
        matches!(self.signals.read(&mut byte), Ok(1..))
    }

    fn expire(&mut self) {
        self.apply(|table, now, effects| table.expire(now, effects));
        while let Some(&(deadline, client)) = self.unfinished.first()
            && deadline <= self.now
        {
            self.unfinished.pop_first();
            self.close_after_flush(client, "it has not finished what it began to send");
        }
    }

    pub(super) fn add_connection(&mut self, connection: Connection) -> ClientId {
        self.idle_since = None;
        ClientId(
            u32::try_from(self.connections.insert(connection)).expect("fewer connections than descriptors"),
        )
    }

    fn connection_ready(&mut self, client: ClientId, generation: u32, events: EpollFlags, buffer: &mut [u8]) {
        // An event that was waiting in line behind the one that closed its connection.
        match self.connections.get(client.0 as usize) {
            Some(connection) if connection.generation == generation => {}
            _ => return,
        }
        if events.intersects(EpollFlags::EPOLLOUT) {
            self.mark_dirty(client);
        }
        if events.intersects(!EpollFlags::EPOLLOUT) {
            self.read(client, buffer);
        }
    }

    pub(super) fn read(&mut self, client: ClientId, buffer: &mut [u8]) {
        let connection = &mut self.connections[client.0 as usize];
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

    /// Takes the requests out of what has arrived; the beginning of one that has not arrived whole is kept.
    fn received(&mut self, client: ClientId, bytes: &[u8]) {
        let connection = &mut self.connections[client.0 as usize];
        if connection.continues_line(bytes) {
            connection.input.extend_from_slice(bytes);
            return;
        }
        let earlier = std::mem::take(&mut connection.input);
        let mut deadline = std::mem::replace(&mut connection.unfinished, Millis::NEVER);
        if deadline != Millis::NEVER {
            self.unfinished.remove(&(deadline, client));
        }
        let joined;
        let mut rest = bytes;
        if !earlier.is_empty() {
            joined = [&earlier, bytes].concat();
            rest = &joined;
        }
        while !self.connections[client.0 as usize].closing {
            let taken = match self.connections[client.0 as usize].protocol {
                Protocol::V1 => self.received_v1(client, &mut rest),
                Protocol::V2 { .. } => self.received_v2(client, &mut rest),
            };
            if !taken {
                // Of one message, its first piece says until when all must be there.
                self.buffer_partial(client, rest, deadline);
                break;
            }
            deadline = Millis::NEVER;
        }
    }

    /// Keeps the beginning of a message until the rest of it comes, which must not take for ever.
    fn buffer_partial(&mut self, client: ClientId, rest: &[u8], deadline: Millis) {
        let connection = &mut self.connections[client.0 as usize];
        if rest.is_empty() || connection.closing {
            return;
        }
        connection.input.extend_from_slice(rest);
        let deadline = deadline.min(self.now.plus(MESSAGE_WAIT));
        connection.unfinished = deadline;
        self.unfinished.insert((deadline, client));
    }

    /// Lets the table handle something, and carries out what it says.
    pub(super) fn apply<T>(&mut self, event: impl FnOnce(&mut Table, Millis, &mut Effects) -> T) -> T {
        let result = event(&mut self.table, self.now, &mut self.effects);
        self.dispatch_effects();
        result
    }

    /// Records and tells what the table has said.
    pub(super) fn dispatch_effects(&mut self) {
        if !self.effects.stir.is_empty() {
            self.stirred.append(&mut self.effects.stir);
        }
        // Taken and put back, so that neither is allocated anew each time.
        let mut record = std::mem::take(&mut self.effects.record);
        let mut tell = std::mem::take(&mut self.effects.tell);
        for change in record.drain(..) {
            self.record(change);
        }
        for effect in tell.drain(..) {
            self.log(effect);
            match self.connections[effect.client.0 as usize].protocol {
                Protocol::V1 => self.notify_v1(effect),
                Protocol::V2 { .. } => self.notify_v2(effect),
            }
            match effect.what {
                What::Expired => self.close_after_flush(effect.client, "it held for too long"),
                What::Superseded => {
                    self.close_after_flush(effect.client, "it has come again on another connection")
                }
                _ => {}
            }
        }
        (self.effects.record, self.effects.tell) = (record, tell);
    }

    /// Takes everything from a client that is gone or must go. It is closed at the end of the turn, after what it is
    /// still to be told.
    pub(super) fn close_after_flush(&mut self, client: ClientId, why: &str) {
        let connection = &mut self.connections[client.0 as usize];
        if connection.closing {
            return;
        }
        connection.closing = true;
        debug!("close: {}: {why}", self.name(client));
        self.mark_dirty(client);
        self.apply(|table, now, effects| table.gone(now, client, effects));
    }

    pub(super) fn mark_dirty(&mut self, client: ClientId) {
        let connection = &mut self.connections[client.0 as usize];
        if !std::mem::replace(&mut connection.dirty, true) {
            self.dirty.push(client);
        }
    }

    /// Records what has changed, then tells who is to be told.
    fn flush_turn(&mut self) {
        loop {
            self.contend();
            self.commit();
            if self.dirty.is_empty() {
                return;
            }
            // Those who turn out to be gone give up what they had. That must be recorded before anybody hears of it, so
            // it is not done on the way.
            for (client, why) in self.flush() {
                self.close_after_flush(client, why);
            }
        }
    }

    /// Sends what there is to send, and closes those that are closing. Returns those that can be sent nothing.
    fn flush(&mut self) -> Vec<(ClientId, &'static str)> {
        let mut gone = Vec::new();
        let mut dirty = std::mem::take(&mut self.dirty);
        for client in dirty.drain(..) {
            self.connections[client.0 as usize].dirty = false;
            self.continue_status(client);
            let connection = &mut self.connections[client.0 as usize];
            failpoint::hit("before-send");
            let sent = connection.send();
            failpoint::hit("after-send");
            if connection.closing {
                self.close(client);
                continue;
            }
            let more = matches!(connection.protocol, Protocol::V2 { status: Some(_) })
                || self.has_listing_ready(client);
            let connection = &mut self.connections[client.0 as usize];
            match sent {
                Sent::Gone => {
                    connection.output().clear();
                    gone.push((client, "it is gone"));
                }
                Sent::Part if connection.output().len() > OUTPUT_BYTES_MAX => {
                    gone.push((client, "it does not read what it is told"));
                }
                Sent::Part => self.watch_output(client, true),
                Sent::All => self.watch_output(client, more),
            }
        }
        self.dirty = dirty;
        gone
    }

    /// Sets whether the loop is to be told when the connection can be written to.
    fn watch_output(&mut self, client: ClientId, blocked: bool) {
        let connection = &mut self.connections[client.0 as usize];
        if connection.blocked == blocked {
            return;
        }
        connection.blocked = blocked;
        let output = if blocked { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
        let source = Source::Connection(client, connection.generation);
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN | output, source.pack());
        if let Err(e) = self.epoll.modify(&*connection, &mut event) {
            // What it is still to be told goes out with its next answer, or never.
            warn!("cannot watch {} for output: {e}", self.name(client));
        }
    }

    fn close(&mut self, client: ClientId) {
        // Closing takes it out of the epoll set too: nobody else has this open file (epoll(7), question 6).
        let connection = self.connections.remove(client.0 as usize);
        self.forget_listing(client);
        if connection.unfinished != Millis::NEVER {
            self.unfinished.remove(&(connection.unfinished, client));
        }
        if self.connections.is_empty() {
            self.idle_since = Some(self.now);
        }
        self.acceptor.closed(connection.peer(), &self.epoll);
    }
}

pub(super) fn millis(span: Duration) -> Millis {
    Millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}
