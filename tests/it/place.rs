//! Where the daemon is when the user does not say, with several users on one machine.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::world::{BOB, EVE, World};

const ROOT: u32 = 0;

/// The script prints where the daemon is.
const WHERE: &str = r#"kmutex run where -- sh -c 'echo "$KMUTEX_SOCK"'"#;

fn own(uid: u32) -> String {
    format!("/tmp/kmutex-{uid}/kmutex.sock")
}

/// Two lock the same key at a time if and only if they have different daemons.
#[track_caller]
fn assert_apart(world: &World, one: u32, other: u32) {
    let _holder = world.hold(one, "k");
    world.expect(other, "kmutex run -n k -- true", 0);
}

#[track_caller]
fn assert_together(world: &World, one: u32, other: u32) {
    let _holder = world.hold(one, "k");
    world.expect(other, "kmutex run -n k -- true", 75);
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn each_user_has_a_daemon_of_its_own_whichever_comes_first() {
    for users in [[ROOT, BOB, EVE], [EVE, BOB, ROOT], [BOB, ROOT, EVE]] {
        let world = World::new();
        for uid in users {
            let sock = if uid == ROOT { "/run/kmutex/kmutex.sock".to_string() } else { own(uid) };
            assert_eq!(world.expect(uid, WHERE, 0), format!("{sock}\n"));
            assert_eq!(world.expect(uid, WHERE, 0), format!("{sock}\n"), "and again");
        }
        assert_apart(&world, users[0], users[1]);
        assert_apart(&world, users[1], users[2]);
        assert_together(&world, users[1], users[1]);
        let meta = fs::metadata(world.path(format!("/tmp/kmutex-{BOB}"))).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o700, BOB));
    }
}

/// By hand and from cron: the place does not depend on the environment.
#[test]
#[ignore = "needs root, to make namespaces"]
fn a_login_shell_and_cron_come_to_the_same_daemon() {
    let world = World::new();
    for uid in [ROOT, BOB] {
        let login = "export HOME=/home/bob USER=bob XDG_RUNTIME_DIR=/run/user/7 TMPDIR=/var/tmp; cd /usr;";
        assert_eq!(world.expect(uid, &format!("{login} {WHERE}"), 0), world.expect(uid, WHERE, 0));
        assert_eq!(
            world.expect(uid, &format!("umask 0; {WHERE}"), 0),
            world.expect(uid, &format!("umask 077; {WHERE}"), 0)
        );
    }
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn what_another_user_leaves_in_tmp_neither_stops_nor_fools_a_user() {
    let squats = [
        "mkdir $D; chmod 777 $D",
        "mkdir $D; mkdir $D.1; mkdir $D.2",
        "touch $D",
        "ln -s /tmp/elsewhere $D; mkdir -p -m 777 /tmp/elsewhere",
        "ln -s /nowhere $D",
        "mkfifo $D; mkfifo /tmp/keyedmutexd.sock",
        // A daemon on each of the paths.
        "mkdir $D; chmod 711 $D; kmutex serve --no-log --mode 666 --sock $D/kmutex.sock --ready-fd 3 3>/tmp/up &",
        "kmutex serve --no-log --mode 666 --sock /tmp/keyedmutexd.sock --ready-fd 3 3>/tmp/up &",
        "touch /tmp/keyedmutexd.sock /tmp/keyedmutexd.sock.lock /tmp/keyedmutexd.sock.journal",
        "ln -s /run/secret /tmp/keyedmutexd.sock; ln -s /run/secret /tmp/keyedmutexd.sock.lock",
    ];
    for squat in squats {
        let world = World::with("echo precious > /run/secret; mkdir -m 755 /run/kmutex-roots");
        for uid in [BOB, ROOT] {
            let script = format!("D=/tmp/kmutex-{uid}; {squat}");
            let script =
                if uid == ROOT { script.replace("/tmp/keyedmutexd.sock", "/tmp/other") } else { script };
            let waits = if squat.contains("/tmp/up") {
                " sleep 0; until test -s /tmp/up; do :; done; rm /tmp/up; echo ready; wait"
            } else {
                " echo ready; cat"
            };
            let _eve = world.start(EVE, &format!("{script}\n{waits}"));
            let sock = world.expect(uid, WHERE, 0);
            assert!(uid == ROOT || sock.starts_with(&format!("/tmp/kmutex-{BOB}")), "{squat}: {sock}");
            assert_eq!(world.expect(uid, WHERE, 0), sock, "{squat}");
            assert_together(&world, uid, uid);
            let meta = fs::metadata(world.path(sock.trim())).unwrap();
            assert_eq!(meta.uid(), uid, "{squat}");
        }
        assert_eq!(fs::read_to_string(world.path("/run/secret")).unwrap(), "precious\n");
    }
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn a_directory_that_is_in_use_stays_in_use_when_the_first_name_becomes_free() {
    let world = World::new();
    world.expect(EVE, &format!("mkdir /tmp/kmutex-{BOB}"), 0);
    let _holder = world.hold(BOB, "k");
    world.expect(EVE, &format!("rmdir /tmp/kmutex-{BOB}"), 0);
    world.expect(BOB, "kmutex run -n k -- true", 75);
    assert_eq!(world.expect(BOB, WHERE, 0), format!("/tmp/kmutex-{BOB}.1/kmutex.sock\n"));
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn many_first_ones_at_once_start_one_daemon() {
    let world = World::new();
    let script = r#"
        for i in 1 2 3 4 5 6 7 8 9 10 11 12; do kmutex run --queue k -- sh -c 'echo "$KMUTEX_SOCK"' & done; wait
        ls -d /tmp/kmutex-* | wc -l
    "#;
    let said = world.expect(BOB, script, 0);
    let mut lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.pop(), Some("1"), "one directory");
    assert_eq!(lines, [own(BOB).as_str(); 12]);
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn roots_daemon_is_in_tmp_where_run_cannot_be_written() {
    let world = World::with("mount -o remount,ro /run");
    assert_eq!(world.expect(ROOT, WHERE, 0), format!("{}\n", own(0)));
    assert_together(&world, ROOT, ROOT);
    let world = World::with("touch /run/kmutex");
    assert_eq!(world.expect(ROOT, WHERE, 0), format!("{}\n", own(0)));
    // Its owner could put a socket there.
    let world = World::with(&format!("mkdir /run/kmutex; chown {EVE} /run/kmutex"));
    assert_eq!(world.expect(ROOT, WHERE, 0), format!("{}\n", own(0)));
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn the_machines_daemon_is_everybodys() {
    let world = World::new();
    let _daemon = world.serve(ROOT, "--mode 666");
    for uid in [ROOT, BOB, EVE] {
        assert_eq!(world.expect(uid, WHERE, 0), "/run/kmutex/kmutex.sock\n");
    }
    assert_together(&world, ROOT, BOB);
    assert_together(&world, BOB, EVE);
    assert_together(&world, BOB, ROOT);
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn a_machines_daemon_that_a_user_may_not_use_is_passed_over() {
    let world = World::new();
    let _daemon = world.serve(ROOT, &format!("--mode 660 --group {BOB}"));
    assert_eq!(world.expect(BOB, WHERE, 0), "/run/kmutex/kmutex.sock\n");
    assert_eq!(world.expect(EVE, WHERE, 0), format!("{}\n", own(EVE)));
    assert_apart(&world, BOB, EVE);
}

/// A daemon of the user's own would grant what the machine's daemon has granted.
#[test]
#[ignore = "needs root, to make namespaces"]
fn while_the_machines_daemon_is_being_restarted_no_user_gets_a_daemon_of_its_own() {
    let world = World::new();
    let mut daemon = world.serve(ROOT, "--mode 666");
    let _holder = world.hold(BOB, "k");
    world.expect(ROOT, "kill -9 $(cat /run/kmutex/kmutex.sock.lock)", 0);
    daemon.wait();
    world.run(EVE, "kmutex run -n k -- true").assert_error(69, &["/run/kmutex/kmutex.sock"]);
    let _daemon = world.serve(ROOT, "--mode 666");
    world.expect(EVE, "kmutex run -n k -- true", 75);
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn a_daemon_that_was_started_by_hand_is_found_by_its_users_and_by_keyedmutexs_clients() {
    let world = World::new();
    let daemon = world.serve(BOB, "");
    // Its own socket, where the next daemon would be started, rather than the other one.
    assert_eq!(world.expect(BOB, WHERE, 0), format!("{}\n", own(BOB)));
    assert_together(&world, BOB, BOB);
    let holder = world.hold(BOB, "k");
    world.expect(BOB, "KMUTEX_SOCK=/tmp/keyedmutexd.sock kmutex run -n k -- true", 75);
    drop(holder);
    // It is not Eve's.
    assert_eq!(world.expect(EVE, WHERE, 0), format!("{}\n", own(EVE)));
    drop(daemon);
    // Under the old name only the old socket is served.
    let world = World::new();
    let mut daemon = world.start(
        BOB,
        "keyedmutexd --no-log & until test -S /tmp/keyedmutexd.sock; do :; done; echo ready; wait",
    );
    assert!(!world.path(own(BOB)).exists());
    assert_eq!(world.expect(BOB, WHERE, 0), "/tmp/keyedmutexd.sock\n");
    assert_together(&world, BOB, BOB);
    world.expect(BOB, "kill $(cat /tmp/keyedmutexd.sock.lock)", 0);
    daemon.wait();
    assert_eq!(world.expect(BOB, WHERE, 0), format!("{}\n", own(BOB)));
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn roots_keyedmutexd_for_all_is_found_by_all() {
    let world = World::new();
    let _daemon = world.serve(ROOT, "--mode 666 --sock /tmp/keyedmutexd.sock");
    for uid in [ROOT, BOB] {
        assert_eq!(world.expect(uid, WHERE, 0), "/tmp/keyedmutexd.sock\n");
    }
    assert_together(&world, ROOT, BOB);
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn serve_does_without_the_old_socket_if_another_user_has_it() {
    let world = World::new();
    world.expect(ROOT, "touch /tmp/keyedmutexd.sock.lock", 0);
    let _daemon = world.serve(BOB, "");
    assert_eq!(world.expect(BOB, WHERE, 0), format!("{}\n", own(BOB)));
    let log = world.run(EVE, "timeout 20 kmutex serve --idle-exit 0").stderr;
    assert!(log.contains("KeyedMutex's clients will not find this daemon"), "{log}");
}

#[test]
#[ignore = "needs root, to make namespaces"]
fn status_says_first_where_it_looked() {
    let world = World::new();
    let _holder = world.hold(BOB, "k");
    let said = world.expect(BOB, "kmutex status", 0);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], format!("daemon: {} (this user's own daemon)", own(BOB)));
    assert!(lines[1].starts_with("KEY") && lines[2].starts_with("k "), "{said}");
    // It was said, or is not for people.
    let given = world.expect(BOB, &format!("kmutex status --sock {}", own(BOB)), 0);
    assert!(given.starts_with("KEY"), "{given}");
    assert_eq!(world.expect(BOB, "kmutex status --keys", 0), "k\n");
    assert!(world.expect(BOB, "kmutex status --json", 0).starts_with('{'));
    world.run(EVE, "kmutex status").assert_error(69, &[&own(EVE)]);
    assert!(!world.path(format!("/tmp/kmutex-{EVE}")).exists(), "a look makes nothing");
}

/// A unit with PrivateTmp= has a /tmp of its own, and so a user's own daemon there is another one; the machine's is the same.
#[test]
#[ignore = "needs root, to make namespaces"]
fn with_a_private_tmp_the_machines_daemon_is_the_same_and_a_users_own_is_not() {
    let world = World::new();
    let private = "unshare --mount sh -c 'mount -t tmpfs -o mode=1777 none /tmp; exec setpriv";
    let as_bob = format!("{private} --reuid={BOB} --regid={BOB} --clear-groups kmutex run -n k -- true'");
    let as_root = format!("{private} kmutex run -n k -- true'");
    let holders = [world.hold(BOB, "k"), world.hold(ROOT, "k")];
    world.expect(ROOT, &as_bob, 0);
    world.expect(ROOT, &as_root, 75);
    drop(holders);
    world.expect(
        ROOT,
        "kill $(cat /run/kmutex/kmutex.sock.lock); while test -e /run/kmutex/kmutex.sock; do :; done",
        0,
    );
    let _daemon = world.serve(ROOT, "--mode 666");
    let _holder = world.hold(BOB, "k");
    world.expect(ROOT, &as_bob, 75);
    world.expect(ROOT, &as_root, 75);
}

/// Where no user has a number, every file seems to belong to the same one.
#[test]
#[ignore = "needs root, to make namespaces"]
fn a_process_without_a_user_id_trusts_no_daemon_by_itself() {
    let world = World::new();
    let _holder = world.hold(EVE, "k");
    world.run(BOB, "unshare --user kmutex run -n k -- true").assert_error(77, &["user namespace"]);
    // Root in a namespace of its own is no more than Bob.
    let said = world.expect(BOB, &format!("unshare --user --map-root-user {WHERE}"), 0);
    assert_eq!(said, format!("{}\n", own(0)));
}

#[test]
#[ignore = "needs root, to act as several users"]
fn where_no_daemon_can_be_started_that_is_69_with_the_reason() {
    let world = World::with("mkdir -m 700 /run/closed; mkdir -m 755 /run/roots");
    world.run(BOB, "kmutex run --sock /nowhere/sock k -- true").assert_error(69, &["/nowhere/sock"]);
    world.run(BOB, "kmutex run --sock /run/roots/sock k -- true").assert_error(69, &["/run/roots/sock"]);
    world.run(BOB, "kmutex run --sock /run/closed/sock k -- true").assert_error(69, &["/run/closed/sock"]);
    world.run(BOB, "ulimit -n 12; kmutex run k -- true").assert_error(69, &["12 open files", "ulimit -n"]);
    // A daemon is there, and may not be used.
    let _daemon = world.serve(ROOT, "--sock /run/roots/sock");
    world.run(BOB, "kmutex run --sock /run/roots/sock k -- true").assert_error(77, &["Permission denied"]);
}

#[test]
#[ignore = "needs root, to act as several users"]
fn without_proc_the_message_says_what_is_missing() {
    let world = World::new();
    let no_proc = |command: &str| {
        format!("unshare --mount sh -c 'umount -l /proc; umount -l /proc; exec kmutex {command}'")
    };
    world.run(ROOT, &no_proc("serve --no-log --sock /tmp/x")).assert_error(71, &["boot_id"]);
    world.run(ROOT, &no_proc("run --sock /tmp/x k -- true")).assert_error(69, &["boot_id"]);
    let said = world.run(ROOT, &no_proc("lock k"));
    assert!(!said.stderr.contains("--pid"), "{said:?}");
    said.assert_error(71, &["/proc"]);
}

#[test]
#[ignore = "needs root, to act as several users"]
fn serve_names_the_locks_of_daemons_that_were_started_automatically() {
    let world = World::new();
    let holders = [world.hold(BOB, "one"), world.hold(BOB, "two")];
    let own = own(BOB);
    let said = world.run(BOB, "kmutex serve --idle-exit 0");
    said.assert_error(75, &[&own, "pid", "\"one\"", "\"two\""]);
    for (uid, serve) in [
        (ROOT, "kmutex serve --idle-exit 0 2>&1"),
        (
            BOB,
            "ln -s /run/bin/kmutex /tmp/keyedmutexd; timeout 20 /tmp/keyedmutexd & until test -S /tmp/keyedmutexd.sock; do :; done; kill $(cat /tmp/keyedmutexd.sock.lock); wait",
        ),
    ] {
        let log = world.expect(uid, serve, 0);
        let line = log.lines().find(|line| line.contains("still holds")).unwrap_or_else(|| panic!("{log}"));
        assert!(line.contains(&own) && line.contains("\"one\"") && line.contains("\"two\""), "{line}");
    }
    drop(holders);
}
