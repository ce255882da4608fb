//! The examples for users do what they say.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use kmutex::addr::Addr;
use kmutex::client::Client;

use crate::harness::{Daemon, Process, finish, tool};

#[path = "../../examples/cache.rs"]
// Its `main` is for people.
#[allow(dead_code)]
mod cache;

#[test]
fn of_many_that_fill_a_cache_one_computes_the_value() {
    let daemon = Daemon::start();
    let computed = AtomicU32::new(0);
    let others_wait = || daemon.wait_for_counts("report", 1, 7);
    std::thread::scope(|scope| {
        let one = || {
            let mut client = Client::connect(&Addr::Unix(daemon.sock())).unwrap();
            let value = cache::cached(&mut client, daemon.folder(), "report", || {
                others_wait();
                computed.fetch_add(1, Ordering::Relaxed);
                "the value".into()
            });
            value.unwrap()
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
        threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), "the value"));
    });
    assert_eq!(computed.into_inner(), 1);
}

fn python(daemon: &Daemon, args: &[&str]) -> Command {
    let mut command = tool("python3");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/client.py")).arg(daemon.sock()).args(args);
    command.current_dir(daemon.folder()).stdin(Stdio::null());
    command
}

#[test]
fn the_client_in_python_runs_or_is_told_that_the_work_is_done() {
    let daemon = Daemon::start();
    assert_eq!(
        finish(&mut python(&daemon, &["k", "sh", "-c", "echo it works; exit 3"])).assert_silent(3),
        "it works\n"
    );
    let holder = daemon.hold("k");
    let mut waiter = Process::spawn(&mut python(&daemon, &["k", "touch", "ran"]));
    daemon.wait_for_counts("k", 1, 1);
    assert_eq!(holder.finish(0), 0);
    assert_eq!(waiter.wait(), 79);
    assert!(!daemon.folder().join("ran").exists());

    let mut holder = python(&daemon, &["k", "sh", "-c", "echo holding; read line; exit 4"]);
    let mut holder = Process::spawn(holder.stdin(Stdio::piped()).stdout(Stdio::piped()));
    holder.wait_for_line("holding");
    let mut adopts = Process::spawn(&mut daemon.run(&["--on-peer-failure", "adopt", "k", "true"]));
    daemon.wait_for_counts("k", 1, 1);
    drop(holder.child.stdin.take());
    assert_eq!((holder.wait(), adopts.wait()), (4, 4), "the outcome reaches the waiters");
    let refused = finish(&mut python(&daemon, &["", "true"]));
    assert!(refused.code != 0 && refused.stderr.contains("key"), "{refused:?}");
}
