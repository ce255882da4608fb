//! What the loop and the clustering say to each other about the locks of other hosts.

use super::connection::ConnectionId;
use super::listing::Page;
use crate::journal::ClusterLease;
use crate::proto::v2::{Answer, ShortText};
use crate::proto::{Key, LockId, Token};
use crate::table::Run;

/// What a client wants of etcd.
#[derive(Debug)]
#[cfg_attr(not(feature = "etcd"), expect(dead_code, reason = "without etcd, it is never read"))]
pub(super) enum RemoteRequest {
    /// Read the locks of all hosts, from this key on; an empty key means from the beginning.
    List { from: Vec<u8> },
    /// Read who holds this lock, and who waits for it.
    Show { lock: LockId },
    /// Read the runs of the lock with this key that count, and then answer with its status.
    Status { key: Key },
    /// Forget the runs of this lock: all of them, or only if they have these tokens.
    Forget { lock: LockId, may: Option<Vec<Token>> },
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
    /// Answer this client, if it is still connected, with the status of one lock.
    Status { to: ConnectionId, key: Key },
    /// Send this page of a listing to this client, if it is still connected; or tell it why etcd did not give one.
    Page { to: ConnectionId, page: Result<Page, String> },
}

/// The result of a run on another host.
#[derive(Debug)]
pub(super) struct RemoteResult {
    /// The token that clients are about to be told with it.
    pub(super) token: Token,
    /// Stands for the user who may have it.
    pub(super) sharer: u64,
    /// A row of pieces, or why there is none.
    pub(super) content: Result<Box<[u8]>, ShortText>,
    /// The run, if it counts for later requests.
    pub(super) run: Option<Run>,
}

/// Why a client may not forget a run.
pub(super) const FORGET_REFUSED: &str =
    "forget: only root, the daemon's user and the user who ran it may do this";
