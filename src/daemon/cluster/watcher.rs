//! The thread that watches all queues.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::backoff::{Backoff, pause_max};
use super::events::Event;
use super::worker::EtcdWorker;
use crate::cluster::Revision;
use crate::etcd::{self, Range, Watch, WatchReply};

/// A watch that lived for so long was a success.
const STEADY: Duration = Duration::from_secs(10);

pub(super) struct Watcher {
    worker: EtcdWorker,
    ttl_secs: u64,
    backoff: Backoff,
    generation: u64,
    /// The last key that the watch saw being put, and the revision: what proves that the store is the same.
    last_put: Option<(Vec<u8>, i64)>,
}

impl Watcher {
    pub(super) fn new(worker: EtcdWorker, ttl_secs: u64) -> Watcher {
        Watcher { worker, ttl_secs, backoff: Backoff::new(), generation: 0, last_put: None }
    }

    /// Watches for ever. Each watch begins with what comes next, so the loop reads what it needs when a watch is opened.
    pub(super) fn run(mut self) {
        loop {
            let error = match self.open() {
                Err(e) => Some(e),
                Ok(watch) => {
                    let (opened, hang_ups) = (Instant::now(), watch.hang_ups());
                    let end = self.read(watch);
                    // A watch that the loop has ended is no failure.
                    if opened.elapsed() >= STEADY || hang_ups != self.worker.client.hang_ups() {
                        self.backoff.reset();
                    }
                    end
                }
            };
            let mut pause = self.backoff.pause();
            if let Some(error) = &error {
                pause = pause.min(pause_max(error, self.ttl_secs));
            }
            if let Some(etcd::Error::StoreChanged { why }) = &error {
                let generation = self.worker.client.generation();
                self.worker.reporter.send(Event::StoreChanged { why: why.clone(), generation });
            }
            self.worker.reporter.send(Event::WatchEnded(error));
            thread::sleep(pause);
        }
    }

    /// Opens a watch, after a look at the store. etcd would accept a watch from a future revision and be silent, so the look
    /// must show that the store has not gone back.
    fn open(&mut self) -> Result<Watch, etcd::Error> {
        let client = &self.worker.client;
        if client.generation() != self.generation {
            (self.generation, self.last_put) = (client.generation(), None);
        }
        let (key, end) = self.worker.layout.everything();
        let look = client.range(&Range { key: key.clone(), limit: 1, ..Range::default() })?;
        if let Some((key, revision)) = &self.last_put {
            client.check_history(key, *revision)?;
        }
        let mut watch = client.watch(&key, &end, look.revision + 1)?;
        self.worker.watched_at.store(client.current(), Ordering::Relaxed);
        let first = watch.next()?;
        if let Some(error) = end_of(&first) {
            return Err(error);
        }
        if !first.created {
            return Err(etcd::Error::BadReply { why: "a watch does not begin as one".into() });
        }
        let (revision, hang_ups, generation) = (Revision(look.revision), watch.hang_ups(), self.generation);
        self.worker.reporter.send(Event::WatchOpened { revision, hang_ups, generation });
        self.report(first);
        Ok(watch)
    }

    /// Reads a watch to its end. Returns what is wrong, unless only the connection has ended.
    fn read(&mut self, mut watch: Watch) -> Option<etcd::Error> {
        loop {
            let reply = match watch.next() {
                Ok(reply) => reply,
                Err(etcd::Error::Unknown { .. }) => return None,
                Err(e) => return Some(e),
            };
            if let Some(error) = end_of(&reply) {
                return Some(error);
            }
            self.report(reply);
        }
    }

    fn report(&mut self, reply: WatchReply) {
        let put = reply.events.iter().rev().find_map(|event| match event {
            etcd::Event::Put(key) => Some((key.key.clone(), key.mod_revision)),
            etcd::Event::Delete { .. } => None,
        });
        self.last_put = put.or(self.last_put.take());
        let layout = &self.worker.layout;
        let events = reply.events.iter().filter_map(|event| layout.watch_event(event)).collect();
        let (revision, generation) = (reply.revision, self.generation);
        self.worker.reporter.send(Event::Watch { revision, events, generation });
    }
}

/// Returns why etcd ends a watch with this message. `None`: it goes on.
fn end_of(reply: &WatchReply) -> Option<etcd::Error> {
    if reply.compact_revision > 0 {
        // The store was compacted between the look and the watch.
        return Some(etcd::Error::Unknown { why: "what the watch was to begin with is compacted".into() });
    }
    let reason = reply.canceled.as_ref()?;
    let reason = if reason.is_empty() { "without a reason" } else { reason };
    Some(etcd::Error::Refused { code: 1, message: format!("watch cancelled: {reason}") })
}
