//! This process's own standard output and standard error, as what a command would have written goes there.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

use crate::output::{Reader, Stream};

/// How much is written at a time.
const WRITE_BYTES: usize = 64 * 1024;

/// Writes all of it, without a buffer between.
///
/// # Errors
/// Those of write(2): [`io::ErrorKind::BrokenPipe`] if no process reads any more.
pub(crate) fn write_all(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Stdout => write_all_to(io::stdout().as_fd(), bytes),
        Stream::Stderr => write_all_to(io::stderr().as_fd(), bytes),
    }
}

fn write_all_to(fd: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match write(&fd, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::EINTR) => {}
            // The process at the other end has made it so.
            Err(Errno::EAGAIN) => {
                match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Why not all of an output was written.
#[derive(Debug)]
pub(crate) enum Error {
    /// It cannot be read.
    Read(io::Error),
    /// It cannot be written.
    Write(io::Error),
}

/// Writes what there is to read.
///
/// # Errors
/// When it cannot be read or written.
pub(crate) fn copy(reader: &mut Reader) -> Result<(), Error> {
    let mut buffer = vec![0; WRITE_BYTES];
    while let Some((stream, length)) = reader.read(&mut buffer).map_err(Error::Read)? {
        write_all(stream, &buffer[..length]).map_err(Error::Write)?;
    }
    Ok(())
}
