//! A server that runs from the volumes: shelved, so that it stops and leaves its host, and unshelved.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::{try_join, try_join_all};
use tokio::sync::OnceCell;
use tokio::time::Instant;

use super::super::{Observed, Power, ProviderError, Side};
use super::effect::{Effect, Look, pause};
use super::switch::{CloudVolume, is_open};
use super::{OpenStack, name};
use crate::image::ImageError;
use crate::image::pools::VolumeImage;
use crate::openstack::cinder::{Status, Volume};
use crate::openstack::nova::{Server, ServerAction};
use crate::openstack::{Cloud, CloudError, if_there};

pub(super) const ACTIVE: &str = "ACTIVE";
pub(super) const OFF: &str = "SHUTOFF";
/// Stopped, and deleted for good one day, where its cloud keeps what is deleted for a while.
pub(super) const DELETED_SOFTLY: &str = "SOFT_DELETED";
const SHELVED: &str = "SHELVED";
const OFFLOADED: &str = "SHELVED_OFFLOADED";

/// Gone, and still to be seen: Nova takes what it had out of its accounts, and then the server out of its lists.
const DELETED: &str = "DELETED";

/// How long Nova may take to forget the host of a server that has left it: before that, it takes what the server had
/// out of the host's accounts, and may have to wait there until it has counted all that the host has. For ever, if that
/// has failed.
const HOST_PATIENCE: Duration = Duration::from_secs(60);

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

/// Why a server can't be brought over because of its status, which is that of a server that does not run.
pub(super) fn why_not_active(server: &Server) -> Option<String> {
    match server.status.as_str() {
        ACTIVE => None,
        DELETED_SOFTLY => {
            let id = &server.id;
            Some(format!("somebody has deleted it, and its cloud keeps it for a while: openstack server restore {id}"))
        }
        status => Some(format!("it is {status}, and has to be {ACTIVE}: it runs when it comes back")),
    }
}

/// Begins to delete a server, which may be gone already, also where its cloud keeps what is deleted for a while, and its
/// volumes with it.
pub(super) async fn delete_for_good(cloud: &Cloud, id: &str) -> Result<(), CloudError> {
    let asked = async {
        match cloud.server(id).await?.status.as_str() {
            DELETED_SOFTLY => cloud.act_on_server(id, ServerAction::ForceDelete).await,
            _ => cloud.delete_server(id).await,
        }
    };
    if_there(asked.await).map(drop)
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

impl Becomes<'_> {
    fn judge(&self, server: &Server) -> Look {
        match () {
            () if server.task.is_some() => Look::Working(told(server)),
            () if server.status == self.wanted => Look::Done,
            () if self.from.contains(&server.status.as_str()) => Look::NotYet(told(server)),
            () => Look::Hopeless(format!("it is {}, and can't become {}", told(server), self.wanted)),
        }
    }
}

#[async_trait]
impl Effect for Becomes<'_> {
    fn wanted(&self) -> String {
        format!("server that is {}", self.wanted)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        Ok(self.judge(&self.cloud.server(self.id).await?))
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.cloud.act_on_server(self.id, self.action).await
    }
}

/// A server leaves its host: it has left it, or is being taken from it, and nobody has its volumes' images open any more.
///
/// Nova shuts a server down first, and then takes what is left of it apart, which takes as long again.
struct Closes<'a> {
    leaves: Becomes<'a>,
    volumes: &'a [CloudVolume],
    images: OnceCell<Vec<Arc<dyn VolumeImage>>>,
    /// Whether it has not left yet.
    is_leaving: &'a AtomicBool,
}

impl Closes<'_> {
    /// Whether nobody is left who might write.
    async fn are_closed(&self) -> Result<bool, ImageError> {
        let open = || try_join_all(self.volumes.iter().map(CloudVolume::named_as_in_use));
        let images =
            self.images.get_or_try_init(|| async { Ok(open().await?.into_iter().flatten().collect()) }).await?;
        let open = try_join_all(images.iter().map(|image| is_open(image.as_ref()))).await?;
        Ok(open.len() >= self.volumes.len() && !open.contains(&true))
    }
}

#[async_trait]
impl Effect for Closes<'_> {
    fn wanted(&self) -> String {
        self.leaves.wanted()
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let server = self.leaves.cloud.server(self.leaves.id).await?;
        // Where the images can't be looked at, its cloud says when it has left.
        if is_being_shelved(&server) && self.are_closed().await.unwrap_or(false) {
            self.is_leaving.store(true, Ordering::Release);
            return Ok(Look::Done);
        }
        Ok(self.leaves.judge(&server))
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.leaves.ask().await
    }
}

/// A server's host has let go of a volume, which Cinder keeps for the server from then on.
struct LetGo<'a> {
    leaves: Becomes<'a>,
    volume: &'a CloudVolume,
    /// What Cinder shows of it then, where that was what told.
    found: OnceLock<Volume>,
    /// When its server was last looked at.
    server_seen: Mutex<Instant>,
}

impl LetGo<'_> {
    /// So seldom the server is looked at as well. It has all the cloud's attention that it can get.
    const SERVER_EVERY: Duration = Duration::from_millis(800);

    /// Whether it is the server's turn to be looked at.
    fn is_servers_turn(&self) -> bool {
        let mut seen = self.server_seen.lock().unwrap_or_else(PoisonError::into_inner);
        let due = seen.elapsed() >= Self::SERVER_EVERY;
        if due {
            *seen = Instant::now();
        }
        due
    }
}

#[async_trait]
impl Effect for LetGo<'_> {
    fn wanted(&self) -> String {
        format!("volume {} that the server's host has let go of", self.volume.name)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.leaves.cloud.volume(&self.volume.cinder.volume).await?;
        let is_kept = shown.status == Status::Reserved.name() && shown.attachments.is_empty();
        if is_kept {
            let _ = self.found.set(shown);
            return Ok(Look::Done);
        }
        match self.is_servers_turn() {
            true => self.leaves.look().await,
            false => Ok(Look::Working(shown.status)),
        }
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.leaves.ask().await
    }
}

/// Whether nothing is under way with it. Nova says that a server has left its host, and writes down that it is on none after
/// that: over what it would write about another host, if the server were told to come back in between.
fn is_at_rest(server: &Server) -> bool {
    server.task.is_none() && !(server.status == OFFLOADED && server.host.is_some())
}

/// Whether something is under way with it.
pub(super) fn is_moving(server: &Server) -> bool {
    server.task.is_some() || server.status == DELETED
}

/// Whether it is being deleted, for good or for a while.
pub(super) fn is_going(server: &Server) -> bool {
    server.status == DELETED || server.task.as_deref().is_some_and(|task| task.ends_with("deleting"))
}

/// Whether its cloud takes it from its host.
fn is_being_shelved(server: &Server) -> bool {
    server.task.as_deref().is_some_and(|task| task.starts_with("shelving"))
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
        Ok(if is_moving(&server) { Look::Working(told(&server)) } else { Look::Done })
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
            let found = if_there(cloud.attachment(&attachment.attachment_id).await)?;
            Ok::<_, CloudError>(found.and_then(|found| found.image().map(str::to_owned)))
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
        let found = if_there(cloud.server(id).await).map_err(|error| self.cloud_error(operation, &error))?;
        let server = match found {
            // Whoever has deleted it has left its volumes.
            None => return Ok(Observed { power: Power::Off, side: self.side_of(&self.look(operation).await?) }),
            Some(server) if server.task.is_none() => server,
            Some(server) if is_being_shelved(&server) && self.is_leaving.load(Ordering::Acquire) => {
                return Ok(Observed { power: Power::Off, side: self.side_of(&self.look(operation).await?) });
            }
            // What a process that is gone has asked for may still be under way.
            Some(_) => self.server_at_rest(operation, id).await?,
        };
        let volumes = self.look(operation).await?;
        let power = match power(&server) {
            Power::Running if !self.runs(operation, &server).await? => Power::Off,
            power => power,
        };
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
    /// to leave its host in any case. With one after the other it would stand still for longer. It may still be leaving
    /// ([`Self::until_let_go`]), with nothing open any more.
    pub(super) async fn stop_server(&self, id: &str) -> Result<(), ProviderError> {
        let operation = "stop";
        self.is_leaving.store(false, Ordering::Release);
        let server = self.server_at_rest(operation, id).await?;
        if server.status != ACTIVE {
            return self.leave_host(operation, id).await;
        }
        let leaves = self.leaves(self.cloud(operation).await?, id);
        let closes = Closes { leaves, volumes: &self.volumes, images: OnceCell::new(), is_leaving: &self.is_leaving };
        self.bring_about_from(operation, &closes, Some(told(&server))).await
    }

    /// It has left its host, and that is asked for where it was given up.
    fn leaves<'a>(&self, cloud: &'a Cloud, id: &'a str) -> Becomes<'a> {
        Becomes { cloud, id, action: ServerAction::Shelve, wanted: OFFLOADED, from: &[ACTIVE, OFF] }
    }

    /// Waits until the host of a server that is leaving it has let go of a volume, and gives back what Cinder shows then.
    pub(super) async fn until_let_go(
        &self,
        operation: &str,
        (volume, id): (&CloudVolume, &str),
    ) -> Result<Volume, ProviderError> {
        let cloud = self.cloud(operation).await?;
        let server_seen = Mutex::new(Instant::now());
        let mut let_go = LetGo { leaves: self.leaves(cloud, id), volume, found: OnceLock::new(), server_seen };
        self.bring_about(operation, &let_go).await?;
        match let_go.found.take() {
            Some(shown) => Ok(shown),
            None => cloud.volume(&volume.cinder.volume).await.map_err(|error| self.cloud_error(operation, &error)),
        }
    }

    async fn server(&self, operation: &str, id: &str) -> Result<Server, ProviderError> {
        self.cloud(operation).await?.server(id).await.map_err(|error| self.cloud_error(operation, &error))
    }

    /// A server, once nothing is under way with it.
    async fn server_at_rest(&self, operation: &str, id: &str) -> Result<Server, ProviderError> {
        let mut server = self.server(operation, id).await?;
        if server.task.is_some() {
            let cloud = self.cloud(operation).await?;
            self.bring_about(operation, &AtRest { cloud, id }).await?;
            server = self.server(operation, id).await?;
        }
        Ok(server)
    }

    /// A server that nothing is under way with, once Nova has written down that it is on no host, if it is on none.
    async fn off_its_host(&self, operation: &str, id: &str) -> Result<Server, ProviderError> {
        let mut server = self.server_at_rest(operation, id).await?;
        let (begun, limit) = (Instant::now(), HOST_PATIENCE.min(self.config.limit));
        while !is_at_rest(&server) {
            if begun.elapsed() >= limit {
                tracing::warn!(server = id, "it has left its host, and Nova has not written that down: going on");
                break;
            }
            pause(begun).await;
            server = self.server(operation, id).await?;
        }
        Ok(server)
    }

    /// It has left its host, or is leaving it with nothing open any more: then its images may be given other names, and
    /// [`Self::until_let_go`] is to be waited for.
    pub(super) async fn be_leaving(&self, operation: &str, id: &str) -> Result<(), ProviderError> {
        if self.is_leaving.load(Ordering::Acquire) {
            let server = self.server(operation, id).await?;
            if is_being_shelved(&server) || server.status == OFFLOADED {
                return Ok(());
            }
            // Its cloud has given that up.
            self.is_leaving.store(false, Ordering::Release);
        }
        self.leave_host(operation, id).await
    }

    /// Has it leave its host, so that it asks for its volumes anew when it comes back.
    pub(super) async fn leave_host(&self, operation: &str, id: &str) -> Result<(), ProviderError> {
        let server = self.server_at_rest(operation, id).await?;
        if self.runs(operation, &server).await? {
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
            OFFLOADED => Ok(()),
            SHELVED => self.act(operation, id, ServerAction::ShelveOffload, (OFFLOADED, &[SHELVED])).await,
            _ => self.bring_about(operation, &self.leaves(self.cloud(operation).await?, id)).await,
        }
    }

    /// Whether a server runs. Where Nova has failed to take one apart it says so of what it has shut down: that has nothing
    /// open.
    async fn runs(&self, operation: &str, server: &Server) -> Result<bool, ProviderError> {
        if power(server) != Power::Running {
            return Ok(false);
        }
        let any = async {
            let images = try_join_all(self.volumes.iter().map(CloudVolume::named_as_in_use)).await?;
            let open = try_join_all(images.iter().flatten().map(|image| is_open(image.as_ref()))).await?;
            Ok(open.contains(&true))
        };
        any.await.map_err(|error| self.image_error(operation, &error))
    }

    /// Has it run from that side. A server that was only stopped knows the images that it had: it is started where those
    /// are the right ones, and built anew otherwise.
    pub(super) async fn start_server(&self, operation: &str, id: &str, on: Side) -> Result<(), ProviderError> {
        let (mut server, mut volumes) = try_join(self.server(operation, id), self.look(operation)).await?;
        self.is_leaving.store(false, Ordering::Release);
        if !is_at_rest(&server) {
            server = self.off_its_host(operation, id).await?;
            volumes = self.look(operation).await?;
        }
        if self.side_of(&volumes) != Some(on) {
            let problem = format!("its volumes are not all on the {}", name(on));
            return Err(self.error(operation, problem, Some("look at their types, and at both pools with rbd ls")));
        }
        let status = server.status.as_str();
        let shown: Vec<Volume> = volumes.into_iter().map(|(volume, _)| volume).collect();
        let knows = status != OFFLOADED && self.told_side(operation, &shown).await? == Some(on);
        if self.runs(operation, &server).await? {
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
            self.off_its_host(operation, id).await?;
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
