//! What the daemon logs. Start and stop are `info`; what concerns one client is `debug`.

use log::{debug, log_enabled};

use super::lookup::Lookup;
use crate::proto::Outcome;
use crate::table::{ClientId, Effect, What};

/// Logs what a client is about to be told.
pub(super) fn notification(lookup: Lookup<'_>, effect: Effect) {
    let (client, lock) = (lookup.client_name(effect.client), lookup.lock_name(effect.lock));
    match effect.what {
        What::Granted(token) => debug!("grant: {lock} to {client}, token {token}"),
        What::Waiting { ahead, .. } => debug!("wait: {client} for {lock}, behind {ahead}"),
        What::Finished(outcome, token) => {
            debug!("finished: {lock}, token {token}: {outcome}, told {client}")
        }
        What::Busy => debug!("busy: {lock}, told {client}"),
        What::Unavailable => debug!("unavailable: {lock}, told {client}"),
        What::HeldAbove => debug!("refused: {client} runs under the lock {lock} that it asks for"),
        What::Deadlock(_) => debug!("refused: {client} waiting for {lock} would be a deadlock"),
        What::Expired => debug!("expire: {lock}, held by {client}"),
        What::Lost(why) => debug!("lost: {lock}, told {client}: {why:?}"),
        What::Superseded => debug!("resume: {lock}, no longer by {client}"),
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
