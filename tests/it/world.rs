//! A machine for itself: /tmp and /run of its own and no other processes, in which commands run as several users, as cron
//! would start them. Only root can make one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::{Pid, Uid};

use crate::harness::{Finished, KMUTEX, Process, finish, tool, wait_for};

/// Mount and process namespaces, which end with all their processes when this is dropped.
pub struct World {
    /// Keeps the namespaces.
    _unshare: Process,
    init: Pid,
}

/// Two users who are not root.
pub const BOB: u32 = 65_531;
pub const EVE: u32 = 65_532;

impl World {
    pub fn new() -> World {
        World::with("")
    }

    /// The same, with a script that runs before anything else, as root.
    pub fn with(script: &str) -> World {
        assert!(
            Uid::effective().is_root(),
            "this test makes namespaces, which only root can: run it as root"
        );
        let setup = format!(
            "set -e; umask 022; mount -t tmpfs -o mode=755 none /run; mkdir /run/bin
             cp \"$KMUTEX\" /run/bin/kmutex; ln -s kmutex /run/bin/keyedmutexd
             mount -t tmpfs -o mode=1777 none /tmp; cd /; {script}\n echo ready; exec cat"
        );
        let mut command = tool("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &setup]);
        command.env("KMUTEX", KMUTEX).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut unshare = Process::spawn(&mut command);
        unshare.wait_for_line("ready");
        let children = format!("/proc/{0}/task/{0}/children", unshare.pid());
        let init =
            wait_for("the first process", || fs::read_to_string(&children).unwrap().trim().parse().ok());
        World { _unshare: unshare, init: Pid::from_raw(init) }
    }

    /// A shell script there, with only `PATH` in its environment.
    pub fn sh(&self, uid: u32, script: &str) -> Command {
        let mut command = tool("nsenter");
        command.arg(format!("--target={}", self.init)).args(["--mount", "--pid", "setpriv"]);
        command.args([format!("--reuid={uid}"), format!("--regid={uid}")]).arg("--clear-groups");
        command.args(["env", "-i", "PATH=/run/bin:/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c"]);
        command.arg(format!("cd /; {script}")).stdin(Stdio::null());
        command
    }

    /// Runs the script to its end.
    pub fn run(&self, uid: u32, script: &str) -> Finished {
        finish(&mut self.sh(uid, script))
    }

    /// Runs the script, which must end with this status and say nothing on standard error. Returns its output.
    #[track_caller]
    pub fn expect(&self, uid: u32, script: &str, code: i32) -> String {
        self.run(uid, script).assert_silent(code)
    }

    /// Starts a script that says `ready` when it is.
    pub fn start(&self, uid: u32, script: &str) -> Process {
        let mut process = Process::spawn(self.sh(uid, script).stdin(Stdio::piped()).stdout(Stdio::piped()));
        process.wait_for_line("ready");
        process
    }

    /// Starts a holder of `key`, which holds until its standard input ends.
    pub fn hold(&self, uid: u32, key: &str) -> Process {
        self.start(uid, &format!("kmutex run {key} -- sh -c 'echo ready; cat'"))
    }

    /// Starts a daemon, and waits until it serves.
    pub fn serve(&self, uid: u32, options: &str) -> Process {
        let script = format!("exec kmutex serve --no-log --ready-fd 1 {options}");
        let mut process = Process::spawn(self.sh(uid, &script).stdout(Stdio::piped()));
        process.wait_for_line("");
        process
    }

    /// A path there, as this test sees it.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.init));
        root.join(path.as_ref().strip_prefix("/").unwrap())
    }
}
