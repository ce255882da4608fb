//! The result of a run that another client shares.

use std::io;

use crate::output::{Output, Stream};
use crate::proto::v2::RunStatus;
use crate::proto::{Outcome, Token};

/// The result of a run: how it ended, and what it wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedRun {
    /// How it ended.
    pub outcome: Outcome,
    /// The token of its lock.
    pub token: Token,
    /// When it was and who ran it, if it was over before the request came.
    pub past: Option<RunStatus>,
    pub(crate) output: Output,
}

impl SharedRun {
    /// Reads its standard output.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] if the client that ran it made a file of another format.
    pub fn stdout(&self) -> io::Result<Vec<u8>> {
        self.output.read(Stream::Stdout)
    }

    /// Reads its standard error.
    ///
    /// # Errors
    /// As [`SharedRun::stdout`].
    pub fn stderr(&self) -> io::Result<Vec<u8>> {
        self.output.read(Stream::Stderr)
    }
}
