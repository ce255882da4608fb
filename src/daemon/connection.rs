//! One client's connection: its descriptor, the part of a message that it has sent so far, and the output that it has
//! not yet read.
//!
//! A daemon may have many thousands of connections, most of them idle, so an idle connection is small: its buffers are
//! inline until they are needed, and are freed when they are empty.

use std::collections::VecDeque;
#[cfg(feature = "tls")]
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

use nix::sys::socket::{MsgFlags, recv, send};
use smallvec::SmallVec;

use super::admission::{Access, is_administrator};
use super::identity::{Identity, Standing};
use super::named::{self, Named};
use crate::addr::Peer;
use crate::passing;
use crate::proto::v2::Share;
use crate::proto::{Nonce, Pid, Protocol, v2};
use crate::table::{ClientId, Timestamp};
#[cfg(feature = "tls")]
use crate::tls::ServerSession;

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
    /// It begins with protocol 1, and a preamble switches it to protocol 2.
    protocol: Protocol,
    pub(super) access: Access,
    /// Its lock may be inherited by a command, whose descendants may keep this connection open.
    pub(super) inherits: bool,
    /// Its user is root or the daemon's own.
    is_administrator: bool,
    /// What few connections have.
    extra: Option<Box<Extra>>,
    /// Its request shares the result of a run.
    pub(super) share: Option<Share>,
    /// It comes through a forwarder, such as sshd: the client may be on another machine, and the end of the stream says nothing
    /// of it.
    pub(super) forwarded: bool,
    /// It is in the list of connections that have output.
    pub(super) dirty: bool,
    /// What the loop is woken for.
    pub(super) interest: Interest,
    /// `unhandled` holds whole requests, which are handled when the output was sent. Until then nothing is read.
    pub(super) postponed: bool,
    /// Its next request is handled when the daemon has looked up a user. Until then nothing is read.
    pub(super) awaits_user: bool,
    /// It holds nothing and waits for nothing any more. It is closed once `output` was sent, or cannot be sent.
    pub(super) closing: bool,
    /// `peer` is known, which it is on a Unix socket. (The two fields are not an `Option` because that would take four
    /// more bytes of each of very many connections.)
    has_peer: bool,
    peer: Peer,
    /// It is read with recvmsg(2), for the descriptors that may come.
    takes_descriptors: bool,
    /// What was read and not handled.
    pub(super) unhandled: Option<Box<Unhandled>>,
    output: Buffer,
}

/// What was read and not handled: the beginning of a message whose end has not arrived yet, or postponed requests.
pub(super) struct Unhandled {
    pub(super) bytes: Buffer,
    /// When the connection is closed unless the message is complete by then, or, if its requests are postponed, unless the client has
    /// read something by then; [`Timestamp::NEVER`] if there is no limit.
    pub(super) deadline: Timestamp,
}

impl Default for Unhandled {
    fn default() -> Unhandled {
        Unhandled { bytes: Buffer::new(), deadline: Timestamp::NEVER }
    }
}

/// What only few connections have at a time: one over TCP, one whose lock a command inherits, or is taken for another process, or
/// was resumed, and one that is being sent a status.
#[derive(Default)]
struct Extra {
    /// Who a client over TCP is, where that matters.
    identity: Option<Box<Identity>>,
    /// The nonce of the lock request that a command inherits. Each further request must show it: the command does not know
    /// it, and so cannot ask for anything with the rights of the user who connected.
    guard: Option<Nonce>,
    /// The process that keeps the lock when the client is gone.
    child: Option<Named>,
    /// The descriptor that has arrived with a request that is handled later.
    received: Option<OwnedFd>,
    /// When the hold that the client has resumed was first recorded. Any other hold was recorded when it was granted.
    recorded: Option<Timestamp>,
    /// The table's cursor of the status that is being sent.
    status: Option<u32>,
}

impl Extra {
    #[cfg(feature = "tls")]
    fn tls(&mut self) -> Option<&mut ServerSession> {
        self.identity.as_mut()?.tls.as_mut()
    }
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
    /// Neither: nothing is read until the daemon knows who the client is.
    Nothing,
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
            is_administrator: peer.is_some_and(|peer| is_administrator(peer.uid)),
            forwarded: false,
            extra: None,
            share: None,
            dirty: false,
            interest: Interest::Input,
            postponed: false,
            awaits_user: false,
            closing: false,
            has_peer: peer.is_some(),
            peer: peer.unwrap_or(Peer { pid: 0, uid: 0 }),
            takes_descriptors: peer.is_some(),
            unhandled: None,
            output: Buffer::new(),
        }
    }

    pub(super) fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The client has sent the preamble.
    pub(super) fn begin_v2(&mut self) {
        self.protocol = Protocol::V2;
        self.takes_descriptors = self.has_peer;
    }

    /// The client has locked by protocol 1, and so passes no descriptor. If it does so nevertheless, the kernel closes that within
    /// recv(2), which may take as long as the client likes ([`named::read`]): only an administrator, who can stop the daemon
    /// anyway, is read so.
    pub(super) fn speaks_v1(&mut self) {
        self.takes_descriptors &= !self.is_administrator;
    }

    /// Returns the process and user at the other end; `None` over TCP.
    pub(super) fn peer(&self) -> Option<Peer> {
        self.has_peer.then_some(self.peer)
    }

    /// Returns `true` if the client may be on another machine.
    pub(super) fn is_remote(&self) -> bool {
        !self.has_peer || self.forwarded
    }

    /// Returns the process at the other end, if that is the client.
    pub(super) fn process(&self) -> Option<Pid> {
        self.peer().filter(|_| !self.forwarded).and_then(|peer| Pid::new(peer.pid))
    }

    /// Returns the user at the other end. `None`: over TCP, and for a user who has no number in this user namespace, and so could be
    /// any.
    pub(super) fn uid(&self) -> Option<u32> {
        self.peer().map(|peer| peer.uid).filter(|uid| *uid != Peer::UNMAPPED)
    }

    /// Returns the process that keeps the lock when this client is gone, if one is known.
    pub(super) fn child(&self) -> Option<&Named> {
        self.extra.as_ref()?.child.as_ref()
    }

    /// Notes that process, and returns the one before.
    pub(super) fn set_child(&mut self, child: Option<Named>) -> Option<Named> {
        match (&mut self.extra, child) {
            (None, None) => None,
            (_, child) => std::mem::replace(&mut self.extra.get_or_insert_default().child, child),
        }
    }

    /// Returns the nonce that each request must show, if a command has inherited this connection.
    pub(super) fn guard(&self) -> Option<Nonce> {
        self.extra.as_ref()?.guard
    }

    pub(super) fn set_guard(&mut self, guard: Option<Nonce>) {
        if self.extra.is_some() || guard.is_some() {
            self.extra.get_or_insert_default().guard = guard;
        }
    }

    /// Keeps the descriptor that has arrived with a request that is handled later.
    pub(super) fn keep_received(&mut self, descriptor: Option<OwnedFd>) {
        if descriptor.is_some() {
            self.extra.get_or_insert_default().received = descriptor;
        }
    }

    /// Takes it.
    pub(super) fn take_received(&mut self) -> Option<OwnedFd> {
        self.extra.as_mut()?.received.take()
    }

    /// Returns when the hold that the client has resumed was first recorded.
    pub(super) fn recorded(&self) -> Option<Timestamp> {
        self.extra.as_ref()?.recorded
    }

    /// `None`: the client has not resumed what it holds.
    pub(super) fn set_recorded(&mut self, recorded: Option<Timestamp>) {
        if self.extra.is_some() || recorded.is_some() {
            self.extra.get_or_insert_default().recorded = recorded;
        }
    }

    /// Returns the table's cursor of the status that is being sent.
    pub(super) fn status(&self) -> Option<u32> {
        self.extra.as_ref()?.status
    }

    /// `None`: the status is complete.
    pub(super) fn set_status(&mut self, status: Option<u32>) {
        if self.extra.is_some() || status.is_some() {
            self.extra.get_or_insert_default().status = status;
        }
    }

    /// Returns who a client over TCP is, where that matters.
    pub(super) fn identity(&self) -> Option<&Identity> {
        self.extra.as_ref()?.identity.as_deref()
    }

    /// The same, to change it.
    pub(super) fn identity_mut(&mut self) -> Option<&mut Identity> {
        self.extra.as_mut()?.identity.as_deref_mut()
    }

    pub(super) fn set_identity(&mut self, identity: Option<Box<Identity>>) {
        if identity.is_some() {
            self.extra.get_or_insert_default().identity = identity;
        }
    }

    /// Returns the name that a client over TCP has shown to be its own.
    pub(super) fn name(&self) -> Option<&str> {
        self.identity()?.name()
    }

    /// Returns `true` if the client speaks TLS.
    #[cfg(feature = "tls")]
    pub(super) fn is_tls(&self) -> bool {
        self.identity().is_some_and(|identity| identity.tls.is_some())
    }

    /// Returns `true` if its TLS session has something to send.
    #[cfg(feature = "tls")]
    pub(super) fn wants_write(&self) -> bool {
        let tls = self.identity().and_then(|identity| identity.tls.as_ref());
        tls.is_some_and(ServerSession::wants_write)
    }

    /// Returns `true` if nothing is to be read for now.
    pub(super) fn is_paused(&self) -> bool {
        self.awaits_user || self.identity().is_some_and(|identity| identity.standing == Standing::Verifying)
    }

    /// Reads what has arrived, without waiting, and the descriptor that came with it: of a process, or of the output of its command.
    pub(super) fn read(&self, buffer: &mut [u8]) -> nix::Result<(usize, Option<OwnedFd>)> {
        match self.takes_descriptors {
            true => named::read(self.fd.as_fd(), buffer, self.share.is_some()),
            false => Ok((recv(self.fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)?, None)),
        }
    }

    /// Returns `true` if descriptors can be passed to the client, and it may pass one: the output of its command.
    pub(super) fn passes_descriptors(&self) -> bool {
        self.has_peer && self.share.is_some()
    }

    /// Returns `true` if `bytes` are the middle of a line that began earlier. Then there is nothing to decode, and a long
    /// line that arrives byte by byte is not searched from its beginning each time.
    pub(super) fn continues_line(&self, bytes: &[u8]) -> bool {
        let Some(unhandled) = self.unhandled.as_ref().filter(|_| self.protocol == Protocol::V2) else {
            return false;
        };
        !self.postponed
            && unhandled.bytes.len() + bytes.len() < v2::FRAME_BYTES_MAX
            && memchr::memchr(b'\n', bytes).is_none()
    }

    /// The buffer that answers are appended to; the next [`Connection::send`] sends it.
    pub(super) fn output(&mut self) -> &mut Buffer {
        &mut self.output
    }

    /// Ends the stream in good order, as far as the kernel takes that without waiting.
    pub(super) fn end(&mut self) {
        #[cfg(feature = "tls")]
        if let Some(tls) = self.extra.as_deref_mut().and_then(Extra::tls) {
            tls.end();
            // If the kernel takes no more, the client sees the connection end without that.
            let _ = tls.flush(&mut Socket(&self.fd));
        }
    }

    /// Sends as much of the output as the kernel takes, without waiting.
    pub(super) fn send(&mut self) -> Sent {
        #[cfg(feature = "tls")]
        if let Some(tls) = self.extra.as_deref_mut().and_then(Extra::tls) {
            return send_encrypted(tls, &self.fd, &mut self.output);
        }
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

    /// The same while there are descriptors to be sent: each with the byte at its place in the output.
    pub(super) fn send_with(&mut self, attached: &mut VecDeque<Attached>) -> Sent {
        while let Some(first) = attached.front() {
            let until = attached.iter().map(|next| next.at).find(|&at| at > 0).unwrap_or(self.output.len());
            let bytes = &self.output[..until.min(self.output.len())];
            if bytes.is_empty() {
                break;
            }
            let is_due = first.at == 0;
            let sent = match is_due {
                true => passing::send(&self.fd, bytes, first.descriptor.as_fd()),
                false => send(self.fd.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL),
            };
            match sent {
                Ok(sent) => {
                    if is_due {
                        attached.pop_front();
                    }
                    self.output.drain(..sent);
                    attached.iter_mut().for_each(|next| next.at -= sent);
                }
                // The kernel has too many descriptors on their way: the client is told that its own did not arrive.
                Err(nix::Error::ETOOMANYREFS) => drop(attached.pop_front()),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN | nix::Error::ENOBUFS | nix::Error::ENOMEM) => return Sent::Part,
                Err(_) => return Sent::Gone,
            }
        }
        attached.clear();
        self.send()
    }
}

/// A descriptor to be sent to a client.
pub(super) struct Attached {
    /// The place in the output of the byte that it goes with.
    pub(super) at: usize,
    pub(super) descriptor: Rc<OwnedFd>,
}

#[cfg(feature = "tls")]
fn send_encrypted(tls: &mut ServerSession, fd: &OwnedFd, output: &mut Buffer) -> Sent {
    match tls.send(output, &mut Socket(fd)) {
        Ok(taken) => {
            output.drain(..taken);
            if !output.is_empty() || tls.wants_write() {
                return Sent::Part;
            }
            output.shrink_to_fit();
            Sent::All
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Sent::Part,
        Err(_) => Sent::Gone,
    }
}

/// Writes to a socket without waiting.
#[cfg(feature = "tls")]
struct Socket<'a>(&'a OwnedFd);

#[cfg(feature = "tls")]
impl io::Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            // The kernel is short of memory for a moment.
            Err(nix::Error::ENOBUFS | nix::Error::ENOMEM) => Err(io::ErrorKind::WouldBlock.into()),
            other => Ok(other?),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_connection_is_small() {
        assert!(size_of::<Connection>() <= 72, "{} bytes", size_of::<Connection>());
    }
}
