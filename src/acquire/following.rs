//! Writes the output of the run that a request waits for, as it comes.

use std::time::Duration;

use super::waiting::Display;
use crate::client::{Error, WaitObserver};
use crate::output::{Output, Reader};
use crate::proto::Token;
use crate::proto::v2::LockUser;
use crate::streams;

const GONE: &str = "the holder disappeared before its end";
const OTHER: &str = "the rest is another run's";

/// Shows who holds the lock, until there is an output.
pub(super) struct Following<'a> {
    display: Option<Display<'a>>,
    /// The output, and the token of its run.
    current: Option<(Token, Reader)>,
}

impl<'a> Following<'a> {
    pub(super) fn new(display: Display<'a>) -> Following<'a> {
        Following { display: Some(display), current: None }
    }

    /// Clears the line about the wait.
    pub(super) fn hide(&mut self) {
        self.display = None;
    }

    /// Returns the rest of the output of this run.
    ///
    /// # Errors
    /// [`Error::Torn`] if part of another run's output was written.
    pub(super) fn rest(self, token: Token, output: &Output) -> Result<Reader, Error> {
        match self.current {
            Some((current, reader)) if current == token => Ok(reader),
            Some((_, reader)) if reader.has_read() => Err(Error::Torn(OTHER.into())),
            _ => Ok(output.reader()),
        }
    }

    /// There is no rest.
    ///
    /// # Errors
    /// [`Error::Torn`] if part of an output was written.
    pub(super) fn end(&self, why: &str) -> Result<(), Error> {
        match &self.current {
            Some((_, reader)) if reader.has_read() => Err(Error::Torn(why.into())),
            _ => Ok(()),
        }
    }

    /// The request was granted: the run that it waited for is gone.
    ///
    /// # Errors
    /// As [`Following::end`].
    pub(super) fn granted(&self) -> Result<(), Error> {
        self.end(GONE)
    }
}

impl WaitObserver for Following<'_> {
    fn pause(&self) -> Option<Duration> {
        self.display.as_ref()?.pause()
    }

    fn on_waiting(&mut self, holders: &[LockUser], ahead: u32) {
        if let Some(display) = &mut self.display {
            display.on_waiting(holders, ahead);
        }
    }

    fn on_output(&mut self, token: Token, output: Output) -> Result<(), Error> {
        match &self.current {
            // The daemon was restarted, and this is the same file.
            Some((current, _)) if *current == token => {}
            _ => {
                self.end(OTHER)?;
                self.current = Some((token, output.reader()));
            }
        }
        self.on_grown()
    }

    fn on_grown(&mut self) -> Result<(), Error> {
        let Some((_, reader)) = &mut self.current else { return Ok(()) };
        // The line about the wait would stand between the lines of the output.
        self.display = None;
        copy(reader)
    }

    fn on_torn(&mut self) -> Result<(), Error> {
        self.end(GONE)?;
        self.current = None;
        Ok(())
    }
}

/// Writes what there is to read of an output.
///
/// # Errors
/// [`Error::Torn`] if it cannot be read, [`Error::Delivery`] if it cannot be written.
fn copy(reader: &mut Reader) -> Result<(), Error> {
    streams::copy(reader).map_err(|error| match error {
        streams::Error::Read(e) => Error::Torn(e.to_string()),
        streams::Error::Write(e) => Error::Delivery(e),
    })
}
