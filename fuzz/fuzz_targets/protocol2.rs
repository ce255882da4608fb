//! Lines of protocol 2, any of them, from several clients in turn.
#![no_main]

mod table;

use kmutex::proto::v1::State;
use kmutex::proto::v2::{Request, decode_answer, decode_request, encode};
use kmutex::table::ClientId;
use libfuzzer_sys::fuzz_target;
use table::{CLIENTS, Checked};

fuzz_target!(|data: &[u8]| {
    let mut checked = Checked::new();
    for (number, line) in data.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let _ = decode_answer(line);
        let request = match decode_request(line) {
            Ok(request) => request,
            Err(error) => {
                // What is sent to the client is what a client understands.
                let mut answer = Vec::new();
                encode(&error, &mut answer);
                assert_eq!(decode_answer(&answer).unwrap(), error);
                continue;
            }
        };
        let mut again = Vec::new();
        encode(&request, &mut again);
        assert_eq!(decode_request(&again).unwrap(), request);

        let client = ClientId((number % usize::from(CLIENTS)) as u32);
        match (request, checked.table.state(client)) {
            (Request::Lock(asked), State::Idle) => checked.feed(|table, now, effects| {
                let _ = table.lock(now, client, None, asked, effects);
            }),
            (Request::Release { outcome }, _) => {
                checked.feed(|table, now, effects| table.release(now, client, outcome, effects));
            }
            (Request::Take, _) => checked.feed(|table, now, effects| table.take(now, client, effects)),
            (Request::Break { key }, _) => {
                checked.feed(|table, now, effects| table.break_lock(now, key.id(), effects));
            }
            (Request::Ping, _) => {
                checked.feed(|table, now, effects| table.disconnected(now, client, effects))
            }
            _ => {}
        }
    }
    checked.end();
});
