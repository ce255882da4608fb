//! The table's effects: what is noted for the journal, and what clients are told.

use std::time::Duration;

use ::log::warn;

use super::{Server, TURN_MAX};
use crate::daemon::log;
use crate::daemon::recorder::Grant;
use crate::proto::Protocol;
use crate::table::{ClientId, Effects, JournalEntry, Notification, NotificationKind, Table, Timestamp};

/// How often the log says that runs are forgotten.
const WARN_EVERY: Duration = Duration::from_secs(60);
/// Reading the clock takes a while, compared with telling a client something.
const NOTIFICATIONS_BETWEEN_CLOCKS: usize = 64;

impl Server {
    /// Lets the table handle an event, and carries out its effects.
    pub(super) fn apply<T>(&mut self, event: impl FnOnce(&mut Table, Timestamp, &mut Effects) -> T) -> T {
        let result = event(&mut self.table, self.now, &mut self.effects);
        self.dispatch_effects();
        result
    }

    /// Notes what the table wants recorded, then writes what it wants clients to be told into their output.
    pub(super) fn dispatch_effects(&mut self) {
        if let Some(cluster) = &mut self.cluster {
            self.effects.notices.drain(..).for_each(|notice| cluster.notify(notice));
        }
        while let Some((lock, token)) = self.effects.results_gone.pop() {
            self.outputs.drop_result(lock, token);
        }
        // Taken and put back, so that neither is allocated anew each time.
        let mut record = std::mem::take(&mut self.effects.record);
        for change in record.drain(..) {
            self.record(change);
        }
        self.effects.record = record;
        self.notify_clients();
        self.warn_of_dropped_runs();
    }

    /// Tells clients what the table has decided. If that takes too long, the rest is left to the next turns, which handle no event of
    /// a client before ([`Server::is_behind`]).
    pub(super) fn notify_clients(&mut self) {
        if !self.is_behind() {
            return;
        }
        let mut notifications = std::mem::take(&mut self.effects.notifications);
        let mut told = 0;
        while let Some(&notification) = notifications.get(told) {
            if told > 0 && told % NOTIFICATIONS_BETWEEN_CLOCKS == 0 && self.is_over(TURN_MAX) {
                break;
            }
            told += 1;
            // A client may have gone meanwhile, or its grant may have been taken back.
            if self.connections.contains(notification.client)
                && !self.connections[notification.client].closing
            {
                self.notify(notification);
            }
        }
        match notifications.len() {
            all if all == told => notifications.clear(),
            _ => drop(notifications.drain(..told)),
        }
        // To tell one client may have had effects on others.
        if self.is_behind() {
            notifications.append(&mut self.effects.notifications);
        }
        self.effects.notifications = notifications;
    }

    pub(super) fn notify(&mut self, notification: Notification) {
        if log::is_verbose() {
            log::notification(self.lookup(), notification);
        }
        match self.connections[notification.client].protocol() {
            Protocol::V1 => self.notify_v1(notification),
            Protocol::V2 => self.notify_v2(notification),
        }
        match notification.kind {
            NotificationKind::Expired => self.close_after_flush(notification.client, "hold limit exceeded"),
            NotificationKind::Superseded => {
                self.close_after_flush(notification.client, "resumed on another connection")
            }
            _ => {}
        }
    }

    /// Returns `true` if clients wait to be told what was decided earlier. No client is answered anything else before.
    pub(super) fn is_behind(&self) -> bool {
        !self.effects.notifications.is_empty()
    }

    /// Warns that the table forgot runs that still counted: once in a while, since that goes on.
    fn warn_of_dropped_runs(&mut self) {
        let dropped = std::mem::take(&mut self.effects.runs_dropped);
        if dropped > 0 && self.warned_of_runs.is_none_or(|last| self.now >= last.plus(WARN_EVERY)) {
            warn!("more locks than --remember-max have runs that count: the oldest are forgotten");
            self.warned_of_runs = Some(self.now);
        }
    }

    /// Notes a change, to be written to the journal with the others of this turn.
    pub(super) fn record(&mut self, change: JournalEntry) {
        match change {
            JournalEntry::Granted(client) => {
                // The client is told of the grant next, behind its present output.
                let output_before = self.connections[client].output().len();
                self.recorder.granted(Grant { client, output_before });
                self.connections[client].set_recorded(None);
                self.record_hold(client);
            }
            JournalEntry::Resumed(client) => {
                if let Some((_, request)) = self.table.request_of(client)
                    && let Some(held) = &request.held
                {
                    let token = held.token;
                    self.forget_orphan(token);
                }
                self.connections[client].set_recorded(Some(self.now));
                self.record_hold(client);
            }
            JournalEntry::Ended(token) => {
                self.forget_orphan(token);
                self.recorder.hold_ended(token);
                self.output_ended(token);
            }
            JournalEntry::Ran(lock, token) => {
                let runs = self.table.last_runs(self.now, lock);
                let run = runs.into_iter().flatten().find(|run| run.token == token).cloned();
                if let Some(run) = run {
                    self.recorder.run(&self.lookup().run_record(&run));
                    let dropped = self.outputs.keep(&run, self.now);
                    self.results_dropped(dropped);
                }
            }
            JournalEntry::RunForgotten(lock, token) => {
                self.recorder.forget_run(token);
                let dropped = self.outputs.forget(lock);
                self.results_dropped(dropped);
            }
        }
    }

    /// Notes what a client holds now.
    pub(super) fn record_hold(&mut self, client: ClientId) {
        if let Some(record) = self.lookup().record_of_client(client) {
            self.recorder.hold(&record);
        }
    }
}
