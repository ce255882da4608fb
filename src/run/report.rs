//! What became of a job, for programs: one JSON object (`--status-fd`, `--status-file`).

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;

use super::{Ended, Error};
use crate::fd;
use crate::proto::{Outcome, Token};

/// What became of a job, as far as it is known.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// The lock's key, or the first of several.
    pub key: String,
    /// All of them, if there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// `ran`, `finished`, `busy`, `lost` or `error`.
    verdict: &'static str,
    /// How the command ended: this one's if it ran, or the holder's that finished first.
    pub outcome: Option<Outcome>,
    /// The token of the lock: this one's if it was granted, or the holder's that finished first.
    pub token: Option<Token>,
    /// How long it waited for the lock, in milliseconds.
    pub waited_ms: u64,
    /// How long it held the lock, in milliseconds.
    pub held_ms: u64,
    /// What went wrong, for people.
    error: Option<String>,
}

impl Report {
    /// Nothing has happened yet.
    pub fn new<'a>(keys: impl Iterator<Item = &'a str>) -> Report {
        let mut keys: Vec<String> = keys.map(String::from).collect();
        let key = keys.first().cloned().unwrap_or_default();
        if keys.len() == 1 {
            keys.clear();
        }
        Report { key, keys, ..Report::default() }
    }

    /// The report as one line of JSON, with its newline.
    pub fn line(&mut self, result: &Result<Ended, Error>) -> String {
        self.verdict = match result {
            Ok(Ended::Ran(_)) => "ran",
            Ok(Ended::Finished(_) | Ended::Adopted(_)) => "finished",
            Ok(Ended::Busy) => "busy",
            Ok(Ended::Lost) => "lost",
            Err(error) => {
                self.error = Some(error.to_string());
                "error"
            }
        };
        serde_json::to_string(self).expect("a report has no part that JSON lacks") + "\n"
    }
}

/// Where the report goes.
pub struct Sink {
    file: File,
    /// The option that named it, for messages.
    name: String,
}

impl Sink {
    /// Opens the descriptor, or else the file, that the report goes to; `None` when there is neither. This comes before
    /// the job: a caller that wants a report learns at once that there can be none.
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
