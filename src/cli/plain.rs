//! A plain `kmutex run`, read without clap.
//!
//! Making the definitions of all options takes clap longer than kmutex needs to lock and release: 270,000 instructions, and 32 pages
//! of memory. So the options that scripts use most are read here. Everything else is left to clap, and so is whatever is wrong,
//! because clap explains it. A test compares what both make of the same words.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
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
    let words = &mut Parser::from_args(words);
    let mut run = defaults();
    // The options that have a default and were given.
    let given = &mut Vec::new();
    while let Some(word) = words.next().ok()? {
        let lock = &mut run.lock;
        match word {
            Value(key) if run.key.is_none() => {
                run.key = Some(key);
                words.try_raw_args()?.peek().is_none_or(may_follow_key).then_some(())?;
            }
            Value(program) => {
                run.command.push(program);
                run.command.extend(words.raw_args().ok()?);
            }
            Short('c') | Long("command") => {
                set(&mut run.shell_command, value(words)?)?;
                let is_last = words.try_raw_args()?.peek().is_none();
                (run.key.is_none() || is_last).then_some(())?;
            }
            Long("queue") => flag(&mut lock.queue)?,
            Short('s') | Long("shared") => flag(&mut lock.shared)?,
            Short('n') | Long("nonblock") => flag(&mut lock.nonblock)?,
            Short('w') | Long("wait" | "timeout") => set(&mut lock.wait, time(words, duration)?)?,
            Long("share") => set(&mut run.share, when(words)?)?,
            Long("fresh") => set(&mut lock.fresh, time(words, positive_duration)?)?,
            Long("max-hold") => set(&mut run.max_hold, time(words, positive_duration)?)?,
            Short('o') | Long("close") => flag(&mut run.close)?,
            Short('F') | Long("no-fork") => flag(&mut run.no_fork)?,
            Long("tree") => flag(&mut run.tree)?,
            Long("reentrant") => flag(&mut run.reentrant)?,
            Long("verbose") => flag(&mut lock.verbose)?,
            Long("no-autostart") => flag(&mut lock.no_autostart)?,
            Short('E') | Long("conflict-exit-code") => {
                once(given, "E", &mut lock.conflict_exit_code, number(words)?)?
            }
            Long("finished-exit-code") => {
                once(given, "finished", &mut lock.finished_exit_code, number(words)?)?
            }
            Long("on-peer-failure") => once(given, "peer", &mut lock.on_peer_failure, one_of(words)?)?,
            Long("on-lost") => once(given, "lost", &mut run.on_lost, one_of(words)?)?,
            Long("kill-after") => once(given, "kill", &mut run.kill_after, time(words, duration)?)?,
            Long("note") => once(given, "note", &mut lock.note, value(words)?)?,
            Long("sock") => set(&mut lock.daemon.sock, value(words)?)?,
            Long("trust-uid") => lock.daemon.trust_uid.push(number(words)?),
            Long("auth-file") => set(&mut lock.daemon.auth_file, path(words)?)?,
            #[cfg(feature = "tls")]
            Long("tls-ca") => set(&mut lock.daemon.tls_ca, path(words)?)?,
            #[cfg(feature = "tls")]
            Long("tls-cert") => set(&mut lock.daemon.tls_cert, path(words)?)?,
            #[cfg(feature = "tls")]
            Long("tls-key") => set(&mut lock.daemon.tls_key, path(words)?)?,
            _ => return None,
        }
    }
    (run.key.is_some() && !is_contradictory(&run)).then_some(run)
}

/// What clap makes of no options at all.
fn defaults() -> Run {
    let lock = LockArgs {
        queue: false,
        shared: false,
        exclusive: false,
        slots: 1,
        fresh: None,
        fresh_failure: None,
        coalesce: false,
        newest: false,
        replace: false,
        replace_after: None,
        no_replace: false,
        weight: None,
        nonblock: false,
        wait: None,
        conflict_exit_code: 75,
        finished_exit_code: 79,
        on_peer_failure: OnPeerFailure::Skip,
        note: OsString::new(),
        no_autostart: false,
        verbose: false,
        daemon: Daemon::default(),
    };
    Run {
        key: None,
        command: Vec::new(),
        shell_command: None,
        keys: Vec::new(),
        lock,
        tree: false,
        share: None,
        share_max: 64 << 20,
        stale: None,
        refresh: false,
        reentrant: false,
        status_fd: None,
        status_file: None,
        close: false,
        no_fork: false,
        on_lost: OnLost::Kill,
        kill_after: Duration::from_secs(5),
        max_hold: None,
        warn_after: None,
    }
}

/// Some options exclude each other.
fn is_contradictory(run: &Run) -> bool {
    let needs_fork = run.close || run.tree || run.max_hold.is_some() || run.share.is_some();
    (run.shell_command.is_some() && !run.command.is_empty())
        || (run.no_fork && needs_fork)
        || (run.share.is_some() && (run.lock.queue || run.lock.shared))
        || (run.lock.fresh.is_some() && run.lock.shared)
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
fn once<T>(given: &mut Vec<&str>, name: &'static str, option: &mut T, value: T) -> Option<()> {
    let is_new = !given.contains(&name);
    given.push(name);
    *option = value;
    is_new.then_some(())
}

/// An option may be given once.
fn set<T>(option: &mut Option<T>, value: T) -> Option<()> {
    option.replace(value).is_none().then_some(())
}

/// The value of the option that was just read. One that looks like an option is probably a forgotten value.
fn value(words: &mut Parser) -> Option<OsString> {
    words.value().ok().filter(|value| !value.as_bytes().starts_with(b"-"))
}

/// clap takes no empty path.
fn path(words: &mut Parser) -> Option<PathBuf> {
    value(words).filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn one_of<T: ValueEnum>(words: &mut Parser) -> Option<T> {
    T::from_str(value(words)?.to_str()?, false).ok()
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
            "--tree --reentrant --on-lost continue --kill-after 1m K true",
            "--trust-uid 7 --trust-uid=0 --auth-file a K true",
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
            "-F --tree K true",
            "--auth-file= K true",
            "--on-lost wait K true",
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
            --sock|--sock=/s|-x|-k|--tree|--reentrant|--on-lost|--on-lost=kill|--kill-after|--kill-after=2|\
            --trust-uid|--trust-uid=3|--auth-file|--auth-file=|--tls-ca=a|--tls-cert=b|--tls-key=c|\
            --coalesce|-nF|-no|-nw|-h|--help";
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
