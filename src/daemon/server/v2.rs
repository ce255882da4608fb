//! Protocol 2 in the daemon: its lines to the table, and the table's effects to its lines.

use std::os::fd::AsFd;
use std::time::Duration;

use ::log::{debug, warn};
use nix::unistd::Uid;

use super::Server;
use crate::clock;
use crate::daemon::admission::{Access, Limit};
use crate::daemon::cluster::Clustering;
use crate::daemon::failpoint;
use crate::daemon::log;
use crate::daemon::named::{self, Named};
use crate::daemon::remote::{FORGET_REFUSED, RemoteRequest};
use crate::daemon::reserve::{Claimant, Decision};
use crate::proto::v1::State;
use crate::proto::v2::{
    Answer, ErrorCode, FRAME_BYTES_MAX, LockRequest, Request, Share, decode_request, error, proof,
};
use crate::proto::{self, Key, Outcome};
use crate::table::{ClientId, Loss, Notification, NotificationKind, RequestView, Timestamp};
use crate::timestamp::millis;

/// `peer_timeout`: for a client on another machine.
pub(super) fn hello(peer_timeout: Option<Duration>) -> Answer {
    let peer_timeout_ms = peer_timeout.map(millis);
    Answer::Hello { version: env!("CARGO_PKG_VERSION").into(), pid: std::process::id(), peer_timeout_ms }
}

pub(super) fn cannot_record() -> Answer {
    error(ErrorCode::CannotRecord, "the lock cannot be recorded, so it is not granted; see the daemon's log")
}

/// Says why a holder has lost its lock.
pub(super) fn describe_loss(loss: Loss) -> &'static str {
    match loss {
        Loss::Unknown => "the daemon does not know of it",
        Loss::LeaseLost => "its lease in etcd is lost, or its key there was removed",
        Loss::Broken => "broken by `kmutex break`",
    }
}

/// Returns the key of a request that has one.
fn key_of(request: &mut Request) -> Option<&mut Key> {
    match request {
        Request::Lock(asked) => Some(&mut asked.key),
        Request::Unlock { key, .. } | Request::Break { key } | Request::Forget { key } => Some(key),
        Request::Status { key, .. } => key.as_mut(),
        _ => None,
    }
}

impl Server {
    /// Takes one line from the front of `input`. Returns `false` if there is no whole line.
    pub(super) fn received_v2(&mut self, client: ClientId, input: &mut &[u8]) -> bool {
        let within = &input[..input.len().min(FRAME_BYTES_MAX)];
        let Some(end) = memchr::memchr(b'\n', within) else {
            if input.len() >= FRAME_BYTES_MAX {
                let message = format!("a line is longer than {FRAME_BYTES_MAX} bytes");
                self.refuse(client, ErrorCode::BadFrame, message);
                self.close_after_flush(client, "line too long");
            }
            return false;
        };
        let (line, rest) = input.split_at(end + 1);
        match decode_request(line) {
            Ok(request) if self.may_request(client, line) => {
                if !self.request(client, request) {
                    // The line is handled again when the daemon knows more.
                    return true;
                }
            }
            Ok(_) => {
                self.connections.received = None;
                let message = "a command has inherited this connection: its requests need a proof";
                self.refuse(client, ErrorCode::NotPermitted, message);
            }
            Err(answer) => {
                self.connections.answer(client, &answer);
                if matches!(answer, Answer::Error { code: ErrorCode::BadFrame, .. }) {
                    self.close_after_flush(client, "protocol violation");
                }
            }
        }
        *input = rest;
        true
    }

    /// Returns `true` if a request on a connection that a command has inherited comes from the client itself.
    fn may_request(&self, client: ClientId, line: &[u8]) -> bool {
        match self.connections[client].guard() {
            None => true,
            Some(nonce) => proof(line) == Some(nonce),
        }
    }

    /// Tells a client that there are too many, and closes its connection.
    pub(super) fn too_many(&mut self, client: ClientId, limit: Limit) {
        self.refuse(client, ErrorCode::TooMany, limit.message());
        self.close_after_flush(client, "too many connections");
    }

    pub(super) fn refuse(&mut self, client: ClientId, code: ErrorCode, message: impl Into<String>) {
        self.connections.answer(client, &error(code, message));
    }

    /// Handles a request. Returns `false` if it can only be handled later; until then, nothing more is read from the client.
    fn request(&mut self, client: ClientId, mut request: Request) -> bool {
        if !matches!(request, Request::Auth { .. }) && !self.is_admitted(client) {
            return true;
        }
        if let Some(key) = key_of(&mut request) {
            self.identify(key);
        }
        match self.decide(client, &request) {
            Decision::Permitted => self.permitted(client, request),
            Decision::Refused(why) => self.refuse(client, ErrorCode::NotPermitted, why),
            Decision::Pending => {
                self.users.wait(self.connections.id(client));
                let descriptor = self.connections.received.take();
                self.connections[client].keep_received(descriptor);
                self.connections[client].awaits_user = true;
                self.connections.mark_dirty(client);
                return false;
            }
        }
        true
    }

    /// Decides whether the client may take the key of its request, if the request takes one.
    fn decide(&mut self, client: ClientId, request: &Request) -> Decision {
        let connection = &self.connections[client];
        let key = match request {
            // A hold of before is the client's own, whatever has been reserved since.
            Request::Lock(asked) if asked.holds.is_none() => &asked.key,
            Request::Break { .. } if connection.identity().is_some_and(|it| self.gate.is_admin(it)) => {
                return Decision::Permitted;
            }
            Request::Break { key } | Request::Forget { key } => key,
            _ => return Decision::Permitted,
        };
        let claimant = match (connection.uid(), connection.name()) {
            (Some(uid), _) => Claimant::User { uid, connection: connection.as_fd() },
            (None, Some(name)) => Claimant::Name(name),
            (None, None) => Claimant::Unknown,
        };
        let (users, gate, epoll, now) = (&mut self.users, &self.gate, &self.epoll, self.now);
        let look_up = |query| users.look_up(query, now, epoll);
        self.reservations.decide(key, claimant, look_up, |name| gate.is_name(name))
    }

    /// Gives a key the identity that its lock has.
    fn identify(&self, key: &mut Key) {
        let is_reserved = self.reservations.changes_identity(key);
        if is_reserved {
            key.set_reserved(true);
        }
        if !self.has_restored {
            return;
        }
        // A lock that was held before the daemon was restarted with other reservations has the identity of before.
        key.set_reserved(!is_reserved);
        let is_of_before = self.table.find(key.id()).is_some_and(|lock| {
            let knows_key = |holder: RequestView<'_>| holder.terms.protocol == proto::Protocol::V2;
            lock.holders().any(|holder| holder.client.is_none() || knows_key(holder))
        });
        if !is_of_before {
            key.set_reserved(is_reserved);
        }
    }

    /// Goes on with the requests that waited to hear of a user.
    pub(super) fn users_ready(&mut self) {
        for id in self.users.ready(self.now) {
            let Some(client) = self.connections.find(id) else { continue };
            self.connections[client].awaits_user = false;
            self.connections.mark_dirty(client);
            let (input, _) = self.connections.take_input(client);
            self.connections.received = self.connections[client].take_received();
            self.handle_requests(client, &input, Timestamp::NEVER);
            self.connections.received = None;
        }
    }

    fn permitted(&mut self, client: ClientId, request: Request) {
        match (request, self.table.state(client)) {
            (Request::Auth { name, secret }, _) => self.authenticate(client, name, secret),
            (Request::Lock(asked), State::Idle) => self.lock(client, asked),
            (Request::Lock(_), _) => {
                let message = "lock: this connection has a lock, or waits for one";
                self.refuse(client, ErrorCode::WrongState, message);
            }
            (Request::Take, _) => self.apply(|table, now, effects| table.take(now, client, effects)),
            // Its process is on another machine.
            (Request::Child { .. }, _) if self.connections[client].is_remote() => {}
            (Request::Child { .. }, State::Owner) => {
                failpoint::hit("child");
                match self.named(client) {
                    Ok(child) => {
                        debug!("command: {} has named it", self.connections.describe(client));
                        self.set_child(client, Some(child));
                        self.record_hold(client);
                    }
                    // It ended while the request was on its way. The lock lasts as long as the connection.
                    Err((_, named::ENDED)) => {}
                    Err((code, why)) => self.refuse(client, code, format!("child: {why}")),
                }
            }
            // The client has lost the lock meanwhile, and was told.
            (Request::Child { .. }, _) => {}
            (Request::Unlock { key, outcome, .. }, _) => self.unlock(client, &key, outcome),
            (Request::Break { key }, _) => self.break_lock(client, &key),
            (Request::Forget { key }, _) => self.forget(client, &key),
            (Request::Overdue { held_ms }, State::Owner) => self.log_overdue(client, held_ms),
            // The client has lost the lock meanwhile, and was told.
            (Request::Overdue { .. }, _) => {}
            (
                request @ (Request::Output
                | Request::Piece { .. }
                | Request::Withhold { .. }
                | Request::Grown),
                _,
            ) => self.output_request(client, request),
            (Request::Release { outcome }, State::Owner) => {
                if log::is_verbose() {
                    log::release(self.lookup(), client, outcome);
                }
                self.peers.end(client);
                self.complete_output(client);
                self.apply(|table, now, effects| table.release(now, client, outcome, effects));
                self.connections.answer(client, &Answer::Released);
                if self.connections[client].inherits {
                    // Processes that the command has left behind may keep the connection open for as long as they live.
                    self.close_after_flush(client, "released");
                }
            }
            (Request::Release { .. }, _) => {
                self.refuse(client, ErrorCode::WrongState, "release: this connection holds no lock");
            }
            (Request::Status { cluster: true, key }, _) => self.status_of_cluster(client, key.as_ref()),
            (Request::Status { key: Some(key), .. }, _) => self.status_of(client, &key),
            (Request::Status { key: None, .. }, _) => self.status(client),
            (Request::Ping, state) => {
                self.peers.renew(client, clock::now());
                let lease = self.lease_terms(client).filter(|_| state == State::Owner);
                self.connections.answer(client, &Answer::Pong { lease });
            }
        }
    }

    fn lock(&mut self, client: ClientId, mut asked: Box<LockRequest>) {
        if let Some(identity) = self.identity(client)
            && let Err(message) = self.gate.may_lock(identity, &asked.key)
        {
            return self.refuse(client, ErrorCode::NotPermitted, message);
        }
        self.note_forwarder(client, &asked.who);
        let connection = &mut self.connections[client];
        if connection.forwarded && asked.exec && asked.child.is_some() {
            let message = "lock: the daemon is on another machine, and cannot watch that process";
            return self.refuse(client, ErrorCode::BadRequest, message);
        }
        if let Access::NoLock(limit) = connection.access {
            return self.too_many(client, limit);
        }
        connection.inherits = asked.inherits;
        connection.share = asked.share;
        connection.set_guard(asked.nonce.filter(|_| asked.inherits || asked.exec));
        let uid = connection.uid();
        self.bind_to_name(client, &mut asked);
        if !self.take_child(client, &asked) {
            return;
        }
        let is_admin = uid.is_some_and(|uid| uid == 0 || uid == Uid::effective().as_raw());
        if asked.replace_after_ms.is_some() && !is_admin && !self.table.may_replace(asked.key.id(), uid) {
            let message = "lock: only root, the daemon's user and the holder's user may replace a holder";
            return self.refuse(client, ErrorCode::NotPermitted, message);
        }
        if asked.holds.is_none()
            // The key's identity takes a while to compute.
            && self.predecessor.remaining(self.now).is_some()
            && let Err(message) = self.presume_held(asked.key.id(), !asked.nowait)
        {
            return self.refuse(client, ErrorCode::Unavailable, message);
        }
        if asked.share.is_some() {
            asked.sharer = self.sharer(client);
            asked.holds.into_iter().for_each(|token| self.outputs.resumed(token));
        }
        if self.now > self.started.plus(self.grace.max(self.peer_timeout)) {
            // Clients that waited for the previous daemon have come back by now. No other client may overtake waiters.
            asked.place = None;
        }
        if self.apply(|table, now, effects| table.lock(now, client, uid, asked, effects)).is_err() {
            self.refuse(client, ErrorCode::NotPermitted, "lock: this nonce names another request");
        }
    }

    /// Takes the process that the client names, if it names one. Returns `false` if the request is refused.
    fn take_child(&mut self, client: ClientId, asked: &LockRequest) -> bool {
        let child = match asked.child.filter(|_| !self.connections[client].is_remote()) {
            // The process of a client on another machine is not here.
            None => None,
            Some(_) => match self.named(client) {
                Ok(child) => Some(child),
                // The client holds the lock whether its command can be named or not.
                Err(_) if asked.holds.is_some() => None,
                Err((code, why)) => {
                    self.refuse(client, code, format!("lock: {why}"));
                    return false;
                }
            },
        };
        if let Some(child) = &child
            && asked.holds.is_none()
            && self.lookup().hold_of_process(asked.key.id(), child).is_some()
        {
            self.refuse(client, ErrorCode::HeldAbove, "lock: the process holds this lock");
            return false;
        }
        self.set_child(client, child);
        true
    }

    /// Returns the process whose descriptor came with a request.
    fn named(&mut self, client: ClientId) -> Result<Named, (ErrorCode, &'static str)> {
        let received = self.connections.received.take();
        let Some((descriptor, peer)) = received.zip(self.connections[client].peer()) else {
            return Err((
                ErrorCode::BadRequest,
                "no descriptor of the process came with this (pidfd_open(2))",
            ));
        };
        named::check(descriptor, peer).map_err(|why| (ErrorCode::NotPermitted, why))
    }

    /// Ends a hold that a process keeps without a connection.
    fn unlock(&mut self, client: ClientId, key: &Key, outcome: Outcome) {
        let by = self.connections[client].uid();
        let process = match self.named(client) {
            Ok(process) => process,
            Err((code, why)) => return self.refuse(client, code, format!("unlock: {why}")),
        };
        let held = self.lookup().hold_of_process(key.id(), &process);
        let Some(held) = held.filter(|held| by == Some(0) || (by.is_some() && by == held.uid)) else {
            return self.refuse(client, ErrorCode::NotHeld, "unlock: the process does not hold this lock");
        };
        self.apply(|table, now, effects| table.release_orphan(now, held.token, outcome, effects));
        self.connections.answer(client, &Answer::Released);
    }

    /// Root, the daemon's own user and the user who ran it may forget a run.
    fn forget(&mut self, client: ClientId, key: &Key) {
        let by = self.connections[client].uid();
        let is_admin = by.is_some_and(|uid| uid == 0 || uid == Uid::effective().as_raw());
        let runs = self.table.last_runs(self.now, key.id());
        if !is_admin && !runs.into_iter().flatten().all(|run| by.is_some() && run.uid == by) {
            return self.refuse(client, ErrorCode::NotPermitted, FORGET_REFUSED);
        }
        if self.cluster.is_some() {
            // Of the runs that only etcd knows, this daemon does not know whose they are.
            let may = (!is_admin).then(|| self.table.known_runs(key.id()));
            return self.request_remote(client, RemoteRequest::Forget { lock: key.id(), may });
        }
        self.apply(|table, _, effects| table.forget(key.id(), effects));
        self.connections.answer(client, &Answer::Forgotten);
    }

    /// A holder says that it holds its lock for longer than it meant to.
    fn log_overdue(&self, client: ClientId, held_ms: u64) {
        if let Some((lock, _)) = self.table.request_of(client) {
            let (name, client) = (self.lookup().lock_name(lock.id()), self.connections.describe(client));
            warn!("{client} has held {name} for {} s", held_ms / 1000);
        }
    }

    /// Root, the daemon's own user and the holder's user may break a lock; one of another host, only the first two.
    fn break_lock(&mut self, client: ClientId, key: &Key) {
        let by = self.connections[client].uid();
        let is_admin = by.is_some_and(|uid| uid == 0 || uid == Uid::effective().as_raw())
            || self.identity(client).is_some_and(|identity| self.gate.is_admin(identity));
        if is_admin
            && let Some(cluster) = &self.cluster
            && (!self.table.is_held_here(key.id()) || cluster.is_held_elsewhere(key.id()))
        {
            let name = self.connections.describe(client);
            if self.limiter.allows(log::Event::Break, by, self.now) {
                warn!("{name} breaks the lock {:?}, if another host holds it", key.as_str());
            }
            return self.request_remote(client, RemoteRequest::Break { lock: key.id() });
        }
        let lookup = self.lookup();
        let Some(lock) = self.table.find(key.id()).filter(|lock| lock.holding() > 0) else {
            return self.refuse(client, ErrorCode::NotHeld, "break: this lock is not held");
        };
        let name = self.connections[client].name();
        let is_own = |holder: RequestView<'_>| {
            (by.is_some() && lookup.uid(&holder) == by) || (name.is_some() && lookup.name(&holder) == name)
        };
        if !is_admin && !lock.holders().all(is_own) {
            let message = "only root, the daemon's user, the holder's user or name, and !admin names may";
            return self.refuse(client, ErrorCode::NotPermitted, message);
        }
        if self.limiter.allows(log::Event::Break, by, self.now) {
            warn!("{} breaks the lock {:?}", self.connections.describe(client), key.as_str());
        }
        self.apply(|table, now, effects| table.break_lock(now, key.id(), effects));
        self.connections.answer(client, &Answer::Broken);
    }

    pub(super) fn notify_v2(&mut self, notification: Notification) {
        match notification.kind {
            NotificationKind::Granted(_) => self.begin_lease(notification.client),
            NotificationKind::Lost(_) => drop(self.peers.end(notification.client)),
            _ => {}
        }
        let share = self.connections[notification.client].share;
        match notification.kind {
            NotificationKind::Finished(..) | NotificationKind::Fresh(_) | NotificationKind::Granted(_)
                if share.is_some() =>
            {
                self.tell_result(notification);
            }
            _ => self.tell(notification),
        }
        if share == Some(Share::Live) && matches!(notification.kind, NotificationKind::Waiting { .. }) {
            self.follow(notification.client);
        }
    }

    fn tell(&mut self, notification: Notification) {
        let lookup = self.lookup();
        let viewer = self.viewer(notification.client);
        let holders = || lookup.holders_of(viewer, notification.lock);
        let answer = match notification.kind {
            NotificationKind::Granted(token) => {
                Answer::Granted { token, lease: self.lease_terms(notification.client), stale: None }
            }
            NotificationKind::Offered => Answer::Offered,
            NotificationKind::Waiting { ahead, place } => {
                Answer::Waiting { holders: holders(), ahead, place }
            }
            NotificationKind::Finished(outcome, token) => Answer::Finished { outcome, token, output: None },
            NotificationKind::Busy => Answer::Busy { holders: holders() },
            NotificationKind::Fresh(token) => match lookup.run(notification.lock, token) {
                Some(run) => Answer::Fresh { run, output: None },
                None => unreachable!("the table has just found it"),
            },
            NotificationKind::NewerRequest => Answer::Superseded,
            NotificationKind::Stop => {
                Answer::Stop { why: "a newer request replaces this one (--replace)".into() }
            }
            NotificationKind::SlotsDiffer { slots, other } => {
                let lock = notification.lock;
                let remote = lookup.cluster.and_then(|cluster| cluster.who_says(lock, slots));
                let (remote, key) = remote.unwrap_or_else(|| ("a holder".into(), None));
                let other = other.map_or(remote, |other| lookup.client_name(other));
                let name = key.map_or_else(|| lookup.lock_name(lock), |key| format!("{key:?}"));
                let message =
                    format!("lock: {other} says that {name} has {slots} slots; all must agree about that");
                error(ErrorCode::SlotsDiffer, message)
            }
            NotificationKind::Lost(loss) => Answer::Lost { why: describe_loss(loss).into() },
            NotificationKind::Expired => Answer::Lost { why: "hold limit exceeded".into() },
            NotificationKind::HeldAbove => {
                let name = lookup.lock_name(notification.lock);
                let message = format!("lock: {name} is held by the command that this is part of");
                error(ErrorCode::HeldAbove, message)
            }
            NotificationKind::Deadlock(within) => {
                error(ErrorCode::Deadlock, lookup.describe_cycle(within, notification.lock))
            }
            NotificationKind::Unavailable => {
                let why = lookup.cluster.map_or_else(String::new, Clustering::unavailable);
                let message = format!("etcd cannot be asked whether the lock is free: {why}");
                error(ErrorCode::Unavailable, message)
            }
            // The daemon does not use that connection any more.
            NotificationKind::Superseded => return,
        };
        self.connections.answer(notification.client, &answer);
    }
}
