//! Locks that last as long as an open file: `kmutex lock --fd`. Where flock(1) has the behaviour, it plays the same scene.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::*;

/// A shell that runs a script in the daemon's folder, with the program in its environment.
fn shell(daemon: &Daemon, program: &str, script: &str) -> Command {
    let mut shell = tool(program);
    shell.args(["-c", script]).env("KMUTEX_SOCK", daemon.sock()).env("KMUTEX", KMUTEX);
    shell.current_dir(daemon.folder()).stdin(Stdio::null());
    shell
}

fn sh(daemon: &Daemon, script: &str) -> Finished {
    finish(&mut shell(daemon, "sh", script))
}

/// A shell that holds `k` with descriptor 9, says so, and waits for the end of its input.
fn holder(daemon: &Daemon, options: &str) -> Process {
    let script = format!(
        r#"exec 9>file; "$KMUTEX" lock --no-autostart {options} --fd 9 k && echo holding; read line"#
    );
    let mut process =
        Process::spawn(shell(daemon, "sh", &script).stdin(Stdio::piped()).stdout(Stdio::piped()));
    process.wait_for_line("holding");
    process
}

/// The process that holds `k`, once it has taken over from the one that asked.
fn keeper(daemon: &Daemon) -> Pid {
    daemon.wait_for_log("resume: ");
    Pid::from_raw(daemon.status()[0]["holders"][0]["pid"].as_i64().unwrap() as i32)
}

#[test]
fn a_descriptor_holds_a_lock_until_it_is_unlocked_or_closed() {
    for program in ["sh", "bash", "dash"] {
        let daemon = Daemon::start();
        let script = r#"
            exec 9>file
            "$KMUTEX" lock --fd 9 k || exit 1
            "$KMUTEX" run -n k true; echo $?
            "$KMUTEX" unlock --fd 9 k || exit 2
            "$KMUTEX" run -n k true; echo $?
            "$KMUTEX" lock --fd 9 k && "$KMUTEX" lock --fd 9 other || exit 3
            "$KMUTEX" run -n other true; echo $?
            exec 9>&-
            "$KMUTEX" run --queue k true && "$KMUTEX" run --queue other true
        "#;
        let done = finish(&mut shell(&daemon, program, script));
        assert_eq!(done.assert_silent(0), "75\n0\n75\n", "{program}");
    }
}

#[test]
fn a_process_that_has_inherited_the_descriptor_keeps_the_lock_as_with_flock() {
    for lock in [r#"flock 9"#, r#""$KMUTEX" lock --queue --fd 9 k"#] {
        for program in ["bash", "dash"] {
            let daemon = Daemon::start();
            let is_held = || match lock.starts_with("flock") {
                true => {
                    finish(tool("flock").args(["-n", "file", "true"]).current_dir(daemon.folder())).code == 1
                }
                false => daemon.counts("k") == (1, 0),
            };
            // The usual idiom: the subshell ends, and has left a process in the background.
            let script = format!(r#"( {lock} || exit 1; sleep 600 > /dev/null 2>&1 & echo $! ) 9>file"#);
            let left = finish(&mut shell(&daemon, program, &script)).assert_silent(0);
            let left = KillOnDrop::new(&left);
            assert!(is_held(), "{lock} in {program}");
            left.kill();
            wait_until("the lock to be free", || !is_held());
        }
    }
}

#[test]
fn the_lock_ends_with_the_last_process_that_is_killed() {
    let daemon = Daemon::start();
    let script = r#"
        exec 9>file; "$KMUTEX" lock --fd 9 k || exit 1
        perl -e '$| = 1; print "$$\n"; sleep 1 while 1' & read line
    "#;
    let mut command = shell(&daemon, "bash", script);
    let mut process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0));
    let child = KillOnDrop::new(&process.line().unwrap());
    let mut once = Process::spawn(&mut daemon.run(&["k", "true"]));
    daemon.wait_for_counts("k", 1, 1);
    let mut queue = Process::spawn(&mut daemon.run(&["--queue", "k", "true"]));
    daemon.wait_for_counts("k", 1, 2);
    process.signal(Signal::SIGKILL);
    process.wait();
    assert_eq!(daemon.counts("k"), (1, 2), "the child has it open");
    child.kill();
    assert_eq!((once.wait(), queue.wait()), (79, 0));
}

#[test]
fn it_works_where_the_shell_itself_cannot_hold_a_lock() {
    let daemon = Daemon::start();
    let script = r#"
        exec 9>file
        token=$("$KMUTEX" lock --fd 9 a) && "$KMUTEX" lock --fd 9 b | cat
        timeout 60 "$KMUTEX" lock --fd 9 c; sh -c '"$KMUTEX" lock --fd 9 d; true'
        for key in a b c d; do "$KMUTEX" run -n $key true; echo $?; done
    "#;
    assert_eq!(sh(&daemon, script).assert_silent(0), "75\n75\n75\n75\n");
    // The refusal of the other way names this one.
    let script = r#"timeout 60 "$KMUTEX" lock k; exit $?"#;
    sh(&daemon, script).assert_error(64, &["--pid $$", "--fd 9 KEY 9>FILE"]);
}

#[test]
fn descriptors_that_cannot_hold_a_lock_are_refused() {
    let daemon = Daemon::start();
    for (redirection, words) in [
        ("9>&-", "it is not open"),
        ("9>/dev/null", "not a regular file"),
        ("9<.", "not a regular file"),
        ("9>&1", "not a regular file"),
    ] {
        let script = format!(r#""$KMUTEX" lock --fd 9 k {redirection} | cat"#);
        let script = format!(r#"{{ {script}; }} && exit 64"#);
        sh(&daemon, &script).assert_error(64, &["--fd 9", words]);
    }
    sh(&daemon, r#""$KMUTEX" lock --fd 4000000000 k"#).assert_error(64, &["it is not open"]);
    sh(&daemon, r#""$KMUTEX" lock --fd 9 --pid $$ k"#).assert_error(64, &["--fd", "--pid"]);
    // A lock on the whole file, of the same kind.
    let script = r#"exec perl -e '
        use Fcntl; open my $f, ">", "file"; my $all = pack "s s x4 q q i x4", F_WRLCK, 0, 0, 0, 0;
        fcntl $f, F_SETLK, $all or die; exit system("sh", "-c", q("$KMUTEX" lock --fd 9 k 9>>file)) >> 8'"#;
    sh(&daemon, script).assert_error(64, &["another program has locked its file"]);
    assert_eq!(daemon.counts("k"), (0, 0), "nothing is held");
}

#[test]
fn a_descriptor_is_not_asked_to_hold_a_lock_twice_or_to_give_one_back_that_it_has_not() {
    let daemon = Daemon::start();
    let twice = r#"exec 9>file; "$KMUTEX" lock --fd 9 k && "$KMUTEX" lock --fd 9 k"#;
    sh(&daemon, twice).assert_error(75, &["held by descriptor 9 already"]);
    daemon.wait_for_counts("k", 0, 0);
    sh(&daemon, r#""$KMUTEX" unlock --fd 9 k 9>file"#)
        .assert_error(77, &["descriptor 9 does not hold", "\"k\""]);
    // Another description of the same file is another one.
    let _holder = holder(&daemon, "");
    sh(&daemon, r#""$KMUTEX" unlock --fd 9 k 9>file"#).assert_error(77, &["descriptor 9 does not hold"]);
    sh(&daemon, r#""$KMUTEX" lock -n --fd 9 k 9>file"#).assert_silent(75);
    assert_eq!(daemon.counts("k"), (1, 0));
}

#[test]
fn the_process_that_holds_the_lock_inherits_nothing_and_heeds_no_signal_but_kill() {
    let daemon = Daemon::start();
    // Its output is a pipe that the holder reads to its end.
    let script = r#"exec 9>file; echo "$("$KMUTEX" lock --fd 9 k 8<file 2>&1)"; read line; "$KMUTEX" lock --fd 9 k && echo again; read line"#;
    let mut command = shell(&daemon, "bash", script);
    let mut process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    process.wait_for_line("");
    let pid = keeper(&daemon);
    let files = || {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        files.map(|file| fs::read_link(file.unwrap().path()).unwrap_or_default()).collect::<Vec<_>>()
    };
    // Its connection; its own description of the file, once more for the thread; a pipe between the two.
    let kinds = ["null", "/file", "pipe:", "socket:"];
    wait_until("it to have its own files alone", || {
        let files = files();
        let count = |kind| files.iter().filter(|file| file.to_string_lossy().contains(kind)).count();
        kinds.map(count) == [3, 2, 2, 1] && files.len() == 8
    });
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str(), Some("/"));
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1] {
        kill(pid, signal).unwrap();
    }
    // SIGRTMIN, for programs with glibc, and the last one.
    for signal in ["-34", "-64"] {
        finish(tool("kill").args([signal, &pid.to_string()])).assert_silent(0);
    }
    assert_eq!(daemon.counts("k"), (1, 0));
    kill(pid, Signal::SIGKILL).unwrap();
    daemon.wait_for_counts("k", 0, 0);
    // What the killed one has left on the file is in the way of no other.
    writeln!(process.child.stdin.as_mut().unwrap()).unwrap();
    process.wait_for_line("again");
    assert_eq!(daemon.counts("k"), (1, 0));
}

#[test]
#[ignore = "takes some seconds"]
fn unlock_returns_when_the_lock_is_released_and_not_before() {
    let daemon = Daemon::start();
    let script = r#"exec 9>file; "$KMUTEX" lock --fd 9 k && echo holding; read line; "$KMUTEX" unlock --fd 9 k; echo $?; read line"#;
    let mut command = shell(&daemon, "sh", script);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::spawn(&mut command);
    process.wait_for_line("holding");
    let pid = keeper(&daemon);
    kill(pid, Signal::SIGSTOP).unwrap();
    writeln!(process.child.stdin.as_mut().unwrap()).unwrap();
    // It waits in vain, and says so.
    process.wait_for_line("71");
    assert_eq!(daemon.counts("k"), (1, 0));
    kill(pid, Signal::SIGCONT).unwrap();
    daemon.wait_for_counts("k", 0, 0);
    drop(process.child.stdin.take());
    process.wait();
    assert_eq!(
        process.stderr(),
        "kmutex: the process that holds the lock for descriptor 9 does not release it in time\n"
    );
}

#[test]
fn a_descriptors_lock_outlives_the_daemon() {
    let mut daemon = Daemon::start();
    let mut holder = holder(&daemon, "");
    let pid = keeper(&daemon);
    for _ in 0..2 {
        daemon.restart(&[]);
        wait_until("it to be back", || {
            let status = &daemon.status()[0]["holders"][0];
            status["pid"] == pid.as_raw() && status["orphan"].is_null()
        });
    }
    drop(holder.child.stdin.take());
    holder.wait();
    daemon.wait_for_counts("k", 0, 0);
}

#[test]
fn shared_locks_and_files_that_are_open_for_reading_work_too() {
    let daemon = Daemon::start();
    let mut holders = [holder(&daemon, "-s"), holder(&daemon, "-s")];
    assert_eq!(daemon.counts("k"), (2, 0));
    let script = r#"exec 9<file; "$KMUTEX" lock -s --fd 9 k && "$KMUTEX" unlock --fd 9 k"#;
    sh(&daemon, script).assert_silent(0);
    assert_eq!(daemon.counts("k"), (2, 0));
    drop(holders[0].child.stdin.take());
    daemon.wait_for_counts("k", 1, 0);
    drop(holders[1].child.stdin.take());
    daemon.wait_for_counts("k", 0, 0);
}

#[test]
fn a_file_that_has_no_name_any_more_will_do() {
    let daemon = Daemon::start();
    let script = r#"exec 9>file; rm file; "$KMUTEX" lock --fd 9 k; "$KMUTEX" run -n k true; echo $?"#;
    assert_eq!(sh(&daemon, script).assert_silent(0), "75\n");
    daemon.wait_for_counts("k", 0, 0);
}

#[test]
fn a_descriptor_can_hold_a_lock_of_a_daemon_on_another_host() {
    let daemon = Daemon::with(&["--sock", "127.0.0.1:0"]);
    let log = daemon.wait_for_log("127.0.0.1:");
    let port = log.rsplit_once("127.0.0.1:").unwrap().1;
    let port: String = port.chars().take_while(char::is_ascii_digit).collect();
    let script = format!(
        r#"export KMUTEX_SOCK=127.0.0.1:{port}; exec 9>file; "$KMUTEX" lock --fd 9 k || exit 1
        "$KMUTEX" run -n k true; echo $?; "$KMUTEX" unlock --fd 9 k; "$KMUTEX" run -n k true; echo $?"#
    );
    assert_eq!(sh(&daemon, &script).assert_silent(0), "75\n0\n");
}
