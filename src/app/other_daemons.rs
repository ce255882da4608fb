//! The daemons that clients have started automatically, before `kmutex serve` serves in their place: the locks that they still
//! hold are not the new daemon's.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::addr::Addr;
use crate::client::{Session, Target};
use crate::place::{self, Missing};
use crate::proto::v2::{Answer, Request};
use nix::unistd::Uid;

/// How long one daemon may take, and all together.
const WAIT: Duration = Duration::from_secs(1);
const WAIT_ALL: Duration = Duration::from_secs(3);
/// How many locks of a daemon are named.
const NAMED_MAX: usize = 5;

/// Returns a line for each automatically started daemon whose users will look for the new one, and that still holds locks.
/// `addrs`: where the new daemon serves; empty: where this user's daemon is by default.
pub(super) fn holding(addrs: &[Addr]) -> Vec<String> {
    let give_up = Instant::now() + WAIT_ALL;
    let own = place::own_socket(Missing::Name).ok();
    let is_served = |path: &Path| match addrs {
        [] => own.as_deref() == Some(path),
        addrs => addrs.iter().any(|addr| *addr == Addr::Unix(path.into())),
    };
    // Another address is for users who name it.
    let is_default =
        addrs.is_empty() || is_served(Path::new(place::MACHINE)) || is_served(Path::new(place::KEYEDMUTEXD));
    if !is_default {
        return Vec::new();
    }
    let mut places: Vec<PathBuf> = own.iter().cloned().collect();
    if Uid::effective().is_root() {
        places.extend(place::all_own_sockets());
    }
    places.retain(|path| !is_served(path));
    let describe = |path: PathBuf| {
        let locks = if Instant::now() < give_up { locks_of(&path) } else { None }?;
        Some(format!("the daemon on {} still holds {locks}, which this daemon does not know", path.display()))
    };
    places.into_iter().filter_map(describe).collect()
}

/// Returns which locks the daemon on this socket holds, in words; `None`: none, or it does not say.
pub(super) fn locks_of(path: &Path) -> Option<String> {
    let owner = fs::symlink_metadata(path).ok()?.uid();
    let mut target = Target::new(Addr::Unix(path.into()));
    target.trusted_uids.push(owner);
    let limit = Instant::now() + WAIT;
    let mut session = Session::connect_within(&target, WAIT).ok()?;
    session.send(&Request::Status { key: None, cluster: false }).ok()?;
    let mut names = Vec::new();
    // The daemon may be any user's.
    while Instant::now() < limit
        && let Ok(Answer::Lock(status)) = session.answer_until(limit)
    {
        if status.holding > 0 {
            names.push(format!("{:?}", status.key.as_deref().unwrap_or(&status.id)));
        }
        if names.len() > NAMED_MAX {
            names.pop();
            names.push("others".into());
            break;
        }
    }
    match names.as_slice() {
        [] => None,
        [one] => Some(format!("the lock {one}")),
        [names @ .., last] => Some(format!("the locks {} and {last}", names.join(", "))),
    }
}
