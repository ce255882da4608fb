//! What stands in etcd under the key of a result: a line of JSON that says whose it is, and then the row of pieces, as in a file of
//! output. Other programs may put anything there.

use serde::{Deserialize, Serialize};

use crate::cluster::{Content, OwnResult, ResultOf, RunUser, SharedResult};
use crate::daemon::sharers::Sharers;
use crate::output;
use crate::proto::Token;
use crate::proto::v2::ShortText;

/// The longest line, in bytes.
const HEAD_BYTES_MAX: usize = 2048;

#[derive(Serialize, Deserialize)]
struct Head {
    /// The hold.
    token: Token,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    for_all: bool,
    /// Why there is no row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    withheld: Option<ShortText>,
}

/// Returns the value that says this.
pub(super) fn encode(result: &OwnResult) -> Vec<u8> {
    let RunUser { uid, name, for_all } = result.user.clone();
    let withheld = result.content.as_ref().err().cloned();
    let head = Head { token: result.token, uid, name, for_all, withheld };
    let mut value = serde_json::to_vec(&head).expect("what is put has no part that JSON lacks");
    value.push(b'\n');
    value.extend_from_slice(result.content.as_deref().unwrap_or_default());
    value
}

/// Returns the result that a value is. `None`: it is none.
pub(super) fn decode(of: ResultOf, value: &[u8], sharers: &Sharers) -> Option<SharedResult> {
    let end = value.iter().take(HEAD_BYTES_MAX).position(|&byte| byte == b'\n')?;
    let (head, row) = (&value[..end], &value[end + 1..]);
    let Head { token, uid, name, for_all, withheld } = serde_json::from_slice(head).ok()?;
    let content: Content = match withheld {
        Some(why) => Err(why),
        None if output::is_short_row(row) => Ok(row.into()),
        None => return None,
    };
    let sharer = sharers.remote_number(uid, name.as_deref(), for_all);
    Some(SharedResult { of, token, sharer, content })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{SENT_BYTES_MAX, Stream, row};
    use crate::table::EVERY_USER;

    fn own(user: RunUser, content: Content) -> OwnResult {
        OwnResult { token: Token(7), user, content }
    }

    fn read(value: &[u8]) -> Option<SharedResult> {
        decode(ResultOf::Done, value, &Sharers::new(true))
    }

    #[test]
    fn what_one_host_writes_another_reads() {
        let row: Content = Ok(row(&[(Stream::Stdout, vec![b'\n'; SENT_BYTES_MAX])]).into());
        for content in [row, Ok(Vec::new().into()), Err("it is too long".into())] {
            let user = RunUser { uid: Some(5), ..RunUser::default() };
            let found = read(&encode(&own(user, content.clone()))).unwrap();
            assert_eq!(found, SharedResult { of: ResultOf::Done, token: Token(7), sharer: 6, content });
        }
        let named = RunUser { name: Some("a\n\"b".into()), ..RunUser::default() };
        let sharers = Sharers::new(false);
        let value = encode(&own(named, Err("".into())));
        let found = decode(ResultOf::Success, &value, &sharers).unwrap();
        assert_eq!(found.sharer, sharers.number(None, Some("a\n\"b")));
        let root = RunUser { uid: Some(0), for_all: true, ..RunUser::default() };
        assert_eq!(read(&encode(&own(root, Err("".into())))).unwrap().sharer, EVERY_USER);
    }

    #[test]
    fn what_no_host_writes_is_no_result() {
        let head = r#"{"token":7,"uid":5}"#;
        let long =
            [format!("{head}\n\x01\0\0\0\0\u{1}\0\x01").into_bytes(), vec![0; SENT_BYTES_MAX + 1]].concat();
        let padded = format!("{}{head}\n", " ".repeat(HEAD_BYTES_MAX));
        for value in [
            &b""[..],
            b"\n",
            head.as_bytes(),
            b"{}\n",
            b"[]\n",
            b"{\"token\":\"7\"}\n",
            b"{\"token\":-7}\n",
            format!("{head}\nrow").as_bytes(),
            format!("{head}\n\x01\0\0\0\0\0\0\x02x").as_bytes(),
            &long,
            padded.as_bytes(),
            &[0xff; 3_000_000],
        ] {
            assert_eq!(read(value), None, "{}", String::from_utf8_lossy(&value[..value.len().min(60)]));
        }
        assert!(read(format!("{head}\n").as_bytes()).is_some());
    }
}
