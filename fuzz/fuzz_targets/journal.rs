//! A journal file with anything in it, as it is and with its checksums made right, restored into a table.
#![no_main]

mod table;

use std::time::Duration;

use kmutex::journal::{BootId, parse};
use libfuzzer_sys::fuzz_target;
use table::Checked;

const BOOT: BootId = *b"this very boot!!";
const RECORD_BYTES: usize = 88;

fn restore(bytes: &[u8]) {
    let loaded = parse(bytes, &BOOT);
    let mut checked = Checked::new();
    for record in &loaded.content.holds {
        assert!(loaded.last_token >= Some(record.held.token));
        checked.table.restore(record.granted, record.held);
    }
    for record in &loaded.content.holds {
        checked.feed(|table, now, effects| {
            table.limit_orphan(record.held.token, now.plus(Duration::from_millis(1)));
            table.orphan_ended(now, record.held.token, effects);
        });
    }
    checked.end();
}

fuzz_target!(|data: &[u8]| {
    restore(data);

    let mut header = [0; RECORD_BYTES];
    header[..16].copy_from_slice(b"kmutex journal1\n");
    header[16..32].copy_from_slice(&BOOT);
    let sum = crc32fast::hash(&header[..84]);
    header[84..].copy_from_slice(&sum.to_le_bytes());
    let mut right = header.to_vec();
    for record in data.chunks(RECORD_BYTES) {
        let mut record = record.to_vec();
        if let Some((sum, rest)) = record.split_first_chunk_mut::<4>() {
            *sum = crc32fast::hash(rest).to_le_bytes();
        }
        right.extend(record);
    }
    restore(&right);
});
