//! Clients that reach the daemon's Unix socket through ssh: the process at the other end is sshd's, and its end says nothing of the
//! client.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::{Daemon, KMUTEX, KillOnDrop, Process, finish, tool, wait_for, wait_until, write_script};

const README: &str = include_str!("../../README.md");
/// The peer timeout of the daemons.
const TIMEOUT: Duration = Duration::from_secs(4);

/// An sshd of one's own on a loopback port, which lets this user in, and an `ssh` that knows it as `locks.example`.
struct Sshd {
    folder: tempfile::TempDir,
    _process: Process,
}

impl Sshd {
    fn start() -> Sshd {
        let folder = tempfile::tempdir().unwrap();
        let sshd = Sshd::program();
        for key in ["host", "user"] {
            let mut keygen = tool("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(folder.path().join(key));
            assert!(keygen.stdin(Stdio::null()).status().unwrap().success());
        }
        let text = |name: &str| folder.path().join(name).display().to_string();
        fs::copy(text("user.pub"), text("authorized")).unwrap();
        // Another process may take the port before sshd does.
        let (process, port) = wait_for("an sshd that listens", || {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let config = format!(
                "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\n\
                 StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n",
                text("host"),
                text("authorized")
            );
            fs::write(text("sshd_config"), config).unwrap();
            let log = fs::File::create(text("sshd.log")).unwrap();
            let mut command = Command::new(&sshd);
            command.args(["-D", "-e", "-f", &text("sshd_config")]).stdin(Stdio::null()).stderr(log);
            let mut process = Process::spawn(&mut command);
            let is_listening = wait_for("sshd", || {
                let log = fs::read_to_string(text("sshd.log")).unwrap();
                if log.contains("Server listening") {
                    Some(true)
                } else {
                    (!process.is_running()).then_some(false)
                }
            });
            is_listening.then_some((process, port))
        });
        let config = format!(
            "Host locks.example\nHostName 127.0.0.1\nPort {port}\nIdentityFile {}\nIdentitiesOnly yes\n\
             StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\nBatchMode yes\n",
            text("user")
        );
        fs::write(text("ssh_config"), config).unwrap();
        fs::create_dir(text("bin")).unwrap();
        let ssh = which("ssh").display().to_string();
        write_script(
            &folder.path().join("bin/ssh"),
            &format!("#!/bin/sh\nexec {ssh} -F {} \"$@\"\n", text("ssh_config")),
        );
        std::os::unix::fs::symlink(KMUTEX, text("bin/kmutex")).unwrap();
        Sshd { folder, _process: process }
    }

    /// The path of sshd, which executes itself by it.
    fn program() -> PathBuf {
        // It wants this directory, which its service makes on a machine where it runs.
        let _ = fs::create_dir("/run/sshd");
        which("sshd")
    }

    /// `sh -c SCRIPT` in this folder, with that ssh.
    fn sh(&self, script: &str) -> Command {
        let mut command = Command::new("sh");
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        command.args(["-euc", script]).current_dir(&self.folder).env("PATH", path).stdin(Stdio::null());
        command.env_remove("KMUTEX_SOCK");
        command
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Forwards `k.sock` to the daemon, until the returned process ends.
    fn forward(&self, daemon: &Daemon) -> Process {
        let _ = fs::remove_file(self.path("k.sock"));
        let script = format!(
            "exec ssh -N -o ExitOnForwardFailure=yes -L ./k.sock:{} locks.example",
            daemon.sock().display()
        );
        let ssh = Process::spawn(&mut self.sh(&script));
        wait_until("the forwarded socket", || self.path("k.sock").exists());
        ssh
    }

    /// A holder of `k` through ssh, and its command, whose process id is in the file `command`.
    fn hold(&self) -> (Process, KillOnDrop) {
        let script = "exec kmutex run --no-autostart --sock ./k.sock k -- \
                      sh -c 'echo $$ > command; echo holding; exec sleep 1000'";
        let mut holder = Process::spawn(self.sh(script).stdout(Stdio::piped()));
        holder.wait_for_line("holding");
        let command = KillOnDrop::new(&fs::read_to_string(self.path("command")).unwrap());
        (holder, command)
    }
}

fn which(name: &str) -> PathBuf {
    tool(name);
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file()).unwrap()
}

fn serve() -> Daemon {
    Daemon::with(&["--peer-timeout", &TIMEOUT.as_secs().to_string()])
}

fn is_gone(pid: &Path) -> bool {
    let pid = fs::read_to_string(pid).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("State:"))
        .is_none_or(|state| state.trim().starts_with(['Z', 'X']))
}

#[test]
#[ignore = "needs root, and sshd"]
fn the_recipe_of_the_readme_works_through_a_real_sshd() {
    let sshd = Sshd::start();
    let daemon = Daemon::with(&["--remote", "--peer-timeout", "1"]);
    write_script(&sshd.path("report.sh"), "#!/bin/sh\necho reported\n");
    let section = README.split("### One daemon for many machines, through ssh").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let recipe: Vec<&str> = section.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    let (serve, clients) = recipe.split_first().unwrap();
    assert!(serve.starts_with("kmutex serve --sock /run/kmutex/kmutex.sock --remote"), "{serve}");
    assert_eq!(clients.len(), 3, "{clients:?}");
    let script = clients.join("\n").replace("/run/kmutex/kmutex.sock", &daemon.sock().display().to_string());
    let done = finish(&mut sshd.sh(&script));
    assert_eq!((done.code, done.stdout.as_str()), (0, "reported\n"), "{}", done.stderr);
    daemon.wait_for_counts("nightly", 0, 0);
}

#[test]
#[ignore = "needs root, and sshd"]
fn a_forwarded_client_is_noticed_and_has_no_process_here() {
    let (sshd, daemon) = (Sshd::start(), serve());
    let _ssh = sshd.forward(&daemon);
    let (_holder, _command) = sshd.hold();
    let status = daemon.status();
    assert_eq!(status[0]["holders"][0]["pid"], 0, "neither sshd's nor one that the client says: {status:?}");
    daemon.wait_for_log("is a forwarder");
    // The daemon cannot watch a process of another machine.
    finish(&mut sshd.sh("kmutex lock --no-autostart --sock ./k.sock --pid $$ other"))
        .assert_error(76, &["another machine"]);
    // It is not noticed where it is not so.
    let _local = daemon.hold("local");
    assert_eq!(daemon.log().matches("is a forwarder").count(), 2, "{}", daemon.log());
}

#[test]
#[ignore = "needs root, and sshd"]
fn when_ssh_ends_the_old_command_has_ended_before_the_next_one_starts() {
    let (sshd, daemon) = (Sshd::start(), serve());
    let ssh = sshd.forward(&daemon);
    let (mut holder, _command) = sshd.hold();
    let mut waiter = daemon.run(&["--queue", "k", "echo", "next"]);
    let mut waiter = Process::spawn(waiter.stdout(Stdio::piped()));
    daemon.wait_for_counts("k", 1, 1);
    let ended = Instant::now();
    ssh.signal(Signal::SIGKILL);
    waiter.wait_for_line("next");
    assert!(is_gone(&sshd.path("command")), "{}", daemon.log());
    assert!(ended.elapsed() > TIMEOUT / 2, "{:?}", ended.elapsed());
    assert_eq!(holder.wait(), 74);
}

#[test]
#[ignore = "needs root, and sshd"]
fn a_lock_is_resumed_through_the_next_ssh() {
    let (sshd, daemon) = (Sshd::start(), serve());
    let ssh = sshd.forward(&daemon);
    let (mut holder, _command) = sshd.hold();
    drop(ssh);
    daemon.wait_for_log("may come back");
    let _ssh = sshd.forward(&daemon);
    wait_until("the holder has resumed", || daemon.status()[0]["holders"][0]["orphan"].is_null());
    let resumed = Instant::now();
    wait_for("two peer timeouts", || (resumed.elapsed() > 2 * TIMEOUT).then_some(()));
    assert!(holder.is_running());
    holder.signal(Signal::SIGTERM);
    assert_eq!(holder.wait(), 128 + 15);
    daemon.wait_for_counts("k", 0, 0);
}
