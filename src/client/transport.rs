//! The stream under a connection: a socket, or TLS over one.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};

use super::{Error, Target};
#[cfg(feature = "tls")]
use crate::addr::Addr;
use crate::passing;
#[cfg(feature = "tls")]
use crate::tls::ClientStream;

/// How much is read at a time.
const READ_BYTES: usize = 4096;
/// How long a TLS handshake may take, if the caller sets no deadline.
#[cfg(feature = "tls")]
const HANDSHAKE_WAIT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) enum Transport {
    Plain(OwnedFd),
    #[cfg(feature = "tls")]
    Tls(Box<ClientStream>),
}

impl Transport {
    /// Begins the stream that the target's address asks for, on a socket that is connected to it.
    pub(super) fn begin(target: &Target, fd: OwnedFd, deadline: Option<Instant>) -> Result<Transport, Error> {
        #[cfg(feature = "tls")]
        if let Addr::Tls { host, .. } = &target.addr {
            let limit = Instant::now() + HANDSHAKE_WAIT;
            let stream =
                ClientStream::connect(fd, &target.tls, host, deadline.map_or(limit, |d| d.min(limit)));
            let stream = stream.map_err(|error| match error {
                crate::tls::Error::TimedOut if deadline.is_some_and(|d| d <= limit) => Error::TimedOut,
                error => Error::Tls { addr: target.addr.clone(), error },
            })?;
            return Ok(Transport::Tls(Box::new(stream)));
        }
        let _ = (target, deadline);
        Ok(Transport::Plain(fd))
    }

    /// Writes all of it. `wait`: how long the daemon may take to make room.
    ///
    /// # Errors
    /// [`Error::Closed`] when the daemon is gone, [`Error::Silent`] when it does not read.
    pub(super) fn write_all(&mut self, mut bytes: &[u8], wait: Duration) -> Result<(), Error> {
        match self {
            Transport::Plain(fd) => {
                while !bytes.is_empty() {
                    match send(fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
                        Ok(sent) => bytes = &bytes[sent..],
                        Err(nix::Error::EINTR) => {}
                        Err(nix::Error::EAGAIN) => {
                            wait_for(&*fd, PollFlags::POLLOUT, Some(Instant::now() + wait))
                                .map_err(silent)?;
                        }
                        Err(e) => return Err(closed_or("write to the daemon", e)),
                    }
                }
                Ok(())
            }
            #[cfg(feature = "tls")]
            Transport::Tls(stream) => match stream.write_all(bytes, Instant::now() + wait) {
                Err(crate::tls::Error::TimedOut) => Err(Error::Silent),
                other => other.map_err(tls_error),
            },
        }
    }

    /// Writes all of it, and passes a descriptor with the first byte. Without a Unix socket there is none to pass it through.
    ///
    /// # Errors
    /// [`Error::Closed`] when the daemon is gone.
    pub(super) fn write_with(
        &mut self,
        bytes: &[u8],
        descriptor: BorrowedFd<'_>,
        wait: Duration,
    ) -> Result<(), Error> {
        let sent = match self {
            Transport::Plain(fd) => loop {
                match passing::send(&*fd, bytes, descriptor) {
                    Err(nix::Error::EINTR) => {}
                    Err(nix::Error::EAGAIN) => {
                        wait_for(&*fd, PollFlags::POLLOUT, Some(Instant::now() + wait)).map_err(silent)?;
                    }
                    other => break other.map_err(|e| closed_or("write to the daemon", e))?,
                }
            },
            #[cfg(feature = "tls")]
            Transport::Tls(_) => 0,
        };
        self.write_all(&bytes[sent..], wait)
    }

    /// Appends what has arrived to `input`, without waiting. Returns `false` if nothing has arrived. (With TLS, what arrives may
    /// be part of a record, which adds nothing yet.)
    ///
    /// # Errors
    /// [`Error::Closed`] when the daemon is gone.
    pub(super) fn try_read(&mut self, input: &mut Input) -> Result<bool, Error> {
        match self {
            Transport::Plain(fd) => receive(fd, input, false),
            #[cfg(feature = "tls")]
            Transport::Tls(stream) => match stream.try_read(&mut input.bytes).map_err(tls_error)? {
                None => Ok(false),
                Some(0) => Err(Error::Closed),
                Some(_) => Ok(true),
            },
        }
    }

    /// Appends what arrives to `input`, at most until `deadline`.
    ///
    /// # Errors
    /// [`Error::TimedOut`] at the deadline, [`Error::Closed`] when the daemon is gone.
    pub(super) fn read(&mut self, input: &mut Input, deadline: Option<Instant>) -> Result<(), Error> {
        // Without a deadline, one system call does both.
        if let (Transport::Plain(fd), None) = (&self, deadline) {
            return receive(fd, input, true).map(|_| ());
        }
        loop {
            self.wait_readable(deadline)?;
            if self.try_read(input)? {
                return Ok(());
            }
        }
    }

    /// Waits until something has arrived, at most until `deadline`.
    pub(super) fn wait_readable(&self, deadline: Option<Instant>) -> Result<(), Error> {
        wait_for(self, PollFlags::POLLIN, deadline)
    }
}

/// Waits until a descriptor is ready, at most until `deadline`.
pub(super) fn wait_for(fd: &impl AsFd, event: PollFlags, deadline: Option<Instant>) -> Result<(), Error> {
    loop {
        let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up: poll(2) counts whole milliseconds and would return too early.
            let millis = left.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
            PollTimeout::try_from(millis).expect("it is from 0 to i32::MAX")
        });
        match poll(&mut [PollFd::new(fd.as_fd(), event)], timeout) {
            Ok(0) if deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                return Err(Error::TimedOut);
            }
            Ok(0) | Err(nix::Error::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(e) => return Err(Error::Io("wait for the daemon", e.into())),
        }
    }
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Transport::Plain(fd) => fd.as_fd(),
            #[cfg(feature = "tls")]
            Transport::Tls(stream) => stream.as_fd(),
        }
    }
}

/// What has arrived and is not decoded yet.
#[derive(Debug, Default)]
pub(super) struct Input {
    pub(super) bytes: Vec<u8>,
    /// The descriptors that were passed with it, in order; only where some are expected.
    pub(super) descriptors: VecDeque<OwnedFd>,
    pub(super) expects_descriptors: bool,
}

fn receive(fd: &OwnedFd, input: &mut Input, waits: bool) -> Result<bool, Error> {
    let mut buffer = [0; READ_BYTES];
    let flags = if waits { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
    loop {
        let received = match input.expects_descriptors {
            false => recv(fd.as_raw_fd(), &mut buffer, flags),
            true => passing::receive(fd, &mut buffer, waits).map(|(bytes, descriptor)| {
                input.descriptors.extend(descriptor);
                bytes
            }),
        };
        match received {
            Ok(0) => return Err(Error::Closed),
            Ok(bytes) => {
                input.bytes.extend_from_slice(&buffer[..bytes]);
                return Ok(true);
            }
            Err(nix::Error::EAGAIN) => return Ok(false),
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(closed_or("read from the daemon", e)),
        }
    }
}

/// An answer, or room for a request, that was due at once did not come.
pub(super) fn silent(error: Error) -> Error {
    match error {
        Error::TimedOut => Error::Silent,
        other => other,
    }
}

fn closed_or(doing: &'static str, error: nix::Error) -> Error {
    match error {
        nix::Error::EPIPE | nix::Error::ECONNRESET | nix::Error::ECONNABORTED => Error::Closed,
        // The kernel gave up after the other machine had not answered for long.
        nix::Error::ETIMEDOUT
        | nix::Error::EHOSTUNREACH
        | nix::Error::EHOSTDOWN
        | nix::Error::ENETUNREACH
        | nix::Error::ENETDOWN => Error::Closed,
        other => Error::Io(doing, other.into()),
    }
}

/// An error of a stream whose handshake is over. TLS 1.3 lets a daemon refuse the client's certificate only after that.
#[cfg(feature = "tls")]
fn tls_error(error: crate::tls::Error) -> Error {
    use crate::tls::Error as E;
    match error {
        E::Io(e) => match e.raw_os_error() {
            Some(number) => closed_or("speak with the daemon", nix::Error::from_raw(number)),
            None => Error::Io("speak with the daemon", e),
        },
        E::Closed => Error::Closed,
        E::Refused(why) => {
            Error::NotPermitted(format!("the daemon refused this client's certificate: {why}"))
        }
        other => Error::Protocol(other.to_string()),
    }
}
