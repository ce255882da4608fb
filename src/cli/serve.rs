//! The arguments of `kmutex serve`, and those of the daemon under its old name.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, ValueEnum, ValueHint};

use super::VERSION;
#[cfg(feature = "etcd")]
use super::value::etcd_timeout;
use super::value::{duration, octal, peer_timeout, reservation, size};

/// The arguments of `kmutex serve`.
#[derive(Args, Debug)]
pub struct Serve {
    /// Listen on ADDR: a path, a PORT (of 127.0.0.1 and ::1), or HOST:PORT (an IPv6 address in brackets); repeat for more
    ///
    /// The default is $KMUTEX_SOCK. If that is not set: the socket of this user's own daemon (root's is
    /// /run/kmutex/kmutex.sock) and, if no other daemon has it, /tmp/keyedmutexd.sock for clients of KeyedMutex.
    #[arg(short = 's', long, visible_alias = "socket", value_name = "ADDR", value_hint = ValueHint::AnyPath)]
    pub sock: Vec<OsString>,

    /// Remove an old socket file
    ///
    /// Start scripts written for keyedmutexd pass this option. kmutex replaces the socket of a dead daemon without it. In
    /// no case does kmutex replace the socket of a live daemon, or a file that is not a socket.
    #[arg(short, long)]
    pub force: bool,

    /// Serve at most N connections at a time; refuse further ones
    ///
    /// The default is as many as the limit of open files allows. The process that a lock of `kmutex lock` belongs to counts
    /// like a connection. A refused client exits with status 69; root and the daemon's user can still use `kmutex status`
    /// and `kmutex break`.
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub maxconn: Option<u32>,

    /// Release the lock of a protocol 1 client after DURATION and close its connection; 0 means never
    #[arg(short, long, value_name = "DURATION", default_value = "30", allow_negative_numbers = true, value_parser = duration)]
    pub timeout: Duration,

    /// Log nothing
    #[arg(long, conflicts_with = "log_level")]
    pub no_log: bool,

    /// Log level for standard error [env: RUST_LOG]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,

    /// Create Unix sockets with this octal mode
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = octal)]
    pub mode: u32,

    /// Create Unix sockets with this group: a name or a number
    #[arg(long, value_name = "GROUP")]
    pub group: Option<String>,

    /// Serve at most N connections per user on Unix sockets; refuse further ones
    ///
    /// The default is a quarter of all connections, and at least 16; then root and the daemon's user have no limit.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_per_uid: Option<u32>,

    /// Reserve the keys that begin with PREFIX for USER, or for the members of :GROUP; repeat for more
    ///
    /// Only these users and root can lock such a key, break its lock, or forget its runs. USER is also the name of a client over
    /// TCP (see --auth-file). The longest PREFIX counts; with the same PREFIX several times, each USER may. Without this
    /// option, a key that begins with @NAME/ belongs to the user NAME. No client of protocol 1 can hold a reserved key.
    #[arg(long, value_name = "PREFIX=USER|:GROUP", value_parser = reservation)]
    pub reserve: Vec<(String, String)>,

    /// Show the commands and notes of all users to every user
    ///
    /// Without this option, kmutex status shows them only to root, to the daemon's user and to the user whose they are. A
    /// waiter sees the holder's note in any case.
    #[arg(long)]
    pub show_commands: bool,

    /// Keep the journal in FILE instead of beside the first Unix socket
    ///
    /// The journal tells the next daemon which locks are held. A daemon that serves only TCP has no journal without this
    /// option, so its locks do not survive it.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub state: Option<PathBuf>,

    /// Keep the lock of a holder that has not reconnected for DURATION after a restart
    ///
    /// This applies to holders that the daemon can neither ask nor watch: those of protocol 1, those over TCP, and those in
    /// another container.
    #[arg(long, value_name = "DURATION", default_value = "30", allow_negative_numbers = true, value_parser = duration)]
    pub grace: Duration,

    /// Count a machine at the other end of a TCP connection as gone when it says nothing for DURATION; 0 means never
    ///
    /// Its locks are free then. A kmutex on that machine that cannot reach the daemon stops its command before that (status 74).
    /// After the start of a daemon that other machines can reach and that has no journal of an earlier one, no lock is granted for
    /// so long, because clients of an earlier daemon may hold it.
    #[arg(long, value_name = "DURATION", default_value = "30", allow_negative_numbers = true, value_parser = peer_timeout)]
    pub peer_timeout: Duration,

    /// Treat all clients as if they were on other machines, because they come through a forwarder such as sshd
    ///
    /// The daemon does so by itself for a client on a Unix socket that is not the process at the other end of the connection. See
    /// --peer-timeout; the end of a connection does not say that the client has ended then.
    #[arg(long)]
    pub remote: bool,

    /// Remember for N locks when their work was last done (see run --fresh); the oldest are forgotten first
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    pub remember_max: u32,

    /// Keep at most SIZE of results for run --share with --fresh; the oldest are dropped first
    ///
    /// SIZE is a number of bytes, or a number with K, M or G. The results are kept in memory, and go with the daemon.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    pub share_total: u64,

    /// Give root's results (run --share) to the callers of all users
    ///
    /// Without this option, a result is given only to callers of the user who ran the command.
    #[arg(long)]
    pub share_across_users: bool,

    /// Admit only clients over TCP that give a name and its secret, as listed in FILE
    ///
    /// FILE has lines NAME SECRET PATTERN...: the secret as printed by kmutex hash-secret, or - for a name that is used with
    /// certificates only; the patterns (with * and ?) of the keys that the name may lock, or none for all keys. The pattern
    /// !admin permits the name to break every lock. The daemon reads FILE again when it changes, and on SIGUSR1.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub auth_file: Option<PathBuf>,

    /// Serve TCP ports that other hosts can reach without --auth-file or --tls-client-ca: every client may take every lock
    #[arg(long)]
    pub open: bool,

    /// Show the certificate in FILE (PEM) to clients of tls:// addresses [env: KMUTEX_TLS_CERT]
    ///
    /// Intermediate certificates follow it in FILE. The daemon reads all certificates again when a file changes, and on
    /// SIGUSR1.
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tls_cert: Option<PathBuf>,

    /// Read the key of that certificate from FILE (PEM) [env: KMUTEX_TLS_KEY]
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tls_key: Option<PathBuf>,

    /// Admit only clients whose certificate is signed by an authority in FILE (PEM) [env: KMUTEX_TLS_CLIENT_CA]
    ///
    /// With --auth-file, a certificate stands for its common name, or one of its alternative names, if that file lists it;
    /// clients without a certificate need a secret.
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tls_client_ca: Option<PathBuf>,

    /// How to cluster the locks
    #[cfg(feature = "etcd")]
    #[command(flatten)]
    pub etcd: Etcd,

    /// Write a newline to descriptor FD when serving, and close it
    #[arg(long, value_name = "FD")]
    pub ready_fd: Option<u32>,

    /// Exit after DURATION without locks and connections
    #[arg(long, value_name = "DURATION", allow_negative_numbers = true, value_parser = duration)]
    pub idle_exit: Option<Duration>,

    /// Detach from the calling process, and write a newline to standard output when serving (used by run)
    #[arg(long, hide = true)]
    pub detach: bool,
}

/// How `kmutex serve` clusters its locks.
#[cfg(feature = "etcd")]
#[derive(Args, Debug)]
pub struct Etcd {
    /// Cluster the locks with all hosts that use the same etcd; URL is http://HOST:PORT or https://HOST:PORT of a member
    ///
    /// Separate several members by commas, or repeat the option. kmutex tries them in turn.
    #[arg(long = "etcd", value_name = "URL", value_delimiter = ',')]
    pub endpoints: Vec<String>,

    /// Trust only members of etcd with a certificate signed by an authority in FILE (PEM)
    ///
    /// Without it, the authorities of the system are trusted.
    #[arg(long = "etcd-ca", value_name = "FILE", value_hint = ValueHint::FilePath, requires = "endpoints")]
    pub ca: Option<PathBuf>,

    /// Client certificate (PEM)
    #[arg(long = "etcd-cert", value_name = "FILE", value_hint = ValueHint::FilePath, requires = "key")]
    pub cert: Option<PathBuf>,

    /// Key of the client certificate (PEM)
    #[arg(long = "etcd-key", value_name = "FILE", value_hint = ValueHint::FilePath, requires = "cert")]
    pub key: Option<PathBuf>,

    /// etcd user name
    #[arg(long = "etcd-user", value_name = "NAME", requires = "password_file")]
    pub user: Option<String>,

    /// File whose first line is the password of the etcd user
    #[arg(long = "etcd-password-file", value_name = "FILE", value_hint = ValueHint::FilePath, requires = "user")]
    pub password_file: Option<PathBuf>,

    /// Time to live of this host's lease: if the host dies, its locks are free after SECS seconds
    #[arg(long = "etcd-ttl", value_name = "SECS", default_value_t = 10, requires = "endpoints",
          value_parser = clap::value_parser!(u64).range(2..=86_400))]
    pub ttl: u64,

    /// Wait SECS seconds for each answer of a member, before kmutex tries the next one
    ///
    /// A slow link needs more, and then a longer --etcd-ttl too: at least five times this.
    #[arg(id = "etcd_timeout", long = "etcd-timeout", value_name = "SECS", default_value = "1", allow_negative_numbers = true,
          requires = "endpoints", value_parser = etcd_timeout)]
    pub timeout: Duration,

    /// Prefix of all keys in etcd
    #[arg(long = "etcd-prefix", value_name = "PREFIX", default_value = "kmutex", requires = "endpoints")]
    pub prefix: String,
}

/// How much the daemon logs. Each level includes the levels before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// Errors that end the daemon, or that cost a client its connection through no fault of the client.
    Error,
    /// Conditions that an administrator should look at.
    Warn,
    /// Start and stop. This is the default.
    Info,
    /// Every connect, grant, wait, release, expiry and close.
    Debug,
}

/// The options of KeyedMutex's daemon, with its defaults: what the binary takes when it is called `keyedmutexd`.
///
/// The lock daemon of KeyedMutex, provided by kmutex
#[derive(Debug, Parser)]
#[command(name = "keyedmutexd", version = VERSION, disable_version_flag = true)]
pub struct Keyedmutexd {
    /// Remove an old socket file
    #[arg(short, long)]
    pub force: bool,

    /// Listen on this Unix socket, or on this port of 127.0.0.1 and ::1
    #[arg(short, long, value_name = "PATH|PORT", default_value = "/tmp/keyedmutexd.sock")]
    pub socket: OsString,

    /// Serve at most N connections at a time; further connections wait
    #[arg(short, long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub maxconn: u32,

    /// Release the lock of a client after SECS seconds
    #[arg(short, long, value_name = "SECS", default_value = "30", allow_negative_numbers = true, value_parser = duration)]
    pub timeout: Duration,

    /// Log nothing
    #[arg(long)]
    pub no_log: bool,

    /// Print version
    #[arg(short, long, action = ArgAction::Version)]
    version: Option<bool>,
}

/// Returns `true` if `program` is the name under which the binary acts as KeyedMutex's daemon.
pub fn is_keyedmutexd(program: &std::ffi::OsStr) -> bool {
    PathBuf::from(program).file_name().is_some_and(|name| name == "keyedmutexd")
}
