//! Random bytes of the kernel.

use std::fs::File;
use std::io::{self, Read};

/// Fills `bytes` with random ones.
///
/// # Errors
/// If the kernel gives none.
pub(super) fn fill(bytes: &mut [u8]) -> io::Result<()> {
    File::open("/dev/urandom")?.read_exact(bytes)
}
