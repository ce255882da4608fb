//! The program `kmutex`: reads the command line, does what it says, prints the error, and exits. Each command has a file
//! that turns its arguments into the job that the library does.
//!
//! | file | command |
//! | --- | --- |
//! | `app/run.rs` | `kmutex run` |
//! | `app/lock.rs` | `kmutex lock`, `kmutex unlock`, and how every command names a lock |
//! | `app/status.rs` | `kmutex status` |
//! | `app/break_lock.rs` | `kmutex break` |
//! | `app/forget.rs` | `kmutex forget` |
//! | `app/serve.rs` | `kmutex serve`, and the daemon under its old name |
//! | `app/hash_secret.rs` | `kmutex hash-secret` |
//! | `app/log.rs` | where the daemon's log goes, and how much of it |

mod break_lock;
mod forget;
mod hash_secret;
mod lock;
mod log;
mod other_daemons;
mod run;
mod serve;
mod status;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::addr::{self, Reason};
use crate::cli::{self, Command, Keyedmutexd};
use crate::exit::Exit;
use crate::{client, daemon, message};

/// Does what the command line says. Returns the exit status of the process; every error was printed.
pub fn main() -> ExitCode {
    report_panics();
    let code = run_command_line(std::env::args_os().collect()).unwrap_or_else(|failure| {
        if let Some(message) = failure.message {
            message::print(message);
        }
        failure.code
    });
    ExitCode::from(code)
}

fn run_command_line(args: Vec<OsString>) -> Result<u8, Failure> {
    if args.first().is_some_and(|program| cli::is_keyedmutexd(program)) {
        return serve::keyedmutexd(Keyedmutexd::try_parse_from(args)?);
    }
    match cli::parse(args)? {
        Command::Run(args) => run::run(args),
        Command::Lock(args) => lock::lock(args),
        Command::Unlock(args) => lock::unlock(args),
        Command::Status(args) => status::status(args),
        Command::Forget(args) => forget::forget(args),
        Command::Break(args) => break_lock::break_lock(args),
        Command::Serve(args) => serve::serve(args),
        Command::HashSecret => hash_secret::hash_secret(),
    }
}

/// Why the program ends before its work is done.
pub struct Failure {
    /// The one line for standard error. `None`: `--help` and `--version` have said what they were asked for.
    message: Option<String>,
    /// The exit status.
    code: u8,
}

impl From<clap::Error> for Failure {
    fn from(error: clap::Error) -> Failure {
        let Some(text) = cli::requested_text(&error) else { return usage(&cli::error_text(&error)) };
        match write!(io::stdout(), "{text}") {
            Ok(()) => Failure { message: None, code: 0 },
            Err(e) => failure(Exit::Os, format_args!("cannot write the help: {}", Reason(&e))),
        }
    }
}

fn failure(exit: Exit, message: impl Display) -> Failure {
    Failure { message: Some(message.to_string()), code: exit.code() }
}

fn usage(message: &str) -> Failure {
    failure(Exit::Usage, format_args!("{message}; see kmutex --help"))
}

/// Every error of the library knows its exit code.
macro_rules! exit_codes {
    ($($error:ty),+ $(,)?) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Failure {
                failure(error.exit(), error)
            }
        }
    )+};
}

exit_codes!(
    addr::Error,
    crate::place::Error,
    client::Error,
    daemon::Error,
    crate::break_lock::Error,
    crate::lock::Error,
    crate::run::Error,
    crate::status::Error,
);

/// A panic is a bug. It gets one line and its own exit code, as any other error does.
fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        message::print(format_args!("internal error: {}", info.to_string().replace('\n', ": ")));
        std::process::exit(Exit::Internal.code().into());
    }));
}
