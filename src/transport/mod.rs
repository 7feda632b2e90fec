//! How batches get from the reader to the applier: within one process, or through a pipe.

mod in_process;
pub mod pipe;

pub use in_process::in_process;
