//! The requests for one lock of which only the newest of all hosts goes on waiting, and what must be true of them:
//!
//! - A request gives way only if another one has not given way: never does the last of them.
//! - When every host knows all, one waits at the most.
//! - A holder is asked to stop only if a request of its host or of its user replaces it, or root's.
//! - A request that waited before another one came never begins after that one has begun.

struct Request {
    host: usize,
    client: usize,
    /// The user, if it replaces the holder.
    replaces_as: Option<u32>,
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
}

impl NewestRequests {
    pub(super) fn asks(&mut self, host: usize, (client, replaces_as): (usize, Option<u32>), step: u64) {
        // What ended before all others came is no reason for any of them to give way.
        let oldest = self.requests.iter().filter(|one| one.end.is_none()).map(|one| one.since).min();
        self.requests.retain(|one| one.end.is_none_or(|end| end.at >= oldest.unwrap_or(step)));
        let since = step;
        self.requests.push(Request { host, client, replaces_as, since, waits_since: None, end: None });
    }

    pub(super) fn waits(&mut self, host: usize, client: usize, step: u64) {
        self.of(host, client).waits_since.get_or_insert(step);
    }

    pub(super) fn began(&mut self, host: usize, client: usize, step: u64) {
        let begun = self.begun;
        let one = self.of(host, client);
        assert!(
            one.waits_since.is_none_or(|waits_since| waits_since >= begun),
            "client {client} of host {host} waits since step {:?}, and begins after one that came at step {begun}",
            one.waits_since
        );
        one.end = Some(End { at: step, gave_way: false });
        self.begun = begun.max(one.since);
    }

    /// A holder of this host and user is asked to stop. Returns `true` if no request of its own host waits that replaces it.
    pub(super) fn replaces(&self, host: usize, uid: u32) -> bool {
        let may = |one: &&Request| {
            let is_permitted = |by: u32| one.host == host || by == 0 || by == uid;
            one.replaces_as.is_some_and(is_permitted)
        };
        assert!(self.requests.iter().any(|one| may(&one)), "no request replaces the holder of {uid}");
        !self.requests.iter().filter(may).any(|one| one.host == host && one.end.is_none())
    }

    /// Returns how many were told to wait, and do so.
    pub(super) fn waiting(&self, waits: impl Fn(usize, usize) -> bool) -> usize {
        let is_such =
            |one: &&Request| one.end.is_none() && one.waits_since.is_some() && waits(one.host, one.client);
        self.requests.iter().filter(is_such).count()
    }

    /// Returns `true` if it gives way to no request of its own host.
    pub(super) fn gives_way(&mut self, host: usize, client: usize, step: u64) -> bool {
        let one = self.of(host, client);
        one.end = Some(End { at: step, gave_way: true });
        let since = one.since;
        let stays = |other: &&Request| other.end.is_none_or(|end| !end.gave_way && end.at >= since);
        let mut others = self.requests.iter().filter(stays).peekable();
        assert!(others.peek().is_some(), "client {client} of host {host} gives way, and is the last");
        others.all(|other| other.host != host)
    }

    /// A client goes away, or is told something else.
    pub(super) fn left(&mut self, host: usize, client: usize, step: u64) {
        if let Some(one) = self.find(host, client) {
            one.end = Some(End { at: step, gave_way: false });
        }
    }

    /// A host was away for longer than a record stays.
    pub(super) fn missed(&mut self, host: usize) {
        self.requests.iter_mut().filter(|one| one.host == host).for_each(|one| one.waits_since = None);
    }

    /// The store went back, and the order with it.
    pub(super) fn forget_order(&mut self) {
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
