//! What a client does while its request waits: it may show who holds the lock, and follow the output of a run.

use std::time::Duration;

use crate::client::Error;
use crate::output::Output;
use crate::proto::Token;
use crate::proto::v2::LockUser;

/// Follows a request that waits: shows who holds the lock.
pub trait WaitObserver {
    /// Returns after how long to ask the daemon again who holds the lock; `None`: never.
    fn pause(&self) -> Option<Duration>;

    /// The request waits: `holders` hold the lock, and `ahead` requests of the queue come first.
    fn on_waiting(&mut self, holders: &[LockUser], ahead: u32);

    /// The output of the run with this token can be read while it grows; only for a request with
    /// [`Share::Live`](crate::proto::v2::Share::Live).
    ///
    /// # Errors
    /// What ends the wait.
    fn on_output(&mut self, _token: Token, _output: Output) -> Result<(), Error> {
        Ok(())
    }

    /// There is more of it.
    ///
    /// # Errors
    /// What ends the wait.
    fn on_grown(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// It will never be complete.
    ///
    /// # Errors
    /// What ends the wait.
    fn on_torn(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

/// Ignores everything.
#[derive(Debug)]
pub struct NoObserver;

impl WaitObserver for NoObserver {
    fn pause(&self) -> Option<Duration> {
        None
    }

    fn on_waiting(&mut self, _holders: &[LockUser], _ahead: u32) {}
}
