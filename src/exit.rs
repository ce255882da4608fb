//! The exit codes of kmutex itself, in one table. (A command that ran passes on its own status, or 128 plus its signal.)

/// Why kmutex ended without the command's own status. The numbers are those of sysexits.h and of the shell, where these
/// have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// The command line is invalid.
    Usage,
    /// The data is invalid, such as a key that is too long.
    BadData,
    /// No daemon can be reached or started.
    Unavailable,
    /// A bug in kmutex.
    Internal,
    /// A system call failed that ordinarily succeeds.
    Os,
    /// A socket or a file cannot be created.
    CannotCreate,
    /// The lock was lost while the command ran.
    Lost,
    /// The lock is held by another client (`-E` changes the number), or another daemon serves the socket.
    Busy,
    /// The peer does not speak the protocol.
    Protocol,
    /// Not permitted, or not trusted.
    NotPermitted,
    /// Another holder finished first (`--finished-exit-code` changes the number).
    Finished,
    /// The command was stopped because it held the lock for too long (`--max-hold`); timeout(1) uses the same number.
    TimedOut,
    /// The command was found but cannot be executed.
    CannotExecute,
    /// The command was not found.
    NotFound,
}

impl Exit {
    /// Returns the exit status for the parent process.
    pub const fn code(self) -> u8 {
        match self {
            Exit::Usage => exitcode::USAGE as u8,
            Exit::BadData => exitcode::DATAERR as u8,
            Exit::Unavailable => exitcode::UNAVAILABLE as u8,
            Exit::Internal => exitcode::SOFTWARE as u8,
            Exit::Os => exitcode::OSERR as u8,
            Exit::CannotCreate => exitcode::CANTCREAT as u8,
            Exit::Lost => exitcode::IOERR as u8,
            Exit::Busy => exitcode::TEMPFAIL as u8,
            Exit::Protocol => exitcode::PROTOCOL as u8,
            Exit::NotPermitted => exitcode::NOPERM as u8,
            // One above the highest code of sysexits.h, and below those of the shell.
            Exit::Finished => exitcode::CONFIG as u8 + 1,
            Exit::TimedOut => 124,
            Exit::CannotExecute => 126,
            Exit::NotFound => 127,
        }
    }
}

/// Returns the exit status with which a shell reports a command that died of a signal.
pub const fn of_signal(number: u8) -> u8 {
    128 + number
}
