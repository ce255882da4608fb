//! What the daemon logs. Start and stop are `info`; what concerns one client is `debug`. What an administrator should know of
//! a client is `warn`, and not more than once a second, so that no client fills the log.

use std::collections::BTreeMap;
use std::time::Duration;

use log::{debug, log_enabled, warn};

use super::lookup::Lookup;
use crate::proto::Outcome;
use crate::table::{ClientId, Notification, NotificationKind, Timestamp};

/// Logs what a client is about to be told.
pub(super) fn notification(lookup: Lookup<'_>, notification: Notification) {
    let (client, lock) = (lookup.client_name(notification.client), lookup.lock_name(notification.lock));
    match notification.kind {
        NotificationKind::Granted(token) => debug!("grant: {lock} to {client}, token {token}"),
        NotificationKind::Offered => debug!("offer: {lock} to {client}"),
        NotificationKind::Waiting { ahead, .. } => debug!("wait: {client} for {lock}, behind {ahead}"),
        NotificationKind::Finished(outcome, token) => {
            debug!("finished: {lock}, token {token}: {outcome}, told {client}")
        }
        NotificationKind::Fresh(token) => debug!("fresh: {lock}, token {token}, told {client}"),
        NotificationKind::NewerRequest => debug!("superseded: {lock}, told {client}"),
        NotificationKind::Stop => debug!("stop: {lock}, told {client}"),
        NotificationKind::SlotsDiffer { slots, .. } => {
            debug!("refused: {client} for {lock}, of {slots} slots")
        }
        NotificationKind::Busy => debug!("busy: {lock}, told {client}"),
        NotificationKind::Unavailable => debug!("unavailable: {lock}, told {client}"),
        NotificationKind::HeldAbove => {
            debug!("refused: {client} runs under the lock {lock} that it asks for")
        }
        NotificationKind::Deadlock(_) => debug!("refused: {client} waiting for {lock} would be a deadlock"),
        NotificationKind::Expired => debug!("expire: {lock}, held by {client}"),
        NotificationKind::Lost(why) => debug!("lost: {lock}, told {client}: {why:?}"),
        NotificationKind::Superseded => debug!("resume: {lock}, no longer by {client}"),
    }
}

/// Logs that a client releases the lock that it holds.
pub(super) fn release(lookup: Lookup<'_>, client: ClientId, outcome: Outcome) {
    if let Some((lock, _)) = lookup.table.request_of(client) {
        debug!("release: {} by {}: {outcome}", lookup.lock_name(lock.id()), lookup.client_name(client));
    }
}

/// Returns `true` if [`notification`] and [`release`] have any effect.
pub(super) fn is_verbose() -> bool {
    log_enabled!(log::Level::Debug)
}

/// What clients can cause to be logged at the default level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    Break,
    Unwatched,
    PeerLost,
}

/// How often the same event of the same user is logged.
const EVERY: Duration = Duration::from_secs(1);

/// Counts what is not logged, by event and user. (All clients over TCP are one user.)
#[derive(Default)]
pub(super) struct Limiter(BTreeMap<(Event, Option<u32>), Recent>);

struct Recent {
    until: Timestamp,
    left_out: u64,
}

impl Limiter {
    /// Returns `true` if this event of this user is to be logged. If not, it is counted.
    pub(super) fn allows(&mut self, event: Event, uid: Option<u32>, now: Timestamp) -> bool {
        self.report(now);
        match self.0.get_mut(&(event, uid)) {
            Some(recent) => {
                recent.left_out += 1;
                false
            }
            None => {
                self.0.insert((event, uid), Recent { until: now.plus(EVERY), left_out: 0 });
                true
            }
        }
    }

    /// When [`Limiter::report`] is next needed.
    pub(super) fn next_report(&self) -> Option<Timestamp> {
        self.0.values().filter(|recent| recent.left_out > 0).map(|recent| recent.until).min()
    }

    /// Logs how many lines were left out in the last second.
    pub(super) fn report(&mut self, now: Timestamp) {
        self.0.retain(|(event, uid), recent| {
            if now < recent.until {
                return true;
            }
            if recent.left_out > 0 {
                warn!("{} more lines like that left out ({event:?}, {})", recent.left_out, user(*uid));
            }
            false
        });
    }
}

fn user(uid: Option<u32>) -> String {
    uid.map_or("over TCP".into(), |uid| format!("uid {uid}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_of_a_user_is_logged_once_a_second() {
        let mut limiter = Limiter::default();
        let at = Timestamp;
        assert!(limiter.allows(Event::Break, Some(1), at(0)));
        assert_eq!(limiter.next_report(), None, "nothing was left out");
        for now in 0..1000 {
            assert!(!limiter.allows(Event::Break, Some(1), at(now)));
        }
        assert_eq!(limiter.next_report(), Some(at(1000)));
        assert!(limiter.allows(Event::Break, Some(2), at(999)), "another user");
        assert!(limiter.allows(Event::Unwatched, Some(1), at(999)), "another event");
        assert!(limiter.allows(Event::Break, Some(1), at(1000)), "a second later");
        limiter.report(at(2000));
        assert_eq!(limiter.next_report(), None);
        assert!(limiter.0.is_empty(), "what is old is forgotten");
    }
}
