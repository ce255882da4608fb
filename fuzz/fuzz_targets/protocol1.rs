//! Several clients of protocol 1 that send anything, in any pieces.
#![no_main]

mod table;

use kmutex::proto::Outcome;
use kmutex::proto::v1::{Request, decode};
use kmutex::table::ClientId;
use libfuzzer_sys::fuzz_target;
use table::{CLIENTS, Checked};

fuzz_target!(|data: &[u8]| {
    let mut checked = Checked::new();
    let mut inputs = vec![Vec::new(); CLIENTS.into()];
    let mut rest = data;
    // A byte that says who sends and how much, and what is sent.
    while let Some((&head, after)) = rest.split_first() {
        let (piece, after) = after.split_at(after.len().min(usize::from(head >> 3)));
        rest = after;
        let number = head % CLIENTS;
        let client = ClientId(number.into());
        let input = &mut inputs[usize::from(number)];
        input.extend_from_slice(piece);
        let mut left = input.as_slice();
        while let Some(request) = decode(checked.table.state(client), &mut left) {
            match request {
                Request::Lock(lock) => {
                    checked.feed(|table, now, effects| table.lock_v1(now, client, lock, effects));
                }
                Request::Release => {
                    checked.feed(|table, now, effects| table.release(now, client, Outcome::Unknown, effects))
                }
                Request::Violation => {
                    checked.feed(|table, now, effects| table.disconnected(now, client, effects));
                    left = &[];
                }
            }
        }
        assert!(left.len() < 16, "a whole message is not taken");
        let left = left.to_vec();
        *input = left;
    }
    checked.end();
});
