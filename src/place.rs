//! Where the daemon is when the user does not say: the order in which every command and the library look for it.
//!
//! | place | whose daemon | taken when |
//! | --- | --- | --- |
//! | `--sock`, `$KMUTEX_SOCK` | as the user says | it is given |
//! | [`MACHINE`] | the machine's, for all users | the socket is there and this user may connect |
//! | [`KEYEDMUTEXD`] | one that was started by hand, for KeyedMutex's clients | a daemon that this user trusts answers there |
//! | the user's own (`place/own.rs`) | this user's alone | otherwise |
//!
//! Only the user's own daemon is started automatically. /tmp belongs to everyone: kmutex looks at a file there with
//! lstat(2) before it connects, passes over every file of another user, and waits for none.

mod own;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, Uid, faccessat};

use crate::addr::{self, Addr, Reason};
use crate::exit::Exit;

pub use own::{OwnDirectory, Survey};

/// The socket of the daemon for all users of the machine.
pub const MACHINE: &str = "/run/kmutex/kmutex.sock";
/// The socket where the clients of KeyedMutex look for its daemon.
pub const KEYEDMUTEXD: &str = "/tmp/keyedmutexd.sock";
/// The name of the socket in the directory of a user's own daemon.
const OWN_SOCKET: &str = "kmutex.sock";

/// A daemon's address, and how it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The address.
    pub addr: Addr,
    /// How it was found.
    pub found: Found,
    /// A client may start a daemon there.
    pub starts: bool,
}

/// How an address was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The user gave it.
    Given,
    /// It is the machine's daemon.
    Machine,
    /// A daemon answers on the socket of KeyedMutex's.
    Keyedmutexd,
    /// It is the user's own daemon, or the place for one.
    Own,
}

impl Found {
    /// Returns a few words for people: whose daemon it is.
    pub fn describe(self) -> &'static str {
        match self {
            Found::Given => "as given",
            Found::Machine => "the machine's daemon",
            Found::Keyedmutexd => "started by hand, shared with KeyedMutex's clients",
            Found::Own => "this user's own daemon",
        }
    }
}

/// Whether the directory of the user's own daemon is made when it is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// Make it: a daemon is about to be started there.
    Make,
    /// Only name it.
    Name,
}

/// Finds the daemon: at the address that was given, or else in the environment, or else in the order of this module.
/// `trusted_uids`: the users whose daemons the caller trusts, besides its own and root's.
///
/// # Errors
/// When the address is bad, or there is no place for the user's own daemon.
pub fn find(given: Option<&OsStr>, trusted_uids: &[u32], missing: Missing) -> Result<Place, Error> {
    let given = match given {
        Some(text) => Some(Addr::parse(text)?),
        None => addr::from_environment()?,
    };
    if let Some(addr) = given {
        return Ok(Place { addr, found: Found::Given, starts: true });
    }
    let me = Uid::effective();
    if is_machine_daemon_there(me) {
        let starts = me.is_root() && OwnDirectory::of_root(Missing::Name).is_some();
        return Ok(Place { addr: Addr::Unix(MACHINE.into()), found: Found::Machine, starts });
    }
    let keyedmutexd = trusted_daemon_on(Path::new(KEYEDMUTEXD), me.as_raw(), trusted_uids);
    if let Some(pid) = keyedmutexd
        && own_pid(me.as_raw(), trusted_uids) != Some(pid)
    {
        return Ok(Place { addr: Addr::Unix(KEYEDMUTEXD.into()), found: Found::Keyedmutexd, starts: false });
    }
    let addr = Addr::Unix(own_socket(missing)?);
    Ok(Place { addr, found: Found::Own, starts: true })
}

/// Returns the socket of the user's own daemon: root's is the machine's, if /run can be written.
///
/// # Errors
/// When there is no place for it.
pub fn own_socket(missing: Missing) -> Result<PathBuf, Error> {
    let me = Uid::effective();
    if is_unmapped(me.as_raw()) {
        return Err(Error::Unmapped);
    }
    let in_run = if me.is_root() { OwnDirectory::of_root(missing) } else { None };
    let directory = match in_run {
        Some(directory) => directory,
        None => {
            let own = OwnDirectory::in_tmp(me.as_raw());
            let found = match missing {
                Missing::Make => own.make(),
                Missing::Name => own.name(),
            };
            found.map_err(|error| Error::Own { path: own.first(), error })?
        }
    };
    Ok(directory.join(OWN_SOCKET))
}

/// Returns the sockets of all users' own daemons in /tmp, those which belong to the user that they are named after.
pub fn all_own_sockets() -> Vec<PathBuf> {
    let entries = fs::read_dir("/tmp").into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let sockets = names.filter_map(|name| {
        let uid: u32 = name.strip_prefix("kmutex-")?.split('.').next()?.parse().ok()?;
        let socket = Path::new("/tmp").join(name).join(OWN_SOCKET);
        is_socket_of(&socket, |owner| owner == uid).then_some(socket)
    });
    sockets.collect()
}

/// Returns `true` if the machine's daemon has its socket there, and this user may connect to it. Only root can write in
/// /run, so nothing there needs doubt. If the socket refuses connections, its daemon is being restarted, and a daemon of
/// the user's own would grant the same locks twice; but root, whose own daemon this may have been, looks on.
fn is_machine_daemon_there(me: Uid) -> bool {
    let path = Path::new(MACHINE);
    let is_there = is_socket_of(path, |_| true) && may_connect(path);
    let may_be_dead_own = me.is_root() && is_socket_of(Path::new(KEYEDMUTEXD), |uid| uid == 0);
    is_there && !(may_be_dead_own && is_refused(addr::probe(path)))
}

/// Returns the process id of a daemon on this socket that this user trusts and may connect to.
fn trusted_daemon_on(path: &Path, me: u32, trusted_uids: &[u32]) -> Option<u32> {
    let trusts = |uid| uid == 0 || uid == me || trusted_uids.contains(&uid);
    if is_unmapped(me) || !is_socket_of(path, trusts) || !may_connect(path) {
        return None;
    }
    let peer = addr::probe(path).ok()?;
    trusts(peer.uid).then_some(peer.pid)
}

/// Returns the process id of the user's own daemon, if it runs. One that serves KeyedMutex's socket too is reached on its
/// own, where clients may start the next one.
fn own_pid(me: u32, trusted_uids: &[u32]) -> Option<u32> {
    trusted_daemon_on(&own_socket(Missing::Name).ok()?, me, trusted_uids)
}

/// Returns `true` if the path itself, and not a link there, is a socket of a user that `is_right` accepts.
fn is_socket_of(path: &Path, is_right: impl Fn(u32) -> bool) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket() && is_right(meta.uid()))
}

/// Returns `true` if the permissions of a socket let this user connect (unix(7): write permission).
fn may_connect(path: &Path) -> bool {
    faccessat(AT_FDCWD, path, AccessFlags::W_OK, AtFlags::AT_EACCESS).is_ok()
}

fn is_refused<T>(result: io::Result<T>) -> bool {
    result.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}

/// The user id that the kernel shows for every user without one in a user namespace (user_namespaces(7)).
const OVERFLOW_UID: u32 = 65_534;

/// Returns `true` if `uid` is what this user namespace shows for every user that it does not know, so that it says nothing.
pub fn is_unmapped(uid: u32) -> bool {
    if uid != OVERFLOW_UID {
        return false;
    }
    // Without /proc, the user `nobody` is more likely than a namespace.
    let Ok(map) = fs::read_to_string("/proc/self/uid_map") else { return false };
    !map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().unwrap_or(0));
        let (first, _, count) = (numbers.next(), numbers.next(), numbers.next());
        let first = first.unwrap_or(0);
        (first..first + count.unwrap_or(0)).contains(&u64::from(uid))
    })
}

/// Why there is no place for a daemon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address that was given is bad.
    #[error(transparent)]
    Addr(#[from] addr::Error),
    /// The directory of the user's own daemon cannot be made.
    #[error("cannot make a directory such as {} for a daemon: {}", path.display(), Reason(error))]
    Own {
        /// The first name that was tried.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The caller has no user id in its user namespace.
    #[error(
        "this process has no user id in its user namespace, so no daemon can be told to be its own; see --sock"
    )]
    Unmapped,
}

impl Error {
    /// Returns the exit code for this error.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Addr(error) => error.exit(),
            Error::Own { .. } => Exit::Unavailable,
            Error::Unmapped => Exit::NotPermitted,
        }
    }
}
