//! What the loop and the clustering say to each other.

use super::Server;
use super::flush::FLUSH_MAX;
use crate::daemon::listing::Listing;
use crate::daemon::remote::{RemoteReply, RemoteRequest};
use crate::proto::v2::{ErrorCode, error};
use crate::table::ClientId;

impl Server {
    /// Lets the clustering do what is due: handle what its threads report, give up what its lease no longer covers, and
    /// ask etcd what the table needs.
    pub(super) fn poll_cluster(&mut self) {
        if self.cluster.is_some() {
            self.poll_clustering();
        }
    }

    /// The same, of a daemon that has a clustering.
    fn poll_clustering(&mut self) {
        while let Some(cluster) = &mut self.cluster
            && let Some(replies) = cluster.poll(&mut self.table, self.now, &mut self.effects)
        {
            self.take_remote_results();
            self.dispatch_effects();
            replies.into_iter().for_each(|reply| self.remote_reply(reply));
            if self.is_over(FLUSH_MAX) {
                self.has_work = true;
                return;
            }
        }
    }

    fn remote_reply(&mut self, reply: RemoteReply) {
        match reply {
            RemoteReply::RecordLease(lease) => self.recorder.set_lease(lease),
            RemoteReply::Answer { to, answer } => {
                if let Some(client) = self.connections.find(to) {
                    self.connections.answer(client, &answer);
                }
            }
            RemoteReply::Status { to, key } => {
                if let Some(client) = self.connections.find(to) {
                    self.answer_status_of(client, &key);
                }
            }
            RemoteReply::Page { to, page } => {
                let Some(client) = self.connections.find(to) else { return };
                match page {
                    Ok(page) => {
                        self.listings.entry(client).or_insert_with(Listing::new).add(page);
                        self.connections.mark_dirty(client);
                    }
                    Err(message) => {
                        self.listings.remove(&client);
                        self.connections.answer(client, &error(ErrorCode::Unavailable, message));
                    }
                }
            }
        }
    }

    pub(super) fn request_remote(&mut self, client: ClientId, request: RemoteRequest) {
        let from = self.connections.id(client);
        if let Some(cluster) = &mut self.cluster {
            cluster.request(from, request);
        }
    }
}
