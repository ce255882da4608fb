//! Recording what is held: from the table's changes to the journal.

use std::io;
use std::path::Path;

use log::{error, info, warn};

use super::connection::Protocol;
use super::failpoint;
use super::orphans::Orphans;
use super::server::Server;
use super::socket_lock::SocketLock;
use super::{Config, Error, v2};
use crate::addr::Reason;
use crate::journal::{self, BootId, Journal, Record};
use crate::proto::Token;
use crate::table::{Change, ClientId, RequestView};

/// The journal, if there is one, and what it said at the start.
pub(super) struct Recorder {
    journal: Option<Journal>,
    /// Beside a socket, the socket's claim covers the journal too.
    _socket_lock: Option<SocketLock>,
    /// Those to whom the changes that are not written yet gave a lock, and how much else they are to be sent before they
    /// hear of it.
    granted: Vec<(ClientId, usize)>,
    /// Held when the daemon before ended.
    inherited: Vec<Record>,
    last_token: Option<Token>,
    lease: Option<u64>,
    /// Holders that are not connected.
    pub(super) orphans: Orphans,
}

impl Recorder {
    /// Records nothing: what is held does not survive the daemon.
    pub(super) fn none() -> Recorder {
        Recorder {
            journal: None,
            _socket_lock: None,
            granted: Vec::new(),
            inherited: Vec::new(),
            last_token: None,
            lease: None,
            orphans: Orphans::default(),
        }
    }

    /// Reads the journal at `path`, and goes on with it.
    pub(super) fn open(
        path: &Path,
        socket_lock: Option<SocketLock>,
        config: &Config,
    ) -> Result<Recorder, Error> {
        let error = |error| Error::Journal { path: path.into(), error };
        let boot = boot_id().map_err(error)?;
        let mut loaded = journal::load(path, &boot);
        if let Some(complaint) = &loaded.complaint {
            warn!("journal {}: {complaint}", path.display());
        }
        // Whoever starts a daemon by hand says what is wanted.
        if !config.is_sharing() && !config.detach && loaded.lease.take().is_some() {
            warn!("the daemon before shared its locks with other hosts; without --etcd, this one does not");
        }
        let journal = Journal::create(path, boot, loaded.lease, &loaded.records).map_err(error)?;
        Ok(Recorder {
            journal: Some(journal),
            _socket_lock: socket_lock,
            inherited: loaded.records,
            last_token: loaded.last_token,
            lease: loaded.lease,
            ..Recorder::none()
        })
    }

    /// The highest token that was ever given, as far as the journal tells.
    pub(super) fn last_token(&self) -> Option<Token> {
        self.last_token
    }

    /// The lease under which the daemon before shared its locks with other hosts; 0: it had none. `None`: it did not.
    pub(super) fn lease(&self) -> Option<u64> {
        self.lease
    }

    /// Notes the lease under which locks are shared with other hosts; 0: under none.
    #[cfg(feature = "etcd")]
    pub(super) fn set_lease(&mut self, lease: u64) {
        if let Some(journal) = self.journal.as_mut().filter(|_| self.lease != Some(lease)) {
            journal.lease(lease);
        }
        self.lease = Some(lease);
    }

    /// What was held when the daemon before ended; once.
    pub(super) fn take_inherited(&mut self) -> Vec<Record> {
        std::mem::take(&mut self.inherited)
    }

    /// Nothing is held any more, so nothing is to be remembered, but that locks are shared.
    pub(super) fn remove(self) {
        if self.lease.is_some() {
            return;
        }
        if let Some(journal) = self.journal {
            let name = journal.to_string();
            if let Err(e) = journal.remove() {
                warn!("cannot remove {name}: {}", Reason(&e));
            }
        }
    }

    /// A hold that was in the journal has ended before the table knew of it.
    pub(super) fn hold_ended(&mut self, token: Token) {
        if let Some(journal) = &mut self.journal {
            journal.strike(token);
        }
    }
}

/// This boot of the machine (random(4)).
fn boot_id() -> io::Result<BootId> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
    Ok(number.to_be_bytes())
}

impl Server {
    /// Notes a change, to be written with the others of this turn.
    pub(super) fn record(&mut self, change: Change) {
        match change {
            Change::Granted(client) => {
                // What is granted is told next, behind this.
                let told = self.connections[client.0 as usize].output().len();
                self.recorder.granted.push((client, told));
                self.record_hold(client);
            }
            Change::Resumed(client) => {
                if let Some((_, request)) = self.table.request_of(client)
                    && let Some(held) = &request.held
                {
                    self.recorder.orphans.forget(held.token);
                }
                self.record_hold(client);
            }
            Change::Ended(token) => {
                self.recorder.orphans.forget(token);
                self.recorder.hold_ended(token);
            }
        }
    }

    /// Notes what a client holds, as it is now.
    pub(super) fn record_hold(&mut self, client: ClientId) {
        let Some((_, request)) = self.table.request_of(client) else { return };
        let record = self.record_of(&request);
        if let (Some(record), Some(journal)) = (record, &mut self.recorder.journal) {
            journal.grant(&record);
        }
    }

    pub(super) fn record_of(&self, request: &RequestView<'_>) -> Option<Record> {
        let held = request.held?;
        let Some(client) = request.client else {
            return self.recorder.orphans.record(held.token).cloned();
        };
        let connection = &self.connections[client.0 as usize];
        // Over TCP no process is known, and what the client says of it means nothing here.
        let (pid, child) = connection.peer().map_or((0, 0), |peer| (peer.pid, connection.child));
        Some(Record { held, pid, child, granted: request.since, recorded: self.now })
    }

    /// Writes what was noted. Where that fails, the locks that were given in this turn are not: whoever got one is
    /// refused, and so is whoever is next, until it works again.
    pub(super) fn commit(&mut self) {
        while let Some(journal) = self.recorder.journal.as_mut().filter(|journal| journal.is_dirty()) {
            failpoint::hit("before-journal");
            let was_behind = journal.is_behind();
            let written = if was_behind { self.rewrite() } else { journal.write() };
            let Some(journal) = &mut self.recorder.journal else { return };
            let Err(e) = written else {
                failpoint::hit("after-journal");
                if was_behind {
                    info!("the journal can be written again");
                }
                break;
            };
            journal.fall_behind();
            if !was_behind {
                error!("cannot write {journal}: {}; no lock is given until I can", Reason(&e));
            }
            let refused = std::mem::take(&mut self.recorder.granted);
            if refused.is_empty() {
                // That a hold has ended may be told all the same: at worst it lasts longer after a restart.
                break;
            }
            for (client, told) in refused {
                self.refuse(client, told);
            }
        }
        self.recorder.granted.clear();
        if self.recorder.journal.as_ref().is_some_and(Journal::is_overgrown) {
            failpoint::hit("before-compaction");
            if let Err(e) = self.rewrite() {
                warn!("cannot write the journal anew: {}", Reason(&e));
            }
            failpoint::hit("after-compaction");
        }
    }

    /// Takes back what a client was given in this turn, before it hears of it. `told`: how much else it is to be sent.
    fn refuse(&mut self, client: ClientId, told: usize) {
        let connection = &mut self.connections[client.0 as usize];
        if connection.closing {
            return;
        }
        connection.output().truncate(told);
        if let Protocol::V2 { .. } = connection.protocol {
            self.answer(client, &v2::cannot_record());
        }
        self.close_after_flush(client, "its lock cannot be recorded");
    }

    /// Writes the journal anew, with nothing but what is held.
    fn rewrite(&mut self) -> io::Result<()> {
        let records = self.records();
        match &mut self.recorder.journal {
            Some(journal) => journal.compact(&records),
            None => Ok(()),
        }
    }

    /// All that is held.
    fn records(&self) -> Vec<Record> {
        let mut records = Vec::new();
        let mut cursor = 0;
        while let Some((lock, next)) = self.table.next_lock(cursor) {
            records.extend(lock.holders().filter_map(|holder| self.record_of(&holder)));
            cursor = next;
        }
        records
    }
}
