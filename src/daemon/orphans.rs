//! Holders that are not connected: the daemon was restarted, and they have not come back yet. Each keeps its lock until
//! it comes back, its process ends, or, where no process can be watched, its time is up.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use log::{debug, info, warn};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::unistd::{SysconfVar, sysconf};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::server::{Server, Source};
use crate::addr::Reason;
use crate::journal::Record;
use crate::proto::Token;
use crate::table::{ClientId, Millis};

/// What is known of them, by the token of their grant.
#[derive(Default)]
pub(super) struct Orphans(BTreeMap<Token, Orphan>);

struct Orphan {
    record: Record,
    /// Readable when its process has ended (pidfd_open(2)).
    process: Option<OwnedFd>,
}

impl Orphans {
    /// What was recorded of a hold.
    pub(super) fn record(&self, token: Token) -> Option<&Record> {
        self.0.get(&token).map(|orphan| &orphan.record)
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
                self.recorder.strike(token);
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
        let process = watch([record.pid, record.child], record.recorded)?;
        let mut held = record.held;
        let grace = self.now.plus(self.grace);
        match &process {
            Watch::Ended => return Ok(false),
            // It will come back, or end.
            Watch::Process(_) if held.terms.protocol == 2 => held.until = None,
            // It may live and not hold any more, and cannot be asked.
            Watch::Process(_) | Watch::Nobody => {
                held.until = Some(held.until.map_or(grace, |until| until.min(grace)))
            }
        }
        if !self.table.restore(record.granted, held) {
            return Ok(false);
        }
        let token = held.token;
        self.recorder.orphans.0.insert(token, Orphan { record, process: None });
        if let Watch::Process(process) = process {
            self.watch_orphan(token, process)?;
        }
        Ok(true)
    }

    /// A client's stream has ended, perhaps while it held a lock that its command has inherited. If the command lives
    /// though nobody has this connection any more (it has closed it, or the lock was resumed since), the lock is its.
    pub(super) fn leave_to_child(&mut self, client: ClientId) {
        let child = self.connections[client.0 as usize].child;
        if child == 0 {
            return;
        }
        let Some(record) = self.table.request_of(client).and_then(|(_, request)| self.record_of(&request))
        else {
            return;
        };
        let Ok(Watch::Process(process)) = watch([child, 0], self.now) else { return };
        let token = record.held.token;
        self.table.detach(client);
        self.recorder
            .orphans
            .0
            .insert(token, Orphan { record: Record { pid: child, child: 0, ..record }, process: None });
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
        let (child, recorded) = (std::mem::take(&mut orphan.record.child), orphan.record.recorded);
        let next = watch([child, 0], recorded).and_then(|next| match next {
            Watch::Process(process) => self.watch_orphan(token, process).map(|()| true),
            Watch::Ended | Watch::Nobody => Ok(false),
        });
        match next {
            Ok(true) => {}
            Ok(false) => {
                debug!("the process of token {token} has ended");
                self.feed(|table, now, effects| table.orphan_ended(now, token, effects));
            }
            // Then it is the holder's coming back that ends it, or nothing: better a lock too long than one twice.
            Err(e) => warn!("cannot watch the command of token {token}: {}", Reason(&e)),
        }
    }
}

/// What can be watched of a holder.
enum Watch {
    /// A process of it lives.
    Process(OwnedFd),
    /// Its processes have ended.
    Ended,
    /// No process of it is known here, or this kernel has no way to watch it.
    Nobody,
}

/// Watches the first of these processes that lives and is the one that was recorded, and not a later one that was given
/// the same number. 0 is no process.
fn watch(pids: [u32; 2], recorded: Millis) -> io::Result<Watch> {
    let mut known = false;
    for pid in pids {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { continue };
        known = true;
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(_) if is_later(pid, recorded) => {}
            Ok(process) => return Ok(Watch::Process(process)),
            Err(rustix::io::Errno::SRCH) => {}
            Err(rustix::io::Errno::NOSYS) => return Ok(Watch::Nobody),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(if known { Watch::Ended } else { Watch::Nobody })
}

/// True when the process with this number was started after `recorded` (proc(5), /proc/PID/stat, starttime). Where that
/// cannot be read, it is taken for the right one, whose end its descriptor will tell.
fn is_later(pid: Pid, recorded: Millis) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())) else {
        return false;
    };
    // The second field is a name in brackets, which may have anything in it.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let start = after_name.split_ascii_whitespace().nth(19).and_then(|ticks| ticks.parse::<u64>().ok());
    let hertz = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|hertz| u64::try_from(hertz).ok());
    match (start, hertz) {
        (Some(ticks), Some(hertz @ 1..)) => ticks.saturating_mul(1000) / hertz > recorded.0,
        _ => false,
    }
}
