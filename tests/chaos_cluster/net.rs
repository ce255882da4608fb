//! The network between the hosts: a namespace for each, joined by a pair of virtual interfaces to a bridge, which has one
//! too, so that nothing of it is seen by the machine's own network. All are removed when it is dropped.

use std::sync::atomic::{AtomicU32, Ordering};

use nix::unistd::Uid;

use crate::etcd_harness::Place;
use crate::harness::tool;

/// The hosts' network, of the range that is set aside for tests of networks (RFC 2544).
const NETWORK: &str = "198.18.77";

pub struct Net {
    /// The prefix of the namespaces' names, which no other namespaces have.
    name: String,
    hosts: usize,
}

/// How a link is cut.
#[derive(Clone, Copy, Debug)]
pub enum Cut {
    /// The host has no network any more, and is told so.
    Interface,
    /// What it sends arrives nowhere.
    Port,
}

impl Net {
    /// Of so many hosts.
    pub fn new(hosts: usize) -> Net {
        assert!(Uid::effective().is_root(), "this test needs to be root, to make network namespaces");
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let net = Net { name: format!("kmx{}n{number}", std::process::id()), hosts };
        let bridge = net.bridge();
        net.ip(&format!("netns add {bridge}"));
        net.ip(&format!("-n {bridge} link add bridge type bridge forward_delay 0"));
        net.ip(&format!("-n {bridge} link set bridge up"));
        for host in 0..hosts {
            let Place { namespace, address } = net.place(host);
            net.ip(&format!("netns add {namespace}"));
            net.ip(&format!("-n {bridge} link add port{host} type veth peer name eth0 netns {namespace}"));
            net.ip(&format!("-n {bridge} link set port{host} master bridge up"));
            net.ip(&format!("-n {namespace} address add {address}/24 dev eth0"));
            net.ip(&format!("-n {namespace} link set lo up"));
            net.ip(&format!("-n {namespace} link set eth0 up"));
        }
        net
    }

    /// Where a host is.
    pub fn place(&self, host: usize) -> Place {
        Place { namespace: format!("{}h{host}", self.name), address: format!("{NETWORK}.{}", host + 1) }
    }

    fn bridge(&self) -> String {
        format!("{}b", self.name)
    }

    /// Takes a host from the network.
    pub fn cut(&self, host: usize, how: Cut) {
        self.set(host, how, "down");
    }

    /// Gives it back.
    pub fn restore(&self, host: usize, how: Cut) {
        self.set(host, how, "up");
    }

    /// Puts another host in the place of one, which has no network any more: it has the same addresses and knows of no connection.
    #[allow(dead_code, reason = "only some tests replace a host")]
    pub fn replace(&self, host: usize, by: usize) {
        self.cut(host, Cut::Port);
        let (old, new) = (self.place(host), self.place(by).namespace);
        let output = tool("ip").args(["-n", &old.namespace, "-o", "link", "show", "eth0"]).output().unwrap();
        let link = String::from_utf8_lossy(&output.stdout).into_owned();
        let hardware = link.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        self.ip(&format!("-n {new} link set eth0 down"));
        self.ip(&format!("-n {new} link set eth0 address {hardware}"));
        self.ip(&format!("-n {new} address add {}/24 dev eth0", old.address));
        self.ip(&format!("-n {new} link set eth0 up"));
    }

    fn set(&self, host: usize, how: Cut, state: &str) {
        match how {
            Cut::Interface => self.ip(&format!("-n {} link set eth0 {state}", self.place(host).namespace)),
            Cut::Port => self.ip(&format!("-n {} link set port{host} {state}", self.bridge())),
        }
    }

    fn ip(&self, args: &str) {
        let output = tool("ip").args(args.split(' ')).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "this test needs network namespaces; ip {args}: {said}");
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let names = (0..self.hosts).map(|host| self.place(host).namespace).chain([self.bridge()]);
        for name in names {
            // Where it could not even be made, there is nothing to remove.
            let _ = tool("ip").args(["netns", "del", &name]).output();
        }
    }
}
