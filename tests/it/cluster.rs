//! Hosts that share their locks through etcd: daemons with sockets of their own, and a real etcd. Each meaning of a lock on
//! one host is the same across hosts.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Stdio;

use kmutex::proto::Key;
use nix::sys::signal::Signal;

use crate::etcd_harness::Etcd;
use crate::harness::*;

const FINISHED: i32 = 79;
const BUSY: i32 = 75;
const LOST: i32 = 74;
const UNAVAILABLE: i32 = 69;

/// The options for a daemon that shares its locks here.
fn options(etcd: &Etcd) -> Vec<String> {
    let endpoints = etcd.endpoints().iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    ["--etcd", &endpoints, "--etcd-ttl", "2"].map(String::from).into()
}

/// A daemon of a host that shares its locks.
pub fn host(etcd: &Etcd) -> Daemon {
    let options = options(etcd);
    let daemon = Daemon::with(&options.iter().map(String::as_str).collect::<Vec<_>>());
    daemon.wait_for_log("clustering locks under lease");
    daemon
}

pub fn restart(daemon: &mut Daemon, etcd: &Etcd) {
    let options = options(etcd);
    daemon.restart(&options.iter().map(String::as_str).collect::<Vec<_>>());
}

pub fn hosts<const N: usize>(etcd: &Etcd) -> [Daemon; N] {
    std::array::from_fn(|_| host(etcd))
}

/// A lease of two seconds is lost on a busy machine. These options are for tests in which no lock may be lost.
pub fn steady_options(etcd: &Etcd) -> Vec<String> {
    let endpoint = etcd.endpoints()[0].to_string();
    ["--etcd", &endpoint, "--etcd-ttl", "10"].map(String::from).into()
}

/// Hosts with these options.
pub fn steady_hosts<const N: usize>(etcd: &Etcd) -> [Daemon; N] {
    let options = steady_options(etcd);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    std::array::from_fn(|_| {
        let daemon = Daemon::with(&options);
        daemon.wait_for_log("clustering locks under lease");
        daemon
    })
}

pub fn restart_steady(daemon: &mut Daemon, etcd: &Etcd) {
    let options = steady_options(etcd);
    daemon.restart(&options.iter().map(String::as_str).collect::<Vec<_>>());
    daemon.wait_for_log("clustering locks under lease");
}

/// What `etcdctl lock` calls a key.
pub fn name(key: &str) -> String {
    format!("kmutex/{}", Key::new(key).unwrap().id())
}

/// A run that waits, and says when it has the lock.
pub fn waiter(daemon: &Daemon, options: &[&str], key: &str, already: u64) -> Process {
    let mut command = daemon.run(options);
    command.args([key, "--", "sh", "-c", "echo running $KMUTEX_TOKEN"]);
    let waiting = daemon.log().matches("wait: ").count();
    let process = Process::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    // The count alone does not show that it waits: until etcd has answered, it may still get the lock.
    daemon.wait_for_logs("wait: ", waiting + 1);
    daemon.wait_for_counts(key, 1, already + 1);
    process
}

/// `etcdctl lock`, which says when it holds, and ends when it is let go.
struct Other {
    process: Process,
    /// Its command gets no standard input, so it reads from a pipe with a name.
    pipe: PathBuf,
}

impl Other {
    fn lock(etcd: &Etcd, key: &str, pipe: &str) -> Other {
        let pipe = etcd.file(pipe);
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let script = format!("echo holding; read end < {}", pipe.display());
        let mut command = etcd.etcdctl(&["lock", "--ttl", "2", &name(key), "--", "sh", "-c", &script]);
        Other { process: Process::spawn(command.stdout(Stdio::piped())), pipe }
    }

    fn release(mut self) {
        // Waits until its command reads.
        std::fs::write(&self.pipe, "\n").unwrap();
        self.process.wait();
    }

    /// Its command outlives it, if it is killed.
    fn end_command(&self) {
        // If no process reads, there is no command.
        let pipe = std::fs::File::options().write(true).custom_flags(nix::libc::O_NONBLOCK).open(&self.pipe);
        if let Ok(mut pipe) = pipe {
            pipe.write_all(b"\n").unwrap();
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.end_command();
    }
}

/// How many stand in the line of a key.
pub fn standing(etcd: &Etcd, key: &str) -> usize {
    etcd.ctl(&["get", "--prefix", "--keys-only", &format!("{}/", name(key))]).split_whitespace().count()
}

#[test]
#[ignore = "needs etcd"]
fn one_of_many_hosts_runs_it_and_the_others_are_told_how_it_ended() {
    let etcd = Etcd::single();
    let [a, b, c] = hosts(&etcd);
    let holder = a.hold("k");
    let mut skips = waiter(&b, &[], "k", 0);
    let mut adopts = waiter(&c, &["--on-peer-failure", "adopt"], "k", 0);
    let mut again = waiter(&c, &["--on-peer-failure", "retry"], "k", 1);
    assert_eq!(holder.finish(3), 3);
    assert_eq!((skips.wait(), adopts.wait()), (FINISHED, 3));
    // It asked again, and had it.
    assert_eq!((again.wait(), again.line().is_some()), (0, true));
    assert_eq!(standing(&etcd, "k"), 0, "nothing is left");
}

#[test]
#[ignore = "needs etcd"]
fn queued_clients_are_served_in_the_order_of_hosts_and_tokens_grow() {
    let etcd = Etcd::single();
    let [a, b, c] = hosts(&etcd);
    let holder = a.hold_with(&["--queue"], "k");
    // It was the first waiter, but its host has just had the lock.
    let mut local = waiter(&a, &["--queue"], "k", 0);
    let mut second = waiter(&b, &["--queue"], "k", 0);
    wait_until("b to stand in line", || standing(&etcd, "k") == 2);
    let mut third = waiter(&c, &["--queue"], "k", 0);
    wait_until("c to stand in line", || standing(&etcd, "k") == 3);
    let mut fourth = waiter(&b, &["--queue"], "k", 1);
    assert_eq!(holder.finish(0), 0);
    let mut token = |process: &mut Process| {
        assert_eq!(process.wait(), 0);
        let line = process.line().unwrap();
        line.strip_prefix("running ").unwrap().parse::<u64>().unwrap()
    };
    let tokens = [&mut second, &mut third, &mut local, &mut fourth].map(&mut token);
    assert!(tokens.is_sorted() && tokens[0] > 1, "{tokens:?}");
}

#[test]
#[ignore = "needs etcd"]
fn a_stopped_waiter_lets_those_of_its_host_and_of_others_pass() {
    let etcd = Etcd::single();
    let [a, b] = hosts(&etcd);
    let holder = b.hold_with(&["--queue"], "k");
    let mut stopped = waiter(&a, &["--queue"], "k", 0);
    stopped.signal(Signal::SIGSTOP);
    wait_until("it to be stopped", || crate::signals::state_of(stopped.pid()) == 'T');
    let mut local = waiter(&a, &["--queue"], "k", 1);
    wait_until("a to stand in line", || standing(&etcd, "k") == 2);
    let mut remote = waiter(&b, &["--queue"], "k", 0);
    assert_eq!(holder.finish(0), 0);
    assert_eq!((local.wait(), remote.wait()), (0, 0));
    stopped.signal(Signal::SIGCONT);
    assert_eq!(stopped.wait(), 0);
}

#[test]
#[ignore = "needs etcd"]
fn the_token_is_the_create_revision_of_the_key() {
    let etcd = Etcd::single();
    let a = host(&etcd);
    let mut command = a.run(&["k", "--", "sh", "-c", "echo $KMUTEX_TOKEN; read end"]);
    let mut run = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let token: u64 = run.line().unwrap().parse().unwrap();
    let keys = etcd.ctl(&["get", "--prefix", &name("k"), "--write-out=json"]);
    let keys: serde_json::Value = serde_json::from_str(&keys).unwrap();
    assert_eq!(keys["kvs"][0]["create_revision"], token);
    assert_eq!(a.status()[0]["holders"][0]["token"], token);
}

#[test]
#[ignore = "needs etcd"]
fn who_does_not_wait_or_not_for_long_is_refused() {
    let etcd = Etcd::single();
    let [a, b] = hosts(&etcd);
    let holder = a.hold("k");
    finish(&mut b.run(&["-n", "k", "true"])).assert_silent(BUSY);
    finish(&mut b.run(&["-w", "0.2", "k", "true"])).assert_silent(BUSY);
    finish(&mut b.run(&["--queue", "-w", "0.2", "k", "true"])).assert_silent(BUSY);
    wait_until("only the holder to stand in line", || standing(&etcd, "k") == 1);
    assert_eq!(holder.finish(0), 0);
    for host in [&b, &a] {
        // A kmutex exits before its daemon has told etcd, so another host may find the lock busy for a moment.
        wait_until("the lock to be free", || standing(&etcd, "k") == 0);
        finish(&mut host.run(&["-n", "k", "true"])).assert_silent(0);
    }
}

#[test]
#[ignore = "needs etcd"]
fn on_one_host_the_second_of_two_that_follow_each_other_is_not_told_of_the_first() {
    let etcd = Etcd::single();
    let a = host(&etcd);
    for _ in 0..20 {
        finish(&mut a.run(&["-n", "k", "true"])).assert_silent(0);
        finish(&mut a.run(&["k", "true"])).assert_silent(0);
    }
}

#[test]
#[ignore = "needs etcd"]
fn protocol_1_shares_its_locks_too() {
    let etcd = Etcd::single();
    let [a, b] = hosts(&etcd);
    let id = Key::new("k").unwrap().id().0;
    let (mut owner, mut waiter) = (a.wire(), b.wire());
    owner.send(id).expect("O");
    waiter.send(id);
    b.wait_for_log("wait: ");
    let mut run = self::waiter(&b, &[], "k", 1);
    owner.send("R");
    waiter.expect("R");
    assert_eq!(run.wait(), FINISHED);
    waiter.send(id).expect("O");
}

#[test]
#[ignore = "needs etcd"]
fn of_a_holder_that_vanishes_one_waiter_takes_the_place_wherever_it_is() {
    let etcd = Etcd::single();
    let [a, b, c] = hosts(&etcd);
    let mut holder = a.hold_with(&["-o"], "k");
    let mut waiters = [waiter(&b, &[], "k", 0), waiter(&c, &[], "k", 0), waiter(&c, &[], "k", 1)];
    holder.process.signal(Signal::SIGKILL);
    assert_eq!(holder.process.wait(), 128 + 9);
    let mut codes = waiters.each_mut().map(Process::wait);
    codes.sort_unstable();
    assert_eq!(codes, [0, FINISHED, FINISHED]);
}

#[test]
#[ignore = "needs etcd"]
fn when_a_host_dies_its_holders_stop_in_time_and_one_waiter_elsewhere_does_the_work() {
    let etcd = Etcd::single();
    let [mut a, b, c] = hosts(&etcd);
    let mut command =
        a.run(&["k", "--", "sh", "-c", "trap '' TERM; echo holding; while :; do sleep 0.05; done"]);
    let mut holder = Process::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    holder.wait_for_line("holding");
    let mut waiters = [waiter(&b, &[], "k", 0), waiter(&c, &[], "k", 0)];
    a.kill();
    // Its command ignores SIGTERM, and is killed well before anybody else can have the lock, though --kill-after is longer.
    assert_eq!(holder.wait(), LOST);
    assert_eq!(standing(&etcd, "k"), 1, "the lock is its host's still");
    assert!(holder.stderr().contains("no lease renewal from the daemon in time"));
    let mut codes = waiters.each_mut().map(Process::wait);
    codes.sort_unstable();
    assert_eq!(codes, [0, FINISHED]);
}

#[test]
#[ignore = "needs etcd"]
fn when_a_daemon_is_stopped_its_holders_notice_themselves() {
    let etcd = Etcd::single();
    let [mut a, b] = hosts(&etcd);
    let mut old = a.wire();
    let id = Key::new("old").unwrap().id().0;
    old.send(id).expect("O");
    let mut holder = a.hold("k");
    let mut next = waiter(&b, &["--queue"], "k", 0);
    a.process().signal(Signal::SIGSTOP);
    assert_eq!(holder.process.wait(), LOST);
    assert_eq!(next.wait(), 0);
    // When it wakes, it knows what was lost before it does anything else.
    a.process().signal(Signal::SIGCONT);
    old.expect_closed();
    a.wait_for_log("is lost");
    a.wait_for_logs("clustering locks under lease", 2);
    finish(&mut a.run(&["k", "true"])).assert_silent(0);
}

#[test]
#[ignore = "needs etcd"]
fn a_daemon_that_comes_back_in_time_has_lost_nothing() {
    let etcd = Etcd::single();
    let [mut a, b] = hosts(&etcd);
    let holder = a.hold("k");
    let mut local = waiter(&a, &["--queue"], "k", 0);
    let mut remote = waiter(&b, &[], "k", 0);
    let token = a.status()[0]["holders"][0]["token"].clone();
    let leases = || {
        let list = etcd.ctl(&["lease", "list"]);
        list.lines().map(String::from).collect::<std::collections::BTreeSet<_>>()
    };
    let lease = leases();
    restart(&mut a, &etcd);
    a.wait_for_log("clustering locks under lease");
    a.wait_for_counts("k", 1, 1);
    assert_eq!(a.status()[0]["holders"][0]["token"], token);
    assert_eq!(leases(), lease, "the lease is the same");
    assert_eq!(standing(&etcd, "k"), 1);
    assert_eq!(holder.finish(5), 5);
    assert_eq!((remote.wait(), local.wait()), (FINISHED, 0));
}

#[test]
#[ignore = "needs etcd"]
fn a_daemon_that_comes_back_too_late_says_so_to_its_holders() {
    let etcd = Etcd::single();
    let [mut a, b] = hosts(&etcd);
    let mut holder = a.hold_with(&["--on-lost", "continue"], "k");
    let next = waiter(&b, &["--queue"], "k", 0);
    a.kill();
    let mut next = next;
    assert_eq!(next.wait(), 0, "the lease has ended");
    restart(&mut a, &etcd);
    a.wait_for_log("clustering locks under lease");
    finish(&mut a.run(&["-n", "k", "true"])).assert_silent(0);
    assert!(holder.process.is_running());
    assert_eq!(holder.finish(0), LOST);
}

#[test]
#[ignore = "needs etcd"]
fn etcdctl_and_kmutex_wait_for_each_other() {
    let etcd = Etcd::single();
    let a = host(&etcd);
    let mut other = Other::lock(&etcd, "k", "pipe1");
    other.process.wait_for_line("holding");
    finish(&mut a.run(&["-n", "k", "true"])).assert_silent(BUSY);
    let mut once = waiter(&a, &[], "k", 0);
    let mut queued = waiter(&a, &["--queue"], "k", 1);
    wait_until("kmutex to stand in line", || standing(&etcd, "k") == 2);
    let mut behind = Other::lock(&etcd, "k", "pipe2");
    wait_until("etcdctl to stand in line", || standing(&etcd, "k") == 3);
    other.release();
    // The outcome of etcdctl's holder is unknown; that it ended is enough.
    assert_eq!((once.wait(), queued.wait()), (FINISHED, 0));
    behind.process.wait_for_line("holding");
    let mut after = waiter(&a, &["--queue"], "k", 0);
    behind.process.signal(Signal::SIGKILL);
    assert_eq!(after.wait(), 0, "its lease ends");
}

#[test]
#[ignore = "needs etcd"]
fn etcdctl_gets_the_lock_of_a_host_that_dies() {
    let etcd = Etcd::single();
    let mut a = host(&etcd);
    let _holder = a.hold("k");
    let mut other = Other::lock(&etcd, "k", "pipe");
    wait_until("etcdctl to stand in line", || standing(&etcd, "k") == 2);
    a.kill();
    other.process.wait_for_line("holding");
    other.release();
}

#[test]
#[ignore = "needs etcd"]
fn a_key_that_is_removed_by_hand_is_a_lock_that_is_lost() {
    let etcd = Etcd::single();
    let a = host(&etcd);
    let mut holder = a.hold("k");
    let mut queued = waiter(&a, &["--queue"], "k", 0);
    etcd.ctl(&["del", "--prefix", &format!("{}/", name("k"))]);
    assert_eq!(holder.process.wait(), LOST);
    assert_eq!(queued.wait(), 0);
}

#[test]
#[ignore = "needs etcd"]
fn a_lease_that_is_revoked_by_hand_is_noticed_at_once() {
    let etcd = Etcd::single();
    let [a, b] = hosts(&etcd);
    let mut holders = [a.hold("k"), a.hold("l")];
    let log = a.log();
    let lease = log.split("under lease ").nth(1).unwrap().split(',').next().unwrap();
    let mut next = waiter(&b, &[], "k", 0);
    etcd.ctl(&["lease", "revoke", lease]);
    assert_eq!(holders.each_mut().map(|holder| holder.process.wait()), [LOST, LOST]);
    assert_eq!(next.wait(), 0, "the holder has vanished");
    a.wait_for_logs("clustering locks under lease", 2);
    finish(&mut a.run(&["l", "true"])).assert_silent(0);
}

#[test]
#[ignore = "needs etcd"]
fn without_the_lease_for_records_nothing_is_lost() {
    let etcd = Etcd::single();
    let a = host(&etcd);
    let held = a.hold("held");
    finish(&mut a.run(&["k", "true"])).assert_silent(0);
    // The second record is put with a lease of its own, if the first was too early for that.
    let all = || etcd.ctl(&["lease", "list"]).lines().skip(1).map(String::from).collect::<Vec<_>>();
    wait_until("a lease for records", || all().len() == 2);
    finish(&mut a.run(&["k", "true"])).assert_silent(0);
    let log = a.log();
    let own = log.split("under lease ").nth(1).unwrap().split(',').next().unwrap();
    let records = all().into_iter().find(|lease| lease != own).unwrap();
    etcd.ctl(&["lease", "revoke", &records]);
    finish(&mut a.run(&["k", "true"])).assert_silent(0);
    finish(&mut a.run(&["k", "true"])).assert_silent(0);
    assert_eq!(held.finish(0), 0);
}

#[test]
#[ignore = "needs etcd"]
fn while_etcd_is_away_new_requests_wait_or_fail_and_what_is_held_ends_in_time() {
    let mut etcd = Etcd::single();
    let a = host(&etcd);
    let mut holder = a.hold("held");
    etcd.kill(0);
    let unavailable = ["etcd cannot be asked"];
    finish(&mut a.run(&["-n", "k", "true"])).assert_error(UNAVAILABLE, &unavailable);
    finish(&mut a.run(&["-w", "0.3", "k", "true"])).assert_silent(BUSY);
    let mut patient = Process::spawn(&mut a.run(&["k", "true"]));
    assert_eq!(holder.process.wait(), LOST);
    finish(&mut a.run(&["-n", "k", "true"])).assert_error(UNAVAILABLE, &unavailable);
    assert!(patient.is_running());
    etcd.restart(0);
    assert_eq!(patient.wait(), 0);
    let complaints = a.log().matches("new locks wait until it answers").count();
    assert_eq!(complaints, 1, "it says so once: {}", a.log());
    a.wait_for_log("it answers again");
}

#[test]
fn a_daemon_that_never_reaches_etcd_serves_and_says_why_it_gives_nothing() {
    // No process listens on port 1.
    let a = Daemon::with(&["--etcd", "http://127.0.0.1:1"]);
    a.wait_for_log("connection refused");
    finish(&mut a.run(&["-n", "k", "true"])).assert_error(UNAVAILABLE, &["etcd"]);
    finish(&mut a.run(&["-w", "0.2", "k", "true"])).assert_silent(BUSY);
    assert_eq!(a.status().len(), 0);
}

#[test]
#[ignore = "needs etcd"]
fn of_three_members_one_may_die_or_hang() {
    let mut etcd = Etcd::cluster(3);
    let [a, b] = hosts(&etcd);
    let holder = a.hold("k");
    let mut next = waiter(&b, &["--queue"], "k", 0);
    let leader = etcd.leader();
    etcd.stop(leader);
    assert_eq!(holder.finish(0), 0);
    assert_eq!(next.wait(), 0);
    finish(&mut a.run(&["k", "true"])).assert_silent(0);
    etcd.cont(leader);
    let holder = a.hold("k");
    let mut next = waiter(&b, &["--queue"], "k", 0);
    etcd.kill(leader);
    assert_eq!(holder.finish(0), 0);
    assert_eq!(next.wait(), 0);
}

#[test]
#[ignore = "needs etcd"]
fn a_status_of_the_cluster_lists_all_hosts() {
    let etcd = Etcd::single();
    let [a, b] = hosts(&etcd);
    let _held = [a.hold_with(&["--note", "from a"], "k"), b.hold("l")];
    let _waits = waiter(&b, &["--queue"], "k", 0);
    wait_until("b to stand in line", || standing(&etcd, "k") == 2);
    let mut other = Other::lock(&etcd, "m", "pipe");
    other.process.wait_for_line("holding");
    let lines = finish(&mut a.kmutex(&["status", "--cluster", "--json"])).assert_silent(0);
    let locks: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let lock = |key: &str| {
        let id = Key::new(key).unwrap().id().to_string();
        locks.iter().find(|lock| lock["id"] == id).unwrap_or_else(|| panic!("{key} is not in {lines}"))
    };
    assert_eq!(locks.len(), 3);
    assert_eq!((&lock("k")["key"], &lock("l")["key"]), (&"k".into(), &"l".into()));
    assert_eq!(lock("k")["holders"][0]["note"], "from a");
    let hostname = nix::unistd::gethostname().unwrap().into_string().unwrap();
    assert_eq!(lock("k")["holders"][0]["host"], hostname);
    assert_eq!((&lock("k")["waiting"], &lock("k")["waiters"][0]["mode"]), (&1.into(), &"queue".into()));
    assert_eq!(lock("m")["holders"][0]["note"], "of another program");
    let table = finish(&mut a.kmutex(&["status", "--cluster"])).assert_silent(0);
    assert!(table.contains(&hostname), "{table}");
    // Who waits sees who holds, wherever that is.
    let status = b.status();
    let status = status.iter().find(|lock| lock["key"] == "k").unwrap();
    assert_eq!(status["holders"][0]["note"], "from a");
    // A host that shares nothing has nothing to say of others.
    let alone = Daemon::start();
    finish(&mut alone.kmutex(&["status", "--cluster"])).assert_error(64, &["does not share its locks"]);
}

#[test]
#[ignore = "needs etcd"]
fn a_status_of_many_locks_comes_in_pages() {
    let etcd = Etcd::single();
    let a = host(&etcd);
    let mut wires: Vec<_> = (0..250).map(|_| a.wire()).collect();
    for (number, wire) in wires.iter_mut().enumerate() {
        wire.open(&format!(r#"{{"type":"lock","key":"key {number}"}}"#));
    }
    wires.iter_mut().for_each(|wire| drop(wire.answer_of("granted")));
    let keys = finish(&mut a.kmutex(&["status", "--cluster", "--keys"])).assert_silent(0);
    let mut keys: Vec<&str> = keys.lines().collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 250);
}

#[test]
#[ignore = "needs etcd"]
fn breaking_a_lock_frees_it_for_all_hosts() {
    let etcd = Etcd::single();
    let [a, b] = hosts(&etcd);
    let mut holder = a.hold("k");
    let mut next = waiter(&b, &["--queue"], "k", 0);
    finish(&mut a.kmutex(&["break", "--yes", "k"])).assert_silent(0);
    assert_eq!((holder.process.wait(), next.wait()), (LOST, 0));
    // From any host, if one is root or the daemon's user.
    let mut holder = a.hold("k");
    finish(&mut b.kmutex(&["break", "k"])).assert_error(64, &["--yes"]);
    finish(&mut b.kmutex(&["break", "--yes", "k"])).assert_silent(0);
    assert_eq!(holder.process.wait(), LOST);
    wait_until("the lock to be free", || standing(&etcd, "k") == 0);
    finish(&mut b.kmutex(&["break", "--yes", "k"])).assert_error(65, &["no client holds"]);
}

#[test]
#[ignore = "needs etcd"]
fn a_shell_holds_a_lock_for_all_hosts() {
    let etcd = Etcd::single();
    let [a, b] = hosts(&etcd);
    let mut shell = Process::spawn(std::process::Command::new("sleep").arg("1000"));
    let pid = shell.pid().to_string();
    finish(&mut a.kmutex(&["lock", "--no-autostart", "--pid", &pid, "k"])).assert_silent(0);
    finish(&mut b.run(&["-n", "k", "true"])).assert_silent(BUSY);
    let mut next = waiter(&b, &["--queue"], "k", 0);
    shell.signal(Signal::SIGKILL);
    shell.wait();
    assert_eq!(next.wait(), 0);
}

#[test]
#[ignore = "needs etcd"]
fn where_locks_are_shared_no_client_starts_a_daemon_that_shares_nothing() {
    let etcd = Etcd::single();
    let mut a = host(&etcd);
    a.kill();
    let refused = ["shared with other hosts", "--etcd"];
    finish(&mut a.kmutex(&["run", "k", "true"])).assert_error(UNAVAILABLE, &refused);
    // In good order too.
    restart(&mut a, &etcd);
    a.wait_for_log("clustering locks under lease");
    a.process().signal(Signal::SIGTERM);
    assert_eq!(a.process().wait(), 0);
    finish(&mut a.kmutex(&["run", "k", "true"])).assert_error(UNAVAILABLE, &refused);
    // A manually started daemon without --etcd is deliberate.
    a.restart(&[]);
    a.wait_for_log("without --etcd, this one does not");
    finish(&mut a.run(&["k", "true"])).assert_silent(0);
    a.process().signal(Signal::SIGTERM);
    assert_eq!(a.process().wait(), 0);
    let _autostarted = Autostarted(a.sock());
    finish(&mut a.kmutex(&["run", "k", "true"])).assert_silent(0);
}

#[test]
#[ignore = "needs etcd"]
fn a_daemon_that_ends_leaves_nothing_behind_that_is_not_needed() {
    let etcd = Etcd::single();
    let [mut a, mut b] = hosts(&etcd);
    let leases = || etcd.ctl(&["lease", "list"]);
    let name = |daemon: &Daemon| {
        let log = daemon.log();
        log.split("under lease ").nth(1).unwrap().split(',').next().unwrap().to_string()
    };
    let (lease_a, lease_b) = (name(&a), name(&b));
    let _holder = a.hold("k");
    let _waits = waiter(&b, &["--queue"], "k", 0);
    wait_until("b to stand in line", || standing(&etcd, "k") == 2);
    for daemon in [&mut a, &mut b] {
        daemon.process().signal(Signal::SIGTERM);
        assert_eq!(daemon.process().wait(), 0);
    }
    // What is held is held until the lease ends: the holder may come back.
    assert!(leases().contains(&lease_a));
    assert!(!leases().contains(&lease_b));
    assert_eq!(standing(&etcd, "k"), 1, "the entry of the waiter is gone");
}

#[test]
#[ignore = "needs etcd"]
fn with_certificates_and_users() {
    let mut etcd = Etcd::tls();
    etcd.enable_auth("locks", "secret", "kmutex");
    let file = |name: &str| etcd.file(name).to_str().unwrap().to_string();
    let password = etcd.file("password");
    std::fs::write(&password, "secret\n").unwrap();
    let password = password.to_str().unwrap();
    let (ca, cert, key) = (file("ca.pem"), file("client.pem"), file("client.key"));
    let mut options = options(&etcd);
    options.extend(["--etcd-ca", &ca, "--etcd-cert", &cert, "--etcd-key", &key].map(String::from));
    let mut with = options.clone();
    with.extend(["--etcd-user", "locks", "--etcd-password-file", password].map(String::from));
    let with: Vec<&str> = with.iter().map(String::as_str).collect();
    let [a, b] = [Daemon::with(&with), Daemon::with(&with)];
    let holder = a.hold("k");
    let mut next = waiter(&b, &["--queue"], "k", 0);
    assert_eq!((holder.finish(0), next.wait()), (0, 0));
    // Another prefix is not for this user, and without a name nothing is.
    let elsewhere = Daemon::with(&[&with[..], &["--etcd-prefix", "other"]].concat());
    elsewhere.wait_for_log("permission denied");
    finish(&mut elsewhere.run(&["-n", "k", "true"])).assert_error(UNAVAILABLE, &["etcd"]);
    let anonymous = Daemon::with(&options.iter().map(String::as_str).collect::<Vec<_>>());
    anonymous.wait_for_log("new locks wait until the user has the permission");
}

#[test]
#[ignore = "needs etcd"]
fn without_etcd_ca_the_systems_authorities_are_trusted() {
    let etcd = Etcd::tls();
    let file = |name: &str| etcd.file(name).to_str().unwrap().to_string();
    let (cert, key) = (file("client.pem"), file("client.key"));
    let mut options = options(&etcd);
    options.extend(["--etcd-cert", &cert, "--etcd-key", &key].map(String::from));
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let trusting = |ca: &str| {
        let ca = etcd.file(ca);
        Daemon::made(&options, |serve| serve.env("SSL_CERT_FILE", ca).env_remove("SSL_CERT_DIR"))
    };
    trusting("ca.pem").wait_for_log("clustering locks under lease");
    trusting("other.pem").wait_for_log("UnknownIssuer");
}

#[test]
fn what_is_wrong_with_the_options_is_said_before_anything_is_served() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("empty"), "").unwrap();
    let refused = |options: &[&str], code: i32, words: &[&str]| {
        let mut command = std::process::Command::new(KMUTEX);
        command.args(["serve", "--sock", "sock"]).args(options).current_dir(folder.path());
        // A system without authorities.
        command.env("SSL_CERT_FILE", "empty").env("SSL_CERT_DIR", "empty");
        finish(&mut command).assert_error(code, words);
    };
    refused(&["--etcd", "ftp://h"], 64, &["--etcd", "ftp://h"]);
    refused(&["--etcd", "http://h:x"], 64, &["--etcd", "http://h:x"]);
    refused(&["--etcd", ""], 64, &["--etcd"]);
    refused(&["--etcd", "https://h", "--etcd-ca", "nothing"], 64, &["--etcd-ca", "nothing", "no such file"]);
    refused(&["--etcd", "https://h", "--etcd-ca", "empty"], 64, &["--etcd-ca", "empty"]);
    refused(&["--etcd", "https://h"], 64, &["no certificates of authorities", "--etcd-ca"]);
    refused(&["--etcd", "http://h", "--etcd-ca", "empty"], 64, &["--etcd-ca", "https"]);
    refused(&["--etcd", "http://h", "--etcd-ttl", "1"], 64, &["--etcd-ttl", "1"]);
    refused(&["--etcd", "http://h", "--etcd-prefix", "/"], 64, &["--etcd-prefix"]);
    refused(&["--etcd", "http://h", "--etcd-user", "u"], 64, &["--etcd-password-file"]);
    let password = ["--etcd", "http://h", "--etcd-user", "u", "--etcd-password-file", "nothing"];
    refused(&password, 64, &["--etcd-password-file", "nothing"]);
    refused(&["--etcd-ttl", "5"], 64, &["--etcd"]);
}

/// What each host reserves is its own affair; which lock a key names is not.
#[test]
#[ignore = "needs etcd"]
fn a_reserved_key_is_the_same_lock_on_hosts_that_reserve_other_keys() {
    let etcd = Etcd::single();
    let reserving: Vec<String> = [options(&etcd), vec!["--reserve".into(), "db/=root".into()]].concat();
    let a = Daemon::with(&reserving.iter().map(String::as_str).collect::<Vec<_>>());
    a.wait_for_log("clustering locks under lease");
    let b = host(&etcd);
    for key in ["db/x".to_string(), format!("@{}/x", nix::unistd::Uid::current())] {
        let holder = b.hold(&key);
        finish(&mut a.run(&["-n", &key, "true"])).assert_silent(BUSY);
        assert_eq!(holder.finish(0), 0);
        let holder = a.hold(&key);
        finish(&mut b.run(&["-n", &key, "true"])).assert_silent(BUSY);
        assert_eq!(holder.finish(0), 0);
    }
    // On the host that reserves it, protocol 1 cannot hold it.
    let mut old = std::os::unix::net::UnixStream::connect(a.sock()).unwrap();
    old.write_all(&Key::new("db/x").unwrap().id().0).unwrap();
    old.set_read_timeout(Some(TIMEOUT)).unwrap();
    assert_eq!(std::io::Read::read(&mut old, &mut [0]).unwrap(), 0, "the daemon closes the connection");
}
