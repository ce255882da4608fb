//! What clients send: accepting them, reading from them, and handling their requests as far as each of them may in one turn.

use std::io;

use ::log::{debug, warn};
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{Server, TURN_MAX};
use crate::daemon::admission::{ANSWERED_MAX, Access};
use crate::daemon::connection::ConnectionId;
use crate::daemon::log;
use crate::daemon::source::Source;
use crate::proto::Protocol;
use crate::table::{ClientId, Timestamp};

/// How many requests of one connection are handled before the other connections have their turn.
const REQUESTS_AT_ONCE_MAX: usize = 64;
/// The same, in bytes of answers: a connection that has so much to read is not answered any more requests until then.
const ANSWERS_AT_ONCE_BYTES: usize = 8 * 1024;
/// How many requests of one connection are handled even if the turn takes long, so that most clients are answered with one
/// write on a busy machine, too.
const REQUESTS_AT_ONCE_MIN: usize = 8;
/// How many connections a listener accepts before the other sources get their turn.
const ACCEPTS_MAX: usize = 64;
/// How often a connection is read that cannot be sent anything any more. A client sends little before it closes.
const READS_OF_REST_MAX: usize = 16;
/// Why a connection is closed whose requests the daemon cannot keep.
const INPUT_FULL: &str = "input buffers full";

impl Server {
    pub(super) fn accept(&mut self, index: usize, buffer: &mut [u8]) -> io::Result<()> {
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

    pub(super) fn register(&mut self, client: ClientId, buffer: &mut [u8]) {
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

    pub(super) fn connection_ready(&mut self, id: ConnectionId, events: EpollFlags, buffer: &mut [u8]) {
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

    pub(super) fn read(&mut self, client: ClientId, buffer: &mut [u8]) {
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
    pub(super) fn read_rest(&mut self, client: ClientId) {
        let mut buffer = [0; 4096];
        for _ in 0..READS_OF_REST_MAX {
            let connection = &self.connections[client];
            if connection.is_remote() || connection.postponed || connection.closing {
                return;
            }
            self.read(client, &mut buffer);
        }
    }

    pub(super) fn received(&mut self, client: ClientId, bytes: &[u8]) {
        let connection = &mut self.connections[client];
        if connection.continues_line(bytes) {
            if !self.connections.buffer(client, bytes) {
                self.close_after_flush(client, INPUT_FULL);
            }
            return;
        }
        if connection.unhandled.is_none() {
            return self.handle_requests(client, bytes, Timestamp::NEVER);
        }
        let (mut input, deadline) = self.connections.take_input(client);
        input.extend_from_slice(bytes);
        self.handle_requests(client, &input, deadline);
    }

    /// Continues with requests that were postponed: each connection once, and at least one of them in each turn.
    pub(super) fn handle_postponed(&mut self) {
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
    pub(super) fn handle_requests(&mut self, client: ClientId, input: &[u8], mut deadline: Timestamp) {
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
            let taken = match self.connections[client].protocol() {
                Protocol::V1 => self.received_v1(client, &mut rest),
                Protocol::V2 => self.received_v2(client, &mut rest),
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
}
