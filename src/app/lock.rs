//! `kmutex lock` and `kmutex unlock`, and what every command that names a lock has in common: its key, its daemon, and how
//! to ask for it.

use std::ffi::OsStr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use super::{Failure, failure, usage};
use crate::acquire::{Acquire, Wait};
use crate::cli;
use crate::client::Target;
use crate::exit::Exit;
use crate::lock::{self, Lifetime, LockResult};
use crate::proto::{Key, v2::Mode};

pub(super) fn lock(args: cli::Lock) -> Result<u8, Failure> {
    let request = acquire(&args.lock, key(args.key)?)?;
    Ok(match lock::lock(&request, Lifetime::new(args.pid, args.fd))? {
        LockResult::Held(_) => 0,
        LockResult::Finished(status) => status.unwrap_or(args.lock.finished_exit_code),
        LockResult::Superseded => args.lock.finished_exit_code,
        LockResult::Busy => args.lock.conflict_exit_code,
    })
}

pub(super) fn unlock(args: cli::Unlock) -> Result<u8, Failure> {
    lock::unlock(&target(&args.daemon, false)?, key(args.key)?, Lifetime::new(args.pid, args.fd))?;
    Ok(0)
}

/// Which lock the arguments ask for, and how.
pub(super) fn acquire(args: &cli::LockArgs, key: Key) -> Result<Acquire, Failure> {
    let replaces = args.replace || args.replace_after.is_some();
    if args.weight.is_some_and(|weight| weight > args.slots) {
        return Err(usage("--weight is more than --slots: the lock would never be granted"));
    }
    Ok(Acquire {
        target: target(&args.daemon, !args.no_autostart)?,
        key,
        mode: match args {
            _ if args.coalesce => Mode::Coalesce,
            _ if args.queue || args.newest || replaces => Mode::Queue,
            _ => Mode::Once,
        },
        shared: args.shared,
        slots: args.slots,
        wait: match args.wait {
            _ if args.nonblock => Wait::Never,
            None => Wait::Forever,
            Some(Duration::ZERO) => Wait::Never,
            Some(limit) => Wait::For(limit),
        },
        on_peer_failure: args.on_peer_failure,
        fresh: args.fresh.unwrap_or_default(),
        fresh_failure: args.fresh_failure.unwrap_or_default(),
        newest: args.newest || replaces,
        replace_after: replaces.then(|| args.replace_after.unwrap_or_default()),
        no_replace: args.no_replace,
        weight: args.weight.and_then(NonZeroU32::new),
        share: None,
        stale: Duration::ZERO,
        note: args.note.to_string_lossy().into_owned(),
        verbose: args.verbose,
    })
}

/// Which daemon the arguments name, or else where it is by default.
pub(super) fn target(args: &cli::Daemon, autostart: bool) -> Result<Target, Failure> {
    Ok(with_options(args, Target::find(args.sock.as_deref(), args.trust_uid.clone(), autostart)?))
}

/// Returns the same target with the files that the arguments name for it.
pub(super) fn with_options(args: &cli::Daemon, target: Target) -> Target {
    Target {
        trusted_uids: args.trust_uid.clone(),
        auth_file: or_variable(&args.auth_file, "KMUTEX_AUTH_FILE"),
        #[cfg(feature = "tls")]
        tls: crate::tls::ClientFiles {
            ca: or_variable(&args.tls_ca, "KMUTEX_TLS_CA"),
            cert: or_variable(&args.tls_cert, "KMUTEX_TLS_CERT"),
            key: or_variable(&args.tls_key, "KMUTEX_TLS_KEY"),
        },
        ..target
    }
}

/// Returns the file that an option names, or else the one that the environment names.
pub(super) fn or_variable(option: &Option<PathBuf>, variable: &str) -> Option<PathBuf> {
    let from_environment = || std::env::var_os(variable).filter(|path| !path.is_empty());
    option.clone().or_else(|| from_environment().map(PathBuf::from))
}

/// A key as it stands on the command line.
pub(super) fn key(text: impl AsRef<OsStr>) -> Result<Key, Failure> {
    let Some(text) = text.as_ref().to_str() else {
        return Err(failure(Exit::BadData, "the key is not UTF-8"));
    };
    Key::new(text).map_err(|e| failure(Exit::BadData, e))
}
