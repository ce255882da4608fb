//! Holds whose client is gone: the process of a command, if it lives, keeps the lock.

use std::io;

use ::log::{debug, warn};

use super::Server;
use crate::addr::Reason;
use crate::daemon::log;
use crate::daemon::named::Named;
use crate::daemon::orphans::Successor;
use crate::daemon::processes::Liveness;
use crate::proto::Token;
use crate::table::ClientId;

impl Server {
    /// Notes the process that keeps a client's lock when the client is gone. A process outside of the namespace takes a
    /// descriptor, which counts as a connection of the client's user does.
    pub(super) fn set_child(&mut self, client: ClientId, child: Option<Named>) {
        let uid = self.peer_uid(client);
        if let Some(Named::Foreign(_)) = child {
            self.acceptor.admission.keep(uid);
        }
        if let Some(Named::Foreign(_)) = self.connections[client].set_child(child) {
            self.acceptor.forgotten(uid, &self.epoll);
        }
    }

    /// The client's stream has ended.
    pub(super) fn end_of_stream(&mut self, client: ClientId, why: &str) {
        if !self.connections[client].closing {
            self.hand_over_to_child(client);
            self.close_after_flush(client, why);
        }
    }

    /// The client's stream has ended, perhaps while it held a lock that its command has inherited. If the command lives,
    /// although no process has this connection any more (the command has closed it, or the lock was resumed since), the
    /// command keeps the lock.
    fn hand_over_to_child(&mut self, client: ClientId) {
        let Some(record) = self.lookup().record_of_client(client) else { return };
        let process = match self.connections[client].set_child(None) {
            None => return,
            Some(Named::Foreign(process)) => {
                // It counts from now on as the process of a holder that is not connected.
                self.acceptor.admission.release(record.held.uid);
                Ok(process)
            }
            Some(Named::Known(child)) => match Liveness::of_named(child) {
                Ok(Liveness::Alive(process)) => Ok(process),
                Ok(Liveness::Exited | Liveness::Unknown) => return,
                Err(e) => Err(e),
            },
        };
        let (token, uid) = (record.held.token, record.held.uid);
        self.table.detach(client);
        self.acceptor.admission.keep(uid);
        let name = self.connections.describe(client);
        match self.orphans.hand_over(record, process, &self.epoll) {
            Ok(()) => debug!("the command of {name} lives and keeps token {token}"),
            Err(e) => self.unwatched(token, uid, &e),
        }
    }

    /// The watched process of a holder has ended.
    pub(super) fn orphan_ready(&mut self, token: Token) {
        match self.orphans.process_exited(token, &self.epoll) {
            Ok(None) => {}
            Ok(Some(successor)) => self.succeeded(token, successor),
            Err(e) => self.unwatched(token, None, &e),
        }
    }

    /// Carries on with a hold whose client has ended.
    fn succeeded(&mut self, token: Token, successor: Successor) {
        match successor {
            Successor::Command => {}
            Successor::None => {
                debug!("the process of token {token} has ended");
                self.apply(|table, now, effects| table.orphan_ended(now, token, effects));
            }
            Successor::Unknown => self.table.limit_orphan(token, self.now.plus(self.grace)),
            Successor::Sought(record) => {
                let begun = self.search.begin(record, &self.epoll);
                self.searches_begun(begun);
            }
        }
    }

    /// A search for a command is over.
    pub(super) fn search_ready(&mut self) {
        let Some((token, found)) = self.search.ready() else { return };
        let begun = self.search.start_next();
        self.searches_begun(begun);
        // The hold may have been broken meanwhile.
        if self.orphans.record(token).is_some() {
            match found.and_then(|found| self.orphans.found(token, found, &self.epoll)) {
                Ok(successor) => self.succeeded(token, successor),
                Err(e) => self.unwatched(token, None, &e),
            }
        }
    }

    fn searches_begun(&mut self, begun: io::Result<()>) {
        if let Err(e) = begun {
            self.search.give_up().into_iter().for_each(|token| self.unwatched(token, None, &e));
        }
    }

    /// The process that keeps a lock cannot be watched, so its lock has a time limit from now on. (It is safer to hold a lock
    /// for too long than to grant it twice.)
    fn unwatched(&mut self, token: Token, uid: Option<u32>, error: &io::Error) {
        self.table.limit_orphan(token, self.now.plus(self.grace));
        if self.limiter.allows(log::Event::Unwatched, uid, self.now) {
            warn!("cannot watch the command of token {token}: {}", Reason(error));
        }
    }

    /// The holder that was not connected has come back, or its hold has ended.
    pub(super) fn forget_orphan(&mut self, token: Token) {
        if let Some(uid) = self.orphans.forget(token) {
            self.acceptor.forgotten(uid, &self.epoll);
        }
    }
}
