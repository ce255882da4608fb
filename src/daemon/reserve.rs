//! Keys that belong to users: `@NAME/...` to the user NAME, and others as `--reserve` says. Only their users and root may take
//! them.

use std::fs;
use std::os::fd::BorrowedFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

use super::users::{Known, Query};
use crate::proto::Key;

/// Reserves the keys that begin with `prefix`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// What the keys begin with.
    pub prefix: String,
    /// Whose they are. Of several owners of the longest prefix, each may take the keys.
    pub owner: Owner,
}

/// Who may take a key, besides root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A user.
    User {
        /// The name, as which the user connects over TCP.
        name: String,
        /// The number; `None`: there is no such user on this machine, only a name over TCP.
        uid: Option<u32>,
    },
    /// All members of the group with this name and number.
    Group(String, u32),
}

impl Owner {
    /// Returns `true` if the client is one of the users that this names.
    fn admits(&self, client: &Claimant<'_>) -> bool {
        match (self, client) {
            (Owner::User { uid, .. }, Claimant::User { uid: mine, .. }) => *uid == Some(*mine),
            (Owner::User { name, .. }, Claimant::Name(mine)) => name == mine,
            (Owner::Group(_, gid), Claimant::User { uid, connection }) => {
                groups_of(*connection, *uid).contains(gid)
            }
            (Owner::Group(..), Claimant::Name(_)) | (_, Claimant::Unknown) => false,
        }
    }

    fn describe(&self) -> String {
        match self {
            Owner::User { name, .. } => format!("the user {name:?}"),
            Owner::Group(name, _) => format!("the group {name:?}"),
        }
    }
}

/// Which client wants a key.
#[derive(Clone, Copy, Debug)]
pub(super) enum Claimant<'a> {
    /// A user, as the kernel states it for a connection of a Unix socket.
    User { uid: u32, connection: BorrowedFd<'a> },
    /// A client over TCP that has shown to have this name.
    Name(&'a str),
    /// Any other.
    Unknown,
}

/// Whether a client may take a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Permitted,
    /// It may not, and this is why.
    Refused(String),
    /// That is known when the query is answered.
    Pending,
}

#[derive(Debug)]
pub(super) struct Reservations {
    /// The longest prefix first.
    given: Vec<Reservation>,
    /// The locks are clustered.
    is_clustered: bool,
}

impl Reservations {
    pub(super) fn new(mut given: Vec<Reservation>, is_clustered: bool) -> Reservations {
        given.sort_by_key(|reservation| std::cmp::Reverse(reservation.prefix.len()));
        Reservations { given, is_clustered }
    }

    /// Returns `true` if the identity of this key must be one that protocol 1 cannot name. Clustered locks have the same identity
    /// on all hosts, whatever each host reserves: there, protocol 1 is refused instead.
    pub(super) fn changes_identity(&self, key: &Key) -> bool {
        !self.is_clustered && self.owners(key).next().is_some()
    }

    /// Returns `true` if no client of protocol 1 may lock anything, since its key could be reserved.
    pub(super) fn exclude_protocol_1(&self) -> bool {
        self.is_clustered && !self.given.is_empty()
    }

    /// Returns the owners of the longest prefix that this key begins with.
    fn owners<'a>(&'a self, key: &'a Key) -> impl Iterator<Item = &'a Owner> {
        let matching = |reservation: &&Reservation| key.as_str().starts_with(&reservation.prefix);
        let longest = self.given.iter().find(matching).map(|reservation| &reservation.prefix);
        let given = self.given.iter().filter(move |reservation| Some(&reservation.prefix) == longest);
        given.map(|reservation| &reservation.owner)
    }

    /// Decides whether the client may take the key. `users` looks users up; `is_name` tells whether clients over TCP have a name.
    pub(super) fn decide(
        &self,
        key: &Key,
        client: Claimant<'_>,
        users: impl FnOnce(Query) -> Known,
        is_name: impl FnOnce(&str) -> bool,
    ) -> Decision {
        let is_root = matches!(client, Claimant::User { uid: 0, .. });
        let owners: Vec<&Owner> = self.owners(key).collect();
        if !owners.is_empty() {
            if is_root || owners.iter().any(|owner| owner.admits(&client)) {
                return Decision::Permitted;
            }
            let owners: Vec<String> = owners.into_iter().map(Owner::describe).collect();
            return refused(key, &owners.join(" and "));
        }
        let Some(owner) = key.owner() else { return Decision::Permitted };
        match client {
            Claimant::User { uid, .. } => decide_by_user(key, owner, uid, users, is_name),
            Claimant::Name(name) if name == owner => Decision::Permitted,
            Claimant::Name(_) | Claimant::Unknown => refused(key, &format!("the user {owner:?}")),
        }
    }
}

fn decide_by_user(
    key: &Key,
    owner: &str,
    uid: u32,
    users: impl FnOnce(Query) -> Known,
    is_name: impl FnOnce(&str) -> bool,
) -> Decision {
    if let Ok(number) = owner.parse::<u32>() {
        return match uid == 0 || uid == number {
            true => Decision::Permitted,
            false => refused(key, &format!("the user with uid {number}")),
        };
    }
    if uid == 0 && (owner == "root" || is_name(owner)) {
        return Decision::Permitted;
    }
    // Only root can ask for a name that it chooses: other users could keep the threads busy with that.
    let query = if uid == 0 { Query::Name(owner.into()) } else { Query::Uid(uid) };
    match users(query) {
        Known::Pending => Decision::Pending,
        Known::User(name) if *name == *owner => Decision::Permitted,
        Known::Missing if uid == 0 => Decision::Refused(format!(
            "the key {:?} belongs to the user {owner:?}, who does not exist",
            key.as_str()
        )),
        Known::User(_) | Known::Missing => refused(key, &format!("the user {owner:?}")),
    }
}

fn refused(key: &Key, owner: &str) -> Decision {
    let key = key.as_str();
    Decision::Refused(format!("the key {key:?} belongs to {owner}: no other user but root may take it"))
}

/// Returns the groups of the process that connected: its own, and the further ones that /proc shows while it lives.
fn groups_of(connection: BorrowedFd<'_>, uid: u32) -> Vec<u32> {
    let Ok(peer) = getsockopt(&connection, sockopt::PeerCredentials) else { return Vec::new() };
    let mut groups = vec![peer.gid()];
    let status = fs::read_to_string(format!("/proc/{}/status", peer.pid())).unwrap_or_default();
    let numbers = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
        line.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect::<Vec<u32>>()
    };
    // Another process may have got the number, or the process another user.
    let is_same = numbers("Uid:").get(1) == Some(&uid) && connector_lives(connection);
    if is_same {
        groups.extend(numbers("Groups:"));
    }
    groups
}

/// Returns `true` if the process that connected lives, as far as the kernel tells (SO_PEERPIDFD, since Linux 6.5).
fn connector_lives(connection: BorrowedFd<'_>) -> bool {
    match getsockopt(&connection, sockopt::PeerPidfd) {
        // A pidfd is readable when its process has ended.
        Ok(process) => matches!(
            poll(
                &mut [PollFd::new(std::os::fd::AsFd::as_fd(&process), PollFlags::POLLIN)],
                PollTimeout::ZERO
            ),
            Ok(0)
        ),
        Err(nix::Error::ENOPROTOOPT) => true,
        Err(_) => false,
    }
}
