//! A daemon that a client starts automatically: it keeps nothing of what its first caller happened to have (open files,
//! signals, limits, priority), and tells the caller on standard output whether it serves.

use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use log::warn;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::SigSet;

use crate::exit::Exit;
use crate::fd;

/// The limits that could end a daemon or stop its work, or that it must not have from a caller's shell. (The limit of open
/// files is raised where connections are counted.)
const LIMITS: [Resource; 6] = [
    Resource::RLIMIT_AS,
    Resource::RLIMIT_CPU,
    Resource::RLIMIT_DATA,
    Resource::RLIMIT_FSIZE,
    Resource::RLIMIT_MEMLOCK,
    Resource::RLIMIT_NPROC,
];

/// Drops what the caller left to this process. Begins the program anew if signals were ignored.
///
/// # Errors
/// When the kernel refuses that.
pub(super) fn prepare() -> io::Result<()> {
    fd::close_all_but(&[])?;
    SigSet::empty().thread_set_mask()?;
    restore_signals()?;
    for limit in LIMITS {
        raise(limit);
    }
    // A lower priority of the caller's (nice(1)) stays where raising it is not allowed.
    if rustix::process::getpriority_process(None).is_ok_and(|nice| nice != 0) {
        let _ = rustix::process::setpriority_process(None, 0);
    }
    Ok(())
}

/// Detaches from the caller, after telling it that this process serves.
///
/// # Errors
/// As fork(2) gives them.
pub(super) fn detach() -> nix::Result<()> {
    tell("");
    nix::unistd::daemon(false, false)
}

/// Tells the caller with which exit code this process ends instead of serving. (A caller that ignores SIGCHLD is not told
/// by wait(2).)
pub(super) fn report_failure(exit: Exit) {
    tell(exit.code());
}

fn tell(what: impl std::fmt::Display) {
    // A caller that is gone needs no answer.
    let _ = writeln!(io::stdout(), "{what}");
}

/// Gives all signals their default meanings. What is ignored stays so in a program that is executed, and what is caught
/// does not (execve(2)): so this process catches every signal that it ignores, and executes itself.
fn restore_signals() -> io::Result<()> {
    let ignored = ignored_signals();
    if ignored.is_empty() {
        return Ok(());
    }
    let flag = Arc::new(AtomicBool::new(false));
    for &signal in &ignored {
        signal_hook::flag::register(signal, Arc::clone(&flag))?;
    }
    let program = std::env::current_exe().ok().filter(|path| path.exists());
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    let program = program.unwrap_or_else(|| "/proc/self/exe".into());
    Err(Command::new(program).arg0(name).args(args).exec())
}

/// The C library keeps these for itself, and its posix_spawn(3) leaves them ignored (nptl(7)). musl keeps one more.
const INTERNAL_SIGNALS: RangeInclusive<i32> = 32..=if cfg!(target_env = "musl") { 34 } else { 33 };

/// Returns the signals that this process ignores, but SIGPIPE, which the Rust runtime ignores, and the signals that no
/// program may catch. Without /proc there is no telling.
fn ignored_signals() -> Vec<i32> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    let is_ignored = |signal: &i32| mask & (1 << (signal - 1)) != 0;
    let fixed = |signal: &i32| {
        signal_hook::consts::FORBIDDEN.contains(signal)
            || INTERNAL_SIGNALS.contains(signal)
            || *signal == signal_hook::consts::SIGPIPE
    };
    (1..=64).filter(is_ignored).filter(|signal| !fixed(signal)).collect()
}

fn raise(limit: Resource) {
    let Ok((soft, hard)) = getrlimit(limit) else { return };
    if soft == RLIM_INFINITY || setrlimit(limit, RLIM_INFINITY, RLIM_INFINITY).is_ok() {
        return;
    }
    if let Err(e) = setrlimit(limit, hard, hard) {
        warn!("cannot raise {limit:?} from {soft} to {hard}: {e}");
    }
}
