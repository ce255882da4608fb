//! The daemon is killed, and nothing is lost.

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::harness::{Daemon, KillOnDrop, Process, Wire, wait_for, wait_until};
use crate::world::{BOB, World};

const KEY: &[u8; 16] = b"0123456789abcdef";

/// The one holder of the one lock there is, as status shows it.
fn holder(daemon: &Daemon) -> Option<serde_json::Value> {
    let status = daemon.status();
    let [lock] = &status[..] else { return None };
    Some(lock["holders"][0].clone())
}

/// Waits until the holder is connected, and returns it.
fn wait_for_resumption(daemon: &Daemon) -> serde_json::Value {
    wait_for("the holder to resume", || holder(daemon).filter(|holder| holder["orphan"] != true))
}

#[test]
fn a_command_runs_on_and_its_lock_is_the_same() {
    let mut daemon = Daemon::start();
    let run = daemon.hold("k");
    let before = holder(&daemon).unwrap();
    for _ in 0..3 {
        daemon.restart(&[]);
        let after = wait_for_resumption(&daemon);
        assert_eq!((&after["token"], &after["pid"]), (&before["token"], &before["pid"]));
        assert_eq!(daemon.run(&["-n", "k", "true"]).status().unwrap().code(), Some(75));
    }
    assert_eq!(run.finish(7), 7);
    daemon.wait_for_counts("k", 0, 0);
}

#[test]
fn a_daemon_that_is_asked_to_end_loses_nothing_either() {
    let mut daemon = Daemon::start();
    let run = daemon.hold("k");
    daemon.process().signal(Signal::SIGTERM);
    assert_eq!(daemon.process().wait(), 0);
    daemon.restart(&[]);
    wait_for_resumption(&daemon);
    assert_eq!(run.finish(0), 0);
}

#[test]
fn waiters_wait_on_in_their_order() {
    let mut daemon = Daemon::start();
    let run = daemon.hold("k");
    let order = daemon.folder().join("order");
    let mut queue = Vec::new();
    for number in 0..5 {
        let append = format!("echo {number} >> {}", order.display());
        queue.push(Process::spawn(&mut daemon.run(&["--queue", "k", "-c", &append])));
        daemon.wait_for_counts("k", 1, number + 1);
    }
    let mut once = Process::spawn(&mut daemon.run(&["k", "-c", "exit 1"]));
    daemon.wait_for_counts("k", 1, 6);
    daemon.restart(&[]);
    daemon.wait_for_counts("k", 1, 6);
    wait_for_resumption(&daemon);
    assert_eq!(run.finish(0), 0);
    assert_eq!(once.wait(), 79);
    for mut waiter in queue {
        assert_eq!(waiter.wait(), 0);
    }
    assert_eq!(fs::read_to_string(order).unwrap(), "0\n1\n2\n3\n4\n");
}

#[test]
fn a_time_to_wait_counts_across_daemons() {
    let mut daemon = Daemon::start();
    let _run = daemon.hold("k");
    let (limit, begun) = (Duration::from_secs(3), Instant::now());
    let mut waiter = Process::spawn(&mut daemon.run(&["-w", "3", "k", "true"]));
    daemon.wait_for_counts("k", 1, 1);
    // Most of the time passes before the daemon is another one, so that a time that began anew would end much later.
    std::thread::sleep((limit * 5 / 6).saturating_sub(begun.elapsed()));
    let restarted = Instant::now();
    daemon.restart(&[]);
    assert_eq!(waiter.wait(), 75);
    assert!(begun.elapsed() >= limit, "{:?}", begun.elapsed());
    assert!(restarted.elapsed() < limit, "{:?}: it began anew", restarted.elapsed());
}

#[test]
fn a_command_without_kmutex_keeps_its_lock_until_it_ends() {
    let mut daemon = Daemon::start();
    let mut run = daemon.hold_with(&["-F"], "k");
    daemon.restart(&[]);
    let orphan = holder(&daemon).unwrap();
    assert_eq!(orphan["orphan"], true);
    assert_eq!(orphan["pid"], run.process.pid().as_raw());
    let mut once = Process::spawn(&mut daemon.run(&["k", "false"]));
    daemon.wait_for_log("wait: ");
    assert!(run.process.is_running());
    assert_eq!(run.finish(0), 0);
    assert_eq!(once.wait(), 79, "the end of a command that kmutex became is an outcome");
}

/// Starts a holder whose kmutex is killed while its command lives: the command's pid.
fn abandoned(daemon: &Daemon, resumes: impl FnOnce()) -> KillOnDrop {
    let mut command = daemon.run(&["k", "--", "sh", "-c", "echo $$; exec sleep 1000"]);
    let mut run = Process::spawn(command.stdout(Stdio::piped()));
    let child = KillOnDrop::new(&run.line().unwrap());
    // The daemon knows the command when its journal does: two records of the grant, after the header.
    let journal = daemon.folder().join("sock.journal");
    wait_until("the child's name", || fs::metadata(&journal).unwrap().len() >= 3 * 88);
    resumes();
    run.signal(Signal::SIGKILL);
    run.wait();
    child
}

#[test]
fn a_command_whose_kmutex_was_killed_keeps_its_lock_across_daemons() {
    let mut daemon = Daemon::start();
    let child = abandoned(&daemon, || {});
    daemon.restart(&[]);
    assert_eq!(holder(&daemon).unwrap()["orphan"], true);
    assert_eq!(daemon.run(&["-n", "k", "true"]).status().unwrap().code(), Some(75));
    let mut next = Process::spawn(&mut daemon.run(&["k", "true"]));
    daemon.wait_for_log("wait: ");
    child.kill();
    assert_eq!(next.wait(), 0, "the work is not done");
}

#[test]
fn a_command_whose_kmutex_was_killed_after_it_resumed_keeps_its_lock() {
    let mut daemon = Daemon::start();
    let mut command = daemon.run(&["k", "--", "sh", "-c", "echo $$; exec sleep 1000"]);
    let mut run = Process::spawn(command.stdout(Stdio::piped()));
    let child = KillOnDrop::new(&run.line().unwrap());
    daemon.restart(&[]);
    wait_for_resumption(&daemon);
    // The command has the old connection, which leads nowhere; only kmutex has the new one.
    run.signal(Signal::SIGKILL);
    run.wait();
    daemon.wait_for_log("lives and keeps token");
    assert_eq!(daemon.run(&["-n", "k", "true"]).status().unwrap().code(), Some(75));
    child.kill();
    assert_eq!(daemon.run(&["--queue", "k", "true"]).status().unwrap().code(), Some(0));
}

#[test]
fn a_holder_of_protocol_1_keeps_its_lock_for_the_grace_period() {
    let options = ["--grace", "1", "-t", "0"];
    let mut daemon = Daemon::with(&options);
    let mut old = daemon.wire();
    old.send(KEY).expect("O");
    daemon.restart(&options);
    let restarted = Instant::now();
    let mut next = daemon.wire();
    next.send(KEY);
    daemon.wait_for_log("wait: ");
    next.expect("R");
    let kept = restarted.elapsed();
    assert!(kept > Duration::from_millis(500), "{kept:?}");
}

#[test]
fn a_holder_of_protocol_1_keeps_its_lock_no_longer_than_the_hold_limit() {
    let options = ["--grace", "1000", "-t", "1"];
    let mut daemon = Daemon::with(&options);
    let mut old = daemon.wire();
    old.send(KEY).expect("O");
    daemon.restart(&options);
    let mut next = daemon.wire();
    next.send(KEY).expect("R").send(KEY).expect("O");
}

#[test]
fn a_holder_over_tcp_resumes_within_the_grace_period_or_not_at_all() {
    let daemon_options = ["--sock", "127.0.0.1:0", "--grace", "2", "--peer-timeout", "2"];
    let dial = |daemon: &Daemon| {
        let line = daemon.wait_for_log("serving on 127.0.0.1:");
        Wire::new(std::net::TcpStream::connect(line.rsplit(' ').next().unwrap()).unwrap())
    };
    let mut daemon = Daemon::with(&daemon_options);
    // Without pings, only a lock with `exec` lasts.
    let (mut one, mut two) = (dial(&daemon), dial(&daemon));
    let token =
        one.open(r#"{"type":"lock","key":"a","nonce":"1","exec":true}"#).answer_of("granted")["token"]
            .clone();
    two.open(r#"{"type":"lock","key":"b","nonce":"2"}"#).answer_of("granted");
    daemon.restart(&daemon_options);
    let mut again = dial(&daemon);
    again.open(&json!({"type": "lock", "key": "a", "nonce": "1", "exec": true, "holds": token}).to_string());
    assert_eq!(again.answer_of("granted")["token"], token);
    // The other one's time passes.
    dial(&daemon).open(r#"{"type":"lock","key":"b","mode":"queue"}"#).answer_of("waiting");
    let mut waiter = dial(&daemon);
    waiter.open(r#"{"type":"lock","key":"b","mode":"queue"}"#).answer_of("waiting");
    waiter.answer_of("granted");
    // The first has come back, so its time does not.
    dial(&daemon).open(r#"{"type":"lock","key":"a","nowait":true}"#).answer_of("busy");
}

#[test]
fn a_nonce_of_another_request_resumes_nothing() {
    let daemon = Daemon::start();
    let (mut holder, mut other) = (daemon.wire(), daemon.wire());
    let token = holder.open(r#"{"type":"lock","key":"a","nonce":"1"}"#).answer_of("granted")["token"].clone();
    other.open(r#"{"type":"lock","key":"b","nonce":"1"}"#);
    assert_eq!(other.answer_of("error")["code"], "not_permitted");
    other.request(&json!({"type": "lock", "key": "a", "nonce": "1", "holds": 1}).to_string());
    assert_eq!(other.answer_of("error")["code"], "not_permitted");
    other.request(&json!({"type": "lock", "key": "a", "nonce": "2", "holds": token}).to_string());
    other.answer_of("lost");
    // The right one moves the lock to the new connection, and the old one is closed.
    other.request(&json!({"type": "lock", "key": "a", "nonce": "1", "holds": token}).to_string());
    assert_eq!(other.answer_of("granted")["token"], token);
    holder.expect_closed();
    daemon.wire().open(r#"{"type":"lock","key":"a","nowait":true}"#).answer_of("busy");
}

/// A command under a lock whose daemon has lost its journal.
fn with_a_lost_lock(options: &[&str], command: &str) -> (Daemon, Process) {
    let mut daemon = Daemon::start();
    let mut run = daemon.run(options);
    run.args(["k", "--", "sh", "-c", command]);
    let mut run = Process::spawn(run.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()));
    run.wait_for_line("running");
    daemon.kill();
    fs::remove_file(daemon.folder().join("sock.journal")).unwrap();
    daemon.restart(&[]);
    (daemon, run)
}

#[test]
fn a_command_whose_lock_is_lost_is_stopped_and_kmutex_says_why() {
    let (_daemon, mut run) = with_a_lost_lock(&[], "echo running; exec sleep 1000");
    assert_eq!(run.wait(), 74);
    assert_eq!(
        run.stderr(),
        "kmutex: the lock was lost: the daemon does not know of it; stopping the command\n"
    );
}

#[test]
fn a_command_that_does_not_stop_is_killed() {
    let stubborn = "trap '' TERM; echo running; while :; do sleep 1000; done";
    let (_daemon, mut run) = with_a_lost_lock(&["--kill-after", "0.2"], stubborn);
    assert_eq!(run.wait(), 74);
}

#[test]
fn what_the_command_started_does_not_outlive_a_lost_lock() {
    let script = "sleep 1000 & echo $! > child; echo running; wait";
    let (daemon, mut run) = with_a_lost_lock(&[], script);
    assert_eq!(run.wait(), 74);
    let child: i32 = fs::read_to_string(daemon.folder().join("child")).unwrap().trim().parse().unwrap();
    wait_until("the end of the command's child", || kill(Pid::from_raw(child), None).is_err());
}

#[test]
fn a_command_may_go_on_without_its_lock() {
    let (_daemon, mut run) = with_a_lost_lock(&["--on-lost", "continue"], "echo running; read line; exit 5");
    let mut stderr = run.child.stderr.take().unwrap();
    let said = wait_for("the message", || {
        let mut line = [0; 200];
        std::io::Read::read(&mut stderr, &mut line)
            .ok()
            .map(|n| String::from_utf8_lossy(&line[..n]).into_owned())
    });
    assert_eq!(
        said,
        "kmutex: the lock was lost: the daemon does not know of it; the command goes on without it\n"
    );
    assert!(run.is_running());
    drop(run.child.stdin.take());
    assert_eq!(run.wait(), 74);
}

#[test]
fn while_no_daemon_is_there_the_command_goes_on() {
    let mut daemon = Daemon::start();
    let run = daemon.hold("k");
    daemon.kill();
    assert_eq!(run.finish(3), 3);
}

#[test]
fn a_release_waits_a_moment_for_the_daemon() {
    let mut daemon = Daemon::start();
    let mut run = daemon.hold("k");
    daemon.kill();
    drop(run.process.child.stdin.take());
    let children = format!("/proc/{0}/task/{0}/children", run.process.pid());
    wait_until("the end of the command", || fs::read_to_string(&children).is_ok_and(|pids| pids.is_empty()));
    assert!(run.process.is_running(), "kmutex does not give the release up at once");
    daemon.restart(&[]);
    assert_eq!(run.process.wait(), 0);
    daemon.wait_for_log(r#"release: "k" by "#);
    assert!(daemon.log().contains(": exit 0"), "{}", daemon.log());
}

#[test]
fn an_autostarted_daemon_comes_back_by_itself() {
    let daemon = Daemon::start();
    let place = daemon.folder().join("auto");
    let _stop = crate::harness::Autostarted(place.clone());
    let auto = |args: &[&str]| {
        let mut command = daemon.kmutex(args);
        command.env("KMUTEX_SOCK", &place);
        command
    };
    let mut command = auto(&["run", "k", "--", "sh", "-c", "echo running; read line; exit 4"]);
    let mut run = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    run.wait_for_line("running");
    let lock_file = daemon.folder().join("auto.lock");
    let first: i32 = fs::read_to_string(&lock_file).unwrap().trim().parse().unwrap();
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    wait_until("another daemon, with the lock", || {
        auto(&["run", "-n", "k", "true"]).status().unwrap().code() == Some(75)
            && fs::read_to_string(&lock_file).unwrap().trim() != first.to_string()
    });
    drop(run.child.stdin.take());
    assert_eq!(run.wait(), 4);
}

#[test]
fn a_journal_that_cannot_be_trusted_is_named_and_the_daemon_serves() {
    type Damage = fn(&std::path::Path);
    let damages: [(&str, Damage); 4] = [
        ("cut off", |path| fs::write(path, "kmutex").unwrap()),
        ("damaged", |path| fs::write(path, vec![7; 500]).unwrap()),
        ("symbolic link", |path| {
            fs::rename(path, path.with_extension("moved")).unwrap();
            std::os::unix::fs::symlink(path.with_extension("moved"), path).unwrap();
        }),
        ("lets others in", |path| {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
        }),
    ];
    for (complaint, damage) in damages {
        let mut daemon = Daemon::start();
        let mut client = daemon.wire();
        client.send(KEY).expect("O");
        daemon.kill();
        damage(&daemon.folder().join("sock.journal"));
        daemon.restart(&[]);
        let line = daemon.wait_for_log("WARN");
        assert!(line.contains("sock.journal") && line.contains(complaint), "{line}");
        daemon.wire().send(KEY).expect("O");
    }
}

/// Starts a holder that is stopped before it can name its command to the daemon, and restarts the daemon. The next daemon watches the
/// holder, and must search for the command when the holder is killed. What it prints: the pids of both.
const UNNAMED: &str =
    "kmutex run --sock $S k -- sh -c 'kill -STOP $PPID; echo $PPID $$ > /tmp/pids; exec sleep 1000' &
    until test -s /tmp/pids; do :; done; d=$(cat $S.lock); kill -KILL $d; while kill -0 $d 2> /dev/null; do :; done";

/// Bob's daemon is another one than that which gave the lock of [`UNNAMED`], and `next` happens; it must end with 0. A service of root
/// was there before, and has started something meanwhile.
fn after_a_holder_that_named_no_command(next: &str) {
    let world = World::new();
    let mut service = world.start(0, "echo ready; read line; sleep 1000 & echo started; wait");
    let sock = "S=/tmp/bobs; export S";
    let first = world.serve(BOB, "--sock /tmp/bobs --grace 1000");
    world.expect(BOB, &format!("{sock}; {UNNAMED}"), 0);
    drop(first);
    let _daemon = world.serve(BOB, "--sock /tmp/bobs --grace 1000");
    writeln!(service.child.stdin.as_mut().unwrap(), "go").unwrap();
    service.wait_for_line("started");
    world.expect(BOB, &format!("{sock}; {next}"), 0);
}

#[test]
#[ignore = "needs root, to act as several users"]
fn a_command_that_was_not_named_is_searched_for_among_all_processes() {
    // Its kmutex is killed: it keeps the lock. Then it is killed too.
    let next = "read kmutex command < /tmp/pids; kill -KILL $kmutex
        for i in 1 2 3 4 5; do kmutex run --sock $S -n k -- true; test $? = 75 || exit 9; done; kill -KILL $command
        exec kmutex run --sock $S --queue -w 50 k -- true";
    after_a_holder_that_named_no_command(next);
}

/// The same if the command ends first. No process has the lock's token then, and that root has started another one meanwhile, which
/// Bob's daemon cannot look into, keeps no lock.
#[test]
#[ignore = "needs root, to act as several users"]
fn a_process_of_root_is_not_taken_for_the_command_of_another_user() {
    let next = "read kmutex command < /tmp/pids; kill -KILL $command; kill -KILL $kmutex
        exec kmutex run --sock $S --queue -w 50 k -- true";
    after_a_holder_that_named_no_command(next);
}
