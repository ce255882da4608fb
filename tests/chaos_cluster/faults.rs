//! What goes wrong, and when: two series of faults, each shuffled by the seed, so that of each series one is under way at a
//! time. Everything is whole again when they end.

use std::time::Duration;

use crate::Arena;
use crate::host::{Host, HostFault};
use crate::net::Cut;
use crate::rng::Rng;
use crate::{HOSTS, TTL_SECS};

/// A fault of a daemon.
#[derive(Clone, Copy, Debug)]
pub enum DaemonFault {
    /// Killed, and started again soon.
    Killed,
    /// Killed, and started again when its lease is over.
    Away,
    /// Stopped for longer than its lease.
    Stopped,
}

/// A fault of etcd or of the network.
#[derive(Clone, Copy, Debug)]
pub enum EtcdFault {
    LeaderKilled,
    /// One that does not lead, for longer than a lease lasts.
    FollowerStopped,
    /// For long enough to lose the lead, and not for as long as a lease lasts. A leader that was stopped for longer would
    /// end leases when it wakes that have been kept alive elsewhere (etcd's issue 15247, mended in 3.4.31, which not all
    /// have yet): then no client of etcd can be told in time.
    LeaderStopped,
    /// A host is cut off for longer than its lease.
    LinkCut(Cut),
}

impl DaemonFault {
    pub const ALL: [DaemonFault; 4] =
        [DaemonFault::Killed, DaemonFault::Killed, DaemonFault::Away, DaemonFault::Stopped];

    pub fn name(self) -> &'static str {
        match self {
            DaemonFault::Killed => "fault: a daemon is killed",
            DaemonFault::Away => "fault: a daemon is killed and away",
            DaemonFault::Stopped => "fault: a daemon is stopped",
        }
    }
}

impl EtcdFault {
    pub const ALL: [EtcdFault; 5] = [
        EtcdFault::LeaderKilled,
        EtcdFault::FollowerStopped,
        EtcdFault::LeaderStopped,
        EtcdFault::LinkCut(Cut::Port),
        EtcdFault::LinkCut(Cut::Interface),
    ];

    pub fn name(self) -> &'static str {
        match self {
            EtcdFault::LeaderKilled => "fault: etcd's leader is killed",
            EtcdFault::FollowerStopped => "fault: a follower of etcd is stopped",
            EtcdFault::LeaderStopped => "fault: etcd's leader is stopped",
            EtcdFault::LinkCut(Cut::Port) => "fault: a host's port is down",
            EtcdFault::LinkCut(Cut::Interface) => "fault: a host's interface is down",
        }
    }
}

/// All of them, in an order of rng.
fn shuffled<T: Copy, const N: usize>(mut all: [T; N], rng: &mut Rng) -> [T; N] {
    for last in (1..N).rev() {
        all.swap(last, rng.below(last as u64 + 1) as usize);
    }
    all
}

/// As long as a lease lasts, and up to a second more.
fn past_a_lease(rng: &mut Rng) -> Duration {
    Duration::from_millis(TTL_SECS * 1000 + 200 + rng.below(1000))
}

/// The schedule is the one place where there is nothing to wait for but time.
fn pass(time: Duration) {
    std::thread::sleep(time);
}

impl Arena {
    fn begin(&self, name: &str, whose: &str) {
        self.record.note(&format!("{name} {whose}"));
        self.record.count(name);
    }

    fn end(&self, name: &str, whose: &str) {
        self.record.note(&format!("over: {name} {whose}"));
    }

    /// Returns a host with a client in a critical section, if there is one: a fault elsewhere proves little.
    fn any_host(&self, rng: &mut Rng) -> &Host {
        let busy = self.hosts_with_holders();
        let host = match busy.len() as u64 {
            0 => rng.below(HOSTS as u64) as usize,
            count => busy[rng.below(count) as usize],
        };
        &self.hosts[host]
    }

    /// Until it is over, one after the other.
    pub fn inject_daemon_faults(&self) {
        let mut rng = Rng(self.seed ^ 1);
        loop {
            for fault in shuffled(DaemonFault::ALL, &mut rng) {
                // At times one follows on the other.
                pass(Duration::from_millis(rng.below(2500)));
                if self.record.is_over() {
                    return;
                }
                self.inject_daemon_fault(fault, &mut rng);
            }
        }
    }

    fn inject_daemon_fault(&self, fault: DaemonFault, rng: &mut Rng) {
        let host = self.any_host(rng);
        let whose = format!("on host {}", host.number);
        self.begin(fault.name(), &whose);
        match fault {
            DaemonFault::Killed => {
                host.kill_daemon();
                pass(Duration::from_millis(rng.below(400)));
                host.revive_daemon();
            }
            DaemonFault::Away => {
                host.kill_daemon();
                pass(past_a_lease(rng));
                host.revive_daemon();
            }
            DaemonFault::Stopped => {
                host.stop_daemon();
                pass(past_a_lease(rng));
                host.continue_daemon();
            }
        }
        self.end(fault.name(), &whose);
    }

    /// Until it is over, one after the other.
    pub fn inject_etcd_faults(&self) {
        let mut rng = Rng(self.seed ^ 2);
        loop {
            for fault in shuffled(EtcdFault::ALL, &mut rng) {
                // Each election gives all leases their whole time again, also the leases of dead daemons. With an election
                // every few seconds, the locks of dead daemons would never be free.
                pass(Duration::from_millis(1500 + rng.below(3000)));
                if self.record.is_over() {
                    return;
                }
                match fault {
                    EtcdFault::LinkCut(how) => self.cut(fault, how, &mut rng),
                    EtcdFault::LeaderKilled => self.kill_leader(fault, &mut rng),
                    EtcdFault::FollowerStopped | EtcdFault::LeaderStopped => {
                        self.stop_member(fault, &mut rng);
                    }
                }
            }
        }
    }

    fn cut(&self, fault: EtcdFault, how: Cut, rng: &mut Rng) {
        let host = self.any_host(rng);
        let whose = format!("of host {}", host.number);
        self.begin(fault.name(), &whose);
        host.begin(HostFault::Cut);
        self.net.cut(host.number, how);
        pass(past_a_lease(rng));
        self.net.restore(host.number, how);
        host.end(HostFault::Cut);
        self.end(fault.name(), &whose);
    }

    fn kill_leader(&self, fault: EtcdFault, rng: &mut Rng) {
        let mut etcd = self.etcd.lock().unwrap();
        let leader = etcd.leader();
        let whose = format!("on host {leader}");
        self.begin(fault.name(), &whose);
        etcd.kill(leader);
        pass(Duration::from_millis(rng.below(3000)));
        etcd.restart(leader);
        self.end(fault.name(), &whose);
    }

    fn stop_member(&self, fault: EtcdFault, rng: &mut Rng) {
        let mut etcd = self.etcd.lock().unwrap();
        let leader = etcd.leader();
        let does_lead = matches!(fault, EtcdFault::LeaderStopped);
        let member = if does_lead { leader } else { (leader + 1 + rng.below(2) as usize) % HOSTS };
        let time = if does_lead { LEADER_STOP } else { past_a_lease(rng) };
        let whose = format!("on host {member}");
        self.begin(fault.name(), &whose);
        etcd.stop(member);
        pass(time);
        etcd.cont(member);
        self.end(fault.name(), &whose);
    }
}

/// A little longer than the others wait before they elect another (up to twice `--election-timeout`, which is a second),
/// and less than what is always left of a lease that is kept (two thirds).
const LEADER_STOP: Duration = Duration::from_millis(2200);
