//! `poolshift merge-diff`: two consecutive rbd diffs as one.

use super::config::MergeDiff;
use super::exit::Exit;
use super::streams::{self, Output};
use super::values::human_bytes;
use super::{Context, Interrupted};
use crate::delta::stream::{DiffReader, Merged, merge};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &MergeDiff) -> anyhow::Result<Exit> {
    let merged = tokio::select! {
        merged = work(settings) => merged?,
        () = context.cancel.cancelled() => return Err(Interrupted.into()),
    };
    tracing::info!(
        "merged {} to {}: {} of data, {} of zeroes",
        merged.from.as_deref().unwrap_or("nothing"),
        merged.to.as_deref().unwrap_or("HEAD"),
        human_bytes(merged.data_bytes),
        human_bytes(merged.zero_bytes),
    );
    Ok(Exit::Success)
}

async fn work(settings: &MergeDiff) -> anyhow::Result<Merged> {
    let mut first = DiffReader::open(streams::input(&settings.first)?).await?;
    let mut second = DiffReader::open(streams::input(&settings.second)?).await?;
    let mut output = Output::new(&settings.output)?;
    let merged = merge(&mut first, &mut second, output.writer()).await?;
    first.expect_nothing_more().await?;
    second.expect_nothing_more().await?;
    output.finish().await?;
    Ok(merged)
}
