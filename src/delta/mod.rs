//! Deltas: which extents differ between two points in time of one image.
//!
//! [`plan`] says where to look, [`extents`] what is there. [`stream`] reads and writes deltas as the `rbd` tool does.

mod plan;
pub mod stream;

pub use plan::{Method, Plan, allocated_in_either, collect, extents, extents_of_both, plan};
