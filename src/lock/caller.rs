//! The process that `kmutex lock` holds a lock for when no option names one: its parent. That is the shell of a script, unless
//! something stands between the two, which ends at once and the lock with it. This finds out what can be found out.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::unistd::{Pid, getppid, getsid};

/// The names of shells, which run their subshells without executing a program.
const SHELLS: [&str; 11] =
    ["ash", "bash", "busybox", "dash", "fish", "ksh", "ksh93", "mksh", "sh", "yash", "zsh"];

/// Why the parent is not the process to hold for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsuitable {
    /// It has ended, and init or a parent outside of the container has taken its place.
    #[error("the process that started kmutex has ended")]
    Ended,
    /// It only runs kmutex, with this program.
    #[error("{0} runs only kmutex, and then exits")]
    Wrapper(String),
    /// It is a subshell: of a pipeline, of `$(...)`, of `( ... )`.
    #[error("process {0} is a subshell of process {1}")]
    Subshell(Pid, Pid),
}

/// Returns the parent of this process.
///
/// # Errors
/// When a lock for it would be no lock of the shell that asks for it.
pub(super) fn find() -> Result<Pid, Unsuitable> {
    let parent = getppid();
    if parent.as_raw() == 0 || (is_init(parent) && getsid(Some(parent)) != getsid(None)) {
        return Err(Unsuitable::Ended);
    }
    let mine: Vec<_> = std::env::args_os().collect();
    let words = words_of(parent);
    let words: Vec<&OsStr> = words.split(|&byte| byte == 0).map(OsStr::from_bytes).collect();
    if let Some(wrapper) = wrapper(&words, &mine) {
        return Err(Unsuitable::Wrapper(wrapper));
    }
    let grandparent = stat_field(parent, PARENT).map_or(0, |pid| pid as i32);
    if grandparent > 0 && is_shell(parent) && is_fork(parent, Pid::from_raw(grandparent)) {
        return Err(Unsuitable::Subshell(parent, Pid::from_raw(grandparent)));
    }
    Ok(parent)
}

/// Returns `true` if the parent is still the same.
pub(super) fn is_still(parent: Pid) -> bool {
    getppid() == parent
}

fn is_init(pid: Pid) -> bool {
    pid.as_raw() == 1 || fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "systemd\n")
}

/// Returns the name of a program whose command line has this one's in it: timeout, strace, sudo, xargs, find.
fn wrapper(words: &[&OsStr], mine: &[impl AsRef<OsStr>]) -> Option<String> {
    let [program, command, ..] = mine else { return None };
    let (first, rest) = words.split_first()?;
    let name = Path::new(program.as_ref()).file_name();
    let runs_this = |two: &[&OsStr]| Path::new(two[0]).file_name() == name && two[1] == command.as_ref();
    rest.windows(2).any(runs_this).then(|| Path::new(first).display().to_string())
}

/// The command line of a process: words that end with a zero byte (proc(5), /proc/PID/cmdline).
fn words_of(pid: Pid) -> Vec<u8> {
    fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

fn is_shell(pid: Pid) -> bool {
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    program.file_name().and_then(OsStr::to_str).is_some_and(|name| SHELLS.contains(&name))
}

/// Returns `true` if a process runs in the memory that its parent had when it forked: no two programs that were executed have their
/// stack at the same place, nor their arguments.
fn is_fork(pid: Pid, parent: Pid) -> bool {
    [START_STACK, ARG_START].iter().all(|&field| {
        let [mine, parents] = [pid, parent].map(|pid| stat_field(pid, field));
        // 0 stands for what this user may not see.
        mine.is_some_and(|address| address > 1) && mine == parents
    })
}

/// The numbers of fields in proc(5), /proc/PID/stat.
const PARENT: usize = 4;
const START_STACK: usize = 28;
const ARG_START: usize = 48;

fn stat_field(pid: Pid, field: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in brackets, which may have spaces.
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split_ascii_whitespace().nth(field - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrapper_is_told_from_a_shell() {
        let wrapper_of = |line: &str| {
            let words: Vec<&OsStr> = line.split('|').map(OsStr::new).collect();
            wrapper(&words, &["kmutex", "lock", "k"])
        };
        for (line, program) in [
            ("timeout|5|kmutex|lock|k|", "timeout"),
            ("/usr/bin/strace|-f|/usr/bin/kmutex|lock|k", "/usr/bin/strace"),
            ("xargs|kmutex|lock|", "xargs"),
            ("find|.|-exec|kmutex|lock|{}|;|", "find"),
        ] {
            assert_eq!(wrapper_of(line).as_deref(), Some(program), "{line}");
        }
        for line in
            ["bash|script|", "sh|-c|kmutex lock k; work|", "kmutex|lock|k|", "sh|script|lock|k|", "", "bash|"]
        {
            assert_eq!(wrapper_of(line), None, "{line}");
        }
    }
}
