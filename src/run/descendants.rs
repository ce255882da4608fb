//! Signals a command and its descendants.
//!
//! The command shares kmutex's process group, and perhaps that of the script around it (in a group of its own it would lose
//! the terminal). Signalling the group would hit the script too, so the descendants are found in /proc.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use nix::libc::{SIGALRM, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpgid};

use crate::startup::bit;

/// Sends a signal to a process and to all its descendants. It searches again until it finds no new descendant, because a
/// process may fork before its signal arrives. Without /proc it signals the process alone.
///
/// What a process starts after its signal was sent may be there to clean up, so it gets no signal but SIGKILL.
pub(super) fn signal_tree(root: Pid, signal: Signal) {
    signal_except(&[], root, signal, None);
}

/// Sends a signal to all descendants of a process, but not to the process itself, nor to those of one process group; otherwise as
/// [`signal_tree`].
pub(super) fn signal_below(root: Pid, signal: Signal, except_group: Option<Pid>) {
    signal_except(&[root], root, signal, except_group);
}

fn signal_except(except: &[Pid], root: Pid, signal: Signal, except_group: Option<Pid>) {
    const ROUNDS_MAX: usize = 10;
    let mut signalled = Vec::new();
    let mut spared = Vec::new();
    for _ in 0..ROUNDS_MAX {
        let is_known = |pid| except.contains(&pid) || signalled.contains(&pid) || spared.contains(&pid);
        let new: Vec<_> = with_descendants(root).into_iter().filter(|new| !is_known(new.pid)).collect();
        if new.is_empty() {
            return;
        }
        let earlier = signalled.len();
        for Process { pid, parent } in new {
            let is_late = signalled[..earlier].contains(&parent) || spared.contains(&parent);
            if is_late && signal != Signal::SIGKILL {
                spared.push(pid);
                continue;
            }
            signalled.push(pid);
            if except_group.is_none() || getpgid(Some(pid)).ok() != except_group {
                // It may have ended by now, or belong to another user.
                let _ = kill(pid, signal);
            }
        }
    }
}

/// Returns `true` if a process is a descendant of another.
pub(super) fn is_below(pid: Pid, ancestor: Pid) -> bool {
    let mut pid = pid.as_raw();
    while let Some(parent) = parent(pid)
        && parent > 1
    {
        if parent == ancestor.as_raw() {
            return true;
        }
        pid = parent;
    }
    false
}

/// Returns `true` if a process ignores a signal.
fn ignores(pid: Pid, signal: i32) -> bool {
    signals(pid, "SigIgn:").is_some_and(|ignored| ignored & bit(signal) != 0)
}

/// Returns `true` if a process that has sent a signal ignores it itself. Waits a moment for timeout(1), which first signals its
/// child, and then its group.
pub(super) fn spares_itself(pid: Pid, signal: i32) -> bool {
    const TRIES: u32 = 50;
    const PAUSE: Duration = Duration::from_micros(200);
    let is_timeout = || fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "timeout\n");
    if ignores(pid, signal) {
        return true;
    }
    // No event tells of that.
    is_timeout()
        && (0..TRIES).any(|_| {
            std::thread::sleep(PAUSE);
            ignores(pid, signal)
        })
}

/// Returns `true` if a process would die of a signal.
pub(super) fn dies_of(pid: Pid, signal: i32) -> bool {
    let sets = ["SigBlk:", "SigIgn:", "SigCgt:"];
    is_fatal(signal) && sets.iter().all(|set| signals(pid, set).is_some_and(|set| set & bit(signal) == 0))
}

/// Returns `true` if a signal that programs are sent ends a program that does nothing about it (signal(7)).
pub(super) fn is_fatal(signal: i32) -> bool {
    matches!(signal, SIGHUP | SIGINT | SIGQUIT | SIGTERM | SIGUSR1 | SIGUSR2 | SIGALRM)
}

/// Returns a set of signals from /proc/PID/status (proc(5)), with [`bit`].
fn signals(pid: Pid, set: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let bits = status.lines().find_map(|line| line.strip_prefix(set))?;
    u64::from_str_radix(bits.trim(), 16).ok()
}

#[derive(Clone, Copy)]
struct Process {
    pid: Pid,
    parent: Pid,
}

/// Returns the process and its descendants, parents first.
fn with_descendants(root: Pid) -> Vec<Process> {
    let mut children: HashMap<Pid, Vec<Process>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok())
            && let Some(parent) = parent(pid).map(Pid::from_raw)
        {
            children.entry(parent).or_default().push(Process { pid: Pid::from_raw(pid), parent });
        }
    }
    // Whose child the first one is does not matter.
    let mut found = vec![Process { pid: root, parent: Pid::from_raw(0) }];
    let mut next = 0;
    while let Some(&Process { pid, .. }) = found.get(next) {
        found.extend(children.remove(&pid).unwrap_or_default());
        next += 1;
    }
    found
}

/// Returns the parent of a process (proc(5), /proc/PID/stat, the second field after the name in brackets).
fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(1)?.parse().ok()
}
