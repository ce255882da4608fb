//! TLS over TCP: what works through it, and what becomes of clients that do not speak it, or may not.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::certificates::{Authority, tcp_sock, tls_sock};
use crate::harness::{Daemon, Finished, Process, finish, tool};

/// `kmutex run OPTIONS... k -- echo ran`.
fn run_echo(daemon: &Daemon, options: &[String]) -> Finished {
    finish(daemon.run(options).args(["k", "--", "echo", "ran"]))
}

fn connect(sock: &str) -> TcpStream {
    let stream = TcpStream::connect(sock.trim_start_matches("tls://")).unwrap();
    stream.set_read_timeout(Some(crate::harness::TIMEOUT)).unwrap();
    stream
}

#[test]
#[ignore = "needs openssl"]
fn a_command_runs_under_a_lock_taken_through_tls() {
    let authority = Authority::new();
    let daemon = authority.daemon(&[]);
    let mut command = daemon.run(&authority.trust(&daemon));
    let done = finish(command.args(["k", "--", "sh", "-c", "echo $KMUTEX_KEY $KMUTEX_SOCK; exit 3"]));
    assert_eq!((done.code, done.stdout), (3, format!("k {}\n", tls_sock(&daemon))), "{}", done.stderr);
    assert_eq!(done.stderr, "");
    assert!(daemon.status().is_empty());
}

#[test]
#[ignore = "needs openssl"]
fn the_environment_names_the_files_as_well() {
    let authority = Authority::new();
    authority.issue("ci", "/CN=ci", "");
    let daemon = authority.daemon(&["--tls-client-ca", &authority.text("ca.pem")]);
    let mut command = daemon.run(&["k", "--", "echo", "ran"]);
    command.env("KMUTEX_SOCK", tls_sock(&daemon)).env("KMUTEX_TLS_CA", authority.path("ca.pem"));
    assert_eq!(finish(&mut command).code, 77);
    command.env("KMUTEX_TLS_CERT", authority.path("ci.pem")).env("KMUTEX_TLS_KEY", authority.path("ci.key"));
    assert_eq!(finish(&mut command).stdout, "ran\n");
}

#[test]
#[ignore = "needs openssl"]
fn a_waiter_through_tls_is_told_the_outcome() {
    let authority = Authority::new();
    let daemon = authority.daemon(&[]);
    let holder = daemon.hold("k");
    let mut waiter = Process::spawn(daemon.run(&authority.trust(&daemon)).args(["k", "--", "echo", "ran"]));
    daemon.wait_for_counts("k", 1, 1);
    assert_eq!(holder.finish(0), 0);
    assert_eq!(waiter.wait(), 79);
}

#[test]
#[ignore = "needs openssl"]
fn a_lock_taken_through_tls_lasts_as_long_as_the_command() {
    let authority = Authority::new();
    let daemon = authority.daemon(&[]);
    let mut command = daemon.run(&authority.trust(&daemon));
    command
        .args(["k", "--", "sh", "-c", "echo holding; read end"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut holder = Process::spawn(&mut command);
    holder.wait_for_line("holding");
    let end = holder.child.stdin.take();
    holder.signal(Signal::SIGKILL);
    assert_eq!(holder.wait(), 128 + 9);
    assert_eq!(daemon.counts("k"), (1, 0));
    drop(end);
    daemon.wait_for_counts("k", 0, 0);
}

#[test]
#[ignore = "needs openssl"]
fn a_lock_taken_through_tls_survives_a_restart_of_the_daemon() {
    let authority = Authority::new();
    let mut daemon = authority.daemon(&[]);
    let options = authority.trust(&daemon);
    let holder = daemon.hold_with(&options.iter().map(String::as_str).collect::<Vec<_>>(), "k");
    let [cert, key] = ["server.pem", "server.key"].map(|name| authority.text(name));
    daemon.restart(&["--sock", &options[1], "--tls-cert", &cert, "--tls-key", &key]);
    daemon.wait_for_log("grant: \"k\"");
    daemon.wait_for_counts("k", 1, 0);
    assert_eq!(holder.finish(0), 0);
    daemon.wait_for_counts("k", 0, 0);
}

#[test]
#[ignore = "needs openssl"]
fn a_long_status_comes_through_tls_whole() {
    let authority = Authority::new();
    let daemon = authority.daemon(&[]);
    let note = "n".repeat(250);
    let holders: Vec<_> = (0..300)
        .map(|number| {
            let mut wire = daemon.wire();
            wire.send(b"\0kmutex proto 2\n");
            let key = format!("{number}{}", "k".repeat(900));
            wire.send(
                format!("{{\"type\":\"lock\",\"key\":\"{key}\",\"who\":{{\"note\":\"{note}\"}}}}\n")
                    .as_bytes(),
            );
            wire
        })
        .collect();
    crate::harness::wait_until("all locks", || daemon.status().len() == holders.len());
    let mut status = daemon.kmutex(&["status", "--keys"]);
    let plain = finish(&mut status).stdout;
    assert!(plain.len() > 256 * 1024);
    assert_eq!(finish(status.args(authority.trust(&daemon))).stdout, plain);
}

#[test]
#[ignore = "needs openssl"]
fn a_plain_client_on_a_tls_port_gets_one_line_and_76() {
    let authority = Authority::new();
    let daemon = authority.daemon(&[]);
    let sock = tls_sock(&daemon);
    let plain = vec!["--sock".to_string(), sock.trim_start_matches("tls://").to_string()];
    let done = run_echo(&daemon, &plain);
    assert_eq!((done.code, done.stdout.as_str()), (76, ""));
    assert!(done.stderr.contains("this port speaks TLS"), "{}", done.stderr);
    assert_eq!(done.stderr.lines().count(), 1);
    // One of protocol 1 has no words for that.
    let mut stream = connect(&sock);
    stream.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap_or(0), 0);
}

#[test]
#[ignore = "needs openssl"]
fn a_tls_client_on_a_plain_port_gets_one_line_and_76() {
    let authority = Authority::new();
    let daemon = Daemon::with(&["--sock", "127.0.0.1:0"]);
    let sock = format!("tls://{}", tcp_sock(&daemon));
    let done = run_echo(&daemon, &["--sock".into(), sock, "--tls-ca".into(), authority.text("ca.pem")]);
    assert_eq!((done.code, done.stdout.as_str()), (76, ""));
    assert!(done.stderr.contains("it does not speak TLS"), "{}", done.stderr);
    assert_eq!(done.stderr.lines().count(), 1);
    daemon.wait_for_log("it speaks TLS to a port that does not");
}

#[test]
#[ignore = "needs openssl"]
fn a_daemon_that_is_not_trusted_is_refused() {
    let (authority, other) = (Authority::new(), Authority::new());
    authority.issue("server", "/CN=server", "DNS:elsewhere.example");
    let daemon = authority.daemon(&[]);
    for (options, why) in [
        (other.trust(&daemon), "is not signed by the authority that it names"),
        (authority.trust(&daemon), "not for localhost"),
    ] {
        let done = run_echo(&daemon, &options);
        assert_eq!((done.code, done.stdout.as_str()), (77, ""));
        assert!(done.stderr.contains(why), "{}", done.stderr);
    }
}

#[test]
#[ignore = "needs openssl"]
fn with_a_client_ca_only_clients_with_a_certificate_of_it_get_in() {
    let (authority, other) = (Authority::new(), Authority::new());
    authority.issue("ci", "/CN=ci", "");
    other.issue("ci", "/CN=ci", "");
    let daemon = authority.daemon(&["--tls-client-ca", &authority.text("ca.pem")]);
    assert_eq!(run_echo(&daemon, &authority.trust_as(&daemon, "ci")).stdout, "ran\n");
    let mut foreign = authority.trust(&daemon);
    foreign.extend(["--tls-cert".into(), other.text("ci.pem"), "--tls-key".into(), other.text("ci.key")]);
    for options in [authority.trust(&daemon), foreign] {
        let done = run_echo(&daemon, &options);
        assert_eq!((done.code, done.stdout.as_str()), (77, ""), "{}", done.stderr);
        assert!(done.stderr.contains("certificate"), "{}", done.stderr);
    }
}

#[test]
#[ignore = "needs openssl"]
fn bad_files_are_named_at_the_start_of_both_ends() {
    let authority = Authority::new();
    let daemon = authority.daemon(&[]);
    let sock = tls_sock(&daemon);
    for (options, what) in [
        (vec!["--tls-ca", "missing.pem"], "--tls-ca missing.pem: No such file"),
        (vec!["--tls-ca", "log"], "--tls-ca log: "),
        (vec!["--tls-cert", "log"], "--tls-cert needs --tls-key"),
    ] {
        let done = finish(daemon.run(&["--sock", &sock]).args(&options).args(["k", "true"]));
        assert_eq!(done.code, 64, "{}", done.stderr);
        assert!(done.stderr.contains(what), "{}", done.stderr);
    }
    let (cert, key) = (authority.text("server.pem"), authority.text("ca.key"));
    for (options, what) in [
        (vec![], "it needs --tls-cert and --tls-key"),
        (vec!["--tls-cert", &cert], "--tls-cert needs --tls-key"),
        (vec!["--tls-client-ca", &cert], "--tls-client-ca needs"),
        (vec!["--tls-cert", &cert, "--tls-key", &key], "the key does not belong to the certificate"),
        (vec!["--tls-cert", &cert, "--tls-key", &cert], "there is no key in it"),
        (vec!["--tls-cert", "/dev/zero", "--tls-key", &key], "not a regular file"),
    ] {
        let done = finish(daemon.kmutex(&["serve", "--sock", "tls://localhost:0"]).args(&options));
        assert_eq!(done.code, 64, "{}", done.stderr);
        assert!(done.stderr.contains(what), "{}", done.stderr);
    }
}

#[test]
#[ignore = "needs openssl"]
fn certificates_are_read_again_when_they_change_and_on_a_signal() {
    let (authority, other) = (Authority::new(), Authority::new());
    let daemon = authority.daemon(&[]);
    assert_eq!(run_echo(&daemon, &authority.trust(&daemon)).stdout, "ran\n");
    // The key is replaced first: what does not belong together changes nothing.
    fs::copy(other.path("server.key"), authority.path("server.key")).unwrap();
    nix::sys::signal::kill(daemon.pid(), Signal::SIGUSR1).unwrap();
    daemon.wait_for_log("the certificates before stay in use");
    assert_eq!(run_echo(&daemon, &authority.trust(&daemon)).stdout, "ran\n");
    fs::copy(other.path("server.pem"), authority.path("server.pem")).unwrap();
    nix::sys::signal::kill(daemon.pid(), Signal::SIGUSR1).unwrap();
    daemon.wait_for_log("read the certificates again");
    assert_eq!(run_echo(&daemon, &other.trust(&daemon)).stdout, "ran\n");
    assert_eq!(run_echo(&daemon, &authority.trust(&daemon)).code, 77);
    // Without a signal, the daemon notices at most a second later.
    other.issue("next", "/CN=server", "DNS:localhost");
    for end in ["key", "pem"] {
        fs::copy(other.path(&format!("next.{end}")), authority.path(&format!("server.{end}"))).unwrap();
    }
    crate::harness::wait_until("the certificates to be read", || {
        assert_eq!(run_echo(&daemon, &other.trust(&daemon)).stdout, "ran\n");
        daemon.log().matches("read the certificates again").count() == 2
    });
}

/// What a client through TLS that knows nothing of kmutex gets in answer to `input`, up to the end.
fn s_client(daemon: &Daemon, authority: &Authority, input: &[u8]) -> Vec<u8> {
    let sock = tls_sock(daemon);
    let mut command: Command = tool("openssl");
    command.args(["s_client", "-quiet", "-verify_quiet", "-verify_return_error", "-CAfile"]);
    command.arg(authority.path("ca.pem")).args(["-connect", sock.trim_start_matches("tls://")]);
    let mut client =
        Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()));
    let mut stdin = client.child.stdin.take().unwrap();
    stdin.write_all(input).unwrap();
    let mut answer = vec![0; 1];
    let mut stdout = client.child.stdout.take().unwrap();
    let bytes = stdout.read(&mut answer).unwrap();
    answer.truncate(bytes);
    answer
}

#[test]
#[ignore = "needs openssl"]
fn protocol_1_goes_through_tls() {
    let authority = Authority::new();
    let daemon = authority.daemon(&[]);
    assert_eq!(s_client(&daemon, &authority, b"0123456789abcdef"), b"O");
}

#[test]
#[ignore = "needs openssl"]
fn a_client_that_does_not_finish_the_handshake_is_closed() {
    let authority = Authority::new();
    let daemon = authority.daemon(&[]);
    let sock = tls_sock(&daemon);
    let begun = Instant::now();
    let mut silent = connect(&sock);
    let mut half = connect(&sock);
    half.write_all(&[22, 3, 1, 1, 0, 1]).unwrap();
    // Without end: in records of the handshake, none of which is the last.
    let mut endless = connect(&sock);
    let record = [&[22, 3, 1, 64, 0, 1, 0xff, 0xff, 0xff][..], &[0; 0x4000 - 4]].concat();
    let next = [&[22, 3, 1, 64, 0][..], &[0; 0x4000]].concat();
    let _ = endless.write_all(&record);
    while endless.write_all(&next).is_ok() {}
    assert!(begun.elapsed() < Duration::from_secs(8), "it is cut off by its length, not by the time");
    for stream in [&mut silent, &mut half] {
        // Perhaps with the alert that ends a TLS stream.
        assert!(stream.read_to_end(&mut Vec::new()).unwrap_or(0) < 16);
    }
    assert!(begun.elapsed() >= Duration::from_secs(9));
    daemon.wait_for_logs("has not said who it is", 2);
    assert_eq!(run_echo(&daemon, &authority.trust(&daemon)).stdout, "ran\n");
}

#[test]
#[ignore = "needs openssl"]
fn garbage_through_tls_ends_only_its_own_connection() {
    let authority = Authority::new();
    let daemon = authority.daemon(&[]);
    let sock = tls_sock(&daemon);
    for seed in 0..50_u8 {
        let mut stream = connect(&sock);
        let bytes: Vec<u8> =
            (0..600_u32).map(|i| (i as u8).wrapping_mul(seed | 1).wrapping_add(seed)).collect();
        let _ = stream.write_all(&[22, 3, 1, 2, 0]).and_then(|()| stream.write_all(&bytes));
    }
    assert_eq!(run_echo(&daemon, &authority.trust(&daemon)).stdout, "ran\n");
}

/// A server whose part of the handshake never comes to its end.
#[test]
#[ignore = "needs openssl"]
fn a_handshake_that_never_ends_keeps_no_client() {
    let authority = Authority::new();
    for trickles in [false, true] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let sock = format!("tls://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    // A server hello, byte by byte; it ends when the client has had enough.
                    let mut next = vec![0x16, 3, 3, 0x3f, 0xff, 2, 0, 0x3f, 0xf0];
                    while stream.write_all(&next).is_ok() {
                        std::thread::sleep(Duration::from_millis(5));
                        next = vec![0; usize::from(trickles)];
                    }
                });
            }
        });
        for (option, code) in [("--nonblock", 69), ("--wait=0.5", 75)] {
            let mut command = Command::new(crate::harness::KMUTEX);
            command.args([
                "run",
                option,
                "--sock",
                &sock,
                "--tls-ca",
                &authority.text("ca.pem"),
                "k",
                "true",
            ]);
            let began = Instant::now();
            let done = finish(&mut command);
            assert_eq!(done.code, code, "{option}, trickles: {trickles}: {done:?}");
            assert!(began.elapsed() < Duration::from_secs(10), "{option}: {:?}", began.elapsed());
        }
    }
}
