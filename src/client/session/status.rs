//! Asking for the status of one lock.

use super::Session;
use crate::client::Error;
use crate::proto::Key;
use crate::proto::v2::{Answer, ErrorCode, LockStatus, Request};

impl Session {
    /// Returns the status of one lock, or `None` if it has no holder and no waiter.
    ///
    /// # Errors
    /// As [`Session::call`].
    pub fn status_of(&mut self, key: &Key) -> Result<Option<LockStatus>, Error> {
        let first = self.call(&Request::Status { key: Some(key.clone()), cluster: false })?;
        self.one_status(first)
    }

    /// Returns the status of one lock among all hosts of the cluster; the host's own if the daemon does not cluster its
    /// locks.
    ///
    /// # Errors
    /// As [`Session::call`], and [`Error::Unavailable`] if the daemon cannot ask etcd.
    pub fn status_in_cluster(&mut self, key: &Key) -> Result<Option<LockStatus>, Error> {
        let here = self.status_of(key)?;
        if here.as_ref().is_some_and(|status| status.holding > 0) {
            return Ok(here);
        }
        match self.call(&Request::Status { key: Some(key.clone()), cluster: true })? {
            Answer::Error { code: ErrorCode::BadRequest, .. } => Ok(here),
            Answer::Error { code: ErrorCode::Unavailable, message } => Err(Error::Unavailable(message)),
            first => self.one_status(first),
        }
    }

    /// Reads the status of one lock to its end.
    fn one_status(&mut self, first: Answer) -> Result<Option<LockStatus>, Error> {
        let status = match first {
            Answer::End => return Ok(None),
            Answer::Lock(status) => status,
            other => return Err(Error::unexpected(other)),
        };
        match self.answer()? {
            Answer::End => Ok(Some(status)),
            other => Err(Error::unexpected(other)),
        }
    }
}
