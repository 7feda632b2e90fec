//! Importing: rbd's diff stream is applied to a target.
//!
//! Nothing in such a stream says which image it is of, so that this is for targets that poolshift does not keep in step
//! itself: one that has a state is refused. What `rbd import-diff` does not check is checked here: that HEAD of the
//! target is what the stream starts from.

use std::sync::Arc;

use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use serde::Serialize;
use tokio::io::AsyncRead;
use tokio_util::sync::CancellationToken;

use crate::batch::{self, Batch, CHUNK_MAX, Chunk, Content};
use crate::delta::stream::{DiffHeader, DiffReader, Record};
use crate::image::{Snapshot, SnapshotSupport, TargetImage};
use crate::pipeline::{self, Applied, ApplyOptions, Budgets, Counted, Limits, Loaded, Permit};

use super::cycle::Progress;
use super::error::{Conflict, ConflictKind, CycleError, Result};
use super::rewind::{self, NoCheckpoint};
use super::side::{load_state, with_lease};

/// How many pieces of a stream make a batch at most.
const PIECES: usize = 256;

/// What was imported.
#[derive(Clone, Debug, Serialize)]
pub struct ImportReport {
    /// The target, as the user wrote it.
    pub target: String,
    /// The snapshot that the stream started from.
    pub base: Option<String>,
    /// The snapshot that the target has now; `None` if the stream named none.
    pub snapshot: Option<String>,
    /// The target's size now, in bytes.
    pub size: u64,
    /// Whether HEAD was brought back to the base first.
    pub rewound: bool,
    /// What was written.
    #[serde(flatten)]
    pub moved: Counted,
}

/// How a stream is imported.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    /// What may be in flight.
    pub limits: Limits,
    /// Bring HEAD back to the snapshot that the stream starts from if it differs, as after an import that was cut. What
    /// was written to it since is lost.
    pub rewind: bool,
}

/// Applies a diff whose header has been read. The snapshot that it leads to is made only when its end was there; one that
/// leads to HEAD makes none, and leaves a HEAD that no snapshot says anything of.
pub async fn import_diff<R: AsyncRead + Unpin + Send + 'static>(
    target: Arc<dyn TargetImage>,
    diff: DiffReader<R>,
    options: &ImportOptions,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<ImportReport> {
    with_lease(&target, || async {
        let header = diff.header().clone();
        let rewound = prepare(&target, &header, options, cancel).await?;
        let records = batches(diff, options.limits.clone()).take_until(cancel.clone().cancelled_owned()).boxed();
        let apply = ApplyOptions { requests: options.limits.requests, ..ApplyOptions::default() };
        let counters = progress.counters.clone();
        let done = pipeline::apply(records, target.clone(), apply, &mut NoCheckpoint, counters.clone(), cancel).await?;
        if done == Applied::Part {
            return Err(interrupted(&header));
        }
        if let Some(name) = &header.to {
            target.create_snapshot(name).await?;
        }
        Ok(ImportReport {
            target: target.location().to_owned(),
            base: header.from,
            snapshot: header.to,
            size: header.size,
            rewound,
            moved: counters.read(),
        })
    })
    .await
}

fn interrupted(header: &DiffHeader) -> CycleError {
    let snapshot = header.to.clone().unwrap_or_else(|| "HEAD".to_owned());
    CycleError::Interrupted { snapshot, progress_to: 0, size: header.size }
}

/// Checks that the diff fits, and makes HEAD what it starts from. Gives back whether HEAD had to be rewound.
async fn prepare(
    target: &Arc<dyn TargetImage>,
    header: &DiffHeader,
    options: &ImportOptions,
    cancel: &CancellationToken,
) -> Result<bool> {
    let snapshots = target.snapshots().await?;
    let head_only = target.snapshot_support() == SnapshotSupport::HeadOnly;
    let conflict = |kind| Conflict {
        kind,
        source: ("the stream".to_owned(), Vec::new()),
        target: (target.location().to_owned(), snapshots.clone()),
    };
    if let Some(state) = load_state(target.as_ref()).await? {
        return Err(conflict(ConflictKind::Owned { location: state.source_location }).into());
    }
    if let Some(name) = header.to.as_ref().filter(|name| !head_only && snapshots.iter().any(|s| s.name == **name)) {
        return Err(conflict(ConflictKind::NameTaken { name: name.clone() }).into());
    }
    let mut rewound = false;
    match &header.from {
        None if !target.is_blank().await? => return Err(conflict(ConflictKind::NotEmpty).into()),
        None => {}
        Some(from) => {
            let base = snapshots.iter().find(|have| have.name == *from).cloned();
            let Some(base) = base else {
                let (stream, at) = (format!("snapshot {from}"), "another point: it has no such snapshot".to_owned());
                return Err(conflict(ConflictKind::WrongBase { stream, at }).into());
            };
            if target.head_differs(&base).await? {
                if !options.rewind || head_only {
                    return Err(conflict(ConflictKind::HeadMoved { since: from.clone() }).into());
                }
                if rewind::rewind(target, &base, options.limits.clone(), cancel).await? == Applied::Part {
                    return Err(interrupted(header));
                }
                rewound = true;
            }
        }
    }
    withdraw_and_resize(target, head_only, &snapshots, header.size).await?;
    Ok(rewound)
}

async fn withdraw_and_resize(
    target: &Arc<dyn TargetImage>,
    head_only: bool,
    snapshots: &[Snapshot],
    size: u64,
) -> Result<()> {
    for declared in snapshots.iter().filter(|_| head_only) {
        target.remove_snapshot(declared).await?;
    }
    if target.size().await? != size {
        target.resize(size).await?;
    }
    Ok(())
}

/// The records of a diff as batches. A record that does not come behind all before it may overlap one of them: it waits
/// until they are on the target.
fn batches<R: AsyncRead + Unpin + Send + 'static>(
    diff: DiffReader<R>,
    limits: Limits,
) -> BoxStream<'static, pipeline::Result<Loaded>> {
    // One take must be able to get all of it.
    let limits = Limits { bytes: limits.bytes.min(u64::from(u32::MAX)), ..limits };
    let budgets = Budgets::new(&limits, 2 * CHUNK_MAX);
    let packer = Packer { diff, next: None, ended: false };
    let units = stream::try_unfold(packer, |mut packer| async move {
        Ok::<_, pipeline::PipelineError>(packer.pack().await?.map(|unit| (unit, packer)))
    });
    let mut behind = 0;
    let mut sequence = 0;
    units
        .and_then(move |unit: Unit| {
            let budgets = budgets.clone();
            let barrier = unit.start < behind;
            behind = behind.max(unit.end);
            async move { Ok((reserve(&budgets, &unit, barrier).await, unit)) }
        })
        .and_then(move |(permit, unit)| {
            let batch = Batch { sequence, progress_to: unit.end, chunks: Vec::new() };
            sequence += 1;
            async move {
                let chunks = pipeline::on_cpu(move || unit.pieces.into_iter().flat_map(cut).collect()).await;
                Ok(Loaded { batch: Batch { chunks, ..batch }, permit })
            }
        })
        .boxed()
}

/// A share of the budgets for one unit; with `barrier`, after everything before has given its share back.
async fn reserve(budgets: &Budgets, unit: &Unit, barrier: bool) -> Permit {
    // At least one, so that zeroes hold a share as well, and the barrier waits for them.
    let wanted = unit.bytes.max(1);
    let own = if barrier {
        budgets.own.take(budgets.own.total()).await.and_then(|mut all| all.split(wanted as usize))
    } else {
        budgets.own.take(wanted).await
    };
    budgets.add_shared(own, wanted).await
}

/// Some records, in ascending order.
#[derive(Default)]
struct Unit {
    start: u64,
    end: u64,
    bytes: u64,
    pieces: Vec<Record>,
}

struct Packer<R> {
    diff: DiffReader<R>,
    next: Option<Record>,
    ended: bool,
}

impl<R: AsyncRead + Unpin + Send> Packer<R> {
    /// The next unit; `None` after the end record.
    async fn pack(&mut self) -> pipeline::Result<Option<Unit>> {
        let mut unit = Unit::default();
        while !self.ended {
            let record = match self.next.take() {
                Some(record) => record,
                None => self.diff.next().await?,
            };
            let (start, end, bytes) = match &record {
                Record::End => {
                    self.ended = true;
                    break;
                }
                Record::Zero(range) => (range.offset(), range.end(), 0),
                Record::Data { offset, bytes } => (*offset, offset + bytes.len() as u64, bytes.len() as u64),
            };
            let fits = unit.bytes + bytes <= CHUNK_MAX && unit.pieces.len() < PIECES && start >= unit.end;
            if !unit.pieces.is_empty() && !fits {
                self.next = Some(record);
                break;
            }
            if unit.pieces.is_empty() {
                unit.start = start;
            }
            unit.end = end;
            unit.bytes += bytes;
            unit.pieces.push(record);
        }
        if self.ended {
            self.diff.expect_nothing_more().await?;
        }
        Ok((!unit.pieces.is_empty()).then_some(unit))
    }
}

fn cut(record: Record) -> Vec<Chunk> {
    match record {
        Record::Data { offset, bytes } => batch::cut(offset, bytes),
        Record::Zero(range) => {
            pipeline::zero_pieces(range).map(|range| Chunk { range, content: Content::Zero }).collect()
        }
        Record::End => Vec::new(),
    }
}
