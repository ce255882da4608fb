//! The processes of this machine: which one a record of the journal means, and how to notice its end.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;
use std::time::Duration;

use nix::unistd::{SysconfVar, Uid, sysconf};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::journal::{self, HoldRecord};
use crate::proto::{self, Token};
use crate::table::Timestamp;

/// Whether a holder's process lives.
pub(super) enum Liveness {
    /// It lives. The descriptor becomes readable when it ends (pidfd_open(2)).
    Alive(OwnedFd),
    /// It has ended.
    Exited,
    /// The daemon knows no process of the holder, or cannot watch it.
    Unknown,
}

impl Liveness {
    /// Finds the process that had the number `pid` when it was recorded. A process that was started later is another one
    /// with the same number.
    ///
    /// # Errors
    /// As pidfd_open(2) gives them.
    pub(super) fn of_process(pid: Option<proto::Pid>, recorded: Timestamp) -> io::Result<Liveness> {
        Liveness::find(pid, |start| start <= recorded)
    }

    /// Finds a process that a client has named.
    ///
    /// # Errors
    /// As pidfd_open(2) gives them.
    pub(super) fn of_named(process: journal::Process) -> io::Result<Liveness> {
        Liveness::find(Some(process.pid), |start| start == process.started)
    }

    fn find(pid: Option<proto::Pid>, is_it: impl FnOnce(Timestamp) -> bool) -> io::Result<Liveness> {
        let pid = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid.get()).ok()?));
        let Some(pid) = pid.filter(|_| namespace().is_some()) else { return Ok(Liveness::Unknown) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(_) if start_time(pid).is_some_and(|start| !is_it(start)) => Ok(Liveness::Exited),
            // If the start time cannot be read, the process counts as the right one: a lock is held for too long rather
            // than granted twice.
            Ok(process) => Ok(Liveness::Alive(process)),
            Err(rustix::io::Errno::SRCH) => Ok(Liveness::Exited),
            Err(rustix::io::Errno::NOSYS) => Ok(Liveness::Unknown),
            Err(e) => Err(e.into()),
        }
    }

    /// Finds the command that has inherited the lock from a process that has ended.
    ///
    /// # Errors
    /// As pidfd_open(2) gives them.
    pub(super) fn of_command(record: &HoldRecord) -> io::Result<Liveness> {
        match record.child {
            Some(child) => Liveness::of_named(child),
            None if must_search(record) => find_command_by_token(record),
            None if record.held.terms.inherits => Ok(Liveness::Unknown),
            None => Ok(Liveness::Exited),
        }
    }
}

/// Returns `true` if only a search of all processes can tell whether the command of this hold lives.
pub(super) fn must_search(record: &HoldRecord) -> bool {
    record.child.is_none() && record.held.terms.inherits && namespace().is_some()
}

/// Returns `true` if a process has this number in one of the pid namespaces that it is in (proc(5), /proc/PID/status, NSpid).
pub(super) fn has_number(pid: u32, number: proto::Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    numbers.split_ascii_whitespace().any(|text| text.parse() == Ok(number.get()))
}

/// Returns this process's pid namespace, in which the numbers mean something that the kernel tells it. `None`: /proc is missing, or
/// shows another namespace, so no number can be looked up there.
pub(super) fn namespace() -> Option<u64> {
    static NAMESPACE: OnceLock<Option<u64>> = OnceLock::new();
    *NAMESPACE.get_or_init(|| {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        // One number for each namespace, from that of /proc down to the process's own.
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        let is_own = numbers.trim().parse() == Ok(std::process::id());
        is_own.then(|| Some(fs::metadata("/proc/self/ns/pid").ok()?.ino()))?
    })
}

/// Finds the command of a kmutex that was killed before it could name the command's process. The command has the lock's
/// token in its environment. Its descendants inherit the variable, so the command is the process that started first.
///
/// Only root and the command's own user may read an environment (proc(5), /proc/PID/environ), and a process whose
/// environment cannot be read may be the command. So the answer is [`Liveness::Exited`] only if every environment was read.
///
/// # Errors
/// As pidfd_open(2) gives them.
pub(super) fn find_command_by_token(record: &HoldRecord) -> io::Result<Liveness> {
    let mine = Uid::effective().as_raw();
    let mut all_seen = record.held.uid == Some(mine);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        let Some(pid) = pid else { continue };
        // Another user could put the token into an environment to keep the lock from becoming free.
        let is_holders = |uid| Some(uid) == record.held.uid || uid == 0;
        if !entry.metadata().is_ok_and(|meta| is_holders(meta.uid())) {
            continue;
        }
        let Some(start) = start_time(pid).filter(|start| start.plus(CLOCK_STEP) >= record.granted) else {
            continue;
        };
        match fs::read(entry.path().join("environ")) {
            Ok(environment) if has_token(&environment, record.held.token) => {
                found.push((start, pid));
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => all_seen &= !may_be_command(pid, record),
            // It has ended.
            Err(_) => {}
        }
    }
    match found.into_iter().min_by_key(|&(start, pid)| (start, pid.as_raw_nonzero())) {
        Some((start, pid)) => {
            Liveness::find(proto::Pid::new(pid.as_raw_nonzero().get() as u32), |other| other == start)
        }
        None if all_seen => Ok(Liveness::Exited),
        None => Ok(Liveness::Unknown),
    }
}

/// Returns `true` if a process could be the command of a kmutex that was killed: its parent is then the first process of a pid namespace,
/// or another one that adopts orphans (PR_SET_CHILD_SUBREAPER in prctl(2)), which is the holder's own. So the kernel's threads, and
/// what a service of root has started, are no commands of other users, though they start all the time.
fn may_be_command(pid: Pid, record: &HoldRecord) -> bool {
    const PARENT: usize = 4;
    let own = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap_or_default();
    let is_zombie = own.lines().any(|line| line.starts_with("State:\tZ"));
    if is_zombie && own.lines().any(|line| matches!(line, "Threads:\t0" | "Threads:\t1")) {
        // It has ended, and only its parent has not looked yet.
        return false;
    }
    let parent = stat_field(pid, PARENT).and_then(|number| Pid::from_raw(i32::try_from(number).ok()?));
    // The parent is outside of the namespace, or has just ended.
    let Some(parent) = parent.map(|parent| format!("/proc/{}", parent.as_raw_nonzero())) else { return true };
    let is_holders = fs::metadata(&parent).map_or(true, |meta| Some(meta.uid()) == record.held.uid);
    let status = fs::read_to_string(format!("{parent}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    is_holders || numbers.is_none_or(|numbers| numbers.split_ascii_whitespace().next_back() == Some("1"))
}

/// Returns `true` if an environment names this token. (An environment is a list of `NAME=VALUE`, each ended by a zero
/// byte, proc(5).)
fn has_token(environment: &[u8], token: Token) -> bool {
    let wanted = token.to_string();
    environment.split(|&byte| byte == 0).any(|variable| {
        let value = |name: &str| variable.strip_prefix(name.as_bytes())?.strip_prefix(b"=");
        let values = value(Token::VARIABLE).or_else(|| value(Token::LIST_VARIABLE)).unwrap_or_default();
        values.split(|&byte| byte == b' ').any(|value| value == wanted.as_bytes())
    })
}

/// How much earlier a process may seem to have started than it did: the kernel gives the start time in clock ticks, and a
/// tick is at most a hundredth of a second.
const CLOCK_STEP: Duration = Duration::from_millis(10);

/// Returns when a process was started, by the clock that counts from boot (proc(5), /proc/PID/stat, starttime).
pub(super) fn start_time(pid: Pid) -> Option<Timestamp> {
    const START_TIME: usize = 22;
    let ticks = stat_field(pid, START_TIME)?;
    let hertz = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|hertz| u64::try_from(hertz).ok())?;
    Some(Timestamp(ticks.saturating_mul(1000).checked_div(hertz)?))
}

/// Returns a field of proc(5), /proc/PID/stat, by its number there.
pub(super) fn stat_field(pid: Pid, field: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The second field is a name in parentheses, which may contain any character.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(field - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_started_later_is_another_process_with_the_same_number() {
        let me = proto::Pid::new(std::process::id());
        let start = start_time(rustix::process::getpid()).unwrap();
        assert!(matches!(Liveness::of_process(me, start), Ok(Liveness::Alive(_))));
        assert!(matches!(Liveness::of_process(me, Timestamp(start.0 - 1)), Ok(Liveness::Exited)));
        assert!(matches!(Liveness::of_process(None, start), Ok(Liveness::Unknown)));
        assert!(
            matches!(Liveness::of_process(proto::Pid::new(u32::MAX), start), Ok(Liveness::Unknown)),
            "no process has such a number"
        );
    }

    #[test]
    fn a_token_is_the_whole_value_of_its_variable() {
        let environment = b"A=1\0KMUTEX_TOKEN=123\0Z=\0";
        assert!(has_token(environment, Token(123)));
        for other in [12, 23, 1234] {
            assert!(!has_token(environment, Token(other)));
        }
        assert!(!has_token(b"XKMUTEX_TOKEN=123\0", Token(123)));
        assert!(!has_token(b"", Token(123)));
        let several = b"KMUTEX_TOKENS=12 123\0KMUTEX_TOKEN=123\0";
        assert!(
            has_token(several, Token(12)) && has_token(several, Token(123)) && !has_token(several, Token(1))
        );
    }
}
