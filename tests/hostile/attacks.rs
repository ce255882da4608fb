//! What a hostile user tries, at random.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kmutex::proto::Key;
use nix::unistd::Pid;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::harness::{PREAMBLE, TIMEOUT, open_process};
use crate::kmutex;

/// Keys of other users, which they hold or wait for all the time.
const FOREIGN_KEYS: [&str; 3] = ["@root/long", "@0/job", "@65521/job"];
/// How many connections a flood opens.
const FLOOD: usize = 300;

/// Attacks until standard input ends.
pub fn run(sock: &Path, seed: u64) {
    static IS_OVER: AtomicBool = AtomicBool::new(false);
    println!("ready");
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        IS_OVER.store(true, Ordering::Relaxed);
    });
    let mut random = Random(seed);
    // Connections that are left open, to fill the daemon.
    let mut idle = Vec::new();
    while !IS_OVER.load(Ordering::Relaxed) {
        let key = FOREIGN_KEYS[random.below(FOREIGN_KEYS.len())];
        match random.below(9) {
            0 => take(sock, key),
            1 => squat(sock, &mut random),
            2 => name_foreign_processes(sock, key),
            3 => by_protocol_1(sock, key),
            4 => idle = connections(sock, FLOOD),
            5 => status_that_is_not_read(sock, &mut idle),
            6 => rubbish(sock, &mut random),
            7 => descriptors(sock),
            _ => slowly(sock, &mut idle),
        }
        if idle.len() > 4 * FLOOD {
            idle.clear();
        }
    }
}

/// xorshift64*, which is enough to choose by.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

/// A connection; `None`: the daemon has just been killed.
fn connect(sock: &Path) -> Option<UnixStream> {
    let stream = UnixStream::connect(sock).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    Some(stream)
}

/// Sends requests of protocol 2, and returns what comes back within a moment.
fn answers(sock: &Path, requests: &str) -> String {
    let Some(mut stream) = connect(sock) else { return String::new() };
    // The daemon may be killed, or close the connection.
    let _ = stream.write_all(&[PREAMBLE, requests.as_bytes()].concat());
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[track_caller]
fn assert_no(answer: &str, kinds: &[&str]) {
    for kind in kinds {
        assert!(!answer.contains(&format!("\"type\":\"{kind}\"")), "{answer}");
    }
}

/// Everything that takes a key which belongs to another user.
fn take(sock: &Path, key: &str) {
    let mut requests = String::new();
    for kind in ["break", "forget", "unlock", "lock", "release"] {
        requests += &format!("{{\"type\":\"{kind}\",\"key\":\"{key}\",\"pid\":1,\"nonce\":\"1\"}}\n");
    }
    let answer = answers(sock, &requests);
    assert_no(&answer, &["broken", "forgotten", "released", "granted", "waiting"]);
    // 69: the daemon serves as many of this user's clients as it may, or has just been killed.
    let code = kmutex(sock, &["run", "--no-autostart", "-n", key, "--", "true"]);
    assert!([77, 69].contains(&code), "exit status {code}");
}

/// Holds and releases a lock that any user may take, again and again.
fn squat(sock: &Path, random: &mut Random) {
    let key = format!("shared {}", random.below(3));
    let round = format!(
        "{{\"type\":\"lock\",\"key\":\"{key}\"}}\n{{\"type\":\"release\",\"outcome\":{{\"exit\":0}}}}\n"
    );
    answers(sock, &round.repeat(50));
}

/// Leaves locks to processes of other users, and takes theirs away.
fn name_foreign_processes(sock: &Path, key: &str) {
    let Some(mut stream) = connect(sock) else { return };
    for pid in [Pid::from_raw(1), Pid::parent()] {
        let lock = "{\"type\":\"lock\",\"key\":\"left behind\",\"exec\":true,\"child\":1}\n";
        let unlock = format!("{{\"type\":\"unlock\",\"key\":\"{key}\",\"pid\":1}}\n");
        let process = open_process(pid);
        let requests = [PREAMBLE, lock.as_bytes(), unlock.as_bytes()].concat();
        if !send_with(&stream, &requests, process.as_fd()) {
            return;
        }
        let mut answer = [0; 4096];
        let bytes = stream.read(&mut answer).unwrap_or(0);
        let answer = String::from_utf8_lossy(&answer[..bytes]);
        assert_no(&answer, &["granted", "released"]);
        match connect(sock) {
            Some(next) => stream = next,
            None => return,
        }
    }
}

/// Protocol 1 knows only identities, which every client can compute.
fn by_protocol_1(sock: &Path, key: &str) {
    let Some(mut stream) = connect(sock) else { return };
    // Behind the floods it may take a while until the daemon comes to this connection.
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let _ = stream.write_all(&Key::new(key).unwrap().id().0);
    let mut answer = [0];
    match stream.read(&mut answer) {
        Ok(0) => {}
        Ok(_) => panic!("protocol 1 got {key}: {answer:?}"),
        Err(e) => assert!(e.kind() != ErrorKind::WouldBlock, "protocol 1 waits for {key}"),
    }
}

fn connections(sock: &Path, count: usize) -> Vec<UnixStream> {
    (0..count).map_while(|_| connect(sock)).collect()
}

fn status_that_is_not_read(sock: &Path, idle: &mut Vec<UnixStream>) {
    let requests = [&PREAMBLE[..], &b"{\"type\":\"status\"}\n".repeat(900)].concat();
    for mut stream in connections(sock, 20) {
        stream.set_nonblocking(true).unwrap();
        let _ = stream.write(&requests);
        idle.push(stream);
    }
}

fn rubbish(sock: &Path, random: &mut Random) {
    for mut stream in connections(sock, 30) {
        let bytes: Vec<u8> = (0..random.below(5000)).map(|_| random.below(256) as u8).collect();
        let _ = stream.write_all(if random.below(2) == 0 { PREAMBLE } else { b"" });
        let _ = stream.write_all(&bytes);
    }
}

/// Descriptors of files that are not asked for.
fn descriptors(sock: &Path) {
    let null = std::fs::File::open("/dev/null").unwrap();
    let (one, other) = UnixStream::pair().unwrap();
    for stream in connections(sock, 30) {
        for file in [null.as_fd(), one.as_fd(), other.as_fd(), stream.as_fd()] {
            if !send_with(&stream, b"{\"type\":\"ping\"}\n", file) {
                break;
            }
        }
    }
}

/// Sends bytes, and a descriptor with them. Returns `false` if the daemon has closed the connection, or was killed.
fn send_with(stream: &UnixStream, bytes: &[u8], file: BorrowedFd<'_>) -> bool {
    let descriptors = [file];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).is_ok()
}

/// Messages that arrive byte by byte and never end.
fn slowly(sock: &Path, idle: &mut Vec<UnixStream>) {
    for mut stream in connections(sock, 20) {
        let _ = stream.write_all(&PREAMBLE[..]);
        for byte in b"{\"type\":\"lock\"" {
            let _ = stream.write(&[*byte]);
        }
        idle.push(stream);
    }
}
