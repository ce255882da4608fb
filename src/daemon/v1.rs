//! Protocol 1 in the daemon: its bytes to the table, and the table's effects to its bytes.

use super::connection::Protocol;
use super::server::Server;
use super::v2;
use crate::proto::v1::{OWNER, RELEASE, Request, decode};
use crate::proto::{LockId, Outcome, v2::PREAMBLE};
use crate::table::{ClientId, Effect, What};

impl Server {
    /// Takes one message from the front of `input`. False: there is no whole one.
    pub(super) fn received_v1(&mut self, client: ClientId, input: &mut &[u8]) -> bool {
        let Some(request) = decode(self.table.state(client), input) else { return false };
        match request {
            Request::Lock(LockId(PREAMBLE)) => {
                self.connections[client.0 as usize].protocol = Protocol::V2 { status: None };
                self.answer(client, &v2::hello());
            }
            Request::Lock(lock) => {
                self.apply(|table, now, effects| table.lock_v1(now, client, lock, effects));
            }
            Request::Release => {
                self.log_release(client, Outcome::Unknown);
                self.apply(|table, now, effects| table.release(now, client, Outcome::Unknown, effects));
            }
            Request::Violation => self.close_after_flush(client, "it sent what it may not"),
        }
        true
    }

    pub(super) fn notify_v1(&mut self, effect: Effect) {
        let byte = match effect.what {
            What::Granted(_) => OWNER,
            What::Finished(..) => RELEASE,
            // Protocol 1 has no words for these: the answer does not come yet, or the connection ends.
            What::Waiting { .. }
            | What::Busy
            | What::Unavailable
            | What::HeldAbove
            | What::Deadlock(_)
            | What::Expired
            | What::Superseded => return,
            What::Lost(_) => return self.close_after_flush(effect.client, "its lock was broken"),
        };
        self.connections[effect.client.0 as usize].output().push(byte);
        self.mark_dirty(effect.client);
    }
}
