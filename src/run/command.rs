//! The command: its arguments and its environment, and how a process becomes it.

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::libc::SIGPIPE;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn, posix_spawnp};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{AccessFlags, Pid, access, execvpe};

use crate::{any_signal, startup};

/// What to execute.
#[derive(Debug)]
pub(super) struct Command<'a> {
    /// The program and its arguments; at least the program.
    argv: &'a [OsString],
    /// What is different in its environment.
    variables: Vec<(&'static str, OsString)>,
}

impl<'a> Command<'a> {
    pub(super) fn new(argv: &'a [OsString], variables: Vec<(&'static str, OsString)>) -> Command<'a> {
        Command { argv, variables }
    }

    /// Starts the command as a child. It gets this mask of blocked signals, and the dispositions that kmutex was started
    /// with, and these standard output and standard error, if any. As execvp(3) does, a file that the kernel cannot execute is given to the shell.
    ///
    /// # Errors
    /// Those of fork(2) and execve(2).
    pub(super) fn spawn(&self, mask: &SigSet, output: Option<[BorrowedFd<'_>; 2]>) -> io::Result<Pid> {
        let (argv, environment) = (self.argv()?, self.environment()?);
        let mut actions = PosixSpawnFileActions::init()?;
        for (fd, number) in output.iter().flatten().zip(1..) {
            actions.add_dup2(fd.as_raw_fd(), number)?;
        }
        let mut attributes = PosixSpawnAttr::init()?;
        attributes
            .set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF)?;
        attributes.set_sigmask(mask)?;
        attributes.set_sigdefault(&reset_signals())?;
        let spawned = match posix_spawnp(&argv[0], &actions, &attributes, &argv, &environment) {
            Err(Errno::ENOEXEC) => {
                let argv = by_shell(&argv)?;
                posix_spawn(argv[0].as_c_str(), &actions, &attributes, &argv, &environment)
            }
            other => other,
        };
        any_signal::block_unnamed()?;
        Ok(spawned?)
    }

    /// Makes this process the command, with the dispositions that kmutex was started with. As execvp(3) does, a file that the kernel
    /// cannot execute is given to the shell.
    ///
    /// # Errors
    /// Those of execve(2); on success it does not return.
    pub(super) fn exec(&self) -> io::Error {
        match self.execute() {
            Err(e) => e,
        }
    }

    fn execute(&self) -> io::Result<Infallible> {
        startup::mask(SigSet::thread_get_mask()?).thread_set_mask()?;
        let argv = self.argv()?;
        match self.replace_process(&argv) {
            Err(e) if e.raw_os_error() == Some(Errno::ENOEXEC as i32) => {
                self.replace_process(&by_shell(&argv)?)
            }
            other => other,
        }
    }

    fn replace_process(&self, argv: &[CString]) -> io::Result<Infallible> {
        if startup::ignores(SIGPIPE) {
            return Ok(execvpe(&argv[0], argv, &self.environment()?)?);
        }
        // This one sets SIGPIPE to its default.
        let words: Vec<_> = argv.iter().map(|word| OsStr::from_bytes(word.to_bytes())).collect();
        let changed = self.variables.iter().map(|(name, value)| (name, value));
        Err(std::process::Command::new(words[0]).args(&words[1..]).envs(changed).exec())
    }

    fn argv(&self) -> io::Result<Vec<CString>> {
        Ok(self.argv.iter().map(|argument| CString::new(argument.as_bytes())).collect::<Result<_, _>>()?)
    }

    /// Returns the environment of this process with the changes, each as `NAME=VALUE`.
    fn environment(&self) -> io::Result<Vec<CString>> {
        let is_changed = |name: &OsStr| self.variables.iter().any(|(changed, _)| name == *changed);
        let inherited = std::env::vars_os().filter(|(name, _)| !is_changed(name));
        let changed = self.variables.iter().map(|(name, value)| (OsString::from(name), value.clone()));
        let all = inherited.chain(changed).map(|(name, value)| {
            let mut entry = name.into_vec();
            entry.push(b'=');
            entry.extend_from_slice(value.as_bytes());
            CString::new(entry)
        });
        Ok(all.collect::<Result<_, _>>()?)
    }
}

/// Returns the signals to set to their default: SIGPIPE, which Rust ignores, unless kmutex was started to ignore it.
fn reset_signals() -> SigSet {
    if startup::ignores(SIGPIPE) { SigSet::empty() } else { SigSet::from(Signal::SIGPIPE) }
}

/// Returns the arguments with which the shell runs a file that the kernel cannot execute.
fn by_shell(argv: &[CString]) -> io::Result<Vec<CString>> {
    let file = find(OsStr::from_bytes(argv[0].to_bytes()));
    let file = CString::new(file.into_os_string().into_vec())?;
    Ok([c"/bin/sh".into(), file].into_iter().chain(argv[1..].iter().cloned()).collect())
}

/// Returns where `$PATH` has a program: given the bare name, the shell would look for a file in the working directory.
fn find(program: &OsStr) -> PathBuf {
    if program.as_encoded_bytes().contains(&b'/') {
        return program.into();
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::env::split_paths(&folders).map(|folder| folder.join(program));
    let is_program = |path: &PathBuf| path.is_file() && access(path, AccessFlags::X_OK).is_ok();
    candidates.find(is_program).unwrap_or_else(|| program.into())
}
