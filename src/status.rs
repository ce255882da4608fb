//! `kmutex status`: what is held, and who waits; a table for people, JSON for programs.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};

use crate::client::{self, Dial, Session};
use crate::describe;
use crate::exit::Exit;
use crate::proto::Key;
use crate::proto::v2::{Answer, LockStatus, Party, Request};

/// In which form to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A table.
    People,
    /// One JSON object a line, as the daemon sends it.
    Json,
}

/// Prints the lock of `key`, or all locks.
///
/// # Errors
/// When there is no daemon, or the output cannot be written.
pub fn print(dial: &Dial, key: Option<Key>, format: Format, out: &mut impl Write) -> Result<(), Error> {
    let mut session = Session::connect(dial, None)?;
    session.send(&Request::Status { key })?;
    let mut table = Table::default();
    loop {
        match (session.answer()?, format) {
            (Answer::Lock(status), Format::Json) => {
                let line = serde_json::to_string(&status).map_err(io::Error::from)?;
                writeln!(out, "{line}")?;
            }
            (Answer::Lock(status), Format::People) => table.add(&status),
            (Answer::End, _) => break,
            (other, _) => return Err(client::Error::Protocol(format!("unexpected answer {other:?}")).into()),
        }
    }
    if format == Format::People {
        table.print(out)?;
    }
    Ok(out.flush()?)
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
        // A key may hold what a terminal would obey.
        let key = lock.key.as_deref().map_or(lock.id.clone(), |key| key.replace(char::is_control, "?"));
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

    fn add_party(&mut self, key: &str, state: &str, party: &Party) {
        let dash = |text: &str| if text.is_empty() { "-".to_string() } else { text.to_string() };
        let user = match party.uid {
            None => dash(party.who.user.as_str()),
            Some(uid) => {
                let name = self.users.entry(uid);
                name.or_insert_with(|| describe::user(uid)).clone()
            }
        };
        let pid = if party.who.pid == 0 { "-".into() } else { party.who.pid.to_string() };
        let command = match party.protocol {
            1 => "(protocol 1)".into(),
            _ => dash(party.who.command.as_str()),
        };
        let host = dash(party.who.host.as_str());
        self.rows.push([key.into(), state.into(), pid, user, host, describe::span(party.for_ms), command]);
    }

    /// Says how many there are beyond those that the daemon lists.
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

/// Why there is no status.
#[derive(Debug)]
pub enum Error {
    /// The daemon cannot be asked.
    Client(client::Error),
    /// The answer cannot be printed.
    Output(io::Error),
}

impl Error {
    /// The exit code for it.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Client(error) => error.exit(),
            Error::Output(_) => Exit::Os,
        }
    }
}

impl From<client::Error> for Error {
    fn from(error: client::Error) -> Error {
        Error::Client(error)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Error {
        Error::Output(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Client(error) => error.fmt(f),
            Error::Output(error) => write!(f, "cannot write the status: {}", crate::addr::Reason(error)),
        }
    }
}

impl std::error::Error for Error {}
