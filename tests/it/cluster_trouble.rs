//! Clustered locks when etcd goes back, refuses, hangs up, or is no etcd: what the daemon does, and what it logs.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kmutex::etcd::{Op, Range, Txn};

use crate::cluster::{host, hosts, name, standing, waiter};
use crate::etcd_harness::{Etcd, copy_folder};
use crate::harness::*;

const FINISHED: i32 = 79;
const LOST: i32 = 74;
const UNAVAILABLE: i32 = 69;
const WENT_BACK: &str = "the store went back";

/// Long enough to restart an etcd in it.
pub fn steady_host(etcd: &Etcd, ttl: &str, more: &[&str]) -> Daemon {
    let url = etcd.endpoints()[0].to_string();
    let daemon = Daemon::with(&[&["--etcd", &url, "--etcd-ttl", ttl][..], more].concat());
    daemon.wait_for_log("clustering locks under lease");
    daemon
}

/// A holder that says so, and writes "a" into `file` when it is stopped.
pub fn witness(daemon: &Daemon, key: &str, file: &Path) -> Process {
    let script = format!(
        "trap 'echo a >> {0}; exit' TERM; echo holding; while :; do sleep 0.02; done",
        file.display()
    );
    let mut command = daemon.run(&[key, "--", "sh", "-c", &script]);
    let mut holder = Process::spawn(command.stdout(Stdio::piped()).stderr(Stdio::null()));
    holder.wait_for_line("holding");
    holder
}

/// What follows when a store went back under a holder on one host, while another host waits and a third asks.
fn check_going_back(etcd: &mut Etcd, change: impl FnOnce(&mut Etcd)) {
    let [a, b] = [steady_host(etcd, "6", &[]), steady_host(etcd, "6", &[])];
    let file = etcd.file("order");
    let mut holder = witness(&a, "k", &file);
    let append = format!("echo b >> {}", file.display());
    let mut next = Process::spawn(&mut b.run(&["--queue", "k", "--", "sh", "-c", &append]));
    b.wait_for_log("wait: ");
    change(etcd);
    assert_eq!(holder.wait(), LOST);
    assert_eq!(next.wait(), 0);
    assert_eq!(
        std::fs::read_to_string(&file).unwrap(),
        "a\nb\n",
        "the holder is dead before the next one runs"
    );
    for daemon in [&a, &b] {
        let log = daemon.log();
        assert_eq!(log.matches(WENT_BACK).count(), 1, "{log}");
    }
    // Afterwards everything is as before.
    let held = a.hold("k");
    let mut told = waiter(&b, &[], "k", 0);
    assert_eq!((held.finish(0), told.wait()), (0, FINISHED));
    let mut queued = {
        let held = b.hold("k");
        let queued = waiter(&a, &["--queue"], "k", 0);
        assert_eq!(held.finish(0), 0);
        queued
    };
    assert_eq!(queued.wait(), 0);
}

#[test]
#[ignore = "needs etcd"]
fn a_store_that_was_emptied_is_noticed_and_no_two_hosts_hold() {
    let mut etcd = Etcd::single();
    // Its revision is beyond what the new store has.
    etcd.ctl(&["put", "other", "1"]);
    check_going_back(&mut etcd, |etcd| etcd.replace_data(|data| std::fs::remove_dir_all(data).unwrap()));
}

#[test]
#[ignore = "needs etcd"]
fn a_snapshot_that_was_restored_is_noticed_and_no_two_hosts_hold() {
    let mut etcd = Etcd::single();
    // The leases are in the snapshot, and the lock is not.
    let snapshot = etcd.file("snapshot");
    let hosts_first: [Daemon; 1] = [steady_host(&etcd, "6", &[])];
    etcd.ctl(&["snapshot", "save", snapshot.to_str().unwrap()]);
    drop(hosts_first);
    check_going_back(&mut etcd, |etcd| {
        let restored = etcd.file("restored");
        etcd.restore_snapshot(&snapshot, &restored);
        etcd.replace_data(|data| {
            std::fs::remove_dir_all(data).unwrap();
            std::fs::rename(&restored, data).unwrap();
        });
    });
}

#[test]
#[ignore = "needs etcd"]
fn a_machine_of_etcd_that_was_rolled_back_is_noticed_with_the_lease_alive() {
    let mut etcd = Etcd::single();
    let a = steady_host(&etcd, "8", &[]);
    // The lease is in the copy. Its holder's key is not.
    let copy = etcd.copy_data("copy");
    let mut holder = a.hold("k");
    let b = steady_host(&etcd, "8", &[]);
    etcd.replace_data(|data| {
        std::fs::remove_dir_all(data).unwrap();
        copy_folder(&copy, data);
    });
    assert_eq!(holder.process.wait(), LOST);
    b.wait_for_log(WENT_BACK);
    finish(&mut b.run(&["k", "true"])).assert_silent(0);
    finish(&mut a.run(&["k", "true"])).assert_silent(0);
    assert_eq!(a.log().matches(WENT_BACK).count(), 1);
}

#[test]
#[ignore = "needs etcd"]
fn a_store_that_went_back_while_no_lock_was_held_is_noticed_too() {
    let mut etcd = Etcd::single();
    let [a, b] = hosts(&etcd);
    finish(&mut a.run(&["k", "true"])).assert_silent(0);
    etcd.replace_data(|data| std::fs::remove_dir_all(data).unwrap());
    for daemon in [&a, &b] {
        daemon.wait_for_log(WENT_BACK);
        daemon.wait_for_logs("clustering locks under lease", 2);
    }
    let holder = a.hold("k");
    let mut next = waiter(&b, &["--queue"], "k", 0);
    assert_eq!((holder.finish(0), next.wait()), (0, 0));
}

#[test]
#[ignore = "needs etcd"]
fn a_store_that_goes_on_is_not_taken_for_one_that_went_back() {
    let mut etcd = Etcd::single();
    let a = steady_host(&etcd, "8", &[]);
    let holder = a.hold("k");
    // As after a crash of its machine.
    etcd.kill(0);
    etcd.restart(0);
    etcd.ctl(&["compaction", "2"]);
    etcd.kill(0);
    etcd.restart(0);
    finish(&mut a.run(&["l", "true"])).assert_silent(0);
    assert_eq!(holder.finish(0), 0);
    assert!(!a.log().contains(WENT_BACK), "{}", a.log());
}

/// Answers each request with the same text, however wrong that is, and counts the connections.
pub struct Liar {
    pub url: String,
    connections: Arc<AtomicUsize>,
}

impl Liar {
    pub fn new(answer: impl Fn(TcpStream) + Send + Sync + 'static) -> Liar {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let connections = Arc::new(AtomicUsize::new(0));
        let (counter, answer) = (Arc::clone(&connections), Arc::new(answer));
        // It ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                counter.fetch_add(1, Ordering::SeqCst);
                let answer = Arc::clone(&answer);
                thread::spawn(move || answer(stream.unwrap()));
            }
        });
        Liar { url, connections }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

fn read_request(stream: &mut TcpStream) {
    let _ = stream.read(&mut [0; 4096]);
}

/// Each of these is asked ever more seldom, and named in one line of the log.
fn check_liar(liar: &Liar, words: &[&str]) {
    let began = Instant::now();
    let daemon = Daemon::with(&["--etcd", &liar.url]);
    let line = daemon.wait_for_log("WARN");
    for word in words.iter().chain([&&*liar.url]) {
        assert!(line.contains(word), "{word}: {line}");
    }
    wait_until("20 attempts", || liar.connections() >= 20);
    assert!(began.elapsed() > Duration::from_millis(1500), "20 attempts within {:?}", began.elapsed());
    assert_eq!(daemon.log().matches("WARN").count(), 1, "{}", daemon.log());
    let refused = finish(&mut daemon.run(&["-n", "k", "true"]));
    refused.assert_error(UNAVAILABLE, &["etcd at", &liar.url]);
}

#[test]
#[ignore = "takes many seconds"]
fn a_proxy_that_answers_with_a_web_page_is_named_and_asked_ever_more_seldom() {
    let liar = Liar::new(|mut stream| {
        read_request(&mut stream);
        let page = "<html>Welcome to the proxy</html>";
        let _ = write!(
            stream,
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{page}",
            page.len()
        );
        // To close a stream with unread bytes would reset it, perhaps before the page is read.
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    check_liar(&liar, &["not the answer of an etcd", "no JSON"]);
}

#[test]
#[ignore = "takes many seconds"]
fn an_answer_without_an_end_is_not_read_to_its_end() {
    let liar = Liar::new(|mut stream| {
        read_request(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        let line = "4000\r\n".to_string() + &"x".repeat(0x4000) + "\r\n";
        while stream.write_all(line.as_bytes()).is_ok() {}
    });
    check_liar(&liar, &["not the answer of an etcd"]);
}

#[test]
fn while_there_is_no_lease_yet_a_request_is_answered_soon_and_with_the_reason() {
    // It takes connections, and never answers.
    let silent = Liar::new(|stream| {
        let mut stream = stream;
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let daemon = Daemon::with(&["--etcd", &silent.url, "--etcd-timeout", "60", "--etcd-ttl", "600"]);
    for _ in 0..2 {
        let began = Instant::now();
        let refused = finish(&mut daemon.run(&["-n", "k", "true"]));
        refused.assert_error(UNAVAILABLE, &["etcd at", &silent.url, "does not answer"]);
        // Ten seconds is after how long a client takes its daemon for dead.
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    }
    let began = Instant::now();
    let status = finish(&mut daemon.kmutex(&["status", "--cluster"]));
    status.assert_error(UNAVAILABLE, &["etcd at", &silent.url, "does not answer"]);
    assert!(began.elapsed() < Duration::from_secs(8));
    assert_eq!(daemon.status().len(), 0);
}

/// Sends a request to etcd's gateway.
fn gateway(etcd: &Etcd, path: &str, body: &str) {
    let url = etcd.endpoints()[0].to_string();
    let mut stream = TcpStream::connect(url.strip_prefix("http://").unwrap()).unwrap();
    let length = body.len();
    write!(stream, "POST {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(" 200 "), "{answer}");
}

#[test]
#[ignore = "needs etcd"]
fn a_store_without_space_lets_locks_be_released_and_says_once_that_it_is_full() {
    let etcd = Etcd::single();
    let [a, b] = hosts(&etcd);
    let holder = a.hold("k");
    let mut next = waiter(&b, &["--queue"], "k", 0);
    wait_until("b to stand in line", || standing(&etcd, "k") == 2);
    gateway(&etcd, "/v3/maintenance/alarm", r#"{"action":"ACTIVATE","alarm":"NOSPACE"}"#);
    assert_eq!(holder.finish(0), 0);
    assert_eq!(next.wait(), 0, "its place was taken before");
    wait_until("the lock to be free", || standing(&etcd, "k") == 0);
    let refused = finish(&mut a.run(&["-n", "k", "true"]));
    refused.assert_error(UNAVAILABLE, &["etcd at", "has no space"]);
    assert_eq!(a.log().matches("database space exceeded").count(), 1, "{}", a.log());
    let mut patient = Process::spawn(&mut a.run(&["k", "true"]));
    etcd.ctl(&["alarm", "disarm"]);
    assert_eq!(patient.wait(), 0);
    a.wait_for_log("it has space again");
}

#[test]
#[ignore = "needs etcd"]
fn a_permission_that_is_revoked_is_logged_once_and_asked_for_ever_more_seldom() {
    let mut etcd = Etcd::single();
    etcd.enable_auth("locks", "secret", "kmutex");
    let password = etcd.file("password");
    std::fs::write(&password, "secret\n").unwrap();
    let user = ["--etcd-user", "locks", "--etcd-password-file", password.to_str().unwrap()];
    let a = steady_host(&etcd, "10", &user);
    let mut holder = a.hold("k");
    etcd.ctl(&["role", "revoke-permission", "--prefix=true", "locks", "kmutex"]);
    let refused = wait_for("a refusal", || {
        let refused = finish(&mut a.run(&["-n", "l", "true"]));
        (refused.code == UNAVAILABLE).then_some(refused)
    });
    refused.assert_error(UNAVAILABLE, &["etcd at", "does not permit it"]);
    // A watch that is open goes on. One that must be opened anew is refused, so what is held cannot be checked any more.
    etcd.kill(0);
    etcd.restart(0);
    assert_eq!(holder.process.wait(), LOST);
    let warnings = a.log().lines().filter(|line| line.contains("permission denied")).count();
    assert_eq!(warnings, 1, "{}", a.log());
    etcd.ctl(&["role", "grant-permission", "--prefix=true", "locks", "readwrite", "kmutex"]);
    finish(&mut a.run(&["k", "true"])).assert_silent(0);
    a.wait_for_log("the user has the permission again");
}

#[test]
#[ignore = "needs etcd"]
fn places_whose_names_are_no_text_or_were_made_at_once_are_all_waited_for() {
    let etcd = Etcd::single();
    let a = host(&etcd);
    let client = etcd.client();
    let key = |end: &[u8]| [name("k").as_bytes(), b"/", end].concat();
    let keys = [&b"\xff"[..], b"\xfe", b"\xef\xbf\xbd"].map(key);
    let puts = keys.iter().map(|key| Op::Put { key: key.clone(), value: Vec::new(), lease: None });
    // One transaction, so that all have the same create revision.
    client.txn(&Txn { then: puts.collect(), ..Txn::default() }).unwrap();
    let mut run = waiter(&a, &["--queue"], "k", 0);
    let queue = Range { key: key(b""), end: [name("k").as_bytes(), b"0"].concat(), ..Range::default() };
    wait_until("kmutex to stand in line", || client.range(&queue).unwrap().kvs.len() == 4);
    for (number, key) in keys.into_iter().enumerate() {
        assert!(run.is_running(), "{number}");
        client.txn(&Txn { then: vec![Op::Delete { key }], ..Txn::default() }).unwrap();
        // When the daemon has seen this, it has seen that.
        finish(&mut a.run(&["marker", "true"])).assert_silent(0);
        if number < 2 {
            assert_eq!(a.counts("k"), (1, 1), "{number}");
        }
    }
    assert_eq!(run.wait(), 0);
}

#[test]
#[ignore = "needs etcd"]
fn a_lease_that_was_lost_is_ended_although_an_election_gives_it_its_whole_time_again() {
    let mut etcd = Etcd::single();
    let a = steady_host(&etcd, "12", &[]);
    let mut holder = a.hold("k");
    let log = a.log();
    let lease = log.split("under lease ").nth(1).unwrap().split(',').next().unwrap().to_string();
    etcd.kill(0);
    a.wait_for_log("was not kept in time");
    assert_eq!(holder.process.wait(), LOST);
    etcd.restart(0);
    let restarted = Instant::now();
    wait_until("the lease to end", || !etcd.ctl(&["lease", "list"]).contains(&lease));
    assert!(restarted.elapsed() < Duration::from_secs(9), "{:?}", restarted.elapsed());
    a.wait_for_logs("clustering locks under lease", 2);
}

#[test]
#[ignore = "needs etcd"]
fn a_release_that_etcd_could_not_be_told_of_is_logged() {
    let mut etcd = Etcd::single();
    let a = host(&etcd);
    let holder = a.hold("nightly");
    etcd.kill(0);
    assert_eq!(holder.finish(3), 3);
    let line = a.wait_for_log("could not be told");
    assert!(line.contains("\"nightly\" (exit 3)") && line.contains("again"), "{line}");
    etcd.restart(0);
}

/// Passes everything on to etcd, and answers late.
fn slow_link(etcd: &Etcd, delay: Duration) -> Liar {
    let url = etcd.endpoints()[0].to_string();
    let addr = url.strip_prefix("http://").unwrap().to_string();
    Liar::new(move |near| {
        let far = TcpStream::connect(&addr).unwrap();
        let (mut from, mut to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
        thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(std::net::Shutdown::Write);
        });
        let (mut from, mut to) = (far, near);
        let mut buffer = [0; 16 * 1024];
        while let Ok(bytes @ 1..) = from.read(&mut buffer) {
            // This is the link, not a wait for something.
            thread::sleep(delay);
            if to.write_all(&buffer[..bytes]).is_err() {
                break;
            }
        }
    })
}

#[test]
#[ignore = "needs etcd"]
fn a_slow_link_needs_a_longer_timeout_and_then_works() {
    let etcd = Etcd::single();
    let link = slow_link(&etcd, Duration::from_millis(1200));
    let impatient = Daemon::with(&["--etcd", &link.url]);
    impatient.wait_for_log("no answer within 1s");
    finish(&mut impatient.run(&["-n", "k", "true"])).assert_error(UNAVAILABLE, &["does not answer"]);
    let patient = ["--etcd", &link.url, "--etcd-timeout", "10", "--etcd-ttl", "60"];
    let patient = Daemon::with(&patient);
    patient.wait_for_log("clustering locks under lease");
    assert!(!patient.log().contains("WARN"), "{}", patient.log());
    finish(&mut patient.run(&["k", "true"])).assert_silent(0);
}

#[test]
fn a_timeout_and_a_lease_that_do_not_fit_together_are_named_at_the_start() {
    let short = Daemon::with(&["--etcd", "http://127.0.0.1:1", "--etcd-ttl", "10", "--etcd-timeout", "2.5"]);
    let line = short.wait_for_log("--etcd-timeout");
    assert!(line.contains("--etcd-ttl 12 or more"), "{line}");
    let enough = Daemon::with(&["--etcd", "http://127.0.0.1:1", "--etcd-ttl", "12", "--etcd-timeout", "2.5"]);
    enough.wait_for_log("connection refused");
    assert!(!enough.log().contains("or more"), "{}", enough.log());
}

#[test]
#[ignore = "needs etcd"]
fn listings_do_not_hold_up_locks() {
    let etcd = Etcd::single();
    let a = host(&etcd);
    let mut wires: Vec<_> = (0..300).map(|_| a.wire()).collect();
    for wire in &mut wires {
        wire.open(r#"{"type":"status","cluster":true}"#);
    }
    // Half of them do not wait for the answer.
    let rest = wires.split_off(150);
    drop(wires);
    finish(&mut a.run(&["k", "true"])).assert_silent(0);
    for mut wire in rest {
        wait_until("the end of a listing", || wire.answer()["type"] == "end");
    }
}

/// The number of a daemon's lease.
fn lease_of(daemon: &Daemon) -> String {
    let log = daemon.log();
    log.split("under lease ").nth(1).unwrap().split(',').next().unwrap().to_string()
}

#[test]
#[ignore = "needs etcd"]
fn a_daemon_with_a_copied_journal_takes_a_lease_of_its_own() {
    let etcd = Etcd::single();
    let a = host(&etcd);
    let holder = a.hold("k");
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("journal");
    std::fs::copy(a.folder().join("sock.journal"), &copy).unwrap();
    let url = etcd.endpoints()[0].to_string();
    let b = Daemon::with(&["--etcd", &url, "--etcd-ttl", "2", "--state", copy.to_str().unwrap()]);
    b.wait_for_log("clustering locks under lease");
    assert_ne!(lease_of(&a), lease_of(&b));
    assert_eq!(b.log().matches("another path").count(), 1, "{}", b.log());
    assert_eq!(b.status().len(), 0, "what is held is the other daemon's");
    finish(&mut b.run(&["-n", "k", "true"])).assert_silent(75);
    assert_eq!(holder.finish(0), 0);
}

/// A clone of a machine: a daemon that finds the journal of another one in its place, and sees the file `mine` in the place of
/// `theirs`. (Two of them on one machine would exclude each other, so the earlier one is dead; etcd knows its lease yet.)
fn check_clone(theirs: &str, mine: &str, why: &str) {
    let etcd = Etcd::single();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), mine).unwrap();
    let url = etcd.endpoints()[0].to_string();
    let options = ["--etcd", &url, "--etcd-ttl", "60"];
    let mut daemon = Daemon::with(&options);
    daemon.wait_for_log("clustering locks under lease");
    let (_holder, lease) = (daemon.hold("k"), lease_of(&daemon));
    let mount = format!("mount --bind {} {theirs} && exec \"$0\" \"$@\"", file.path().display());
    daemon.restart_made(&options, |command| {
        let mut clone = tool("unshare");
        let home = command.get_current_dir().unwrap();
        clone.args(["--mount", "sh", "-c", &mount]).arg(command.get_program()).args(command.get_args());
        clone.current_dir(home).env_remove("KMUTEX_SOCK").env_remove("RUST_LOG");
        clone.stdin(Stdio::null()).stderr(File::create(home.join("log")).unwrap());
        *command = clone;
        command
    });
    daemon.wait_for_log("clustering locks under lease");
    assert_ne!(lease_of(&daemon), lease);
    assert_eq!(daemon.log().matches(why).count(), 1, "{}", daemon.log());
    finish(&mut daemon.run(&["-n", "k", "true"])).assert_silent(75);
    assert!(etcd.ctl(&["lease", "list"]).contains(lease.trim_start_matches('0')), "it is the other daemon's");
}

#[test]
#[ignore = "needs root and etcd"]
fn a_clone_with_another_machine_id_takes_a_lease_of_its_own() {
    check_clone("/etc/machine-id", "0123456789abcdef0123456789abcdef\n", "another machine");
}

#[test]
#[ignore = "needs root and etcd"]
fn a_clone_with_the_same_machine_id_that_has_booted_takes_a_lease_of_its_own() {
    let boot = "01234567-89ab-cdef-0123-456789abcdef\n";
    check_clone("/proc/sys/kernel/random/boot_id", boot, "another boot");
}
