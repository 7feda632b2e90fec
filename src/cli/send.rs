//! `poolshift send`: a delta as a batch stream on standard output.

use super::config::{Send, Stream};
use super::exit::Exit;
use super::streams::Output;
use super::values::human_bytes;
use super::{Context, images, progress};
use crate::pipeline::Limits;
use crate::replicate::{self, Progress, SendRequest};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Send) -> anyhow::Result<Exit> {
    let mut output = Output::new(&Stream::Standard)?;
    let source = images::source(context, &settings.source).await?.image();
    for remark in source.remarks() {
        tracing::warn!("{remark}");
    }
    let request = SendRequest {
        to: settings.source.snapshot().map(str::to_owned),
        from: settings.from.as_ref().map(|name| name.as_str().to_owned()),
        compression: settings.compress.resolve(true),
        limits: Limits { bytes: settings.memory, ..Limits::default() },
    };
    let shown = Progress::default();
    let work = replicate::send(source, &request, output.writer(), &shown, &context.cancel);
    let report = progress::shown(context, "send", &shown, work).await?;
    output.finish().await?;
    tracing::info!(
        "sent {} from {}: {} of data, {} of zeroes",
        report.snapshot,
        report.base.as_deref().unwrap_or("nothing"),
        human_bytes(report.totals.data_bytes),
        human_bytes(report.totals.zero_bytes),
    );
    Ok(Exit::Success)
}
