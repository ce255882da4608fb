//! `kmutex break`.

use super::{Failure, lock};
use crate::break_lock::{self, Confirm};
use crate::cli;

pub(super) fn break_lock(args: cli::Break) -> Result<u8, Failure> {
    let confirm = if args.yes { Confirm::Given } else { Confirm::Ask };
    break_lock::break_lock(&lock::target(&args.daemon, false)?, lock::key(args.key)?, confirm)?;
    Ok(0)
}
