//! The proof that the copy is right, as much of it as possible while the server still runs.

use futures::future::try_join_all;
use futures::stream::{self, StreamExt};

use super::server::{CutoverError, Proof, Result, Volume};
use super::sides::Sides;
use crate::extent::{ByteRange, normalize};
use crate::image::{ChangedObjects, Point};
use crate::pipeline::Limits;
use crate::replicate::state::Commit;
use crate::replicate::{self, Compared, LastDelta, Progress};

/// How many places of a volume a sample looks at.
const SAMPLES: usize = 64;
/// How much it reads at each, in bytes.
const SAMPLE: u64 = 1 << 20;

/// What was compared so far, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Proved(pub(super) u64);

impl Proved {
    fn take(&mut self, volume: &Volume, found: Compared) -> Result<()> {
        self.0 += found.bytes;
        match found.first_difference {
            None => Ok(()),
            Some(range) => {
                Err(CutoverError::Different { volume: volume.disk.volume.clone(), range: range.to_string() })
            }
        }
    }
}

/// Proves points that both sides have, while the server runs: by a sample, or whole.
pub(super) async fn prove_points(sides: Sides<'_>, points: &[Commit], proof: Proof, proved: &mut Proved) -> Result<()> {
    for (volume, point) in sides.server.volumes.iter().zip(points) {
        let (ours, theirs) = (volume.on(sides.to.other()), volume.on(sides.to));
        let source = ours.view(&Point::Snapshot(point.on_source())).await?;
        let target = theirs.view(&Point::Snapshot(point.on_target())).await?;
        let found = match proof {
            Proof::None | Proof::Delta => return Ok(()),
            Proof::Sample => {
                let places = sample(match target.changed_objects(None).await? {
                    ChangedObjects::Runs(runs) => runs,
                    ChangedObjects::Unavailable { .. } => ByteRange::between(0, target.size()).into_iter().collect(),
                });
                let places = stream::iter([Ok(places)]).boxed();
                replicate::compare_windows(source, target, places, &Limits::default()).await?
            }
            Proof::Full => {
                let whole = (source, ours.layout());
                let report = replicate::verify(whole, target, Limits::default(), &Progress::default()).await?;
                Compared { bytes: report.bytes_compared, first_difference: report.ranges.first().copied() }
            }
        };
        replicate::point_still_there(ours.as_ref(), &Point::Snapshot(point.on_source())).await?;
        replicate::point_still_there(theirs.as_ref(), &Point::Snapshot(point.on_target())).await?;
        proved.take(volume, found)?;
    }
    Ok(())
}

/// Places in `runs`, at random, in ascending order.
fn sample(runs: Vec<ByteRange>) -> Vec<ByteRange> {
    let pieces: u64 = runs.iter().map(|run| run.length().div_ceil(SAMPLE)).sum();
    let wanted = usize::try_from(pieces).unwrap_or(usize::MAX).min(SAMPLES);
    let place = |_| {
        let mut number = fastrand::u64(..pieces);
        let run = runs.iter().find(|run| {
            let has = run.length().div_ceil(SAMPLE);
            let here = number < has;
            number -= if here { 0 } else { has };
            here
        })?;
        let start = run.offset() + number * SAMPLE;
        ByteRange::between(start, run.end().min(start + SAMPLE))
    };
    normalize((0..wanted).filter_map(place).collect())
}

/// Proves what a cycle has changed, at its end, while the server runs.
pub(super) async fn prove_cycle(sides: Sides<'_>, from: &[Commit], to: &[Commit], proved: &mut Proved) -> Result<()> {
    for ((volume, from), to) in sides.server.volumes.iter().zip(from).zip(to) {
        let (ours, theirs) = (volume.on(sides.to.other()).clone(), volume.on(sides.to).clone());
        let found = replicate::compare_delta(&(ours as _), &(theirs as _), from, to, &Limits::default()).await?;
        proved.take(volume, found)?;
    }
    Ok(())
}

/// Proves the last deltas, while the server stands still.
pub(super) async fn prove_last(sides: Sides<'_>, deltas: &[LastDelta], proved: &mut Proved) -> Result<()> {
    let found = try_join_all(deltas.iter().map(LastDelta::compare)).await?;
    for (volume, found) in sides.server.volumes.iter().zip(found) {
        proved.take(volume, found)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_lies_in_what_is_allocated_and_is_never_too_much() {
        let range = |from, to| ByteRange::between(from, to).unwrap();
        let runs = vec![range(0, 100), range(4 << 20, 6 << 20), range(1 << 40, (1 << 40) + (200 << 20))];
        for _ in 0..100 {
            let places = sample(runs.clone());
            assert!(!places.is_empty() && places.len() <= SAMPLES);
            for place in places {
                assert!(runs.iter().any(|run| run.offset() <= place.offset() && place.end() <= run.end()), "{place}");
            }
        }
        assert!(sample(Vec::new()).is_empty());
        assert_eq!(sample(vec![range(7, 9)]), [range(7, 9)]);
    }
}
