//! What kmutex was told about signals when it was started, and how it dies of one.

use std::fs::File;
use std::io::Read;
use std::sync::OnceLock;

use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::unistd::Pid;
use signal_hook::low_level::raise;

/// The signals that this process ignored when it began, as a set of bits: signal 1 is bit 0.
static IGNORED: OnceLock<u64> = OnceLock::new();

/// Asks before `main`, because Rust itself sets SIGPIPE to "ignore" there. (What the arguments are is not known yet: musl, unlike
/// glibc, passes them to `main` alone. So every command asks, and not just `run`.)
#[ctor::ctor]
fn ask_before_main() {
    IGNORED.get_or_init(ignored_now);
}

/// Returns `true` if this process ignored the signal when it began.
pub(crate) fn ignores(signal: i32) -> bool {
    IGNORED.get().is_some_and(|ignored| ignored & bit(signal) != 0)
}

/// Returns the set with this one signal in it.
pub(crate) fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// What was blocked when this process began, once that is blocked which ends a wait.
static MASK: OnceLock<SigSet> = OnceLock::new();

/// Blocks the signals that end a wait, so that kmutex can end it in order. The kernel drops a signal that PID 1 does not block
/// or handle.
///
/// # Errors
/// As sigprocmask(2).
pub(crate) fn block_wait_enders() -> nix::Result<SigSet> {
    let enders = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];
    let enders: SigSet = enders.into_iter().filter(|signal| !ignores(*signal as i32)).collect();
    let before = enders.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    MASK.get_or_init(|| before);
    Ok(enders)
}

/// Returns the mask of blocked signals with which kmutex was started; `now` is the present one.
pub(crate) fn mask(now: SigSet) -> SigSet {
    MASK.get().copied().unwrap_or(now)
}

/// Returns `true` if this process is the first of its PID namespace, as in a container.
pub(crate) fn is_init() -> bool {
    Pid::this().as_raw() == 1
}

/// Ends this process by a signal that its command died of, without a core dump. A shell that is interrupted from the keyboard
/// looks for exactly that when it decides whether its script goes on. Returns where the signal does not end the process, which
/// is so for PID 1.
pub(crate) fn die_of(signal: i32) {
    // Failures leave the exit status to tell what happened.
    let _ = prctl::set_dumpable(false);
    let _ = raise(signal);
    let _ = SigSet::empty().thread_set_mask();
    // Rust's own handler of SIGSEGV and SIGBUS has set the default by now.
    let _ = raise(signal);
}

/// Reads SigIgn of proc(5), because Rust offers no safe call that asks the kernel itself. Without /proc it is the empty set.
///
/// A search by memchr would first ask the processor what it can do, which takes longer than all of this on a virtual machine.
fn ignored_now() -> u64 {
    let mut buffer = [0; 4096];
    // One read: the kernel makes the file up for each, and it is never as long as this.
    let read = File::open("/proc/self/status").and_then(|mut file| file.read(&mut buffer));
    let mut lines = buffer[..read.unwrap_or(0)].split(|&byte| byte == b'\n');
    // The name of a program cannot contain a line feed: proc(5) escapes it.
    let bits = lines.find_map(|line| str::from_utf8(line.strip_prefix(b"SigIgn:\t")?).ok());
    bits.and_then(|bits| u64::from_str_radix(bits, 16).ok()).unwrap_or(0)
}
