//! A read-only view of everything that the daemon knows: what a lock is called, who holds it, and what to record of a hold.

use nix::unistd::Uid;

use super::cluster::Clustering;
use super::connections::Connections;
use super::named::Named;
use super::orphans::Orphans;
use crate::clock;
use crate::journal::{HoldRecord, RunRecord, Snapshot};
use crate::proto::v2::{LISTED_MAX, LeaseTerms, LockStatus, LockUser, Mode, RunStatus, ShortText};
use crate::proto::{Key, LockId, Pid, Token};
use crate::table::{ClientId, HoldState, LockView, RequestView, Run, Table, Timestamp};
use crate::timestamp::millis;

/// What a client may see of the requests of other users.
#[derive(Clone, Copy)]
pub(super) struct Viewer {
    /// The client's user, on a Unix socket.
    uid: Option<u32>,
    /// The client may see the commands of all users.
    sees_all: bool,
}

impl Viewer {
    /// `shows_commands`: the daemon shows the commands of all users to all (`--show-commands`).
    pub(super) fn new(uid: Option<u32>, shows_commands: bool) -> Viewer {
        let is_admin = uid.is_some_and(|uid| uid == 0 || uid == Uid::effective().as_raw());
        Viewer { uid, sees_all: shows_commands || is_admin }
    }

    /// Removes from a holder or waiter what this client may not see: the command and, unless `with_note`, the note, which is
    /// meant for waiters.
    fn conceal(self, party: &mut LockUser, is_remote: bool, with_note: bool) {
        if self.sees_all || (!is_remote && party.uid == self.uid) {
            return;
        }
        party.who.command = ShortText::default();
        if !with_note {
            party.who.note = ShortText::default();
        }
    }

    /// Removes from a status, read from etcd, what this client may not see.
    pub(super) fn conceal_remote(self, status: &mut LockStatus) {
        for party in status.holders.iter_mut().chain(&mut status.waiters) {
            self.conceal(party, true, false);
        }
    }
}

/// Returns `true` if this is the name of this machine.
fn is_here(host: &str) -> bool {
    nix::unistd::gethostname().is_ok_and(|name| name.to_string_lossy() == host)
}

#[derive(Clone, Copy)]
pub(super) struct Lookup<'a> {
    pub(super) table: &'a Table,
    pub(super) connections: &'a Connections,
    pub(super) orphans: &'a Orphans,
    pub(super) cluster: Option<&'a Clustering>,
    pub(super) now: Timestamp,
}

impl<'a> Lookup<'a> {
    /// A client, for the log.
    pub(super) fn client_name(&self, client: ClientId) -> String {
        self.connections.describe(client)
    }

    /// A lock's key if it is known, otherwise its identity; for the log and for error messages.
    pub(super) fn lock_name(&self, id: LockId) -> String {
        match self.table.find(id).and_then(|lock| lock.key().map(|key| format!("{key:?}"))) {
            Some(key) => key,
            None => id.to_string(),
        }
    }

    /// Returns the user whose request this is, if the kernel told.
    pub(super) fn uid(&self, request: &RequestView<'_>) -> Option<u32> {
        match request.client {
            Some(client) => self.connections[client].uid(),
            None => request.held.and_then(|held| held.uid),
        }
    }

    /// Returns the name that the client of this request has shown to be its own, over TCP.
    pub(super) fn name(&self, request: &RequestView<'_>) -> Option<&'a str> {
        self.connections[request.client?].name()
    }

    /// Returns the hold of a lock that a process keeps without a connection, if it does.
    pub(super) fn hold_of_process(&self, lock: LockId, process: &Named) -> Option<HoldState> {
        let lock = self.table.find(lock)?;
        let mut unconnected =
            lock.holders().filter(|holder| holder.client.is_none()).filter_map(|holder| holder.held);
        unconnected.find(|held| self.orphans.is_held_by(held.token, process))
    }

    /// Returns how long a granted lock may be relied on, if that has a limit.
    pub(super) fn lease_terms(&self) -> Option<LeaseTerms> {
        Some(self.cluster?.lease_terms())
    }

    /// `key`: as the client named it, where the table may not know it.
    pub(super) fn lock_status(&self, viewer: Viewer, lock: &LockView<'_>, key: Option<&str>) -> LockStatus {
        let party = |request: RequestView<'_>| {
            let mut party = self.party(lock.id(), &request);
            viewer.conceal(&mut party, request.is_remote, false);
            party
        };
        let waiters = lock.waiters().take(LISTED_MAX).map(party).collect();
        LockStatus {
            key: key.map(Into::into),
            id: lock.id().to_string(),
            holders: lock.holders().take(LISTED_MAX).map(party).collect(),
            holding: lock.holding(),
            waiters,
            waiting: lock.waiting(),
            last_success: None,
            last_failure: None,
        }
    }

    /// Returns the status of one lock, which may be only remembered. `None`: nothing is known of it.
    pub(super) fn status_of(&self, viewer: Viewer, key: &Key) -> Option<LockStatus> {
        let id = key.id();
        let [last_success, last_failure] =
            self.table.last_runs(self.now, id).map(|run| run.map(|run| Box::new(self.run_status(run))));
        let status = match self.table.find(id) {
            Some(lock) => self.lock_status(viewer, &lock, Some(key.as_str())),
            None if last_success.is_none() && last_failure.is_none() => return None,
            None => {
                LockStatus { key: Some(key.as_str().into()), id: id.to_string(), ..LockStatus::default() }
            }
        };
        Some(LockStatus { last_success, last_failure, ..status })
    }

    /// Returns the run with this token, if it is remembered.
    pub(super) fn run(&self, lock: LockId, token: Token) -> Option<RunStatus> {
        let runs = self.table.last_runs(self.now, lock);
        let run = runs.into_iter().flatten().find(|run| run.token == token);
        let run = run.or_else(|| self.table.run_with_result(lock, token))?;
        Some(self.run_status(run))
    }

    fn run_status(&self, run: &Run) -> RunStatus {
        let age_ms = millis(run.age(self.now));
        RunStatus { outcome: run.outcome, token: run.token, age_ms, by: run.by.clone() }
    }

    /// Returns what to record of a run.
    pub(super) fn run_record(&self, run: &Run) -> RunRecord {
        let began_unix_ms = clock::unix_ms().saturating_sub(millis(run.age(self.now)));
        RunRecord { run: run.clone(), began_unix_ms }
    }

    /// Returns the first [`LISTED_MAX`] holders of a lock, for a client that asks for it; none if the table does not have it.
    pub(super) fn holders_of(&self, viewer: Viewer, lock: LockId) -> Vec<LockUser> {
        let Some(lock) = self.table.find(lock) else { return Vec::new() };
        let party = |holder: RequestView<'_>| {
            let mut party = self.party(lock.id(), &holder);
            viewer.conceal(&mut party, holder.is_remote, true);
            party
        };
        lock.holders().take(LISTED_MAX).map(party).collect()
    }

    fn party(&self, lock: LockId, request: &RequestView<'_>) -> LockUser {
        if request.is_remote
            && let Some(party) = self.cluster.and_then(|cluster| cluster.remote_holder(lock))
        {
            return party;
        }
        let orphan = request.held.filter(|_| request.client.is_none()).map(|held| held.token);
        let process = request.client.and_then(|client| self.connections[client].process());
        let mut who = request.asked.map(|asked| asked.who.clone()).unwrap_or_default();
        let pid_of = |token| self.orphans.pid(token);
        if let Some(pid) = process.or_else(|| orphan.and_then(pid_of)) {
            who.pid = Some(pid);
        } else if request.client.is_some_and(|client| self.connections[client].forwarded) {
            // A local client must not pass for another process. On another machine the number is of that one.
            who.pid = who.pid.filter(|_| !who.host.is_empty() && !is_here(who.host.as_str()));
        }
        if let Some(name) = self.name(request) {
            who.user = name.into();
        }
        LockUser {
            protocol: request.terms.protocol,
            uid: self.uid(request),
            who,
            for_ms: self.now.0.saturating_sub(request.since.0),
            token: request.held.map(|held| held.token),
            mode: request.held.is_none().then_some(request.asked.map_or(Mode::Once, |asked| asked.mode)),
            shared: request.terms.shared,
            orphan: orphan.is_some_and(|token| self.orphans.awaits_resume(token)),
        }
    }

    /// Describes why a request for `lock`, made under the lock with the token `within`, would never be granted.
    pub(super) fn describe_cycle(&self, within: Token, lock: LockId) -> String {
        let cycle = self.table.cycle(within, lock).unwrap_or_default();
        let steps = cycle.iter().take(LISTED_MAX).map(|&(id, token)| {
            let holder = self.table.find(id).and_then(|lock| {
                lock.holders().find(|holder| holder.held.is_some_and(|held| held.token == token))
            });
            let pid = Pid::number(holder.and_then(|holder| self.party(id, &holder).who.pid));
            format!("{} is held by pid {pid}", self.lock_name(id))
        });
        let steps: Vec<String> = steps.collect();
        format!("{}, under which this runs", steps.join(", which waits: "))
    }

    /// Returns what to record of the lock that a client holds; `None` if it holds none.
    pub(super) fn record_of_client(&self, client: ClientId) -> Option<HoldRecord> {
        let (held, granted) = self.table.hold_of(client)?;
        Some(self.record(client, held, granted))
    }

    fn record_of(&self, request: &RequestView<'_>) -> Option<HoldRecord> {
        let held = request.held?;
        match request.client {
            Some(client) => Some(self.record(client, held, request.since)),
            None => self.orphans.record(held.token).cloned(),
        }
    }

    fn record(&self, client: ClientId, held: HoldState, granted: Timestamp) -> HoldRecord {
        let connection = &self.connections[client];
        // The daemon does not know the process of a client on another machine, and a process id that the client sends means
        // nothing on this host.
        let pid = connection.process();
        let child = connection.child().and_then(Named::known);
        let recorded = connection.recorded().unwrap_or(granted);
        HoldRecord { held, pid, child, granted, recorded }
    }

    /// Returns everything that is to be recorded.
    pub(super) fn records(&self) -> Snapshot {
        let runs = self.table.runs(self.now).map(|run| self.run_record(run)).collect();
        Snapshot { holds: self.holds(), runs }
    }

    fn holds(&self) -> Vec<HoldRecord> {
        let mut records = Vec::new();
        let mut cursor = 0;
        while let Some((lock, next)) = self.table.next_lock(cursor) {
            records.extend(lock.holders().filter_map(|holder| self.record_of(&holder)));
            cursor = next;
        }
        records
    }
}
