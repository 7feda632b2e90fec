//! The warm-up: cycles while the server runs, until the next one would be as small as the one before.

use std::time::{Duration, Instant};

use super::driver::Walk;
use super::proof;
use super::server::{CutoverError, Proof, Result};
use crate::fleet::group::{self, GroupEnd};
use crate::fleet::predict::CostModel;
use crate::replicate;
use crate::replicate::state::Commit;

/// At most so many cycles: a server that changes faster than it is carried does not get any closer by more of them.
const CYCLES_MAX: usize = 4;
/// A cycle of this length is mostly its two snapshots.
const SHORT: Duration = Duration::from_secs(3);

/// Carries over what has changed, until little is left, and proves it. The newest point of both sides is the base of the
/// last delta.
pub(super) async fn run(walk: &mut Walk<'_>) -> Result<()> {
    let mut model = CostModel::default();
    catch_up(walk, &mut model, walk.options.proof).await?;
    // Waiting for others has given the server time to change again.
    if walk.wait_for_turn().await? {
        catch_up(walk, &mut model, Proof::None).await?;
    }
    check_prediction(walk, &model).await
}

/// Carries over what has changed, and proves it; and so much of the rest as `proof` says.
async fn catch_up(walk: &mut Walk<'_>, model: &mut CostModel, proof: Proof) -> Result<()> {
    let (sides, options) = (walk.sides, walk.sides.group_options());
    let members = sides.members();
    let mut before = newest(&members).await?;
    let mut last: Option<Duration> = None;
    for cycle in 0..CYCLES_MAX {
        let begun = Instant::now();
        let GroupEnd::Committed(report) = group::run_held(&members, &options, walk.cancel).await? else { break };
        let took = begun.elapsed();
        let bytes = report.volumes.iter().map(|volume| volume.moved.bytes_read).sum();
        let transfer = report.volumes.iter().map(|volume| volume.stages.transfer_seconds + volume.stages.plan_seconds);
        model.observe(bytes, transfer.fold(0.0, f64::max));
        let points = newest(&members).await?;
        let begun = Instant::now();
        if walk.options.proof != Proof::None {
            proof::prove_cycle(sides, &before, &points, &mut walk.proved).await?;
            if cycle == 0 && proof != Proof::None {
                proof::prove_points(sides, &points, proof, &mut walk.proved).await?;
            }
        }
        // What took long, a cycle or its proof, gave the server time to change again.
        let settled = took <= SHORT || last.is_some_and(|last| took > last.mul_f64(0.8));
        if settled && begun.elapsed() <= SHORT {
            break;
        }
        (before, last) = (points, Some(took));
    }
    Ok(())
}

/// The newest commit of every volume; fewer where one has none.
async fn newest(members: &[group::Member]) -> Result<Vec<Commit>> {
    let mut newest = Vec::new();
    for member in members {
        let look = replicate::look(member.source.as_ref(), member.target.as_ref()).await?;
        newest.extend(look.base().cloned());
    }
    Ok(newest)
}

/// Refuses to go on where the outage would be too long.
async fn check_prediction(walk: &Walk<'_>, model: &CostModel) -> Result<()> {
    let Some(limit) = walk.options.max_outage else { return Ok(()) };
    let seen = group::look(&walk.sides.members()).await?;
    let changed: u64 = seen.iter().filter_map(|seen| seen.changed).sum();
    let pause = walk.server().provider.usual_pause().await.unwrap_or_default();
    let predicted = pause + Duration::from_secs_f64(model.predict(changed).unwrap_or_default().max(0.0));
    if predicted <= limit {
        return Ok(());
    }
    let how = format!("would be {:.1} s, over", predicted.as_secs_f64());
    Err(CutoverError::TooLong { server: walk.server().name.clone(), how, limit })
}
