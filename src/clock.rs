//! The clock that daemon and clients have in common.

use nix::time::{ClockId, clock_gettime};

use crate::table::Millis;

/// Milliseconds since the machine was booted, the time that it slept included.
pub(crate) fn now() -> Millis {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("the kernel has this clock");
    Millis(time.tv_sec() as u64 * 1000 + time.tv_nsec() as u64 / 1_000_000)
}
