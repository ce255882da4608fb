//! A table whose promise is checked after each event: an exclusive lock has one holder.

use std::time::Duration;

use kmutex::proto::Token;
use kmutex::table::{ClientId, Config, Effects, Table, Timestamp};

pub const CLIENTS: u8 = 8;

pub struct Checked {
    pub table: Table,
    now: Timestamp,
}

impl Checked {
    pub fn new() -> Checked {
        let hold_limit = Some(Duration::from_secs(1));
        let config =
            Config { hash_key: 1, first_token: Token(1), hold_limit, is_clustered: false, remember_max: 5 };
        Checked { table: Table::new(config), now: Timestamp(0) }
    }

    /// One event, and the time that passes with it.
    pub fn feed(&mut self, event: impl FnOnce(&mut Table, Timestamp, &mut Effects)) {
        let mut effects = Effects::default();
        self.now = self.now.plus(Duration::from_millis(7));
        event(&mut self.table, self.now, &mut effects);
        if let Some(mark) = self.table.deferred() {
            self.table.settle(self.now, mark, &mut effects);
        }
        self.table.expire(self.now, &mut effects);
        self.check();
    }

    fn check(&self) {
        self.table.audit();
        let mut cursor = 0;
        while let Some((lock, next)) = self.table.next_lock(cursor) {
            let terms: Vec<_> =
                lock.holders().filter_map(|holder| holder.held).map(|held| held.terms).collect();
            assert_eq!(terms.len(), lock.holding() as usize);
            for one in &terms {
                let is_alone = !one.shared && one.slots == 1;
                assert!(!is_alone || terms.len() == 1, "{terms:?}");
            }
            cursor = next;
        }
    }

    /// All clients leave: nothing may be left of them.
    pub fn end(mut self) {
        for client in 0..CLIENTS {
            self.feed(|table, now, effects| table.disconnected(now, ClientId(client.into()), effects));
        }
        assert!(self.table.is_empty());
    }
}
