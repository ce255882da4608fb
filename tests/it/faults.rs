//! What the kernel may answer, at the worst of times: strace(1) puts errors in the place of system calls. For each,
//! the test says what the daemon does, and that no other client notices.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use nix::sys::signal::Signal;

use crate::harness::{Daemon, PREAMBLE, Process, TIMEOUT, Wire, finish, tool, wait_until};

const OLD_KEY: &[u8; 16] = b"0123456789abcdef";
const PING: &str = r#"{"type":"ping"}"#;
const ONCE: &str = r#"{"type":"lock","key":"k"}"#;
const QUEUE: &str = r#"{"type":"lock","key":"k","mode":"queue"}"#;
const RELEASE: &str = r#"{"type":"release"}"#;

/// While it lives, the kernel answers the daemon with errors.
struct Injector {
    strace: Process,
    output: std::path::PathBuf,
}

impl Injector {
    /// `what` is as in strace(1), `-e inject=`.
    fn attach(daemon: &Daemon, what: &str) -> Injector {
        let output = daemon.folder().join("strace");
        let mut strace = tool("strace");
        strace.arg("-o").arg(&output).args([
            "-e",
            &format!("inject={what}"),
            "-p",
            &daemon.pid().to_string(),
        ]);
        let strace = Process::spawn(strace.stderr(Stdio::null()));
        let status = format!("/proc/{}/status", daemon.pid());
        wait_until("strace to attach", || {
            let status = fs::read_to_string(&status).unwrap();
            status.lines().any(|line| line == format!("TracerPid:\t{}", strace.pid()))
        });
        Injector { strace, output }
    }

    /// How many errors the kernel has answered with.
    fn errors(&self) -> usize {
        fs::read_to_string(&self.output).unwrap_or_default().matches("(INJECTED)").count()
    }

    fn wait_for_errors(&self, count: usize) {
        wait_until("errors to be met", || self.errors() >= count);
    }

    /// The kernel answers as it should again. (The daemon may be stopped until then, if strace were just killed.)
    fn detach(mut self) -> usize {
        self.strace.signal(Signal::SIGINT);
        self.strace.wait();
        self.errors()
    }
}

/// One who holds and one who waits, of each protocol: they are to notice nothing.
struct Bystanders {
    holders: [Wire<UnixStream>; 2],
    waiters: [Wire<UnixStream>; 2],
}

impl Bystanders {
    fn of(daemon: &Daemon) -> Bystanders {
        let [mut new_holder, mut new_waiter] = [daemon.wire(), daemon.wire()];
        new_holder.open(r#"{"type":"lock","key":"theirs"}"#).answer_of("granted");
        new_waiter.open(r#"{"type":"lock","key":"theirs","mode":"queue"}"#).answer_of("waiting");
        let [mut old_holder, mut old_waiter] = [daemon.wire(), daemon.wire()];
        old_holder.send(OLD_KEY).expect("O");
        old_waiter.send(OLD_KEY);
        Bystanders { holders: [new_holder, old_holder], waiters: [new_waiter, old_waiter] }
    }

    fn go_on(mut self) {
        self.holders[0].request(PING).answer_of("pong");
        self.holders[0].request(RELEASE).answer_of("released");
        self.waiters[0].answer_of("granted");
        self.holders[1].send("R");
        self.waiters[1].expect("R");
    }
}

/// While there is no descriptor for a newcomer (accept(2): EMFILE, ENFILE, ENOMEM), it waits in the kernel, and the
/// daemon tries again once a second, or when a connection ends.
#[test]
#[ignore = "needs strace"]
fn without_descriptors_newcomers_wait() {
    for error in ["EMFILE", "ENFILE", "ENOMEM", "ENOBUFS"] {
        let daemon = Daemon::start();
        let bystanders = Bystanders::of(&daemon);
        let injector = Injector::attach(&daemon, &format!("accept4:error={error}"));
        let mut newcomer = daemon.wire();
        newcomer.send([&PREAMBLE[..], ONCE.as_bytes(), b"\n"].concat());
        injector.wait_for_errors(1);
        daemon.wait_for_log("cannot accept: ");
        assert!(injector.detach() <= 3, "it tried again at once");
        newcomer.answer_of("hello");
        newcomer.answer_of("granted");
        bystanders.go_on();
    }
}

/// The daemon skips a newcomer that gave up before it was accepted (ECONNABORTED), and a signal that interrupts (EINTR): it
/// accepts the next client at once.
#[test]
#[ignore = "needs strace"]
fn a_newcomer_that_gave_up_is_passed_over() {
    for error in ["ECONNABORTED", "EINTR", "EPROTO"] {
        let daemon = Daemon::start();
        let bystanders = Bystanders::of(&daemon);
        let injector = Injector::attach(&daemon, &format!("accept4:error={error}:when=1..5"));
        daemon.wire().open(ONCE).answer_of("granted");
        assert_eq!(injector.detach(), 5);
        assert!(!daemon.log().contains("cannot accept"), "{}", daemon.log());
        bystanders.go_on();
    }
}

/// Interrupted system calls are made again.
#[test]
#[ignore = "needs strace"]
fn interruptions_change_nothing() {
    let daemon = Daemon::start();
    let bystanders = Bystanders::of(&daemon);
    let calls = "epoll_wait,epoll_pwait,recvfrom,recvmsg,sendto,accept4,pwrite64,pidfd_open";
    let injector = Injector::attach(&daemon, &format!("{calls}:error=EINTR:when=1+2"));
    let holder = daemon.hold("k");
    let mut waiter = Process::spawn(&mut daemon.run(&["k", "false"]));
    daemon.wait_for_logs("wait: ", 3);
    assert_eq!(holder.finish(0), 0);
    assert_eq!(waiter.wait(), 79);
    bystanders.go_on();
    assert!(injector.detach() > 10);
}

/// A lock that cannot be recorded (the disk is full, or broken) is not granted: clients that ask
/// for it or wait for it get an error. Held locks stay held, and can be released. When the journal can be written again, the
/// daemon grants locks again.
#[test]
#[ignore = "needs strace"]
fn a_lock_that_cannot_be_recorded_is_not_given() {
    for error in ["ENOSPC", "EIO", "EROFS", "EDQUOT"] {
        let daemon = Daemon::start();
        let (mut holder, mut waiter, mut old) = (daemon.wire(), daemon.wire(), daemon.wire());
        holder.open(ONCE).answer_of("granted");
        waiter.open(QUEUE).answer_of("waiting");
        let mut bystander = daemon.wire();
        bystander.open(r#"{"type":"lock","key":"theirs"}"#).answer_of("granted");

        let injector = Injector::attach(&daemon, &format!("pwrite64:error={error}"));
        let mut newcomer = daemon.run(&["other", "true"]);
        finish(&mut newcomer).assert_error(69, &["cannot be recorded"]);
        old.send(OLD_KEY).expect_closed();
        holder.request(RELEASE).answer_of("released");
        assert_eq!(waiter.answer_of("error")["code"], "cannot_record");
        waiter.expect_closed();
        bystander.request(PING).answer_of("pong");
        let complaints = daemon.log().matches("cannot write").count();
        assert_eq!(complaints, 1, "said once, not every time");
        injector.detach();

        assert_eq!(daemon.run(&["k", "true"]).status().unwrap().code(), Some(0));
        daemon.wait_for_log("can be written again");
        bystander.request(RELEASE).answer_of("released");
    }
}

/// What was released while the journal could not be written is struck out as soon as it can.
#[test]
#[ignore = "needs strace"]
fn a_release_that_could_not_be_recorded_is_recorded_later() {
    let mut daemon = Daemon::start();
    let (mut first, mut second) = (daemon.wire(), daemon.wire());
    first.open(ONCE).answer_of("granted");
    let injector = Injector::attach(&daemon, "pwrite64:error=ENOSPC");
    first.request(RELEASE).answer_of("released");
    injector.detach();
    second.open(r#"{"type":"lock","key":"other"}"#).answer_of("granted");
    daemon.restart(&[]);
    let keys: Vec<_> = daemon.status().iter().map(|lock| lock["id"].clone()).collect();
    assert_eq!(keys.len(), 1, "{keys:?}");
}

/// An answer that the kernel does not take now (EAGAIN, ENOBUFS, ENOMEM) is sent when it does.
#[test]
#[ignore = "needs strace"]
fn an_answer_that_cannot_be_sent_is_sent_later() {
    for error in ["EAGAIN", "ENOBUFS", "ENOMEM"] {
        let daemon = Daemon::start();
        let bystanders = Bystanders::of(&daemon);
        let injector = Injector::attach(&daemon, &format!("sendto:error={error}:when=1..3"));
        let mut client = daemon.wire();
        client.open(ONCE).answer_of("granted");
        client.request(RELEASE).answer_of("released");
        assert_eq!(injector.detach(), 3);
        bystanders.go_on();
    }
}

/// One that cannot be sent anything (EPIPE, ECONNRESET) is gone, and what it was given is the next one's.
#[test]
#[ignore = "needs strace"]
fn a_client_that_cannot_be_sent_to_is_gone() {
    for error in ["EPIPE", "ECONNRESET"] {
        let daemon = Daemon::start();
        let bystanders = Bystanders::of(&daemon);
        let injector = Injector::attach(&daemon, &format!("sendto:error={error}:when=1"));
        let mut client = daemon.wire();
        client.send([&PREAMBLE[..], ONCE.as_bytes(), b"\n"].concat());
        daemon.wait_for_log(": disconnected");
        injector.detach();
        client.expect_closed();
        daemon.wire().open(ONCE).answer_of("granted");
        bystanders.go_on();
    }
}

/// The same of one that cannot be read from (ECONNRESET, EIO), or cannot be watched (epoll_ctl(2): ENOMEM, ENOSPC).
#[test]
#[ignore = "needs strace"]
fn a_client_that_cannot_be_heard_is_gone() {
    for fault in
        ["recvmsg:error=ECONNRESET", "recvmsg:error=EIO", "epoll_ctl:error=ENOMEM", "epoll_ctl:error=ENOSPC"]
    {
        let daemon = Daemon::start();
        let bystanders = Bystanders::of(&daemon);
        let injector = Injector::attach(&daemon, &format!("{fault}:when=1"));
        let mut client = UnixStream::connect(daemon.sock()).unwrap();
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        // It may be closed already.
        let _ = client.write_all(&[&PREAMBLE[..], ONCE.as_bytes(), b"\n"].concat());
        let end = client.read(&mut [0]);
        assert!(matches!(end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
        injector.detach();
        daemon.wire().open(ONCE).answer_of("granted");
        bystanders.go_on();
    }
}
