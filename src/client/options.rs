//! How a program asks for a lock.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::proto::Key;
use crate::proto::v2::{LockRequest, Mode, Share};
use crate::timestamp::millis;

/// How [`super::Client::lock_with`] asks for a lock. The default asks as [`super::Client::lock`] does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockOptions {
    /// What to wait for while another client holds the lock.
    pub mode: Mode,
    /// How long to wait; zero: not at all. `None`: until the daemon replies.
    pub wait: Option<Duration>,
    /// A run that succeeded counts if it began less than so long ago; zero: none does.
    pub fresh: Duration,
    /// A run that failed counts if it began less than so long ago; zero: none does.
    pub fresh_failure: Duration,
    /// While it waits, a newer request with this option takes its place. With [`Mode::Queue`] only.
    pub newest: bool,
    /// Have the daemon ask the holder to stop after so long. With `newest` only.
    pub replace_after: Option<Duration>,
    /// As a holder, never be asked to stop.
    pub no_replace: bool,
    /// Hold the lock together with other shared holders.
    pub shared: bool,
    /// How many may hold the lock at the same time. `None`: one.
    pub slots: Option<NonZeroU32>,
    /// How many of the slots to take. All clients that say so must agree about `slots`.
    pub weight: Option<NonZeroU32>,
    /// Wait for the result of the holder's run ([`LockReply::Shared`](super::LockReply::Shared)), and as a holder give one
    /// ([`Guard::finish_with`](super::Guard::finish_with)). For locks with one holder, and not with [`Mode::Queue`].
    pub share: bool,
    /// A result counts while another client runs anew, if its run began less than so long ago. The client that is to run
    /// anew gets the lock, and [`Guard::stale`](super::Guard::stale) has the result. With `share` and a shorter `fresh`.
    pub stale: Duration,
    /// A text that `kmutex status` shows.
    pub note: String,
}

impl LockOptions {
    pub(super) fn request(&self, key: Key) -> LockRequest {
        let mut request = LockRequest {
            nowait: self.wait == Some(Duration::ZERO),
            fresh_ms: millis(self.fresh),
            fresh_failure_ms: millis(self.fresh_failure),
            newest: self.newest,
            replace_after_ms: self.replace_after.map(millis),
            no_replace: self.no_replace,
            shared: self.shared,
            slots: self.slots.map_or(1, NonZeroU32::get),
            weight: self.weight,
            share: self.share.then_some(Share::Whole),
            stale_ms: millis(self.stale),
            ..LockRequest::new(key, self.mode)
        };
        request.who.note = self.note.as_str().into();
        request
    }
}
