//! Clustering the locks with other hosts: between the daemon's loop, this host's part in the queues ([`Cluster`]), and the
//! threads that speak with etcd.
//!
//! Nothing here happens without `--etcd`.

mod backoff;
mod events;
mod layout;
mod lease_keeper;
mod listing;
mod quarantine;
mod stored_result;
mod threads;
mod trouble;
mod unsent;
mod watcher;
mod worker;

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{debug, info, warn};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::connection::ConnectionId;
use super::remote::{FORGET_REFUSED, RemoteReply, RemoteRequest, RemoteResult};
use super::sharers::Sharers;
use super::source::Source;
use crate::clock;
use crate::cluster::{
    Cluster, Entry, Failure, FoundResult, LeaseName, OwnResult, QueueOp, Renewal, Revision, RunUser,
};
use crate::etcd::{self, Client, Kind, LeaseId};
use crate::journal::ClusterLease;
use crate::proto::v2::{Answer, ErrorCode, LeaseTerms, LockUser, ShortText, error};
use crate::proto::{LockId, Token};
use crate::table::{ClusterNotice, EVERY_USER, Effects, Sharing, Table, Timestamp};
use events::{Command, Event, Reading};
use layout::{Layout, Leases};
use lease_keeper::LeaseCommand;
use quarantine::Quarantine;
use threads::EtcdThreads;
use trouble::Troubles;
use unsent::Unsent;

/// How long the end of the daemon may wait for etcd.
const STOP_WAIT: Duration = Duration::from_millis(80);
/// After how long records get another lease, while there are any.
const RECORDS_LEASE_EVERY: Duration = Duration::from_secs(60);
/// When etcd did not end a lease that is lost, how long until it is asked again, and how often.
const REVOKE_PAUSE: Duration = Duration::from_millis(500);
const REVOKES_MAX: u32 = 120;
/// Why there is no result of a run on another host.
const NO_RESULT: &str =
    "that run was on another host, and without --share, or its result is not in etcd any more";
/// How many locks a log line names.
const NAMED_MAX: usize = 10;

/// How locks are clustered.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where etcd is.
    pub etcd: etcd::Config,
    /// What the keys of all locks begin with.
    pub prefix: String,
    /// How long the locks of a host outlive it, in seconds.
    pub ttl_secs: u64,
}

/// What the daemon has for clustering.
pub(super) struct Clustering {
    cluster: Cluster,
    threads: EtcdThreads,
    host: ShortText,
    /// The endpoints of etcd, for messages.
    urls: Vec<String>,
    ttl_secs: u64,
    lease: Option<LeaseId>,
    /// The lease that was given up last. Reports about it may still come, and count for nothing.
    abandoned: Option<LeaseId>,
    /// Leases to end as soon as the commands that ran under them are dead.
    revokes: Vec<Revoke>,
    /// Goes off when the lease cannot be relied on any more; after a sleep of the machine at once, while the loop's own
    /// timeouts sleep with the machine.
    alarm: TimerFd,
    /// A lease for records, and when it was requested.
    records: Option<(LeaseId, Timestamp)>,
    wants_records: bool,
    unsent: Unsent,
    sharers: Sharers,
    troubles: Troubles,
    /// How many times the store went back.
    generation: u64,
    quarantine: Quarantine,
    watch: WatchState,
    /// The requests that are under way.
    under_way: usize,
    /// What clients want to read, and whether the first of them is being read.
    readings: VecDeque<(ConnectionId, Option<Reading>)>,
    /// What clients are told at once.
    replies: Vec<RemoteReply>,
}

struct Revoke {
    lease: LeaseId,
    at: Timestamp,
    tries: u32,
}

/// How far the watch can be trusted.
#[derive(Default)]
struct WatchState {
    is_open: bool,
    /// The last revision that the watch reported.
    seen: i64,
    /// The store's revision when the lease was kept before.
    kept: i64,
    /// When this host last wrote something that the watch must see, and its revision, if it is known and was not seen yet.
    checked: Timestamp,
    sign: Option<i64>,
    /// How often this host has ended watches, so that they were opened anew.
    hang_ups: u64,
}

/// A lease is not relied on for this last part of its time: a quarter, in which holders stop.
fn margin(ttl_secs: u64) -> Duration {
    Duration::from_millis((ttl_secs * 250).max(500))
}

/// Starts what the daemon needs for clustering. `recorded`: what the journal says of the lease of the previous daemon.
///
/// # Errors
/// If no thread can be started.
pub(super) fn join(
    config: &Config,
    client: Client,
    recorded: ClusterLease,
    sharers: Sharers,
) -> Result<Clustering, super::Error> {
    warn_if_too_short(config);
    let resume = recorded.number().filter(|&lease| lease != 0).map(|lease| LeaseId(lease as i64));
    let quarantine = Quarantine::resumed(recorded, clock::now(), Duration::from_secs(config.ttl_secs));
    if let Some(left) = quarantine.left(clock::now()) {
        let left = left.as_millis();
        warn!("etcd: the previous daemon found that the store went back; no lock is granted for {left} ms");
    }
    let layout = Layout::new(&config.prefix, sharers.clone());
    let threads = EtcdThreads::start(client, layout, config.ttl_secs, resume, quarantine.end())
        .map_err(|e| super::Error::Os("start the threads for etcd", e))?;
    let micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_micros() as u64);
    let host = nix::unistd::gethostname().unwrap_or_default();
    let alarm =
        TimerFd::new(timerfd::ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
            .map_err(|e| super::Error::Os("make a timer", e.into()))?;
    Ok(Clustering {
        // The previous daemon did not number so many entries.
        cluster: Cluster::new(micros, clock::now()),
        threads,
        host: (&*host.to_string_lossy()).into(),
        urls: config.etcd.endpoints.iter().map(ToString::to_string).collect(),
        ttl_secs: config.ttl_secs,
        lease: None,
        abandoned: None,
        revokes: Vec::new(),
        alarm,
        records: None,
        wants_records: false,
        unsent: Unsent::default(),
        sharers,
        troubles: Troubles::default(),
        generation: 0,
        quarantine,
        watch: WatchState::default(),
        under_way: 0,
        readings: VecDeque::new(),
        replies: Vec::new(),
    })
}

/// A lease must survive one lost answer: there must be time for two attempts after the moment when it is kept alive.
fn warn_if_too_short(config: &Config) {
    let timeout = config.etcd.timeout.as_millis() as u64;
    let relied_on = config.ttl_secs * 1000 - margin(config.ttl_secs).as_millis() as u64;
    if config.ttl_secs * 1000 / 3 + 2 * timeout > relied_on {
        let enough = (timeout * 48).div_ceil(10_000);
        warn!(
            "etcd: a lease of {} s (--etcd-ttl) can be relied on for {relied_on} ms, which is short for answers that may \
             take {timeout} ms (--etcd-timeout): one lost answer may cost the locks; use --etcd-ttl {enough} or more",
            config.ttl_secs,
        );
    }
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

    /// Returns when [`Clustering::poll`] has something to do even if nothing wakes the loop.
    pub(super) fn deadline(&self) -> Option<Timestamp> {
        let revoke = self.revokes.iter().map(|revoke| revoke.at).min();
        [self.cluster.good_until(), self.cluster.next_deadline(), revoke].into_iter().flatten().min()
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
            let why = match self.cluster.is_renewed(now) {
                true => "the lease was renewed, but what is held could not be read in time",
                false => "the lease was not kept in time",
            };
            warn!("etcd: {why}; what is held is lost");
            return Some(vec![self.lose_lease(table, now, effects)]);
        }
        if let Some(index) = self.revokes.iter().position(|revoke| revoke.at <= now) {
            let revoke = &mut self.revokes[index];
            revoke.at = Timestamp::NEVER;
            self.threads.command(Command::Revoke(revoke.lease));
            return Some(Vec::new());
        }
        if let Some(event) = self.threads.next_event() {
            return Some(self.handle(event, table, now, effects).into_iter().collect());
        }
        if self.cluster.has_work(now) {
            self.cluster.poll(table, now, effects);
            self.send(now);
            return Some(Vec::new());
        }
        (!self.replies.is_empty()).then(|| std::mem::take(&mut self.replies))
    }

    /// A run on this host is about to be released, and has this result for the user with this uid or name.
    pub(super) fn keep_result(
        &mut self,
        lock: LockId,
        token: Token,
        (uid, name): (Option<u32>, Option<&str>),
        content: Result<Vec<u8>, ShortText>,
    ) {
        let for_all = self.sharers.number(uid, name) == EVERY_USER;
        let user = RunUser { uid, name: name.map(String::from), for_all };
        self.unsent.add(lock, OwnResult { token, user, content: content.map(Into::into) });
    }

    /// Returns the results of other hosts' runs that the effects speak of, to be had before those are carried out.
    pub(super) fn take_results(&mut self) -> Vec<RemoteResult> {
        self.cluster.take_results().into_iter().map(remote_result).collect()
    }

    /// Asks etcd something for a client. [`Clustering::poll`] returns the answer.
    pub(super) fn request(&mut self, from: ConnectionId, request: RemoteRequest) {
        if !self.cluster.is_usable() && (self.cluster.is_away() || self.troubles.reason().is_some()) {
            let message = self.unavailable();
            self.replies.push(match request {
                RemoteRequest::List { .. } | RemoteRequest::Show { .. } => {
                    RemoteReply::Page { to: from, page: Err(message) }
                }
                // What is known here.
                RemoteRequest::Status { key } => RemoteReply::Status { to: from, key },
                RemoteRequest::Break { .. } | RemoteRequest::Forget { .. } => {
                    RemoteReply::Answer { to: from, answer: error(ErrorCode::Unavailable, message) }
                }
            });
            return;
        }
        let reading = match request {
            RemoteRequest::List { from } => Reading::Page(from),
            RemoteRequest::Show { lock } => Reading::Lock(lock),
            RemoteRequest::Status { key } => Reading::Runs(key),
            RemoteRequest::Forget { lock, may } => {
                return self.threads.command(Command::Forget { to: from, lock, may });
            }
            RemoteRequest::Break { lock } => return self.threads.command(Command::Break(from, lock)),
        };
        self.readings.push_back((from, Some(reading)));
        self.read_next();
    }

    /// A client has gone: what it wants to read need not be read any more.
    pub(super) fn forget(&mut self, client: ConnectionId) {
        self.readings.retain(|(from, reading)| *from != client || reading.is_none());
    }

    /// One reading is under way at a time.
    fn read_next(&mut self) {
        if let Some((to, reading)) = self.readings.front_mut()
            && let Some(reading) = reading.take()
        {
            self.threads.read(*to, reading);
        }
    }

    /// Returns how long what a client holds can be relied on.
    pub(super) fn lease_terms(&self) -> LeaseTerms {
        let good_ms = self.cluster.good_until().map_or(0, |until| until.0.saturating_sub(clock::now().0));
        LeaseTerms { good_ms, margin_ms: margin(self.ttl_secs).as_millis() as u64 }
    }

    /// Returns the holder of a lock on another host, as far as it is known.
    pub(super) fn remote_holder(&self, lock: LockId) -> Option<LockUser> {
        self.cluster.holder(lock).map(party)
    }

    /// Returns `true` if another host holds a lock, as far as it is known.
    pub(super) fn is_held_elsewhere(&self, lock: LockId) -> bool {
        self.cluster.is_held_elsewhere(lock)
    }

    /// Names the client, of any host, that says this number of slots, and the lock's key as it says it.
    pub(super) fn who_says(&self, lock: LockId, slots: u32) -> Option<(String, Option<String>)> {
        let entry = self.cluster.entry_with(lock, slots)?;
        let LockUser { who, .. } = party(entry);
        let pid = who.pid.map_or_else(String::new, |pid| format!(" (pid {pid})"));
        let (user, host) = (who.user.as_str().escape_debug(), who.host.as_str().escape_debug());
        Some((format!("{user}@{host}{pid}"), entry.owner.as_ref()?.key.clone()))
    }

    /// Says why etcd cannot be asked.
    pub(super) fn unavailable(&self) -> String {
        let urls = self.urls.join(",");
        if let Some(left) = self.quarantine.left(clock::now()) {
            let left = left.as_millis();
            return format!("the store of etcd at {urls} went back: no lock is granted for {left} ms");
        }
        let (kind, text) = self.troubles.reason().unwrap_or((Kind::Unreachable, "no answer yet"));
        let state = match kind {
            Kind::Unreachable => "does not answer",
            Kind::NoLeader => "has no leader",
            Kind::NoEtcd => "gives answers that are not etcd's",
            Kind::NoPermission => "does not permit it",
            Kind::NoSpace => "has no space",
            Kind::Refused | Kind::StoreChanged => "refuses",
        };
        let mut why = text.split_once(": ").map_or(text, |(_, why)| why);
        if let [url] = &self.urls[..] {
            why = why.strip_prefix(&**url).and_then(|why| why.strip_prefix(": ")).unwrap_or(why);
        }
        format!("etcd at {urls} {state}: {why}")
    }

    /// Tells etcd what has ended, as far as there is time, and ends the lease if nothing is held under it. If nothing is,
    /// the next daemon has no lease to resume; returns what to record then.
    pub(super) fn stop(&mut self, table: &Table) -> Option<ClusterLease> {
        let until = Instant::now() + STOP_WAIT;
        while self.under_way > 0
            && let Some(event) = self.threads.wait(until)
        {
            self.under_way -= usize::from(matches!(event, Event::Answer { .. }));
        }
        let mut cursor = 0;
        while let Some((lock, next)) = table.next_lock(cursor) {
            if table.is_held_here(lock.id()) {
                return None;
            }
            cursor = next;
        }
        self.threads.stop(self.lease, until);
        Some(self.quarantine.record(clock::now()))
    }

    fn lose_lease(&mut self, table: &mut Table, now: Timestamp, effects: &mut Effects) -> RemoteReply {
        self.warn_of_untold();
        self.cluster.lost_lease(table, now, effects);
        self.abandon_lease(now);
        // The next daemon must not resume it either: it would release entries while their holders are stopping.
        RemoteReply::RecordLease(self.quarantine.record(now))
    }

    /// Gives the lease up. It is ended, so that other hosts need not wait for the rest of it, but not before the commands
    /// under it are dead. (An election gives all leases their whole time again.)
    fn abandon_lease(&mut self, now: Timestamp) {
        if let Some(lease) = self.lease.take() {
            self.threads.lease_command(LeaseCommand::Abandon(lease));
            self.abandoned = Some(lease);
            self.revokes.push(Revoke { lease, at: now.plus(margin(self.ttl_secs)), tries: 0 });
        }
    }

    /// The store went back: the quarantine begins.
    fn store_changed(
        &mut self,
        why: &str,
        generation: u64,
        table: &mut Table,
        now: Timestamp,
        effects: &mut Effects,
    ) -> RemoteReply {
        warn!(
            "etcd: the store went back: {why}; what is held is lost, and no lock is granted for {} s",
            self.ttl_secs
        );
        self.generation = generation;
        self.cluster.store_changed(table, now, effects);
        self.abandon_lease(now);
        self.quarantine.begin(now, Duration::from_secs(self.ttl_secs));
        self.threads.lease_command(LeaseCommand::Quarantine(self.quarantine.end()));
        (self.records, self.watch) = (None, WatchState::default());
        self.hang_up(now);
        RemoteReply::RecordLease(self.quarantine.record(now))
    }

    /// If a release did not reach etcd, another host finds the lock of a holder that vanished, and runs it again.
    fn warn_of_untold(&self) {
        let mut untold: Vec<String> =
            self.cluster.untold().map(|(name, record)| format!("{name} ({})", record.outcome)).collect();
        if untold.is_empty() {
            return;
        }
        let more = untold.len().saturating_sub(NAMED_MAX);
        untold.truncate(NAMED_MAX);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        warn!(
            "etcd: could not be told that these locks were released: {}{more}; other hosts may run their commands again",
            untold.join(", ")
        );
    }

    /// Handles what one of the threads reports.
    fn handle(
        &mut self,
        event: Event,
        table: &mut Table,
        now: Timestamp,
        effects: &mut Effects,
    ) -> Option<RemoteReply> {
        if let Event::Answer { .. } = event {
            self.under_way -= 1;
        }
        if let Some(generation) = event.generation() {
            if generation > self.generation {
                let why = if let Event::StoreChanged { why, .. } = &event { why } else { "it has changed" };
                return Some(self.store_changed(why, generation, table, now, effects));
            }
            if generation < self.generation {
                return None;
            }
        }
        match event {
            Event::Leased { lease, .. } if self.abandoned == Some(lease) => None,
            Event::Leased { .. } if self.quarantine.left(now).is_some() => None,
            Event::Leased { lease, sent, ttl_secs, revision, is_prompt, .. } => {
                self.lease_kept(table, now, (lease, sent, ttl_secs), (revision, is_prompt))
            }
            Event::LeaseGone(lease) => self.lease_gone(table, now, lease, effects),
            Event::Answer { lock, id, lease, answer, source, trouble, .. } => {
                match &trouble {
                    Some(etcd::Error::StoreChanged { .. }) => {}
                    Some(error) => self.troubles.began(source, error),
                    None if answer.is_ok() => self.note_success(source),
                    None => {}
                }
                let is_gone = answer == Err(Failure::LeaseGone);
                if answer == Err(Failure::Unknown) {
                    self.unsent.not_answered(lock);
                }
                self.cluster.answered(table, now, (lock, id), answer, effects);
                // An answer to a request under an earlier lease says nothing of this one.
                (is_gone && self.lease == Some(lease)).then(|| {
                    warn!("etcd: the lease is gone; what was held under it is lost");
                    self.lose_lease(table, now, effects)
                })
            }
            Event::Page { .. } | Event::Runs { .. } | Event::Forgotten { .. } | Event::Broken { .. } => {
                self.reply(event, table, now, effects)
            }
            other => {
                self.observe(other, table, now, effects);
                None
            }
        }
    }

    /// etcd has renewed the lease, or given it.
    fn lease_kept(
        &mut self,
        table: &Table,
        now: Timestamp,
        (lease, sent, ttl_secs): (LeaseId, Timestamp, u64),
        (revision, is_prompt): (i64, bool),
    ) -> Option<RemoteReply> {
        self.troubles.ended(trouble::Source::Lease);
        if self.watch.is_open {
            self.troubles.ended(trouble::Source::Watch);
        }
        let relied_on = Duration::from_secs(ttl_secs).saturating_sub(margin(self.ttl_secs));
        let good_until = sent.plus(relied_on);
        let is_new = self.lease.replace(lease) != Some(lease);
        let renewal = Renewal { lease: name(lease), good_until, revision: Revision(revision), is_prompt };
        if self.cluster.leased(table, now, renewal) {
            self.hang_up(now);
        }
        self.read_presence();
        self.check_watch(lease, now, revision);
        is_new.then(|| {
            info!("etcd: clustering locks under lease {:016x}, of {ttl_secs} s", lease.0);
            // A resumed lease may have entries that this daemon does not know.
            self.threads.command(Command::ListEntries(lease));
            RemoteReply::RecordLease(ClusterLease::Id(lease.0 as u64))
        })
    }

    /// Has read whether what is held is there, and wakes the loop when it cannot be relied on any more.
    fn read_presence(&mut self) {
        for request in self.cluster.take_presence_requests() {
            if let Some(lease) = self.lease {
                self.threads.read_presence(request, lease);
            }
        }
        let Some(good_until) = self.cluster.good_until() else { return };
        let until = TimeSpec::from_duration(Duration::from_millis(good_until.0.max(1)));
        if let Err(e) = self.alarm.set(Expiration::OneShot(until), TimerSetTimeFlags::TFD_TIMER_ABSTIME) {
            warn!("cannot set a timer: {e}");
        }
    }

    /// Has the watch opened anew. What the old one may still say counts for nothing.
    fn hang_up(&mut self, now: Timestamp) {
        self.watch.is_open = false;
        self.cluster.watch_ended(now);
        self.watch.hang_ups = self.threads.reopen_watch();
    }

    /// etcd has this lease no more.
    fn lease_gone(
        &mut self,
        table: &mut Table,
        now: Timestamp,
        lease: LeaseId,
        effects: &mut Effects,
    ) -> Option<RemoteReply> {
        let is_resumed = self.lease.is_none() && self.abandoned != Some(lease);
        (self.lease == Some(lease) || is_resumed).then(|| {
            warn!("etcd: lease {:016x} is gone; what was held under it is lost", lease.0);
            self.lease = None;
            self.abandoned = Some(lease);
            self.threads.lease_command(LeaseCommand::Abandon(lease));
            self.lose_lease(table, now, effects)
        })
    }

    /// Returns what to tell the client that asked for this.
    fn reply(
        &mut self,
        event: Event,
        table: &mut Table,
        now: Timestamp,
        effects: &mut Effects,
    ) -> Option<RemoteReply> {
        match event {
            Event::Page { to, page } => {
                self.readings.pop_front();
                self.read_next();
                Some(RemoteReply::Page { to, page: page.map_err(|e| format!("etcd: {e}")) })
            }
            Event::Runs { to, key, runs, .. } => {
                self.readings.pop_front();
                self.read_next();
                if let Some((revision, runs)) = runs {
                    self.cluster.runs_read(table, now, (key.id(), revision), runs, effects);
                }
                Some(RemoteReply::Status { to, key })
            }
            Event::Forgotten { to, lock, forgotten } => {
                let answer = match forgotten {
                    Ok(true) => {
                        table.forget(lock, effects);
                        Answer::Forgotten
                    }
                    Ok(false) => error(ErrorCode::NotPermitted, FORGET_REFUSED),
                    Err(e) => error(ErrorCode::Unavailable, format!("etcd: {e}")),
                };
                Some(RemoteReply::Answer { to, answer })
            }
            Event::Broken { to, broken } => {
                let answer = match broken {
                    Ok(true) => Answer::Broken,
                    Ok(false) => error(ErrorCode::NotHeld, "break: this lock is not held"),
                    Err(e) => error(ErrorCode::Unavailable, format!("etcd: {e}")),
                };
                Some(RemoteReply::Answer { to, answer })
            }
            _ => None,
        }
    }

    fn note_success(&mut self, source: trouble::Source) {
        self.troubles.ended(source);
        if source == trouble::Source::Writes {
            self.troubles.ended(trouble::Source::Reads);
        }
    }

    /// Takes note of an event that has no effect on the table by itself.
    fn observe(&mut self, event: Event, table: &mut Table, now: Timestamp, effects: &mut Effects) {
        match event {
            Event::Trouble(source, error) => self.troubles.began(source, &error),
            Event::Presence { id, answer, .. } => {
                self.cluster.presence_answered(table, now, (id, answer), effects);
                self.read_presence();
            }
            Event::Entries(locks) => self.cluster.has_entries(locks),
            Event::NoEntries(lease) => {
                if self.lease == Some(lease) {
                    self.threads.command(Command::ListEntries(lease));
                }
            }
            Event::RecordsLease { lease, sent } => {
                self.records = Some((lease, sent));
                self.wants_records = false;
            }
            Event::RecordsGone(LeaseId(0)) => self.wants_records = false,
            Event::RecordsGone(lease) => {
                self.records.take_if(|(records, _)| *records == lease);
            }
            Event::Revoked { lease, is_done } => self.revoked(lease, is_done, now),
            Event::SignOfLife(Some(revision)) => self.watch.sign = Some(revision),
            Event::SignOfLife(None) => self.hang_up(now),
            // It was ended meanwhile.
            Event::WatchOpened { hang_ups, .. } if hang_ups < self.watch.hang_ups => {}
            Event::WatchOpened { revision, .. } => {
                self.watch.is_open = true;
                self.watch.seen = self.watch.seen.max(revision.0);
                self.cluster.watch_opened(table, revision);
                if let Some(lease) = self.lease {
                    self.threads.command(Command::ListEntries(lease));
                }
            }
            Event::Watch { revision, events, .. } => {
                self.watch.seen = self.watch.seen.max(revision);
                for event in events {
                    self.cluster.watch_event(table, now, event, effects);
                }
                self.cluster.watch_shown(Revision(revision));
            }
            Event::WatchEnded(error) => {
                self.watch.is_open = false;
                self.cluster.watch_ended(now);
                if let Some(error) = error.filter(|error| error.kind() != Kind::StoreChanged) {
                    self.troubles.began(trouble::Source::Watch, &error);
                }
            }
            Event::StoreChanged { .. } => {}
            Event::Leased { .. }
            | Event::LeaseGone(_)
            | Event::Answer { .. }
            | Event::Page { .. }
            | Event::Runs { .. }
            | Event::Forgotten { .. }
            | Event::Broken { .. } => unreachable!("these are handled"),
        }
    }

    fn revoked(&mut self, lease: LeaseId, is_done: bool, now: Timestamp) {
        self.revokes.retain_mut(|revoke| {
            if revoke.lease != lease {
                return true;
            }
            (revoke.at, revoke.tries) = (now.plus(REVOKE_PAUSE), revoke.tries + 1);
            !is_done && revoke.tries < REVOKES_MAX
        });
    }

    fn send(&mut self, now: Timestamp) {
        self.unsent.retain(|lock, token| self.cluster.is_untold(lock, token));
        for mut request in self.cluster.take_requests() {
            let Some(entries) = self.lease else { return };
            if let Some(owner) = request.op.owner_mut() {
                owner.host = self.host.clone();
                owner.since_ms = unix_ms();
            }
            if let QueueOp::RecordNewest { .. } = &request.op {
                self.renew_records(now);
            }
            if let QueueOp::Release { record: Some(record), result, .. } = &mut request.op {
                *result = self.unsent.for_request(request.lock, record.token);
                self.renew_records(now);
            }
            let records = self.records.map_or(entries, |(lease, _)| lease);
            self.under_way += 1;
            self.threads.command(Command::Request(request, Leases { entries, records }));
        }
    }

    /// Records are read by daemons later, so they get a lease that is not this daemon's, and that ends without being kept
    /// alive. Until there is one, the daemon's will do.
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

    /// If the store has gone on while the watch said nothing, either other programs wrote, or the watch is one of a member
    /// that says nothing any more. Once in a while, this host writes something that the watch must see.
    fn check_watch(&mut self, lease: LeaseId, now: Timestamp, revision: i64) {
        let watch = &mut self.watch;
        let is_silent = watch.kept > watch.seen;
        watch.kept = revision;
        if !watch.is_open {
            return;
        }
        if let Some(sign) = watch.sign.take() {
            if watch.seen < sign {
                debug!("etcd: the watch is silent, opening it anew");
                self.hang_up(now);
            }
        } else if is_silent && now >= watch.checked.plus(Duration::from_secs(self.ttl_secs * 2)) {
            watch.checked = now;
            self.threads.command(Command::SignOfLife(lease));
        }
    }
}

/// A result as the loop takes it in. If there is none, each client is told so.
fn remote_result(found: FoundResult) -> RemoteResult {
    let FoundResult { token, run, result } = found;
    let none = || (EVERY_USER, Err(NO_RESULT.into()));
    let (sharer, content) = result.map_or_else(none, |result| (result.sharer, result.content));
    RemoteResult { token, sharer, content, run }
}

/// A holder or waiter on another host.
fn party(entry: &Entry) -> LockUser {
    let shared = entry.sharing() == Sharing::Shared;
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
        shared,
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
