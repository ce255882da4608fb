//! Notices that a file of the daemon's was removed or replaced (inotify(7)), without ever looking by itself.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use log::debug;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// The kernel's watch on some files. Without it the daemon looks before each grant instead.
pub(super) struct FileWatch {
    inotify: Option<Inotify>,
}

impl FileWatch {
    /// A watch on nothing yet.
    pub(super) fn new() -> FileWatch {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC);
        FileWatch { inotify: inotify.inspect_err(|e| debug!("cannot watch files: {e}")).ok() }
    }

    /// Returns the descriptor that becomes readable when one of the files has gone.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// Watches these files, those which are there, and their directories.
    pub(super) fn watch(&self, paths: &[PathBuf]) {
        let Some(inotify) = &self.inotify else { return };
        // A file whose last name is removed may stay open; then only its link count changes, which is an attribute.
        let gone = AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_DELETE_SELF;
        let file = gone | AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_DONT_FOLLOW;
        for path in paths {
            // A file that is not there is missed by the look that follows.
            let _ = inotify.add_watch(path, file);
            if let Some(parent) = path.parent() {
                let _ = inotify.add_watch(parent, gone | AddWatchFlags::IN_ONLYDIR);
            }
        }
    }

    /// Forgets what has happened so far.
    pub(super) fn drain(&self) {
        while self.inotify.as_ref().is_some_and(|inotify| inotify.read_events().is_ok_and(|e| !e.is_empty()))
        {
        }
    }
}
