//! `poolshift flatten`: cuts clones loose from their parents.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::Serialize;

use super::config::Flatten;
use super::exit::Exit;
use super::output::{self, Facts};
use super::terminal::drawing;
use super::values::human_bytes;
use super::{Context, Interrupted, deps, images};
use crate::image::rbd::{FlattenCost, FlattenProgress, Flattened, ImageTree, RbdImage, RbdLink};
use crate::image::{ErrorKind, ImageError, SourceImage as _};

/// A clone to be flattened.
#[derive(Debug, Serialize)]
struct Planned {
    image: RbdLink,
    /// What it copies at most.
    #[serde(flatten)]
    cost: FlattenCost,
}

/// A clone that was flattened, or begun.
#[derive(Debug, Serialize)]
struct Done {
    image: RbdLink,
    #[serde(flatten)]
    flattened: Flattened,
}

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Flatten) -> anyhow::Result<Exit> {
    let image = images::rbd(context, &settings.image).await?;
    let planned = plan(&image, settings).await?;
    if settings.dry_run {
        return show_plan(&planned, settings.json);
    }
    let mut all_done = Vec::new();
    let mut stopped = false;
    for clone in planned {
        if context.cancel.is_cancelled() {
            stopped = true;
            break;
        }
        let done = flatten(context, settings, &image, clone).await?;
        stopped = !done.flattened.done;
        all_done.push(done);
        if stopped {
            break;
        }
    }
    if settings.json {
        output::json(&all_done)?;
    } else {
        show_done(&all_done)?;
    }
    if stopped { Err(Interrupted.into()) } else { Ok(Exit::Success) }
}

/// What is to be flattened, in order.
async fn plan(image: &RbdImage, settings: &Flatten) -> anyhow::Result<Vec<Planned>> {
    let planned = |clone: &ImageTree| Some(Planned { image: clone.image.clone(), cost: clone.relations.flatten? });
    if settings.children {
        let mut tree = image.tree().await?;
        if let Some(wanted) = &settings.snapshot {
            tree.snapshots.retain(|snapshot| snapshot.snapshot.user && snapshot.snapshot.name == wanted.as_str());
            if tree.snapshots.is_empty() {
                let missing = ImageError::new(ErrorKind::NotFound, image.location(), "flatten the clones");
                return Err(missing.detail(format!("it has no snapshot {:?}", wanted.as_str())).into());
            }
        }
        return Ok(tree.clones_deepest_first().into_iter().filter_map(planned).collect());
    }
    let Some(cost) = image.relations().await?.flatten else {
        let no_clone = ImageError::new(ErrorKind::Unsupported, image.location(), "flatten it");
        let hint = "its own clones are flattened with --children; poolshift deps shows them";
        return Err(no_clone.detail("it has no parent").hint(hint).into());
    };
    Ok(vec![Planned { image: image.link(), cost }])
}

fn show_plan(planned: &[Planned], json: bool) -> anyhow::Result<Exit> {
    if json {
        output::json(&planned)?;
        return Ok(Exit::Success);
    }
    let mut facts = Facts::default();
    for clone in planned {
        facts.add("would flatten", format!("{}, {}", clone.image, deps::cost_text(&clone.cost)));
    }
    let total = planned.iter().fold(0u64, |total, clone| total.saturating_add(clone.cost.bytes_at_most));
    facts.add("to copy", format!("at most {}", human_bytes(total)));
    facts.print()?;
    Ok(Exit::Success)
}

async fn flatten(context: &Context<'_>, settings: &Flatten, image: &RbdImage, clone: Planned) -> anyhow::Result<Done> {
    tracing::info!("flattening {}: {}", clone.image, deps::cost_text(&clone.cost));
    let opened = image.open_linked(&clone.image).await?;
    let shown = Arc::new(FlattenProgress::default());
    let bar = context.terminal.progress(&format!("flatten {}", clone.image));
    let draw = || {
        let total = shown.total.load(Ordering::Relaxed);
        if total > 0 {
            bar.set(shown.done.load(Ordering::Relaxed), total);
        }
    };
    let flattened = drawing(opened.flatten(settings.rate, &shown, &context.cancel), draw).await?;
    if let (Some(owner), false) = (&flattened.done_by, flattened.done) {
        tracing::warn!("the client at {owner} goes on flattening {}: it can't be told to stop", clone.image);
    }
    for snapshot in &flattened.bound_snapshots {
        tracing::warn!(
            "snapshot {snapshot} of {} still sees the parent, for want of deep-flatten: remove it to cut the link",
            clone.image
        );
    }
    Ok(Done { image: clone.image, flattened })
}

fn show_done(done: &[Done]) -> anyhow::Result<()> {
    let mut facts = Facts::default();
    if done.is_empty() {
        facts.add("flattened", "nothing: there are no clones");
    }
    for Done { image, flattened } in done {
        let copied = human_bytes(flattened.copied_bytes_at_most);
        let by = flattened.done_by.as_ref().map(|owner| format!(", by the client at {owner}")).unwrap_or_default();
        let key = if flattened.done { "flattened" } else { "stopped" };
        facts.add(key, format!("{image}, at most {copied} copied{by}"));
    }
    facts.print()
}
