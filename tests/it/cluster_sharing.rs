//! Shared locks and slots among hosts that share their locks through a real etcd.

use std::process::Stdio;

use crate::cluster::{hosts, name, standing, steady_hosts, steady_options};
use crate::etcd_harness::Etcd;
use crate::harness::*;

const FINISHED: i32 = 79;
const BUSY: i32 = 75;
const LOST: i32 = 74;

/// A run in the queue, which stands in the line of all hosts as number `place`.
fn queued(daemon: &Daemon, etcd: &Etcd, options: &[&str], key: &str, place: usize) -> Process {
    let mut command = daemon.run(options);
    command.args(["--queue", key, "--", "sh", "-c", "echo running"]).stdout(Stdio::piped());
    let process = Process::spawn(&mut command);
    wait_until("it to stand in line", || standing(etcd, key) == place);
    process
}

#[test]
#[ignore = "needs etcd"]
fn readers_of_all_hosts_hold_together_and_a_writer_that_waits_holds_back_later_ones() {
    let etcd = Etcd::single();
    let [a, b] = steady_hosts(&etcd);
    let readers =
        [a.hold_with(&["--shared"], "k"), a.hold_with(&["--shared"], "k"), b.hold_with(&["--shared"], "k")];
    assert_eq!(standing(&etcd, "k"), 3);
    for host in [&a, &b] {
        finish(&mut host.run(&["-n", "k", "true"])).assert_silent(BUSY);
    }
    let mut writer = queued(&b, &etcd, &[], "k", 4);
    for host in [&a, &b] {
        finish(&mut host.run(&["-n", "--shared", "k", "true"])).assert_silent(BUSY);
    }
    let mut late = queued(&a, &etcd, &["--shared"], "k", 5);
    let [first, second, third] = readers;
    assert_eq!((first.finish(0), second.finish(0)), (0, 0));
    wait_until("the places to be given up", || standing(&etcd, "k") == 3);
    assert!(writer.is_running() && late.is_running());
    assert_eq!(third.finish(0), 0);
    assert_eq!((writer.wait(), late.wait()), (0, 0));
    wait_until("nothing to be left", || standing(&etcd, "k") == 0);
}

#[test]
#[ignore = "needs etcd"]
fn a_reader_that_does_not_queue_is_told_of_the_writer_of_another_host() {
    let etcd = Etcd::single();
    let [a, b] = steady_hosts(&etcd);
    let writer = a.hold("k");
    let reader = Process::spawn(&mut b.run(&["--shared", "k", "true"]));
    b.wait_for_counts("k", 1, 1);
    assert_eq!(writer.finish(0), 0);
    let mut reader = reader;
    assert_eq!(reader.wait(), FINISHED);
}

#[test]
#[ignore = "needs etcd"]
fn slots_are_counted_over_all_hosts() {
    let etcd = Etcd::single();
    let [a, b] = steady_hosts(&etcd);
    let slots = ["--slots", "3"];
    let [one, two] = [a.hold_with(&slots, "k"), a.hold_with(&slots, "k")];
    let three = b.hold_with(&slots, "k");
    for host in [&a, &b] {
        finish(&mut host.run(&["-n", "--slots", "3", "k", "true"])).assert_silent(BUSY);
        finish(&mut host.run(&["-n", "k", "true"])).assert_silent(BUSY);
        finish(&mut host.run(&["-n", "--shared", "k", "true"])).assert_silent(BUSY);
    }
    let mut next = queued(&b, &etcd, &slots, "k", 4);
    assert_eq!(one.finish(0), 0);
    assert_eq!(next.wait(), 0);
    wait_until("its place to be given up", || standing(&etcd, "k") == 2);
    // Two of the three are taken.
    finish(&mut b.run(&["-n", "--slots", "3", "--weight", "2", "k", "true"])).assert_silent(BUSY);
    finish(&mut b.run(&["-n", "--slots", "3", "k", "true"])).assert_silent(0);
    assert_eq!((two.finish(0), three.finish(0)), (0, 0));
}

#[test]
#[ignore = "needs etcd"]
fn who_says_another_number_of_slots_is_refused_and_told_who_said_which() {
    let etcd = Etcd::single();
    let [a, b] = steady_hosts(&etcd);
    let holder = a.hold_with(&["--slots", "3"], "k");
    let pid = format!("pid {}", holder.process.pid());
    let hostname = nix::unistd::gethostname().unwrap().into_string().unwrap();
    for options in [&["-n"][..], &["--queue"], &[]] {
        let mut run = b.run(options);
        run.args(["--slots", "2", "k", "true"]);
        finish(&mut run).assert_error(64, &["3 slots", &pid, &hostname]);
    }
    wait_until("no place to be left but the holder's", || standing(&etcd, "k") == 1);
    assert_eq!(holder.finish(0), 0);
    wait_until("the lock to be free", || standing(&etcd, "k") == 0);
    finish(&mut b.run(&["-n", "--slots", "2", "k", "true"])).assert_silent(0);
}

#[test]
#[ignore = "needs etcd"]
fn etcdctl_is_a_writer_among_readers_and_slots() {
    let etcd = Etcd::single();
    let [a] = steady_hosts(&etcd);
    let put = |lease: &str| drop(etcd.ctl(&["put", &format!("{}/by-hand{lease}", name("k")), ""]));
    put("");
    finish(&mut a.run(&["-n", "--shared", "k", "true"])).assert_silent(BUSY);
    finish(&mut a.run(&["-n", "--slots", "2", "k", "true"])).assert_silent(BUSY);
    let mut reader = queued(&a, &etcd, &["--shared"], "k", 2);
    etcd.ctl(&["del", &format!("{}/by-hand", name("k"))]);
    assert_eq!(reader.wait(), 0);
    wait_until("the lock to be free", || standing(&etcd, "k") == 0);
    let holder = a.hold_with(&["--shared"], "k");
    put("-waits");
    finish(&mut a.run(&["-n", "--shared", "k", "true"])).assert_silent(BUSY);
    assert_eq!(holder.finish(0), 0);
}

#[test]
#[ignore = "needs etcd"]
fn readers_and_slots_survive_a_restart_of_their_daemon() {
    let etcd = Etcd::single();
    let [mut a, b] = steady_hosts(&etcd);
    let readers = [a.hold_with(&["--shared"], "k"), a.hold_with(&["--shared"], "k")];
    let slots = [a.hold_with(&["--slots", "2"], "s"), a.hold_with(&["--slots", "2"], "s")];
    let mut writer = queued(&b, &etcd, &[], "k", 3);
    a.restart(&steady_options(&etcd).iter().map(String::as_str).collect::<Vec<_>>());
    a.wait_for_log("clustering locks under lease");
    a.wait_for_counts("k", 2, 0);
    a.wait_for_counts("s", 2, 0);
    finish(&mut b.run(&["-n", "--slots", "2", "s", "true"])).assert_silent(BUSY);
    assert_eq!((standing(&etcd, "k"), standing(&etcd, "s")), (3, 2));
    let [first, second] = readers;
    assert_eq!(first.finish(3), 3);
    wait_until("its place to be given up", || standing(&etcd, "k") == 2);
    assert!(writer.is_running());
    assert_eq!((second.finish(4), writer.wait()), (4, 0));
    assert_eq!(slots.map(|holder| holder.finish(0)), [0, 0]);
    wait_until("nothing to be left", || standing(&etcd, "s") == 0);
}

#[test]
#[ignore = "needs etcd"]
fn the_readers_of_a_host_that_dies_go_with_its_lease() {
    let etcd = Etcd::single();
    let [mut a, b] = hosts(&etcd);
    let mut readers = [a.hold_with(&["--shared"], "k"), a.hold_with(&["--shared"], "k")];
    let mut writer = queued(&b, &etcd, &[], "k", 3);
    a.kill();
    assert_eq!(writer.wait(), 0);
    assert_eq!(readers.each_mut().map(|reader| reader.process.wait()), [LOST; 2]);
}

#[test]
#[ignore = "needs etcd"]
fn the_status_of_the_cluster_lists_all_holders_and_break_takes_the_lock_from_each() {
    let etcd = Etcd::single();
    let [a, b] = steady_hosts(&etcd);
    let mut readers =
        [a.hold_with(&["--shared"], "k"), a.hold_with(&["--shared"], "k"), b.hold_with(&["--shared"], "k")];
    let mut writer = queued(&b, &etcd, &[], "k", 4);
    let line = finish(&mut a.kmutex(&["status", "--cluster", "--json"])).assert_silent(0);
    let lock: serde_json::Value = serde_json::from_str(line.trim()).unwrap();
    assert_eq!((&lock["holding"], &lock["waiting"]), (&3.into(), &1.into()));
    let pids: Vec<serde_json::Value> =
        readers.iter().map(|reader| reader.process.pid().as_raw().into()).collect();
    let holders: Vec<serde_json::Value> =
        lock["holders"].as_array().unwrap().iter().map(|holder| holder["pid"].clone()).collect();
    assert_eq!(holders, pids);
    assert_eq!(lock["holders"][2]["shared"], true);
    finish(&mut a.kmutex(&["break", "--yes", "k"])).assert_silent(0);
    assert_eq!(readers.each_mut().map(|reader| reader.process.wait()), [LOST; 3]);
    assert_eq!(writer.wait(), 0, "the lock is the waiter's");
}
