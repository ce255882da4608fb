//! kmutex: flock(1) for keys, with single-flight.
//!
//! [`Client`] takes locks in a program of your own; `kmutex run` does it for any command. The architecture, from top to
//! bottom; imports point down only:
//!
//! | module | what it owns | feature |
//! | --- | --- | --- |
//! | `app` | the program: dispatch, the one line of an error, the one exit | `cli` |
//! | `cli` | the definition of the command line | `cli` |
//! | `daemon` | the epoll loop: sockets to the table and back | `daemon` |
//! | `run` | a command under a lock: the child, its signals, its status | `cli` |
//! | `lock` | a lock that a shell holds | `cli` |
//! | `acquire` | asking for a lock at a command line | `cli` |
//! | `status` | which locks are held, as a table and as JSON | `cli` |
//! | `break_lock` | breaking a lock | `cli` |
//! | [`client`] | the blocking client | |
//! | `etcd` | the blocking client of etcd | `etcd` |
//! | [`place`] | where to look for a daemon when the user does not say | |
//! | [`addr`] | where a daemon is | |
//! | `tls` | TLS: certificates, and both ends of a connection | `tls` |
//! | `auth` | names, secrets and patterns: which client over TCP is who | `daemon` |
//! | `config_file` | small files, read as a whole, and noticed when they change | |
//! | `keepalive` | how the kernel notices that the other machine of a TCP connection is gone | |
//! | `describe` | holders and times in words | `cli` |
//! | `output` | the output of a command, kept to be given to others | |
//! | `passing` | passing descriptors through a Unix socket | |
//! | `fd` | descriptors that this process was started with | `daemon` |
//! | `lookup` | names of users, groups and hosts | |
//! | `lock_file` | the lock file beside a socket | |
//! | [`exit`] | the exit codes | |
//! | `message` | one line on standard error | `cli` |
//! | `streams` | this process's own standard output and error, for the output of other processes | `cli` |
//! | `any_signal` | signals of any number, real-time signals too | `cli` |
//! | `startup` | the signals as they were when kmutex was started, and how it dies of one | `cli` |
//! | `clock`, `timestamp` | the clock that the daemon and the clients use, and a moment on it | |
//! | `cluster` | this host's part in the locks of several hosts: events in, requests to etcd out, nothing else | `etcd` |
//! | `journal` | which locks are held, on disk, to survive a crash of the daemon | `daemon` |
//! | `table` | the lock table: events in, effects out, nothing else | `daemon` |
//! | [`proto`] | both wire protocols: bytes to messages and back, nothing else | |
//!
//! The daemon never imports the client. `proto`, `table` and `cluster` touch no socket, file, process or clock, and a test
//! keeps it so. docs/architecture.md follows one request through all of it.
//!
//! # Features
//!
//! All are on by default. A program that only takes locks uses `default-features = false`.
//!
//! - `cli`: the program `kmutex`; with it come clap, lexopt, uapi and env_logger.
//! - `daemon`: the lock daemon.
//! - `etcd`: locks that several hosts have in common, through etcd; with it come ureq and the feature `tls`.
//! - `tls`: TLS for TCP; with it comes rustls.
#![forbid(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("kmutex runs on Linux only: it needs epoll, pidfds, waitid and timerfd");

pub mod addr;
pub mod client;
pub mod exit;
pub mod place;
pub mod proto;

// What follows is public for the program, the tests, the benchmarks and the fuzz targets alone: it changes without notice,
// and so the documentation of the library does not show it.
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod acquire;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod app;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod auth;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod break_lock;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
#[cfg(feature = "etcd")]
#[doc(hidden)]
pub mod cluster;
mod config_file;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod daemon;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod describe;
#[cfg(feature = "etcd")]
#[doc(hidden)]
pub mod etcd;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod fd;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod journal;
mod keepalive;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod lock;
#[doc(hidden)]
pub mod lock_file;
#[doc(hidden)]
pub mod lookup;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod message;
#[doc(hidden)]
pub mod output;
mod passing;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod run;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod status;
#[cfg(feature = "daemon")]
#[doc(hidden)]
pub mod table;
#[doc(hidden)]
pub mod timestamp;
#[cfg(feature = "tls")]
#[doc(hidden)]
pub mod tls;

#[cfg(feature = "cli")]
mod any_signal;
#[cfg(feature = "cli")]
mod startup;
#[cfg(feature = "cli")]
mod streams;

mod clock;

pub use client::Client;
