//! kmutex's own messages: one line each on standard error.

use std::fmt::Display;
use std::io::{self, Write};

use crate::proto::text::sanitize;

/// Prints `kmutex: MESSAGE`. Harmful characters, which a key or a command may contain, are replaced, so that it stays one
/// line and no terminal obeys it. The line is written by one system call, so that the lines of many processes do not mix.
pub fn print(message: impl Display) {
    let text = message.to_string();
    // If standard error cannot be written, the exit code still says what happened.
    let _ = io::stderr().write_all(format!("kmutex: {}\n", sanitize(&text)).as_bytes());
}
