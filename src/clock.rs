//! The clock that the daemon and the clients use.

use nix::time::{ClockId, clock_gettime};

use crate::timestamp::Timestamp;

/// Returns the milliseconds since 1970, by the clock that the administrator can set.
#[cfg(feature = "daemon")]
pub(crate) fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// Returns the milliseconds since the machine was booted, including the time that it slept (CLOCK_BOOTTIME).
pub(crate) fn now() -> Timestamp {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("the kernel has this clock");
    Timestamp(time.tv_sec() as u64 * 1000 + time.tv_nsec() as u64 / 1_000_000)
}
