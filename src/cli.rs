//! The command line: the clap definitions. The man pages and the completions are generated from them.
//!
//! clap checks each argument by itself. The commands parse addresses, keys and the like.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `cli/lock.rs` | the arguments of `kmutex run`, `kmutex lock` and `kmutex unlock` |
//! | `cli/plain.rs` | the options of `kmutex run` that scripts use most, read without clap |
//! | `cli/serve.rs` | those of `kmutex serve`, and of the daemon under its old name |
//! | `cli/value.rs` | how the values of options are written |

mod lock;
mod plain;
mod serve;
mod value;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueHint};

pub use lock::{Lock, LockArgs, Run, Unlock};
#[cfg(feature = "etcd")]
pub use serve::Etcd;
pub use serve::{Keyedmutexd, LogLevel, Serve, is_keyedmutexd};

/// The version, and the features that this binary was built with; `etcd` contains `tls`.
const VERSION: &str = if cfg!(feature = "etcd") {
    concat!(env!("CARGO_PKG_VERSION"), " (etcd)")
} else if cfg!(feature = "tls") {
    concat!(env!("CARGO_PKG_VERSION"), " (tls)")
} else {
    env!("CARGO_PKG_VERSION")
};

/// flock(1) for keys, with single-flight
///
/// kmutex runs a command under a named lock. A caller that finds the lock held waits until the holder finishes and then
/// skips its own command, because the work is already done. With --queue, each caller gets its turn.
#[derive(Debug, Parser)]
#[command(name = "kmutex", version = VERSION, disable_help_subcommand = true)]
pub struct Cli {
    /// The subcommand.
    #[command(subcommand)]
    pub command: Command,
}

/// Reads the command line of `kmutex`, the program's name included.
///
/// # Errors
/// Clap's, whose text [`requested_text`] and [`error_text`] make fit for one line.
pub fn parse(args: Vec<OsString>) -> Result<Command, clap::Error> {
    let plain = args.get(1).filter(|word| *word == "run").and_then(|_| plain::run(&args[2..]));
    match plain {
        Some(run) => Ok(Command::Run(run)),
        None => Cli::try_parse_from(args).map(|cli| cli.command),
    }
}

/// The text of `--help` or `--version`, if that is what the command line asked for.
pub fn requested_text(error: &clap::Error) -> Option<String> {
    matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion)
        .then(|| error.render().to_string())
}

/// What is wrong with a command line, as one line. Clap explains an error over several lines; its first paragraph says what
/// is wrong.
pub fn error_text(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "a subcommand is required".into();
    }
    let text = error.render().to_string();
    let first = text.lines().take_while(|line| !line.is_empty());
    let joined = first.map(str::trim).collect::<Vec<_>>().join(" ");
    joined.trim_start_matches("error: ").into()
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command under a lock
    ///
    /// Acquires the lock KEY, runs COMMAND, and releases the lock. If another process holds the lock, waits until it
    /// finishes and then skips COMMAND, because the work is already done; the exit status is 79. With --queue, waits in
    /// line and always runs COMMAND, like flock(1). If the holder disappears without finishing, one of the waiters takes
    /// over.
    ///
    /// If no daemon listens on the socket, starts a daemon that exits after one idle minute.
    Run(Run),
    /// Acquire a lock for the calling shell
    ///
    /// The shell holds the lock until it runs kmutex unlock KEY, or until it exits. If another process held the lock and
    /// finished meanwhile, exits with 79 without the lock: `kmutex lock report || exit`.
    Lock(Lock),
    /// Release a lock acquired with kmutex lock
    ///
    /// The waiters learn that the work is done.
    Unlock(Unlock),
    /// Show the locks with their holders and waiters
    ///
    /// Prints a table for people, or with --json one JSON object per line for programs.
    Status(Status),
    /// Take a lock away from its holder
    ///
    /// The holder of KEY learns that the lock is lost and stops its command (unless it runs with --on-lost continue). The
    /// next waiter gets the lock. Requires root, the daemon's user, or the holder's user.
    Break(Break),
    /// Forget when the work of a lock was last done
    ///
    /// The next request with --fresh runs its command. Requires root, the daemon's user, or the user who ran it.
    Forget(Forget),
    /// Run the lock daemon
    ///
    /// Serves protocols 1 and 2 of docs/protocol.md on each given socket, in the foreground, until HUP, INT or TERM.
    Serve(Serve),
    /// Hash a secret for kmutex serve --auth-file
    ///
    /// Reads the secret from standard input, as one line, and prints its hash (Argon2id, with a random salt).
    HashSecret,
}

/// What `kmutex status` takes.
#[derive(Args, Debug)]
pub struct Status {
    /// Show only the lock KEY
    pub key: Option<OsString>,

    /// Print one JSON object per lock, each on its own line
    #[arg(long)]
    pub json: bool,

    /// Print only the keys, one per line (keys with control characters are left out)
    #[arg(long, conflicts_with = "json")]
    pub keys: bool,

    /// Show the clustered locks of all hosts (see kmutex serve --etcd)
    #[arg(long, conflicts_with = "key")]
    pub cluster: bool,

    /// Refresh the table every second until interrupted
    #[arg(long, conflicts_with_all = ["json", "keys"])]
    pub watch: bool,

    /// How to reach the daemon
    #[command(flatten)]
    pub daemon: Daemon,
}

/// The arguments of `kmutex break`.
#[derive(Args, Debug)]
pub struct Break {
    /// The lock's name
    pub key: OsString,

    /// Break the lock without asking first
    #[arg(short, long)]
    pub yes: bool,

    /// How to reach the daemon
    #[command(flatten)]
    pub daemon: Daemon,
}

/// The arguments of `kmutex forget`.
#[derive(Args, Debug)]
pub struct Forget {
    /// The lock's name
    pub key: OsString,

    /// How to reach the daemon
    #[command(flatten)]
    pub daemon: Daemon,
}

/// How a client reaches its daemon, and which users it trusts.
#[derive(Args, Debug, Default, PartialEq)]
pub struct Daemon {
    /// Connect to the daemon at ADDR: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)
    ///
    /// The default is $KMUTEX_SOCK. If that is not set: the machine's daemon, /run/kmutex/kmutex.sock, if it is there and this
    /// user may connect; or a trusted daemon on /tmp/keyedmutexd.sock; or this user's own daemon. See WHICH DAEMON in kmutex(1).
    #[arg(long, value_name = "ADDR", value_hint = ValueHint::AnyPath)]
    pub sock: Option<OsString>,

    /// Trust a daemon of this user id too, besides root's and the caller's
    #[arg(long, value_name = "UID")]
    pub trust_uid: Vec<u32>,

    /// Give the name and secret in FILE to a daemon that is reached over TCP [env: KMUTEX_AUTH_FILE]
    ///
    /// FILE has one line NAME SECRET, and only its owner may have access to it (mode 600).
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub auth_file: Option<PathBuf>,

    /// Trust daemons at tls:// whose certificate is signed by an authority in FILE (PEM), and no others [env: KMUTEX_TLS_CA]
    ///
    /// Without it, the authorities of the system are trusted.
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tls_ca: Option<PathBuf>,

    /// Show the certificate in FILE (PEM) to a daemon at tls:// [env: KMUTEX_TLS_CERT]
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tls_cert: Option<PathBuf>,

    /// Read the key of that certificate from FILE (PEM) [env: KMUTEX_TLS_KEY]
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tls_key: Option<PathBuf>,
}
