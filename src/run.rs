//! `kmutex run`: a lock, a command under it, and an exit code that tells what happened.

mod child;
mod descendants;
mod report;
mod waiting;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::addr::Addr;
use crate::addr::Reason;
use crate::client::{self, Dial, Hold, RELEASE_WAIT, Session, Verdict};
use crate::exit::{self, Exit};
use crate::proto::v2::{LockRequest, Mode, Who};
use crate::proto::{Key, Outcome, Token};
pub use report::Report;
use waiting::Display;

/// What to run, under which lock, and how.
#[derive(Clone, Debug)]
pub struct Job {
    /// Where the lock is.
    pub dial: Dial,
    /// Which lock.
    pub key: Key,
    /// The program and its arguments; at least the program.
    pub argv: Vec<OsString>,
    /// What to do when somebody else holds the lock.
    pub mode: Mode,
    /// Share the lock.
    pub shared: bool,
    /// Run while fewer than so many hold it.
    pub slots: u32,
    /// How long to wait.
    pub wait: Wait,
    /// What the command gets of the lock, and who waits for it.
    pub child: Child,
    /// What to do when the lock is lost while the command runs.
    pub on_lost: OnLost,
    /// What to do when the holder that was waited for has failed.
    pub on_peer_failure: OnPeerFailure,
    /// If the lock is held by the command that this is part of, run without taking it again.
    pub reentrant: bool,
    /// Hold the lock until all that the command has started has ended.
    pub tree: bool,
    /// What others are to see of it.
    pub note: String,
    /// Tell what is done on standard error.
    pub verbose: bool,
}

/// What to do when the holder that was waited for ended with a status other than 0, or died of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPeerFailure {
    /// It is done all the same.
    Skip,
    /// Ask for the lock again: one of those who waited runs next.
    Retry,
    /// End as the holder did, also when it did not fail.
    Adopt,
}

/// How long to wait for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Until it comes.
    Forever,
    /// Not at all.
    Never,
    /// So long at the most.
    For(Duration),
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLost {
    /// SIGTERM to the command and its descendants, and SIGKILL to those that are left after so long.
    Kill(Duration),
    /// Say so, and let it run.
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
    /// When the lock or the command cannot be had. Whatever was locked is released.
    pub fn run(&self, report: &mut Report) -> Result<Ended, Error> {
        let asked = Instant::now();
        let deadline = match self.wait {
            Wait::For(limit) => asked.checked_add(limit),
            Wait::Forever | Wait::Never => None,
        };
        loop {
            let request = self.request();
            let verdict = self.acquire(&request, deadline);
            report.waited_ms = millis(asked);
            let (session, verdict) = match verdict {
                Err(client::Error::TimedOut) => return Ok(Ended::Busy),
                other => other?,
            };
            match verdict {
                Verdict::Busy(_) => return Ok(Ended::Busy),
                Verdict::HeldAbove if self.reentrant => return Err(self.become_command()?),
                Verdict::HeldAbove => {
                    return Err(client::Error::Deadlock(format!(
                        "the lock {:?} is held by the command that this is part of; see --reentrant",
                        self.key.as_str()
                    ))
                    .into());
                }
                Verdict::Finished(outcome, token) => {
                    (report.outcome, report.token) = (Some(outcome), Some(token));
                    match (self.on_peer_failure, outcome) {
                        (OnPeerFailure::Adopt, Outcome::Exit(status)) => return Ok(Ended::Adopted(status)),
                        (OnPeerFailure::Adopt, Outcome::Signal(number)) => {
                            return Ok(Ended::Adopted(exit::of_signal(number)));
                        }
                        (OnPeerFailure::Retry, Outcome::Exit(1..) | Outcome::Signal(_)) => {
                            self.say(|| format!("the holder has failed ({outcome}); asking again"));
                        }
                        _ => return Ok(Ended::Finished(outcome)),
                    }
                }
                Verdict::Granted(token) => {
                    (report.outcome, report.token) = (None, Some(token));
                    let waited = asked.elapsed().as_secs_f64();
                    self.say(|| format!("got the lock {:?} after {waited:.6} s", self.key.as_str()));
                    self.say(|| format!("running {}", self.command_line()));
                    let granted = Instant::now();
                    let ended = self.run_granted(request, session, token, report);
                    report.held_ms = millis(granted);
                    return ended;
                }
            }
        }
    }

    fn acquire(
        &self,
        request: &LockRequest,
        deadline: Option<Instant>,
    ) -> Result<(Session, Verdict), client::Error> {
        client::lock(&self.dial, request, deadline, &mut Display::new(self.key.as_str(), self.verbose))
    }

    fn run_granted(
        &self,
        request: LockRequest,
        session: Session,
        token: Token,
        report: &mut Report,
    ) -> Result<Ended, Error> {
        if self.child != Child::Closed {
            // The one descriptor that is to be inherited; all others are closed on exec.
            fcntl(&session, FcntlArg::F_SETFD(FdFlag::empty()))
                .map_err(|e| Error::Os("pass the lock on", e.into()))?;
        }
        self.run_locked(Hold::new(self.dial.clone(), request, session, token), report)
    }

    /// The lock is held above: the command needs nothing of this process. Returns only why that failed.
    fn become_command(&self) -> Result<Error, Error> {
        let error = Command::new(&self.argv[0]).args(&self.argv[1..]).exec();
        Ok(Error::Command { program: self.argv[0].clone(), error })
    }

    fn run_locked(&self, mut hold: Hold, report: &mut Report) -> Result<Ended, Error> {
        let mut command = self.command(hold.token())?;
        if self.child == Child::Exec {
            let error = command.exec();
            return Err(self.not_started(hold, error));
        }
        let inherits = self.child == Child::Inherits;
        let ended = match child::run(&mut command, &mut hold, inherits, self.on_lost, self.tree) {
            Err(child::Error::Spawn(error)) => return Err(self.not_started(hold, error)),
            Err(child::Error::Os(doing, error)) => return Err(Error::Os(doing, error)),
            Ok(ended) => ended,
        };
        report.outcome = Some(ended.outcome);
        if ended.lost {
            return Ok(Ended::Lost);
        }
        match hold.release(ended.outcome, RELEASE_WAIT) {
            // No daemon came back in time. The lock ends with this process, which the next daemon can tell.
            Ok(_) | Err(client::Error::Closed) => {}
            Err(client::Error::Lost(why)) => {
                crate::say(format_args!(
                    "lost the lock {:?} while the command ran: {why}",
                    self.key.as_str()
                ));
                return Ok(Ended::Lost);
            }
            Err(e) => return Err(e.into()),
        }
        Ok(Ended::Ran(match ended.outcome {
            Outcome::Signal(number) => exit::of_signal(number),
            Outcome::Exit(status) => status,
            Outcome::Unknown | Outcome::Vanished => unreachable!("a child exits or dies of a signal"),
        }))
    }

    /// The command could not be started: those who wait are told with which status that ends.
    fn not_started(&self, mut hold: Hold, error: io::Error) -> Error {
        let error = Error::Command { program: self.argv[0].clone(), error };
        // If the daemon has gone meanwhile, the lock goes with this process.
        let _ = hold.release(Outcome::Exit(error.exit().code()), RELEASE_WAIT);
        error
    }

    fn request(&self) -> LockRequest {
        LockRequest {
            nonce: Some(client::nonce()),
            shared: self.shared,
            slots: self.slots,
            nowait: self.wait == Wait::Never,
            exec: self.child == Child::Exec,
            inherits: self.child == Child::Inherits,
            within: self.within(),
            who: self.who(),
            ..LockRequest::new(self.key.clone(), self.mode)
        }
    }

    fn who(&self) -> Who {
        let user = ["USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok());
        let host = nix::unistd::gethostname().unwrap_or_default();
        Who {
            pid: std::process::id(),
            host: (&*host.to_string_lossy()).into(),
            user: user.unwrap_or_default().into(),
            command: self.command_line().into(),
            note: self.note.as_str().into(),
        }
    }

    /// The token of the lock under which this process runs itself, if it is of the same daemon.
    fn within(&self) -> Option<Token> {
        let sock = std::env::var_os(crate::addr::VARIABLE)?;
        let here = self.dial.addr.absolute().ok()?;
        if Addr::parse(&sock).ok()?.absolute().ok()? != here {
            return None;
        }
        Some(Token(std::env::var(Token::VARIABLE).ok()?.parse().ok()?))
    }

    fn command(&self, token: Token) -> Result<Command, Error> {
        let sock = self.dial.addr.absolute().map_err(|e| Error::Os("tell the working directory", e))?;
        let mut command = Command::new(&self.argv[0]);
        command
            .args(&self.argv[1..])
            .env("KMUTEX_KEY", self.key.as_str())
            .env(Token::VARIABLE, token.to_string())
            .env(crate::addr::VARIABLE, OsString::from(&sock));
        Ok(command)
    }

    /// The command for people to read, as it was given.
    fn command_line(&self) -> String {
        self.argv.join(OsStr::new(" ")).to_string_lossy().into_owned()
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if self.verbose {
            crate::say(what());
        }
    }
}

fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}

/// What a shell command is run with: as flock(1) does, `$SHELL`, or else /bin/sh.
pub fn shell(command: OsString) -> Vec<OsString> {
    let shell = std::env::var_os("SHELL").filter(|shell| !shell.is_empty());
    vec![shell.unwrap_or_else(|| "/bin/sh".into()), "-c".into(), command]
}

/// Why a job could not be done.
#[derive(Debug)]
pub enum Error {
    /// The lock cannot be had.
    Client(client::Error),
    /// The command cannot be started.
    Command {
        /// As it was given.
        program: OsString,
        /// Why.
        error: io::Error,
    },
    /// The kernel refused something.
    Os(&'static str, io::Error),
}

impl Error {
    /// The exit code for it.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Client(error) => error.exit(),
            Error::Command { error, .. } if error.kind() == io::ErrorKind::NotFound => Exit::NotFound,
            Error::Command { .. } => Exit::CannotExecute,
            Error::Os(..) => Exit::Os,
        }
    }
}

impl From<client::Error> for Error {
    fn from(error: client::Error) -> Error {
        Error::Client(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Client(error) => error.fmt(f),
            Error::Command { program, error } => {
                write!(f, "cannot run {}: {}", program.to_string_lossy(), Reason(error))
            }
            Error::Os(doing, error) => write!(f, "cannot {doing}: {}", Reason(error)),
        }
    }
}

impl std::error::Error for Error {}
