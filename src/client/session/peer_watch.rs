//! Has the kernel notice when the daemon's machine is gone, so that no wait lasts for ever.

use std::time::{Duration, Instant};

use super::{Session, Stage};
use crate::keepalive;

/// After how long without a word the daemon's machine counts as gone, if the daemon does not say.
pub(super) const PEER_TIMEOUT: Duration = Duration::from_secs(30);

/// Whether the kernel watches the daemon's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PeerWatch {
    /// The daemon is on this machine.
    Needless,
    /// It will, before the client next waits: most locks are free, and then there is no wait.
    Due(Duration),
    /// It does.
    Begun,
}

impl Session {
    /// Returns until when the daemon must have greeted the client, if it may be gone without a word.
    pub(super) fn greeting_limit(&self) -> Option<Instant> {
        match (self.stage, self.peer) {
            (Stage::Opening, PeerWatch::Due(timeout)) => Some(Instant::now() + timeout),
            _ => None,
        }
    }

    /// Has the kernel watch the daemon's machine from now on, if the daemon has greeted the client and is on another one.
    pub(super) fn watch_peer(&mut self) {
        if let PeerWatch::Due(timeout) = self.peer
            && !matches!(self.stage, Stage::Silent | Stage::Opening)
        {
            // It would fail only for a socket of another kind.
            let _ = keepalive::set(&self.transport, timeout);
            self.peer = PeerWatch::Begun;
        }
    }
}
