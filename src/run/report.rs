//! The report of `--status-fd` and `--status-file`: one JSON object on a line.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;

use super::{Ended, Error};
use crate::fd;
use crate::proto::{Outcome, Token};

/// How a job went. Its fields are filled in as they become known.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// The lock's key, or the first of several.
    pub key: String,
    /// All keys, if there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// `ran`, `finished`, `fresh`, `superseded`, `busy`, `timeout`, `replaced`, `lost` or `error`.
    verdict: &'static str,
    /// How the command ended, or the command of the holder that finished first.
    pub outcome: Option<Outcome>,
    /// The token of the granted lock, or that of the holder that finished first.
    pub token: Option<Token>,
    /// How long kmutex waited for the lock, in milliseconds.
    pub waited_ms: u64,
    /// How long kmutex held the lock, in milliseconds.
    pub held_ms: u64,
    /// The error message.
    error: Option<String>,
}

impl Report {
    /// Returns an empty report for these keys.
    pub fn new<'a>(keys: impl Iterator<Item = &'a str>) -> Report {
        let mut keys: Vec<String> = keys.map(String::from).collect();
        let key = keys.first().cloned().unwrap_or_default();
        if keys.len() == 1 {
            keys.clear();
        }
        Report { key, keys, ..Report::default() }
    }

    /// Returns the report as one line of JSON, with its newline.
    pub fn line(&mut self, result: &Result<Ended, Error>) -> String {
        self.verdict = match result {
            Ok(Ended::Ran(_) | Ended::Died(_)) => "ran",
            Ok(Ended::Finished(_) | Ended::Adopted(_) | Ended::Shared(..)) => "finished",
            Ok(Ended::Fresh(_) | Ended::FreshAdopted(_) | Ended::SharedFresh(..)) => "fresh",
            Ok(Ended::Superseded) => "superseded",
            Ok(Ended::TimedOut) => "timeout",
            Ok(Ended::Replaced(_)) => "replaced",
            Ok(Ended::Busy) => "busy",
            Ok(Ended::Lost) => "lost",
            Err(error) => {
                self.error = Some(error.to_string());
                "error"
            }
        };
        serde_json::to_string(self).expect("every field of a report has a JSON form") + "\n"
    }
}

/// The file that the report is written to.
pub struct Sink {
    file: File,
    /// The option that named the file, for messages.
    name: String,
}

impl Sink {
    /// Opens the descriptor or the file; returns `None` if neither is given. The caller does this before the job, so that
    /// a file that cannot be written is an error before the command has run.
    ///
    /// # Errors
    /// [`Error::Sink`].
    pub fn open(fd: Option<u32>, path: Option<PathBuf>) -> Result<Option<Sink>, Error> {
        let (file, name) = match (fd, path) {
            (None, None) => return Ok(None),
            (Some(number), _) => (fd::dup(number), format!("--status-fd {number}")),
            (None, Some(path)) => (File::create(&path), format!("--status-file {}", path.display())),
        };
        match file {
            Ok(file) => Ok(Some(Sink { file, name })),
            Err(error) if fd.is_some() => Err(Error::SinkDescriptor { name, error }),
            Err(error) => Err(Error::Sink { name, error }),
        }
    }

    /// Writes the report.
    ///
    /// # Errors
    /// [`Error::Report`].
    pub fn write(mut self, line: &str) -> Result<(), Error> {
        let written = self.file.write_all(line.as_bytes());
        written.map_err(|error| Error::Report { name: self.name, error })
    }
}
