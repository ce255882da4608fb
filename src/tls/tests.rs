//! Both ends against each other, with certificates that openssl has made.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::*;
use crate::exit::Exit;

/// An authority with a folder of its own.
struct Authority {
    folder: tempfile::TempDir,
}

impl Authority {
    fn new() -> Authority {
        let authority = Authority { folder: tempfile::tempdir().unwrap() };
        authority.openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=authority -keyout ca.key -out ca.pem",
        );
        authority
    }

    fn openssl(&self, args: &str) {
        let mut command = Command::new("openssl");
        let output = command.args(args.split(' ')).current_dir(self.folder.path()).output();
        let output = output.expect("this test needs openssl; tests/install-tools brings it");
        assert!(output.status.success(), "openssl {args}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Makes `NAME.pem` and `NAME.key`.
    fn sign(&self, name: &str, subject: &str, more: &str) {
        self.openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -CA ca.pem -CAkey ca.key \
             -addext basicConstraints=critical,CA:FALSE -subj {subject} -keyout {name}.key -out {name}.pem{more}"
        ));
    }

    /// Makes `NAME.pem` and `NAME.key` for localhost, which are good no more.
    fn expired(&self, name: &str) {
        fs::write(self.path("san"), "subjectAltName=DNS:localhost").unwrap();
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=old -keyout {name}.key -out {name}.csr"
        ));
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days -1 -extfile san -out {name}.pem"
        ));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn server_files(&self) -> ServerFiles {
        ServerFiles { cert: self.path("server.pem"), key: self.path("server.key"), client_ca: None }
    }

    fn client_files(&self) -> ClientFiles {
        ClientFiles { ca: Some(self.path("ca.pem")), ..ClientFiles::default() }
    }

    fn client_files_with(&self, name: &str) -> ClientFiles {
        ClientFiles {
            cert: Some(self.path(&format!("{name}.pem"))),
            key: Some(self.path(&format!("{name}.key"))),
            ..self.client_files()
        }
    }
}

fn with_server() -> Authority {
    let authority = Authority::new();
    authority.sign("server", "/CN=server", " -addext subjectAltName=DNS:localhost,IP:127.0.0.1");
    authority
}

/// A daemon that sends back what it is sent, `step` bytes at a time, and returns how its session ended.
fn echo(tls: &ServerTls, mut socket: UnixStream, step: usize) -> JoinHandle<Result<ServerSession, Error>> {
    let mut session = tls.begin().unwrap();
    std::thread::spawn(move || {
        let mut buffer = vec![0; step];
        loop {
            let bytes = socket.read(&mut buffer).unwrap_or(0);
            let mut plaintext = Vec::new();
            let stream = session.receive(&buffer[..bytes], &mut plaintext);
            // The client may be gone.
            let _ = session.send(&plaintext, &mut socket);
            if stream? == Stream::Ended || bytes == 0 {
                session.end();
                let _ = session.flush(&mut socket);
                return Ok(session);
            }
        }
    })
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn read(stream: &mut ClientStream, bytes: usize) -> Result<Vec<u8>, Error> {
    let mut plaintext = Vec::new();
    while plaintext.len() < bytes {
        match stream.try_read(&mut plaintext)? {
            Some(0) => return Err(Error::Closed),
            Some(_) => {}
            None => std::thread::yield_now(),
        }
    }
    Ok(plaintext)
}

/// Connects, sends a line and reads it back; returns how that went for the client, and for the daemon.
fn converse(
    tls: &ServerTls,
    files: &ClientFiles,
    host: &str,
    step: usize,
) -> (Result<Vec<u8>, Error>, Result<ServerSession, Error>) {
    let (near, far) = UnixStream::pair().unwrap();
    let daemon = echo(tls, far, step);
    let client = ClientStream::connect(near.into(), files, host, soon()).and_then(|mut stream| {
        stream.write_all(b"hello\n", soon())?;
        read(&mut stream, 6)
    });
    (client, daemon.join().unwrap())
}

#[test]
fn both_ends_understand_each_other_however_the_bytes_arrive() {
    let authority = with_server();
    let tls = ServerTls::load(authority.server_files(), ClientCertificates::Optional).unwrap();
    for (host, step) in [("localhost", 16 * 1024), ("127.0.0.1", 1), ("localhost", 1000)] {
        let (client, daemon) = converse(&tls, &authority.client_files(), host, step);
        assert_eq!(client.unwrap(), b"hello\n");
        assert!(daemon.unwrap().names().is_none());
    }
}

#[test]
fn much_data_passes_and_no_buffer_of_the_session_grows() {
    let authority = with_server();
    let tls = ServerTls::load(authority.server_files(), ClientCertificates::Optional).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let daemon = echo(&tls, far, 16 * 1024);
    let mut stream =
        ClientStream::connect(near.into(), &authority.client_files(), "localhost", soon()).unwrap();
    let piece: Vec<u8> = (0..10_000_u32).map(|number| number as u8).collect();
    for _ in 0..100 {
        stream.write_all(&piece, soon()).unwrap();
        assert_eq!(read(&mut stream, piece.len()).unwrap(), piece);
    }
    drop(stream);
    daemon.join().unwrap().unwrap();
}

#[test]
fn a_daemon_with_a_wrong_certificate_is_not_trusted() {
    let authority = with_server();
    authority.expired("old");
    let old =
        ServerFiles { cert: authority.path("old.pem"), key: authority.path("old.key"), client_ca: None };
    let other = Authority::new();
    for (files, client, host, why) in [
        (authority.server_files(), authority.client_files(), "example.org", "not for example.org, but for"),
        (
            authority.server_files(),
            other.client_files(),
            "localhost",
            "not signed by the authority that it names",
        ),
        (old, authority.client_files(), "localhost", "has expired"),
    ] {
        let tls = ServerTls::load(files, ClientCertificates::Optional).unwrap();
        let error = converse(&tls, &client, host, 4096).0.unwrap_err();
        assert_eq!(error.exit(), Exit::NotPermitted);
        assert!(error.to_string().contains(why), "{error}");
    }
}

#[test]
fn a_client_is_known_by_the_names_in_its_certificate() {
    let authority = with_server();
    authority.sign(
        "a",
        "/O=x/CN=runner",
        " -addext subjectAltName=DNS:r.example,email:r@example,URI:spiffe://example/r",
    );
    authority.sign("b", "/O=x", " -addext subjectAltName=DNS:only.example");
    let files = ServerFiles { client_ca: Some(authority.path("ca.pem")), ..authority.server_files() };
    let tls = ServerTls::load(files, ClientCertificates::Required).unwrap();
    let names = |name: &str| {
        let (client, daemon) = converse(&tls, &authority.client_files_with(name), "localhost", 4096);
        assert_eq!(client.unwrap(), b"hello\n");
        daemon.unwrap().names().unwrap()
    };
    assert_eq!(names("a"), ["runner", "r.example", "r@example", "spiffe://example/r"]);
    assert_eq!(names("b"), ["only.example"]);
}

#[test]
fn a_client_without_a_good_certificate_is_told_so() {
    let authority = with_server();
    let other = Authority::new();
    other.sign("stranger", "/CN=runner", "");
    let files = ServerFiles { client_ca: Some(authority.path("ca.pem")), ..authority.server_files() };
    let tls = ServerTls::load(files, ClientCertificates::Required).unwrap();
    let stranger = ClientFiles { ca: Some(authority.path("ca.pem")), ..other.client_files_with("stranger") };
    for (client, why) in [
        (authority.client_files(), "wants a certificate"),
        (stranger, "not signed by the authority that it names"),
    ] {
        let (client, daemon) = converse(&tls, &client, "localhost", 4096);
        let error = client.unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
        assert_eq!(error.exit(), Exit::NotPermitted);
        assert_eq!(daemon.unwrap_err().exit(), Exit::NotPermitted);
    }
}

#[test]
fn what_is_no_tls_or_too_much_of_it_is_refused() {
    let authority = with_server();
    let tls = ServerTls::load(authority.server_files(), ClientCertificates::Optional).unwrap();
    let mut plaintext = Vec::new();
    for garbage in
        [&b"\0kmutex proto 2\n"[..], b"GET / HTTP/1.1\r\n\r\n", &[0x16, 3, 1, 0, 4, 1, 0, 0, 0], &[0x80; 64]]
    {
        let error = tls.begin().unwrap().receive(garbage, &mut plaintext).unwrap_err();
        assert_eq!(error.exit(), Exit::Protocol, "{error}");
    }
    // Half a message, again and again.
    let mut session = tls.begin().unwrap();
    let hello = [&[0x16, 3, 1, 0x3f, 0xfc, 1, 0, 0xff, 0xf0][..], &[0; 0x3ff8]].concat();
    let taken = (0..100).take_while(|_| session.receive(&hello, &mut plaintext).is_ok()).count();
    assert!(taken * hello.len() <= HANDSHAKE_BYTES_MAX, "it has taken {taken} times {} bytes", hello.len());
    assert!(plaintext.is_empty() && session.is_handshaking());
}

#[test]
fn an_answer_that_is_no_tls_is_named() {
    let authority = with_server();
    for (answer, exit) in
        [(&b"O"[..], Exit::Protocol), (b"{\"type\":\"hello\"}\n", Exit::Protocol), (b"", Exit::Unavailable)]
    {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(answer).unwrap();
        far.write_all(&[0; 16]).unwrap();
        if answer.is_empty() {
            far.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let files = authority.client_files();
        if answer.is_empty() {
            let (near, far) = UnixStream::pair().unwrap();
            far.shutdown(std::net::Shutdown::Write).unwrap();
            let error = ClientStream::connect(near.into(), &files, "localhost", soon()).unwrap_err();
            assert_eq!(error.exit(), exit, "{error}");
            continue;
        }
        let error = ClientStream::connect(near.into(), &files, "localhost", soon()).unwrap_err();
        assert_eq!(error.exit(), exit, "{error}");
    }
}

#[test]
fn a_daemon_that_says_nothing_is_given_up() {
    let authority = with_server();
    let (near, _far) = UnixStream::pair().unwrap();
    let deadline = Instant::now() + Duration::from_millis(20);
    let error =
        ClientStream::connect(near.into(), &authority.client_files(), "localhost", deadline).unwrap_err();
    assert!(matches!(error, Error::TimedOut), "{error}");
}

#[test]
fn new_files_are_used_from_the_next_session_on_and_bad_ones_are_not() {
    let authority = with_server();
    authority.sign("next", "/CN=next", " -addext subjectAltName=DNS:next.example");
    let mut tls = ServerTls::load(authority.server_files(), ClientCertificates::Optional).unwrap();
    assert!(!tls.reload_if_changed().unwrap());
    let replace = |from: &str, to: &str| fs::copy(authority.path(from), authority.path(to)).unwrap();

    replace("next.pem", "server.pem");
    let error = tls.reload_if_changed().unwrap_err();
    assert!(error.to_string().contains("the key does not belong to the certificate"), "{error}");
    assert!(!tls.reload_if_changed().unwrap(), "it is said once");
    converse(&tls, &authority.client_files(), "localhost", 4096).0.unwrap();

    replace("next.key", "server.key");
    assert!(tls.reload_if_changed().unwrap());
    converse(&tls, &authority.client_files(), "next.example", 4096).0.unwrap();
}

#[test]
fn what_is_wrong_with_a_file_is_said_with_its_option_and_name() {
    let authority = with_server();
    authority.openssl("ec -in server.key -aes128 -passout pass:secret -out encrypted.key");
    fs::write(authority.path("empty"), "").unwrap();
    let load = |cert: &str, key: &str, ca: &str| {
        let client_ca = Some(authority.path(ca));
        let files = ServerFiles { cert: authority.path(cert), key: authority.path(key), client_ca };
        let error = ServerTls::load(files, ClientCertificates::Optional).unwrap_err();
        assert_eq!(error.exit(), Exit::Usage);
        error.to_string()
    };
    let expect = |text: String, option: &str, name: &Path, why: &str| {
        assert!(
            text.contains(option) && text.contains(name.to_str().unwrap()) && text.contains(why),
            "{text}"
        );
    };
    expect(load("none", "server.key", "ca.pem"), "--tls-cert", Path::new("none"), "o such file");
    expect(load("empty", "server.key", "ca.pem"), "--tls-cert", Path::new("empty"), "no certificate in it");
    expect(load("server.pem", "empty", "ca.pem"), "--tls-key", Path::new("empty"), "no key in it");
    expect(
        load("server.pem", "encrypted.key", "ca.pem"),
        "--tls-key",
        Path::new("encrypted"),
        "is encrypted",
    );
    expect(load("server.pem", "ca.key", "ca.pem"), "--tls-key", Path::new("ca.key"), "does not belong");
    expect(
        load("server.pem", "server.key", "empty"),
        "--tls-client-ca",
        Path::new("empty"),
        "no certificate",
    );
}
