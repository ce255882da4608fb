//! Which clients may be in a critical section while another host has the lock. A lock with a lease can exclude others only
//! until the lease ends, so its holder must be told then; a client that cannot be told is turned away by the resource, which
//! compares the tokens. Two kinds of clients cannot be told here, and an overlap is permitted no longer than that lasts:
//!
//! - A command whose `kmutex run` was killed. Its daemon keeps the lock for it while the lease lives. When the lease is lost,
//!   no process is left to stop the command. Another client may overlap it once its host has lost the lease.
//! - A client of protocol 1 whose daemon is stopped. The daemon announces a loss by closing the connection, which a stopped
//!   daemon cannot do. Another client may overlap it while the daemon is stopped, after the lease has run out; when the
//!   daemon continues, the client must stop.
//!
//! No other overlap is permitted: not with a command under `kmutex run`, whatever happens to the daemon, nor with a client
//! of protocol 1 whose daemon is killed or cut off.

use crate::checker::Section;
use crate::host::{HostFault, Outage};

/// What the checker must know about a client.
#[derive(Clone, Debug)]
pub struct Life {
    pub speaker: Speaker,
    /// Its `kmutex run` was killed.
    pub is_orphan: bool,
    /// What was wrong with its host.
    pub outages: Vec<Outage>,
    /// When its host's daemon said that what it held is lost, in order.
    pub losses: Vec<f64>,
}

/// The kind of client.
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

/// Returns why `next` may have entered while `first` was inside, or `None` if it may not.
pub fn permit(first: &Section<'_>, life: &Life, next: &Section<'_>) -> Option<&'static str> {
    let outages = &life.outages;
    // Not before the lease can have run out, which was relied on when the outage began.
    let is_over_since = |outage: &&Outage| outage.from + MARGIN <= next.entered;
    let at_next = || outages.iter().filter(is_over_since).filter(|outage| next.entered <= outage.to);
    if life.speaker == Speaker::Protocol1 {
        let stopped = at_next().find(|outage| outage.what == HostFault::Stopped)?;
        return (first.left <= stopped.to + NOTICING).then_some("a client that cannot be told is overtaken");
    }
    if !life.is_orphan {
        return None;
    }
    // The first loss after it entered: that of the lease under which it did.
    let loss = life.losses.iter().copied().find(|&loss| loss > first.entered)?;
    let was_told_in_time = next.entered >= loss - PERIOD;
    let could_not_be_told = || {
        let mut before = outages.iter().filter(is_over_since);
        before.any(|outage| next.entered <= loss && loss <= outage.to + FINDING_OUT)
    };
    (was_told_in_time || could_not_be_told()).then_some("a command without its kmutex is overtaken")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::check_except;

    const FROM: f64 = 100.0;
    const TO: f64 = 106.0;

    /// A client on a host with this fault from 100 to 106 is inside from 99 on, and another client enters.
    fn is_permitted(fault: HostFault, speaker: Speaker, is_orphan: bool, times: [f64; 3]) -> bool {
        let [entered, left, lost] = times;
        let outages = vec![Outage { what: fault, from: FROM, to: TO }];
        let life = Life { speaker, is_orphan, outages, losses: vec![50.0, lost] };
        let log = format!(
            "enter a k exclusive - 1 99\nenter b k exclusive - 2 {entered}\n\
             leave a k exclusive - 1 {left}\nleave b k exclusive - 2 200\n"
        );
        check_except(&log, |first, next| permit(first, &life, next).is_some()).is_ok()
    }

    #[test]
    fn a_client_of_protocol_1_may_be_overlapped_while_its_daemon_is_stopped() {
        let is = |fault, times| is_permitted(fault, Speaker::Protocol1, false, times);
        assert!(is(HostFault::Stopped, [104.0, 106.1, 106.0]));
        assert!(!is(HostFault::Stopped, [100.5, 106.1, 106.0]), "the lease was relied on");
        assert!(!is(HostFault::Stopped, [106.2, 106.3, 106.0]), "it could be told");
        assert!(!is(HostFault::Stopped, [104.0, 107.0, 106.0]), "it was told");
        for other in [HostFault::Cut, HostFault::Dead] {
            assert!(!is(other, [104.0, 106.1, 106.0]), "{other:?}");
        }
    }

    #[test]
    fn a_command_without_its_kmutex_may_be_overlapped_when_the_lease_is_lost() {
        let is = |is_orphan, times| is_permitted(HostFault::Cut, Speaker::KmutexRun, is_orphan, times);
        assert!(is(true, [104.0, 110.0, 103.0]));
        assert!(is(true, [104.0, 110.0, 106.5]), "the daemon finds out later");
        assert!(!is(true, [100.5, 110.0, 103.0]), "the lease was relied on");
        assert!(!is(true, [104.0, 110.0, 60.0]), "nothing was lost");
        assert!(!is(true, [104.0, 110.0, 130.0]), "that was another loss");
        assert!(!is(false, [104.0, 110.0, 103.0]), "it has its kmutex");
    }

    #[test]
    fn etcdctl_may_never_be_overlapped() {
        for fault in [HostFault::Stopped, HostFault::Cut, HostFault::Dead] {
            assert!(!is_permitted(fault, Speaker::Etcdctl, false, [104.0, 106.1, 103.0]));
        }
    }
}
