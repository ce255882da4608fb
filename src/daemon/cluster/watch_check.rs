//! Checking the watch: whether it still reports what is written, or says nothing any more.

use std::time::Duration;

use log::debug;

use super::Clustering;
use super::events::Command;
use crate::etcd::LeaseId;
use crate::table::Timestamp;

/// How far the watch can be trusted.
#[derive(Default)]
pub(super) struct WatchState {
    pub(super) is_open: bool,
    /// The last revision that the watch reported.
    pub(super) seen: i64,
    /// The store's revision when the lease was kept before.
    kept: i64,
    /// When this host last wrote something that the watch must see, and its revision, if it is known and was not seen yet.
    checked: Timestamp,
    pub(super) sign: Option<i64>,
    /// How often this host has ended watches, so that they were opened anew.
    pub(super) hang_ups: u64,
}

impl Clustering {
    /// If the store has gone on while the watch said nothing, either other programs wrote, or the watch is one of a member
    /// that says nothing any more. Once in a while, this host writes something that the watch must see.
    pub(super) fn check_watch(&mut self, lease: LeaseId, now: Timestamp, revision: i64) {
        let watch = &mut self.watch;
        let is_silent = watch.kept > watch.seen;
        watch.kept = revision;
        if !watch.is_open {
            return;
        }
        if let Some(sign) = watch.sign.take() {
            if watch.seen < sign {
                debug!("etcd: the watch is silent, opening it anew");
                self.hang_up(now);
            }
        } else if is_silent && now >= watch.checked.plus(Duration::from_secs(self.ttl_secs * 2)) {
            watch.checked = now;
            self.threads.command(Command::SignOfLife(lease));
        }
    }

    /// Has the watch opened anew. What the old one may still say counts for nothing.
    pub(super) fn hang_up(&mut self, now: Timestamp) {
        self.watch.is_open = false;
        self.cluster.watch_ended(now);
        self.watch.hang_ups = self.threads.reopen_watch();
    }
}
