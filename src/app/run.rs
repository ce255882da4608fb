//! `kmutex run`: turns its arguments into a [`Job`], and the job's end into the exit status.

use std::ffi::OsString;

use super::{Failure, lock, usage};
use crate::acquire::Acquire;
use crate::exit::{self, Exit};
use crate::proto::{Key, v2};
use crate::run::{self, Ended, Job, Report, Share, Sink, Spawn};
use crate::{cli, startup};

pub(super) fn run(args: cli::Run) -> Result<u8, Failure> {
    let (finished, conflict) = (args.lock.finished_exit_code, args.lock.conflict_exit_code);
    // The report is that of the process that the caller has started.
    let (status_fd, status_file) = match args.refresh {
        true => (None, None),
        false => (args.status_fd, args.status_file.clone()),
    };
    let job = Job::try_from(args)?;
    let sink = Sink::open(status_fd, status_file)?;
    let mut report = Report::new(job.locks.iter().map(|lock| lock.key.as_str()));
    let result = job.run(&mut report);
    if let Some(sink) = sink {
        sink.write(&report.line(&result))?;
    }
    Ok(match result? {
        Ended::Ran(status)
        | Ended::Adopted(status)
        | Ended::FreshAdopted(status)
        | Ended::Shared(_, status)
        | Ended::SharedFresh(_, status)
        | Ended::Replaced(status) => status,
        Ended::TimedOut => Exit::TimedOut.code(),
        Ended::Died(signal) => {
            startup::die_of(signal.into());
            exit::of_signal(signal)
        }
        Ended::Finished(_) | Ended::Fresh(_) | Ended::Superseded => finished,
        Ended::Busy => conflict,
        Ended::Lost => Exit::Lost.code(),
    })
}

impl TryFrom<cli::Run> for Job {
    type Error = Failure;

    fn try_from(mut args: cli::Run) -> Result<Job, Failure> {
        let (keys, argv) = keys_and_command(&mut args)?;
        let keys = keys.into_iter().map(lock::key).collect::<Result<Vec<Key>, Failure>>()?;
        let keys =
            run::in_order(keys).map_err(|key| usage(&format!("-k {:?} is given twice", key.as_str())))?;
        refuse_with_several_keys(&args, keys.len())?;
        refuse_without_meaning(&args)?;
        let share = args.share.map(|share| match share {
            Share::Whole => v2::Share::Whole,
            Share::Live => v2::Share::Live,
        });
        let stale = args.stale.unwrap_or_default();
        let acquire = |key| lock::acquire(&args.lock, key).map(|acquire| Acquire { share, stale, ..acquire });
        Ok(Job {
            locks: keys.into_iter().map(acquire).collect::<Result<_, _>>()?,
            argv,
            spawn: match (args.no_fork, args.close) {
                (true, _) => Spawn::Exec,
                (false, true) => Spawn::CloseLock,
                (false, false) => Spawn::InheritLock,
            },
            on_lost: args.on_lost,
            kill_after: args.kill_after,
            reentrant: args.reentrant,
            tree: args.tree,
            max_hold: args.max_hold,
            warn_after: args.warn_after,
            share_max: args.share_max,
            is_refresh: args.refresh,
        })
    }
}

/// Some options speak of one lock and its one run, which several locks do not have.
fn refuse_with_several_keys(args: &cli::Run, keys: usize) -> Result<(), Failure> {
    let options = [
        ("--fresh", args.lock.fresh.is_some()),
        ("--fresh-failure", args.lock.fresh_failure.is_some()),
        ("--coalesce", args.lock.coalesce),
        ("--share", args.share.is_some()),
        ("--newest", args.lock.newest),
        ("--replace", args.lock.replace),
        ("--replace-after", args.lock.replace_after.is_some()),
    ];
    match options.iter().find(|(_, is_given)| *is_given) {
        Some((name, _)) if keys > 1 => {
            Err(usage(&format!("{name} works with one lock, and there are several -k")))
        }
        _ => Ok(()),
    }
}

/// Some options contradict each other only by their values.
fn refuse_without_meaning(args: &cli::Run) -> Result<(), Failure> {
    if args.share == Some(Share::Live) && args.lock.coalesce {
        return Err(usage(
            "--share=live follows the present run, and with --coalesce only a later one counts",
        ));
    }
    match (args.stale, args.lock.fresh) {
        (Some(stale), Some(fresh)) if stale <= fresh => {
            Err(usage("--stale must be longer than --fresh: an older result is given only after that time"))
        }
        _ => Ok(()),
    }
}

/// Returns the keys and the command's argument vector. With `-k` there is no KEY: the first positional argument is the command.
fn keys_and_command(args: &mut cli::Run) -> Result<(Vec<OsString>, Vec<OsString>), Failure> {
    let (keys, first) = match args.keys.is_empty() {
        true => (args.key.take().into_iter().collect(), None),
        false => (std::mem::take(&mut args.keys), args.key.take()),
    };
    let command: Vec<OsString> = first.into_iter().chain(std::mem::take(&mut args.command)).collect();
    let argv = match args.shell_command.take() {
        Some(_) if !command.is_empty() => {
            return Err(usage("there is a COMMAND as well as -c SHELL_COMMAND"));
        }
        Some(command) => run::shell_command(command),
        None if command.is_empty() => {
            return Err(usage("nothing to run: give a COMMAND, or -c SHELL_COMMAND"));
        }
        None => command,
    };
    Ok((keys, argv))
}
