//! A server that has the volumes as data disks: it gives them away, and gets them back, while it goes on with its others.

use std::sync::OnceLock;

use async_trait::async_trait;
use futures::future::try_join_all;
use serde_json::json;
use tokio::process::Command;

use super::super::run::run;
use super::super::{Notes, Observed, Power, ProviderError, Side};
use super::effect::{Effect, Look};
use super::switch::CloudVolume;
use super::{OpenStack, name};
use crate::openstack::cinder::{Status, Volume};
use crate::openstack::nova::ServerAttachment;
use crate::openstack::{Cloud, CloudError, Fault};

/// The note of a volume's attachment, by its id.
fn note(volume: &str) -> String {
    format!("attachment-{volume}")
}

/// Whether Nova names a volume among those that a server has.
async fn is_named(cloud: &Cloud, server: &str, volume: &str) -> Result<bool, CloudError> {
    Ok(cloud.server_attachments(server).await?.iter().any(|found| found.volume == volume))
}

/// Neither Cinder nor Nova is at any of them: nothing moves, and what nobody has for Cinder, the gateway has not for
/// Nova.
///
/// Nova writes down a volume before it reserves it, and crosses it out after Cinder has been told that the server has
/// it no more (`attach_volume` and `_detach_volume` of `nova.compute`): in between they disagree.
struct Still<'a> {
    cloud: &'a Cloud,
    gateway: &'a str,
    volumes: &'a [CloudVolume],
    /// Those of them that the gateway has then.
    found: OnceLock<Vec<ServerAttachment>>,
}

#[async_trait]
impl Effect for Still<'_> {
    fn wanted(&self) -> String {
        format!("gateway {} of which Cinder and Nova say the same", self.gateway)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.volumes.iter().map(|volume| self.cloud.volume(&volume.cinder.volume));
        let shown = try_join_all(shown).await?;
        if let Some(moving) = shown.iter().find(|volume| volume.is_moving()) {
            return Ok(Look::Working(format!("{}, with volume {}", moving.status, moving.id)));
        }
        // Nova is asked after Cinder: what it has begun to give to the gateway meanwhile is among these.
        let mut attached = self.cloud.server_attachments(self.gateway).await?;
        attached.retain(|found| shown.iter().any(|volume| volume.id == found.volume));
        let nobodys = |volume: &&Volume| volume.attachments.is_empty() && volume.status != Status::InUse.name();
        let between = |volume: &&Volume| attached.iter().any(|found| found.volume == volume.id);
        if let Some(between) = shown.iter().filter(nobodys).find(between) {
            let Volume { id, status, .. } = between;
            let how =
                format!("one that has volume {id} for Nova, which is {status} for Cinder: see nova-compute's log");
            return Ok(Look::Working(how));
        }
        let _ = self.found.set(attached);
        Ok(Look::Done)
    }
}

/// The gateway has it not.
struct Detached<'a> {
    cloud: &'a Cloud,
    gateway: &'a str,
    volume: &'a CloudVolume,
}

#[async_trait]
impl Effect for Detached<'_> {
    fn wanted(&self) -> String {
        format!("volume {} that nobody has", self.volume.name)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.cloud.volume(&self.volume.cinder.volume).await?;
        Ok(match () {
            () if shown.is_moving() => Look::Working(shown.status),
            () if shown.status == Status::Reserved.name() && is_named(self.cloud, self.gateway, &shown.id).await? => {
                Look::Working(shown.status)
            }
            () if shown.attachments.is_empty() && shown.status != Status::InUse.name() => Look::Done,
            () if shown.attachments.iter().any(|found| found.server_id != self.gateway) => {
                Look::Hopeless(format!("volume {} is with another server", self.volume.name))
            }
            () => Look::NotYet(shown.status),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.cloud.detach(self.gateway, &self.volume.cinder.volume).await
    }
}

/// The gateway has it.
struct Attached<'a> {
    cloud: &'a Cloud,
    gateway: &'a str,
    attachment: &'a ServerAttachment,
}

#[async_trait]
impl Effect for Attached<'_> {
    fn wanted(&self) -> String {
        format!("volume {} with its gateway", self.attachment.volume)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.cloud.volume(&self.attachment.volume).await?;
        let there = shown.attachments.iter().any(|found| found.server_id == self.gateway);
        Ok(match () {
            () if there && shown.status == Status::InUse.name() => Look::Done,
            () if shown.attachments.iter().any(|found| found.server_id != self.gateway) => {
                Look::Hopeless(format!("volume {} is with another server", shown.id))
            }
            () if shown.is_moving() || shown.status == Status::Reserved.name() => Look::Working(shown.status),
            () => Look::NotYet(shown.status),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        let id = self.attachment.volume.as_str();
        // It may have been kept from being attached while its images were given their names.
        if self.cloud.volume(id).await?.status == Status::Maintenance.name() {
            self.cloud.reset_status(id, Status::Available).await?;
        }
        match self.cloud.attach(self.gateway, self.attachment).await {
            // Nova has not yet crossed out that the gateway had it, and refuses to give it a second time.
            Err(mut error)
                if error.fault == Fault::Refused(400)
                    && is_named(self.cloud, self.gateway, id).await.unwrap_or(true) =>
            {
                error.fault = Fault::Conflict;
                Err(error)
            }
            asked => asked,
        }
    }
}

impl OpenStack {
    async fn attachments(&self, operation: &str, gateway: &str) -> Result<Vec<ServerAttachment>, ProviderError> {
        let cloud = self.cloud(operation).await?;
        let all = cloud.server_attachments(gateway).await.map_err(|error| self.cloud_error(operation, &error))?;
        let ours = |found: &ServerAttachment| self.volumes.iter().any(|volume| volume.cinder.volume == found.volume);
        Ok(all.into_iter().filter(ours).collect())
    }

    /// Those of the volumes that the gateway has, once nothing is under way with any.
    async fn attached_at_rest(&self, operation: &str, gateway: &str) -> Result<Vec<ServerAttachment>, ProviderError> {
        let cloud = self.cloud(operation).await?;
        let still = Still { cloud, gateway, volumes: &self.volumes, found: OnceLock::new() };
        self.bring_about(operation, &still).await?;
        Ok(still.found.into_inner().unwrap_or_default())
    }

    /// Running: the gateway has any of them, so that something may be written. Off: it has none.
    pub(super) async fn observe_gateway(&self, gateway: &str) -> Result<Observed, ProviderError> {
        let operation = "state";
        let attached = self.attached_at_rest(operation, gateway).await?;
        let volumes = self.look(operation).await?;
        let power = if attached.is_empty() { Power::Off } else { Power::Running };
        Ok(Observed { power, side: self.side_of(&volumes) })
    }

    /// Keeps in mind how the gateway has the volumes.
    pub(super) async fn remember_attachments(
        &self,
        operation: &str,
        gateway: &str,
        notes: &mut Notes,
    ) -> Result<(), ProviderError> {
        for found in self.attachments(operation, gateway).await? {
            let ServerAttachment { volume, device, delete_on_termination, tag } = &found;
            let text = json!({
                "volumeId": volume,
                "device": device,
                "delete_on_termination": delete_on_termination,
                "tag": tag,
            });
            notes.insert(note(volume), text.to_string());
        }
        Ok(())
    }

    /// Has their writers pause, and the gateway let go of them.
    pub(super) async fn pause_and_detach(&self, gateway: &str, pause: Option<&str>) -> Result<(), ProviderError> {
        if let Some(pause) = pause {
            self.hook("pause", pause).await?;
        }
        self.detach_all("detach", gateway).await
    }

    /// Where a process that is gone has begun to detach them: the others, too.
    pub(super) async fn finish_detaching(&self, gateway: &str) -> Result<(), ProviderError> {
        let operation = "detach";
        match self.attached_at_rest(operation, gateway).await?.len() {
            some if some < self.volumes.len() => self.detach_all(operation, gateway).await,
            _ => Ok(()),
        }
    }

    /// Has the gateway let go of them.
    pub(super) async fn detach_all(&self, operation: &str, gateway: &str) -> Result<(), ProviderError> {
        let cloud = self.cloud(operation).await?;
        // One after the other: a server does one such thing at a time.
        for volume in &self.volumes {
            self.bring_about(operation, &Detached { cloud, gateway, volume }).await?;
        }
        Ok(())
    }

    /// Gives them back to the gateway, as it had them.
    pub(super) async fn attach_all(
        &self,
        operation: &str,
        (gateway, on): (&str, Side),
        notes: &Notes,
    ) -> Result<(), ProviderError> {
        let cloud = self.cloud(operation).await?;
        if self.side_of(&self.look(operation).await?) != Some(on) {
            let problem = format!("the volumes are not all on the {}", name(on));
            return Err(self.error(operation, problem, Some("look at their types, and at both pools with rbd ls")));
        }
        let mut had: Vec<ServerAttachment> = Vec::new();
        for volume in &self.volumes {
            let id = &volume.cinder.volume;
            let noted = notes.get(&note(id)).and_then(|text| serde_json::from_str(text).ok());
            let plain =
                || ServerAttachment { volume: id.clone(), device: None, delete_on_termination: false, tag: None };
            had.push(noted.unwrap_or_else(plain));
        }
        // In the order of their names there, so that each is given its own again.
        had.sort_by(|one, other| one.device.cmp(&other.device));
        for attachment in &had {
            self.bring_about(operation, &Attached { cloud, gateway, attachment }).await?;
        }
        Ok(())
    }

    pub(super) async fn hook(&self, step: &'static str, script: &str) -> Result<(), ProviderError> {
        let volumes = self.volumes.iter().map(|volume| json!({"volume": volume.name, "cinder": volume.cinder.volume}));
        let volumes = serde_json::Value::from(volumes.collect::<Vec<_>>());
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).env("POOLSHIFT_SERVER", &self.server).env("POOLSHIFT_STEP", step);
        command.env("POOLSHIFT_VOLUMES", volumes.to_string());
        let hint = "run the command of the plan by hand";
        let ended = run(command, Vec::new(), self.config.limit).await;
        let ended = ended.map_err(|error| self.error(step, format!("{script:?}: {error}"), Some(hint)))?;
        match ended.status.success() {
            true => Ok(()),
            false => Err(self.error(step, format!("{script:?} {}", ended.failure()), Some(hint))),
        }
    }
}
