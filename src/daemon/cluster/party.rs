//! Holders and waiters on other hosts, as their entries in etcd describe them.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::cluster::Entry;
use crate::proto::Token;
use crate::proto::v2::LockUser;
use crate::table::Sharing;

/// A holder or waiter on another host.
pub(super) fn party(entry: &Entry) -> LockUser {
    let shared = entry.sharing() == Sharing::Shared;
    let owner = entry.owner.clone().unwrap_or_default();
    let mut who = owner.who;
    if !owner.host.is_empty() {
        who.host = owner.host;
    }
    // Its number says nothing of a user here, and its name may not be known there.
    if let (true, Some(uid)) = (who.user.is_empty(), owner.uid) {
        who.user = format!("uid {uid}").into();
    }
    if entry.owner.is_none() {
        who.note = "of another program".into();
    }
    LockUser {
        protocol: owner.protocol,
        uid: None,
        who,
        for_ms: if owner.since_ms == 0 { 0 } else { unix_ms().saturating_sub(owner.since_ms) },
        token: Some(Token(entry.revision.0 as u64)),
        mode: None,
        shared,
        orphan: false,
    }
}

/// Milliseconds since 1970, which hosts have about in common.
pub(super) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
