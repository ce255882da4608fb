//! Breaking a lock that another host holds: its place is removed from etcd, which its daemon sees, and tells the holder.

use log::warn;

use super::Server;
use super::link::Order;
use crate::etcd;
use crate::proto::Key;
use crate::proto::v2::{Answer, ErrorCode, error};
use crate::table::ClientId;

impl Server {
    /// Begins to break a lock that is not held here. The client is answered when etcd has.
    pub(in crate::daemon) fn break_elsewhere(&mut self, client: ClientId, key: &Key) {
        let generation = self.connections[client.0 as usize].generation;
        let name = self.name(client);
        let Some(sharing) = &mut self.sharing else { return };
        warn!("{name} breaks the lock {:?}, if another host holds it", key.as_str());
        let number = sharing.next_number();
        sharing.breaks.insert(number, (client, generation));
        sharing.link.order(Order::Break { number, lock: key.id() });
    }

    /// It is broken, or nobody held it (false), or it could not be done.
    pub(super) fn broken(&mut self, number: u64, broken: Result<bool, etcd::Error>) {
        let asked = self.sharing.as_mut().and_then(|sharing| sharing.breaks.remove(&number));
        let Some((client, generation)) = asked else { return };
        // Whoever asked may be gone.
        let connection = self.connections.get(client.0 as usize);
        if connection.is_none_or(|connection| connection.generation != generation) {
            return;
        }
        let answer = match broken {
            Ok(true) => Answer::Broken,
            Ok(false) => error(ErrorCode::NotHeld, "break: nobody holds this lock"),
            Err(e) => error(ErrorCode::Unavailable, format!("etcd: {e}")),
        };
        self.answer(client, &answer);
    }
}
