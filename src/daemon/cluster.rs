//! Clustering locks with other hosts: between the daemon's loop, the standing of this host among them ([`Cluster`]), and the
//! threads that speak with etcd.
//!
//! Nothing here happens without `--etcd`.

mod layout;
mod listing;
mod threads;

use crate::journal::ClusterLease;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{debug, info, warn};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::connection::ConnectionId;
use super::remote::{RemoteReply, RemoteRequest};
use super::source::Source;
use crate::clock;
use crate::cluster::{Cluster, Entry, Failure, LeaseName, QueueOp};
use crate::etcd::{self, Client, LeaseId};
use crate::proto::v2::{Answer, ErrorCode, LeaseTerms, LockUser, ShortText, error};
use crate::proto::{LockId, Token};
use crate::table::{ClusterNotice, Effects, Table, Timestamp};
use layout::{Layout, Leases};
use threads::{Command, EtcdThreads, Event};

/// How long the end of the daemon may wait for etcd.
const STOP_WAIT: Duration = Duration::from_millis(80);
/// After how long records get another lease, while there are any.
const RECORDS_LEASE_EVERY: Duration = Duration::from_secs(60);

/// How locks are shared.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where etcd is.
    pub etcd: etcd::Config,
    /// What the keys of all locks begin with.
    pub prefix: String,
    /// How long the locks of a host outlive it, in seconds.
    pub ttl_secs: u64,
}

/// What the daemon has for it.
pub(super) struct Clustering {
    cluster: Cluster,
    threads: EtcdThreads,
    host: ShortText,
    ttl_secs: u64,
    lease: Option<LeaseId>,
    /// The lease that was given up last. That it was kept once more may be reported afterwards, and counts for nothing.
    abandoned: Option<LeaseId>,
    /// Goes off when the lease may not be relied on any more; after a sleep of the machine at once, which the loop's own
    /// timeouts sleep through.
    alarm: TimerFd,
    /// A lease for records, and when it was asked for.
    records: Option<(LeaseId, Timestamp)>,
    wants_records: bool,
    /// The last that was said of etcd was that it cannot be reached.
    in_trouble: bool,
    /// The last revision that the watch has told of, and the store's when the lease was last kept.
    watched: i64,
    kept: i64,
    /// The questions that are under way.
    under_way: usize,
}

/// A lease is not relied on for this last part of its time: a quarter, in which holders stop.
fn margin(ttl_secs: u64) -> Duration {
    Duration::from_millis((ttl_secs * 250).max(500))
}

/// Starts what the daemon needs for sharing locks. `resume` is the lease of the daemon before.
///
/// # Errors
/// When no thread can be started.
pub(super) fn join(config: &Config, client: Client, resume: Option<u64>) -> Result<Clustering, super::Error> {
    let resume = resume.filter(|&lease| lease != 0).map(|lease| LeaseId(lease as i64));
    let threads = EtcdThreads::start(client, Layout::new(&config.prefix), config.ttl_secs, resume)
        .map_err(|e| super::Error::Os("start the threads for etcd", e))?;
    let micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_micros() as u64);
    let host = nix::unistd::gethostname().unwrap_or_default();
    let alarm =
        TimerFd::new(timerfd::ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
            .map_err(|e| super::Error::Os("make a timer", e.into()))?;
    Ok(Clustering {
        // Whatever the daemon before has called its places, it had not so many.
        cluster: Cluster::new(micros),
        threads,
        host: (&*host.to_string_lossy()).into(),
        ttl_secs: config.ttl_secs,
        lease: None,
        abandoned: None,
        alarm,
        records: None,
        wants_records: false,
        in_trouble: false,
        watched: 0,
        kept: 0,
        under_way: 0,
    })
}

impl Clustering {
    /// Has the loop woken, with [`Source::Cluster`], when [`Clustering::poll`] has something to do.
    ///
    /// # Errors
    /// As epoll_ctl(2) gives them.
    pub(super) fn register(&self, epoll: &Epoll) -> io::Result<()> {
        // Edge-triggered: neither of them is ever read.
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, Source::Cluster.pack());
        epoll.add(self.threads.readable(), event)?;
        epoll.add(&self.alarm, event)?;
        Ok(())
    }

    /// When [`Clustering::poll`] has something to do even if nothing wakes the loop.
    pub(super) fn deadline(&self) -> Option<Timestamp> {
        [self.cluster.good_until(), self.cluster.retry_at()].into_iter().flatten().min()
    }

    /// The table says that something may have to be asked or told.
    pub(super) fn notify(&mut self, notice: ClusterNotice) {
        self.cluster.notify(notice);
    }

    /// Does one thing that is due, and returns what the loop has to do besides carrying out `effects`. Returns `None` when
    /// nothing is due. Call it before anything else in a turn: after a sleep of the machine, or a stop of the daemon, what
    /// is held may have been granted to other hosts.
    pub(super) fn poll(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        effects: &mut Effects,
    ) -> Option<Vec<RemoteReply>> {
        if self.cluster.good_until().is_some_and(|until| until <= now) {
            warn!("etcd: the lease was not kept in time; what is held is lost");
            return Some(vec![self.lose_lease(table, now, effects)]);
        }
        if let Some(event) = self.threads.next_event() {
            return Some(self.handle(event, table, now, effects).into_iter().collect());
        }
        if self.cluster.has_work(now) {
            self.cluster.poll(table, now, effects);
            self.send(now);
            return Some(Vec::new());
        }
        None
    }

    /// Asks etcd something for a client. [`Clustering::poll`] returns the answer.
    pub(super) fn request(&mut self, from: ConnectionId, request: RemoteRequest) {
        self.threads.command(Command::Remote(from, request));
    }

    /// Returns how long what a client holds may be relied on.
    pub(super) fn lease_terms(&self) -> LeaseTerms {
        let good_ms = self.cluster.good_until().map_or(0, |until| until.0.saturating_sub(clock::now().0));
        LeaseTerms { good_ms, margin_ms: margin(self.ttl_secs).as_millis() as u64 }
    }

    /// Returns the holder of a lock on another host, as far as it is known.
    pub(super) fn remote_holder(&self, lock: LockId) -> Option<LockUser> {
        self.cluster.holder(lock).map(party)
    }

    /// Tells etcd what has ended, as far as there is time, and ends the lease if nothing is held under it. Returns `true` if
    /// nothing is, so that the next daemon has no lease to resume.
    pub(super) fn stop(&mut self, table: &Table) -> bool {
        let until = Instant::now() + STOP_WAIT;
        while self.under_way > 0
            && let Some(event) = self.threads.wait(until)
        {
            self.under_way -= usize::from(matches!(event, Event::Answer { .. }));
        }
        let mut cursor = 0;
        while let Some((lock, next)) = table.next_lock(cursor) {
            if table.held_here(lock.id()).is_some() {
                return false;
            }
            cursor = next;
        }
        self.threads.stop(self.lease, until);
        true
    }

    fn lose_lease(&mut self, table: &mut Table, now: Timestamp, effects: &mut Effects) -> RemoteReply {
        self.cluster.lost_lease(table, now, effects);
        if let Some(lease) = self.lease.take() {
            self.threads.abandon(lease);
            self.abandoned = Some(lease);
        }
        // The next daemon must not resume it either: it would give up places in whose remaining time holders are stopping.
        RemoteReply::RecordLease(ClusterLease::None)
    }

    /// Handles what one of the threads reports.
    fn handle(
        &mut self,
        event: Event,
        table: &mut Table,
        now: Timestamp,
        effects: &mut Effects,
    ) -> Option<RemoteReply> {
        match event {
            Event::Leased { lease, .. } if self.abandoned == Some(lease) => None,
            Event::Leased { lease, sent, ttl_secs, revision } => {
                self.no_trouble();
                self.leased(lease, sent, ttl_secs, revision).then(|| {
                    info!("etcd: sharing locks under lease {:016x}, of {ttl_secs} s", lease.0);
                    // A resumed lease may have places that this daemon does not know of.
                    self.threads.command(Command::ListEntries(lease));
                    RemoteReply::RecordLease(ClusterLease::Id(lease.0 as u64))
                })
            }
            Event::LeaseGone(lease) => (self.lease.is_none() || self.lease == Some(lease)).then(|| {
                warn!("etcd: lease {:016x} is gone; what was held under it is lost", lease.0);
                self.lease = None;
                self.lose_lease(table, now, effects)
            }),
            Event::Answer { lock, id, lease, answer, trouble } => {
                self.under_way -= 1;
                match &trouble {
                    Some(error) => self.trouble(error),
                    None => self.no_trouble(),
                }
                let is_gone = answer == Err(Failure::LeaseGone);
                self.cluster.answered(table, now, (lock, id), answer, effects);
                // Not that of a question that was asked under one before.
                (is_gone && self.lease == Some(lease)).then(|| {
                    warn!("etcd: the lease is gone; what was held under it is lost");
                    self.lose_lease(table, now, effects)
                })
            }
            Event::Page { to, page } => {
                Some(RemoteReply::Page { to, page: page.map_err(|e| format!("etcd: {e}")) })
            }
            Event::Broken { to, broken } => {
                let answer = match broken {
                    Ok(true) => Answer::Broken,
                    Ok(false) => error(ErrorCode::NotHeld, "break: this lock is not held"),
                    Err(e) => error(ErrorCode::Unavailable, format!("etcd: {e}")),
                };
                Some(RemoteReply::Answer { to, answer })
            }
            other => {
                self.observe(other, now);
                None
            }
        }
    }

    /// Takes note of a report that has no effect on the table by itself.
    fn observe(&mut self, event: Event, now: Timestamp) {
        match event {
            Event::Trouble(error) => {
                self.wants_records = false;
                self.trouble(&error);
                if self.lease.is_none() {
                    self.cluster.cannot_ask(now);
                }
            }
            Event::Entries(locks) => self.cluster.has_places(locks),
            Event::NoEntries(lease) => {
                if self.lease == Some(lease) {
                    self.threads.command(Command::ListEntries(lease));
                }
            }
            Event::RecordsLease { lease, sent } => {
                self.records = Some((lease, sent));
                self.wants_records = false;
            }
            Event::RecordsGone(lease) => {
                self.records.take_if(|(records, _)| *records == lease);
            }
            Event::Watch { revision, events } => {
                self.watched = self.watched.max(revision);
                for (lock, revision, what) in events {
                    self.cluster.watch_event(lock, revision, what);
                }
            }
            Event::WatchGap(revision) => {
                self.watched = self.watched.max(revision.0);
                self.cluster.watch_gap(revision);
                if let Some(lease) = self.lease {
                    self.threads.command(Command::ListEntries(lease));
                }
            }
            Event::Leased { .. }
            | Event::LeaseGone(_)
            | Event::Answer { .. }
            | Event::Page { .. }
            | Event::Broken { .. } => unreachable!("these are handled"),
        }
    }

    fn send(&mut self, now: Timestamp) {
        for mut ask in self.cluster.take_requests() {
            let Some(places) = self.lease else { return };
            if let Some(owner) = ask.what.owner_mut() {
                owner.host = self.host.clone();
                owner.since_ms = unix_ms();
            }
            if let QueueOp::Release { record: Some(_), .. } = ask.what {
                self.renew_records(now);
            }
            let records = self.records.map_or(places, |(lease, _)| lease);
            self.under_way += 1;
            self.threads.command(Command::Request(ask, Leases { places, records }));
        }
    }

    /// Records are left behind for daemons that read them later, so they get a lease that is not this daemon's, and that
    /// ends without being kept. Until there is one, the daemon's will do.
    fn renew_records(&mut self, now: Timestamp) {
        let is_ending = |(_, sent): (LeaseId, Timestamp)| now >= sent.plus(RECORDS_LEASE_EVERY * 3 / 2);
        if self.records.is_some_and(is_ending) {
            self.records = None;
        }
        let is_fresh = self.records.is_some_and(|(_, sent)| now < sent.plus(RECORDS_LEASE_EVERY));
        if !is_fresh && !std::mem::replace(&mut self.wants_records, true) {
            self.threads.command(Command::GrantRecordsLease);
        }
    }

    fn leased(&mut self, lease: LeaseId, sent: Timestamp, ttl_secs: u64, revision: i64) -> bool {
        let good_until = sent.plus(Duration::from_secs(ttl_secs)).minus(margin(self.ttl_secs));
        let is_new = self.lease != Some(lease);
        self.lease = Some(lease);
        self.cluster.leased(name(lease), good_until);
        let until = TimeSpec::from_duration(Duration::from_millis(good_until.0.max(1)));
        if let Err(e) = self.alarm.set(Expiration::OneShot(until), TimerSetTimeFlags::TFD_TIMER_ABSTIME) {
            warn!("cannot set a timer: {e}");
        }
        // While the lease was kept once, the store went on, and the watch has said nothing: it may be one of a member that
        // says nothing any more.
        if self.kept > self.watched {
            debug!("etcd: the watch is silent, opening it anew");
            self.threads.watch_anew();
        }
        self.kept = revision;
        is_new
    }

    fn trouble(&mut self, error: &etcd::Error) {
        if !std::mem::replace(&mut self.in_trouble, true) {
            warn!("etcd: {error}; new locks wait until it answers");
        }
    }

    fn no_trouble(&mut self) {
        if std::mem::take(&mut self.in_trouble) {
            info!("etcd: it answers again");
        }
    }
}

/// A holder or waiter on another host.
fn party(entry: &Entry) -> LockUser {
    let owner = entry.owner.clone().unwrap_or_default();
    let mut who = owner.who;
    if !owner.host.is_empty() {
        who.host = owner.host;
    }
    // Its number says nothing of a user here, and its name may not be known there.
    if let (true, Some(uid)) = (who.user.is_empty(), owner.uid) {
        who.user = format!("uid {uid}").into();
    }
    if entry.owner.is_none() {
        who.note = "of another program".into();
    }
    LockUser {
        protocol: owner.protocol,
        uid: None,
        who,
        for_ms: if owner.since_ms == 0 { 0 } else { unix_ms().saturating_sub(owner.since_ms) },
        token: Some(Token(entry.revision.0 as u64)),
        mode: None,
        shared: false,
        orphan: false,
    }
}

/// Milliseconds since 1970, which hosts have about in common.
fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn name(lease: LeaseId) -> LeaseName {
    LeaseName(format!("{:x}", lease.0))
}
