//! One cycle of a server: all its volumes get the same new point, or the server keeps the one it has.
//!
//! 1. A look at each volume, without a lease: where nothing has changed, that is all.
//! 2. The leases of all targets; the first volume's first, so that of two workers one gets all of them.
//! 3. What was begun is finished: a point whose snapshots were all made (`gate`) is carried over by every volume
//!    that does not have it yet. Volumes only ever agree on points that were made for all of them at one moment, so that
//!    the newest name that all of them have committed is the server's newest point.
//! 4. A new point for all.
//! 5. Retention, once all volumes have the new point; until then the older one stays on all of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::{join_all, try_join_all};
use tokio_util::sync::CancellationToken;

use super::gate::{Gate, NoSnapshots};
use super::shared::PAUSED;
use crate::batch::Compression;
use crate::failpoint::failpoint;
use crate::image::{ErrorKind, ImageError, LeaseOwner, SnapshotSupport, SourceImage, TargetImage};
use crate::pipeline::Limits;
use crate::plan::{Quiesce, Retention};
use crate::replicate::lineage::Request;
use crate::replicate::state::Commit;
use crate::replicate::{self, CycleError, Look, Progress, SyncOptions, SyncReport};

/// One volume of a server, open.
#[derive(Clone)]
pub struct Member {
    /// Its name in the plan.
    pub name: String,
    /// The image that is read.
    pub source: Arc<dyn SourceImage>,
    /// The image that is written.
    pub target: Arc<dyn TargetImage>,
    /// What an observer sees of its cycle.
    pub progress: Arc<Progress>,
}

/// How a server is worked on.
#[derive(Clone, Debug)]
pub struct GroupOptions {
    /// The server's name.
    pub server: String,
    /// How its writers are quiesced.
    pub quiesce: Quiesce,
    /// What stays.
    pub retention: Retention,
    /// What each volume may have in flight.
    pub limits: Limits,
    /// Where another worker has made a point that is younger than this, nothing is done.
    pub not_younger_than: Duration,
    /// A cycle runs however young the point is; if nothing has changed there is still nothing to do.
    pub forced: bool,
}

/// What was seen of a volume, before its cycle.
#[derive(Clone, Debug)]
pub struct Seen {
    /// What poolshift keeps with the target.
    pub look: Look,
    /// What has changed on the source since the base, in bytes, at most; `None` where nothing tells.
    pub changed: Option<u64>,
    /// The source's size, in bytes.
    pub size: u64,
}

/// A point that all volumes of a server have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupPoint {
    /// The name of the snapshots.
    pub snapshot: String,
    /// When they were made.
    pub at: jiff::Timestamp,
}

/// How a server's cycle ended.
#[derive(Debug)]
pub enum GroupEnd {
    /// Nothing has changed since the newest point.
    Unchanged {
        /// That point.
        point: GroupPoint,
    },
    /// Another worker made a point a moment ago.
    Recent {
        /// That point.
        point: GroupPoint,
    },
    /// All volumes have a new point.
    Committed(Box<GroupReport>),
}

/// What a server's cycle did.
#[derive(Debug)]
pub struct GroupReport {
    /// The new point.
    pub point: GroupPoint,
    /// Each volume's report, in the order of the members.
    pub volumes: Vec<SyncReport>,
    /// From the first intent to the last commit.
    pub took: Duration,
    /// How long the writers were frozen.
    pub frozen_for: Option<Duration>,
    /// Whether a point that an earlier cycle had begun was finished first.
    pub finished_first: bool,
}

/// Why a server's cycle failed.
#[derive(Debug, thiserror::Error)]
#[error("{volume}: {error}")]
pub struct GroupError {
    /// The volume that failed first, or the server.
    pub volume: String,
    /// What happened.
    #[source]
    pub error: CycleError,
}

impl GroupError {
    fn of(member: &Member, error: impl Into<CycleError>) -> Self {
        Self { volume: member.name.clone(), error: error.into() }
    }

    /// Whether it may succeed later without anybody's doing.
    pub fn is_retryable(&self) -> bool {
        self.error.is_retryable()
    }
}

/// Looks at all volumes, without a lease and without writing.
pub async fn look(members: &[Member]) -> Result<Vec<Seen>, GroupError> {
    let look_at = |member: &Member| {
        let member = member.clone();
        async move {
            let fail = |error| GroupError::of(&member, error);
            let look = replicate::look(member.source.as_ref(), member.target.as_ref()).await.map_err(fail)?;
            let found = match look.base() {
                Some(base) => replicate::changed_since(member.source.as_ref(), base).await.map(Some),
                None => Ok(None),
            };
            let (changed, size) = match found {
                Ok(Some(changed)) => (changed.bytes, changed.size),
                // The base has gone, or another cycle has just replaced it: the cycle finds out.
                Err(CycleError::Image(error)) if error.kind != ErrorKind::NotFound => return Err(fail(error.into())),
                Ok(None) | Err(CycleError::Image(_)) => {
                    (None, member.source.size().await.map_err(|error| fail(error.into()))?)
                }
                Err(error) => return Err(fail(error)),
            };
            Ok(Seen { look, changed, size })
        }
    };
    try_join_all(members.iter().map(look_at)).await
}

/// A server that had not changed when it was looked at last.
#[derive(Debug)]
pub struct Idle {
    seen: Vec<Seen>,
    /// What the sources gave before the last look at each; see [`SourceImage::quiet_token`].
    tokens: Vec<Option<String>>,
    /// How often it was found unchanged.
    times: u32,
    /// When the note with its first target was read last.
    noted: Instant,
}

/// So often tokens are believed; then the sources are looked at again.
const TOKENS_BELIEVED: u32 = 15;

/// How long the note of an idle server is believed to be what it was: nothing else tells that somebody has paused it, or
/// cut it over.
const NOTE_BELIEVED: Duration = Duration::from_secs(60);

impl Idle {
    /// What a whole look has found.
    pub fn new(seen: Vec<Seen>) -> Self {
        Self { tokens: vec![None; seen.len()], seen, times: 0, noted: Instant::now() }
    }

    /// Whether the note is to be read again, which is then taken to be done.
    pub fn note_is_due(&mut self, now: Instant) -> bool {
        let is_due = now.saturating_duration_since(self.noted) >= NOTE_BELIEVED;
        if is_due {
            self.noted = now;
        }
        is_due
    }
}

/// Whether nothing has changed since the look that found a server idle: the cheapest look, which asks the sources alone.
/// `None` where something has, or another worker has made a newer point: then a whole look is due.
pub async fn still_unchanged(members: &[Member], idle: &mut Idle) -> Option<GroupPoint> {
    let point = common_point(idle.seen.iter().map(|seen| &seen.look)).filter(|_| members.len() == idle.seen.len())?;
    idle.times += 1;
    let believed = !idle.times.is_multiple_of(TOKENS_BELIEVED);
    let unchanged = |((member, seen), known): ((&Member, &Seen), &Option<String>)| {
        let (member, base) = (member.clone(), seen.look.base().cloned());
        let base = base.filter(|_| seen.look.in_flight.is_none());
        let known = known.clone().filter(|_| believed);
        async move {
            let base = base?;
            // Before the look, so that what happens meanwhile is seen by one of the two.
            let token = member.source.quiet_token().await.ok()?;
            if token.is_none() || token != known {
                // A base that is gone is another worker's doing; whatever else fails is found out by the whole look.
                let changed = replicate::changed_since(member.source.as_ref(), &base).await.ok()?;
                (changed.bytes == Some(0)).then_some(())?;
            }
            Some(token)
        }
    };
    let all = join_all(members.iter().zip(&idle.seen).zip(&idle.tokens).map(unchanged)).await;
    idle.tokens = all.into_iter().collect::<Option<Vec<_>>>()?;
    Some(point)
}

/// The newest point that all volumes have committed.
pub fn common_point<'a>(looks: impl IntoIterator<Item = &'a Look>) -> Option<GroupPoint> {
    let looks: Vec<&Look> = looks.into_iter().collect();
    let (first, others) = looks.split_first()?;
    // What a person named was made for one volume alone, whatever another one is called.
    let on_all = |commit: &&Commit| {
        commit.automatic && others.iter().all(|other| other.commits.iter().any(|have| have.name == commit.name))
    };
    let commit = first.commits.iter().rev().find(on_all)?;
    // Of one point, the volume whose intent was stored first says how old it is at most.
    let times = looks.iter().flat_map(|look| &look.commits).filter(|have| have.name == commit.name);
    let at = times.filter_map(|commit| commit.at.parse::<jiff::Timestamp>().ok()).min()?;
    Some(GroupPoint { snapshot: commit.name.clone(), at })
}

/// The points that were made for all volumes and that some do not have yet, oldest first. A volume that has recorded the
/// id of its snapshot, or committed it, proves that all of them were made; see [`super::gate`].
fn begun(looks: &[Look]) -> Vec<String> {
    let mut names: Vec<&str> = Vec::new();
    for look in looks {
        // What a person named is not the server's, and never becomes poolshift's own to remove.
        let in_flight = look.in_flight.as_ref().filter(|flight| flight.automatic && flight.snapshot.is_some());
        let newest = look.base().filter(|base| base.automatic).map(|base| base.name.as_str());
        names.extend(in_flight.map(|in_flight| in_flight.name.as_str()).into_iter().chain(newest));
    }
    names.sort_unstable();
    names.dedup();
    let has = |look: &Look, name: &str| look.commits.iter().any(|commit| commit.name == name);
    names.retain(|name| looks.iter().any(|look| !has(look, name)));
    names.into_iter().map(str::to_owned).collect()
}

struct Group<'a> {
    members: &'a [Member],
    options: &'a GroupOptions,
    cancel: &'a CancellationToken,
}

/// Is told how far a cycle is.
pub trait Observer: Send + Sync {
    /// What the look has found.
    fn seen(&self, _seen: &[Seen]) {}

    /// All leases are held: the work begins.
    fn leased(&self) {}
}

/// Carries one cycle of a server through. `cancel` stops it at a checkpoint of each volume, and before the writers are
/// frozen.
pub async fn run(
    members: &[Member],
    options: &GroupOptions,
    observer: &dyn Observer,
    cancel: &CancellationToken,
) -> Result<GroupEnd, GroupError> {
    let seen = look(members).await?;
    observer.seen(&seen);
    if let Some(end) = nothing_to_do(&seen, options) {
        return Ok(end);
    }
    let group = Group { members, options, cancel };
    group.take_leases().await?;
    if let Err(error) = group.refuse_paused().await {
        group.give_leases_back().await;
        return Err(error);
    }
    observer.leased();
    let outcome = group.with_leases().await;
    group.give_leases_back().await;
    outcome
}

/// [`run`] for a caller who holds all the leases already, and keeps them: always a new point.
pub async fn run_held(
    members: &[Member],
    options: &GroupOptions,
    cancel: &CancellationToken,
) -> Result<GroupEnd, GroupError> {
    Group { members, options, cancel }.with_leases().await
}

fn nothing_to_do(seen: &[Seen], options: &GroupOptions) -> Option<GroupEnd> {
    let point = common_point(seen.iter().map(|seen| &seen.look))?;
    let at_point =
        |seen: &Seen| seen.look.in_flight.is_none() && seen.look.base().is_some_and(|base| base.name == point.snapshot);
    if !seen.iter().all(at_point) {
        return None;
    }
    if seen.iter().all(|seen| seen.changed == Some(0)) {
        return Some(GroupEnd::Unchanged { point });
    }
    let age = crate::clock::now().duration_since(point.at);
    let young = Duration::try_from(age).is_ok_and(|age| age < options.not_younger_than);
    (young && !options.forced).then_some(GroupEnd::Recent { point })
}

impl Group<'_> {
    async fn take_lease(&self, member: &Member) -> Result<(), GroupError> {
        let owner = LeaseOwner::current().map_err(|error| {
            let error = ImageError::from_io(error, member.target.location(), "say who takes the lease");
            GroupError::of(member, error)
        })?;
        member.target.acquire_lease(&owner).await.map_err(|error| GroupError::of(member, error))
    }

    /// All leases, or none.
    async fn take_leases(&self) -> Result<(), GroupError> {
        let Some((first, others)) = self.members.split_first() else { return Ok(()) };
        self.take_lease(first).await?;
        let taken = join_all(others.iter().map(|member| self.take_lease(member))).await;
        match taken.into_iter().find_map(Result::err) {
            None => {
                failpoint!("group.leased");
                Ok(())
            }
            Some(error) => {
                self.give_leases_back().await;
                Err(error)
            }
        }
    }

    /// Somebody may have paused the server since it was looked at, for its cutover say: with the leases held this is the
    /// last word.
    async fn refuse_paused(&self) -> Result<(), GroupError> {
        let Some(first) = self.members.first() else { return Ok(()) };
        let note = first.target.load_note().await.map_err(|error| GroupError::of(first, error))?;
        match note.filter(|note| note.starts_with(PAUSED)) {
            None => Ok(()),
            Some(note) => {
                let kind = ErrorKind::Busy { holder: format!("nobody: the server is {note}") };
                Err(GroupError::of(first, ImageError::new(kind, first.target.location(), "begin a cycle")))
            }
        }
    }

    async fn give_leases_back(&self) {
        let released = join_all(self.members.iter().map(|member| member.target.release_lease())).await;
        for error in released.into_iter().filter_map(Result::err) {
            // It is taken over by whoever comes next: this process will be gone, or its watch will.
            tracing::warn!(%error, "a lease was not given back");
        }
    }

    async fn looks(&self) -> Result<Vec<Look>, GroupError> {
        let look = |member: &Member| {
            let member = member.clone();
            async move {
                let looked = replicate::look(member.source.as_ref(), member.target.as_ref()).await;
                looked.map_err(|error| GroupError::of(&member, error))
            }
        };
        try_join_all(self.members.iter().map(look)).await
    }

    async fn with_leases(&self) -> Result<GroupEnd, GroupError> {
        // Another worker may have been at it until a moment ago.
        let looks = self.looks().await?;
        let begun = begun(&looks);
        let point = common_point(&looks);
        if let Some(point) = point.clone().filter(|_| begun.is_empty() && !self.options.forced) {
            let age = Duration::try_from(crate::clock::now().duration_since(point.at));
            if age.is_ok_and(|age| age < self.options.not_younger_than) {
                return Ok(GroupEnd::Recent { point });
            }
        }
        for name in &begun {
            self.refuse_cancelled()?;
            self.finish(name, &looks).await?;
            failpoint!("group.finished");
        }
        self.refuse_cancelled()?;
        let report = self.new_point(!begun.is_empty()).await?;
        failpoint!("group.committed");
        self.prune().await;
        failpoint!("group.pruned");
        Ok(GroupEnd::Committed(Box::new(report)))
    }

    /// Nothing is begun any more once the job was told to stop.
    fn refuse_cancelled(&self) -> Result<(), GroupError> {
        if !self.cancel.is_cancelled() {
            return Ok(());
        }
        let error = CycleError::Interrupted { snapshot: "none".to_owned(), progress_to: 0, size: 0 };
        Err(GroupError { volume: self.options.server.clone(), error })
    }

    fn sync_options(&self, name: &str, keep: usize) -> SyncOptions {
        SyncOptions {
            request: Request { name: Some(name.to_owned()), automatic: true, ..Request::default() },
            keep,
            keep_for: self.options.retention.keep_for,
            protect: Vec::new(),
            compression: Compression::None,
            limits: self.options.limits.clone(),
            snapshotter: None,
        }
    }

    /// How many snapshots a volume's own cycle leaves: all, where its companions might not get the new point.
    fn keep(&self) -> usize {
        if self.members.len() == 1 { self.options.retention.keep } else { usize::MAX }
    }

    /// Carries a point that was made for all volumes over to those that do not have it.
    async fn finish(&self, name: &str, looks: &[Look]) -> Result<(), GroupError> {
        let finish = |(member, look): (&Member, &Look)| {
            let member = member.clone();
            let committed = look.commits.iter().any(|commit| commit.name == name);
            let options =
                SyncOptions { snapshotter: Some(Arc::new(NoSnapshots)), ..self.sync_options(name, self.keep()) };
            async move {
                let fail = |error: CycleError| GroupError::of(&member, error);
                let snapshots = member.source.snapshots().await.map_err(|error| fail(error.into()))?;
                let kept = member.source.snapshot_support() == SnapshotSupport::Kept;
                // A volume that has lost this snapshot goes on to the next point; this one will not be the server's.
                if committed || kept && !snapshots.iter().any(|snapshot| snapshot.name == name) {
                    return Ok(());
                }
                let done =
                    replicate::sync_held(&member.source, &member.target, &options, &member.progress, self.cancel).await;
                done.map(drop).map_err(fail)
            }
        };
        try_first(join_all(self.members.iter().zip(looks).map(finish)).await)
    }

    async fn new_point(&self, finished_first: bool) -> Result<GroupReport, GroupError> {
        let name = replicate::name_of_now();
        let (begun, at) = (Instant::now(), crate::clock::now());
        let gate = Gate::new(&self.options.server, &self.options.quiesce, self.members.len());
        let cycle = |member: &Member| {
            let (mut member, pass) = (member.clone(), gate.member());
            if finished_first {
                // Its counters are those of what was finished.
                member.progress = Arc::default();
            }
            let options = SyncOptions { snapshotter: Some(pass.clone()), ..self.sync_options(&name, self.keep()) };
            async move {
                let done =
                    replicate::sync_held(&member.source, &member.target, &options, &member.progress, self.cancel).await;
                match done {
                    Ok(report) => {
                        pass.leave(&format!("{} made no snapshot", member.name));
                        Ok((report, begun.elapsed()))
                    }
                    Err(error) => {
                        pass.leave(&format!("{} failed: {error}", member.name));
                        Err((pass.was_given_up(), GroupError::of(&member, error)))
                    }
                }
            }
        };
        let ends = join_all(self.members.iter().map(cycle)).await;
        let (mut volumes, mut took, mut failed) = (Vec::new(), Duration::ZERO, None::<(bool, GroupError)>);
        for end in ends {
            match end {
                Ok((report, after)) => {
                    let after = after.saturating_sub(Duration::from_secs_f64(report.stages.prune_seconds));
                    took = took.max(after);
                    volumes.push(report);
                }
                // The volume that failed of itself says more than those that gave up because of it.
                Err(error) if failed.as_ref().is_none_or(|(given_up, _)| *given_up) => failed = Some(error),
                Err(_) => {}
            }
        }
        match failed {
            Some((_, error)) => Err(error),
            None => Ok(GroupReport {
                point: GroupPoint { snapshot: name, at },
                volumes,
                took,
                frozen_for: gate.frozen_for(),
                finished_first,
            }),
        }
    }

    /// Now that all volumes have the new point, older ones may go.
    async fn prune(&self) {
        if self.members.len() == 1 {
            return;
        }
        let Retention { keep, keep_for } = self.options.retention;
        let prune = |member: &Member| {
            let member = member.clone();
            async move { replicate::prune_held(&member.source, &member.target, keep, keep_for).await }
        };
        let pruned = self.members.iter().map(prune);
        for (member, outcome) in self.members.iter().zip(join_all(pruned).await) {
            match outcome {
                Ok(pruned) => {
                    for left in pruned.left {
                        tracing::warn!(volume = member.name, "a snapshot was not removed: {left}");
                    }
                }
                // The next cycle tries again.
                Err(error) => tracing::warn!(volume = member.name, %error, "older snapshots were not removed"),
            }
        }
    }
}

fn try_first(ends: Vec<Result<(), GroupError>>) -> Result<(), GroupError> {
    ends.into_iter().collect()
}

#[cfg(test)]
#[path = "group_tests.rs"]
mod tests;
