//! A server that has the volumes as data disks: it gives them away, and gets them back, while it goes on with its others.

use async_trait::async_trait;
use serde_json::json;
use tokio::process::Command;

use super::super::run::run;
use super::super::{Notes, Observed, Power, ProviderError, Side};
use super::effect::{Effect, Look};
use super::switch::CloudVolume;
use super::{OpenStack, name};
use crate::openstack::cinder::Volume;
use crate::openstack::nova::ServerAttachment;
use crate::openstack::{Cloud, CloudError};

/// The note of a volume's attachment, by its id.
fn note(volume: &str) -> String {
    format!("attachment-{volume}")
}

/// Whether somebody is about to have it, or to have it no longer. Nova reserves a volume before it tells the server.
fn is_changing_hands(shown: &Volume) -> bool {
    shown.is_moving() || shown.status == "reserved"
}

/// The gateway has it, or has it not.
struct InOneHand<'a> {
    cloud: &'a Cloud,
    volume: &'a CloudVolume,
}

#[async_trait]
impl Effect for InOneHand<'_> {
    fn wanted(&self) -> String {
        format!("volume {} at rest", self.volume.name)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.cloud.volume(&self.volume.cinder.volume).await?;
        Ok(if is_changing_hands(&shown) { Look::Working(shown.status) } else { Look::Done })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        Ok(())
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
            () if is_changing_hands(&shown) => Look::Working(shown.status),
            () if shown.attachments.is_empty() && shown.status != "in-use" => Look::Done,
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
            () if there && shown.status == "in-use" => Look::Done,
            () if shown.attachments.iter().any(|found| found.server_id != self.gateway) => {
                Look::Hopeless(format!("volume {} is with another server", shown.id))
            }
            () if is_changing_hands(&shown) => Look::Working(shown.status),
            () => Look::NotYet(shown.status),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.cloud.attach(self.gateway, self.attachment).await
    }
}

impl OpenStack {
    async fn attachments(&self, operation: &str, gateway: &str) -> Result<Vec<ServerAttachment>, ProviderError> {
        let cloud = self.cloud(operation).await?;
        let all = cloud.server_attachments(gateway).await.map_err(|error| self.cloud_error(operation, &error))?;
        let ours = |found: &ServerAttachment| self.volumes.iter().any(|volume| volume.cinder.volume == found.volume);
        Ok(all.into_iter().filter(ours).collect())
    }

    /// Running: the gateway has all of them. Off: it has not. Once nothing is under way with any.
    pub(super) async fn observe_gateway(&self, gateway: &str) -> Result<Observed, ProviderError> {
        let operation = "state";
        let cloud = self.cloud(operation).await?;
        for volume in &self.volumes {
            self.bring_about(operation, &InOneHand { cloud, volume }).await?;
        }
        let attached = self.attachments(operation, gateway).await?;
        let volumes = self.look(operation).await?;
        let in_use = volumes.iter().all(|(volume, _)| volume.status == "in-use");
        let power = if attached.len() == self.volumes.len() && in_use { Power::Running } else { Power::Off };
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

    /// Has the gateway let go of them.
    pub(super) async fn detach_all(&self, gateway: &str, pause: Option<&str>) -> Result<(), ProviderError> {
        let operation = "detach";
        if let Some(pause) = pause {
            self.hook("pause", pause).await?;
        }
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
        resume: Option<&str>,
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
        match resume {
            Some(resume) => self.hook("resume", resume).await,
            None => Ok(()),
        }
    }

    async fn hook(&self, step: &'static str, script: &str) -> Result<(), ProviderError> {
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
