//! `kmutex break`: takes a lock from its holders by force.

use std::io::{self, BufRead, IsTerminal, Write};

use crate::client::{self, Session, Target};
use crate::describe;
use crate::exit::Exit;
use crate::proto::Key;
use crate::proto::text::sanitize;
use crate::proto::v2::{Answer, ErrorCode, LockStatus, Request};

/// Whether to ask the user first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirm {
    /// The user has agreed already (`--yes`).
    Given,
    /// Ask on the terminal (standard input and standard error).
    Ask,
}

/// Frees the lock of `key`: the daemon tells its holders that the lock is lost, and grants it to the next waiter.
///
/// # Errors
/// When no client holds the lock, this user may not break it, the user says no, or there is no daemon or no terminal.
pub fn break_lock(target: &Target, key: Key, confirm: Confirm) -> Result<(), Error> {
    let mut session = Session::connect_within(target, 3 * client::PROMPT_WAIT)?;
    if confirm == Confirm::Ask {
        let status = session.status_in_cluster(&key)?.filter(|status| status.holding > 0);
        let status = status.ok_or_else(|| Error::NotHeld(key.clone()))?;
        ask(&key, &status)?;
    }
    match session.call(&Request::Break { key: key.clone() })? {
        Answer::Broken => Ok(()),
        Answer::Error { code: ErrorCode::NotHeld, .. } => Err(Error::NotHeld(key)),
        Answer::Error { code: ErrorCode::Unavailable, message } => {
            Err(Error::Client(client::Error::Unavailable(message)))
        }
        Answer::Error { code: ErrorCode::NotPermitted, message } => Err(Error::NotPermitted(key, message)),
        other => Err(Error::Client(client::Error::unexpected(other))),
    }
}

fn ask(key: &Key, status: &LockStatus) -> Result<(), Error> {
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Err(Error::NoTerminal);
    }
    let mut question = format!("break the lock {:?}, held by", key.as_str());
    for holder in &status.holders {
        question.push_str(&format!(" {},", describe::party(holder)));
    }
    let more = (status.holding as usize).saturating_sub(status.holders.len());
    if more > 0 {
        question.push_str(&format!(" and {more} more,"));
    }
    let mut answer = String::new();
    let question = format!("kmutex: {} and stop what runs under it? [y/N] ", question.trim_end_matches(','));
    io::stderr()
        .write_all(sanitize(&question).as_bytes())
        .and_then(|()| io::stdin().lock().read_line(&mut answer))
        .map_err(Error::Terminal)?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Error::Refused),
    }
}

/// Why a lock was not broken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The client failed.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// No client holds the lock.
    #[error("no client holds the lock {:?}", .0.as_str())]
    NotHeld(Key),
    /// This user may not break the lock, and why.
    #[error("not permitted to break the lock {:?}: {}", .0.as_str(), .1)]
    NotPermitted(Key, String),
    /// The user said no.
    #[error("not broken")]
    Refused,
    /// There is no terminal, and `--yes` was not given.
    #[error("there is no terminal to ask on; --yes breaks the lock without asking")]
    NoTerminal,
    /// The terminal cannot be read or written.
    #[error("cannot ask: {}", crate::addr::Reason(.0))]
    Terminal(#[source] io::Error),
}

impl Error {
    /// Returns the exit code for this error.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Client(error) => error.exit(),
            Error::NotHeld(_) => Exit::BadData,
            Error::NotPermitted(..) | Error::Refused => Exit::NotPermitted,
            Error::NoTerminal => Exit::Usage,
            Error::Terminal(_) => Exit::Os,
        }
    }
}
