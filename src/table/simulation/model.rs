//! What the clients have been told, and what no client may ever be told.
//!
//! The model knows only the events that went into the table and the effects that came out. It decides nothing: it
//! follows what the table decided, and panics when that breaks a rule.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use super::super::{ClientId, JournalEntry, Notification, NotificationKind, Timestamp};
use super::tally::Tally;
use crate::proto::v2::{LockRequest, Mode};
use crate::proto::{Key, LockId, Outcome, Token};

/// How long an offer stands.
const OFFER_MAX: Duration = Duration::from_secs(1);

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Wish {
    pub(super) v1: bool,
    pub(super) mode: Mode,
    pub(super) shared: bool,
    pub(super) slots: u32,
    pub(super) nowait: bool,
    pub(super) exec: bool,
    pub(super) offers: bool,
}

impl Wish {
    pub(super) const V1: Wish = Wish {
        v1: true,
        mode: Mode::Once,
        shared: false,
        slots: 1,
        nowait: false,
        exec: false,
        offers: false,
    };

    pub(super) fn request(self, key: Key) -> LockRequest {
        let Wish { v1: _, mode, shared, slots, nowait, exec, offers } = self;
        LockRequest { shared, slots, nowait, exec, offers, ..LockRequest::new(key, mode) }
    }

    fn may_be_deferred(self) -> bool {
        !self.v1 && (self.nowait || self.mode == Mode::Once)
    }
}

/// Something that happens to the table. `key` is an index into the model's keys.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    Ask { client: u32, key: usize, wish: Wish },
    Release { client: u32, outcome: Outcome },
    Take { client: u32 },
    Gone { client: u32 },
    Settle,
    Expire,
}

/// What a client believes of itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Stage {
    Idle,
    /// It has asked and heard nothing yet.
    Undecided,
    Waiting,
    /// It may have the lock; it has not heard that, or has not answered.
    Offered,
    /// It did not answer in time.
    Stalled,
    Holding(Token),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Client {
    pub(super) stage: Stage,
    pub(super) key: usize,
    pub(super) wish: Wish,
    /// When it asked, or was granted.
    pub(super) since: Timestamp,
    arrival: u64,
}

/// A key and the clients that want it, each list in the order in which they joined it.
pub(super) struct Lock {
    pub(super) key: Key,
    pub(super) id: LockId,
    /// Also the clients that it is offered to.
    pub(super) holders: Vec<u32>,
    pub(super) undecided: Vec<u32>,
    pub(super) queue: Vec<u32>,
    pub(super) once: Vec<u32>,
    pub(super) v1: Vec<u32>,
    pub(super) stalled: Vec<u32>,
}

impl Lock {
    pub(super) fn is_unused(&self) -> bool {
        let Lock { holders, undecided, queue, once, v1, stalled, .. } = self;
        [holders, undecided, queue, once, v1, stalled].iter().all(|list| list.is_empty())
    }

    fn line(&mut self, wish: Wish) -> &mut Vec<u32> {
        match wish {
            Wish { v1: true, .. } => &mut self.v1,
            Wish { mode: Mode::Once, .. } => &mut self.once,
            Wish { mode: Mode::Queue, .. } => &mut self.queue,
            Wish { mode: Mode::Coalesce, .. } => unreachable!("single_flight.rs has those"),
        }
    }
}

/// A hold that ended in the step under way.
struct Ended {
    key: usize,
    outcome: Outcome,
    token: Token,
    /// Whom a vanished holder leaves the lock to.
    successor: Option<u32>,
}

pub(super) struct Model {
    pub(super) clients: Vec<Client>,
    pub(super) locks: Vec<Lock>,
    /// The undecided requests, in the order in which they came.
    pub(super) deferred: VecDeque<u32>,
    pub(super) deadlines: BTreeSet<(Timestamp, u32)>,
    /// Which locks the step under way has to do with.
    pub(super) touched: BTreeSet<usize>,
    pub(super) seen: Tally,
    by_id: HashMap<LockId, usize>,
    hold_limit: Option<Duration>,
    last_token: Option<Token>,
    arrivals: u64,
    ended: Vec<Ended>,
    /// The keys of which an offer was not taken in the step under way.
    withdrawn: BTreeSet<usize>,
    /// Who is recorded to hold something since the step under way.
    granting: Vec<u32>,
    /// The tokens of the holds that the journal knows.
    recorded: BTreeSet<Token>,
    now: Timestamp,
}

impl Model {
    pub(super) fn new(clients: u32, keys: usize, hold_limit: Option<Duration>) -> Model {
        let idle = Client { stage: Stage::Idle, key: 0, wish: Wish::V1, since: Timestamp(0), arrival: 0 };
        let lock = |number| {
            let key = Key::new(format!("key {number}")).unwrap();
            let id = key.id();
            let [holders, undecided, queue, once, v1, stalled] = Default::default();
            Lock { key, id, holders, undecided, queue, once, v1, stalled }
        };
        let locks: Vec<Lock> = (0..keys).map(lock).collect();
        Model {
            clients: vec![idle; clients as usize],
            by_id: locks.iter().enumerate().map(|(index, lock)| (lock.id, index)).collect(),
            locks,
            deferred: VecDeque::new(),
            deadlines: BTreeSet::new(),
            touched: BTreeSet::new(),
            seen: Tally::default(),
            hold_limit,
            last_token: None,
            arrivals: 0,
            ended: Vec::new(),
            withdrawn: BTreeSet::new(),
            granting: Vec::new(),
            recorded: BTreeSet::new(),
            now: Timestamp(0),
        }
    }

    pub(super) fn client(&self, client: u32) -> &Client {
        &self.clients[client as usize]
    }

    /// What the event means by itself, before the table has said anything.
    pub(super) fn begin(&mut self, now: Timestamp, event: Event) {
        self.now = now;
        self.ended.clear();
        self.withdrawn.clear();
        self.touched.clear();
        match event {
            Event::Ask { client, key, wish } => self.asked(client, key, wish),
            Event::Release { client, outcome } => {
                if let Stage::Holding(_) = self.client(client).stage {
                    self.end_hold(client, outcome);
                }
            }
            Event::Gone { client } => self.left(client),
            Event::Settle => self.touched.extend(self.deferred.iter().map(|&c| self.clients[c as usize].key)),
            Event::Take { client } => drop(self.touched.insert(self.client(client).key)),
            Event::Expire => self.withdraw_offers(),
        }
    }

    /// Follows what is to be recorded before anybody is told: the journal must always know all who hold.
    pub(super) fn record(&mut self, changes: &[JournalEntry]) {
        self.granting.clear();
        for change in changes {
            match change {
                JournalEntry::Granted(ClientId(client)) | JournalEntry::Resumed(ClientId(client)) => {
                    self.granting.push(*client)
                }
                JournalEntry::Ran(..) | JournalEntry::RunForgotten(..) => {
                    panic!("single_flight.rs has those")
                }
                JournalEntry::Ended(token) => {
                    assert!(self.recorded.remove(token), "a hold that was not recorded ends")
                }
            }
        }
    }

    /// Follows one notification, and panics when it breaks a rule.
    pub(super) fn hear(&mut self, event: Event, notification: &Notification) {
        let ClientId(client) = notification.client;
        let about = *self.client(client);
        assert_ne!(about.stage, Stage::Idle, "an idle client is told something");
        assert_eq!(
            self.by_id.get(&notification.lock),
            Some(&about.key),
            "a client hears of a lock it did not ask for"
        );
        if about.stage == Stage::Undecided {
            self.decide(event, client);
        }
        match notification.kind {
            NotificationKind::Granted(token) => self.granted(event, client, about, token),
            NotificationKind::Offered => self.offered(client, about),
            NotificationKind::Waiting { ahead, .. } => self.told_to_wait(event, client, about, ahead),
            NotificationKind::Finished(outcome, token) => self.finished(client, about, outcome, token),
            NotificationKind::Busy => self.told_busy(event, client, about),
            NotificationKind::Expired => self.expired(event, client),
            NotificationKind::HeldAbove | NotificationKind::Deadlock(_) => {
                panic!("no client asks under another lock here")
            }
            NotificationKind::Lost(_) | NotificationKind::Superseded => {
                panic!("no client resumes or breaks anything here")
            }
            NotificationKind::Fresh(_)
            | NotificationKind::NewerRequest
            | NotificationKind::Stop
            | NotificationKind::SlotsDiffer { .. } => panic!("single_flight.rs has those"),
            NotificationKind::Unavailable => panic!("there are no other hosts here"),
        }
    }

    /// Checks what must hold when the table has notified everyone that it has to.
    pub(super) fn end(&mut self, event: Event) {
        match event {
            Event::Ask { client, wish, .. } if self.client(client).stage == Stage::Undecided => {
                assert!(wish.may_be_deferred(), "it is not told where it stands");
                assert!(!self.may_enter(client), "a lock is free for it, and it is not granted");
                self.seen.deferrals += 1;
            }
            Event::Take { client } => {
                let is_answered = !matches!(self.client(client).stage, Stage::Offered | Stage::Stalled);
                assert!(is_answered, "a client takes an offer, and is not told what came of it");
            }
            Event::Settle => assert!(self.deferred.is_empty(), "a request is still undecided"),
            Event::Expire => {
                assert!(
                    self.deadlines.range(..=(self.now, u32::MAX)).next().is_none(),
                    "a hold or an offer outlives its limit"
                );
            }
            _ => {}
        }
        for Ended { key, outcome, successor, token } in &self.ended {
            assert!(!self.recorded.contains(token), "a hold that has ended is still recorded");
            let lock = &self.locks[*key];
            assert!(lock.v1.is_empty(), "a protocol 1 waiter is not told of a release");
            if *outcome != Outcome::Vanished {
                let stalled = lock.stalled.iter().map(|&client| self.client(client).wish.mode);
                let waits_once = !lock.once.is_empty() || stalled.into_iter().any(|mode| mode == Mode::Once);
                assert!(!waits_once, "a once waiter is not told of a release");
            }
            assert_eq!(*successor, None, "the oldest waiter does not succeed a vanished holder");
        }
        for &key in &self.withdrawn {
            assert!(self.locks[key].v1.is_empty(), "a protocol 1 waiter waits for a client that is stopped");
        }
        for &key in &self.touched {
            let lock = &self.locks[key];
            let waiting = lock.queue.len() + lock.once.len() + lock.v1.len();
            assert!(waiting == 0 || !lock.holders.is_empty(), "a client waits for a free lock");
            if let Some(&head) = lock.queue.first() {
                assert!(!self.fits(head), "the head of the queue could hold the lock, and waits");
            }
        }
    }

    fn asked(&mut self, client: u32, key: usize, wish: Wish) {
        assert_eq!(self.client(client).stage, Stage::Idle, "the world asks only for idle clients");
        let arrival = self.arrivals;
        self.arrivals += 1;
        self.clients[client as usize] =
            Client { stage: Stage::Undecided, key, wish, since: self.now, arrival };
        self.locks[key].undecided.push(client);
        self.deferred.push_back(client);
        self.touched.insert(key);
    }

    fn left(&mut self, client: u32) {
        let Client { stage, key, wish, .. } = *self.client(client);
        match stage {
            Stage::Idle => return,
            Stage::Undecided => self.forget_undecided(client),
            Stage::Waiting => remove(self.locks[key].line(wish), client),
            Stage::Stalled => remove(&mut self.locks[key].stalled, client),
            Stage::Offered => self.end_offer(client),
            Stage::Holding(_) if wish.exec => return self.end_hold(client, Outcome::Unknown),
            Stage::Holding(_) => return self.end_hold(client, Outcome::Vanished),
        }
        self.touched.insert(key);
        self.clients[client as usize].stage = Stage::Idle;
    }

    fn end_hold(&mut self, client: u32, outcome: Outcome) {
        let Client { stage, key, wish, since, .. } = *self.client(client);
        let Stage::Holding(token) = stage else { panic!("a client that holds nothing ends a hold") };
        if let (true, Some(limit)) = (wish.v1, self.hold_limit) {
            self.deadlines.remove(&(since.plus(limit), client));
        }
        remove(&mut self.locks[key].holders, client);
        self.clients[client as usize].stage = Stage::Idle;
        self.touched.insert(key);
        let successor = match outcome {
            Outcome::Vanished => self.oldest_waiter(key).filter(|&oldest| self.fits(oldest)),
            _ => None,
        };
        self.ended.push(Ended { key, outcome, token, successor });
    }

    /// An undecided client hears its first word.
    fn decide(&mut self, event: Event, client: u32) {
        match event {
            Event::Ask { client: asking, .. } => assert_eq!(client, asking, "decided before its time"),
            Event::Settle => {
                assert_eq!(self.deferred.front(), Some(&client), "not decided in the order of arrival");
            }
            _ => panic!("a request is decided by something that has nothing to do with it"),
        }
        self.forget_undecided(client);
    }

    /// The offers whose time is over end without a word to their clients.
    fn withdraw_offers(&mut self) {
        let due = self.deadlines.range(..=(self.now, u32::MAX)).map(|&(_, client)| client);
        let due: Vec<u32> = due.filter(|&client| self.client(client).stage == Stage::Offered).collect();
        for client in due {
            self.end_offer(client);
            self.clients[client as usize].stage = Stage::Stalled;
            let key = self.client(client).key;
            self.locks[key].stalled.push(client);
            sort(&self.clients, &mut self.locks[key].stalled);
            self.seen.offers[1] += 1;
        }
    }

    fn end_offer(&mut self, client: u32) {
        let key = self.client(client).key;
        self.deadlines.retain(|&(_, other)| other != client);
        remove(&mut self.locks[key].holders, client);
        self.touched.insert(key);
        self.withdrawn.insert(key);
    }

    /// A waiter may have the lock.
    fn offered(&mut self, client: u32, about: Client) {
        assert!(about.wish.offers, "it is offered something, and does not know offers");
        assert_eq!(about.stage, Stage::Waiting, "one that has not waited is offered something");
        assert!(self.fits(client), "it is offered a place beside holders that do not admit it");
        self.leave_line(client, about);
        self.locks[about.key].holders.push(client);
        self.clients[client as usize].stage = Stage::Offered;
        self.deadlines.insert((self.now.plus(OFFER_MAX), client));
    }

    /// A waiter leaves its line because it is its turn.
    fn leave_line(&mut self, client: u32, about: Client) {
        assert!(self.touched.contains(&about.key), "a waiter is granted for no reason");
        let oldest = self.oldest_waiter(about.key);
        let lock = &mut self.locks[about.key];
        let ended = self.ended.iter_mut().find(|ended| ended.key == about.key);
        match ended.map(|ended| &mut ended.successor) {
            Some(heir) if *heir == Some(client) => {
                self.seen.successions[about.wish.mode as usize] += 1;
                *heir = None;
            }
            Some(Some(_)) => panic!("the oldest waiter is passed over"),
            _ if oldest == Some(client) && self.withdrawn.contains(&about.key) => {}
            _ => assert_eq!(lock.queue.first(), Some(&client), "it is not the head of the queue"),
        }
        remove(lock.line(about.wish), client);
        self.seen.grants_to_waiters += 1;
    }

    fn granted(&mut self, event: Event, client: u32, about: Client, token: Token) {
        assert!(self.last_token < Some(token), "tokens do not grow");
        assert!(self.granting.contains(&client), "it is told of a grant that is not recorded");
        self.recorded.insert(token);
        self.last_token = Some(token);
        let takes = matches!(event, Event::Take { client: taking } if taking == client);
        match about.stage {
            Stage::Undecided => assert!(self.locks[about.key].queue.is_empty(), "it overtakes the queue"),
            Stage::Waiting => {
                assert!(!about.wish.offers, "it has waited, may be stopped, and is not asked");
                self.leave_line(client, about);
            }
            Stage::Offered | Stage::Stalled => {
                assert!(takes, "it is granted what it has not taken");
                self.take(client, about);
            }
            _ => panic!("a holder is granted a lock"),
        }
        // An offer is a place among the holders.
        let fits = about.stage == Stage::Offered || self.fits(client);
        assert!(fits, "it is granted beside holders that do not admit it");
        let lock = &mut self.locks[about.key];
        if !lock.holders.is_empty() {
            self.seen.grants_beside_others[usize::from(about.wish.shared)] += 1;
        }
        lock.holders.push(client);
        self.clients[client as usize].stage = Stage::Holding(token);
        self.clients[client as usize].since = self.now;
        if let (true, Some(limit)) = (about.wish.v1, self.hold_limit) {
            self.deadlines.insert((self.now.plus(limit), client));
        }
    }

    /// A client takes an offer, which may have been withdrawn.
    fn take(&mut self, client: u32, about: Client) {
        let lock = &mut self.locks[about.key];
        if about.stage == Stage::Offered {
            remove(&mut lock.holders, client);
            self.deadlines.retain(|&(_, other)| other != client);
            self.seen.offers[0] += 1;
        } else {
            remove(&mut lock.stalled, client);
            let head = self.locks[about.key].queue.first();
            let overtakes = head.is_some_and(|&head| self.client(head).arrival < about.arrival);
            assert!(!overtakes, "it overtakes the queue");
            self.seen.offers[2] += 1;
        }
    }

    /// A client takes an offer that was withdrawn, and another client has the lock.
    fn waits_again(&mut self, client: u32, about: Client, ahead: u32) {
        remove(&mut self.locks[about.key].stalled, client);
        assert!(!self.may_enter(client), "a lock is free for it, and it waits");
        let lock = &mut self.locks[about.key];
        lock.line(about.wish).push(client);
        sort(&self.clients, lock.line(about.wish));
        let place = lock.queue.iter().position(|&other| other == client).unwrap_or(0);
        assert_eq!(ahead as usize, place, "it has lost its place");
        self.clients[client as usize].stage = Stage::Waiting;
        self.seen.offers[2] += 1;
    }

    fn told_to_wait(&mut self, event: Event, client: u32, about: Client, ahead: u32) {
        if about.stage == Stage::Stalled
            && matches!(event, Event::Take { client: taking } if taking == client)
        {
            return self.waits_again(client, about, ahead);
        }
        assert_eq!(about.stage, Stage::Undecided, "it is told to wait twice");
        assert!(!about.wish.nowait, "it waits, and did not want to");
        let settled = matches!(event, Event::Settle) || !about.wish.may_be_deferred();
        assert!(settled, "it is told to wait before everything pending is processed");
        assert!(!self.may_enter(client), "a lock is free for it, and it waits");
        let lock = &mut self.locks[about.key];
        let line = lock.line(about.wish);
        line.push(client);
        let queues = about.wish.mode == Mode::Queue;
        let before = if queues { line.len() - 1 } else { 0 };
        assert_eq!(ahead as usize, before, "it is told a wrong place in the queue");
        self.clients[client as usize].stage = Stage::Waiting;
        self.seen.waits[if about.wish.v1 { 2 } else { usize::from(queues) }] += 1;
    }

    fn finished(&mut self, client: u32, about: Client, outcome: Outcome, token: Token) {
        let waits = matches!(about.stage, Stage::Waiting | Stage::Stalled);
        assert!(waits, "one that does not wait is told that a holder is done");
        let wish = about.wish;
        assert!(wish.v1 || wish.mode == Mode::Once, "one that waits for its turn is sent home");
        assert!(
            wish.v1 || outcome != Outcome::Vanished,
            "a once waiter is told that a vanished holder is done"
        );
        let told = (about.key, outcome, token);
        let real = |ended: &Ended| (ended.key, ended.outcome, ended.token) == told;
        let is_withdrawn = wish.v1 && self.withdrawn.contains(&about.key);
        assert!(is_withdrawn || self.ended.iter().any(real), "it is told of a release that did not happen");
        match about.stage {
            Stage::Stalled => remove(&mut self.locks[about.key].stalled, client),
            _ => remove(self.locks[about.key].line(wish), client),
        }
        self.clients[client as usize].stage = Stage::Idle;
        self.seen.finished[usize::from(wish.v1)] += 1;
    }

    fn told_busy(&mut self, event: Event, client: u32, about: Client) {
        assert_eq!(about.stage, Stage::Undecided, "it is refused after it was answered");
        assert!(about.wish.nowait, "it is refused, and was willing to wait");
        assert!(matches!(event, Event::Settle), "it is refused before everything pending is processed");
        assert!(!self.may_enter(client), "a lock is free for it, and it is refused");
        self.clients[client as usize].stage = Stage::Idle;
        self.seen.refusals += 1;
    }

    fn expired(&mut self, event: Event, client: u32) {
        assert!(matches!(event, Event::Expire), "a hold expires by something else than time");
        let own = self.deadlines.iter().find(|&&(_, other)| other == client);
        let &(due, _) = own.expect("only a hold with a limit expires");
        assert!(due <= self.now, "a hold expires before its time");
        assert_eq!(self.deadlines.first().map(|&(at, _)| at), Some(due), "holds expire out of order");
        self.end_hold(client, Outcome::Vanished);
        self.seen.expiries += 1;
    }

    fn forget_undecided(&mut self, client: u32) {
        let key = self.client(client).key;
        remove(&mut self.locks[key].undecided, client);
        let place = self.deferred.iter().position(|&c| c == client).expect("it is undecided");
        self.deferred.remove(place);
    }

    /// Would a newcomer with its wish be let in?
    fn may_enter(&self, client: u32) -> bool {
        self.locks[self.client(client).key].queue.is_empty() && self.fits(client)
    }

    /// Returns `true` if the holders of the lock permit it beside them, and it permits them.
    fn fits(&self, client: u32) -> bool {
        let Client { key, wish, .. } = *self.client(client);
        let holders = &self.locks[key].holders;
        holders.iter().all(|&holder| match (self.client(holder).wish, wish) {
            (Wish { shared: true, .. }, Wish { shared, .. }) => shared,
            (_, Wish { shared: true, .. }) => false,
            // One slot is the exclusive lock, whatever the newcomer would put up with.
            (Wish { slots, .. }, _) => slots > 1 && holders.len() < wish.slots as usize,
        })
    }

    fn oldest_waiter(&self, key: usize) -> Option<u32> {
        let Lock { once, queue, .. } = &self.locks[key];
        once.iter().chain(queue).copied().min_by_key(|&client| self.client(client).arrival)
    }
}

/// Sorts a list by arrival.
fn sort(clients: &[Client], list: &mut [u32]) {
    list.sort_by_key(|&client| clients[client as usize].arrival);
}

fn remove(list: &mut Vec<u32>, client: u32) {
    let place = list.iter().position(|&other| other == client).expect("it is in the list");
    list.remove(place);
}
