//! Small files that are read as a whole, at the start and again when they change, without ever blocking or growing the process.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
#[cfg(feature = "daemon")]
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Reads a regular file of at most `bytes_max` bytes, and returns what was known of the file when it was opened.
///
/// # Errors
/// When the file cannot be opened or read, is not a regular file, or is longer.
pub(crate) fn read(path: &Path, bytes_max: u64) -> io::Result<(Vec<u8>, Metadata)> {
    // Opening a FIFO waits for its writer, unless it is told not to (fifo(7)).
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok((read_bounded(file, bytes_max)?, metadata))
}

fn read_bounded(file: File, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(io::Error::other(format!("it is longer than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// Tells one version of a file from the next. A file that is replaced, written to or touched has another one.
#[cfg(feature = "daemon")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[cfg(feature = "daemon")]
impl Stamp {
    /// Returns the stamp of the file as it is now. A file that cannot be looked at has the default one.
    pub(crate) fn of(path: &Path) -> Stamp {
        std::fs::metadata(path).map_or(Stamp::default(), |metadata| Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_too_long_or_no_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap().0, b"12345");
        assert!(read(&path, 4).unwrap_err().to_string().contains("longer than 4 bytes"));
        assert!(read(folder.path(), 5).is_err());
        assert!(read(&folder.path().join("none"), 5).is_err());
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read(&fifo, 5).unwrap_err().to_string().contains("not a regular file"));
    }

    #[test]
    fn a_file_that_was_replaced_or_removed_has_another_stamp() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("file"), folder.path().join("other"));
        std::fs::write(&path, "a").unwrap();
        let first = Stamp::of(&path);
        assert_eq!(Stamp::of(&path), first);
        std::fs::write(&other, "a").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_ne!(Stamp::of(&path), first);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(Stamp::of(&path), Stamp::default());
    }
}
