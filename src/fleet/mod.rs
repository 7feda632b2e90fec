//! The fleet: hundreds of volumes, in step for weeks.

pub mod control;
pub mod predict;
pub mod scheduler;
pub mod status;
