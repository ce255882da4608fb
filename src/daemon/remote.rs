//! What the loop and the clustering say to each other about the locks of other hosts.

use super::connection::ConnectionId;
use super::listing::Page;
use crate::journal::ClusterLease;
use crate::proto::LockId;
use crate::proto::v2::Answer;

/// What a client wants of etcd.
#[derive(Debug)]
#[cfg_attr(not(feature = "etcd"), expect(dead_code, reason = "without etcd, it is never read"))]
pub(super) enum RemoteRequest {
    /// Read the locks of all hosts, from this key on; an empty key means from the beginning.
    List { from: Vec<u8> },
    /// Read who holds this lock, and who waits for it.
    Show { lock: LockId },
    /// Take the lock from the host that holds it.
    Break { lock: LockId },
}

/// What the clustering wants of the loop.
#[derive(Debug)]
#[cfg_attr(not(feature = "etcd"), expect(dead_code, reason = "without etcd, nothing replies"))]
pub(super) enum RemoteReply {
    /// Record this lease, which the next daemon may resume; or that there is none to resume.
    RecordLease(ClusterLease),
    /// Answer this client, if it is still connected.
    Answer { to: ConnectionId, answer: Answer },
    /// Send this page of a listing to this client, if it is still connected; or tell it why etcd did not give one.
    Page { to: ConnectionId, page: Result<Page, String> },
}
