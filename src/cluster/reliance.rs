//! Until when this host relies on what it holds: the rule by which a renewal of the lease counts, and why it is safe.
//!
//! The danger is a store that goes back to a state in which the lease of this host lives and one of its places is missing, and that
//! has overtaken the revision that this host saw when it looks again. Such a store renews the lease, and no revision shows that it is
//! another one.
//!
//! The rule: a renewal counts when etcd has answered it and has shown *after that* that each place of a hold is still there. Then what is
//! held is relied on until `sent + TTL - margin`, where `sent` is when the renewal was sent. Two things can show it:
//! - A read that is sent when the answer to the renewal has come ([`PresenceRequest`]; etcd's linearizable read).
//! - The watch, at no request of its own: it was open when what is held was read, has shown each change up to the revision of the
//!   renewal, and contact with etcd was not interrupted since ([`Renewal::is_prompt`]). A store that goes back is restarted,
//!   which ends the watch. If a cut of the network hides that, the cut makes a renewal fail or come late; or it is so short that no
//!   renewal falls into it, and then the store's revision is not the one that the watch has shown. (Only a store that goes back and
//!   comes to the very same revision again between two renewals, while the watch dies without a sign, would not be noticed.)
//!
//! Why that is safe. The renewal was sent at `s`, a read after its answer showed the place `p` (its key, which is used once, and its
//! create revision), and `p` is relied on until `T = s + TTL - margin`.
//! - If the store did not go back since `s`: `p` was there when its lease was renewed, so etcd keeps it until `s + TTL` at least,
//!   which is later than `T`.
//! - If it went back before `s`: the renewal and the read are both answers of the store as it is since then, and the first case holds.
//! - If it went back at `g`, later than `s`: `p` may be missing. A host that knows of it grants nothing before `g + TTL`, which is later
//!   than `T`. (A host that saw nothing of what was lost cannot know of it: docs/cluster.md says so.)
//!
//! The other order is not safe. If `p` is read, the store goes back, and then it renews the lease, `T` can be almost a TTL later than
//! the moment at which the hosts that noticed begin to grant `p`.

use std::collections::{BTreeMap, BTreeSet};

use super::{LeaseName, Revision};
use crate::proto::{LockId, Token};
use crate::table::Timestamp;

/// How many locks one [`PresenceRequest`] has at the most. etcd refuses a transaction with more than 128 operations.
const LOCKS_MAX: usize = 100;

/// The lease was granted or renewed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// The lease.
    pub lease: LeaseName,
    /// Until when what is held can be relied on if the renewal counts: the margin before the lease ends, counted from when
    /// the renewal was sent.
    pub good_until: Timestamp,
    /// The store's revision when etcd answered.
    pub revision: Revision,
    /// Contact with etcd was not interrupted since the renewal before: no attempt has failed, this one was not late, and the member that
    /// the watch reads from has answered.
    pub is_prompt: bool,
}

/// A request to etcd to read which places this host has in the queues of some locks. The answer are the tokens of these places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresenceRequest {
    /// Identifies the request in the answer.
    pub id: u64,
    /// The locks, at most 100 of them.
    pub locks: Vec<LockId>,
}

/// A hold of this host.
pub(super) type Held = (LockId, Token);

#[derive(Debug, Default)]
pub(super) struct Reliance {
    /// `None`: no renewal of this lease has counted yet.
    good_until: Option<Timestamp>,
    /// What `good_until` becomes if the last renewal counts.
    renewed_until: Timestamp,
    proof: Option<Proof>,
    requests: Vec<PresenceRequest>,
    next_id: u64,
}

/// A renewal whose holds are being read.
#[derive(Debug)]
struct Proof {
    good_until: Timestamp,
    held: BTreeSet<Held>,
    /// The requests that were not answered yet, by their ids, and their locks.
    under_way: BTreeMap<u64, Vec<LockId>>,
}

impl Reliance {
    /// Forgets the lease. Answers that come now are of no use.
    pub(super) fn reset(&mut self) {
        *self = Reliance { next_id: self.next_id, ..Reliance::default() };
    }

    /// Returns until when what is held can be relied on. `None`: it cannot.
    pub(super) fn good_until(&self) -> Option<Timestamp> {
        self.good_until
    }

    /// Returns `true` if a renewal would be good for longer than this.
    pub(super) fn is_renewed(&self, now: Timestamp) -> bool {
        self.renewed_until > now
    }

    /// A renewal would be good until then. It counts at once if the watch has shown that all of `held` is there.
    pub(super) fn renewed(&mut self, good_until: Timestamp, held: BTreeSet<Held>, is_shown: bool) {
        self.renewed_until = self.renewed_until.max(good_until);
        if is_shown || held.is_empty() {
            self.count(good_until);
            self.proof = None;
        } else if self.proof.is_none() {
            self.begin_proof(held);
        }
    }

    /// A request was answered with this host's places in the queues of its locks, or failed. `held` is what is held now. Returns
    /// what of that is missing.
    pub(super) fn answered(
        &mut self,
        id: u64,
        answer: Option<&BTreeSet<Held>>,
        held: BTreeSet<Held>,
    ) -> Vec<Held> {
        let Some(proof) = &mut self.proof else { return Vec::new() };
        let Some(locks) = proof.under_way.remove(&id) else { return Vec::new() };
        let Some(there) = answer else {
            // The next renewal begins another one.
            self.proof = None;
            return Vec::new();
        };
        let is_missing = |one: &&Held| locks.contains(&one.0) && !there.contains(one) && held.contains(one);
        let missing: Vec<Held> = proof.held.iter().filter(is_missing).copied().collect();
        if proof.under_way.is_empty() {
            let good_until = proof.good_until;
            self.proof = None;
            self.count(good_until);
            if self.renewed_until > good_until {
                self.begin_proof(held.into_iter().filter(|one| !missing.contains(one)).collect());
            }
        }
        missing
    }

    /// Returns the requests that are due.
    pub(super) fn take_requests(&mut self) -> Vec<PresenceRequest> {
        std::mem::take(&mut self.requests)
    }

    fn count(&mut self, good_until: Timestamp) {
        self.good_until = self.good_until.max(Some(good_until));
    }

    fn begin_proof(&mut self, held: BTreeSet<Held>) {
        let locks: BTreeSet<LockId> = held.iter().map(|(lock, _)| *lock).collect();
        let locks: Vec<LockId> = locks.into_iter().collect();
        let mut under_way = BTreeMap::new();
        for locks in locks.chunks(LOCKS_MAX) {
            self.next_id += 1;
            under_way.insert(self.next_id, locks.to_vec());
            self.requests.push(PresenceRequest { id: self.next_id, locks: locks.to_vec() });
        }
        self.proof = Some(Proof { good_until: self.renewed_until, held, under_way });
    }
}

#[cfg(test)]
mod tests;
