//! A second hold on a socket, for the time in which its files are gone: a lock on a directory, which survives whatever is
//! deleted in it.
//!
//! The lock file says which daemon serves a socket. If a clean-up job deletes it under a living daemon, the next daemon
//! would make and lock another file. So each daemon also has a read lock (fcntl(2), F_OFD_SETLK) on a byte of a directory,
//! and a daemon that starts looks whether another one has it. Only a directory that no other user can open serves for that,
//! since everyone who can could lock it: that of the socket, or else that of the user's own daemon.
//!
//! Of two daemons that start at the same moment, both may see the other one. Then neither serves, and a client starts one.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use md5::{Digest, Md5};
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::libc;
use nix::unistd::Uid;

use crate::place::{self, Missing};

/// The lock on the directory, which lasts as long as this.
pub(super) struct Claim {
    _directory: File,
    /// systemd-tmpfiles(8) spares what is locked with flock(2), and what is below it.
    _spared: Option<Flock<File>>,
}

impl Claim {
    /// Claims a socket. Returns `None` if there is no directory for it.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] if another daemon has claimed the socket.
    pub(super) fn take(socket: &Path) -> io::Result<Option<Claim>> {
        let Some(parent) = socket.parent() else { return Ok(None) };
        let (directory, name, is_parent) = match open_private(parent) {
            Some(directory) => (directory, socket.file_name().unwrap_or_default(), true),
            None => {
                let own = place::own_socket(Missing::Make).ok();
                let own = own.and_then(|own| open_private(own.parent()?));
                let Some(directory) = own else { return Ok(None) };
                (directory, socket.as_os_str(), false)
            }
        };
        let byte = byte_of(name.as_bytes());
        if fcntl(&directory, FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, byte))).is_err() {
            // A file system without such locks.
            return Ok(None);
        }
        let mut other = lock(libc::F_WRLCK, byte);
        fcntl(&directory, FcntlArg::F_OFD_GETLK(&mut other))?;
        if i32::from(other.l_type) != libc::F_UNLCK {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let spared = is_parent.then(|| directory.try_clone().ok()).flatten();
        let spared = spared.and_then(|file| Flock::lock(file, FlockArg::LockSharedNonblock).ok());
        Ok(Some(Claim { _directory: directory, _spared: spared }))
    }
}

/// Opens a directory that belongs to this user, and that no other user can open or write in.
fn open_private(path: &Path) -> Option<File> {
    let directory = File::open(path).ok()?;
    let meta = directory.metadata().ok()?;
    let is_private = meta.is_dir() && meta.uid() == Uid::effective().as_raw() && meta.mode() & 0o066 == 0;
    // The file system knows the directory by this name still.
    let named = fs::metadata(path).ok()?;
    (is_private && (named.dev(), named.ino()) == (meta.dev(), meta.ino())).then_some(directory)
}

/// Returns the byte that stands for a name. (The file system allows locks far behind the end.)
fn byte_of(name: &[u8]) -> i64 {
    let digest: [u8; 16] = Md5::digest(name).into();
    let number = u64::from_le_bytes(digest[..8].try_into().expect("eight bytes"));
    (number >> 2) as i64
}

fn lock(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

impl std::fmt::Debug for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Claim({})", self._directory.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_socket_is_claimed_once_even_if_everything_beside_it_is_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("sock");
        let claim = Claim::take(&socket).unwrap().expect("the folder is private");
        let second = Claim::take(&socket).map(|_| ());
        assert_eq!(second.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(Claim::take(&folder.path().join("other")).unwrap().is_some(), "another socket is free");
        drop(claim);
        assert!(Claim::take(&socket).unwrap().is_some());
    }

    #[test]
    fn a_directory_that_other_users_can_open_is_not_locked() {
        let folder = tempfile::tempdir().unwrap();
        for mode in [0o755, 0o777, 0o720] {
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert!(open_private(folder.path()).is_none(), "{mode:o}");
        }
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).unwrap();
        assert!(open_private(folder.path()).is_some());
    }
}
