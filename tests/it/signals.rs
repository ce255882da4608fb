//! Signals: each one that is sent to kmutex reaches the command, and the command is started with the signals as they were.
//! What is typed at a terminal is in `terminal.rs`.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::*;
use crate::other_user::OtherUser;

/// A command that counts: for each signal of its arguments that it gets, it writes the name into the file `signals`. It
/// ends with status 5 at the end of its input, or when it reads the line "quit". Its own process id is in `pid`.
pub const COUNTER: &str = r#"
    use strict;
    open my $log, ">>", "signals" or die;
    my $get = sub { syswrite $log, "$_[0]\n" };
    $SIG{$_} = $get for @ARGV;
    open my $pid, ">", "pid.new" or die; print $pid "$$\n"; close $pid; rename "pid.new", "pid" or die;
    my $input = "";
    until ($input =~ /quit/) {
        # perl runs a handler between two of its operations, and may miss a signal that comes just before it waits.
        vec(my $readable = "", 0, 1) = 1;
        select($readable, undef, undef, 0.1) > 0 or next;
        my $bytes = sysread STDIN, $input, 100, length $input;
        last if defined $bytes && $bytes == 0;
    }
    exit 5;
"#;

/// What the counting command has told.
pub struct Counter<'a> {
    daemon: &'a Daemon,
    pub kmutex: Pid,
}

impl Counter<'_> {
    /// Waits until the command of the one who holds `k` counts.
    pub fn ready(daemon: &Daemon) -> Counter<'_> {
        wait_until("the command to count", || daemon.folder().join("pid").exists());
        let kmutex = daemon.status()[0]["holders"][0]["pid"].as_i64().unwrap();
        Counter { daemon, kmutex: Pid::from_raw(kmutex as i32) }
    }

    pub fn command(&self) -> Pid {
        Pid::from_raw(fs::read_to_string(self.file("pid")).unwrap().trim().parse().unwrap())
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.daemon.folder().join(name)
    }

    /// How often the command got this signal.
    pub fn count(&self, name: &str) -> usize {
        fs::read_to_string(self.file("signals")).unwrap().lines().filter(|&line| line == name).count()
    }

    pub fn wait_for(&self, name: &str, count: usize) {
        wait_until(&format!("{count} times {name}"), || self.count(name) >= count);
    }

    /// Sends a signal to kmutex alone, and waits until the command has got it.
    pub fn send(&self, signal: Signal) {
        let name = &signal.as_str()[3..];
        let before = self.count(name);
        kill(self.kmutex, signal).unwrap();
        self.wait_for(name, before + 1);
    }

    /// Waits until kmutex has dealt with what it was sent before: it takes the pending signal with the lowest number first, and
    /// PWR has the highest but for the real-time signals.
    pub fn barrier(&self) {
        self.send(Signal::SIGPWR);
    }
}

/// kmutex with the counting command, which is the holder of `k`.
fn start(daemon: &Daemon, options: &[&str], signals: &[&str]) -> Process {
    let mut command = daemon.run(&[options, &["k", "perl", "-e", COUNTER, "--", "PWR"], signals].concat());
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
            assert_eq!(counter.count(name), 1, "{name}");
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
        "PWR",
    ]);
    command.current_dir(daemon.folder()).env("KMUTEX_SOCK", daemon.sock());
    let mut process = Process::spawn(command.stdin(Stdio::piped()));
    let counter = Counter::ready(&daemon);
    counter.barrier();
    assert_eq!(counter.count("USR1"), 1);
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

/// What a command of one line says of its signals, with kmutex before it or without.
fn dispositions(daemon: &Daemon, start: &[&str], kmutex: &[&str]) -> Vec<String> {
    let command = [start, kmutex, &["grep", "-E", "^Sig(Ign|Blk|Cgt)", "/proc/self/status"]].concat();
    let mut command_line = tool(command[0]);
    let said =
        finish(command_line.args(&command[1..]).env("KMUTEX_SOCK", daemon.sock()).stdin(Stdio::null()));
    said.assert_silent(0).lines().map(known_to_libc).collect()
}

/// A line of /proc/self/status without what the C library hides from kmutex: musl's masks do not contain signal 34.
fn known_to_libc(line: &str) -> String {
    let Some(blocked) = line.strip_prefix("SigBlk:\t") else { return line.into() };
    let hidden = if cfg!(target_env = "musl") { 1_u64 << (34 - 1) } else { 0 };
    format!("SigBlk:\t{:016x}", u64::from_str_radix(blocked, 16).unwrap() & !hidden)
}

#[test]
fn the_command_is_started_with_the_mask_and_the_dispositions_of_kmutex() {
    let daemon = Daemon::start();
    let starts: [&[&str]; 12] = [
        &["env"],
        &["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"],
        &["sh", "-c", "trap '' PIPE; exec \"$@\"", "sh"],
        &["bash", "-c", "trap '' PIPE TERM; \"$@\"; exit", "bash"],
        &["env", "--ignore-signal=PIPE"],
        &["env", "--default-signal=PIPE"],
        &["env", "--block-signal=PIPE"],
        &["env", "--block-signal=CHLD"],
        &["env", "--block-signal=TERM", "--ignore-signal=TERM"],
        &["env", "--block-signal=RTMIN+3", "--ignore-signal=RTMIN+4"],
        &["env", "--block-signal"],
        &["env", "--ignore-signal=HUP,INT,QUIT,TERM,USR1,USR2,TSTP,CONT,ALRM,PIPE,SEGV,ABRT,WINCH,PWR"],
    ];
    for start in starts {
        let bare = dispositions(&daemon, start, &["env"]);
        for options in [&[][..], &["-o"], &["-F"], &["--tree"]] {
            let under =
                dispositions(&daemon, start, &[&[KMUTEX, "run", "--no-autostart"], options, &["k"]].concat());
            assert_eq!(under, bare, "{start:?} {options:?}");
        }
    }
    let bare = dispositions(&daemon, &["env", "--ignore-signal=PIPE", "--block-signal=CHLD"], &["env"]);
    assert!(
        bare[0].ends_with("10000") && bare[1].ends_with("1000"),
        "the test sees what it should: {bare:?}"
    );
}

#[test]
fn a_parent_that_blocks_or_ignores_sigchld_changes_nothing_as_with_flock() {
    let daemon = Daemon::start();
    for start in ["--block-signal=CHLD", "--ignore-signal=CHLD", "--block-signal"] {
        for tool in [&["flock", "f"][..], &[KMUTEX, "run", "k"], &[KMUTEX, "run", "--tree", "k"]] {
            let mut command = Command::new("env");
            command.arg(start).args(tool).args(["sh", "-c", "exit 7"]).stdin(Stdio::null());
            command.current_dir(daemon.folder()).env("KMUTEX_SOCK", daemon.sock());
            finish(&mut command).assert_silent(7);
        }
        // Of a parent that ignores it, flock's command and kmutex's do not: their own parent must not.
        let with_flock = dispositions(&daemon, &["env", start], &["flock", "/dev/null"]);
        assert_eq!(dispositions(&daemon, &["env", start], &[KMUTEX, "run", "k"]), with_flock, "{start}");
    }
}

#[test]
fn a_signal_that_is_ignored_does_not_reach_the_command() {
    let daemon = Daemon::start();
    let mut command = Command::new("sh");
    // As nohup does. The command could handle it if it got it.
    command.args(["-c", r#"trap '' HUP; exec "$0" run k perl -e "$1" -- HUP PWR"#, KMUTEX, COUNTER]);
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
    assert_eq!(counter.count("USR1"), 1);
    assert_ne!(state_of(process.pid()), 'T');
    drop(process.child.stdin.take());
    assert_eq!(process.wait(), 5);
}

/// The one letter of /proc/PID/stat.
pub fn state_of(pid: Pid) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
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

/// Writes the number of each signal that it gets, whichever it is, into the file `signals`.
const COUNT_ALL: &str = r#"
    use strict; use Config;
    open my $log, ">>", "signals" or die;
    my @names = split " ", $Config{sig_name};
    my @numbers = split " ", $Config{sig_num};
    for my $at (0 .. $#names) {
        my $number = $numbers[$at];
        next if grep { $number == $_ } 0, 9, 19, 32, 33;
        $SIG{$names[$at]} = sub { syswrite $log, "$number\n" };
    }
    open my $pid, ">", "pid.new" or die; print $pid "$$\n"; close $pid; rename "pid.new", "pid" or die;
    sleep 1 until -e "end";
    exit 5;
"#;

#[test]
fn every_signal_that_can_be_caught_reaches_the_command_once() {
    for options in [&[][..], &["--tree"]] {
        let daemon = Daemon::start();
        let mut command = daemon.run(&[options, &["k", "perl", "-e", COUNT_ALL]].concat());
        let mut process = Process::spawn(command.process_group(0));
        let counter = Counter::ready(&daemon);
        let catchable: Vec<i32> = (1..=64).filter(|signal| ![9, 19, 32, 33].contains(signal)).collect();
        for signal in &catchable {
            finish(Command::new("kill").arg(format!("-{signal}")).arg(counter.kmutex.to_string()))
                .assert_silent(0);
            counter.wait_for(&signal.to_string(), 1);
        }
        for signal in &catchable {
            assert_eq!(counter.count(&signal.to_string()), 1, "{signal} {options:?}");
        }
        fs::write(counter.file("end"), "").unwrap();
        process.signal(Signal::SIGUSR1);
        assert_eq!(process.wait(), 5);
    }
}

#[test]
fn kmutex_dies_of_the_signal_of_which_its_command_died_if_it_was_sent_the_same() {
    use std::os::unix::process::ExitStatusExt;
    // Not FPE, which perl ignores.
    for signal in [1, 2, 3, 4, 6, 10, 11, 12, 14, 15, 24, 31, 34, 64] {
        let daemon = Daemon::start();
        let mut command = daemon.run(&["--status-file", "report", "k", "perl", "-e", COUNTER]);
        let mut process = Process::spawn(command.stdin(Stdio::piped()).process_group(0));
        let counter = Counter::ready(&daemon);
        finish(Command::new("kill").arg(format!("-{signal}")).arg(counter.kmutex.to_string()))
            .assert_silent(0);
        let status = wait_for("the end of kmutex", || process.child.try_wait().unwrap());
        assert_eq!((status.signal(), status.core_dumped()), (Some(signal), false), "{status}");
        daemon.wait_for_counts("k", 0, 0);
        let report: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(counter.file("report")).unwrap()).unwrap();
        assert_eq!((&report["verdict"], &report["outcome"]["signal"]), (&"ran".into(), &signal.into()));
    }
}

#[test]
fn what_the_handler_of_a_command_starts_to_clean_up_is_not_signalled() {
    let daemon = Daemon::start();
    // It is started just when kmutex looks whether there are descendants that it has not signalled: most times, so several.
    let script = "trap 'sleep 0.02 && echo clean; exit' TERM; sleep 1000 & echo ready; wait";
    for _ in 0..10 {
        let mut command = daemon.run(&["--kill-after", "1h", "k", "sh", "-c", script]);
        let mut process = Process::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()));
        process.wait_for_line("ready");
        finish(&mut daemon.kmutex(&["break", "--yes", "k"])).assert_silent(0);
        process.wait_for_line("clean");
        assert_eq!(process.wait(), 74);
    }
}

#[test]
fn a_signal_of_the_commands_own_is_an_exit_status() {
    let daemon = Daemon::start();
    let mut process = start(&daemon, &[], &[]);
    kill(Counter::ready(&daemon).command(), Signal::SIGTERM).unwrap();
    let status = wait_for("the end of kmutex", || process.child.try_wait().unwrap());
    assert_eq!(status.code(), Some(128 + 15));
}

#[test]
fn a_stop_that_is_followed_by_a_continue_leaves_both_running() {
    let daemon = Daemon::start();
    let mut process = start(&daemon, &[], &["CONT"]);
    let counter = Counter::ready(&daemon);
    for round in 0..1000 {
        process.signal(Signal::SIGTSTP);
        for _ in 0..round * 10 {
            std::hint::spin_loop();
        }
        process.signal(Signal::SIGCONT);
        // Both run: kmutex passes the signal on, and the command handles it.
        counter.barrier();
    }
    drop(process.child.stdin.take());
    assert_eq!(process.wait(), 5);
}

#[test]
fn what_a_descendant_of_the_command_sends_to_their_group_is_not_passed_on() {
    let daemon = Daemon::start();
    let script = r#"exec 3<&0; perl -e "$COUNTER" -- TERM PWR <&3 & until test -e pid; do sleep 0.01; done; trap : TERM
        sh -c 'trap "" TERM; kill -TERM 0'; wait; wait; wait; exit 5"#;
    let mut command = daemon.run(&["k", "sh", "-c", script]);
    let mut process = Process::spawn(command.env("COUNTER", COUNTER).stdin(Stdio::piped()).process_group(0));
    let counter = Counter::ready(&daemon);
    counter.wait_for("TERM", 1);
    // Both are the lowest that is pending when kmutex reads it, TERM before WINCH.
    process.signal(Signal::SIGWINCH);
    wait_until("kmutex to sleep again", || state_of(process.pid()) == 'S');
    kill(counter.command(), Signal::SIGKILL).unwrap();
    assert_eq!(process.wait(), 5);
    assert_eq!(counter.count("TERM"), 1);
}

#[test]
fn a_signal_to_the_whole_group_from_outside_is_never_lost_and_comes_twice_at_most() {
    type Send = fn(&Counter<'_>);
    let senders: [(&str, Send); 3] = [
        ("kill -- -PGID", |counter| kill(Pid::from_raw(-counter.kmutex.as_raw()), Signal::SIGTERM).unwrap()),
        ("each process, kmutex first", |counter| {
            kill(counter.kmutex, Signal::SIGTERM).unwrap();
            kill(counter.command(), Signal::SIGTERM).unwrap();
        }),
        ("each process, the command first", |counter| {
            kill(counter.command(), Signal::SIGTERM).unwrap();
            kill(counter.kmutex, Signal::SIGTERM).unwrap();
        }),
    ];
    for options in [&[][..], &["-o"], &["--tree"]] {
        for (name, send) in senders {
            let daemon = Daemon::start();
            let mut process = start(&daemon, options, &["TERM"]);
            let counter = Counter::ready(&daemon);
            send(&counter);
            counter.wait_for("TERM", 1);
            counter.barrier();
            // No rule tells such a sender from one that signals kmutex alone.
            assert!((1..=2).contains(&counter.count("TERM")), "{name}: {}", counter.count("TERM"));
            drop(process.child.stdin.take());
            assert_eq!(process.wait(), 5);
        }
    }
}

#[test]
fn a_signal_from_outside_that_kills_the_script_too_comes_once() {
    for _ in 0..5 {
        let daemon = Daemon::start();
        // The script does nothing about TERM; the command does.
        let script = r#""$KMUTEX" run k perl -e "$COUNTER" -- TERM PWR <&3; echo not here > not"#;
        let mut command = tool("dash");
        command.args(["-c", &format!("exec 3<&0; {script}")]).current_dir(daemon.folder()).process_group(0);
        command.env("KMUTEX", KMUTEX).env("COUNTER", COUNTER).env("KMUTEX_SOCK", daemon.sock());
        let mut script = Process::spawn(command.stdin(Stdio::piped()));
        let counter = Counter::ready(&daemon);
        wait_until("kmutex to watch the script", || watches_a_process(counter.kmutex));
        kill(Pid::from_raw(-script.pid().as_raw()), Signal::SIGTERM).unwrap();
        counter.wait_for("TERM", 1);
        assert_eq!(script.wait(), 128 + 15);
        counter.barrier();
        assert_eq!(counter.count("TERM"), 1);
        // To kmutex alone: nothing is held back for the sake of that.
        counter.send(Signal::SIGTERM);
        drop(script.child.stdin.take());
        daemon.wait_for_counts("k", 0, 0);
        assert!(!daemon.folder().join("not").exists());
    }
}

/// Whether a process has a descriptor of another one.
fn watches_a_process(pid: Pid) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    files
        .filter_map(|file| fs::read_link(file.path()).ok())
        .any(|link| link.to_string_lossy().contains("pidfd"))
}

#[test]
fn a_signal_from_outside_that_spares_the_script_comes_once() {
    let daemon = Daemon::start();
    let script = r#"exec 3<&0; "$KMUTEX" run k perl -e "$COUNTER" -- TERM PWR <&3; exit $?"#;
    let mut command = tool("dash");
    command.args(["-c", script]).current_dir(daemon.folder()).process_group(0);
    command.env("KMUTEX", KMUTEX).env("COUNTER", COUNTER).env("KMUTEX_SOCK", daemon.sock());
    let mut script = Process::spawn(command.stdin(Stdio::piped()));
    let counter = Counter::ready(&daemon);
    wait_until("kmutex to watch the script", || watches_a_process(counter.kmutex));
    counter.send(Signal::SIGTERM);
    counter.barrier();
    assert_eq!(counter.count("TERM"), 1);
    drop(script.child.stdin.take());
    assert_eq!(script.wait(), 5);
}

#[test]
fn what_a_shell_sends_to_a_job_is_never_lost_and_comes_twice_at_most() {
    let daemon = Daemon::start();
    // With -m, a job has a process group of its own, which kmutex leads.
    let script = r#"exec 3<&0; set -m; "$KMUTEX" run k perl -e "$COUNTER" -- TERM PWR <&3 &
        until test -e pid; do sleep 0.01; done; kill -TERM %1; wait %1; exit $?"#;
    let mut command = tool("bash");
    command.args(["-c", script]).current_dir(daemon.folder());
    command.env("KMUTEX", KMUTEX).env("COUNTER", COUNTER).env("KMUTEX_SOCK", daemon.sock());
    let mut shell = Process::spawn(command.stdin(Stdio::piped()));
    let counter = Counter::ready(&daemon);
    counter.wait_for("TERM", 1);
    counter.barrier();
    assert!((1..=2).contains(&counter.count("TERM")), "{}", counter.count("TERM"));
    drop(shell.child.stdin.take());
    assert_eq!(shell.wait(), 5);
}

#[test]
#[ignore = "needs zsh and dash"]
fn the_command_gets_what_each_kind_of_sender_sends() {
    // A shell gives a background process no input, unless it is told to.
    let run = r#""$KMUTEX" run k perl -e "$COUNTER" -- TERM PWR <&3"#;
    let ready = "until test -e pid; do sleep 0.01; done";
    // The shell's script, and how often the command gets TERM.
    let senders = [
        // One process is signalled.
        (format!("{run} & {ready}; kill -TERM $!; wait"), 1),
        (format!("{run} & {ready}; command kill -TERM $!; wait"), 1),
        (format!("test $0 != bash || set -m; {run} & {ready}; kill -TERM $!; wait"), 1),
        (format!("trap : TERM; {run} & {ready}; kill -TERM $!; wait"), 1),
        // The whole group is signalled by one of its processes, which spares itself.
        (format!("{run} & {ready}; trap '' TERM; kill -TERM 0; wait"), 1),
        // timeout(1) signals its child, and then its group, from which kmutex cannot tell the two apart.
        (format!("timeout -s TERM 1 {run}"), 1),
    ];
    for shell in ["bash", "dash", "zsh"] {
        for (script, expected) in &senders {
            let daemon = Daemon::start();
            let mut command = tool("setsid");
            command.args(["-w", shell, "-c", &format!("exec 3<&0; {script}")]).current_dir(daemon.folder());
            command.env("KMUTEX", KMUTEX).env("COUNTER", COUNTER).env("KMUTEX_SOCK", daemon.sock());
            let mut process = Process::spawn(command.stdin(Stdio::piped()));
            println!("{shell}: {script}");
            let counter = Counter::ready(&daemon);
            if *expected > 0 {
                counter.wait_for("TERM", *expected);
            }
            counter.barrier();
            assert_eq!(counter.count("TERM"), *expected, "{shell}: {script}");
            kill(counter.command(), Signal::SIGKILL).unwrap();
            drop(process.child.stdin.take());
            process.wait();
        }
    }
}

#[test]
#[ignore = "needs root, to act as two users"]
fn without_a_process_for_the_command_a_waiter_takes_over() {
    let user = OtherUser::new();
    let sock = user.folder().join("sock");
    let root = Command::new(KMUTEX);
    let _daemon = user.serve(root, &sock, &["--mode", "666"]);
    // A first holder, so that the two wait.
    let run = |mut command: Command, args: &[&str]| {
        command.args(["run", "--trust-uid", "0", "--sock"]).arg(&sock).args(args).current_dir(user.folder());
        command
    };
    let mut first = run(Command::new(KMUTEX), &["k", "sh", "-c", "echo holding; read end; exit 0"]);
    let mut first = Process::spawn(first.stdin(Stdio::piped()).stdout(Stdio::piped()));
    first.wait_for_line("holding");
    let waiting = |count: u64| {
        let status =
            finish(Command::new(KMUTEX).args(["status", "--json", "--sock"]).arg(&sock)).assert_silent(0);
        serde_json::from_str::<serde_json::Value>(status.trim()).unwrap()["waiting"] == count
    };
    // This user, of no other test, may have one process, which is kmutex.
    let mut limited = Command::new("prlimit");
    limited.args(["--nproc=1", "setpriv", "--reuid=64021", "--clear-groups"]).arg(user.kmutex());
    let mut limited =
        Process::spawn(run(limited, &["--queue", "k", "touch", "first"]).stderr(Stdio::piped()));
    wait_until("one to wait", || waiting(1));
    let mut second = Process::spawn(&mut run(Command::new(KMUTEX), &["--queue", "k", "touch", "second"]));
    wait_until("two to wait", || waiting(2));
    drop(first.child.stdin.take());
    assert_eq!(limited.wait(), 71);
    assert!(limited.stderr().starts_with("kmutex: cannot start the command: "), "the reason");
    assert_eq!(second.wait(), 0);
    assert!(user.folder().join("second").exists() && !user.folder().join("first").exists());
}

#[test]
#[ignore = "needs root, to act as two users"]
fn a_command_of_another_user_that_may_not_be_signalled_is_reported() {
    let user = OtherUser::new();
    let sock = user.folder().join("sock");
    let _daemon = user.serve(Command::new(KMUTEX), &sock, &["--mode", "666"]);
    // A program that becomes root, as sudo(8) does.
    let suid = user.folder().join("setpriv");
    finish(Command::new("sh").args(["-c", "install -m 4755 \"$(command -v setpriv)\" \"$0\""]).arg(&suid))
        .assert_silent(0);
    let mut command = user.command(user.kmutex());
    command.args(["run", "--trust-uid", "0", "--sock"]).arg(&sock).arg("k").arg(&suid);
    command.args(["--reuid=0", "sh", "-c", "echo running; read end; exit 4"]);
    let mut process =
        Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()));
    process.wait_for_line("running");
    for signal in [Signal::SIGTERM, Signal::SIGTERM, Signal::SIGUSR1] {
        process.signal(signal);
        wait_until("kmutex to have read it", || {
            let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
            let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap();
            u64::from_str_radix(pending.trim(), 16) == Ok(0)
        });
    }
    drop(process.child.stdin.take());
    assert_eq!(process.wait(), 4);
    let said = process.stderr();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 2, "{said}");
    assert!(lines[0].contains("cannot pass SIGTERM on to the command: it runs as another user"), "{said}");
}
