//! Holders that are not connected: the daemon was restarted, and they have not come back yet. Each keeps its lock until
//! it comes back, its process ends, or, where no process can be watched, its time is up.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use log::{debug, info, warn};
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::processes::Liveness;
use super::server::{Server, Source};
use crate::addr::Reason;
use crate::journal::Record;
use crate::proto::Token;
use crate::table::ClientId;

/// What is known of them, by the token of their grant.
#[derive(Default)]
pub(super) struct Orphans(BTreeMap<Token, Orphan>);

struct Orphan {
    record: Record,
    /// Readable when the process that is watched has ended (pidfd_open(2)).
    process: Option<OwnedFd>,
    /// What is watched is the command: with it, the hold ends.
    is_command: bool,
    /// It was restored after a restart of the daemon, and its client may yet come.
    is_restored: bool,
}

impl Orphan {
    /// It was taken for a process that is not its client (`kmutex lock`), which is not expected to come back.
    fn is_handed_over(&self) -> bool {
        self.record.held.terms.exec && self.record.child != 0 && (self.is_command || !self.is_restored)
    }
}

impl Orphans {
    /// What was recorded of a hold.
    pub(super) fn record(&self, token: Token) -> Option<&Record> {
        self.0.get(&token).map(|orphan| &orphan.record)
    }

    /// The process that keeps it, as far as it is known.
    pub(super) fn pid(&self, token: Token) -> Option<u32> {
        let orphan = self.0.get(&token)?;
        let is_command = orphan.is_command && orphan.record.child != 0;
        Some(if is_command { orphan.record.child } else { orphan.record.pid })
    }

    /// True when its client should have come back since a restart of the daemon, and has not.
    pub(super) fn awaits_resume(&self, token: Token) -> bool {
        self.0.get(&token).is_some_and(|orphan| orphan.is_restored && !orphan.is_handed_over())
    }

    /// True when it was taken for this process.
    pub(super) fn is_held_by(&self, token: Token, pid: u32) -> bool {
        self.0.get(&token).is_some_and(|orphan| orphan.is_handed_over() && orphan.record.child == pid)
    }

    /// It has come back, or has ended.
    pub(super) fn forget(&mut self, token: Token) {
        self.0.remove(&token);
    }
}

impl Server {
    /// Gives the table what the daemon before had recorded, less what has ended since.
    pub(super) fn restore_orphans(&mut self) -> io::Result<()> {
        let mut inherited = self.recorder.take_inherited();
        // The latest first: where the end of a hold could not be recorded, a later one of the same lock tells of it.
        inherited.sort_by_key(|record| std::cmp::Reverse(record.held.token));
        for record in inherited {
            let token = record.held.token;
            if !self.restore(record)? {
                self.recorder.hold_ended(token);
            }
        }
        match self.recorder.orphans.0.len() {
            0 => {}
            count => info!("{count} locks were held when the daemon before ended, and are held still"),
        }
        Ok(())
    }

    /// False: the hold has ended.
    fn restore(&mut self, record: Record) -> io::Result<bool> {
        let (process, is_command) = match Liveness::of_process(record.pid, record.recorded)? {
            Liveness::Exited => (Liveness::of_command(&record)?, true),
            other => (other, false),
        };
        let mut held = record.held;
        let grace = self.now.plus(self.grace);
        match &process {
            Liveness::Exited => return Ok(false),
            // It will come back, or end.
            Liveness::Alive(_) if held.terms.protocol == 2 => held.until = None,
            // It may live and not hold any more, and cannot be asked.
            Liveness::Alive(_) | Liveness::Unknown => {
                held.until = Some(held.until.map_or(grace, |until| until.min(grace)))
            }
        }
        if !self.table.restore(record.granted, held) {
            return Ok(false);
        }
        let token = held.token;
        self.recorder
            .orphans
            .0
            .insert(token, Orphan { record, process: None, is_command, is_restored: true });
        if let Liveness::Alive(process) = process {
            self.watch_orphan(token, process)?;
        }
        Ok(true)
    }

    /// A client's stream has ended, perhaps while it held a lock that its command has inherited. If the command lives
    /// though nobody has this connection any more (it has closed it, or the lock was resumed since), the lock is its.
    pub(super) fn hand_over_to_child(&mut self, client: ClientId) {
        let child = self.connections[client.0 as usize].child;
        if child == 0 {
            return;
        }
        let Some(record) = self.table.request_of(client).and_then(|(_, request)| self.record_of(&request))
        else {
            return;
        };
        let Ok(Liveness::Alive(process)) = Liveness::of_process(child, self.now) else { return };
        let token = record.held.token;
        self.table.detach(client);
        let orphan = Orphan { record, process: None, is_command: true, is_restored: false };
        self.recorder.orphans.0.insert(token, orphan);
        match self.watch_orphan(token, process) {
            Ok(()) => debug!("the command of {} goes on and keeps token {token}", self.name(client)),
            // Better a lock too long than one twice: it ends when the daemon does and cannot watch it either.
            Err(e) => warn!("cannot watch the command of token {token}: {}", Reason(&e)),
        }
    }

    fn watch_orphan(&mut self, token: Token, process: OwnedFd) -> io::Result<()> {
        self.epoll.add(&process, EpollEvent::new(EpollFlags::EPOLLIN, Source::Orphan(token).pack()))?;
        if let Some(orphan) = self.recorder.orphans.0.get_mut(&token) {
            orphan.process = Some(process);
        }
        Ok(())
    }

    /// A process that was watched has ended. Its command may have inherited the lock, and live.
    pub(super) fn orphan_ready(&mut self, token: Token) {
        let Some(orphan) = self.recorder.orphans.0.get_mut(&token) else { return };
        orphan.process = None;
        let next = match std::mem::replace(&mut orphan.is_command, true) {
            true => Ok(Liveness::Exited),
            false => Liveness::of_command(&orphan.record),
        };
        let result = next.and_then(|next| match next {
            Liveness::Alive(process) => self.watch_orphan(token, process),
            Liveness::Exited => {
                debug!("the process of token {token} has ended");
                self.apply(|table, now, effects| table.orphan_ended(now, token, effects));
                Ok(())
            }
            Liveness::Unknown => {
                self.table.limit_orphan(token, self.now.plus(self.grace));
                Ok(())
            }
        });
        if let Err(e) = result {
            // Then it is the holder's coming back that ends it, or nothing: better a lock too long than one twice.
            warn!("cannot watch the command of token {token}: {}", Reason(&e));
        }
    }
}
