//! What Cinder is asked for, about one volume.

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;
use tokio::time::Instant;

use super::effect::{Effect, Look};
use super::switch::CloudVolume;
use crate::openstack::cinder::{MigrationPolicy, Status, Volume};
use crate::openstack::{Cloud, CloudError, Fault, if_there};

/// Cinder is not at it.
pub(super) struct AtRest<'a> {
    pub(super) cloud: &'a Cloud,
    pub(super) volume: &'a CloudVolume,
}

#[async_trait]
impl Effect for AtRest<'_> {
    fn wanted(&self) -> String {
        format!("volume {} at rest", self.volume.name)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.cloud.volume(&self.volume.cinder.volume).await?;
        Ok(if shown.is_moving() { Look::Working(shown.status) } else { Look::Done })
    }
}

/// It has that type, and that is what Cinder shows of it then.
pub(super) struct OfType<'a> {
    pub(super) cloud: &'a Cloud,
    pub(super) volume: &'a CloudVolume,
    /// The type that it was seen with.
    pub(super) now: &'a str,
    pub(super) next: &'a str,
    pub(super) policy: MigrationPolicy,
    /// The server that has left its host, and may be said to have it all the same.
    pub(super) ours: Option<&'a str>,
    /// Since when it was seen to be reserved.
    pub(super) reserved: OnceLock<Instant>,
    /// What Cinder has shown of it just now, kept for that server: before the first request it is not asked for again.
    pub(super) seen: Mutex<Option<Volume>>,
    /// What Cinder shows of it once it has the type.
    pub(super) found: OnceLock<Volume>,
}

#[async_trait]
impl Effect for OfType<'_> {
    fn wanted(&self) -> String {
        format!("volume {} of type {:?}", self.volume.name, self.next)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.cloud.volume(&self.volume.cinder.volume).await?;
        let now = shown.volume_type.as_deref().unwrap_or_default();
        Ok(match () {
            () if shown.is_moving() || is_being_given(&shown, self.ours, &self.reserved) => Look::Working(shown.status),
            () if now == self.next => {
                let _ = self.found.set(shown);
                Look::Done
            }
            // Cinder would copy, and throw away, what that server writes to.
            () if is_taken(&shown, self.ours) => taken(&shown),
            () => {
                let migration = shown.migration_status.as_deref().unwrap_or("none");
                Look::NotYet(format!("{} of type {now:?}, migration {migration}", shown.status))
            }
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        let id = self.volume.cinder.volume.as_str();
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).take();
        let shown = match seen {
            Some(shown) => shown,
            None => self.cloud.volume(id).await?,
        };
        // It may have become something else since it was looked at: that is looked at again.
        let as_seen = shown.volume_type.as_deref().unwrap_or_default() == self.now && self.volume.is_image_of(&shown);
        if shown.is_moving() || is_being_given(&shown, self.ours, &self.reserved) || !as_seen {
            return Ok(());
        }
        if shown.migration_status.as_deref() == Some("error") {
            self.cloud.forget_migration(id).await?;
        }
        // Only from these it is known to be nobody's.
        let known = [Status::Reserved.name(), Status::Maintenance.name(), "error"];
        let is_ours = shown.status == Status::InUse.name() && !is_taken(&shown, self.ours);
        match shown.status.as_str() {
            status if status == Status::Available.name() => {}
            status if known.contains(&status) || is_ours => {
                self.cloud.reset_status(id, Status::Available).await?;
                // Cinder may have said yes, and not done it; and what is in use it would move in another way.
                let status = self.cloud.volume(id).await?.status;
                if status != Status::Available.name() {
                    let (what, detail) = (format!("reset volume {id}"), format!("it said yes, and it is {status}"));
                    return Err(CloudError::new(Fault::Conflict, what, self.cloud.name(), detail));
                }
            }
            _ => return Ok(()),
        }
        self.cloud.retype(id, self.next, self.policy).await
    }
}

/// How long what is reserved for somebody may take to be his. Beyond that it is what is left of an attachment that came
/// to nothing.
const RESERVED: Duration = Duration::from_secs(10);

/// Whether another server than that which has left its host is about to get it: Cinder reserves it, and does not show
/// for whom before he has it.
fn is_being_given(shown: &Volume, ours: Option<&str>, reserved: &OnceLock<Instant>) -> bool {
    let is_reserved = ours.is_none() && shown.status == Status::Reserved.name();
    is_reserved && reserved.get_or_init(Instant::now).elapsed() < RESERVED
}

/// Whether another server has it than the one that has left its host.
fn is_taken(shown: &Volume, ours: Option<&str>) -> bool {
    shown.status == Status::InUse.name() && (ours.is_none() || has_other(shown, ours))
}

fn has_other(shown: &Volume, ours: Option<&str>) -> bool {
    shown.attachments.iter().any(|found| Some(found.server_id.as_str()) != ours)
}

/// A server has it.
fn taken(shown: &Volume) -> Look {
    let by = shown.attachments.first().map_or("", |attachment| attachment.server_id.as_str());
    Look::Hopeless(format!("volume {} is in use, by server {by}: somebody has attached it meanwhile", shown.id))
}

/// It has that status.
pub(super) struct OfStatus<'a> {
    pub(super) cloud: &'a Cloud,
    pub(super) volume: &'a CloudVolume,
    pub(super) status: Status,
    /// The server that has left its host, and may be said to have it all the same.
    pub(super) ours: Option<&'a str>,
    /// Since when it was seen to be reserved.
    pub(super) reserved: OnceLock<Instant>,
}

#[async_trait]
impl Effect for OfStatus<'_> {
    fn wanted(&self) -> String {
        format!("volume {} that is {}", self.volume.name, self.status.name())
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.cloud.volume(&self.volume.cinder.volume).await?;
        Ok(match () {
            // Its status may have been written over just when another server was given it.
            () if self.status == Status::Reserved && has_other(&shown, self.ours) => taken(&shown),
            () if shown.status == self.status.name() => Look::Done,
            // It is to be kept from nobody, and somebody has it, or is about to.
            () if self.status == Status::Available
                && [Status::InUse, Status::Reserved].iter().any(|taken| taken.name() == shown.status) =>
            {
                Look::Done
            }
            () if shown.is_moving() || is_being_given(&shown, self.ours, &self.reserved) => Look::Working(shown.status),
            () if is_taken(&shown, self.ours) => taken(&shown),
            () => Look::NotYet(shown.status),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.cloud.reset_status(&self.volume.cinder.volume, self.status).await
    }
}

/// No migration that failed is told of it.
pub(super) struct NoFailure<'a> {
    pub(super) cloud: &'a Cloud,
    pub(super) volume: &'a CloudVolume,
}

#[async_trait]
impl Effect for NoFailure<'_> {
    fn wanted(&self) -> String {
        format!("volume {} without a migration that failed", self.volume.name)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        // Whoever has deleted it has deleted that, too.
        let Some(shown) = if_there(self.cloud.volume(&self.volume.cinder.volume).await)? else {
            return Ok(Look::Done);
        };
        let failed = shown.migration_status.as_deref() == Some("error");
        Ok(if failed { Look::NotYet("of a migration that failed".into()) } else { Look::Done })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.cloud.forget_migration(&self.volume.cinder.volume).await
    }
}

/// What Cinder writes about images and lets nobody else write.
const NOT_WRITTEN: &str = "signature_verified";

/// A volume has what is known of the image that another was made from.
pub(super) struct Described<'a> {
    pub(super) cloud: &'a Cloud,
    pub(super) volume: &'a str,
    pub(super) original: &'a Volume,
}

impl Described<'_> {
    fn image_metadata(&self) -> BTreeMap<String, Value> {
        let mut wanted = self.original.image_metadata.clone();
        wanted.remove(NOT_WRITTEN);
        wanted
    }
}

#[async_trait]
impl Effect for Described<'_> {
    fn wanted(&self) -> String {
        format!("volume {} with the image metadata of {}", self.volume, self.original.id)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let has = self.cloud.volume(self.volume).await?.image_metadata;
        let missing = self.image_metadata().into_iter().find(|(key, value)| has.get(key) != Some(value));
        Ok(missing.map_or(Look::Done, |(key, _)| Look::NotYet(format!("without {key}"))))
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.cloud.set_image_metadata(self.volume, &self.image_metadata()).await
    }
}

/// Begins to have Cinder give a volume up, which may be gone already; its image stays.
pub(super) async fn give_up(cloud: &Cloud, id: &str) -> Result<(), CloudError> {
    let asked = async {
        if cloud.volume(id).await?.status == "error_unmanaging" {
            cloud.reset_status(id, Status::Available).await?;
        }
        cloud.unmanage(id).await
    };
    if_there(asked.await).map(drop)
}
