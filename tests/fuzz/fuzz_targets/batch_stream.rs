//! Any bytes as a batch stream: refused, or sound in every way that a receiver relies on.

#![no_main]

use libfuzzer_sys::fuzz_target;
use poolshift::batch::{BATCH_MAX, Content, decode};
use poolshift::wire::{Message, StreamReader, WireError};
use tokio::runtime::Builder;

async fn read(bytes: &[u8]) -> Result<(), WireError> {
    let mut reader = StreamReader::open(bytes).await?;
    let size = reader.hello().to.size;
    let (mut sequence, mut end) = (0, 0);
    loop {
        let Message::Batch(encoded) = reader.next().await? else { return Ok(()) };
        assert_eq!(encoded.sequence, sequence);
        sequence += 1;
        for chunk in &encoded.chunks {
            assert!(chunk.range.offset() >= end && chunk.range.end() <= size);
            end = chunk.range.end();
        }
        let Ok(batch) = decode(encoded) else { continue };
        assert!(batch.data_bytes() <= BATCH_MAX);
        for chunk in &batch.chunks {
            if let Content::Data { bytes, .. } = &chunk.content {
                assert_eq!(bytes.len() as u64, chunk.range.length());
            }
        }
        drop(batch.verify());
    }
}

/// Makes the CRC of each frame right, as `proto/README.md` defines it: no fuzzer guesses those, and behind them is
/// where the work is.
fn seal(stream: &mut [u8]) {
    let mut rest = stream.get_mut(12..).unwrap_or_default();
    while rest.len() >= 16 {
        let u32_at = |at: usize| u32::from_le_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]) as usize;
        let (message_end, payload) = (16usize.saturating_add(u32_at(4)), u32_at(8));
        let Some(message) = rest.get(16..message_end) else { return };
        let mut crc = crc32fast::Hasher::new();
        crc.update(&rest[..12]);
        crc.update(message);
        let crc = crc.finalize();
        rest[12..16].copy_from_slice(&crc.to_le_bytes());
        rest = rest.get_mut(message_end.saturating_add(payload)..).unwrap_or_default();
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    seal(&mut bytes);
    let runtime = Builder::new_current_thread().build().expect("a runtime starts");
    drop(runtime.block_on(read(&bytes)));
});
