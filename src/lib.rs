//! kmutex: flock(1) for keys, with single-flight.
#![forbid(unsafe_code)]

pub mod addr;
pub mod cli;
pub mod daemon;
pub mod exit;
pub mod proto;
pub mod table;
