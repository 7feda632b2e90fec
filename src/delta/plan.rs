//! The two levels of a delta.
//!
//! Asking RBD for the exact extents costs one request per object of the image, however little has changed. The object
//! map knows which objects changed, and one request reads it. So a delta is planned in two levels:
//!
//! 1. [`plan`] asks once which objects may have changed and joins them into runs;
//! 2. [`extents`] asks for the exact extents inside the runs only, several windows at a time, in ascending order, as
//!    the pipeline takes them. No list of all extents is ever held: memory is bounded by the windows in flight.
//!
//! Where the first level can't be trusted, the only run is the whole image, and [`Method::Exact`] says why and what
//! would cure it.

use std::sync::Arc;

use futures::stream::{self, BoxStream, Stream, StreamExt, TryStreamExt};
use serde::Serialize;

use crate::extent::{ByteRange, Extent, ExtentKind, normalize, normalize_extents, subtract, total_length};
use crate::image::{COMPARE_BLOCK, ChangedObjects, Layout, Result, Snapshot, View};

/// How much of the image one exact look covers: 64 objects of the default size. Long enough that the cost of a call
/// vanishes, short enough that several run at a time and that one answer stays small.
const WINDOW: u64 = 256 << 20;

/// How many exact looks are under way at a time. librbd itself asks ten objects at a time in each.
const WINDOWS_IN_FLIGHT: usize = 8;

/// How the runs of a delta were found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum Method {
    /// The object map named the changed objects.
    TwoLevel,
    /// Every object of the image is looked at.
    Exact {
        /// Why the object map was not used.
        reason: String,
        /// What would make it usable.
        #[serde(skip_serializing_if = "Option::is_none")]
        cure: Option<String>,
    },
    /// The content of both sides is compared, block by block.
    Compare,
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TwoLevel => f.write_str("two-level: the object map, then the exact extents of changed objects"),
            Self::Exact { reason, cure: None } => write!(f, "exact: every object is asked, because {reason}"),
            Self::Exact { reason, cure: Some(cure) } => {
                write!(f, "exact: every object is asked, because {reason}; to make it fast again: {cure}")
            }
            Self::Compare => f.write_str("compare: the content of both sides, block by block"),
        }
    }
}

/// The first level of a delta: where to look. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The earlier point; `None` for an image of zeroes.
    pub since: Option<Snapshot>,
    /// The image's size at the later point, in bytes.
    pub size: u64,
    /// All changed bytes lie in these, sorted and disjoint.
    pub runs: Vec<ByteRange>,
    /// How they were found.
    pub method: Method,
}

impl Plan {
    /// How many bytes the runs cover: what the second level looks at, not what is read or moved.
    pub fn covered(&self) -> u64 {
        total_length(&self.runs)
    }

    /// How many bytes the runs cover below `offset`.
    pub fn covered_below(&self, offset: u64) -> u64 {
        self.runs.iter().filter_map(|run| run.clip(offset)).map(ByteRange::length).sum()
    }

    /// A plan that looks at every object, whatever the object map says.
    pub fn exact(since: Option<&Snapshot>, size: u64, reason: impl Into<String>, cure: Option<String>) -> Self {
        Self {
            since: since.cloned(),
            size,
            runs: ByteRange::between(0, size).into_iter().collect(),
            method: Method::Exact { reason: reason.into(), cure },
        }
    }

    /// A plan that looks at all of both sides.
    pub fn compare(size: u64) -> Self {
        Self { since: None, size, runs: ByteRange::between(0, size).into_iter().collect(), method: Method::Compare }
    }
}

/// Plans the delta from `since` to the point that `view` looks at.
pub async fn plan(view: &dyn View, since: Option<&Snapshot>) -> Result<Plan> {
    Ok(match view.changed_objects(since).await? {
        ChangedObjects::Runs(runs) => {
            let runs = normalize(runs.into_iter().filter_map(|run| run.clip(view.size())).collect());
            Plan { since: since.cloned(), size: view.size(), runs, method: Method::TwoLevel }
        }
        ChangedObjects::Unavailable { reason, cure } => Plan::exact(since, view.size(), reason, cure),
    })
}

/// The windows of a plan from `start` on, in ascending order.
fn windows(plan: &Plan, layout: Layout, start: u64) -> impl Iterator<Item = ByteRange> + Send + use<> {
    // Whole periods of the layout, so that no object is asked twice.
    let period = layout.period().max(1);
    let window = (WINDOW / period).max(1).saturating_mul(period).next_multiple_of(COMPARE_BLOCK);
    let runs = plan.runs.clone();
    runs.into_iter()
        .filter_map(move |run| ByteRange::between(run.offset().max(start), run.end()))
        .flat_map(move |run| run.split_at_multiples(window).collect::<Vec<_>>())
}

/// The second level: the exact extents of `plan`, from offset `start` on, in ascending order, a window at a time.
///
/// `view` is the view that `plan` was made with.
pub fn extents(
    view: Arc<dyn View>,
    plan: &Plan,
    layout: Layout,
    start: u64,
) -> BoxStream<'static, Result<Vec<Extent>>> {
    let since = plan.since.clone();
    stream::iter(windows(plan, layout, start))
        .map(move |window| {
            let (view, since) = (view.clone(), since.clone());
            async move { Ok(normalize_extents(view.diff(since.as_ref(), window).await?)) }
        })
        .buffered(WINDOWS_IN_FLIGHT)
        .boxed()
}

/// The extents of a comparison: data where the source has some, zeroes where only the target has. All of them begin and
/// end at multiples of [`COMPARE_BLOCK`], but for the end of the image.
pub fn extents_of_both(
    source: Arc<dyn View>,
    target: Arc<dyn View>,
    plan: &Plan,
    layout: Layout,
    start: u64,
) -> BoxStream<'static, Result<Vec<Extent>>> {
    let both = allocated(source, target, plan, layout, start).map_ok(|(data, behind)| {
        let zero = subtract(&behind, &data).into_iter().map(Extent::zero);
        normalize_extents(data.into_iter().map(Extent::data).chain(zero).collect())
    });
    both.boxed()
}

/// Where at least one side has something allocated, in whole blocks, a window at a time.
pub fn allocated_in_either(
    source: Arc<dyn View>,
    target: Arc<dyn View>,
    plan: &Plan,
    layout: Layout,
) -> BoxStream<'static, Result<Vec<ByteRange>>> {
    let either = allocated(source, target, plan, layout, 0);
    either.map_ok(|(ours, theirs)| normalize(ours.into_iter().chain(theirs).collect())).boxed()
}

/// What is allocated on the source, and on the target, in whole blocks below the plan's size.
fn allocated(
    source: Arc<dyn View>,
    target: Arc<dyn View>,
    plan: &Plan,
    layout: Layout,
    start: u64,
) -> impl Stream<Item = Result<(Vec<ByteRange>, Vec<ByteRange>)>> + Send + 'static {
    let size = plan.size;
    stream::iter(windows(plan, layout, start))
        .map(move |window| {
            let (source, target) = (source.clone(), target.clone());
            async move {
                let of = async |view: &dyn View| match window.clip(view.size()) {
                    Some(window) => Ok(blocks_of(view.diff(None, window).await?, size)),
                    None => Ok(Vec::new()),
                };
                futures::try_join!(of(source.as_ref()), of(target.as_ref()))
            }
        })
        .buffered(WINDOWS_IN_FLIGHT)
}

/// The data among `extents`, in whole blocks.
fn blocks_of(extents: Vec<Extent>, size: u64) -> Vec<ByteRange> {
    let data = extents.into_iter().filter(|extent| extent.kind == ExtentKind::Data);
    normalize(data.map(|extent| extent.range.align_outward(COMPARE_BLOCK, size)).collect())
}

/// All extents of a plan at once, neighbours joined across windows: for printing, not for moving data.
pub async fn collect(mut extents: BoxStream<'static, Result<Vec<Extent>>>) -> Result<Vec<Extent>> {
    let mut all: Vec<Extent> = Vec::new();
    while let Some(window) = extents.next().await {
        for extent in window? {
            match all.last_mut() {
                Some(last) if last.kind == extent.kind && last.range.end() == extent.range.offset() => {
                    let joined = ByteRange::between(last.range.offset(), extent.range.end());
                    last.range = joined.unwrap_or(extent.range);
                }
                _ => all.push(extent),
            }
        }
    }
    Ok(all)
}
