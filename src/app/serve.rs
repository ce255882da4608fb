//! `kmutex serve`, and the same daemon under the name of KeyedMutex's, `keyedmutexd`: from the arguments to the daemon's
//! configuration.

use std::io;
#[cfg(feature = "tls")]
use std::path::PathBuf;
use std::time::Duration;

use env_logger::Target;

#[cfg(feature = "tls")]
use super::lock;
use super::{Failure, failure, log, other_daemons, usage};
use crate::addr::{self, Addr, Reason};
use crate::cli::{self, Keyedmutexd, LogLevel};
use crate::daemon;
use crate::lookup;
#[cfg(feature = "tls")]
use crate::tls::ServerFiles;
#[cfg(feature = "etcd")]
use crate::{etcd, exit::Exit};

pub(super) fn serve(args: cli::Serve) -> Result<u8, Failure> {
    let level = if args.no_log { Some(LogLevel::Off) } else { args.log_level };
    log::init(level, Target::Stderr);
    serve_and_tell(&daemon::Config::try_from(args)?)
}

/// Serves, after telling which daemons that started automatically still hold locks.
fn serve_and_tell(config: &daemon::Config) -> Result<u8, Failure> {
    if !config.detach && std::env::var_os("LISTEN_FDS").is_none() {
        other_daemons::holding(&config.addrs).into_iter().for_each(|line| ::log::warn!("{line}"));
    }
    match daemon::serve(config) {
        Err(error @ daemon::Error::Served { .. }) if !config.detach => {
            let daemon::Error::Served { path, .. } = &error else { unreachable!("the arm says so") };
            let locks = other_daemons::locks_of(path);
            let locks = locks.map_or(String::new(), |locks| format!(", and holds {locks}"));
            Err(failure(error.exit(), format_args!("{error}{locks}")))
        }
        other => Ok(other.map(|()| 0)?),
    }
}

impl TryFrom<cli::Serve> for daemon::Config {
    type Error = Failure;

    fn try_from(args: cli::Serve) -> Result<daemon::Config, Failure> {
        let addrs: Vec<Addr> = match &args.sock[..] {
            // Without an address, the daemon serves where this user's clients look for one.
            [] => addr::from_environment()?.into_iter().collect(),
            given => given.iter().map(|text| Addr::parse(text)).collect::<Result<_, _>>()?,
        };
        #[cfg(feature = "tls")]
        let tls = tls_files(&args, &addrs)?;
        let reservations = reservations(&args)?;
        Ok(daemon::Config {
            access: daemon::Access { mode: args.mode, group: args.group },
            connections_max: args.maxconn,
            hold_limit: (args.timeout > Duration::ZERO).then_some(args.timeout),
            per_uid_max: args.max_per_uid,
            reservations,
            shows_commands: args.show_commands,
            grace: args.grace,
            peer_timeout: (args.peer_timeout > Duration::ZERO).then_some(args.peer_timeout),
            remote: args.remote,
            state: args.state,
            remember_max: args.remember_max as usize,
            share_total: args.share_total,
            share_across_users: args.share_across_users,
            ready_fd: args.ready_fd,
            idle_exit: args.idle_exit,
            #[cfg(feature = "etcd")]
            clustering: clustering(args.etcd)?,
            auth_file: args.auth_file,
            open: args.open,
            #[cfg(feature = "tls")]
            tls,
            detach: args.detach,
            ..daemon::Config::new(addrs)
        })
    }
}

/// Returns which keys belong to whom. With names over TCP, a user need not be one of this machine.
fn reservations(args: &cli::Serve) -> Result<Vec<daemon::Reservation>, Failure> {
    let bad = |prefix: &str, owner: &str, e: io::Error| {
        usage(&format!("--reserve {prefix}={owner}: {}", Reason(&e)))
    };
    let reservation = |(prefix, owner): &(String, String)| {
        let found = match owner.strip_prefix(':') {
            Some(group) => lookup::group(group).map(|gid| daemon::Owner::Group(group.into(), gid)),
            None => match lookup::uid(owner) {
                Err(e) if args.auth_file.is_none() => Err(e),
                uid => Ok(daemon::Owner::User { name: owner.clone(), uid: uid.ok() }),
            },
        };
        let owner = found.map_err(|e| bad(prefix, owner, e))?;
        Ok(daemon::Reservation { prefix: prefix.clone(), owner })
    };
    args.reserve.iter().map(reservation).collect()
}

/// Returns the daemon's certificates. `None`: it has none.
#[cfg(feature = "tls")]
fn tls_files(args: &cli::Serve, addrs: &[Addr]) -> Result<Option<ServerFiles>, Failure> {
    let is_served = addrs.iter().any(|addr| matches!(addr, Addr::Tls { .. }));
    // The environment may be meant for clients, so it counts only where certificates are needed.
    let file = |option: &Option<PathBuf>, variable| match is_served {
        true => lock::or_variable(option, variable),
        false => option.clone(),
    };
    let client_ca = file(&args.tls_client_ca, "KMUTEX_TLS_CLIENT_CA");
    match (file(&args.tls_cert, "KMUTEX_TLS_CERT"), file(&args.tls_key, "KMUTEX_TLS_KEY")) {
        (Some(cert), Some(key)) => Ok(Some(ServerFiles { cert, key, client_ca })),
        (None, None) if client_ca.is_some() => Err(usage("--tls-client-ca needs --tls-cert and --tls-key")),
        (None, None) => Ok(None),
        (Some(_), None) => Err(usage("--tls-cert needs --tls-key")),
        (None, Some(_)) => Err(usage("--tls-key needs --tls-cert")),
    }
}

/// The etcd that the locks go through. `None`: the locks are this host's alone.
#[cfg(feature = "etcd")]
fn clustering(args: cli::Etcd) -> Result<Option<daemon::Clustering>, Failure> {
    if args.endpoints.is_empty() {
        return Ok(None);
    }
    let endpoints = args.endpoints.iter().map(|text| text.parse::<etcd::Endpoint>());
    let endpoints =
        endpoints.collect::<Result<_, _>>().map_err(|e| failure(Exit::Usage, format_args!("--etcd: {e}")))?;
    let user = match (args.user, args.password_file) {
        (Some(name), Some(path)) => {
            Some(etcd::User::with_password_file(name, &path).map_err(|e| failure(Exit::Usage, e))?)
        }
        _ => None,
    };
    if args.prefix.trim_matches('/').is_empty() {
        return Err(usage("--etcd-prefix is empty"));
    }
    let etcd =
        etcd::Config { endpoints, ca: args.ca, cert: args.cert, key: args.key, user, timeout: args.timeout };
    Ok(Some(daemon::Clustering { etcd, prefix: args.prefix, ttl_secs: args.ttl }))
}

pub(super) fn keyedmutexd(args: Keyedmutexd) -> Result<u8, Failure> {
    // KeyedMutex's daemon wrote a line on standard output for every event.
    let level = if args.no_log { LogLevel::Off } else { LogLevel::Debug };
    log::init(Some(level), Target::Stdout);
    serve_and_tell(&daemon::Config {
        connections_max: Some(args.maxconn),
        when_full: daemon::WhenFull::Wait,
        hold_limit: (args.timeout > Duration::ZERO).then_some(args.timeout),
        ..daemon::Config::new(vec![Addr::parse(&args.socket)?])
    })
}
