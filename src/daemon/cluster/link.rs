//! The threads that speak with etcd, so that the daemon's loop never waits for it: one that keeps the lease, one that
//! watches, and a few that carry out what the loop orders. All that they find goes through one channel to the loop, which
//! an eventfd(2) wakes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::layout::{Layout, Leases};
use super::listing::Locks;
use crate::clock;
use crate::cluster::{Ask, Contender, Failure, Heard, Line, Question, Revision};
use crate::daemon::connection::ConnectionId;
use crate::daemon::listing::Page;
use crate::daemon::remote::RemoteRequest;
use crate::etcd::{self, Client, Event, LeaseId, Range, Sort};
use crate::proto::LockId;
use crate::table::Millis;

/// How many orders are carried out side by side.
const WORKERS: usize = 16;
/// How many reports may wait for the loop before the threads wait for it.
const REPORTS_MAX: usize = 1024;
/// How long before a lease, or a watch, is asked for again.
const PAUSE: Duration = Duration::from_millis(500);
/// How many keys a page of all that is held has at the most.
const PAGE_KEYS_MAX: u64 = 100;
/// How much longer a record is kept than its host's lease.
const RECORDS_TTL_SECS: u64 = 120;

/// What the loop has etcd asked.
#[derive(Debug)]
pub(super) enum Order {
    Ask(Ask, Leases),
    /// In which lines a lease has places.
    Places(LeaseId),
    /// A lease for records.
    RecordsLease,
    /// What a client wants of etcd.
    Remote(ConnectionId, RemoteRequest),
}

/// What the keeper of the lease is told.
#[derive(Debug)]
pub(super) enum Care {
    /// Nothing may rely on this lease any more: get another. This one ends by itself, and not before: those who held under
    /// it need the rest of its time to stop.
    Abandon(LeaseId),
    /// The daemon ends: end the lease if it is not needed, and say so.
    Stop { revoke: Option<LeaseId>, done: Sender<()> },
}

/// What the loop is told.
#[derive(Debug)]
pub(super) enum Report {
    /// The lease lives, and did when this was asked for, at `sent`.
    Leased {
        lease: LeaseId,
        sent: Millis,
        ttl_secs: u64,
        revision: i64,
    },
    LeaseGone(LeaseId),
    /// Etcd cannot be reached, or refuses: why.
    Trouble(etcd::Error),
    /// `lease`: under which it was asked.
    Answer {
        lock: LockId,
        id: u64,
        lease: LeaseId,
        answer: Result<Line, Failure>,
        trouble: Option<etcd::Error>,
    },
    Places(Vec<LockId>),
    /// In which lines this lease has places could not be found out a while ago.
    NoPlaces(LeaseId),
    /// Where records may be put for [`RECORDS_TTL_SECS`] after `sent`.
    RecordsLease {
        lease: LeaseId,
        sent: Millis,
    },
    /// This lease for records is gone, perhaps.
    RecordsGone(LeaseId),
    /// What the watch has seen, and how far.
    Heard {
        revision: i64,
        events: Vec<(LockId, Revision, Heard)>,
    },
    /// What happened up to this revision is not known; what comes after will be.
    Missed(Revision),
    Page {
        to: ConnectionId,
        page: Result<Page, etcd::Error>,
    },
    /// A lock was broken; `false`: it was not held.
    Broken {
        to: ConnectionId,
        broken: Result<bool, etcd::Error>,
    },
}

/// The loop's end of it.
pub(super) struct Link {
    client: Arc<Client>,
    wake: Arc<EventFd>,
    reports: Receiver<Report>,
    orders: Sender<Order>,
    care: Sender<Care>,
}

/// The threads' end of it.
#[derive(Clone)]
struct Desk {
    client: Arc<Client>,
    layout: Layout,
    wake: Arc<EventFd>,
    reports: SyncSender<Report>,
}

impl Link {
    /// Starts the threads. `resume` is the lease of the daemon before, which may live still.
    pub(super) fn start(
        client: Client,
        layout: Layout,
        ttl_secs: u64,
        resume: Option<LeaseId>,
    ) -> io::Result<Link> {
        let (reports, received) = mpsc::sync_channel(REPORTS_MAX);
        let (orders, ordered) = mpsc::channel();
        let (care, cared) = mpsc::channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let client = Arc::new(client);
        let desk = Desk { client: client.clone(), layout, wake: wake.clone(), reports };
        let ordered = Arc::new(Mutex::new(ordered));
        for _ in 0..WORKERS {
            let (desk, ordered) = (desk.clone(), ordered.clone());
            thread::Builder::new().name("etcd worker".into()).spawn(move || desk.work(&ordered))?;
        }
        let watcher = desk.clone();
        thread::Builder::new().name("etcd watch".into()).spawn(move || watcher.watch())?;
        thread::Builder::new().name("etcd lease".into()).spawn(move || {
            Keeper { desk, ttl_secs, lease: resume }.keep(&cared);
        })?;
        Ok(Link { client, wake, reports: received, orders, care })
    }

    /// What becomes readable when there is a report.
    pub(super) fn readable(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next report, if there is one. Ask for them until there is none.
    pub(super) fn report(&self) -> Option<Report> {
        self.reports.try_recv().ok()
    }

    pub(super) fn order(&self, order: Order) {
        // The workers live as long as this.
        let _ = self.orders.send(order);
    }

    pub(super) fn abandon(&self, lease: LeaseId) {
        let _ = self.care.send(Care::Abandon(lease));
    }

    /// The watch has been silent for too long: it is opened anew.
    pub(super) fn watch_anew(&self) {
        self.client.hang_up();
    }

    /// The next report, waited for until then at the most.
    pub(super) fn wait(&self, until: Instant) -> Option<Report> {
        self.reports.recv_timeout(until.saturating_duration_since(Instant::now())).ok()
    }

    /// Ends the lease, if one is given, and returns when that is done, or at the deadline.
    pub(super) fn stop(&self, revoke: Option<LeaseId>, until: Instant) {
        let (done, told) = mpsc::channel();
        if self.care.send(Care::Stop { revoke, done }).is_ok() {
            // If it takes longer, the lease ends by itself.
            let _ = told.recv_timeout(until.saturating_duration_since(Instant::now()));
        }
    }
}

impl Desk {
    fn report(&self, report: Report) {
        // The loop has ended, or is woken already.
        if self.reports.send(report).is_ok() {
            let _ = self.wake.write(1);
        }
    }

    fn work(&self, orders: &Mutex<Receiver<Order>>) {
        loop {
            let order = orders.lock().unwrap_or_else(PoisonError::into_inner).recv();
            match order {
                Ok(Order::Ask(ask, leases)) => self.ask(&ask, leases),
                Ok(Order::Places(lease)) => match self.client.lease_keys(lease) {
                    Ok(keys) => {
                        let locks = keys.iter().filter_map(|key| self.layout.lock_of(key)).collect();
                        self.report(Report::Places(locks));
                    }
                    Err(e) => {
                        self.report(Report::Trouble(e));
                        thread::sleep(PAUSE);
                        self.report(Report::NoPlaces(lease));
                    }
                },
                Ok(Order::RecordsLease) => {
                    let sent = clock::now();
                    match self.client.grant_lease(RECORDS_TTL_SECS) {
                        Ok(lease) => self.report(Report::RecordsLease { lease: lease.id, sent }),
                        Err(e) => self.report(Report::Trouble(e)),
                    }
                }
                Ok(Order::Remote(to, RemoteRequest::List { from })) => {
                    let page = self.page(from);
                    self.report(Report::Page { to, page });
                }
                Ok(Order::Remote(to, RemoteRequest::Break { lock })) => {
                    let broken = self.break_lock(lock);
                    self.report(Report::Broken { to, broken });
                }
                Err(_) => return,
            }
        }
    }

    fn ask(&self, ask: &Ask, leases: Leases) {
        let txn = |leases| self.client.txn(&self.layout.txn(ask.lock, &ask.what, leases));
        let mut reply = txn(leases);
        if leases.records != leases.places && reply.as_ref().is_err_and(etcd::Error::is_lease_gone) {
            // Which of the two it is that is gone, etcd does not say. Not to have one for records is no loss.
            self.report(Report::RecordsGone(leases.records));
            reply = txn(Leases { records: leases.places, ..leases });
        }
        let (answer, trouble) = match reply {
            Ok(mut reply) => {
                let keys = reply.ranges.pop().unwrap_or_default();
                (Ok(self.layout.line(reply.revision, keys)), None)
            }
            Err(e) if e.is_lease_gone() => (Err(Failure::LeaseGone), None),
            Err(e @ (etcd::Error::Unreachable { .. } | etcd::Error::Refused { .. })) => {
                (Err(Failure::NotDone), Some(e))
            }
            Err(e) => (Err(Failure::Unknown), Some(e)),
        };
        self.report(Report::Answer { lock: ask.lock, id: ask.id, lease: leases.places, answer, trouble });
    }

    fn break_lock(&self, lock: LockId) -> Result<bool, etcd::Error> {
        let none = Leases { places: LeaseId(0), records: LeaseId(0) };
        let mut reply = self.client.txn(&self.layout.txn(lock, &Question::Read, none))?;
        let line = self.layout.line(reply.revision, reply.ranges.pop().unwrap_or_default());
        let Some(Contender { place, revision, .. }) = line.contenders.into_iter().next() else {
            return Ok(false);
        };
        let question = Question::Leave { place, revision, record: None, next: None };
        Ok(self.client.txn(&self.layout.txn(lock, &question, none))?.succeeded)
    }

    /// Reads a page of whole locks, beginning at the key `from`; an empty key means from the beginning.
    fn page(&self, from: Vec<u8>) -> Result<Page, etcd::Error> {
        let (start, end) = self.layout.everything();
        let mut key = if from.is_empty() { start } else { from };
        let mut locks = Locks::default();
        loop {
            let range = Range { key, end: end.clone(), limit: PAGE_KEYS_MAX, sort: Sort::Key };
            let reply = self.client.range(&range)?;
            for (lock, contender) in reply.kvs.iter().filter_map(|key| self.layout.contender(key)) {
                locks.add(lock, contender);
            }
            let last = reply.kvs.last().filter(|_| reply.more);
            let Some(last) = last else { return Ok(Page { locks: locks.finish(), next: None }) };
            if locks.has_complete() {
                let (locks, incomplete) = locks.complete();
                return Ok(Page { locks, next: incomplete.map(|lock| self.layout.first_key(lock)) });
            }
            key = [&last.key[..], b"\0"].concat();
        }
    }

    /// Watches for ever: from where it ended the last time, or, if that is forgotten, from now on.
    fn watch(&self) {
        let mut next = None;
        loop {
            // A watch that was open and has ended is opened at once.
            if let Err(e) = self.watch_once(&mut next) {
                self.report(Report::Trouble(e));
                thread::sleep(PAUSE);
            }
        }
    }

    /// `next`: the first revision that was not seen.
    fn watch_once(&self, next: &mut Option<i64>) -> Result<(), etcd::Error> {
        let (key, end) = self.layout.everything();
        let from = match *next {
            Some(from) => from,
            None => {
                let range = Range { key: key.clone(), limit: 1, ..Range::default() };
                self.client.range(&range)?.revision + 1
            }
        };
        let mut watch = self.client.watch(&key, &end, from)?;
        if next.is_none() {
            *next = Some(from);
            self.report(Report::Missed(Revision(from - 1)));
        }
        loop {
            let Ok(reply) = watch.next() else { return Ok(()) };
            if reply.compact_revision > 0 {
                *next = None;
            }
            if reply.canceled.is_some() || reply.compact_revision > 0 {
                return Ok(());
            }
            // Not the revision of the reply: where there is much to tell, it is that of the store, and more is to come.
            let last = reply.events.iter().map(Event::revision).max();
            *next = (*next).max(last.map(|last| last + 1));
            let events = reply.events.iter().filter_map(|event| self.layout.heard(event)).collect();
            self.report(Report::Heard { revision: reply.revision, events });
        }
    }
}

/// Has a lease, and keeps it.
struct Keeper {
    desk: Desk,
    ttl_secs: u64,
    lease: Option<LeaseId>,
}

impl Keeper {
    fn keep(mut self, orders: &Receiver<Care>) {
        loop {
            let began = Instant::now();
            let pause = self.tend();
            match orders.recv_timeout(pause.saturating_sub(began.elapsed())) {
                Ok(Care::Abandon(lease)) => {
                    if self.lease == Some(lease) {
                        self.lease = None;
                    }
                }
                Ok(Care::Stop { revoke, done }) => {
                    if let Some(lease) = revoke {
                        // If that fails, it ends by itself.
                        let _ = self.desk.client.revoke(lease);
                    }
                    // Nobody may be waiting any more.
                    let _ = done.send(());
                    return;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Gets a lease, or keeps the one that it has. Returns after how long to do so again.
    fn tend(&mut self) -> Duration {
        let sent = clock::now();
        let Some(lease) = self.lease else {
            return match self.desk.client.grant_lease(self.ttl_secs) {
                Ok(granted) => {
                    self.lease = Some(granted.id);
                    let (lease, ttl_secs) = (granted.id, granted.ttl_secs);
                    self.desk.report(Report::Leased { lease, sent, ttl_secs, revision: 0 });
                    period(ttl_secs)
                }
                Err(e) => {
                    self.desk.report(Report::Trouble(e));
                    PAUSE
                }
            };
        };
        match self.desk.client.keep_alive(lease) {
            Ok(kept) if kept.ttl_secs == 0 => {
                self.lease = None;
                self.desk.report(Report::LeaseGone(lease));
                Duration::ZERO
            }
            Ok(kept) => {
                let (ttl_secs, revision) = (kept.ttl_secs, kept.revision);
                self.desk.report(Report::Leased { lease, sent, ttl_secs, revision });
                period(ttl_secs)
            }
            Err(e) => {
                self.desk.report(Report::Trouble(e));
                PAUSE.min(period(self.ttl_secs))
            }
        }
    }
}

/// How often a lease is kept alive.
fn period(ttl_secs: u64) -> Duration {
    Duration::from_secs(ttl_secs) / 3
}
