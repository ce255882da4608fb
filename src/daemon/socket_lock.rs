//! The right to serve a socket or to use a journal: a lock on a file beside it, `PATH.lock`, which the kernel gives back
//! when its process ends, however that happens.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;

use super::Error;

/// The right to serve a path: a lock on the file beside it, which the kernel gives back when this process ends.
pub(super) struct SocketLock {
    file: Flock<File>,
    path: PathBuf,
}

impl SocketLock {
    pub(super) fn take(socket: &Path) -> Result<SocketLock, Error> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let error = |e| Error::LockFile { path: path.clone(), error: e };
        // The name may vanish between opening and locking, when the daemon that had it ends. Then it is not the file
        // that the next one will look at, and the lock is worth nothing.
        for _ in 0..100 {
            let file = open_own(&path).map_err(error)?;
            let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((file, nix::Error::EWOULDBLOCK)) => return Err(served(socket, file)),
                Err((_, e)) => return Err(error(e.into())),
            };
            if is_named(&file, &path).map_err(error)? {
                let mut socket_lock = SocketLock { file, path };
                socket_lock.write_pid()?;
                return Ok(socket_lock);
            }
        }
        Err(error(io::Error::other("daemons come and go too fast")))
    }

    pub(super) fn write_pid(&mut self) -> Result<(), Error> {
        let text = format!("{}\n", std::process::id());
        let file = &mut *self.file;
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(text.as_bytes())
        };
        write(file).map_err(|error| Error::LockFile { path: self.path.clone(), error })
    }
}

impl Drop for SocketLock {
    fn drop(&mut self) {
        // While the lock is still held, so that the name is surely ours. Whoever comes next takes over a file that
        // could not be removed, so there is nothing to say of it.
        let _ = fs::remove_file(&self.path);
    }
}

/// True when the path still leads to this file.
fn is_named(file: &File, path: &Path) -> io::Result<bool> {
    let file = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (file.dev(), file.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Opens the lock file, which must be a plain file of ours: in a directory like /tmp anybody could have put it there.
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
    Ok(file)
}

fn served(socket: &Path, mut lock_file: File) -> Error {
    let mut text = String::new();
    // The pid is for people only; that the file is locked is what counts.
    let pid = lock_file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
    Error::Served { path: socket.into(), pid }
}
