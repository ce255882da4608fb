//! The daemon's beginning: what it takes over from the daemon before it; and its end, which leaves the next one what is still held.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{SystemTime, UNIX_EPOCH};

use ::log::info;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

use super::Server;
use super::tcp::ForeignWarnings;
use crate::clock;
use crate::daemon::Config;
use crate::daemon::accept::Acceptor;
use crate::daemon::cluster::Clustering;
use crate::daemon::connections::Connections;
use crate::daemon::files::Files;
use crate::daemon::gate::Gate;
use crate::daemon::leases::PeerLeases;
use crate::daemon::listener::Listener;
use crate::daemon::log::Limiter;
use crate::daemon::orphans::Orphans;
use crate::daemon::outputs::Outputs;
use crate::daemon::predecessor::Predecessor;
use crate::daemon::recorder::Recorder;
use crate::daemon::reserve::Reservations;
use crate::daemon::search::Search;
use crate::daemon::sharers::Sharers;
use crate::daemon::source::Source;
use crate::daemon::users::Users;
use crate::journal::{ClusterLease, HoldRecord, Snapshot};
use crate::proto::Token;
use crate::table::{self, ClusterNotice, Effects, Table};

impl Server {
    /// A server that takes over what `recorder` says was held before.
    ///
    /// # Errors
    /// If the kernel refuses a descriptor.
    pub(in crate::daemon) fn new(
        config: &Config,
        listeners: Vec<Listener>,
        recorder: Recorder,
        mut gate: Gate,
        (cluster, sharers): (Option<Clustering>, Sharers),
    ) -> io::Result<Server> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let signals = signal_pipe(&[SIGHUP, SIGINT, SIGTERM], &epoll, Source::Signals)?;
        let reload = signal_pipe(&[SIGUSR1], &epoll, Source::Reload)?;
        gate.start(&epoll)?;
        if let Some(cluster) = &cluster {
            cluster.register(&epoll)?;
        }
        // The time of day makes tokens grow across restarts, even without a journal; a million grants a second would
        // not catch up with it.
        let micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_micros() as u64);
        let last = recorder.last_token().map_or(0, |token| token.0);
        let now = clock::now();
        let first_token = Token(micros.max(last + 1));
        let is_exposed = config.remote || listeners.iter().any(Listener::is_exposed);
        let is_unknown = is_exposed && cluster.is_none() && !recorder.knows_past();
        let acceptor = Acceptor::new(config, listeners)?;
        let descriptors = acceptor.admission.outputs_max();
        let server = Server {
            epoll,
            signals,
            reload,
            gate,
            reservations: Reservations::new(config.reservations.clone(), cluster.is_some()),
            users: Users::default(),
            search: Search::default(),
            has_restored: false,
            peers: PeerLeases::new(config.peer_timeout),
            predecessor: Predecessor::new(is_unknown, config.peer_timeout, now, first_token),
            is_exposed,
            #[cfg(feature = "tls")]
            plaintext: Vec::new(),
            foreign_warnings: ForeignWarnings::new(),
            acceptor,
            connections: Connections::default(),
            table: Table::new(table::Config {
                hash_key: RandomState::new().hash_one(0),
                first_token,
                hold_limit: config.hold_limit,
                is_clustered: cluster.is_some(),
                remember_max: config.remember_max,
            }),
            recorder,
            orphans: Orphans::default(),
            outputs: Outputs::new(config.share_total, descriptors),
            sharers,
            effects: Effects::default(),
            cluster,
            listings: BTreeMap::new(),
            closing: 0,
            refused: VecDeque::new(),
            limiter: Limiter::default(),
            mark: None,
            has_work: false,
            warned_of_runs: None,
            now,
            started: now,
            grace: config.grace,
            peer_timeout: config.peer_timeout.unwrap_or_default(),
            shows_commands: config.shows_commands,
            idle_exit: config.idle_exit,
            idle_since: Some(now),
            files: Files::new(),
        };
        server.begin()
    }

    /// Watches the daemon's files, takes over what was held before, and begins to accept clients.
    pub(super) fn begin(mut self) -> io::Result<Server> {
        if let Some(descriptor) = self.files.watch.descriptor() {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Files.pack());
            self.epoll.add(descriptor, event)?;
        }
        self.files.watch.watch(&self.file_paths());
        // What was removed before the watch began.
        self.look_at_files();
        self.restore_holds()?;
        self.join_cluster();
        self.acceptor.resume(&self.epoll)?;
        Ok(self)
    }

    /// Gives the table what the previous daemon recorded, except for holds that have ended since.
    fn restore_holds(&mut self) -> io::Result<()> {
        let Snapshot { holds: mut inherited, runs } = self.recorder.take_inherited();
        runs.into_iter().for_each(|record| self.table.restore_run(self.now, record.run));
        // The latest first: if the end of a hold could not be recorded, a later hold of the same lock proves that it ended.
        inherited.sort_by_key(|record| std::cmp::Reverse(record.held.token));
        for record in inherited {
            let token = record.held.token;
            if !self.restore(record)? {
                self.recorder.hold_ended(token);
            }
        }
        match self.orphans.len() {
            0 => {}
            count => info!("{count} locks were held when the previous daemon ended, and still are"),
        }
        Ok(())
    }

    /// Returns `false` if the hold has ended.
    pub(super) fn restore(&mut self, record: HoldRecord) -> io::Result<bool> {
        let may_watch = self.acceptor.admission.may_watch_restored();
        // A client on another machine, which has no uid here, runs its command until its lease is over.
        let is_remote = record.pid.is_none() && record.held.uid.is_none();
        let grace = if is_remote { self.grace.max(self.peer_timeout) } else { self.grace };
        match Orphans::examine(record, self.now.plus(grace), may_watch) {
            Some(survivor) if self.table.restore(survivor.granted(), survivor.held) => {
                if survivor.is_watched() {
                    self.acceptor.admission.keep(survivor.held.uid);
                }
                self.orphans.restore(survivor, &self.epoll)?;
                self.has_restored = true;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Begins to share the locks with other hosts, also the locks that are held already.
    fn join_cluster(&mut self) {
        let Some(cluster) = &mut self.cluster else { return };
        let mut cursor = 0;
        while let Some((lock, next)) = self.table.next_lock(cursor) {
            cluster.notify(ClusterNotice::Needs(lock.id()));
            cursor = next;
        }
        if !self.recorder.lease().is_clustered() {
            // This keeps a later daemon from serving here without sharing the locks.
            self.recorder.set_lease(ClusterLease::None);
            self.commit();
        }
    }

    /// Ends in good order: what is still held stays in the journal, for the next daemon.
    pub(in crate::daemon) fn finish(mut self) {
        self.poll_cluster();
        if let Some(lease) = self.cluster.as_mut().and_then(|cluster| cluster.stop(&self.table)) {
            self.recorder.set_lease(lease);
        }
        self.commit();
        // To the next daemon of an exposed port, a journal without holds says that there are none.
        if !self.is_exposed && self.table.is_empty() && self.table.runs(self.now).next().is_none() {
            self.recorder.remove();
        }
    }
}

/// Returns a pipe that becomes readable with these signals.
fn signal_pipe(signals: &[i32], epoll: &Epoll, source: Source) -> io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    reader.set_nonblocking(true)?;
    for &signal in signals {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    epoll.add(&reader, EpollEvent::new(EpollFlags::EPOLLIN, source.pack()))?;
    Ok(reader)
}
