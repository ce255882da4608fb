//! What kmutex itself says: on standard error, one line each.

use std::fmt::Display;
use std::io::{self, Write};

/// Says something, as `kmutex: what`. It stays one line that no terminal obeys, whatever a command or a key has in it,
/// and it is written at once, so that the lines of many processes do not mix.
pub fn print(what: impl Display) {
    let text = what.to_string().replace(char::is_control, "?");
    // Where standard error cannot be written to, there is nobody to tell; the exit code still says what happened.
    let _ = io::stderr().write_all(format!("kmutex: {text}\n").as_bytes());
}
