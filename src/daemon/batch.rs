//! The readiness events that the kernel gives at a time. A turn of the loop may end before all of them are handled; then
//! the next turn goes on with the rest.

use std::io;

use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};

/// How many events are taken from the kernel at a time.
const EVENTS_MAX: usize = 256;

pub(super) struct Batch {
    events: Box<[EpollEvent]>,
    ready: usize,
    next: usize,
    /// How many batches in a row were full.
    full: usize,
}

impl Batch {
    /// A batch without events.
    pub(super) fn new() -> Batch {
        Batch { events: vec![EpollEvent::empty(); EVENTS_MAX].into(), ready: 0, next: 0, full: 0 }
    }

    /// Takes the next events from the kernel. Call it when all events of the last batch are handled.
    ///
    /// # Errors
    /// As epoll_wait(2) gives them.
    pub(super) fn wait(&mut self, epoll: &Epoll, timeout: EpollTimeout) -> io::Result<()> {
        self.next = 0;
        self.ready = match epoll.wait(&mut self.events, timeout) {
            Err(nix::Error::EINTR) => 0,
            other => other?,
        };
        self.full = if self.ready < EVENTS_MAX { 0 } else { self.full + 1 };
        Ok(())
    }

    pub(super) fn next(&mut self) -> Option<EpollEvent> {
        let event = self.events[..self.ready].get(self.next).copied();
        self.next += usize::from(event.is_some());
        event
    }

    pub(super) fn is_handled(&self) -> bool {
        self.next == self.ready
    }

    /// Forgets how many batches were full.
    pub(super) fn start_round(&mut self) {
        self.full = 0;
    }

    /// Returns `true` if everything that was ready when the round began has been handled. A batch with room for more
    /// events had all of them. If batches are full, the kernel continues with the descriptors that it has not returned yet,
    /// so that after enough full batches all of `descriptors` had their turn.
    pub(super) fn is_round_complete(&self, descriptors: usize) -> bool {
        self.is_handled() && (self.full == 0 || self.full > descriptors / EVENTS_MAX + 1)
    }
}
