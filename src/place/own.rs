//! The directory of a user's own daemon: made and checked so that no other user can stop this one or pose as its daemon.
//!
//! In /tmp every user can make a directory of any name. So a directory counts only if it belongs to this user and no
//! other user can write there, as tmux checks its own; if another user took the name first, the next one is
//! `kmutex-UID.1`, and so on. All processes of a user must come to the same directory, at whatever moment other users make
//! and remove theirs: a new directory is made without write permission, and gets it, once and for all, from its maker
//! after a second look that finds no other directory of this user. At most one of two makers finds none.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};

use super::Missing;

/// The directory of root's own daemon, which is the machine's.
const ROOTS: &str = "/run/kmutex";
/// No read permission for others: to lock a directory (flock(2)), a user must be able to read it.
const ROOTS_MODE: u32 = 0o711;
/// A directory that its maker has not finished.
const UNFINISHED: u32 = 0o500;
/// How long another process may take to finish its directory, before this one removes it.
const UNFINISHED_WAIT: Duration = Duration::from_secs(1);
/// How long to try in all.
const MAKE_WAIT: Duration = Duration::from_secs(5);

/// The directories `kmutex-UID`, `kmutex-UID.1` and so on of one user.
#[derive(Debug)]
pub struct OwnDirectory {
    parent: PathBuf,
    uid: u32,
}

/// What there is.
#[derive(Debug, PartialEq, Eq)]
pub enum Survey {
    /// The user's directory.
    Ready(PathBuf),
    /// Another process of the user is making it.
    Unfinished(PathBuf),
    /// There is none. This is the first name that is free.
    Free(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Absent,
    Ready,
    Unfinished,
    Foreign,
}

impl OwnDirectory {
    /// Those of a user in /tmp.
    pub fn in_tmp(uid: u32) -> OwnDirectory {
        OwnDirectory { parent: "/tmp".into(), uid }
    }

    /// Returns the directory of root's own daemon, and makes it if asked to. `None`: it cannot be used or written.
    pub fn of_root(missing: Missing) -> Option<PathBuf> {
        let path = Path::new(ROOTS);
        if missing == Missing::Make && make_roots(path).is_err() {
            return None;
        }
        let writable =
            |path: &Path| faccessat(AT_FDCWD, path, AccessFlags::W_OK, AtFlags::AT_EACCESS).is_ok();
        match look(path, 0) {
            Entry::Ready if writable(path) => Some(path.into()),
            Entry::Absent if path.parent().is_some_and(writable) => Some(path.into()),
            _ => None,
        }
    }

    /// Returns the first name.
    pub fn first(&self) -> PathBuf {
        self.path(0)
    }

    /// Returns the user's directory, or the name that it would get.
    ///
    /// # Errors
    /// When the parent directory cannot be read.
    pub fn name(&self) -> io::Result<PathBuf> {
        Ok(match self.survey(None)? {
            Survey::Ready(path) | Survey::Unfinished(path) | Survey::Free(path) => path,
        })
    }

    /// Returns the user's directory, and makes it if there is none.
    ///
    /// # Errors
    /// As mkdir(2) gives them, or when other processes keep interfering.
    pub fn make(&self) -> io::Result<PathBuf> {
        let give_up = Instant::now() + MAKE_WAIT;
        let mut unfinished_since: Option<(PathBuf, Instant)> = None;
        while Instant::now() < give_up {
            match self.survey(None)? {
                Survey::Ready(path) => {
                    if fs::symlink_metadata(&path)?.mode() & 0o077 != 0 {
                        open_directory(&path)?.set_permissions(fs::Permissions::from_mode(0o700))?;
                    }
                    return Ok(path);
                }
                Survey::Free(path) => {
                    if self.try_make(&path)? {
                        return Ok(path);
                    }
                }
                Survey::Unfinished(path) => {
                    let since = match &unfinished_since {
                        Some((same, since)) if *same == path => *since,
                        _ => Instant::now(),
                    };
                    if since.elapsed() >= UNFINISHED_WAIT {
                        // Its maker has died. If it is not empty, it was in use, and is made usable again.
                        if fs::remove_dir(&path).is_err() {
                            fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
                        }
                    }
                    unfinished_since = Some((path, since));
                    // No event tells when the other process is done.
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        Err(io::Error::other("other processes keep making and removing such directories"))
    }

    /// Looks at all directories of this user but `except`. One that is there goes before a new one, the lowest number first.
    ///
    /// # Errors
    /// When the parent directory cannot be read.
    pub fn survey(&self, except: Option<&Path>) -> io::Result<Survey> {
        let first = self.path(0);
        // The usual case needs no look at all of /tmp.
        if except.is_none() && look(&first, self.uid) == Entry::Ready {
            return Ok(Survey::Ready(first));
        }
        let mut numbers: Vec<u32> =
            fs::read_dir(&self.parent)?.filter_map(|entry| self.number(&entry.ok()?.file_name())).collect();
        numbers.sort_unstable();
        let (mut unfinished, mut free) = (None, 0);
        for number in numbers {
            let path = self.path(number);
            let entry = look(&path, self.uid);
            if entry != Entry::Absent && number == free {
                free += 1;
            }
            match entry {
                _ if except == Some(&path) => {}
                Entry::Ready => return Ok(Survey::Ready(path)),
                Entry::Unfinished => unfinished = unfinished.or(Some(path)),
                Entry::Foreign | Entry::Absent => {}
            }
        }
        Ok(match unfinished {
            Some(path) => Survey::Unfinished(path),
            None => Survey::Free(self.path(free)),
        })
    }

    /// Returns `false` if another process was faster.
    fn try_make(&self, path: &Path) -> io::Result<bool> {
        match DirBuilder::new().mode(UNFINISHED).create(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
            other => other?,
        }
        let directory = open_directory(path)?;
        if !matches!(self.survey(Some(path))?, Survey::Free(_)) {
            // If it cannot be removed, another process did that.
            let _ = fs::remove_dir(path);
            return Ok(false);
        }
        directory.set_permissions(fs::Permissions::from_mode(0o700))?;
        Ok(is_named(&directory, path) && look(path, self.uid) == Entry::Ready)
    }

    fn path(&self, number: u32) -> PathBuf {
        let name = format!("kmutex-{}", self.uid);
        self.parent.join(if number == 0 { name } else { format!("{name}.{number}") })
    }

    /// Returns the number of a directory's name; `None`: it is not such a name.
    fn number(&self, name: &OsStr) -> Option<u32> {
        let rest = name.to_str()?.strip_prefix("kmutex-")?.strip_prefix(&self.uid.to_string())?;
        let number = if rest.is_empty() { 0 } else { rest.strip_prefix('.')?.parse().ok()? };
        // `.01` is not `.1`.
        (self.path(number).file_name() == Some(name)).then_some(number)
    }
}

/// Looks at a directory without following a link.
fn look(path: &Path, uid: u32) -> Entry {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Entry::Absent,
        Ok(meta) if meta.is_dir() && meta.uid() == uid => match meta.mode() & 0o777 {
            UNFINISHED => Entry::Unfinished,
            mode if mode & 0o722 == 0o700 => Entry::Ready,
            _ => Entry::Foreign,
        },
        _ => Entry::Foreign,
    }
}

fn make_roots(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(ROOTS_MODE).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        other => other?,
    }
    // Whatever the umask is.
    open_directory(path)?.set_permissions(fs::Permissions::from_mode(ROOTS_MODE))
}

fn open_directory(path: &Path) -> io::Result<File> {
    let flags = nix::libc::O_DIRECTORY | nix::libc::O_NOFOLLOW;
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Returns `true` if the path still leads to this directory.
fn is_named(directory: &File, path: &Path) -> bool {
    match (directory.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::unistd::{Uid, chown};

    use super::*;

    struct Tmp(tempfile::TempDir);

    impl Tmp {
        fn new() -> Tmp {
            Tmp(tempfile::tempdir().unwrap())
        }

        fn own(&self) -> OwnDirectory {
            OwnDirectory { parent: self.0.path().into(), uid: Uid::effective().as_raw() }
        }

        fn path(&self, number: u32) -> PathBuf {
            self.own().path(number)
        }

        fn make(&self, number: u32, mode: u32) {
            fs::create_dir(self.path(number)).unwrap();
            fs::set_permissions(self.path(number), fs::Permissions::from_mode(mode)).unwrap();
        }

        /// Only root can do this.
        fn give_away(&self, number: u32) {
            chown(&self.path(number), Some(Uid::from_raw(65_533)), None).unwrap();
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn the_directory_is_private_and_found_again() {
        let tmp = Tmp::new();
        assert_eq!(tmp.own().name().unwrap(), tmp.path(0));
        assert!(!tmp.path(0).exists(), "naming it makes nothing");
        assert_eq!(tmp.own().make().unwrap(), tmp.path(0));
        assert_eq!(mode(&tmp.path(0)), 0o700);
        assert_eq!(tmp.own().make().unwrap(), tmp.path(0));
    }

    #[test]
    fn a_directory_that_other_users_can_read_is_closed_to_them() {
        let tmp = Tmp::new();
        tmp.make(0, 0o755);
        assert_eq!(tmp.own().make().unwrap(), tmp.path(0));
        assert_eq!(mode(&tmp.path(0)), 0o700);
    }

    #[test]
    fn what_is_not_a_private_directory_of_this_user_is_passed_over() {
        let tmp = Tmp::new();
        fs::write(tmp.path(0), "").unwrap();
        let elsewhere = tmp.0.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, tmp.path(1)).unwrap();
        symlink("nowhere", tmp.path(2)).unwrap();
        tmp.make(3, 0o777);
        tmp.make(4, 0o720);
        assert_eq!(tmp.own().name().unwrap(), tmp.path(5));
        assert_eq!(tmp.own().make().unwrap(), tmp.path(5));
        assert_eq!(fs::read_dir(elsewhere).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_of_this_user_goes_before_a_name_that_became_free() {
        let tmp = Tmp::new();
        fs::write(tmp.path(0), "").unwrap();
        assert_eq!(tmp.own().make().unwrap(), tmp.path(1));
        fs::remove_file(tmp.path(0)).unwrap();
        assert_eq!(tmp.own().make().unwrap(), tmp.path(1));
        tmp.make(7, 0o700);
        assert_eq!(tmp.own().make().unwrap(), tmp.path(1), "the lowest of several");
    }

    #[test]
    #[ignore = "needs root, to give a directory to another user"]
    fn a_directory_of_another_user_is_passed_over() {
        let tmp = Tmp::new();
        for number in 0..1000 {
            tmp.make(number, 0o700);
            tmp.give_away(number);
        }
        assert_eq!(tmp.own().make().unwrap(), tmp.path(1000));
    }

    #[test]
    fn other_names_do_not_count() {
        let tmp = Tmp::new();
        let uid = Uid::effective();
        for name in [format!("kmutex-{uid}0"), format!("kmutex-{uid}.01"), format!("kmutex-{uid}.x")] {
            fs::create_dir(tmp.0.path().join(name)).unwrap();
        }
        assert_eq!(tmp.own().name().unwrap(), tmp.path(0));
    }

    #[test]
    fn a_maker_that_died_stops_no_other_process() {
        let tmp = Tmp::new();
        tmp.make(0, UNFINISHED);
        assert_eq!(tmp.own().survey(None).unwrap(), Survey::Unfinished(tmp.path(0)));
        assert_eq!(tmp.own().make().unwrap(), tmp.path(0));
        assert_eq!(mode(&tmp.path(0)), 0o700);
    }

    #[test]
    fn of_two_makers_one_yields() {
        let tmp = Tmp::new();
        // The other maker took another name, because this one was taken at that moment.
        tmp.make(1, UNFINISHED);
        assert!(!tmp.own().try_make(&tmp.path(0)).unwrap());
        assert!(!tmp.path(0).exists());
        tmp.make(2, 0o700);
        assert!(!tmp.own().try_make(&tmp.path(0)).unwrap());
        assert_eq!(tmp.own().make().unwrap(), tmp.path(2));
    }

    #[test]
    fn all_makers_come_to_the_same_directory_while_another_takes_names_and_leaves_them() {
        for _ in 0..20 {
            let tmp = Tmp::new();
            let made = std::thread::scope(|scope| {
                let makers: Vec<_> = (0..8).map(|_| scope.spawn(|| tmp.own().make().unwrap())).collect();
                for _ in 0..200 {
                    if File::create_new(tmp.path(0)).is_ok() {
                        fs::remove_file(tmp.path(0)).unwrap();
                    }
                }
                makers.into_iter().map(|maker| maker.join().unwrap()).collect::<Vec<_>>()
            });
            assert!(made.iter().all(|path| *path == made[0]), "{made:?}");
        }
    }
}
