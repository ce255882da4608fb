//! Connecting without waiting for it: a thread connects, for a caller that has other things to do, such as signals. A name may have
//! to be resolved, and a machine may be gone, so that connecting over TCP takes long.

use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::{Error, Session, Target};

/// An attempt to connect.
#[derive(Debug)]
pub(super) struct Connecting {
    result: Receiver<Result<Session, Error>>,
    /// Becomes readable when the attempt is over: its other end is closed then.
    over: PipeReader,
}

impl Connecting {
    /// Begins to connect, which may take `limit`.
    ///
    /// # Errors
    /// When the kernel refuses a thread or a pipe.
    pub(super) fn begin(target: Target, limit: Duration) -> io::Result<Connecting> {
        let (over, end) = io::pipe()?;
        let (sender, result) = channel();
        let connect = move || {
            // If the caller is not interested any more, the connection is closed here.
            let _ = sender.send(Session::connect(&target, Some(Instant::now() + limit)));
            drop(end);
        };
        thread::Builder::new().name("connect".into()).spawn(connect)?;
        Ok(Connecting { result, over })
    }

    /// Returns how the attempt went, once it is over.
    pub(super) fn result(&self) -> Option<Result<Session, Error>> {
        match self.result.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(Error::Closed)),
        }
    }
}

impl AsFd for Connecting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.over.as_fd()
    }
}
