//! Certificates for tests, made by openssl, and daemons that use them.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::harness::{Daemon, tool};

/// An authority with a folder of its own, and a certificate `server` for localhost that it has signed.
pub struct Authority {
    folder: TempDir,
}

impl Authority {
    pub fn new() -> Authority {
        let authority = Authority { folder: tempfile::tempdir().unwrap() };
        authority.openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=authority -keyout ca.key -out ca.pem",
        );
        authority.issue("server", "/CN=server", "DNS:localhost,IP:127.0.0.1");
        authority
    }

    pub fn openssl(&self, args: &str) {
        let output = tool("openssl").args(args.split(' ')).current_dir(self.folder.path()).output().unwrap();
        assert!(output.status.success(), "openssl {args}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Makes `NAME.pem` and `NAME.key`.
    pub fn issue(&self, name: &str, subject: &str, alternative_names: &str) {
        let names = match alternative_names {
            "" => String::new(),
            names => format!(" -addext subjectAltName={names}"),
        };
        self.openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -CA ca.pem -CAkey ca.key \
             -addext basicConstraints=critical,CA:FALSE -subj {subject} -keyout {name}.key -out {name}.pem{names}"
        ));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().into()
    }

    /// A daemon with a TLS port, and these options besides.
    pub fn daemon(&self, options: &[&str]) -> Daemon {
        let [cert, key] = ["server.pem", "server.key"].map(|name| self.text(name));
        let tls = ["--sock", "tls://localhost:0", "--tls-cert", &cert, "--tls-key", &key];
        Daemon::with(&[&tls, options].concat())
    }

    /// The options of a client that trusts this authority.
    pub fn trust(&self, daemon: &Daemon) -> Vec<String> {
        vec!["--sock".into(), tls_sock(daemon), "--tls-ca".into(), self.text("ca.pem")]
    }

    /// The same, with a certificate to show.
    pub fn trust_as(&self, daemon: &Daemon, name: &str) -> Vec<String> {
        let mut options = self.trust(daemon);
        let certificate = [format!("{name}.pem"), format!("{name}.key")].map(|name| self.text(&name));
        for (option, path) in ["--tls-cert", "--tls-key"].into_iter().zip(certificate) {
            options.extend([option.to_string(), path]);
        }
        options
    }
}

/// The address of a daemon's TLS port.
pub fn tls_sock(daemon: &Daemon) -> String {
    format!("tls://localhost:{}", port(daemon, "serving on tls://127.0.0.1:"))
}

/// The address of a daemon's plain port on 127.0.0.1.
pub fn tcp_sock(daemon: &Daemon) -> String {
    format!("127.0.0.1:{}", port(daemon, "serving on 127.0.0.1:"))
}

fn port(daemon: &Daemon, before: &str) -> u16 {
    let line = daemon.wait_for_log(before);
    let (_, port) = line.rsplit_once(':').unwrap();
    port.parse().unwrap()
}

/// Writes a file that only its owner may read.
pub fn write_private(path: &Path, text: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    file.unwrap().write_all(text.as_bytes()).unwrap();
}
