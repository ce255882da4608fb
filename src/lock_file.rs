//! The lock file beside a socket: its name, and which daemon has it locked.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Returns the path of a socket's lock file.
pub fn path_of(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    PathBuf::from(path)
}

/// Returns the process id of the daemon that serves this socket according to the lock file, although the socket may be
/// gone. A daemon that only starts is not in the file yet. `None`, too, when the file cannot be read.
fn serving_pid(socket: &Path) -> Option<u32> {
    let path = path_of(socket);
    let inode = fs::symlink_metadata(&path).ok().filter(|meta| meta.is_file())?.ino();
    let pid = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    is_locked(&fs::read_to_string("/proc/locks").ok()?, inode).then_some(pid)
}

/// Returns the process id of the daemon that serves this socket, if the socket is gone.
pub fn pid_without_socket(socket: &Path) -> Option<u32> {
    let is_gone = fs::symlink_metadata(socket).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    if is_gone { serving_pid(socket) } else { None }
}

/// Returns `true` if one of the locks (proc(5), /proc/locks) is a lock of flock(2) on this file. (Asking flock(2) itself
/// would get in the way of a daemon that starts.)
fn is_locked(locks: &str, inode: u64) -> bool {
    let mut held = locks.lines().filter(|line| line.contains(" FLOCK ") && !line.contains("->"));
    held.any(|line| {
        let id = line.split_whitespace().nth(5).and_then(|id| id.rsplit(':').next());
        id.and_then(|id| id.parse().ok()) == Some(inode)
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::fcntl::{Flock, FlockArg};

    use super::*;

    #[test]
    fn the_daemon_is_named_while_it_has_the_file_locked() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("sock");
        assert_eq!(serving_pid(&socket), None);
        fs::write(path_of(&socket), "7\n").unwrap();
        assert_eq!(serving_pid(&socket), None, "it has died");
        let file = File::open(path_of(&socket)).unwrap();
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
        assert_eq!(serving_pid(&socket), Some(7));
        fs::write(path_of(&socket), "").unwrap();
        assert_eq!(serving_pid(&socket), None, "it starts");
        drop(lock);
    }

    #[test]
    fn only_a_lock_that_is_held_counts() {
        let locks = "1: POSIX  ADVISORY  WRITE 5 fe:00:7 0 EOF\n2: FLOCK  ADVISORY  WRITE 6 fe:00:8 0 EOF\n2: -> FLOCK  ADVISORY  WRITE 6 fe:00:9 0 EOF\n";
        assert_eq!([7, 8, 9].map(|inode| is_locked(locks, inode)), [false, true, false]);
    }
}
