//! Starting a daemon on a Unix socket where there is none.
//!
//! Many clients may do so at the same moment. They all start one; the lock file lets one of these serve, the others end
//! at once, and every client connects to the one that serves.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Error;
use crate::addr::{Addr, Reason};
use crate::exit::Exit;
use crate::lock_file;

/// How long such a daemon stays without connections and locks.
const IDLE_EXIT_SECS: &str = "60";
/// How long to wait for a daemon that this client or another one is starting.
const START_WAIT: Duration = Duration::from_secs(10);
/// After this time, a daemon that serves a socket that is not there has lost it.
const SOCKET_WAIT: Duration = Duration::from_millis(700);
/// The name of the program.
const PROGRAM: &str = "kmutex";

/// Starts a daemon, unless another client does, and connects to the one that serves. Takes no longer than `deadline`.
pub(super) fn start_and_connect(path: &Path, deadline: Option<Instant>) -> Result<OwnedFd, Error> {
    let addr = Addr::Unix(path.into());
    let began = Instant::now();
    let give_up = deadline.unwrap_or(began + START_WAIT).min(began + START_WAIT);
    let mut pause = Duration::from_millis(1);
    loop {
        let begins = Instant::now();
        let started = start(path, deadline.unwrap_or(begins + START_WAIT).min(begins + START_WAIT))?;
        match addr.connect(deadline) {
            Err(e) if e.is_absent() && Instant::now() < give_up => {}
            other => return Ok(other?),
        }
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Error::TimedOut);
        }
        if began.elapsed() > SOCKET_WAIT
            && let Some(pid) = lock_file::pid_without_socket(path)
        {
            return Err(Error::SocketGone { path: path.into(), pid });
        }
        // Another daemon holds the lock file and does not listen yet (or is just ending): there is no event to wait
        // for that would tell when it does.
        if !started {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }
}

/// Starts a daemon and waits until it serves. False: another one does or is about to, or this one was killed.
fn start(path: &Path, give_up: Instant) -> Result<bool, Error> {
    let failed = |why: String| Error::Autostart { path: path.into(), why };
    let os = |e: io::Error| failed(Reason(&e).to_string());
    let mut child = command(path).map_err(os)?.spawn().map_err(os)?;
    let answer = Answer::read(&mut child, give_up);
    if matches!(answer, Err(ref e) if e.kind() == io::ErrorKind::TimedOut) {
        // It is this process's own child, and of no use any more. It may have ended.
        let _ = child.kill();
    }
    // It ends as soon as the daemon, its child, serves, and leaves nothing behind for the command to find among its
    // children. Where SIGCHLD is ignored, wait(2) fails although the child has ended; its answer says all.
    let _ = child.wait();
    let answer = answer.map_err(os)?;
    match answer.code.as_deref() {
        Some("") => Ok(true),
        Some(code) if code == Exit::Busy.code().to_string() => Ok(false),
        // It was killed on its way, perhaps by a process that does not kill the next one.
        None if answer.said.is_empty() => Ok(false),
        _ => Err(failed(answer.said.trim().trim_start_matches("kmutex: ").replace('\n', "; "))),
    }
}

/// What a starting daemon says.
struct Answer {
    /// Its line on standard output: empty if it serves, the exit code if not. `None`: it died without a word.
    code: Option<String>,
    /// Its message on standard error.
    said: String,
}

impl Answer {
    fn read(child: &mut Child, give_up: Instant) -> io::Result<Answer> {
        let mut line = Vec::new();
        let mut said = Vec::new();
        if let Some(stdout) = &mut child.stdout {
            read_until_end(stdout, give_up, &mut line)?;
        }
        let line = String::from_utf8_lossy(&line);
        let code = line.strip_suffix('\n').map(String::from);
        // The daemon itself has neither of the two.
        if code.as_deref() != Some("")
            && let Some(stderr) = &mut child.stderr
        {
            read_until_end(stderr, give_up, &mut said)?;
        }
        Ok(Answer { code, said: String::from_utf8_lossy(&said).into_owned() })
    }
}

/// Reads a pipe to its end.
fn read_until_end(pipe: &mut (impl Read + AsFd), give_up: Instant, into: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = [0; 1024];
    loop {
        let left = give_up.saturating_duration_since(Instant::now());
        let millis = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        let timeout = PollTimeout::try_from(millis).expect("it is from 1 to i32::MAX");
        match poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if left.is_zero() => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not start in time"));
            }
            Ok(0) | Err(nix::Error::EINTR) => continue,
            other => other?,
        };
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(bytes) => into.extend_from_slice(&buffer[..bytes]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// The command that starts a daemon, with nothing of this process's environment but the search path.
fn command(path: &Path) -> io::Result<Command> {
    let mut command = Command::new(program()?);
    command.args(["serve", "--detach", "--idle-exit", IDLE_EXIT_SECS, "--sock"]);
    command.arg(OsString::from(&Addr::Unix(path.into()))).env_clear();
    let kept = ["PATH", if cfg!(feature = "failpoints") { "KMUTEX_FAILPOINT" } else { "PATH" }];
    command.envs(kept.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

/// Returns the program to start: this one; or, if an upgrade has replaced it, the one at the path by which it was started;
/// or, in a program that uses the library, the `kmutex` in the search path.
fn program() -> io::Result<PathBuf> {
    let first = std::env::args_os().next().unwrap_or_default();
    let Ok(running) = std::env::current_exe() else { return search(&first) };
    let name = running.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // proc(5), /proc/PID/exe.
    let Some(old_name) = name.strip_suffix(" (deleted)").filter(|_| !running.exists()) else {
        return match name == PROGRAM {
            true => Ok(running),
            false => search(OsStr::new(PROGRAM)).or(if name.starts_with(PROGRAM) {
                Ok(running)
            } else {
                Err(io::Error::other("there is no kmutex in $PATH"))
            }),
        };
    };
    if let Ok(found) = search(&first) {
        return Ok(found);
    }
    let same_path = running.with_file_name(old_name);
    // The program that runs can be executed even if it has no name any more.
    Ok(if same_path.exists() { same_path } else { "/proc/self/exe".into() })
}

/// Finds a program as a shell does.
fn search(name: &OsStr) -> io::Result<PathBuf> {
    let not_found = || io::Error::new(io::ErrorKind::NotFound, "the program kmutex is not found");
    if name.as_encoded_bytes().contains(&b'/') {
        return Some(PathBuf::from(name)).filter(|path| path.is_file()).ok_or_else(not_found);
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.filter(|_| !name.is_empty()).ok_or_else(not_found)
}
