//! kmutex: flock(1) for keys, with single-flight.
//!
//! [`Client`] takes locks in a program of your own; `kmutex run` does it for any command. The house, from top to bottom;
//! imports point down only:
//!
//! | module | what it owns |
//! | --- | --- |
//! | `main.rs` | parse, dispatch, report the error, the one exit |
//! | [`cli`] | the command line's definition |
//! | [`daemon`] | the epoll loop: sockets to the table and back |
//! | [`run`] | a command under a lock: the child, its signals, its status |
//! | [`lock`] | a lock that a shell holds |
//! | [`acquire`] | asking for a lock at a command line |
//! | [`status`] | what is held, for people and for programs |
//! | [`break_lock`] | breaking a lock |
//! | [`client`] | the blocking client |
//! | `etcd` | the blocking client of etcd (the feature `etcd`) |
//! | [`addr`] | where a daemon is |
//! | [`describe`] | holders and times in words |
//! | [`fd`] | descriptors from whoever started this process |
//! | [`lookup`] | names of users, groups and hosts |
//! | [`exit`] | the exit codes |
//! | [`message`] | one line on standard error |
//! | `cluster` | how this host stands among those that share their locks: events in, questions out, nothing else (the feature `etcd`) |
//! | [`journal`] | which locks are held, on disk, to survive a crash of the daemon |
//! | [`table`] | the lock table: events in, effects out, nothing else |
//! | [`proto`] | both wire protocols: bytes to messages and back, nothing else |
//!
//! The daemon never imports the client. The last two, and `cluster`, touch no socket, file, process or clock, and a test
//! keeps it so.
#![forbid(unsafe_code)]

pub mod acquire;
pub mod addr;
pub mod break_lock;
pub mod cli;
pub mod client;
mod clock;
#[cfg(feature = "etcd")]
pub mod cluster;
pub mod daemon;
pub mod describe;
#[cfg(feature = "etcd")]
pub mod etcd;
pub mod exit;
pub mod fd;
pub mod journal;
pub mod lock;
pub mod lookup;
pub mod message;
pub mod proto;
pub mod run;
pub mod status;
pub mod table;

pub use client::Client;
