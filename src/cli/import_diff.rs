//! `poolshift import-diff`: applies a delta as rbd writes it.

use super::config::ImportDiff;
use super::exit::Exit;
use super::output::{self, Facts};
use super::values::human_bytes;
use super::{Context, Interrupted, images, progress, streams};
use crate::delta::stream::DiffReader;
use crate::pipeline::Limits;
use crate::replicate::{self, ImportOptions, ImportReport, Progress};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &ImportDiff) -> anyhow::Result<Exit> {
    let input = streams::input(&settings.input)?;
    let diff = tokio::select! {
        diff = DiffReader::open(input) => diff?,
        () = context.cancel.cancelled() => return Err(Interrupted.into()),
    };
    let target = images::existing_target(context, &settings.target, settings.state_dir.as_deref()).await?;
    for remark in target.remarks() {
        tracing::warn!("{remark}");
    }
    let limits = Limits { bytes: settings.memory, ..Limits::default() };
    let options = ImportOptions { limits, rewind: settings.rewind };
    let shown = Progress::default();
    let work = replicate::import_diff(target, diff, &options, &shown, &context.cancel);
    let report = progress::shown(context, "import-diff", &shown, work).await?;
    if settings.json {
        output::json(&report)?
    } else {
        facts(&report).print()?
    }
    Ok(Exit::Success)
}

fn facts(report: &ImportReport) -> Facts {
    let mut facts = Facts::default();
    facts.add("snapshot", report.snapshot.as_deref().unwrap_or("none (HEAD)"));
    facts.add("base", report.base.as_deref().unwrap_or("none"));
    if report.rewound {
        facts.add("before that", "the target's HEAD was brought back to the base");
    }
    facts.add("size", human_bytes(report.size));
    facts.add("written", human_bytes(report.moved.bytes_written));
    facts.add("zeroed", human_bytes(report.moved.bytes_zeroed));
    facts
}
