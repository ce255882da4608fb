//! `kmutex status`: which locks are held, and who waits; a table for people, JSON for programs.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::client::{self, Session, Target};
use crate::describe;
use crate::exit::Exit;
use crate::proto::v2::{Answer, ErrorCode, LockStatus, LockUser, Request};
use crate::proto::{Key, Protocol, text};

/// The form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A table.
    People,
    /// One JSON object a line, as the daemon sends it.
    Json,
    /// The keys alone, one a line; keys with characters that a terminal could obey are left out.
    Keys,
}

/// Which locks to print.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// The lock of one key.
    Key(Key),
    /// Every lock that is held or awaited on this host.
    All,
    /// Every lock of every host of the cluster.
    Cluster,
}

/// What to ask, and of which daemon.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The daemon.
    pub target: &'a Target,
    /// Which locks to print.
    pub which: &'a Which,
    /// The first line of a table: where the daemon is, if the user did not say.
    pub heading: Option<&'a str>,
}

/// How long the daemon may take to send the whole status. (Each line of it has a time of its own.)
const LISTING_WAIT: Duration = Duration::from_secs(60);

/// Prints locks.
///
/// # Errors
/// When there is no daemon, or the output cannot be written.
pub fn print(question: &Question<'_>, format: Format, out: &mut impl Write) -> Result<(), Error> {
    let (key, cluster) = match question.which {
        Which::Key(key) => (Some(key.clone()), false),
        Which::All => (None, false),
        Which::Cluster => (None, true),
    };
    // Hosts that share their locks are asked through etcd, which takes longer.
    let limit = if cluster { 3 * client::PROMPT_WAIT } else { client::PROMPT_WAIT };
    let mut session = Session::connect_within(question.target, limit)?;
    session.send(&Request::Status { key, cluster })?;
    let mut table = Table::default();
    let mut notes = Vec::new();
    let give_up = Instant::now() + LISTING_WAIT;
    loop {
        if give_up <= Instant::now() {
            return Err(client::Error::Silent.into());
        }
        match (session.answer()?, format) {
            (Answer::Lock(status), Format::Json) => {
                let line = serde_json::to_string(&status).map_err(io::Error::from)?;
                writeln!(out, "{}", text::escape_json(&line))?;
            }
            (Answer::Lock(status), Format::Keys) => {
                if let Some(key) = status.key.filter(|key| text::is_harmless(key)) {
                    writeln!(out, "{key}")?;
                }
            }
            (Answer::Lock(status), Format::People) => {
                table.add(&status);
                let runs = [("last success", &status.last_success), ("last failure", &status.last_failure)];
                for (name, run) in runs {
                    notes.extend(run.as_ref().map(|run| format!("{name}: {}", describe::run(run))));
                }
            }
            (Answer::End, _) => break,
            (Answer::Error { code: ErrorCode::Unavailable, message }, _) => {
                return Err(client::Error::Unavailable(message).into());
            }
            (Answer::Error { code: ErrorCode::BadRequest, message }, _) if cluster => {
                return Err(client::Error::PerHost(message).into());
            }
            (other, _) => return Err(client::Error::unexpected(other).into()),
        }
    }
    if format == Format::People {
        if let Some(heading) = question.heading {
            writeln!(out, "{heading}")?;
        }
        table.print(out)?;
        notes.iter().try_for_each(|note| writeln!(out, "{note}"))?;
    }
    Ok(out.flush()?)
}

/// How often [`watch`] asks the daemon.
const PAUSE: Duration = Duration::from_secs(1);

/// Prints the table every second: in place on a terminal, one below the other elsewhere. While there is no daemon, prints
/// the error instead.
///
/// # Errors
/// When there is no daemon at the beginning, or the output cannot be written. Does not return otherwise.
pub fn watch(question: &Question<'_>, out: &mut impl Write) -> Result<(), Error> {
    let is_terminal = io::stdout().is_terminal();
    let mut has_begun = false;
    loop {
        let mut table = Vec::new();
        match print(question, Format::People, &mut table) {
            Err(Error::Client(error)) if has_begun => writeln!(table, "kmutex: {error}")?,
            other => other?,
        }
        has_begun = true;
        let text = String::from_utf8_lossy(&table);
        match rustix::termios::tcgetwinsize(io::stdout()) {
            Ok(size) if is_terminal => {
                write!(out, "{}", in_place(&text, size.ws_row.into(), size.ws_col.into()))?
            }
            _ => writeln!(out, "{text}")?,
        }
        out.flush()?;
        std::thread::sleep(PAUSE);
    }
}

/// Returns the bytes that replace the content of a terminal by `text`, as much of it as fits into `rows` and `columns`.
fn in_place(text: &str, rows: usize, columns: usize) -> String {
    let (rows, columns) = (if rows == 0 { 24 } else { rows }, if columns == 0 { 80 } else { columns });
    let count = text.lines().count();
    // The cursor stands in the last row.
    let fit = if count < rows { count } else { rows.saturating_sub(2) };
    let mut screen = "\x1b[H".to_string();
    for line in text.lines().take(fit) {
        screen.extend(line.chars().take(columns));
        screen.push_str("\x1b[K\n");
    }
    if fit < count {
        screen.push_str(&format!("and {} more\x1b[K\n", count - fit));
    }
    screen.push_str("\x1b[J");
    screen
}

const HEADINGS: [&str; 7] = ["KEY", "STATE", "PID", "USER", "HOST", "FOR", "COMMAND"];
type Row = [String; HEADINGS.len()];

/// The table for people, row by row.
#[derive(Default)]
struct Table {
    rows: Vec<Row>,
    /// Users' names, each looked up once.
    users: HashMap<u32, String>,
}

impl Table {
    fn add(&mut self, lock: &LockStatus) {
        // A key may contain an escape sequence, which a terminal would obey.
        let key = lock.key.as_deref().map_or(lock.id.clone(), |key| text::sanitize(key).into());
        for holder in &lock.holders {
            let state = if holder.orphan { "orphan" } else { "holds" };
            self.add_party(&key, state, holder);
        }
        for waiter in &lock.waiters {
            self.add_party(&key, "waits", waiter);
        }
        self.add_rest(&key, lock.holding, lock.holders.len(), "hold");
        self.add_rest(&key, lock.waiting, lock.waiters.len(), "wait");
    }

    fn add_party(&mut self, key: &str, state: &str, party: &LockUser) {
        let dash = |text: &str| if text.is_empty() { "-".to_string() } else { text.to_string() };
        let user = match party.uid {
            None => dash(party.who.user.as_str()),
            Some(uid) => {
                let name = self.users.entry(uid);
                name.or_insert_with(|| describe::user(uid)).clone()
            }
        };
        let pid = party.who.pid.map_or("-".into(), |pid| pid.to_string());
        let command = match party.protocol {
            Protocol::V1 => "(protocol 1)".into(),
            Protocol::V2 => dash(party.who.command.as_str()),
        };
        let host = dash(party.who.host.as_str());
        self.rows.push([key.into(), state.into(), pid, user, host, describe::span(party.for_ms), command]);
    }

    /// Adds a row that counts the holders or waiters that the daemon does not list.
    fn add_rest(&mut self, key: &str, count: u32, listed: usize, verb: &str) {
        let rest = (count as usize).saturating_sub(listed);
        if rest > 0 {
            let mut row = Row::default();
            row[0] = key.into();
            row[1] = format!("{rest} more {verb}");
            self.rows.push(row);
        }
    }

    fn print(mut self, out: &mut impl Write) -> io::Result<()> {
        // Stable, so that within a key the holders and waiters stay in order.
        self.rows.sort_by(|a, b| a[0].cmp(&b[0]));
        self.rows.insert(0, HEADINGS.map(String::from));
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; HEADINGS.len()] = std::array::from_fn(width);
        for row in &self.rows {
            let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
            writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// Why the status cannot be shown.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The client failed.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The output cannot be written.
    #[error("cannot write the status: {}", crate::addr::Reason(.0))]
    Output(#[from] io::Error),
}

impl Error {
    /// Returns the exit code for this error.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Client(error) => error.exit(),
            Error::Output(_) => Exit::Os,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_do_not_fit_on_a_terminal_are_counted() {
        assert_eq!(in_place("a\nbc\n", 5, 1), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
        assert_eq!(in_place("1\n2\n3\n4\n", 4, 9), "\x1b[H1\x1b[K\n2\x1b[K\nand 2 more\x1b[K\n\x1b[J");
    }
}
