//! Starting a daemon on a Unix socket where there is none.
//!
//! Many clients may do so at the same moment. They all start one; the lock file lets one of these serve, the others end
//! at once, and every client connects to the one that serves.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Error;
use crate::addr::{Addr, Reason};
use crate::exit::Exit;

/// How long such a daemon stays without connections and locks.
const IDLE_EXIT_SECS: &str = "60";
/// How long to wait for a daemon that somebody else is starting.
const START_WAIT: Duration = Duration::from_secs(10);

/// Starts a daemon, unless somebody else does, and connects to whichever serves.
pub(super) fn start_and_connect(path: &Path, deadline: Option<Instant>) -> Result<OwnedFd, Error> {
    let addr = Addr::Unix(path.into());
    let give_up = Instant::now() + START_WAIT;
    let mut pause = Duration::from_millis(1);
    loop {
        let started = start(path)?;
        match addr.connect(deadline) {
            Err(e) if e.is_absent() && Instant::now() < give_up => {}
            other => return Ok(other?),
        }
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Error::TimedOut);
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
fn start(path: &Path) -> Result<bool, Error> {
    let failed = |why: String, exit| Error::Autostart { path: path.into(), why, exit };
    let os = |e: io::Error| failed(Reason(&e).to_string(), Exit::Unavailable);
    let program = std::env::current_exe().map_err(os)?;
    // The process that is waited for here ends as soon as the daemon, its child, listens; it leaves nothing behind for
    // the command to find among its children.
    let output = Command::new(program)
        .args(["serve", "--detach", "--idle-exit", IDLE_EXIT_SECS, "--sock"])
        .arg(std::ffi::OsString::from(&Addr::Unix(path.into())))
        .stdin(Stdio::null())
        .output()
        .map_err(os)?;
    if output.status.success() {
        return Ok(true);
    }
    match output.status.code() {
        Some(code) if code == i32::from(Exit::Busy.code()) => return Ok(false),
        // It was killed on its way, by somebody who may not kill the next one.
        None => return Ok(false),
        Some(_) => {}
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let why = said.trim().trim_start_matches("kmutex: ").replace('\n', "; ");
    let exit = match output.status.code() {
        Some(code) if code == i32::from(Exit::CannotCreate.code()) => Exit::CannotCreate,
        _ => Exit::Unavailable,
    };
    Err(failed(why, exit))
}
