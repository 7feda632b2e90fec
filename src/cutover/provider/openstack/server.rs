//! A server that runs from the volumes: shelved, so that it stops and leaves its host, and unshelved.

use async_trait::async_trait;
use futures::future::{try_join, try_join_all};

use super::super::{Observed, Power, ProviderError, Side};
use super::effect::{Effect, Look};
use super::{OpenStack, name};
use crate::openstack::cinder::{Status, Volume};
use crate::openstack::nova::{Server, ServerAction};
use crate::openstack::{Cloud, CloudError, Fault};

pub(super) const ACTIVE: &str = "ACTIVE";
pub(super) const OFF: &str = "SHUTOFF";
const SHELVED: &str = "SHELVED";
const OFFLOADED: &str = "SHELVED_OFFLOADED";

/// What it is doing, in the cloud's own words.
pub(super) fn told(server: &Server) -> String {
    let task = server.task.as_ref().map(|task| format!(", {task}")).unwrap_or_default();
    let fault = server.fault.as_ref().filter(|fault| !fault.message.is_empty());
    let fault = fault.map(|fault| format!(": {}", fault.message)).unwrap_or_default();
    format!("{}{task}{fault}", server.status)
}

/// What a server is doing. One that failed runs if its hypervisor says so.
pub(super) fn power(server: &Server) -> Power {
    match (server.status.as_str(), server.power) {
        ("PAUSED", _) => Power::Suspended,
        ("SUSPENDED", _) => Power::Saved,
        (OFF | SHELVED | OFFLOADED, _) => Power::Off,
        // Rescued, being resized, failed and what else there is: its hypervisor knows.
        (ACTIVE, _) | (_, 1) => Power::Running,
        _ => Power::Off,
    }
}

/// Begins to delete a server, which may be gone already, also where its cloud keeps what is deleted for a while, and its
/// volumes with it.
pub(super) async fn delete_for_good(cloud: &Cloud, id: &str) -> Result<(), CloudError> {
    let asked = async {
        match cloud.server(id).await?.status.as_str() {
            "SOFT_DELETED" => cloud.act_on_server(id, ServerAction::ForceDelete).await,
            _ => cloud.delete_server(id).await,
        }
    };
    asked.await.or_else(|error| if error.fault == Fault::NotFound { Ok(()) } else { Err(error) })
}

/// A server is in that state.
struct Becomes<'a> {
    cloud: &'a Cloud,
    id: &'a str,
    action: ServerAction,
    wanted: &'static str,
    /// In which states it can be asked for it.
    from: &'static [&'static str],
}

#[async_trait]
impl Effect for Becomes<'_> {
    fn wanted(&self) -> String {
        format!("server that is {}", self.wanted)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let server = self.cloud.server(self.id).await?;
        Ok(match () {
            () if server.task.is_some() => Look::Working(told(&server)),
            () if server.status == self.wanted => Look::Done,
            () if self.from.contains(&server.status.as_str()) => Look::NotYet(told(&server)),
            () => Look::Hopeless(format!("it is {}, and can't become {}", told(&server), self.wanted)),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.cloud.act_on_server(self.id, self.action).await
    }
}

/// Nothing is under way with a server.
pub(super) struct AtRest<'a> {
    pub(super) cloud: &'a Cloud,
    pub(super) id: &'a str,
}

#[async_trait]
impl Effect for AtRest<'_> {
    fn wanted(&self) -> String {
        "server that is at rest".into()
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let server = self.cloud.server(self.id).await?;
        Ok(if server.task.is_some() { Look::Working(told(&server)) } else { Look::Done })
    }
}

impl OpenStack {
    /// The image that each volume was last told to a server as; `None` where none was.
    async fn told_images(&self, operation: &str, volumes: &[Volume]) -> Result<Vec<Option<String>>, ProviderError> {
        let cloud = self.cloud(operation).await?;
        let told = volumes.iter().map(|volume| async move {
            let Some(attachment) = volume.attachments.first().filter(|found| !found.attachment_id.is_empty()) else {
                return Ok(None);
            };
            Ok::<_, CloudError>(cloud.attachment(&attachment.attachment_id).await?.image().map(str::to_owned))
        });
        try_join_all(told).await.map_err(|error| self.cloud_error(operation, &error))
    }

    /// The side that a server was told of, by what Cinder has answered to it: not what Cinder would say now.
    async fn told_side(&self, operation: &str, volumes: &[Volume]) -> Result<Option<Side>, ProviderError> {
        let told = self.told_images(operation, volumes).await?;
        let on = |side| {
            self.volumes.iter().zip(&told).all(|(volume, told)| told.as_deref() == Some(volume.image(side).as_str()))
        };
        Ok([Side::Source, Side::Target].into_iter().find(|&side| on(side)))
    }

    /// What is true of a server, once nothing is under way with it.
    pub(super) async fn observe_server(&self, id: &str) -> Result<Observed, ProviderError> {
        let operation = "state";
        let cloud = self.cloud(operation).await?;
        let found = match cloud.server(id).await {
            // Whoever has deleted it has left its volumes.
            Err(error) if error.fault == Fault::NotFound => None,
            found => Some(found.map_err(|error| self.cloud_error(operation, &error))?),
        };
        let server = match found {
            None => return Ok(Observed { power: Power::Off, side: self.side_of(&self.look(operation).await?) }),
            Some(server) if server.task.is_none() => server,
            // What a process that is gone has asked for may still be under way.
            Some(_) => {
                self.bring_about(operation, &AtRest { cloud, id }).await?;
                cloud.server(id).await.map_err(|error| self.cloud_error(operation, &error))?
            }
        };
        let volumes = self.look(operation).await?;
        let power = power(&server);
        let side = match power {
            Power::Running | Power::Suspended => {
                let shown: Vec<Volume> = volumes.into_iter().map(|(volume, _)| volume).collect();
                self.told_side(operation, &shown).await?
            }
            Power::Off | Power::Saved => self.side_of(&volumes),
        };
        Ok(Observed { power, side })
    }

    pub(super) async fn act(
        &self,
        operation: &str,
        id: &str,
        action: ServerAction,
        (wanted, from): (&'static str, &'static [&'static str]),
    ) -> Result<(), ProviderError> {
        let cloud = self.cloud(operation).await?;
        self.bring_about(operation, &Becomes { cloud, id, action, wanted, from }).await
    }

    /// The same, for a server that was just looked at.
    async fn act_on(
        &self,
        operation: &str,
        server: &Server,
        action: ServerAction,
        (wanted, from): (&'static str, &'static [&'static str]),
    ) -> Result<(), ProviderError> {
        let (cloud, id) = (self.cloud(operation).await?, server.id.as_str());
        let is = (server.task.is_none() && from.contains(&server.status.as_str())).then(|| told(server));
        self.bring_about_from(operation, &Becomes { cloud, id, action, wanted, from }, is).await
    }

    /// Has it shut down and leave its host at once: Nova does both for one request, where it runs from volumes, and it has
    /// to leave its host in any case. With one after the other it would stand still for longer.
    pub(super) async fn stop_server(&self, id: &str) -> Result<(), ProviderError> {
        let operation = "stop";
        let cloud = self.cloud(operation).await?;
        let server = cloud.server(id).await.map_err(|error| self.cloud_error(operation, &error))?;
        match server.status.as_str() {
            ACTIVE => self.act_on(operation, &server, ServerAction::Shelve, (OFFLOADED, &[ACTIVE, OFF])).await,
            _ => self.leave_host(operation, id).await,
        }
    }

    /// Has it leave its host, so that it asks for its volumes anew when it comes back.
    pub(super) async fn leave_host(&self, operation: &str, id: &str) -> Result<(), ProviderError> {
        let cloud = self.cloud(operation).await?;
        let server = cloud.server(id).await.map_err(|error| self.cloud_error(operation, &error))?;
        if power(&server) == Power::Running {
            let problem = format!("it is {}: nothing is switched below a server that runs", told(&server));
            return Err(self.error(operation, problem, None));
        }
        match server.status.as_str() {
            // Nova shelves nothing that failed; it stops it.
            "ERROR" => {
                self.act(operation, id, ServerAction::Stop, (OFF, &["ERROR"])).await?;
                self.act(operation, id, ServerAction::Shelve, (OFFLOADED, &[OFF])).await
            }
            // Its cloud keeps what is shelved on its host for a while.
            OFFLOADED if server.task.is_none() => Ok(()),
            SHELVED => self.act(operation, id, ServerAction::ShelveOffload, (OFFLOADED, &[SHELVED])).await,
            _ => self.act(operation, id, ServerAction::Shelve, (OFFLOADED, &[OFF])).await,
        }
    }

    /// Has it run from that side. A server that was only stopped knows the images that it had: it is started where those
    /// are the right ones, and built anew otherwise.
    pub(super) async fn start_server(&self, operation: &str, id: &str, on: Side) -> Result<(), ProviderError> {
        let cloud = self.cloud(operation).await?;
        let server = async { cloud.server(id).await.map_err(|error| self.cloud_error(operation, &error)) };
        let (server, volumes) = try_join(server, self.look(operation)).await?;
        if self.side_of(&volumes) != Some(on) {
            let problem = format!("its volumes are not all on the {}", name(on));
            return Err(self.error(operation, problem, Some("look at their types, and at both pools with rbd ls")));
        }
        let status = server.status.as_str();
        let shown: Vec<Volume> = volumes.into_iter().map(|(volume, _)| volume).collect();
        let knows = status != OFFLOADED && self.told_side(operation, &shown).await? == Some(on);
        if power(&server) == Power::Running {
            return match knows {
                true => Ok(()),
                false => {
                    let problem = format!("it runs, and not from the {}", name(on));
                    Err(self.error(operation, problem, Some("find out who has started it")))
                }
            };
        }
        if knows && status == OFF {
            return self.act(operation, id, ServerAction::Start, (ACTIVE, &[OFF])).await;
        }
        if status != OFFLOADED {
            self.leave_host(operation, id).await?;
        }
        // Whoever has it shelved expects them to be kept for it.
        if shown.iter().any(|volume| volume.status != Status::Reserved.name()) {
            self.reset_all(operation, Status::Reserved).await?;
        }
        let becomes = (ACTIVE, &[OFFLOADED][..]);
        match status {
            OFFLOADED => self.act_on(operation, &server, ServerAction::Unshelve, becomes).await,
            _ => self.act(operation, id, ServerAction::Unshelve, becomes).await,
        }
    }
}
