//! What the daemon logs. Start and stop are `info`; what concerns one client is `debug`.

use log::{debug, log_enabled};

use super::lookup::Lookup;
use crate::proto::Outcome;
use crate::table::{ClientId, Notification, NotificationKind};

/// Logs what a client is about to be told.
pub(super) fn notification(lookup: Lookup<'_>, notification: Notification) {
    let (client, lock) = (lookup.client_name(notification.client), lookup.lock_name(notification.lock));
    match notification.kind {
        NotificationKind::Granted(token) => debug!("grant: {lock} to {client}, token {token}"),
        NotificationKind::Waiting { ahead, .. } => debug!("wait: {client} for {lock}, behind {ahead}"),
        NotificationKind::Finished(outcome, token) => {
            debug!("finished: {lock}, token {token}: {outcome}, told {client}")
        }
        NotificationKind::Busy => debug!("busy: {lock}, told {client}"),
        NotificationKind::Unavailable => debug!("unavailable: {lock}, told {client}"),
        NotificationKind::HeldAbove => {
            debug!("refused: {client} runs under the lock {lock} that it asks for")
        }
        NotificationKind::Deadlock(_) => debug!("refused: {client} waiting for {lock} would be a deadlock"),
        NotificationKind::Expired => debug!("expire: {lock}, held by {client}"),
        NotificationKind::Lost(why) => debug!("lost: {lock}, told {client}: {why:?}"),
        NotificationKind::Superseded => debug!("resume: {lock}, no longer by {client}"),
    }
}

/// Logs that a client releases the lock that it holds.
pub(super) fn release(lookup: Lookup<'_>, client: ClientId, outcome: Outcome) {
    if let Some((lock, _)) = lookup.table.request_of(client) {
        debug!("release: {} by {}: {outcome}", lookup.lock_name(lock.id()), lookup.client_name(client));
    }
}

/// Returns `true` if [`notification`] and [`release`] have any effect.
pub(super) fn is_verbose() -> bool {
    log_enabled!(log::Level::Debug)
}
