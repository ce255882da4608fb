//! All integration tests: one binary, a file a topic, one harness.

mod errors;
mod harness;
mod like_flock;
mod purity;
mod run;
mod signals;
mod vanished;
