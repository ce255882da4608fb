//! One client's connection: its descriptor, what it has sent so far of a message, and what it has not yet read.
//!
//! There may be many thousands, most of them idle, so an idle one is small: its buffers are inline until they are
//! needed, and given back when they are empty.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, recv, send};
use smallvec::SmallVec;

use crate::addr::Peer;
use crate::proto::v2;
use crate::table::Millis;

/// How much a client may leave unread before it is cut off: a whole frame, and then some.
pub(super) const OUTPUT_BYTES_MAX: usize = 2 * v2::FRAME_BYTES_MAX;

/// A key of protocol 1 that has half arrived, or the answer to one, fits in without allocation.
type Buffer = SmallVec<[u8; 16]>;

pub(super) struct Connection {
    fd: OwnedFd,
    /// Tells this connection's events from those of an older one with the same number.
    pub(super) generation: u32,
    pub(super) protocol: Protocol,
    /// It is in the list of those that have something to send.
    pub(super) dirty: bool,
    /// The kernel took only part of the output: the rest goes when the socket is writable.
    pub(super) blocked: bool,
    /// It has given up all it had, and is closed when what is in `output` was sent or cannot be.
    pub(super) closing: bool,
    /// On a Unix socket, so that it is known who it is. (The two are not an `Option`, which would take four bytes more, of
    /// each of very many connections. The same goes for `unfinished`.)
    has_peer: bool,
    peer: Peer,
    /// The process that has inherited the lock from this client; 0: none that is known.
    pub(super) child: u32,
    /// When it is cut off if the message that it has begun does not end; [`Millis::NEVER`] when it has begun none.
    pub(super) unfinished: Millis,
    /// The beginning of a message whose end has not arrived.
    pub(super) input: Buffer,
    output: Buffer,
}

/// What a connection speaks. It begins with protocol 1, and a preamble turns it to protocol 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    V1,
    V2 {
        /// Where the status that it is being sent stands in the table.
        status: Option<u32>,
    },
}

/// What became of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    All,
    /// The client reads more slowly than it is written to.
    Part,
    /// The client is gone.
    Gone,
}

impl Connection {
    pub(super) fn new(fd: OwnedFd, peer: Option<Peer>, generation: u32) -> Connection {
        Connection {
            fd,
            generation,
            protocol: Protocol::V1,
            dirty: false,
            blocked: false,
            closing: false,
            has_peer: peer.is_some(),
            peer: peer.unwrap_or(Peer { pid: 0, uid: 0 }),
            child: 0,
            unfinished: Millis::NEVER,
            input: Buffer::new(),
            output: Buffer::new(),
        }
    }

    /// Who it is; only on Unix sockets.
    pub(super) fn peer(&self) -> Option<Peer> {
        self.has_peer.then_some(self.peer)
    }

    /// Reads what is there, without waiting.
    pub(super) fn read(&self, buffer: &mut [u8]) -> nix::Result<usize> {
        recv(self.fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)
    }

    /// True when `bytes` are the middle of a line that began earlier: then there is nothing to decode, and whoever sends
    /// a long line byte by byte does not have it searched from its beginning each time.
    pub(super) fn continues_line(&self, bytes: &[u8]) -> bool {
        matches!(self.protocol, Protocol::V2 { .. })
            && !self.input.is_empty()
            && self.input.len() + bytes.len() < v2::FRAME_BYTES_MAX
            && memchr::memchr(b'\n', bytes).is_none()
    }

    /// Where answers are written; they leave with the next [`Connection::send`].
    pub(super) fn output(&mut self) -> &mut Buffer {
        &mut self.output
    }

    /// Sends what the kernel takes of the output, without waiting.
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
