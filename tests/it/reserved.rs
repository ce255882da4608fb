//! Keys that belong to users: only these and root can lock them, break their locks or forget their runs, by whatever way.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use md5::{Digest, Md5};

use crate::harness::{Daemon, Finished, Process, TIMEOUT, finish};
use crate::world::{BOB, EVE, World};

/// A machine that knows the users Bob and Eve by name, and a group `ops` that Bob is in.
fn world() -> World {
    World::with(&format!(
        "grep -v -e ^bob: -e ^eve: /etc/passwd > /run/passwd; cp /etc/group /run; echo bob:x:{BOB}:{BOB}::/:/bin/sh >> /run/passwd
         echo eve:x:{EVE}:{EVE}::/:/bin/sh >> /run/passwd; echo ops:x:4242:bob >> /run/group
         mount --bind /run/passwd /etc/passwd; mount --bind /run/group /etc/group"
    ))
}

#[track_caller]
fn assert_refused(done: Finished, words: &[&str]) {
    done.assert_error(77, words);
}

#[test]
#[ignore = "needs root, to act as several users"]
fn a_key_with_a_users_name_is_that_users_and_roots_alone() {
    let world = world();
    let _daemon = world.serve(0, "--mode 666");
    for (owner, key) in [(BOB, "@bob/backup"), (0, "@root/backup"), (BOB, &format!("@{BOB}/x"))] {
        for uid in [owner, 0] {
            world.expect(uid, &format!("kmutex run {key} -- true"), 0);
        }
        for command in
            ["run {} -- true", "run -n {} -- true", "run -k free -k {} -- true", "lock {}", "forget {}"]
        {
            let script = format!("kmutex {}", command.replace("{}", key));
            assert_refused(world.run(EVE, &script), &[key, "belongs to"]);
        }
        let _holder = world.hold(owner, key);
        assert_refused(
            world.run(EVE, &format!("kmutex break --yes {key}")),
            &["not permitted to break", "belongs to"],
        );
        world.expect(owner, &format!("kmutex break --yes {key}"), 0);
    }
    // Of a user that does not exist, not even root's.
    assert_refused(world.run(0, "kmutex run @carol/x -- true"), &["\"carol\", who does not exist"]);
    assert_refused(world.run(BOB, "kmutex run @carol/x -- true"), &["\"carol\""]);
    assert_refused(world.run(BOB, "kmutex run @/x -- true"), &["\"\""]);
    // Other keys are as before.
    world.expect(EVE, "kmutex run @bob -- kmutex run bob/x -- kmutex run a@bob/x -- true", 0);
}

#[test]
#[ignore = "needs root, to act as several users"]
fn a_prefix_can_be_reserved_for_users_and_groups() {
    let world = world();
    let _daemon = world
        .serve(0, "--mode 666 --reserve db/=bob --reserve db/=:ops --reserve db/eve/=eve --reserve a=b=:ops");
    let may = |uid, key: &str| world.run(uid, &format!("kmutex run {key} -- true"));
    for key in ["db/x", "a=b", "a=bc"] {
        assert_eq!([may(0, key).code, may(EVE, key).code], [0, 77], "{key}");
    }
    assert_eq!([may(BOB, "db/x").code, may(BOB, "db/eve/x").code, may(EVE, "db/eve/x").code], [0, 77, 0]);
    assert_refused(may(EVE, "db/x"), &["belongs to the user \"bob\" and the group \"ops\""]);
    assert_eq!([may(EVE, "db").code, may(EVE, "a=c").code], [0, 0]);
    // A process with the group, as a supplementary one and as its own; sh(1) ends before its child takes the lock.
    let with_group = |option: &str| {
        let groups = format!("setpriv --reuid={EVE} --regid={EVE} {option} kmutex run a=b -- true");
        finish(&mut world.sh(0, &groups)).code
    };
    assert_eq!(with_group("--groups=4242"), 0);
    assert_eq!(with_group("--clear-groups"), 77);
    assert_eq!(with_group("--groups=4243"), 77);
    let own = format!("setpriv --reuid={EVE} --regid=4242 --clear-groups kmutex run a=b -- true");
    world.expect(0, &own, 0);
}

/// A directory service that takes its time.
#[test]
#[ignore = "needs root, to act as several users"]
fn looking_up_a_user_stops_no_other_client() {
    let world = World::with(
        "mkfifo /run/answer; printf '#!/bin/sh\\ncat /run/answer\\n' > /run/bin/getent; chmod 755 /run/bin/getent",
    );
    let _daemon = world.serve(0, "--mode 666");
    for (user, entry, code) in [(0, "far:x:12345:12345::/:/bin/sh", 0), (EVE, "eve:x:1:1::/:/bin/sh", 77)] {
        let mut asking = Process::spawn(world.sh(user, "kmutex run @far/x -- true").stderr(Stdio::null()));
        // Opening it waits for getent.
        let mut answer = std::fs::OpenOptions::new().write(true).open(world.path("/run/answer")).unwrap();
        for uid in [0, BOB, EVE] {
            world.expect(uid, "kmutex run -n k -- true", 0);
        }
        assert!(asking.is_running());
        writeln!(answer, "{entry}").unwrap();
        drop(answer);
        assert_eq!(asking.wait(), code, "{entry}");
    }
    // One that never answers.
    world.run(0, "kmutex run @other/x -- true").assert_error(77, &["\"other\""]);
}

#[test]
#[ignore = "needs root, to act as several users"]
fn a_reservation_that_makes_no_sense_is_refused_at_the_start() {
    let world = world();
    for (value, why) in [
        ("a/=carol", "there is no such name"),
        ("a/=:carols", "there is no such name"),
        ("=bob", "PREFIX is empty"),
        ("a/", "not PREFIX=USER"),
        ("a/=", "USER or :GROUP is missing"),
        ("a/=:", "USER or :GROUP is missing"),
    ] {
        let done = world.run(0, &format!("kmutex serve --idle-exit 0 --sock /tmp/s --reserve {value}"));
        assert_eq!(done.code, 64, "{done:?}");
        assert!(done.stderr.contains(why) && done.stderr.contains("--reserve"), "{done:?}");
    }
}

/// What the daemon answers to an identity of protocol 1, before it closes the connection or lets the client wait.
fn protocol_1(daemon: &Daemon, identity: &[u8; 16]) -> Vec<u8> {
    let mut stream = UnixStream::connect(daemon.sock()).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.write_all(identity).unwrap();
    let mut answer = vec![0; 1];
    let bytes = stream.read(&mut answer).unwrap();
    answer.truncate(bytes);
    answer
}

fn md5(text: &str) -> [u8; 16] {
    Md5::digest(text.as_bytes()).into()
}

/// The identity of a key, as the status names it.
fn identity(daemon: &Daemon, key: &str) -> [u8; 16] {
    let _holder = daemon.hold(key);
    let status = daemon.status();
    let id = status[0]["id"].as_str().unwrap();
    u128::from_str_radix(id, 16).unwrap().to_be_bytes()
}

#[test]
fn protocol_1_cannot_hold_a_reserved_key() {
    let me = nix::unistd::Uid::current();
    let daemon = Daemon::with(&["--reserve", &format!("db/={me}")]);
    for key in [format!("@{me}/x"), "db/x".into()] {
        let mut holder = UnixStream::connect(daemon.sock()).unwrap();
        holder.set_read_timeout(Some(TIMEOUT)).unwrap();
        holder.write_all(&md5(&key)).unwrap();
        holder.read_exact(&mut [0]).unwrap();
        // It holds something, and it is not this.
        finish(&mut daemon.run(&["-n", &key, "true"])).assert_silent(0);
        drop(holder);
        assert_eq!(protocol_1(&daemon, &identity(&daemon, &key)), b"", "{key}");
        assert_ne!(identity(&daemon, &key), md5(&key));
    }
    // Other keys are the same in both.
    assert_eq!(identity(&daemon, "other"), md5("other"));
    let _holder = daemon.hold("other");
    let mut waiter = UnixStream::connect(daemon.sock()).unwrap();
    waiter.write_all(&md5("other")).unwrap();
    daemon.wait_for_counts("other", 1, 1);
}

/// A lock that is held while its prefix becomes reserved, or ceases to be, is held.
#[test]
fn a_restart_with_other_reservations_gives_no_lock_twice() {
    let me = nix::unistd::Uid::current();
    let reserve = ["--reserve".to_string(), format!("db/={me}")];
    let reserve: Vec<&str> = reserve.iter().map(String::as_str).collect();
    let mut daemon = Daemon::start();
    for options in [&reserve[..], &[], &reserve[..]] {
        let holder = daemon.hold("db/x");
        daemon.restart(options);
        finish(&mut daemon.run(&["-n", "db/x", "true"])).assert_silent(75);
        daemon.wait_for_log("grant: \"db/x\"");
        finish(&mut daemon.run(&["-n", "db/x", "true"])).assert_silent(75);
        let mut waiter = Process::spawn(daemon.run(&["--queue", "db/x", "true"]).stdout(Stdio::null()));
        daemon.wait_for_counts("db/x", 1, 1);
        assert_eq!(holder.finish(0), 0);
        assert_eq!(waiter.wait(), 0);
    }
}

#[test]
fn a_holder_resumes_a_key_that_has_become_another_users() {
    let mut daemon = Daemon::start();
    let mut holder = daemon.hold("db/x");
    daemon.restart(&["--reserve", "db/=1"]);
    if nix::unistd::Uid::current().is_root() {
        finish(&mut daemon.run(&["-n", "db/x", "true"])).assert_silent(75);
    } else {
        finish(&mut daemon.run(&["-n", "db/x", "true"])).assert_error(77, &["db/x"]);
    }
    daemon.wait_for_log("grant: \"db/x\"");
    assert!(holder.process.is_running());
    assert_eq!(holder.finish(0), 0);
}
