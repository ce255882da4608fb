//! The threads that speak with etcd, so that the daemon's loop never waits for it: one keeps the lease, one watches, one
//! reads listings, one reads whether what is held is there, and a few carry out the loop's commands. What they find goes through one channel to the loop, which
//! an eventfd(2) wakes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::events::{Command, Event, Reading, Reporter};
use super::layout::Layout;
use super::lease_keeper::{LeaseCommand, LeaseKeeper};
use super::watcher::Watcher;
use super::worker::EtcdWorker;
use crate::cluster::PresenceRequest;
use crate::daemon::connection::ConnectionId;
use crate::etcd::{Client, LeaseId};

/// How many commands are carried out side by side.
const WORKERS: usize = 16;
/// How many events may wait for the loop before the threads wait for it.
const EVENTS_MAX: usize = 1024;

/// The loop's side.
pub(super) struct EtcdThreads {
    client: Arc<Client>,
    wake: Arc<EventFd>,
    events: Receiver<Event>,
    commands: Sender<Command>,
    readings: Sender<(ConnectionId, Reading)>,
    presence: Sender<(PresenceRequest, LeaseId)>,
    lease_commands: Sender<LeaseCommand>,
}

impl EtcdThreads {
    /// Starts the threads. `resume` is the previous daemon's lease, which may live still. No lease is requested before
    /// `not_before`.
    pub(super) fn start(
        client: Client,
        layout: Layout,
        ttl_secs: u64,
        resume: Option<LeaseId>,
        not_before: Instant,
    ) -> io::Result<EtcdThreads> {
        let (events, received) = mpsc::sync_channel(EVENTS_MAX);
        let (commands, queued) = mpsc::channel();
        let (readings, queued_readings) = mpsc::channel();
        let (presence, queued_presence) = mpsc::channel();
        let (lease_commands, lease_received) = mpsc::channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let client = Arc::new(client);
        let reporter = Reporter::new(wake.clone(), events);
        let watched_at = Arc::new(AtomicUsize::new(usize::MAX));
        let worker = EtcdWorker { client: client.clone(), layout, reporter, watched_at };
        let queued = Arc::new(Mutex::new(queued));
        for _ in 0..WORKERS {
            let (worker, queued) = (worker.clone(), queued.clone());
            spawn("etcd worker", move || worker.work(&queued))?;
        }
        let (lister, watcher, reader) = (worker.clone(), worker.clone(), worker.clone());
        spawn("etcd listing", move || lister.read_listings(&queued_readings))?;
        spawn("etcd presence", move || reader.read_presence(&queued_presence))?;
        spawn("etcd watch", move || Watcher::new(watcher, ttl_secs).run())?;
        let keeper = LeaseKeeper::new(worker, ttl_secs, resume, not_before);
        spawn("etcd lease", move || keeper.run(&lease_received))?;
        Ok(EtcdThreads { client, wake, events: received, commands, readings, presence, lease_commands })
    }

    /// Returns the descriptor that becomes readable when there is an event.
    pub(super) fn readable(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Returns the next event, if there is one. Call it until there is none.
    pub(super) fn next_event(&self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    pub(super) fn command(&self, command: Command) {
        // The workers live as long as this.
        let _ = self.commands.send(command);
    }

    /// Reads something for a client. Readings do not share a queue with locks.
    pub(super) fn read(&self, to: ConnectionId, reading: Reading) {
        // Its thread lives as long as this.
        let _ = self.readings.send((to, reading));
    }

    /// Reads which places a lease has.
    pub(super) fn read_presence(&self, request: PresenceRequest, lease: LeaseId) {
        // Its thread lives as long as this.
        let _ = self.presence.send((request, lease));
    }

    /// Tells the keeper of the lease something.
    pub(super) fn lease_command(&self, command: LeaseCommand) {
        let _ = self.lease_commands.send(command);
    }

    /// Ends the watch, so that it is opened anew. Returns how often that was done.
    pub(super) fn reopen_watch(&self) -> u64 {
        self.client.hang_up()
    }

    /// Waits for the next event, until `until` at the latest.
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

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(work).map(drop)
}
