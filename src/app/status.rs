//! `kmutex status`.

use std::io;

use super::{Failure, lock};
use crate::cli;
use crate::client::Target;
use crate::place::{self, Found, Missing};
use crate::status::{self, Format, Question, Which};

pub(super) fn status(args: cli::Status) -> Result<u8, Failure> {
    let format = match (args.json, args.keys) {
        (true, _) => Format::Json,
        (_, true) => Format::Keys,
        (false, false) => Format::People,
    };
    let which = match (args.key.map(lock::key).transpose()?, args.cluster) {
        (Some(key), _) => Which::Key(key),
        (None, true) => Which::Cluster,
        (None, false) => Which::All,
    };
    let place = place::find(args.daemon.sock.as_deref(), &args.daemon.trust_uid, Missing::Name)?;
    // What the user has said needs no telling.
    let heading = match place.found {
        Found::Given => None,
        found => Some(format!("daemon: {} ({})", place.addr, found.describe())),
    };
    let target = lock::with_options(&args.daemon, Target::new(place.addr));
    let question = Question { target: &target, which: &which, heading: heading.as_deref() };
    let printed = match args.watch {
        true => status::watch(&question, &mut io::stdout().lock()),
        false => status::print(&question, format, &mut io::BufWriter::new(io::stdout().lock())),
    };
    match printed {
        // The reader of the pipe has read enough, as `head` does.
        Err(status::Error::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        other => Ok(other.map(|()| 0)?),
    }
}
