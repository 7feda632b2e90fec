//! The fleet: hundreds of volumes, in step for weeks.
//!
//! ```text
//! plan ─▶ worker (one loop) ─▶ scheduler: which server now ─▶ job: open, look ─▶ group: one cycle of all its volumes
//!            │    ▲                                                                    │
//!            │    └──────────────── how it ended ◀─────────────────────────────────────┘
//!            ▼
//!         tracker: lag, rates, predictions, history ─▶ status, events ─▶ control: API, metrics, tables
//! ```
//!
//! [`scheduler`] and [`predict`] are pure. Whether a server is still as its plan has it, where it runs, is asked through
//! [`Opener::drift`]. [`group`] is the only part that touches images; a server's newest point, its
//! pauses and what is in flight are kept with the images themselves, so that a worker can be killed at any moment and
//! any other one goes on.

pub mod control;
mod drift;
mod events;
mod gate;
pub mod group;
mod images_only;
mod job;
pub mod predict;
pub mod quiesce;
pub mod scheduler;
mod shared;
pub mod status;
mod throttles;
mod tracker;
mod worker;

pub use drift::Drift;
pub use images_only::status_from_images;
pub(crate) use job::chain_text;
pub use shared::{CUTOVER_NOTE, Fleet, Images, Opener};
pub use worker::Worker;
