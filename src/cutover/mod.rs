//! The cutover: a server leaves its sources and goes on from its targets, in seconds, with a way back.
//!
//! ```text
//! Syncing ─▶ Converged ─▶ Quiescing ─▶ FinalDelta ─▶ Verifying ─▶ Swapping ─▶ Resuming ─▶ Committed
//!    └───────────┴────────────┴────────────┴──────────────┴────────────┴───────────┴──▶ RollingBack ─▶ RolledBack
//! ```
//!
//! The way back after the commit is the same walk with the sides exchanged.

pub mod journal;
pub mod phase;
pub mod provider;
mod server;

use tokio_util::sync::CancellationToken;

use journal::{Changes, Journal};
pub use server::{CutoverError, Observer, Options, PhaseTime, Proof, Readiness, Report, Result, Server, Volume};

/// What stands in the way, and how long it would take. Changes nothing.
pub async fn readiness(_server: &Server, _to: provider::Side, _options: &Options) -> Result<Readiness> {
    unimplemented!()
}

/// Brings a server over to its targets, or finishes what was begun. A failure before the commit brings it back, which is
/// an `Ok` with [`phase::Phase::RolledBack`]. `cancel` is heeded until the server is stopped, and brings it back after.
pub async fn cutover(
    _server: &Server,
    _options: &Options,
    _observer: &dyn Observer,
    _cancel: &CancellationToken,
) -> Result<Report> {
    unimplemented!()
}

/// Brings a server back to its sources, or finishes what was begun.
pub async fn rollback(
    _server: &Server,
    _changes: Changes,
    _options: &Options,
    _observer: &dyn Observer,
    _cancel: &CancellationToken,
) -> Result<Report> {
    unimplemented!()
}

/// The journal, if there is one.
pub async fn journal(_server: &Server) -> Result<Option<Journal>> {
    unimplemented!()
}
