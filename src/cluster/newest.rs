//! Which request with `--newest` is the newest of all hosts.
//!
//! A lock has one record of its newest request in etcd. A host records each request before it waits, in a transaction that
//! compares the record with what the host has read last. So the records of two requests never cross, and the revision at
//! which a request is recorded is its *rank*. A request gives way to a record that was made with knowledge of its rank. The
//! request with the highest rank gives way to none.
//!
//! A record outlives its lease by nothing, and a lease for records is never renewed. When the record is gone while the request
//! waits, its host puts it again, with the rank that the request had.

use serde::{Deserialize, Serialize};

use super::{LeaseName, Revision};
use crate::proto::LockId;
use crate::proto::v2::ShortText;
use crate::table::{ArrivalMark, Effects, Table};

/// The newest request of a lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewestRecord {
    /// The lease of its host.
    pub by: ShortText,
    /// Its place in the order of arrival on that host.
    pub place: u64,
    /// The revision as of which its host knew the queue: requests with a higher rank do not give way.
    pub after: i64,
    /// Its rank, if it was recorded before. `None`: the rank is the revision of this record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<i64>,
}

/// A record as it stands in etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenNewest {
    /// When it was put.
    pub revision: Revision,
    /// What it says. `None`: it is not kmutex's.
    pub record: Option<NewestRecord>,
}

impl SeenNewest {
    /// Returns `true` if a request with this rank gives way.
    fn beats(&self, rank: Revision) -> bool {
        let knows = self.record.as_ref().is_some_and(|record| record.after >= rank.0);
        knows && rank < self.revision
    }
}

/// What a host knows of the newest requests of a lock.
#[derive(Debug, Default)]
pub(super) struct Newest {
    seen: Option<SeenNewest>,
    /// The requests of this host before the mark are ranked, and the last of them has this rank.
    ranked: Option<(ArrivalMark, Revision)>,
    /// The store went back since requests of this host were ranked.
    is_of_later_store: bool,
}

impl Newest {
    /// Nothing that was read is true any more.
    pub(super) fn forget_store(&mut self) {
        *self = Newest { is_of_later_store: true, ..Newest::default() };
    }

    /// The record is this one by now.
    pub(super) fn see(&mut self, seen: Option<SeenNewest>, lease: Option<&LeaseName>) {
        self.recognize(seen.as_ref(), lease);
        self.seen = seen;
    }

    /// The record was this one at some time: if this host put it, it says which requests are ranked.
    pub(super) fn recognize(&mut self, seen: Option<&SeenNewest>, lease: Option<&LeaseName>) {
        if let Some(SeenNewest { revision, record: Some(record) }) = seen
            && lease.is_some_and(|lease| lease.0 == record.by.as_str())
        {
            self.note_rank(*revision, record.clone());
        }
    }

    fn note_rank(&mut self, revision: Revision, record: NewestRecord) {
        let mark = ArrivalMark::behind(record.place);
        if self.ranked.is_none_or(|(known, _)| known < mark) {
            let rank = record.rank.map_or(revision, |rank| Revision(rank).min(revision));
            self.ranked = Some((mark, rank));
        }
    }

    /// Tells the table which of its requests are ranked, and which give way.
    pub(super) fn tell(
        &mut self,
        table: &mut Table,
        lock: LockId,
        lease: Option<&LeaseName>,
        effects: &mut Effects,
    ) {
        let mut is_own = false;
        if let Some(SeenNewest { revision, record: Some(record) }) = &self.seen {
            // A request that kept its place may have been recorded under an earlier lease.
            is_own = lease.is_some_and(|lease| lease.0 == record.by.as_str())
                || table.has_newest_at(lock, record.place);
            if is_own {
                self.note_rank(*revision, record.clone());
            }
        }
        if let Some((mark, _)) = &mut self.ranked {
            // No request that has not come is ranked, whatever a record says.
            *mark = (*mark).min(table.mark());
        }
        table.set_ranked(lock, self.ranked.map_or(ArrivalMark::NONE, |(mark, _)| mark));
        if !is_own && let Some(mark) = self.beaten(table) {
            table.supersede_before(lock, mark, effects);
        }
    }

    /// Returns a mark behind the requests of this host that give way to the record.
    fn beaten(&self, table: &Table) -> Option<ArrivalMark> {
        let seen = self.seen.as_ref().filter(|seen| seen.record.is_some())?;
        match self.ranked {
            Some((mark, rank)) => seen.beats(rank).then_some(mark),
            // A request that kept its place from an earlier daemon was ranked then, and its record has been replaced.
            None => (!self.is_of_later_store).then(|| table.first_mark()),
        }
    }

    /// Returns what to record as of this revision, and the revision of the record that it replaces (0: there is none).
    pub(super) fn next_record(
        &self,
        table: &Table,
        lock: LockId,
        lease: &LeaseName,
        as_of: Revision,
    ) -> Option<(NewestRecord, Revision)> {
        let by = ShortText::from(&*lease.0);
        if let Some(place) = table.unranked(lock) {
            let replaced = self.seen.as_ref().map_or(Revision(0), |seen| seen.revision);
            return Some((NewestRecord { by, place, after: as_of.0, rank: None }, replaced));
        }
        let (_, rank) = self.ranked.filter(|_| self.seen.is_none())?;
        let place = table.newest_waiter(lock)?;
        Some((NewestRecord { by, place, after: rank.0, rank: Some(rank.0) }, Revision(0)))
    }

    /// Returns `true` if the record of a request that waits is gone.
    pub(super) fn has_lapsed(&self, table: &Table, lock: LockId) -> bool {
        self.seen.is_none() && self.ranked.is_some() && table.newest_waiter(lock).is_some()
    }
}
