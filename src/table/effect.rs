//! What the table answers to an event: who is to be told what, and what is to be recorded before that.

use super::ClientId;
use crate::proto::{LockId, Outcome, Token};

/// What the caller has to do: tell `client` something about `lock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Who is to be told.
    pub client: ClientId,
    /// The lock that it asked for.
    pub lock: LockId,
    /// What.
    pub kind: NotificationKind,
}

/// What a client is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotificationKind {
    /// It holds the lock now.
    Granted(Token),
    /// It waits.
    Waiting {
        /// How many others of the queue come first; 0 for a once waiter.
        ahead: u32,
        /// Its place in the order of arrival, which it may name when it resumes.
        place: u64,
    },
    /// It may have the lock that it waits for, if it says soon that it still wants it ([`super::Table::take`]).
    Offered,
    /// The holder that it waited for is done. The client is idle again.
    Finished(Outcome, Token),
    /// The run with this token did the work recently enough for it: [`super::Table::last_runs`] has it. The client is idle
    /// again.
    Fresh(Token),
    /// A newer request waits in its place. The client is idle again.
    NewerRequest,
    /// It holds the lock, and a newer request asks it to stop and to release.
    Stop,
    /// Its request names a weight, and so does another client's, which says this number of slots. The client is idle again.
    SlotsDiffer {
        /// What the other client says.
        slots: u32,
        /// That client, if it is connected. `None` for a clustered lock: another host's, perhaps.
        other: Option<ClientId>,
    },
    /// The lock is held and it did not want to wait. The client is idle again.
    Busy,
    /// The lock is held by one under whose lock it asked, which waits for it in turn. The client is idle again.
    HeldAbove,
    /// It asked under this token, and would wait for one who waits for that: [`super::Table::cycle`] says for whom. The
    /// client is idle again.
    Deadlock(Token),
    /// It held the lock for longer than the limit: it is released, and the connection is to be closed.
    Expired,
    /// It holds the lock no more, or never did.
    Lost(Loss),
    /// It did not want to wait, and whether the lock is free cannot be told: the other hosts cannot be asked. The client
    /// is idle again.
    Unavailable,
    /// Its request is another connection's now; this one is to be closed.
    Superseded,
}

/// Why a holder's lock is not its any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The daemon knows nothing of the hold that is to be resumed: its journal was lost, or the hold has ended since.
    Unknown,
    /// A user broke the lock.
    Broken,
    /// It is not ours among the hosts any more, or may soon not be.
    LeaseLost,
}

/// What a change to the set of holds is, for the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalEntry {
    /// This client was granted a lock.
    Granted(ClientId),
    /// A hold is this client's now.
    Resumed(ClientId),
    /// The hold with this token has ended.
    Ended(Token),
    /// The run of this lock with this token is over, and counts for a while.
    Ran(LockId, Token),
    /// It does not count any more.
    RunForgotten(LockId, Token),
}

/// What the table answers to an event: what is to be recorded first, and what is to be told then. Kept by the caller,
/// so that the table need not allocate for each event.
#[derive(Debug, Default)]
pub struct Effects {
    /// To be carried out in order.
    pub notifications: Vec<Notification>,
    /// To be recorded before any of it is told.
    pub record: Vec<JournalEntry>,
    /// What the other hosts may have to be asked or told; only where there are some.
    pub notices: Vec<ClusterNotice>,
    /// The results that are not to be kept any more.
    pub results_gone: Vec<(LockId, Token)>,
    /// How many runs were forgotten, for lack of room, while they still counted.
    pub runs_dropped: usize,
}

/// What makes it necessary to look at how a lock stands among the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterNotice {
    /// A client asks for it, or has stopped asking.
    Needs(LockId),
    /// A hold of it here has ended so.
    Ended(LockId, Token, Outcome),
}
