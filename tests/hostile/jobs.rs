//! The jobs of a user that does nothing wrong: threads that take the same lock in turn, which no other user may take.

use std::io::Read;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kmutex::addr::Addr;
use kmutex::client::{LockOptions, LockReply};
use kmutex::proto::v2::Mode;
use kmutex::{Client, client};
use nix::unistd::Uid;

/// How long a daemon that was killed may be away.
const AWAY_MAX: Duration = Duration::from_secs(30);

/// Takes locks until standard input ends, and prints how long each took.
pub fn run(sock: &Path) {
    let addr = Addr::Unix(sock.into());
    let key = format!("@{}/job", Uid::effective());
    let (is_over, is_held, last) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
    // Printed at the end: until then the output is not read.
    let lines = Mutex::new(Vec::new());
    let note = |name: &str, took: Duration| {
        lines.lock().unwrap().push(format!("{name} {:.3}", took.as_secs_f64() * 1000.0));
    };
    println!("ready");
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut client = None;
                while !is_over.load(Ordering::Relaxed) {
                    note("wait", job(&addr, &key, &mut client, &is_held, &last));
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
        }
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let began = Instant::now();
                std::thread::sleep(Duration::from_millis(1));
                note("pause", began.elapsed());
            }
        });
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        is_over.store(true, Ordering::Relaxed);
    });
    println!("{}", lines.into_inner().unwrap().join("\n"));
}

/// One job: takes the lock, checks that it is alone and comes later than the job before, and releases. Returns how long it
/// waited for the lock.
fn job(
    addr: &Addr,
    key: &str,
    client: &mut Option<Client>,
    is_held: &AtomicBool,
    last: &AtomicU64,
) -> Duration {
    let options = LockOptions { mode: Mode::Queue, ..LockOptions::default() };
    let began = Instant::now();
    let guard = loop {
        assert!(began.elapsed() < AWAY_MAX, "no daemon came back");
        let Some(client) = client else {
            *client = connect(addr);
            continue;
        };
        match client.lock_with(key, &options) {
            Ok(Ok(guard)) => break guard,
            Ok(Err(reply)) => panic!("an exclusive queue has no other reply: {}", describe(&reply)),
            Err(e) if is_absence(&e) => std::thread::sleep(Duration::from_millis(1)),
            Err(e) => panic!("{e}"),
        }
    };
    let waited = began.elapsed();
    assert!(!is_held.swap(true, Ordering::SeqCst), "the lock was given twice");
    let token = guard.token().0;
    assert!(last.swap(token, Ordering::SeqCst) < token, "the tokens do not grow");
    std::thread::sleep(Duration::from_millis(2));
    is_held.store(false, Ordering::SeqCst);
    match guard.release() {
        Err(e) if !is_absence(&e) => panic!("{e}"),
        _ => waited,
    }
}

fn connect(addr: &Addr) -> Option<Client> {
    match Client::connect(addr) {
        Ok(client) => Some(client),
        Err(e) if is_absence(&e) => {
            std::thread::sleep(Duration::from_millis(1));
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// The daemon has just been killed. Every other error is a fault, of which that a lock was lost is the worst.
fn is_absence(error: &client::Error) -> bool {
    match error {
        client::Error::Addr(error) => error.is_absent(),
        client::Error::Closed | client::Error::SocketGone { .. } => true,
        _ => false,
    }
}

fn describe(reply: &LockReply) -> String {
    format!("{reply:?}")
}
