//! This host's lease in etcd: how long it can be relied on, and what happens when it is lost.

use std::time::Duration;

use log::{info, warn};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};

use super::events::Command;
use super::lease_keeper::LeaseCommand;
use super::{Clustering, Config, trouble};
use crate::clock;
use crate::cluster::{LeaseName, Renewal, Revision};
use crate::daemon::remote::RemoteReply;
use crate::etcd::LeaseId;
use crate::journal::ClusterLease;
use crate::proto::v2::LeaseTerms;
use crate::table::{Effects, Table, Timestamp};

/// When etcd did not end a lease that is lost, how long until it is asked again, and how often.
const REVOKE_PAUSE: Duration = Duration::from_millis(500);
const REVOKES_MAX: u32 = 120;
/// How many locks a log line names.
const NAMED_MAX: usize = 10;

pub(super) struct Revoke {
    pub(super) lease: LeaseId,
    pub(super) at: Timestamp,
    tries: u32,
}

/// A lease is not relied on for this last part of its time: a quarter, in which holders stop.
fn margin(ttl_secs: u64) -> Duration {
    Duration::from_millis((ttl_secs * 250).max(500))
}

/// A lease must survive one lost answer: there must be time for two attempts after the moment when it is kept alive.
pub(super) fn warn_if_too_short(config: &Config) {
    let timeout = config.etcd.timeout.as_millis() as u64;
    let relied_on = config.ttl_secs * 1000 - margin(config.ttl_secs).as_millis() as u64;
    if config.ttl_secs * 1000 / 3 + 2 * timeout > relied_on {
        let enough = (timeout * 48).div_ceil(10_000);
        warn!(
            "etcd: a lease of {} s (--etcd-ttl) can be relied on for {relied_on} ms, which is short for answers that may \
             take {timeout} ms (--etcd-timeout): one lost answer may cost the locks; use --etcd-ttl {enough} or more",
            config.ttl_secs,
        );
    }
}

impl Clustering {
    /// Returns how long what a client holds can be relied on.
    pub(in crate::daemon) fn lease_terms(&self) -> LeaseTerms {
        let good_ms = self.cluster.good_until().map_or(0, |until| until.0.saturating_sub(clock::now().0));
        LeaseTerms { good_ms, margin_ms: margin(self.ttl_secs).as_millis() as u64 }
    }

    /// etcd has renewed the lease, or given it.
    pub(super) fn lease_kept(
        &mut self,
        table: &Table,
        now: Timestamp,
        (lease, sent, ttl_secs): (LeaseId, Timestamp, u64),
        (revision, is_prompt): (i64, bool),
    ) -> Option<RemoteReply> {
        self.troubles.ended(trouble::Source::Lease);
        if self.watch.is_open {
            self.troubles.ended(trouble::Source::Watch);
        }
        let relied_on = Duration::from_secs(ttl_secs).saturating_sub(margin(self.ttl_secs));
        let good_until = sent.plus(relied_on);
        let is_new = self.lease.replace(lease) != Some(lease);
        let renewal = Renewal { lease: name(lease), good_until, revision: Revision(revision), is_prompt };
        if self.cluster.leased(table, now, renewal) {
            self.hang_up(now);
        }
        self.read_presence();
        self.check_watch(lease, now, revision);
        is_new.then(|| {
            info!("etcd: clustering locks under lease {:016x}, of {ttl_secs} s", lease.0);
            // A resumed lease may have entries that this daemon does not know.
            self.threads.command(Command::ListEntries(lease));
            RemoteReply::RecordLease(ClusterLease::Id(lease.0 as u64))
        })
    }

    /// Has read whether what is held is there, and wakes the loop when it cannot be relied on any more.
    pub(super) fn read_presence(&mut self) {
        for request in self.cluster.take_presence_requests() {
            if let Some(lease) = self.lease {
                self.threads.read_presence(request, lease);
            }
        }
        let Some(good_until) = self.cluster.good_until() else { return };
        let until = TimeSpec::from_duration(Duration::from_millis(good_until.0.max(1)));
        if let Err(e) = self.alarm.set(Expiration::OneShot(until), TimerSetTimeFlags::TFD_TIMER_ABSTIME) {
            warn!("cannot set a timer: {e}");
        }
    }

    /// etcd has this lease no more.
    pub(super) fn lease_gone(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        lease: LeaseId,
        effects: &mut Effects,
    ) -> Option<RemoteReply> {
        let is_resumed = self.lease.is_none() && self.abandoned != Some(lease);
        (self.lease == Some(lease) || is_resumed).then(|| {
            warn!("etcd: lease {:016x} is gone; what was held under it is lost", lease.0);
            self.lease = None;
            self.abandoned = Some(lease);
            self.threads.lease_command(LeaseCommand::Abandon(lease));
            self.lose_lease(table, now, effects)
        })
    }

    pub(super) fn lose_lease(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        effects: &mut Effects,
    ) -> RemoteReply {
        self.warn_of_untold();
        self.cluster.lost_lease(table, now, effects);
        self.abandon_lease(now);
        // The next daemon must not resume it either: it would release entries while their holders are stopping.
        RemoteReply::RecordLease(self.quarantine.record(now))
    }

    /// Gives the lease up. It is ended, so that other hosts need not wait for the rest of it, but not before the commands
    /// under it are dead. (An election gives all leases their whole time again.)
    pub(super) fn abandon_lease(&mut self, now: Timestamp) {
        if let Some(lease) = self.lease.take() {
            self.threads.lease_command(LeaseCommand::Abandon(lease));
            self.abandoned = Some(lease);
            self.revokes.push(Revoke { lease, at: now.plus(margin(self.ttl_secs)), tries: 0 });
        }
    }

    pub(super) fn revoked(&mut self, lease: LeaseId, is_done: bool, now: Timestamp) {
        self.revokes.retain_mut(|revoke| {
            if revoke.lease != lease {
                return true;
            }
            (revoke.at, revoke.tries) = (now.plus(REVOKE_PAUSE), revoke.tries + 1);
            !is_done && revoke.tries < REVOKES_MAX
        });
    }

    /// If a release did not reach etcd, another host finds the lock of a holder that vanished, and runs it again.
    fn warn_of_untold(&self) {
        let mut untold: Vec<String> =
            self.cluster.untold().map(|(name, record)| format!("{name} ({})", record.outcome)).collect();
        if untold.is_empty() {
            return;
        }
        let more = untold.len().saturating_sub(NAMED_MAX);
        untold.truncate(NAMED_MAX);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        warn!(
            "etcd: could not be told that these locks were released: {}{more}; other hosts may run their commands again",
            untold.join(", ")
        );
    }
}

fn name(lease: LeaseId) -> LeaseName {
    LeaseName(format!("{:x}", lease.0))
}
