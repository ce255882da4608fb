//! How the kernel notices that the machine at the other end of a TCP connection is gone, although neither end sends anything.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

/// The longest time between two probes that the kernel takes, in seconds (tcp(7)).
const INTERVAL_SECS_MAX: u64 = 32_767;

/// Has the kernel end a connection, or every connection that a listening socket will accept, when the other end has not answered for
/// `timeout`. This wakes neither of the two processes.
///
/// # Errors
/// As setsockopt(2) gives them, for instance when it is not a TCP socket.
pub(crate) fn set(socket: &impl AsFd, timeout: Duration) -> nix::Result<()> {
    let secs = |part: Duration| part.as_secs().clamp(1, INTERVAL_SECS_MAX) as u32;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &secs(timeout / 3))?;
    setsockopt(socket, sockopt::TcpKeepInterval, &secs(timeout / 6))?;
    // The time limit below ends it, not the count.
    setsockopt(socket, sockopt::TcpKeepCount, &100)?;
    let millis = timeout.as_millis().clamp(1, i32::MAX as u128) as u32;
    setsockopt(socket, sockopt::TcpUserTimeout, &millis)
}
