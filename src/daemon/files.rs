//! When to look whether the daemon's files are still there, and what follows if they are not.
//!
//! A file that was removed is put back. While one cannot be, the daemon grants nothing, since another daemon may be about to
//! serve in its place; it looks again some times, then says what is wrong, and ends as soon as nothing is held.

use std::path::PathBuf;
use std::time::Duration;

use log::{error, info};

use super::Error;
use super::file_watch::FileWatch;
use crate::table::Timestamp;

/// How often to look again, and after how long.
const LOOKS_MAX: u32 = 10;
const PAUSE: Duration = Duration::from_millis(100);

/// The state of the daemon's files.
pub(super) struct Files {
    pub(super) watch: FileWatch,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    InPlace,
    /// Something is missing: look again at this time, so many times.
    Missing {
        look_at: Timestamp,
        looks: u32,
    },
    /// It cannot be put back.
    Lost,
}

impl Files {
    /// The files are in place, as far as it is known.
    pub(super) fn new() -> Files {
        Files { watch: FileWatch::new(), state: State::InPlace }
    }

    /// Notes what a look at the files has found. Returns `true` if locks may be granted.
    pub(super) fn looked(&mut self, found: Result<(), Error>, now: Timestamp, files: &[PathBuf]) -> bool {
        self.watch.watch(files);
        let look_at = now.plus(PAUSE);
        self.state = match (found, self.state) {
            (Ok(()), State::InPlace) => State::InPlace,
            (Ok(()), _) => {
                info!("the daemon's files are in place again");
                State::InPlace
            }
            (Err(_), State::InPlace) => State::Missing { look_at, looks: 1 },
            (Err(_), State::Missing { looks, .. }) if looks < LOOKS_MAX => {
                State::Missing { look_at, looks: looks + 1 }
            }
            (Err(e), State::Missing { .. }) => {
                error!("{e}; this daemon grants no locks, and ends when none is held");
                State::Lost
            }
            (Err(_), State::Lost) => State::Lost,
        };
        self.state == State::InPlace
    }

    /// When to look again.
    pub(super) fn look_at(&self) -> Option<Timestamp> {
        match self.state {
            State::Missing { look_at, .. } => Some(look_at),
            State::InPlace | State::Lost => None,
        }
    }

    /// Returns `true` if the files cannot be put back.
    pub(super) fn are_lost(&self) -> bool {
        self.state == State::Lost
    }

    /// Returns `true` if the kernel does not tell when a file is removed.
    pub(super) fn are_unwatched(&self) -> bool {
        self.watch.descriptor().is_none()
    }
}
