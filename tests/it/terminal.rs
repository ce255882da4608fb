//! kmutex at a terminal: keys, job control, hang-ups, and what it writes there. Where env(1) or flock(1) have the behaviour,
//! the same scene is played with them.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::*;
use crate::signals::{COUNTER, Counter, state_of};

/// A terminal with a shell script in it, in the daemon's folder; `$KMUTEX` is the program. What is written to its standard input
/// is typed; what appears on its screen is in the file `screen`.
pub fn terminal(daemon: &Daemon, shell: &str, script: &str) -> Process {
    tool(shell);
    let mut command = tool("script");
    fs::write(daemon.folder().join("script.sh"), script).unwrap();
    command.args(["-q", "-e", "-f", "-c", &format!("exec {shell} script.sh"), "screen"]);
    command.current_dir(daemon.folder()).env("KMUTEX", KMUTEX).env("COUNTER", COUNTER);
    command
        .env("KMUTEX_SOCK", daemon.sock())
        .env("SHELL", "/bin/sh")
        .env("TERM", "xterm")
        .env_remove("NO_COLOR");
    Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::null()))
}

pub fn type_in(terminal: &mut Process, keys: &str) {
    terminal.child.stdin.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
}

#[test]
fn what_is_typed_at_a_terminal_reaches_the_command_once() {
    for (key, name) in [("\x03", "INT"), ("\x1c", "QUIT")] {
        let daemon = Daemon::start();
        // The shell around it survives the key, to report the status.
        let script = r#"trap : INT QUIT; "$KMUTEX" run k perl -e "$COUNTER" -- INT QUIT PWR; exit $?"#;
        let mut terminal = terminal(&daemon, "sh", script);
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
        let mut terminal = terminal(&daemon, "sh", script);
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
        "$KMUTEX" run k perl -e "$COUNTER" -- CONT PWR
        status=$?
        for round in 1 2 3 4 5; do
            echo "$status" >> stops
            until test -e go$round; do sleep 0.01; done
            fg > /dev/null
            status=$?
        done
        exit $status
    "#;
    let mut terminal = terminal(&daemon, "sh", script);
    let counter = Counter::ready(&daemon);
    for round in 1..=5 {
        // Not before the job is in the foreground, or the key would go to the shell.
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
    // 128 and the signal of the key.
    assert!(stops.lines().all(|status| status == "148"), "{stops}");
    type_in(&mut terminal, "quit\n");
    assert_eq!(terminal.wait(), 5);
}

/// The parent of a process: the second field behind the name in /proc/PID/stat.
fn parent_of(pid: Pid) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Whether a process is in the foreground of its terminal: fields pgrp and tpgid of /proc/PID/stat.
pub fn is_in_foreground(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split_whitespace().collect();
    fields[2] == fields[5] && fields[0] != "T"
}

/// What runs a command at a terminal: kmutex in its variants, and what it is compared with.
const LIKE_ENV: [&str; 5] = [
    "env",
    r#""$KMUTEX" run k"#,
    r#""$KMUTEX" run -o k"#,
    r#""$KMUTEX" run --tree k"#,
    r#""$KMUTEX" run -F k"#,
];

/// Plays a scene at a terminal: the script runs `RUN` and creates the file `started`; then this key is typed. Returns the status of
/// the shell and whether it came to its second command.
fn play(shell: &str, script: &str, run: &str, key: &str) -> (i32, bool) {
    let daemon = Daemon::start();
    let script = script.replace("RUN", run).replace("SECOND", "echo second > second");
    let mut terminal = terminal(&daemon, shell, &format!("ulimit -c 0\n{script}"));
    wait_until("the command to run", || daemon.folder().join("started").exists());
    type_in(&mut terminal, key);
    let status = terminal.wait();
    daemon.wait_for_counts("k", 0, 0);
    (status, daemon.folder().join("second").exists())
}

#[test]
#[ignore = "needs zsh and dash"]
fn an_interrupted_script_stops_where_it_stops_under_env() {
    let scripts = [
        // A command that dies of the key.
        "RUN perl -e 'open F, q(>started); close F; sleep 1 while 1'; SECOND; exit 3",
        "while :; do RUN perl -e 'open F, q(>started); close F; sleep 1 while 1' || SECOND; break; done; exit 3",
        // One that handles it, and ends with a status.
        "RUN perl -e '$SIG{INT} = $SIG{QUIT} = sub { exit 5 }; open F, q(>started); close F; sleep 1 while 1'; SECOND; exit 3",
    ];
    for shell in ["bash", "dash", "zsh"] {
        for script in scripts {
            for key in ["\x03", "\x1c"] {
                let with_env = play(shell, script, LIKE_ENV[0], key);
                for run in &LIKE_ENV[1..] {
                    assert_eq!(play(shell, script, run, key), with_env, "{shell} {key:?} {run}: {script}");
                }
            }
        }
    }
}

#[test]
fn an_interrupted_script_stops_in_bash() {
    // The test before this one compares; this one says with what.
    let script = "RUN perl -e 'open F, q(>started); close F; sleep 1 while 1'; SECOND; exit 3";
    for run in ["env", "flock f", LIKE_ENV[1]] {
        assert_eq!(play("bash", script, run, "\x03"), (130, false), "{run}");
    }
}

#[test]
fn a_key_reaches_a_command_that_has_moved_to_another_group() {
    for (key, signal) in [("\x03", 2), ("\x1c", 3)] {
        for options in ["", "-o", "--tree"] {
            let daemon = Daemon::start();
            // timeout(1) moves to a group of its own, so that the terminal does not signal it.
            let script = format!(
                r#"ulimit -c 0; "$KMUTEX" run {options} k timeout 600 perl -e '
                    open F, q(>started.new); print F getppid; close F; rename qw(started.new started); sleep 1 while 1'"#
            );
            let mut terminal = terminal(&daemon, "bash", &script);
            let timeout = wait_for("the command to run", || {
                Some(fs::read_to_string(daemon.folder().join("started")).ok()?.parse().unwrap())
            });
            wait_until("timeout(1) to wait for it", || state_of(Pid::from_raw(timeout)) == 'S');
            type_in(&mut terminal, key);
            assert_eq!(terminal.wait(), 128 + signal, "{options}");
            daemon.wait_for_counts("k", 0, 0);
        }
    }
}

#[test]
fn a_key_reaches_what_an_ended_command_has_left_in_another_group() {
    for key in ["\x03", "\x1c"] {
        let daemon = Daemon::start();
        let script =
            format!("trap : INT QUIT; \"$KMUTEX\" run --tree k perl -e '{LEAVE_ONE}'; echo $? > status");
        let mut terminal = terminal(&daemon, "dash", &script);
        let left = wait_for("the command to run", || {
            fs::read_to_string(daemon.folder().join("started")).ok()?.trim().parse().ok()
        });
        let kmutex = daemon.status()[0]["holders"][0]["pid"].as_i64().unwrap();
        wait_until("the command itself to end", || parent_of(Pid::from_raw(left)) == kmutex as i32);
        type_in(&mut terminal, key);
        terminal.wait();
        assert_eq!(fs::read_to_string(daemon.folder().join("status")).unwrap(), "0\n", "the command's own");
        daemon.wait_for_counts("k", 0, 0);
    }
}

/// Leaves a process behind that sleeps, in a group of its own; its process id is in `started`.
const LEAVE_ONE: &str = r#"$SIG{QUIT} = sub { exit }; fork and exit; setpgrp; open F, ">", "started"; print F "$$\n"; close F; sleep 1 while 1"#;

#[test]
fn a_signal_to_kmutex_reaches_what_an_ended_command_has_left() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        let daemon = Daemon::start();
        let mut process = Process::spawn(&mut daemon.run(&["--tree", "k", "perl", "-e", LEAVE_ONE]));
        let left = wait_for("the command to run", || {
            fs::read_to_string(daemon.folder().join("started")).ok()?.trim().parse().ok()
        });
        wait_until("the command itself to end", || parent_of(Pid::from_raw(left)) == process.pid().as_raw());
        process.signal(signal);
        assert_eq!(process.wait(), 0, "{signal}: the status is the command's");
    }
}

#[test]
fn a_hang_up_ends_a_command_whose_kmutex_leads_the_session() {
    // What handles HUP counts it; env(1) shows what is usual.
    let counts = ["env", r#""$KMUTEX" run k"#, r#""$KMUTEX" run -o k"#, r#""$KMUTEX" run --tree k"#].map(|run| {
        let daemon = Daemon::start();
        let script = format!(r#"exec {run} perl -e '
            open my $log, ">>", "hangups" or die;
            $SIG{{HUP}} = sub {{ syswrite $log, "HUP\n" }};
            open my $pid, ">", "pid.new" or die; print $pid "$$\n"; close $pid; rename "pid.new", "pid" or die;
            sleep 1 until -e "end"'"#);
        let terminal = terminal(&daemon, "sh", &script);
        wait_until("the command to run", || daemon.folder().join("pid").exists());
        let command = KillOnDrop::new(fs::read_to_string(daemon.folder().join("pid")).unwrap().trim());
        // With it the terminal goes.
        kill(terminal.pid(), Signal::SIGKILL).unwrap();
        let hangups = daemon.folder().join("hangups");
        wait_until("the hang-up", || fs::read_to_string(&hangups).unwrap().lines().count() > 0);
        fs::write(daemon.folder().join("end"), "").unwrap();
        daemon.wait_for_counts("k", 0, 0);
        drop(command);
        fs::read_to_string(&hangups).unwrap().lines().count()
    });
    assert_eq!(counts, [1; 4]);
}

#[test]
fn a_hang_up_releases_the_lock_of_a_command_that_dies_of_it() {
    for options in ["", "-o", "--tree", "-F"] {
        let daemon = Daemon::start();
        let script = format!(
            r#"exec "$KMUTEX" run {options} k perl -e 'open F, q(>started); close F; sleep 1 while 1'"#
        );
        let terminal = terminal(&daemon, "sh", &script);
        wait_until("the command to run", || daemon.folder().join("started").exists());
        kill(terminal.pid(), Signal::SIGKILL).unwrap();
        daemon.wait_for_counts("k", 0, 0);
    }
}

/// A holder of `k`, so that others wait.
fn hold(daemon: &Daemon) -> Holder {
    daemon.hold_with(&["--note", "the holder"], "k")
}

/// What has appeared on the screen of a terminal in the daemon's folder.
fn screen(daemon: &Daemon) -> String {
    String::from_utf8_lossy(&fs::read(daemon.folder().join("screen")).unwrap_or_default()).into_owned()
}

const CLEAR: &str = "\r\x1b[K";

#[test]
fn the_line_about_a_wait_is_cleared_when_the_lock_comes() {
    let daemon = Daemon::start();
    let holder = hold(&daemon);
    let mut terminal = terminal(&daemon, "bash", r#"exec "$KMUTEX" run --queue k echo done"#);
    wait_until("the line", || screen(&daemon).contains("waiting for \"k\", held by"));
    holder.finish(0);
    assert_eq!(terminal.wait(), 0);
    let screen = screen(&daemon);
    assert!(screen.contains(&format!("{CLEAR}done")), "{screen:?}");
}

#[test]
fn the_line_about_a_wait_is_cleared_when_a_key_ends_the_wait() {
    for (key, code) in [("\x03", 130), ("\x1c", 131)] {
        let daemon = Daemon::start();
        let _holder = hold(&daemon);
        let script = r#"ulimit -c 0; "$KMUTEX" run --queue k echo done; echo second > second; exit 3"#;
        let mut terminal = terminal(&daemon, "bash", script);
        wait_until("the line", || screen(&daemon).contains("waiting for"));
        type_in(&mut terminal, key);
        // As without the line: bash sees that its command was interrupted.
        assert_eq!(
            (terminal.wait(), daemon.folder().join("second").exists()),
            if code == 130 { (130, false) } else { (3, true) }
        );
        let screen = screen(&daemon);
        let after = screen.rsplit_once("\x1b[K").unwrap();
        assert!(after.0.ends_with('\r') && !after.1.contains("waiting"), "{screen:?}");
        daemon.wait_for_counts("k", 1, 0);
    }
}

#[test]
fn a_waiter_in_the_background_writes_nothing_and_is_not_stopped() {
    let daemon = Daemon::start();
    let holder = hold(&daemon);
    // The one in the foreground shows when the other has had its time.
    let script = r#"set -m; stty tostop; "$KMUTEX" run --note background --queue k sh -c 'echo > ran' & echo $! > background
        until "$KMUTEX" status --json | grep -q background; do sleep 0.01; done
        "$KMUTEX" run --queue other true; exec "$KMUTEX" run --queue k true"#;
    let other = daemon.hold("other");
    let mut terminal = terminal(&daemon, "bash", script);
    wait_until("three lines of the one in the foreground", || {
        screen(&daemon).matches("waiting for").count() >= 3
    });
    let background: i32 =
        fs::read_to_string(daemon.folder().join("background")).unwrap().trim().parse().unwrap();
    assert_eq!(state_of(Pid::from_raw(background)), 'S');
    assert!(!screen(&daemon).contains("waiting for \"k\""), "{:?}", screen(&daemon));
    other.finish(0);
    holder.finish(0);
    assert_eq!(terminal.wait(), 0);
    assert!(daemon.folder().join("ran").exists());
}

#[test]
#[ignore = "takes many seconds"]
fn without_control_sequences_a_wait_is_told_once() {
    for setting in ["NO_COLOR=1", "TERM=dumb"] {
        let daemon = Daemon::start();
        let holder = hold(&daemon);
        let script = format!(r#"exec env {setting} "$KMUTEX" run --queue k echo done"#);
        let mut plain = terminal(&daemon, "sh", &script);
        wait_until("the line", || screen(&daemon).contains("waiting for"));
        // Another terminal shows when there was time for a second line.
        let clock_daemon = Daemon::start();
        let clock_holder = hold(&clock_daemon);
        let mut clock = terminal(&clock_daemon, "sh", r#"exec "$KMUTEX" run --queue k true"#);
        wait_until("two lines", || screen(&clock_daemon).matches("waiting for").count() >= 2);
        holder.finish(0);
        clock_holder.finish(0);
        assert_eq!((plain.wait(), clock.wait()), (0, 0));
        let screen = screen(&daemon);
        assert_eq!(screen.matches("waiting for").count(), 1, "{setting}: {screen:?}");
        assert!(!screen.contains('\x1b'), "{setting}: {screen:?}");
    }
}
