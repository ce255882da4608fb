//! How many descriptors clients may take: all together, and each user. A connection takes one, and so does the process of
//! a holder that is not connected.

use std::collections::HashMap;

use nix::unistd::Uid;

use super::Config;
use crate::addr::Peer;

/// Descriptors that the daemon needs itself: standard ones, listeners, lock files, the journal, the loop.
const OWN: u64 = 20;
/// The descriptors of the threads that talk to etcd.
#[cfg(feature = "etcd")]
const CLUSTER: u64 = 24;
/// How many connections there may be at a time that are only told that there are too many.
pub(super) const ANSWERED_MAX: usize = 8;
/// How many connections of root and of the daemon's user there may be beyond the limits, for `status` and `break`.
const LIMITED_MAX: usize = 4;
/// The descriptors that are not used for connections, without etcd.
pub(super) const RESERVED: u64 = OWN + (ANSWERED_MAX + LIMITED_MAX) as u64;
/// This part of the descriptors is for the outputs of runs whose results clients share, but at most so many.
const OUTPUT_PART: usize = 16;
const OUTPUTS_MAX: usize = 256;
/// By default, one user may have this part of all connections, but at least so many.
const USER_PART: usize = 4;
const USER_MIN: usize = 16;

/// What a connection may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Full,
    /// Anything but lock: it is beyond a limit, and belongs to an administrator.
    NoLock(Limit),
    /// Nothing: it is beyond a limit, and is told so.
    None(Limit),
}

/// A limit that is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    Daemon,
    User,
}

impl Limit {
    /// Says so, to a client.
    pub(super) fn message(self) -> &'static str {
        match self {
            Limit::Daemon => {
                "the daemon serves as many clients as it can (--maxconn, or the limit of open files)"
            }
            Limit::User => "this user has as many connections as one user may have (--max-per-uid)",
        }
    }
}

/// How many connections one user may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UserLimit {
    Everyone(usize),
    /// Not for root and the daemon's own user.
    Others(usize),
}

pub(super) struct Admission {
    max: usize,
    outputs_max: usize,
    user_limit: UserLimit,
    /// The connections with full access, and the processes of holders that are not connected.
    total: usize,
    by_uid: HashMap<u32, usize>,
    limited: usize,
}

impl Admission {
    /// `descriptors`: how many this process may have.
    pub(super) fn new(config: &Config, descriptors: u64) -> Admission {
        #[cfg(feature = "etcd")]
        let reserved = RESERVED + if config.is_clustered() { CLUSTER } else { 0 };
        #[cfg(not(feature = "etcd"))]
        let reserved = RESERVED;
        let room = usize::try_from(descriptors.saturating_sub(reserved)).unwrap_or(usize::MAX).max(1);
        let outputs_max = (room / OUTPUT_PART).min(OUTPUTS_MAX);
        let room = room - outputs_max;
        let max = config.connections_max.map_or(room, |n| room.min(n as usize));
        let user_limit = match config.per_uid_max {
            Some(max) => UserLimit::Everyone(max as usize),
            None => UserLimit::Others((max / USER_PART).max(USER_MIN)),
        };
        Admission { max, outputs_max, user_limit, total: 0, by_uid: HashMap::new(), limited: 0 }
    }

    /// Returns how many outputs there may be.
    pub(super) fn outputs_max(&self) -> usize {
        self.outputs_max
    }

    /// Returns `true` if no connection is let in any more.
    pub(super) fn is_full(&self) -> bool {
        self.total >= self.max
    }

    /// Returns `true` if some connection would not be let in.
    pub(super) fn has_reached_a_limit(&self) -> bool {
        self.is_full() || self.by_uid.keys().any(|&uid| self.has_too_many(uid))
    }

    /// Decides about a connection, and counts it. Pass the result to [`Admission::leave`] when it is closed.
    pub(super) fn admit(&mut self, peer: Option<Peer>) -> Access {
        let limit = if self.is_full() {
            Limit::Daemon
        } else if peer.is_some_and(|peer| self.has_too_many(peer.uid)) {
            Limit::User
        } else {
            self.keep(peer.map(|peer| peer.uid));
            return Access::Full;
        };
        if self.limited < LIMITED_MAX && peer.is_some_and(|peer| is_administrator(peer.uid)) {
            self.limited += 1;
            return Access::NoLock(limit);
        }
        Access::None(limit)
    }

    /// A connection is closed.
    pub(super) fn leave(&mut self, access: Access, peer: Option<Peer>) {
        match access {
            Access::Full => self.release(peer.map(|peer| peer.uid)),
            Access::NoLock(_) => self.limited -= 1,
            Access::None(_) => {}
        }
    }

    /// Counts a descriptor of this user.
    pub(super) fn keep(&mut self, uid: Option<u32>) {
        self.total += 1;
        if let Some(uid) = uid {
            *self.by_uid.entry(uid).or_insert(0) += 1;
        }
    }

    /// A descriptor that was counted is closed.
    pub(super) fn release(&mut self, uid: Option<u32>) {
        self.total -= 1;
        if let Some(uid) = uid
            && let Some(count) = self.by_uid.get_mut(&uid)
        {
            *count -= 1;
            if *count == 0 {
                self.by_uid.remove(&uid);
            }
        }
    }

    /// Returns `true` if there is room to watch one more process of a holder that was restored after a restart. A part of the
    /// room stays free, so that the holders can connect to resume.
    pub(super) fn may_watch_restored(&self) -> bool {
        self.total < self.max - self.max.div_ceil(USER_PART)
    }

    fn has_too_many(&self, uid: u32) -> bool {
        let max = match self.user_limit {
            UserLimit::Others(_) if is_administrator(uid) => return false,
            UserLimit::Everyone(max) | UserLimit::Others(max) => max,
        };
        self.by_uid.get(&uid).is_some_and(|count| *count >= max)
    }
}

/// Root and the daemon's own user could stop the daemon anyway.
pub(super) fn is_administrator(uid: u32) -> bool {
    uid == 0 || uid == Uid::effective().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHER: u32 = 12_345;

    fn peer(uid: u32) -> Option<Peer> {
        Some(Peer { pid: 1, uid })
    }

    fn admission(descriptors: u64, connections_max: Option<u32>, per_uid_max: Option<u32>) -> Admission {
        let config = Config { connections_max, per_uid_max, ..Config::new(Vec::new()) };
        Admission::new(&config, descriptors)
    }

    #[test]
    fn by_default_a_user_has_a_quarter_of_the_room_and_at_least_sixteen() {
        for (descriptors, max) in [(20_000, 4_928), (132, 23), (60, 16)] {
            let mut admission = admission(descriptors, None, None);
            for _ in 0..max {
                assert_eq!(admission.admit(peer(OTHER)), Access::Full);
            }
            assert_eq!(admission.admit(peer(OTHER)), Access::None(Limit::User), "{descriptors}");
            assert_eq!(admission.admit(peer(OTHER + 1)), Access::Full);
            assert_eq!(admission.admit(peer(0)), Access::Full);
            admission.leave(Access::Full, peer(OTHER));
            assert_eq!(admission.admit(peer(OTHER)), Access::Full);
        }
    }

    #[test]
    fn at_the_limit_administrators_are_let_in_but_may_not_lock() {
        let mut admission = admission(20_000, Some(3), None);
        for _ in 0..3 {
            assert_eq!(admission.admit(None), Access::Full);
        }
        for _ in 0..LIMITED_MAX {
            assert_eq!(admission.admit(peer(OTHER)), Access::None(Limit::Daemon));
            assert_eq!(admission.admit(peer(0)), Access::NoLock(Limit::Daemon));
        }
        assert_eq!(admission.admit(peer(0)), Access::None(Limit::Daemon));
        admission.leave(Access::NoLock(Limit::Daemon), peer(0));
        assert_eq!(admission.admit(peer(0)), Access::NoLock(Limit::Daemon));
    }

    #[test]
    fn a_limit_that_was_given_holds_for_root_too() {
        let mut admission = admission(20_000, None, Some(2));
        for _ in 0..2 {
            assert_eq!(admission.admit(peer(0)), Access::Full);
        }
        assert_eq!(admission.admit(peer(0)), Access::NoLock(Limit::User));
    }

    #[test]
    fn processes_that_hold_locks_count_as_connections_do() {
        let mut admission = admission(20_000, None, Some(2));
        admission.keep(Some(OTHER));
        assert_eq!(admission.admit(peer(OTHER)), Access::Full);
        assert_eq!(admission.admit(peer(OTHER)), Access::None(Limit::User));
        admission.release(Some(OTHER));
        assert_eq!(admission.admit(peer(OTHER)), Access::Full);
    }

    #[test]
    fn with_few_descriptors_room_is_left_for_clients_that_resume() {
        for max in 1..20 {
            let mut admission = admission(20_000, Some(max), None);
            while admission.may_watch_restored() {
                admission.keep(None);
            }
            assert!(!admission.is_full(), "{max}");
        }
    }
}
