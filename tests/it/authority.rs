//! What a command can do with what it inherits: keep the lock, and nothing else.

use crate::harness::{Daemon, finish, tool};
use crate::world::{BOB, EVE, World};

/// Sends these requests to every socket that it has inherited, and waits until each was answered or ignored.
const ATTACK: &str = r#"
    my @requests = map { "{\"type\":$_}\n" } '"break","key":"bobs"', '"break","key":"mine"', '"release"',
        '"status"', '"child","pid":1', '"unlock","key":"bobs","pid":1', '"lock","key":"another","nonce":"1"';
    for my $fd (3 .. 30) {
        next unless -S "/proc/self/fd/$fd" and open my $socket, "+<&=", $fd;
        syswrite $socket, join "", @requests;
        print "sent\n";
    }
"#;

fn perl() -> String {
    tool("perl");
    format!("perl -e '{}'", ATTACK.replace('\'', "'\\''"))
}

#[test]
#[ignore = "needs root, to act as several users"]
fn a_command_that_runs_as_another_user_has_nothing_of_roots_authority() {
    let world = World::new();
    let _daemon = world.serve(0, "--mode 666");
    let _bob = world.hold(BOB, "bobs");
    let eve = format!("setpriv --reuid={EVE} --regid={EVE} --clear-groups");
    for option in ["", "-F"] {
        let attack = perl();
        let script = format!(
            "kmutex run {option} mine -- {eve} sh -c '{}; echo ready; cat'",
            attack.replace('\'', "'\\''")
        );
        let mut process = crate::harness::Process::spawn(
            world.sh(0, &script).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()),
        );
        let before = process.wait_for_line("ready");
        assert_eq!(before, ["sent"], "it has inherited one socket: {option}");
        // The daemon reads this after the attack.
        world.expect(BOB, "kmutex status --keys > /dev/null", 0);
        world.expect(EVE, "kmutex run -n bobs -- true", 75);
        world.expect(BOB, "kmutex run -n mine -- true", 75);
        drop(process.child.stdin.take());
        assert_eq!(process.wait(), 0, "{option}");
        world.expect(BOB, "kmutex run -n mine -- true", 0);
    }
}

#[test]
fn a_request_on_an_inherited_connection_needs_the_nonce() {
    let daemon = Daemon::start();
    for flag in ["inherits", "exec"] {
        let mut wire = daemon.wire();
        wire.open(&format!(r#"{{"type":"lock","key":"k","nonce":"7a","{flag}":true}}"#)).answer_of("granted");
        for proof in ["", r#","proof":"7b""#, r#","proof":7"#] {
            wire.request(&format!(r#"{{"type":"release"{proof}}}"#));
            assert_eq!(wire.answer_of("error")["code"], "not_permitted", "{flag} {proof}");
        }
        finish(&mut daemon.run(&["-n", "k", "true"])).assert_silent(75);
        wire.request(r#"{"type":"release","proof":"7a"}"#).answer_of("released");
    }
}

#[test]
fn after_the_lock_was_lost_the_connection_is_good_for_nothing_either() {
    let daemon = Daemon::start();
    let mut wire = daemon.wire();
    wire.open(r#"{"type":"lock","key":"k","nonce":"7a","inherits":true}"#).answer_of("granted");
    let _other = daemon.hold("other");
    finish(&mut daemon.kmutex(&["break", "--yes", "k"])).assert_silent(0);
    wire.answer_of("lost");
    wire.request(r#"{"type":"break","key":"other"}"#);
    assert_eq!(wire.answer_of("error")["code"], "not_permitted");
}
