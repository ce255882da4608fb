//! Shows who holds the lock that a command waits for: on a terminal one line that is kept up to date, and with `--verbose`
//! one line when the wait begins.

mod interrupt;

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use rustix::process::getpgrp;
use rustix::termios::{tcgetpgrp, tcgetwinsize};

use crate::client::WaitObserver;
use crate::describe;
use crate::proto::text::sanitize;
use crate::proto::v2::LockUser;
use crate::startup;
use interrupt::Interrupt;

/// The line appears after this time, and is renewed as often.
const PAUSE: Duration = Duration::from_secs(1);
/// What clears the line.
const CLEAR: &str = "\r\x1b[K";

/// The line about the wait. Dropping it clears the line.
pub(super) struct Display<'a> {
    key: &'a str,
    began: Instant,
    /// Asked for when the wait begins: most requests are granted at once.
    style: Option<Style>,
    /// A line is due as soon as the wait begins.
    verbose: bool,
    is_shown: bool,
    /// Clears the line when a signal ends the wait.
    interrupt: Option<Interrupt>,
}

/// How the line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// Again and again at the same place.
    InPlace,
    /// Once, for a terminal that cannot clear a line, or a user who wants no control sequences.
    Once,
    /// Not at all: standard error is no terminal.
    Never,
}

impl Style {
    fn of_stderr() -> Style {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        match io::stderr().is_terminal() {
            false => Style::Never,
            true if is_dumb || is_set("NO_COLOR") => Style::Once,
            true => Style::InPlace,
        }
    }
}

impl Display<'_> {
    pub(super) fn new(key: &str, verbose: bool) -> Display<'_> {
        // The kernel drops what is sent to PID 1, unless it asks for it.
        let interrupt = startup::is_init().then(|| Interrupt::watch("")).flatten();
        Display { key, began: Instant::now(), style: None, verbose, is_shown: false, interrupt }
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

    /// Writes the line over the one before. The line is only a service to the user: if it cannot be written, the wait goes on
    /// all the same.
    fn show(&mut self, text: &str) {
        if !self.is_shown {
            self.interrupt = None;
            self.interrupt = Interrupt::watch(CLEAR);
        }
        let width = tcgetwinsize(io::stderr()).map_or(0, |size| usize::from(size.ws_col));
        let width = if width == 0 { 80 } else { width };
        // The last column stays free: some terminals go on to the next line when it is written to.
        let line: String = sanitize(&format!("kmutex: {text}")).chars().take(width - 1).collect();
        let _ = write!(io::stderr(), "\r{line}\x1b[K");
        self.is_shown = true;
    }
}

impl WaitObserver for Display<'_> {
    fn pause(&self) -> Option<Duration> {
        (self.style.unwrap_or_else(Style::of_stderr) != Style::Never).then_some(PAUSE)
    }

    fn on_waiting(&mut self, holders: &[LockUser], ahead: u32) {
        if std::mem::take(&mut self.verbose) {
            crate::message::print(self.text(holders, ahead));
        }
        let style = *self.style.get_or_insert_with(Style::of_stderr);
        if style == Style::Never || self.began.elapsed() < PAUSE || !is_in_foreground() {
            return;
        }
        let text = self.text(holders, ahead);
        match style {
            Style::InPlace => self.show(&text),
            Style::Once => {
                crate::message::print(text);
                self.style = Some(Style::Never);
            }
            Style::Never => {}
        }
    }
}

impl Drop for Display<'_> {
    fn drop(&mut self) {
        if self.is_shown && is_in_foreground() {
            let _ = write!(io::stderr(), "{CLEAR}");
        }
    }
}

/// Returns `true` if the user types to this process, and not to another job of the same terminal. (A job in the background that
/// writes to a terminal with `tostop` is stopped.)
fn is_in_foreground() -> bool {
    tcgetpgrp(io::stderr()) == Ok(getpgrp())
}
