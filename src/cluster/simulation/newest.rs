//! The requests for one lock of which only the newest of all hosts goes on waiting, and what must be true of them:
//!
//! - A request gives way only if another one has not given way: never does the last of them.
//! - When every host knows all, one waits at the most.
//! - A request that waited before another one came never begins after that one has begun.
//! - A holder is asked to stop only for a request that replaces it (`replacing`).

use super::replacing::ReplacingRequests;

/// A moment in a simulation.
#[derive(Clone, Copy)]
pub(super) struct Moment {
    pub(super) step: u64,
    /// In milliseconds.
    pub(super) time: u64,
}

struct Request {
    host: usize,
    client: usize,
    since: u64,
    /// The step at which it was told to wait, so that a request that comes after it is newer. `None`: it was not told, or the
    /// order of the requests before it was lost.
    waits_since: Option<u64>,
    /// `None`: it waits.
    end: Option<End>,
}

#[derive(Clone, Copy, PartialEq)]
struct End {
    at: u64,
    gave_way: bool,
}

#[derive(Default)]
pub(super) struct NewestRequests {
    requests: Vec<Request>,
    /// The step at which the newest of the requests came that have begun.
    begun: u64,
    /// The step at which the order of the requests was lost.
    lost: u64,
    pub(super) replacing: ReplacingRequests,
}

impl NewestRequests {
    pub(super) fn asks(&mut self, host: usize, (client, replaces_as): (usize, Option<u32>), step: u64) {
        // What ended before all others came is no reason for any of them to give way.
        let oldest = self.requests.iter().filter(|one| one.end.is_none()).map(|one| one.since).min();
        self.requests.retain(|one| one.end.is_none_or(|end| end.at >= oldest.unwrap_or(step)));
        let since = step;
        self.requests.push(Request { host, client, since, waits_since: None, end: None });
        if let Some(uid) = replaces_as {
            self.replacing.asks(host, client, uid);
        }
    }

    pub(super) fn waits(&mut self, host: usize, client: usize, step: u64) {
        let lost = self.lost;
        let one = self.of(host, client);
        // One that came before that may have been recorded before.
        if one.since >= lost {
            one.waits_since.get_or_insert(step);
        }
    }

    pub(super) fn began(&mut self, host: usize, client: usize, now: Moment) {
        let begun = self.begun;
        let one = self.of(host, client);
        assert!(
            one.waits_since.is_none_or(|waits_since| waits_since >= begun),
            "client {client} of host {host} waits since step {:?}, and begins after one that came at step {begun}",
            one.waits_since
        );
        let since = one.since;
        self.ends(host, client, (now, false));
        self.begun = begun.max(since);
    }

    /// Returns how many were told to wait, and do so.
    pub(super) fn waiting(&self, waits: impl Fn(usize, usize) -> bool) -> usize {
        let is_such =
            |one: &&Request| one.end.is_none() && one.waits_since.is_some() && waits(one.host, one.client);
        self.requests.iter().filter(is_such).count()
    }

    /// Returns `true` if it gives way to no request of its own host.
    pub(super) fn gives_way(&mut self, host: usize, client: usize, now: Moment) -> bool {
        let since = self.of(host, client).since;
        self.ends(host, client, (now, true));
        let stays = |other: &&Request| other.end.is_none_or(|end| !end.gave_way && end.at >= since);
        let mut others = self.requests.iter().filter(stays).peekable();
        assert!(others.peek().is_some(), "client {client} of host {host} gives way, and is the last");
        others.all(|other| other.host != host)
    }

    /// A client goes away, or is told something else.
    pub(super) fn left(&mut self, host: usize, client: usize, now: Moment) {
        self.ends(host, client, (now, false));
    }

    fn ends(&mut self, host: usize, client: usize, (now, gave_way): (Moment, bool)) {
        if let Some(one) = self.find(host, client) {
            one.end = Some(End { at: now.step, gave_way });
        }
        self.replacing.left(host, client, now.time);
    }

    /// A host was away for longer than a record stays.
    pub(super) fn missed(&mut self, host: usize) {
        self.requests.iter_mut().filter(|one| one.host == host).for_each(|one| one.waits_since = None);
    }

    /// The record of the newest is gone, or the store went back, and the order with it.
    pub(super) fn forget_order(&mut self, step: u64) {
        self.lost = step;
        self.requests.iter_mut().for_each(|one| one.waits_since = None);
        self.begun = 0;
    }

    fn of(&mut self, host: usize, client: usize) -> &mut Request {
        self.find(host, client).expect("it has asked")
    }

    fn find(&mut self, host: usize, client: usize) -> Option<&mut Request> {
        self.requests.iter_mut().find(|one| (one.host, one.client, one.end) == (host, client, None))
    }
}
