//! Whole commands, from their start to their end.

use std::process::{Command, Stdio};
use std::time::Instant;

use crate::{Result, fail};

/// A command, and the exit code with which it must end.
pub struct Timed {
    command: Command,
    code: i32,
}

impl Timed {
    pub fn new(words: &[&str], code: i32) -> Timed {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).stdin(Stdio::null());
        Timed { command, code }
    }

    /// Runs it once: how long it took, in microseconds.
    fn run(&mut self) -> Result<f64> {
        let began = Instant::now();
        let status = self.command.status()?;
        let took = began.elapsed();
        if status.code() != Some(self.code) {
            return fail(format!("{:?}: {status}, and not {}", self.command, self.code));
        }
        Ok(took.as_secs_f64() * 1e6)
    }
}

/// Runs two commands by turns, so many times each: how long each run took, in microseconds.
pub fn alternate(times: usize, mut ours: Timed, mut theirs: Timed) -> Result<[Vec<f64>; 2]> {
    let mut took = [Vec::new(), Vec::new()];
    for _ in 0..times {
        took[0].push(ours.run()?);
        took[1].push(theirs.run()?);
    }
    Ok(took)
}
