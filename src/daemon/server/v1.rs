//! Protocol 1 in the daemon: its bytes to the table, and the table's effects to its bytes.

use super::{Server, v2};
use crate::daemon::admission::Access;
use crate::daemon::log;
use crate::proto::v1::{OWNER, RELEASE, Request, State, decode, foreign};
use crate::proto::{LockId, Outcome, v2::PREAMBLE};
use crate::table::{ClientId, Notification, NotificationKind};

impl Server {
    /// Takes one message from the front of `input`. Returns `false` if there is no whole one.
    pub(super) fn received_v1(&mut self, client: ClientId, input: &mut &[u8]) -> bool {
        let state = self.table.state(client);
        if state == State::Idle
            && let Some(what) = foreign(input)
        {
            self.foreign(client, what);
            return false;
        }
        let Some(request) = decode(state, input) else { return false };
        match request {
            Request::Lock(LockId(PREAMBLE)) => {
                self.connections[client].begin_v2();
                self.connections.answer(client, &v2::hello(self.stated_peer_timeout(client)));
                if let Access::None(limit) = self.connections[client].access {
                    self.too_many(client, limit);
                }
            }
            // Protocol 1 has no word for it.
            Request::Lock(_) if self.connections[client].access != Access::Full => {
                self.close_after_flush(client, "too many connections");
            }
            // Reserved keys belong to users, and this protocol says nothing of users.
            Request::Lock(lock) if self.is_reserved_by_id(lock) || !self.may_lock_by_id(client, lock) => {
                self.close_after_flush(client, "not permitted");
            }
            Request::Lock(lock) if self.presume_held(lock, true).is_err() => {
                self.close_after_flush(client, "cannot be decided yet");
            }
            Request::Lock(lock) => {
                self.connections[client].speaks_v1();
                self.apply(|table, now, effects| table.lock_v1(now, client, lock, effects));
            }
            Request::Release => {
                if log::is_verbose() {
                    log::release(self.lookup(), client, Outcome::Unknown);
                }
                self.apply(|table, now, effects| table.release(now, client, Outcome::Unknown, effects));
            }
            Request::Violation => self.close_after_flush(client, "protocol violation"),
        }
        true
    }

    fn is_reserved_by_id(&self, lock: LockId) -> bool {
        lock.is_reserved() || self.reservations.exclude_protocol_1()
    }

    pub(super) fn notify_v1(&mut self, notification: Notification) {
        let byte = match notification.kind {
            NotificationKind::Granted(_) => OWNER,
            NotificationKind::Finished(..) => RELEASE,
            // Protocol 1 cannot express these: the client gets no answer yet, or its connection is closed.
            NotificationKind::Waiting { .. }
            | NotificationKind::Offered
            | NotificationKind::Busy
            | NotificationKind::Unavailable
            | NotificationKind::HeldAbove
            | NotificationKind::Deadlock(_)
            | NotificationKind::Expired
            | NotificationKind::Fresh(_)
            | NotificationKind::NewerRequest
            | NotificationKind::Stop
            | NotificationKind::SlotsDiffer { .. }
            | NotificationKind::Superseded => return,
            NotificationKind::Lost(loss) => {
                return self.close_after_flush(notification.client, v2::describe_loss(loss));
            }
        };
        self.connections[notification.client].output().push(byte);
        self.connections.mark_dirty(notification.client);
    }
}
