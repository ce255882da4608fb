//! Looks up names of users, groups and hosts, by running getent(1).
//!
//! The C library's own functions load the system's lookup modules into the calling process. A static program cannot do
//! that safely: the modules must have the version of glibc that the program was linked with. getent has the right modules
//! for every source that the system is configured to use (files, LDAP, DNS).

use std::io;
use std::net::IpAddr;
use std::process::{Command, Stdio};

/// Returns the name of a user, or `None` if the user has no name or getent cannot be run.
pub fn user(uid: u32) -> Option<String> {
    let entry = getent("passwd", &uid.to_string()).ok()?;
    entry.split(':').next().filter(|name| !name.is_empty()).map(String::from)
}

/// Returns the gid of a group, given by name or number.
///
/// # Errors
/// When there is no such group, or getent cannot be run.
pub fn group(name: &str) -> io::Result<u32> {
    if let Ok(gid) = name.parse() {
        return Ok(gid);
    }
    let entry = getent("group", name)?;
    let gid = entry.split(':').nth(2).and_then(|gid| gid.parse().ok());
    gid.ok_or_else(|| io::Error::other("getent prints no number"))
}

/// Returns the addresses of a host, given by name or number, in the order in which to try them.
///
/// # Errors
/// When the name is not known, or getent cannot be run.
pub fn host(name: &str) -> io::Result<Vec<IpAddr>> {
    if let Ok(addr) = name.parse() {
        return Ok(vec![addr]);
    }
    let lines = getent("ahosts", name)?;
    let mut addrs: Vec<IpAddr> =
        lines.lines().filter_map(|line| line.split_ascii_whitespace().next()?.parse().ok()).collect();
    // getent prints one line for each kind of socket.
    addrs.dedup();
    Ok(addrs)
}

/// Returns what getent prints for a key of a database; its exit status is 2 when the key is missing.
fn getent(database: &str, key: &str) -> io::Result<String> {
    // Some versions of getent do not accept "--" as the end of the options.
    if key.starts_with('-') {
        return Err(io::Error::other("there is no such name"));
    }
    let output = Command::new("getent").args([database, key]).stdin(Stdio::null()).output();
    let output = output.map_err(|e| io::Error::new(e.kind(), format!("cannot run getent: {e}")))?;
    if !output.status.success() {
        return Err(io::Error::other("there is no such name"));
    }
    String::from_utf8(output.stdout).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_has_a_name_and_its_group_a_number() {
        assert_eq!(user(0).as_deref(), Some("root"));
        assert_eq!(group("root").unwrap(), 0);
        assert_eq!(group("17").unwrap(), 17);
        assert!(group("no such group").is_err());
        assert_eq!(user(4_000_000_000), None);
    }

    #[test]
    fn a_host_is_found_by_name_and_by_number() {
        assert!(host("localhost").unwrap().iter().all(IpAddr::is_loopback));
        assert_eq!(host("127.0.0.1").unwrap(), ["127.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(host("::1").unwrap(), ["::1".parse::<IpAddr>().unwrap()]);
        assert!(host("no.such.host.invalid").is_err());
        assert!(host("-h").is_err(), "a name that looks like an option is a name");
    }
}
