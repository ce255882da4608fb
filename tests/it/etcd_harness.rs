//! An etcd of one's own: one member, or several, in a private folder, on loopback ports that were free, or each in a
//! network namespace of its own. All are killed when it is dropped; a failing test shows their logs.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kmutex::etcd::{Client, Config, Endpoint, TIMEOUT_DEFAULT};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Process, tool, wait_for, wait_until};

/// How many times other ports are tried, if another process has taken one meanwhile.
const STARTS_MAX: usize = 5;
/// How much of a member's log is shown.
const LOG_LINES_MAX: usize = 40;
/// The ports of a member that has a network of its own.
const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;
/// The administrator, once there are users.
pub const ROOT: &str = "root:root's password";

/// A cluster of etcd.
pub struct Etcd {
    folder: TempDir,
    members: Vec<Member>,
    is_tls: bool,
    has_users: bool,
    options: &'static [&'static str],
}

/// A network namespace (ip-netns(8)), and an address in it.
#[derive(Clone, Debug)]
pub struct Place {
    pub namespace: String,
    pub address: String,
}

impl Place {
    /// `NAME ARGS...` in the namespace.
    pub fn tool(&self, name: &str) -> Command {
        // Fails here if it is missing, and not in the namespace.
        let named = tool(name);
        let mut command = tool("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace)).arg(named.get_program());
        command
    }
}

struct Member {
    name: String,
    /// `None`: it is here, on the loopback address.
    place: Option<Place>,
    port: u16,
    peer_port: u16,
    /// `None`: it was killed.
    process: Option<Process>,
    is_stopped: bool,
}

impl Etcd {
    /// One member.
    pub fn single() -> Etcd {
        Etcd::start(|| free_ports(1), false)
    }

    /// One member, with these options.
    pub fn with(options: &'static [&'static str]) -> Etcd {
        Etcd::start_with(|| free_ports(1), false, options)
    }

    /// So many members.
    pub fn cluster(members: usize) -> Etcd {
        Etcd::start(|| free_ports(members), false)
    }

    /// A member in each of these places.
    pub fn spread(places: &[Place]) -> Etcd {
        let member = |(index, place): (usize, &Place)| Member {
            place: Some(place.clone()),
            ..Member::new(index, CLIENT_PORT, PEER_PORT)
        };
        Etcd::start(|| places.iter().enumerate().map(member).collect(), false)
    }

    /// One member that speaks only TLS, and only to clients with a certificate of its own authority. It can have users too:
    /// its gateway presents the server's certificate to the server, so that certificate is valid for both sides; and
    /// because a common name in a certificate is a user's name, which the gateway refuses, the certificates have none.
    pub fn tls() -> Etcd {
        Etcd::start(|| free_ports(1), true)
    }

    fn start(members: impl Fn() -> Vec<Member>, is_tls: bool) -> Etcd {
        Etcd::start_with(members, is_tls, &[])
    }

    fn start_with(members: impl Fn() -> Vec<Member>, is_tls: bool, options: &'static [&'static str]) -> Etcd {
        for _ in 0..STARTS_MAX {
            let folder = tempfile::tempdir().unwrap();
            if is_tls {
                make_certificates(&folder);
            }
            let mut etcd = Etcd { members: members(), folder, is_tls, has_users: false, options };
            (0..etcd.members.len()).for_each(|index| etcd.spawn(index));
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
        let member = &self.members[index];
        let name = &member.name;
        let log = File::options().create(true).append(true).open(self.log_path(index)).unwrap();
        let peers = self.members.iter().map(|it| format!("{}={}", it.name, it.peer_url()));
        let mut command = member.tool("etcd");
        command.current_dir(self.folder.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.args(["--logger=zap", "--log-outputs=stderr", "--name", name, "--data-dir", name]);
        let (client, peer) = (self.endpoint(index), member.peer_url());
        command.args([format!("--listen-client-urls={client}"), format!("--advertise-client-urls={client}")]);
        command.args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")]);
        command.args(["--initial-cluster", &peers.collect::<Vec<_>>().join(",")]);
        if member.place.is_some() {
            // One that was cut off does not depose the leader when it is back. From 3.5 on it is so anyway.
            command.arg("--pre-vote");
        }
        // Each login costs the member a hash. A strong one takes longer than a call may, where many tests run at a time.
        command.arg("--bcrypt-cost=4").args(self.options);
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

    fn endpoint(&self, index: usize) -> Endpoint {
        let scheme = if self.is_tls { "https" } else { "http" };
        let member = &self.members[index];
        format!("{scheme}://{}:{}", member.address(), member.port).parse().unwrap()
    }

    /// Where the members are, in their order.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        (0..self.members.len()).map(|index| self.endpoint(index)).collect()
    }

    /// The configuration of a client of it.
    pub fn config(&self) -> Config {
        let file = |name: &str| self.is_tls.then(|| self.file(name));
        let [ca, cert, key] = ["ca.pem", "client.pem", "client.key"].map(file);
        Config { endpoints: self.endpoints(), ca, cert, key, user: None, timeout: TIMEOUT_DEFAULT }
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
        let endpoint = [self.endpoint(index)];
        wait_until("a member of etcd to be back", || self.is_healthy(&endpoint));
    }

    /// Kills the only member and starts it again with other data: what `change` makes of its data directory, which is the
    /// path that it gets.
    pub fn replace_data(&mut self, change: impl FnOnce(&Path)) {
        assert_eq!(self.members.len(), 1);
        self.kill(0);
        let data = self.file(&self.members[0].name);
        change(&data);
        self.restart(0);
    }

    /// Kills all members and starts them again with other data: what `change` makes of each data directory. `between` is called
    /// while none of them runs.
    pub fn replace_all_data(&mut self, mut change: impl FnMut(&Path), between: impl FnOnce()) {
        let members = 0..self.members.len();
        members.clone().for_each(|index| self.kill(index));
        members.clone().for_each(|index| change(&self.file(&self.members[index].name)));
        between();
        members.for_each(|index| self.spawn(index));
        wait_until("etcd to be back", || {
            self.endpoints().iter().all(|endpoint| self.is_healthy(std::slice::from_ref(endpoint)))
        });
    }

    /// Copies the data directory of the only member, which is killed for that and started again.
    pub fn copy_data(&mut self, name: &str) -> PathBuf {
        let copy = self.file(name);
        self.replace_data(|data| copy_folder(data, &copy));
        copy
    }

    /// Restores a snapshot of the only member into a data directory.
    pub fn restore_snapshot(&self, snapshot: &Path, data: &Path) {
        let member = &self.members[0];
        let peer = member.peer_url();
        let mut command = self.etcdctl(&["snapshot", "restore"]);
        command.arg(snapshot).arg("--data-dir").arg(data).args(["--name", &member.name]);
        command.args(["--initial-cluster", &format!("{}={peer}", member.name)]);
        command.args(["--initial-advertise-peer-urls", &peer]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
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
        let args = ["endpoint", "status", "--write-out=json", "--command-timeout=2s"];
        let mut command = self.etcdctl_beside(index, &args);
        command.env("ETCDCTL_ENDPOINTS", self.endpoint(index).to_string());
        let status: Value = serde_json::from_slice(&command.output().unwrap().stdout).ok()?;
        let status = &status[0]["Status"];
        Some(status["leader"].as_u64()? == status["header"]["member_id"].as_u64()?)
    }

    /// `etcdctl ARGS...` with this etcd and no other; as the administrator, once there are users.
    pub fn etcdctl(&self, args: &[&str]) -> Command {
        self.etcdctl_beside(0, args)
    }

    /// The same, where that member is.
    pub fn etcdctl_beside(&self, index: usize, args: &[&str]) -> Command {
        let mut command = self.members[index].tool("etcdctl");
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

    /// From now on each client must log in: as the administrator, or as this user, who may read and write keys that begin
    /// with `prefix`.
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

impl Member {
    fn new(index: usize, port: u16, peer_port: u16) -> Member {
        let name = format!("m{index}");
        Member { name, place: None, port, peer_port, process: None, is_stopped: false }
    }

    fn address(&self) -> &str {
        self.place.as_ref().map_or("127.0.0.1", |place| &place.address)
    }

    fn peer_url(&self) -> String {
        format!("http://{}:{}", self.address(), self.peer_port)
    }

    /// One of etcd's programs where this member is, without the options that it would take from the environment.
    fn tool(&self, name: &str) -> Command {
        let mut command = self.place.as_ref().map_or_else(|| tool(name), |place| place.tool(name));
        for (variable, _) in std::env::vars_os() {
            if variable.as_encoded_bytes().starts_with(b"ETCD") {
                command.env_remove(variable);
            }
        }
        command
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
    let member = |(index, (client, peer)): (usize, &(TcpListener, TcpListener))| {
        Member::new(index, port(client), port(peer))
    };
    held.iter().enumerate().map(member).collect()
}

/// Copies a folder with its contents.
pub fn copy_folder(from: &Path, to: &Path) {
    let output = tool("cp").arg("-a").arg(from).arg(to).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
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
