//! Locks that last as long as an open file does: `kmutex lock --fd 9 KEY 9>FILE`.
//!
//! The kernel knows how long an open file description (open(2)) lasts: until the last process has closed the last descriptor
//! of it. kmutex marks the description with a lock of the kind that belongs to it, F_OFD_SETLK of fcntl(2), at a byte that no
//! other program uses. A process in the background, the keeper, opens the same file for itself and waits for that byte: the
//! kernel grants it when the description is gone. A second byte is the keeper's own, for as long as it lives.
//!
//! So a marker's place says what it is for: 30 bits of the key's hash, then 31 random bits, then one that says which of the two
//! bytes it is.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread::Builder;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{self, F_RDLCK, F_UNLCK, F_WRLCK, O_ACCMODE, SEEK_SET, c_int, off_t};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;

use crate::any_signal;
use crate::client;
use crate::fd;
use crate::proto::Key;

/// The bytes that stand for one key.
const BYTES_PER_KEY: off_t = 1 << 32;

/// A descriptor that `kmutex lock` was started with.
pub(super) struct Descriptor {
    /// The description that it refers to.
    shared: File,
    /// Another description of the same file, which locks of the first one exclude.
    own: File,
    /// The kind of lock that the first one may have: it depends on how the file was opened.
    kind: c_int,
}

/// The bytes that tell of one lock of the daemon's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Marker(off_t);

impl Marker {
    fn itself(self) -> Bytes {
        self.0..self.0 + 1
    }

    fn keeper(self) -> Bytes {
        self.0 + 1..self.0 + 2
    }
}

/// A part of a file, which need not be as long as that.
type Bytes = Range<off_t>;

/// Why a descriptor cannot have a lock.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// No descriptor has that number.
    #[error("it is not open")]
    NotOpen,
    /// A pipe, a socket, a device, a directory.
    #[error("it is not a regular file; use one, as in 9>FILE")]
    NotRegular,
    /// The keeper could not wait.
    #[error("its file cannot be opened for writing: {}", crate::addr::Reason(.0))]
    NotWritable(#[source] io::Error),
    /// It has the whole file, or a part of it that kmutex needs.
    #[error("another program has locked its file")]
    Locked,
    /// The kernel refuses something.
    #[error("{}", crate::addr::Reason(.0))]
    Os(#[from] io::Error),
}

impl Descriptor {
    pub(super) fn new(number: u32) -> Result<Descriptor, Unusable> {
        let shared = fd::share(number).map_err(|e| match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EBADF) => Unusable::NotOpen,
            _ => Unusable::Os(e),
        })?;
        if !shared.metadata()?.is_file() {
            return Err(Unusable::NotRegular);
        }
        let own = File::options().write(true).open(fd::path(&shared)).map_err(Unusable::NotWritable)?;
        let mode = fcntl(&shared, FcntlArg::F_GETFL).map_err(io::Error::from)? & O_ACCMODE;
        let kind = if mode == OFlag::O_RDONLY.bits() { F_RDLCK } else { F_WRLCK };
        Ok(Descriptor { shared, own, kind })
    }

    /// Marks the description as holding the lock of a key.
    pub(super) fn mark(&self, key: &Key) -> Result<Marker, Unusable> {
        // Only another hold of the same key can be in the way, if at all.
        const TRIES: u32 = 10;
        let mut result = Err(Errno::EAGAIN);
        for _ in 0..TRIES {
            let random = (client::nonce().0 & 0x7fff_ffff) as off_t;
            let marker = Marker(first_byte(key) + random * 2);
            result = set(&self.own, F_WRLCK, &marker.keeper())
                .and_then(|()| set(&self.shared, self.kind, &marker.itself()))
                .map(|()| marker);
            if result.is_ok() {
                break;
            }
        }
        result.map_err(|e| match e {
            Errno::EAGAIN | Errno::EACCES => Unusable::Locked,
            e => Unusable::Os(e.into()),
        })
    }

    /// Removes the marker of a description.
    pub(super) fn unmark(&self, marker: Marker) -> io::Result<()> {
        Ok(set(&self.shared, F_UNLCK, &marker.itself())?)
    }

    /// Returns the marker of the lock that the description holds for a key. Removes the markers that no keeper looks after.
    pub(super) fn find(&self, key: &Key) -> io::Result<Option<Marker>> {
        let first = first_byte(key);
        let mut unsearched: Vec<Bytes> = std::iter::once(first..first + BYTES_PER_KEY).collect();
        while let Some(bytes) = unsearched.pop() {
            // The kernel names any of the locks in there, not the first.
            let Some(locked) = conflict(&self.own, &bytes)? else { continue };
            let marker = Marker(locked.start.max(bytes.start));
            if marker.0 % 2 == 0 && conflict(&self.shared, &marker.itself())?.is_none() {
                if conflict(&self.own, &marker.keeper())?.is_some() {
                    return Ok(Some(marker));
                }
                self.unmark(marker)?;
            }
            unsearched.extend([bytes.start..marker.0, locked.end.min(bytes.end)..bytes.end]);
            unsearched.retain(|bytes| !bytes.is_empty());
        }
        Ok(None)
    }

    /// Waits until the keeper of a marker has ended.
    pub(super) fn wait_for_keeper(&self, marker: Marker, limit: Duration) -> io::Result<()> {
        let ended = watch(&self.own, &marker.keeper())?;
        let give_up = Instant::now() + limit;
        loop {
            let left = give_up.saturating_duration_since(Instant::now()).as_millis() as i32;
            let timeout = PollTimeout::try_from(left).expect("it is not negative");
            match poll(&mut [PollFd::new(ended.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) if left == 0 => return Err(io::ErrorKind::TimedOut.into()),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// For the keeper: returns a descriptor that becomes readable when the description is gone, or its marker is removed. Closes
    /// everything else that this process was started with.
    pub(super) fn watch(self, marker: Marker, hold: &impl AsFd) -> io::Result<Watch> {
        drop(self.shared);
        fd::close_all_but(&[self.own.as_raw_fd(), hold.as_fd().as_raw_fd()])?;
        Ok(Watch { gone: watch(&self.own, &marker.itself())?, _own: self.own })
    }
}

/// The keeper's view of a description.
pub(super) struct Watch {
    /// Readable when the description is gone.
    pub(super) gone: OwnedFd,
    /// Has the keeper's byte.
    _own: File,
}

/// Returns a descriptor that becomes readable when these bytes of the file are free.
fn watch(file: &File, bytes: &Bytes) -> io::Result<OwnedFd> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    let (file, lock) = (file.try_clone()?, flock(F_WRLCK, bytes));
    any_signal::start_thread(Builder::new(), move || {
        while fcntl(&file, FcntlArg::F_OFD_SETLKW(&lock)) == Err(Errno::EINTR) {}
        drop(writer);
    })?;
    Ok(reader)
}

fn first_byte(key: &Key) -> off_t {
    let [a, b, c, d, ..] = key.id().0;
    off_t::from(u32::from_be_bytes([a, b, c, d]) >> 2) << 32
}

fn flock(kind: c_int, bytes: &Bytes) -> libc::flock {
    let (l_start, l_len) = (bytes.start, bytes.end - bytes.start);
    libc::flock { l_type: kind as i16, l_whence: SEEK_SET as i16, l_start, l_len, l_pid: 0 }
}

fn set(file: &File, kind: c_int, bytes: &Bytes) -> nix::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&flock(kind, bytes))).map(drop)
}

/// Returns what another description has locked that has a part of these bytes.
fn conflict(file: &File, bytes: &Bytes) -> io::Result<Option<Bytes>> {
    let mut lock = flock(F_WRLCK, bytes);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    let libc::flock { l_type, l_start, l_len, .. } = lock;
    // A lock of length 0 has no end.
    let end = if l_len == 0 { off_t::MAX } else { l_start.saturating_add(l_len) };
    Ok((l_type != F_UNLCK as i16).then_some(l_start..end))
}
