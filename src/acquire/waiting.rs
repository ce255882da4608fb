//! Shows who holds the lock that a command waits for: on a terminal one line that is kept up to date, and with `--verbose`
//! one line when the wait begins.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::client::WaitObserver;
use crate::describe;
use crate::proto::v2::LockUser;

/// The line appears after this time, and is renewed as often.
const PAUSE: Duration = Duration::from_secs(1);

/// The line about the wait. Dropping it clears the line.
pub(super) struct Display<'a> {
    key: &'a str,
    began: Instant,
    is_terminal: bool,
    /// A line is due as soon as the wait begins.
    verbose: bool,
    is_shown: bool,
}

impl Display<'_> {
    pub(super) fn new(key: &str, verbose: bool) -> Display<'_> {
        let is_terminal = io::stderr().is_terminal();
        Display { key, began: Instant::now(), is_terminal, verbose, is_shown: false }
    }

    fn text(&self, holders: &[LockUser], ahead: u32) -> String {
        let mut text = format!("waiting for {:?}", self.key);
        if ahead > 0 {
            text.push_str(&format!(", {ahead} ahead"));
        }
        if let Some(first) = holders.first() {
            text.push_str(&format!(", held by {}", describe::party(first)));
        }
        if holders.len() > 1 {
            text.push_str(&format!(" and {} more", holders.len() - 1));
        }
        text
    }
}

impl WaitObserver for Display<'_> {
    fn pause(&self) -> Option<Duration> {
        self.is_terminal.then_some(PAUSE)
    }

    fn on_waiting(&mut self, holders: &[LockUser], ahead: u32) {
        if std::mem::take(&mut self.verbose) {
            crate::message::print(self.text(holders, ahead));
        }
        if !self.is_terminal || self.began.elapsed() < PAUSE {
            return;
        }
        let width = rustix::termios::tcgetwinsize(io::stderr()).map_or(0, |size| usize::from(size.ws_col));
        let width = if width == 0 { 80 } else { width };
        let text = format!("kmutex: {}", self.text(holders, ahead));
        // The last column stays free: some terminals go on to the next line when it is written to.
        let line: String = text.chars().take(width - 1).collect();
        // The line is only a service to the user: if it cannot be written, the wait goes on all the same.
        let _ = write!(io::stderr(), "\r{line}\x1b[K");
        self.is_shown = true;
    }
}

impl Drop for Display<'_> {
    fn drop(&mut self) {
        if self.is_shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
