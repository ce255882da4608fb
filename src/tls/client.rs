//! The client's end: which daemons to trust, and a stream over a socket.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::pem::{authorities, bad, certificates, key};
use super::{Error, VERSIONS, error, provider};

const CA: &str = "--tls-ca";
const CERT: &str = "--tls-cert";
const KEY: &str = "--tls-key";

/// How often what a daemon has sent is read, in search of why it closed the connection.
const LAST_READS_MAX: usize = 64;

/// The PEM files of a client.
#[derive(Clone, Debug, Default)]
pub struct ClientFiles {
    /// The authorities that may have signed a daemon's certificate. `None`: those of the system.
    pub ca: Option<PathBuf>,
    /// A certificate to show to the daemon, and behind it those between it and the authority.
    pub cert: Option<PathBuf>,
    /// The key of that certificate.
    pub key: Option<PathBuf>,
}

impl ClientFiles {
    fn config(&self) -> Result<ClientConfig, Error> {
        let roots = match &self.ca {
            Some(path) => authorities(CA, path)?,
            None => system_authorities()?,
        };
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(VERSIONS)?;
        let builder = builder.with_root_certificates(roots);
        let mut config = match (&self.cert, &self.key) {
            (None, None) => builder.with_no_client_auth(),
            (Some(_), None) => return Err(Error::Missing { option: CERT, missing: KEY }),
            (None, Some(_)) => return Err(Error::Missing { option: KEY, missing: CERT }),
            (Some(cert), Some(path)) => {
                let built = builder.with_client_auth_cert(certificates(CERT, cert)?, key(KEY, path)?);
                built.map_err(|e| bad(KEY, path, error::describe(&e)))?
            }
        };
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }
}

fn system_authorities() -> Result<RootCertStore, Error> {
    let mut store = RootCertStore::empty();
    // Of many certificates, one that cannot be used is left out.
    store.add_parsable_certificates(super::system_certificates());
    if store.is_empty() { Err(Error::NoAuthorities) } else { Ok(store) }
}

/// A TLS connection of a client.
#[derive(Debug)]
pub struct ClientStream {
    fd: OwnedFd,
    tls: ClientConnection,
    /// Plaintext that came with the end of the handshake.
    early: Vec<u8>,
    /// The daemon has ended the stream, and nothing more counts.
    ended: bool,
}

impl ClientStream {
    /// Makes a connection secure: reads the files, and finishes the handshake with a daemon whose certificate is good for `host`, until
    /// `deadline` at the most.
    ///
    /// # Errors
    /// When a file cannot be used, the daemon cannot be trusted or does not trust, or the time is up.
    pub fn connect(
        fd: OwnedFd,
        files: &ClientFiles,
        host: &str,
        deadline: Instant,
    ) -> Result<ClientStream, Error> {
        let name = ServerName::try_from(host.to_owned()).map_err(|_| Error::BadHost(host.into()))?;
        let tls = ClientConnection::new(Arc::new(files.config()?), name)?;
        let mut stream = ClientStream { fd, tls, early: Vec::new(), ended: false };
        let mut early = Vec::new();
        while stream.tls.is_handshaking() {
            stream.flush(deadline)?;
            if !stream.tls.is_handshaking() {
                break;
            }
            wait_for(&stream.fd, PollFlags::POLLIN, deadline)?;
            if stream.try_read(&mut early)? == Some(0) {
                return Err(Error::Closed);
            }
            // A daemon may always have sent a little more.
            if stream.tls.is_handshaking() && deadline <= Instant::now() {
                return Err(Error::TimedOut);
            }
        }
        stream.flush(deadline)?;
        stream.early = early;
        Ok(stream)
    }

    /// Writes all of it, until `deadline` at the most.
    ///
    /// # Errors
    /// What the kernel gives, or what the daemon said before it closed the connection; [`Error::TimedOut`] when it does not read.
    pub fn write_all(&mut self, mut plaintext: &[u8], deadline: Instant) -> Result<(), Error> {
        while !plaintext.is_empty() {
            let taken = self.tls.writer().write(plaintext).map_err(Error::Io)?;
            plaintext = &plaintext[taken..];
            self.flush(deadline)?;
        }
        Ok(())
    }

    fn flush(&mut self, deadline: Instant) -> Result<(), Error> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut Socket(&self.fd)) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait_for(&self.fd, PollFlags::POLLOUT, deadline)?;
                }
                Err(error) => return Err(self.last_words(error)),
            }
        }
        Ok(())
    }

    /// Why the daemon takes nothing any more: it may have said so before.
    fn last_words(&mut self, error: io::Error) -> Error {
        for _ in 0..LAST_READS_MAX {
            match self.try_read(&mut Vec::new()) {
                Ok(Some(1..)) => {}
                Ok(None | Some(0)) | Err(Error::Io(_)) => break,
                Err(said) => return said,
            }
        }
        Error::Io(error)
    }

    /// Reads what has arrived, without waiting, and appends its plaintext to `plaintext`. Returns how many bytes were read, which
    /// may all be TLS's own: 0 at the end of the stream. `None`: nothing has arrived.
    ///
    /// # Errors
    /// When it is not TLS, or the kernel refuses.
    pub fn try_read(&mut self, plaintext: &mut Vec<u8>) -> Result<Option<usize>, Error> {
        if !self.early.is_empty() {
            let bytes = self.early.len();
            plaintext.append(&mut self.early);
            return Ok(Some(bytes));
        }
        if self.ended {
            return Ok(Some(0));
        }
        let mut buffer = [0; 16 * 1024];
        loop {
            match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Ok(Some(0)),
                Ok(bytes) => {
                    self.decrypt(&buffer[..bytes], plaintext)?;
                    return Ok(Some(bytes));
                }
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Ok(None),
                Err(e) => return Err(Error::Io(e.into())),
            }
        }
    }

    fn decrypt(&mut self, mut bytes: &[u8], plaintext: &mut Vec<u8>) -> Result<(), Error> {
        while !bytes.is_empty() && !self.ended {
            self.ended = self.tls.read_tls(&mut bytes).map_err(Error::Io)? == 0;
            let state = self.tls.process_new_packets().map_err(|error| {
                // The alert is for the daemon's log; whether it arrives changes nothing here.
                let _ = self.tls.write_tls(&mut Socket(&self.fd));
                Error::from(error)
            })?;
            let length = plaintext.len();
            plaintext.resize(length + state.plaintext_bytes_to_read(), 0);
            self.tls.reader().read_exact(&mut plaintext[length..]).map_err(Error::Io)?;
            self.ended |= state.peer_has_closed();
        }
        Ok(())
    }
}

impl AsFd for ClientStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Writes to a socket without waiting, and never dies of SIGPIPE.
struct Socket<'a>(&'a OwnedFd);

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn wait_for(fd: &OwnedFd, event: PollFlags, deadline: Instant) -> Result<(), Error> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, since poll(2) counts whole milliseconds, and would return too early.
        let millis = left.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
        let timeout = PollTimeout::try_from(millis).expect("it is from 0 to i32::MAX");
        match poll(&mut [PollFd::new(fd.as_fd(), event)], timeout) {
            Ok(0) if deadline <= Instant::now() => return Err(Error::TimedOut),
            Ok(0) | Err(nix::Error::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(e) => return Err(Error::Io(e.into())),
        }
    }
}
