//! kmutex: flock(1) for keys, with single-flight.
#![forbid(unsafe_code)]

pub mod proto;
pub mod table;
