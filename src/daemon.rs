//! The daemon: one thread that waits for sockets, feeds what comes to the table, and sends what the table decides.
//!
//! Each turn of the loop reads all that is ready, then writes: one write for each client that has something to be told,
//! however many requests were found in one read. Everything that is decided about locks is decided in the table.

mod connection;
mod listener;
mod log;
mod v1;
mod v2;

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ::log::{debug, error, info, warn};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use slab::Slab;

use crate::addr::{self, Addr, Reason};
use crate::exit::Exit;
use crate::proto::Token;
use crate::table::{ClientId, Effect, Millis, Table, What};
use connection::{Connection, OUTPUT_BYTES_MAX, Protocol, Sent};
pub use listener::Access;
use listener::Listener;
pub use log::{Target as LogTarget, init as init_log};

/// How many events are taken from the kernel at a time.
const EVENTS_MAX: usize = 256;
/// How many connections are accepted before those that are there get their turn again.
const ACCEPTS_MAX: usize = 64;
/// How much is read from one connection before the others get their turn.
const READ_BYTES_MAX: usize = 16 * 1024;
/// Descriptors that are kept free of connections: standard ones, listeners, the log, name lookups.
const DESCRIPTORS_RESERVED: u64 = 32;
/// After the kernel refused a descriptor, and none of ours was closed since, when to ask again.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);

/// What to serve, and how.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen.
    pub addrs: Vec<Addr>,
    /// Who may connect to the Unix sockets among them.
    pub access: Access,
    /// How many connections to serve at a time. `None`: as many as descriptors allow.
    pub connections_max: Option<u32>,
    /// How long a protocol 1 client may hold. `None`: as long as it likes.
    pub hold_limit: Option<Duration>,
    /// End after so long without connections and locks. `None`: never.
    pub idle_exit: Option<Duration>,
    /// Go into the background, away from whoever started this, as soon as the sockets are listened on.
    pub detach: bool,
}

impl Config {
    /// These addresses, and for the rest what is safe: only for the user's own processes, in the foreground.
    pub fn new(addrs: Vec<Addr>) -> Config {
        Config {
            addrs,
            access: Access { mode: 0o600, group: None },
            connections_max: None,
            hold_limit: Some(Duration::from_secs(30)),
            idle_exit: None,
            detach: false,
        }
    }
}

/// Serves until HUP, INT or TERM, or until idle for long enough.
///
/// # Errors
/// When a socket cannot be listened on, or the kernel refuses what a daemon cannot do without.
pub fn serve(config: &Config) -> Result<(), Error> {
    if config.detach {
        close_inherited().map_err(|e| Error::Os("close inherited files", e))?;
    }
    let mut listeners = Listener::bind_all(&config.addrs, &config.access)?;
    if config.detach {
        // Whoever started this waits for the process that ends here, and may connect from then on.
        nix::unistd::daemon(false, false).map_err(|e| Error::Os("detach", e.into()))?;
        listeners.iter_mut().try_for_each(Listener::sign)?;
    }
    let mut server = Server::new(config, listeners).map_err(|e| Error::Os("start", e))?;
    for listener in &server.listeners {
        info!("serving on {}", listener.name());
    }
    let reason = server.run().map_err(|e| Error::Os("wait for events", e))?;
    info!("stopping: {reason}");
    Ok(())
}

/// Closes all files but the standard ones, so that nobody waits for the end of a pipe of which a daemon keeps an end.
fn close_inherited() -> io::Result<()> {
    let numbers =
        std::fs::read_dir("/dev/fd")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    for number in numbers.collect::<Vec<i32>>() {
        if number > 2 {
            // The one of the directory itself is closed already; for the others there is nothing to lose.
            let _ = nix::unistd::close(number);
        }
    }
    Ok(())
}

struct Server {
    epoll: Epoll,
    signals: UnixStream,
    listeners: Vec<Listener>,
    connections: Slab<Connection>,
    connections_max: usize,
    generation: u32,
    table: Table,
    effects: Vec<Effect>,
    /// Those with output, or doomed: they are seen to at the end of the turn.
    dirty: Vec<ClientId>,
    accepting: Accepting,
    /// When the log last said that the kernel refused a connection.
    refused_last: Option<Millis>,
    started: Instant,
    now: Millis,
    idle_exit: Option<Duration>,
    /// Since when nobody is connected.
    idle_since: Option<Millis>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accepting {
    Yes,
    /// There are as many connections as there may be: until one of them goes.
    Full,
    /// The kernel has no descriptor to give: until a connection goes, or until then.
    Refused(Millis),
}

/// What an event is about, packed into the 64 bits that the kernel keeps with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Signals,
    Listener(usize),
    Connection(ClientId, u32),
}

impl Source {
    /// Generation 0 marks what is no connection.
    fn pack(self) -> u64 {
        match self {
            Source::Signals => 0,
            Source::Listener(index) => index as u64 + 1,
            Source::Connection(client, generation) => u64::from(generation) << 32 | u64::from(client.0),
        }
    }

    fn unpack(bits: u64) -> Source {
        let (generation, low) = ((bits >> 32) as u32, bits as u32);
        match (generation, low) {
            (0, 0) => Source::Signals,
            (0, number) => Source::Listener(number as usize - 1),
            _ => Source::Connection(ClientId(low), generation),
        }
    }
}

impl Server {
    fn new(config: &Config, listeners: Vec<Listener>) -> io::Result<Server> {
        let (signals, writer) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
        }
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&signals, EpollEvent::new(EpollFlags::EPOLLIN, Source::Signals.pack()))?;
        let descriptors = raise_descriptor_limit()?;
        let connections_max =
            usize::try_from(descriptors.saturating_sub(DESCRIPTORS_RESERVED)).unwrap_or(usize::MAX);
        let wanted = config.connections_max.map_or(usize::MAX, |n| n as usize);
        // The time of day makes tokens grow across restarts; half a million grants a second would not catch up.
        let micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_micros() as u64);
        let hold_limit = config.hold_limit.map(|limit| Millis(limit.as_millis() as u64));
        let mut server = Server {
            epoll,
            signals,
            listeners,
            connections: Slab::new(),
            connections_max: wanted.min(connections_max.max(1)),
            generation: 0,
            table: Table::new(RandomState::new().hash_one(0), Token(micros), hold_limit),
            effects: Vec::new(),
            dirty: Vec::new(),
            accepting: Accepting::Full,
            refused_last: None,
            started: Instant::now(),
            now: Millis(0),
            idle_exit: config.idle_exit,
            idle_since: Some(Millis(0)),
        };
        server.resume_accepting()?;
        Ok(server)
    }

    /// Returns why it ended.
    fn run(&mut self) -> io::Result<&'static str> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let mut buffer = vec![0; READ_BYTES_MAX].into_boxed_slice();
        let mut turns_full = 0;
        loop {
            let mark = self.table.deferred();
            let timeout = if mark.is_some() { EpollTimeout::ZERO } else { self.timeout() };
            let ready = match self.epoll.wait(&mut events, timeout) {
                Err(nix::Error::EINTR) => 0,
                other => other?,
            };
            self.now = Millis(self.started.elapsed().as_millis() as u64);
            for event in &events[..ready] {
                match Source::unpack(event.data()) {
                    Source::Signals => {
                        if let Some(name) = self.signal() {
                            return Ok(name);
                        }
                    }
                    Source::Listener(index) => self.accept(index, &mut buffer)?,
                    Source::Connection(client, generation) => {
                        self.connection_ready(client, generation, event.events(), &mut buffer);
                    }
                }
            }
            // A turn with room for more events has seen all that was ready when it began. With more than one turn's
            // worth, the kernel goes round, so that after enough full turns all has been seen as well.
            turns_full = if ready < EVENTS_MAX { 0 } else { turns_full + 1 };
            if let Some(mark) = mark
                && (turns_full == 0 || turns_full > self.connections.len() / EVENTS_MAX + 1)
            {
                turns_full = 0;
                self.feed(|table, now, effects| table.settle(now, mark, effects));
            }
            self.feed(|table, now, effects| table.expire(now, effects));
            self.flush();
            if let Accepting::Refused(until) = self.accepting
                && until <= self.now
            {
                self.resume_accepting()?;
            }
            if self.idle_deadline().is_some_and(|deadline| deadline <= self.now) {
                return Ok("nobody needs it");
            }
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let retry = match self.accepting {
            Accepting::Refused(until) => Some(until),
            _ => None,
        };
        match [self.table.next_deadline(), self.idle_deadline(), retry].into_iter().flatten().min() {
            None => EpollTimeout::NONE,
            Some(deadline) => {
                // Not `self.now`: part of that millisecond has passed, and the rest would be waited for in a spin.
                let now = self.started.elapsed().as_millis() as u64;
                let millis = deadline.0.saturating_sub(now).min(i32::MAX as u64);
                EpollTimeout::try_from(millis).expect("it is at most i32::MAX")
            }
        }
    }

    fn idle_deadline(&self) -> Option<Millis> {
        let (since, limit) = (self.idle_since?, self.idle_exit?);
        self.table.is_empty().then(|| Millis(since.0 + limit.as_millis() as u64))
    }

    /// The name of a signal that arrived: each of them ends the daemon.
    fn signal(&mut self) -> Option<&'static str> {
        let mut byte = [0];
        match self.signals.read(&mut byte) {
            Ok(1..) => Some("a signal asks for it"),
            _ => None,
        }
    }

    fn accept(&mut self, index: usize, buffer: &mut [u8]) -> io::Result<()> {
        for _ in 0..ACCEPTS_MAX {
            if self.accepting != Accepting::Yes {
                break;
            }
            if self.connections.len() >= self.connections_max {
                return self.pause_accepting(Accepting::Full);
            }
            match self.listeners[index].accept() {
                Ok(fd) => self.welcome(index, fd, buffer),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if listener::concerns_one_client(&e) => debug!("accept: {}", Reason(&e)),
                Err(e) => {
                    self.warn_of_refusal(&e);
                    let until = Millis(self.now.0 + ACCEPT_RETRY.as_millis() as u64);
                    return self.pause_accepting(Accepting::Refused(until));
                }
            }
        }
        Ok(())
    }

    /// Once a minute at the most: it may happen with each connection that closes.
    fn warn_of_refusal(&mut self, error: &io::Error) {
        let quiet = |last: Millis| self.now.0 < last.0 + 60_000;
        if !self.refused_last.is_some_and(quiet) {
            warn!("cannot accept: {}; trying again when there is room", Reason(error));
            self.refused_last = Some(self.now);
        }
    }

    fn welcome(&mut self, index: usize, fd: OwnedFd, buffer: &mut [u8]) {
        let peer = if self.listeners[index].is_unix() { addr::peer(&fd).ok() } else { None };
        // 0 is not for connections; four thousand million connections later a number may come again.
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        let generation = self.generation;
        let entry = self.connections.vacant_entry();
        let client = ClientId(u32::try_from(entry.key()).expect("fewer connections than descriptors"));
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Connection(client, generation).pack());
        if let Err(e) = self.epoll.add(&fd, event) {
            warn!("cannot watch a connection: {e}");
            return;
        }
        entry.insert(Connection::new(fd, peer, generation));
        self.idle_since = None;
        debug!("connect: {} on {}", self.name(client), self.listeners[index].name());
        // Most clients have sent their request by now, and need not wait for another turn.
        self.read(client, buffer);
    }

    fn connection_ready(&mut self, client: ClientId, generation: u32, events: EpollFlags, buffer: &mut [u8]) {
        // An event that was waiting in line behind the one that closed its connection.
        match self.connections.get(client.0 as usize) {
            Some(connection) if connection.generation == generation => {}
            _ => return,
        }
        if events.intersects(EpollFlags::EPOLLOUT) {
            self.mark_dirty(client);
        }
        if events.intersects(!EpollFlags::EPOLLOUT) {
            self.read(client, buffer);
        }
    }

    fn read(&mut self, client: ClientId, buffer: &mut [u8]) {
        let connection = &mut self.connections[client.0 as usize];
        if connection.doomed {
            return;
        }
        match connection.read(buffer) {
            Ok(0) => self.doom(client, "end of stream"),
            Ok(bytes) => self.received(client, &buffer[..bytes]),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Err(e) => self.doom(client, e.desc()),
        }
    }

    /// Takes the requests out of what has arrived; the beginning of one that has not arrived whole is kept.
    fn received(&mut self, client: ClientId, bytes: &[u8]) {
        let connection = &mut self.connections[client.0 as usize];
        if connection.continues_line(bytes) {
            connection.input.extend_from_slice(bytes);
            return;
        }
        let earlier = std::mem::take(&mut connection.input);
        let joined;
        let mut rest = bytes;
        if !earlier.is_empty() {
            joined = [&earlier, bytes].concat();
            rest = &joined;
        }
        while !self.connections[client.0 as usize].doomed {
            let taken = match self.connections[client.0 as usize].protocol {
                Protocol::V1 => self.received_v1(client, &mut rest),
                Protocol::V2 { .. } => self.received_v2(client, &mut rest),
            };
            if !taken {
                self.connections[client.0 as usize].input.extend_from_slice(rest);
                break;
            }
        }
    }

    /// Lets the table handle something, and carries out what it says.
    fn feed(&mut self, event: impl FnOnce(&mut Table, Millis, &mut Vec<Effect>)) {
        let mut effects = std::mem::take(&mut self.effects);
        event(&mut self.table, self.now, &mut effects);
        for effect in effects.drain(..) {
            self.log(effect);
            match self.connections[effect.client.0 as usize].protocol {
                Protocol::V1 => self.tell_v1(effect),
                Protocol::V2 { .. } => self.tell_v2(effect),
            }
            if effect.what == What::Expired {
                self.doom(effect.client, "it held for too long");
            }
        }
        self.effects = effects;
    }

    /// Takes everything from a client that is gone or must go. It is closed at the end of the turn, after what it is
    /// still to be told.
    fn doom(&mut self, client: ClientId, why: &str) {
        let connection = &mut self.connections[client.0 as usize];
        if connection.doomed {
            return;
        }
        connection.doomed = true;
        debug!("close: {}: {why}", self.name(client));
        self.mark_dirty(client);
        self.feed(|table, now, effects| table.gone(now, client, effects));
    }

    fn mark_dirty(&mut self, client: ClientId) {
        let connection = &mut self.connections[client.0 as usize];
        if !std::mem::replace(&mut connection.dirty, true) {
            self.dirty.push(client);
        }
    }

    /// Sends what there is to send, and closes those that are doomed.
    fn flush(&mut self) {
        let mut next = 0;
        // By index, because to close one client may give another something to be told.
        while let Some(&client) = self.dirty.get(next) {
            next += 1;
            self.connections[client.0 as usize].dirty = false;
            self.continue_status(client);
            let connection = &mut self.connections[client.0 as usize];
            let sent = connection.send();
            if connection.doomed {
                self.close(client);
                continue;
            }
            match sent {
                Sent::Gone => self.doom(client, "it is gone"),
                Sent::Part if connection.output().len() > OUTPUT_BYTES_MAX => {
                    self.doom(client, "it does not read what it is told");
                }
                Sent::Part => self.watch_output(client, true),
                Sent::All => {
                    let more = matches!(connection.protocol, Protocol::V2 { status: Some(_) });
                    self.watch_output(client, more);
                }
            }
        }
        self.dirty.clear();
    }

    /// Sets whether the loop is to be told when the connection can be written to.
    fn watch_output(&mut self, client: ClientId, blocked: bool) {
        let connection = &mut self.connections[client.0 as usize];
        if connection.blocked == blocked {
            return;
        }
        connection.blocked = blocked;
        let output = if blocked { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
        let source = Source::Connection(client, connection.generation);
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN | output, source.pack());
        if let Err(e) = self.epoll.modify(&*connection, &mut event) {
            warn!("cannot watch a connection: {e}");
            self.doom(client, "it cannot be watched");
        }
    }

    fn close(&mut self, client: ClientId) {
        // Closing takes it out of the epoll set too: nobody else has this open file (epoll(7), question 6).
        self.connections.remove(client.0 as usize);
        if self.connections.is_empty() {
            self.idle_since = Some(self.now);
        }
        if self.accepting != Accepting::Yes
            && let Err(e) = self.resume_accepting()
        {
            error!("cannot accept any more: {}", Reason(&e));
        }
    }

    fn pause_accepting(&mut self, why: Accepting) -> io::Result<()> {
        debug!("not accepting: {why:?}");
        self.accepting = why;
        for listener in &self.listeners {
            self.epoll.delete(listener.as_fd())?;
        }
        Ok(())
    }

    fn resume_accepting(&mut self) -> io::Result<()> {
        self.accepting = Accepting::Yes;
        for (index, listener) in self.listeners.iter().enumerate() {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Listener(index).pack());
            self.epoll.add(listener.as_fd(), event)?;
        }
        Ok(())
    }
}

/// Raises the limit of open files as far as it goes, and returns it.
fn raise_descriptor_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => Ok(hard),
        Err(e) => {
            warn!("cannot raise the limit of open files from {soft} to {hard}: {e}");
            Ok(soft)
        }
    }
}

/// Why the daemon cannot serve.
#[derive(Debug)]
pub enum Error {
    /// An address is wrong or cannot be resolved.
    Addr(addr::Error),
    /// A socket cannot be made.
    Bind {
        /// Where.
        addr: Addr,
        /// Why.
        error: io::Error,
    },
    /// The lock file that goes with a socket cannot be had.
    Claim {
        /// The lock file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Another daemon serves this socket.
    Served {
        /// The socket.
        path: PathBuf,
        /// The other daemon, if it has said who it is.
        pid: Option<u32>,
    },
    /// The group for the sockets is not known.
    Group {
        /// What was given.
        name: String,
        /// Why.
        why: String,
    },
    /// The kernel refused something.
    Os(&'static str, io::Error),
}

impl Error {
    fn bind(addr: &Addr, error: io::Error) -> Error {
        Error::Bind { addr: addr.clone(), error }
    }

    /// The exit code for it.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Addr(error) => error.exit(),
            Error::Bind { .. } | Error::Claim { .. } => Exit::CannotCreate,
            Error::Served { .. } => Exit::Busy,
            Error::Group { .. } => Exit::Usage,
            Error::Os(..) => Exit::Os,
        }
    }
}

impl From<addr::Error> for Error {
    fn from(error: addr::Error) -> Error {
        Error::Addr(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Addr(error) => error.fmt(f),
            Error::Bind { addr, error } => write!(f, "cannot serve on {addr}: {}", Reason(error)),
            Error::Claim { path, error } => write!(f, "cannot lock {}: {}", path.display(), Reason(error)),
            Error::Served { path, pid: Some(pid) } => {
                write!(f, "cannot serve on {}: the daemon with pid {pid} does", path.display())
            }
            Error::Served { path, pid: None } => {
                write!(f, "cannot serve on {}: another daemon does", path.display())
            }
            Error::Group { name, why } => write!(f, "bad --group {name:?}: {why}"),
            Error::Os(doing, error) => write!(f, "cannot {doing}: {}", Reason(error)),
        }
    }
}

impl std::error::Error for Error {}
