//! `kmutex status`.

use std::io;

use super::{Failure, lock};
use crate::cli;
use crate::status::{self, Format, Which};

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
    let target = lock::target(&args.daemon, false)?;
    let printed = match args.watch {
        true => status::watch(&target, &which, &mut io::stdout().lock()),
        false => status::print(&target, &which, format, &mut io::BufWriter::new(io::stdout().lock())),
    };
    match printed {
        // The reader of the pipe has read enough, as `head` does.
        Err(status::Error::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        other => Ok(other.map(|()| 0)?),
    }
}
