//! The thread that gets the host's lease, and keeps it alive.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::backoff::{Backoff, pause_max};
use super::events::Event;
use super::trouble::Source;
use super::worker::EtcdWorker;
use crate::clock;
use crate::etcd::{self, LeaseId, Range};
use crate::table::Timestamp;

/// How soon the keeper looks again after it found that the store went back.
const SOON: Duration = Duration::from_millis(100);

/// What the loop tells the keeper.
#[derive(Debug)]
pub(super) enum LeaseCommand {
    /// Do not keep this lease any more: get another one.
    Abandon(LeaseId),
    /// The store went back: get another lease, but not before this.
    Quarantine(Instant),
    /// The daemon ends: end the lease if one is given, and say so.
    Stop { revoke: Option<LeaseId>, done: Sender<()> },
}

pub(super) struct LeaseKeeper {
    worker: EtcdWorker,
    ttl_secs: u64,
    lease: Option<LeaseId>,
    not_before: Instant,
    backoff: Backoff,
    /// When the last request for the lease was sent that was answered. `None`: an attempt has failed since.
    renewed: Option<Timestamp>,
}

impl LeaseKeeper {
    pub(super) fn new(
        worker: EtcdWorker,
        ttl_secs: u64,
        lease: Option<LeaseId>,
        not_before: Instant,
    ) -> LeaseKeeper {
        let backoff = Backoff::up_to(period(ttl_secs));
        LeaseKeeper { worker, ttl_secs, lease, not_before, backoff, renewed: Some(clock::now()) }
    }

    pub(super) fn run(mut self, commands: &Receiver<LeaseCommand>) {
        loop {
            let began = Instant::now();
            let pause = match self.not_before.saturating_duration_since(began) {
                Duration::ZERO => self.refresh(),
                left => left,
            };
            match commands.recv_timeout(pause.saturating_sub(began.elapsed())) {
                Ok(LeaseCommand::Abandon(lease)) => {
                    self.lease.take_if(|current| *current == lease);
                }
                Ok(LeaseCommand::Quarantine(until)) => (self.lease, self.not_before) = (None, until),
                Ok(LeaseCommand::Stop { revoke, done }) => {
                    if let Some(lease) = revoke {
                        // If that fails, it ends by itself.
                        let _ = self.worker.client.revoke(lease);
                    }
                    // The loop may have stopped waiting.
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
        let refreshed = match self.lease {
            None => self.grant(),
            Some(lease) => self.keep(lease),
        };
        match refreshed {
            Ok(pause) => {
                self.backoff.reset();
                pause
            }
            Err(e) => {
                self.renewed = None;
                let pause = match e {
                    etcd::Error::StoreChanged { .. } => SOON,
                    _ => self.backoff.pause().min(pause_max(&e, self.ttl_secs)),
                };
                self.worker.failed(Source::Lease, e);
                pause
            }
        }
    }

    fn grant(&mut self) -> Result<Duration, etcd::Error> {
        let (sent, generation) = (clock::now(), self.worker.client.generation());
        let granted = self.worker.client.grant_lease(self.ttl_secs)?;
        self.lease = Some(granted.id);
        let (lease, ttl_secs) = (granted.id, granted.ttl_secs);
        let (revision, is_prompt) = (0, self.is_prompt(sent));
        self.renewed = Some(sent);
        self.worker.reporter.send(Event::Leased { lease, sent, ttl_secs, revision, is_prompt, generation });
        Ok(period(ttl_secs))
    }

    fn keep(&mut self, lease: LeaseId) -> Result<Duration, etcd::Error> {
        let (sent, generation) = (clock::now(), self.worker.client.generation());
        let client = &self.worker.client;
        let kept = client.keep_alive(lease)?;
        if kept.is_behind {
            // Either the member lags behind, or the store went back: a linearizable read tells.
            let (key, _) = self.worker.layout.everything();
            client.range(&Range { key, limit: 1, ..Range::default() })?;
        }
        if kept.ttl_secs == 0 {
            self.lease = None;
            self.worker.reporter.send(Event::LeaseGone(lease));
            return Ok(Duration::ZERO);
        }
        let (ttl_secs, revision, is_prompt) = (kept.ttl_secs, kept.revision, self.is_prompt(sent));
        self.renewed = Some(sent);
        self.worker.reporter.send(Event::Leased { lease, sent, ttl_secs, revision, is_prompt, generation });
        Ok(period(ttl_secs))
    }

    /// Returns `true` if a request that was sent then, and answered, shows that contact with etcd was not interrupted.
    fn is_prompt(&self, sent: Timestamp) -> bool {
        let watched_at = self.worker.watched_at.load(Ordering::Relaxed);
        if watched_at != usize::MAX && watched_at != self.worker.client.current() {
            // The member that the watch reads from did not answer: it may hang, and the watch with it.
            self.worker.watched_at.store(usize::MAX, Ordering::Relaxed);
            return false;
        }
        self.renewed.is_some_and(|before| sent <= before.plus(period(self.ttl_secs) * 3 / 2))
    }
}

/// Returns how often a lease is kept alive.
pub(super) fn period(ttl_secs: u64) -> Duration {
    Duration::from_secs(ttl_secs) / 3
}
