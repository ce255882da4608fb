//! Clustering the locks with other hosts: between the daemon's loop, this host's part in the queues ([`Cluster`]), and the
//! threads that speak with etcd.
//!
//! Nothing here happens without `--etcd`.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `cluster/client_requests.rs` | what clients want to know or to have done in etcd |
//! | `cluster/handle_event.rs` | what follows from what the threads report |
//! | `cluster/host_lease.rs` | this host's lease: how long it can be relied on, and its loss |
//! | `cluster/quarantine.rs` | the time without grants after the store went back |
//! | `cluster/watch_check.rs` | whether the watch still reports what is written |
//! | `cluster/sending.rs` | the requests of the queues, on their way to the threads |
//! | `cluster/unsent.rs` | the results of this host's runs until etcd has them |
//! | `cluster/party.rs` | holders and waiters on other hosts |
//! | `cluster/trouble.rs` | what is wrong with etcd at the moment |
//! | `cluster/events.rs` | what the loop and the threads say to each other |
//! | `cluster/threads.rs` | the threads |
//! | `cluster/lease_keeper.rs`, `cluster/watcher.rs`, `cluster/worker.rs` | what each of them does |
//! | `cluster/backoff.rs` | how long they wait before they try again |
//! | `cluster/layout.rs`, `cluster/stored_result.rs` | how queues and results are laid out in etcd |
//! | `cluster/listing.rs` | what all hosts hold, from what is read there |

mod backoff;
mod client_requests;
mod events;
mod handle_event;
mod host_lease;
mod layout;
mod lease_keeper;
mod listing;
mod party;
mod quarantine;
mod sending;
mod stored_result;
mod threads;
mod trouble;
mod unsent;
mod watch_check;
mod watcher;
mod worker;

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::warn;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::timerfd::{self, TimerFd, TimerFlags};

use super::connection::ConnectionId;
use super::remote::{RemoteReply, RemoteResult};
use super::sharers::Sharers;
use super::source::Source;
use crate::clock;
use crate::cluster::{Cluster, FoundResult, OwnResult, RunUser};
use crate::etcd::{self, Client, Kind, LeaseId};
use crate::journal::ClusterLease;
use crate::proto::v2::{LockUser, ShortText};
use crate::proto::{LockId, Token};
use crate::table::{ClusterNotice, EVERY_USER, Effects, Table, Timestamp};
use events::{Command, Event, Reading};
use host_lease::{Revoke, warn_if_too_short};
use layout::Layout;
use party::party;
use quarantine::Quarantine;
use threads::EtcdThreads;
use trouble::Troubles;
use unsent::Unsent;
use watch_check::WatchState;

/// How long the end of the daemon may wait for etcd.
const STOP_WAIT: Duration = Duration::from_millis(80);
/// Why there is no result of a run on another host.
const NO_RESULT: &str =
    "that run was on another host, and without --share, or its result is not in etcd any more";

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
}

/// A result as the loop takes it in. If there is none, each client is told so.
fn remote_result(found: FoundResult) -> RemoteResult {
    let FoundResult { token, run, result } = found;
    let none = || (EVERY_USER, Err(NO_RESULT.into()));
    let (sharer, content) = result.map_or_else(none, |result| (result.sharer, result.content));
    RemoteResult { token, sharer, content, run }
}
