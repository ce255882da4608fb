//! Several locks at once, in a world of many clients that want some of the same locks. They take them in one order, as
//! `kmutex run -k` does, or in any order, one under the other, where a request that would close a cycle is refused: no client
//! waits for ever.

use std::collections::BTreeMap;

use super::*;
use crate::table::rng::Rng;

const KEYS: u64 = 5;
const CLIENTS: u32 = 24;
const JOBS: u32 = 3_000;

/// One who wants some of the keys, takes them in order, and gives them back together.
#[derive(Default)]
struct Job {
    wants: Vec<u64>,
    /// The connection of each lock that is held, and its token.
    holds: Vec<(u32, u64)>,
    asked_at: u32,
}

/// A world of such jobs. Each lock that a job holds has a connection of its own.
struct World {
    fixture: Fixture,
    jobs: BTreeMap<u32, Job>,
    /// Whose each connection is.
    owner: BTreeMap<u32, u32>,
    next_connection: u32,
    done: u32,
    /// Who was refused, because it would have waited for ever.
    refused: Vec<u32>,
    /// How many others have begun at the most while one was waiting for its first or next lock.
    longest: u32,
}

impl World {
    /// Asks for the next lock that a job wants.
    fn ask(&mut self, number: u32) {
        let job = &self.jobs[&number];
        let key = job.wants[job.holds.len()];
        let within = job.holds.last().map(|&(_, token)| Token(token));
        let asked =
            LockRequest { within, ..LockRequest::new(Key::new(format!("key {key}")).unwrap(), Mode::Queue) };
        let connection = self.next_connection;
        self.next_connection += 1;
        self.owner.insert(connection, number);
        let notified = self.fixture.ask(connection, asked);
        self.hear(notified);
    }

    fn hear(&mut self, notified: Vec<(u32, NotificationKind)>) {
        for (connection, what) in notified {
            let number = self.owner[&connection];
            match what {
                NotificationKind::Granted(token) => {
                    let job = self.jobs.get_mut(&number).unwrap();
                    job.holds.push((connection, token.0));
                    self.longest = self.longest.max(self.done - job.asked_at);
                    job.asked_at = self.done;
                    if job.holds.len() < job.wants.len() {
                        self.ask(number);
                    }
                }
                NotificationKind::Waiting { .. } => {}
                NotificationKind::Deadlock(_) => self.refused.push(number),
                other => panic!("no client should be told {other:?}"),
            }
        }
    }

    fn new(wants: &mut impl FnMut() -> Vec<u64>) -> World {
        let mut world = World {
            fixture: Fixture::new(),
            jobs: BTreeMap::new(),
            owner: BTreeMap::new(),
            next_connection: 1,
            done: 0,
            refused: Vec::new(),
            longest: 0,
        };
        for number in 0..CLIENTS {
            world.jobs.insert(number, Job { wants: wants(), ..Job::default() });
            world.ask(number);
        }
        world
    }

    /// Returns the jobs that hold every lock that they want.
    fn ready(&self) -> Vec<u32> {
        let is_ready = |job: &Job| job.holds.len() == job.wants.len();
        self.jobs.iter().filter(|(_, job)| is_ready(job)).map(|(&number, _)| number).collect()
    }

    /// A job gives back all its locks, and wants others.
    fn finish(&mut self, number: u32, wants: Vec<u64>) {
        let job = self.jobs.get_mut(&number).unwrap();
        let holds = std::mem::take(&mut job.holds);
        job.wants = wants;
        self.done += 1;
        job.asked_at = self.done;
        for (connection, _) in holds {
            let notified = self.fixture.release(connection, Outcome::Exit(0));
            self.hear(notified);
            self.fixture.disconnected(connection);
        }
    }
}

/// Some want many, some only one.
fn some_keys(rng: &mut Rng) -> Vec<u64> {
    let some: Vec<u64> = (0..KEYS).filter(|_| rng.below(3) == 0).collect();
    if some.is_empty() { vec![rng.below(KEYS)] } else { some }
}

#[test]
fn jobs_that_take_their_locks_in_order_all_come_to_their_end() {
    for seed in 1..=8 {
        let mut rng = Rng(seed);
        let mut wants = || some_keys(&mut rng);
        let mut world = World::new(&mut wants);
        let mut pick = Rng(seed + 100);
        while world.done < JOBS {
            let ready = world.ready();
            assert!(!ready.is_empty(), "all wait for each other (seed {seed})");
            let number = ready[pick.below(ready.len() as u64) as usize];
            world.finish(number, wants());
            world.ask(number);
        }
        assert!(world.refused.is_empty(), "no client would have waited for ever (seed {seed})");
        // A client waits behind earlier ones, each of which may wait behind still earlier ones.
        assert!(
            world.longest < CLIENTS * KEYS as u32,
            "one waited for {} others (seed {seed})",
            world.longest
        );
    }
}

#[test]
fn of_jobs_that_take_their_locks_in_any_order_enough_are_refused_and_no_more() {
    for seed in 1..=8 {
        let mut rng = Rng(seed);
        let mut wants = || {
            let mut keys = some_keys(&mut rng);
            let by = rng.below(keys.len() as u64) as usize;
            keys.rotate_left(by);
            keys
        };
        let mut world = World::new(&mut wants);
        let mut pick = Rng(seed + 100);
        let mut refused = 0;
        while world.done < JOBS {
            let number = match world.refused.pop() {
                Some(number) => {
                    refused += 1;
                    number
                }
                None => {
                    let ready = world.ready();
                    assert!(!ready.is_empty(), "all wait for each other (seed {seed})");
                    ready[pick.below(ready.len() as u64) as usize]
                }
            };
            world.finish(number, wants());
            world.ask(number);
        }
        assert!((1..JOBS / 2).contains(&refused), "{refused} were refused (seed {seed})");
    }
}
