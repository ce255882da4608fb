//! Sharing locks with other hosts: between the daemon's loop, the standing of this host among them ([`Cluster`]), and the
//! threads that speak with etcd.
//!
//! Nothing here happens without `--etcd`.

mod breaking;
mod layout;
mod link;
mod listing;

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{debug, info, warn};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::server::{Server, Source};
use crate::clock;
use crate::cluster::{Cluster, Contender, LeaseName, Question};
use crate::etcd::{self, Client, LeaseId};
use crate::proto::v2::{LeaseTerms, Party, Text};
use crate::proto::{LockId, Token};
use crate::table::{ClientId, Effects, Millis, Stir, Table};
use layout::{Layout, Leases};
use link::{Link, Order, Report};
use listing::Listing;

/// How long the end of the daemon may wait for etcd.
const STOP_WAIT: Duration = Duration::from_millis(80);
/// After how long records get another lease, while there are any.
const RECORDS_LEASE_EVERY: Millis = Millis(60_000);

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
pub(super) struct Sharing {
    cluster: Cluster,
    link: Link,
    host: Text,
    ttl_secs: u64,
    lease: Option<LeaseId>,
    /// The lease that was given up last. That it was kept once more may be reported afterwards, and counts for nothing.
    abandoned: Option<LeaseId>,
    /// Goes off when the lease may not be relied on any more; after a sleep of the machine at once, which the loop's own
    /// timeouts sleep through.
    alarm: TimerFd,
    /// A lease for records, and when it was asked for.
    records: Option<(LeaseId, Millis)>,
    wants_records: bool,
    /// The last that was said of etcd was that it cannot be reached.
    in_trouble: bool,
    /// The last revision that the watch has told of, and the store's when the lease was last kept.
    watched: i64,
    kept: i64,
    /// The questions that are under way.
    under_way: usize,
    /// By client.
    listings: BTreeMap<u32, Listing>,
    /// Who wants a lock of another host broken: the client and its generation.
    breaks: BTreeMap<u64, (ClientId, u32)>,
    next_number: u64,
}

/// A lease is not relied on for this last part of its time: a quarter, in which holders stop.
fn margin(ttl_secs: u64) -> Millis {
    Millis((ttl_secs * 250).max(500))
}

/// Starts what the daemon needs for sharing locks. `resume` is the lease of the daemon before.
///
/// # Errors
/// When no thread can be started.
pub(super) fn share(config: &Config, client: Client, resume: Option<u64>) -> Result<Sharing, super::Error> {
    let resume = resume.filter(|&lease| lease != 0).map(|lease| LeaseId(lease as i64));
    let link = Link::start(client, Layout::new(&config.prefix), config.ttl_secs, resume)
        .map_err(|e| super::Error::Os("start the threads for etcd", e))?;
    let micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_micros() as u64);
    let host = nix::unistd::gethostname().unwrap_or_default();
    let alarm =
        TimerFd::new(timerfd::ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
            .map_err(|e| super::Error::Os("make a timer", e.into()))?;
    Ok(Sharing {
        // Whatever the daemon before has called its places, it had not so many.
        cluster: Cluster::new(micros),
        link,
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
        listings: BTreeMap::new(),
        breaks: BTreeMap::new(),
        next_number: 0,
    })
}

impl Sharing {
    /// Takes note that what was held when the daemon before ended must be found in etcd.
    fn restore(&mut self, table: &Table) {
        let mut cursor = 0;
        while let Some((lock, next)) = table.next_lock(cursor) {
            self.cluster.stir(Stir::Wants(lock.id()));
            cursor = next;
        }
    }

    fn send(&mut self, now: Millis) {
        for mut ask in self.cluster.take_asks() {
            let Some(places) = self.lease else { return };
            if let Some(claim) = ask.what.claim_mut() {
                claim.host = self.host.clone();
                claim.since_ms = unix_ms();
            }
            if let Question::Leave { record: Some(_), .. } = ask.what {
                self.renew_records(now);
            }
            let records = self.records.map_or(places, |(lease, _)| lease);
            self.under_way += 1;
            self.link.order(Order::Ask(ask, Leases { places, records }));
        }
    }

    /// Records are left behind for those who read them later, so they get a lease that is not this daemon's, and that
    /// ends without being kept. Until there is one, the daemon's will do.
    fn renew_records(&mut self, now: Millis) {
        let is_ending =
            |(_, sent): (LeaseId, Millis)| now >= sent.plus(Millis(3 * RECORDS_LEASE_EVERY.0 / 2));
        if self.records.is_some_and(is_ending) {
            self.records = None;
        }
        let is_fresh = self.records.is_some_and(|(_, sent)| now < sent.plus(RECORDS_LEASE_EVERY));
        if !is_fresh && !std::mem::replace(&mut self.wants_records, true) {
            self.link.order(Order::RecordsLease);
        }
    }

    fn leased(&mut self, lease: LeaseId, sent: Millis, ttl_secs: u64, revision: i64) -> bool {
        let ttl = Millis(ttl_secs.saturating_mul(1000));
        let margin = margin(self.ttl_secs);
        let good_until = Millis(sent.plus(ttl).0.saturating_sub(margin.0));
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
            self.link.watch_anew();
        }
        self.kept = revision;
        is_new
    }

    fn next_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
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

    fn terms(&self) -> LeaseTerms {
        let good_ms = self.cluster.good_until().map_or(0, |until| until.0.saturating_sub(clock::now().0));
        LeaseTerms { good_ms, margin_ms: margin(self.ttl_secs).0 }
    }

    /// Who holds a lock on another host.
    fn party(&self, contender: &Contender) -> Party {
        let claim = contender.claim.clone().unwrap_or_default();
        let mut who = claim.who;
        if !claim.host.is_empty() {
            who.host = claim.host;
        }
        // Its number says nothing of a user here, and its name may not be known there.
        if let (true, Some(uid)) = (who.user.is_empty(), claim.uid) {
            who.user = format!("uid {uid}").into();
        }
        if contender.claim.is_none() {
            who.note = "of another program".into();
        }
        Party {
            protocol: claim.protocol,
            uid: None,
            who,
            for_ms: if claim.since_ms == 0 { 0 } else { unix_ms().saturating_sub(claim.since_ms) },
            token: Some(Token(contender.revision.0 as u64)),
            mode: None,
            shared: false,
            orphan: false,
        }
    }
}

/// Milliseconds since 1970, which hosts have about in common.
fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn name(lease: LeaseId) -> LeaseName {
    LeaseName(format!("{:x}", lease.0))
}

impl Server {
    /// Begins to share locks, with what is held in the table already.
    pub(super) fn share(&mut self, mut sharing: Sharing) -> io::Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Cluster.pack());
        self.epoll.add(sharing.link.readable(), event)?;
        self.epoll.add(&sharing.alarm, event)?;
        sharing.restore(&self.table);
        if self.recorder.lease().is_none() {
            // So that nobody starts a daemon here that shares nothing.
            self.recorder.set_lease(0);
            self.commit();
        }
        self.sharing = Some(Box::new(sharing));
        Ok(())
    }

    /// True where locks are shared with other hosts.
    pub(super) fn is_sharing(&self) -> bool {
        self.sharing.is_some()
    }

    /// When there is something to do that nobody wakes the loop for.
    pub(super) fn sharing_deadline(&self) -> Option<Millis> {
        let cluster = &self.sharing.as_ref()?.cluster;
        [cluster.good_until(), cluster.retry_at()].into_iter().flatten().min()
    }

    /// Before anything else in a turn: after a sleep of the machine, or a stop of the daemon, what is held may have been
    /// given to others.
    pub(super) fn check_lease(&mut self) {
        let Some(sharing) = &self.sharing else { return };
        if sharing.cluster.good_until().is_some_and(|until| until <= self.now) {
            warn!("etcd: the lease was not kept in time; what is held is lost");
            self.lose_lease();
        }
    }

    fn lose_lease(&mut self) {
        self.with_cluster(|sharing, table, now, effects| {
            sharing.cluster.lost_lease(table, now, effects);
            if let Some(lease) = sharing.lease.take() {
                sharing.link.abandon(lease);
                sharing.abandoned = Some(lease);
            }
        });
        // Nor by the next daemon: it would give up places in whose remaining time holders are stopping.
        self.recorder.set_lease(0);
    }

    /// Reports of the threads.
    pub(super) fn sharing_ready(&mut self) {
        if let Some(sharing) = &self.sharing {
            sharing.link.clear();
            // What it is for is looked at in each turn.
            let _ = sharing.alarm.wait();
        }
        while let Some(report) = self.sharing.as_ref().and_then(|sharing| sharing.link.report()) {
            self.reported(report);
        }
    }

    fn reported(&mut self, report: Report) {
        let Some(sharing) = &mut self.sharing else { return };
        match report {
            Report::Leased { lease, .. } if sharing.abandoned == Some(lease) => {}
            Report::Leased { lease, sent, ttl_secs, revision } => {
                sharing.no_trouble();
                if sharing.leased(lease, sent, ttl_secs, revision) {
                    info!("etcd: sharing locks under lease {:016x}, of {ttl_secs} s", lease.0);
                    // One that was taken up again may have places that nobody knows of.
                    sharing.link.order(Order::Places(lease));
                    self.recorder.set_lease(lease.0 as u64);
                }
                self.check_lease();
            }
            Report::LeaseGone(lease) => {
                if sharing.lease.is_none() || sharing.lease == Some(lease) {
                    warn!("etcd: lease {:016x} is gone; what was held under it is lost", lease.0);
                    sharing.lease = None;
                    self.lose_lease();
                }
            }
            Report::Trouble(error) => {
                sharing.wants_records = false;
                sharing.trouble(&error);
                if sharing.lease.is_none() {
                    let now = self.now;
                    sharing.cluster.cannot_ask(now);
                }
            }
            Report::Answer { lock, id, lease, answer, trouble } => {
                sharing.under_way -= 1;
                match &trouble {
                    Some(error) => sharing.trouble(error),
                    None => sharing.no_trouble(),
                }
                let is_gone = answer == Err(crate::cluster::Failure::LeaseGone);
                self.with_cluster(|sharing, table, now, effects| {
                    sharing.cluster.answered(table, now, (lock, id), answer, effects);
                });
                // Not that of a question that was asked under one before.
                if is_gone && self.sharing.as_ref().is_some_and(|sharing| sharing.lease == Some(lease)) {
                    warn!("etcd: the lease is gone; what was held under it is lost");
                    self.lose_lease();
                }
            }
            Report::Places(locks) => sharing.cluster.has_places(locks),
            Report::NoPlaces(lease) if sharing.lease == Some(lease) => {
                sharing.link.order(Order::Places(lease));
            }
            Report::NoPlaces(_) => {}
            Report::RecordsLease { lease, sent } => {
                sharing.records = Some((lease, sent));
                sharing.wants_records = false;
            }
            Report::RecordsGone(lease) => {
                sharing.records.take_if(|(records, _)| *records == lease);
            }
            Report::Heard { revision, events } => {
                sharing.watched = sharing.watched.max(revision);
                for (lock, revision, what) in events {
                    sharing.cluster.heard(lock, revision, what);
                }
            }
            Report::Missed(revision) => {
                sharing.watched = sharing.watched.max(revision.0);
                sharing.cluster.missed(revision);
                if let Some(lease) = sharing.lease {
                    sharing.link.order(Order::Places(lease));
                }
            }
            Report::Page { number, page } => self.listed(number, page),
            Report::Broken { number, broken } => self.broken(number, broken),
        }
    }

    /// Looks at what has changed, and asks etcd what follows from it.
    pub(super) fn contend(&mut self) {
        while let Some(sharing) = &mut self.sharing {
            for stir in self.stirred.drain(..) {
                sharing.cluster.stir(stir);
            }
            if !sharing.cluster.is_stirred(self.now) {
                return;
            }
            self.with_cluster(|sharing, table, now, effects| {
                sharing.cluster.review(table, now, effects);
                sharing.send(now);
            });
        }
    }

    fn with_cluster(&mut self, event: impl FnOnce(&mut Sharing, &mut Table, Millis, &mut Effects)) {
        let Some(sharing) = &mut self.sharing else { return };
        event(sharing, &mut self.table, self.now, &mut self.effects);
        self.dispatch_effects();
    }

    /// How long what a client holds may be relied on, if that has an end.
    pub(super) fn lease_terms(&self) -> Option<LeaseTerms> {
        Some(self.sharing.as_ref()?.terms())
    }

    /// Who holds a lock on another host, as far as it is known.
    pub(super) fn holder_elsewhere(&self, lock: LockId) -> Option<Party> {
        let sharing = self.sharing.as_ref()?;
        sharing.cluster.holder(lock).map(|contender| sharing.party(contender))
    }

    /// Tells etcd, as far as there is time, what has ended; and ends the lease if nothing is held under it.
    pub(super) fn stop_sharing(&mut self) {
        self.contend();
        let Some(sharing) = &mut self.sharing else { return };
        let until = Instant::now() + STOP_WAIT;
        while sharing.under_way > 0
            && let Some(report) = sharing.link.wait(until)
        {
            sharing.under_way -= usize::from(matches!(report, Report::Answer { .. }));
        }
        let mut held = 0;
        let mut cursor = 0;
        while let Some((lock, next)) = self.table.next_lock(cursor) {
            held += usize::from(self.table.held_here(lock.id()).is_some());
            cursor = next;
        }
        if held == 0 {
            sharing.link.stop(sharing.lease, until);
            self.recorder.set_lease(0);
        }
        self.commit();
    }
}
