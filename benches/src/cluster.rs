//! Locks that hosts share through etcd: beside what etcd itself takes for the same transactions, and beside `etcdctl lock`.
//!
//! Nothing is pinned: etcd, the daemon's threads and the load share the processors as they do anywhere.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use kmutex::etcd::{self, Compare, LeaseId, Op, Range, Sort, Txn};

use crate::commands::{Environment, Timed, alternate};
use crate::etcd::Etcd;
use crate::load::connect;
use crate::report::{Row, Target};
use crate::servers::{Server, unpin_load};
use crate::single_flight;
use crate::{Result, fail, median, raise_descriptor_limit};

/// How many turns each side has, and of how many locks and releases.
const TURNS: usize = 40;
const ROUNDS: usize = 25;
/// How often each of two commands is run.
const RUNS: usize = 200;
/// How many keys at once, and how often.
const KEYS: usize = 200;
const KEYS_TURNS: usize = 9;
/// How many locks are held while nothing happens, and for how long that is watched.
const HELD: [usize; 3] = [0, 1, 1_000];
const WATCHED: Duration = Duration::from_secs(15);
/// How long it may take until etcd knows of all releases.
const SETTLE_MAX: Duration = Duration::from_secs(30);
/// What is asked of etcd in that time: a keep-alive for each third of a lease of 10 s; five of them may fall into 15 s.
const STEADY_MAX: f64 = 0.34;

/// All rows of the table that are about etcd.
pub fn measure(program: &Path) -> Result<Vec<Row>> {
    raise_descriptor_limit()?;
    unpin_load()?;
    let mut rows = Vec::new();
    for (nodes, name) in [(1, "one node"), (3, "three nodes")] {
        let etcd = Etcd::start(nodes)?;
        let daemon = Server::sharing(program, &etcd.urls())?;
        rows.push(transactions(&etcd, &daemon, name)?);
        rows.push(commands(program, &etcd, &daemon, name)?);
        rows.push(at_once(&etcd, &daemon, name)?);
        if nodes == 1 {
            for held in HELD {
                rows.push(steady(&etcd, &daemon, held)?);
            }
        }
    }
    rows.push(single_flight::measure_hosts(program)?);
    Ok(rows)
}

/// A connection of protocol 2.
struct Locker(BufReader<UnixStream>);

impl Locker {
    fn connect(sock: &Path) -> Result<Locker> {
        let mut locker = Locker(BufReader::new(connect(sock)?));
        locker.0.get_mut().write_all(b"\0kmutex proto 2\n")?;
        locker.expect("hello")?;
        Ok(locker)
    }

    fn ask_lock(&mut self, key: &str) -> Result<()> {
        Ok(writeln!(self.0.get_mut(), "{{\"type\":\"lock\",\"key\":\"{key}\"}}")?)
    }

    fn lock(&mut self, key: &str) -> Result<()> {
        self.ask_lock(key)?;
        self.expect("granted")
    }

    fn release(&mut self) -> Result<()> {
        self.0.get_mut().write_all(b"{\"type\":\"release\"}\n")?;
        self.expect("released")
    }

    fn expect(&mut self, what: &str) -> Result<()> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        if !line.contains(&format!("\"type\":\"{what}\"")) {
            return fail(format!("{line:?} instead of {what}"));
        }
        Ok(())
    }
}

/// The two transactions that the daemon makes for a lock and its release, and nothing else.
struct Raw {
    client: etcd::Client,
    lease: LeaseId,
    number: u64,
}

/// As long as what the daemon puts.
const IDENTITY: &str = "raw/00112233445566778899aabbccddeeff";
const CLAIM: &str = r#"{"key":"raw","host":"a-host-of-mine","protocol":2,"mode":"once","who":{"user":"operator"},"since_ms":1700000000000}"#;
const RECORD: &str = r#"{"token":1700000000000000,"outcome":"unknown"}"#;

impl Raw {
    fn new(etcd: &Etcd) -> Result<Raw> {
        let client = etcd.client()?;
        let lease = client.grant_lease(600)?.id;
        Ok(Raw { client, lease, number: 0 })
    }

    /// A pair of transactions.
    fn round(&mut self) -> Result<()> {
        self.number += 1;
        let of = |rest: &str| format!("{IDENTITY}{rest}").into_bytes();
        let place = of(&format!("/{:x}.{:x}", self.lease.0, self.number));
        let lease = Some(self.lease);
        let line = || {
            Op::Range(Range { key: of("."), end: of("0"), sort: Sort::CreateRevision, ..Range::default() })
        };
        let put = Op::Put { key: place.clone(), value: CLAIM.into(), lease };
        let taken = self.client.txn(&Txn {
            compare: vec![Compare::Empty { key: of("/"), end: of("0") }],
            then: vec![put, line()],
            or_else: vec![line()],
        })?;
        let is_mine = Compare::CreateRevision { key: place.clone(), revision: taken.revision };
        let record = Op::Put { key: of(".done"), value: RECORD.into(), lease };
        let left = self.client.txn(&Txn {
            compare: vec![is_mine],
            then: vec![Op::Delete { key: place }, record, line()],
            or_else: vec![line()],
        })?;
        if taken.succeeded && left.succeeded { Ok(()) } else { fail("another client has the raw lock") }
    }
}

/// A release and the next lock of one key: how long that takes in the daemon, and how long etcd alone.
fn transactions(etcd: &Etcd, daemon: &Server, name: &str) -> Result<Row> {
    let mut locker = Locker::connect(&daemon.sock())?;
    let mut raw = Raw::new(etcd)?;
    let mut took = [Vec::new(), Vec::new()];
    for _ in 0..TURNS {
        locker.lock("key")?;
        for _ in 0..ROUNDS {
            took[0].push(micros(|| {
                // The release is answered before etcd knows of it; the lock is not to be had before.
                locker.release()?;
                locker.lock("key")
            })?);
        }
        locker.release()?;
        wait_for_empty(etcd)?;
        raw.round()?;
        for _ in 0..ROUNDS {
            took[1].push(micros(|| raw.round())?);
        }
    }
    let what = format!("lock and release through etcd, {name} / its two transactions alone");
    let [ours, theirs] = took.map(|took| median(&took));
    Ok(Row::new(&what, ours, Some(theirs), "µs", Target::AtMost(1.2)))
}

fn micros(act: impl FnOnce() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    act()?;
    Ok(began.elapsed().as_secs_f64() * 1e6)
}

/// Waits until no place is left in etcd.
fn wait_for_empty(etcd: &Etcd) -> Result<()> {
    let client = etcd.client()?;
    let all = Range { key: b"kmutex/".into(), end: b"kmutex0".into(), ..Range::default() };
    let give_up = Instant::now() + SETTLE_MAX;
    loop {
        match client.range(&all) {
            Ok(reply) if reply.kvs.iter().all(|key| key.key.ends_with(b".done")) => return Ok(()),
            Err(e) if Instant::now() > give_up => return Err(e.to_string().into()),
            Ok(_) if Instant::now() > give_up => return fail("a lock that was released is still in etcd"),
            _ => sleep(Duration::from_millis(2)),
        }
    }
}

/// As users start them.
fn commands(program: &Path, etcd: &Etcd, daemon: &Server, name: &str) -> Result<Row> {
    let (program, sock) = (&*program.to_string_lossy(), daemon.sock());
    let ours = [program, "run", "--sock", &sock.to_string_lossy(), "key", "true"];
    let ours = Timed::new(&ours, 0, Environment::Login)?;
    let endpoints = format!("--endpoints={}", etcd.urls());
    let theirs = Timed::new(&["etcdctl", &endpoints, "lock", "key", "true"], 0, Environment::Login)?;
    let [ours, theirs] = alternate(RUNS, &ours, &theirs)?.map(|took| median(&took));
    let what = format!("`kmutex run K true`, {name} / `etcdctl lock K true`");
    Ok(Row::new(&what, ours, Some(theirs), "µs", Target::AtMost(0.2)))
}

/// Many keys on as many connections: until all are granted, asked for at once, or each when the one before is granted.
fn at_once(etcd: &Etcd, daemon: &Server, name: &str) -> Result<Row> {
    let connect = |_| Locker::connect(&daemon.sock());
    let mut lockers: Vec<Locker> = (0..KEYS).map(connect).collect::<Result<_>>()?;
    let mut took = [Vec::new(), Vec::new()];
    for turn in 0..2 * KEYS_TURNS {
        let keys = (0..KEYS).map(|number| format!("key {turn} {number}"));
        let mut pairs: Vec<_> = lockers.iter_mut().zip(keys).collect();
        took[turn % 2].push(
            micros(|| match turn % 2 {
                0 => {
                    pairs.iter_mut().try_for_each(|(locker, key)| locker.ask_lock(key))?;
                    pairs.iter_mut().try_for_each(|(locker, _)| locker.expect("granted"))
                }
                _ => pairs.iter_mut().try_for_each(|(locker, key)| locker.lock(key)),
            })? / 1e3,
        );
        lockers.iter_mut().try_for_each(Locker::release)?;
        wait_for_empty(etcd)?;
    }
    let what = format!("{KEYS} keys at once, {name} / one after the other");
    let [ours, theirs] = took.map(|took| median(&took));
    Ok(Row::new(&what, ours, Some(theirs), "ms", Target::Open))
}

/// What etcd is asked a second while locks are held and nothing happens.
fn steady(etcd: &Etcd, daemon: &Server, held: usize) -> Result<Row> {
    let mut lockers = Vec::new();
    for number in 0..held {
        let mut locker = Locker::connect(&daemon.sock())?;
        locker.ask_lock(&format!("held {number}"))?;
        lockers.push(locker);
    }
    lockers.iter_mut().try_for_each(|locker| locker.expect("granted"))?;
    // The watch that this may have the daemon open anew, after the keep-alive that follows.
    sleep(Duration::from_secs(5));
    let before = etcd.requests()?;
    sleep(WATCHED);
    let mut count = 0;
    for (method, after) in etcd.requests()? {
        let more = after - before.get(&method).copied().unwrap_or(0);
        if more > 0 {
            eprintln!("{held} held locks: {more} {method}");
        }
        count += more;
    }
    lockers.iter_mut().try_for_each(Locker::release)?;
    wait_for_empty(etcd)?;
    let what = format!("requests to etcd while {held} locks are held");
    let rate = count as f64 / WATCHED.as_secs_f64();
    Ok(Row::new(&what, rate, None, "a second", Target::AtMost(STEADY_MAX)))
}
