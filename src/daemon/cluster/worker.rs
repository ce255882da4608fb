//! One thread that carries out the loop's commands at etcd, and what all threads have in common.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::events::{Command, Event, Reading, Reporter};
use super::layout::{Layout, LeasedRun, Leases};
use super::listing::Locks;
use super::trouble::Source;
use crate::clock;
use crate::cluster::{
    self, ClusterRequest, Entry, EntryKey, Failure, PresenceRequest, QueueOp, QueueSnapshot, Revision,
    RunRecord,
};
use crate::daemon::connection::ConnectionId;
use crate::daemon::listing::Page;
use crate::etcd::{self, Client, KeyValue, LeaseId, Op, Range, Txn};
use crate::proto::{LockId, Token};
use crate::table::Run;

/// How long before entries are looked for again.
const PAUSE: Duration = Duration::from_millis(500);
/// How many keys a page of a listing has at the most.
const PAGE_KEYS_MAX: u64 = 100;
/// How much longer a record is kept than its host's lease.
pub(super) const RECORDS_TTL_SECS: u64 = 120;

#[derive(Clone)]
pub(super) struct EtcdWorker {
    pub(super) client: Arc<Client>,
    pub(super) layout: Layout,
    pub(super) reporter: Reporter,
    /// The index of the endpoint that the watch reads from.
    pub(super) watched_at: Arc<AtomicUsize>,
}

impl EtcdWorker {
    pub(super) fn work(&self, commands: &Mutex<Receiver<Command>>) {
        loop {
            let command = commands.lock().unwrap_or_else(PoisonError::into_inner).recv();
            match command {
                Ok(Command::Request(request, leases)) => self.request(&request, leases),
                Ok(Command::ListEntries(lease)) => self.list_entries(lease),
                Ok(Command::GrantRecordsLease) => self.grant_records_lease(),
                Ok(Command::Break(to, lock)) => {
                    let broken = self.break_lock(lock);
                    self.note_change(broken.as_ref().err());
                    self.reporter.send(Event::Broken { to, broken });
                }
                Ok(Command::Revoke(lease)) => {
                    let is_done = self.client.revoke(lease).is_ok();
                    self.reporter.send(Event::Revoked { lease, is_done });
                }
                Ok(Command::Forget { to, lock, may }) => {
                    let forgotten = self.forget(lock, may.as_deref());
                    self.note_change(forgotten.as_ref().err());
                    self.reporter.send(Event::Forgotten { to, lock, forgotten });
                }
                Ok(Command::SignOfLife(lease)) => self.give_sign_of_life(lease),
                Err(_) => return,
            }
        }
    }

    /// Reports that a request failed.
    pub(super) fn failed(&self, source: Source, error: etcd::Error) {
        match error {
            etcd::Error::StoreChanged { .. } => self.note_change(Some(&error)),
            error => self.reporter.send(Event::Trouble(source, error)),
        }
    }

    /// Reports that the store went back, if that is the error.
    fn note_change(&self, error: Option<&etcd::Error>) {
        if let Some(etcd::Error::StoreChanged { why }) = error {
            let generation = self.client.generation();
            self.reporter.send(Event::StoreChanged { why: why.clone(), generation });
        }
    }

    fn request(&self, request: &ClusterRequest, leases: Leases) {
        let generation = self.client.generation();
        let source = source(&request.op);
        let (mut reply, mut trouble) = (self.try_request(request, leases), None);
        for op in lesser_releases(&request.op) {
            let Err(e) = &reply else { break };
            if !matches!(e, etcd::Error::Refused { .. }) || e.is_lease_gone() {
                break;
            }
            // The store may have no space for the result, or for anything. The lock must be free all the same.
            trouble = (self::source(&op) == Source::Reads).then(|| e.clone());
            reply = self.try_request(&ClusterRequest { op, ..request.clone() }, leases);
        }
        let answer = match reply {
            Ok(snapshot) => Ok(snapshot),
            Err(e) if e.is_lease_gone() => Err(Failure::LeaseGone),
            Err(e) => {
                self.note_change(Some(&e));
                let failure = match &e {
                    etcd::Error::Unreachable { .. } | etcd::Error::Refused { .. } => Failure::NotDone,
                    _ => Failure::Unknown,
                };
                trouble = Some(e);
                Err(failure)
            }
        };
        let (lock, id, lease) = (request.lock, request.id, leases.entries);
        self.reporter.send(Event::Answer { lock, id, lease, answer, source, trouble, generation });
    }

    fn try_request(&self, request: &ClusterRequest, leases: Leases) -> Result<QueueSnapshot, etcd::Error> {
        let ClusterRequest { lock, op, known_runs, wants_results, .. } = request;
        let run = match op {
            QueueOp::Release { run: Some(run), .. } => self.lease_run(run)?,
            _ => None,
        };
        let txn = |leases| {
            let txn = self.layout.txn(*lock, op, leases, run.as_ref());
            self.client.txn(&if *wants_results { self.layout.with_results(*lock, txn) } else { txn })
        };
        let mut reply = txn(leases);
        if leases.records != leases.entries && reply.as_ref().is_err_and(etcd::Error::is_lease_gone) {
            // etcd does not say which of the two leases is gone. To lose the one for records costs nothing.
            self.reporter.send(Event::RecordsGone(leases.records));
            reply = txn(Leases { records: leases.entries, ..leases });
        }
        if let (Err(etcd::Error::Refused { .. }), Some(run)) = (&reply, &run) {
            // If that fails, it ends by itself.
            let _ = self.client.revoke(run.lease);
        }
        let reply = reply?;
        let mut ranges = reply.ranges.into_iter();
        let keys = ranges.next().unwrap_or_default();
        let results = self.layout.results(*lock, ranges.as_slice().iter().flatten());
        let runs = self.runs(&keys, known_runs)?;
        Ok(QueueSnapshot { runs, results, ..self.layout.snapshot(reply.revision, &keys) })
    }

    /// Gets a lease for the record of a run, for as long as it counts. `None`: it does not count any more.
    fn lease_run(&self, run: &Run) -> Result<Option<LeasedRun>, etcd::Error> {
        let Some(record) = RunRecord::of(run, clock::now()) else { return Ok(None) };
        let lease = self.client.grant_lease(record.ttl_secs())?.id;
        Ok(Some(LeasedRun { record, lease }))
    }

    /// Returns the runs that count among these keys, with their ages. The ages of the `known` ones are not asked for.
    fn runs(&self, keys: &[KeyValue], known: &[Token]) -> Result<Vec<RunRecord>, etcd::Error> {
        let mut runs = Vec::new();
        for LeasedRun { mut record, lease } in keys.iter().filter_map(|key| self.layout.run(key)) {
            if lease != LeaseId(0) && !known.contains(&record.token) {
                let Some(left) = self.client.time_to_live(lease)? else { continue };
                record.grow_older(left.granted_secs, left.left_secs);
            }
            runs.push(record);
        }
        Ok(runs)
    }

    /// Deletes the records of a lock's runs, and their results, if `may` permits it for each of them.
    fn forget(&self, lock: LockId, may: Option<&[Token]>) -> Result<bool, etcd::Error> {
        loop {
            let mut keys = self.client.range(&self.layout.queue(lock))?.kvs;
            keys.retain(|key| self.layout.is_run(key));
            let token = |key: &KeyValue| self.layout.run(key).map(|run| run.record.token);
            if may.is_some_and(|may| {
                keys.iter().any(|key| token(key).is_none_or(|token| !may.contains(&token)))
            }) {
                return Ok(false);
            }
            if self.client.txn(&self.layout.forget(lock, &keys))?.succeeded {
                return Ok(true);
            }
        }
    }

    fn list_entries(&self, lease: LeaseId) {
        match self.client.lease_keys(lease) {
            Ok(keys) => {
                let locks = keys.iter().filter_map(|key| self.layout.lock_of(key)).collect();
                self.reporter.send(Event::Entries(locks));
            }
            Err(e) => {
                self.failed(Source::Reads, e);
                thread::sleep(PAUSE);
                self.reporter.send(Event::NoEntries(lease));
            }
        }
    }

    /// Reads which places a lease has, for one request after the other. They do not share a queue with locks: they decide whether
    /// what is held is lost.
    pub(super) fn read_presence(&self, requests: &Receiver<(PresenceRequest, LeaseId)>) {
        while let Ok((request, lease)) = requests.recv() {
            let generation = self.client.generation();
            let answer = self.presence(&request.locks, lease);
            let (id, answer) = (request.id, answer.map_err(|e| self.failed(Source::Reads, e)).ok());
            self.reporter.send(Event::Presence { id, answer, generation });
        }
    }

    fn presence(&self, locks: &[LockId], lease: LeaseId) -> Result<BTreeSet<(LockId, Token)>, etcd::Error> {
        let then = locks.iter().map(|lock| Op::Range(self.layout.entries_of(*lock, lease))).collect();
        let reply = self.client.txn(&Txn { then, ..Txn::default() })?;
        let entries = reply.ranges.iter().flatten().filter_map(|key| self.layout.entry(key));
        Ok(entries.map(|(lock, entry)| (lock, Token(entry.revision.0 as u64))).collect())
    }

    fn grant_records_lease(&self) {
        let sent = clock::now();
        match self.client.grant_lease(RECORDS_TTL_SECS) {
            Ok(lease) => self.reporter.send(Event::RecordsLease { lease: lease.id, sent }),
            Err(e) => {
                self.reporter.send(Event::RecordsGone(LeaseId(0)));
                self.failed(Source::Writes, e);
            }
        }
    }

    fn break_lock(&self, lock: LockId) -> Result<bool, etcd::Error> {
        let none = Leases { entries: LeaseId(0), records: LeaseId(0) };
        let mut line = self.layout.snapshot(0, &self.client.range(&self.layout.queue(lock))?.kvs).entries;
        line.sort_by(|a, b| (a.revision, &a.entry_key).cmp(&(b.revision, &b.entry_key)));
        line.truncate(cluster::holding(line.iter().map(Entry::sharing)));
        let mut is_broken = false;
        for Entry { entry_key, revision, .. } in line {
            let op = plain_release(entry_key, revision);
            is_broken |= self.client.txn(&self.layout.txn(lock, &op, none, None))?.succeeded;
        }
        Ok(is_broken)
    }

    fn give_sign_of_life(&self, lease: LeaseId) {
        let key = self.layout.sign_of_life(lease);
        let put = Op::Put { key, value: Vec::new(), lease: Some(lease) };
        let reply = self.client.txn(&Txn { then: vec![put], ..Txn::default() });
        self.note_change(reply.as_ref().err());
        self.reporter.send(Event::SignOfLife(reply.ok().map(|reply| reply.revision)));
    }

    /// Reads one listing after the other, for clients.
    pub(super) fn read_listings(&self, readings: &Receiver<(ConnectionId, Reading)>) {
        while let Ok((to, reading)) = readings.recv() {
            let page = match reading {
                Reading::Page(from) => self.page(from),
                Reading::Lock(lock) => self.one_lock(lock),
                Reading::Runs(key) => {
                    let (runs, generation) = (self.runs_of(key.id()), self.client.generation());
                    self.note_change(runs.as_ref().err());
                    self.reporter.send(Event::Runs { to, key, runs: runs.ok(), generation });
                    continue;
                }
            };
            self.note_change(page.as_ref().err());
            self.reporter.send(Event::Page { to, page });
        }
    }

    fn one_lock(&self, lock: LockId) -> Result<Page, etcd::Error> {
        let mut locks = Locks::default();
        let keys = self.client.range(&self.layout.queue(lock))?.kvs;
        for (lock, entry) in keys.iter().filter_map(|key| self.layout.entry(key)) {
            locks.add(lock, entry);
        }
        let runs = self.runs(&keys, &[])?;
        Ok(Page { locks: locks.finish_with(lock, runs), next: None })
    }

    fn runs_of(&self, lock: LockId) -> Result<(Revision, Vec<RunRecord>), etcd::Error> {
        let reply = self.client.range(&self.layout.queue(lock))?;
        Ok((Revision(reply.revision), self.runs(&reply.kvs, &[])?))
    }

    /// Reads a page of whole locks, beginning at the key `from`; an empty key means from the beginning.
    fn page(&self, from: Vec<u8>) -> Result<Page, etcd::Error> {
        let (start, end) = self.layout.queues();
        let mut key = if from.is_empty() { start } else { from };
        let mut locks = Locks::default();
        loop {
            let range = Range { key, end: end.clone(), limit: PAGE_KEYS_MAX, ..Range::default() };
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
}

/// Returns what to do instead of a release that etcd refuses: without the result, and then without a record.
fn lesser_releases(op: &QueueOp) -> Vec<QueueOp> {
    let QueueOp::Release { entry_key, revision, .. } = op else { return Vec::new() };
    if source(op) == Source::Reads {
        return Vec::new();
    }
    let mut without = op.clone();
    let has_result = match &mut without {
        QueueOp::Release { result: Some(result), .. } if result.content.is_ok() => {
            result.content = Err("etcd refused to store it".into());
            true
        }
        _ => false,
    };
    let plain = plain_release(entry_key.clone(), *revision);
    has_result.then_some(without).into_iter().chain([plain]).collect()
}

fn plain_release(entry_key: EntryKey, revision: Revision) -> QueueOp {
    QueueOp::Release { entry_key, revision, record: None, run: None, result: None, next: None }
}

/// Returns whether a request writes. etcd may refuse to write, and read all the same.
fn source(op: &QueueOp) -> Source {
    match op {
        QueueOp::Read | QueueOp::Release { record: None, run: None, next: None, .. } => Source::Reads,
        QueueOp::TryAcquire { .. }
        | QueueOp::Enqueue { .. }
        | QueueOp::RecordNewest { .. }
        | QueueOp::Describe { .. }
        | QueueOp::Release { .. } => Source::Writes,
    }
}
