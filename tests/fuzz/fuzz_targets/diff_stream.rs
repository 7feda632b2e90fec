//! Any bytes as an rbd diff: refused, or within the size that it states.

#![no_main]

use libfuzzer_sys::fuzz_target;
use poolshift::delta::stream::{DiffError, DiffReader, PIECE_MAX, Record};
use tokio::runtime::Builder;

async fn read(bytes: &[u8]) -> Result<(), DiffError> {
    let mut reader = DiffReader::open(bytes).await?;
    let size = reader.header().size;
    loop {
        match reader.next().await? {
            Record::Data { offset, bytes } => {
                assert!(!bytes.is_empty() && bytes.len() as u64 <= PIECE_MAX);
                assert!(offset + bytes.len() as u64 <= size);
            }
            Record::Zero(range) => assert!(range.end() <= size),
            Record::End => return reader.expect_nothing_more().await,
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let runtime = Builder::new_current_thread().build().expect("a runtime starts");
    drop(runtime.block_on(read(bytes)));
});
