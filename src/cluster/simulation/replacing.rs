//! The requests for one lock that replace its holders. A holder is asked to stop only for one of them: for one of its own host that
//! waits; or for one of its user or of root that waits, or that went away so short a time ago that the holder's host may not have
//! heard of it.

use super::world::{ONLY_RENEWS_MAX, TTL};

/// How long the holder's host may not have heard that a request went away, in milliseconds: as long as the place of the request stays
/// if its host is cut off, with or without its renewals, and then as long as a host relies on what it holds without news.
const NEWS_MS: u64 = ONLY_RENEWS_MAX + 2 * TTL;

struct Replacing {
    host: usize,
    client: usize,
    uid: u32,
    /// When it went away. `None`: it waits.
    gone_at: Option<u64>,
}

#[derive(Default)]
pub(super) struct ReplacingRequests(Vec<Replacing>);

impl ReplacingRequests {
    pub(super) fn asks(&mut self, host: usize, client: usize, uid: u32) {
        self.0.push(Replacing { host, client, uid, gone_at: None });
    }

    /// A request begins, gives way or goes away, if it is one of these.
    pub(super) fn left(&mut self, host: usize, client: usize, now: u64) {
        let waits = |one: &&mut Replacing| (one.host, one.client, one.gone_at) == (host, client, None);
        self.0.iter_mut().filter(waits).for_each(|one| one.gone_at = Some(now));
    }

    /// etcd is started anew, with the store as it was at `taken`. The places that may have been in it then are there again, under
    /// leases that have their whole time.
    pub(super) fn restarted(&mut self, taken: u64, now: u64) {
        let gone = self.0.iter_mut().filter_map(|one| one.gone_at.as_mut());
        gone.filter(|gone_at| taken < **gone_at + NEWS_MS).for_each(|gone_at| *gone_at = now);
    }

    /// A holder of this host and user is asked to stop. Returns `true` if no request of its own host waits that replaces it.
    pub(super) fn stops(&self, host: usize, uid: u32, now: u64) -> bool {
        let is_here = self.0.iter().any(|one| one.host == host && one.gone_at.is_none());
        let is_permitted = |one: &&Replacing| one.uid == 0 || one.uid == uid;
        let may_be_known = |one: &Replacing| one.gone_at.is_none_or(|gone_at| now < gone_at + NEWS_MS);
        let is_elsewhere = self.0.iter().filter(is_permitted).any(may_be_known);
        assert!(is_here || is_elsewhere, "no request replaces the holder of {uid}");
        !is_here
    }
}
