//! Clients and daemons in pid and user namespaces of their own, as in containers: a process is named by a descriptor, so no number
//! is taken for another process.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::harness::{Daemon, KMUTEX, PREAMBLE, Process, finish, wait_for, wait_until};
use crate::world::{BOB, EVE, World};

/// A folder that this machine and all containers see at the same path.
fn shared() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("kmutex-shared.").tempdir_in("/var/tmp").unwrap()
}

/// `kmutex ARGS` on this machine, for the daemon on `sock`.
fn kmutex(sock: &Path, args: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(KMUTEX);
    command.args(args).env("KMUTEX_SOCK", sock).stdin(Stdio::null());
    command
}

fn serve(sock: &Path, options: &[&str]) -> Process {
    let mut command = kmutex(sock, &["serve", "--no-log", "--ready-fd", "1"]);
    let mut process = Process::spawn(command.args(options).stdout(Stdio::piped()));
    process.wait_for_line("");
    process
}

/// Waits until the daemon has recorded which process holds on: its journal names the command of the only hold.
fn wait_until_named(sock: &Path) {
    let journal = PathBuf::from(format!("{}.journal", sock.display()));
    wait_until("the command to be named", || {
        let bytes = fs::read(&journal).unwrap();
        // A record that tells of a command (its kind is the fifth byte).
        bytes.chunks_exact(88).skip(1).any(|record| record[4] == 7)
    });
}

fn is_held(sock: &Path) -> bool {
    match finish(&mut kmutex(sock, &["run", "--no-autostart", "-n", "k", "true"])).code {
        75 => true,
        0 => false,
        other => panic!("exit status {other}"),
    }
}

fn wait_until_free(sock: &Path) {
    wait_until("the lock to be free", || !is_held(sock));
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn the_command_of_a_client_in_a_container_keeps_the_lock_and_frees_it_with_the_container() {
    let folder = shared();
    let sock = folder.path().join("sock");
    let mut daemon = serve(&sock, &["--grace", "1"]);
    let env = format!("KMUTEX_SOCK={}", sock.display());
    for restarts in [false, true] {
        let world = World::new();
        let mut run =
            world.start(0, &format!("{env} exec kmutex run k -- sh -c 'echo ready; exec sleep 1000'"));
        wait_until_named(&sock);
        if restarts {
            // Its kmutex dies, and the next daemon has only the journal.
            world.run(0, "pkill -KILL kmutex");
            run.wait();
            drop(daemon);
            daemon = serve(&sock, &["--grace", "1"]);
        }
        assert!(is_held(&sock));
        // All its processes are killed at once. Their numbers, 2 or 3, are those of other processes here.
        drop(run);
        drop(world);
        wait_until_free(&sock);
    }
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn a_shell_in_a_container_holds_a_lock_of_the_machines_daemon() {
    let folder = shared();
    let sock = folder.path().join("sock");
    let _daemon = serve(&sock, &[]);
    let world = World::new();
    let script = format!(
        "export KMUTEX_SOCK={}; kmutex lock k; echo ready; read line; kmutex unlock k; echo unlocked; read line
         kmutex lock k; echo again; read line",
        sock.display()
    );
    let mut shell = world.start(0, &script);
    let mut stdin = shell.child.stdin.take().unwrap();
    let mut next = || std::io::Write::write_all(&mut stdin, b"\n").unwrap();
    assert!(is_held(&sock));
    next();
    shell.wait_for_line("unlocked");
    assert!(!is_held(&sock));
    next();
    shell.wait_for_line("again");
    assert!(is_held(&sock));
    next();
    wait_until_free(&sock);
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn a_daemon_in_a_container_watches_processes_outside() {
    let folder = shared();
    let sock = folder.path().join("sock");
    let world = World::new();
    let log = folder.path().join("log");
    let serve = format!("kmutex serve --log-level debug --sock {} --ready-fd 1", sock.display());
    let _daemon = world.start(0, &format!("{serve} 2> {} | sed s/^/ready/", log.display()));
    // A shell of this machine.
    let mut command = kmutex(&sock, &[]);
    let script = r#""$0" lock k; echo ready; read line; "$0" unlock k; echo unlocked; read line; "$0" lock k; echo again; read line"#;
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", script]).arg(command.get_program()).env("KMUTEX_SOCK", &sock);
    command.stdin(Stdio::null());
    let mut shell = Process::spawn(shell.stdin(Stdio::piped()).stdout(Stdio::piped()));
    shell.wait_for_line("ready");
    let mut stdin = shell.child.stdin.take().unwrap();
    assert!(is_held(&sock));
    std::io::Write::write_all(&mut stdin, b"\n").unwrap();
    shell.wait_for_line("unlocked");
    assert!(!is_held(&sock));
    std::io::Write::write_all(&mut stdin, b"\n").unwrap();
    shell.wait_for_line("again");
    assert!(is_held(&sock));
    drop(stdin);
    wait_until_free(&sock);
    // A command whose kmutex is killed and that has closed what it inherited.
    let mut run =
        kmutex(&sock, &["run", "k", "--", "sh", "-c", "exec 3>&- 4>&- 5>&-; echo $$; exec sleep 1000"]);
    let mut run = Process::spawn(run.stdout(Stdio::piped()));
    let pid = Pid::from_raw(run.line().unwrap().parse().unwrap());
    let command = crate::harness::KillOnDrop::new(&pid.to_string());
    wait_until("the command to be named", || fs::read_to_string(&log).unwrap().contains("has named it"));
    run.signal(Signal::SIGKILL);
    run.wait();
    assert!(is_held(&sock));
    command.kill();
    wait_until_free(&sock);
}

/// The daemon that a client in the first container started ends with that container. The next one is in another pid namespace, where the
/// numbers in the journal mean nothing.
#[test]
#[ignore = "needs root, to make namespaces"]
fn after_a_restart_in_another_container_holders_must_come_back() {
    let folder = shared();
    let sock = folder.path().join("sock");
    let env = format!("KMUTEX_SOCK={}", sock.display());
    let (first, second) = (World::new(), World::new());
    // One holder dies with its container, one can come back.
    let gone = first.start(0, &format!("{env} exec kmutex run gone -- sh -c 'echo ready; exec sleep 1000'"));
    let stays = second
        .start(0, &format!("{env} exec kmutex run --no-autostart stays -- sh -c 'echo ready; exec cat'"));
    let held = |key: &str| finish(&mut kmutex(&sock, &["run", "--no-autostart", "-n", key, "true"])).code;
    assert_eq!([held("gone"), held("stays")], [75, 75]);
    // A process of the second container for every number that the first one had.
    let _crowd = second.start(0, "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo ready; wait");
    drop(gone);
    drop(first);
    wait_until("the daemon to be gone", || held("gone") == 69);
    let _daemon = second.start(
        0,
        &format!("kmutex serve --no-log --grace 2 --sock {} --ready-fd 1 | sed s/^/ready/", sock.display()),
    );
    assert_eq!(held("gone"), 75, "for the time of --grace");
    wait_until("the lock of the dead to be free", || held("gone") == 0);
    assert_eq!(held("stays"), 75);
    drop(stays);
    wait_until("the other to be free", || held("stays") == 0);
}

/// The number of a command comes round while a leftover has its connection open.
#[test]
#[ignore = "needs root, to make namespaces"]
fn a_number_that_was_used_again_holds_no_lock() {
    for restarts in [false, true] {
        // The first process reaps what is left to it, so that numbers are free.
        let world = World::with("echo ready; exec env --ignore-signal=CHLD cat");
        let daemon = world.serve(0, "--grace 1");
        let sock = world.path("/run/kmutex/kmutex.sock");
        let script = "kmutex run k -- sh -c 'sleep 1000 & echo $$ $! > /run/pids; exec sleep 1001' & echo $! > /run/kmutex.pid
             until test -s /run/pids; do :; done; echo ready; wait";
        let shell = world.start(0, script);
        wait_until_named(&sock);
        world.expect(0, "kill -KILL $(cat /run/kmutex.pid); read c l < /run/pids; kill -KILL $c", 0);
        let pids = fs::read_to_string(world.path("/run/pids")).unwrap();
        let command: i32 = pids.split_whitespace().next().unwrap().parse().unwrap();
        world.expect(0, &format!("while kill -0 {command} 2>&-; do :; done"), 0);
        let again = format!(
            "echo {} > /proc/sys/kernel/ns_last_pid; sleep 1002 & echo $!; exec sleep 1002",
            command - 1
        );
        let other = wait_for("another process with the number", || {
            let mut other = Process::spawn(world.sh(0, &again).stdout(Stdio::piped()));
            (other.line().unwrap() == command.to_string()).then_some(other)
        });
        world.expect(0, "kmutex run -n k -- true", 75);
        let _next = restarts.then(|| {
            drop(daemon);
            world.expect(0, "d=$(cat /run/kmutex/kmutex.sock.lock); kill -KILL $d; while kill -0 $d 2>&-; do :; done; read c l < /run/pids; kill -KILL $l", 0);
            world.serve(0, "--grace 1")
        });
        world.run(0, "read c l < /run/pids; kill -KILL $l");
        wait_until("the lock to be free", || world.run(0, "kmutex run -n k -- true").code == 0);
        drop((other, shell));
    }
}

#[test]
#[ignore = "needs root, to act as several users"]
fn process_1_and_processes_of_other_users_cannot_hold_a_lock() {
    let world = World::new();
    let _daemon = world.serve(0, "--mode 666");
    world.run(0, "kmutex lock --pid 1 k").assert_error(77, &["process 1"]);
    let _shell = world.start(EVE, "echo $$ > /tmp/pid; echo ready; read line");
    world.run(BOB, "kmutex lock --pid $(cat /tmp/pid) k").assert_error(77, &["belongs to uid"]);
    world.run(BOB, "kmutex lock --pid 1 k").assert_error(77, &["belongs to uid"]);
    world.expect(0, "kmutex run -n k -- true", 0);
    // Root may name any other. Eve may then unlock what she did not lock as little as Bob.
    world.expect(0, "kmutex lock --pid $(cat /tmp/pid) k", 0);
    world.run(EVE, "kmutex unlock --pid $(cat /tmp/pid) k").assert_error(77, &["does not hold"]);
    world.expect(0, "kmutex run -n k -- true", 75);
    world.expect(0, "kmutex unlock --pid $(cat /tmp/pid) k", 0);
}

/// A script that a container runs as its first process is a shell as any other.
#[test]
#[ignore = "needs root, to make namespaces"]
fn a_script_that_is_process_1_of_its_container_may_hold_a_lock() {
    let world = World::new();
    let _daemon = world.serve(0, "");
    let script = "unshare --pid --fork --mount-proc --kill-child sh -c 'kmutex lock k && echo ready && read line; kmutex unlock k'";
    let shell = world.start(0, script);
    world.expect(0, "kmutex run -n k -- true", 75);
    drop(shell);
    wait_until("the lock to be free", || world.run(0, "kmutex run -n k -- true").code == 0);
}

#[test]
fn a_process_is_named_by_its_descriptor_and_not_by_its_number() {
    let daemon = Daemon::start();
    let mut wire = daemon.wire();
    let me = Pid::this();
    let request = |key: &str| format!(r#"{{"type":"lock","key":"{key}","exec":true,"child":{me}}}"#);
    wire.open(&request("k"));
    assert_eq!(wire.answer_of("error")["code"], "bad_request");
    // Another file in its place.
    let file = fs::File::open("/dev/null").unwrap();
    wire.request_with_file(b"", &request("k"), file.as_fd());
    assert_eq!(wire.answer_of("error")["code"], "bad_request");
    // One that comes with another request is not kept for the next.
    wire.request_with(b"", r#"{"type":"ping"}"#, me).answer_of("pong");
    wire.request(&request("k"));
    assert_eq!(wire.answer_of("error")["code"], "bad_request");
    // The number may be wrong.
    let other = format!(r#"{{"type":"lock","key":"k","exec":true,"child":{}}}"#, u32::MAX);
    wire.request_with(b"", &other, me).answer_of("granted");
    drop(wire);
    wait_until("this process to hold the lock", || {
        daemon.status().first().is_some_and(|lock| lock["holders"][0]["pid"] == me.as_raw())
    });
    let mut wire = daemon.wire();
    wire.request_with(PREAMBLE, r#"{"type":"unlock","key":"k","pid":1}"#, me).answer_of("hello");
    wire.answer_of("released");
    // A process that has ended.
    let mut ended = Process::spawn(std::process::Command::new("true").stdin(Stdio::null()));
    wait_until("its end", || {
        fs::read_to_string(format!("/proc/{}/stat", ended.pid())).unwrap().contains(" Z ")
    });
    wire.request_with(b"", &request("k"), ended.pid());
    assert_eq!(wire.answer_of("error")["code"], "not_permitted");
    // A holder names its command when it may have ended. That is no error: the client has its status.
    wire.request(r#"{"type":"lock","key":"other","inherits":false}"#).answer_of("granted");
    wire.request_with(b"", &format!(r#"{{"type":"child","pid":{}}}"#, ended.pid()), ended.pid());
    assert_eq!(wire.request(r#"{"type":"ping"}"#).answer()["type"], "pong");
    assert_eq!(daemon.counts("other"), (1, 0));
    ended.wait();
}

#[test]
fn a_client_of_protocol_1_passes_no_descriptor_until_it_goes_on_with_protocol_2() {
    const KEY: &[u8; 16] = b"0123456789abcdef";
    let daemon = Daemon::start();
    let open_files = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    let mut wire = daemon.wire();
    wire.send(KEY).expect("O");
    let before = open_files();
    let file = fs::File::open("/dev/null").unwrap();
    for _ in 0..3 {
        wire.send_with("R", file.as_fd());
        wire.send(KEY).expect("O");
    }
    assert_eq!(open_files(), before, "the daemon has kept what was passed");
    wire.send("R").send(PREAMBLE).answer_of("hello");
    let me = Pid::this();
    let request = format!(r#"{{"type":"lock","key":"k","exec":true,"child":{me}}}"#);
    wire.request_with(b"", &request, me).answer_of("granted");
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn in_a_user_namespace_without_user_ids_no_daemon_is_trusted() {
    let world = World::new();
    let _daemon = world.serve(0, "--mode 666 --sock /run/roots");
    let _bobs = world.serve(BOB, "--mode 666 --sock /tmp/bobs");
    for (option, sock) in [("", "/run/roots"), ("", "/tmp/bobs"), ("--map-root-user", "/run/roots")] {
        let script = format!("unshare --user {option} kmutex run --sock {sock} -n k -- true");
        let said = world.run(BOB, &script);
        assert!(!said.stderr.contains("65534") && !said.stderr.contains("--trust-uid"), "{said:?}");
        said.assert_error(77, &["no uid in this user namespace"]);
    }
    // Who has a uid there is known there: Bob's own daemon is that of root in the namespace.
    world.expect(BOB, "unshare --user --map-root-user kmutex run --sock /tmp/bobs -n k -- true", 0);
    // A daemon that is started in such a namespace.
    world.expect(BOB, "unshare --user --map-root-user kmutex run --sock /tmp/own -n k -- true", 0);
}

/// To a daemon in a user namespace, all users that have no uid there look the same, and none of them may do what another one may.
#[test]
#[ignore = "needs root, to make namespaces"]
fn users_without_a_uid_have_no_rights_over_each_other() {
    let world = World::new();
    let serve =
        "exec unshare --user --map-root-user kmutex serve --no-log --mode 666 --ready-fd 1 --trust-none";
    let serve = serve.replace(" --trust-none", " --sock /tmp/sock | sed s/^/ready/");
    let _daemon = world.start(65_530, &serve);
    let kmutex = |args: &str| format!("kmutex {args} --sock /tmp/sock --trust-uid 65530");
    let _holder = world.start(BOB, &format!("{} k -- sh -c 'echo ready; cat'", kmutex("run")));
    world.run(EVE, &format!("{} --yes k", kmutex("break"))).assert_error(77, &["not permitted"]);
    world.run(EVE, &format!("{} @{EVE}/x -- true", kmutex("run"))).assert_error(77, &["belongs to"]);
    world.expect(EVE, &format!("{} -n k -- true", kmutex("run")), 75);
    world.expect(65_530, &format!("{} --yes k", kmutex("break")), 0);
    assert_eq!(fs::metadata(world.path("/tmp/sock")).unwrap().uid(), 65_530);
}
