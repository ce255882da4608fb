//! Who may be overtaken: in a critical section while another host has the lock. A lock with a lease can promise that it is
//! alone only to those who can be told when that is over; what they write to must look at the tokens to turn the others
//! away. There are two kinds of those others here, and each is excused no further than its reason goes:
//!
//! - A command whose `kmutex run` was killed. Its daemon keeps the lock for it as long as the lease lives, and when it does
//!   not, nobody is left to stop the command. It may be overtaken once its host has lost the lease.
//! - A client of protocol 1 whose daemon is stopped. It hears of a loss by the end of its connection, which a stopped
//!   daemon cannot close. It may be overtaken while the daemon is stopped, after the lease has run out; when the daemon
//!   goes on, that client has to stop.
//!
//! Nobody else is excused: neither is a command under `kmutex run`, whatever becomes of the daemon, nor a client of
//! protocol 1 whose daemon is killed or cut off.

use crate::checker::Section;
use crate::host::{Ailment, Host, Spell};

/// What the checker must know of a client.
#[derive(Clone, Copy)]
pub struct Life<'a> {
    pub host: &'a Host,
    pub speaker: Speaker,
    /// When its `kmutex run` was killed, if it was.
    pub orphaned: Option<f64>,
}

/// Who asks for the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    KmutexRun,
    Protocol1,
    Etcdctl,
}

/// How long before its end a lease is not relied on any more (a quarter of it).
const MARGIN: f64 = crate::TTL_SECS as f64 / 4.0;
/// The pause between two keep-alives (a third of it): so much later a daemon may hear that its lease is gone.
const PERIOD: f64 = crate::TTL_SECS as f64 / 3.0;
/// How long a daemon that runs again may take to find out what it has lost: until etcd answers it, which may itself be
/// away for the length of a fault.
const FINDING_OUT: f64 = 2.0 * crate::TTL_SECS as f64 + 4.0;
/// How long a client of protocol 1 may take to see that its connection has ended.
const NOTICING: f64 = 0.5;

/// Why `next` may have entered while `first` was inside, if it may.
pub fn excuse(first: &Section<'_>, life: Life<'_>, next: &Section<'_>) -> Option<&'static str> {
    let spells = life.host.spells();
    // Not before the lease can have run out, which was relied on when the spell began.
    let is_over_since = |spell: &&Spell| spell.from + MARGIN <= next.entered;
    let at_next = || spells.iter().filter(is_over_since).filter(|spell| next.entered <= spell.to);
    if life.speaker == Speaker::Protocol1 {
        let stopped = at_next().find(|spell| spell.what == Ailment::Stopped)?;
        return (first.left <= stopped.to + NOTICING).then_some("a client that cannot be told is overtaken");
    }
    life.orphaned?;
    // The first loss after it entered: that of the lease under which it did.
    let loss = life.host.loss_after(first.entered)?;
    let was_told_in_time = next.entered >= loss - PERIOD;
    let could_not_be_told = || {
        let mut before = spells.iter().filter(is_over_since);
        before.any(|spell| next.entered <= loss && loss <= spell.to + FINDING_OUT)
    };
    (was_told_in_time || could_not_be_told()).then_some("a command without its kmutex is overtaken")
}
