//! Signals: each one that is sent to kmutex reaches the command, and reaches it exactly once, wherever it comes from.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::*;

/// A command that counts: for each signal of its arguments that it gets, it writes the name into the file `signals`. It
/// ends with status 5 at the end of its input, or when it reads the line "quit". Its own process id is in `pid`.
const COUNTER: &str = r#"
    use strict;
    open my $log, ">>", "signals" or die;
    my $get = sub { syswrite $log, "$_[0]\n" };
    $SIG{$_} = $get for @ARGV;
    open my $pid, ">", "pid.new" or die; print $pid "$$\n"; close $pid; rename "pid.new", "pid" or die;
    my $input = "";
    until ($input =~ /quit/) {
        my $bytes = sysread STDIN, $input, 100, length $input;
        last if defined $bytes && $bytes == 0;
    }
    exit 5;
"#;

/// What the counting command has told.
struct Counter<'a> {
    daemon: &'a Daemon,
    kmutex: Pid,
}

impl Counter<'_> {
    /// Waits until the command of the one who holds `k` counts.
    fn ready(daemon: &Daemon) -> Counter<'_> {
        wait_until("the command to count", || daemon.folder().join("pid").exists());
        let kmutex = daemon.status()[0]["holders"][0]["pid"].as_i64().unwrap();
        Counter { daemon, kmutex: Pid::from_raw(kmutex as i32) }
    }

    fn command(&self) -> Pid {
        Pid::from_raw(fs::read_to_string(self.file("pid")).unwrap().trim().parse().unwrap())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.daemon.folder().join(name)
    }

    /// How often the command got this signal.
    fn count(&self, name: &str) -> usize {
        fs::read_to_string(self.file("signals")).unwrap().lines().filter(|&line| line == name).count()
    }

    fn wait_for(&self, name: &str, count: usize) {
        wait_until(&format!("{count} times {name}"), || self.count(name) >= count);
    }

    /// Sends a signal to kmutex alone, and waits until the command has got it.
    fn send(&self, signal: Signal) {
        let name = &signal.as_str()[3..];
        let before = self.count(name);
        kill(self.kmutex, signal).unwrap();
        self.wait_for(name, before + 1);
    }

    /// Waits until kmutex has dealt with whatever it was sent before: it looks through what it has got in one fixed
    /// order, in which TERM comes before USR1, so that when this TERM is passed on, the round with that USR1 is over.
    fn barrier(&self) {
        self.send(Signal::SIGUSR1);
        self.send(Signal::SIGTERM);
    }
}

/// kmutex with the counting command, which is the holder of `k`.
fn start(daemon: &Daemon, options: &[&str], signals: &[&str]) -> Process {
    let mut command = daemon.run(&[options, &["k", "perl", "-e", COUNTER, "--"], signals].concat());
    // In a group of its own, as a shell would have it. The tests' own group may be orphaned, and the kernel does not stop
    // the processes of such a one.
    Process::spawn(command.stdin(Stdio::piped()).process_group(0))
}

const ALL: [(Signal, &str); 8] = [
    (Signal::SIGTERM, "TERM"),
    (Signal::SIGHUP, "HUP"),
    (Signal::SIGINT, "INT"),
    (Signal::SIGQUIT, "QUIT"),
    (Signal::SIGUSR1, "USR1"),
    (Signal::SIGUSR2, "USR2"),
    (Signal::SIGTSTP, "TSTP"),
    (Signal::SIGCONT, "CONT"),
];

#[test]
fn a_signal_to_kmutex_reaches_the_command_once() {
    for options in [&[][..], &["-o"]] {
        let daemon = Daemon::start();
        let mut process = start(&daemon, options, &ALL.map(|(_, name)| name));
        let counter = Counter::ready(&daemon);
        for (signal, _) in ALL {
            counter.send(signal);
        }
        counter.barrier();
        for (_, name) in ALL {
            let settled = usize::from(matches!(name, "USR1" | "TERM"));
            assert_eq!(counter.count(name), 1 + settled, "{name}");
        }
        drop(process.child.stdin.take());
        assert_eq!(process.wait(), 5, "a command that handles its signals ends as it likes");
    }
}

#[test]
fn a_signal_to_what_became_the_command_is_the_commands() {
    let daemon = Daemon::start();
    let mut process = start(&daemon, &["-F"], &["TERM", "HUP"]);
    let counter = Counter::ready(&daemon);
    assert_eq!((counter.kmutex, process.pid()), (counter.command(), counter.command()));
    counter.send(Signal::SIGTERM);
    counter.send(Signal::SIGHUP);
    assert_eq!((counter.count("TERM"), counter.count("HUP")), (1, 1));
    drop(process.child.stdin.take());
    assert_eq!(process.wait(), 5);
}

#[test]
fn when_the_command_dies_of_it_kmutex_ends_with_128_and_the_signal() {
    for (signal, _) in &ALL[..6] {
        let daemon = Daemon::start();
        let mut process = start(&daemon, &[], &[]);
        let _counter = Counter::ready(&daemon);
        process.signal(*signal);
        assert_eq!(process.wait(), 128 + *signal as i32);
        assert_eq!(daemon.counts("k"), (0, 0));
    }
}

#[test]
fn a_command_that_is_killed_is_137() {
    let daemon = Daemon::start();
    let mut process = start(&daemon, &[], &[]);
    kill(Counter::ready(&daemon).command(), Signal::SIGKILL).unwrap();
    assert_eq!(process.wait(), 137);
    daemon.wait_for_log("signal 9");
}

#[test]
fn what_the_command_sends_to_its_group_is_not_passed_on_to_it() {
    let daemon = Daemon::start();
    let script = COUNTER.replace("$SIG{$_} = $get for @ARGV;", "$SIG{$_} = $get for @ARGV; kill 'USR1', 0;");
    let mut command = Command::new("perl");
    // In a group of its own, since the test would be in this one.
    command.args([
        "-e",
        "setpgrp 0, 0; exec @ARGV or die",
        KMUTEX,
        "run",
        "k",
        "perl",
        "-e",
        &script,
        "--",
        "USR1",
        "TERM",
    ]);
    command.current_dir(daemon.folder()).env("KMUTEX_SOCK", daemon.sock());
    let mut process = Process::spawn(command.stdin(Stdio::piped()));
    let counter = Counter::ready(&daemon);
    counter.barrier();
    assert_eq!(counter.count("USR1"), 2, "its own, and the one of the test");
    drop(process.child.stdin.take());
    assert_eq!(process.wait(), 5);
}

#[test]
fn a_signal_at_any_moment_is_not_lost() {
    let daemon = Daemon::start();
    for round in 0..60 {
        let mut command = daemon.run(&["--verbose", "k", "sleep", "600"]);
        let mut process = Process::spawn(command.stderr(Stdio::piped()));
        // From here on kmutex has the lock and starts the command. Where in that it is hit differs from round to round.
        let mut line = String::new();
        let mut stderr = std::io::BufReader::new(process.child.stderr.take().unwrap());
        std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
        for _ in 0..round * 100 {
            std::hint::spin_loop();
        }
        process.signal(Signal::SIGTERM);
        assert_eq!(process.wait(), 128 + 15);
        wait_until("the lock to be free again", || daemon.counts("k") == (0, 0));
    }
}

#[test]
fn what_is_ignored_stays_ignored_for_the_command() {
    let daemon = Daemon::start();
    let masks = |start: &str, how: &[&str]| {
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("{start} exec \"$@\""), "sh"])
            .args(how)
            .args(["cat", "/proc/self/status"]);
        let said = finish(command.env("KMUTEX_SOCK", daemon.sock()).stdin(Stdio::null())).assert_silent(0);
        let lines = said.lines().filter(|line| line.starts_with("SigIgn") || line.starts_with("SigBlk"));
        lines.map(String::from).collect::<Vec<_>>()
    };
    for start in ["", "trap '' HUP;", "trap '' HUP INT QUIT TERM USR1 USR2 TSTP CONT;"] {
        let bare = masks(start, &[]);
        for options in [&[][..], &["-o"], &["-F"]] {
            let under = masks(start, &[&[KMUTEX, "run", "--no-autostart"], options, &["k"]].concat());
            assert_eq!(under, bare, "{start:?} {options:?}");
        }
    }
    let bits = masks("trap '' HUP;", &[])[1]
        .split_whitespace()
        .nth(1)
        .map(|bits| u64::from_str_radix(bits, 16).unwrap());
    assert_eq!(bits.unwrap() & 1, 1, "the test sees what it should");
}

#[test]
fn a_signal_that_is_ignored_does_not_reach_the_command() {
    let daemon = Daemon::start();
    let mut command = Command::new("sh");
    // As nohup does. The command could handle it if it got it.
    command.args(["-c", r#"trap '' HUP; exec "$0" run k perl -e "$1" -- HUP TERM USR1"#, KMUTEX, COUNTER]);
    command.current_dir(daemon.folder()).env("KMUTEX_SOCK", daemon.sock());
    let mut process = Process::spawn(command.stdin(Stdio::piped()));
    let counter = Counter::ready(&daemon);
    process.signal(Signal::SIGHUP);
    counter.barrier();
    assert_eq!(counter.count("HUP"), 0);
    drop(process.child.stdin.take());
    assert_eq!(process.wait(), 5);
}

#[test]
fn a_command_that_is_stopped_from_outside_does_not_stop_kmutex() {
    let daemon = Daemon::start();
    let mut process = start(&daemon, &[], &["USR1", "TERM"]);
    let counter = Counter::ready(&daemon);
    kill(counter.command(), Signal::SIGSTOP).unwrap();
    wait_until("the command to be stopped", || state_of(counter.command()) == 'T');
    // A signal to kmutex still goes through, to where it waits.
    process.signal(Signal::SIGUSR1);
    kill(counter.command(), Signal::SIGCONT).unwrap();
    counter.wait_for("USR1", 1);
    counter.barrier();
    assert_eq!(counter.count("USR1"), 2);
    assert_ne!(state_of(process.pid()), 'T');
    drop(process.child.stdin.take());
    assert_eq!(process.wait(), 5);
}

/// The one letter of /proc/PID/stat.
fn state_of(pid: Pid) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
}

/// A terminal with a shell script in it, in the daemon's folder; `$KMUTEX` is the program. What is written to its
/// standard input is typed.
fn terminal(daemon: &Daemon, script: &str) -> Process {
    let mut command = Command::new("script");
    fs::write(daemon.folder().join("script.sh"), script).unwrap();
    command.args(["-q", "-e", "-c", "exec sh script.sh", "typescript"]).current_dir(daemon.folder());
    command
        .env("KMUTEX", KMUTEX)
        .env("COUNTER", COUNTER)
        .env("KMUTEX_SOCK", daemon.sock())
        .env("SHELL", "/bin/sh");
    Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::null()))
}

fn type_in(terminal: &mut Process, keys: &str) {
    terminal.child.stdin.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
}

#[test]
fn what_is_typed_at_a_terminal_reaches_the_command_once() {
    for (key, name) in [("\x03", "INT"), ("\x1c", "QUIT")] {
        let daemon = Daemon::start();
        // The shell around it survives the key, to report the status.
        let script =
            r#"trap : INT QUIT; "$KMUTEX" run k perl -e "$COUNTER" -- INT QUIT TERM USR1 CONT; exit $?"#;
        let mut terminal = terminal(&daemon, script);
        let counter = Counter::ready(&daemon);
        // kmutex gets its copy only after the command has dealt with its own: were it to pass that on, the second could
        // not fall together with the first.
        kill(counter.kmutex, Signal::SIGSTOP).unwrap();
        type_in(&mut terminal, key);
        counter.wait_for(name, 1);
        kill(counter.kmutex, Signal::SIGCONT).unwrap();
        counter.barrier();
        assert_eq!(counter.count(name), 1, "{name}");
        type_in(&mut terminal, "quit\n");
        assert_eq!(terminal.wait(), 5);
    }
}

#[test]
fn a_key_that_kills_the_command_ends_kmutex_with_128_and_the_signal() {
    for (key, signal) in [("\x03", 2), ("\x1c", 3)] {
        let daemon = Daemon::start();
        let script = r#"ulimit -c 0; trap : INT QUIT; "$KMUTEX" run k perl -e "$COUNTER"; exit $?"#;
        let mut terminal = terminal(&daemon, script);
        Counter::ready(&daemon);
        type_in(&mut terminal, key);
        assert_eq!(terminal.wait(), 128 + signal);
    }
}

#[test]
fn ctrl_z_stops_the_job_and_fg_continues_it() {
    let daemon = Daemon::start();
    // With -m a shell without a prompt has job control. Each time the job stops, the script goes on.
    let script = r#"
        set -m
        "$KMUTEX" run k perl -e "$COUNTER" -- CONT TERM USR1
        status=$?
        for round in 1 2 3 4 5; do
            echo "$status" >> stops
            until test -e go$round; do sleep 0.01; done
            fg > /dev/null
            status=$?
        done
        exit $status
    "#;
    let mut terminal = terminal(&daemon, script);
    let counter = Counter::ready(&daemon);
    for round in 1..=5 {
        // Before the job is in the foreground the key would go to another process.
        wait_until("the job to be in the foreground", || is_in_foreground(counter.kmutex));
        type_in(&mut terminal, "\x1a");
        wait_until("the shell to see the job stopped", || {
            fs::read_to_string(counter.file("stops")).is_ok_and(|stops| stops.lines().count() == round)
        });
        assert_eq!((state_of(counter.kmutex), state_of(counter.command())), ('T', 'T'));
        fs::write(counter.file(&format!("go{round}")), "").unwrap();
        counter.wait_for("CONT", round);
        counter.barrier();
        assert_eq!(counter.count("CONT"), round, "one for each time");
    }
    let stops = fs::read_to_string(counter.file("stops")).unwrap();
    // 128 and the signal that stopped it: Ctrl-Z's own, or the one by which kmutex stopped after its command.
    assert!(stops.lines().all(|status| status == "148" || status == "147"), "{stops}");
    type_in(&mut terminal, "quit\n");
    assert_eq!(terminal.wait(), 5);
}

/// Whether a process is in the foreground of its terminal: fields pgrp and tpgid of /proc/PID/stat.
fn is_in_foreground(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split_whitespace().collect();
    fields[2] == fields[5] && fields[0] != "T"
}

#[test]
fn a_stop_sent_to_kmutex_alone_stops_the_command_and_a_continue_continues_both() {
    let daemon = Daemon::start();
    let mut process = start(&daemon, &[], &["CONT", "TERM", "USR1"]);
    let counter = Counter::ready(&daemon);
    for round in 1..=5 {
        process.signal(Signal::SIGTSTP);
        for pid in [counter.command(), counter.kmutex] {
            wait_until("both to be stopped", || state_of(pid) == 'T');
        }
        process.signal(Signal::SIGCONT);
        counter.wait_for("CONT", round);
        counter.barrier();
        assert_eq!(counter.count("CONT"), round);
    }
    drop(process.child.stdin.take());
    assert_eq!(process.wait(), 5);
}
