//! The users of this machine, by name and by number. Looking one up may take seconds (LDAP), so threads do it, and the loop goes
//! on meanwhile.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use log::warn;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::connection::ConnectionId;
use super::source::Source;
use crate::lookup;
use crate::table::Timestamp;

/// How long an answer counts: that there is such a user, and that there is none.
const FOUND_FOR: Duration = Duration::from_secs(60);
const MISSING_FOR: Duration = Duration::from_secs(5);
/// How many lookups run at a time.
const RUNNING_MAX: usize = 4;
/// How many answers are kept.
const KNOWN_MAX: usize = 4096;

/// What can be looked up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Query {
    /// The name of the user with this uid.
    Uid(u32),
    /// Whether there is a user of this name.
    Name(Box<str>),
}

/// What is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// The user's name.
    User(Box<str>),
    /// There is no such user.
    Missing,
    /// A thread is looking it up.
    Pending,
}

#[derive(Default)]
pub(super) struct Users {
    known: HashMap<Query, (Known, Timestamp)>,
    running: usize,
    /// What to look up next.
    queue: VecDeque<Query>,
    threads: Option<Threads>,
    /// The connections that wait for an answer.
    waiting: Vec<ConnectionId>,
}

struct Threads {
    answers: Receiver<(Query, Known)>,
    sender: Sender<(Query, Known)>,
    /// Becomes readable with each answer.
    wake: UnixStream,
    waker: Arc<UnixStream>,
}

impl Users {
    /// Returns what is known, and begins to look it up if that is nothing.
    pub(super) fn look_up(&mut self, query: Query, now: Timestamp, epoll: &Epoll) -> Known {
        if let Some((known, until)) = self.known.get(&query)
            && (*until > now || *known == Known::Pending)
        {
            return known.clone();
        }
        if self.threads.is_none() {
            match Threads::start(epoll) {
                Ok(threads) => self.threads = Some(threads),
                Err(e) => {
                    warn!("cannot look up users: {e}");
                    return Known::Missing;
                }
            }
        }
        if self.known.len() >= KNOWN_MAX {
            self.known.retain(|_, (known, until)| *until > now && *known == Known::Pending);
        }
        self.known.insert(query.clone(), (Known::Pending, Timestamp::NEVER));
        self.queue.push_back(query);
        self.start_next();
        Known::Pending
    }

    /// Notes that a connection waits for an answer that is pending.
    pub(super) fn wait(&mut self, connection: ConnectionId) {
        self.waiting.push(connection);
    }

    /// Takes the answers that have come, and returns the connections that may go on.
    pub(super) fn ready(&mut self, now: Timestamp) -> Vec<ConnectionId> {
        let Some(threads) = &mut self.threads else { return Vec::new() };
        // The pipe is only there to wake the loop.
        let _ = threads.wake.read(&mut [0; 16]);
        while let Ok((query, known)) = threads.answers.try_recv() {
            let for_time = if known == Known::Missing { MISSING_FOR } else { FOUND_FOR };
            self.known.insert(query, (known, now.plus(for_time)));
            self.running -= 1;
        }
        self.start_next();
        std::mem::take(&mut self.waiting)
    }

    fn start_next(&mut self) {
        while self.running < RUNNING_MAX
            && let Some(threads) = &self.threads
            && let Some(query) = self.queue.pop_front()
        {
            self.running += 1;
            threads.begin(query);
        }
    }
}

impl Threads {
    fn start(epoll: &Epoll) -> io::Result<Threads> {
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, Source::Users.pack()))?;
        let (sender, answers) = channel();
        Ok(Threads { answers, sender, wake, waker: Arc::new(waker) })
    }

    fn begin(&self, query: Query) {
        let (sender, waker) = (self.sender.clone(), Arc::clone(&self.waker));
        let answer = {
            let query = query.clone();
            move |known| {
                // An error means that the loop has ended.
                if sender.send((query, known)).is_ok() {
                    let _ = (&*waker).write_all(b".");
                }
            }
        };
        let for_thread = answer.clone();
        let thread = thread::Builder::new().name("users".into());
        if let Err(e) = thread.spawn(move || for_thread(find(&query))) {
            warn!("cannot look up a user: {e}");
            answer(Known::Missing);
        }
    }
}

fn find(query: &Query) -> Known {
    let name = match query {
        Query::Uid(uid) => lookup::user(*uid).map(String::into_boxed_str),
        Query::Name(name) => lookup::uid(name).ok().map(|_| name.clone()),
    };
    name.map_or(Known::Missing, Known::User)
}
