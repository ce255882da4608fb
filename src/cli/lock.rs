//! The arguments of the commands that acquire a lock: `kmutex run` and `kmutex lock`; and of `kmutex unlock`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueHint};

use super::Daemon;
use super::value::{duration, positive_duration, size};
use crate::acquire::OnPeerFailure;
use crate::run::{OnLost, Share};

/// The arguments of `kmutex run`.
#[derive(Args, Debug, PartialEq)]
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
#[derive(Args, Debug, PartialEq)]
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
