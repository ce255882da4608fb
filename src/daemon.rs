//! The daemon: one thread that waits for sockets, applies what arrives to the table, and sends what the table decides.
//! All decisions about locks are made in the table.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `server.rs` | the loop: the order in which things are read, recorded and sent. Only it knows all other parts |
//! | `server/start.rs` | the loop's beginning, with what the daemon before it left, and its end |
//! | `server/input.rs` | accepting and reading clients, and how many requests of each are handled in one turn |
//! | `server/effects.rs` | what the table decided: noted for the journal, and told to clients |
//! | `server/flush.rs` | the end of a turn: the journal, then the output, then connections that are closed |
//! | `server/holders.rs` | holds whose client is gone, but whose command may live |
//! | `server/v1.rs`, `server/v2.rs` | the protocols: bytes to the table, effects to bytes |
//! | `server/status.rs` | statuses, as far as their clients read them |
//! | `server/remote.rs` | what the loop and the clustering say to each other |
//! | `server/share.rs` | results that clients share |
//! | `server/tcp.rs` | clients over TCP: TLS, names, and other protocols |
//! | `batch.rs` | the readiness events that the kernel gives at a time |
//! | `source.rs` | what a readiness event is about |
//! | `accept.rs` | accepting connections |
//! | `admission.rs` | the limits: how many descriptors clients may take, all together and each user |
//! | `listener.rs` | the listening sockets |
//! | `socket_lock.rs` | the lock file that keeps a second daemon away from a socket |
//! | `claim.rs` | what keeps it away while that file is gone |
//! | `bind.rs` | making a Unix socket with the right permissions |
//! | `files.rs`, `file_watch.rs` | putting back the daemon's files, if a clean-up job has removed them |
//! | `connection.rs` | one client's descriptor and buffers |
//! | `connections.rs` | all of them: which have output, which have sent only part of a message |
//! | `identity.rs` | who a client over TCP is, and its TLS session |
//! | `gate.rs` | who may use the TCP ports, and as whom |
//! | `reserve.rs` | which keys belong to which users |
//! | `users.rs` | the users of this machine, looked up by threads |
//! | `leases.rs` | holders over TCP: until when each of them is believed to live |
//! | `predecessor.rs` | an earlier daemon of which nothing is known |
//! | `attempts.rs`, `verifier.rs` | in which order secrets are verified, and the thread that does it |
//! | `lookup.rs` | a read-only view of table, connections and orphans, for status, log and journal |
//! | `recorder.rs` | the table's changes to the journal |
//! | `orphans.rs` | holders that are not connected |
//! | `outputs.rs` | the outputs of runs whose results clients share |
//! | `named.rs` | processes that clients name, by descriptor |
//! | `processes.rs` | which processes those are, and whether they live |
//! | `search.rs` | the thread that searches all processes for a command |
//! | `cluster.rs` | clustering: sharing locks with other hosts, through etcd |
//! | `cluster_disabled.rs` | an empty type in its place, in a build without etcd |
//! | `remote.rs`, `listing.rs` | what the loop and the clustering say to each other about locks of other hosts |
//! | `log.rs` | what is logged of one lock |
//! | `detach.rs` | leaving what the caller of an automatically started daemon had |
//! | `failpoint.rs` | places where a test can have the daemon killed |

mod accept;
mod admission;
mod attempts;
mod batch;
mod bind;
mod claim;
#[cfg_attr(not(feature = "etcd"), path = "daemon/cluster_disabled.rs")]
mod cluster;
mod connection;
mod connections;
mod detach;
mod failpoint;
mod file_watch;
mod files;
mod gate;
mod identity;
mod leases;
mod listener;
mod listing;
mod log;
mod lookup;
mod named;
mod orphans;
mod outputs;
mod predecessor;
mod processes;
mod recorder;
mod remote;
mod reserve;
mod search;
mod server;
mod sharers;
mod socket_lock;
mod source;
mod users;
mod verifier;

use std::fs::File;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::log::info;

use crate::addr::{self, Addr, Reason};
use crate::exit::Exit;
use crate::fd;
use crate::journal;
use crate::place;
#[cfg(feature = "etcd")]
pub use cluster::Config as Clustering;
use gate::{Exposure, Gate};
pub use listener::Access;
use listener::Listener;
use recorder::Recorder;
pub use reserve::{Owner, Reservation};
use server::Server;
use sharers::Sharers;
use socket_lock::SocketLock;

/// What to serve, and how.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen. Empty: where the user's own clients look for a daemon, and on the socket of KeyedMutex's clients if
    /// no other daemon does.
    pub addrs: Vec<Addr>,
    /// Which users may connect to the Unix sockets among them.
    pub access: Access,
    /// How many connections to serve at a time. `None`: as many as the limit of descriptors allows.
    pub connections_max: Option<u32>,
    /// What to do with further connections.
    pub when_full: WhenFull,
    /// How long a protocol 1 client may hold a lock. `None`: no limit.
    pub hold_limit: Option<Duration>,
    /// How many connections one user may have on the Unix sockets, the processes of `kmutex lock` included. `None`: a quarter
    /// of all connections, and at least 16; root and the daemon's own user then have no limit.
    pub per_uid_max: Option<u32>,
    /// The keys that belong to some users only, besides those which begin with `@NAME/`.
    pub reservations: Vec<Reservation>,
    /// Show the commands and notes of all users to all users in a status.
    pub shows_commands: bool,
    /// After a restart, how long the daemon keeps a lock for a holder that has not come back and whose process it cannot
    /// watch.
    pub grace: Duration,
    /// How long a machine at the other end of a TCP connection may say nothing until it counts as gone. `None`: for ever.
    pub peer_timeout: Option<Duration>,
    /// All clients may come through forwarders, such as sshd.
    pub remote: bool,
    /// Where to keep the journal. `None`: beside the first Unix socket; if there is none, the daemon keeps no journal.
    pub state: Option<PathBuf>,
    /// Of how many locks the daemon remembers when their work was last done.
    pub remember_max: usize,
    /// How long all results may be that the daemon keeps, in bytes.
    pub share_total: u64,
    /// Root's results are for the clients of all users.
    pub share_across_users: bool,
    /// A descriptor to write a newline to as soon as the daemon serves.
    pub ready_fd: Option<u32>,
    /// Exit after so long without connections and locks. `None`: never.
    pub idle_exit: Option<Duration>,
    /// How to share the locks with other hosts. `None`: they are this host's alone.
    #[cfg(feature = "etcd")]
    pub clustering: Option<Clustering>,
    /// The names that clients over TCP may be, with their secrets and keys. `None`: clients need no name.
    pub auth_file: Option<PathBuf>,
    /// Serve TCP ports that other hosts can reach even if every client there may use every lock.
    pub open: bool,
    /// The certificates for the TLS ports among the addresses.
    #[cfg(feature = "tls")]
    pub tls: Option<crate::tls::ServerFiles>,
    /// Detach from the starting process and run in the background, as soon as the sockets are listening.
    pub detach: bool,
}

/// What happens to connections beyond the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// They are told so, and closed. Root and the daemon's own user may still do anything but lock.
    Answer,
    /// They wait until another connection is closed, as with KeyedMutex's daemon.
    Wait,
}

impl Config {
    /// Returns `true` if the locks are to be shared with other hosts.
    fn is_clustered(&self) -> bool {
        #[cfg(feature = "etcd")]
        return self.clustering.is_some();
        #[cfg(not(feature = "etcd"))]
        false
    }

    /// Returns `true` if there are certificates for TLS.
    fn has_tls(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.tls.is_some();
        #[cfg(not(feature = "tls"))]
        false
    }

    /// Serves these addresses, with safe values for everything else: only for the user's own processes, in the foreground.
    pub fn new(addrs: Vec<Addr>) -> Config {
        Config {
            addrs,
            access: Access { mode: 0o600, group: None },
            connections_max: None,
            when_full: WhenFull::Answer,
            hold_limit: Some(Duration::from_secs(30)),
            per_uid_max: None,
            reservations: Vec::new(),
            shows_commands: false,
            grace: Duration::from_secs(30),
            peer_timeout: Some(Duration::from_secs(30)),
            remote: false,
            state: None,
            remember_max: 100_000,
            share_total: 256 * 1024 * 1024,
            share_across_users: false,
            ready_fd: None,
            idle_exit: None,
            #[cfg(feature = "etcd")]
            clustering: None,
            auth_file: None,
            open: false,
            #[cfg(feature = "tls")]
            tls: None,
            detach: false,
        }
    }
}

/// Serves until HUP, INT or TERM arrives, or until the daemon was idle for long enough.
///
/// # Errors
/// If a socket or the journal cannot be used, or the kernel refuses something that the daemon needs.
pub fn serve(config: &Config) -> Result<(), Error> {
    let result = serve_until_end(config);
    if let Err(e) = &result
        && config.detach
    {
        detach::report_failure(e.exit());
    }
    result
}

fn serve_until_end(config: &Config) -> Result<(), Error> {
    let ready = config.ready_fd.map(take_ready_fd).transpose()?;
    if config.detach {
        detach::prepare().map_err(|e| Error::Os("prepare to detach", e))?;
    }
    accept::check_descriptor_limit()?;
    // Errors in the configuration of etcd are reported before anything is served.
    #[cfg(feature = "etcd")]
    let etcd = config.clustering.as_ref().map(|clustering| crate::etcd::Client::new(&clustering.etcd));
    #[cfg(feature = "etcd")]
    let etcd = etcd.transpose().map_err(Error::Etcd)?;
    if config.detach {
        refuse_without_cluster(config)?;
    }
    let gate = Gate::load(config)?;
    let exposure = Exposure::of(config);
    let mut listeners = Listener::inherit(config.has_tls(), exposure)?;
    if listeners.is_empty() {
        if let Some(addr) = config.addrs.iter().find(|addr| matches!(addr, Addr::Tls { .. }))
            && !config.has_tls()
        {
            return Err(Error::NoCertificate { addr: addr.clone() });
        }
        listeners = match &config.addrs[..] {
            [] => Listener::bind_default(&config.access)?,
            addrs => Listener::bind_all(addrs, &config.access, exposure)?,
        };
    }
    failpoint::hit("start");
    let recorder = open_recorder(config, &listeners)?;
    if recorder.lease().is_clustered() {
        // The journal may have changed since the first check.
        refuse_without_cluster(config)?;
    }
    if config.detach {
        detach::detach().map_err(|e| Error::Os("detach", e.into()))?;
    }
    listeners.iter_mut().try_for_each(Listener::write_pid)?;
    if let Some(timeout) = config.peer_timeout {
        let set = listeners.iter().try_for_each(|listener| listener.set_keepalive(timeout));
        set.map_err(|e| Error::Os("have the kernel watch TCP connections", e))?;
    }
    for listener in &listeners {
        info!("serving on {}", listener.name());
    }
    let sharers = Sharers::new(config.share_across_users);
    #[cfg(feature = "etcd")]
    let cluster = match config.clustering.as_ref().zip(etcd) {
        Some((etcd, client)) => Some(cluster::join(etcd, client, recorder.lease(), sharers.clone())?),
        None => None,
    };
    #[cfg(not(feature = "etcd"))]
    let cluster = None;
    let mut server = Server::new(config, listeners, recorder, gate, (cluster, sharers))
        .map_err(|e| Error::Os("start", e))?;
    notify_ready(ready).map_err(|e| Error::Os("report readiness", e))?;
    let reason = server.run().map_err(|e| Error::Os("wait for events", e))?;
    info!("stopping: {reason}");
    server.finish();
    Ok(())
}

/// A client starts this daemon because there is none. If the previous daemon shared its locks with other hosts, this one
/// would grant locks that those hosts hold. Checked before this daemon takes anything that the right one needs.
fn refuse_without_cluster(config: &Config) -> Result<(), Error> {
    let unix = config.addrs.iter().find_map(|addr| match addr {
        Addr::Unix(path) => Some(path),
        Addr::Loopback(_) | Addr::Tcp { .. } | Addr::Tls { .. } => None,
    });
    match unix {
        Some(path) if !config.is_clustered() && journal::is_clustered(&journal_of(path)) => {
            Err(Error::Clustered { path: path.clone() })
        }
        _ => Ok(()),
    }
}

/// Returns where a daemon keeps its journal by default: beside its first Unix socket.
fn journal_of(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".journal");
    PathBuf::from(path)
}

fn open_recorder(config: &Config, listeners: &[Listener]) -> Result<Recorder, Error> {
    if let Some(path) = &config.state {
        let path = std::path::absolute(path).map_err(|error| Error::Journal { path: path.clone(), error })?;
        let mut socket_lock = SocketLock::take(&path)?;
        socket_lock.write_pid()?;
        return Recorder::open(&path, Some(socket_lock), config);
    }
    let Some(socket) = listeners.iter().find_map(Listener::path) else {
        info!("no Unix socket and no --state: locks will not survive a restart of this daemon");
        return Ok(Recorder::none());
    };
    Recorder::open(&journal_of(socket), None, config)
}

/// Takes over the descriptor to report readiness on. Call it before opening any other file, which could get the same
/// number if the descriptor is not open.
fn take_ready_fd(number: u32) -> Result<File, Error> {
    let bad = |error| Error::ReadyFd { number, error };
    let raw = i32::try_from(number).map_err(|_| bad(nix::Error::EBADF.into()))?;
    let file = fd::dup(number).map_err(bad)?;
    nix::unistd::close(raw).map_err(|e| bad(e.into()))?;
    Ok(file)
}

/// Reports readiness to the starting process if it asked: with a newline on a descriptor, and as systemd wants it
/// (sd_notify(3)).
fn notify_ready(descriptor: Option<File>) -> io::Result<()> {
    if let Some(mut file) = descriptor {
        file.write_all(b"\n")?;
    }
    sd_notify::notify(&[sd_notify::NotifyState::Ready])
}

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An address is wrong or cannot be resolved.
    #[error(transparent)]
    Addr(#[from] addr::Error),
    /// There is no place for a socket.
    #[error(transparent)]
    Place(#[from] place::Error),
    /// A socket cannot be made.
    #[error("cannot serve on {addr}: {}", Reason(error))]
    Bind {
        /// Where.
        addr: Addr,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The lock file beside a socket cannot be used.
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
    /// The limit of open files is too low.
    #[error("cannot serve with at most {limit} open files: it takes {needed} (ulimit -n)")]
    Descriptors {
        /// The limit.
        limit: u64,
        /// How many it takes.
        needed: u64,
    },
    /// The kernel does not tell which boot of the machine this is, without which a journal cannot be believed.
    #[error("cannot read {}, which the journal needs: {}", recorder::BOOT_ID, Reason(.0))]
    BootId(#[source] io::Error),
    /// Another daemon serves this socket.
    #[error("cannot serve on {}: {}", path.display(), other_daemon(*pid))]
    Served {
        /// The socket.
        path: PathBuf,
        /// The other daemon, if its process id is known.
        pid: Option<u32>,
    },
    /// The locks of this socket are shared with other hosts, and this daemon was not told how.
    #[error("the locks of {} are shared with other hosts: start its daemon with --etcd", path.display())]
    Clustered {
        /// The socket.
        path: PathBuf,
    },
    /// The descriptor to report readiness on cannot be used.
    #[error("bad --ready-fd {number}: {}", Reason(error))]
    ReadyFd {
        /// Its number.
        number: u32,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The group for the sockets does not exist.
    #[error("bad --group {name:?}: {why}")]
    Group {
        /// What was given.
        name: String,
        /// Why.
        why: String,
    },
    /// The configuration of etcd is wrong.
    #[error(transparent)]
    #[cfg(feature = "etcd")]
    Etcd(crate::etcd::ConfigError),
    /// Other hosts could take any lock over this port, and nothing says that this is meant.
    #[error("not serving on {}{socket}, where every host that reaches it could take every lock: give {}, or --open if that is meant", if *is_tls { "tls://" } else { "" }, if *is_tls { "--tls-client-ca or --auth-file" } else { "--auth-file, or tls:// with --tls-client-ca" })]
    Exposed {
        /// The port.
        socket: SocketAddr,
        /// It speaks TLS.
        is_tls: bool,
    },
    /// A TLS port without a certificate.
    #[error("cannot serve on {addr}: it needs --tls-cert and --tls-key")]
    NoCertificate {
        /// Where.
        addr: Addr,
    },
    /// The file of names cannot be used.
    #[error(transparent)]
    Auth(crate::auth::Error),
    /// The certificates cannot be used.
    #[cfg(feature = "tls")]
    #[error(transparent)]
    Tls(crate::tls::Error),
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
            Error::Place(error) => error.exit(),
            Error::Bind { .. } | Error::LockFile { .. } | Error::Journal { .. } => Exit::CannotCreate,
            Error::Served { .. } => Exit::Busy,
            Error::Clustered { .. } => Exit::Unavailable,
            Error::Group { .. } | Error::ReadyFd { .. } => Exit::Usage,
            Error::Exposed { .. } | Error::NoCertificate { .. } | Error::Auth(_) => Exit::Usage,
            #[cfg(feature = "tls")]
            Error::Tls(error) => error.exit(),
            #[cfg(feature = "etcd")]
            Error::Etcd(_) => Exit::Usage,
            Error::BootId(_) | Error::Descriptors { .. } | Error::Os(..) => Exit::Os,
        }
    }
}

fn other_daemon(pid: Option<u32>) -> String {
    match pid {
        Some(pid) => format!("the daemon with pid {pid} does"),
        None => "another daemon does".into(),
    }
}
