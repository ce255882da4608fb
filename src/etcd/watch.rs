//! A watch: the messages that etcd sends for as long as somebody reads them.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;

use ureq::{Body, BodyReader};

use super::auth::Tokens;
use super::codec;
use super::error::{Error, Failure};
use super::http::{REPLY_BYTES_MAX, describe_io_error, too_long};
use super::{Endpoint, WatchReply};

/// A watch that was opened. Dropping it ends it.
pub struct Watch {
    endpoint: Endpoint,
    lines: BufReader<BodyReader<'static>>,
    tokens: Arc<Tokens>,
    token: Option<String>,
}

impl Watch {
    pub(super) fn new(endpoint: Endpoint, body: Body, tokens: Arc<Tokens>, token: Option<String>) -> Watch {
        // All messages together have no limit; each one has.
        let body = body.into_with_config().limit(u64::MAX).reader();
        Watch { endpoint, lines: BufReader::new(body), tokens, token }
    }

    /// Waits for the next message, without a limit: etcd says nothing as long as nothing happens, and nothing either
    /// when it can no more. [`super::Client::hang_up`] ends the wait.
    ///
    /// # Errors
    /// [`Error::Unknown`] when the connection ended, [`Error::Refused`] when etcd ended it, [`Error::BadReply`]. The
    /// watch is over then: what has happened since the last message can be had by a new one, from the revision behind.
    #[expect(clippy::should_implement_trait, reason = "it ends with an error, and that must be looked at")]
    pub fn next(&mut self) -> Result<WatchReply, Error> {
        let reply = self.line().and_then(|line| codec::read_watch(&line));
        if let Ok(WatchReply { canceled: Some(reason), .. }) = &reply
            && (reason.contains("permission denied") || reason.contains("auth"))
        {
            // So etcd 3.4 calls a token that has ended, too. The next call gets a new one.
            self.tokens.forget(self.token.as_deref());
        }
        reply.map_err(|failure| failure.into_error(&self.endpoint))
    }

    fn line(&mut self) -> Result<Vec<u8>, Failure> {
        let mut line = Vec::new();
        let read = self.lines.by_ref().take(REPLY_BYTES_MAX).read_until(b'\n', &mut line);
        match read {
            Err(e) => Err(Failure::no_answer(describe_io_error(&e))),
            Ok(0) => Err(Failure::no_answer("the watch has ended")),
            Ok(_) if line.ends_with(b"\n") => Ok(line),
            Ok(bytes) if bytes as u64 >= REPLY_BYTES_MAX => Err(too_long()),
            // The gateway ends the line of every message, but not that of an error, which is the last.
            Ok(_) => Ok(line),
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}
