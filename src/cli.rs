//! The command line: the clap definitions, from which the man pages and the completions are generated too.
//!
//! Only what can be told from one argument alone is checked here; addresses, keys and the like are parsed by those who
//! use them.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgAction, Args, FromArgMatches, Parser, Subcommand, ValueEnum, ValueHint};

use crate::acquire::OnPeerFailure;
use crate::run::OnLost;

/// The version, and the features that this binary was built with.
const VERSION: &str = if cfg!(feature = "etcd") {
    concat!(env!("CARGO_PKG_VERSION"), " (etcd)")
} else {
    env!("CARGO_PKG_VERSION")
};

/// flock(1) for keys, with single-flight
///
/// kmutex runs a command under a lock that is named by a key. While one holds the key, others wait; when the holder is
/// done, those who waited do not run the command again, unless they ask for their turn with --queue.
#[derive(Debug, Parser)]
#[command(name = "kmutex", version = VERSION, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
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
        return "what to do is missing".into();
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
    /// Acquires the lock of KEY, runs COMMAND, and releases the lock. If somebody else holds the key, waits until that
    /// holder is done and then does not run COMMAND, because the work has just been done: the exit status says so. With
    /// --queue, waits for its turn and runs COMMAND always, as flock(1) does. Should a holder vanish without being
    /// done, one of those who wait takes its place.
    ///
    /// If nothing listens on the socket, starts a daemon there, which ends itself after a minute without use.
    Run(Run),
    /// Take a lock for the shell that this is started from
    ///
    /// The lock is held when this returns, and until kmutex unlock KEY, or until that shell ends. Exits with 79 if
    /// somebody else held the lock and finished meanwhile: `kmutex lock report || exit`.
    Lock(Lock),
    /// Release a lock that kmutex lock has taken
    ///
    /// Those who waited are told that the work is done.
    Unlock(Unlock),
    /// Show who holds which locks, and who waits
    ///
    /// A table for people, or with --json one JSON object a line for programs.
    Status(Status),
    /// Free a lock by force
    ///
    /// Whoever holds the lock of KEY is told that it is lost, and stops what runs under it (unless it runs with
    /// --on-lost continue); whoever is next gets the lock. Only root, the daemon's user and the holder's may do this.
    Break(Break),
    /// Serve locks: the daemon
    ///
    /// Serves protocols 1 and 2 of docs/protocol.md on each socket given, in the foreground, until HUP, INT or TERM.
    Serve(Serve),
}

/// What `kmutex run` takes.
#[derive(Args, Debug)]
#[command(
    override_usage = "kmutex run [OPTIONS] KEY [--] COMMAND [ARG]...\n       kmutex run [OPTIONS] KEY -c SHELL_COMMAND\n       kmutex run [OPTIONS] -k KEY [-k KEY]... -- COMMAND [ARG]..."
)]
pub struct Run {
    /// The lock's name: 1 to 1024 bytes of UTF-8
    #[arg(required_unless_present = "keys")]
    pub key: Option<OsString>,

    /// The command, and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<OsString>,

    /// Run SHELL_COMMAND with $SHELL -c, or /bin/sh -c if SHELL is not set
    #[arg(short = 'c', long = "command", value_name = "SHELL_COMMAND", conflicts_with = "command")]
    pub shell_command: Option<OsString>,

    /// Run under the lock of this KEY and those of all others that are named so, instead of one KEY
    ///
    /// All or nothing: if one of them is not to be had, none is kept. They are taken in an order that is the same for
    /// everybody, so that no two wait for each other.
    #[arg(short = 'k', long = "key", value_name = "KEY")]
    pub keys: Vec<OsString>,

    /// How to ask for the lock
    #[command(flatten)]
    pub lock: LockArgs,

    /// Hold the lock until all that the command has started has ended, and not only the command itself
    ///
    /// SIGTERM to kmutex, and a lost lock, then reach all of it. The exit status is the command's.
    #[arg(long, conflicts_with = "no_fork")]
    pub tree: bool,

    /// If the lock is held by the kmutex run that this one runs under, run the command without taking it again
    ///
    /// Otherwise that is an error, since the two would wait for each other.
    #[arg(long)]
    pub reentrant: bool,

    /// At the end, write what happened to descriptor FD: one JSON object on a line
    #[arg(long, value_name = "FD", conflicts_with_all = ["no_fork", "status_file"])]
    pub status_fd: Option<u32>,

    /// The same, to FILE
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "no_fork")]
    pub status_file: Option<PathBuf>,

    /// Keep the lock's descriptor from the command
    ///
    /// Without this the command inherits it, so that the lock lasts as long as kmutex or the command lives, even when
    /// kmutex is killed.
    #[arg(short = 'o', long, conflicts_with = "no_fork")]
    pub close: bool,

    /// Become the command instead of waiting for it
    ///
    /// The lock then ends when the command, and all who inherited the descriptor from it, have ended; how it ended is
    /// not told to those who waited.
    #[arg(short = 'F', long)]
    pub no_fork: bool,

    /// What to do when the lock is lost while the command runs
    ///
    /// That happens when the journal of a daemon that died is lost too, or when somebody breaks the lock.
    #[arg(long, value_name = "WHAT", default_value = "kill")]
    pub on_lost: OnLost,

    /// After SIGTERM for a lost lock, send SIGKILL to what is left after SECS seconds
    #[arg(long, value_name = "SECS", default_value = "5", allow_negative_numbers = true, value_parser = seconds)]
    pub kill_after: Duration,
}

/// How a lock is asked for: what `run` and `lock` have in common.
#[derive(Args, Debug)]
pub struct LockArgs {
    /// Wait for my turn, whoever had the lock before
    #[arg(long)]
    pub queue: bool,

    /// Share the lock with others who ask for a shared one
    #[arg(short, long, conflicts_with_all = ["exclusive", "slots"])]
    pub shared: bool,

    /// Hold the lock alone; this is the default
    #[arg(short = 'x', short_alias = 'e', long)]
    pub exclusive: bool,

    /// Take the lock while fewer than N hold it
    #[arg(long, value_name = "N", default_value_t = 1, hide_default_value = true, conflicts_with = "exclusive",
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub slots: u32,

    /// Do not wait: if somebody else holds the lock, fail
    #[arg(short, long = "nonblock", aliases = ["nb", "nonblocking"], conflicts_with = "wait")]
    pub nonblock: bool,

    /// Wait for at most SECS seconds, which may have a fraction, then fail; 0 is --nonblock
    #[arg(short, long, visible_alias = "timeout", value_name = "SECS", allow_negative_numbers = true,
          value_parser = seconds)]
    pub wait: Option<Duration>,

    /// The exit status when the lock was not to be had: busy with --nonblock, or --wait ran out
    #[arg(short = 'E', long, value_name = "N", default_value_t = 75, allow_negative_numbers = true)]
    pub conflict_exit_code: u8,

    /// The exit status when another holder finished first
    #[arg(long, value_name = "N", default_value_t = 79, allow_negative_numbers = true)]
    pub finished_exit_code: u8,

    /// What to do when the holder that was waited for has failed: ended with a status other than 0, or died of a signal
    #[arg(long, value_name = "WHAT", default_value = "skip")]
    pub on_peer_failure: OnPeerFailure,

    /// Show TEXT to those who wait for this one, and in kmutex status
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub note: OsString,

    /// Do not start a daemon if none is there
    #[arg(long)]
    pub no_autostart: bool,

    /// Say on standard error who holds the lock, and how long it took to get it
    #[arg(long)]
    pub verbose: bool,

    /// Where the daemon is
    #[command(flatten)]
    pub daemon: Daemon,
}

/// What `kmutex lock` takes.
#[derive(Args, Debug)]
pub struct Lock {
    /// The lock's name: 1 to 1024 bytes of UTF-8
    pub key: OsString,

    /// Take it for process PID instead of the one that starts this
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Option<u32>,

    /// How to ask for the lock
    #[command(flatten)]
    pub lock: LockArgs,
}

/// What `kmutex unlock` takes.
#[derive(Args, Debug)]
pub struct Unlock {
    /// The lock's name
    pub key: OsString,

    /// It was taken for process PID
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Option<u32>,

    /// Where the daemon is
    #[command(flatten)]
    pub daemon: Daemon,
}

/// What `kmutex status` takes.
#[derive(Args, Debug)]
pub struct Status {
    /// Show only the lock of this key
    pub key: Option<OsString>,

    /// Print one JSON object for each lock, on a line of its own
    #[arg(long)]
    pub json: bool,

    /// Print only the keys, each on a line of its own (but not those with control characters in them)
    #[arg(long, conflicts_with = "json")]
    pub keys: bool,

    /// Show the locks of all hosts that share them (see kmutex serve --etcd)
    #[arg(long, conflicts_with = "key")]
    pub cluster: bool,

    /// Show it again every second, in place, until interrupted
    #[arg(long, conflicts_with_all = ["json", "keys"])]
    pub watch: bool,

    /// Where the daemon is
    #[command(flatten)]
    pub daemon: Daemon,
}

/// What `kmutex break` takes.
#[derive(Args, Debug)]
pub struct Break {
    /// The lock's name
    pub key: OsString,

    /// Do not ask first
    #[arg(short, long)]
    pub yes: bool,

    /// Where the daemon is
    #[command(flatten)]
    pub daemon: Daemon,
}

/// How a client finds its daemon, and whom it trusts.
#[derive(Args, Debug)]
pub struct Daemon {
    /// The daemon's socket: a path, a PORT (of 127.0.0.1), or HOST:PORT (an IPv6 address in brackets)
    ///
    /// Without it, $KMUTEX_SOCK, or else /tmp/keyedmutexd.sock.
    #[arg(long, value_name = "ADDR", value_hint = ValueHint::AnyPath)]
    pub sock: Option<OsString>,

    /// Trust a daemon of this user id too, besides my own and root's
    #[arg(long, value_name = "UID")]
    pub trust_uid: Vec<u32>,
}

/// What `kmutex serve` takes.
#[derive(Args, Debug)]
pub struct Serve {
    /// Serve here: a path, a PORT (of 127.0.0.1 and ::1), or HOST:PORT (an IPv6 address in brackets); may be given several times
    ///
    /// Without it, $KMUTEX_SOCK, or else /tmp/keyedmutexd.sock.
    #[arg(short = 's', long, visible_alias = "socket", value_name = "ADDR", value_hint = ValueHint::AnyPath)]
    pub sock: Vec<OsString>,

    /// Remove an old socket file
    ///
    /// For the start scripts of keyedmutexd. A socket whose daemon is dead is replaced without it; one whose daemon
    /// lives never is, nor is a file that is no socket.
    #[arg(short, long)]
    pub force: bool,

    /// Serve at most N connections at a time; more of them wait until there is room
    ///
    /// Without it, as many as the limit of open files allows.
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub maxconn: Option<u32>,

    /// End the hold of a protocol 1 client after SECS seconds, and close its connection; 0 is never
    #[arg(short, long, value_name = "SECS", default_value = "30", allow_negative_numbers = true, value_parser = seconds)]
    pub timeout: Duration,

    /// Log nothing
    #[arg(long, conflicts_with = "log_level")]
    pub no_log: bool,

    /// What to log on standard error; $RUST_LOG says it too
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,

    /// The mode of Unix sockets, in octal
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = octal)]
    pub mode: u32,

    /// The group of Unix sockets: a name or a number
    #[arg(long, value_name = "GROUP")]
    pub group: Option<String>,

    /// Serve at most N connections of one user on Unix sockets; more of them are closed
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_per_uid: Option<u32>,

    /// Keep the journal in FILE instead of beside the first Unix socket
    ///
    /// The journal tells the next daemon which locks are held. It is needed where only TCP is served, and locks are to
    /// survive the daemon.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub state: Option<PathBuf>,

    /// After a restart, keep the lock of a holder that does not come back for SECS seconds
    ///
    /// This concerns holders that cannot be asked and whose end cannot be seen: those of protocol 1 and over TCP.
    #[arg(long, value_name = "SECS", default_value = "30", allow_negative_numbers = true, value_parser = seconds)]
    pub grace: Duration,

    /// Sharing the locks with other hosts
    #[cfg(feature = "etcd")]
    #[command(flatten)]
    pub etcd: Etcd,

    /// Write a newline to descriptor FD, and close it, when serving
    #[arg(long, value_name = "FD")]
    pub ready_fd: Option<u32>,

    /// End after SECS seconds without locks and connections
    #[arg(long, value_name = "SECS", allow_negative_numbers = true, value_parser = seconds)]
    pub idle_exit: Option<Duration>,

    /// Detach from whoever started this, and write a newline to standard output when serving (used by run)
    #[arg(long, hide = true)]
    pub detach: bool,
}

/// How `kmutex serve` shares its locks with other hosts.
#[cfg(feature = "etcd")]
#[derive(Args, Debug)]
pub struct Etcd {
    /// Share the locks with all hosts that name the same etcd: URL is http://HOST:PORT or https://HOST:PORT of a member
    ///
    /// Several members are separated by commas, or the option is given several times; they are tried in turn.
    #[arg(long = "etcd", value_name = "URL", value_delimiter = ',')]
    pub endpoints: Vec<String>,

    /// Trust members of etcd whose certificate is signed by one of those in FILE (PEM), and no others
    ///
    /// Without it, the public authorities are trusted.
    #[arg(long = "etcd-ca", value_name = "FILE", value_hint = ValueHint::FilePath, requires = "endpoints")]
    pub ca: Option<PathBuf>,

    /// Show the certificate in FILE (PEM) to etcd
    #[arg(long = "etcd-cert", value_name = "FILE", value_hint = ValueHint::FilePath, requires = "key")]
    pub cert: Option<PathBuf>,

    /// The key of that certificate, in FILE (PEM)
    #[arg(long = "etcd-key", value_name = "FILE", value_hint = ValueHint::FilePath, requires = "cert")]
    pub key: Option<PathBuf>,

    /// Be user NAME of etcd
    #[arg(long = "etcd-user", value_name = "NAME", requires = "password_file")]
    pub user: Option<String>,

    /// That user's password is the first line of FILE
    #[arg(long = "etcd-password-file", value_name = "FILE", value_hint = ValueHint::FilePath, requires = "user")]
    pub password_file: Option<PathBuf>,

    /// The lease of this host lasts SECS seconds without being kept alive, and so do its locks when the host is gone
    #[arg(long = "etcd-ttl", value_name = "SECS", default_value_t = 10, requires = "endpoints",
          value_parser = clap::value_parser!(u64).range(2..=86_400))]
    pub ttl: u64,

    /// Keys in etcd begin with PREFIX
    #[arg(long = "etcd-prefix", value_name = "PREFIX", default_value = "kmutex", requires = "endpoints")]
    pub prefix: String,
}

/// What goes to the daemon's log. Each level includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What makes the daemon end, or a client lose its connection through no fault of its own.
    Error,
    /// What an administrator should look at.
    Warn,
    /// Start and stop. This is the default.
    Info,
    /// Every connect, grant, wait, release, expiry and close.
    Debug,
}

/// The options of KeyedMutex's daemon, with its defaults: what the binary takes when it is called `keyedmutexd`.
///
/// The lock daemon of KeyedMutex, as kmutex serves it
#[derive(Debug, Parser)]
#[command(name = "keyedmutexd", version = VERSION, disable_version_flag = true)]
pub struct Keyedmutexd {
    /// Remove an old socket file
    #[arg(short, long)]
    pub force: bool,

    /// Serve on this Unix socket, or on this port of 127.0.0.1 and ::1
    #[arg(short, long, value_name = "PATH|PORT", default_value = "/tmp/keyedmutexd.sock")]
    pub socket: OsString,

    /// Serve at most N connections at a time
    #[arg(short, long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub maxconn: u32,

    /// End the hold of a client after SECS seconds
    #[arg(short, long, value_name = "SECS", default_value = "30", allow_negative_numbers = true, value_parser = seconds)]
    pub timeout: Duration,

    /// Log nothing
    #[arg(long)]
    pub no_log: bool,

    /// Print version
    #[arg(short, long, action = ArgAction::Version)]
    version: Option<bool>,
}

/// The names under which the binary is KeyedMutex's daemon.
pub fn is_keyedmutexd(program: &std::ffi::OsStr) -> bool {
    PathBuf::from(program).file_name().is_some_and(|name| name == "keyedmutexd")
}

/// Seconds, with or without a fraction.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    Duration::try_from_secs_f64(seconds).map_err(|_| "not a number of seconds from 0 on".into())
}

/// The mode of a file: only permission bits.
fn octal(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("not an octal mode from 0 to 777".into()),
    }
}
