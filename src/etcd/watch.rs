//! A watch: the messages that etcd sends while a caller reads them.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;

use ureq::{Body, BodyReader};

use super::auth::Tokens;
use super::codec;
use super::error::{Error, Failure};
use super::http::describe_io_error;
use super::store::{Currency, Seen, Store};
use super::{Endpoint, WatchReply};

/// The longest message, in bytes. etcd divides longer ones, unless a single value is as long.
const MESSAGE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// How many messages in a row may tell nothing.
const EMPTY_MAX: u32 = 1_000;

/// A watch that was opened. Dropping it ends it.
pub struct Watch {
    endpoint: Endpoint,
    lines: BufReader<BodyReader<'static>>,
    tokens: Arc<Tokens>,
    token: Option<String>,
    /// What is known of the store, now and when the watch was opened.
    store: (Arc<Store>, Seen),
    /// How many messages in a row have told nothing.
    empty: u32,
    /// How often watches had been ended when it was opened.
    hang_ups: u64,
}

impl Watch {
    pub(super) fn new(
        endpoint: Endpoint,
        body: Body,
        (tokens, token): (Arc<Tokens>, Option<String>),
        store: (Arc<Store>, Seen),
        hang_ups: u64,
    ) -> Watch {
        // There is a limit for each message, not for all of them together.
        let body = body.into_with_config().limit(u64::MAX).reader();
        Watch { endpoint, lines: BufReader::new(body), tokens, token, store, empty: 0, hang_ups }
    }

    /// Returns how often [`super::Client::hang_up`] had been called when this was opened. If it was called since, this watch ends.
    pub fn hang_ups(&self) -> u64 {
        self.hang_ups
    }

    /// Waits for the next message, without a limit: etcd is silent while nothing happens, and also when it hangs.
    /// [`super::Client::hang_up`] ends the wait.
    ///
    /// # Errors
    /// [`Error::Unknown`] if the connection ended, [`Error::Refused`] if etcd ended it, [`Error::BadReply`], and
    /// [`Error::StoreChanged`]. The watch is over then. A new one, from the revision after the last message, reports what
    /// happened since.
    #[expect(clippy::should_implement_trait, reason = "it ends with an error, and that must be looked at")]
    pub fn next(&mut self) -> Result<WatchReply, Error> {
        let line = self.line().map_err(|failure| failure.into_error(&self.endpoint))?;
        let reply = codec::read_watch(&line).and_then(|reply| self.limit_empty(reply));
        let (store, opened) = &self.store;
        store.check(*opened, codec::read_header(&line), Currency::Local)?;
        if let Ok(WatchReply { canceled: Some(reason), .. }) = &reply
            && (reason.contains("permission denied") || reason.contains("auth"))
        {
            // etcd 3.4 also says this of a token that has expired. The next call gets a new one.
            self.tokens.forget(self.token.as_deref());
        }
        reply.map_err(|failure| failure.into_error(&self.endpoint))
    }

    /// A watch has something to tell now and then, and reports its progress every ten minutes. What sends one empty message
    /// after the other is no etcd.
    fn limit_empty(&mut self, reply: WatchReply) -> Result<WatchReply, Failure> {
        let is_empty = reply.events.is_empty() && reply.canceled.is_none() && reply.compact_revision == 0;
        self.empty = if is_empty { self.empty + 1 } else { 0 };
        match self.empty {
            0..=EMPTY_MAX => Ok(reply),
            _ => Err(Failure::BadReply("bad answer: its messages tell nothing".into())),
        }
    }

    fn line(&mut self) -> Result<Vec<u8>, Failure> {
        let mut line = Vec::new();
        let read = self.lines.by_ref().take(MESSAGE_BYTES_MAX).read_until(b'\n', &mut line);
        match read {
            Err(e) => Err(Failure::no_answer(describe_io_error(&e))),
            Ok(0) => Err(Failure::no_answer("the watch has ended")),
            Ok(_) if line.ends_with(b"\n") => Ok(line),
            Ok(bytes) if bytes as u64 >= MESSAGE_BYTES_MAX => {
                Err(Failure::BadReply(format!("a message is longer than {MESSAGE_BYTES_MAX} bytes")))
            }
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
