//! Protocol 2 in the daemon: its lines to the table, and the table's effects to its lines.

use log::warn;
use nix::unistd::Uid;

use super::connection::{OUTPUT_BYTES_MAX, Protocol};
use super::failpoint;
use super::server::Server;
use crate::proto::v1::State;
use crate::proto::v2::{
    Answer, ErrorCode, FRAME_BYTES_MAX, LISTED_MAX, LockRequest, LockStatus, Mode, Party, Request,
    decode_request, encode, error,
};
use crate::proto::{Key, LockId, Outcome, Token};
use crate::table::{ClientId, Effect, Held, LockView, Loss, RequestView, What};

/// A status goes on when less than this waits to be sent. A lock of it may be as long as a frame.
const STATUS_BYTES_AHEAD: usize = OUTPUT_BYTES_MAX - FRAME_BYTES_MAX;

pub(super) fn hello() -> Answer {
    Answer::Hello { version: env!("CARGO_PKG_VERSION").into(), pid: std::process::id() }
}

pub(super) fn cannot_record() -> Answer {
    error(ErrorCode::CannotRecord, "the lock cannot be recorded, so it is not given; see the daemon's log")
}

impl Server {
    /// Takes one line from the front of `input`. False: there is no whole one.
    pub(super) fn received_v2(&mut self, client: ClientId, input: &mut &[u8]) -> bool {
        let within = &input[..input.len().min(FRAME_BYTES_MAX)];
        let Some(end) = memchr::memchr(b'\n', within) else {
            if input.len() >= FRAME_BYTES_MAX {
                let message = format!("a line is longer than {FRAME_BYTES_MAX} bytes");
                self.answer(client, &error(ErrorCode::BadFrame, message));
                self.close_after_flush(client, "its line is too long");
            }
            return false;
        };
        let (line, rest) = input.split_at(end + 1);
        *input = rest;
        match decode_request(line) {
            Ok(request) => self.request(client, request),
            Err(answer) => {
                self.answer(client, &answer);
                if matches!(answer, Answer::Error { code: ErrorCode::BadFrame, .. }) {
                    self.close_after_flush(client, "it does not speak the protocol");
                }
            }
        }
        true
    }

    fn request(&mut self, client: ClientId, request: Request) {
        let wrong_state = |message: &str| error(ErrorCode::WrongState, message);
        match (request, self.table.state(client)) {
            (Request::Lock(asked), State::Idle) => self.lock(client, asked),
            (Request::Lock(_), _) => {
                self.answer(client, &wrong_state("lock: this connection has a lock, or waits for one"));
            }
            (Request::Child { pid }, State::Owner) => {
                failpoint::hit("child");
                self.connections[client.0 as usize].child = pid;
                self.record_hold(client);
            }
            // It has lost the lock meanwhile, and was told.
            (Request::Child { .. }, _) => {}
            (Request::Unlock { key, pid, outcome }, _) => self.unlock(client, &key, pid, outcome),
            (Request::Break { key }, _) => self.break_lock(client, &key),
            (Request::Release { outcome }, State::Owner) => {
                self.log_release(client, outcome);
                self.apply(|table, now, effects| table.release(now, client, outcome, effects));
                self.answer(client, &Answer::Released);
            }
            (Request::Release { .. }, _) => {
                self.answer(client, &wrong_state("release: this connection holds no lock"));
            }
            (Request::Status { cluster: true, .. }, _) => self.status_of_cluster(client),
            (Request::Status { key: Some(key), .. }, _) => self.status_of(client, &key),
            (Request::Status { key: None, .. }, _) => {
                match &mut self.connections[client.0 as usize].protocol {
                    Protocol::V2 { status: status @ None } => *status = Some(0),
                    _ => return self.answer(client, &wrong_state("status: one is under way")),
                }
                self.mark_dirty(client);
            }
            (Request::Ping, state) => {
                let lease = self.lease_terms().filter(|_| state == State::Owner);
                self.answer(client, &Answer::Pong { lease });
            }
        }
    }

    fn lock(&mut self, client: ClientId, mut asked: Box<LockRequest>) {
        let connection = &mut self.connections[client.0 as usize];
        connection.child = asked.child.unwrap_or(0);
        let uid = connection.peer().map(|peer| peer.uid);
        if self.is_sharing() && (asked.shared || asked.slots > 1) {
            let message =
                "lock: shared locks and slots are for one host alone, and this daemon shares its locks";
            return self.answer(client, &error(ErrorCode::PerHost, message));
        }
        if let Some(child) = asked.child
            && asked.holds.is_none()
            && self.hold_of_process(asked.key.id(), child).is_some()
        {
            let message = format!("lock: process {child} holds this lock");
            return self.answer(client, &error(ErrorCode::HeldAbove, message));
        }
        if self.now > self.started.plus(self.grace) {
            // Whoever waited for the daemon before has come by now, and nobody else goes before those who wait.
            asked.place = None;
        }
        if self.apply(|table, now, effects| table.lock(now, client, uid, asked, effects)).is_err() {
            let message = "lock: this nonce names another request";
            self.answer(client, &error(ErrorCode::NotPermitted, message));
        }
    }

    /// Ends a hold that was left to a process.
    fn unlock(&mut self, client: ClientId, key: &Key, pid: u32, outcome: Outcome) {
        let by = self.connections[client.0 as usize].peer().map(|peer| peer.uid);
        let held = self
            .hold_of_process(key.id(), pid)
            .filter(|held| by == Some(0) || (by.is_some() && by == held.uid));
        let Some(held) = held else {
            let message = format!("unlock: process {pid} does not hold this lock");
            return self.answer(client, &error(ErrorCode::NotHeld, message));
        };
        self.apply(|table, now, effects| table.release_orphan(now, held.token, outcome, effects));
        self.answer(client, &Answer::Released);
    }

    /// The hold of a lock that was left to this process, if there is one.
    fn hold_of_process(&self, lock: LockId, pid: u32) -> Option<Held> {
        let lock = self.table.find(lock)?;
        let mut left =
            lock.holders().filter(|holder| holder.client.is_none()).filter_map(|holder| holder.held);
        left.find(|held| self.recorder.orphans.is_held_by(held.token, pid))
    }

    /// Root, the daemon's own user, and whoever holds the lock may break it.
    fn break_lock(&mut self, client: ClientId, key: &Key) {
        let by = self.connections[client.0 as usize].peer().map(|peer| peer.uid);
        let lock = self.table.find(key.id());
        let holders: Vec<_> =
            lock.iter().flat_map(LockView::holders).map(|holder| self.uid(&holder)).collect();
        let permitted = by.is_some_and(|uid| {
            uid == 0 || uid == Uid::effective().as_raw() || holders.iter().all(|holder| *holder == Some(uid))
        });
        let is_here = self.table.held_here(key.id()).is_some();
        if !is_here && self.is_sharing() && by.is_some_and(|uid| uid == 0 || uid == Uid::effective().as_raw())
        {
            return self.break_elsewhere(client, key);
        }
        if holders.is_empty() {
            let message = "break: nobody holds this lock";
            return self.answer(client, &error(ErrorCode::NotHeld, message));
        }
        if !permitted {
            let message = "break: only root, the daemon's user, or the holder's may";
            return self.answer(client, &error(ErrorCode::NotPermitted, message));
        }
        warn!("{} breaks the lock {:?}", self.name(client), key.as_str());
        self.apply(|table, now, effects| table.break_lock(now, key.id(), effects));
        self.answer(client, &Answer::Broken);
    }

    fn uid(&self, request: &RequestView<'_>) -> Option<u32> {
        match request.client {
            Some(client) => self.connections[client.0 as usize].peer().map(|peer| peer.uid),
            None => request.held.and_then(|held| held.uid),
        }
    }

    pub(super) fn answer(&mut self, client: ClientId, answer: &Answer) {
        encode(answer, self.connections[client.0 as usize].output());
        self.mark_dirty(client);
    }

    pub(super) fn notify_v2(&mut self, effect: Effect) {
        let holders = || self.table.find(effect.lock).map_or(Vec::new(), |lock| self.holders(&lock));
        let answer = match effect.what {
            What::Granted(token) => Answer::Granted { token, lease: self.lease_terms() },
            What::Waiting { ahead, place } => Answer::Waiting { holders: holders(), ahead, place },
            What::Finished(outcome, token) => Answer::Finished { outcome, token },
            What::Busy => Answer::Busy { holders: holders() },
            What::Lost(Loss::Unknown) => Answer::Lost { why: "the daemon does not know of it".into() },
            What::Lost(Loss::Elsewhere) => {
                Answer::Lost { why: "its lease in etcd is lost, or its key there was removed".into() }
            }
            What::Lost(Loss::Broken) => Answer::Lost { why: "it was broken".into() },
            What::Expired => Answer::Lost { why: "its time is up".into() },
            What::HeldAbove => {
                let name = self.lock_name(effect.lock);
                error(
                    ErrorCode::HeldAbove,
                    format!("lock: {name} is held by the command that this is part of"),
                )
            }
            What::Deadlock(within) => error(ErrorCode::Deadlock, self.describe_cycle(within, effect.lock)),
            What::Unavailable => error(
                ErrorCode::Unavailable,
                "etcd cannot be asked whether the lock is free; see the daemon's log",
            ),
            // That connection is not listened to any more.
            What::Superseded => return,
        };
        self.answer(effect.client, &answer);
    }

    /// Who waits for whom, for people.
    fn describe_cycle(&self, within: Token, lock: LockId) -> String {
        let cycle = self.table.cycle(within, lock).unwrap_or_default();
        let steps = cycle.iter().map(|(lock, token)| {
            let lock_id = *lock;
            let holder = self.table.find(lock_id).and_then(|lock| {
                lock.holders().find(|holder| holder.held.is_some_and(|held| held.token == *token))
            });
            let pid = holder.map_or(0, |holder| self.party(lock_id, &holder).who.pid);
            format!("{} is held by pid {pid}", self.lock_name(*lock))
        });
        let steps: Vec<String> = steps.collect();
        format!("{}, under which this runs", steps.join(", which waits: "))
    }

    fn status_of(&mut self, client: ClientId, key: &Key) {
        if let Some(lock) = self.table.find(key.id()) {
            let status = self.lock_status(&lock, Some(key.as_str()));
            self.answer(client, &Answer::Lock(status));
        }
        self.answer(client, &Answer::End);
    }

    fn status_of_cluster(&mut self, client: ClientId) {
        if !self.is_sharing() {
            let message = "status: this daemon shares no locks with other hosts";
            self.answer(client, &error(ErrorCode::BadRequest, message));
        } else if !self.list_cluster(client) {
            self.answer(client, &error(ErrorCode::WrongState, "status: one is under way"));
        }
    }

    /// Writes as much of a status as there is room for: a client that asks for all locks must not make the daemon keep
    /// all of them for it at once.
    pub(super) fn continue_status(&mut self, client: ClientId) {
        if !self.connections[client.0 as usize].closing {
            self.continue_listing(client, |waiting| waiting < STATUS_BYTES_AHEAD);
        }
        loop {
            let connection = &mut self.connections[client.0 as usize];
            let Protocol::V2 { status: Some(cursor) } = connection.protocol else { return };
            if connection.closing || connection.output().len() >= STATUS_BYTES_AHEAD {
                return;
            }
            let (answer, status) = match self.table.next_lock(cursor as usize) {
                Some((lock, next)) => {
                    let status = self.lock_status(&lock, lock.key());
                    (Answer::Lock(status), Some(next as u32))
                }
                None => (Answer::End, None),
            };
            let connection = &mut self.connections[client.0 as usize];
            connection.protocol = Protocol::V2 { status };
            encode(&answer, connection.output());
        }
    }

    fn lock_status(&self, lock: &LockView<'_>, key: Option<&str>) -> LockStatus {
        let waiters = lock.waiters().take(LISTED_MAX).map(|waiter| self.party(lock.id(), &waiter)).collect();
        LockStatus {
            key: key.map(Into::into),
            id: lock.id().to_string(),
            holders: self.holders(lock),
            holding: lock.holding(),
            waiters,
            waiting: lock.waiting(),
        }
    }

    fn holders(&self, lock: &LockView<'_>) -> Vec<Party> {
        lock.holders().take(LISTED_MAX).map(|holder| self.party(lock.id(), &holder)).collect()
    }

    fn party(&self, lock: LockId, request: &RequestView<'_>) -> Party {
        if request.is_elsewhere
            && let Some(party) = self.holder_elsewhere(lock)
        {
            return party;
        }
        let orphan = request.held.filter(|_| request.client.is_none()).map(|held| held.token);
        let peer = request.client.and_then(|client| self.connections[client.0 as usize].peer());
        let mut who = request.asked.map(|asked| asked.who.clone()).unwrap_or_default();
        let pid_of = |token| self.recorder.orphans.pid(token);
        if let Some(pid) = peer.map(|peer| peer.pid).or_else(|| orphan.and_then(pid_of)) {
            who.pid = pid;
        }
        Party {
            protocol: request.terms.protocol,
            uid: self.uid(request),
            who,
            for_ms: self.now.0.saturating_sub(request.since.0),
            token: request.held.map(|held| held.token),
            mode: request.held.is_none().then_some(request.asked.map_or(Mode::Once, |asked| asked.mode)),
            shared: request.terms.shared,
            orphan: orphan.is_some_and(|token| self.recorder.orphans.awaits_resume(token)),
        }
    }

    /// A lock's key if it is known, and else its identity, for the log.
    pub(super) fn lock_name(&self, id: LockId) -> String {
        match self.table.find(id).and_then(|lock| lock.key().map(|key| format!("{key:?}"))) {
            Some(key) => key,
            None => id.to_string(),
        }
    }
}
