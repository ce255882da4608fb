//! The listening sockets: making them so that at no moment more users can connect than intended, and making sure that each
//! Unix socket has one daemon.
//!
//! A lock on the file `PATH.lock` decides which daemon serves `PATH`. The state of the socket does not: a socket that
//! refuses connections may belong to a daemon that is just starting.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::{info, warn};
use nix::sys::socket::{Backlog, listen};
use nix::unistd::Gid;

use super::Error;
use super::bind::{self, FileId, Permissions};
use super::gate::Exposure;
use super::socket_lock::SocketLock;
use crate::addr::{self, Addr};
use crate::keepalive;
use crate::lookup;
use crate::place::{self, Missing};

/// Which users may connect to a Unix socket.
#[derive(Clone, Debug)]
pub struct Access {
    /// The socket's permission bits.
    pub mode: u32,
    /// The socket's group, by name or number; `None`: the daemon's group.
    pub group: Option<String>,
}

/// A listening socket. A Unix socket that was made here is removed when this is dropped.
pub(super) struct Listener {
    socket: Socket,
    name: String,
}

enum Socket {
    Unix {
        listener: UnixListener,
        path: PathBuf,
        socket_lock: SocketLock,
        /// The file that clients find at the path; `None`: it could not be seen.
        file: Option<FileId>,
        /// The socket was made here, with these permissions, and is removed with this daemon.
        ours: Option<Permissions>,
    },
    Tcp {
        listener: TcpListener,
        is_tls: bool,
    },
}

impl Listener {
    /// Listens on each address; a TCP address may stand for several sockets.
    pub(super) fn bind_all(
        addrs: &[Addr],
        access: &Access,
        exposure: Exposure,
    ) -> Result<Vec<Listener>, Error> {
        let gid = access.group.as_deref().map(group_id).transpose()?;
        let mut listeners = Vec::new();
        for addr in addrs {
            match addr {
                Addr::Unix(path) => {
                    let path = std::path::absolute(path).map_err(|e| Error::bind(addr, e))?;
                    listeners.push(bind_unix(&path, Permissions { mode: access.mode, gid })?);
                }
                _ => bind_tcp(addr, exposure, &mut listeners)?,
            }
        }
        Ok(listeners)
    }

    /// Listens on the socket of the user's own daemon, and on that of KeyedMutex's clients if that can be had.
    pub(super) fn bind_default(access: &Access) -> Result<Vec<Listener>, Error> {
        let own = place::own_socket(Missing::Make)?;
        let mut listeners = Listener::bind_all(&[Addr::Unix(own)], access, Exposure::NONE)?;
        match Listener::bind_all(&[Addr::Unix(place::KEYEDMUTEXD.into())], access, Exposure::NONE) {
            Ok(also) => listeners.extend(also),
            Err(e) => info!("KeyedMutex's clients will not find this daemon: {e}"),
        }
        Ok(listeners)
    }

    /// Takes over the sockets that systemd listens on already (sd_listen_fds(3)). Returns an empty list if there are none.
    /// `is_tls`: the TCP ports among them speak TLS.
    pub(super) fn inherit(is_tls: bool, exposure: Exposure) -> Result<Vec<Listener>, Error> {
        let error = |e| Error::Os("take over the sockets from systemd", e);
        let mut given = listenfd::ListenFd::from_env();
        let mut listeners = Vec::new();
        for index in 0..given.len() {
            // Each kind is tried in turn; an attempt with the wrong kind leaves the socket where it is.
            if let Ok(Some(listener)) = given.take_unix_listener(index) {
                listeners.push(inherit_unix(listener)?);
            } else if let Some(listener) = given.take_tcp_listener(index).map_err(error)? {
                listener.set_nonblocking(true).map_err(error)?;
                let local = listener.local_addr().map_err(error)?;
                check_exposure(local, is_tls, exposure)?;
                listeners.push(Listener {
                    name: tcp_name(local, is_tls),
                    socket: Socket::Tcp { listener, is_tls },
                });
            }
        }
        Ok(listeners)
    }

    /// Accepts one connection; returns its address too, over TCP. The error `WouldBlock` means that none is waiting.
    pub(super) fn accept(&self) -> io::Result<(OwnedFd, Option<IpAddr>)> {
        match &self.socket {
            Socket::Unix { listener, .. } => Ok((listener.accept()?.0.into(), None)),
            Socket::Tcp { listener, .. } => {
                let (stream, from) = listener.accept()?;
                // Clients wait for answers of a single byte, which Nagle's algorithm would delay. This fails only if the
                // client has disconnected already, which the next read reports.
                let _ = stream.set_nodelay(true);
                Ok((stream.into(), Some(from.ip())))
            }
        }
    }

    /// Has the kernel end the connections that will be accepted here when the other machine is gone for so long.
    pub(super) fn set_keepalive(&self, timeout: Duration) -> io::Result<()> {
        match &self.socket {
            Socket::Unix { .. } => Ok(()),
            Socket::Tcp { listener, .. } => Ok(keepalive::set(listener, timeout)?),
        }
    }

    /// Returns `true` if clients on other machines can connect.
    pub(super) fn is_exposed(&self) -> bool {
        let ip = self.local_addr().map(|local| local.ip().to_canonical());
        matches!(self.socket, Socket::Tcp { .. }) && !ip.is_ok_and(|ip| ip.is_loopback())
    }

    /// Returns `true` if clients speak TLS here.
    pub(super) fn is_tls(&self) -> bool {
        matches!(self.socket, Socket::Tcp { is_tls: true, .. })
    }

    pub(super) fn is_unix(&self) -> bool {
        matches!(self.socket, Socket::Unix { .. })
    }

    /// Returns the path of a Unix socket.
    pub(super) fn path(&self) -> Option<&Path> {
        match &self.socket {
            Socket::Unix { path, .. } => Some(path),
            Socket::Tcp { .. } => None,
        }
    }

    /// Returns the files that this socket needs.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        match &self.socket {
            Socket::Unix { path, socket_lock, .. } => vec![path.clone(), socket_lock.path().into()],
            Socket::Tcp { .. } => Vec::new(),
        }
    }

    /// Checks that clients still find this socket at its path, and the next daemon its lock file; puts back what was
    /// removed. Returns whether the socket is another one now.
    ///
    /// # Errors
    /// When another process has put its own in their place, or they cannot be put back.
    pub(super) fn restore_files(&mut self) -> Result<bool, Error> {
        let Socket::Unix { listener, path, socket_lock, file, ours } = &mut self.socket else {
            return Ok(false);
        };
        if socket_lock.restore()? {
            warn!("{} was removed, and is put back", socket_lock.path().display());
        }
        let error = |e| Error::bind(&Addr::Unix(path.clone()), e);
        let there = FileId::at(path).map_err(error)?;
        match (there, *ours) {
            _ if there == *file || file.is_none() => Ok(false),
            (None, Some(permissions)) => {
                let (new, id) = bind::bind(path, permissions).map_err(error)?;
                (*listener, *file) = (new, Some(id));
                warn!("{} was removed, and is put back", path.display());
                Ok(true)
            }
            (None, None) => {
                warn!("{} was removed: restart the unit that listens on it", path.display());
                *file = None;
                Ok(false)
            }
            (Some(_), _) => {
                Err(error(io::Error::other("another process has put a file in the place of the socket")))
            }
        }
    }

    /// Returns the address, for the log.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Writes this process's id into the lock file, so that a second daemon can name the first.
    pub(super) fn write_pid(&mut self) -> Result<(), Error> {
        match &mut self.socket {
            Socket::Unix { socket_lock, .. } => socket_lock.write_pid(),
            Socket::Tcp { .. } => Ok(()),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Unix { listener, .. } => listener.as_fd(),
            Socket::Tcp { listener, .. } => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix { path, file, ours: Some(_), .. } = &self.socket
            && FileId::at(path).is_ok_and(|there| there == *file)
        {
            // If it cannot be removed, the next daemon replaces it, so the error needs no report.
            let _ = fs::remove_file(path);
        }
    }
}

/// Returns `true` for errors of accept(2) that concern only the first waiting connection, and not the ones behind it
/// (accept(2), "Error handling").
pub(super) fn is_per_connection_error(error: &io::Error) -> bool {
    use nix::Error as E;
    matches!(
        error.raw_os_error().map(nix::Error::from_raw),
        Some(
            E::EINTR
                | E::ECONNABORTED
                | E::EPERM
                | E::EPROTO
                | E::ENOPROTOOPT
                | E::EOPNOTSUPP
                | E::ENETDOWN
                | E::ENETUNREACH
                | E::EHOSTDOWN
                | E::EHOSTUNREACH
                | E::ETIMEDOUT
        )
    )
}

fn bind_unix(path: &Path, permissions: Permissions) -> Result<Listener, Error> {
    let socket_lock = SocketLock::take(path)?;
    remove_dead_socket(path)?;
    let bound = bind::bind(path, permissions);
    let (listener, file) = bound.map_err(|e| Error::bind(&Addr::Unix(path.into()), e))?;
    let path = PathBuf::from(path);
    let name = path.display().to_string();
    let socket = Socket::Unix { listener, path, socket_lock, file: Some(file), ours: Some(permissions) };
    Ok(Listener { socket, name })
}

fn inherit_unix(listener: UnixListener) -> Result<Listener, Error> {
    let error = |e| Error::Os("take over a socket from systemd", e);
    listener.set_nonblocking(true).map_err(error)?;
    let addr = listener.local_addr().map_err(error)?;
    let path = addr.as_pathname().ok_or_else(|| error(io::Error::other("it has no path")))?.to_owned();
    let socket_lock = SocketLock::take(&path)?;
    let name = path.display().to_string();
    let file = FileId::at(&path).map_err(error)?;
    Ok(Listener { socket: Socket::Unix { listener, path, socket_lock, file, ours: None }, name })
}

/// Removes a dead socket from a path whose lock file this process has locked.
fn remove_dead_socket(path: &Path) -> Result<(), Error> {
    let error = |e| Error::bind(&Addr::Unix(path.into()), e);
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(error(e)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(error(io::Error::other("it exists and is not a socket")));
        }
        Ok(_) => {}
    }
    // A daemon of another kind does not lock that file, so the socket is tried as well.
    match addr::probe(path) {
        Ok(peer) => Err(Error::Served { path: path.into(), pid: Some(peer.pid) }),
        // It has so many clients that it cannot be asked.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            Err(Error::Served { path: path.into(), pid: None })
        }
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(error),
        Err(e) => Err(error(e)),
    }
}

fn tcp_name(local: SocketAddr, is_tls: bool) -> String {
    if is_tls { format!("tls://{local}") } else { local.to_string() }
}

/// Refuses a port that other hosts can reach and that is not protected, unless that is meant.
fn check_exposure(socket: SocketAddr, is_tls: bool, exposure: Exposure) -> Result<(), Error> {
    let is_protected = if is_tls { exposure.tls } else { exposure.plain };
    match socket.ip().to_canonical().is_loopback() || is_protected {
        true => Ok(()),
        false => Err(Error::Exposed { socket, is_tls }),
    }
}

fn bind_tcp(addr: &Addr, exposure: Exposure, listeners: &mut Vec<Listener>) -> Result<(), Error> {
    let error = |e| Error::bind(addr, e);
    let is_tls = matches!(addr, Addr::Tls { .. });
    let before = listeners.len();
    for mut socket in addr.resolve(None)? {
        check_exposure(socket, is_tls, exposure)?;
        if let (Some(first), 0) = (listeners.get(before), socket.port()) {
            // Port 0 lets the kernel choose; all sockets of one address get the port that it chose for the first.
            socket.set_port(first.local_addr().map_err(error)?.port());
        }
        let listener = match TcpListener::bind(socket) {
            // A machine without IPv6 has no ::1. That is an error only if the user named an address, and not only a port.
            Err(e)
                if *addr == Addr::Loopback(socket.port()) && e.kind() == io::ErrorKind::AddrNotAvailable =>
            {
                continue;
            }
            other => other.map_err(error)?,
        };
        listener.set_nonblocking(true).map_err(error)?;
        listen(&listener, Backlog::MAXALLOWABLE).map_err(|e| error(e.into()))?;
        let name = tcp_name(listener.local_addr().map_err(error)?, is_tls);
        listeners.push(Listener { socket: Socket::Tcp { listener, is_tls }, name });
    }
    if listeners.len() == before {
        return Err(error(io::ErrorKind::AddrNotAvailable.into()));
    }
    Ok(())
}

impl Listener {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.socket {
            Socket::Tcp { listener, .. } => listener.local_addr(),
            Socket::Unix { .. } => Err(io::ErrorKind::AddrNotAvailable.into()),
        }
    }
}

fn group_id(name: &str) -> Result<Gid, Error> {
    let gid = lookup::group(name).map_err(|e| Error::Group { name: name.into(), why: e.to_string() })?;
    Ok(Gid::from_raw(gid))
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
