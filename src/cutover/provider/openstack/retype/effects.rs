//! What is asked of Cinder: another type, and the note.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::super::super::Side;
use super::super::effect::{Effect, Look};
use super::super::switch::CloudVolume;
use super::images::{self, Copied};
use super::{Copying, note};
use crate::cutover::Observer;
use crate::image::ImageError;
use crate::openstack::cinder::{MigrationPolicy, Status, Volume};
use crate::openstack::{Cloud, CloudError, Fault, if_there};

/// How often it is looked how much of an image has been copied.
const MEASURE: Duration = Duration::from_secs(2);

/// How far Cinder is with a volume's copy.
pub(super) struct Gauge<'a> {
    volume: &'a CloudVolume,
    to: Side,
    copying: &'a Copying,
    measured: Mutex<Option<(Instant, Copied)>>,
    since: Instant,
}

impl<'a> Gauge<'a> {
    pub(super) fn new(volume: &'a CloudVolume, to: Side, copying: &'a Copying) -> Self {
        Self { volume, to, copying, measured: Mutex::new(None), since: Instant::now() }
    }

    /// Looked at now and then. What can't be looked at now is no failure of the retype's.
    async fn read(&self) -> Copied {
        let known = self.measured.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let known = match known {
            Some((at, copied)) if at.elapsed() < MEASURE => return copied,
            known => known.map(|(_, copied)| copied).unwrap_or_default(),
        };
        tracing::debug!(volume = self.volume.name, "Cinder is retyping it");
        let copied = match images::copied(self.volume, self.to).await {
            Ok(copied) => copied,
            Err(error) => {
                tracing::debug!(%error, "how much is copied is not known now");
                known
            }
        };
        // Nobody can see whether Cinder comes forward, and it may take as long as it takes: what is told goes on all the
        // same, as the limit is for what stands still.
        let copied = match copied.there {
            None => copied.unseen(self.since.elapsed()),
            Some(_) => copied,
        };
        self.copying.show(copied.there);
        let now = Some((Instant::now(), copied.clone()));
        *self.measured.lock().unwrap_or_else(PoisonError::into_inner) = now;
        copied
    }
}

/// A volume that nobody has has that type.
pub(super) struct Retyped<'a> {
    pub(super) cloud: &'a Cloud,
    pub(super) volume: &'a CloudVolume,
    pub(super) next: &'a str,
    /// Whether Cinder moves it to the other pool for that.
    pub(super) migrates: bool,
    pub(super) to: Side,
    pub(super) gauge: &'a Gauge<'a>,
    pub(super) observer: &'a dyn Observer,
    pub(super) asks: AtomicU32,
    /// Whether Cinder was seen at it with nobody having it: then nobody can have it before Cinder is done.
    pub(super) free: AtomicBool,
}

/// A server has taken a volume that Cinder copies, or may have: what it writes may be thrown away.
fn taken_while_copied(volume: &Volume) -> Option<Look> {
    let server = &volume.attachments.first()?.server_id;
    let problem = format!(
        "server {server} has volume {}, and may have taken it before Cinder had copied it: what it writes may be lost; stop \
         that server at once, and look at both pools with rbd ls and rbd trash ls",
        volume.id
    );
    Some(Look::Hopeless(problem))
}

/// Whether Cinder is giving it another type.
fn is_retyped(volume: &Volume) -> bool {
    volume.is_moving() && !matches!(volume.status.as_str(), "attaching" | "detaching")
}

#[async_trait]
impl Effect for Retyped<'_> {
    fn wanted(&self) -> String {
        format!("volume {} of type {:?}", self.volume.name, self.next)
    }

    fn lasts(&self) -> bool {
        true
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.cloud.volume(&self.volume.cinder.volume).await?;
        let now = shown.volume_type.as_deref().unwrap_or_default();
        let asked = self.asks.load(Ordering::Relaxed) > 0;
        if shown.is_moving() {
            if asked && self.migrates && is_retyped(&shown) {
                if let Some(taken) = taken_while_copied(&shown) {
                    return Ok(taken);
                }
                self.free.store(true, Ordering::Relaxed);
            }
            let copied = if self.migrates { self.gauge.read().await.to_string() } else { String::new() };
            return Ok(Look::Working(format!("{}{copied}", shown.status)));
        }
        if now == self.next {
            let doubtful = asked && self.migrates && !self.free.load(Ordering::Relaxed);
            return Ok(taken_while_copied(&shown).filter(|_| doubtful).unwrap_or(Look::Done));
        }
        if shown.status != Status::Available.name() || !shown.attachments.is_empty() {
            let by = shown.attachments.first().map(|found| format!(" by server {}", found.server_id));
            let problem = format!(
                "volume {} is {}{}: somebody has taken it meanwhile; nothing more is asked of Cinder",
                shown.id,
                shown.status,
                by.unwrap_or_default()
            );
            return Ok(Look::Hopeless(problem));
        }
        if self.migrates
            && let Some(taken) = images::in_the_way(self.volume, self.to).await.map_err(|error| unseen(&error))?
        {
            return Ok(Look::Hopeless(super::look::taken_by(&taken)));
        }
        let migration = shown.migration_status.as_deref().unwrap_or("none");
        Ok(Look::NotYet(format!("{} of type {now:?}, migration {migration}", shown.status)))
    }

    async fn ask(&self) -> Result<(), CloudError> {
        let id = self.volume.cinder.volume.as_str();
        let name = &self.volume.name;
        match self.asks.fetch_add(1, Ordering::Relaxed) {
            0 => self.observer.note(&format!("{name}: asking Cinder for type {:?}", self.next)),
            asks => {
                let text = format!("{name}: Cinder has given it up; asking once more, {} in all", asks + 1);
                self.observer.note(&text);
            }
        }
        let shown = self.cloud.volume(id).await?;
        if shown.status != Status::Available.name() || !shown.attachments.is_empty() {
            return Ok(());
        }
        if shown.migration_status.as_deref() == Some("error") {
            self.cloud.forget_migration(id).await?;
        }
        let policy = if self.migrates { MigrationPolicy::OnDemand } else { MigrationPolicy::Never };
        self.cloud.retype(id, self.next, policy).await
    }
}

fn unseen(error: &ImageError) -> CloudError {
    CloudError::new(Fault::Unavailable, "look at the pool", "the cluster", crate::fleet::chain_text(error))
}

/// Cinder is not at it. That may take as long as a copy.
pub(super) struct Settled<'a> {
    pub(super) cloud: &'a Cloud,
    pub(super) volume: &'a CloudVolume,
    pub(super) gauge: &'a Gauge<'a>,
}

#[async_trait]
impl Effect for Settled<'_> {
    fn wanted(&self) -> String {
        format!("volume {} at rest", self.volume.name)
    }

    fn lasts(&self) -> bool {
        true
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.cloud.volume(&self.volume.cinder.volume).await?;
        if !shown.is_moving() {
            return Ok(Look::Done);
        }
        if is_retyped(&shown)
            && let Some(taken) = taken_while_copied(&shown)
        {
            return Ok(taken);
        }
        Ok(Look::Working(format!("{}{}", shown.status, self.gauge.read().await)))
    }
}

/// Cinder is not at a volume that is a clone of one; or it has gone.
pub(super) struct CloneSettled<'a> {
    pub(super) cloud: &'a Cloud,
    pub(super) id: &'a str,
}

#[async_trait]
impl Effect for CloneSettled<'_> {
    fn wanted(&self) -> String {
        format!("volume {}, a clone, at rest", self.id)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        Ok(match if_there(self.cloud.volume(self.id).await)? {
            Some(shown) if shown.is_moving() => Look::Working(shown.status),
            _ => Look::Done,
        })
    }
}

/// The note is with the volume, or not.
pub(super) struct Noted<'a> {
    pub(super) cloud: &'a Cloud,
    pub(super) volume: &'a CloudVolume,
    pub(super) text: Option<String>,
}

#[async_trait]
impl Effect for Noted<'_> {
    fn wanted(&self) -> String {
        let what = if self.text.is_some() { "a note" } else { "no note" };
        format!("{what} of its retype in the metadata of volume {}", self.volume.name)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.cloud.volume(&self.volume.cinder.volume).await?;
        let found = shown.metadata.get(note::KEY);
        let how = || found.map_or_else(|| "without one".to_owned(), |text| format!("there as {text}"));
        Ok(if found == self.text.as_ref() { Look::Done } else { Look::NotYet(how()) })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        let id = self.volume.cinder.volume.as_str();
        match &self.text {
            Some(text) => self.cloud.set_metadata(id, note::KEY, text).await,
            None => if_there(self.cloud.remove_metadata(id, note::KEY).await).map(drop),
        }
    }
}
