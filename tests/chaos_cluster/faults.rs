//! What goes wrong, and when: three series of faults, each shuffled by the seed, so that of each series one is under way at a
//! time. Everything is whole again when they end.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::Arena;
use crate::etcd_harness::copy_folder;
use crate::harness::wait_until;
use crate::host::{Host, HostFault};
use crate::net::Cut;
use crate::proxy::Manner;
use crate::record::now;
use crate::rng::Rng;
use crate::setbacks::Setback;
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
    /// The alarm NOSPACE is raised: what takes space is refused.
    NoSpace,
    /// All members start again with nothing.
    Emptied,
    /// All members start again with the data of some seconds before, as virtual machines that are rolled back.
    RolledBack,
}

/// A fault of what is between a host and etcd.
pub type ProxyFault = Manner;

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
    /// Those come first that no other test has beside other faults.
    pub const ALL: [EtcdFault; 8] = [
        EtcdFault::NoSpace,
        EtcdFault::Emptied,
        EtcdFault::RolledBack,
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
            EtcdFault::NoSpace => "fault: etcd has no space",
            EtcdFault::Emptied => "fault: etcd has lost everything",
            EtcdFault::RolledBack => "fault: etcd is rolled back",
        }
    }
}

impl ProxyFault {
    pub const ALL: [ProxyFault; 4] = [Manner::Slow, Manner::WebPage, Manner::Cuts, Manner::Forbids];

    pub fn name(self) -> &'static str {
        match self {
            Manner::Honest => unreachable!("that is no fault"),
            Manner::Slow => "fault: a proxy is slow",
            Manner::WebPage => "fault: a proxy answers with a web page",
            Manner::Cuts => "fault: a proxy cuts answers",
            Manner::Forbids => "fault: a user has no permission any more",
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

fn remove_folder(data: &Path) {
    fs::remove_dir_all(data).unwrap();
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
        // In a short test some of them have no turn: the first round is as they are listed.
        let mut round = EtcdFault::ALL;
        loop {
            for fault in round {
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
                    EtcdFault::NoSpace => self.fill(fault, &mut rng),
                    EtcdFault::Emptied => self.set_back(fault, remove_folder),
                    EtcdFault::RolledBack => self.roll_back(fault),
                }
            }
            round = shuffled(EtcdFault::ALL, &mut rng);
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

    /// Until it is over, one after the other.
    pub fn inject_proxy_faults(&self) {
        let mut rng = Rng(self.seed ^ 3);
        loop {
            for fault in shuffled(ProxyFault::ALL, &mut rng) {
                pass(Duration::from_millis(1000 + rng.below(4000)));
                if self.record.is_over() {
                    return;
                }
                self.begin(fault.name(), "of the host with proxies");
                self.proxies.set(fault);
                pass(Duration::from_millis(rng.below(TTL_SECS * 1000 + 2000)));
                self.proxies.set(Manner::Honest);
                self.end(fault.name(), "of the host with proxies");
            }
        }
    }

    fn fill(&self, fault: EtcdFault, rng: &mut Rng) {
        let etcd = self.etcd.lock().unwrap();
        self.begin(fault.name(), "");
        let body = r#"{"action":"ACTIVATE","alarm":"NOSPACE"}"#;
        let url = format!("{}/v3/maintenance/alarm", etcd.endpoints()[0]);
        let output = self.hosts[0].tool("curl").args(["-sS", "--fail", "-d", body, &url]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        pass(Duration::from_millis(1000 + rng.below(3000)));
        // An election may be under way.
        wait_until("the alarm to be over", || {
            etcd.etcdctl(&["alarm", "disarm"]).output().unwrap().status.success()
        });
        self.end(fault.name(), "");
    }

    fn roll_back(&self, fault: EtcdFault) {
        let copy = |data: &Path| data.with_extension("before");
        self.etcd.lock().unwrap().replace_all_data(|data| copy_folder(data, &copy(data)), || ());
        pass(Duration::from_secs(TTL_SECS / 2));
        self.set_back(fault, |data| {
            remove_folder(data);
            fs::rename(copy(data), data).unwrap();
        });
    }

    fn set_back(&self, fault: EtcdFault, change: impl FnMut(&Path)) {
        let mut etcd = self.etcd.lock().unwrap();
        self.begin(fault.name(), "");
        let killed = now();
        etcd.replace_all_data(change, || {
            // What was granted before has reached its clients.
            pass(Duration::from_secs(1));
            self.setbacks.lock().unwrap().push(Setback { killed, reborn: now() });
        });
        self.end(fault.name(), "");
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
