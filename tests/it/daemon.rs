//! The daemon as a process: its sockets, its limits, its log, its end.

use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::harness::{Daemon, KMUTEX, PREAMBLE, Process, Wire, tool, wait_for, wait_until};

const KEY: &[u8; 16] = b"0123456789abcdef";

/// `kmutex serve` that is to be refused: its exit code and its one line.
fn refused(args: &[&str], folder: &Path) -> (i32, String) {
    let output = Command::new(KMUTEX).arg("serve").args(args).current_dir(folder).output().unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.starts_with("kmutex: "), "{line}");
    (output.status.code().unwrap(), line)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn it_serves_several_sockets_side_by_side() {
    let daemon = Daemon::with(&["--sock", "other", "--sock", "127.0.0.1:0"]);
    let line = daemon.wait_for_log("serving on 127.0.0.1:");
    let addr = line.rsplit(' ').next().unwrap();
    let mut first = daemon.wire();
    first.send(KEY).expect("O");
    let mut other = Wire::new(UnixStream::connect(daemon.folder().join("other")).unwrap());
    other.send(KEY);
    daemon.wait_for_log("wait: ");
    let mut third = Wire::new(TcpStream::connect(addr).unwrap());
    third.send(KEY);
    daemon.wait_for_logs("wait: ", 2);
    first.send("R");
    other.expect("R");
    third.expect("R");
}

#[test]
fn a_bare_port_is_the_loopbacks_of_both_kinds_and_nothing_else() {
    // The kernel knows a port that is free on both.
    let port = wait_for("a port that is free on both loopbacks", || {
        let v4 = TcpListener::bind("127.0.0.1:0").ok()?;
        let port = v4.local_addr().unwrap().port();
        TcpListener::bind(("::1", port)).ok().map(|_| port)
    });
    let daemon = Daemon::with(&["--sock", &port.to_string()]);
    daemon.wait_for_log(&format!("serving on 127.0.0.1:{port}"));
    daemon.wait_for_log(&format!("serving on [::1]:{port}"));
    let [mut v4, mut v6] =
        ["127.0.0.1", "::1"].map(|host| Wire::new(TcpStream::connect((host, port)).unwrap()));
    v4.send(KEY).expect("O");
    v6.send(KEY);
    daemon.wait_for_log("wait: ");
    v4.send("R");
    v6.expect("R");
    let sockets =
        fs::read_to_string("/proc/net/tcp").unwrap() + &fs::read_to_string("/proc/net/tcp6").unwrap();
    let listening =
        sockets.lines().filter(|line| line.contains(&format!(":{port:04X} ")) && line.contains(" 0A "));
    assert_eq!(listening.count(), 2, "{sockets}");
}

#[test]
fn a_socket_is_for_its_owner_unless_asked_otherwise() {
    let daemon = Daemon::start();
    assert_eq!(mode(&daemon.sock()), 0o600);
    assert_eq!(mode(&daemon.folder().join("sock.lock")), 0o600);
    assert_eq!(mode(&daemon.folder().join("sock.journal")), 0o600);

    let gid = nix::unistd::getgid().as_raw();
    let wider = Daemon::with(&["--mode", "660", "--group", &gid.to_string()]);
    assert_eq!(mode(&wider.sock()), 0o660);
    assert_eq!(fs::metadata(wider.sock()).unwrap().gid(), gid);
}

#[test]
#[ignore = "needs root, to give a file to another group"]
fn a_socket_may_be_for_a_group() {
    let daemon = Daemon::with(&["--mode", "660", "--group", "daemon"]);
    assert_eq!(mode(&daemon.sock()), 0o660);
    let gid = kmutex::lookup::group("daemon").unwrap();
    assert_eq!(fs::metadata(daemon.sock()).unwrap().gid(), gid);
}

#[test]
#[ignore = "needs strace"]
fn a_socket_is_never_wider_for_a_moment() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let mut strace = tool("strace");
    strace.args(["-f", "-e", "trace=umask,bind,listen,chmod,fchmodat,chown,lchown,fchownat", "-o"]);
    strace.arg(&trace).args([
        KMUTEX,
        "serve",
        "--detach",
        "--idle-exit",
        "0",
        "--mode",
        "666",
        "--group",
        "0",
    ]);
    strace.arg("--sock").arg(folder.path().join("sock"));
    assert!(strace.status().unwrap().success());
    let calls = fs::read_to_string(&trace).unwrap();
    let at = |call: &str| calls.find(call).unwrap_or_else(|| panic!("no {call} in {calls}"));
    assert!(at("umask(0177)") < at("bind("), "{calls}");
    assert!(at("bind(") < at("chown"), "{calls}");
    assert!(at("chown") < at("chmod"), "{calls}");
}

#[test]
#[ignore = "needs strace"]
fn it_does_not_spin_at_the_connection_limit() {
    let daemon = Daemon::with(&["-m", "2"]);
    let mut inside = [daemon.wire(), daemon.wire()];
    inside[0].send(KEY).expect("O");
    inside[1].send(KEY);
    daemon.wait_for_log("wait: ");
    let _outside = daemon.wire();
    daemon.wait_for_log("refused a connection");
    assert_is_idle(&daemon);
    // The clients inside are served.
    inside[0].send("R");
    inside[1].expect("R").send(KEY).expect("O");
}

#[test]
fn without_descriptors_it_serves_the_connected_clients_and_does_not_spin() {
    let daemon = Daemon::start();
    let mut inside = daemon.wire();
    inside.send(KEY).expect("O");
    // Leaves room for two, whatever descriptors the daemon has inherited.
    let used = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    let limit = format!("--nofile={}", used + 2);
    let pid = daemon.pid().to_string();
    assert!(tool("prlimit").args(["--pid", &pid, &limit]).status().unwrap().success());
    let refused = || daemon.log().contains("cannot accept: Too many open files");
    let mut others = Vec::new();
    while !refused() {
        assert!(others.len() < 20, "the limit is not felt");
        let mut other = daemon.wire();
        other.send(PREAMBLE);
        wait_until("the connection's fate", || {
            refused() || daemon.log().matches("connect: ").count() == others.len() + 2
        });
        others.push(other);
    }
    inside.send("R").send(KEY).expect("O");
    let mut outside = daemon.wire();
    outside.send(PREAMBLE);
    // One that leaves makes room.
    drop(others);
    outside.answer_of("hello");
    assert_eq!(daemon.log().matches("cannot accept").count(), 1, "it says so once");
}

#[test]
fn hundreds_may_connect_before_it_accepts() {
    const CLIENTS: usize = 300;
    let daemon = Daemon::start();
    kill(daemon.pid(), Signal::SIGSTOP).unwrap();
    let addr = UnixAddr::new(&daemon.sock()).unwrap();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
            connect(client.as_raw_fd(), &addr).unwrap_or_else(|e| panic!("client {number}: {e}"));
            client
        })
        .collect();
    kill(daemon.pid(), Signal::SIGCONT).unwrap();
    daemon.wire().send(KEY).expect("O");
    drop(clients);
}

#[test]
#[ignore = "needs strace"]
fn an_idle_daemon_makes_no_system_calls() {
    let daemon = Daemon::start();
    let mut client = daemon.wire();
    client.open(r#"{"type":"lock","key":"k"}"#).answer_of("granted");
    assert_is_idle(&daemon);
}

/// Watches the daemon for as long as any timer of its could take to fire twice.
fn assert_is_idle(daemon: &Daemon) {
    let trace = daemon.folder().join("trace");
    let mut strace = tool("strace");
    strace.arg("-o").arg(&trace).args(["-p", &daemon.pid().to_string()]);
    let strace = Process::spawn(strace.stderr(Stdio::null()));
    // It is attached when the call that the daemon waits in is seen.
    wait_until("strace", || fs::read_to_string(&trace).is_ok_and(|calls| calls.contains("epoll_")));
    // Not to wait for anything: it is watched for so long.
    std::thread::sleep(Duration::from_millis(2_500));
    let calls = fs::read_to_string(&trace).unwrap();
    assert_eq!(calls.matches("epoll_").count(), 1, "{calls}");
    assert_eq!(calls.lines().count(), 1, "{calls}");
    drop(strace);
}

#[test]
fn signals_end_it_at_once_whatever_clients_do() {
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        let mut daemon = Daemon::start();
        let (mut owner, mut waiter, mut half) = (daemon.wire(), daemon.wire(), daemon.wire());
        owner.send(KEY).expect("O");
        waiter.send(KEY);
        half.send(&KEY[..3]);
        daemon.wait_for_log("wait: ");
        let before = Instant::now();
        daemon.process().signal(signal);
        assert_eq!(daemon.process().wait(), 0);
        let took = before.elapsed();
        // It waits for none of the clients: half a message alone would have ten seconds.
        assert!(took < Duration::from_secs(5), "it took {took:?}");
        assert!(!daemon.sock().exists());
        assert!(!daemon.folder().join("sock.lock").exists());
        daemon.wait_for_log("stopping: ");
    }
}

#[test]
fn a_second_daemon_is_refused_and_told_of_the_first() {
    let daemon = Daemon::start();
    for args in [&["--sock", "sock"][..], &["-f", "--sock", "sock"]] {
        let (code, line) = refused(args, daemon.folder());
        assert_eq!(code, 75);
        assert!(line.contains(&format!("pid {}", daemon.pid())), "{line}");
    }
    daemon.wire().send(KEY).expect("O");
}

#[test]
fn a_dead_daemons_socket_is_replaced() {
    let mut daemon = Daemon::start();
    daemon.kill();
    assert!(daemon.sock().exists());
    daemon.restart(&[]);
    daemon.wire().send(KEY).expect("O");
}

#[test]
fn a_socket_that_another_program_serves_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let _other = UnixListener::bind(folder.path().join("sock")).unwrap();
    let (code, line) = refused(&["-f", "--sock", "sock"], folder.path());
    assert_eq!(code, 75);
    assert!(line.contains(&format!("pid {}", std::process::id())), "{line}");
    assert!(UnixStream::connect(folder.path().join("sock")).is_ok());
    assert!(!folder.path().join("sock.lock").exists(), "nothing is left behind");
}

#[test]
fn what_cannot_be_served_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "precious").unwrap();
    fs::create_dir(folder.path().join("directory")).unwrap();
    symlink("/dev/null", folder.path().join("linked.lock")).unwrap();
    let long = "x".repeat(108);
    for (args, code, named) in [
        (&["-f", "--sock", "file"][..], 73, "file: it exists and is not a socket"),
        (&["--sock", "directory"], 73, "directory: it exists and is not a socket"),
        (&["--sock", "nowhere/sock"], 73, "nowhere/sock.lock: No such file or directory"),
        (&["--sock", "linked"], 73, "linked.lock: Too many levels of symbolic links"),
        (&["--sock", &long], 64, "108 bytes"),
        (&["--sock", "65536"], 64, "from 0 to 65535"),
        (&["--sock", "no.such.host.invalid:7000"], 69, "no.such.host.invalid:7000"),
        (&["--sock", "s", "--group", "no such group"], 64, "--group \"no such group\""),
        (&["--sock", "s", "--mode", "999"], 64, "--mode"),
        (&["--sock", "s", "-m", "0"], 64, "--maxconn"),
        (&["--sock", "s", "-t", "-1"], 64, "--timeout"),
        (&["--sock", "s", "--state", "nowhere/state"], 73, "nowhere/state.lock"),
        (&["--sock", "s", "extra"], 64, "extra"),
    ] {
        let (got, line) = refused(args, folder.path());
        assert_eq!(got, code, "{args:?}: {line}");
        assert!(line.contains(named), "{args:?}: {line}");
    }
    assert_eq!(fs::read_to_string(folder.path().join("file")).unwrap(), "precious");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let (code, line) = refused(&["--sock", &addr], Path::new("/"));
    assert_eq!(code, 73);
    assert!(line.contains(&addr) && line.contains("in use"), "{line}");
}

#[test]
fn it_may_open_as_many_files_as_the_hard_limit_allows() {
    let folder = tempfile::tempdir().unwrap();
    let mut limited = tool("prlimit");
    limited.args(["--nofile=100:5000", KMUTEX, "serve", "--sock", "sock", "--ready-fd", "1"]);
    limited.current_dir(folder.path()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut daemon = Process::spawn(&mut limited);
    daemon.wait_for_line("");
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(line.split_whitespace().nth(3), Some("5000"), "{line}");
}

#[test]
fn when_idle_it_ends_if_asked_to_but_not_under_a_client() {
    let mut daemon = Daemon::with(&["--idle-exit", "0.2"]);
    let mut client = daemon.wire();
    client.send(KEY).expect("O");
    // One that began later and has no client has ended before it.
    assert_eq!(Daemon::with(&["--idle-exit", "0.2"]).process().wait(), 0);
    assert!(daemon.process().is_running(), "it has a client");
    drop(client);
    assert_eq!(daemon.process().wait(), 0);
    assert!(!daemon.sock().exists());
    assert!(!daemon.folder().join("sock.journal").exists(), "nothing was held");
}

#[test]
fn the_log_tells_every_event_with_key_and_peer() {
    let daemon = Daemon::with(&["-t", "0.3"]);
    let me = format!("(pid {}, uid {})", std::process::id(), nix::unistd::getuid());
    let (mut new, mut old) = (daemon.wire(), daemon.wire());
    new.open(r#"{"type":"lock","key":"a \"key\""}"#).answer_of("granted");
    new.request(r#"{"type":"release","outcome":{"exit":4}}"#).answer_of("released");
    old.send(KEY).expect("O");
    drop(new);
    old.expect_closed();
    for event in [
        format!("connect: client 0 {me} on "),
        format!("grant: \"a \\\"key\\\"\" to client 0 {me}, token "),
        format!("release: \"a \\\"key\\\"\" by client 0 {me}: exit 4"),
        format!("grant: 30313233343536373839616263646566 to client 1 {me}"),
        format!("expire: 30313233343536373839616263646566, held by client 1 {me}"),
        format!("close: client 0 {me}: end of stream"),
    ] {
        daemon.wait_for_log(&event);
    }
}

#[test]
fn by_default_the_log_tells_only_start_and_stop() {
    let folder = tempfile::tempdir().unwrap();
    let log = |args: &[&str], filter: Option<&str>| {
        let mut command = Command::new(KMUTEX);
        command
            .args(["serve", "--sock", "sock"])
            .args(args)
            .current_dir(folder.path())
            .env_remove("RUST_LOG");
        filter.map(|filter| command.env("RUST_LOG", filter));
        let mut daemon = Process::spawn(command.stderr(Stdio::piped()));
        let sock = folder.path().join("sock");
        let stream = wait_for("the socket", || UnixStream::connect(&sock).ok());
        Wire::new(stream).send(KEY).expect("O");
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait(), 0);
        let mut text = String::new();
        daemon.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    };
    let lines = log(&[], None);
    assert_eq!(lines.lines().count(), 2, "{lines}");
    assert!(lines.contains("serving on") && lines.contains("stopping: "), "{lines}");
    assert!(log(&["--log-level", "debug"], None).contains("grant: "));
    assert!(log(&[], Some("debug")).contains("grant: "));
    assert_eq!(log(&["--no-log"], Some("debug")), "");
    assert_eq!(log(&["--log-level", "error"], None), "");
}

#[test]
#[ignore = "needs strace"]
fn small_answers_are_not_held_back_on_tcp() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let mut strace = tool("strace");
    strace.args(["-f", "-e", "trace=setsockopt", "-o"]).arg(&trace);
    strace.args([KMUTEX, "serve", "--sock", "127.0.0.1:0"]).stderr(Stdio::piped());
    let mut daemon = Process::spawn(&mut strace);
    let mut log = daemon.child.stderr.take().unwrap();
    let mut text = String::new();
    let addr = loop {
        let mut byte = [0];
        log.read_exact(&mut byte).unwrap();
        text.push(byte[0] as char);
        if let Some(line) = text.strip_suffix('\n')
            && line.contains("serving on 127.0.0.1:")
        {
            break line.rsplit(' ').next().unwrap().to_string();
        }
    };
    Wire::new(TcpStream::connect(addr).unwrap()).send(KEY).expect("O");
    let calls = fs::read_to_string(&trace).unwrap();
    assert!(calls.contains("TCP_NODELAY, [1]"), "{calls}");
    // strace ends with what it traces.
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.pid())).unwrap();
    for child in children.split_whitespace() {
        let pid = nix::unistd::Pid::from_raw(child.parse().unwrap());
        nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    }
    assert_eq!(daemon.wait(), 0);
}
