//! What other users send is shown without harm, and what belongs to one user is not shown to another.

use std::process::{Command, Stdio};

use crate::harness::{Daemon, KMUTEX, Process, finish, tool, wait_until};
use crate::other_user::OtherUser;

/// A key that moves the cursor, turns the text around and hides a part of itself.
const HARMFUL: &str = "key\u{202e}\u{9b}31m\u{200b}end";

#[test]
fn no_output_has_a_character_that_a_terminal_obeys() {
    let daemon = Daemon::start();
    let note = format!("note {HARMFUL}");
    let holder = daemon.hold_with(&["--note", &note], HARMFUL);
    let is_harmless = |text: &str| !text.chars().any(|c| "\u{202e}\u{9b}\u{200b}\u{1b}".contains(c));
    let table = finish(&mut daemon.kmutex(&["status"])).assert_silent(0);
    assert!(is_harmless(&table) && table.contains("key??31m?end"), "{table:?}");
    let json = finish(&mut daemon.kmutex(&["status", "--json"])).assert_silent(0);
    assert!(is_harmless(&json), "{json:?}");
    let status: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(status["key"], HARMFUL, "a program reads the key as it is");
    assert_eq!(finish(&mut daemon.kmutex(&["status", "--keys"])).assert_silent(0), "");
    let mut waiter =
        Process::spawn(daemon.run(&["--verbose", "--wait", "60", HARMFUL, "true"]).stderr(Stdio::piped()));
    daemon.wait_for_counts(HARMFUL, 1, 1);
    holder.finish(0);
    assert_eq!(waiter.wait(), 79);
    let said = waiter.stderr();
    assert!(is_harmless(&said) && said.contains("\"note key??31m?end\""), "{said:?}");
    assert!(is_harmless(&daemon.log()), "{:?}", daemon.log());
}

#[test]
#[ignore = "needs root, to act as two users"]
fn a_user_sees_the_commands_of_that_user_alone() {
    let other = OtherUser::new();
    for (options, shows) in [(&[][..], false), (&["--show-commands"][..], true)] {
        let daemon = Daemon::with(&[&["--mode", "666"], options].concat());
        crate::harness::open_to_all(daemon.folder());
        let _holder = daemon.hold_with(&["--note", "call me"], "k");
        let ask = |args: &[&str]| {
            let mut command = other.command(other.kmutex());
            command.args(args).arg("--sock").arg(daemon.sock());
            let output = command.output().unwrap();
            (
                output.status.code(),
                String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr),
            )
        };
        let (_, status) = ask(&["status", "--json"]);
        let party: serde_json::Value = serde_json::from_str(&status).unwrap();
        let party = &party["holders"][0];
        assert_eq!(party["command"].is_string(), shows, "{status}");
        assert_eq!(party["note"].is_string(), shows, "{status}");
        assert_eq!(party["uid"], 0, "who holds the lock is no secret: {status}");
        let mine = finish(&mut daemon.kmutex(&["status", "--json"])).assert_silent(0);
        assert!(mine.contains("\"note\":\"call me\"") && mine.contains("\"command\""), "{mine}");
    }
}

#[test]
#[ignore = "needs root, to act as two users"]
fn a_waiter_of_another_user_sees_the_note_and_not_the_command() {
    let other = OtherUser::new();
    let daemon = Daemon::with(&["--mode", "666"]);
    crate::harness::open_to_all(daemon.folder());
    let holder = daemon.hold_with(&["--note", "call me"], "k");
    let mut command = other.command(other.kmutex());
    command.args(["run", "--verbose", "k", "--sock"]).arg(daemon.sock()).args(["--", "true"]);
    let mut waiter = Process::spawn(command.stderr(Stdio::piped()));
    daemon.wait_for_counts("k", 1, 1);
    holder.finish(0);
    assert_eq!(waiter.wait(), 79);
    let said = waiter.stderr();
    assert!(said.contains("a command, \"call me\" (pid "), "{said}");
}

/// What TAB offers in bash for a command line whose last word is `current`.
fn offers(daemon: &Daemon, current: &str) -> Vec<String> {
    offers_with(daemon, &[current], current)
}

/// The same for a word that bash has divided into these, of which it replaces `replaced`.
fn offers_with(daemon: &Daemon, words: &[&str], replaced: &str) -> Vec<String> {
    let script = r#"
        source "$COMPLETIONS/kmutex.bash"
        COMP_WORDS=(kmutex status "$@") COMP_CWORD=$(($# + 1))
        [[ $# -gt 1 ]] && { COMP_LINE=$(printf %s "kmutex status " "$@"); COMP_POINT=${#COMP_LINE}; }
        _kmutex_with_keys kmutex "$REPLACED" status
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let path = format!("{}:{}", std::path::Path::new(KMUTEX).parent().unwrap().display(), env!("PATH"));
    let mut bash: Command = tool("bash");
    bash.args(["-c", script, "bash"])
        .args(words)
        .env("REPLACED", replaced)
        .env("PATH", path)
        .env("KMUTEX_SOCK", daemon.sock());
    bash.env("COMPLETIONS", concat!(env!("CARGO_MANIFEST_DIR"), "/completions")).current_dir(daemon.folder());
    let output = finish(&mut bash).assert_silent(0);
    output.lines().map(String::from).filter(|line| !line.starts_with('-')).collect()
}

#[test]
fn completion_runs_nothing_that_a_key_says() {
    let daemon = Daemon::start();
    let keys = ["a$(touch x)b", "a`touch x`b", "a b;touch x", "a*", "a\\", "plain"];
    let _holders: Vec<_> = keys.iter().map(|key| daemon.hold(key)).collect();
    wait_until("all keys", || daemon.status().len() == keys.len());
    let offered = offers(&daemon, "a");
    assert_eq!(offered.len(), keys.len() - 1, "{offered:?}");
    assert_eq!(offers(&daemon, "pl"), ["plain"]);
    assert!(!daemon.folder().join("x").exists(), "a key was executed");
    // What is offered is one word for the shell, and that word is the key.
    for word in &offered {
        let mut bash: Command = tool("bash");
        bash.args(["-c", &format!("printf %s {word}")]).current_dir(daemon.folder());
        let key = finish(&mut bash).assert_silent(0);
        assert!(keys.contains(&key.as_str()), "{word:?} is read as {key:?}");
    }
    assert!(!daemon.folder().join("x").exists(), "a key was executed");
    assert_eq!(offers(&daemon, r"a\$").len(), 1, "a word that is quoted already is completed too");
}

#[test]
fn completion_knows_keys_with_the_characters_at_which_bash_divides_words() {
    let daemon = Daemon::start();
    let me = nix::unistd::Uid::current();
    let mine = format!("@{me}/backup");
    let _holders = [mine.as_str(), "a:b=c", "other"].map(|key| daemon.hold(key));
    wait_until("all keys", || daemon.status().len() == 3);
    // Bash keeps an @ at the beginning with what follows.
    let (after, whole) = (format!("{me}/ba"), format!("@{me}/ba"));
    assert_eq!(offers_with(&daemon, &["@", &after], &whole), [mine.as_str()]);
    assert_eq!(offers_with(&daemon, &[&whole], &whole), [mine.as_str()]);
    assert_eq!(offers_with(&daemon, &["a", ":", "b"], "b"), ["b=c"]);
    assert_eq!(offers_with(&daemon, &["a", ":", "b", "="], ""), ["c"]);
    assert_eq!(offers(&daemon, "o"), ["other"]);
}
