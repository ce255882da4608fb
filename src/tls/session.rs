//! One client's TLS session in the daemon, without its socket: bytes from the network in, plaintext out, and the other way
//! round. Each buffer is bounded.

use std::io::{self, Read, Write};
use std::sync::Arc;

use rustls::{ServerConfig, ServerConnection};

use super::{Error, names};

/// How much a client may send before the handshake is over, in bytes. A chain of certificates fits in.
pub const HANDSHAKE_BYTES_MAX: usize = 64 * 1024;
/// How much plaintext is encrypted before what it makes is written: one record.
const RECORD_BYTES: usize = 16 * 1024;

/// The daemon's end of a TLS connection.
#[derive(Debug)]
pub struct ServerSession {
    tls: ServerConnection,
    /// What the client may yet send before the handshake is over.
    handshake_bytes_left: usize,
}

/// Returns `true` if these may be the first bytes of a TLS stream: a record of the handshake (RFC 8446, 5.1).
pub fn is_hello(bytes: &[u8]) -> bool {
    bytes.first() == Some(&0x16)
}

/// What has become of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// It goes on.
    Open,
    /// The client has ended it in good order.
    Ended,
}

impl ServerSession {
    pub(super) fn new(config: Arc<ServerConfig>) -> Result<ServerSession, Error> {
        Ok(ServerSession { tls: ServerConnection::new(config)?, handshake_bytes_left: HANDSHAKE_BYTES_MAX })
    }

    /// Takes what has arrived, and appends the plaintext in it, which is never longer, to `plaintext`.
    ///
    /// # Errors
    /// When it is not TLS, or not to be trusted. The connection is to be closed, after the alert that is to be written.
    pub fn receive(&mut self, mut bytes: &[u8], plaintext: &mut Vec<u8>) -> Result<Stream, Error> {
        if self.is_handshaking() {
            let left = self.handshake_bytes_left.checked_sub(bytes.len());
            self.handshake_bytes_left =
                left.ok_or_else(|| Error::Protocol("its handshake is too long".into()))?;
        }
        while !bytes.is_empty() {
            // rustls reads no more after the client has ended the stream.
            if self.tls.read_tls(&mut bytes).map_err(Error::Io)? == 0 {
                return Ok(Stream::Ended);
            }
            let state = self.tls.process_new_packets()?;
            let length = plaintext.len();
            plaintext.resize(length + state.plaintext_bytes_to_read(), 0);
            self.tls.reader().read_exact(&mut plaintext[length..]).map_err(Error::Io)?;
            if state.peer_has_closed() {
                return Ok(Stream::Ended);
            }
        }
        Ok(Stream::Open)
    }

    /// Returns `true` if anything has arrived.
    pub fn has_begun(&self) -> bool {
        self.handshake_bytes_left < HANDSHAKE_BYTES_MAX
    }

    /// Returns `true` until both ends have finished the handshake. Nothing that a client sends before that means anything.
    pub fn is_handshaking(&self) -> bool {
        self.tls.is_handshaking()
    }

    /// Returns the names in the client's certificate, the best first. `None`: it has shown none.
    pub fn names(&self) -> Option<Vec<String>> {
        let certificate = self.tls.peer_certificates()?.first()?;
        Some(names::of_certificate(certificate))
    }

    /// Returns `true` while there is something to write.
    pub fn wants_write(&self) -> bool {
        self.tls.wants_write()
    }

    /// Writes what the session has to say for itself: handshake, alerts, and what was encrypted before.
    ///
    /// # Errors
    /// What `writer` gives: of the kind `WouldBlock` when it takes no more at the moment.
    pub fn flush(&mut self, writer: &mut dyn Write) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(writer)?;
        }
        Ok(())
    }

    /// Encrypts from the front of `plaintext` and writes it. Returns how much of it was taken: where that is less than all, the writer
    /// takes no more at the moment. Until the handshake is over, nothing of it is.
    ///
    /// # Errors
    /// What `writer` gives.
    pub fn send(&mut self, plaintext: &[u8], writer: &mut dyn Write) -> io::Result<usize> {
        let mut taken = 0;
        loop {
            match self.flush(writer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(taken),
                other => other?,
            }
            if taken == plaintext.len() || self.is_handshaking() {
                return Ok(taken);
            }
            let record = &plaintext[taken..(taken + RECORD_BYTES).min(plaintext.len())];
            taken += self.tls.writer().write(record)?;
        }
    }

    /// Ends the stream in good order, with the next [`ServerSession::flush`].
    pub fn end(&mut self) {
        self.tls.send_close_notify();
    }
}
