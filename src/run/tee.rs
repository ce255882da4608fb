//! Keeps the output of a command for others while passing it on: the command writes to two pipes; one thread appends what
//! arrives to a file in memory, and another one writes what is in the file to kmutex's own standard output and standard
//! error. So neither a slow reader of kmutex's output nor any waiter slows the command, as long as the file may grow.
//!
//! An output that is too long to be shared is only passed on from there on: directly, as slowly as it is read.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};

use crate::any_signal;
use crate::client::HeldLock;
use crate::output::{OutputFile, Reader, Stream};
use crate::startup;
use crate::streams;

/// How much is read from a pipe at a time.
const READ_BYTES: usize = 64 * 1024;
/// The clients that read the output as it comes are told of more at most this often.
const TELL_EVERY: Duration = Duration::from_millis(10);

/// What becomes of the output for others.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It is complete.
    Complete,
    /// Only kmutex's own caller got it, and why.
    Withheld(String),
    /// The command was cut off, because kmutex's caller does not read its output any more.
    CutOff,
}

/// The output of one command.
pub(super) struct Tee {
    shared: Arc<Shared>,
    file: Option<OutputFile>,
    writes: Option<[OwnedFd; 2]>,
    reads: Option<[OwnedFd; 2]>,
    max: u64,
    reader: Option<JoinHandle<()>>,
    writer: Option<JoinHandle<()>>,
    /// Until when no client is told of more.
    quiet_until: Option<Instant>,
    is_withheld: bool,
}

/// What the threads have in common.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Wakes the thread that reads.
    wake: EventFd,
    /// Wakes the thread that has the lock.
    news: EventFd,
}

#[derive(Default)]
struct State {
    /// How long the file is.
    length: u64,
    /// How much of it was written to kmutex's own streams.
    written: u64,
    /// The command has ended.
    has_ended: bool,
    /// Nothing more will be read.
    is_read: bool,
    /// The streams of kmutex's own that no process reads any more.
    closed: [bool; 2],
    is_cut_off: bool,
    withheld: Option<String>,
    error: Option<io::Error>,
    /// A client wants to know when there is more.
    is_followed: bool,
    has_grown: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a panic ends the process")
    }

    /// Changes the state, and tells the other threads.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.changed.notify_all();
        result
    }

    /// Waits until the state is as it should be.
    fn wait_until(&self, is_so: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        self.changed.wait_while(self.state(), |state| !is_so(state)).expect("a panic ends the process")
    }
}

impl Tee {
    /// Pipes for a command. At most `max` bytes of its output are kept.
    ///
    /// # Errors
    /// Those of memfd_create(2), pipe(2) and eventfd(2).
    pub(super) fn new(max: u64) -> io::Result<Tee> {
        let [(out_read, out_write), (err_read, err_write)] = [pipe()?, pipe()?];
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = || EventFd::from_flags(flags).map_err(io::Error::from);
        let shared =
            Shared { state: Mutex::default(), changed: Condvar::new(), wake: event()?, news: event()? };
        Ok(Tee {
            shared: Arc::new(shared),
            file: Some(OutputFile::new()?),
            writes: Some([out_write, err_write]),
            reads: Some([out_read, err_read]),
            max,
            reader: None,
            writer: None,
            quiet_until: None,
            is_withheld: false,
        })
    }

    /// Returns a descriptor of the file for others.
    ///
    /// # Errors
    /// As open(2), where /proc is missing.
    pub(super) fn for_readers(&self) -> io::Result<OwnedFd> {
        self.file.as_ref().expect("the threads have not begun").for_readers()
    }

    /// Returns what the command is to have as standard output and standard error.
    pub(super) fn writes(&self) -> Option<[BorrowedFd<'_>; 2]> {
        self.writes.as_ref().map(|writes| [writes[0].as_fd(), writes[1].as_fd()])
    }

    /// Begins to read. Called before the command is started, so that it does not run if this fails, and when all signals are
    /// blocked.
    ///
    /// # Errors
    /// As pthread_create(3).
    pub(super) fn start(&mut self) -> io::Result<()> {
        let (Some(file), Some(reads)) = (self.file.take(), self.reads.take()) else { return Ok(()) };
        let own = file.output()?.reader();
        let shared = Arc::clone(&self.shared);
        let writer = move || write_own(&shared, own);
        self.writer = Some(any_signal::start_thread(Builder::new().name("write".into()), writer)?);
        let reading = Reading {
            shared: Arc::clone(&self.shared),
            pipes: reads.map(Some),
            file: Some(file),
            room: self.max,
        };
        self.reader =
            Some(any_signal::start_thread(Builder::new().name("read".into()), move || reading.run())?);
        Ok(())
    }

    /// The command has been started: only it writes to the pipes from now on.
    pub(super) fn command_is_started(&mut self) {
        self.writes = None;
    }

    /// Returns the descriptor that becomes readable when [`Tee::tell`] has something to do.
    pub(super) fn news(&self) -> Option<BorrowedFd<'_>> {
        self.quiet_until.is_none().then(|| self.shared.news.as_fd())
    }

    /// Returns when [`Tee::news`] is there again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.quiet_until
    }

    /// Tells the daemon what has changed.
    pub(super) fn tell(&mut self, hold: &mut HeldLock) {
        if self.quiet_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        self.quiet_until = None;
        // If there is none, nothing has changed.
        let _ = self.shared.news.read();
        let mut state = self.shared.state();
        let begins = hold.is_followed() && !std::mem::replace(&mut state.is_followed, hold.is_followed());
        let has_grown = std::mem::take(&mut state.has_grown) && state.is_followed;
        let withheld = state.withheld.clone().filter(|_| !self.is_withheld);
        drop(state);
        if let Some(why) = withheld {
            self.is_withheld = true;
            hold.withhold_output(why);
        } else if (begins || has_grown) && !self.is_withheld {
            hold.output_has_grown();
            self.quiet_until = Some(Instant::now() + TELL_EVERY);
        }
    }

    /// The command has ended: reads what is left in the pipes. What other processes write later is not part of the output.
    pub(super) fn end(&mut self) -> End {
        self.shared.change(|state| state.has_ended = true);
        wake(&self.shared.wake);
        let state = self.shared.wait_until(|state| state.is_read || state.withheld.is_some());
        match &state.withheld {
            _ if state.is_cut_off => End::CutOff,
            Some(why) => End::Withheld(why.clone()),
            None => End::Complete,
        }
    }

    /// Waits until kmutex's caller has read the output. A signal that is sent to kmutex meanwhile ends it.
    ///
    /// # Errors
    /// Those of write(2), but for a pipe that no process reads any more.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let enders = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];
        let enders: SigSet = enders.into_iter().filter(|signal| !startup::ignores(*signal as i32)).collect();
        enders.thread_unblock()?;
        for thread in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            thread.join().expect("a panic ends the process");
        }
        self.shared.state().error.take().map_or(Ok(()), Err)
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = io::pipe()?;
    // Only this end: the command's is as the command expects it.
    fcntl(&read, FcntlArg::F_SETFL(OFlag::O_RDONLY | OFlag::O_NONBLOCK))?;
    Ok((read.into(), write.into()))
}

fn wake(event: &EventFd) {
    // It is full only if it was not read for 2^64 times.
    let _ = event.write(1);
}

/// The thread that reads the pipes.
struct Reading {
    shared: Arc<Shared>,
    pipes: [Option<OwnedFd>; 2],
    /// `None`: the output is not shared any more.
    file: Option<OutputFile>,
    /// How much more may be kept.
    room: u64,
}

impl Reading {
    fn run(mut self) {
        let mut buffer = vec![0; READ_BYTES];
        while self.pipes.iter().any(Option::is_some) {
            let has_ended = self.wait();
            if !has_ended {
                self.drop_closed();
            }
            let mut has_read = false;
            for (index, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
                has_read |= self.read(index, stream, &mut buffer);
            }
            if has_ended && !has_read {
                break;
            }
        }
        if let Some(file) = self.file.take()
            && let Err(e) = file.seal()
        {
            self.withhold(format!("the output cannot be kept: {e}"));
        }
        self.shared.change(|state| state.is_read = true);
    }

    /// Waits for the command to write. Returns `true` if it has ended, and does not wait then.
    fn wait(&self) -> bool {
        if self.shared.state().has_ended {
            return true;
        }
        let pipes = self.pipes.iter().flatten().map(AsFd::as_fd);
        let fds = pipes.chain([self.shared.wake.as_fd()]).map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        // An error ends no wait that would not end without it.
        let _ = poll(&mut fds.collect::<Vec<_>>(), PollTimeout::NONE);
        let _ = self.shared.wake.read();
        self.shared.state().has_ended
    }

    /// Closes the pipes of which kmutex's own caller does not read the output any more: the command finds them as it would
    /// find its own.
    fn drop_closed(&mut self) {
        let closed = self.shared.state().closed;
        for (pipe, _) in self.pipes.iter_mut().zip(closed).filter(|(_, is_closed)| *is_closed) {
            if pipe.take().is_some() {
                self.shared.change(|state| state.is_cut_off = true);
            }
        }
    }

    /// Reads once from a pipe. Returns `true` if there may be more.
    fn read(&mut self, index: usize, stream: Stream, buffer: &mut [u8]) -> bool {
        let Some(pipe) = &self.pipes[index] else { return false };
        match nix::unistd::read(pipe, buffer) {
            Ok(0) => self.pipes[index] = None,
            Ok(bytes) => self.pass_on(stream, &buffer[..bytes]),
            Err(Errno::EAGAIN) => return false,
            Err(Errno::EINTR) => {}
            Err(_) => self.pipes[index] = None,
        }
        true
    }

    fn pass_on(&mut self, stream: Stream, bytes: &[u8]) {
        if let Some(file) = &mut self.file {
            let room = self.room.checked_sub(bytes.len() as u64);
            let kept = room.map(|room| (room, file.append(stream, bytes).and_then(|()| file.length())));
            let why = match kept {
                Some((room, Ok(length))) => {
                    self.room = room;
                    return self.has_grown(length);
                }
                Some((_, Err(e))) => format!("the output cannot be kept: {e}"),
                None => "the output is longer than --share-max".into(),
            };
            self.withhold(why);
            self.file = None;
        }
        write_own_directly(&self.shared, stream, bytes);
    }

    fn has_grown(&self, length: u64) {
        let is_news = self.shared.change(|state| {
            state.length = length;
            state.is_followed && !std::mem::replace(&mut state.has_grown, true)
        });
        if is_news {
            wake(&self.shared.news);
        }
    }

    /// The output is not for others any more. Waits until what was kept of it is written.
    fn withhold(&mut self, why: String) {
        self.shared.change(|state| state.withheld = Some(why));
        wake(&self.shared.news);
        drop(self.shared.wait_until(|state| state.written == state.length));
    }
}

/// The thread that writes what is kept to kmutex's own streams.
fn write_own(shared: &Shared, mut reader: Reader) {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let offset = reader.offset();
        shared.change(|state| state.written = offset);
        let state =
            shared.wait_until(|state| state.length > offset || state.is_read || state.withheld.is_some());
        if state.length <= offset {
            return;
        }
        drop(state);
        match reader.read(&mut buffer) {
            Ok(Some((stream, length))) => write_own_directly(shared, stream, &buffer[..length]),
            Ok(None) => {}
            Err(e) => return shared.change(|state| (state.written, state.error) = (state.length, Some(e))),
        }
    }
}

fn write_own_directly(shared: &Shared, stream: Stream, bytes: &[u8]) {
    let index = usize::from(stream.number()) - 1;
    if shared.state().closed[index] {
        return;
    }
    match streams::write_all(stream, bytes) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
            shared.change(|state| state.closed[index] = true);
            wake(&shared.wake);
        }
        // The output is still there for the others.
        Err(e) => shared.change(|state| state.error = state.error.take().or(Some(e))),
    }
}
