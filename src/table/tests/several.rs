//! Several locks at once: taken one after the other in an order that is the same for everybody, as `kmutex run -k` does.
//! Nobody waits for ever, among any number of others who want some of the same locks or only one.

use std::collections::BTreeMap;

use super::*;

const KEYS: u64 = 5;
const CLIENTS: u32 = 24;
const JOBS: u32 = 3_000;

/// A number that depends on nothing but those before it (splitmix64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % limit
    }
}

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
    scene: Scene,
    jobs: BTreeMap<u32, Job>,
    /// Whose each connection is.
    owner: BTreeMap<u32, u32>,
    next_connection: u32,
    done: u32,
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
        let told = self.scene.ask(connection, asked);
        self.hear(told);
    }

    fn hear(&mut self, told: Vec<(u32, What)>) {
        for (connection, what) in told {
            let number = self.owner[&connection];
            match what {
                What::Granted(token) => {
                    let job = self.jobs.get_mut(&number).unwrap();
                    job.holds.push((connection, token.0));
                    self.longest = self.longest.max(self.done - job.asked_at);
                    job.asked_at = self.done;
                    if job.holds.len() < job.wants.len() {
                        self.ask(number);
                    }
                }
                What::Waiting { .. } => {}
                other => panic!("nobody should be told {other:?}"),
            }
        }
    }

    fn is_ready(job: &Job) -> bool {
        !job.wants.is_empty() && job.holds.len() == job.wants.len()
    }

    /// A job that has all its locks gives them back, and wants others.
    fn finish(&mut self, number: u32, wants: Vec<u64>) {
        let job = self.jobs.get_mut(&number).unwrap();
        let holds = std::mem::take(&mut job.holds);
        job.wants = wants;
        self.done += 1;
        job.asked_at = self.done;
        for (connection, _) in holds {
            let told = self.scene.release(connection, Outcome::Exit(0));
            self.hear(told);
            self.scene.gone(connection);
        }
    }
}

#[test]
fn jobs_that_take_their_locks_in_order_all_come_to_their_end() {
    for seed in 1..=8 {
        let mut chance = Chance(seed);
        let mut wants = || {
            let some: Vec<u64> = (0..KEYS).filter(|_| chance.below(3) == 0).collect();
            // Some want many, some only one.
            if some.is_empty() { vec![chance.below(KEYS)] } else { some }
        };
        let scene = Scene::new();
        let (jobs, owner) = (BTreeMap::new(), BTreeMap::new());
        let mut world = World { scene, jobs, owner, next_connection: 1, done: 0, longest: 0 };
        for number in 0..CLIENTS {
            world.jobs.insert(number, Job { wants: wants(), ..Job::default() });
            world.ask(number);
        }
        let mut pick = Chance(seed + 100);
        while world.done < JOBS {
            let ready: Vec<u32> = world
                .jobs
                .iter()
                .filter(|(_, job)| World::is_ready(job))
                .map(|(&number, _)| number)
                .collect();
            assert!(!ready.is_empty(), "all wait for each other (seed {seed})");
            let number = ready[pick.below(ready.len() as u64) as usize];
            world.finish(number, wants());
            world.ask(number);
        }
        // One waits behind those who came before it, of whom each may wait behind those who came before that one.
        assert!(
            world.longest < CLIENTS * KEYS as u32,
            "one waited for {} others (seed {seed})",
            world.longest
        );
    }
}
