//! What must hold of the table's own parts, whatever has happened to it.

use super::{Stage, Table, Timestamp};

impl Table {
    /// Panics when the table's parts contradict each other.
    pub fn audit(&self) {
        let requests = self.store.audit();
        let without_client = requests.iter().filter(|(_, request)| request.client().is_none());
        let remote = requests
            .iter()
            .filter(|(id, request)| self.store[request.lock].extra().remote_holder == Some(*id));
        assert_eq!(
            without_client.count(),
            self.orphans.len() + remote.count(),
            "a request has no client, and no reason for that"
        );
        for (token, id) in &self.orphans {
            assert_eq!(self.store.token_of(*id), Some(*token), "an orphan does not hold");
        }
        for (token, id) in self.holders.iter() {
            assert_eq!(self.store.token_of(id), Some(token), "a token names a request that does not hold");
        }
        let mut limited = 0;
        for (id, request) in requests {
            let is_limited = request.deadline != Timestamp::NEVER;
            let is_offered = matches!(request.stage, Stage::Offered(_));
            let replaces = request.asked().is_some_and(|asked| asked.replace_after_ms.is_some());
            assert!(
                !is_limited || request.token().is_some() || is_offered || replaces,
                "a request that does not hold has a deadline"
            );
            assert!(
                !is_limited || self.deadlines.contains(&(request.deadline, id)),
                "a hold has no deadline"
            );
            limited += usize::from(is_limited);
        }
        assert_eq!(limited, self.deadlines.len(), "a deadline outlives its hold");
    }
}
