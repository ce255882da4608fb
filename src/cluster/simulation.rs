//! A seeded world of clustered hosts: their tables, their standings, a model of etcd between them, and every fault that can
//! occur there. The checks after each step fail if a client was told what it must never be told.
//!
//! - `store`: etcd as far as it matters: a store with revisions, leases, and a history that is compacted.
//! - `newest`: what must be true of the requests of which only the newest of all hosts waits; `replacing`: of those among them
//!   that replace a holder.
//! - `world`: hosts, time and chance; links that lose questions or answers, or are cut. `world/clients`: what the clients do;
//!   `world/trouble`: what disturbs hosts and etcd; `world/checks`: what must be true when a client is told something.
//!
//! `KMUTEX_SIM_SEED=N` replays one seed; `KMUTEX_SIM_SEEDS=N..M` runs others than the usual ones.

mod newest;
mod replacing;
mod store;
mod world;

use world::{Seen, World};

const SEEDS: std::ops::Range<u64> = 0..150;
const FIRST_SEEDS: std::ops::Range<u64> = 0..20;
const STEPS: u64 = 6_000;

#[test]
fn clustered_hosts_keep_their_promises() {
    match std::env::var("KMUTEX_SIM_SEED") {
        Ok(seed) => drop(World::new(seed.parse().expect("KMUTEX_SIM_SEED is a number")).run(STEPS)),
        Err(_) => run(FIRST_SEEDS),
    }
}

#[test]
#[ignore = "takes a minute"]
fn clustered_hosts_keep_their_promises_with_many_more_seeds() {
    run(std::env::var("KMUTEX_SIM_SEEDS").map_or(SEEDS, |range| parse_range(&range)));
}

fn parse_range(range: &str) -> std::ops::Range<u64> {
    let parse = |number: &str| number.parse().expect("KMUTEX_SIM_SEEDS has numbers");
    let (first, end) = range.split_once("..").expect("KMUTEX_SIM_SEEDS is N..M");
    parse(first)..parse(end)
}

fn run(seeds: std::ops::Range<u64>) {
    let mut seen = Seen::default();
    for seed in seeds {
        World::new(seed)
            .run(STEPS)
            .into_iter()
            .for_each(|(what, times)| *seen.entry(what).or_default() += times);
    }
    // What never came up was not tested.
    for what in [
        "granted",
        "granted shared",
        "granted beside shared",
        "granted a slot",
        "granted a slot beside others",
        "slots differ",
        "offered",
        "taken",
        "taken late",
        "finished",
        "busy",
        "waiting",
        "lost",
        "unavailable",
        "vanished",
        "expired",
        "lost answer",
        "late question",
        "cut",
        "cut again",
        "frozen",
        "compacted",
        "other program",
        "rolled back",
        "emptied",
        "noticed",
        "restarted",
        "dead watch",
        "went back unseen",
        "renewed unawares",
        "read again",
        "fresh",
        "batch",
        "stepped aside",
        "forgotten",
        "result",
        "another user's result",
        "no result",
        "own result",
        "result of another host",
        "election",
        "newest",
        "recorded again",
        "superseded",
        "superseded from elsewhere",
        "stopped",
        "stopped from elsewhere",
    ] {
        assert!(seen.get(what).is_some_and(|&times| times >= 10), "hardly ever: {what}: {seen:?}");
    }
}

#[test]
fn the_same_seed_is_the_same_history() {
    assert_eq!(World::new(7).run(2_000), World::new(7).run(2_000));
}
