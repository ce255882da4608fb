//! Holders on other machines: until when the daemon believes that each of them lives. Only a ping says that it does: a machine
//! that has lost its power or its network says nothing more, and its connection stays open.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::proto::v2::LeaseTerms;
use crate::table::{ClientId, Timestamp};
use crate::timestamp::millis;

/// The leases of holders over TCP.
///
/// A holder stops its command when two thirds of the time are over without an answer to a ping, by its own clock, which began
/// before the daemon's. The last third is for the command to end in.
pub(super) struct PeerLeases {
    /// How long a lease lasts. `None`: locks have no leases.
    timeout: Option<Duration>,
    until: BTreeMap<ClientId, Timestamp>,
    in_order: BTreeSet<(Timestamp, ClientId)>,
}

impl PeerLeases {
    pub(super) fn new(timeout: Option<Duration>) -> PeerLeases {
        PeerLeases { timeout, until: BTreeMap::new(), in_order: BTreeSet::new() }
    }

    /// Returns what a holder is told of its lease; `None` if it has none.
    pub(super) fn terms(&self, client: ClientId) -> Option<LeaseTerms> {
        let timeout = self.timeout.filter(|_| self.until.contains_key(&client))?;
        Some(LeaseTerms { good_ms: millis(timeout * 2 / 3), margin_ms: millis(timeout / 3) })
    }

    /// Begins the lease of a holder.
    pub(super) fn begin(&mut self, client: ClientId, now: Timestamp) {
        let Some(timeout) = self.timeout else { return };
        let until = now.plus(timeout);
        if let Some(before) = self.until.insert(client, until) {
            self.in_order.remove(&(before, client));
        }
        self.in_order.insert((until, client));
    }

    /// The holder has sent a ping. Nothing happens if it has no lease.
    pub(super) fn renew(&mut self, client: ClientId, now: Timestamp) {
        if self.until.contains_key(&client) {
            self.begin(client, now);
        }
    }

    /// The client holds nothing any more. Returns until when it would have had to be believed, if it had a lease.
    pub(super) fn end(&mut self, client: ClientId) -> Option<Timestamp> {
        let until = self.until.remove(&client)?;
        self.in_order.remove(&(until, client));
        Some(until)
    }

    /// Returns a holder whose lease is over, once.
    pub(super) fn pop_over(&mut self, now: Timestamp) -> Option<ClientId> {
        let &(_, client) = self.in_order.first().filter(|&&(until, _)| until <= now)?;
        self.end(client);
        Some(client)
    }

    /// Returns when [`PeerLeases::pop_over`] is next needed.
    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        self.in_order.first().map(|&(until, _)| until)
    }
}

/// Joins the limits of two leases, of which the lock needs both.
pub(super) fn both(one: Option<LeaseTerms>, other: Option<LeaseTerms>) -> Option<LeaseTerms> {
    let (Some(a), Some(b)) = (one, other) else { return one.or(other) };
    let end = |terms: LeaseTerms| terms.good_ms.saturating_add(terms.margin_ms);
    let good_ms = a.good_ms.min(b.good_ms);
    Some(LeaseTerms { good_ms, margin_ms: end(a).min(end(b)) - good_ms })
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ClientId = ClientId(1);
    const B: ClientId = ClientId(2);

    #[test]
    fn a_lease_ends_unless_it_is_renewed() {
        let mut leases = PeerLeases::new(Some(Duration::from_secs(30)));
        assert_eq!(leases.terms(A), None);
        leases.begin(A, Timestamp(0));
        leases.begin(B, Timestamp(1000));
        assert_eq!(leases.terms(A), Some(LeaseTerms { good_ms: 20_000, margin_ms: 10_000 }));
        leases.renew(A, Timestamp(5000));
        assert_eq!(leases.next_deadline(), Some(Timestamp(31_000)));
        assert_eq!(leases.pop_over(Timestamp(30_999)), None);
        assert_eq!(leases.pop_over(Timestamp(31_000)), Some(B));
        assert_eq!(leases.pop_over(Timestamp(31_000)), None);
        assert_eq!(leases.end(A), Some(Timestamp(35_000)));
        leases.renew(A, Timestamp(6000));
        assert_eq!((leases.next_deadline(), leases.terms(A)), (None, None), "it holds nothing");
    }

    #[test]
    fn without_a_timeout_there_are_no_leases() {
        let mut leases = PeerLeases::new(None);
        leases.begin(A, Timestamp(0));
        assert_eq!((leases.terms(A), leases.next_deadline()), (None, None));
    }

    #[test]
    fn of_two_leases_the_shorter_counts_in_each_part() {
        let terms = |good_ms, margin_ms| Some(LeaseTerms { good_ms, margin_ms });
        assert_eq!(both(terms(20, 10), None), terms(20, 10));
        assert_eq!(both(None, terms(20, 10)), terms(20, 10));
        assert_eq!(both(terms(20, 10), terms(6, 3)), terms(6, 3));
        assert_eq!(both(terms(10, 1), terms(9, 30)), terms(9, 2));
    }
}
