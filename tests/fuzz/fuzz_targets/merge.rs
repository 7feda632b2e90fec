//! Two halves of any bytes as two diffs: what merging makes of them, a reader takes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use poolshift::delta::stream::{DiffReader, Record, merge};
use tokio::runtime::Builder;

async fn merge_halves(bytes: &[u8]) {
    let (first, second) = bytes.split_at(bytes.len() / 2);
    let (Ok(mut first), Ok(mut second)) = (DiffReader::open(first).await, DiffReader::open(second).await) else {
        return;
    };
    let mut merged = Vec::new();
    if merge(&mut first, &mut second, &mut merged).await.is_err() {
        return;
    }
    let mut reader = DiffReader::open(&merged[..]).await.expect("a merged diff is sound");
    assert_eq!(reader.header().size, second.header().size);
    while reader.next().await.expect("a merged diff is sound") != Record::End {}
}

fuzz_target!(|bytes: &[u8]| {
    let runtime = Builder::new_current_thread().build().expect("a runtime starts");
    runtime.block_on(merge_halves(bytes));
});
