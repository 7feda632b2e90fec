//! `poolshift export-diff`: a delta as rbd writes it.

use super::config::ExportDiff;
use super::exit::Exit;
use super::streams::Output;
use super::values::human_bytes;
use super::{Context, images, output, progress};
use crate::pipeline::Limits;
use crate::replicate::{self, Progress};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &ExportDiff) -> anyhow::Result<Exit> {
    let mut diff = Output::new(&settings.output)?;
    let source = images::source(context, &settings.source).await?.image();
    for remark in source.remarks() {
        tracing::warn!("{remark}");
    }
    let points = (settings.from.as_ref().map(|name| name.as_str()), settings.source.snapshot());
    let limits = Limits { bytes: settings.memory, ..Limits::default() };
    let shown = Progress::default();
    let work = replicate::export_diff(source, points, limits, diff.writer(), &shown, &context.cancel);
    let report = progress::shown(context, "export-diff", &shown, work).await?;
    diff.finish().await?;
    if settings.json {
        output::json(&report)?;
    }
    tracing::info!(
        "exported {} from {} to {}: {} of data, {} of zeroes",
        report.snapshot.as_deref().unwrap_or("HEAD"),
        report.base.as_deref().unwrap_or("nothing"),
        settings.output,
        human_bytes(report.data_bytes),
        human_bytes(report.zero_bytes),
    );
    Ok(Exit::Success)
}
