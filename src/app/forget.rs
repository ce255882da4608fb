//! `kmutex forget`.

use super::{Failure, failure, lock};
use crate::cli;
use crate::client::{self, Session};
use crate::exit::Exit;
use crate::proto::v2::{Answer, ErrorCode, Request};

pub(super) fn forget(args: cli::Forget) -> Result<u8, Failure> {
    let (target, key) = (lock::target(&args.daemon, false)?, lock::key(args.key)?);
    let mut session = Session::connect_within(&target, 3 * client::PROMPT_WAIT)?;
    match session.call(&Request::Forget { key })? {
        Answer::Forgotten => Ok(0),
        Answer::Error { code: ErrorCode::NotPermitted, message } => Err(failure(Exit::NotPermitted, message)),
        other => Err(client::Error::unexpected(other).into()),
    }
}
