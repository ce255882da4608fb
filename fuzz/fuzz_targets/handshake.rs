//! What arrives before a TLS handshake and in it, in pieces: none of it means anything, and there is an end to it.
#![no_main]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use kmutex::proto::v1::foreign;
use kmutex::tls::{ClientCertificates, HANDSHAKE_BYTES_MAX, ServerFiles, ServerTls, Stream, is_hello};
use libfuzzer_sys::fuzz_target;

static TLS: LazyLock<ServerTls> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("kmutex-fuzz-tls.{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the folder for temporary files can be written");
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| folder.join(name));
    make_certificate(&cert, &key);
    let files = ServerFiles { cert: cert.clone(), key, client_ca: Some(cert) };
    let tls = ServerTls::load(files, ClientCertificates::Optional).expect("the certificate is good");
    let _ = std::fs::remove_dir_all(folder);
    tls
});

fn make_certificate(cert: &Path, key: &PathBuf) {
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
    openssl.args(["-subj", "/CN=fuzz", "-keyout"]).arg(key).arg("-out").arg(cert);
    let output = openssl.output().expect("openssl is needed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fuzz_target!(|data: &[u8]| {
    let Some((&size, data)) = data.split_first() else { return };
    if data.is_empty() {
        return;
    }
    let _ = (foreign(data), is_hello(data));
    let mut session = TLS.begin().expect("the configuration is good");
    let (mut plaintext, mut received) = (Vec::new(), 0);
    for piece in data.chunks(usize::from(size) + 1).cycle() {
        let stream = session.receive(piece, &mut plaintext);
        received += piece.len();
        assert!(plaintext.is_empty() && session.is_handshaking(), "no bytes are a whole handshake");
        assert!(session.has_begun());
        session.flush(&mut Vec::new()).expect("memory takes what is written");
        match stream {
            Ok(Stream::Open) => assert!(received <= HANDSHAKE_BYTES_MAX, "the handshake never ends"),
            Ok(Stream::Ended) | Err(_) => return,
        }
    }
});
