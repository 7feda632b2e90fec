//! Receiving: a batch stream is applied to a target, with the same steps and the same state as a cycle.

use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt;
use serde::Serialize;
use tokio::io::AsyncRead;
use tokio_util::sync::CancellationToken;

use crate::extent::ByteRange;
use crate::image::{SnapshotSupport, TargetImage};
use crate::pipeline::{self, Applied, ApplyOptions, Counted, Limits, PipelineError};
use crate::transport::pipe::{self, Received};
use crate::wire::{Hello, StreamReader, Totals};

use super::cycle::{Progress, is_automatic};
use super::error::{Conflict, ConflictKind, CycleError, Result};
use super::lineage::{self, Acceptance, Facts, Offer};
use super::report::Pruned;
use super::retention::Keep;
use super::side::{TargetSide, interrupted, load_state, with_lease};
use super::state::{InFlight, Origin, TargetState};

/// What was received.
#[derive(Clone, Debug, Serialize)]
pub struct ReceiveReport {
    /// The target, as the user wrote it.
    pub target: String,
    /// Where the stream came from, as its sender says.
    pub source: String,
    /// The snapshot that the stream started from.
    pub base: Option<String>,
    /// The snapshot that the target is at now.
    pub snapshot: String,
    /// Whether the target had it already, and nothing was written.
    pub already_there: bool,
    /// Whether HEAD was brought back to the base first.
    pub rewound: bool,
    /// What the stream carried; `None` when it was not read to its end.
    #[serde(flatten)]
    pub totals: Option<Totals>,
    /// What was written.
    pub moved: Counted,
    /// What was removed on the target.
    pub pruned: Pruned,
}

/// How a stream is received.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// How many automatic snapshots stay on the target; at least the newest does.
    pub keep: usize,
    /// What may be in flight.
    pub limits: Limits,
}

/// Applies a stream whose beginning has been read. The target's snapshot is made only when the stream's end was there
/// and everything in it was in order.
pub async fn receive<R: AsyncRead + Unpin + Send + 'static>(
    target: Arc<dyn TargetImage>,
    stream: StreamReader<R>,
    options: &ReceiveOptions,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<ReceiveReport> {
    let hello = stream.hello().clone();
    with_lease(&target, || async {
        let facts = gather(target.as_ref(), &hello).await?;
        let offer = Offer { source: &hello.source, from: hello.from.as_ref(), to: &hello.to };
        let acceptance =
            lineage::accept(&facts, &offer).map_err(|kind| refused(kind, &hello, target.as_ref(), &facts))?;
        let state = facts.state.clone().unwrap_or_else(|| TargetState::new(&hello.source, &hello.location));
        let keep = Keep::newest(options.keep);
        let side = TargetSide { target: &target, state, keep, limits: options.limits.clone(), cancel };
        let mut receiver = Receiver { side, hello: &hello, progress };
        receiver.carry_out(acceptance, stream).await
    })
    .await
}

async fn gather(target: &dyn TargetImage, hello: &Hello) -> Result<Facts> {
    let mut facts = Facts {
        source: hello.source.clone(),
        source_support: SnapshotSupport::Kept,
        source_snapshots: Vec::new(),
        target_support: target.snapshot_support(),
        target_snapshots: target.snapshots().await?,
        state: load_state(target).await?,
        target_blank: false,
        head_differs: false,
    };
    if lineage::needs_blank(facts.state.as_ref()) {
        facts.target_blank = target.is_blank().await?;
    }
    if let Some(newest) = lineage::needs_head_check(&facts) {
        facts.head_differs = target.head_differs(&newest).await?;
    }
    Ok(facts)
}

fn refused(kind: ConflictKind, hello: &Hello, target: &dyn TargetImage, facts: &Facts) -> CycleError {
    let known = hello.from.iter().chain([&hello.to]).cloned().collect();
    Conflict {
        kind,
        source: (format!("the stream of {}", hello.location), known),
        target: (target.location().to_owned(), facts.target_snapshots.clone()),
    }
    .into()
}

struct Receiver<'a> {
    side: TargetSide<'a>,
    hello: &'a Hello,
    progress: &'a Progress,
}

impl Receiver<'_> {
    async fn carry_out<R: AsyncRead + Unpin + Send + 'static>(
        &mut self,
        acceptance: Acceptance,
        stream: StreamReader<R>,
    ) -> Result<ReceiveReport> {
        let mut report = ReceiveReport {
            target: self.side.target.location().to_owned(),
            source: self.hello.location.clone(),
            base: self.hello.from.as_ref().map(|from| from.name.clone()),
            snapshot: self.hello.to.name.clone(),
            already_there: false,
            rewound: false,
            totals: None,
            moved: Counted::default(),
            pruned: Pruned::default(),
        };
        match acceptance {
            Acceptance::AlreadyThere(_) => {
                report.totals = self.read_through(stream).await?;
                report.already_there = true;
            }
            Acceptance::EnterCommit { in_flight, target } => {
                report.totals = self.read_through(stream).await?;
                report.already_there = true;
                self.side.enter(&in_flight, &target, true).await?;
            }
            Acceptance::Resume(in_flight) => self.apply(in_flight, stream, &mut report).await?,
            Acceptance::Begin { from, rewind, empty } => {
                let in_flight = self.begin(from, rewind, empty).await?;
                self.apply(in_flight, stream, &mut report).await?;
            }
        }
        report.moved = self.progress.counters.read();
        report.pruned = self.side.prune(None).await;
        Ok(report)
    }

    /// Reads a stream that has nothing new to its end, so that its sender does not see a broken pipe; checks it, too.
    async fn read_through<R: AsyncRead + Unpin + Send + 'static>(
        &self,
        stream: StreamReader<R>,
    ) -> Result<Option<Totals>> {
        let received = Received::default();
        let mut batches = pipe::receive(stream, self.side.limits.clone(), received.clone());
        while let Some(loaded) = batches.next().await {
            loaded?;
        }
        Ok(*received.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn begin(&mut self, from: Origin, rewind: bool, empty: bool) -> Result<InFlight> {
        let (to, dirty) = (self.hello.to.clone(), self.side.state.is_dirty());
        let automatic = is_automatic(&to.name);
        let in_flight = InFlight { rewind, ..InFlight::new(to.name.clone(), Some(to), automatic, from, dirty) };
        if empty {
            // Before the new intent is stored: until then the old one says that HEAD is dirty.
            self.side.target.resize(0).await?;
        }
        self.side.begin(&in_flight, &[]).await?;
        Ok(in_flight)
    }

    async fn apply<R: AsyncRead + Unpin + Send + 'static>(
        &mut self,
        mut in_flight: InFlight,
        stream: StreamReader<R>,
        report: &mut ReceiveReport,
    ) -> Result<()> {
        let (size, target, cancel) = (self.hello.to.size, self.side.target, self.side.cancel);
        let went_on = in_flight.dirty && !in_flight.rewind;
        // Stored before the first write: of a stream with a fault, or one that is cut, nothing is applied as a whole.
        in_flight.applied = false;
        report.rewound = self.side.prepare(&mut in_flight, size).await?;
        let received = Received::default();
        let done = in_flight.progress_to;
        let covered = Arc::new(Mutex::new(Covered::of(target.layout().period(), size)));
        let covers = Arc::clone(&covered);
        let batches = pipe::receive(stream, self.side.limits.clone(), received.clone())
            .map(move |loaded| {
                let mut loaded = loaded?;
                let ranges = loaded.batch.chunks.iter().map(|chunk| chunk.range);
                covers.lock().unwrap_or_else(PoisonError::into_inner).add(ranges);
                // A stream that is sent again begins at its beginning: what is done and flushed is not written twice.
                loaded.batch.chunks.retain(|chunk| chunk.range.end() > done);
                Ok(loaded)
            })
            .take_until(cancel.clone().cancelled_owned())
            .boxed();
        let apply = ApplyOptions { requests: self.side.limits.requests, ..ApplyOptions::default() };
        let counters = self.progress.counters.clone();
        let mut keeper = self.side.keeper(&mut in_flight);
        let applied = pipeline::apply(batches, target.clone(), apply, &mut keeper, counters, cancel).await;
        let applied = match applied {
            Ok(applied) => applied,
            Err(error) => {
                // Of a stream with a fault nobody knows since when it was wrong.
                let is_cut = |error: &PipelineError| match error {
                    PipelineError::Wire(error) => error.is_cut(),
                    PipelineError::Image(_) => true,
                    _ => false,
                };
                if !is_cut(&error)
                    && let Err(unstored) = self.side.spoil(&mut in_flight).await
                {
                    // The stream's fault is what its user has to see.
                    tracing::error!("{}: HEAD is not marked for a rewind: {unstored}", target.location());
                }
                return Err(error.into());
            }
        };
        report.totals = *received.lock().unwrap_or_else(PoisonError::into_inner);
        if applied == Applied::Part || report.totals.is_none() {
            return Err(interrupted(&in_flight, size));
        }
        if went_on {
            let ranges = std::mem::take(&mut *covered.lock().unwrap_or_else(PoisonError::into_inner)).ranges;
            if let Some(since) = self.side.written_beyond(&in_flight, ranges, size).await? {
                let facts = gather(target.as_ref(), self.hello).await?;
                return Err(refused(ConflictKind::Diverged { since }, self.hello, target.as_ref(), &facts));
            }
        }
        let made = self.side.finish(&mut in_flight).await?;
        self.side.enter(&in_flight, &made, true).await?;
        Ok(())
    }
}

/// The objects that a stream writes to, as ranges in ascending order: at most one for every second object.
#[derive(Default)]
struct Covered {
    period: u64,
    size: u64,
    ranges: Vec<ByteRange>,
}

impl Covered {
    fn of(period: u64, size: u64) -> Self {
        Self { period, size, ranges: Vec::new() }
    }

    /// Ranges that begin behind all before them.
    fn add(&mut self, ranges: impl Iterator<Item = ByteRange>) {
        for range in ranges.map(|range| range.align_outward(self.period, self.size)) {
            match self.ranges.last_mut() {
                Some(last) if range.offset() <= last.end() => {
                    *last = ByteRange::between(last.offset(), last.end().max(range.end())).unwrap_or(*last);
                }
                _ => self.ranges.push(range),
            }
        }
    }
}
