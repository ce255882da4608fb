//! The right to serve a socket or to use a journal: a lock on the file `PATH.lock` beside it. The kernel releases the lock
//! when the daemon ends, however it ends.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;

use super::Error;
use super::claim::Claim;
use crate::lock_file;

/// A locked lock file. Dropping it removes the file.
pub(super) struct SocketLock {
    file: Flock<File>,
    path: PathBuf,
    /// What still keeps another daemon away if the file is removed.
    _claim: Option<Claim>,
}

impl SocketLock {
    pub(super) fn take(socket: &Path) -> Result<SocketLock, Error> {
        let path = lock_file::path_of(socket);
        let error = |e| Error::LockFile { path: path.clone(), error: e };
        // If the previous daemon ends between opening and locking, it removes the file. Then the next daemon would look at
        // another file, and this lock would be worth nothing.
        for _ in 0..100 {
            let file = match open_own(&path) {
                Err(_) if remove_of_other_user(&path) => continue,
                other => other.map_err(error)?,
            };
            let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((file, nix::Error::EWOULDBLOCK)) => return Err(served(socket, Some(file))),
                Err((_, e)) => return Err(error(e.into())),
            };
            if is_named(&file, &path).map_err(error)? {
                let claim = match Claim::take(socket) {
                    Err(e) if e.kind() == io::ErrorKind::AddrInUse => return Err(served(socket, None)),
                    other => other.map_err(error)?,
                };
                let socket_lock = SocketLock { file, path, _claim: claim };
                // The previous daemon's id must not be taken for that of this one.
                socket_lock.file.set_len(0).map_err(|error| socket_lock.error(error))?;
                return Ok(socket_lock);
            }
        }
        Err(error(io::Error::other("other daemons keep starting and ending")))
    }

    /// Writes this process's id into the file: the daemon serves, and not only starts.
    pub(super) fn write_pid(&mut self) -> Result<(), Error> {
        let text = format!("{}\n", std::process::id());
        let file = &mut *self.file;
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(text.as_bytes())
        };
        write(file).map_err(|error| self.error(error))
    }

    /// Returns the path of the lock file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes and locks the file anew if it was removed. Returns whether it was.
    ///
    /// # Errors
    /// When another process has the file that is there now, or none can be made.
    pub(super) fn restore(&mut self) -> Result<bool, Error> {
        if is_named(&self.file, &self.path).map_err(|e| self.error(e))? {
            return Ok(false);
        }
        let file = open_own(&self.path).map_err(|e| self.error(e))?;
        let file =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| self.error(e.into()))?;
        self.file = file;
        self.write_pid()?;
        Ok(true)
    }

    fn error(&self, error: io::Error) -> Error {
        Error::LockFile { path: self.path.clone(), error }
    }
}

impl Drop for SocketLock {
    fn drop(&mut self) {
        // If it cannot be removed, the next daemon takes it over, so the error needs no report.
        if is_named(&self.file, &self.path).unwrap_or(false) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Returns `true` if the path still leads to this file.
fn is_named(file: &File, path: &Path) -> io::Result<bool> {
    let file = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (file.dev(), file.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Opens the lock file, which must be a plain file of this user: in a directory like /tmp any user could have made it.
fn open_own(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK);
    let file = options.open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::other("it is not a plain file"));
    }
    if meta.uid() != Uid::effective().as_raw() {
        return Err(io::Error::other(format!("it belongs to uid {}", meta.uid())));
    }
    if meta.nlink() > 1 {
        return Err(io::Error::other("it is another file too (a hard link)"));
    }
    Ok(file)
}

/// Removes what another user has put in the place of a lock file, unless a daemon has it locked. Only root may do that
/// in a directory like /tmp. Returns whether that was so.
fn remove_of_other_user(path: &Path) -> bool {
    let me = Uid::effective();
    let is_of_other = fs::symlink_metadata(path).is_ok_and(|meta| meta.uid() != me.as_raw());
    if !me.is_root() || !is_of_other {
        return false;
    }
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK);
    if let Ok(file) = options.open(path)
        && Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err()
    {
        return false;
    }
    fs::remove_file(path).is_ok()
}

fn served(socket: &Path, lock_file: Option<File>) -> Error {
    let mut text = String::new();
    // The pid is only for the message; what counts is that the file is locked.
    let read = lock_file.and_then(|mut file| file.read_to_string(&mut text).ok());
    let pid = read.and_then(|_| text.trim().parse().ok());
    Error::Served { path: socket.into(), pid }
}
