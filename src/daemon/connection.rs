//! One client's connection: its descriptor, the part of a message that it has sent so far, and the output that it has
//! not yet read.
//!
//! A daemon may have many thousands of connections, most of them idle, so an idle connection is small: its buffers are
//! inline until they are needed, and are freed when they are empty.

use crate::proto::{Nonce, Pid};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, recv, send};
use smallvec::SmallVec;

use super::admission::Access;
use crate::addr::Peer;
use crate::proto::v2;
use crate::table::{ClientId, Timestamp};

/// Half a protocol 1 key, or the answer to one, fits in without an allocation.
pub(super) type Buffer = SmallVec<[u8; 16]>;

/// Names one connection for as long as the daemon runs. (A client number is reused as soon as its connection is closed.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConnectionId {
    pub(super) client: ClientId,
    /// From 1 to `u32::MAX / 2`.
    pub(super) generation: u32,
}

pub(super) struct Connection {
    fd: OwnedFd,
    /// Distinguishes this connection's events from those of an earlier connection with the same client number.
    pub(super) generation: u32,
    pub(super) protocol: Protocol,
    pub(super) access: Access,
    /// Its lock may be inherited by a command, whose descendants may keep this connection open.
    pub(super) inherits: bool,
    /// The nonce of the lock request that a command inherits. Each further request must show it: the command does not know
    /// it, and so cannot ask for anything with the rights of the user who connected.
    pub(super) guard: Option<Box<Nonce>>,
    /// It is in the list of connections that have output.
    pub(super) dirty: bool,
    /// What the loop is woken for.
    pub(super) interest: Interest,
    /// `input` holds whole requests, which are handled when the output was sent. Until then nothing is read.
    pub(super) postponed: bool,
    /// It holds nothing and waits for nothing any more. It is closed once `output` was sent, or cannot be sent.
    pub(super) closing: bool,
    /// `peer` is known, which it is on a Unix socket. (The two fields are not an `Option` because that would take four
    /// more bytes of each of very many connections. The same is true of `deadline`.)
    has_peer: bool,
    peer: Peer,
    /// The process that has inherited the lock from this client; 0 if no such process is known.
    pub(super) child: Option<Pid>,
    /// When it is closed unless the message that it has begun is complete by then, or, if its requests are postponed, unless
    /// it has read something by then; [`Timestamp::NEVER`] if there is no limit.
    pub(super) deadline: Timestamp,
    /// What was read and not handled: the beginning of a message whose end has not arrived yet, or postponed requests.
    pub(super) input: Buffer,
    output: Buffer,
}

/// The protocol of a connection. It begins with protocol 1, and a preamble switches it to protocol 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    V1,
    V2 {
        /// The table's cursor of the status that is being sent.
        status: Option<u32>,
    },
}

/// What the loop is woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    /// The client has sent something.
    Input,
    /// That, or the client has read what the kernel kept for it.
    Both,
    /// Only the latter: nothing is read until the client reads.
    Output,
}

/// What [`Connection::send`] achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    All,
    /// The client reads more slowly than it is written to.
    Part,
    /// The client has closed the connection.
    Gone,
}

impl Connection {
    pub(super) fn new(fd: OwnedFd, peer: Option<Peer>, generation: u32, access: Access) -> Connection {
        Connection {
            fd,
            generation,
            protocol: Protocol::V1,
            access,
            inherits: false,
            guard: None,
            dirty: false,
            interest: Interest::Input,
            postponed: false,
            closing: false,
            has_peer: peer.is_some(),
            peer: peer.unwrap_or(Peer { pid: 0, uid: 0 }),
            child: None,
            deadline: Timestamp::NEVER,
            input: Buffer::new(),
            output: Buffer::new(),
        }
    }

    /// Returns the process and user at the other end; `None` over TCP.
    pub(super) fn peer(&self) -> Option<Peer> {
        self.has_peer.then_some(self.peer)
    }

    /// Reads what has arrived, without waiting.
    pub(super) fn read(&self, buffer: &mut [u8]) -> nix::Result<usize> {
        recv(self.fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)
    }

    /// Returns `true` if `bytes` are the middle of a line that began earlier. Then there is nothing to decode, and a long
    /// line that arrives byte by byte is not searched from its beginning each time.
    pub(super) fn continues_line(&self, bytes: &[u8]) -> bool {
        matches!(self.protocol, Protocol::V2 { .. })
            && !self.postponed
            && !self.input.is_empty()
            && self.input.len() + bytes.len() < v2::FRAME_BYTES_MAX
            && memchr::memchr(b'\n', bytes).is_none()
    }

    /// The buffer that answers are appended to; the next [`Connection::send`] sends it.
    pub(super) fn output(&mut self) -> &mut Buffer {
        &mut self.output
    }

    /// Sends as much of the output as the kernel takes, without waiting.
    pub(super) fn send(&mut self) -> Sent {
        if self.output.is_empty() {
            return Sent::All;
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            match send(self.fd.as_raw_fd(), &self.output, flags) {
                Ok(bytes) if bytes == self.output.len() => {
                    self.output.clear();
                    self.output.shrink_to_fit();
                    return Sent::All;
                }
                Ok(bytes) => {
                    self.output.drain(..bytes);
                    return Sent::Part;
                }
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN | nix::Error::ENOBUFS | nix::Error::ENOMEM) => return Sent::Part,
                Err(_) => return Sent::Gone,
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
