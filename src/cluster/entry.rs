//! An entry in the queue of a lock: its key, whom it belongs to, and which entries of a line hold the lock.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Replaces;
use crate::proto::Protocol;
use crate::proto::v2::{ClientInfo, Mode, ShortText};
use crate::table::{RequestView, Sharing, Verdict};

/// A revision of etcd's store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub i64);

/// The last part of an entry's key in etcd. Other programs may have put any bytes there.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryKey(pub Vec<u8>);

impl fmt::Debug for EntryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&String::from_utf8_lossy(&self.0), f)
    }
}

/// Names a lease: its number in hexadecimal digits, with which the keys of all its entries begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseName(pub String);

impl LeaseName {
    /// Returns the key of a new entry, which no other daemon uses.
    pub(super) fn entry_key(&self, number: u64) -> EntryKey {
        EntryKey(format!("{}.{number:x}", self.0).into())
    }

    /// Returns `true` if a daemon with this lease made the entry.
    pub(super) fn owns(&self, entry_key: &EntryKey) -> bool {
        let rest = entry_key.0.strip_prefix(self.0.as_bytes()).and_then(|rest| rest.strip_prefix(b"."));
        rest.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_hexdigit))
    }
}

/// Who an entry belongs to, for people on other hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The lock's key, if it is known here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The machine of the daemon.
    pub host: ShortText,
    /// The user's id on that machine, as its kernel knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// The protocol that the client speaks.
    pub protocol: Protocol,
    /// What the client waits for, if it has to wait.
    #[serde(default)]
    pub mode: Mode,
    /// It may hold beside other shared ones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// How many may hold at a time, if they all say the same number. 0: one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub slots: u32,
    /// How many of the slots it takes. 0: one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub weight: u32,
    /// A request that waits at this entry replaces the holders before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<Replaces>,
    /// What the client says about itself.
    #[serde(default)]
    pub who: ClientInfo,
    /// When the entry was made: milliseconds since 1970, by the clock of that machine.
    #[serde(default)]
    pub since_ms: u64,
}

impl Owner {
    /// The owner of an entry for a request. The caller fills in host and time.
    pub(super) fn of(key: Option<&str>, request: &RequestView<'_>) -> Owner {
        let asked = request.asked;
        let (shared, slots, weight) = match Sharing::from(&request.terms) {
            Sharing::Exclusive => (false, 0, 0),
            Sharing::Shared => (true, 0, 0),
            Sharing::Slots { slots, weight } => (false, slots, if weight == 1 { 0 } else { weight }),
        };
        Owner {
            shared,
            slots,
            weight,
            key: key.map(Into::into),
            uid: request.uid,
            protocol: request.terms.protocol,
            mode: asked.map_or(Mode::Once, |asked| asked.mode),
            who: asked.map(|asked| asked.who.clone()).unwrap_or_default(),
            ..Owner::default()
        }
    }
}

/// An entry in the queue of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The last part of its key in etcd.
    pub entry_key: EntryKey,
    /// When it was made. It is the token of the hold.
    pub revision: Revision,
    /// Who it belongs to. `None`: to another program than kmutex.
    pub owner: Option<Owner>,
}

impl Entry {
    /// Returns with whom it shares the lock. An entry of another program is exclusive.
    pub fn sharing(&self) -> Sharing {
        match &self.owner {
            Some(Owner { shared: true, .. }) => Sharing::Shared,
            Some(Owner { slots, weight, .. }) if *slots > 1 => {
                Sharing::Slots { slots: *slots, weight: (*weight).max(1) }
            }
            _ => Sharing::Exclusive,
        }
    }
}

/// Returns how many of the entries of a line hold, which are the first ones.
pub fn holding(line: impl IntoIterator<Item = Sharing>) -> usize {
    let mut holding = 0;
    // All holders are of one kind.
    let mut together = None;
    for sharing in line {
        if sharing.verdict(together) != Verdict::Admitted {
            break;
        }
        holding += 1;
        together = Some(match (sharing, together) {
            (Sharing::Slots { slots, weight }, Some(Sharing::Slots { weight: taken, .. })) => {
                Sharing::Slots { slots, weight: weight.saturating_add(taken) }
            }
            _ => sharing,
        });
    }
    holding
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}
