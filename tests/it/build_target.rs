//! For which target `make` builds (`packaging/build-target`), with programs in the place of rustc and rustup.

use std::path::Path;

use crate::harness::{Finished, finish, tool, write_script};

const CHOOSE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/build-target");

/// Runs it where rustc belongs to this host, and `rustup` is a script that may make the folder `$MUSL`, which has the standard
/// library for musl.
fn choose(folder: &Path, host: &str, rustup: &str) -> Finished {
    let musl = folder.join("musl");
    let rustc = format!(
        "case $1 in
        -vV) echo 'rustc 1.91.0'; echo 'host: {host}';;
        --print) test \"$4\" = \"{}\" && echo \"$MUSL\";;
        *) exit 1;;
        esac",
        host.replace("gnu", "musl")
    );
    write_script(&folder.join("rustc"), &format!("#!/bin/sh\n{rustc}\n"));
    write_script(&folder.join("rustup"), &format!("#!/bin/sh\n{rustup}\n"));
    let path = format!("{}:/usr/bin:/bin", folder.display());
    finish(tool("sh").arg(CHOOSE).env("PATH", path).env("MUSL", musl))
}

#[test]
fn it_is_musl_where_the_standard_library_is_there_or_can_be_had() {
    for host in ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "x86_64-unknown-linux-musl"] {
        let folder = tempfile::tempdir().unwrap();
        let musl = format!("{}\n", host.replace("gnu", "musl"));
        let bring = format!("test \"$*\" = 'target add {}' && mkdir \"$MUSL\"", musl.trim());
        assert_eq!(choose(folder.path(), host, &bring).assert_silent(0), musl);
        assert_eq!(choose(folder.path(), host, "exit 1").assert_silent(0), musl, "it is there by now");
    }
}

#[test]
fn it_is_the_host_where_not_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let chosen = choose(folder.path(), "x86_64-unknown-linux-gnu", "echo 'no network' >&2; exit 1");
    assert_eq!((chosen.code, &*chosen.stdout), (0, "x86_64-unknown-linux-gnu\n"));
    for part in ["no network", "no standard library for x86_64-unknown-linux-musl"] {
        assert!(chosen.stderr.contains(part), "{chosen:?}");
    }
}
