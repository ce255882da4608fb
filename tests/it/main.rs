//! All integration tests: one binary, a file a topic, one harness.

mod harness;
mod purity;
mod run;
