//! `kmutex hash-secret`.

use std::io::{self, IsTerminal, Read, Write};

use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use super::{Failure, failure};
use crate::addr::Reason;
use crate::auth;
use crate::exit::Exit;
use crate::proto::{SECRET_BYTES_MAX, Secret};

pub(super) fn hash_secret() -> Result<u8, Failure> {
    let os = |doing, e| failure(Exit::Os, format_args!("cannot {doing}: {}", Reason(&e)));
    let bytes = read_secret().map_err(|e| os("read the secret", e))?;
    let text = String::from_utf8(bytes).map_err(|_| failure(Exit::BadData, "the secret is not UTF-8"))?;
    let secret = Secret::new(text.strip_suffix('\n').unwrap_or(&text));
    let secret = secret.map_err(|e| failure(Exit::BadData, e))?;
    let hash = auth::hash(&secret);
    let hash = hash.map_err(|e| failure(Exit::Os, format_args!("cannot hash the secret: {e}")))?;
    writeln!(io::stdout(), "{hash}").map_err(|e| os("write the hash", e))?;
    Ok(0)
}

/// Reads one line from a terminal, without showing it, or another file up to its end.
fn read_secret() -> io::Result<Vec<u8>> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        let mut bytes = Vec::new();
        // One byte more than fits, so that a secret that is too long is noticed, and the newline.
        stdin.lock().take(SECRET_BYTES_MAX as u64 + 2).read_to_end(&mut bytes)?;
        return Ok(bytes);
    }
    let shown = tcgetattr(&stdin)?;
    let mut hidden = shown.clone();
    hidden.local_modes.remove(LocalModes::ECHO);
    write!(io::stderr(), "Secret: ")?;
    tcsetattr(&stdin, OptionalActions::Flush, &hidden)?;
    let mut line = String::new();
    let read = stdin.read_line(&mut line);
    tcsetattr(&stdin, OptionalActions::Flush, &shown)?;
    writeln!(io::stderr())?;
    read.map(|_| line.into_bytes())
}
