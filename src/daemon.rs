//! The daemon: one thread that waits for sockets, feeds what comes to the table, and sends what the table decides.
//! Everything that is decided about locks is decided in the table.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `server.rs` | the loop, and who is told in which order |
//! | `accept.rs` | taking connections, up to the limits |
//! | `listener.rs` | the sockets that are listened on |
//! | `socket_lock.rs` | one daemon a socket |
//! | `connection.rs` | one client's descriptor and buffers |
//! | `v1.rs`, `v2.rs` | the protocols: bytes to the table, effects to bytes |
//! | `recorder.rs` | the table's changes to the journal |
//! | `orphans.rs` | holders that have not come back since a restart |
//! | `processes.rs` | which processes those are, and whether they live |
//! | `cluster.rs` | sharing locks with other hosts, through etcd |
//! | `log.rs` | what is logged |

mod accept;
#[cfg_attr(not(feature = "etcd"), path = "daemon/cluster_disabled.rs")]
mod cluster;
mod connection;
mod connections;
mod failpoint;
mod listener;
mod listing;
mod log;
mod lookup;
mod orphans;
mod processes;
mod recorder;
mod remote;
mod server;
mod socket_lock;
mod source;

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::log::info;

use crate::addr::{self, Addr, Reason};
use crate::exit::Exit;
use crate::fd;
use crate::journal;
use crate::table::Millis;
#[cfg(feature = "etcd")]
pub use cluster::Config as Sharing;
pub use listener::Access;
use listener::Listener;
use recorder::Recorder;
use server::Server;
use socket_lock::SocketLock;

/// What to serve, and how.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen.
    pub addrs: Vec<Addr>,
    /// Who may connect to the Unix sockets among them.
    pub access: Access,
    /// How many connections to serve at a time. `None`: as many as descriptors allow.
    pub connections_max: Option<u32>,
    /// How long a protocol 1 client may hold. `None`: as long as it likes.
    pub hold_limit: Option<Duration>,
    /// How many connections one user may have on the Unix sockets. `None`: as many as there are.
    pub per_uid_max: Option<u32>,
    /// After a restart, how long a lock is kept for a holder that has not come back and whose process cannot be watched.
    pub grace: Duration,
    /// Where to keep the journal. `None`: beside the first Unix socket, and nowhere if there is none.
    pub state: Option<PathBuf>,
    /// A descriptor to write a newline to when serving.
    pub ready_fd: Option<u32>,
    /// End after so long without connections and locks. `None`: never.
    pub idle_exit: Option<Duration>,
    /// Share the locks with other hosts. `None`: they are this host's alone.
    #[cfg(feature = "etcd")]
    pub sharing: Option<Sharing>,
    /// Go into the background, away from whoever started this, as soon as the sockets are listened on.
    pub detach: bool,
}

impl Config {
    /// True when other hosts are to have the same locks.
    fn is_sharing(&self) -> bool {
        #[cfg(feature = "etcd")]
        return self.sharing.is_some();
        #[cfg(not(feature = "etcd"))]
        false
    }

    /// These addresses, and for the rest what is safe: only for the user's own processes, in the foreground.
    pub fn new(addrs: Vec<Addr>) -> Config {
        Config {
            addrs,
            access: Access { mode: 0o600, group: None },
            connections_max: None,
            hold_limit: Some(Duration::from_secs(30)),
            per_uid_max: None,
            grace: Duration::from_secs(30),
            state: None,
            ready_fd: None,
            idle_exit: None,
            #[cfg(feature = "etcd")]
            sharing: None,
            detach: false,
        }
    }
}

/// Serves until HUP, INT or TERM, or until idle for long enough.
///
/// # Errors
/// When a socket cannot be listened on, or the kernel refuses what a daemon cannot do without.
pub fn serve(config: &Config) -> Result<(), Error> {
    let ready = config.ready_fd.map(take_ready_fd).transpose()?;
    if config.detach {
        close_inherited().map_err(|e| Error::Os("close inherited files", e))?;
    }
    // What is wrong with it is said before anything is served.
    #[cfg(feature = "etcd")]
    let etcd = config.sharing.as_ref().map(|sharing| crate::etcd::Client::new(&sharing.etcd));
    #[cfg(feature = "etcd")]
    let etcd = etcd.transpose().map_err(Error::Etcd)?;
    if config.detach {
        refuse_without_cluster(config)?;
    }
    let mut listeners = Listener::inherit()?;
    if listeners.is_empty() {
        listeners = Listener::bind_all(&config.addrs, &config.access)?;
    }
    failpoint::hit("start");
    let recorder = open_recorder(config, &listeners)?;
    if recorder.lease().is_some() {
        // Since it was looked at first.
        refuse_without_cluster(config)?;
    }
    if config.detach {
        // Whoever started this waits for the process that ends here, and may connect from then on.
        nix::unistd::daemon(false, false).map_err(|e| Error::Os("detach", e.into()))?;
        listeners.iter_mut().try_for_each(Listener::write_pid)?;
    }
    for listener in &listeners {
        info!("serving on {}", listener.name());
    }
    #[cfg(feature = "etcd")]
    let cluster = match config.sharing.as_ref().zip(etcd) {
        Some((config, client)) => Some(cluster::share(config, client, recorder.lease())?),
        None => None,
    };
    #[cfg(not(feature = "etcd"))]
    let cluster = None;
    let mut server = Server::new(config, listeners, recorder, cluster).map_err(|e| Error::Os("start", e))?;
    notify_ready(ready).map_err(|e| Error::Os("tell that it serves", e))?;
    let reason = server.run().map_err(|e| Error::Os("wait for events", e))?;
    info!("stopping: {reason}");
    server.finish();
    Ok(())
}

/// A client starts this because there is no daemon. Where there was one that has shared its locks with other hosts, this one
/// would give locks that they hold. It is looked at before anything is taken that the daemon needs which is wanted there.
fn refuse_without_cluster(config: &Config) -> Result<(), Error> {
    let unix = config.addrs.iter().find_map(|addr| match addr {
        Addr::Unix(path) => Some(path),
        Addr::Loopback(_) | Addr::Tcp { .. } => None,
    });
    match unix {
        Some(path) if !config.is_sharing() && journal::is_shared(&journal_of(path)) => {
            Err(Error::Shared { path: path.clone() })
        }
        _ => Ok(()),
    }
}

/// Where a daemon keeps its journal by itself: beside its first Unix socket.
fn journal_of(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".journal");
    PathBuf::from(path)
}

fn open_recorder(config: &Config, listeners: &[Listener]) -> Result<Recorder, Error> {
    if let Some(path) = &config.state {
        let path = std::path::absolute(path).map_err(|error| Error::Journal { path: path.clone(), error })?;
        let socket_lock = SocketLock::take(&path)?;
        return Recorder::open(&path, Some(socket_lock), config);
    }
    let Some(socket) = listeners.iter().find_map(Listener::path) else {
        info!("no Unix socket and no --state: what is held will not survive this daemon");
        return Ok(Recorder::none());
    };
    Recorder::open(&journal_of(socket), None, config)
}

/// Takes over the descriptor that readiness is to be told on. Before anything of ours is opened, which might get the
/// number of one that is not open.
fn take_ready_fd(number: u32) -> Result<File, Error> {
    let bad = |error| Error::ReadyFd { number, error };
    let raw = i32::try_from(number).map_err(|_| bad(nix::Error::EBADF.into()))?;
    let file = fd::dup(number).map_err(bad)?;
    nix::unistd::close(raw).map_err(|e| bad(e.into()))?;
    Ok(file)
}

/// Tells whoever started this, if it asked: by a newline on a descriptor, or as systemd wants it (sd_notify(3)).
fn notify_ready(descriptor: Option<File>) -> io::Result<()> {
    if let Some(mut file) = descriptor {
        file.write_all(b"\n")?;
    }
    sd_notify::notify(&[sd_notify::NotifyState::Ready])
}

/// Closes all files but the standard ones, so that nobody waits for the end of a pipe of which a daemon keeps an end.
fn close_inherited() -> io::Result<()> {
    let numbers =
        std::fs::read_dir("/dev/fd")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    for number in numbers.collect::<Vec<i32>>() {
        if number > 2 {
            // The one of the directory itself is closed already; for the others there is nothing to lose.
            let _ = nix::unistd::close(number);
        }
    }
    Ok(())
}

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An address is wrong or cannot be resolved.
    #[error(transparent)]
    Addr(#[from] addr::Error),
    /// A socket cannot be made.
    #[error("cannot serve on {addr}: {}", Reason(error))]
    Bind {
        /// Where.
        addr: Addr,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The lock file that goes with a socket cannot be had.
    #[error("cannot lock {}: {}", path.display(), Reason(error))]
    LockFile {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The journal cannot be written.
    #[error("cannot use the journal {}: {}", path.display(), Reason(error))]
    Journal {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// Another daemon serves this socket.
    #[error("cannot serve on {}: {}", path.display(), other_daemon(*pid))]
    Served {
        /// The socket.
        path: PathBuf,
        /// The other daemon, if it has said who it is.
        pid: Option<u32>,
    },
    /// The locks of this socket are shared with other hosts, and nobody has said how.
    #[error("the locks of {} are shared with other hosts: start its daemon with --etcd", path.display())]
    Shared {
        /// The socket.
        path: PathBuf,
    },
    /// The descriptor to tell readiness on cannot be used.
    #[error("bad --ready-fd {number}: {}", Reason(error))]
    ReadyFd {
        /// Its number.
        number: u32,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The group for the sockets is not known.
    #[error("bad --group {name:?}: {why}")]
    Group {
        /// What was given.
        name: String,
        /// Why.
        why: String,
    },
    /// Etcd cannot be used as it was asked for.
    #[error(transparent)]
    #[cfg(feature = "etcd")]
    Etcd(crate::etcd::ConfigError),
    /// The kernel refused something.
    #[error("cannot {}: {}", .0, Reason(.1))]
    Os(&'static str, #[source] io::Error),
}

impl Error {
    fn bind(addr: &Addr, error: io::Error) -> Error {
        Error::Bind { addr: addr.clone(), error }
    }

    /// The exit code for it.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Addr(error) => error.exit(),
            Error::Bind { .. } | Error::LockFile { .. } | Error::Journal { .. } => Exit::CannotCreate,
            Error::Served { .. } => Exit::Busy,
            Error::Shared { .. } => Exit::Unavailable,
            Error::Group { .. } | Error::ReadyFd { .. } => Exit::Usage,
            #[cfg(feature = "etcd")]
            Error::Etcd(_) => Exit::Usage,
            Error::Os(..) => Exit::Os,
        }
    }
}

fn other_daemon(pid: Option<u32>) -> String {
    match pid {
        Some(pid) => format!("the daemon with pid {pid} does"),
        None => "another daemon does".into(),
    }
}

fn millis(span: Duration) -> Millis {
    Millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}
