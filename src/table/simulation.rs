//! A seeded world that drives the lock table through a million steps and checks the invariants after each of them.
//!
//! - `world`: time, chance, and clients that ask, release, die and overstay.
//! - `model`: what the clients have been told, and what no client may ever be told.
//! - `single_flight`: runs that count, batches, the newest, weights; the world above has none of them.
//! - `tally`: how often each situation came up.
//!
//! `KMUTEX_SIM_SEED=N` replays one seed, `KMUTEX_SIM_STEPS=N` sets how many steps each seed runs.

mod model;
mod single_flight;
mod tally;
mod world;

use tally::Tally;
use world::World;

/// Many short worlds meet more than one long one: each seed also draws how busy, how crowded and how deadly it is.
const SEEDS: u64 = 50;
const STEPS: u64 = 2_000;
const MANY_STEPS: u64 = 20_000;

#[test]
fn the_table_keeps_its_promises() {
    run(STEPS);
}

#[test]
#[ignore = "takes a minute"]
fn the_table_keeps_its_promises_in_a_million_steps() {
    run(MANY_STEPS);
}

/// Runs each seed for so many steps, or as the environment says.
fn run(steps: u64) {
    let number = |name| {
        let text = std::env::var(name).ok()?;
        Some(text.parse::<u64>().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
    };
    let steps = number("KMUTEX_SIM_STEPS").unwrap_or(steps);
    if let Some(seed) = number("KMUTEX_SIM_SEED") {
        World::new(seed).run(steps);
        return;
    }
    let mut seen = Tally::default();
    for seed in 0..SEEDS {
        seen += World::new(seed).run(steps);
    }
    seen.assert_nothing_was_missed();
}

#[test]
fn the_same_seed_is_the_same_history() {
    assert_eq!(World::new(7).run(5_000), World::new(7).run(5_000));
}
