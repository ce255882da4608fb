//! Which clients over TCP get in, as whom, and which locks they may use.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::certificates::{Authority, tcp_sock, write_private};
use crate::harness::{Daemon, Finished, KMUTEX, Process, TIMEOUT, Wire, finish, wait_until};

/// What `kmutex hash-secret` makes of a secret.
fn hash(secret: &str) -> String {
    let mut command = Command::new(KMUTEX);
    command.arg("hash-secret").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = Process::spawn(&mut command);
    process.child.stdin.take().unwrap().write_all(secret.as_bytes()).unwrap();
    let hash = process.line().unwrap();
    assert_eq!(process.wait(), 0);
    hash
}

/// A folder with the daemon's file of names, and the clients' files.
struct Names {
    folder: tempfile::TempDir,
}

impl Names {
    /// `ci` may lock `build` and `deploy/...`; `ops` everything, and may break; both have the secret `open sesame`.
    fn new() -> Names {
        let names = Names { folder: tempfile::tempdir().unwrap() };
        let hash = hash("open sesame\n");
        names.write(&format!("# names\nci {hash} build deploy/*\nops {hash} !admin\nrunner - build\n"));
        for (file, line) in [
            ("ci", "ci open sesame"),
            ("ops", "ops open sesame"),
            ("wrong", "ci open barley"),
            ("unknown", "stranger open sesame"),
            ("runner", "runner -"),
        ] {
            write_private(&names.path(file), line);
        }
        names
    }

    fn write(&self, text: &str) {
        fs::write(self.path("auth"), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().into()
    }

    fn daemon(&self) -> Daemon {
        Daemon::with(&["--sock", "127.0.0.1:0", "--auth-file", &self.text("auth")])
    }

    /// `kmutex COMMAND` over TCP as the client of this file.
    fn kmutex(&self, daemon: &Daemon, file: &str, command: &[&str]) -> Command {
        let mut kmutex = daemon.kmutex(command);
        kmutex.env("KMUTEX_SOCK", tcp_sock(daemon)).env("KMUTEX_AUTH_FILE", self.path(file));
        kmutex
    }

    /// A raw connection of this name, which has made this request.
    fn wire(&self, daemon: &Daemon, name: &str, request: &str) -> Wire<TcpStream> {
        let mut wire = Wire::new(TcpStream::connect(tcp_sock(daemon)).unwrap());
        let auth = format!(r#"{{"type":"auth","name":"{name}","secret":"open sesame"}}"#);
        wire.open(&format!("{auth}\n{request}")).answer_of("welcome");
        wire
    }

    fn run(&self, daemon: &Daemon, file: &str, key: &str) -> Finished {
        finish(&mut self.kmutex(daemon, file, &["run", key, "--", "echo", "ran"]))
    }

    /// A holder as the client of this file, that holds until it is dropped.
    fn hold(&self, daemon: &Daemon, file: &str, key: &str) -> Process {
        let mut command =
            self.kmutex(daemon, file, &["run", key, "--", "sh", "-c", "echo holding; read end"]);
        let mut holder = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        holder.wait_for_line("holding");
        holder
    }
}

fn assert_refused(done: &Finished, why: &str) {
    assert_eq!((done.code, done.stdout.as_str()), (77, ""), "{}", done.stderr);
    assert!(done.stderr.contains(why), "{}", done.stderr);
    assert_eq!(done.stderr.lines().count(), 1);
}

#[test]
fn a_name_with_its_secret_gets_in_and_others_do_not() {
    let names = Names::new();
    let daemon = names.daemon();
    assert_eq!(names.run(&daemon, "ci", "build").stdout, "ran\n");
    let sock = tcp_sock(&daemon);
    let file = names.text("ci");
    let mut by_option = daemon.run(&["--sock", &sock, "--auth-file", &file, "build", "echo", "ran"]);
    assert_eq!(finish(&mut by_option).stdout, "ran\n");
    let mut without = daemon.run(&["--sock", &sock, "build", "echo", "ran"]);
    assert_refused(&finish(&mut without), "--auth-file");
    // The Unix socket has the kernel's word for who it is.
    assert_eq!(finish(&mut daemon.run(&["secret/key", "echo", "ran"])).stdout, "ran\n");
}

#[test]
fn a_wrong_secret_and_an_unknown_name_get_the_same_answer_after_a_second() {
    let names = Names::new();
    let daemon = names.daemon();
    let answers: Vec<_> = ["wrong", "unknown", "runner"]
        .map(|file| {
            let begun = Instant::now();
            let done = names.run(&daemon, file, "build");
            assert!(begun.elapsed() >= Duration::from_secs(1), "{file}");
            assert_refused(&done, "wrong name or secret");
            done.stderr
        })
        .into();
    assert!(answers.windows(2).all(|two| two[0] == two[1]), "{answers:?}");
    assert_eq!(names.run(&daemon, "ci", "build").stdout, "ran\n");
}

#[test]
fn guesses_side_by_side_are_as_slow_as_one_after_the_other() {
    let names = Names::new();
    let daemon = names.daemon();
    let begun = Instant::now();
    let mut guesses: Vec<_> = (0..4)
        .map(|_| {
            let mut command = names.kmutex(&daemon, "wrong", &["run", "build", "--", "true"]);
            Process::spawn(command.stderr(Stdio::null()))
        })
        .collect();
    assert!(guesses.iter_mut().all(|guess| guess.wait() == 77));
    assert!(begun.elapsed() >= Duration::from_secs(4));
    // Clients that have got in before are not made to wait by them, nor is the loop.
    daemon.wait_for_logs("gave a wrong name or secret", 4);
}

#[test]
fn a_client_file_that_others_can_read_is_refused() {
    let names = Names::new();
    let daemon = names.daemon();
    fs::set_permissions(names.path("ci"), fs::Permissions::from_mode(0o640)).unwrap();
    assert_refused(&names.run(&daemon, "ci", "build"), "chmod 600");
    let missing = names.run(&daemon, "missing", "build");
    assert_eq!(missing.code, 64, "{}", missing.stderr);
}

#[test]
fn a_name_may_lock_only_the_keys_of_its_patterns() {
    let names = Names::new();
    let daemon = names.daemon();
    assert_eq!(names.run(&daemon, "ci", "deploy/web").stdout, "ran\n");
    for key in ["deploy", "builds", "other"] {
        assert_refused(&names.run(&daemon, "ci", key), "the name \"ci\" may not lock");
    }
    assert_eq!(names.run(&daemon, "ops", "other").stdout, "ran\n");
}

#[test]
fn a_key_of_a_user_belongs_to_the_client_with_that_name() {
    let names = Names::new();
    let hash = hash("open sesame");
    names.write(&format!("ci {hash}\nops {hash} !admin\nother {hash}\n"));
    write_private(&names.path("other"), "other open sesame");
    let options = ["--sock", "127.0.0.1:0", "--auth-file", &names.text("auth"), "--reserve", "db/=other"];
    let daemon = Daemon::with(&options);
    assert_eq!(names.run(&daemon, "ci", "@ci/x").stdout, "ran\n");
    assert_refused(&names.run(&daemon, "other", "@ci/x"), "belongs to the user \"ci\"");
    assert_refused(&names.run(&daemon, "ops", "@ci/x"), "belongs to the user \"ci\"");
    assert_eq!(names.run(&daemon, "other", "db/x").stdout, "ran\n");
    assert_refused(&names.run(&daemon, "ci", "db/x"), "belongs to the user \"other\"");
    let mut holder = names.hold(&daemon, "ci", "@ci/x");
    let broken_by = |file| finish(&mut names.kmutex(&daemon, file, &["break", "--yes", "@ci/x"]));
    assert_refused(&broken_by("other"), "belongs to the user");
    assert_eq!(broken_by("ops").code, 0);
    assert_eq!(holder.wait(), 74);
}

#[test]
fn without_names_no_client_over_tcp_may_take_a_key_of_a_user() {
    let daemon = Daemon::with(&["--sock", "127.0.0.1:0"]);
    let me = nix::unistd::Uid::current();
    let done = finish(&mut daemon.run(&["--sock", &tcp_sock(&daemon), &format!("@{me}/x"), "true"]));
    assert_refused(&done, "belongs to the user");
}

#[test]
fn a_lock_is_broken_by_the_name_that_holds_it_and_by_an_admin_only() {
    let names = Names::new();
    let hash = hash("open sesame");
    names.write(&format!("ci {hash}\nops {hash} !admin\nother {hash}\n"));
    write_private(&names.path("other"), "other open sesame");
    let daemon = names.daemon();
    let broken_by = |file| finish(&mut names.kmutex(&daemon, file, &["break", "--yes", "k"]));
    for file in ["ci", "ops"] {
        let mut holder = names.hold(&daemon, "ci", "k");
        assert_refused(&broken_by("other"), "not permitted to break");
        assert_eq!(broken_by(file).code, 0);
        assert_eq!(holder.wait(), 74);
    }
    let _holder = daemon.hold("k");
    assert_refused(&broken_by("ci"), "not permitted to break");
    assert_eq!(broken_by("ops").code, 0);
}

#[test]
fn the_status_shows_the_name_as_the_user() {
    let names = Names::new();
    let daemon = names.daemon();
    let _holder = names.hold(&daemon, "ci", "build");
    let status = daemon.status();
    assert_eq!(status[0]["holders"][0]["user"], "ci", "{status:?}");
    assert!(finish(&mut daemon.kmutex(&["status"])).stdout.contains(" ci "));
}

#[test]
fn a_name_that_is_struck_out_takes_no_more_locks() {
    let names = Names::new();
    let daemon = names.daemon();
    assert_eq!(names.run(&daemon, "ci", "build").stdout, "ran\n");
    let hash = hash("new");
    names.write(&format!("ci {hash}\n"));
    nix::sys::signal::kill(daemon.pid(), Signal::SIGUSR1).unwrap();
    daemon.wait_for_log("read the file of names again");
    assert_refused(&names.run(&daemon, "ci", "build"), "wrong name or secret");
    write_private(&names.path("ci"), "ci new");
    assert_eq!(names.run(&daemon, "ci", "anything").stdout, "ran\n");
    names.write("broken");
    nix::sys::signal::kill(daemon.pid(), Signal::SIGUSR1).unwrap();
    daemon.wait_for_log("line 1: the secret is missing");
    assert_eq!(names.run(&daemon, "ci", "anything").stdout, "ran\n");
    // Without a signal, at most a second later.
    fs::write(names.path("auth"), "other -\n").unwrap();
    wait_until("the file to be read", || names.run(&daemon, "ci", "anything").code == 77);
}

#[test]
#[ignore = "needs openssl"]
fn a_certificate_stands_for_a_name_of_the_file() {
    let (names, authority) = (Names::new(), Authority::new());
    authority.issue("common", "/CN=runner", "");
    authority.issue("alternative", "/CN=host17", "DNS:host17.example,DNS:runner");
    authority.issue("stranger", "/CN=stranger", "");
    let daemon =
        authority.daemon(&["--tls-client-ca", &authority.text("ca.pem"), "--auth-file", &names.text("auth")]);
    let run = |options: &[String], key: &str| {
        finish(daemon.run(options).args([key, "--", "echo", "ran"]).env_remove("KMUTEX_AUTH_FILE"))
    };
    for certificate in ["common", "alternative"] {
        let options = authority.trust_as(&daemon, certificate);
        assert_eq!(run(&options, "build").stdout, "ran\n", "{certificate}");
        assert_refused(&run(&options, "deploy/x"), "the name \"runner\" may not lock \"deploy/x\"");
    }
    assert_refused(&run(&authority.trust_as(&daemon, "stranger"), "build"), "wants a name that it knows");
    assert_refused(&run(&authority.trust(&daemon), "build"), "wants a name that it knows");
    // A secret does for those without a certificate, and for those whose certificate says nothing to the daemon.
    for mut options in [authority.trust(&daemon), authority.trust_as(&daemon, "stranger")] {
        options.extend(["--auth-file".into(), names.text("ci")]);
        assert_eq!(run(&options, "deploy/x").stdout, "ran\n");
    }
}

/// Sends bytes, and returns what comes back before the daemon closes the connection.
fn answer(mut stream: impl Read + Write, bytes: &[u8]) -> Vec<u8> {
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // A reset is an end, too.
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn connect(daemon: &Daemon) -> TcpStream {
    let stream = TcpStream::connect(tcp_sock(daemon)).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

#[test]
fn protocol_1_does_not_get_past_the_names() {
    let names = Names::new();
    let daemon = names.daemon();
    assert_eq!(answer(connect(&daemon), b"0123456789abcdef"), b"");
    assert!(daemon.status().is_empty());
}

#[test]
fn nothing_is_answered_before_the_name() {
    let names = Names::new();
    let daemon = names.daemon();
    for request in ["status", "ping", "lock\",\"key\":\"build", "break\",\"key\":\"build"] {
        let bytes = format!("\0kmutex proto 2\n{{\"type\":\"{request}\"}}\n");
        let answer = String::from_utf8(answer(connect(&daemon), bytes.as_bytes())).unwrap();
        let lines: Vec<&str> = answer.lines().collect();
        assert_eq!(lines.len(), 2, "{answer}");
        assert!(lines[0].contains("hello") && lines[1].contains("not_permitted"), "{answer}");
    }
}

#[test]
fn browsers_and_tls_clients_are_closed_with_a_line_in_the_log() {
    let daemon = Daemon::with(&["--sock", "127.0.0.1:0"]);
    for (number, method) in
        ["GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "CONNECT", "PATCH"].iter().enumerate()
    {
        let request = format!("{method} /lock?key=x HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(answer(connect(&daemon), request.as_bytes()), b"", "{method}");
        daemon.wait_for_logs("it speaks HTTP to a port that does not", number + 1);
    }
    let hello = [&[22, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3][..], &[7; 194]].concat();
    // The alert that ends a TLS client.
    assert_eq!(answer(connect(&daemon), &hello), [21, 3, 3, 0, 2, 2, 10]);
    let line = daemon.wait_for_log("it speaks TLS to a port that does not");
    assert!(line.contains("127.0.0.1:"), "{line}");
}

#[test]
fn an_identity_that_looks_like_another_protocol_is_refused() {
    let daemon = Daemon::with(&["--sock", "127.0.0.1:0"]);
    for identity in [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x00\xc8\x01abcdefghij"] {
        let answered = answer(connect(&daemon), identity);
        assert!(!answered.contains(&b'O'), "{answered:?}");
        let unix = UnixStream::connect(daemon.sock()).unwrap();
        assert!(!answer(unix, identity).contains(&b'O'));
        // As the second identity of a connection, too, and in pieces.
        let mut client = connect(&daemon);
        client.write_all(b"0123456789abcdef").unwrap();
        let mut owner = [0];
        client.read_exact(&mut owner).unwrap();
        assert_eq!(&owner, b"O");
        client.write_all(b"R").unwrap();
        client.write_all(&identity[..2]).unwrap();
        assert!(!answer(client, &identity[2..]).contains(&b'O'));
    }
    assert!(daemon.status().is_empty());
}

fn serve(folder: &Path, args: &[&str]) -> Finished {
    // What is refused ends at once. What serves ends at once too: its idle time is over.
    finish(Command::new(KMUTEX).args(["serve", "--idle-exit", "0"]).args(args).current_dir(folder))
}

#[test]
#[ignore = "needs openssl"]
fn a_port_that_other_hosts_reach_is_refused_unless_it_is_protected_or_meant_to_be_open() {
    let (names, authority) = (Names::new(), Authority::new());
    let folder = names.folder.path();
    let [auth, ca, cert, key] = [
        names.text("auth"),
        authority.text("ca.pem"),
        authority.text("server.pem"),
        authority.text("server.key"),
    ];
    let tls = ["--tls-cert", &cert, "--tls-key", &key];
    let client_ca = ["--tls-client-ca", &ca];
    for sock in ["0.0.0.0:0", "[::]:0", "[::ffff:0.0.0.0]:0"] {
        let refused = serve(folder, &["--sock", sock]);
        assert_eq!(refused.code, 64, "{sock}");
        assert!(refused.stderr.contains("--open"), "{}", refused.stderr);
        assert_eq!(serve(folder, &["--sock", sock, "--open"]).code, 0, "{sock}");
        assert_eq!(serve(folder, &["--sock", sock, "--auth-file", &auth]).code, 0, "{sock}");
        // The authority of clients protects the ports that speak TLS.
        assert_eq!(serve(folder, &[&["--sock", sock], &tls[..], &client_ca[..]].concat()).code, 64);
        let sock = format!("tls://{sock}");
        assert_eq!(serve(folder, &[&["--sock", &sock], &tls[..]].concat()).code, 64, "{sock}");
        assert_eq!(serve(folder, &[&["--sock", &sock], &tls[..], &client_ca[..]].concat()).code, 0, "{sock}");
        assert_eq!(serve(folder, &[&["--sock", &sock, "--auth-file", &auth], &tls[..]].concat()).code, 0);
    }
    assert_eq!(serve(folder, &["--sock", "127.0.0.1:0"]).code, 0);
}

#[test]
fn hash_secret_refuses_what_is_no_secret() {
    for (secret, why) in [("", "empty"), ("\n", "empty"), ("a\nb\n", "control character"), (" a", "blank")] {
        let mut command = Command::new(KMUTEX);
        command.arg("hash-secret").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process::spawn(&mut command);
        process.child.stdin.take().unwrap().write_all(secret.as_bytes()).unwrap();
        assert!(process.stderr().contains(why), "{secret:?}");
        assert_eq!(process.wait(), 65, "{secret:?}");
    }
    assert_ne!(hash("same"), hash("same"));
}

#[test]
fn a_bad_file_of_names_is_named_at_the_start() {
    let names = Names::new();
    names.write("ci hunter2 build");
    let refused = serve(names.folder.path(), &["--sock", "127.0.0.1:0", "--auth-file", "auth"]);
    assert_eq!(refused.code, 64);
    assert!(refused.stderr.contains("auth: line 1: the secret is not a hash"), "{}", refused.stderr);
    assert!(!refused.stderr.contains("hunter2"));
}

#[test]
fn a_request_is_resumed_by_its_own_name_only() {
    let names = Names::new();
    let daemon = names.daemon();
    let as_name = |name: &str, request: &str| names.wire(&daemon, name, request);
    let mut ci = as_name("ci", r#"{"type":"lock","key":"build","nonce":"7"}"#);
    let token = ci.answer_of("granted")["token"].clone();
    let again = format!(r#"{{"type":"lock","key":"build","nonce":"7","holds":{token}}}"#);
    as_name("ops", &again).answer_of("lost");
    let mut anew = as_name("ops", r#"{"type":"lock","key":"build","nonce":"7","mode":"queue"}"#);
    anew.answer_of("waiting");
    let mut resumed = as_name("ci", &again);
    assert_eq!(resumed.answer_of("granted")["token"], token);
    resumed.request(r#"{"type":"release"}"#).answer_of("released");
    anew.answer_of("granted");
}

#[test]
fn a_request_runs_under_a_lock_of_its_own_name_only() {
    let names = Names::new();
    let daemon = names.daemon();
    let as_name = |name: &str, request: &str| names.wire(&daemon, name, request);
    let mut ci = as_name("ci", r#"{"type":"lock","key":"build"}"#);
    let token = ci.answer_of("granted")["token"].clone();
    let within = format!(r#"{{"type":"lock","key":"build","nowait":true,"within":{token}}}"#);
    assert_eq!(as_name("ci", &within).answer_of("error")["code"], "held_above");
    as_name("ops", &within).answer_of("busy");
}
