//! Three hosts are clustered through etcd, everything fails all the time, and still no two clients that exclude each other
//! are in a critical section together.
//!
//! For a while (`KMUTEX_CHAOS_SECS`, 60), clients of all kinds and both protocols, and etcdctl, lock a few keys on all
//! hosts, and note in a log when they are inside; readers share one of the keys, and clients of different weights the slots
//! of another one. Each host has a network of its own, with its member of etcd. Daemons, members of etcd and links fail as
//! `faults.rs` says, etcd goes back or is full, and proxies lie to the last host; commands and their kmutex are killed too.
//! Then the checker of `tests/chaos` reads the log; `permitted_overlaps.rs` and `setbacks.rs` say which client may be
//! overtaken. `KMUTEX_CHAOS_SEED` plays a seed again, as far as the machine's own chance lets it.
#![cfg(feature = "etcd")]
#![allow(unreachable_pub)]

#[path = "../chaos/checker.rs"]
#[allow(dead_code)]
mod checker;
#[path = "../it/etcd_harness.rs"]
#[allow(dead_code)]
mod etcd_harness;
mod faults;
#[path = "../it/harness.rs"]
#[allow(dead_code)]
mod harness;
mod host;
mod net;
mod permitted_overlaps;
mod proxy;
#[path = "../chaos/record.rs"]
mod record;
#[path = "../../src/table/rng.rs"]
#[allow(dead_code)]
mod rng;
mod setbacks;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use kmutex::proto::Key;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use etcd_harness::Etcd;
use faults::{DaemonFault, EtcdFault, ProxyFault};
use harness::{KMUTEX, Process, TIMEOUT, wait_for, wait_until};
use host::{Host, HostFault};
use net::Net;
use permitted_overlaps::{Life, Speaker};
use proxy::Proxies;
use record::{CLIENT, Record, command_line, now, settings};
use rng::Rng;
use setbacks::{Party, Setback};

const HOSTS: usize = 3;
/// How many clients there are at a time on each host, and how many of them are sharers.
const CLIENTS: usize = 8;
const SHARERS: usize = 3;
/// The daemons' leases, in seconds. An election takes up to two of them.
const TTL_SECS: u64 = 4;
/// That of etcdctl.
const ETCDCTL_TTL_SECS: u64 = 6;
/// How long anybody may have to wait for an answer when nothing fails any more: others are in line, with long sections.
const ANSWER_WAIT: Duration = Duration::from_secs(60);

/// A kind of client: options for `kmutex run`, its key, what it may exit with besides, and how the checker is to see it.
struct Role {
    options: &'static [&'static str],
    key: &'static str,
    codes: &'static [i32],
    kind: &'static str,
}

const fn role(options: &'static [&'static str], key: &'static str, codes: &'static [i32]) -> Role {
    Role { options, key, codes, kind: "exclusive" }
}

/// One that is not alone.
const fn sharer(
    kind: &'static str,
    options: &'static [&'static str],
    key: &'static str,
    codes: &'static [i32],
) -> Role {
    Role { kind, ..role(options, key, codes) }
}

const ROLES: [Role; 11] = [
    role(&[], "a", &[79]),
    role(&[], "b", &[79]),
    role(&["--queue"], "a", &[]),
    role(&["--queue"], "b", &[]),
    role(&["--queue"], "c", &[]),
    role(&["--queue"], "d", &[]),
    role(&["--queue"], "e", &[]),
    role(&["--queue"], "p", &[]),
    // 69: etcd is away, and it does not wait.
    role(&["-n"], "d", &[75, 69]),
    role(&["-w", "1"], "a", &[75, 79]),
    role(&["-w", "1", "--queue"], "c", &[75]),
];
/// Those of the sharers, which would meet each other too rarely if they also stood in the lines of the other keys.
const ROLES_OF_SHARERS: [Role; 10] = [
    sharer("shared", &["--shared", "--queue"], "s", &[]),
    sharer("shared", &["--shared", "--queue"], "s", &[]),
    sharer("shared", &["--shared"], "s", &[79]),
    sharer("shared", &["--shared", "-n"], "s", &[75, 69]),
    role(&["--queue"], "s", &[]),
    sharer("slots4x1", &["--slots", "4", "--queue"], "n", &[]),
    sharer("slots4x2", &["--slots", "4", "--weight", "2", "--queue"], "n", &[]),
    sharer("slots4x3", &["--slots", "4", "--weight", "3", "--queue"], "n", &[]),
    sharer("slots4x2", &["--slots", "4", "--weight", "2", "-w", "1"], "n", &[75, 79]),
    role(&["-w", "1"], "n", &[75, 79]),
];
/// All their keys.
const KEYS: [&str; 8] = ["a", "b", "c", "d", "e", "n", "p", "s"];
/// Those whose sections are often longer than a lease, so that faults meet them.
const KEYS_OF_LONG: [&str; 5] = ["c", "d", "n", "p", "s"];
/// Those of readers and of slots.
const KEYS_OF_SHARERS: [&str; 2] = ["s", "n"];
/// For those of protocol 1, of which it takes some: they do not queue.
const KEYS_OF_V1: [&str; 4] = ["a", "b", "d", "p"];
/// For etcdctl.
const KEY_OF_ETCDCTL: &str = "e";

/// In this order they are dropped: what runs in a namespace before that.
struct Arena {
    hosts: Vec<Host>,
    etcd: Mutex<Etcd>,
    net: Net,
    /// Those between the last host's daemon and etcd.
    proxies: Proxies,
    seed: u64,
    /// When the store went back.
    setbacks: Mutex<Vec<Setback>>,
    record: Record,
    /// By name.
    clients: Mutex<BTreeMap<String, Client>>,
}

#[derive(Clone, Copy)]
struct Client {
    host: usize,
    speaker: Speaker,
    is_orphan: bool,
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    None,
    Kmutex,
    Command,
    Both,
}

impl Victim {
    fn draw(rng: &mut Rng) -> Victim {
        match rng.below(100) {
            0..8 => Victim::Kmutex,
            8..18 => Victim::Command,
            18..26 => Victim::Both,
            _ => Victim::None,
        }
    }
}

/// How long a section lasts.
fn draw_micros(key: &str, rng: &mut Rng) -> String {
    let long = if KEYS_OF_LONG.contains(&key) { 35 } else { 4 };
    let micros = match rng.below(100) {
        lot if lot < long => 1_000_000 + rng.below(4_000_000),
        lot if lot < 60 => 2_000 + rng.below(30_000),
        _ => 30_000 + rng.below(300_000),
    };
    micros.to_string()
}

impl Arena {
    /// One client after the other, until it is over.
    fn keep_busy(&self, number: usize) {
        let host = &self.hosts[number % HOSTS];
        let is_sharer = number / HOSTS < SHARERS;
        let mut rng = Rng(self.seed ^ ((number as u64 + 16) << 32));
        while !self.record.is_over() {
            std::thread::sleep(Duration::from_millis(rng.below(200)));
            let name = self.record.name();
            match rng.below(32) {
                _ if is_sharer => self.one_run(host, &name, &ROLES_OF_SHARERS, &mut rng),
                0..6 => self.one_of_protocol_1(host, &name, &mut rng),
                6 => self.one_etcdctl(host, &name, &mut rng),
                _ => self.one_run(host, &name, &ROLES, &mut rng),
            }
        }
    }

    fn is_born(&self, name: &str, host: &Host, speaker: Speaker) {
        let client = Client { host: host.number, speaker, is_orphan: false };
        self.clients.lock().unwrap().insert(name.into(), client);
    }

    fn one_run(&self, host: &Host, name: &str, roles: &[Role], rng: &mut Rng) {
        self.is_born(name, host, Speaker::KmutexRun);
        let role = &roles[rng.below(roles.len() as u64) as usize];
        let how = if rng.percent(25) { "stubborn" } else { "section" };
        let mut command = host.tool(KMUTEX);
        command.arg("run").args(role.options).args([role.key, "--", "perl", CLIENT, how]);
        command.arg(&self.record.log).args([name, role.key, role.kind, &draw_micros(role.key, rng)]);
        let began = now();
        let mut process = Process::spawn(command.stderr(Stdio::piped()).process_group(0));
        let victim = Victim::draw(rng);
        self.kill(victim, name, &mut process, rng);
        let Some(code) = self.outcome(name, &mut process) else { return };
        let said = process.stderr();
        self.record.count(format!("{:?} ends with {code}", role.options));
        let may_be = match code {
            0 | 74 => true,
            // Of another's command that was killed, only to be told: as its own.
            137 => victim != Victim::None,
            // The daemon was dead when the client began.
            69 if host.outages().iter().any(|s| s.what == HostFault::Dead && s.to >= began) => true,
            code => role.codes.contains(&code),
        };
        if !may_be {
            let what = format!("{name} {:?} on host {} ended with {code}: {said}", role.options, host.number);
            self.record.find(what);
        }
        if code == 79 {
            self.record.count("finished");
        }
        if code == 74 {
            self.record.count("lost");
            self.record.note(&format!("{name} on host {} has lost it: {}", host.number, said.trim()));
        }
    }

    /// Kills some of it: at any moment, while it starts, waits, holds or releases; or while the command runs.
    fn kill(&self, victim: Victim, name: &str, process: &mut Process, rng: &mut Rng) {
        if victim == Victim::None {
            return;
        }
        let mut command = None;
        if victim == Victim::Command || rng.percent(70) {
            let limit = Instant::now() + TIMEOUT;
            while command.is_none() && process.is_running() && Instant::now() < limit {
                std::thread::sleep(Duration::from_millis(2));
                command = command_of(process.pid()).filter(|pid| command_line(*pid).contains(name));
            }
        }
        std::thread::sleep(Duration::from_millis(rng.below(80)));
        if !process.is_running() {
            return;
        }
        self.record.note(&format!("{victim:?} of {name} is killed"));
        match victim {
            Victim::Kmutex => {
                self.clients.lock().unwrap().get_mut(name).unwrap().is_orphan = true;
                process.signal(Signal::SIGKILL);
            }
            Victim::Both => kill(Pid::from_raw(-process.pid().as_raw()), Signal::SIGKILL).unwrap(),
            Victim::Command => match command {
                // It may have ended by itself since it was looked at.
                Some(pid) => drop(kill(Pid::from_raw(pid), Signal::SIGKILL)),
                None => return,
            },
            Victim::None => unreachable!("seen to above"),
        }
        self.record.count(format!("killed: {victim:?}"));
    }

    fn one_of_protocol_1(&self, host: &Host, name: &str, rng: &mut Rng) {
        self.is_born(name, host, Speaker::Protocol1);
        let key = KEYS_OF_V1[rng.below(KEYS_OF_V1.len() as u64) as usize];
        let mut command = host.tool("perl");
        command.args([CLIENT, "sharer"]).arg(&self.record.log);
        command.args([name, key, "exclusive", &draw_micros(key, rng)]).arg(host.sock());
        let Some(code) = self.outcome(name, &mut Process::spawn(&mut command)) else { return };
        self.record.count(format!("protocol 1 ends with {code}"));
        if code == 74 {
            self.record.count("lost");
        }
        if ![0, 79, 74].contains(&code) {
            self.record.find(format!("{name} of protocol 1 ended with {code}"));
        }
    }

    /// A program that is not kmutex. It does not stop a command whose lease is over, so it is the command that does not
    /// go on for longer than the lease lasts at least, which etcdctl gets after this. Nor does it always find its way
    /// back after a fault; then it is killed.
    fn one_etcdctl(&self, host: &Host, name: &str, rng: &mut Rng) {
        self.is_born(name, host, Speaker::Etcdctl);
        let until = now() + ETCDCTL_TTL_SECS as f64 - 1.0;
        let lock = lock_of(KEY_OF_ETCDCTL);
        let mut command = host.etcdctl();
        command.args(["lock", &format!("--ttl={ETCDCTL_TTL_SECS}"), &lock, "perl", CLIENT, "guest"]);
        let micros = (2_000 + rng.below(300_000)).to_string();
        command.arg(&self.record.log).args([name, KEY_OF_ETCDCTL, "exclusive", &micros, &until.to_string()]);
        let mut process = Process::spawn(command.stderr(Stdio::null()));
        while process.is_running() && now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        if process.is_running() {
            let line = host.etcdctl().args(["get", "--prefix", "--sort-by=CREATE", &lock]).output().unwrap();
            self.record.note(&format!("{name} hangs: {:?}", String::from_utf8_lossy(&line.stdout)));
            self.record.count("etcdctl is stopped");
            // If it waits, it leaves the line: its place may last for long otherwise, since each election of etcd's gives
            // all leases their whole time again.
            process.signal(Signal::SIGTERM);
            let limit = now() + 3.0;
            while process.is_running() && now() < limit {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        if process.is_running() {
            process.signal(Signal::SIGKILL);
        }
        self.record.count(format!("etcdctl ends with {}", process.wait()));
    }

    /// Waits for the end of a client, which must come when nothing fails any more. (Before that there is no saying how long
    /// it takes: those before it hold for long, hosts come back at the end of the line, and each election of etcd's gives
    /// the places of the dead their whole time again.)
    fn outcome(&self, name: &str, process: &mut Process) -> Option<i32> {
        let mut limit = Instant::now() + ANSWER_WAIT;
        while process.is_running() {
            if !self.record.is_over() {
                limit = Instant::now() + ANSWER_WAIT;
            }
            if Instant::now() > limit {
                self.record.find(format!("{name} was not answered for {ANSWER_WAIT:?}"));
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(process.wait())
    }

    /// Returns the host of each client that is in a critical section.
    fn hosts_with_holders(&self) -> Vec<usize> {
        let log = self.record.read();
        let clients = self.clients.lock().unwrap();
        let inside = unended(&log).into_iter().filter(|(name, pid)| command_line(*pid).contains(name));
        inside.map(|(name, _)| clients[&name].host).collect()
    }

    /// Returns the whole log, when the last client has ended.
    fn whole_log(&self) -> String {
        let log = wait_for("the last to leave", || {
            let log = self.record.read();
            unended(&log).iter().all(|(name, pid)| !command_line(*pid).contains(name)).then_some(log)
        });
        for (name, pid) in unended(&log) {
            self.record.write(&format!("gone {name} - - - {pid}"));
        }
        self.record.read()
    }

    /// What was held when the store went back is lost, and not in silence: no command goes on under `kmutex run`.
    fn check_that_commands_were_stopped(&self, log: &str) {
        let clients = self.clients.lock().unwrap();
        let has_kmutex = |name: &str| {
            let client = clients[name];
            client.speaker == Speaker::KmutexRun && !client.is_orphan
        };
        for setback in self.setbacks.lock().unwrap().iter() {
            let end = setback.commands_are_dead_by();
            for section in checker::sections(log).unwrap() {
                let goes_on = section.entered < setback.killed && section.left > end;
                assert!(
                    !(goes_on && has_kmutex(section.name)),
                    "{section:?} goes on after the store went back: {setback:?}"
                );
            }
        }
    }

    fn a_setback_permits(
        &self,
        clients: &BTreeMap<String, Client>,
        first: &checker::Section<'_>,
        next: &checker::Section<'_>,
    ) -> bool {
        let party = |it: &checker::Section<'_>| {
            let Client { speaker, is_orphan, host } = clients[it.name];
            Party { speaker, is_orphan, outages: self.hosts[host].outages() }
        };
        let setbacks = self.setbacks.lock().unwrap();
        setbacks.iter().any(|setback| setback.permits((first, party(first)), (next, party(next))))
    }

    fn check(&self, log: &str) -> usize {
        let clients = self.clients.lock().unwrap();
        let may_overlap = |first: &checker::Section<'_>, next: &checker::Section<'_>| {
            let client = &clients[first.name];
            let host = &self.hosts[client.host];
            let (speaker, is_orphan) = (client.speaker, client.is_orphan);
            let life = Life { speaker, is_orphan, outages: host.outages(), losses: host.losses() };
            let permitted = permitted_overlaps::permit(first, &life, next).or_else(|| {
                let permits = self.a_setback_permits(&clients, first, next);
                permits.then_some("a host cannot know that the store went back")
            });
            if let Some(reason) = permitted {
                self.record.count(format!("permitted: {reason}"));
            }
            permitted.is_some()
        };
        checker::check_except(log, may_overlap).unwrap_or_else(|broken| {
            let excerpt = checker::excerpt(log, &broken);
            let time = |line: &str| line.rsplit(' ').next().and_then(|time| time.parse::<f64>().ok());
            let times: Vec<f64> = excerpt.lines().filter_map(time).collect();
            let (from, to) = (times[0] - 2.0, times[times.len() - 1] + 2.0);
            for host in &self.hosts {
                println!("--- host {}: {:?} ---\n{}", host.number, host.outages(), host.logged(from, to));
            }
            for word in broken.split(' ') {
                if let Some(client) = clients.get(word) {
                    println!(
                        "{word}: {:?} on host {}, orphan: {}",
                        client.speaker, client.host, client.is_orphan
                    );
                }
            }
            let faults: String =
                log.lines().filter(|line| line.contains("fault")).flat_map(|line| [line, "\n"]).collect();
            panic!("{broken}\n{faults}---\n{excerpt}")
        })
    }

    /// Nothing is stuck: every lock can be acquired on every host, and in the end all are free and no client waits.
    fn check_that_all_is_free(&self) {
        for host in &self.hosts {
            assert!(host.is_well(), "the daemon of host {} has ended", host.number);
            for key in KEYS {
                let run =
                    host.tool(KMUTEX).args(["run", "-w", "25", "--queue", key, "true"]).status().unwrap();
                assert_eq!(run.code(), Some(0), "{key} is stuck on host {}", host.number);
                let lock = host.etcdctl().args(["lock", &lock_of(key), "true"]).status().unwrap();
                assert!(lock.success(), "{key} is stuck for etcdctl: {lock}");
            }
        }
        for host in &self.hosts {
            for args in [&["status", "--json"][..], &["status", "--json", "--cluster"]] {
                wait_until("all locks to be free", || {
                    let output = host.tool(KMUTEX).args(args).output().unwrap();
                    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                    output.stdout.is_empty()
                });
            }
        }
        let etcd = self.etcd.lock().unwrap();
        let keys = || etcd.ctl(&["get", "--prefix", "--keys-only", "kmutex"]);
        // A sign of life stays for as long as its host's lease.
        let is_place =
            |key: &&str| !key.is_empty() && !key.ends_with(".done") && !key.starts_with("kmutex/hosts/");
        wait_until("etcd to have no place left", || keys().lines().filter(is_place).count() == 0);
    }

    /// A test in which something hardly ever happened has not tested that.
    fn check_that_it_happened(&self, span: Duration, log: &str, sections: usize) {
        let least = |what: &str, least: u64| {
            let count = self.record.counted(what);
            assert!(count >= least, "{what}: only {count} times");
        };
        let secs = span.as_secs();
        for fault in DaemonFault::ALL {
            least(fault.name(), secs / 60);
        }
        // A round of them takes longer than a minute.
        for fault in EtcdFault::ALL {
            least(fault.name(), secs / 120);
        }
        for fault in ProxyFault::ALL {
            least(fault.name(), secs / 60);
        }
        for victim in [Victim::Kmutex, Victim::Command, Victim::Both] {
            least(&format!("killed: {victim:?}"), secs / 60);
        }
        for what in ["lost", "finished", "protocol 1 ends with 0"] {
            least(what, secs / 60);
        }
        assert!(sections as u64 > secs / 3, "{sections} sections are too few to prove anything");
        for key in KEYS_OF_SHARERS {
            let count = checker::entered_beside_others(&checker::sections(log).unwrap(), key);
            println!("{count} entered {key} beside others");
            assert!(
                count as u64 >= secs / 20,
                "{count} beside others in {key} are too few to prove anything"
            );
        }
    }
}

/// What a lock is called in etcd.
fn lock_of(key: &str) -> String {
    format!("kmutex/{}", Key::new(key).unwrap().id())
}

/// The only child of a process, if it has one.
fn command_of(pid: Pid) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// Returns the clients that are inside according to a log, with their processes.
fn unended(log: &str) -> BTreeSet<(String, i32)> {
    let mut inside = BTreeSet::new();
    for line in log.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        if let ["enter" | "leave", name, _, _, _, pid, _] = words[..] {
            let one = (name.to_string(), pid.parse().unwrap());
            let _ = if words[0] == "enter" { inside.insert(one) } else { inside.remove(&one) };
        }
    }
    inside
}

/// Where everything is; what is in it is kept when the test fails.
struct Folder(TempDir);

impl Drop for Folder {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the logs are kept in {}", self.0.path().display());
            self.0.disable_cleanup(true);
        }
    }
}

#[test]
#[ignore = "needs root and etcd, and takes a minute: KMUTEX_CHAOS_SECS"]
fn no_client_enters_beside_another_on_clustered_hosts_whatever_fails() {
    let folder = Folder(tempfile::tempdir().unwrap());
    let (seed, span) = settings();
    let net = Net::new(HOSTS);
    let places: Vec<_> = (0..HOSTS).map(|host| net.place(host)).collect();
    let etcd = Etcd::spread(&places);
    let mut endpoints: Vec<String> = etcd.endpoints().iter().map(ToString::to_string).collect();
    let members: Vec<_> = endpoints.iter().map(|url| url.replace("http://", "")).collect();
    let (proxies, urls_of_proxies) = Proxies::start(&places[HOSTS - 1], members);
    let mut hosts = Vec::new();
    for (number, place) in places.into_iter().enumerate() {
        hosts.push(Host::start(
            number,
            place,
            folder.0.path().join(format!("h{number}")),
            if number == HOSTS - 1 { urls_of_proxies.join(",") } else { endpoints.join(",") },
            endpoints.join(","),
        ));
        endpoints.rotate_left(1);
    }
    let record = Record::new(folder.0.path().join("log"));
    let (clients, setbacks) = (Mutex::default(), Mutex::default());
    let arena = Arena { hosts, etcd: Mutex::new(etcd), net, proxies, seed, setbacks, record, clients };
    std::thread::scope(|scope| {
        for number in 0..HOSTS * CLIENTS {
            let arena = &arena;
            scope.spawn(move || arena.keep_busy(number));
        }
        scope.spawn(|| arena.record.ends_if_this_fails(|| arena.inject_daemon_faults()));
        scope.spawn(|| arena.record.ends_if_this_fails(|| arena.inject_etcd_faults()));
        scope.spawn(|| arena.record.ends_if_this_fails(|| arena.inject_proxy_faults()));
        arena.record.run_for(span);
    });

    let findings = arena.record.findings();
    if !findings.is_empty() {
        println!("{}", arena.whole_log());
        for host in &arena.hosts {
            println!("--- host {}: {:?} ---\n{}", host.number, host.outages(), host.logged(0.0, f64::MAX));
        }
    }
    assert!(findings.is_empty(), "{findings:#?}");
    let log = arena.whole_log();
    arena.record.print_tally();
    let log = setbacks::with_growing_tokens(&log, &arena.setbacks.lock().unwrap());
    arena.check_that_commands_were_stopped(&log);
    let sections = arena.check(&log);
    println!("{sections} sections");
    arena.check_that_all_is_free();
    arena.check_that_it_happened(span, &log, sections);
}
