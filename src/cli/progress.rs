//! A bar that follows the engine's counters.

use std::sync::atomic::Ordering;

use super::Context;
use super::terminal::drawing;
use crate::replicate::Progress;

/// Awaits `work`, with a bar for as long as it runs: how much of the plan's runs lies behind.
pub(super) async fn shown<T>(
    context: &Context<'_>,
    what: &str,
    progress: &Progress,
    work: impl Future<Output = T>,
) -> T {
    let bar = context.terminal.progress(what);
    let draw = || {
        if let Some(plan) = progress.plan() {
            let position = progress.counters.position.load(Ordering::Relaxed);
            bar.set(plan.covered_below(position), plan.covered());
        }
    };
    drawing(work, draw).await
}
