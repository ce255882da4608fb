//! A list of the locks of all hosts, on its way from etcd to one client: page by page, and no faster than the client
//! reads it.

use std::collections::VecDeque;

use crate::proto::v2::LockStatus;

/// Some of the locks of all hosts.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) locks: Vec<LockStatus>,
    /// The key in etcd where the next page begins; `None`: this is the last page.
    pub(super) next: Option<Vec<u8>>,
}

/// What one client is being sent.
pub(super) struct Listing {
    ready: VecDeque<LockStatus>,
    next: Next,
}

enum Next {
    /// A page has been requested.
    Requested,
    From(Vec<u8>),
    End,
}

/// What to do next for a client that has room for more output.
pub(super) enum Step {
    Send(Box<LockStatus>),
    /// Request the page that begins at this key.
    Request(Vec<u8>),
    /// Wait for a page.
    Wait,
    /// The client has been sent everything.
    End,
}

impl Listing {
    /// A listing whose first page has been requested.
    pub(super) fn new() -> Listing {
        Listing { ready: VecDeque::new(), next: Next::Requested }
    }

    pub(super) fn add(&mut self, page: Page) {
        self.ready.extend(page.locks);
        self.next = page.next.map_or(Next::End, Next::From);
    }

    /// Returns `true` if there is something to send as soon as the client has room.
    pub(super) fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    pub(super) fn step(&mut self) -> Step {
        if let Some(status) = self.ready.pop_front() {
            return Step::Send(Box::new(status));
        }
        match std::mem::replace(&mut self.next, Next::Requested) {
            Next::Requested => Step::Wait,
            Next::From(from) => Step::Request(from),
            Next::End => Step::End,
        }
    }
}
