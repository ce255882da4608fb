//! A command and all that it has started, as far as it is still its own.
//!
//! The command shares kmutex's process group, and so perhaps that of the script around it (a group of its own would take
//! it from the terminal), so the group is not what can be signalled when only the command is to be stopped.

use std::collections::HashMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Sends a signal to a process and to all its descendants. What is started meanwhile by those that were not reached yet
/// is looked for again, so that nothing slips away; where there is no /proc, the process alone is signalled.
pub(super) fn signal(root: Pid, signal: Signal) {
    signal_but(Vec::new(), root, signal);
}

/// The same without the process itself.
pub(super) fn signal_below(root: Pid, signal: Signal) {
    signal_but(vec![root], root, signal);
}

fn signal_but(mut reached: Vec<Pid>, root: Pid, signal: Signal) {
    const ROUNDS_MAX: usize = 10;
    for _ in 0..ROUNDS_MAX {
        let new: Vec<Pid> = list(root).into_iter().filter(|pid| !reached.contains(pid)).collect();
        if new.is_empty() {
            return;
        }
        for &pid in &new {
            // It may have ended by now, or belong to another user: nothing more can be done about it.
            let _ = kill(pid, signal);
        }
        reached.extend(new);
    }
}

/// The process and its descendants, parents first.
fn list(root: Pid) -> Vec<Pid> {
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

/// A process's parent (proc(5), /proc/PID/stat, the second field after the name in brackets).
fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(1)?.parse().ok()
}
