//! Where a daemon is: reading an address, connecting to it, and asking the kernel who is at the other end.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::exit::Exit;
use crate::lookup;

/// The environment variable that says where the daemon is.
pub const VARIABLE: &str = "KMUTEX_SOCK";
/// Returns the address in [`VARIABLE`], if it is set.
///
/// # Errors
/// [`Error::Bad`].
pub fn from_environment() -> Result<Option<Addr>, Error> {
    let text = std::env::var_os(VARIABLE).filter(|text| !text.is_empty());
    text.map(|text| Addr::parse(&text)).transpose()
}

/// The longest path of a Unix socket, in bytes: `sun_path` less its final zero (unix(7)).
const PATH_BYTES_MAX: usize = 107;

/// The address of a daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Addr {
    /// A Unix socket.
    Unix(PathBuf),
    /// A port of this machine alone: 127.0.0.1, and ::1 where there is one.
    Loopback(u16),
    /// A port of a host that was named.
    Tcp {
        /// A name or a number, without brackets.
        host: String,
        /// Not of this machine alone.
        port: u16,
    },
    /// The same, through TLS.
    Tls {
        /// A name or a number, without brackets: the daemon's certificate must be for it.
        host: String,
        /// The port.
        port: u16,
    },
}

/// What a TLS address begins with.
const TLS_SCHEME: &str = "tls://";

impl Addr {
    /// Reads a path, a `PORT`, `HOST:PORT`, `[V6]:PORT`, or `tls://HOST:PORT`. Other texts with a slash are paths.
    ///
    /// # Errors
    /// [`Error::Bad`].
    pub fn parse(text: &OsStr) -> Result<Addr, Error> {
        let bad = |why: &str| Error::Bad { text: text.to_owned(), why: why.into() };
        if let Some(text) = text.to_str() {
            if let Some(rest) = text.strip_prefix(TLS_SCHEME) {
                let (host, port) =
                    host_and_port(rest).map_err(bad)?.ok_or_else(|| bad("it is not tls://HOST:PORT"))?;
                return match cfg!(feature = "tls") {
                    true => Ok(Addr::Tls { host, port }),
                    false => Err(bad("this kmutex was built without TLS")),
                };
            }
            if is_number(text) {
                return Ok(Addr::Loopback(port_number(text).map_err(bad)?));
            }
            if !text.contains('/')
                && let Some((host, port)) = host_and_port(text).map_err(bad)?
            {
                return Ok(Addr::Tcp { host, port });
            }
        }
        match text.len() {
            0 => Err(bad("it is empty")),
            1..=PATH_BYTES_MAX if !text.as_encoded_bytes().contains(&0) => Ok(Addr::Unix(text.into())),
            1..=PATH_BYTES_MAX => Err(bad("it has a zero byte")),
            bytes => {
                Err(bad(&format!("the path has {bytes} bytes, the most for a socket is {PATH_BYTES_MAX}")))
            }
        }
    }

    /// The same address for a process with another working directory, as it goes into [`VARIABLE`].
    ///
    /// # Errors
    /// When the working directory cannot be told.
    pub fn absolute(&self) -> io::Result<Addr> {
        Ok(match self {
            Addr::Unix(path) => Addr::Unix(std::path::absolute(path)?),
            other => other.clone(),
        })
    }

    /// The addresses of a TCP address, in the order in which they should be tried. None for a Unix socket. Resolving a name
    /// ends at the deadline, if there is one, and takes a few seconds at the most.
    ///
    /// # Errors
    /// [`Error::Io`] when the host's name cannot be resolved.
    pub fn resolve(&self, deadline: Option<Instant>) -> Result<Vec<SocketAddr>, Error> {
        match self {
            Addr::Unix(_) => Ok(Vec::new()),
            Addr::Loopback(port) => Ok(vec![
                SocketAddr::from(([127, 0, 0, 1], *port)),
                SocketAddr::from(([0u16, 0, 0, 0, 0, 0, 0, 1], *port)),
            ]),
            Addr::Tcp { host, port } | Addr::Tls { host, port } => {
                let found = lookup::host(host, deadline).map_err(|e| self.error("resolve", e))?;
                Ok(found.into_iter().map(|ip| SocketAddr::new(ip, *port)).collect())
            }
        }
    }

    /// Connects, and waits until `deadline` at the most (for ever when there is none).
    ///
    /// # Errors
    /// [`Error::Io`]; of the kind [`io::ErrorKind::TimedOut`] when the deadline came first.
    pub fn connect(&self, deadline: Option<Instant>) -> Result<OwnedFd, Error> {
        let error = |e| self.error("connect to", e);
        match self {
            Addr::Unix(path) => connect_unix(path, deadline).map_err(error),
            _ => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for addr in self.resolve(deadline)? {
                    match connect_tcp(addr, deadline) {
                        Ok(fd) => return Ok(fd),
                        Err(e) => last = e,
                    }
                }
                Err(error(last))
            }
        }
    }

    fn error(&self, doing: &'static str, error: io::Error) -> Error {
        Error::Io { doing, addr: self.clone(), error }
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Addr::Unix(path) => path.display().fmt(f),
            Addr::Loopback(port) => port.fmt(f),
            Addr::Tcp { host, port } => write_host(f, host, *port),
            Addr::Tls { host, port } => {
                f.write_str(TLS_SCHEME)?;
                write_host(f, host, *port)
            }
        }
    }
}

fn write_host(f: &mut fmt::Formatter<'_>, host: &str, port: u16) -> fmt::Result {
    if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn port_number(digits: &str) -> Result<u16, &'static str> {
    digits.parse().map_err(|_| "the port is not from 0 to 65535")
}

/// Reads `HOST:PORT` or `[V6]:PORT`. Returns `None` if the text does not end in a port.
fn host_and_port(text: &str) -> Result<Option<(String, u16)>, &'static str> {
    let Some((host, digits)) = text.rsplit_once(':').filter(|(_, digits)| is_number(digits)) else {
        return Ok(None);
    };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    match bare.unwrap_or(host) {
        "" => Err("the host is missing"),
        host if bare.is_none() && host.contains(':') => Err("an IPv6 address stands in brackets: [V6]:PORT"),
        host if host.contains('/') => Err("a host has no slash"),
        host => Ok(Some((host.into(), port_number(digits)?))),
    }
}

impl From<&Addr> for OsString {
    /// What [`Addr::parse`] reads as the same address.
    fn from(addr: &Addr) -> OsString {
        match addr {
            // `./7000` is a path where `7000` is a port.
            Addr::Unix(path) if !path.as_os_str().as_encoded_bytes().contains(&b'/') => {
                Path::new(".").join(path).into()
            }
            Addr::Unix(path) => path.into(),
            other => other.to_string().into(),
        }
    }
}

fn connect_unix(path: &Path, deadline: Option<Instant>) -> io::Result<OwnedFd> {
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    if let Some(deadline) = deadline {
        // A full backlog blocks a Unix socket's connect for as long as it may block in a send (unix(7)).
        let left =
            Duration::max(deadline.saturating_duration_since(Instant::now()), Duration::from_millis(1));
        let micros = i64::try_from(left.as_micros()).unwrap_or(i64::MAX);
        socket::setsockopt(
            &fd,
            sockopt::SendTimeout,
            &TimeVal::microseconds(micros.min(i64::from(i32::MAX) * 1_000_000)),
        )?;
    }
    let addr = UnixAddr::new(path)?;
    loop {
        match socket::connect(fd.as_raw_fd(), &addr) {
            Ok(()) => break,
            Err(nix::Error::EINTR) => {}
            Err(nix::Error::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e.into()),
        }
    }
    if deadline.is_some() {
        socket::setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(0))?;
    }
    Ok(fd)
}

fn connect_tcp(addr: SocketAddr, deadline: Option<Instant>) -> io::Result<OwnedFd> {
    let stream = match deadline {
        None => TcpStream::connect(addr)?,
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            TcpStream::connect_timeout(&addr, Duration::max(left, Duration::from_millis(1)))?
        }
    };
    // Messages are small and waited for: Nagle's algorithm would hold them back.
    stream.set_nodelay(true)?;
    Ok(stream.into())
}

/// The process at the other end of a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process id: of a client the one that connected, of a daemon the one that listens.
    pub pid: u32,
    /// Its effective user id then.
    pub uid: u32,
}

impl Peer {
    /// Stands for the users that have no number in this user namespace; it is the number of no user.
    #[doc(hidden)]
    pub const UNMAPPED: u32 = u32::MAX;
}

/// Asks the kernel who is at the other end (unix(7), SO_PEERCRED).
///
/// # Errors
/// When the socket is not a Unix socket, or the kernel does not tell.
pub fn peer(socket: impl AsFd) -> io::Result<Peer> {
    let cred = socket::getsockopt(&socket, sockopt::PeerCredentials)?;
    Ok(Peer { pid: u32::try_from(cred.pid()).unwrap_or(0), uid: cred.uid() })
}

/// Connects to a Unix socket only to see who serves it. Waits for nothing.
///
/// # Errors
/// As connect(2) gives them: `ConnectionRefused` when no daemon listens, `WouldBlock` when more connections wait for the
/// daemon than it may have waiting.
pub fn probe(path: &Path) -> io::Result<Peer> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    peer(fd)
}

/// What is wrong with an address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It cannot be read.
    #[error("bad socket address {text:?}: {why}")]
    Bad {
        /// What was given.
        text: OsString,
        /// What is wrong with it.
        why: String,
    },
    /// It cannot be used.
    #[error("cannot {doing} {addr}: {}", Reason(error))]
    Io {
        /// "connect to" or "resolve".
        doing: &'static str,
        /// Which one.
        addr: Addr,
        /// Why.
        #[source]
        error: io::Error,
    },
}

impl Error {
    /// True when no daemon listens there: the socket is missing, or it refuses connections.
    pub fn is_absent(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        matches!(self, Error::Io { error, .. } if matches!(error.kind(), NotFound | ConnectionRefused))
    }

    /// True when another machine, or the way to it, is the reason.
    pub(crate) fn is_of_network(&self) -> bool {
        matches!(self, Error::Io { addr: Addr::Tcp { .. } | Addr::Tls { .. }, .. })
    }

    /// The exit code for it.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Bad { .. } => Exit::Usage,
            // A directory that cannot be searched does not say whether there is a daemon.
            Error::Io { addr: Addr::Unix(path), error, .. }
                if error.kind() == io::ErrorKind::PermissionDenied && path.symlink_metadata().is_ok() =>
            {
                Exit::NotPermitted
            }
            Error::Io { .. } => Exit::Unavailable,
        }
    }
}

/// An operating system's error in words that are the same with every C library, and without the number that `io::Error` adds.
pub struct Reason<'a>(pub &'a io::Error);

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.raw_os_error().map(Errno::from_raw) {
            // Where nix has words of its own.
            Some(Errno::EBADF) => f.write_str("Bad file descriptor"),
            Some(Errno::ELOOP) => f.write_str("Too many levels of symbolic links"),
            Some(Errno::EIO) => f.write_str("Input/output error"),
            Some(errno) if errno != Errno::UnknownErrno => f.write_str(errno.desc()),
            _ => self.0.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Addr, String> {
        Addr::parse(OsStr::new(text)).map_err(|e| e.to_string())
    }

    #[test]
    fn an_address_is_a_path_a_port_or_a_host_with_a_port() {
        let tcp = |host: &str, port| Ok(Addr::Tcp { host: host.into(), port });
        assert_eq!(parse("/run/k.sock"), Ok(Addr::Unix("/run/k.sock".into())));
        assert_eq!(parse("k.sock"), Ok(Addr::Unix("k.sock".into())));
        assert_eq!(parse("./7000"), Ok(Addr::Unix("./7000".into())));
        assert_eq!(parse("/a:80"), Ok(Addr::Unix("/a:80".into())));
        assert_eq!(parse("7000"), Ok(Addr::Loopback(7000)));
        assert_eq!(parse("db.example:7000"), tcp("db.example", 7000));
        assert_eq!(parse("[::1]:7000"), tcp("::1", 7000));
    }

    #[test]
    fn a_bad_address_is_named_with_what_is_wrong() {
        let long = "x".repeat(108);
        for (text, why) in [
            ("", "empty"),
            ("65536", "port is not from 0 to 65535"),
            ("a:99999", "port is not from 0 to 65535"),
            (":80", "host is missing"),
            ("::1:80", "in brackets"),
            (&long, "108 bytes"),
            ("a\0b", "zero byte"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_reason_is_in_the_usual_words_and_has_no_number() {
        let reason = |number| Reason(&io::Error::from_raw_os_error(number)).to_string();
        assert_eq!(reason(nix::Error::EBADF as i32), "Bad file descriptor");
        assert_eq!(reason(nix::Error::ELOOP as i32), "Too many levels of symbolic links");
        assert_eq!(reason(nix::Error::EMFILE as i32), "Too many open files");
        assert_eq!(Reason(&io::Error::other("no (os error 9) here")).to_string(), "no (os error 9) here");
    }

    #[test]
    fn an_address_survives_being_written_out() {
        for text in ["/run/k.sock", "k.sock", "7000", "db.example:7000", "[::1]:7000"] {
            let addr = parse(text).unwrap();
            let again = Addr::parse(&OsString::from(&addr)).unwrap();
            assert_eq!(again.absolute().unwrap(), addr.absolute().unwrap());
        }
        let numeric = Addr::Unix("7000".into());
        assert_eq!(Addr::parse(&OsString::from(&numeric)).unwrap(), Addr::Unix("./7000".into()));
    }
}
