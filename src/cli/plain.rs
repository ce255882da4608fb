//! A plain `kmutex run`, read without clap.
//!
//! Making the definitions of all options takes clap longer than kmutex needs to lock and release: 270,000 instructions, and 32 pages
//! of memory. So the options that scripts use most are read here. Everything else is left to clap, and so is whatever is wrong,
//! because clap explains it. A test compares what both make of the same words.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use lexopt::Arg::{Long, Short, Value};
use lexopt::Parser;

use super::value::{duration, positive_duration};
use super::{Daemon, LockArgs, Run};
use crate::acquire::OnPeerFailure;
use crate::run::{OnLost, Share};

/// Reads the words after `run`. `None`: they are not plain, or not right.
pub(super) fn run(words: &[OsString]) -> Option<Run> {
    let mut words = Parser::from_args(words);
    let (mut key, mut command, mut shell_command) = (None, Vec::new(), None);
    let (mut queue, mut shared, mut nonblock, mut wait) = (false, false, false, None);
    let (mut share, mut fresh, mut max_hold) = (None, None, None);
    let (mut close, mut no_fork, mut verbose, mut no_autostart) = (false, false, false, false);
    let (mut conflict_exit_code, mut finished_exit_code, mut on_peer_failure) = (None, None, None);
    let (mut note, mut sock) = (None, None);
    while let Some(word) = words.next().ok()? {
        match word {
            Value(word) if key.is_none() => {
                key = Some(word);
                if !words.try_raw_args()?.peek().is_none_or(may_follow_key) {
                    return None;
                }
            }
            Value(word) => {
                command.push(word);
                command.extend(words.raw_args().ok()?);
                break;
            }
            Short('c') | Long("command") => {
                set(&mut shell_command, value(&mut words)?)?;
                if key.is_some() && words.try_raw_args()?.peek().is_some() {
                    return None;
                }
            }
            Long("queue") => flag(&mut queue)?,
            Short('s') | Long("shared") => flag(&mut shared)?,
            Short('n') | Long("nonblock") => flag(&mut nonblock)?,
            Short('w') | Long("wait" | "timeout") => set(&mut wait, time(&mut words, duration)?)?,
            Long("share") => set(&mut share, when(&mut words)?)?,
            Long("fresh") => set(&mut fresh, time(&mut words, positive_duration)?)?,
            Long("max-hold") => set(&mut max_hold, time(&mut words, positive_duration)?)?,
            Short('o') | Long("close") => flag(&mut close)?,
            Short('F') | Long("no-fork") => flag(&mut no_fork)?,
            Long("verbose") => flag(&mut verbose)?,
            Long("no-autostart") => flag(&mut no_autostart)?,
            Short('E') | Long("conflict-exit-code") => set(&mut conflict_exit_code, number(&mut words)?)?,
            Long("finished-exit-code") => set(&mut finished_exit_code, number(&mut words)?)?,
            Long("on-peer-failure") => {
                let what = OnPeerFailure::from_str(value(&mut words)?.to_str()?, false).ok()?;
                set(&mut on_peer_failure, what)?;
            }
            Long("note") => set(&mut note, value(&mut words)?)?,
            Long("sock") => set(&mut sock, value(&mut words)?)?,
            _ => return None,
        }
    }
    let is_contradictory = (shell_command.is_some() && !command.is_empty())
        || (no_fork && (close || max_hold.is_some() || share.is_some()))
        || (share.is_some() && (queue || shared))
        || (fresh.is_some() && shared);
    if is_contradictory {
        return None;
    }
    let daemon = Daemon {
        sock,
        trust_uid: Vec::new(),
        auth_file: None,
        #[cfg(feature = "tls")]
        tls_ca: None,
        #[cfg(feature = "tls")]
        tls_cert: None,
        #[cfg(feature = "tls")]
        tls_key: None,
    };
    let lock = LockArgs {
        queue,
        shared,
        exclusive: false,
        slots: 1,
        fresh,
        fresh_failure: None,
        coalesce: false,
        newest: false,
        replace: false,
        replace_after: None,
        no_replace: false,
        weight: None,
        nonblock,
        wait,
        conflict_exit_code: conflict_exit_code.unwrap_or(75),
        finished_exit_code: finished_exit_code.unwrap_or(79),
        on_peer_failure: on_peer_failure.unwrap_or(OnPeerFailure::Skip),
        note: note.unwrap_or_default(),
        no_autostart,
        verbose,
        daemon,
    };
    Some(Run {
        key: Some(key?),
        command,
        shell_command,
        keys: Vec::new(),
        lock,
        tree: false,
        share,
        share_max: 64 << 20,
        stale: None,
        refresh: false,
        reentrant: false,
        status_fd: None,
        status_file: None,
        close,
        no_fork,
        on_lost: OnLost::Kill,
        kill_after: Duration::from_secs(5),
        max_hold,
        warn_after: None,
    })
}

/// clap takes some options that come after KEY for the command.
fn may_follow_key(word: &OsStr) -> bool {
    let word = word.as_bytes();
    !word.starts_with(b"-") || matches!(word, b"-" | b"--" | b"-c" | b"--command")
}

/// An option may be given once.
fn flag(given: &mut bool) -> Option<()> {
    (!std::mem::replace(given, true)).then_some(())
}

/// An option may be given once.
fn set<T>(option: &mut Option<T>, value: T) -> Option<()> {
    option.replace(value).is_none().then_some(())
}

/// The value of the option that was just read. One that looks like an option is probably a forgotten value.
fn value(words: &mut Parser) -> Option<OsString> {
    words.value().ok().filter(|value| !value.as_bytes().starts_with(b"-"))
}

fn number<T: FromStr>(words: &mut Parser) -> Option<T> {
    value(words)?.to_str()?.parse().ok()
}

fn time(words: &mut Parser, parse: fn(&str) -> Result<Duration, String>) -> Option<Duration> {
    parse(value(words)?.to_str()?).ok()
}

/// The value of `--share`, which needs none.
fn when(words: &mut Parser) -> Option<Share> {
    match words.optional_value() {
        None => Some(Share::Whole),
        Some(when) => Share::from_str(when.to_str()?, false).ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use clap::Parser as _;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::cli::{Cli, Command};

    fn by_clap(words: &[OsString]) -> Option<Run> {
        let line = ["kmutex", "run"].into_iter().map(OsString::from).chain(words.iter().cloned());
        match Cli::try_parse_from(line).ok()?.command {
            Command::Run(run) => Some(run),
            _ => None,
        }
    }

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn what_scripts_use_most_is_plain() {
        for line in [
            "K true",
            "K -- true --flag",
            "-n K -- true",
            "-nFE 3 K true",
            "--queue --wait 5m K -- sh -c true",
            "-w0.5 -o K true",
            "--sock=/run/s --fresh 12h --finished-exit-code 0 K -- true",
            "--share=live --on-peer-failure retry --note why K true -- -x",
            "--share --fresh 1h K true",
            "K -c true",
            "-s --verbose --no-autostart --max-hold 1d K true",
            "- true",
            "-- K true",
        ] {
            let plain = run(&words(line)).unwrap_or_else(|| panic!("not plain: {line}"));
            assert_eq!(Some(plain), by_clap(&words(line)), "{line}");
        }
    }

    #[test]
    fn what_is_wrong_is_left_to_clap() {
        for line in [
            "-n -n K true",
            "--wait 1 --timeout 2 K true",
            "--wait -1 K true",
            "--wait soon K true",
            "--fresh 0 K true",
            "-E 256 K true",
            "--sock -n K true",
            "--share=late K true",
            "--share --queue K true",
            "-F --share K true",
            "-F -o K true",
            "-F --max-hold 1 K true",
            "-s --fresh 1 K true",
            "-c true K true",
            "--nonblock=yes K true",
            "--no-such K true",
            "-n",
        ] {
            assert_eq!(run(&words(line)), None, "{line}");
            assert_eq!(by_clap(&words(line)), None, "{line}");
        }
    }

    /// Words of all kinds: options that are plain and others, with good and bad values, keys, and commands.
    fn any_word() -> impl Strategy<Value = OsString> {
        const OPTIONS: &str = "-c|--command|--command=x|--queue|-s|--shared|-n|--nonblock|--nb|-w|-w5|--wait|--wait=5|\
            --timeout=1m|--share|--share=live|--share=whole|--fresh|--fresh=1h|--max-hold|--max-hold=1|-o|\
            --close|-F|--no-fork|--verbose|--no-autostart|-E|-E=7|-E7|--conflict-exit-code|\
            --finished-exit-code=0|--on-peer-failure=adopt|--on-peer-failure|--note|--note=|--note=-x|\
            --sock|--sock=/s|-x|-k|--tree|--coalesce|-nF|-no|-nw|-h|--help";
        const VALUES: &str = "|-|--|K|true|1|-1|0|1h|256|+5|skip|live|5.5s|a b|-z";
        let one_of = |words: &'static str| select(words.split('|').collect::<Vec<_>>());
        prop_oneof![
            one_of(OPTIONS).prop_map(OsString::from),
            one_of(VALUES).prop_map(OsString::from),
            one_of(VALUES).prop_map(OsString::from),
            proptest::collection::vec(1..=255_u8, 0..4).prop_map(OsString::from_vec),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3_000))]

        #[test]
        fn what_is_plain_is_what_clap_reads(words in proptest::collection::vec(any_word(), 0..7)) {
            if let Some(plain) = run(&words) {
                prop_assert_eq!(Some(plain), by_clap(&words));
            }
        }
    }
}
