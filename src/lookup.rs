//! Looks up names of users, groups and hosts, by running getent(1).
//!
//! The C library's own functions load the system's lookup modules into the calling process. A static program cannot do
//! that safely: the modules must have the version of glibc that the program was linked with. getent has the right modules
//! for every source that the system is configured to use (files, LDAP, DNS).

use std::io::{self, Read};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long getent may take for a user or a group. Without a limit, a directory service that does not answer would stop every
/// command that shows a name.
const USER_WAIT: Duration = Duration::from_secs(3);
/// The same for a host: one server of DNS that does not answer must not be the end of it (resolv.conf(5), timeout).
const HOST_WAIT: Duration = Duration::from_secs(15);

/// Returns the name of a user, or `None` if the user has no name or getent cannot be run.
pub fn user(uid: u32) -> Option<String> {
    let entry = getent("passwd", &uid.to_string(), USER_WAIT).ok()?;
    entry.split(':').next().filter(|name| !name.is_empty()).map(String::from)
}

/// Returns the uid of a user, given by name or number.
///
/// # Errors
/// When there is no such user, or getent cannot be run.
pub fn uid(name: &str) -> io::Result<u32> {
    if let Ok(uid) = name.parse() {
        return Ok(uid);
    }
    number(&getent("passwd", name, USER_WAIT)?)
}

/// Returns the gid of a group, given by name or number.
///
/// # Errors
/// When there is no such group, or getent cannot be run.
pub fn group(name: &str) -> io::Result<u32> {
    if let Ok(gid) = name.parse() {
        return Ok(gid);
    }
    number(&getent("group", name, USER_WAIT)?)
}

/// Returns the number in an entry of passwd(5) or group(5).
fn number(entry: &str) -> io::Result<u32> {
    let number = entry.split(':').nth(2).and_then(|number| number.parse().ok());
    number.ok_or_else(|| io::Error::other("getent prints no number"))
}

/// Returns the addresses of a host, given by name or number, in the order in which to try them. `deadline`: when to give up, if
/// that is before getent's own limit.
///
/// # Errors
/// When the name is not known, or getent cannot be run; of the kind [`io::ErrorKind::TimedOut`] when it takes too long.
pub fn host(name: &str, deadline: Option<Instant>) -> io::Result<Vec<IpAddr>> {
    if let Ok(addr) = name.parse() {
        return Ok(vec![addr]);
    }
    let limit = deadline.map_or(HOST_WAIT, |at| at.saturating_duration_since(Instant::now()).min(HOST_WAIT));
    let lines = getent("ahosts", name, limit)?;
    let mut addrs: Vec<IpAddr> =
        lines.lines().filter_map(|line| line.split_ascii_whitespace().next()?.parse().ok()).collect();
    // getent prints one line for each kind of socket.
    addrs.dedup();
    Ok(addrs)
}

/// Returns what getent prints for a key of a database; its exit status is 2 when the key is missing.
fn getent(database: &str, key: &str, limit: Duration) -> io::Result<String> {
    // Some versions of getent do not accept "--" as the end of the options.
    if key.starts_with('-') || key.is_empty() {
        return Err(io::Error::other("there is no such name"));
    }
    let deadline = Instant::now() + limit;
    let mut command = Command::new("getent");
    command.args([database, key]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let child = command.spawn();
    let mut child = child.map_err(|e| io::Error::new(e.kind(), format!("cannot run getent: {e}")))?;
    let output = read_until(&mut child, deadline);
    if output.is_err() {
        // It may have ended by itself meanwhile.
        let _ = child.kill();
    }
    let status = child.wait();
    let output = output?;
    let is_found = match status {
        Ok(status) => status.success(),
        // A process that waits for all its children, as `kmutex run --tree` does, has reaped this one too.
        Err(e) if e.raw_os_error() == Some(nix::libc::ECHILD) => !output.is_empty(),
        Err(e) => return Err(e),
    };
    if !is_found {
        return Err(io::Error::other("there is no such name"));
    }
    String::from_utf8(output).map_err(io::Error::other)
}

/// Returns the output of a process, up to its end.
fn read_until(child: &mut Child, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut stdout = child.stdout.take().expect("it is piped");
    let mut output = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let millis = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        let timeout = PollTimeout::try_from(millis).expect("it is from 0 to i32::MAX");
        match poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(&stdout), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "getent takes too long")),
            Ok(_) => match stdout.read(&mut buffer)? {
                0 => return Ok(output),
                bytes => output.extend_from_slice(&buffer[..bytes]),
            },
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
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
        assert!(host("localhost", None).unwrap().iter().all(IpAddr::is_loopback));
        assert_eq!(host("127.0.0.1", None).unwrap(), ["127.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(host("::1", None).unwrap(), ["::1".parse::<IpAddr>().unwrap()]);
        assert!(host("no.such.host.invalid", None).is_err());
        assert!(host("-h", None).is_err(), "a name that looks like an option is a name");
    }
}
