//! What the threads that speak with etcd report, and what follows from it for this host's part in the queues.

use std::time::Duration;

use log::warn;

use super::events::{Command, Event};
use super::lease_keeper::LeaseCommand;
use super::watch_check::WatchState;
use super::{Clustering, trouble};
use crate::cluster::{Failure, Revision};
use crate::daemon::remote::RemoteReply;
use crate::etcd::{self, Kind, LeaseId};
use crate::table::{Effects, Table, Timestamp};

impl Clustering {
    /// Handles what one of the threads reports.
    pub(super) fn handle(
        &mut self,
        event: Event,
        table: &mut Table,
        now: Timestamp,
        effects: &mut Effects,
    ) -> Option<RemoteReply> {
        if let Event::Answer { .. } = event {
            self.under_way -= 1;
        }
        if let Some(generation) = event.generation() {
            if generation > self.generation {
                let why = if let Event::StoreChanged { why, .. } = &event { why } else { "it has changed" };
                return Some(self.store_changed(why, generation, table, now, effects));
            }
            if generation < self.generation {
                return None;
            }
        }
        match event {
            Event::Leased { lease, .. } if self.abandoned == Some(lease) => None,
            Event::Leased { .. } if self.quarantine.left(now).is_some() => None,
            Event::Leased { lease, sent, ttl_secs, revision, is_prompt, .. } => {
                self.lease_kept(table, now, (lease, sent, ttl_secs), (revision, is_prompt))
            }
            Event::LeaseGone(lease) => self.lease_gone(table, now, lease, effects),
            Event::Answer { lock, id, lease, answer, source, trouble, .. } => {
                match &trouble {
                    Some(etcd::Error::StoreChanged { .. }) => {}
                    Some(error) => self.troubles.began(source, error),
                    None if answer.is_ok() => self.note_success(source),
                    None => {}
                }
                let is_gone = answer == Err(Failure::LeaseGone);
                if answer == Err(Failure::Unknown) {
                    self.unsent.not_answered(lock);
                }
                self.cluster.answered(table, now, (lock, id), answer, effects);
                // An answer to a request under an earlier lease says nothing of this one.
                (is_gone && self.lease == Some(lease)).then(|| {
                    warn!("etcd: the lease is gone; what was held under it is lost");
                    self.lose_lease(table, now, effects)
                })
            }
            Event::Page { .. } | Event::Runs { .. } | Event::Forgotten { .. } | Event::Broken { .. } => {
                self.reply(event, table, now, effects)
            }
            other => {
                self.observe(other, table, now, effects);
                None
            }
        }
    }

    /// The store went back: the quarantine begins.
    fn store_changed(
        &mut self,
        why: &str,
        generation: u64,
        table: &mut Table,
        now: Timestamp,
        effects: &mut Effects,
    ) -> RemoteReply {
        warn!(
            "etcd: the store went back: {why}; what is held is lost, and no lock is granted for {} s",
            self.ttl_secs
        );
        self.generation = generation;
        self.cluster.store_changed(table, now, effects);
        self.abandon_lease(now);
        self.quarantine.begin(now, Duration::from_secs(self.ttl_secs));
        self.threads.lease_command(LeaseCommand::Quarantine(self.quarantine.end()));
        (self.records, self.watch) = (None, WatchState::default());
        self.hang_up(now);
        RemoteReply::RecordLease(self.quarantine.record(now))
    }

    /// Takes note of an event that has no effect on the table by itself.
    fn observe(&mut self, event: Event, table: &mut Table, now: Timestamp, effects: &mut Effects) {
        match event {
            Event::Trouble(source, error) => self.troubles.began(source, &error),
            Event::Presence { id, answer, .. } => {
                self.cluster.presence_answered(table, now, (id, answer), effects);
                self.read_presence();
            }
            Event::Entries(locks) => self.cluster.has_entries(locks),
            Event::NoEntries(lease) => {
                if self.lease == Some(lease) {
                    self.threads.command(Command::ListEntries(lease));
                }
            }
            Event::RecordsLease { lease, sent } => {
                self.records = Some((lease, sent));
                self.wants_records = false;
            }
            Event::RecordsGone(LeaseId(0)) => self.wants_records = false,
            Event::RecordsGone(lease) => {
                self.records.take_if(|(records, _)| *records == lease);
            }
            Event::Revoked { lease, is_done } => self.revoked(lease, is_done, now),
            Event::SignOfLife(Some(revision)) => self.watch.sign = Some(revision),
            Event::SignOfLife(None) => self.hang_up(now),
            // It was ended meanwhile.
            Event::WatchOpened { hang_ups, .. } if hang_ups < self.watch.hang_ups => {}
            Event::WatchOpened { revision, .. } => {
                self.watch.is_open = true;
                self.watch.seen = self.watch.seen.max(revision.0);
                self.cluster.watch_opened(table, revision);
                if let Some(lease) = self.lease {
                    self.threads.command(Command::ListEntries(lease));
                }
            }
            Event::Watch { revision, events, .. } => {
                self.watch.seen = self.watch.seen.max(revision);
                for event in events {
                    self.cluster.watch_event(table, now, event, effects);
                }
                self.cluster.watch_shown(Revision(revision));
            }
            Event::WatchEnded(error) => {
                self.watch.is_open = false;
                self.cluster.watch_ended(now);
                if let Some(error) = error.filter(|error| error.kind() != Kind::StoreChanged) {
                    self.troubles.began(trouble::Source::Watch, &error);
                }
            }
            Event::StoreChanged { .. } => {}
            Event::Leased { .. }
            | Event::LeaseGone(_)
            | Event::Answer { .. }
            | Event::Page { .. }
            | Event::Runs { .. }
            | Event::Forgotten { .. }
            | Event::Broken { .. } => unreachable!("these are handled"),
        }
    }

    fn note_success(&mut self, source: trouble::Source) {
        self.troubles.ended(source);
        if source == trouble::Source::Writes {
            self.troubles.ended(trouble::Source::Reads);
        }
    }
}
