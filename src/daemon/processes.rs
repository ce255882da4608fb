//! The processes of this machine: which of them a journal's record means, and how to hear of its end.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use nix::unistd::{SysconfVar, Uid, sysconf};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::journal::Record;
use crate::proto::Token;
use crate::table::Millis;

/// What can be watched of a holder.
pub(super) enum Liveness {
    /// A process of it lives. The descriptor is readable when it has ended (pidfd_open(2)).
    Alive(OwnedFd),
    /// Its processes have ended.
    Exited,
    /// No process of it is known here, or this kernel has no way to watch it.
    Unknown,
}

impl Liveness {
    /// Watches the process with this number, if it lives and is the one that was meant when it was recorded, and not a
    /// later one that was given the same number. 0 is no process.
    pub(super) fn of_process(pid: u32, recorded: Millis) -> io::Result<Liveness> {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(Liveness::Unknown) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(_) if start_time(pid).is_some_and(|start| start > recorded) => Ok(Liveness::Exited),
            // Where it cannot be read when it started, it is taken for the right one, whose end is told.
            Ok(process) => Ok(Liveness::Alive(process)),
            Err(rustix::io::Errno::SRCH) => Ok(Liveness::Exited),
            Err(rustix::io::Errno::NOSYS) => Ok(Liveness::Unknown),
            Err(e) => Err(e.into()),
        }
    }

    /// Watches the command that has inherited the lock from a process that has ended.
    pub(super) fn of_command(record: &Record) -> io::Result<Liveness> {
        match (record.child, record.held.terms.inherits) {
            (0, false) => Ok(Liveness::Exited),
            (0, true) => find_command_by_token(record),
            (child, _) => Liveness::of_process(child, record.recorded),
        }
    }
}

/// Watches the command of a kmutex that was killed before it could tell which process that is. It is known by the token
/// in its environment; of its descendants, which inherit that too, it is the first.
///
/// Only root and the command's own user may read an environment (proc(5), /proc/PID/environ). What cannot be read may be
/// the command, so if nothing is found the answer is that nobody knows, unless all was seen.
fn find_command_by_token(record: &Record) -> io::Result<Liveness> {
    let mine = Uid::effective().as_raw();
    let mut all_seen = record.held.uid == Some(mine);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        let Some(pid) = pid else { continue };
        // Whoever wants to keep a lock of somebody else's from being free could put its token into an environment too.
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
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => all_seen = false,
            // It has ended.
            Err(_) => {}
        }
    }
    match found.into_iter().min_by_key(|&(start, pid)| (start, pid.as_raw_nonzero())) {
        Some((start, pid)) => Liveness::of_process(pid.as_raw_nonzero().get() as u32, start),
        None if all_seen => Ok(Liveness::Exited),
        None => Ok(Liveness::Unknown),
    }
}

/// An environment is `NAME=VALUE` after `NAME=VALUE`, each ended by a zero byte (proc(5)).
fn has_token(environment: &[u8], token: Token) -> bool {
    let wanted = token.to_string();
    environment.split(|&byte| byte == 0).any(|variable| {
        let value = |name: &str| variable.strip_prefix(name.as_bytes())?.strip_prefix(b"=");
        let values = value(Token::VARIABLE).or_else(|| value(Token::LIST_VARIABLE)).unwrap_or_default();
        values.split(|&byte| byte == b' ').any(|value| value == wanted.as_bytes())
    })
}

/// How much earlier a process may seem to have started than it did: the kernel tells it in ticks of a clock, of which
/// there are a hundred in a second, and never fewer.
const CLOCK_STEP: Millis = Millis(10);

/// When a process was started, by the clock that counts from boot (proc(5), /proc/PID/stat, starttime).
fn start_time(pid: Pid) -> Option<Millis> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The second field is a name in brackets, which may have anything in it.
    let (_, after_name) = stat.rsplit_once(')')?;
    let ticks: u64 = after_name.split_ascii_whitespace().nth(19)?.parse().ok()?;
    let hertz = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|hertz| u64::try_from(hertz).ok())?;
    Some(Millis(ticks.saturating_mul(1000).checked_div(hertz)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_started_later_is_another_with_the_same_number() {
        let me = std::process::id();
        let start = start_time(Pid::from_raw(me as i32).unwrap()).unwrap();
        assert!(matches!(Liveness::of_process(me, start), Ok(Liveness::Alive(_))));
        assert!(matches!(Liveness::of_process(me, Millis(start.0 - 1)), Ok(Liveness::Exited)));
        assert!(matches!(Liveness::of_process(0, start), Ok(Liveness::Unknown)));
        assert!(
            matches!(Liveness::of_process(u32::MAX, start), Ok(Liveness::Unknown)),
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
