//! `poolshift gc`: removes what poolshift made for a plan's volumes and nothing needs any more.

use serde::Serialize;

use super::config::Gc;
use super::cutover::look::hands_off;
use super::cutover::open_stage;
use super::exit::Exit;
use super::fleet::{PlanImages, without_retyped};
use super::output::{self, Facts};
use super::{Context, Interrupted, images};
use crate::cutover::rehearsal::Leftovers;
use crate::cutover::{CutoverError, Observer};
use crate::image::ErrorKind;
use crate::observe::human::plain;
use crate::plan::Plan;
use crate::replicate::orphans::{Orphan, Why};
use crate::replicate::state::Side;
use crate::replicate::{self, GcReport, Sides};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Gc) -> anyhow::Result<Exit> {
    let plan = without_retyped(&context.terminal, Plan::load(&settings.plan)?);
    let plan_images = PlanImages::new(context, &plan);
    let context = plan_images.context();
    let pairs = open(&context, settings, &plan).await?;
    let known = replicate::survey(&pairs).await?;
    let (mut reports, mut failed) = (Vec::new(), Vec::new());
    let rehearsals = rehearsals(&context, settings, &plan, &mut failed).await?;
    for (source, target) in &pairs {
        if context.cancel.is_cancelled() {
            return Err(Interrupted.into());
        }
        let looked = match settings.remove {
            true => replicate::gc(source, target, &known, settings.unknown).await,
            false => replicate::find_orphans(source.as_ref(), target.as_ref(), &known).await,
        };
        match looked {
            Ok(report) => reports.push(report),
            // One that is being worked on, or broken, keeps the others from nothing.
            Err(error) => failed.push(format!("{}: {error}", target.location())),
        }
    }
    if settings.json {
        output::json(&serde_json::json!({ "volumes": reports, "rehearsals": rehearsals }))?;
    } else {
        show(&reports, &rehearsals, settings)?;
    }
    for failure in &failed {
        tracing::warn!("passed over: {failure}");
    }
    let stays = rehearsals.iter().any(|rehearsal| !rehearsal.not_removed.is_empty());
    let left = stays || !failed.is_empty() || reports.iter().any(|report| !report.removed.left.is_empty());
    Ok(if left { Exit::Failed } else { Exit::Success })
}

/// Opens both sides of every volume. One that has no target yet has nothing that poolshift made; a server that was cut
/// over needs what both sides have in common for its way back.
async fn open(context: &Context<'_>, settings: &Gc, plan: &Plan) -> anyhow::Result<Vec<Sides>> {
    let mut pairs = Vec::new();
    for server in &plan.servers {
        if let Some(reason) = hands_off(context, server).await? {
            tracing::warn!("server {} is passed over: {reason}", server.name);
            continue;
        }
        for volume in &server.volumes {
            let source = images::source(context, &volume.source).await?;
            let Some(target) = images::target(context, &volume.target, settings.state_dir.as_deref()).await? else {
                tracing::warn!("{} does not exist yet: volume {} is passed over", volume.target, volume.name);
                continue;
            };
            images::refuse_same(&source, target.as_ref())?;
            pairs.push((source.image(), target));
        }
    }
    Ok(pairs)
}

/// What a rehearsal that was killed has left of a server, and what came of removing it.
#[derive(Serialize)]
struct Rehearsal {
    #[serde(flatten)]
    left: Leftovers,
    removed: bool,
    not_removed: Vec<String>,
}

/// Finds, and where it is asked for removes, what rehearsals have left. One that is under way is left alone.
async fn rehearsals(
    context: &Context<'_>,
    settings: &Gc,
    plan: &Plan,
    failed: &mut Vec<String>,
) -> anyhow::Result<Vec<Rehearsal>> {
    let mut found = Vec::new();
    for server in &plan.servers {
        if context.cancel.is_cancelled() {
            return Err(Interrupted.into());
        }
        let looked = async {
            let Some(stage) = open_stage(context, server).await? else { return anyhow::Ok(None) };
            let left = stage.leftovers().await?;
            if left.is_empty() {
                return Ok(None);
            }
            let not_removed = if settings.remove { stage.clear(&left, &Silent).await } else { Vec::new() };
            Ok(Some(Rehearsal { left, removed: settings.remove && not_removed.is_empty(), not_removed }))
        };
        match looked.await {
            Ok(rehearsal) => found.extend(rehearsal),
            Err(error) => match error.downcast_ref() {
                Some(CutoverError::Image(image)) if matches!(image.kind, ErrorKind::Busy { .. }) => {
                    tracing::warn!("server {}: its rehearsal is left alone: {error:#}", server.name);
                }
                _ => failed.push(format!("server {}: {error:#}", server.name)),
            },
        }
    }
    Ok(found)
}

struct Silent;

impl Observer for Silent {}

fn show(reports: &[GcReport], rehearsals: &[Rehearsal], settings: &Gc) -> anyhow::Result<()> {
    let mut facts = Facts::default();
    let (mut proven, mut unknown) = (0, 0);
    for Rehearsal { left, removed, not_removed } in rehearsals {
        let by = left.by.as_deref().unwrap_or("a process that was killed");
        let stand_in = left.stand_in.iter().map(|name| format!("server {name}"));
        let what: Vec<String> = stand_in.chain(left.clones.iter().cloned()).collect();
        let what = plain(&format!("{}, of a rehearsal of {} by {by}", what.join(", "), left.server));
        facts.add(if *removed { "removed" } else { "left behind" }, what);
        for left in not_removed {
            facts.add("not removed", plain(left));
        }
        proven += 1;
    }
    for report in reports {
        for orphan in &report.orphans {
            let Orphan { side, id, name, why } = orphan;
            let image = if *side == Side::Source { &report.source } else { &report.target };
            let why = match why {
                Why::Retired => "no longer needed",
                Why::GivenUp => "begun and given up",
                Why::Unknown => "unknown: looks like poolshift's, known to no target in this plan",
            };
            *if orphan.why.is_proven() { &mut proven } else { &mut unknown } += 1;
            facts.add("orphan", format!("{image}@{name} (id {id}), {why}"));
        }
        for name in &report.removed.source {
            facts.add("removed", format!("{}@{name}", report.source));
        }
        for name in &report.removed.target {
            facts.add("removed", format!("{}@{name}", report.target));
        }
        for left in &report.removed.left {
            facts.add("not removed", left);
        }
    }
    let stays = rehearsals.iter().any(|rehearsal| !rehearsal.not_removed.is_empty());
    let next = match (settings.remove, proven, unknown) {
        (true, ..) if stays => "not all of it was removed: run it again",
        (_, 0, 0) => "nothing to remove",
        (false, 0, _) => "nothing that is poolshift's for sure; unknown ones go with --yes --unknown only",
        (false, ..) => "run again with --yes to remove them; unknown ones go with --unknown as well only",
        (true, _, unknown) if unknown > 0 && !settings.unknown => "unknown ones were left alone: see --unknown",
        (true, ..) => "done",
    };
    facts.add("result", next);
    facts.print()
}
