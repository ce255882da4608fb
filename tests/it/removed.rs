//! The daemon's files are removed or replaced under it, as clean-up jobs do: the daemon puts them back, and no lock is given
//! twice.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};

use crate::harness::{Daemon, KMUTEX, Process, finish, tool, wait_until};
use crate::other_user::OtherUser;
use crate::world::{BOB, EVE, World};

fn beside(daemon: &Daemon, suffix: &str) -> PathBuf {
    daemon.folder().join(format!("sock{suffix}"))
}

fn assert_held(daemon: &Daemon, key: &str) {
    finish(&mut daemon.kmutex(&["run", "-n", key, "true"])).assert_silent(75);
}

#[test]
fn each_file_that_is_removed_comes_back_and_the_lock_stays_held() {
    let removals: [&[&str]; 7] = [
        &[""],
        &[".lock"],
        &[".journal"],
        &[".lock", ".journal"],
        &["", ".lock"],
        &["", ".journal"],
        &["", ".lock", ".journal"],
    ];
    for suffixes in removals {
        let mut daemon = Daemon::start();
        let holder = daemon.hold("k");
        for suffix in suffixes {
            fs::remove_file(beside(&daemon, suffix)).unwrap();
        }
        for suffix in ["", ".lock", ".journal"] {
            wait_until(&format!("sock{suffix} to be back"), || beside(&daemon, suffix).exists());
        }
        wait_until("its pid", || {
            fs::read_to_string(beside(&daemon, ".lock")).unwrap().trim() == daemon.pid().to_string()
        });
        assert_held(&daemon, "k");
        assert_eq!(fs::metadata(daemon.sock()).unwrap().permissions().mode() & 0o777, 0o600);
        // The next daemon knows it too.
        daemon.restart(&[]);
        assert_held(&daemon, "k");
        holder.finish(0);
        finish(&mut daemon.run(&["k", "true"])).assert_silent(0);
    }
}

/// Also while the daemon cannot do anything about it.
#[test]
fn a_second_daemon_does_not_serve_while_the_first_one_lives_without_files() {
    let daemon = Daemon::start();
    let _holder = daemon.hold("k");
    kill(daemon.pid(), Signal::SIGSTOP).unwrap();
    for suffix in ["", ".lock", ".journal"] {
        fs::remove_file(beside(&daemon, suffix)).unwrap();
    }
    finish(&mut daemon.kmutex(&["serve", "--no-log"])).assert_error(75, &["another daemon does"]);
    let said = finish(&mut daemon.kmutex(&["run", "-w", "1", "k", "true"]));
    assert!([75, 69].contains(&said.code), "{said:?}");
    kill(daemon.pid(), Signal::SIGCONT).unwrap();
    wait_until("the socket to be back", || daemon.sock().exists());
    assert_held(&daemon, "k");
}

#[test]
fn a_daemon_whose_socket_was_replaced_says_so_and_grants_nothing_more() {
    let mut daemon = Daemon::start();
    let holder = daemon.hold("k");
    let mut old = daemon.wire();
    fs::remove_file(daemon.sock()).unwrap();
    // Before the daemon could put it back, unless it was faster.
    while UnixListener::bind(daemon.sock()).map(std::mem::forget).is_err() {
        let _ = fs::remove_file(daemon.sock());
    }
    daemon.wait_for_log("grants no locks");
    old.open(r#"{"type":"lock","key":"other"}"#);
    assert_eq!(old.answer_of("error")["code"], "cannot_record");
    // What is held stays held, and the daemon ends with it, without removing what is not its own.
    assert!(daemon.process().is_running());
    drop(holder);
    assert_eq!(daemon.process().wait(), 0);
    assert!(UnixStream::connect(daemon.sock()).is_ok());
}

#[test]
fn a_journal_that_was_replaced_is_written_anew() {
    let mut daemon = Daemon::start();
    let _holder = daemon.hold("k");
    let other = daemon.folder().join("other");
    fs::write(&other, "rubbish").unwrap();
    fs::rename(&other, beside(&daemon, ".journal")).unwrap();
    wait_until("the journal to be right", || {
        fs::read(beside(&daemon, ".journal")).unwrap().starts_with(b"kmutex journal")
    });
    daemon.restart(&[]);
    assert_held(&daemon, "k");
}

#[test]
fn a_folder_that_has_gone_stops_grants_until_it_is_back() {
    let daemon = Daemon::start();
    let (mut holder, mut wire) = (daemon.wire(), daemon.wire());
    holder.open(r#"{"type":"lock","key":"held"}"#).answer_of("granted");
    wire.open(r#"{"type":"ping"}"#).answer_of("pong");
    let away = daemon.folder().with_extension("away");
    fs::rename(daemon.folder(), &away).unwrap();
    let log = || fs::read_to_string(away.join("log")).unwrap();
    wait_until("the daemon to notice", || log().contains("grants no locks"));
    wire.request(r#"{"type":"lock","key":"k"}"#).answer_of("error");
    fs::rename(&away, daemon.folder()).unwrap();
    daemon.wait_for_log("in place again");
    assert_held(&daemon, "held");
    finish(&mut daemon.run(&["k", "true"])).assert_silent(0);
}

#[test]
fn an_idle_daemon_does_not_wake_up_to_look() {
    let daemon = Daemon::start();
    let switches = || {
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        status.lines().find(|line| line.starts_with("voluntary_ctxt")).unwrap().to_string()
    };
    finish(&mut daemon.run(&["k", "true"])).assert_silent(0);
    daemon.wait_for_log("close: ");
    let mut before = switches();
    wait_until("the daemon to sleep", || std::mem::replace(&mut before, switches()) == before);
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(switches(), before);
}

/// The clean-up job of systemd, which deletes what is old.
#[test]
#[ignore = "needs root, to act as several users"]
fn systemd_tmpfiles_takes_no_lock_from_a_living_daemon() {
    tool("systemd-tmpfiles");
    let world = World::with("echo 'd /tmp 1777 root root 0' > /run/all.conf");
    let clean = "systemd-tmpfiles --clean /run/all.conf";
    let _own = world.hold(BOB, "k");
    let _daemon = world.serve(EVE, "--sock /tmp/eve.sock");
    let eve = |args: &str| format!("KMUTEX_SOCK=/tmp/eve.sock kmutex {args}");
    let _other = world.start(EVE, &eve("run k -- sh -c 'echo ready; cat'"));
    for _ in 0..3 {
        world.run(0, clean);
        world.expect(BOB, "kmutex run -n k -- true", 75);
        wait_until("Eve's files to be back", || {
            ["", ".lock", ".journal"]
                .iter()
                .all(|suffix| world.path(format!("/tmp/eve.sock{suffix}")).exists())
        });
        world.expect(EVE, &eve("run -n k -- true"), 75);
        world.expect(EVE, &eve("serve --no-log 2>&1 | grep -q 'the daemon with pid'"), 0);
    }
}

/// Our own line for it.
#[test]
#[ignore = "needs root, to act as several users"]
fn the_line_for_systemd_tmpfiles_spares_what_is_kmutexs() {
    let conf = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/tmpfiles.d/kmutex.conf");
    let conf = fs::read_to_string(conf).unwrap();
    let world = World::with("echo 'd /tmp 1777 root root 0' > /run/all.conf");
    fs::write(world.path("/run/kmutex.conf"), conf).unwrap();
    world.expect(
        BOB,
        "mkdir /tmp/kmutex-1; touch /tmp/kmutex-1/x /tmp/keyedmutexd.sock.journal /tmp/other",
        0,
    );
    world.expect(0, "systemd-tmpfiles --create --clean /run/kmutex.conf /run/all.conf", 0);
    assert!(world.path("/tmp/kmutex-1/x").exists() && world.path("/tmp/keyedmutexd.sock.journal").exists());
    assert!(!world.path("/tmp/other").exists(), "the job did its work");
    assert_eq!(fs::metadata(world.path("/run/kmutex")).unwrap().mode() & 0o777, 0o711);
}

#[test]
#[ignore = "needs root, to act as several users"]
fn a_link_in_the_place_of_the_lock_file_or_the_journal_is_not_followed() {
    for suffix in [".lock", ".journal"] {
        for kind in ["ln -s", "ln"] {
            let world = World::with(
                "mkdir -m 1777 /run/open; echo precious > /run/open/secret; chmod 600 /run/open/secret",
            );
            world.expect(0, &format!("{kind} /run/open/secret /run/open/sock{suffix}"), 0);
            let script = "timeout 20 kmutex serve --no-log --idle-exit 0 --sock /run/open/sock";
            world.run(0, script);
            assert_eq!(
                fs::read_to_string(world.path("/run/open/secret")).unwrap(),
                "precious\n",
                "{kind} {suffix}"
            );
            assert_eq!(fs::metadata(world.path("/run/open/secret")).unwrap().mode() & 0o777, 0o600);
        }
    }
}

/// Another user swaps the socket for a link, again and again, in a folder of its own.
#[test]
#[ignore = "needs root, to act as several users"]
fn no_race_for_the_socket_gives_another_file_the_sockets_mode_or_group() {
    let other = OtherUser::new();
    let secret = other.folder().join("secret");
    fs::write(&secret, "precious").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let script = "while :; do ln -sfn secret sock 2>/dev/null; rm -f sock; done";
    let mut racer = other.command(PathBuf::from("sh"));
    let _racer = Process::spawn(racer.args(["-c", &format!("cd {} && {script}", other.folder().display())]));
    for _ in 0..40 {
        let mut serve = std::process::Command::new(KMUTEX);
        serve.args(["serve", "--no-log", "--idle-exit", "0", "--mode", "666", "--group", "65533", "--sock"]);
        finish(serve.arg(other.folder().join("sock")));
        let meta = fs::metadata(&secret).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.gid()), (0o600, 0));
    }
}

#[test]
#[ignore = "needs root, to act as several users"]
fn root_serves_where_another_user_has_left_files() {
    let world = World::new();
    world.expect(EVE, "touch /tmp/keyedmutexd.sock.lock /tmp/keyedmutexd.sock.journal; mkfifo /tmp/keyedmutexd.sock.journal.new", 0);
    let _daemon = world
        .start(0, "keyedmutexd --no-log & until test -S /tmp/keyedmutexd.sock; do :; done; echo ready; wait");
    world.expect(0, "KMUTEX_SOCK=/tmp/keyedmutexd.sock kmutex run k -- true", 0);
}
