//! Making a Unix socket with the right permissions from its first moment, without following a link that another user may
//! have put in its place.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::fcntl::AtFlags;
use nix::sys::socket::{Backlog, listen};
use nix::unistd::{Gid, Uid, fchownat};
use rustix::fs::{Mode, OFlags};
use rustix::process::umask;

/// Which users may connect.
#[derive(Clone, Copy, Debug)]
pub(super) struct Permissions {
    pub(super) mode: u32,
    pub(super) gid: Option<Gid>,
}

/// A file, whatever its name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Returns the file that a path leads to, without following a link; `None`: there is none.
    ///
    /// # Errors
    /// As lstat(2) gives them.
    pub(super) fn at(path: &Path) -> io::Result<Option<FileId>> {
        match fs::symlink_metadata(path) {
            Ok(meta) => Ok(Some(FileId::of(&meta))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn of(meta: &fs::Metadata) -> FileId {
        FileId { device: meta.dev(), inode: meta.ino() }
    }
}

/// Listens on a new socket. The path must be free.
///
/// # Errors
/// As bind(2) gives them, or when another user has replaced the socket meanwhile.
pub(super) fn bind(path: &Path, permissions: Permissions) -> io::Result<(UnixListener, FileId)> {
    // A mode that admits the group must not admit the old group, so the group is set first.
    let first_mode = if permissions.gid.is_some() { permissions.mode & 0o700 } else { permissions.mode };
    let old = umask(Mode::from_bits_truncate(!first_mode & 0o777));
    let listener = UnixListener::bind(path);
    umask(old);
    let listener = listener?;
    let file = open(path)?;
    if let Some(gid) = permissions.gid {
        fchownat(&file, "", None, Some(gid), AtFlags::AT_EMPTY_PATH)?;
        // By the descriptor, which no other user can replace.
        let by_descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
        fs::set_permissions(by_descriptor, fs::Permissions::from_mode(permissions.mode))?;
    }
    listener.set_nonblocking(true)?;
    listen(&listener, Backlog::MAXALLOWABLE)?;
    Ok((listener, FileId::of(&file.metadata()?)))
}

/// Opens the socket that was just made, and not whatever else may be there.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let meta = file.metadata()?;
    let is_ours =
        meta.file_type().is_socket() && meta.uid() == Uid::effective().as_raw() && meta.nlink() == 1;
    match is_ours {
        true => Ok(file),
        false => Err(io::Error::other("another user has replaced it meanwhile")),
    }
}
