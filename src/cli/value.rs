//! The values of options: how each is written, and what is wrong with one that is not.

use std::time::Duration;

/// Parses a duration: a number of seconds, with or without a fraction, or a number with a unit (s, m, h or d).
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let units = [("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86400.0)];
    let unit = units.into_iter().find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, seconds)));
    let (number, seconds) = unit.unwrap_or((text, 1.0));
    let number: f64 = number.parse().map_err(|_| "not a number of seconds, nor one with s, m, h or d")?;
    Duration::try_from_secs_f64(number * seconds).map_err(|_| "must be from 0 to 1.8e19 seconds".into())
}

/// Parses 0, or a duration for which the kernel can watch a connection.
pub(super) fn peer_timeout(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        short if !short.is_zero() && short < Duration::from_secs(1) => {
            Err("must be 0, or at least 1 second".into())
        }
        long if long > Duration::from_secs(86_400) => Err("must be at most 1 day".into()),
        other => Ok(other),
    }
}

/// Parses a duration that is longer than none.
pub(super) fn positive_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be longer than 0".into()),
        other => Ok(other),
    }
}

/// Parses a size: a number of bytes, with or without a unit (K, M or G: powers of 1024).
pub(super) fn size(text: &str) -> Result<u64, String> {
    let units = [("K", 10), ("k", 10), ("M", 20), ("m", 20), ("G", 30), ("g", 30)];
    let unit = units.into_iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, shift)));
    let (number, shift) = unit.unwrap_or((text, 0));
    let number: u64 = number.parse().map_err(|_| "not a number of bytes, nor one with K, M or G")?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".into())
}

/// Parses how long to wait for etcd, in seconds.
#[cfg(feature = "etcd")]
pub(super) fn etcd_timeout(text: &str) -> Result<Duration, String> {
    let timeout = duration(text)?;
    match timeout.as_secs_f64() {
        0.05..=60.0 => Ok(timeout),
        _ => Err("not from 0.05 to 60 seconds".into()),
    }
}

/// Parses `PREFIX=USER` or `PREFIX=:GROUP`. A prefix may have equals signs, a name has none.
pub(super) fn reservation(text: &str) -> Result<(String, String), String> {
    match text.rsplit_once('=') {
        Some(("", _)) => Err("PREFIX is empty".into()),
        Some((_, "" | ":")) => Err("USER or :GROUP is missing".into()),
        Some((prefix, owner)) => Ok((prefix.into(), owner.into())),
        None => Err("not PREFIX=USER or PREFIX=:GROUP".into()),
    }
}

/// Parses an octal file mode of permission bits only.
pub(super) fn octal(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("not an octal mode from 0 to 777".into()),
    }
}
