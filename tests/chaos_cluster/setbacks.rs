//! What follows when the store of etcd goes back: tokens begin anew, and some clients may be overtaken that cannot be told in
//! time, or by hosts that cannot know (docs/cluster.md):
//!
//! - etcdctl neither notices that its lock is gone, nor waits before it takes another one.
//! - A command whose `kmutex run` was killed is stopped by no process.
//! - A daemon that was not there before the store went back does not wait.
//!
//! A command under `kmutex run` is dead at most one lease later.

use crate::checker::Section;
use crate::host::{HostFault, Outage};
use crate::permitted_overlaps::Speaker;

const TTL: f64 = crate::TTL_SECS as f64;
/// How long a daemon may take to see the store again after it is back.
const FINDING_OUT: f64 = TTL + 4.0;
/// More than any token of one store.
const TOKENS_OF_A_STORE: u64 = 1_000_000_000_000;

/// The store went back.
#[derive(Clone, Copy, Debug)]
pub struct Setback {
    /// The members were killed.
    pub killed: f64,
    /// They are started with older data from here on.
    pub reborn: f64,
}

/// A client, as far as it matters here.
#[derive(Clone, Debug)]
pub struct Party {
    pub speaker: Speaker,
    pub is_orphan: bool,
    pub outages: Vec<Outage>,
}

impl Setback {
    /// Returns `true` if `next` may have entered while `first` was inside, because the store went back between.
    pub fn permits(&self, first: (&Section<'_>, Party), next: (&Section<'_>, Party)) -> bool {
        let (first, next) = ((first.0.entered, first.1), (next.0.entered, next.1));
        let is_between = first.0 < self.reborn + TTL && next.0 >= self.killed;
        if !is_between || next.0 > self.reborn + TTL + FINDING_OUT {
            return false;
        }
        let cannot_be_told = first.1.speaker == Speaker::Etcdctl || first.1.is_orphan;
        cannot_be_told || next.1.speaker == Speaker::Etcdctl || self.is_unknown_to(&next.1.outages, next.0)
    }

    /// The daemon there was started when the store had gone back, or had not seen it before.
    fn is_unknown_to(&self, outages: &[Outage], at: f64) -> bool {
        let mut dead = outages.iter().filter(|outage| outage.what == HostFault::Dead);
        dead.any(|outage| outage.from <= at && outage.to + FINDING_OUT >= self.killed)
    }

    /// By when each command that ran under the old store's locks must be dead.
    pub fn commands_are_dead_by(&self) -> f64 {
        self.reborn + TTL
    }
}

/// The log with tokens that grow from store to store. A client that entered while the store changed has none: its token may be
/// of either.
pub fn with_growing_tokens(log: &str, setbacks: &[Setback]) -> String {
    let mut lines = String::new();
    for line in log.lines() {
        let mut words: Vec<String> = line.split(' ').map(Into::into).collect();
        if let [word, _, _, _, token, _, time] = &mut words[..]
            && word == "enter"
        {
            let entered: f64 = time.parse().unwrap_or(0.0);
            let is_of_either = |it: &&Setback| (it.killed..=it.reborn + TTL + FINDING_OUT).contains(&entered);
            let stores = setbacks.iter().filter(|it| it.reborn < entered).count() as u64;
            *token = match token.parse::<u64>() {
                Ok(number) if !setbacks.iter().any(|it| is_of_either(&it)) => {
                    (number + stores * TOKENS_OF_A_STORE).to_string()
                }
                _ => "-".into(),
            };
        }
        lines += &words.join(" ");
        lines.push('\n');
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::check_except;

    const SETBACK: Setback = Setback { killed: 100.0, reborn: 102.0 };

    fn permits(first: Speaker, is_orphan: bool, next: Speaker, dead: Option<[f64; 2]>, entered: f64) -> bool {
        let log = format!(
            "enter a k exclusive - 1 99\nenter b k exclusive - 2 {entered}\n\
             leave a k exclusive - 1 300\nleave b k exclusive - 2 301\n"
        );
        let outages: Vec<_> =
            dead.map(|[from, to]| Outage { what: HostFault::Dead, from, to }).into_iter().collect();
        let first = Party { speaker: first, is_orphan, outages: Vec::new() };
        let next = Party { speaker: next, is_orphan: false, outages };
        check_except(&log, |a, b| SETBACK.permits((a, first.clone()), (b, next.clone()))).is_ok()
    }

    #[test]
    fn only_clients_that_cannot_know_may_overlap_when_the_store_goes_back() {
        let (run, etcdctl) = (Speaker::KmutexRun, Speaker::Etcdctl);
        assert!(!permits(run, false, run, None, 103.0));
        assert!(permits(run, false, etcdctl, None, 103.0));
        assert!(permits(etcdctl, false, run, None, 108.0));
        assert!(permits(run, true, run, None, 108.0));
        assert!(permits(run, false, run, Some([101.0, 103.0]), 103.5), "it did not see the old store");
        assert!(!permits(run, false, run, Some([50.0, 60.0]), 103.5), "it saw the old store");
        assert!(!permits(run, true, run, None, 130.0), "that is too late");
        assert!(!permits(run, true, run, None, 99.5), "that was before");
    }

    #[test]
    fn tokens_grow_from_store_to_store() {
        let log = "enter a k exclusive 9 1 99\n# note 99\nenter b k exclusive 3 2 103\nenter c k exclusive 3 3 150\n";
        let grown = with_growing_tokens(log, &[SETBACK]);
        let tokens: Vec<_> = grown.lines().filter_map(|line| line.split(' ').nth(4)).collect();
        assert_eq!(tokens, ["9", "-", "1000000000003"]);
    }
}
