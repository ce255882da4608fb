//! Places where a test can have the daemon killed, and where it is measured. In ordinary builds they do nothing.

/// Kills this process, as `kill -9` does, when `$KMUTEX_FAILPOINT` is `PLACE:N` and this is the Nth time here.
#[cfg(feature = "failpoints")]
pub(super) fn hit(place: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static HITS: AtomicU64 = AtomicU64::new(0);

    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("KMUTEX_FAILPOINT").ok()?;
        let (place, number) = text.split_once(':')?;
        Some((place.to_string(), number.parse().ok()?))
    });
    if let Some((wanted, number)) = wanted
        && wanted == place
        && HITS.fetch_add(1, Ordering::Relaxed) + 1 == *number
    {
        let killed = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
        unreachable!("no process survives SIGKILL: {killed:?}");
    }
}

#[cfg(not(feature = "failpoints"))]
pub(super) fn hit(_place: &str) {}

/// Measures how long the turns of the loop take, if `$KMUTEX_MEASURE_TURNS` is set: in processor time of the loop's thread,
/// which does not depend on what else the machine does.
#[cfg(feature = "failpoints")]
#[derive(Default)]
pub(super) struct TurnTimer {
    is_on: bool,
    began: u64,
    longest: u64,
}

#[cfg(feature = "failpoints")]
impl TurnTimer {
    pub(super) fn new() -> TurnTimer {
        TurnTimer { is_on: std::env::var_os("KMUTEX_MEASURE_TURNS").is_some(), ..TurnTimer::default() }
    }

    pub(super) fn start(&mut self) {
        if self.is_on {
            self.began = processor_micros();
        }
    }

    /// Logs how long the turn took, if no turn before took so long.
    pub(super) fn stop(&mut self) {
        if !self.is_on {
            return;
        }
        let took = processor_micros() - self.began;
        if took > self.longest {
            self.longest = took;
            log::info!("longest turn: {took} us");
        }
    }
}

#[cfg(feature = "failpoints")]
fn processor_micros() -> u64 {
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    let time = nix::time::clock_gettime(clock).expect("the kernel has this clock");
    time.tv_sec() as u64 * 1_000_000 + time.tv_nsec() as u64 / 1000
}

#[cfg(not(feature = "failpoints"))]
pub(super) struct TurnTimer;

#[cfg(not(feature = "failpoints"))]
impl TurnTimer {
    pub(super) fn new() -> TurnTimer {
        TurnTimer
    }

    pub(super) fn start(&mut self) {}

    pub(super) fn stop(&mut self) {}
}
