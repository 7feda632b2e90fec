//! `poolshift verify`: both sides, byte for byte.

use super::config::{UsageError, Verify};
use super::exit::Exit;
use super::output::{self, Facts};
use super::values::human_bytes;
use super::{Context, Interrupted, images, progress};
use crate::pipeline::Limits;
use crate::replicate::{self, Progress, SyncOptions, VerifyReport};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Verify) -> anyhow::Result<Exit> {
    let report = compare(context, settings).await?;
    let report = match (report.equal, settings.repair) {
        (false, true) => {
            repair(context, settings, &report).await?;
            compare(context, settings).await?
        }
        _ => report,
    };
    if settings.json {
        output::json(&report)?
    } else {
        facts(settings, &report).print()?
    }
    Ok(if report.equal { Exit::Success } else { Exit::Different })
}

async fn compare(context: &Context<'_>, settings: &Verify) -> anyhow::Result<VerifyReport> {
    let source = images::source(context, &settings.source).await?.image();
    let target = images::target_to_read(context, &settings.target, settings.state_dir.as_deref()).await?;
    let (ours, our_point) = replicate::open_point(source.as_ref(), settings.source.snapshot()).await?;
    let (theirs, their_point) = replicate::open_point(target.as_ref(), settings.target.snapshot()).await?;
    let limits = Limits { bytes: settings.memory, ..Limits::default() };
    let shown = Progress::default();
    let work = replicate::verify((ours, source.layout()), theirs, limits, &shown);
    let report = tokio::select! {
        report = progress::shown(context, "verify", &shown, work) => report?,
        () = context.cancel.cancelled() => return Err(Interrupted.into()),
    };
    replicate::point_still_there(source.as_ref(), &our_point).await?;
    replicate::point_still_there(target.as_ref(), &their_point).await?;
    Ok(report)
}

/// Rewrites what differs. The target's newest snapshot is withdrawn first and made anew at the end.
async fn repair(context: &Context<'_>, settings: &Verify, found: &VerifyReport) -> anyhow::Result<()> {
    tracing::warn!("{} differ: repairing {}", human_bytes(found.bytes_differing), settings.target);
    let source = images::source(context, &settings.source).await?;
    let target = images::existing_target(context, &settings.target, settings.state_dir.as_deref()).await?;
    images::refuse_same(&source, target.as_ref())?;
    if let (Some(ours), Some(theirs)) = (settings.source.snapshot(), settings.target.snapshot())
        && ours != theirs
    {
        let text = format!("--repair makes {theirs} of the target equal to {theirs} of the source, not to {ours}");
        return Err(UsageError(text).into());
    }
    let snapshot = match settings.target.snapshot() {
        Some(name) => name.to_owned(),
        None => match target.snapshots().await?.pop() {
            Some(newest) => newest.name,
            None => {
                let text = format!("{} has no committed snapshot to repair: use poolshift sync", settings.target);
                return Err(UsageError(text).into());
            }
        },
    };
    let options = SyncOptions { limits: Limits { bytes: settings.memory, ..Limits::default() }, ..Default::default() };
    let shown = Progress::default();
    let work = replicate::repair(source.image(), target, &snapshot, &options, &shown, &context.cancel);
    progress::shown(context, "repair", &shown, work).await?;
    Ok(())
}

fn facts(settings: &Verify, report: &VerifyReport) -> Facts {
    let mut facts = Facts::default();
    facts.add("result", if report.equal { "equal" } else { "DIFFERENT" });
    facts.add("source", &settings.source).add("target", &settings.target);
    if report.source_size == report.target_size {
        facts.add("size", human_bytes(report.source_size));
    } else {
        facts.add("size", format!("{} bytes against {} bytes", report.source_size, report.target_size));
    }
    facts.add("compared", human_bytes(report.bytes_compared));
    facts.add("digest", &report.digest);
    if !report.equal {
        facts.add("differing", human_bytes(report.bytes_differing));
        for range in &report.ranges {
            facts.add("at", format!("offset {}, {} bytes", range.offset(), range.length()));
        }
    }
    facts
}
