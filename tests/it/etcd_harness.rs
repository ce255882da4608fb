//! An etcd of one's own: one member, or several, in a private folder, on loopback ports that were free. All are killed
//! when it is dropped; a failing test shows their logs.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use kmutex::etcd::{Client, Config, Endpoint};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Process, tool, wait_for, wait_until};

/// How many times other ports are tried, when somebody else has taken one meanwhile.
const STARTS_MAX: usize = 5;
/// How much of a member's log is shown.
const LOG_LINES_MAX: usize = 40;
/// The administrator, once there are users.
pub const ROOT: &str = "root:root's password";

/// A cluster of etcd.
pub struct Etcd {
    folder: TempDir,
    members: Vec<Member>,
    is_tls: bool,
    has_users: bool,
}

struct Member {
    name: String,
    port: u16,
    peer_port: u16,
    /// `None`: it was killed.
    process: Option<Process>,
    is_stopped: bool,
}

impl Etcd {
    /// One member.
    pub fn single() -> Etcd {
        Etcd::start(1, false)
    }

    /// So many members.
    pub fn cluster(members: usize) -> Etcd {
        Etcd::start(members, false)
    }

    /// One member that speaks TLS alone, and only to those who show a certificate of its own authority. Made so that it
    /// can have users too: its gateway shows the server's certificate to the server, so that has to be good for both
    /// sides; and a name in a certificate would be a user's name, which the gateway refuses.
    pub fn tls() -> Etcd {
        Etcd::start(1, true)
    }

    fn start(members: usize, is_tls: bool) -> Etcd {
        for _ in 0..STARTS_MAX {
            let folder = tempfile::tempdir().unwrap();
            if is_tls {
                make_certificates(&folder);
            }
            let mut etcd = Etcd { members: free_ports(members), folder, is_tls, has_users: false };
            (0..members).for_each(|index| etcd.spawn(index));
            // Either all of them are ready, or one has ended because its port is taken.
            let is_ready = wait_for("etcd", || match etcd.has_lost_one() {
                true => Some(false),
                false => etcd.is_healthy(&etcd.endpoints()).then_some(true),
            });
            if is_ready {
                return etcd;
            }
        }
        panic!("etcd does not start, after {STARTS_MAX} attempts");
    }

    fn spawn(&mut self, index: usize) {
        let Member { name, port, peer_port, .. } = &self.members[index];
        let log = File::options().create(true).append(true).open(self.log_path(index)).unwrap();
        let peers = self.members.iter().map(|it| format!("{}=http://127.0.0.1:{}", it.name, it.peer_port));
        let mut command = etcd_tool("etcd");
        command.current_dir(self.folder.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.args(["--logger=zap", "--log-outputs=stderr", "--name", name, "--data-dir", name]);
        let (client, peer) = (self.endpoint(*port), format!("http://127.0.0.1:{peer_port}"));
        command.args([format!("--listen-client-urls={client}"), format!("--advertise-client-urls={client}")]);
        command.args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")]);
        command.args(["--initial-cluster", &peers.collect::<Vec<_>>().join(",")]);
        if self.members.len() == 1 {
            // It elects itself, for which it needs not wait for long; and the least lease is shorter.
            command.args(["--heartbeat-interval=20", "--election-timeout=200"]);
        }
        if self.is_tls {
            command.args(["--cert-file=server.pem", "--key-file=server.key"]);
            command.args(["--client-cert-auth", "--trusted-ca-file=ca.pem"]);
        }
        self.members[index].process = Some(Process::spawn(&mut command));
    }

    fn has_lost_one(&mut self) -> bool {
        self.members.iter_mut().any(|member| !member.process.as_mut().unwrap().is_running())
    }

    /// True when each of these can read and write, for which there has to be a leader.
    fn is_healthy(&self, endpoints: &[Endpoint]) -> bool {
        let mut command = self.etcdctl(&["endpoint", "health", "--command-timeout=2s"]);
        command.env("ETCDCTL_ENDPOINTS", join(endpoints));
        command.output().unwrap().status.success()
    }

    fn endpoint(&self, port: u16) -> Endpoint {
        let scheme = if self.is_tls { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{port}").parse().unwrap()
    }

    /// Where the members are, in their order.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.members.iter().map(|member| self.endpoint(member.port)).collect()
    }

    /// The configuration of a client of it.
    pub fn config(&self) -> Config {
        let file = |name: &str| self.is_tls.then(|| self.file(name));
        let [ca, cert, key] = ["ca.pem", "client.pem", "client.key"].map(file);
        Config { endpoints: self.endpoints(), ca, cert, key, user: None }
    }

    /// A client of it.
    pub fn client(&self) -> Client {
        Client::new(&self.config()).unwrap()
    }

    /// A file in the private folder. With TLS these are there: ca, server, client, and other, which is an authority
    /// that this etcd does not know; each with the ending pem for the certificate, and key.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn log_path(&self, index: usize) -> PathBuf {
        self.file(&format!("{}.log", self.members[index].name))
    }

    /// Kills a member, as a power failure of its machine would.
    pub fn kill(&mut self, index: usize) {
        let mut process = self.members[index].process.take().expect("it runs");
        process.signal(Signal::SIGKILL);
        assert_eq!(process.wait(), 128 + 9);
    }

    /// Starts a member that was killed, with what it has on disk, and waits until it is one of the cluster again.
    pub fn restart(&mut self, index: usize) {
        assert!(self.members[index].process.is_none(), "it runs");
        self.spawn(index);
        let endpoint = [self.endpoint(self.members[index].port)];
        wait_until("a member of etcd to be back", || self.is_healthy(&endpoint));
    }

    /// Stops a member as a machine that hangs: its connections stay open, and nothing is answered.
    pub fn stop(&mut self, index: usize) {
        self.signal(index, Signal::SIGSTOP);
        self.members[index].is_stopped = true;
    }

    /// Lets a member go on that was stopped.
    pub fn cont(&mut self, index: usize) {
        self.signal(index, Signal::SIGCONT);
        self.members[index].is_stopped = false;
    }

    fn signal(&self, index: usize, signal: Signal) {
        self.members[index].process.as_ref().expect("it runs").signal(signal);
    }

    /// Which member leads, as one of those says that run. Waits until there is one.
    pub fn leader(&self) -> usize {
        wait_for("a leader", || self.running().find(|&index| self.is_leader(index) == Some(true)))
    }

    /// The members that run.
    pub fn running(&self) -> impl Iterator<Item = usize> {
        let runs = |&index: &usize| self.members[index].process.is_some() && !self.members[index].is_stopped;
        (0..self.members.len()).filter(runs)
    }

    fn is_leader(&self, index: usize) -> Option<bool> {
        let mut command = self.etcdctl(&["endpoint", "status", "--write-out=json", "--command-timeout=2s"]);
        command.env("ETCDCTL_ENDPOINTS", self.endpoint(self.members[index].port).to_string());
        let status: Value = serde_json::from_slice(&command.output().unwrap().stdout).ok()?;
        let status = &status[0]["Status"];
        Some(status["leader"].as_u64()? == status["header"]["member_id"].as_u64()?)
    }

    /// `etcdctl ARGS...` with this etcd and no other; as the administrator, once there are users.
    pub fn etcdctl(&self, args: &[&str]) -> Command {
        let mut command = etcd_tool("etcdctl");
        command.args(args).env("ETCDCTL_API", "3").env("ETCDCTL_ENDPOINTS", join(&self.endpoints()));
        command.stdin(Stdio::null());
        if self.is_tls {
            for (variable, name) in [("CACERT", "ca.pem"), ("CERT", "client.pem"), ("KEY", "client.key")] {
                command.env(format!("ETCDCTL_{variable}"), self.file(name));
            }
        }
        if self.has_users {
            command.env("ETCDCTL_USER", ROOT);
        }
        command
    }

    /// Runs `etcdctl ARGS...`, which must succeed, and returns what it prints.
    pub fn ctl(&self, args: &[&str]) -> String {
        let output = self.etcdctl(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// From now on whoever comes has to say who he is: the administrator, or this user, who may read and write what
    /// begins with `prefix`.
    pub fn enable_auth(&mut self, name: &str, password: &str, prefix: &str) {
        self.ctl(&["user", "add", ROOT]);
        self.ctl(&["user", "grant-role", "root", "root"]);
        self.ctl(&["role", "add", name]);
        self.ctl(&["role", "grant-permission", "--prefix=true", name, "readwrite", prefix]);
        self.ctl(&["user", "add", &format!("{name}:{password}")]);
        self.ctl(&["user", "grant-role", name, name]);
        self.ctl(&["auth", "enable"]);
        self.has_users = true;
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for (index, member) in self.members.iter().enumerate() {
            let log = fs::read_to_string(self.log_path(index)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(LOG_LINES_MAX)..].join("\n");
            eprintln!("--- the log of etcd's {} ---\n{last}\n---", member.name);
        }
    }
}

/// Members on ports that were free just now. All of them are held at once, so that none is found twice.
fn free_ports(members: usize) -> Vec<Member> {
    let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
    let held: Vec<_> = (0..members).map(|_| (bind(), bind())).collect();
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let member = |(index, (client, peer)): (usize, &(TcpListener, TcpListener))| Member {
        name: format!("m{index}"),
        port: port(client),
        peer_port: port(peer),
        process: None,
        is_stopped: false,
    };
    held.iter().enumerate().map(member).collect()
}

/// One of etcd's programs, without the options that it would take from the environment.
fn etcd_tool(name: &str) -> Command {
    let mut command = tool(name);
    for (variable, _) in std::env::vars_os() {
        if variable.as_encoded_bytes().starts_with(b"ETCD") {
            command.env_remove(variable);
        }
    }
    command
}

fn join(endpoints: &[Endpoint]) -> String {
    endpoints.iter().map(Endpoint::to_string).collect::<Vec<_>>().join(",")
}

/// What stands in each certificate. None has a common name.
const OPENSSL_CONFIG: &str = "
[req]
distinguished_name = name
[name]
[ca]
basicConstraints = critical, CA:TRUE
[server]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = serverAuth, clientAuth
subjectAltName = IP:127.0.0.1
[client]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = clientAuth
";

fn make_certificates(folder: &TempDir) {
    fs::write(folder.path().join("openssl.cnf"), OPENSSL_CONFIG).unwrap();
    let make = |name: &str, extensions: &str, signed: &[&str]| {
        let mut command = tool("openssl");
        command.current_dir(folder.path()).args(["req", "-x509", "-config", "openssl.cnf", "-days", "2"]);
        command.args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"]);
        command
            .args(["-subj", &format!("/O=kmutex's tests/OU={name}"), "-extensions", extensions])
            .args(signed);
        command.args(["-keyout", &format!("{name}.key"), "-out", &format!("{name}.pem")]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    };
    make("ca", "ca", &[]);
    make("other", "ca", &[]);
    make("server", "server", &["-CA", "ca.pem", "-CAkey", "ca.key"]);
    make("client", "client", &["-CA", "ca.pem", "-CAkey", "ca.key"]);
}
