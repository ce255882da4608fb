//! kmutex: parses the command line, does what it says, reports the error, exits.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use clap::error::ErrorKind;
use kmutex::acquire::{Acquire, OnPeerFailure, Wait};
use kmutex::addr::{self, Addr, Reason};
use kmutex::break_lock::{self, Confirm};
use kmutex::cli::{self, Cli, Command, Keyedmutexd, LogLevel};
use kmutex::client::Target;
use kmutex::daemon::{self, LogTarget};
#[cfg(feature = "etcd")]
use kmutex::etcd;
use kmutex::exit::Exit;
use kmutex::fd;
use kmutex::lock::{self, LockResult};
use kmutex::proto::{Key, Token, v2::Mode};
use kmutex::run::{self, Child, Ended, Job, OnLost, Report};
use kmutex::status::{self, Format, Which};

fn main() -> ExitCode {
    report_panics();
    let args: Vec<OsString> = std::env::args_os().collect();
    let result = if args.first().is_some_and(|program| cli::is_keyedmutexd(program)) {
        Keyedmutexd::try_parse_from(args).map_err(Failure::from).and_then(keyedmutexd)
    } else {
        Cli::parse_quickly(args).map_err(Failure::from).and_then(|cli| match cli.command {
            Command::Run(args) => run(args),
            Command::Lock(args) => lock(args),
            Command::Unlock(args) => unlock(args),
            Command::Status(args) => status(args),
            Command::Break(args) => break_lock(args),
            Command::Serve(args) => serve(args),
        })
    };
    let code = result.unwrap_or_else(|Failure { message, code }| {
        if let Some(message) = message {
            kmutex::message::print(message);
        }
        code
    });
    ExitCode::from(code)
}

fn run(args: cli::Run) -> Result<u8, Failure> {
    // With -k there is no KEY, and what stands in its place is the command.
    let (keys, first) = match args.keys.is_empty() {
        true => (args.key.into_iter().collect(), None),
        false => (args.keys, args.key),
    };
    let command: Vec<OsString> = first.into_iter().chain(args.command).collect();
    let argv = match args.shell_command {
        Some(_) if !command.is_empty() => {
            return Err(usage("there is a COMMAND as well as -c SHELL_COMMAND"));
        }
        Some(command) => run::shell_command(command),
        None if command.is_empty() => {
            return Err(usage("nothing to run: give a COMMAND, or -c SHELL_COMMAND"));
        }
        None => command,
    };
    let keys = keys.into_iter().map(key).collect::<Result<Vec<Key>, Failure>>()?;
    let keys = run::in_order(keys).map_err(|key| usage(&format!("-k {:?} is given twice", key.as_str())))?;
    if args.reentrant && std::env::var_os(Token::VARIABLE).is_none() {
        return Err(usage("--reentrant: this does not run under a lock"));
    }
    let asks = keys.into_iter().map(|key| ask(&args.lock, key)).collect::<Result<_, _>>()?;
    let child = match (args.no_fork, args.close) {
        (true, _) => Child::Exec,
        (false, true) => Child::Closed,
        (false, false) => Child::Inherits,
    };
    let job = Job {
        locks: asks,
        argv,
        child,
        on_lost: match args.on_lost {
            cli::OnLost::Kill => OnLost::Kill(args.kill_after),
            cli::OnLost::Continue => OnLost::Continue,
        },
        reentrant: args.reentrant,
        tree: args.tree,
    };
    let sink = Sink::open(args.status_fd, args.status_file)?;
    let mut report = Report::new(job.locks.iter().map(|lock| lock.key.as_str()));
    let result = job.run(&mut report);
    if let Some(sink) = sink {
        sink.write(&report.line(&result))?;
    }
    Ok(match result.map_err(|e| failure(e.exit(), e))? {
        Ended::Ran(status) | Ended::Adopted(status) => status,
        Ended::Finished(_) => args.lock.finished_exit_code,
        Ended::Busy => args.lock.conflict_exit_code,
        Ended::Lost => Exit::Lost.code(),
    })
}

fn ask(args: &cli::LockArgs, key: Key) -> Result<Acquire, Failure> {
    let wait = match args.wait {
        _ if args.nonblock => Wait::Never,
        None => Wait::Forever,
        Some(Duration::ZERO) => Wait::Never,
        Some(limit) => Wait::For(limit),
    };
    Ok(Acquire {
        target: target(&args.daemon, !args.no_autostart)?,
        key,
        mode: if args.queue { Mode::Queue } else { Mode::Once },
        shared: args.shared,
        slots: args.slots,
        wait,
        on_peer_failure: match args.on_peer_failure {
            cli::OnPeerFailure::Skip => OnPeerFailure::Skip,
            cli::OnPeerFailure::Retry => OnPeerFailure::Retry,
            cli::OnPeerFailure::Adopt => OnPeerFailure::Adopt,
        },
        note: args.note.to_string_lossy().into_owned(),
        verbose: args.verbose,
    })
}

fn lock(args: cli::Lock) -> Result<u8, Failure> {
    let ask = ask(&args.lock, key(args.key)?)?;
    Ok(match lock::lock(&ask, args.pid).map_err(|e| failure(e.exit(), e))? {
        LockResult::Held(_) => 0,
        LockResult::Finished(status) => status.unwrap_or(args.lock.finished_exit_code),
        LockResult::Busy => args.lock.conflict_exit_code,
    })
}

fn unlock(args: cli::Unlock) -> Result<u8, Failure> {
    lock::unlock(&target(&args.daemon, false)?, key(args.key)?, args.pid)
        .map(|()| 0)
        .map_err(|e| failure(e.exit(), e))
}

/// Where the report goes.
struct Sink {
    file: File,
    name: String,
}

impl Sink {
    /// Before anything is done: whoever asks for a report is told at once if there can be none.
    fn open(fd: Option<u32>, path: Option<PathBuf>) -> Result<Option<Sink>, Failure> {
        let (file, name) = match (fd, path) {
            (None, None) => return Ok(None),
            (Some(number), _) => (fd::dup(number), format!("--status-fd {number}")),
            (None, Some(path)) => (File::create(&path), format!("--status-file {}", path.display())),
        };
        match file {
            Ok(file) => Ok(Some(Sink { file, name })),
            Err(e) if fd.is_some() => Err(usage(&format!("{name}: {}", Reason(&e)))),
            Err(e) => Err(failure(Exit::CannotCreate, format_args!("{name}: {}", Reason(&e)))),
        }
    }

    fn write(mut self, line: &str) -> Result<(), Failure> {
        let written = self.file.write_all(line.as_bytes());
        written.map_err(|e| failure(Exit::Os, format_args!("{}: {}", self.name, Reason(&e))))
    }
}

fn status(args: cli::Status) -> Result<u8, Failure> {
    let format = match (args.json, args.keys) {
        (true, _) => Format::Json,
        (_, true) => Format::Keys,
        (false, false) => Format::People,
    };
    let which = match (args.key.map(key).transpose()?, args.cluster) {
        (Some(key), _) => Which::Key(key),
        (None, true) => Which::Cluster,
        (None, false) => Which::All,
    };
    let target = target(&args.daemon, false)?;
    let printed = match args.watch {
        true => status::watch(&target, &which, &mut io::stdout().lock()),
        false => status::print(&target, &which, format, &mut io::BufWriter::new(io::stdout().lock())),
    };
    match printed {
        // Whoever reads it has read enough.
        Err(status::Error::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        other => other.map(|()| 0).map_err(|e| failure(e.exit(), e)),
    }
}

fn break_lock(args: cli::Break) -> Result<u8, Failure> {
    let confirm = if args.yes { Confirm::Given } else { Confirm::Ask };
    break_lock::break_lock(&target(&args.daemon, false)?, key(args.key)?, confirm)
        .map(|()| 0)
        .map_err(|e| failure(e.exit(), e))
}

fn serve(args: cli::Serve) -> Result<u8, Failure> {
    let level = if args.no_log { Some(LogLevel::Off) } else { args.log_level };
    daemon::init_log(level.map(Into::into), LogTarget::Stderr);
    let addrs = match &args.sock[..] {
        [] => vec![Addr::or_default(None)],
        given => given.iter().map(|text| Addr::parse(text)).collect(),
    };
    let config = daemon::Config {
        access: daemon::Access { mode: args.mode, group: args.group },
        connections_max: args.maxconn,
        hold_limit: (args.timeout > Duration::ZERO).then_some(args.timeout),
        per_uid_max: args.max_per_uid,
        grace: args.grace,
        state: args.state,
        ready_fd: args.ready_fd,
        idle_exit: args.idle_exit,
        #[cfg(feature = "etcd")]
        sharing: sharing(args.etcd)?,
        detach: args.detach,
        ..daemon::Config::new(addrs.into_iter().collect::<Result<_, _>>().map_err(|e| failure(e.exit(), e))?)
    };
    daemon::serve(&config).map(|()| 0).map_err(|e| failure(e.exit(), e))
}

/// How the locks are shared with other hosts, if they are to be.
#[cfg(feature = "etcd")]
fn sharing(args: cli::Etcd) -> Result<Option<daemon::Sharing>, Failure> {
    if args.endpoints.is_empty() {
        return Ok(None);
    }
    let endpoints = args.endpoints.iter().map(|text| text.parse::<etcd::Endpoint>());
    let endpoints =
        endpoints.collect::<Result<_, _>>().map_err(|e| failure(Exit::Usage, format_args!("--etcd: {e}")))?;
    let user = match (args.user, args.password_file) {
        (Some(name), Some(path)) => {
            let text = std::fs::read_to_string(&path).map_err(|e| {
                let path = path.display();
                failure(Exit::Usage, format_args!("cannot read --etcd-password-file {path}: {}", Reason(&e)))
            })?;
            Some(etcd::User { name, password: text.lines().next().unwrap_or_default().into() })
        }
        _ => None,
    };
    if args.prefix.trim_matches('/').is_empty() {
        return Err(usage("--etcd-prefix is empty"));
    }
    let etcd = etcd::Config { endpoints, ca: args.ca, cert: args.cert, key: args.key, user };
    Ok(Some(daemon::Sharing { etcd, prefix: args.prefix, ttl_secs: args.ttl }))
}

fn keyedmutexd(args: Keyedmutexd) -> Result<u8, Failure> {
    // That daemon wrote a line on standard output for every event.
    let level = if args.no_log { LogLevel::Off } else { LogLevel::Debug };
    daemon::init_log(Some(level.into()), LogTarget::Stdout);
    let config = daemon::Config {
        connections_max: Some(args.maxconn),
        hold_limit: (args.timeout > Duration::ZERO).then_some(args.timeout),
        ..daemon::Config::new(vec![Addr::parse(&args.socket).map_err(|e| failure(e.exit(), e))?])
    };
    daemon::serve(&config).map(|()| 0).map_err(|e| failure(e.exit(), e))
}

fn target(args: &cli::Daemon, autostart: bool) -> Result<Target, Failure> {
    let addr = Addr::or_default(args.sock.as_deref()).map_err(|e: addr::Error| failure(e.exit(), e))?;
    Ok(Target { addr, trusted_uids: args.trust_uid.clone(), autostart })
}

fn key(text: impl AsRef<OsStr>) -> Result<Key, Failure> {
    let Some(text) = text.as_ref().to_str() else {
        return Err(failure(Exit::BadData, "the key is not UTF-8"));
    };
    Key::new(text).map_err(|e| failure(Exit::BadData, e))
}

/// What main reports and exits with.
struct Failure {
    message: Option<String>,
    code: u8,
}

fn failure(exit: Exit, message: impl Display) -> Failure {
    Failure { message: Some(message.to_string()), code: exit.code() }
}

fn usage(message: &str) -> Failure {
    failure(Exit::Usage, format_args!("{message}; see kmutex --help"))
}

impl From<clap::Error> for Failure {
    /// Clap explains an error over several lines; its first paragraph says what is wrong.
    fn from(error: clap::Error) -> Failure {
        if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            // Standard output, and status 0: it is what was asked for.
            let printed = write!(io::stdout(), "{}", error.render());
            return match printed {
                Ok(()) => Failure { message: None, code: 0 },
                Err(e) => failure(Exit::Os, format_args!("cannot write the help: {e}")),
            };
        }
        if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
            return usage("what to do is missing");
        }
        let text = error.render().to_string();
        let first = text.lines().take_while(|line| !line.is_empty());
        let joined = first.map(str::trim).collect::<Vec<_>>().join(" ");
        usage(joined.trim_start_matches("error: "))
    }
}

/// A panic is a bug; it gets one line and its own exit code, like any other error.
fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        kmutex::message::print(format_args!("internal error: {}", info.to_string().replace('\n', ": ")));
        std::process::exit(Exit::Internal.code().into());
    }));
}
