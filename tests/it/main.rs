//! All integration tests: one binary, a file a topic, one harness.
// The harness is public to the tests only.
#![allow(unreachable_pub)]

mod authority;
mod autostart;
mod breaking;
mod build_target;
#[cfg(feature = "tls")]
mod certificates;
#[cfg(feature = "etcd")]
mod cluster;
#[cfg(feature = "etcd")]
mod cluster_batches;
#[cfg(feature = "etcd")]
mod cluster_newest;
#[cfg(feature = "etcd")]
mod cluster_overtaken;
#[cfg(feature = "etcd")]
mod cluster_quarantine;
#[cfg(feature = "etcd")]
mod cluster_runs;
#[cfg(feature = "etcd")]
mod cluster_share;
#[cfg(feature = "etcd")]
mod cluster_sharing;
#[cfg(feature = "etcd")]
mod cluster_trouble;
#[cfg(feature = "failpoints")]
mod crash;
mod daemon;
mod deadlines;
mod descriptor;
mod errors;
#[cfg(feature = "etcd")]
mod etcd_client;
#[cfg(feature = "etcd")]
// Some of it is for the chaos of a cluster.
#[allow(dead_code)]
mod etcd_harness;
mod examples;
mod faults;
mod first_caller;
#[cfg(feature = "etcd")]
mod generated;
mod harmless;
mod harness;
mod hostile;
mod imports;
mod init;
mod keyedmutex;
mod leases;
mod library;
mod like_flock;
mod limits;
#[cfg(feature = "etcd")]
mod machines;
mod namespaces;
mod nested;
#[cfg(feature = "etcd")]
#[path = "../chaos_cluster/net.rs"]
#[allow(dead_code)]
mod net;
mod other_user;
mod pages;
mod peers;
mod place;
mod protocol1;
mod protocol2;
mod purity;
mod readme;
mod removed;
mod reserved;
mod resume;
mod run;
mod service;
mod several;
mod share;
mod shell;
mod signals;
mod single_flight;
mod ssh;
mod status;
mod stopped;
mod terminal;
#[cfg(feature = "tls")]
mod tls;
mod too_many;
mod vanished;
#[cfg(feature = "tls")]
mod who;
mod words;
mod world;
