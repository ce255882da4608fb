//! Where the daemon's log goes, and how much of it.

use std::io::Write;

use env_logger::Target;
use log::LevelFilter;

use crate::cli::LogLevel;
use crate::proto::text::sanitize;

/// Starts the log, once. Without a level, `$RUST_LOG` says what is logged, and without that it is `info`.
pub(super) fn init(level: Option<LogLevel>, target: Target) {
    let mut builder = env_logger::Builder::new();
    match (level, std::env::var("RUST_LOG")) {
        (Some(level), _) => builder.filter_level(filter(level)),
        (None, Ok(filters)) => builder.parse_filters(&filters),
        (None, Err(_)) => builder.filter_level(LevelFilter::Info),
    };
    // The libraries under etcd log every request, which says nothing about locks.
    builder.filter_module("ureq", LevelFilter::Off).filter_module("rustls", LevelFilter::Off);
    builder.target(target).format(|out, record| {
        // A line may quote what other users have sent.
        let message = record.args().to_string();
        writeln!(out, "[{} {:<5}] {}", out.timestamp(), record.level(), sanitize(&message))
    });
    builder.init();
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::Off,
        LogLevel::Error => LevelFilter::Error,
        LogLevel::Warn => LevelFilter::Warn,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Debug => LevelFilter::Debug,
    }
}
