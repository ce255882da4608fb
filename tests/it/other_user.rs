//! Another user of this machine, for tests of permissions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::Uid;

use crate::harness::{KMUTEX, Process, finish, open_to_all};

/// A user that is not root, with a folder that both users can use and the program in it. Only root can make one.
pub struct OtherUser {
    folder: tempfile::TempDir,
}

impl OtherUser {
    pub const UID: u32 = 65_533;

    pub fn new() -> OtherUser {
        assert!(
            Uid::effective().is_root(),
            "this test acts as two users, which only root can: run it as root"
        );
        let folder = tempfile::tempdir().unwrap();
        // The modes of the files in the folder decide who may use them.
        open_to_all(folder.path());
        // By another process, as in `write_script`.
        let mut copy = Command::new("install");
        finish(copy.args(["-m", "755", KMUTEX]).arg(folder.path().join("kmutex"))).assert_silent(0);
        let home = folder.path().join("home");
        fs::create_dir(&home).unwrap();
        open_to_all(&home);
        OtherUser { folder }
    }

    /// A folder in which everybody may make files.
    pub fn folder(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    pub fn kmutex(&self) -> PathBuf {
        self.folder.path().join("kmutex")
    }

    /// This program, as that user.
    pub fn command(&self, program: PathBuf) -> Command {
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={}", Self::UID)).arg(format!("--regid={}", Self::UID));
        command.arg("--clear-groups").arg(program).current_dir("/").env("HOME", "/");
        command.stdin(Stdio::null());
        command
    }

    /// Starts a daemon, and waits until it serves.
    pub fn serve(&self, mut command: Command, sock: &Path, options: &[&str]) -> Process {
        command.args(["serve", "--ready-fd", "1", "--sock"]).arg(sock).args(options);
        let mut process =
            Process::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()));
        process.wait_for_line("");
        process
    }
}
