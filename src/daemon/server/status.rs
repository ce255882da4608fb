//! Statuses: lists of locks, sent to a client piece by piece as it reads them.

use std::collections::btree_map::Entry;

use super::Server;
use crate::daemon::listing::{Listing, Step};
use crate::daemon::lookup::Viewer;
use crate::daemon::remote::RemoteRequest;
use crate::proto::Key;
use crate::proto::v2::{Answer, ErrorCode, LockStatus, encode};
use crate::table::ClientId;

/// A status continues when less output than this waits to be sent. One lock of it may be as long as a frame.
const STATUS_BYTES_AHEAD: usize = 16 * 1024;
const STATUS_UNDER_WAY: &str = "status: this connection is being sent one already";

impl Server {
    pub(super) fn viewer(&self, client: ClientId) -> Viewer {
        Viewer::new(self.connections[client].uid(), self.shows_commands)
    }

    pub(super) fn status_of(&mut self, client: ClientId, key: &Key) {
        if self.cluster.is_some() && !self.table.knows_runs(key.id()) {
            return self.request_remote(client, RemoteRequest::Status { key: key.clone() });
        }
        self.answer_status_of(client, key);
    }

    pub(super) fn answer_status_of(&mut self, client: ClientId, key: &Key) {
        let (lookup, viewer) = (self.lookup(), self.viewer(client));
        if let Some(status) = lookup.status_of(viewer, key) {
            self.connections.answer(client, &Answer::Lock(status));
        }
        self.connections.answer(client, &Answer::End);
    }

    pub(super) fn status(&mut self, client: ClientId) {
        let connection = &mut self.connections[client];
        if connection.status().is_some() {
            return self.refuse(client, ErrorCode::WrongState, STATUS_UNDER_WAY);
        }
        connection.set_status(Some(0));
        self.connections.mark_dirty(client);
    }

    /// Lists the locks of all hosts, or only the lock of `key`.
    pub(super) fn status_of_cluster(&mut self, client: ClientId, key: Option<&Key>) {
        if self.cluster.is_none() {
            let message = "status: this daemon does not share its locks with other hosts";
            return self.refuse(client, ErrorCode::BadRequest, message);
        }
        match self.listings.entry(client) {
            Entry::Occupied(_) => self.refuse(client, ErrorCode::WrongState, STATUS_UNDER_WAY),
            Entry::Vacant(entry) => {
                entry.insert(Listing::new());
                self.request_remote(
                    client,
                    match key {
                        Some(key) => RemoteRequest::Show { lock: key.id() },
                        None => RemoteRequest::List { from: Vec::new() },
                    },
                );
            }
        }
    }

    /// Writes as much of a status as there is room for: the daemon must not keep all of it in memory for a client that
    /// reads slowly.
    /// Returns `true` if it has written something.
    pub(super) fn continue_status(&mut self, client: ClientId) -> bool {
        let before = self.connections[client].output().len();
        while !self.connections[client].closing
            && self.connections[client].output().len() < STATUS_BYTES_AHEAD
            && let Some(status) = self.next_lock(client)
        {
            let answer = status.map_or(Answer::End, Answer::Lock);
            encode(&answer, self.connections[client].output());
        }
        self.connections[client].output().len() > before
    }

    /// Returns the next lock of a status, or `Some(None)` once at its end, or `None` if there is nothing to send now.
    fn next_lock(&mut self, client: ClientId) -> Option<Option<LockStatus>> {
        if let Some(listing) = self.listings.get_mut(&client) {
            match listing.step() {
                Step::Send(mut status) => {
                    self.viewer(client).conceal_remote(&mut status);
                    return Some(Some(*status));
                }
                Step::Request(from) => self.request_remote(client, RemoteRequest::List { from }),
                Step::Wait => {}
                Step::End => {
                    self.listings.remove(&client);
                    return Some(None);
                }
            }
        }
        let cursor = self.connections[client].status()?;
        let next = self.table.next_lock(cursor as usize);
        let (lock, status) = match next {
            Some((lock, next)) => {
                (Some(self.lookup().lock_status(self.viewer(client), &lock, lock.key())), Some(next as u32))
            }
            None => (None, None),
        };
        self.connections[client].set_status(status);
        Some(lock)
    }

    /// Returns `true` if part of a status can be sent as soon as the client has read what it was sent.
    pub(super) fn has_more_status(&self, client: ClientId) -> bool {
        self.connections[client].status().is_some()
            || self.listings.get(&client).is_some_and(Listing::is_ready)
    }
}
