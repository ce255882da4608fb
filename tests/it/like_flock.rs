//! Where flock(1) has a behaviour, `kmutex run --queue` has the same. Each scenario here is played with both, so that
//! what is taken for flock's behaviour is tested too.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::*;
use crate::signals::state_of;

/// One of the two, with locks of its own.
struct Tool {
    name: &'static str,
    /// Its exit code when the lock is not to be had.
    busy: i32,
    /// Serves kmutex; flock only has its files there.
    daemon: Daemon,
}

fn both(scenario: impl Fn(&Tool)) {
    for (name, busy) in [("flock", 1), ("kmutex", 75)] {
        println!("with {name}:");
        scenario(&Tool { name, busy, daemon: Daemon::start() });
    }
}

impl Tool {
    /// A command under the lock `l`.
    fn run(&self, options: &[&str], command: &[&str]) -> Command {
        let mut run = match self.name {
            "flock" => Command::new("flock"),
            _ => self.daemon.run(&["--queue"]),
        };
        run.args(options).arg("l").args(command).current_dir(self.daemon.folder()).stdin(Stdio::null());
        run
    }

    fn hold(&self, options: &[&str]) -> Holder {
        let mut command = self.run(options, &["sh", "-c", "echo holding; read status; exit ${status:-0}"]);
        let mut process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        process.wait_for_line("holding");
        Holder { process }
    }

    /// A shell command under the lock. This one option flock has behind the file.
    fn shell(&self, command: &str) -> Command {
        self.run(&[], &["-c", command])
    }

    #[track_caller]
    fn ends(&self, options: &[&str], command: &[&str], code: i32) -> String {
        finish(&mut self.run(options, command)).assert_silent(code)
    }

    /// Waits until these processes wait for the lock.
    fn wait_for_waiters(&self, waiters: &[&Process]) {
        if self.name == "kmutex" {
            return self.daemon.wait_for_counts("l", 1, waiters.len() as u64);
        }
        // proc_locks(5): "1: -> FLOCK  ADVISORY  WRITE 1234 ..." is a process that waits.
        let waits = |locks: &str, waiter: &Process| {
            let pid = waiter.pid().to_string();
            locks.lines().any(|line| line.contains(" -> FLOCK ") && line.split(' ').any(|word| word == pid))
        };
        wait_until("all to wait for the lock", || {
            let locks = fs::read_to_string("/proc/locks").unwrap();
            waiters.iter().all(|waiter| waits(&locks, waiter))
        });
    }

    /// Whether the lock is free.
    fn is_free(&self) -> bool {
        let code = finish(&mut self.run(&["-n"], &["true"])).code;
        assert!(code == 0 || code == self.busy, "{code}");
        code == 0
    }
}

#[test]
fn who_does_not_wait_is_refused() {
    both(|tool| {
        let holder = tool.hold(&[]);
        for way in [&["-n"][..], &["--nb"], &["--nonblock"], &["-w", "0"], &["--timeout", "0"]] {
            tool.ends(way, &["touch", "ran"], tool.busy);
            tool.ends(&[way, &["-E", "33"]].concat(), &["touch", "ran"], 33);
            tool.ends(&[way, &["--conflict-exit-code", "0"]].concat(), &["touch", "ran"], 0);
        }
        assert!(!tool.daemon.folder().join("ran").exists());
        assert_eq!(holder.finish(5), 5);
        tool.ends(&["-n"], &["true"], 0);
    });
}

#[test]
fn who_waits_for_a_time_is_refused_then() {
    both(|tool| {
        let _holder = tool.hold(&[]);
        for (options, code) in [
            (&["-w", "0.2"][..], tool.busy),
            (&["--wait", ".2", "-E", "0"], 0),
            (&["--timeout=0.2"], tool.busy),
        ] {
            let begin = Instant::now();
            tool.ends(options, &["touch", "ran"], code);
            assert!(begin.elapsed() >= Duration::from_millis(200), "too early: {:?}", begin.elapsed());
        }
        assert!(!tool.daemon.folder().join("ran").exists());
    });
}

#[test]
fn who_waits_runs_after_the_holder() {
    both(|tool| {
        let mut holder = tool.run(&[], &["sh", "-c", "echo holding; read line; echo holder >> order"]);
        let mut holder = Process::spawn(holder.stdin(Stdio::piped()).stdout(Stdio::piped()));
        holder.wait_for_line("holding");
        let mut waiter = Process::spawn(&mut tool.run(&[], &["sh", "-c", "echo waiter >> order"]));
        let mut patient = Process::spawn(&mut tool.run(&["-w", "600"], &["sh", "-c", "exit 4"]));
        tool.wait_for_waiters(&[&waiter, &patient]);
        drop(holder.child.stdin.take());
        assert_eq!((holder.wait(), waiter.wait(), patient.wait()), (0, 0, 4));
        assert_eq!(fs::read_to_string(tool.daemon.folder().join("order")).unwrap(), "holder\nwaiter\n");
    });
}

#[test]
fn a_stopped_waiter_lets_the_others_pass() {
    both(|tool| {
        let holder = tool.hold(&[]);
        let mut stopped = Process::spawn(&mut tool.run(&[], &["sh", "-c", "echo stopped >> order"]));
        tool.wait_for_waiters(&[&stopped]);
        stopped.signal(Signal::SIGSTOP);
        wait_until("it to be stopped", || state_of(stopped.pid()) == 'T');
        let mut other = Process::spawn(&mut tool.run(&[], &["sh", "-c", "echo other >> order"]));
        match tool.name {
            // The kernel takes a stopped process off its list.
            "flock" => tool.wait_for_waiters(&[&other]),
            _ => tool.wait_for_waiters(&[&stopped, &other]),
        }
        holder.finish(0);
        assert_eq!(other.wait(), 0);
        stopped.signal(Signal::SIGCONT);
        assert_eq!(stopped.wait(), 0);
        assert_eq!(fs::read_to_string(tool.daemon.folder().join("order")).unwrap(), "other\nstopped\n");
    });
}

#[test]
fn readers_share_and_writers_do_not() {
    both(|tool| {
        let (first, second) = (tool.hold(&["-s"]), tool.hold(&["--shared"]));
        tool.ends(&["-n", "-s"], &["true"], 0);
        for way in [&["-n"][..], &["-n", "-x"], &["-n", "-e"], &["-n", "--exclusive"]] {
            tool.ends(way, &["true"], tool.busy);
        }
        first.finish(0);
        tool.ends(&["-n", "-x"], &["true"], tool.busy);
        second.finish(0);
        let writer = tool.hold(&["-x"]);
        tool.ends(&["-n", "-s"], &["true"], tool.busy);
        writer.finish(0);
        tool.ends(&["-n", "-s"], &["true"], 0);
    });
}

#[test]
fn the_lock_outlives_a_tool_that_is_killed_while_the_command_lives() {
    both(|tool| {
        let mut holder = tool.hold(&[]);
        holder.process.signal(Signal::SIGKILL);
        assert_eq!(holder.process.wait(), 137);
        tool.ends(&["-w", "0.2"], &["true"], tool.busy);
        drop(holder.process.child.stdin.take());
        wait_until("the lock to be free after the command", || tool.is_free());
    });
}

#[test]
fn the_lock_does_not_outlive_a_tool_that_kept_it_from_the_command() {
    both(|tool| {
        for option in ["-o", "--close"] {
            let mut holder = tool.hold(&[option]);
            assert!(!tool.is_free());
            holder.process.signal(Signal::SIGKILL);
            assert_eq!(holder.process.wait(), 137);
            wait_until("the lock to be free though the command lives", || tool.is_free());
            drop(holder.process.child.stdin.take());
        }
    });
}

#[test]
fn a_tool_that_does_not_fork_becomes_the_command() {
    both(|tool| {
        for option in ["-F", "--no-fork"] {
            let mut command = tool.run(&[option], &["sh", "-c", "echo $$; read line; exit 6"]);
            let mut process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
            assert_eq!(process.line().unwrap(), process.pid().to_string());
            tool.ends(&["-n"], &["true"], tool.busy);
            drop(process.child.stdin.take());
            assert_eq!(process.wait(), 6);
            wait_until("the lock to be free after the command", || tool.is_free());
        }
        let mut holder = tool.hold(&["-F"]);
        holder.process.signal(Signal::SIGTERM);
        let status = wait_for("the end of the command", || holder.process.child.try_wait().unwrap());
        assert_eq!(status.signal(), Some(15), "it died of the signal itself");
        wait_until("the lock to be free after the command", || tool.is_free());
    });
}

#[test]
fn the_exit_status_is_the_commands() {
    both(|tool| {
        for status in [0, 1, 2, 75, 79, 127, 128, 255] {
            tool.ends(&[], &["sh", "-c", &format!("exit {status}")], status);
            finish(&mut tool.shell(&format!("exit {status}"))).assert_silent(status);
        }
        for signal in [1, 2, 9, 13, 15, 34, 64] {
            tool.ends(&[], &["perl", "-e", &format!("kill {signal}, $$; exit 0")], 128 + signal);
        }
    });
}

#[test]
fn a_shell_command_goes_to_the_users_shell() {
    both(|tool| {
        let shell = tool.daemon.folder().join("shell");
        write_script(&shell, "#!/bin/sh\nprintf '%s|' mine \"$@\"\n");
        let command = "echo $((40 + 2)); exit 3";
        assert_eq!(
            finish(tool.shell(command).env("SHELL", &shell)).assert_silent(0),
            format!("mine|-c|{command}|")
        );
        assert_eq!(finish(tool.shell(command).env("SHELL", "")).assert_silent(3), "42\n");
        assert_eq!(finish(tool.shell(command).env_remove("SHELL")).assert_silent(3), "42\n");
    });
}

#[test]
fn what_follows_the_command_is_the_commands() {
    both(|tool| {
        let print = r#"print map "$_|", @ARGV"#;
        let arguments = ["-n", "--", "-c", "", "a b", "--queue", "-w", "x"];
        let said = tool.ends(&[], &[&["perl", "-e", print, "--"], &arguments[..]].concat(), 0);
        assert_eq!(said, "-n|--|-c||a b|--queue|-w|x|");
    });
}

#[test]
fn a_script_without_a_first_line_is_given_to_sh() {
    both(|tool| {
        let folder = tool.daemon.folder().join("bin");
        fs::create_dir(&folder).unwrap();
        let script = folder.join("script-of-mine");
        write_script(&script, "echo \"$0|$1|$2\"; exit 8\n");
        // What is of the same name, but cannot be executed, is passed over in the search.
        let decoy = tool.daemon.folder().join("script-of-mine");
        fs::write(&decoy, "echo the wrong one\n").unwrap();
        let path =
            std::env::join_paths([tool.daemon.folder(), &*folder, "/usr/bin".as_ref(), "/bin".as_ref()]);
        let path = path.unwrap();
        let expected = format!("{}|a b|c\n", script.display());
        for how in [&[][..], &["-o"], &["-F"]] {
            let mut by_path = tool.run(how, &[script.to_str().unwrap(), "a b", "c"]);
            assert_eq!(finish(&mut by_path).assert_silent(8), expected);
            let mut by_name = tool.run(how, &["script-of-mine", "a b", "c"]);
            assert_eq!(finish(by_name.env("PATH", &path)).assert_silent(8), expected);
        }
    });
}

/// Prints what descriptors a process has, and what they are, less the one with which it looks.
const PRINT_DESCRIPTORS: &str = r#"
    opendir my $folder, "/proc/self/fd" or die;
    my %is = map { $_ => readlink "/proc/self/fd/$_" } grep { /\d/ } readdir $folder;
    delete $is{fileno $folder};
    print map { "$_=" . ($is{$_} =~ s/\[\d+\]$//r) . "\n" } sort { $a <=> $b } keys %is;
"#;

#[test]
fn the_command_inherits_the_lock_and_what_was_open_and_nothing_else() {
    both(|tool| {
        let print = ["perl", "-e", PRINT_DESCRIPTORS];
        let descriptors = |inner: &Command| -> Vec<String> {
            let mut command = Command::new("sh");
            // The caller opened descriptor 7.
            command
                .args(["-c", r#"exec 7</; exec "$@""#, "sh"])
                .arg(inner.get_program())
                .args(inner.get_args());
            command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
            let said =
                finish(command.current_dir(tool.daemon.folder()).stdin(Stdio::null())).assert_silent(0);
            // Output and error are other files each time.
            said.lines()
                .filter(|line| !line.starts_with("1=") && !line.starts_with("2="))
                .map(String::from)
                .collect()
        };
        let mut bare = Command::new(print[0]);
        let before = descriptors(bare.args(&print[1..]));
        assert!(before.contains(&"7=/".to_string()), "{before:?}");
        assert_eq!(descriptors(&tool.run(&["-o"], &print)), before);
        for options in [&[][..], &["-F"]] {
            let mut with = descriptors(&tool.run(options, &print));
            with.retain(|line| !before.contains(line));
            let [lock] = &with[..] else { panic!("one more, the lock's: {with:?}") };
            let what = if tool.name == "flock" { "/l" } else { "=socket:" };
            assert!(lock.ends_with(what), "{lock}");
        }
    });
}

/// The one difference: with flock, whatever the command leaves behind in the background keeps the lock.
#[test]
fn what_the_command_leaves_behind_keeps_a_lock_of_flock_but_not_of_kmutex() {
    both(|tool| {
        let said = tool.ends(&[], &["sh", "-c", "sleep 600 & echo $!"], 0);
        let sleeper = KillOnDrop::new(said.trim());
        assert_eq!(tool.is_free(), tool.name == "kmutex");
        drop(sleeper);
        wait_until("the lock to be free", || tool.is_free());
        // With -F no kmutex process is left to release, so both behave alike.
        let said = tool.ends(&["-F"], &["sh", "-c", "sleep 600 & echo $!"], 0);
        let sleeper = KillOnDrop::new(said.trim());
        assert!(!tool.is_free());
        drop(sleeper);
        wait_until("the lock to be free", || tool.is_free());
    });
}
