//! One volume: its image becomes a volume of Cinder's, or a mere image again; what is to be done next, as a pure function
//! of what is there, and doing it.

use std::collections::BTreeMap;

use async_trait::async_trait;

use super::super::super::{ProviderError, Side};
use super::super::effect::{Effect, Look};
use super::super::switch::CloudVolume;
use super::super::volumes::{Described, give_up};
use super::super::{OpenStack, STEPS_MAX};
use super::remembered::VOLUME_MARK;
use crate::failpoint::failpoint;
use crate::image::rbd::RbdImage;
use crate::image::{Disk as _, ImageError, ImageSpec, SourceImage as _};
use crate::openstack::cinder::{Status, Volume};
use crate::openstack::manage::Managed;
use crate::openstack::nova::Whose;
use crate::openstack::{Cloud, CloudError, if_there};

/// How it is with a volume that Cinder has been given, or is being given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nobody has it.
    Free,
    /// Somebody has it, or is about to.
    Taken,
    /// Cinder is at it.
    Moving,
    /// Cinder has failed with it.
    Failed,
}

impl State {
    pub(super) fn of(volume: &Volume) -> Self {
        match volume.status.as_str() {
            status if status == Status::Available.name() => Self::Free,
            "in-use" | "reserved" | "attaching" | "detaching" | "maintenance" => Self::Taken,
            status if status.starts_with("error") => Self::Failed,
            _ => Self::Moving,
        }
    }
}

/// What is there of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Whether its image has the name that it is replicated under.
    pub(super) idle: bool,
    /// The volume of Cinder's whose image it is, by its name.
    pub(super) volume: Option<(String, State)>,
    /// Volumes that were to have it, by their mark, and have it not.
    pub(super) others: Vec<(String, State)>,
}

impl Seen {
    /// The volume of Cinder's that it is.
    pub(super) fn id(&self) -> Option<&str> {
        self.volume.as_ref().map(|(id, _)| id.as_str())
    }

    /// On which side a server would be that is made now.
    pub(super) fn side(&self) -> Option<Side> {
        match &self.volume {
            Some((_, State::Free | State::Taken)) => Some(Side::Target),
            None if self.idle && self.others.is_empty() => Some(Side::Source),
            _ => None,
        }
    }
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Cinder is at that volume.
    Wait(String),
    /// That volume is taken from Cinder; its image stays.
    Unmanage(String),
    /// The image is given the name back that it is replicated under.
    Rename,
    /// The image is given to Cinder.
    Manage,
    /// Nothing: it is there.
    Done,
}

#[cfg(debug_assertions)]
impl Step {
    /// Its name among the failpoints.
    fn failpoint(&self) -> &'static str {
        match self {
            Self::Wait(_) => "wait",
            Self::Unmanage(_) => "unmanage",
            Self::Rename => "rename",
            Self::Manage => "manage",
            Self::Done => "done",
        }
    }
}

/// What leads a target to being a volume of Cinder's (`to` the target), or to being none.
pub(super) fn next(to: Side, seen: &Seen) -> Step {
    if let Some((id, state)) = &seen.volume {
        return match (state, to) {
            (State::Moving, _) => Step::Wait(id.clone()),
            (State::Free | State::Taken, Side::Target) => Step::Done,
            // What has it, or had it a moment ago, lets go of it.
            (State::Taken, Side::Source) => Step::Wait(id.clone()),
            (State::Free, Side::Source) | (State::Failed, _) => Step::Unmanage(id.clone()),
        };
    }
    match seen.others.first() {
        Some((id, State::Moving)) => Step::Wait(id.clone()),
        // Without the image it is good for nothing, and there is nothing that could be lost with it.
        Some((id, _)) => Step::Unmanage(id.clone()),
        None if !seen.idle => Step::Rename,
        None if to == Side::Target => Step::Manage,
        None => Step::Done,
    }
}

/// Cinder is not at it.
struct AtRest<'a> {
    cloud: &'a Cloud,
    id: &'a str,
    to: Side,
}

#[async_trait]
impl Effect for AtRest<'_> {
    fn wanted(&self) -> String {
        format!("volume {} at rest", self.id)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let Some(shown) = if_there(self.cloud.volume(self.id).await)? else { return Ok(Look::Done) };
        Ok(match State::of(&shown) {
            State::Moving => Look::Working(shown.status),
            State::Taken if self.to == Side::Source => Look::Working(shown.status),
            _ => Look::Done,
        })
    }
}

/// Cinder has it no more, and its image stays.
struct Unmanaged<'a> {
    cloud: &'a Cloud,
    id: &'a str,
}

#[async_trait]
impl Effect for Unmanaged<'_> {
    fn wanted(&self) -> String {
        format!("volume {} that Cinder does not have", self.id)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let Some(shown) = if_there(self.cloud.volume(self.id).await)? else { return Ok(Look::Done) };
        Ok(match State::of(&shown) {
            State::Free | State::Failed => Look::NotYet(shown.status),
            State::Taken => Look::Hopeless(format!("volume {} is {}: somebody has it", self.id, shown.status)),
            State::Moving => Look::Working(shown.status),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        give_up(self.cloud, self.id).await
    }
}

/// Cinder has begun to take the image.
struct Begun<'a> {
    cloud: &'a Cloud,
    wanted: Managed<'a>,
    /// The volume that it is the target of.
    of: &'a str,
    begun: std::sync::Mutex<Option<String>>,
}

impl Begun<'_> {
    fn id(&self) -> Option<String> {
        self.begun.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl Effect for Begun<'_> {
    fn wanted(&self) -> String {
        format!("volume of the image {}", self.wanted.image)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let found = match self.id() {
            Some(id) => self.cloud.volume(&id).await?,
            None => match marked(self.cloud, self.of).await?.into_iter().next() {
                Some(found) => found,
                None => return Ok(Look::NotYet("not there".into())),
            },
        };
        Ok(match State::of(&found) {
            State::Free | State::Taken => Look::Done,
            State::Moving => Look::Working(found.status),
            State::Failed => Look::Hopeless(format!(
                "Cinder could not take the image {} as volume {}, which is {}: is it in the pool of {}?",
                self.wanted.image, found.id, found.status, self.wanted.host
            )),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        let made = self.cloud.manage(&self.wanted).await?;
        *self.begun.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(made.id);
        Ok(())
    }
}

/// The volumes of the credentials' project that are marked as targets of that one.
pub(super) async fn marked(cloud: &Cloud, of: &str) -> Result<Vec<Volume>, CloudError> {
    let mut all = cloud.volumes(&Whose::Own).await?;
    all.retain(|volume| volume.metadata.get(VOLUME_MARK).is_some_and(|mark| mark == of));
    Ok(all)
}

/// What is written to a volume, without what Cinder itself adds while a server has it.
fn metadata_of(old: &Volume) -> BTreeMap<String, String> {
    let mut metadata = old.metadata.clone();
    metadata.retain(|key, _| !matches!(key.as_str(), "attached_mode" | "readonly"));
    metadata.insert(VOLUME_MARK.to_owned(), old.id.clone());
    metadata
}

/// The target's image, whatever its name.
pub(super) async fn image(volume: &CloudVolume) -> Result<RbdImage, ImageError> {
    let (sources, source) = volume.in_cluster(Side::Source)?;
    let (targets, target) = volume.in_cluster(Side::Target)?;
    let spec = |place: &super::super::switch::Place, image: &str| ImageSpec::Rbd {
        pool: place.pool.clone(),
        namespace: place.namespace.clone(),
        image: image.to_owned(),
        snapshot: None,
    };
    let (idle, in_use) = (spec(target, &target.idle), spec(target, &target.in_use));
    targets.open_target_of(&idle, Some(&in_use), (sources, &spec(source, &source.in_use))).await
}

/// Notes with the source which image its target is, so that it is found under whatever name.
pub(super) async fn note_target(volume: &CloudVolume) -> Result<(), ImageError> {
    let target = image(volume).await?;
    source_image(volume).await?.note_target(target.identity()).await
}

/// The target has the name back by which everybody finds it.
pub(super) async fn forget_target(volume: &CloudVolume) -> Result<(), ImageError> {
    let target = volume.at(Side::Target).1;
    match image(volume).await?.name().await? == target.idle {
        true => source_image(volume).await?.forget_target().await,
        false => Ok(()),
    }
}

async fn source_image(volume: &CloudVolume) -> Result<RbdImage, ImageError> {
    let (connector, place) = volume.in_cluster(Side::Source)?;
    RbdImage::open_source(connector, &place.pool, place.namespace.as_deref(), &place.in_use).await
}

impl OpenStack {
    /// What is there of a target.
    pub(super) async fn look_at_target(&self, operation: &str, volume: &CloudVolume) -> Result<Seen, ProviderError> {
        let cloud = self.cloud(operation).await?;
        let here = volume.in_cluster(Side::Target);
        let (connector, place) = here.map_err(|error| self.image_error(operation, &error))?;
        let image_error = |error: ImageError| self.image_error(operation, &error);
        let target = image(volume).await.map_err(image_error)?;
        let name = target.name().await.map_err(image_error)?;
        let cloud_error = |error: CloudError| self.cloud_error(operation, &error);
        let idle = name == place.idle;
        if let Some(id) = name.strip_prefix("volume-").filter(|_| !idle) {
            if id == volume.cinder.volume {
                let problem = format!("the target of volume {id} has that volume's own name");
                let hint = "it was switched with strategy \"keep-ids\": put that into the plan again";
                return Err(self.error(operation, problem, Some(hint)));
            }
            if let Some(found) = if_there(cloud.volume(id).await).map_err(cloud_error)? {
                let volume = Some((found.id.clone(), State::of(&found)));
                return Ok(Seen { idle, volume, others: Vec::new() });
            }
        }
        let mut others = Vec::new();
        for found in marked(cloud, &volume.cinder.volume).await.map_err(cloud_error)? {
            let (pool, namespace, image) = (&place.pool, place.namespace.as_deref(), found.image());
            // One that has an image is somebody else's, who has the mark by a copy of the metadata.
            let state = State::of(&found);
            if state == State::Moving
                || !RbdImage::exists(connector, pool, namespace, &image).await.map_err(image_error)?
            {
                others.push((found.id, state));
            }
        }
        // Or Cinder has just made the target that one.
        if target.name().await.map_err(image_error)? != name {
            return Box::pin(self.look_at_target(operation, volume)).await;
        }
        Ok(Seen { idle, volume: None, others })
    }

    /// Makes a target a volume of Cinder's, or a mere image, and gives back the volume's id.
    pub(super) async fn bring_target(
        &self,
        operation: &str,
        volume: &CloudVolume,
        to: Side,
    ) -> Result<Option<String>, ProviderError> {
        let cloud = self.cloud(operation).await?;
        for _ in 0..STEPS_MAX {
            let seen = self.look_at_target(operation, volume).await?;
            let step = next(to, &seen);
            tracing::debug!(volume = volume.name, ?step, "{operation}");
            failpoint!("recreate.{}", step.failpoint());
            match &step {
                Step::Done => {
                    if let (Side::Target, Some(id)) = (to, seen.id()) {
                        let old = cloud.volume(&volume.cinder.volume).await;
                        let old = old.map_err(|error| self.cloud_error(operation, &error))?;
                        self.bring_about(operation, &Described { cloud, volume: id, original: &old }).await?;
                    }
                    return Ok(seen.id().map(str::to_owned));
                }
                Step::Wait(id) => self.bring_about(operation, &AtRest { cloud, id, to }).await?,
                Step::Unmanage(id) => self.bring_about(operation, &Unmanaged { cloud, id }).await?,
                Step::Rename => {
                    let idle = volume.at(Side::Target).1.idle.as_str();
                    let renamed = async { image(volume).await?.rename(idle).await };
                    renamed.await.map_err(|error| self.image_error(operation, &error))?;
                }
                Step::Manage => self.manage(operation, volume).await?,
            }
        }
        Err(self.error(operation, format!("volume {} does not come to rest", volume.name), None))
    }

    async fn manage(&self, operation: &str, volume: &CloudVolume) -> Result<(), ProviderError> {
        let cloud = self.cloud(operation).await?;
        let cloud_error = |error: CloudError| self.cloud_error(operation, &error);
        let host = self.host_of(operation, volume).await?;
        let old = cloud.volume(&volume.cinder.volume).await.map_err(cloud_error)?;
        let wanted = Managed {
            host: &host,
            image: &volume.at(Side::Target).1.idle,
            name: &old.name,
            description: old.description.as_deref(),
            volume_type: &volume.cinder.to_type,
            bootable: old.bootable,
            metadata: metadata_of(&old),
        };
        let begun = std::sync::Mutex::default();
        self.bring_about(operation, &Begun { cloud, wanted, of: &old.id, begun }).await
    }

    /// The backend of the type that a volume is to have, by which Cinder has to find the target's image.
    pub(super) async fn host_of(&self, operation: &str, volume: &CloudVolume) -> Result<String, ProviderError> {
        let cloud = self.cloud(operation).await?;
        let found = futures::future::try_join(cloud.volume_types(), cloud.backends()).await;
        let (types, backends) = found.map_err(|error| self.cloud_error(operation, &error))?;
        let wanted = volume.cinder.to_type.as_str();
        let Some(to_type) = types.iter().find(|found| found.name == wanted) else {
            return Err(self.error(operation, format!("there is no volume type {wanted:?}"), None));
        };
        let Some(name) = to_type.extra_specs.get("volume_backend_name") else {
            let problem = format!("the type {wanted:?} does not say on which backend its volumes are");
            return Err(self.error(operation, problem, Some("give it the extra spec volume_backend_name")));
        };
        let here = volume.in_cluster(Side::Target);
        let (connector, place) = here.map_err(|error| self.image_error(operation, &error))?;
        let here = (connector.fsid(), place.pool.as_str());
        let of_name = || backends.iter().filter(|backend| backend.backend_name == *name);
        // One that does not say where its images are may be the right one.
        let fits = of_name().find(|backend| backend.place().is_none_or(|there| there == here));
        fits.map(|backend| backend.host.clone()).ok_or_else(|| {
            let elsewhere: Vec<String> = of_name().filter_map(|found| Some(found.place()?.1.to_owned())).collect();
            let problem = match elsewhere.is_empty() {
                true => format!("no backend has the name {name:?}, which the type {wanted:?} asks for"),
                false => format!(
                    "the backend {name:?} of the type {wanted:?} has the pool {}, and the target is in {}",
                    elsewhere.join(", "),
                    place.pool
                ),
            };
            self.error(operation, problem, Some("look at what `cinder get-pools --detail` says"))
        })
    }
}

/// Cinder has the old volume no more, nor its image.
pub(super) struct Deleted<'a> {
    pub(super) cloud: &'a Cloud,
    pub(super) volume: &'a CloudVolume,
}

impl Deleted<'_> {
    fn id(&self) -> &str {
        &self.volume.cinder.volume
    }
}

#[async_trait]
impl Effect for Deleted<'_> {
    fn wanted(&self) -> String {
        format!("volume {} that is deleted", self.id())
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let Some(shown) = if_there(self.cloud.volume(self.id()).await)? else { return Ok(Look::Done) };
        let now = shown.volume_type.as_deref().unwrap_or_default();
        if !self.volume.is_image_of(&shown) || now != self.volume.final_type(Side::Source) {
            return Ok(Look::Hopeless(format!(
                "volume {} is {} of type {now:?} now, and not what the plan has: somebody has given it another type since, \
                 and it is not deleted; take it out of poolshift's hands by deleting it yourself, if it is not needed",
                shown.id,
                shown.image()
            )));
        }
        Ok(match shown.status.as_str() {
            "available" | "attaching" if shown.attachments.is_empty() => Look::NotYet(shown.status),
            status if status.starts_with("error") => Look::NotYet(shown.status),
            "in-use" | "reserved" | "attaching" => {
                Look::Hopeless(format!("volume {} is {}: somebody has it", self.id(), shown.status))
            }
            _ => Look::Working(shown.status),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        free(self.cloud, self.id()).await?;
        self.cloud.delete_volume(self.id()).await
    }
}

/// Keeps a volume that nobody has from being attached. It is a help: where it can't be done, it is not.
pub(super) async fn hold(cloud: &Cloud, id: &str) {
    let held = async {
        let shown = cloud.volume(id).await?;
        match shown.status.as_str() {
            "available" => cloud.reserve(id).await,
            _ => Ok(()),
        }
    };
    if let Err(error) = held.await {
        tracing::warn!(error = crate::fleet::chain_text(&error), "volume {id} is not kept from being attached");
    }
}

/// Lets go of a volume that is held.
pub(super) async fn free(cloud: &Cloud, id: &str) -> Result<(), CloudError> {
    let shown = cloud.volume(id).await?;
    match shown.status.as_str() {
        "attaching" if shown.attachments.is_empty() => cloud.unreserve(id).await,
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 4] = [State::Free, State::Taken, State::Moving, State::Failed];

    /// Every world that there can be: an image has one name.
    fn worlds() -> Vec<Seen> {
        let mut all = Vec::new();
        for state in STATES {
            all.push(Seen { idle: false, volume: Some(("v".into(), state)), others: Vec::new() });
        }
        let others = [None, Some(State::Free), Some(State::Moving), Some(State::Failed)];
        for (idle, one) in [true, false].into_iter().flat_map(|idle| others.map(|one| (idle, one))) {
            for more in others {
                let others = [("a", one), ("b", more)];
                let others = others.into_iter().filter_map(|(id, state)| Some((id.to_owned(), state?))).collect();
                all.push(Seen { idle, volume: None, others });
            }
        }
        all
    }

    #[test]
    fn every_world_leads_there_and_no_image_is_given_twice() {
        for first in worlds() {
            for to in [Side::Source, Side::Target] {
                let mut seen = first.clone();
                for steps in 0.. {
                    assert!(steps < 12, "it goes round in circles: {first:?} to {to:?}");
                    match next(to, &seen) {
                        Step::Done => {
                            assert_eq!(seen.side(), Some(to), "{first:?}");
                            break;
                        }
                        Step::Rename => {
                            assert!(seen.volume.is_none() && seen.others.is_empty(), "{first:?}");
                            seen.idle = true;
                        }
                        Step::Manage => {
                            assert!(seen.idle && seen.volume.is_none() && seen.others.is_empty(), "{first:?}");
                            (seen.idle, seen.volume) = (false, Some(("new".into(), State::Free)));
                        }
                        Step::Unmanage(id) => {
                            if seen.id() == Some(id.as_str()) {
                                seen.volume = None;
                            }
                            seen.others.retain(|(other, _)| *other != id);
                        }
                        // A manage that was under way fails, as it may.
                        Step::Wait(id) => {
                            if let Some((_, state)) = seen.volume.as_mut().filter(|(other, _)| *other == id) {
                                *state = State::Free;
                            }
                            for (_, state) in seen.others.iter_mut().filter(|(other, _)| *other == id) {
                                *state = State::Failed;
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_somebody_has_is_not_taken_from_cinder() {
        for seen in worlds() {
            for to in [Side::Source, Side::Target] {
                if let (Step::Unmanage(id), Some((volume, state))) = (next(to, &seen), &seen.volume)
                    && id == *volume
                {
                    assert!(matches!(state, State::Free | State::Failed), "{seen:?}");
                }
            }
        }
    }

    #[test]
    fn a_volume_is_marked_and_keeps_what_its_owner_wrote() {
        let old: Volume = serde_json::from_value(serde_json::json!({
            "id": "v", "size": 1, "status": "in-use",
            "metadata": {"owner": "it", "attached_mode": "rw", "readonly": "False", "poolshift-volume": "older"},
        }))
        .unwrap();
        let metadata = metadata_of(&old);
        let all: Vec<(&str, &str)> = metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(all, [("owner", "it"), ("poolshift-volume", "v")]);
    }
}
