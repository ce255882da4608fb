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
use crate::cluster::{ClusterRequest, Entry, Failure, QueueOp, QueueSnapshot, Revision, WatchEvent};
use crate::daemon::connection::ConnectionId;
use crate::daemon::listing::Page;
use crate::daemon::remote::RemoteRequest;
use crate::etcd::{self, Client, LeaseId, Range, Sort};
use crate::proto::LockId;
use crate::table::Timestamp;

/// How many commands are carried out side by side.
const WORKERS: usize = 16;
/// How many events may wait for the loop before the threads wait for it.
const EVENTS_MAX: usize = 1024;
/// How long before a lease, or a watch, is asked for again.
const PAUSE: Duration = Duration::from_millis(500);
/// How many keys a page of all that is held has at the most.
const PAGE_KEYS_MAX: u64 = 100;
/// How much longer a record is kept than its host's lease.
const RECORDS_TTL_SECS: u64 = 120;

/// What the loop has etcd asked.
#[derive(Debug)]
pub(super) enum Command {
    Request(ClusterRequest, Leases),
    /// In which lines a lease has places.
    ListEntries(LeaseId),
    /// A lease for records.
    GrantRecordsLease,
    /// What a client wants of etcd.
    Remote(ConnectionId, RemoteRequest),
}

/// What the keeper of the lease is told.
#[derive(Debug)]
pub(super) enum LeaseCommand {
    /// Nothing may rely on this lease any more: get another. This one ends by itself, and not before: those who held under
    /// it need the rest of its time to stop.
    Abandon(LeaseId),
    /// The daemon ends: end the lease if it is not needed, and say so.
    Stop { revoke: Option<LeaseId>, done: Sender<()> },
}

/// What the loop is told.
#[derive(Debug)]
pub(super) enum Event {
    /// The lease lives, and did when this was asked for, at `sent`.
    Leased {
        lease: LeaseId,
        sent: Timestamp,
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
        answer: Result<QueueSnapshot, Failure>,
        trouble: Option<etcd::Error>,
    },
    Entries(Vec<LockId>),
    /// In which lines this lease has places could not be found out a while ago.
    NoEntries(LeaseId),
    /// Where records may be put for [`RECORDS_TTL_SECS`] after `sent`.
    RecordsLease {
        lease: LeaseId,
        sent: Timestamp,
    },
    /// This lease for records is gone, perhaps.
    RecordsGone(LeaseId),
    /// What the watch has seen, and how far.
    Watch {
        revision: i64,
        events: Vec<(LockId, Revision, WatchEvent)>,
    },
    /// What happened up to this revision is not known; what comes after will be.
    WatchGap(Revision),
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
pub(super) struct EtcdThreads {
    client: Arc<Client>,
    wake: Arc<EventFd>,
    events: Receiver<Event>,
    commands: Sender<Command>,
    lease_commands: Sender<LeaseCommand>,
}

/// The threads' end of it.
#[derive(Clone)]
struct EtcdWorker {
    client: Arc<Client>,
    layout: Layout,
    wake: Arc<EventFd>,
    events: SyncSender<Event>,
}

impl EtcdThreads {
    /// Starts the threads. `resume` is the lease of the daemon before, which may live still.
    pub(super) fn start(
        client: Client,
        layout: Layout,
        ttl_secs: u64,
        resume: Option<LeaseId>,
    ) -> io::Result<EtcdThreads> {
        let (events, received) = mpsc::sync_channel(EVENTS_MAX);
        let (commands, queued) = mpsc::channel();
        let (lease_commands, lease_received) = mpsc::channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let client = Arc::new(client);
        let worker = EtcdWorker { client: client.clone(), layout, wake: wake.clone(), events };
        let queued = Arc::new(Mutex::new(queued));
        for _ in 0..WORKERS {
            let (worker, queued) = (worker.clone(), queued.clone());
            thread::Builder::new().name("etcd worker".into()).spawn(move || worker.work(&queued))?;
        }
        let watcher = worker.clone();
        thread::Builder::new().name("etcd watch".into()).spawn(move || watcher.watch())?;
        thread::Builder::new().name("etcd lease".into()).spawn(move || {
            LeaseKeeper { worker, ttl_secs, lease: resume }.keep(&lease_received);
        })?;
        Ok(EtcdThreads { client, wake, events: received, commands, lease_commands })
    }

    /// What becomes readable when there is an event.
    pub(super) fn readable(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next event, if there is one. Ask for them until there is none.
    pub(super) fn next_event(&self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    pub(super) fn command(&self, command: Command) {
        // The workers live as long as this.
        let _ = self.commands.send(command);
    }

    pub(super) fn abandon(&self, lease: LeaseId) {
        let _ = self.lease_commands.send(LeaseCommand::Abandon(lease));
    }

    /// The watch has been silent for too long: it is opened anew.
    pub(super) fn watch_anew(&self) {
        self.client.hang_up();
    }

    /// The next event, waited for until then at the most.
    pub(super) fn wait(&self, until: Instant) -> Option<Event> {
        self.events.recv_timeout(until.saturating_duration_since(Instant::now())).ok()
    }

    /// Ends the lease, if one is given, and returns when that is done, or at the deadline.
    pub(super) fn stop(&self, revoke: Option<LeaseId>, until: Instant) {
        let (done, told) = mpsc::channel();
        if self.lease_commands.send(LeaseCommand::Stop { revoke, done }).is_ok() {
            // If it takes longer, the lease ends by itself.
            let _ = told.recv_timeout(until.saturating_duration_since(Instant::now()));
        }
    }
}

impl EtcdWorker {
    fn send(&self, event: Event) {
        // The loop has ended, or is woken already.
        if self.events.send(event).is_ok() {
            let _ = self.wake.write(1);
        }
    }

    fn work(&self, commands: &Mutex<Receiver<Command>>) {
        loop {
            let command = commands.lock().unwrap_or_else(PoisonError::into_inner).recv();
            match command {
                Ok(Command::Request(ask, leases)) => self.ask(&ask, leases),
                Ok(Command::ListEntries(lease)) => match self.client.lease_keys(lease) {
                    Ok(keys) => {
                        let locks = keys.iter().filter_map(|key| self.layout.lock_of(key)).collect();
                        self.send(Event::Entries(locks));
                    }
                    Err(e) => {
                        self.send(Event::Trouble(e));
                        thread::sleep(PAUSE);
                        self.send(Event::NoEntries(lease));
                    }
                },
                Ok(Command::GrantRecordsLease) => {
                    let sent = clock::now();
                    match self.client.grant_lease(RECORDS_TTL_SECS) {
                        Ok(lease) => self.send(Event::RecordsLease { lease: lease.id, sent }),
                        Err(e) => self.send(Event::Trouble(e)),
                    }
                }
                Ok(Command::Remote(to, RemoteRequest::List { from })) => {
                    let page = self.page(from);
                    self.send(Event::Page { to, page });
                }
                Ok(Command::Remote(to, RemoteRequest::Break { lock })) => {
                    let broken = self.break_lock(lock);
                    self.send(Event::Broken { to, broken });
                }
                Err(_) => return,
            }
        }
    }

    fn ask(&self, ask: &ClusterRequest, leases: Leases) {
        let txn = |leases| self.client.txn(&self.layout.txn(ask.lock, &ask.what, leases));
        let mut reply = txn(leases);
        if leases.records != leases.places && reply.as_ref().is_err_and(etcd::Error::is_lease_gone) {
            // Which of the two it is that is gone, etcd does not say. Not to have one for records is no loss.
            self.send(Event::RecordsGone(leases.records));
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
        self.send(Event::Answer { lock: ask.lock, id: ask.id, lease: leases.places, answer, trouble });
    }

    fn break_lock(&self, lock: LockId) -> Result<bool, etcd::Error> {
        let none = Leases { places: LeaseId(0), records: LeaseId(0) };
        let mut reply = self.client.txn(&self.layout.txn(lock, &QueueOp::Read, none))?;
        let line = self.layout.line(reply.revision, reply.ranges.pop().unwrap_or_default());
        let Some(Entry { place, revision, .. }) = line.entries.into_iter().next() else {
            return Ok(false);
        };
        let question = QueueOp::Release { place, revision, record: None, next: None };
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
            for (lock, entry) in reply.kvs.iter().filter_map(|key| self.layout.entry(key)) {
                locks.add(lock, entry);
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
                self.send(Event::Trouble(e));
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
            self.send(Event::WatchGap(Revision(from - 1)));
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
            let last = reply.events.iter().map(etcd::Event::revision).max();
            *next = (*next).max(last.map(|last| last + 1));
            let events = reply.events.iter().filter_map(|event| self.layout.watch_event(event)).collect();
            self.send(Event::Watch { revision: reply.revision, events });
        }
    }
}

/// Has a lease, and keeps it.
struct LeaseKeeper {
    worker: EtcdWorker,
    ttl_secs: u64,
    lease: Option<LeaseId>,
}

impl LeaseKeeper {
    fn keep(mut self, commands: &Receiver<LeaseCommand>) {
        loop {
            let began = Instant::now();
            let pause = self.refresh();
            match commands.recv_timeout(pause.saturating_sub(began.elapsed())) {
                Ok(LeaseCommand::Abandon(lease)) => {
                    if self.lease == Some(lease) {
                        self.lease = None;
                    }
                }
                Ok(LeaseCommand::Stop { revoke, done }) => {
                    if let Some(lease) = revoke {
                        // If that fails, it ends by itself.
                        let _ = self.worker.client.revoke(lease);
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
    fn refresh(&mut self) -> Duration {
        let sent = clock::now();
        let Some(lease) = self.lease else {
            return match self.worker.client.grant_lease(self.ttl_secs) {
                Ok(granted) => {
                    self.lease = Some(granted.id);
                    let (lease, ttl_secs) = (granted.id, granted.ttl_secs);
                    self.worker.send(Event::Leased { lease, sent, ttl_secs, revision: 0 });
                    period(ttl_secs)
                }
                Err(e) => {
                    self.worker.send(Event::Trouble(e));
                    PAUSE
                }
            };
        };
        match self.worker.client.keep_alive(lease) {
            Ok(kept) if kept.ttl_secs == 0 => {
                self.lease = None;
                self.worker.send(Event::LeaseGone(lease));
                Duration::ZERO
            }
            Ok(kept) => {
                let (ttl_secs, revision) = (kept.ttl_secs, kept.revision);
                self.worker.send(Event::Leased { lease, sent, ttl_secs, revision });
                period(ttl_secs)
            }
            Err(e) => {
                self.worker.send(Event::Trouble(e));
                PAUSE.min(period(self.ttl_secs))
            }
        }
    }
}

/// How often a lease is kept alive.
fn period(ttl_secs: u64) -> Duration {
    Duration::from_secs(ttl_secs) / 3
}
