//! What kmutex was told about signals when it was started: the command is started with the same.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::sync::OnceLock;

use nix::libc::SIGPIPE;

/// The signals that this process ignored when it began, as a set of bits: signal 1 is bit 0.
static IGNORED: OnceLock<u64> = OnceLock::new();

/// Asks before `main`, because Rust itself sets SIGPIPE to "ignore" there. (No other command needs it, and none pays for it.)
#[ctor::ctor]
fn ask_before_main() {
    if std::env::args_os().nth(1).as_deref() == Some(OsStr::new("run")) {
        IGNORED.get_or_init(ignored_now);
    }
}

/// Returns `true` if this process ignored the signal when it began.
pub(super) fn ignores(signal: i32) -> bool {
    // A program that calls this without the word `run` in its arguments: Rust has set SIGPIPE by now.
    let ignored = IGNORED.get_or_init(|| ignored_now() & !bit(SIGPIPE));
    ignored & bit(signal) != 0
}

/// Returns the set with this one signal in it.
pub(super) fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Reads SigIgn of proc(5), because Rust offers no safe call that asks the kernel itself. Without /proc it is the empty set.
fn ignored_now() -> u64 {
    let mut buffer = [0; 4096];
    // One read: the kernel makes the file up for each, and it is never as long as this.
    let read = File::open("/proc/self/status").and_then(|mut file| file.read(&mut buffer));
    let status = String::from_utf8_lossy(&buffer[..read.unwrap_or(0)]);
    let bits = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}
