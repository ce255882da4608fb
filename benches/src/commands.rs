//! Whole commands, from their start to their end. They are started by posix_spawn(3), whose cost does not grow with the memory of
//! this program, and with an environment as cron(8) gives it, or a login.

use std::ffi::CString;
use std::time::Instant;

use nix::fcntl::OFlag;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawnp};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};

use crate::{Result, fail};

/// What a command finds in its environment. flock(1) loads the tables of its locale, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Environment {
    /// As cron(8) gives it: without `LANG`.
    Cron,
    /// As a login gives it: with `LANG=C.UTF-8`.
    Login,
}

/// A command, and the exit code with which it must end.
pub struct Timed {
    argv: Vec<CString>,
    environment: Vec<CString>,
    actions: PosixSpawnFileActions,
    attributes: PosixSpawnAttr,
    code: i32,
}

impl Timed {
    pub fn new(words: &[&str], code: i32, environment: Environment) -> Result<Timed> {
        let strings = |words: &[&str]| {
            words.iter().map(|word| CString::new(*word)).collect::<std::result::Result<_, _>>()
        };
        let mut actions = PosixSpawnFileActions::init()?;
        actions.add_open(0, "/dev/null", OFlag::O_RDONLY, Mode::empty())?;
        actions.add_open(1, "/dev/null", OFlag::O_WRONLY, Mode::empty())?;
        let path = format!("PATH={}", std::env::var("PATH")?);
        let environment = match environment {
            Environment::Cron => strings(&[&path, "HOME=/", "SHELL=/bin/sh"])?,
            Environment::Login => strings(&[&path, "HOME=/", "SHELL=/bin/sh", "LANG=C.UTF-8"])?,
        };
        Ok(Timed { argv: strings(words)?, environment, actions, attributes: PosixSpawnAttr::init()?, code })
    }

    /// Runs it once: how long it took, in microseconds.
    pub fn run(&self) -> Result<f64> {
        let began = Instant::now();
        let child =
            posix_spawnp(&self.argv[0], &self.actions, &self.attributes, &self.argv, &self.environment)?;
        let status = waitpid(child, None)?;
        let took = began.elapsed();
        match status {
            WaitStatus::Exited(_, code) if code == self.code => Ok(took.as_secs_f64() * 1e6),
            other => fail(format!("{:?}: {other:?}, and not {}", self.argv, self.code)),
        }
    }
}

/// Runs two commands by turns, so many times each: how long each run took, in microseconds.
pub fn alternate(times: usize, ours: &Timed, theirs: &Timed) -> Result<[Vec<f64>; 2]> {
    let mut took = [Vec::new(), Vec::new()];
    for _ in 0..times {
        took[0].push(ours.run()?);
        took[1].push(theirs.run()?);
    }
    Ok(took)
}
