//! All connections: which of them have output, which have sent only part of a message, which have requests that were
//! postponed, and how much memory all of that takes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::{Index, IndexMut};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use slab::Slab;

use super::connection::{Attached, Buffer, Connection, ConnectionId, Sent};
use crate::addr::Peer;
use crate::proto::v2::{self, Answer};
use crate::table::{ClientId, Timestamp};

/// How long the rest of a message may take to arrive, and how long a client that sends requests may take to read answers.
const CLIENT_WAIT: Duration = Duration::from_secs(10);
/// How much input of all clients the daemon keeps, in bytes: incomplete messages and postponed requests.
const INPUT_TOTAL_MAX: usize = 16 * 1024 * 1024;
/// How much output the daemon keeps for all clients that do not read, in bytes.
const OUTPUT_TOTAL_MAX: usize = 16 * 1024 * 1024;

/// The room for answers of protocol 2 that a connection begins with, while it has any to send.
const OUTPUT_BYTES: usize = 128;

#[derive(Default)]
pub(super) struct Connections {
    slab: Slab<Connection>,
    /// The connections to flush at the end of the turn.
    dirty: VecDeque<ClientId>,
    /// The connections whose postponed requests can be handled.
    postponed: VecDeque<ConnectionId>,
    /// When connections are closed that do not go on.
    deadlines: BTreeSet<(Timestamp, ClientId)>,
    /// The length of all `input`.
    input_total: usize,
    /// The length of the output that clients have left unread, and the sum of these.
    unread: BTreeMap<ClientId, usize>,
    unread_total: usize,
    /// Reused: an answer is written here first, so that the output of its connection grows once.
    answer: Vec<u8>,
    /// Descriptors to be sent, by client.
    attached: BTreeMap<ClientId, VecDeque<Attached>>,
    /// The descriptor that came with the requests that are being handled.
    pub(super) received: Option<OwnedFd>,
}

impl Connections {
    pub(super) fn insert(&mut self, connection: Connection) -> ClientId {
        let index = self.slab.insert(connection);
        ClientId(u32::try_from(index).expect("fewer connections than descriptors"))
    }

    pub(super) fn remove(&mut self, client: ClientId) -> Connection {
        self.set_deadline(client, Timestamp::NEVER);
        self.all_read(client);
        self.attached.remove(&client);
        let connection = self.slab.remove(client.0 as usize);
        self.input_total -= connection.unhandled.as_ref().map_or(0, |unhandled| unhandled.bytes.len());
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

    /// Returns `true` if there is such a client.
    pub(super) fn contains(&self, client: ClientId) -> bool {
        self.slab.contains(client.0 as usize)
    }

    /// Returns the client if this connection is still open.
    pub(super) fn find(&self, id: ConnectionId) -> Option<ClientId> {
        let connection = self.slab.get(id.client.0 as usize)?;
        (connection.generation == id.generation).then_some(id.client)
    }

    /// Appends an answer of protocol 2 to the client's output.
    pub(super) fn answer(&mut self, client: ClientId, answer: &Answer) {
        self.answer.clear();
        v2::encode_answer(answer, &mut self.answer);
        let output = self.slab[client.0 as usize].output();
        if output.is_empty() {
            // Two answers often go together.
            output.reserve(OUTPUT_BYTES);
        }
        output.extend_from_slice(&self.answer);
        self.mark_dirty(client);
    }

    /// Appends an answer of protocol 2, with which a descriptor goes.
    pub(super) fn answer_with(&mut self, client: ClientId, answer: &Answer, descriptor: Option<Rc<OwnedFd>>) {
        if let Some(descriptor) = descriptor {
            let at = self[client].output().len();
            self.attached.entry(client).or_default().push_back(Attached { at, descriptor });
        }
        self.answer(client, answer);
    }

    /// Takes back the output behind the first `length` bytes.
    pub(super) fn truncate_output(&mut self, client: ClientId, length: usize) {
        self[client].output().truncate(length);
        if let Some(attached) = self.attached.get_mut(&client) {
            attached.retain(|one| one.at < length);
        }
    }

    /// Sends as much of a client's output as the kernel takes, without waiting.
    pub(super) fn send(&mut self, client: ClientId) -> Sent {
        let Some(mut attached) = self.attached.remove(&client) else { return self[client].send() };
        let sent = self[client].send_with(&mut attached);
        if sent == Sent::Part && !attached.is_empty() {
            self.attached.insert(client, attached);
        }
        sent
    }

    /// Returns `true` if a client has left output unread that it will find when it reads.
    pub(super) fn has_unread(&self, client: ClientId) -> bool {
        self.unread.contains_key(&client)
    }

    /// Has the connection flushed at the end of the turn.
    pub(super) fn mark_dirty(&mut self, client: ClientId) {
        if !std::mem::replace(&mut self[client].dirty, true) {
            self.dirty.push_back(client);
        }
    }

    /// Returns the next connection to flush, and takes it from the list.
    pub(super) fn pop_dirty(&mut self) -> Option<ClientId> {
        let client = self.dirty.pop_front()?;
        self[client].dirty = false;
        Some(client)
    }

    /// Returns `true` if there is something to flush.
    pub(super) fn has_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Returns `true` if there is something to do without waiting for an event.
    pub(super) fn has_work(&self) -> bool {
        !self.dirty.is_empty() || !self.postponed.is_empty()
    }

    /// Keeps the beginning of a message until the rest arrives. The first piece sets the deadline for the whole message:
    /// pass the deadline that [`Connections::take_input`] returned with it, or [`Timestamp::NEVER`]. Returns `false` if that is
    /// too much.
    pub(super) fn buffer_partial(
        &mut self,
        client: ClientId,
        rest: &[u8],
        deadline: Timestamp,
        now: Timestamp,
    ) -> bool {
        let is_kept = self.buffer(client, rest);
        self.set_deadline(client, deadline.min(now.plus(CLIENT_WAIT)));
        is_kept
    }

    /// Keeps requests until the client has read the answers to those before them. Returns `false` if that is too much.
    pub(super) fn postpone(&mut self, client: ClientId, rest: &[u8], now: Timestamp) -> bool {
        self[client].postponed = true;
        self.mark_dirty(client);
        let is_kept = self.buffer(client, rest);
        self.set_deadline(client, now.plus(CLIENT_WAIT));
        is_kept
    }

    /// Keeps more input. Returns `false` if that is too much.
    pub(super) fn buffer(&mut self, client: ClientId, bytes: &[u8]) -> bool {
        self[client].unhandled.get_or_insert_default().bytes.extend_from_slice(bytes);
        self.input_total += bytes.len();
        self.input_total <= INPUT_TOTAL_MAX
    }

    /// Takes what was kept of the input, and the deadline for the rest of a message.
    pub(super) fn take_input(&mut self, client: ClientId) -> (Buffer, Timestamp) {
        let connection = &mut self[client];
        connection.postponed = false;
        let Some(earlier) = connection.unhandled.take() else { return (Buffer::new(), Timestamp::NEVER) };
        self.input_total -= earlier.bytes.len();
        self.deadlines.remove(&(earlier.deadline, client));
        (earlier.bytes, earlier.deadline)
    }

    /// The client has read everything so far. Its postponed requests can be handled.
    pub(super) fn all_read(&mut self, client: ClientId) {
        if let Some(unread) = self.unread.remove(&client) {
            self.unread_total -= unread;
        }
        if self[client].postponed && !self[client].closing {
            self.postponed.push_back(self.id(client));
        }
    }

    /// The client has left some output unread. Returns `false` if the daemon keeps too much for clients that do not read.
    pub(super) fn left_unread(&mut self, client: ClientId, now: Timestamp) -> bool {
        let bytes = self[client].output().len();
        let before = self.unread.insert(client, bytes).unwrap_or(0);
        self.unread_total = self.unread_total - before + bytes;
        if self[client].postponed {
            self.set_deadline(client, now.plus(CLIENT_WAIT));
        }
        self.unread_total <= OUTPUT_TOTAL_MAX
    }

    /// Returns how many connections have postponed requests that can be handled.
    pub(super) fn postponed(&self) -> usize {
        self.postponed.len()
    }

    /// Returns a connection whose postponed requests can be handled, and takes it from the list.
    pub(super) fn pop_postponed(&mut self) -> Option<ClientId> {
        while let Some(id) = self.postponed.pop_front() {
            if let Some(client) = self.find(id).filter(|&client| self[client].postponed) {
                return Some(client);
            }
        }
        None
    }

    /// When [`Connections::pop_overdue`] is next needed.
    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// Returns a client that has not sent the rest of its message, or not read its answers, in time; once.
    pub(super) fn pop_overdue(&mut self, now: Timestamp) -> Option<ClientId> {
        let &(deadline, client) = self.deadlines.first()?;
        (deadline <= now).then(|| self.set_deadline(client, Timestamp::NEVER))?;
        Some(client)
    }

    fn set_deadline(&mut self, client: ClientId, deadline: Timestamp) {
        let Some(unhandled) = &mut self[client].unhandled else { return };
        let old = std::mem::replace(&mut unhandled.deadline, deadline);
        if old != Timestamp::NEVER {
            self.deadlines.remove(&(old, client));
        }
        if deadline != Timestamp::NEVER {
            self.deadlines.insert((deadline, client));
        }
    }

    /// A client, for the log.
    pub(super) fn describe(&self, client: ClientId) -> String {
        match self.slab.get(client.0 as usize).and_then(|connection| connection.peer()) {
            Some(Peer { pid, uid: Peer::UNMAPPED }) => {
                format!("client {} (pid {pid}, a user without a uid here)", client.0)
            }
            Some(peer) => format!("client {} (pid {}, uid {})", client.0, peer.pid, peer.uid),
            None => match self.slab.get(client.0 as usize).and_then(Connection::name) {
                Some(name) => format!("client {} ({name:?})", client.0),
                None => format!("client {}", client.0),
            },
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
