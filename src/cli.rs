//! The command line: the clap definitions. The man pages and the completions are generated from them.
//!
//! clap checks each argument by itself. The commands parse addresses, keys and the like.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgAction, Args, FromArgMatches, Parser, Subcommand, ValueEnum, ValueHint};

use crate::acquire::OnPeerFailure;
use crate::run::{OnLost, Share};

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
    match parse_run(&args) {
        Some(run) => Ok(Command::Run(run)),
        None => Cli::try_parse_from(args).map(|cli| cli.command),
    }
}

/// `run` is started often and briefly: it does not pay for making the definitions of all other commands, nor for dropping
/// its own afterwards. `None`: this is not plainly a good `run`, and the whole definition says what it is.
fn parse_run(args: &[OsString]) -> Option<Run> {
    if args.get(1)? != "run" {
        return None;
    }
    let mut command = Run::augment_args(clap::Command::new("run"));
    let matches = command.try_get_matches_from_mut(&args[1..]);
    std::mem::forget(command);
    let mut matches = matches.ok()?;
    let run = Run::from_arg_matches_mut(&mut matches).ok()?;
    std::mem::forget(matches);
    Some(run)
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

/// The arguments of `kmutex run`.
#[derive(Args, Debug)]
#[command(
    override_usage = "kmutex run [OPTIONS] KEY [--] COMMAND [ARG]...\n       kmutex run [OPTIONS] KEY -c SHELL_COMMAND\n       kmutex run [OPTIONS] -k KEY [-k KEY]... -- COMMAND [ARG]..."
)]
pub struct Run {
    /// The lock's name: 1 to 1024 bytes of UTF-8
    #[arg(required_unless_present = "keys")]
    pub key: Option<OsString>,

    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<OsString>,

    /// Run SHELL_COMMAND with $SHELL -c, or /bin/sh -c if SHELL is not set
    #[arg(short = 'c', long = "command", value_name = "SHELL_COMMAND", conflicts_with = "command")]
    pub shell_command: Option<OsString>,

    /// Lock KEY; repeat to hold several locks
    ///
    /// If any of them cannot be acquired, none is held. All callers acquire locks in the same order, so two callers
    /// cannot wait for each other.
    #[arg(short = 'k', long = "key", value_name = "KEY")]
    pub keys: Vec<OsString>,

    /// How to acquire the lock
    #[command(flatten)]
    pub lock: LockArgs,

    /// Hold the lock until the command and all its descendants have exited
    ///
    /// kmutex then passes SIGTERM to all of them, and stops all of them if the lock is lost. The exit status is the
    /// command's.
    #[arg(long, conflicts_with = "no_fork")]
    pub tree: bool,

    /// Give the result of the run to the callers that waited for it: standard output, standard error and the exit status
    ///
    /// They do not run the command. Each gets all of the output at the end (whole), or from the beginning as it comes (live).
    /// If the holder disappears before its end, one of the waiters takes over. With --share=live, a waiter that has written
    /// part of the output then exits with 74. Only callers of the same user get the result. Standard output and standard error
    /// of the command are pipes then, not the terminal.
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "whole",
          conflicts_with_all = ["no_fork", "queue", "newest", "replace", "replace_after", "shared", "slots"])]
    pub share: Option<Share>,

    /// Do not share an output that is longer than SIZE: a number of bytes, or a number with K, M or G
    ///
    /// The command runs to its end nevertheless. The waiters then exit as after --finished-exit-code, and say why.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size)]
    pub share_max: u64,

    /// Give an older result at once, if that run began less than DURATION ago; one such caller runs the command anew
    ///
    /// It does so in the background, and the next callers get the new result. Needs --share and a shorter --fresh.
    #[arg(long, value_name = "DURATION", requires_all = ["share", "fresh"], value_parser = positive_duration)]
    pub stale: Option<Duration>,

    /// Run the command under the lock that standard input names, which another kmutex run has acquired (used by --stale)
    #[arg(long, hide = true)]
    pub refresh: bool,

    /// Run the command without locking if an enclosing kmutex run already holds the lock
    ///
    /// Without this option that is an error, because the two would wait for each other.
    #[arg(long)]
    pub reentrant: bool,

    /// Write a report to descriptor FD at the end: one line with a JSON object
    #[arg(long, value_name = "FD", conflicts_with_all = ["no_fork", "status_file"])]
    pub status_fd: Option<u32>,

    /// Write the report of --status-fd to FILE
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "no_fork")]
    pub status_file: Option<PathBuf>,

    /// Close the lock's descriptor before running the command
    ///
    /// Without this option the command inherits the descriptor, and the lock is held while kmutex or the command lives,
    /// even if kmutex is killed.
    #[arg(short = 'o', long, conflicts_with = "no_fork")]
    pub close: bool,

    /// Replace kmutex with the command instead of waiting for it
    ///
    /// The lock is then held until the command, and all processes that inherited the descriptor from it, have exited. The
    /// waiters do not learn how the command exited.
    #[arg(short = 'F', long)]
    pub no_fork: bool,

    /// Choose what to do if the lock is lost while the command runs
    ///
    /// A lock is lost when a daemon dies and its journal is lost too, when another user breaks the lock, or, with
    /// kmutex serve --etcd, when the host cannot reach etcd for too long.
    #[arg(long, value_name = "WHAT", default_value = "kill")]
    pub on_lost: OnLost,

    /// Wait for DURATION between SIGTERM and SIGKILL when stopping a command
    #[arg(long, value_name = "DURATION", default_value = "5", allow_negative_numbers = true, value_parser = duration)]
    pub kill_after: Duration,

    /// Stop the command and its descendants after DURATION (SIGTERM, then SIGKILL); exit with 124
    ///
    /// The time begins when the lock is granted. The lock is released when they have all ended, and counts as failed.
    #[arg(long, value_name = "DURATION", conflicts_with = "no_fork", value_parser = positive_duration)]
    pub max_hold: Option<Duration>,

    /// Warn, here and in the daemon's log, if the lock is held for longer than DURATION
    #[arg(long, value_name = "DURATION", conflicts_with = "no_fork", value_parser = positive_duration)]
    pub warn_after: Option<Duration>,
}

/// How to acquire a lock: the options that `run` and `lock` have in common.
#[derive(Args, Debug)]
pub struct LockArgs {
    /// Wait in line and always run, like flock(1)
    #[arg(long)]
    pub queue: bool,

    /// Acquire a shared lock, which other shared holders can hold too
    #[arg(short, long, conflicts_with_all = ["exclusive", "slots"])]
    pub shared: bool,

    /// Acquire an exclusive lock (the default)
    #[arg(short = 'x', short_alias = 'e', long)]
    pub exclusive: bool,

    /// Let up to N holders hold the lock at a time
    #[arg(long, value_name = "N", default_value_t = 1, hide_default_value = true, conflicts_with = "exclusive",
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub slots: u32,

    /// Skip the command if a run that succeeded began less than DURATION ago
    ///
    /// The exit status is that of --finished-exit-code. Only the end of a run counts, never its beginning: a command that
    /// crashes is run again. The daemon remembers a run for the longest DURATION that a request named for it. See also
    /// kmutex status KEY and kmutex forget.
    #[arg(long, value_name = "DURATION", conflicts_with_all = ["coalesce", "shared", "slots"],
          value_parser = positive_duration)]
    pub fresh: Option<Duration>,

    /// Skip the command if a run that failed began less than DURATION ago
    ///
    /// With --on-peer-failure adopt, the exit status is that of the failure.
    #[arg(long, value_name = "DURATION", conflicts_with_all = ["coalesce", "shared", "slots"],
          value_parser = positive_duration)]
    pub fresh_failure: Option<Duration>,

    /// Wait for the end of a run that begins after this request
    ///
    /// Requests that come during a run form a batch: at its end the newest of them runs its command, and the others wait
    /// for that run and skip theirs.
    #[arg(long, conflicts_with_all = ["queue", "shared", "slots", "newest", "replace", "replace_after"])]
    pub coalesce: bool,

    /// Wait in line until a newer request with --newest comes; then exit as after --finished-exit-code
    #[arg(long, conflicts_with_all = ["shared", "slots"])]
    pub newest: bool,

    /// Stop the holder, wait until its command has ended, and run; implies --queue and --newest
    ///
    /// The holder must belong to the same user, and kmutex run must be waiting for its command. Root may stop every holder.
    #[arg(long, conflicts_with_all = ["shared", "slots", "nonblock"])]
    pub replace: bool,

    /// Like --replace, but let the holder finish by itself for DURATION first
    #[arg(long, value_name = "DURATION", conflicts_with_all = ["shared", "slots", "nonblock"], value_parser = duration)]
    pub replace_after: Option<Duration>,

    /// Do not let requests with --replace stop this command; they wait in line instead
    #[arg(long)]
    pub no_replace: bool,

    /// Take N of the --slots
    ///
    /// The sum of the weights of all holders is at most the number of slots. All callers with --weight must agree about
    /// that number.
    #[arg(long, value_name = "N", requires = "slots", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub weight: Option<u32>,

    /// Fail instead of waiting if another process holds the lock
    #[arg(short, long = "nonblock", aliases = ["nb", "nonblocking"])]
    pub nonblock: bool,

    /// Fail after waiting for DURATION: seconds, or a number with s, m, h or d (0 means --nonblock)
    #[arg(short, long, visible_alias = "timeout", value_name = "DURATION", allow_negative_numbers = true,
          value_parser = duration)]
    pub wait: Option<Duration>,

    /// Exit status if the lock could not be acquired (--nonblock, or --wait timed out)
    #[arg(short = 'E', long, value_name = "N", default_value_t = 75, allow_negative_numbers = true)]
    pub conflict_exit_code: u8,

    /// Exit status if another holder finished first
    #[arg(long, value_name = "N", default_value_t = 79, allow_negative_numbers = true)]
    pub finished_exit_code: u8,

    /// Choose what to do if the awaited holder failed (exit status other than 0, or death by a signal)
    #[arg(long, value_name = "WHAT", default_value = "skip")]
    pub on_peer_failure: OnPeerFailure,

    /// Show TEXT to waiters and in kmutex status
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub note: OsString,

    /// Fail instead of starting a daemon
    #[arg(long)]
    pub no_autostart: bool,

    /// Report on standard error who holds the lock and how long the wait took
    #[arg(long)]
    pub verbose: bool,

    /// How to reach the daemon
    #[command(flatten)]
    pub daemon: Daemon,
}

/// The arguments of `kmutex lock`.
#[derive(Args, Debug)]
pub struct Lock {
    /// The lock's name: 1 to 1024 bytes of UTF-8
    pub key: OsString,

    /// Acquire the lock for process PID instead of the calling process
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Option<u32>,

    /// Acquire the lock for the open file of descriptor N, as flock(1) does: as long as any process has it open
    #[arg(long, value_name = "N", conflicts_with = "pid")]
    pub fd: Option<u32>,

    /// How to acquire the lock
    #[command(flatten)]
    pub lock: LockArgs,
}

/// The arguments of `kmutex unlock`.
#[derive(Args, Debug)]
pub struct Unlock {
    /// The lock's name
    pub key: OsString,

    /// Release the lock of process PID instead of the calling process
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Option<u32>,

    /// Release the lock of the open file of descriptor N
    #[arg(long, value_name = "N", conflicts_with = "pid")]
    pub fd: Option<u32>,

    /// How to reach the daemon
    #[command(flatten)]
    pub daemon: Daemon,
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
#[derive(Args, Debug)]
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
    /// The default is to trust the public authorities.
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

/// Parses a duration: a number of seconds, with or without a fraction, or a number with a unit (s, m, h or d).
fn duration(text: &str) -> Result<Duration, String> {
    let units = [("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86400.0)];
    let unit = units.into_iter().find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, seconds)));
    let (number, seconds) = unit.unwrap_or((text, 1.0));
    let number: f64 = number.parse().map_err(|_| "not a number of seconds, nor one with s, m, h or d")?;
    Duration::try_from_secs_f64(number * seconds).map_err(|_| "must be from 0 to 1.8e19 seconds".into())
}

/// Parses 0, or a duration for which the kernel can watch a connection.
fn peer_timeout(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        short if !short.is_zero() && short < Duration::from_secs(1) => {
            Err("must be 0, or at least 1 second".into())
        }
        long if long > Duration::from_secs(86_400) => Err("must be at most 1 day".into()),
        other => Ok(other),
    }
}

/// Parses a duration that is longer than none.
fn positive_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be longer than 0".into()),
        other => Ok(other),
    }
}

/// Parses a size: a number of bytes, with or without a unit (K, M or G: powers of 1024).
fn size(text: &str) -> Result<u64, String> {
    let units = [("K", 10), ("k", 10), ("M", 20), ("m", 20), ("G", 30), ("g", 30)];
    let unit = units.into_iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, shift)));
    let (number, shift) = unit.unwrap_or((text, 0));
    let number: u64 = number.parse().map_err(|_| "not a number of bytes, nor one with K, M or G")?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".into())
}

/// Parses how long to wait for etcd, in seconds.
#[cfg(feature = "etcd")]
fn etcd_timeout(text: &str) -> Result<Duration, String> {
    let timeout = duration(text)?;
    match timeout.as_secs_f64() {
        0.05..=60.0 => Ok(timeout),
        _ => Err("not from 0.05 to 60 seconds".into()),
    }
}

/// Parses `PREFIX=USER` or `PREFIX=:GROUP`. A prefix may have equals signs, a name has none.
fn reservation(text: &str) -> Result<(String, String), String> {
    match text.rsplit_once('=') {
        Some(("", _)) => Err("PREFIX is empty".into()),
        Some((_, "" | ":")) => Err("USER or :GROUP is missing".into()),
        Some((prefix, owner)) => Ok((prefix.into(), owner.into())),
        None => Err("not PREFIX=USER or PREFIX=:GROUP".into()),
    }
}

/// Parses an octal file mode of permission bits only.
fn octal(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("not an octal mode from 0 to 777".into()),
    }
}
