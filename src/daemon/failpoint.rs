//! Places where a test can have the daemon killed. In ordinary builds they do nothing.

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
