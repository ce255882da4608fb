//! The outputs that are kept, of runs that are over and still count: until when, and which of them go to make room.

use super::{Given, Outputs};
use crate::output;
use crate::proto::{LockId, Token};
use crate::table::{Run, Timestamp};

/// The output of a run that is over.
pub(super) struct Kept {
    pub(super) lock: LockId,
    is_success: bool,
    pub(super) given: Given,
    pub(super) bytes: u64,
    until: Timestamp,
}

/// A result that is not kept any more.
pub(in crate::daemon) type Dropped = (LockId, Token);

impl Outputs {
    /// Returns `true` if no output of a run that is over is kept.
    pub(in crate::daemon) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// A run that is over is remembered: keeps its output, if it has one. Returns what had to go.
    pub(in crate::daemon) fn keep(&mut self, run: &Run, now: Timestamp) -> Vec<Dropped> {
        let Some(running) = self.running.get(&run.token).filter(|running| running.is_over) else {
            return Vec::new();
        };
        let bytes = match &running.given {
            Given::Withheld(_) => return Vec::new(),
            Given::Bytes(bytes, _) => bytes.len() as u64,
            Given::File(file) => output::sealed_size(file).unwrap_or(u64::MAX),
        };
        let left = run.counts_for.saturating_sub(run.age(now));
        let kept = Kept {
            lock: run.lock,
            is_success: run.is_success(),
            given: running.given.clone(),
            bytes,
            until: now.plus(left),
        };
        let is_old = |kept: &Kept| kept.lock == run.lock && kept.is_success == run.is_success();
        let old = self.kept.iter().find(|(_, kept)| is_old(kept)).map(|(&token, _)| token);
        let mut dropped: Vec<Dropped> = old.into_iter().filter_map(|token| self.drop_kept(token)).collect();
        if bytes > self.bytes_max {
            dropped.push((run.lock, run.token));
            return dropped;
        }
        while self.kept_bytes > self.bytes_max - bytes
            && let Some(oldest) = self.drop_oldest()
        {
            dropped.push(oldest);
        }
        self.kept_bytes += bytes;
        self.ends.insert((kept.until, run.token));
        self.kept.insert(run.token, kept);
        dropped
    }

    /// The runs of a lock are forgotten.
    pub(in crate::daemon) fn forget(&mut self, lock: LockId) -> Vec<Dropped> {
        let tokens: Vec<Token> =
            self.kept.iter().filter(|(_, kept)| kept.lock == lock).map(|(&token, _)| token).collect();
        tokens.into_iter().filter_map(|token| self.drop_kept(token)).collect()
    }

    /// A result of a lock is not to be kept any more.
    pub(in crate::daemon) fn drop_result(&mut self, lock: LockId, token: Token) {
        if self.kept.get(&token).is_some_and(|kept| kept.lock == lock) {
            self.drop_kept(token);
        }
    }

    /// When [`Outputs::expire`] is next needed.
    pub(in crate::daemon) fn next_deadline(&self) -> Option<Timestamp> {
        self.ends.first().map(|&(until, _)| until)
    }

    /// Drops the outputs whose time is over.
    pub(in crate::daemon) fn expire(&mut self, now: Timestamp) -> Vec<Dropped> {
        let mut dropped = Vec::new();
        while let Some(&(until, token)) = self.ends.first()
            && until <= now
        {
            dropped.extend(self.drop_kept(token));
        }
        dropped
    }

    pub(super) fn drop_oldest(&mut self) -> Option<Dropped> {
        let (&token, _) = self.kept.first_key_value()?;
        self.drop_kept(token)
    }

    fn drop_kept(&mut self, token: Token) -> Option<Dropped> {
        let kept = self.kept.remove(&token)?;
        self.kept_bytes -= kept.bytes;
        self.ends.remove(&(kept.until, token));
        Some((kept.lock, token))
    }
}
