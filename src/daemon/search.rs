//! Searches all processes for the command of a hold whose kmutex was killed. On a machine with many processes that takes longer
//! than the loop may take, so a thread does it, one search after the other.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::processes::{Liveness, find_command_by_token};
use super::source::Source;
use crate::journal::HoldRecord;
use crate::proto::Token;

/// What a search has found.
type Found = (Token, io::Result<Liveness>);

#[derive(Default)]
pub(super) struct Search {
    queue: VecDeque<HoldRecord>,
    is_running: bool,
    thread: Option<Results>,
}

struct Results {
    found: Receiver<Found>,
    sender: Sender<Found>,
    /// Becomes readable with each result.
    wake: UnixStream,
    waker: Arc<UnixStream>,
}

impl Search {
    /// Begins to search for the command of a hold.
    ///
    /// # Errors
    /// If the kernel refuses a thread, or a descriptor.
    pub(super) fn begin(&mut self, record: HoldRecord, epoll: &Epoll) -> io::Result<()> {
        self.queue.push_back(record);
        if self.thread.is_none() {
            self.thread = Some(Results::new(epoll)?);
        }
        self.start_next()
    }

    /// Returns what a search has found, once. [`Search::start_next`] then begins the next one.
    pub(super) fn ready(&mut self) -> Option<Found> {
        let results = self.thread.as_mut()?;
        // The pipe is only there to wake the loop.
        let _ = results.wake.read(&mut [0]);
        let found = results.found.try_recv().ok()?;
        self.is_running = false;
        Some(found)
    }

    /// Gives up the searches that have not begun. Returns of which holds.
    pub(super) fn give_up(&mut self) -> Vec<Token> {
        self.queue.drain(..).map(|record| record.held.token).collect()
    }

    /// Begins the next search, if none is under way.
    ///
    /// # Errors
    /// If the kernel refuses a thread.
    pub(super) fn start_next(&mut self) -> io::Result<()> {
        let Some(results) = self.thread.as_ref().filter(|_| !self.is_running) else { return Ok(()) };
        let Some(record) = self.queue.front().cloned() else { return Ok(()) };
        let (sender, waker) = (results.sender.clone(), Arc::clone(&results.waker));
        thread::Builder::new().name("search".into()).spawn(move || {
            let found = find_command_by_token(&record);
            // An error means that the loop has ended.
            if sender.send((record.held.token, found)).is_ok() {
                let _ = (&*waker).write_all(b".");
            }
        })?;
        self.queue.pop_front();
        self.is_running = true;
        Ok(())
    }
}

impl Results {
    fn new(epoll: &Epoll) -> io::Result<Results> {
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, Source::Search.pack()))?;
        let (sender, found) = channel();
        Ok(Results { found, sender, wake, waker: Arc::new(waker) })
    }
}
