//! What belongs to a disk beside its bytes: its metadata goes with the server, there and back.
//!
//! It is carried while the server stands still, after the last delta and before the swap: what fails then leads to the way
//! back, and a server that runs on the other side, however it came to, has all of it. It is not carried where the changes
//! are discarded: the sources are as they were then. Each step may be the last one, and the next run does all of it again.

use std::collections::BTreeSet;

use futures::future::try_join_all;

use super::provider::{Precondition, Side, Verdict};
use super::server::{Result, Volume};
use super::sides::Sides;
use crate::failpoint::failpoint;
use crate::image::Disk;
use crate::image::metadata::{Metadata, change, parse_known, remarks, render_known};

/// Gives the side that the server arrives at the metadata of the one that it leaves.
pub(super) async fn carry(sides: Sides<'_>) -> Result<()> {
    try_join_all(sides.server.volumes.iter().map(|volume| carry_volume(volume, sides.to))).await?;
    failpoint!("cutover.metadata-carried");
    Ok(())
}

/// The metadata of a volume, of the side that is left and of the other one.
async fn both(volume: &Volume, to: Side) -> Result<(Metadata, Metadata)> {
    Ok(futures::try_join!(volume.on(to.other()).metadata(), volume.on(to).metadata())?)
}

async fn carry_volume(volume: &Volume, to: Side) -> Result<()> {
    let ((from, there), known) = futures::try_join!(both(volume, to), known_keys(volume.target.as_ref()))?;
    let change = change(&from, &there, &known);
    let carried = from.keys();
    if !change.is_empty() {
        // What is set now and removed on the side that is left before the next run is to go then.
        note(volume.target.as_ref(), &known, &known.union(&carried).cloned().collect()).await?;
        volume.on(to).change_metadata(&change).await?;
        return note(volume.target.as_ref(), &BTreeSet::new(), &carried).await;
    }
    note(volume.target.as_ref(), &known, &carried).await
}

/// The keys that both sides had when the metadata was carried last.
pub(super) async fn known_keys(target: &dyn Disk) -> Result<BTreeSet<String>> {
    Ok(parse_known(target.load_known_keys().await?.as_deref()))
}

async fn note(target: &dyn Disk, noted: &BTreeSet<String>, known: &BTreeSet<String>) -> Result<()> {
    let text = render_known(known);
    if render_known(noted) != text {
        target.store_known_keys(text.as_deref()).await?;
    }
    Ok(())
}

/// What a person should know of it before the server is stopped.
pub(super) async fn preconditions(volume: &Volume, to: Side) -> Result<Vec<Precondition>> {
    let (from, there) = both(volume, to).await?;
    let what = format!("metadata of {}", volume.on(to.other()).location());
    let told =
        |(warning, text)| Precondition::new(what.clone(), if warning { Verdict::Warning } else { Verdict::Ok }, text);
    Ok(remarks(&from, Some(&there)).into_iter().map(told).collect())
}
