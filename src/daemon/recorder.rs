//! Recording what is held: notes the changes of a turn, and writes them to the journal before the clients are told.

use crate::journal::ClusterLease;
use std::io;
use std::path::{Path, PathBuf};

use log::{error, info, warn};

use super::socket_lock::SocketLock;
use super::{Config, Error};
use super::{failpoint, processes};
use crate::addr::Reason;
use crate::clock;
use crate::journal::{self, BootId, Era, HoldRecord, Journal, RunRecord, Snapshot};
use crate::proto::Token;
use crate::table::{ClientId, Timestamp};

/// The journal, if there is one, and what it contained at the start.
pub(super) struct Recorder {
    journal: Option<Journal>,
    /// A journal beside a socket needs no lock file of its own: the socket's covers it.
    socket_lock: Option<SocketLock>,
    /// The daemon's files are gone: another daemon may serve in its place, so this one grants nothing.
    refuses: bool,
    /// The grants whose records are not written yet.
    grants: Vec<Grant>,
    /// What was held when the previous daemon ended.
    inherited: Snapshot,
    last_token: Option<Token>,
    /// There was a journal of this boot of the machine: what the daemon before granted is known.
    knows_past: bool,
    lease: ClusterLease,
}

/// A grant in this turn, of which the client has not been told yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grant {
    pub(super) client: ClientId,
    /// How many bytes of the client's output come before the grant.
    pub(super) output_before: usize,
}

impl Recorder {
    /// A recorder that records nothing: what is held does not survive the daemon.
    pub(super) fn none() -> Recorder {
        Recorder {
            journal: None,
            socket_lock: None,
            refuses: false,
            grants: Vec::new(),
            inherited: Snapshot::default(),
            last_token: None,
            knows_past: false,
            lease: ClusterLease::Local,
        }
    }

    /// Reads the journal at `path`, and continues it.
    ///
    /// # Errors
    /// [`Error::Journal`] if it cannot be written.
    pub(super) fn open(
        path: &Path,
        socket_lock: Option<SocketLock>,
        config: &Config,
    ) -> Result<Recorder, Error> {
        let error = |error| Error::Journal { path: path.into(), error };
        let boot = boot_id().map_err(Error::BootId)?;
        let mut loaded = journal::load(path, &boot);
        if let Some(complaint) = &loaded.complaint {
            warn!("journal {}: {complaint}", path.display());
        }
        // A manually started daemon without --etcd is deliberate.
        if !config.is_clustered() && !config.detach && std::mem::take(&mut loaded.lease).is_clustered() {
            warn!("the previous daemon shared its locks with other hosts; without --etcd, this one does not");
        }
        if !loaded.is_of_this_boot && loaded.lease.is_clustered() {
            info!(
                "journal {}: it is of another boot of the machine, so this daemon takes a lease of its own",
                path.display()
            );
        }
        if !loaded.is_of_this_boot {
            let (now, unix_now) = (clock::now(), clock::unix_ms());
            loaded.content.runs.retain_mut(|run| carry_over(run, now, unix_now));
        }
        let namespace = processes::namespace().unwrap_or(0);
        if loaded.namespace != namespace || namespace == 0 {
            // The numbers are of another pid namespace, where this daemon sees no process: each holder must resume.
            for hold in &mut loaded.content.holds {
                (hold.pid, hold.child) = (None, None);
            }
        }
        let era = Era { boot, namespace };
        let journal = Journal::create(path, era, loaded.lease, &loaded.content).map_err(error)?;
        Ok(Recorder {
            journal: Some(journal),
            socket_lock,
            inherited: loaded.content,
            last_token: loaded.last_token,
            knows_past: loaded.is_of_this_boot,
            lease: loaded.lease,
            ..Recorder::none()
        })
    }

    /// Returns the highest token that was ever given, as far as the journal tells.
    pub(super) fn last_token(&self) -> Option<Token> {
        self.last_token
    }

    /// Returns `true` if it is known what the daemon before granted.
    pub(super) fn knows_past(&self) -> bool {
        self.knows_past
    }

    /// Returns whether the locks are clustered, and under which lease.
    pub(super) fn lease(&self) -> ClusterLease {
        self.lease
    }

    /// Notes that the locks are clustered, and under which lease.
    pub(super) fn set_lease(&mut self, lease: ClusterLease) {
        if let Some(journal) = self.journal.as_mut().filter(|_| self.lease != lease) {
            journal.set_lease(lease);
        }
        self.lease = lease;
    }

    /// Returns what was held when the previous daemon ended; once.
    pub(super) fn take_inherited(&mut self) -> Snapshot {
        std::mem::take(&mut self.inherited)
    }

    /// Removes the journal: nothing is held any more. A journal that says that the locks are shared with other hosts stays.
    pub(super) fn remove(self) {
        if self.lease.is_clustered() {
            return;
        }
        if let Some(journal) = self.journal {
            let name = journal.to_string();
            if let Err(e) = journal.remove() {
                warn!("cannot remove {name}: {}", Reason(&e));
            }
        }
    }

    /// Notes a grant. The hold itself is noted with [`Recorder::hold`].
    pub(super) fn granted(&mut self, grant: Grant) {
        self.grants.push(grant);
    }

    /// Notes what a client holds now; it replaces an earlier note with the same token.
    pub(super) fn hold(&mut self, record: &HoldRecord) {
        if let Some(journal) = &mut self.journal {
            journal.grant(record);
        }
    }

    /// Notes that the hold with this token has ended.
    pub(super) fn hold_ended(&mut self, token: Token) {
        if let Some(journal) = &mut self.journal {
            journal.end(token);
        }
    }

    /// Returns the files that the journal needs.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let journal = self.journal.as_ref().map(|journal| journal.path().into());
        journal.into_iter().chain(self.socket_lock.as_ref().map(|lock| lock.path().into())).collect()
    }

    /// Writes the journal anew if it was removed or replaced.
    ///
    /// # Errors
    /// When that cannot be done.
    pub(super) fn restore_files(&mut self, held: impl Fn() -> Snapshot) -> Result<(), Error> {
        if let Some(lock) = &mut self.socket_lock {
            lock.restore()?;
        }
        let Some(journal) = self.journal.as_mut().filter(|journal| !journal.is_in_place()) else {
            return Ok(());
        };
        let path = journal.path().to_path_buf();
        journal.compact(&held()).map_err(|error| Error::Journal { path: path.clone(), error })?;
        warn!("{} was removed, and is put back", path.display());
        Ok(())
    }

    /// Returns `true` if something was granted in this turn.
    pub(super) fn has_grants(&self) -> bool {
        !self.grants.is_empty()
    }

    /// Grants nothing from now on, or again.
    pub(super) fn set_refusing(&mut self, refuses: bool) {
        self.refuses = refuses;
    }

    /// Notes that a run is over and counts for a while.
    pub(super) fn run(&mut self, run: &RunRecord) {
        if let Some(journal) = &mut self.journal {
            journal.run(run);
        }
    }

    /// Notes that the run with this token does not count any more.
    pub(super) fn forget_run(&mut self, token: Token) {
        if let Some(journal) = &mut self.journal {
            journal.forget_run(token);
        }
    }

    /// Writes what was noted in this turn. `held` lists everything that is held, in case that the whole journal must be
    /// written anew.
    ///
    /// Returns the grants that cannot be recorded: the caller takes them back, and calls this again until none is returned.
    /// No lock is given until the journal can be written again.
    pub(super) fn commit(&mut self, held: impl Fn() -> Snapshot) -> Vec<Grant> {
        if self.refuses && !self.grants.is_empty() {
            return std::mem::take(&mut self.grants);
        }
        let Some(journal) = &mut self.journal else {
            self.grants.clear();
            return Vec::new();
        };
        if journal.is_dirty() {
            failpoint::hit("before-journal");
            let was_behind = journal.is_stale();
            let written = if was_behind { journal.compact(&held()) } else { journal.write() };
            match written {
                Ok(()) => {
                    failpoint::hit("after-journal");
                    if was_behind {
                        info!("the journal can be written again");
                    }
                }
                Err(e) => {
                    journal.mark_stale();
                    if !was_behind {
                        error!("cannot write {journal}: {}; no lock is granted until that works", Reason(&e));
                    }
                    // Clients may be told of the end of a hold that is not recorded: at worst, the hold lasts longer
                    // after a restart.
                    return std::mem::take(&mut self.grants);
                }
            }
        }
        self.grants.clear();
        if journal.needs_compaction() {
            failpoint::hit("before-compaction");
            if let Err(e) = journal.compact(&held()) {
                warn!("cannot write the journal anew: {}", Reason(&e));
            }
            failpoint::hit("after-compaction");
        }
        Vec::new()
    }
}

/// Takes a run of an earlier boot over to the clock of this one. Returns `false` if the time of day has gone back since: it
/// does not tell how old the run is.
fn carry_over(record: &mut RunRecord, now: Timestamp, unix_now_ms: u64) -> bool {
    let Some(age) = unix_now_ms.checked_sub(record.began_unix_ms) else { return false };
    let (now, age) = (i64::try_from(now.0).unwrap_or(i64::MAX), i64::try_from(age).unwrap_or(i64::MAX));
    record.run.began_ms = now.saturating_sub(age);
    true
}

/// Where the kernel tells the id of this boot.
pub(super) const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Returns the id of this boot of the machine (random(4)).
fn boot_id() -> io::Result<BootId> {
    let text = std::fs::read_to_string(BOOT_ID)?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
    Ok(number.to_be_bytes())
}
