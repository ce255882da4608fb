//! Whose results are whose: a number for each user, as the table knows them.

use std::hash::{BuildHasher, RandomState};

use crate::table::EVERY_USER;
#[cfg(feature = "etcd")]
use crate::table::ROOT_ALONE;

/// Stands for the clients over TCP that have no names: on such a port they are all the same to the daemon.
const NAMELESS: u64 = 1 << 33;

/// Gives users their numbers. A copy gives the same ones.
#[derive(Clone)]
pub(super) struct Sharers {
    /// Root's results are for all users.
    across_users: bool,
    /// Makes numbers of names.
    names: RandomState,
}

impl Sharers {
    pub(super) fn new(across_users: bool) -> Sharers {
        Sharers { across_users, names: RandomState::new() }
    }

    /// Returns the number that stands for a user: by the uid that the kernel states, or the name over TCP.
    pub(super) fn number(&self, uid: Option<u32>, name: Option<&str>) -> u64 {
        match (uid, name) {
            (Some(0), _) if self.across_users => EVERY_USER,
            (Some(uid), _) => u64::from(uid) + 1,
            (None, None) => NAMELESS,
            // Apart from all other numbers.
            (None, Some(name)) => (self.names.hash_one(name) | 1 << 63) & !1,
        }
    }

    /// The same for the user of a run on another host. `for_all`: that host gives it to all users. Both hosts must say so.
    #[cfg(feature = "etcd")]
    pub(super) fn remote_number(&self, uid: Option<u32>, name: Option<&str>, for_all: bool) -> u64 {
        match uid {
            Some(0) if !for_all => ROOT_ALONE,
            _ => self.number(uid, name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_has_a_number_and_roots_stands_for_all_where_the_daemon_says_so() {
        let sharers = Sharers::new(false);
        let users = [(Some(0), None), (Some(5), None), (None, Some("a")), (None, Some("b")), (None, None)];
        let mut numbers = users.map(|(uid, name)| sharers.number(uid, name));
        assert_eq!(numbers, users.map(|(uid, name)| sharers.clone().number(uid, name)));
        assert!(!numbers.contains(&EVERY_USER) && !numbers.contains(&0));
        numbers.sort_unstable();
        assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
        assert_eq!(Sharers::new(true).number(Some(0), None), EVERY_USER);
    }

    #[cfg(feature = "etcd")]
    #[test]
    fn roots_result_of_another_host_is_for_all_only_if_both_hosts_say_so() {
        let is_for_all = |here, there| Sharers::new(here).remote_number(Some(0), None, there) == EVERY_USER;
        assert!(is_for_all(true, true) && !is_for_all(true, false) && !is_for_all(false, true));
        assert_ne!(Sharers::new(true).remote_number(Some(5), None, true), EVERY_USER);
    }
}
