//! Attempts to show a secret, in the order in which they are verified: one at a time for each origin, and after one that
//! failed the origin waits for a second.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use super::connection::ConnectionId;
use super::identity::Origin;
use crate::proto::Secret;
use crate::timestamp::Timestamp;

/// How long an origin waits after an attempt that failed, and how long the client waits for that answer.
const PAUSE: Duration = Duration::from_secs(1);
/// How many attempts of one origin wait at most.
const WAITING_MAX: usize = 64;

/// One client's attempt.
pub(super) struct Attempt {
    pub(super) client: ConnectionId,
    pub(super) name: Box<str>,
    pub(super) secret: Secret,
}

#[derive(Default)]
pub(super) struct Attempts {
    lines: HashMap<Origin, Line>,
    /// The origins whose first attempt may be verified.
    turn: VecDeque<Origin>,
    /// The origins that wait after a failure, by when they may go on, and the client whose attempt failed.
    paused: BTreeMap<(Timestamp, Origin), ConnectionId>,
}

/// The attempts of one origin. There is one as long as it has attempts, or waits after a failure.
#[derive(Default)]
struct Line {
    waiting: VecDeque<Attempt>,
    /// An attempt of this origin is being verified, or has just failed.
    is_held: bool,
}

impl Attempts {
    /// Appends an attempt. Returns `false`, and drops it, if too many of its origin wait.
    pub(super) fn push(&mut self, origin: Origin, attempt: Attempt) -> bool {
        let line = self.lines.entry(origin).or_default();
        if line.waiting.len() >= WAITING_MAX {
            return false;
        }
        line.waiting.push_back(attempt);
        if !line.is_held && line.waiting.len() == 1 {
            self.turn.push_back(origin);
        }
        true
    }

    /// Takes the next attempt to verify. [`Attempts::verified`] must follow before the next one of its origin is taken.
    pub(super) fn next(&mut self) -> Option<(Origin, Attempt)> {
        while let Some(origin) = self.turn.pop_front() {
            let line = self.lines.get_mut(&origin);
            // Its last attempt may have been cancelled meanwhile.
            if let Some(line) = line
                && let Some(attempt) = line.waiting.pop_front()
            {
                line.is_held = true;
                return Some((origin, attempt));
            }
        }
        None
    }

    /// Lets the origin go on: at once if the attempt succeeded, else after a pause, with whose end
    /// [`Attempts::pop_failed`] returns the client.
    pub(super) fn verified(&mut self, origin: Origin, client: ConnectionId, now: Timestamp, is_good: bool) {
        match is_good {
            true => self.go_on(origin),
            false => {
                self.paused.insert((now.plus(PAUSE), origin), client);
            }
        }
    }

    /// Returns when [`Attempts::pop_failed`] is next needed.
    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        self.paused.first_key_value().map(|(&(until, _), _)| until)
    }

    /// Returns a client whose attempt failed, once the pause for it is over.
    pub(super) fn pop_failed(&mut self, now: Timestamp) -> Option<ConnectionId> {
        let entry = self.paused.first_entry().filter(|entry| entry.key().0 <= now)?;
        let ((_, origin), client) = entry.remove_entry();
        self.go_on(origin);
        Some(client)
    }

    /// Drops the attempts of a client that has gone.
    pub(super) fn cancel(&mut self, origin: Origin, client: ConnectionId) {
        let Some(line) = self.lines.get_mut(&origin) else { return };
        line.waiting.retain(|attempt| attempt.client != client);
        if line.waiting.is_empty() && !line.is_held {
            self.lines.remove(&origin);
            self.turn.retain(|&other| other != origin);
        }
    }

    fn go_on(&mut self, origin: Origin) {
        let Some(line) = self.lines.get_mut(&origin) else { return };
        line.is_held = false;
        match line.waiting.is_empty() {
            true => drop(self.lines.remove(&origin)),
            false => self.turn.push_back(origin),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::table::ClientId;

    fn id(number: u32) -> ConnectionId {
        ConnectionId { client: ClientId(number), generation: 1 }
    }

    fn origin(last: u8) -> Origin {
        Origin::from(IpAddr::from([192, 0, 2, last]))
    }

    fn push(attempts: &mut Attempts, from: u8, client: u32) -> bool {
        let secret = Secret::new("x").unwrap();
        attempts.push(origin(from), Attempt { client: id(client), name: "ci".into(), secret })
    }

    fn next(attempts: &mut Attempts) -> Option<u32> {
        attempts.next().map(|(_, attempt)| attempt.client.client.0)
    }

    #[test]
    fn an_origin_waits_after_a_failure_and_others_do_not() {
        let mut attempts = Attempts::default();
        for (from, client) in [(1, 10), (1, 11), (2, 20)] {
            assert!(push(&mut attempts, from, client));
        }
        assert_eq!(next(&mut attempts), Some(10));
        assert_eq!(next(&mut attempts), Some(20), "one at a time of the first origin");
        attempts.verified(origin(1), id(10), Timestamp(5000), false);
        attempts.verified(origin(2), id(20), Timestamp(5000), true);
        assert_eq!(next(&mut attempts), None);
        assert_eq!(attempts.pop_failed(Timestamp(5999)), None);
        assert_eq!(attempts.next_deadline(), Some(Timestamp(6000)));
        assert_eq!(attempts.pop_failed(Timestamp(6000)), Some(id(10)));
        assert_eq!(next(&mut attempts), Some(11));
        attempts.verified(origin(1), id(11), Timestamp(6000), true);
        assert!(attempts.lines.is_empty() && attempts.turn.is_empty() && attempts.paused.is_empty());
    }

    #[test]
    fn a_pause_holds_for_attempts_that_come_during_it() {
        let mut attempts = Attempts::default();
        push(&mut attempts, 1, 10);
        next(&mut attempts);
        attempts.verified(origin(1), id(10), Timestamp(0), false);
        push(&mut attempts, 1, 11);
        assert_eq!(next(&mut attempts), None);
        assert_eq!(attempts.pop_failed(Timestamp(1000)), Some(id(10)));
        assert_eq!(next(&mut attempts), Some(11));
    }

    #[test]
    fn what_a_client_that_has_gone_asked_is_not_verified() {
        let mut attempts = Attempts::default();
        push(&mut attempts, 1, 10);
        push(&mut attempts, 1, 11);
        attempts.cancel(origin(1), id(10));
        assert_eq!(next(&mut attempts), Some(11));
        push(&mut attempts, 2, 20);
        attempts.cancel(origin(2), id(20));
        assert_eq!(next(&mut attempts), None);
        assert_eq!(attempts.lines.len(), 1);
    }

    #[test]
    fn only_so_many_attempts_of_an_origin_wait() {
        let mut attempts = Attempts::default();
        let taken = (0..100).filter(|&client| push(&mut attempts, 1, client)).count();
        assert_eq!(taken, WAITING_MAX);
        assert!(push(&mut attempts, 2, 200));
    }
}
