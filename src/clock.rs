//! The clock that daemon and clients have in common.

use nix::time::{ClockId, clock_gettime};

use crate::table::Millis;

/// Milliseconds since the machine was booted, the time that it slept included.
pub(crate) fn now() -> Millis {
    #[cfg(target_os = "linux")]
    const CLOCK: ClockId = ClockId::CLOCK_BOOTTIME;
    #[cfg(not(target_os = "linux"))]
    const CLOCK: ClockId = ClockId::CLOCK_MONOTONIC;
    let time = clock_gettime(CLOCK).expect("the kernel has this clock");
    Millis(time.tv_sec() as u64 * 1000 + time.tv_nsec() as u64 / 1_000_000)
}
