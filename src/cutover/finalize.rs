//! Finalizing: the kept sources of a server that runs from its targets go, and what poolshift has left on the targets.
//!
//! # The order
//!
//! 1. The leases of the sources, so that no way back begins meanwhile; then the journal is read again, and says from
//!    now on that the server is being finalized: a way back is refused.
//! 2. The clones of the sources are flattened.
//! 3. The snapshots of the sources are removed, and the sources: by the provider, where somebody else keeps books of them
//!    ([`Provider::remove_source`]), which is told only when no snapshot and no client of poolshift's is left.
//! 4. On the targets poolshift's snapshots are removed, by their ids, and then the state that knows them; the record of
//!    the metadata that was carried; the note.
//! 5. The journal.
//!
//! What is done already is no error, so that a run that was cut is finished by the next one. The server runs meanwhile,
//! and has the locks of the targets: librbd has it do what needs them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::being_finalized;
use super::farewell::{self, CloneFarewell, Farewell, Going, SourceFarewell, TargetFarewell, VolumeFarewell, Whose};
use super::journal::{Journal, JournalVolume, kept_name};
use super::metadata;
use super::provider::{Provider, ServerDisk};
use super::server::{CutoverError, Observer, Result};
use crate::failpoint::failpoint;
use crate::image::metadata::lost;
use crate::image::rbd::{Connector, FlattenProgress, ImageTree, RbdImage, RbdSnapshot};
use crate::image::{
    Disk as _, ErrorKind, ImageError, ImageSpec, LeaseOwner, Snapshot, SourceImage as _, TargetImage as _,
};
use crate::replicate::CycleError;
use crate::replicate::state::TargetState;

/// How long a client is waited for that has a source open once it was begun: one that was killed seems to, for 30 s.
const CLOSE_PATIENCE: Duration = Duration::from_secs(45);
/// How often it is looked whether it has gone.
const STEP: Duration = Duration::from_millis(500);

/// A server that was cut over, with what is kept of it open.
pub struct Kept {
    name: String,
    provider: Arc<dyn Provider>,
    journal: Journal,
    connector: Connector,
    volumes: Vec<KeptVolume>,
}

struct KeptVolume {
    disk: ServerDisk,
    journal: JournalVolume,
    /// `None` once it is gone.
    source: Option<RbdImage>,
    target: RbdImage,
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Finalized {
    /// The server.
    pub server: String,
    /// Whether nothing is left to be done; otherwise it was told to stop, and the next run goes on.
    pub done: bool,
    /// The clones that were flattened.
    pub flattened: Vec<String>,
    /// The sources that were removed.
    pub removed_images: Vec<String>,
    /// How many snapshots were removed, on both sides.
    pub removed_snapshots: usize,
}

/// Where an image is: pool, namespace, name. A file can't have been cut over.
pub fn place(spec: &ImageSpec) -> Result<(&str, Option<&str>, &str), ImageError> {
    match spec {
        ImageSpec::Rbd { pool, namespace, image, .. } => Ok((pool, namespace.as_deref(), image)),
        ImageSpec::File { .. } => Err(ImageError::new(ErrorKind::Unsupported, spec.to_string(), "finalize")
            .detail("only a server that is on RBD images can have been cut over")),
    }
}

pub(super) fn wrong_state(server: &str, problem: &str, hint: &str) -> CutoverError {
    CutoverError::WrongState { server: server.to_owned(), problem: problem.to_owned(), hint: hint.to_owned() }
}

pub(super) async fn journal_of(target: &RbdImage) -> Result<Option<Journal>> {
    let text = target.load_journal().await?;
    let parsed = text.as_deref().map(Journal::parse).transpose();
    parsed.map_err(|error| CutoverError::Journal { location: target.location().to_owned(), error })
}

/// The journal of a server that may be finalized.
fn cut_over(server: &str, journal: Option<Journal>) -> Result<Journal> {
    match journal {
        Some(journal) if journal.is_cut_over() => Ok(journal),
        Some(_) => Err(wrong_state(
            server,
            "is on its way: a cutover, or a way back, was begun and has not ended",
            "finish or undo it first: poolshift cutover, or poolshift rollback",
        )),
        None => Err(wrong_state(
            server,
            "has nothing to finalize: it was not cut over, or is finalized already",
            "if it was finalized, take it out of the plan: its sources are gone",
        )),
    }
}

pub(super) async fn load_state(target: &RbdImage) -> Result<Option<TargetState>> {
    let text = target.load_state().await?;
    let failed = |error| CycleError::State { target: target.location().to_owned(), error };
    Ok(text.as_deref().map(TargetState::parse).transpose().map_err(failed)?)
}

impl Kept {
    /// Opens what is kept of a server, by the ids in its journal. Changes nothing.
    ///
    /// [`CutoverError::WrongState`] if it was not cut over, or the plan has other volumes than the journal.
    pub async fn open(
        name: &str,
        provider: Arc<dyn Provider>,
        disks: Vec<ServerDisk>,
        (sources, targets): (&Connector, &Connector),
    ) -> Result<Self> {
        let Some(first) = disks.first() else { return Err(other_plan(name, "a volume")) };
        let first = open_first(name, first, (sources, targets)).await?;
        let journal = cut_over(name, journal_of(&first).await?)?;
        let (mut volumes, mut first) = (Vec::new(), Some(first));
        for disk in disks {
            let noted = journal.volumes.iter().find(|noted| noted.name == disk.volume).cloned();
            let Some(noted) = noted else { return Err(other_plan(name, &disk.volume)) };
            let (pool, namespace, _) = place(&disk.target)?;
            // By its id: of what was tidied up already nothing else says that it is the target.
            let target = match first.take() {
                Some(first) => Some(first).filter(|first| noted.target == *first.identity()),
                None => RbdImage::open_known(targets, pool, namespace, &noted.target).await?,
            };
            let Some(target) = target else { return Err(other_plan(name, &disk.volume)) };
            let (pool, namespace, _) = place(&disk.source)?;
            let source = RbdImage::open_known(sources, pool, namespace, &noted.source).await?;
            volumes.push(KeptVolume { disk, journal: noted, source, target });
        }
        if let Some(left_out) =
            journal.volumes.iter().find(|noted| !volumes.iter().any(|v| v.disk.volume == noted.name))
        {
            return Err(other_plan(name, &left_out.name));
        }
        Ok(Self { name: name.to_owned(), provider, journal, connector: sources.clone(), volumes })
    }

    /// What would go, and what stands in the way. Changes nothing.
    pub async fn look(&self) -> Result<Farewell> {
        let begun = self.journal.finalizing;
        let observed = self.provider.observe(&self.journal.notes).await?;
        let wrong_side = match farewell::wrong_side(&observed, self.provider.by_hand(), begun) {
            None => self.provider.keeps_sources().await?,
            wrong => wrong,
        };
        let since = self.journal.ended.clone().unwrap_or_else(|| self.journal.begun.clone());
        Ok(Farewell {
            server: self.name.clone(),
            by: self.provider.describe(),
            since,
            begun,
            wrong_side,
            volumes: try_join_all(self.volumes.iter().map(|volume| volume.look(self.provider.as_ref()))).await?,
        })
    }

    /// Removes what was agreed to, and nothing that has come since. `progress` shows the flatten that is under way;
    /// `cancel` ends it between two steps, or within a flatten.
    ///
    /// [`CutoverError::Bound`] where something stands in the way.
    pub async fn carry_out(
        mut self,
        agreed: &Farewell,
        flatten: bool,
        (observer, progress): (&dyn Observer, &Arc<FlattenProgress>),
        cancel: &CancellationToken,
    ) -> Result<Finalized> {
        let done = match self.begin(agreed, flatten).await {
            Ok(now) => self.remove_all(&now, (observer, progress), cancel).await,
            Err(error) => Err(error),
        };
        for source in self.volumes.iter().filter_map(|volume| volume.source.as_ref()) {
            if let Err(error) = source.release_lease().await {
                tracing::warn!(%error, "a lease was not given back");
            }
        }
        done
    }

    /// From here on there is no way back.
    async fn begin(&mut self, agreed: &Farewell, flatten: bool) -> Result<Farewell> {
        for source in self.volumes.iter().filter_map(|volume| volume.source.as_ref()) {
            let failed = |error| ImageError::from_io(error, source.location(), "say who takes the lease");
            source.acquire_lease(&LeaseOwner::current().map_err(failed)?).await?;
        }
        let Some(first) = self.volumes.first() else { return Err(other_plan(&self.name, "a volume")) };
        self.journal = cut_over(&self.name, journal_of(&first.target).await?)?;
        let now = self.look().await?;
        let obstacles = now.obstacles(flatten);
        if !obstacles.is_empty() {
            return Err(CutoverError::Bound { server: self.name.clone(), obstacles });
        }
        if !now.is_within(agreed) {
            let problem = "has more to lose by now than what was shown";
            return Err(wrong_state(&self.name, problem, "nothing was changed; run it again, and look at the list"));
        }
        self.journal.finalizing = true;
        self.store_journal(true).await?;
        failpoint!("finalize.begun");
        Ok(now)
    }

    async fn store_journal(&self, stays: bool) -> Result<()> {
        let Some(first) = self.volumes.first() else { return Ok(()) };
        let failed = |error| CutoverError::Journal { location: first.target.location().to_owned(), error };
        let text = stays.then(|| self.journal.render()).transpose().map_err(failed)?;
        Ok(first.target.store_journal(text.as_deref()).await?)
    }

    async fn remove_all(
        &mut self,
        now: &Farewell,
        (observer, progress): (&dyn Observer, &Arc<FlattenProgress>),
        cancel: &CancellationToken,
    ) -> Result<Finalized> {
        let mut done = Finalized { server: self.name.clone(), ..Finalized::default() };
        for (volume, going) in self.volumes.iter().zip(&now.volumes) {
            for clone in going.source.iter().flat_map(|source| &source.clones) {
                if cancel.is_cancelled() || !volume.flatten(clone, (observer, progress), cancel, &mut done).await? {
                    return Ok(done);
                }
            }
        }
        for (volume, going) in self.volumes.iter_mut().zip(&now.volumes) {
            if cancel.is_cancelled() {
                return Ok(done);
            }
            let by = (&self.connector, self.provider.as_ref());
            volume.remove_source(by, going.source.as_ref(), observer, &mut done).await?;
        }
        for (volume, going) in self.volumes.iter().zip(&now.volumes) {
            if cancel.is_cancelled() {
                return Ok(done);
            }
            volume.tidy_target(&going.target, observer, &mut done).await?;
        }
        if let Some(first) = self.volumes.first() {
            first.target.store_note(None).await?;
        }
        failpoint!("finalize.note-removed");
        self.store_journal(false).await?;
        failpoint!("finalize.journal-removed");
        done.done = true;
        Ok(done)
    }
}

/// The first target, which keeps the journal. Where its name is not to be known beforehand, its source leads to it; where
/// that is gone, by a run that was cut, the journal itself does.
async fn open_first(name: &str, disk: &ServerDisk, clusters: (&Connector, &Connector)) -> Result<RbdImage> {
    let (sources, targets) = clusters;
    let missing = match targets.open_target_of(&disk.target, disk.target_in_use.as_ref(), (sources, &disk.source)).await
    {
        Err(error) if error.kind == ErrorKind::NotFound && disk.target_in_use.is_some() => error,
        opened => return Ok(opened?),
    };
    let (pool, namespace, _) = place(&disk.target)?;
    let (_, _, source_name) = place(&disk.source)?;
    for (image, text) in targets.journals(pool, namespace).await? {
        let Ok(journal) = Journal::parse(&text) else { continue };
        let first = journal.volumes.first();
        let is_of = first.is_some_and(|volume| volume.source_name == source_name && volume.target == *image.identity());
        if journal.server == name && journal.finalizing && is_of {
            return Ok(image);
        }
    }
    Err(missing.into())
}

fn other_plan(server: &str, volume: &str) -> CutoverError {
    let problem = format!("was cut over with other images than the plan has for {volume}");
    wrong_state(server, &problem, "the plan has to be as it was at the cutover")
}

fn snapshot_of(going: &Going) -> Snapshot {
    Snapshot { id: going.id, name: going.name.clone(), size: going.size }
}

impl KeptVolume {
    async fn look(&self, provider: &dyn Provider) -> Result<VolumeFarewell> {
        let state = load_state(&self.target).await?;
        let follows_another = state.as_ref().filter(|state| state.source != self.journal.source);
        let follows_another = follows_another.map(|state| state.source_location.clone());
        let snapshots = match &state {
            None => Vec::new(),
            Some(state) => {
                let all = self.target.relations().await?.snapshots;
                let ours = all.iter().filter(|snapshot| farewell::on_target(snapshot, state));
                ours.map(|snapshot| Going::of(snapshot, Whose::Poolshift)).collect()
            }
        };
        let source = match &self.source {
            Some(source) => Some(self.look_at_source((source, provider), state.as_ref()).await?),
            None => None,
        };
        let target = TargetFarewell { location: self.target.location().to_owned(), snapshots, follows_another };
        Ok(VolumeFarewell { volume: self.disk.volume.clone(), source, target })
    }

    async fn look_at_source(
        &self,
        (source, provider): (&RbdImage, &dyn Provider),
        state: Option<&TargetState>,
    ) -> Result<SourceFarewell> {
        let (tree, users, name) = futures::try_join!(source.tree(), source.users(), source.name())?;
        let (going, stays) = futures::try_join!(source.metadata(), self.target.metadata())?;
        let known = metadata::known_keys(&self.target).await?;
        let whose = |snapshot: &RbdSnapshot| Going::of(snapshot, farewell::on_source(snapshot, state));
        let left = match provider.keeps_source_names() {
            true => self.journal.source_name.clone(),
            false => kept_name(&self.journal.source_name),
        };
        Ok(SourceFarewell {
            location: source.location().to_owned(),
            named_as_kept: name == left,
            size: tree.relations.size,
            own_bytes: tree.relations.own_bytes,
            snapshots: tree.relations.snapshots.iter().map(whose).collect(),
            clones: tree.clones_deepest_first().into_iter().map(clone_of).collect(),
            metadata: lost(&going, &stays, &known),
            users: users.into_iter().filter(|user| !user.is_own).map(|user| user.address).collect(),
        })
    }

    /// Cuts a clone loose; `false` if it was told to stop.
    async fn flatten(
        &self,
        clone: &CloneFarewell,
        (observer, progress): (&dyn Observer, &Arc<FlattenProgress>),
        cancel: &CancellationToken,
        done: &mut Finalized,
    ) -> Result<bool> {
        let Some(source) = &self.source else { return Ok(true) };
        let image = match source.open_linked(&clone.image).await {
            Ok(image) => image,
            Err(error) if error.kind == ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        if image.relations().await?.flatten.is_none() {
            return Ok(true);
        }
        observer.note(&format!("flattening {}", clone.image));
        progress.total.store(0, Ordering::Relaxed);
        let flattened = image.flatten(None, progress, cancel).await?;
        failpoint!("finalize.flattened");
        if flattened.done {
            done.flattened.push(clone.image.to_string());
        }
        Ok(flattened.done)
    }

    async fn remove_source(
        &mut self,
        (connector, provider): (&Connector, &dyn Provider),
        going: Option<&SourceFarewell>,
        observer: &dyn Observer,
        done: &mut Finalized,
    ) -> Result<()> {
        let (Some(source), Some(going)) = (self.source.take(), going) else {
            // Gone, but perhaps not for whoever keeps books of it.
            provider.remove_source(&self.disk.volume).await?;
            let (pool, namespace, _) = place(&self.disk.source)?;
            return Ok(connector.remove_remains(pool, namespace, &self.journal.source.image).await?);
        };
        observer.note(&format!("removing {}", going.location));
        let removed = remove_source(&source, going, observer, done).await;
        if let Err(error) = removed {
            self.source = Some(source);
            return Err(error);
        }
        if provider.keeps_source_names() {
            source.release_lease().await?;
        }
        if !provider.remove_source(&self.disk.volume).await? {
            source.remove().await?;
        }
        failpoint!("finalize.source-removed");
        done.removed_images.push(going.location.clone());
        Ok(())
    }

    async fn tidy_target(&self, going: &TargetFarewell, observer: &dyn Observer, done: &mut Finalized) -> Result<()> {
        observer.note(&format!("tidying up {}", going.location));
        for snapshot in &going.snapshots {
            remove_snapshot(&self.target, snapshot, done).await?;
        }
        self.target.forget_state().await?;
        self.target.store_known_keys(None).await?;
        failpoint!("finalize.target-tidied");
        Ok(())
    }
}

fn clone_of(tree: &ImageTree) -> CloneFarewell {
    let bound = tree.relations.snapshots.iter().filter(|snapshot| !tree.relations.deep_flatten && snapshot.has_parent);
    CloneFarewell {
        image: tree.image.clone(),
        cost: tree.relations.flatten,
        bound_snapshots: bound.map(|snapshot| snapshot.name.clone()).collect(),
    }
}

/// All that has to go before the source can.
async fn remove_source(
    source: &RbdImage,
    going: &SourceFarewell,
    observer: &dyn Observer,
    done: &mut Finalized,
) -> Result<()> {
    // One in the trash that had clones has gone with the last of them, or goes like the others.
    for snapshot in &going.snapshots {
        remove_snapshot(source, snapshot, done).await?;
    }
    let begun = Instant::now();
    let mut told = false;
    while let Some(user) = source.users().await?.into_iter().find(|user| !user.is_own) {
        if begun.elapsed() >= CLOSE_PATIENCE {
            break; // The removal says who it is.
        }
        if !told {
            observer.note(&format!("waiting for {} to close {}", user.address, going.location));
            told = true;
        }
        tokio::time::sleep(STEP).await;
    }
    Ok(())
}

/// Removes a snapshot, by its id. Gone already is no error.
async fn remove_snapshot(image: &RbdImage, going: &Going, done: &mut Finalized) -> Result<()> {
    let gone = |error: ImageError| if error.kind == ErrorKind::NotFound { Ok(()) } else { Err(error) };
    let snapshot = snapshot_of(going);
    if going.protected {
        // By name, which may be another one's by now.
        let there = image.snapshots().await?;
        if there.iter().any(|there| (there.id, &there.name) == (snapshot.id, &snapshot.name)) {
            image.unprotect_snapshot(&going.name).await.or_else(|error| match error.kind {
                // It was not protected any more.
                ErrorKind::Unsupported => Ok(()),
                _ => gone(error),
            })?;
        }
    }
    match image.remove_snapshot(&snapshot).await {
        Ok(()) => done.removed_snapshots += 1,
        Err(error) => gone(error)?,
    }
    failpoint!("finalize.snapshot-removed");
    Ok(())
}

/// Fails for a server that is being finalized: its sources are going, and it has no other way to go.
pub async fn refuse_begun(server: &str, first_target: &RbdImage) -> Result<()> {
    match journal_of(first_target).await? {
        Some(journal) if journal.finalizing => Err(being_finalized(server)),
        _ => Ok(()),
    }
}
