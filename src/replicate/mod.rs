//! One volume's cycle: lineage, plan, state, checkpoint, commit, retention, verification.
//!
//! A cycle makes the target's HEAD equal to one source snapshot and then says so by a target snapshot of the same
//! name. Its durable steps, in their order, and what a crash between them leaves:
//!
//! | step | durable effect | a crash after it leaves |
//! |---|---|---|
//! | 1 | the intent: the snapshot's name in the target's state | an intent; the next run takes it up |
//! | 2 | the source snapshot | an unused source snapshot, known by the intent; the next run uses it |
//! | 3 | its id, and that HEAD gets dirty, in the state | the same, in flight: HEAD is not looked at any more |
//! | 4 | where HEAD was dirty for another reason: HEAD is rewound to the base | a dirty HEAD; rewound again |
//! | 5 | on a file: the statement "HEAD is snapshot B" is withdrawn | a dirty file, and no wrong "done" |
//! | 6 | the target's size | a dirty HEAD, in flight |
//! | 7 | writes; every few seconds: flush, then the checkpoint in the state | a dirty HEAD; goes on from the checkpoint |
//! | 8 | flush, then "applied" in the state | HEAD is the snapshot; only the commit is missing |
//! | 9 | **the target snapshot: the commit** | a commit not yet in the state; the next run enters it |
//! | 10 | the commit in the state, nothing in flight | older snapshots on both sides |
//! | 11 | older snapshots removed | |
//!
//! What is to be done is decided by [`lineage::decide`], a pure function of what is found on both sides; [`sync()`]
//! carries it out. The steps on the target are the same for [`receive()`] and stand in one place, `side.rs`.
//!
//! Every snapshot that poolshift makes is known by the state at any crash: by its name from step 1, by its id from step 3,
//! as a commit from step 10, as retired until it has been removed; [`orphans`] builds on that. What a target loses sight
//! of, and what is then only *unknown* there: the source's snapshots when the target starts over with another source
//! (`--full`), or is fed by [`receive()`] from then on, which has no source at hand to remove anything from.
//!
//! What others do meanwhile is looked for where it can be seen: a snapshot that is removed while it is read (RBD then
//! gives zeroes and no error), a target snapshot of the name in flight, a HEAD that was written behind an intent that
//! was never begun, or outside the objects of an interrupted delta. A write of somebody else to the target *within* the
//! objects of an interrupted delta, before the next run goes on, is not seen; `verify` finds it.

mod cycle;
mod dry_run;
mod error;
mod export;
mod gc;
mod head;
mod import;
mod last;
pub mod lineage;
mod look;
pub mod orphans;
mod receive;
mod report;
mod retention;
mod rewind;
mod send;
mod side;
pub mod state;
mod status;
#[cfg(test)]
mod tests;
mod verify;

pub use cycle::{NAME_PREFIX, Progress, Snapshotter, SyncOptions, is_automatic, name_of_now, sync, sync_held};
pub use dry_run::{DryRun, dry_run};
pub use error::{Conflict, ConflictKind, CycleError, Result};
pub use export::{ExportReport, export_diff};
pub use gc::{GcReport, Sides, find_orphans, gc, survey};
pub use head::HeadWatch;
pub use import::{ImportOptions, ImportReport, import_diff};
pub use last::{LastDelta, Moved, compare_delta, compare_heads, turn_back, turn_round};
pub use look::{Changed, Look, changed_since, look};
pub use receive::{ReceiveOptions, ReceiveReport, receive};
pub use report::{Pruned, Stages, SyncReport};
pub use retention::prune_held;
pub use send::{SendReport, SendRequest, send};
pub use side::point_still_there;
pub use status::{Status, StatusInFlight, StatusPoint, status};
pub use verify::{Compared, VerifyReport, compare_windows, digest, find, open_point, repair, verify};
