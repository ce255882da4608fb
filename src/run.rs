//! `kmutex run`: a lock, a command under it, and an exit code that tells what happened.

mod child;
mod descendants;
mod report;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::acquire::{Acquire, Acquired};
use crate::addr::Reason;
use crate::client::{self, HeldLock, RELEASE_WAIT};
use crate::exit::{self, Exit};
use crate::proto::v2::LockRequest;
use crate::proto::{Key, Outcome, Token};
pub use report::{Report, Sink};

/// What to run, under which lock, and how.
#[derive(Clone, Debug)]
pub struct Job {
    /// Which locks, and how to ask for each; at least one, and all of one daemon. See [`in_order`].
    pub locks: Vec<Acquire>,
    /// The program and its arguments; at least the program.
    pub argv: Vec<OsString>,
    /// What the command gets of the lock, and who waits for it.
    pub child: Child,
    /// What to do when the lock is lost while the command runs.
    pub on_lost: OnLost,
    /// For [`OnLost::Kill`]: how long after SIGTERM the processes that are left get SIGKILL.
    pub kill_after: Duration,
    /// If the lock is held by the command that this is part of, run without taking it again.
    pub reentrant: bool,
    /// HeldLock the lock until all that the command has started has ended.
    pub tree: bool,
}

/// What becomes of the lock's descriptor, and of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Child {
    /// The command inherits the descriptor, so that the lock lasts as long as either lives.
    Inherits,
    /// The command does not inherit it: the lock lasts as long as this process.
    Closed,
    /// This process becomes the command.
    Exec,
}

/// What to do when the lock is lost while the command runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnLost {
    /// Stop the command and its descendants: SIGTERM, then SIGKILL; exit with 74
    Kill,
    /// Say so on standard error and let it run; exit with 74 when it has ended
    Continue,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The command ran. This is its status, or 128 and the signal that it died of.
    Ran(u8),
    /// Another holder was done first; the command did not run.
    Finished(Outcome),
    /// The same, and this is the status with which that one ended.
    Adopted(u8),
    /// Somebody else holds the lock, and there was no waiting, or no more.
    Busy,
    /// The lock was lost while the command ran.
    Lost,
}

impl Job {
    /// Does it, and notes in `report` what happens. Does not return when the job is to become the command and does.
    ///
    /// # Errors
    /// When a lock or the command cannot be had. Whatever was locked is released.
    pub fn run(&self, report: &mut Report) -> Result<Ended, Error> {
        let asked = Instant::now();
        let mut holds = Vec::new();
        let ended = self.acquire(&mut holds, asked, report);
        report.waited_ms = millis(asked);
        match ended {
            Ok(None) => {}
            other => {
                for hold in &mut holds {
                    // Nothing was done under it, which is what those who wait for it are told. If the daemon has gone
                    // meanwhile, the lock goes with this process.
                    let _ = hold.release(Outcome::Vanished, RELEASE_WAIT);
                }
                return other.map(|ended| ended.expect("it is not none"));
            }
        }
        self.locks[0].say(|| format!("running {}", self.command_line()));
        let granted = Instant::now();
        let ended = self.run_locked(holds, report);
        report.held_ms = millis(granted);
        ended
    }

    /// Takes all the locks, but for those that are held above. `Some`: one is not to be had.
    fn acquire(
        &self,
        holds: &mut Vec<HeldLock>,
        asked: Instant,
        report: &mut Report,
    ) -> Result<Option<Ended>, Error> {
        for lock in &self.locks {
            match lock.acquire(&self.request(lock, holds), asked)? {
                Acquired::Busy => return Ok(Some(Ended::Busy)),
                Acquired::HeldAbove if self.reentrant => {}
                Acquired::HeldAbove => {
                    return Err(client::Error::Deadlock(format!(
                        "the lock {:?} is held by the command that this is part of; see --reentrant",
                        lock.key.as_str()
                    ))
                    .into());
                }
                Acquired::Finished { outcome, token, status } => {
                    (report.outcome, report.token) = (Some(outcome), Some(token));
                    return Ok(Some(status.map_or(Ended::Finished(outcome), Ended::Adopted)));
                }
                Acquired::Granted { request, session, token } => {
                    report.token = Some(token);
                    if self.child != Child::Closed {
                        // The descriptors that are to be inherited; all others are closed on exec.
                        fcntl(&session, FcntlArg::F_SETFD(FdFlag::empty()))
                            .map_err(|e| Error::Os("pass the lock on", e.into()))?;
                    }
                    holds.push(HeldLock::new(lock.target.clone(), *request, session, token));
                }
            }
        }
        Ok(None)
    }

    fn run_locked(&self, mut holds: Vec<HeldLock>, report: &mut Report) -> Result<Ended, Error> {
        let mut command = self.command(&holds)?;
        if self.child == Child::Exec {
            let error = command.exec();
            return Err(self.not_started(holds, error));
        }
        let inherits = self.child == Child::Inherits;
        let kill_after = (self.on_lost == OnLost::Kill).then_some(self.kill_after);
        let ended = match child::run(&mut command, &mut holds, inherits, kill_after, self.tree) {
            Err(child::Error::Spawn(error)) => return Err(self.not_started(holds, error)),
            Err(child::Error::Os(doing, error)) => return Err(Error::Os(doing, error)),
            Ok(ended) => ended,
        };
        report.outcome = Some(ended.outcome);
        let mut lost = ended.lost;
        for hold in &mut holds {
            match hold.release(ended.outcome, RELEASE_WAIT) {
                // No daemon came back in time. The lock ends with this process, which the next daemon can tell.
                Ok(_) | Err(client::Error::Closed) => {}
                // It was said already.
                Err(client::Error::Lost(_)) if lost => {}
                Err(client::Error::Lost(why)) => {
                    let key = hold.key().as_str();
                    crate::message::print(format_args!("lost the lock {key:?} while the command ran: {why}"));
                    lost = true;
                }
                Err(_) if lost => {}
                Err(e) => return Err(e.into()),
            }
        }
        if lost {
            return Ok(Ended::Lost);
        }
        Ok(Ended::Ran(match ended.outcome {
            Outcome::Signal(number) => exit::of_signal(number),
            Outcome::Exit(status) => status,
            Outcome::Unknown | Outcome::Vanished => unreachable!("a child exits or dies of a signal"),
        }))
    }

    /// The command could not be started: those who wait are told with which status that ends.
    fn not_started(&self, mut holds: Vec<HeldLock>, error: io::Error) -> Error {
        let error = Error::Command { program: self.argv[0].clone(), error };
        for hold in &mut holds {
            // If the daemon has gone meanwhile, the lock goes with this process.
            let _ = hold.release(Outcome::Exit(error.exit().code()), RELEASE_WAIT);
        }
        error
    }

    /// The request for one of the locks. Each but the first is asked for under the one before, so that the daemon sees
    /// that those wait for it.
    fn request(&self, lock: &Acquire, holds: &[HeldLock]) -> LockRequest {
        let request = lock.request(self.command_line());
        LockRequest {
            exec: self.child == Child::Exec,
            inherits: self.child == Child::Inherits,
            within: holds.last().map(HeldLock::token).or(request.within),
            ..request
        }
    }

    fn command(&self, holds: &[HeldLock]) -> Result<Command, Error> {
        let mut command = Command::new(&self.argv[0]);
        command.args(&self.argv[1..]);
        // Where all is held above, what the command was told there is true here.
        let Some(hold) = holds.last() else { return Ok(command) };
        let sock =
            self.locks[0].target.addr.absolute().map_err(|e| Error::Os("tell the working directory", e))?;
        command
            .env("KMUTEX_KEY", hold.key().as_str())
            .env(Token::VARIABLE, hold.token().to_string())
            .env(crate::addr::VARIABLE, OsString::from(&sock));
        if holds.len() > 1 {
            let tokens: Vec<String> = holds.iter().map(|hold| hold.token().to_string()).collect();
            command.env(Token::LIST_VARIABLE, tokens.join(" "));
        }
        Ok(command)
    }

    /// The command for people to read, as it was given.
    fn command_line(&self) -> String {
        self.argv.join(OsStr::new(" ")).to_string_lossy().into_owned()
    }
}

fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}

/// The order in which several locks are to be taken: the same for everybody, so that no two who hold some of them wait for
/// each other.
///
/// # Errors
/// The key that is among them twice.
pub fn in_order(mut keys: Vec<Key>) -> Result<Vec<Key>, Key> {
    keys.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
    match keys.windows(2).find(|two| two[0] == two[1]) {
        Some(two) => Err(two[0].clone()),
        None => Ok(keys),
    }
}

/// What a shell command is run with: as flock(1) does, `$SHELL`, or else /bin/sh.
pub fn shell_command(command: OsString) -> Vec<OsString> {
    let shell = std::env::var_os("SHELL").filter(|shell| !shell.is_empty());
    vec![shell.unwrap_or_else(|| "/bin/sh".into()), "-c".into(), command]
}

/// Why a job could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The lock cannot be had.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The command cannot be started.
    #[error("cannot run {}: {}", program.to_string_lossy(), Reason(error))]
    Command {
        /// As it was given.
        program: OsString,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The descriptor for the report cannot be used.
    #[error("{name}: {}; see kmutex --help", Reason(error))]
    SinkDescriptor {
        /// The option that named it.
        name: String,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The file for the report cannot be created.
    #[error("{name}: {}", Reason(error))]
    Sink {
        /// The option that named it.
        name: String,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The report cannot be written.
    #[error("{name}: {}", Reason(error))]
    Report {
        /// The option that said where to.
        name: String,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The kernel refused something.
    #[error("cannot {}: {}", .0, Reason(.1))]
    Os(&'static str, #[source] io::Error),
}

impl Error {
    /// The exit code for it.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Client(error) => error.exit(),
            Error::Command { error, .. } if error.kind() == io::ErrorKind::NotFound => Exit::NotFound,
            Error::Command { .. } => Exit::CannotExecute,
            Error::SinkDescriptor { .. } => Exit::Usage,
            Error::Sink { .. } => Exit::CannotCreate,
            Error::Report { .. } | Error::Os(..) => Exit::Os,
        }
    }
}
