//! The names of users, for other hosts, which cannot ask this one. They are asked of [`crate::names`], which takes a
//! process each time, and for as long as the system's directory likes; so they are remembered, and the daemon's loop
//! never asks.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::names;

/// After this long a name is looked up again. The old one is used meanwhile.
const FRESH: Duration = Duration::from_secs(60);
/// How long a name that is not known yet is waited for: a lock is worth more than its holder's name.
const WAIT_MAX: Duration = Duration::from_millis(100);
/// How many are remembered.
const USERS_MAX: usize = 1_000;

/// What is known of the users. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Users(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    users: Mutex<HashMap<u32, User>>,
    looked_up: Condvar,
}

#[derive(Debug, Default)]
struct User {
    name: String,
    /// When it was looked up last.
    asked: Option<Instant>,
    /// One thread at the most looks it up, however long that takes.
    is_being_looked_up: bool,
}

impl Users {
    /// The name of a user; empty when there is none, or it does not become known in time.
    pub(super) fn name(&self, uid: u32) -> String {
        let mut users = self.0.users();
        if users.len() >= USERS_MAX && !users.contains_key(&uid) {
            users.retain(|_, user| user.is_being_looked_up);
        }
        let user = users.entry(uid).or_default();
        let is_fresh = user.asked.is_some_and(|asked| asked.elapsed() < FRESH);
        if !is_fresh && !user.is_being_looked_up {
            user.is_being_looked_up = self.look_up(uid);
        }
        let is_waiting = |users: &mut HashMap<u32, User>| {
            users.get(&uid).is_some_and(|user| user.asked.is_none() && user.is_being_looked_up)
        };
        let waited = self.0.looked_up.wait_timeout_while(users, WAIT_MAX, is_waiting);
        let (users, _) = waited.unwrap_or_else(PoisonError::into_inner);
        users.get(&uid).map(|user| user.name.clone()).unwrap_or_default()
    }

    /// True when it has begun: without a thread the name remains unknown.
    fn look_up(&self, uid: u32) -> bool {
        let shared = Arc::clone(&self.0);
        let look_up = move || {
            let name = names::user(uid).unwrap_or_default();
            let user = User { name, asked: Some(Instant::now()), is_being_looked_up: false };
            shared.users().insert(uid, user);
            shared.looked_up.notify_all();
        };
        thread::Builder::new().name("etcd users".into()).spawn(look_up).is_ok()
    }
}

impl Shared {
    fn users(&self) -> MutexGuard<'_, HashMap<u32, User>> {
        // Whoever panicked with it has left it whole: each change is one assignment.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name that is waited for as long as that takes.
    fn name(users: &Users, uid: u32) -> String {
        let is_known = || users.0.users().get(&uid).is_some_and(|user| user.asked.is_some());
        while !is_known() {
            users.name(uid);
        }
        users.name(uid)
    }

    #[test]
    fn a_user_is_looked_up_once() {
        let users = Users::default();
        assert_eq!(name(&users, 0), "root");
        let asked = users.0.users()[&0].asked;
        assert_eq!(users.name(0), "root");
        assert_eq!(users.0.users()[&0].asked, asked);
    }

    #[test]
    fn a_user_without_a_name_is_remembered_too() {
        let users = Users::default();
        assert_eq!(name(&users, 4_000_000_000), "");
        assert!(users.0.users()[&4_000_000_000].asked.is_some());
    }

    #[test]
    fn no_more_users_are_remembered_than_there_is_room_for() {
        let users = Users::default();
        let asked = Some(Instant::now());
        let known = |uid| (uid, User { name: "old".into(), asked, is_being_looked_up: false });
        *users.0.users() = (1..=USERS_MAX as u32).map(known).collect();
        assert_eq!(users.name(7), "old");
        assert_eq!(name(&users, 0), "root");
        assert_eq!(users.0.users().len(), 1);
    }
}
