//! Any bytes as a stream of any format.

#![no_main]

use libfuzzer_sys::fuzz_target;
use poolshift::wire::inspect;
use tokio::runtime::Builder;

fuzz_target!(|bytes: &[u8]| {
    let runtime = Builder::new_current_thread().build().expect("a runtime starts");
    drop(runtime.block_on(inspect(bytes)));
});
