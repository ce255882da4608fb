//! Holders that are not connected: either the daemon was restarted and they have not come back yet, or their client has
//! ended and a process that it started holds the lock. Each keeps its lock until it comes back, its process ends, or,
//! if no process can be watched, a time limit passes.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::named::Named;
use super::processes::{Liveness, must_search};
use super::source::Source;
use crate::journal::HoldRecord;
use crate::proto::{Pid, Protocol, Token};
use crate::table::{HoldState, Timestamp};

/// What the daemon knows of each unconnected holder, by the token of its grant.
#[derive(Default)]
pub(super) struct Orphans(BTreeMap<Token, Orphan>);

struct Orphan {
    record: HoldRecord,
    /// Becomes readable when the watched process ends (pidfd_open(2)).
    process: Option<OwnedFd>,
    /// The watched process is the command: the hold ends with it.
    is_command: bool,
    /// The hold was restored after a restart of the daemon, and its client may yet come back.
    is_restored: bool,
    /// The watched process is a command outside of the daemon's pid namespace, which only the descriptor names.
    is_foreign: bool,
    /// Its descriptor counts, as a connection of the holder's user does.
    counts: bool,
}

impl Orphan {
    /// Returns `true` if the lock was taken for a process that is not its client (`kmutex lock`). No client will come back.
    fn is_handed_over(&self) -> bool {
        let has_command = self.record.child.is_some() || self.is_foreign;
        self.record.held.terms.exec && has_command && (self.is_command || !self.is_restored)
    }
}

/// A recorded hold whose holder lives, or may live.
pub(super) struct Survivor {
    orphan: Orphan,
    process: Option<OwnedFd>,
    /// The hold, with its new time limit.
    pub(super) held: HoldState,
}

impl Survivor {
    pub(super) fn granted(&self) -> Timestamp {
        self.orphan.record.granted
    }

    /// Returns `true` if its process is going to be watched.
    pub(super) fn is_watched(&self) -> bool {
        self.process.is_some()
    }
}

/// What holds a lock after a watched process has ended.
pub(super) enum Successor {
    /// The command that inherited the lock. It is being watched.
    Command,
    /// Nothing.
    None,
    /// Perhaps a command that cannot be found.
    Unknown,
    /// Perhaps a command that was not named, and must be searched for.
    Sought(HoldRecord),
}

impl Orphans {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns what was recorded of a hold.
    pub(super) fn record(&self, token: Token) -> Option<&HoldRecord> {
        self.0.get(&token).map(|orphan| &orphan.record)
    }

    /// Returns the process that keeps a hold, as far as it is known.
    pub(super) fn pid(&self, token: Token) -> Option<Pid> {
        let orphan = self.0.get(&token)?;
        if orphan.is_foreign {
            return None;
        }
        orphan.record.child.filter(|_| orphan.is_command).map(|child| child.pid).or(orphan.record.pid)
    }

    /// Returns `true` if the client of this hold has not come back since a restart of the daemon.
    pub(super) fn awaits_resume(&self, token: Token) -> bool {
        self.0.get(&token).is_some_and(|orphan| orphan.is_restored && !orphan.is_handed_over())
    }

    /// Returns `true` if the lock was taken for this process.
    pub(super) fn is_held_by(&self, token: Token, process: &Named) -> bool {
        let is_it = |orphan: &Orphan| match process {
            Named::Known(process) => orphan.record.child == Some(*process),
            Named::Foreign(_) => orphan.process.as_ref().is_some_and(|mine| process.is_foreign(mine)),
        };
        self.0.get(&token).is_some_and(|orphan| orphan.is_handed_over() && is_it(orphan))
    }

    /// The holder has come back, or its hold has ended. Returns whose descriptor counts no more, if one did.
    pub(super) fn forget(&mut self, token: Token) -> Option<Option<u32>> {
        let orphan = self.0.remove(&token)?;
        orphan.counts.then_some(orphan.record.held.uid)
    }

    /// Finds out what became of a hold that the previous daemon recorded. Returns `None` if the hold has ended.
    /// `grace`: when a hold ends whose holder can neither be watched nor come back. `may_watch`: there is a descriptor to watch
    /// its process with.
    pub(super) fn examine(record: HoldRecord, grace: Timestamp, may_watch: bool) -> Option<Survivor> {
        // A process that cannot be examined may live.
        let known = |liveness: io::Result<Liveness>| match liveness.unwrap_or(Liveness::Unknown) {
            Liveness::Alive(_) if !may_watch => Liveness::Unknown,
            other => other,
        };
        let (process, is_command) = match known(Liveness::of_process(record.pid, record.recorded)) {
            Liveness::Exited => (known(Liveness::of_command(&record)), true),
            other => (other, false),
        };
        let mut held = record.held;
        match &process {
            Liveness::Exited => return None,
            // It will come back, or end.
            Liveness::Alive(_) if held.terms.protocol == Protocol::V2 => held.until = None,
            // It may live without holding the lock any more, and the daemon cannot ask it.
            Liveness::Alive(_) | Liveness::Unknown => {
                held.until = Some(held.until.map_or(grace, |until| until.min(grace)))
            }
        }
        let process = match process {
            Liveness::Alive(process) => Some(process),
            Liveness::Exited | Liveness::Unknown => None,
        };
        let orphan = Orphan {
            record,
            process: None,
            is_command,
            is_restored: true,
            is_foreign: false,
            counts: process.is_some(),
        };
        Some(Survivor { orphan, process, held })
    }

    /// Watches the holder of a hold that the table has taken over.
    ///
    /// # Errors
    /// As epoll_ctl(2) gives them.
    pub(super) fn restore(&mut self, survivor: Survivor, epoll: &Epoll) -> io::Result<()> {
        let token = survivor.held.token;
        self.0.insert(token, survivor.orphan);
        match survivor.process {
            Some(process) => self.watch(token, process, epoll),
            None => Ok(()),
        }
    }

    /// Leaves a hold whose client has gone to a process: the one that `record.child` names, or else one that only its descriptor
    /// names.
    ///
    /// # Errors
    /// If the process cannot be watched. The hold lasts nevertheless.
    pub(super) fn hand_over(
        &mut self,
        record: HoldRecord,
        process: io::Result<OwnedFd>,
        epoll: &Epoll,
    ) -> io::Result<()> {
        let token = record.held.token;
        let is_foreign = record.child.is_none();
        let orphan =
            Orphan { record, process: None, is_command: true, is_restored: false, is_foreign, counts: true };
        self.0.insert(token, orphan);
        self.watch(token, process?, epoll)
    }

    /// Keeps a hold whose client may come back, although its connection is gone: the client is on another machine, and nothing
    /// tells whether it lives.
    pub(super) fn await_return(&mut self, record: HoldRecord) {
        let token = record.held.token;
        let orphan = Orphan {
            record,
            process: None,
            is_command: false,
            is_restored: true,
            is_foreign: false,
            counts: false,
        };
        self.0.insert(token, orphan);
    }

    fn watch(&mut self, token: Token, process: OwnedFd, epoll: &Epoll) -> io::Result<()> {
        epoll.add(&process, EpollEvent::new(EpollFlags::EPOLLIN, Source::Orphan(token).pack()))?;
        if let Some(orphan) = self.0.get_mut(&token) {
            orphan.process = Some(process);
        }
        Ok(())
    }

    /// The watched process of a hold has ended. Its command may have inherited the lock, and live.
    ///
    /// # Errors
    /// If the command cannot be watched. The hold lasts until its holder comes back.
    pub(super) fn process_exited(&mut self, token: Token, epoll: &Epoll) -> io::Result<Option<Successor>> {
        let Some(orphan) = self.0.get_mut(&token) else { return Ok(None) };
        orphan.process = None;
        let next = match std::mem::replace(&mut orphan.is_command, true) {
            true => Liveness::Exited,
            false if must_search(&orphan.record) => {
                return Ok(Some(Successor::Sought(orphan.record.clone())));
            }
            false => Liveness::of_command(&orphan.record)?,
        };
        self.found(token, next, epoll).map(Some)
    }

    /// Notes what has become of the command of a hold, whose client has ended.
    ///
    /// # Errors
    /// If the command cannot be watched. The hold lasts until it is broken.
    pub(super) fn found(&mut self, token: Token, next: Liveness, epoll: &Epoll) -> io::Result<Successor> {
        Ok(match next {
            Liveness::Alive(process) => {
                self.watch(token, process, epoll)?;
                Successor::Command
            }
            Liveness::Exited => Successor::None,
            Liveness::Unknown => Successor::Unknown,
        })
    }
}
