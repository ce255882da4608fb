//! Signals a command and its descendants.
//!
//! The command shares kmutex's process group, and perhaps that of the script around it (in a group of its own it would lose
//! the terminal). Signalling the group would hit the script too, so the descendants are found in /proc.

use std::collections::HashMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Sends a signal to a process and to all its descendants. It searches again until it finds no new descendant, because a
/// process may fork before its signal arrives. Without /proc it signals the process alone.
pub(super) fn signal_tree(root: Pid, signal: Signal) {
    signal_except(Vec::new(), root, signal);
}

/// Sends a signal to all descendants of a process, but not to the process itself.
pub(super) fn signal_below(root: Pid, signal: Signal) {
    signal_except(vec![root], root, signal);
}

fn signal_except(mut signalled: Vec<Pid>, root: Pid, signal: Signal) {
    const ROUNDS_MAX: usize = 10;
    for _ in 0..ROUNDS_MAX {
        let new: Vec<Pid> =
            with_descendants(root).into_iter().filter(|pid| !signalled.contains(pid)).collect();
        if new.is_empty() {
            return;
        }
        for &pid in &new {
            // It may have ended by now, or belong to another user.
            let _ = kill(pid, signal);
        }
        signalled.extend(new);
    }
}

/// Returns the process and its descendants, parents first.
fn with_descendants(root: Pid) -> Vec<Pid> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok())
            && let Some(parent) = parent(pid)
        {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![root.as_raw()];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        found.extend(children.remove(&pid).unwrap_or_default());
        next += 1;
    }
    found.into_iter().map(Pid::from_raw).collect()
}

/// Returns the parent of a process (proc(5), /proc/PID/stat, the second field after the name in brackets).
fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(1)?.parse().ok()
}
