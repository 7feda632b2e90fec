//! Volumes that nobody has, which Cinder copies to the other pool by itself: strategy `retype`. No server, no replication;
//! while it is copied nobody can use the volume.
//!
//! | part | what it is |
//! |---|---|
//! | `look` | what stands in the way, as a pure function of what was found |
//! | `images` | the volume's images, which are only ever read |
//! | `effects` | what Cinder is asked for |
//! | `note` | what the next run has to know, with the volume |
//!
//! # How
//!
//! Clones that hang on the volume's image are cut loose, if they may be, and the snapshots go that were there for them
//! only. Then Cinder is asked for the other type, by way of the helper types if the plan has some, and looked at until the
//! volume has it and is at rest: its answer to the request says nothing. What Cinder gives up without a word is asked for
//! again.
//!
//! # What can't happen
//!
//! - A failing copy of Cinder's *deletes* an image of the volume's name where it goes to: it is looked for before every
//!   request, and nothing is asked while there is one.
//! - A copy has no snapshots, and Cinder puts an image that has some, or clones, into the trash, or leaves it behind: such
//!   volumes are refused by name.
//! - Cinder would copy a volume that a server writes to, and throw away what is written meanwhile: only what nobody has
//!   is asked for. A server that may have taken it in the instant between the look and the request is an error.
//!
//! # After a crash
//!
//! Cinder goes on, or has ended; the next run asks it which, and does what is left. The way back is the same with the
//! sides changed.

mod effects;
mod images;
mod look;
mod note;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::super::{Precondition, Side, Verdict, name};
use super::OpenStack;
use super::switch::{CloudVolume, Connectors};
use crate::cutover::{CutoverError, Observer};
use crate::failpoint::failpoint;
use crate::image::rbd::{FlattenProgress, RbdImage, RbdSnapshot};
use crate::image::{ErrorKind, ImageError, Point, Snapshot, SourceImage as _};
use crate::openstack::cinder::{Status, Volume};
use crate::openstack::{Cloud, CloudError};
use crate::pipeline::Limits;
use crate::plan::{self, OpenStackCutover};
use crate::replicate::{self, Progress};
use effects::{CloneSettled, Gauge, Noted, Retyped, Settled};
use look::{Found, Judged};
use note::Note;

/// How long a client that has the image open may take to let go of it: one that was killed takes half a minute.
const RELEASE: Duration = Duration::from_secs(45);
/// How often that is looked at.
const POLL: Duration = Duration::from_millis(500);
/// How long Cinder may take to remove what it has copied before it is spoken of. With much in it, that takes longer.
const REMOVAL: Duration = Duration::from_secs(30);
/// How many types a volume goes through at most.
const TYPES_MAX: usize = 8;

/// What a retype is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetypeOptions {
    /// To which side.
    pub to: Side,
    /// Whether clones that hang on a volume are cut loose.
    pub flatten: bool,
    /// Whether the volume is read before and after, and compared by its digest.
    pub verify: bool,
}

/// Where a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RetypeState {
    /// Where it is to go, at rest, with nothing left to do.
    There,
    /// Begun by poolshift, or under way in Cinder: it is finished.
    Begun,
    /// Neither.
    ToGo,
}

/// A volume that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct RetypeLook {
    /// The server of the plan.
    pub server: String,
    /// Its name in the plan.
    pub volume: String,
    /// Cinder's id of it.
    pub cinder: String,
    /// The type that it has.
    pub from_type: String,
    /// The type that it is to have.
    pub to_type: String,
    /// GiB.
    pub size_gib: u64,
    /// Where it is.
    pub state: RetypeState,
    /// Everything that has to be so, with its verdict.
    pub preconditions: Vec<Precondition>,
    /// The clones that are cut loose before.
    pub to_flatten: Vec<String>,
    /// The snapshots that are removed before, which were there for clones only.
    pub to_remove: Vec<String>,
}

impl RetypeLook {
    /// Whether nothing stands in the way.
    pub fn is_ready(&self) -> bool {
        self.preconditions.iter().all(|found| found.verdict != Verdict::Error)
    }
}

/// How the retype of a volume ended.
#[derive(Clone, Debug, Serialize)]
pub struct RetypeReport {
    /// The type that it had when this run began.
    pub from_type: String,
    /// The type that it has.
    pub to_type: String,
    /// How long this run took.
    pub seconds: f64,
    /// The clones that were cut loose.
    pub flattened: Vec<String>,
    /// The snapshots that were removed.
    pub removed_snapshots: Vec<String>,
    /// Whether it holds what it held before; `None` where that was not to be looked at, or nobody knows any more.
    pub verified: Option<bool>,
    /// What a person should know.
    pub remarks: Vec<String>,
}

/// How far it is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct Copying {
    /// Bytes of the copy that are there.
    pub done: AtomicU64,
    /// Bytes that there are to copy, as far as is known; 0 where it is not.
    pub total: AtomicU64,
}

impl Copying {
    fn show(&self, done: Option<u64>) {
        if let Some(done) = done {
            self.done.store(done, Ordering::Relaxed);
        }
    }
}

/// The volumes of a server of the plan, which Cinder moves by itself.
#[derive(Debug)]
pub struct Retype {
    provider: OpenStack,
}

/// What is known of a volume.
struct Known {
    shown: Volume,
    /// In which pool it is, by its type.
    pool: Side,
    /// The types that are left on its way.
    way: Vec<(String, bool)>,
    /// That of a retype this way.
    note: Option<Note>,
}

impl Known {
    fn state(&self) -> RetypeState {
        // One that was noted the other way as well: there is something to tidy up.
        match self.shown.is_moving() || self.shown.metadata.contains_key(note::KEY) {
            false if self.way.is_empty() => RetypeState::There,
            false => RetypeState::ToGo,
            true => RetypeState::Begun,
        }
    }

    fn migrates(&self) -> bool {
        self.way.iter().any(|(_, migrates)| *migrates)
    }
}

impl Retype {
    /// The server of the plan. Nobody is asked before something is to be known of it.
    pub fn new(server: &plan::Server, config: OpenStackCutover, connectors: &Connectors) -> Self {
        Self { provider: OpenStack::new(server, config, connectors) }
    }

    /// The names that its volumes have in the plan, with Cinder's ids of them.
    pub fn volumes(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.provider.volumes.iter().map(|volume| (volume.name.as_str(), volume.cinder.volume.as_str()))
    }

    fn at(&self, index: usize) -> Result<&CloudVolume, CutoverError> {
        let missing = || self.provider.error("retype", format!("it has no volume {index}"), None).into();
        self.provider.volumes.get(index).ok_or_else(missing)
    }

    async fn cloud(&self) -> Result<&Cloud, CutoverError> {
        Ok(self.provider.cloud("retype").await?)
    }

    fn cloud_error(&self, error: &CloudError) -> CutoverError {
        self.provider.cloud_error("retype", error).into()
    }

    /// Looks at a volume, and what is in its way. Changes nothing.
    pub async fn look(&self, index: usize, options: RetypeOptions) -> Result<RetypeLook, CutoverError> {
        let volume = self.at(index)?;
        let known = self.known(volume, options.to).await?;
        let now = known.shown.volume_type.clone().unwrap_or_default();
        let what = format!("volume {}", known.shown.id);
        let (mut preconditions, mut judged) = (Vec::new(), Judged::default());
        let to_type = volume.final_type(options.to);
        if known.shown.is_moving() {
            let found = format!("{}: it is waited for", known.shown.status);
            preconditions.push(Precondition::new(&what, Verdict::Ok, found));
        } else if !known.way.is_empty() {
            judged = self.judge(volume, &known, options).await?;
            let of = |verdict, texts: &[String]| {
                texts.iter().map(|text| Precondition::new(&what, verdict, text)).collect::<Vec<_>>()
            };
            preconditions.extend(of(Verdict::Error, &judged.errors));
            preconditions.extend(of(Verdict::Warning, &judged.warnings));
            if judged.errors.is_empty() {
                let found = format!("{} GiB of type {now:?}, on to {to_type:?}", known.shown.size);
                preconditions.insert(0, Precondition::new(&what, Verdict::Ok, found));
            }
        }
        Ok(RetypeLook {
            server: self.provider.server.clone(),
            volume: volume.name.clone(),
            cinder: known.shown.id.clone(),
            from_type: now,
            to_type: to_type.to_owned(),
            size_gib: known.shown.size,
            state: known.state(),
            preconditions,
            to_flatten: judged.to_flatten.iter().map(ToString::to_string).collect(),
            to_remove: judged.to_remove.iter().map(|snapshot| snapshot.name.clone()).collect(),
        })
    }

    async fn known(&self, volume: &CloudVolume, to: Side) -> Result<Known, CutoverError> {
        let cloud = self.cloud().await?;
        let shown = cloud.volume(&volume.cinder.volume).await.map_err(|error| self.cloud_error(&error))?;
        let now = shown.volume_type.clone().unwrap_or_default();
        let Some(pool) = volume.pool_of(&now) else {
            let problem = format!("volume {} has type {now:?}, which the plan does not know", volume.name);
            let hint = "make the plan anew: poolshift plan --openstack --strategy retype";
            return Err(self.provider.error("retype", problem, Some(hint)).into());
        };
        let way = way(volume, &now, to);
        let note = Note::of(shown.metadata.get(note::KEY), to);
        Ok(Known { shown, pool, way, note })
    }

    async fn judge(&self, volume: &CloudVolume, known: &Known, options: RetypeOptions) -> Result<Judged, CutoverError> {
        let cloud = self.cloud().await?;
        let cloud_error = |error: CloudError| self.cloud_error(&error);
        let snapshots = cloud.snapshots(&known.shown.id).await.map_err(cloud_error)?;
        let types = cloud.volume_types().await.map_err(cloud_error)?;
        let mut encrypting = Vec::new();
        for found in types.iter().filter(|found| known.way.iter().any(|(name, _)| *name == found.name)) {
            if cloud.is_encrypting(&found.id).await.map_err(cloud_error)? {
                encrypting.push(found.name.clone());
            }
        }
        let quotas = match &known.shown.project {
            // Cinder itself has the last word.
            Some(project) => cloud.quotas(project).await.unwrap_or_default(),
            None => BTreeMap::new(),
        };
        let (mut bound, mut taken, mut replicas) = (None, None, Vec::new());
        if known.migrates() {
            taken = images::in_the_way(volume, options.to).await?;
            replicas = images::replicas(volume).await?;
            if let Some(image) = images::open(volume, known.pool).await? {
                bound = Some(images::bound(&image).await?);
            }
        }
        Ok(look::judge(&Found {
            shown: &known.shown,
            snapshots: &snapshots,
            image: &volume.at(known.pool).1.in_use,
            bound: bound.as_ref(),
            taken: taken.as_deref(),
            replicas: &replicas,
            way: &known.way,
            types: &types,
            encrypting: &encrypting,
            quotas: &quotas,
            flatten: options.flatten,
        }))
    }

    /// Has Cinder give a volume its type on the other side, and comes back when it has it, or can't get it. Where it is
    /// there already, nothing is done. Dropped, it leaves Cinder at work, and the next call goes on.
    pub async fn carry_out(
        &self,
        index: usize,
        options: RetypeOptions,
        (observer, copying): (&dyn Observer, &Copying),
        cancel: &CancellationToken,
    ) -> Result<RetypeReport, CutoverError> {
        let begun = Instant::now();
        let volume = self.at(index)?;
        let (cloud, to) = (self.cloud().await?, options.to);
        let operation = operation(to);
        let gauge = &Gauge::new(volume, to, copying);
        self.provider.bring_about(&operation, &Settled { cloud, volume, gauge }).await?;
        let mut known = self.known(volume, to).await?;
        let mut report = RetypeReport {
            from_type: known.shown.volume_type.clone().unwrap_or_default(),
            to_type: volume.final_type(to).to_owned(),
            seconds: 0.0,
            flattened: Vec::new(),
            removed_snapshots: Vec::new(),
            verified: None,
            remarks: Vec::new(),
        };
        if known.migrates() {
            self.make_ready(volume, &known, options, (observer, &mut report), cancel).await?;
            self.begin(volume, &mut known, options, (observer, copying)).await?;
        } else if !known.way.is_empty() {
            refuse(volume, self.judge(volume, &known, options).await?)?;
        }
        let ended_before = known.way.is_empty();
        for _ in 0..TYPES_MAX {
            let Some((next, migrates)) = known.way.first().cloned() else { break };
            let (next, asks, free) = (next.as_str(), AtomicU32::new(0), AtomicBool::new(false));
            let effect = Retyped { cloud, volume, next, migrates, to, gauge, observer, asks, free };
            self.provider.bring_about(&operation, &effect).await?;
            known = Known { note: known.note, ..self.known(volume, to).await? };
        }
        self.arrived(volume, &known, to, &mut report.remarks).await?;
        let digest = known.note.as_ref().and_then(|note| note.digest.as_ref());
        let in_use = known.shown.status != Status::Available.name() || !known.shown.attachments.is_empty();
        if digest.is_some() && ended_before && in_use {
            let text = "it can't be compared with what it held before: somebody has had it since";
            report.remarks.push(text.to_owned());
        } else if let Some(before) = digest {
            observer.note(&format!("{}: reading it, to compare it with what it held before", volume.name));
            failpoint!("retype.compare");
            report.verified = Some(self.digest(volume, to).await? == *before);
        } else if options.verify {
            let text = "it can't be compared with what it held before: nobody has read that";
            report.remarks.push(text.to_owned());
        }
        if report.verified == Some(false) {
            let (key, id) = (note::KEY, &volume.cinder.volume);
            let text = format!(
                "its metadata keeps the digest of before; to forget it: openstack volume unset --property {key} {id}"
            );
            report.remarks.push(text);
        } else {
            self.provider.bring_about(&operation, &Noted { cloud, volume, text: None }).await?;
        }
        report.seconds = begun.elapsed().as_secs_f64();
        Ok(report)
    }

    /// Cuts loose what hangs on it, and waits until nobody has it open.
    async fn make_ready(
        &self,
        volume: &CloudVolume,
        known: &Known,
        options: RetypeOptions,
        (observer, report): (&dyn Observer, &mut RetypeReport),
        cancel: &CancellationToken,
    ) -> Result<(), CutoverError> {
        let judged = refuse(volume, self.judge(volume, known, options).await?)?;
        let Some(image) = images::open(volume, known.pool).await? else { return Ok(()) };
        for link in &judged.to_flatten {
            observer.note(&format!("{}: cutting loose {link}", volume.name));
            if let Some(id) = link.image.strip_prefix("volume-").filter(|_| plan::is_cinders(&link.image)) {
                // It may be under way itself, and goes from here then.
                let (cloud, operation) = (self.cloud().await?, operation(options.to));
                self.provider.bring_about(&operation, &CloneSettled { cloud, id }).await?;
            }
            let clone = match image.open_linked(link).await {
                Ok(clone) => clone,
                Err(error) if error.kind == ErrorKind::NotFound => continue,
                Err(error) => return Err(error.into()),
            };
            let flattened = clone.flatten(None, &Arc::new(FlattenProgress::default()), cancel).await?;
            if !flattened.done {
                return Err(CutoverError::Interrupted { server: self.provider.server.clone() });
            }
            report.flattened.push(link.to_string());
        }
        for snapshot in &judged.to_remove {
            // Cinder may be about to clone it.
            if let Some(id) = snapshot.name.strip_suffix(".clone_snap").and_then(|name| name.strip_prefix("volume-")) {
                let (cloud, operation) = (self.cloud().await?, operation(options.to));
                self.provider.bring_about(&operation, &CloneSettled { cloud, id }).await?;
            }
        }
        self.remove_snapshots(&image, &judged.to_remove, report).await?;
        if !judged.to_flatten.is_empty() || !judged.to_remove.is_empty() {
            // Whatever is bound all the same, for want of deep-flatten or because it is new, is named.
            let again = RetypeOptions { flatten: false, ..options };
            refuse(volume, self.judge(volume, known, again).await?)?;
        }
        self.until_closed(volume, &image, observer).await
    }

    async fn remove_snapshots(
        &self,
        image: &RbdImage,
        wanted: &[RbdSnapshot],
        report: &mut RetypeReport,
    ) -> Result<(), ImageError> {
        if wanted.is_empty() {
            return Ok(());
        }
        let now = image.relations().await?.snapshots;
        for wanted in wanted {
            // By its id, and only what is seen to have no clone.
            let Some(found) = now.iter().find(|found| found.id == wanted.id && found.clones.is_empty()) else {
                continue;
            };
            if found.protected {
                image.unprotect_snapshot(&found.name).await?;
            }
            image.remove_snapshot(&Snapshot { id: found.id, name: found.name.clone(), size: found.size }).await?;
            report.removed_snapshots.push(found.name.clone());
        }
        Ok(())
    }

    /// A client that has it open would keep Cinder from removing it.
    async fn until_closed(
        &self,
        volume: &CloudVolume,
        image: &RbdImage,
        observer: &dyn Observer,
    ) -> Result<(), CutoverError> {
        let begun = Instant::now();
        let mut said = false;
        loop {
            let users = image.watchers().await?;
            let Some(first) = users.first() else { return Ok(()) };
            if begun.elapsed() >= RELEASE {
                let problem = format!("{} has volume {} open", first.address, volume.name);
                let hint = "end what uses its image: Cinder could not remove it after its copy";
                return Err(self.provider.error("retype", problem, Some(hint)).into());
            }
            if !said && !first.is_own {
                observer.note(&format!("{}: waiting for {}, which has its image open", volume.name, first.address));
                said = true;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Notes that it is begun, with what it holds, if that is to be verified.
    async fn begin(
        &self,
        volume: &CloudVolume,
        known: &mut Known,
        options: RetypeOptions,
        (observer, copying): (&dyn Observer, &Copying),
    ) -> Result<(), CutoverError> {
        let to_copy = images::copied(volume, known.pool).await?.there.unwrap_or_default();
        copying.total.store(to_copy, Ordering::Relaxed);
        let mut digest = None;
        if options.verify {
            // Whatever a run that was cut has noted: somebody may have had the volume since.
            observer.note(&format!("{}: reading it, to compare its copy with it", volume.name));
            digest = Some(self.digest(volume, known.pool).await?);
            // That may have taken hours: a snapshot that was made meanwhile would be lost.
            *known = self.known(volume, options.to).await?;
            refuse(volume, self.judge(volume, known, RetypeOptions { flatten: false, ..options }).await?)?;
            if let Some(image) = images::open(volume, known.pool).await? {
                self.until_closed(volume, &image, observer).await?;
            }
        }
        let note = Note::new(options.to, jiff::Timestamp::now(), digest);
        let (cloud, text) = (self.cloud().await?, Some(note.text()));
        self.provider.bring_about(&operation(options.to), &Noted { cloud, volume, text }).await?;
        known.note = Some(note);
        Ok(())
    }

    async fn digest(&self, volume: &CloudVolume, side: Side) -> Result<String, CutoverError> {
        let Some(image) = images::open(volume, side).await? else {
            return Err(self.not_there(volume, side).into());
        };
        let view = image.view(&Point::Head).await?;
        Ok(replicate::digest(view, image.layout(), &Limits::default(), &Progress::default()).await?)
    }

    fn not_there(&self, volume: &CloudVolume, side: Side) -> super::ProviderError {
        let problem = format!("volume {} has its type, and {} is not there", volume.name, volume.image(side));
        self.provider.error("retype", problem, Some("look at the backends of the types in the plan"))
    }

    /// Makes sure that its image is where its type says.
    async fn arrived(
        &self,
        volume: &CloudVolume,
        known: &Known,
        to: Side,
        remarks: &mut Vec<String>,
    ) -> Result<(), CutoverError> {
        if !volume.is_image_of(&known.shown) {
            let problem = format!(
                "volume {} has its type, and Cinder calls its image {} now, which the plan does not know",
                volume.name,
                known.shown.image()
            );
            let hint = "it is of use as it is; make the plan anew: poolshift plan --openstack --strategy retype";
            return Err(self.provider.error("retype", problem, Some(hint)).into());
        }
        if images::in_the_way(volume, to).await?.is_none() {
            return Err(self.not_there(volume, to).into());
        }
        // Where its driver can't move an image itself, Cinder removes what it has copied after it has said that it is
        // done.
        let begun = Instant::now();
        loop {
            let left = images::in_the_way(volume, to.other()).await;
            if matches!(left, Ok(None)) {
                break;
            }
            if begun.elapsed() >= REMOVAL
                && let Some(left) = left?
            {
                remarks.push(format!(
                    "Cinder has not removed what it has copied, {left}: if it is not still at it, remove it once nothing \
                     needs it"
                ));
                break;
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }
}

/// The types that a volume goes through from one that it has, each with whether Cinder moves it to the other pool.
fn way(volume: &CloudVolume, now: &str, to: Side) -> Vec<(String, bool)> {
    let mut way: Vec<(String, bool)> = Vec::new();
    while way.len() < TYPES_MAX
        && let Some((next, migrates)) = volume.next_type(way.last().map_or(now, |(name, _)| name), to)
    {
        way.push((next.to_owned(), migrates));
    }
    way
}

fn refuse(volume: &CloudVolume, judged: Judged) -> Result<Judged, CutoverError> {
    if judged.errors.is_empty() {
        return Ok(judged);
    }
    Err(CutoverError::NotRetyped { volume: volume.name.clone(), obstacles: judged.errors })
}

fn operation(to: Side) -> String {
    format!("retype to the {}", name(to))
}
