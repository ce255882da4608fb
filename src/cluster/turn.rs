//! Whose turn it is in the queue of a lock, since when, and which of several batches is the newest.
//!
//! A batch (the coalescing requests of one host) waits for a run that begins after its requests came. One run does for the
//! batches of all hosts, and the newest of them, whose arguments are current, makes it: when the hold before it ends, an older
//! batch that is first in line steps aside for a newer one. Only batches that had come when that hold ended count, so that each
//! host steps aside once for each run, and a run begins however many requests come.

use super::{OutcomeRecord, Revision};
use crate::proto::Token;
use crate::table::ArrivalMark;

#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    /// The first of the queue.
    first: Option<First>,
    /// The first of the queue when it was settled last.
    settled: Option<First>,
    /// When that one was first no more.
    changed: Revision,
    /// When the last hold ended that was no batch which stepped aside, as far as it is known.
    round: Revision,
    /// The requests before this mark came before this host asked to give up its place for a new one.
    left: ArrivalMark,
}

#[derive(Clone, Copy, Debug)]
struct First {
    token: Token,
    is_batch: bool,
    /// The requests before this mark came before it was first.
    began: ArrivalMark,
}

impl Default for Turn {
    fn default() -> Turn {
        let (changed, round) = (Revision(0), Revision(0));
        Turn { first: None, settled: None, changed, round, left: ArrivalMark::NONE }
    }
}

impl Turn {
    /// The queue has changed, as of this revision. All requests before `mark` had come when its first place was another one.
    pub(super) fn changes_to(&mut self, first: Option<(Token, bool)>, revision: Revision, mark: ArrivalMark) {
        let before = self.first.map(|first| first.token);
        if before != first.map(|(token, _)| token) {
            if before == self.settled.map(|settled| settled.token) {
                self.changed = revision;
            }
            self.first = first.map(|(token, is_batch)| First { token, is_batch, began: mark });
        }
    }

    /// This host asks to give up its place for a new one, which the requests before `mark` wait for.
    pub(super) fn leaves(&mut self, mark: ArrivalMark) {
        self.left = mark;
    }

    /// The place with this token was given up as asked. The hold of a place behind it began after that.
    pub(super) fn has_left(&mut self, token: Token) {
        if let Some(first) = &mut self.first
            && first.token > token
        {
            first.began = first.began.max(self.left);
        }
    }

    /// All changes are known, and how the last hold ended.
    pub(super) fn settle(&mut self, last: Option<OutcomeRecord>) {
        if let Some(before) = self.settled
            && self.first.is_none_or(|first| first.token != before.token)
        {
            let has_run = last.is_some_and(|last| last.token >= before.token);
            if has_run || !before.is_batch {
                self.round = self.changed;
            }
        }
        self.settled = self.first;
    }

    /// The requests before this mark came before the hold of the first place began.
    pub(super) fn began(&self) -> ArrivalMark {
        self.first.map_or(ArrivalMark::NONE, |first| first.began)
    }

    /// Returns `true` if the first place is one of a batch.
    pub(super) fn is_batch(&self) -> bool {
        self.first.is_some_and(|first| first.is_batch)
    }

    /// Returns `true` if a place with this create revision was in the queue when the last hold ended.
    pub(super) fn had_come(&self, revision: Revision) -> bool {
        revision < self.round
    }
}
