//! A host that grants nothing for a while, because etcd went back, and whose daemon is started anew meanwhile.

use nix::sys::signal::Signal;

use crate::cluster_trouble::{steady_host, witness};
use crate::etcd_harness::Etcd;
use crate::harness::*;

const LOST: i32 = 74;
const UNAVAILABLE: i32 = 69;
const TTL: &str = "8";
const NONE_GRANTED: &str = "went back: no lock is granted for";
const GRANTS_NOTHING: &str = "the previous daemon found that the store went back; no lock is granted for";

/// A holder on one host, whose daemon cannot notice that etcd goes back; and another host, whose daemon does, and is ended by `end`
/// and started anew while it grants nothing.
fn check_restart(end: impl FnOnce(&mut Daemon)) {
    let mut etcd = Etcd::single();
    let [a, mut b] = [steady_host(&etcd, TTL, &[]), steady_host(&etcd, TTL, &[])];
    let file = etcd.file("order");
    let mut holder = witness(&a, "k", &file);
    finish(&mut b.run(&["other", "true"])).assert_silent(0);
    nix::sys::signal::kill(a.pid(), Signal::SIGSTOP).unwrap();
    etcd.replace_data(|data| std::fs::remove_dir_all(data).unwrap());
    b.wait_for_log("the store went back");
    // When a client has heard of it, the journal has it.
    finish(&mut b.run(&["--nonblock", "k", "true"])).assert_error(UNAVAILABLE, &[NONE_GRANTED]);
    end(&mut b);
    b.restart(&["--etcd", &etcd.endpoints()[0].to_string(), "--etcd-ttl", TTL]);
    b.wait_for_log(GRANTS_NOTHING);
    finish(&mut b.run(&["--nonblock", "k", "true"])).assert_error(UNAVAILABLE, &[NONE_GRANTED]);
    let append = format!("echo b >> {}", file.display());
    finish(&mut b.run(&["--queue", "k", "--", "sh", "-c", &append])).assert_silent(0);
    assert_eq!(holder.wait(), LOST);
    let order = std::fs::read_to_string(&file).unwrap();
    assert_eq!(order, "a\nb\n", "the holder is dead before the next one runs");
    // It is over once: the daemon after this one grants at once.
    b.restart(&["--etcd", &etcd.endpoints()[0].to_string(), "--etcd-ttl", TTL]);
    finish(&mut b.run(&["k", "true"])).assert_silent(0);
    assert!(!b.log().contains(GRANTS_NOTHING), "{}", b.log());
}

#[test]
#[ignore = "needs etcd"]
fn a_daemon_that_is_killed_while_it_grants_nothing_is_followed_by_one_that_waits_for_the_rest() {
    check_restart(Daemon::kill);
}

#[test]
#[ignore = "needs etcd"]
fn a_daemon_that_is_stopped_while_it_grants_nothing_is_followed_by_one_that_waits_for_the_rest() {
    check_restart(|daemon| {
        daemon.process().signal(Signal::SIGTERM);
        assert_eq!(daemon.process().wait(), 0);
    });
}
