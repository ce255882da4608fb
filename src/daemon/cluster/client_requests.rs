//! What clients want to know or to have done in etcd: a listing, a status, a lock forgotten or broken.

use super::Clustering;
use super::events::{Command, Event, Reading};
use crate::daemon::connection::ConnectionId;
use crate::daemon::remote::{FORGET_REFUSED, RemoteReply, RemoteRequest};
use crate::proto::v2::{Answer, ErrorCode, error};
use crate::table::{Effects, Table, Timestamp};

impl Clustering {
    /// Asks etcd something for a client. [`Clustering::poll`] returns the answer.
    pub(in crate::daemon) fn request(&mut self, from: ConnectionId, request: RemoteRequest) {
        if !self.cluster.is_usable() && (self.cluster.is_away() || self.troubles.reason().is_some()) {
            let message = self.unavailable();
            self.replies.push(match request {
                RemoteRequest::List { .. } | RemoteRequest::Show { .. } => {
                    RemoteReply::Page { to: from, page: Err(message) }
                }
                // What is known here.
                RemoteRequest::Status { key } => RemoteReply::Status { to: from, key },
                RemoteRequest::Break { .. } | RemoteRequest::Forget { .. } => {
                    RemoteReply::Answer { to: from, answer: error(ErrorCode::Unavailable, message) }
                }
            });
            return;
        }
        let reading = match request {
            RemoteRequest::List { from } => Reading::Page(from),
            RemoteRequest::Show { lock } => Reading::Lock(lock),
            RemoteRequest::Status { key } => Reading::Runs(key),
            RemoteRequest::Forget { lock, may } => {
                return self.threads.command(Command::Forget { to: from, lock, may });
            }
            RemoteRequest::Break { lock } => return self.threads.command(Command::Break(from, lock)),
        };
        self.readings.push_back((from, Some(reading)));
        self.read_next();
    }

    /// A client has gone: what it wants to read need not be read any more.
    pub(in crate::daemon) fn forget(&mut self, client: ConnectionId) {
        self.readings.retain(|(from, reading)| *from != client || reading.is_none());
    }

    /// One reading is under way at a time.
    fn read_next(&mut self) {
        if let Some((to, reading)) = self.readings.front_mut()
            && let Some(reading) = reading.take()
        {
            self.threads.read(*to, reading);
        }
    }

    /// Returns what to tell the client that asked for this.
    pub(super) fn reply(
        &mut self,
        event: Event,
        table: &mut Table,
        now: Timestamp,
        effects: &mut Effects,
    ) -> Option<RemoteReply> {
        match event {
            Event::Page { to, page } => {
                self.readings.pop_front();
                self.read_next();
                Some(RemoteReply::Page { to, page: page.map_err(|e| format!("etcd: {e}")) })
            }
            Event::Runs { to, key, runs, .. } => {
                self.readings.pop_front();
                self.read_next();
                if let Some((revision, runs)) = runs {
                    self.cluster.runs_read(table, now, (key.id(), revision), runs, effects);
                }
                Some(RemoteReply::Status { to, key })
            }
            Event::Forgotten { to, lock, forgotten } => {
                let answer = match forgotten {
                    Ok(true) => {
                        table.forget(lock, effects);
                        Answer::Forgotten
                    }
                    Ok(false) => error(ErrorCode::NotPermitted, FORGET_REFUSED),
                    Err(e) => error(ErrorCode::Unavailable, format!("etcd: {e}")),
                };
                Some(RemoteReply::Answer { to, answer })
            }
            Event::Broken { to, broken } => {
                let answer = match broken {
                    Ok(true) => Answer::Broken,
                    Ok(false) => error(ErrorCode::NotHeld, "break: this lock is not held"),
                    Err(e) => error(ErrorCode::Unavailable, format!("etcd: {e}")),
                };
                Some(RemoteReply::Answer { to, answer })
            }
            _ => None,
        }
    }
}
