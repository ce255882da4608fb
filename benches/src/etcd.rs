//! An etcd of one's own: one member or several, on loopback ports that were free, in a temporary folder, with its default
//! settings. It ends when it is dropped.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use kmutex::etcd::{Client, Config, Endpoint, Range, TIMEOUT_DEFAULT};
use tempfile::TempDir;

use crate::{Result, fail};

const START_MAX: Duration = Duration::from_secs(30);

pub struct Etcd {
    members: Vec<Child>,
    /// For clients.
    ports: Vec<u16>,
    folder: TempDir,
}

impl Etcd {
    /// Returns when each of its members answers.
    pub fn start(members: usize) -> Result<Etcd> {
        let ports = free_ports(2 * members)?;
        let (ports, peer_ports) = ports.split_at(members);
        let mut etcd =
            Etcd { members: Vec::new(), ports: ports.into(), folder: tempfile::Builder::new().tempdir()? };
        let peer = |index: usize| format!("http://127.0.0.1:{}", peer_ports[index]);
        let all: Vec<String> = (0..members).map(|index| format!("m{index}={}", peer(index))).collect();
        for index in 0..members {
            let (name, peer, url) = (format!("m{index}"), peer(index), url(etcd.ports[index]));
            let mut command = Command::new("etcd");
            command.current_dir(etcd.folder.path()).args(["--name", &name, "--data-dir", &name]);
            command
                .args([format!("--listen-client-urls={url}"), format!("--advertise-client-urls={url}")])
                .args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")])
                .args(["--initial-cluster", &all.join(",")])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            etcd.members.push(command.spawn().map_err(|e| format!("etcd: {e}"))?);
        }
        etcd.ports.iter().try_for_each(|&port| ready(port))?;
        Ok(etcd)
    }

    /// Where all members are, as kmutex and etcdctl want it.
    pub fn urls(&self) -> String {
        self.ports.iter().map(|&port| url(port)).collect::<Vec<_>>().join(",")
    }

    /// A client that knows all members, as the daemon does.
    pub fn client(&self) -> Result<Client> {
        client(&self.ports)
    }

    /// How many requests clients have made so far, by method: messages, so that those of a stream count each.
    pub fn requests(&self) -> Result<BTreeMap<String, u64>> {
        let mut requests = BTreeMap::new();
        for &port in &self.ports {
            for line in metrics(port)?.lines() {
                let Some((labels, count)) = line
                    .strip_prefix("grpc_server_msg_received_total{")
                    .and_then(|rest| rest.split_once("} "))
                else {
                    continue;
                };
                let method = labels.split("grpc_method=\"").nth(1).and_then(|rest| rest.split('"').next());
                *requests.entry(method.unwrap_or(labels).to_string()).or_default() +=
                    count.parse::<f64>()? as u64;
            }
        }
        Ok(requests)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            // It may have ended by itself, which its user has noticed.
            let _ = member.kill();
            let _ = member.wait();
        }
    }
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

/// All of them are held at once, so that none is found twice.
fn free_ports(count: usize) -> Result<Vec<u16>> {
    let held: std::io::Result<Vec<_>> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect();
    held?.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

fn client(ports: &[u16]) -> Result<Client> {
    let endpoints: std::result::Result<Vec<Endpoint>, _> =
        ports.iter().map(|&port| url(port).parse()).collect();
    let endpoints = endpoints.map_err(|e| e.to_string())?;
    let config = Config { endpoints, ca: None, cert: None, key: None, user: None, timeout: TIMEOUT_DEFAULT };
    Client::new(&config).map_err(|e| e.to_string().into())
}

fn ready(port: u16) -> Result<()> {
    let (client, give_up) = (client(&[port])?, Instant::now() + START_MAX);
    while let Err(e) = client.range(&Range { key: b"ready".into(), ..Range::default() }) {
        if Instant::now() > give_up {
            return fail(format!("etcd does not come up: {e}"));
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn metrics(port: u16) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}
