//! `kmutex run`: acquires locks, runs a command under them, releases them, and tells how that went.

mod child;
mod command;
mod descendants;
mod forward;
mod refresh;
mod report;
mod signals;
mod tee;
mod witness;

use std::ffi::{OsStr, OsString};
use std::io;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc::SIGPIPE;

use crate::acquire::{Acquire, Acquired};
use crate::addr::Reason;
use crate::client::{self, HeldLock, RELEASE_WAIT, Session, SharedRun};
use crate::exit::{self, Exit};
use crate::output::Reader;
use crate::proto::v2::LockRequest;
use crate::proto::{Key, Outcome, Token};
use crate::{startup, streams};
use command::Command;
pub use report::{Report, Sink};
use tee::Tee;

/// What to run, under which lock, and how.
#[derive(Clone, Debug)]
pub struct Job {
    /// The locks to acquire, at least one, all of the same daemon, in the order of [`in_order`].
    pub locks: Vec<Acquire>,
    /// The program and its arguments; at least the program.
    pub argv: Vec<OsString>,
    /// How the command is started, and whether it inherits the lock.
    pub spawn: Spawn,
    /// What to do when the lock is lost while the command runs.
    pub on_lost: OnLost,
    /// For [`OnLost::Kill`]: how long after SIGTERM kmutex sends SIGKILL.
    pub kill_after: Duration,
    /// Runs the command without acquiring a lock that an enclosing `kmutex run` holds already.
    pub reentrant: bool,
    /// Holds the lock until the command and all its descendants have exited.
    pub tree: bool,
    /// The command and its descendants are stopped after holding the lock for so long.
    pub max_hold: Option<Duration>,
    /// After holding the lock for so long, kmutex and the daemon warn.
    pub warn_after: Option<Duration>,
    /// The longest output that is given to others, in bytes.
    pub share_max: u64,
    /// This process takes over a lock that another one has acquired, and runs the command in the background.
    pub is_refresh: bool,
}

/// When a waiter gets the result of the run that it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Share {
    /// All of it at the end
    Whole,
    /// From the beginning, as it comes
    Live,
}

/// How the command is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spawn {
    /// As a child that inherits the lock's descriptor: the lock lasts as long as kmutex or the child lives.
    InheritLock,
    /// As a child without the descriptor: the lock lasts as long as kmutex lives.
    CloseLock,
    /// This process executes the command itself.
    Exec,
}

/// What to do when the lock is lost while the command runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnLost {
    /// Stop the command and its descendants with SIGTERM, then SIGKILL; exit with 74
    Kill,
    /// Warn and let the command run; exit with 74 when it has ended
    Continue,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The command ran and exited with this status, or died of a signal: then 128 plus its number.
    Ran(u8),
    /// The command died of this signal, which was sent to kmutex too: kmutex dies of it as well, see `startup::die_of`.
    Died(u8),
    /// Another holder finished first; the command did not run.
    Finished(Outcome),
    /// Another holder finished first, with this status; the command did not run.
    Adopted(u8),
    /// The work was done recently enough; the command did not run.
    Fresh(Outcome),
    /// The work failed recently enough, with this status; the command did not run.
    FreshAdopted(u8),
    /// The result of another run was given, with this status; the command did not run.
    Shared(Outcome, u8),
    /// The same of a run that was over before.
    SharedFresh(Outcome, u8),
    /// A newer request took the place of this one; the command did not run.
    Superseded,
    /// The command was stopped because it held the lock for too long.
    TimedOut,
    /// The command was stopped because a newer request replaced it; this is its status.
    Replaced(u8),
    /// Another holder has the lock, and the request does not wait, or its time ran out.
    Busy,
    /// The lock was lost while the command ran.
    Lost,
}

impl Job {
    /// Acquires the locks, runs the command, releases the locks, and records in `report` what happens. With [`Spawn::Exec`] it
    /// returns only when the command cannot be executed.
    ///
    /// # Errors
    /// When a lock cannot be acquired or the command cannot be started. All locks are released then.
    pub fn run(&self, report: &mut Report) -> Result<Ended, Error> {
        let asked = Instant::now();
        let mut holds = Vec::new();
        let ended = match self.is_refresh {
            true => self.take_over(&mut holds),
            false => self.acquire(&mut holds, asked, report),
        };
        report.waited_ms = millis(asked);
        match ended {
            Ok(None) => {}
            other => {
                for hold in &mut holds {
                    // Nothing was done under the lock, so a waiter takes over. If the daemon is down, the lock ends with
                    // this process.
                    let _ = hold.release(Outcome::Vanished, RELEASE_WAIT);
                }
                return other.map(|ended| ended.expect("it is not none"));
            }
        }
        self.locks[0].report(|| format!("running {}", self.command_line()));
        let granted = Instant::now();
        let ended = self.run_locked(holds, report);
        report.held_ms = millis(granted);
        ended
    }

    /// Acquires each lock that no enclosing `kmutex run` holds. Returns `Some` if one of them was refused.
    fn acquire(
        &self,
        holds: &mut Vec<HeldLock>,
        asked: Instant,
        report: &mut Report,
    ) -> Result<Option<Ended>, Error> {
        for lock in &self.locks {
            let acquired = match lock.acquire(&self.request(lock, holds), asked) {
                Err(client::Error::Delivery(error)) => return not_delivered(error).map(Some),
                other => other?,
            };
            match acquired {
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
                Acquired::Fresh { run, status } => {
                    (report.outcome, report.token) = (Some(run.outcome), Some(run.token));
                    return Ok(Some(status.map_or(Ended::Fresh(run.outcome), Ended::FreshAdopted)));
                }
                Acquired::Superseded => return Ok(Some(Ended::Superseded)),
                Acquired::Shared { run, rest } => return deliver(&run, rest, report).map(Some),
                Acquired::Withheld { outcome, token, why } => {
                    (report.outcome, report.token) = (Some(outcome), Some(token));
                    crate::message::print(format_args!(
                        "the work is done, but its result is not given: {why}"
                    ));
                    return Ok(Some(Ended::Finished(outcome)));
                }
                Acquired::Granted { request, mut session, token } => {
                    report.token = Some(token);
                    if let Some(run) = session.take_stale()
                        && let Ok(background) = refresh::Background::start(&request, token)
                    {
                        lock.report(|| "giving an older result; running in the background".into());
                        let rest = run.output.reader();
                        let ended = deliver(&run, rest, report);
                        background.wait();
                        return ended.map(Some);
                    }
                    holds.push(self.hold(lock, *request, session, token)?);
                }
            }
        }
        Ok(None)
    }

    /// Returns the lock as this process holds it.
    fn hold(
        &self,
        lock: &Acquire,
        request: LockRequest,
        session: Session,
        token: Token,
    ) -> Result<HeldLock, Error> {
        if self.spawn != Spawn::CloseLock {
            // Only the locks' descriptors are inherited; all others are close-on-exec.
            fcntl(&session, FcntlArg::F_SETFD(FdFlag::empty()))
                .map_err(|e| Error::Os("let the command inherit the lock", e.into()))?;
        }
        Ok(HeldLock::new(lock.target.clone(), request, session, token))
    }

    /// Takes the lock over that the caller of this process has acquired.
    fn take_over(&self, holds: &mut Vec<HeldLock>) -> Result<Option<Ended>, Error> {
        let lock = &self.locks[0];
        let (request, session, token) = refresh::take_over(&lock.target, self.request(lock, holds))?;
        holds.push(self.hold(lock, request, session, token)?);
        Ok(None)
    }

    /// Returns what keeps the output of the command for others, if it is to be shared.
    fn tee(&self, holds: &mut [HeldLock]) -> Result<Option<Tee>, Error> {
        let [hold] = holds else { return Ok(None) };
        if self.locks[0].share.is_none() {
            return Ok(None);
        }
        let tee = Tee::new(self.share_max).map_err(|e| Error::Os("keep the command's output", e))?;
        match tee.for_readers() {
            Ok(file) => hold.give_output(file),
            Err(e) => hold.withhold_output(format!("the output cannot be passed on: {}", Reason(&e))),
        }
        Ok(Some(tee))
    }

    fn run_locked(&self, mut holds: Vec<HeldLock>, report: &mut Report) -> Result<Ended, Error> {
        let command = self.command(&holds)?;
        if self.spawn == Spawn::Exec {
            let error = command.exec();
            return Err(self.not_started(holds, error));
        }
        let mut tee = self.tee(&mut holds)?;
        let options = child::Options {
            inherits: self.spawn == Spawn::InheritLock,
            kill_after: (self.on_lost == OnLost::Kill).then_some(self.kill_after),
            tree: self.tree,
            stop_within: self.kill_after,
            max_hold: self.max_hold,
            warn_after: self.warn_after,
        };
        let exit = match child::run(&command, &mut holds, tee.as_mut(), options) {
            Err(child::Error::Spawn(error)) => return Err(self.not_started(holds, error)),
            Err(child::Error::Os(doing, error)) => return Err(Error::Os(doing, error)),
            Ok(exit) => exit,
        };
        report.outcome = Some(exit.outcome);
        let end = tee.as_mut().map(Tee::end);
        let ended = self.release(&mut holds, &exit, end);
        if let Some(mut tee) = tee {
            tee.flush().map_err(|e| Error::Os("write the command's output", e))?;
        }
        ended
    }

    /// Releases the locks of a command that has ended, and gives its output to others.
    fn release(
        &self,
        holds: &mut [HeldLock],
        exit: &child::ChildExit,
        end: Option<tee::End>,
    ) -> Result<Ended, Error> {
        let mut lost = exit.lost;
        // A command that exits with 0 when it is stopped has not done its work.
        let outcome = match exit.stopped {
            Some(child::StopReason::MaxHold) => Outcome::Exit(Exit::TimedOut.code()),
            // What is only this caller's concern ended it: for the others it has not done its work.
            _ if end == Some(tee::End::CutOff) || (end.is_some() && exit.died_with_kmutex) => {
                Outcome::Vanished
            }
            Some(child::StopReason::Replaced) | None => exit.outcome,
        };
        if let ([hold], Some(end)) = (&mut *holds, end) {
            match end {
                _ if exit.stopped.is_some() => {
                    hold.withhold_output("the run was stopped before its end".into())
                }
                tee::End::Complete => hold.output_is_complete(),
                tee::End::Withheld(why) => hold.withhold_output(why),
                tee::End::CutOff => {}
            }
        }
        for hold in holds {
            let released = match hold.is_remembered() {
                true => hold.release_recorded(outcome, RELEASE_WAIT),
                false => hold.release(outcome, RELEASE_WAIT).map(drop),
            };
            match released {
                // No daemon came back in time. The lock ends with this process, and the next daemon notices that.
                Ok(_) | Err(client::Error::Closed) => {}
                // Reported when it happened.
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
        if exit.stopped == Some(child::StopReason::MaxHold) {
            return Ok(Ended::TimedOut);
        }
        Ok(match exit.outcome {
            Outcome::Signal(number) if exit.stopped.is_some() => Ended::Replaced(exit::of_signal(number)),
            Outcome::Exit(status) if exit.stopped.is_some() => Ended::Replaced(status),
            Outcome::Signal(number) if exit.died_with_kmutex => Ended::Died(number),
            Outcome::Signal(number) => Ended::Ran(exit::of_signal(number)),
            Outcome::Exit(status) => Ended::Ran(status),
            Outcome::Unknown | Outcome::Vanished => unreachable!("a child exits or dies of a signal"),
        })
    }

    /// Releases the locks of a command that could not be started, and returns the error.
    fn not_started(&self, mut holds: Vec<HeldLock>, error: io::Error) -> Error {
        // Without a process or memory no command could be started: another host, or a moment later, may do better.
        let is_shortage = matches!(
            error.raw_os_error().map(Errno::from_raw),
            Some(Errno::EAGAIN | Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE)
        );
        let error = match is_shortage {
            true => Error::Os("start the command", error),
            false => Error::Command { program: self.argv[0].clone(), error },
        };
        let outcome = match is_shortage {
            true => Outcome::Vanished,
            false => Outcome::Exit(error.exit().code()),
        };
        for hold in &mut holds {
            // If the daemon is down, the lock ends with this process.
            let _ = hold.release(outcome, RELEASE_WAIT);
        }
        error
    }

    /// Returns the request for one of the locks. Each names the lock acquired before it, so that the daemon can detect
    /// deadlocks.
    fn request(&self, lock: &Acquire, holds: &[HeldLock]) -> LockRequest {
        let request = lock.request(self.command_line());
        LockRequest {
            exec: self.spawn == Spawn::Exec,
            inherits: self.spawn == Spawn::InheritLock,
            within: holds.last().map(HeldLock::token).or(request.within),
            ..request
        }
    }

    fn command(&self, holds: &[HeldLock]) -> Result<Command<'_>, Error> {
        let mut variables = Vec::new();
        // If an enclosing `kmutex run` holds all locks, its variables are still right.
        if let Some(hold) = holds.last() {
            let sock = self.locks[0]
                .target
                .addr
                .absolute()
                .map_err(|e| Error::Os("find the working directory", e))?;
            variables.push(("KMUTEX_KEY", hold.key().as_str().into()));
            variables.push((Token::VARIABLE, hold.token().to_string().into()));
            variables.push((crate::addr::VARIABLE, OsString::from(&sock)));
        }
        if holds.len() > 1 {
            let tokens: Vec<String> = holds.iter().map(|hold| hold.token().to_string()).collect();
            variables.push((Token::LIST_VARIABLE, tokens.join(" ").into()));
        }
        Ok(Command::new(&self.argv, variables))
    }

    /// Returns the command line as it was given, for display.
    fn command_line(&self) -> String {
        self.argv.join(OsStr::new(" ")).to_string_lossy().into_owned()
    }
}

/// Gives the result of another run to the caller: the rest of its output, and its status.
fn deliver(run: &SharedRun, mut rest: Reader, report: &mut Report) -> Result<Ended, Error> {
    (report.outcome, report.token) = (Some(run.outcome), Some(run.token));
    match streams::copy(&mut rest) {
        Ok(()) if rest.is_between_pieces() => {}
        Ok(()) => return Err(client::Error::Torn("it ends in the middle".into()).into()),
        Err(streams::Error::Read(e)) => return Err(client::Error::Torn(Reason(&e).to_string()).into()),
        Err(streams::Error::Write(e)) => return not_delivered(e),
    }
    let status = match run.outcome {
        Outcome::Exit(status) => status,
        Outcome::Signal(number) => exit::of_signal(number),
        Outcome::Unknown | Outcome::Vanished => {
            return Err(client::Error::Protocol("a result without an exit status".into()).into());
        }
    };
    Ok(match run.past {
        None => Ended::Shared(run.outcome, status),
        Some(_) => Ended::SharedFresh(run.outcome, status),
    })
}

/// No process reads this process's output, or it cannot be written: ends as the command would.
fn not_delivered(error: io::Error) -> Result<Ended, Error> {
    if error.kind() == io::ErrorKind::BrokenPipe && !startup::ignores(SIGPIPE) {
        return Ok(Ended::Died(SIGPIPE as u8));
    }
    Err(client::Error::Delivery(error).into())
}

fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}

/// Sorts the keys into the order in which every client acquires them, so that two clients never wait for each other.
///
/// # Errors
/// The key that is given twice.
pub fn in_order(mut keys: Vec<Key>) -> Result<Vec<Key>, Key> {
    keys.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
    match keys.windows(2).find(|two| two[0] == two[1]) {
        Some(two) => Err(two[0].clone()),
        None => Ok(keys),
    }
}

/// Returns the argument vector for a shell command: `$SHELL -c`, or /bin/sh as flock(1) does.
pub fn shell_command(command: OsString) -> Vec<OsString> {
    let shell = std::env::var_os("SHELL").filter(|shell| !shell.is_empty());
    vec![shell.unwrap_or_else(|| "/bin/sh".into()), "-c".into(), command]
}

/// Why a job failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A lock cannot be acquired.
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
