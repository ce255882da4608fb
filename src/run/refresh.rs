//! Running a command anew in the background, while its caller has an older result (`--stale`). The caller's kmutex has the lock;
//! it starts itself once more, and the new process takes the lock over: it sends the same request with the same nonce.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use nix::unistd::{dup2_stdin, dup2_stdout, setsid};

use crate::client::{self, LockReply, NoObserver, Session, Target};
use crate::fd;
use crate::proto::v2::LockRequest;
use crate::proto::{Nonce, Token};

/// The process that runs the command.
pub(super) struct Background(std::process::Child);

impl Background {
    /// Starts it. It keeps nothing of what this process has open.
    ///
    /// # Errors
    /// Those of fork(2) and execve(2).
    pub(super) fn start(request: &LockRequest, token: Token) -> io::Result<Background> {
        let nonce = request.nonce.ok_or_else(|| io::Error::other("the request has no nonce"))?;
        let mut args = std::env::args_os().skip(1);
        let mut child = Command::new("/proc/self/exe")
            .args(args.next())
            .arg("--refresh")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut stdin = child.stdin.take().expect("it is piped");
        writeln!(stdin, "{} {token}", String::from(nonce))?;
        Ok(Background(child))
    }

    /// Waits until it has taken the lock over. (If it cannot, the lock ends with this process.)
    pub(super) fn wait(mut self) {
        if let Some(mut stdout) = self.0.stdout.take() {
            // The line, or the end of a process that has failed.
            let _ = stdout.read(&mut [0]);
        }
    }
}

/// In the new process: takes the lock over.
///
/// # Errors
/// When the lock is lost, or there is none.
pub(super) fn take_over(
    target: &Target,
    request: LockRequest,
) -> Result<(LockRequest, Session, Token), client::Error> {
    let os = |e: io::Error| client::Error::Io("begin to run in the background", e);
    // Before this process opens anything itself.
    fd::close_all_but(&[]).map_err(os)?;
    let mut line = String::new();
    BufReader::new(io::stdin()).read_line(&mut line).map_err(os)?;
    let (nonce, token) = parse(line.trim_end()).ok_or_else(|| os(io::ErrorKind::InvalidInput.into()))?;
    let nothing = std::fs::File::options().read(true).write(true).open("/dev/null").map_err(os)?;
    dup2_stdin(&nothing).map_err(|e| os(e.into()))?;
    // Keys at the caller's terminal are not for this process. It fails only for the leader of a group.
    let _ = setsid();
    let request = LockRequest { nonce: Some(nonce), holds: Some(token), ..request };
    let (session, reply) = client::lock(target, &request, None, &mut NoObserver)?;
    if reply != LockReply::Granted(token) {
        return Err(client::Error::Lost("another client has it".into()));
    }
    // A caller that is gone needs no answer.
    let _ = io::stdout().write_all(b"\n").and_then(|()| io::stdout().flush());
    let nothing = std::fs::File::options().write(true).open("/dev/null").map_err(os)?;
    dup2_stdout(&nothing).map_err(|e| os(e.into()))?;
    Ok((LockRequest { holds: None, ..request }, session, token))
}

fn parse(line: &str) -> Option<(Nonce, Token)> {
    let (nonce, token) = line.split_once(' ')?;
    Some((Nonce::try_from(nonce.to_string()).ok()?, Token(token.parse().ok()?)))
}
