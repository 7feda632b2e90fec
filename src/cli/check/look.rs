//! One volume: what its source and target are, and whether they go together.

use serde::Serialize;

use super::{Finding, Verdict};
use crate::cli::Context;
use crate::cli::cutover::look::hands_off;
use crate::cli::exit::Exit;
use crate::cli::images::{self, Source};
use crate::cli::values::human_bytes;
use crate::delta::{self, Method};
use crate::extent::total_length;
use crate::image::metadata;
use crate::image::rbd::{RbdImage, Transfer};
use crate::image::{Disk as _, ImageError, Point, SourceImage, TargetImage};
use crate::plan::{Server, Volume};
use crate::replicate::{self, CycleError};

/// What is said of the target of a server that was cut over.
const CUT_OVER: &str = "cut over";

/// What was found out of a volume.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Looked {
    /// The source's size, in bytes.
    pub(super) size: Option<u64>,
    /// What is allocated on the source, in bytes, at most: whole objects, or all of it where nothing tells.
    pub(super) allocated_bytes_at_most: Option<u64>,
    /// Whether the object map, or the file system, has told that.
    pub(super) allocated_is_known: bool,
    /// How many snapshots the source has.
    pub(super) snapshots: Option<usize>,
    /// Whose clone it is.
    pub(super) parent: Option<String>,
    /// How many clones of its snapshots there are; `None` where that can't be told.
    pub(super) dependents: Option<usize>,
    /// Who has it open for writing.
    pub(super) writers: Vec<String>,
    /// What the target is: `absent`, `empty`, or what `poolshift status` says of it: `behind`, `in-step`, `in-flight`,
    /// `conflict`; `cut over` if the server runs from there. `None` where it can't be told.
    pub(super) target_state: Option<&'static str>,
    /// What a first copy reads, in bytes, at most; 0 where only changes are missing.
    pub(super) first_copy_bytes: u64,
}

/// Looks at a volume. What fails is a finding.
pub(super) async fn look(context: &Context<'_>, server: &Server, volume: &Volume) -> (Looked, Vec<Finding>) {
    let (mut looked, mut findings) = (Looked::default(), Vec::new());
    let source = match images::source(context, &volume.source).await {
        Ok(source) => Some(source),
        Err(error) => {
            // The source of a server that was cut over has another name.
            let explained = match Exit::of(&error) {
                Exit::NotFound => hands_off(context, server).await,
                _ => Ok(None),
            };
            match explained {
                Ok(Some(reason)) => {
                    findings.push(Finding::new(Verdict::Ok, format!("{CUT_OVER}: {reason}")));
                    looked.target_state = Some(CUT_OVER);
                    return (looked, findings);
                }
                Ok(None) => {}
                Err(unread) => findings.push(failure(&unread)),
            }
            findings.push(failure(&error));
            None
        }
    };
    if let Some(source) = &source
        && let Err(error) = look_at_source(source, &mut looked, &mut findings).await
    {
        findings.push(Finding::failure(&error));
    }
    match images::target(context, &volume.target, None).await {
        Ok(None) => {
            if let Some(pool) = volume.target.pool() {
                let remarks = match images::connect(context, &context.config.target_ceph).await {
                    Ok(connector) => connector.qos_remarks(pool, Transfer::Write).await,
                    Err(error) => Err(error),
                };
                qos(remarks, &mut findings);
            }
            looked.target_state = Some("absent");
            looked.first_copy_bytes = looked.allocated_bytes_at_most.unwrap_or(0);
        }
        Ok(Some(target)) => {
            qos(target.rate_limits().await, &mut findings);
            if let Some(source) = &source
                && let Err(error) = look_at_both(source, target.as_ref(), &mut looked, &mut findings).await
            {
                findings.push(failure(&error.into()));
            }
        }
        Err(error) => findings.push(failure(&error)),
    }
    (looked, findings)
}

/// An error with what to do, whatever its type.
fn failure(error: &anyhow::Error) -> Finding {
    let image_error = error.chain().find_map(|cause| match cause.downcast_ref::<CycleError>() {
        Some(CycleError::Image(error)) => Some(error),
        _ => cause.downcast_ref::<ImageError>(),
    });
    match image_error {
        Some(error) => Finding::failure(error),
        None => Finding::new(Verdict::Error, format!("{error:#}")),
    }
}

async fn look_at_source(source: &Source, looked: &mut Looked, findings: &mut Vec<Finding>) -> Result<(), ImageError> {
    let image = source.image();
    if let Source::Rbd(rbd) = source {
        look_at_rbd(rbd, looked, findings).await?;
    } else {
        findings.extend(image.remarks().into_iter().map(|remark| Finding::new(Verdict::Warning, remark)));
    }
    let snapshots = image.snapshots().await?;
    let foreign = snapshots.iter().filter(|snapshot| !snapshot.name.starts_with(replicate::NAME_PREFIX)).count();
    if foreign > 0 {
        let text = format!("snapshots that poolshift did not name stay behind: {foreign}");
        findings.push(Finding::new(Verdict::Ok, text));
    }
    looked.snapshots = Some(snapshots.len());
    dependents(source, looked, findings).await;
    let view = image.view(&Point::Head).await?;
    looked.size = Some(view.size());
    let plan = delta::plan(view.as_ref(), None).await?;
    let is_file = matches!(source, Source::File(_));
    let allocated = match plan.method {
        Method::TwoLevel => plan.covered(),
        // A file system tells at once where its holes are; RBD would be asked for every object.
        _ if is_file => {
            let extents = delta::collect(delta::extents(view.clone(), &plan, image.layout(), 0)).await?;
            total_length(&extents.into_iter().map(|extent| extent.range).collect::<Vec<_>>())
        }
        _ => view.size(),
    };
    looked.allocated_bytes_at_most = Some(allocated);
    looked.allocated_is_known = is_file || plan.method == Method::TwoLevel;
    if !looked.allocated_is_known {
        let text = "how much of it is allocated is not known without its object map: all of it is assumed";
        findings.push(Finding::new(Verdict::Ok, text));
    }
    Ok(())
}

async fn look_at_rbd(rbd: &RbdImage, looked: &mut Looked, findings: &mut Vec<Finding>) -> Result<(), ImageError> {
    let obstacle = match rbd.obstacle() {
        Some(obstacle) => Some(obstacle.to_owned()),
        None => match rbd.read_only_because().await {
            Ok(because) => because.map(|(because, hint)| format!("{because}; {hint}")),
            Err(error) => {
                let text = format!("whether mirroring lets it be snapshotted is not known: {error}");
                findings.push(Finding::new(Verdict::Warning, text));
                None
            }
        },
    };
    match obstacle {
        Some(obstacle) => {
            findings.push(Finding::new(Verdict::Error, format!("the source can't be snapshotted: {obstacle}")))
        }
        None => findings.extend(rbd.remarks().into_iter().map(|remark| Finding::new(Verdict::Warning, remark))),
    }
    if let Some((detail, hint)) = rbd.snapshot_limit_reached().await? {
        findings.push(Finding::new(Verdict::Error, format!("no snapshot can be made of the source: {detail}; {hint}")));
    }
    qos(rbd.qos_remarks(Transfer::Read).await, findings);
    let writers = rbd.watchers().await?.into_iter().filter(|watcher| !watcher.is_own);
    looked.writers = writers.map(|watcher| format!("client.{} at {}", watcher.client, watcher.address)).collect();
    if !looked.writers.is_empty() {
        findings.push(Finding::new(Verdict::Ok, format!("in use by {}", looked.writers.join(", "))));
    }
    if let Some(parent) = rbd.parent().await? {
        let text = format!(
            "it is a clone of {}: up to {} are read from there, and the target does not depend on it",
            parent.snapshot,
            human_bytes(parent.overlap),
        );
        findings.push(Finding::new(Verdict::Ok, text));
        looked.parent = Some(parent.snapshot);
    }
    let remarks = metadata::remarks(&rbd.metadata().await?, None).into_iter();
    findings.extend(
        remarks.map(|(warning, text)| Finding::new(if warning { Verdict::Warning } else { Verdict::Ok }, text)),
    );
    if let Some(group) = rbd.group().await? {
        let text = format!(
            "it is a member of an rbd group (id {group}), and the target is not: add the target to a group after the \
             cutover: rbd group image add GROUP IMAGE"
        );
        findings.push(Finding::new(Verdict::Warning, text));
    }
    Ok(())
}

/// Limits of librbd's own, which may make a copy slow, or too slow.
fn qos(remarks: Result<Vec<String>, ImageError>, findings: &mut Vec<Finding>) {
    match remarks {
        Ok(remarks) => findings.extend(remarks.into_iter().map(|remark| Finding::new(Verdict::Warning, remark))),
        Err(error) => findings.push(Finding::new(Verdict::Warning, format!("its QoS limits are not known: {error}"))),
    }
}

/// Counts the clones of the source's snapshots, which keep the old pool from being emptied.
async fn dependents(source: &Source, looked: &mut Looked, findings: &mut Vec<Finding>) {
    let Source::Rbd(rbd) = source else { return };
    match rbd.relations().await {
        Ok(relations) => {
            let clones: usize = relations.snapshots.iter().map(|snapshot| snapshot.clones.len()).sum();
            looked.dependents = Some(clones);
            if clones > 0 {
                let text = format!(
                    "clones depend on it ({clones}), and it can't be removed before they are flattened; see poolshift deps \
                     {}",
                    rbd.location(),
                );
                findings.push(Finding::new(Verdict::Warning, text));
            }
        }
        // They may be in pools that the user has no business in.
        Err(error) => findings.push(Finding::new(Verdict::Warning, format!("its clones are not known: {error}"))),
    }
}

async fn look_at_both(
    source: &Source,
    target: &dyn TargetImage,
    looked: &mut Looked,
    findings: &mut Vec<Finding>,
) -> Result<(), CycleError> {
    let image = source.image();
    if image.identity() == target.identity() {
        let text = format!("source and target are the same image, {}; name another target", image.identity());
        findings.push(Finding::new(Verdict::Error, text));
        return Ok(());
    }
    let status = replicate::status(image.as_ref(), target).await?;
    if let Some(conflict) = status.conflict {
        findings.push(Finding::new(Verdict::Error, format!("{}: {conflict}", target.location())));
    }
    if let Some(owner) = status.lease {
        findings.push(Finding::new(Verdict::Warning, format!("{owner} works on the target; let it end first")));
    }
    findings.extend(target.remarks().into_iter().map(|remark| Finding::new(Verdict::Warning, remark)));
    let begun = status.last_commit.is_some() || status.state == "conflict";
    looked.target_state = Some(if status.state == "never-synced" { "empty" } else { status.state });
    if !begun {
        // What an interrupted first copy has done is behind its checkpoint.
        let done = status.in_flight.map_or(0, |in_flight| in_flight.progress_to);
        looked.first_copy_bytes = match looked.size.filter(|_| done > 0) {
            None => looked.allocated_bytes_at_most.unwrap_or(0),
            Some(size) => looked.allocated_bytes_at_most.unwrap_or(0).min(size.saturating_sub(done)),
        };
    }
    Ok(())
}
