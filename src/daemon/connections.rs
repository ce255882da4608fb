//! All connections: which of them have output, and which have sent only part of a message.

use std::collections::BTreeSet;
use std::ops::{Index, IndexMut};

use slab::Slab;

use super::connection::{Buffer, Connection, ConnectionId};
use crate::proto::v2::{self, Answer};
use crate::table::{ClientId, Timestamp};

/// How long the rest of a message may take to arrive.
const MESSAGE_WAIT: Timestamp = Timestamp(10_000);

#[derive(Default)]
pub(super) struct Connections {
    slab: Slab<Connection>,
    /// The connections to flush at the end of the turn.
    dirty: Vec<ClientId>,
    /// When connections with part of a message are closed.
    unfinished: BTreeSet<(Timestamp, ClientId)>,
}

impl Connections {
    pub(super) fn insert(&mut self, connection: Connection) -> ClientId {
        let index = self.slab.insert(connection);
        ClientId(u32::try_from(index).expect("fewer connections than descriptors"))
    }

    pub(super) fn remove(&mut self, client: ClientId) -> Connection {
        let connection = self.slab.remove(client.0 as usize);
        if connection.unfinished != Timestamp::NEVER {
            self.unfinished.remove(&(connection.unfinished, client));
        }
        connection
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slab.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.slab.len()
    }

    pub(super) fn id(&self, client: ClientId) -> ConnectionId {
        ConnectionId { client, generation: self[client].generation }
    }

    /// Returns the client if this connection is still open.
    pub(super) fn find(&self, id: ConnectionId) -> Option<ClientId> {
        let connection = self.slab.get(id.client.0 as usize)?;
        (connection.generation == id.generation).then_some(id.client)
    }

    /// Appends an answer of protocol 2 to the client's output.
    pub(super) fn answer(&mut self, client: ClientId, answer: &Answer) {
        v2::encode(answer, self[client].output());
        self.mark_dirty(client);
    }

    /// Has the connection flushed at the end of the turn.
    pub(super) fn mark_dirty(&mut self, client: ClientId) {
        if !std::mem::replace(&mut self[client].dirty, true) {
            self.dirty.push(client);
        }
    }

    pub(super) fn has_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Takes the list of dirty connections. Give it back with [`Connections::reuse`], so that it is not allocated anew
    /// each turn.
    pub(super) fn take_dirty(&mut self) -> Vec<ClientId> {
        std::mem::take(&mut self.dirty)
    }

    pub(super) fn reuse(&mut self, empty: Vec<ClientId>) {
        if self.dirty.is_empty() {
            self.dirty = empty;
        }
    }

    /// Keeps the beginning of a message until the rest arrives. The first piece sets the deadline for the whole message:
    /// pass the `deadline` that [`Connections::take_partial`] returned with it, or [`Timestamp::NEVER`].
    pub(super) fn buffer_partial(
        &mut self,
        client: ClientId,
        rest: &[u8],
        deadline: Timestamp,
        now: Timestamp,
    ) {
        let connection = &mut self[client];
        connection.input.extend_from_slice(rest);
        let deadline = deadline.min(now.plus(MESSAGE_WAIT));
        connection.unfinished = deadline;
        self.unfinished.insert((deadline, client));
    }

    /// Takes the beginning of a message that has been kept, and its deadline.
    pub(super) fn take_partial(&mut self, client: ClientId) -> (Buffer, Timestamp) {
        let connection = &mut self[client];
        let earlier = std::mem::take(&mut connection.input);
        let deadline = std::mem::replace(&mut connection.unfinished, Timestamp::NEVER);
        if deadline != Timestamp::NEVER {
            self.unfinished.remove(&(deadline, client));
        }
        (earlier, deadline)
    }

    /// When [`Connections::pop_overdue`] is next needed.
    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        self.unfinished.first().map(|&(deadline, _)| deadline)
    }

    /// Returns a client whose message has not arrived whole in time, once.
    pub(super) fn pop_overdue(&mut self, now: Timestamp) -> Option<ClientId> {
        let overdue = self.unfinished.first().is_some_and(|&(deadline, _)| deadline <= now);
        let (_, client) = overdue.then(|| self.unfinished.pop_first())??;
        Some(client)
    }

    /// A client, for the log.
    pub(super) fn describe(&self, client: ClientId) -> String {
        match self.slab.get(client.0 as usize).and_then(|connection| connection.peer()) {
            Some(peer) => format!("client {} (pid {}, uid {})", client.0, peer.pid, peer.uid),
            None => format!("client {}", client.0),
        }
    }
}

impl Index<ClientId> for Connections {
    type Output = Connection;
    fn index(&self, client: ClientId) -> &Connection {
        &self.slab[client.0 as usize]
    }
}

impl IndexMut<ClientId> for Connections {
    fn index_mut(&mut self, client: ClientId) -> &mut Connection {
        &mut self.slab[client.0 as usize]
    }
}
