//! What a client says of itself, and the file of names that it is compared with, with anything in either.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use kmutex::auth::AuthFile;
use kmutex::proto::Key;
use kmutex::proto::v2::{Answer, Request, decode_answer, decode_request, encode};
use libfuzzer_sys::fuzz_target;

static FILE: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::temp_dir().join(format!("kmutex-fuzz-auth.{}", std::process::id())));

/// One message, as the daemon reads it.
fn message(line: &[u8]) {
    let Ok(Request::Auth { name, secret }) = decode_request(line) else { return };
    let shown = format!("{secret:?}");
    assert_eq!(shown, "Secret(…)", "a secret is never shown");
    let mut again = Vec::new();
    encode(&Request::Auth { name: name.clone(), secret: secret.clone() }, &mut again);
    assert_eq!(decode_request(&again), Ok(Request::Auth { name, secret }));
}

/// The file of names, and what its names may do.
fn file(text: &[u8]) {
    std::fs::write(&*FILE, text).expect("the folder for temporary files can be written");
    let file = match AuthFile::load(&FILE) {
        Ok(file) => file,
        Err(error) => {
            assert!(!error.to_string().contains('\n'), "an error is one line");
            return;
        }
    };
    let text = std::str::from_utf8(text).expect("another file is refused");
    for name in text.lines().filter_map(|line| line.split_whitespace().next()) {
        let Some(rights) = file.find(name) else { continue };
        let Ok(key) = Key::new(name) else { continue };
        // What the hash of a key permits, the key permits too.
        assert!(!rights.may_lock_by_id(key.id()) || rights.may_lock(&key));
        rights.is_admin();
    }
}

fuzz_target!(|data: &[u8]| {
    data.split_inclusive(|&byte| byte == b'\n').for_each(message);
    file(data);
    let mut welcome = Vec::new();
    encode(&Answer::Welcome, &mut welcome);
    assert_eq!(decode_answer(&welcome), Ok(Answer::Welcome));
});
