//! The end of a turn: first the journal is written, then the output is sent, then connections are closed.

use std::time::Duration;

use ::log::{debug, warn};
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{Server, v2};
use crate::daemon::connection::{Interest, Sent};
use crate::daemon::lookup::Lookup;
use crate::daemon::named::Named;
use crate::daemon::recorder::Grant;
use crate::daemon::source::Source;
use crate::daemon::{failpoint, log};
use crate::proto::Protocol;
use crate::table::ClientId;

/// How long a turn may take until it stops sending.
pub(super) const FLUSH_MAX: Duration = Duration::from_millis(10);
/// Reading the clock takes a while, compared with sending a few bytes.
const SENDS_BETWEEN_CLOCKS: usize = 16;

impl Server {
    /// Records what has changed in this turn, then sends the output; what there is no time for is left to the next turn.
    pub(super) fn flush_turn(&mut self) {
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
    pub(super) fn commit(&mut self) {
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
        let protocol = connection.protocol();
        self.connections.truncate_output(grant.client, grant.output_before);
        if protocol == Protocol::V2 {
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

    /// Releases everything of a client that has gone or must go. Its connection is closed at the end of the turn, after
    /// its output.
    pub(super) fn close_after_flush(&mut self, client: ClientId, why: &str) {
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
        if let Some(identity) = connection.identity_mut() {
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
