//! What the daemon logs. Start and stop are `info`; what concerns one client is `debug`.

use log::{debug, log_enabled};

use super::server::Server;
use crate::proto::Outcome;
use crate::table::{ClientId, Effect, What};

impl Server {
    pub(super) fn log(&self, effect: Effect) {
        if !log_enabled!(log::Level::Debug) {
            return;
        }
        let (client, lock) = (self.name(effect.client), self.lock_name(effect.lock));
        match effect.what {
            What::Granted(token) => debug!("grant: {lock} to {client}, token {token}"),
            What::Waiting { ahead, .. } => debug!("wait: {client} for {lock}, behind {ahead}"),
            What::Finished(outcome, token) => {
                debug!("finished: {lock}, token {token}: {outcome}, told {client}")
            }
            What::Busy => debug!("busy: {lock}, told {client}"),
            What::Unavailable => debug!("unavailable: {lock}, told {client}"),
            What::HeldAbove => debug!("refused: {lock} is held above {client}"),
            What::Deadlock(_) => debug!("refused: {client} would wait for ever for {lock}"),
            What::Expired => debug!("expire: {lock}, held by {client}"),
            What::Lost(why) => debug!("lost: {lock}, told {client}: {why:?}"),
            What::Superseded => debug!("resume: {lock}, no longer by {client}"),
        }
    }

    pub(super) fn log_release(&self, client: ClientId, outcome: Outcome) {
        if !log_enabled!(log::Level::Debug) {
            return;
        }
        if let Some((lock, _)) = self.table.request_of(client) {
            debug!("release: {} by {}: {outcome}", self.lock_name(lock.id()), self.name(client));
        }
    }

    /// A client, for the log.
    pub(super) fn name(&self, client: ClientId) -> String {
        match self.connections.get(client.0 as usize).and_then(|connection| connection.peer()) {
            Some(peer) => format!("client {} (pid {}, uid {})", client.0, peer.pid, peer.uid),
            None => format!("client {}", client.0),
        }
    }
}
