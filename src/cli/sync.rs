//! `poolshift sync`: one cycle.

use super::config::{StartOver, Sync};
use super::exit::Exit;
use super::output::{self, Facts};
use super::values::human_bytes;
use super::{Context, images, progress};
use crate::cutover::CutoverError;
use crate::fleet::CUTOVER_NOTE;
use crate::image::TargetImage;
use crate::pipeline::Limits;
use crate::replicate::lineage::Request;
use crate::replicate::{self, DryRun, Progress, SyncOptions, SyncReport};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, sync: &Sync) -> anyhow::Result<Exit> {
    if sync.dry_run {
        let plan = plan(context, sync).await?;
        if sync.json {
            output::json(&plan)?
        } else {
            plan_facts(&plan).print()?
        }
        return Ok(Exit::Success);
    }
    let report = cycle(context, sync).await?;
    for remark in &report.remarks {
        tracing::warn!("{remark}");
    }
    if sync.json {
        output::json(&report)?
    } else {
        report_facts(&report, sync.explain).print()?
    }
    Ok(Exit::Success)
}

/// Carries one cycle through, with progress on the terminal. The target is created if it doesn't exist.
pub(super) async fn cycle(context: &Context<'_>, sync: &Sync) -> anyhow::Result<SyncReport> {
    let source = images::source(context, &sync.source).await?;
    let target = match images::target(context, &sync.target, sync.state_dir.as_deref()).await? {
        Some(target) => target,
        None => images::create(context, &sync.target, source.model().await?, &sync.create).await?,
    };
    images::refuse_same(&source, target.as_ref())?;
    refuse_cut_over(target.as_ref()).await?;
    let options = SyncOptions {
        request: request(sync),
        keep: sync.keep as usize,
        keep_for: None,
        protect: Vec::new(),
        compression: sync.compress.resolve(false),
        limits: Limits { bytes: sync.memory, ..Limits::default() },
        ..SyncOptions::default()
    };
    let shown = Progress::default();
    let work = replicate::sync(source.image(), target, &options, &shown, &context.cancel);
    Ok(progress::shown(context, "sync", &shown, work).await?)
}

/// A server that was cut over runs from its target: a cycle would write over what it has written.
async fn refuse_cut_over(target: &dyn TargetImage) -> anyhow::Result<()> {
    match target.load_note().await?.filter(|note| note.starts_with(CUTOVER_NOTE)) {
        None => Ok(()),
        Some(note) => Err(CutoverError::WrongState {
            server: target.location().to_owned(),
            problem: format!("belongs to a server that is {note}"),
            hint: "poolshift rollback brings that server back to its sources".into(),
        }
        .into()),
    }
}

async fn plan(context: &Context<'_>, sync: &Sync) -> anyhow::Result<DryRun> {
    let source = images::source(context, &sync.source).await?;
    let target = images::target(context, &sync.target, sync.state_dir.as_deref()).await?;
    if let Some(target) = &target {
        images::refuse_same(&source, target.as_ref())?;
    }
    Ok(replicate::dry_run(&source.image(), target.as_ref(), &request(sync)).await?)
}

fn request(sync: &Sync) -> Request {
    Request {
        name: sync.snapshot.as_ref().map(|name| name.as_str().to_owned()),
        automatic: false,
        full: sync.start_over != StartOver::No,
        adopt: sync.start_over == StartOver::Adopt,
    }
}

fn plan_facts(plan: &DryRun) -> Facts {
    let mut facts = Facts::default();
    facts.add("would do", plan.action);
    facts.add("base", plan.base.as_deref().unwrap_or("none"));
    let note = if plan.snapshot_exists { "" } else { " (would be created; the figures are HEAD's)" };
    facts.add("snapshot", format!("{}{note}", plan.snapshot));
    if plan.creates_target {
        facts.add("target", "would be created");
    }
    if plan.rewind {
        facts.add("before that", "the target's HEAD would be brought back to the base");
    }
    if let Some(method) = &plan.method {
        facts.add("delta", method);
    }
    facts.add("image", human_bytes(plan.size));
    facts.add("extents", plan.extents);
    facts.add("to read", human_bytes(plan.data_bytes));
    facts.add("zeroes", human_bytes(plan.zero_bytes));
    facts
}

fn report_facts(report: &SyncReport, explain: bool) -> Facts {
    let mut facts = Facts::default();
    let note = match (report.already_there, report.resumed) {
        (true, _) => " (was there already)",
        (false, true) => " (begun by an earlier run)",
        (false, false) => "",
    };
    facts.add("snapshot", format!("{}{note}", report.snapshot));
    if let Some(first) = &report.finished_first {
        facts.add("finished first", first);
    }
    facts.add("base", report.base.as_deref().unwrap_or("none"));
    if report.rewound {
        facts.add("before that", "the target's HEAD was brought back to the base");
    }
    if let (true, Some(method)) = (explain, &report.method) {
        facts.add("delta", method);
    }
    facts.add("extents", report.moved.extents);
    facts.add("data", human_bytes(report.moved.data_bytes));
    facts.add("zeroes", human_bytes(report.moved.zero_bytes));
    if report.moved.bytes_equal > 0 {
        facts.add("equal already", human_bytes(report.moved.bytes_equal));
    }
    facts.add("written", human_bytes(report.moved.bytes_written));
    match report.unchanged_while_read {
        Some(true) => facts.add("one moment", "yes: the source did not change while it was read"),
        Some(false) => facts.add("one moment", "no: the source may have changed while it was read"),
        None => &mut facts,
    };
    for left in &report.pruned.left {
        facts.add("not removed", left);
    }
    facts.add("time", time(report));
    facts
}

fn time(report: &SyncReport) -> String {
    let stages = &report.stages;
    format!(
        "{:.2} s to the commit (look {:.2}, snapshot {:.2}, plan {:.2}, transfer {:.2}, commit {:.2}), prune {:.2} s",
        stages.until_commit_seconds,
        stages.look_seconds,
        stages.source_snapshot_seconds,
        stages.plan_seconds,
        stages.transfer_seconds,
        stages.commit_seconds,
        stages.prune_seconds
    )
}
