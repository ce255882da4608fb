//! Sending the requests of the queues to etcd, each with what only the daemon knows: the host, the time, the result of a
//! run, and the lease for records.

use std::time::Duration;

use super::Clustering;
use super::events::Command;
use super::layout::Leases;
use super::party::unix_ms;
use crate::cluster::QueueOp;
use crate::etcd::LeaseId;
use crate::table::Timestamp;

/// After how long records get another lease, while there are any.
const RECORDS_LEASE_EVERY: Duration = Duration::from_secs(60);

impl Clustering {
    pub(super) fn send(&mut self, now: Timestamp) {
        self.unsent.retain(|lock, token| self.cluster.is_untold(lock, token));
        for mut request in self.cluster.take_requests() {
            let Some(entries) = self.lease else { return };
            if let Some(owner) = request.op.owner_mut() {
                owner.host = self.host.clone();
                owner.since_ms = unix_ms();
            }
            if let QueueOp::RecordNewest { .. } = &request.op {
                self.renew_records(now);
            }
            if let QueueOp::Release { record: Some(record), result, .. } = &mut request.op {
                *result = self.unsent.for_request(request.lock, record.token);
                self.renew_records(now);
            }
            let records = self.records.map_or(entries, |(lease, _)| lease);
            self.under_way += 1;
            self.threads.command(Command::Request(request, Leases { entries, records }));
        }
    }

    /// Records are read by daemons later, so they get a lease that is not this daemon's, and that ends without being kept
    /// alive. Until there is one, the daemon's will do.
    fn renew_records(&mut self, now: Timestamp) {
        let is_ending = |(_, sent): (LeaseId, Timestamp)| now >= sent.plus(RECORDS_LEASE_EVERY * 3 / 2);
        if self.records.is_some_and(is_ending) {
            self.records = None;
        }
        let is_fresh = self.records.is_some_and(|(_, sent)| now < sent.plus(RECORDS_LEASE_EVERY));
        if !is_fresh && !std::mem::replace(&mut self.wants_records, true) {
            self.threads.command(Command::GrantRecordsLease);
        }
    }
}
