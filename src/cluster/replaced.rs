//! Requests of other hosts that replace the holders of this one.
//!
//! Such a request stands in the line behind the holders, and its entry says so. The host of a holder counts the time that the
//! request gives the holder, from when it sees the entry: the clocks of two hosts are never compared.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Entry, EntryKey};
use crate::table::{RequestView, Timestamp};

/// What an entry says of a request that replaces the holders before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replaces {
    /// The user of the request, as its host's kernel states it: only holders of the same user are stopped. Root's request
    /// stops all.
    pub uid: u32,
    /// How long it lets them go on, in milliseconds.
    pub after_ms: u64,
    /// The place of the request on its host: the time begins anew for another request.
    pub place: u64,
}

impl Replaces {
    /// Describes a request that replaces the holders. `None`: its user is not known, or it replaces none.
    pub(super) fn of((request, place): (RequestView<'_>, u64)) -> Option<Replaces> {
        Some(Replaces { uid: request.uid?, after_ms: request.asked?.replace_after_ms?, place })
    }
}

/// The request of another host that replaces the holders, and since when this host knows of it.
#[derive(Debug, Default)]
pub(super) struct Replaced(Option<(EntryKey, Replaces, Timestamp)>);

impl Replaced {
    /// These entries of other hosts wait. Of several that replace the holders, the last counts.
    pub(super) fn see<'a>(&mut self, waiting: impl Iterator<Item = &'a Entry>, now: Timestamp) {
        let replaces = |entry: &'a Entry| Some((&entry.entry_key, entry.owner.as_ref()?.replaces?));
        let last = waiting.filter_map(replaces).last();
        if last != self.0.as_ref().map(|(entry_key, replaces, _)| (entry_key, *replaces)) {
            self.0 = last.map(|(entry_key, replaces)| (entry_key.clone(), replaces, now));
        }
    }

    /// Returns the user for whose request the holders are to stop, when that is.
    pub(super) fn stop_at(&self) -> Option<(u32, Timestamp)> {
        let (_, replaces, since) = self.0.as_ref()?;
        Some((replaces.uid, since.plus(Duration::from_millis(replaces.after_ms))))
    }
}
