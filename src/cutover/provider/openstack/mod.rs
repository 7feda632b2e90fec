//! A server, or volumes, of a cloud: the volumes keep their ids and are given another type, and with it another pool.
//!
//! | part | what it is |
//! |---|---|
//! | `switch` | one volume: what is to be done next, as a pure function, and doing it |
//! | `server` | a server that runs from the volumes: it is shelved, and unshelved |
//! | `lock` | that server is locked meanwhile, so that its owner does not start it |
//! | `gateway` | a server that has them as data disks: it gives them away, and gets them back |
//! | `detached` | volumes that nobody has |
//! | `effect` | asking a cloud for something, and looking until it is so |
//! | `volumes` | what Cinder is asked for |
//! | `preconditions` | what stands in the way |
//! | `rehearse` | whether a stand-in can be made, and has booted |
//! | `stand_in` | making a stand-in from clones, and removing it |
//! | [`retype`] | volumes that Cinder copies itself, without replication: another strategy |
//! | [`Recreate`] | another strategy: the server is deleted and made again, from volumes with other ids |
//! | [`drift`] | what has become of it while it was replicated |
//!
//! # The order
//!
//! A **server** is shelved, which shuts it down and takes it from its host, because only what is built anew asks Cinder how
//! to reach its volumes: a server that was only stopped would start with the old image. Its disks are closed long before
//! Nova is done with that: the last delta is carried over, and the images are given their names, meanwhile; Cinder is asked
//! for nothing before the host has let go of a volume. Once all are switched, it is unshelved. A **gateway** goes on: the
//! volumes are detached from it, switched, and attached again, as they were. What nobody has is kept from being attached
//! meanwhile by the status `maintenance`.
//!
//! # The stand-in of a rehearsal
//!
//! The clones are given to Cinder as volumes, of the project of the credentials, and Nova is told to make a server from
//! them: of the server's flavor, on no network. Cinder renames the clones. At the end the server is deleted, and Cinder
//! gives the volumes up without their images, which are the driver's to remove. Whatever is made says in its metadata which
//! rehearsal it is of, and is found by that, from any host.
//!
//! # The hooks of a gateway
//!
//! `pause` and `resume` of the plan are run by `/bin/sh -c` as the commands of [`super::command`] are, with
//! `POOLSHIFT_SERVER`, `POOLSHIFT_STEP` (`pause` or `resume`) and `POOLSHIFT_VOLUMES`, a JSON list of
//! `{"volume": "…", "cinder": "…"}`. After `pause` nothing may use the disks: they are about to go. Both must be
//! repeatable.

mod detached;
pub mod drift;
mod effect;
mod gateway;
mod lock;
mod preconditions;
mod recreate;
mod rehearse;
pub mod retype;
mod server;
mod stand_in;
mod switch;
#[cfg(all(test, debug_assertions))]
mod tests;
mod volumes;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::{join, join_all, join3, try_join, try_join_all};
use tokio::sync::OnceCell;

use super::{Notes, Observed, Precondition, Provider, ProviderError, Side, name};
use crate::failpoint::failpoint;
use crate::image::ImageError;
use crate::openstack::cinder::{MigrationPolicy, Status, Volume};
use crate::openstack::{Cloud, CloudAccess, CloudError};
use crate::plan::{self, Holder, OpenStackCutover};
pub use recreate::Recreate;
pub use switch::Connectors;
use switch::{CloudVolume, Images, Seen, Step};

/// How many steps a volume's switch has at most; the usual way has 5.
const STEPS_MAX: usize = 40;
/// How long a gateway is without a volume, beside the last delta.
const GATEWAY_PAUSE: Duration = Duration::from_secs(4);

/// A server, or volumes, of a cloud.
#[derive(Debug)]
pub struct OpenStack {
    server: String,
    config: OpenStackCutover,
    volumes: Vec<CloudVolume>,
    cloud: OnceCell<Cloud>,
    /// How to reach the cloud; `None`: as the plan and the environment say.
    access: Option<CloudAccess>,
    /// Whether this process has seen the server with nothing open while it was leaving its host, which it may not have yet.
    is_leaving: AtomicBool,
    /// Whether all of a stand-in has come about that this process has asked for: nothing of it comes later.
    stand_in_is_complete: AtomicBool,
}

impl OpenStack {
    /// The server of the plan. Nobody is asked before something is to be known of it.
    pub fn new(server: &plan::Server, config: OpenStackCutover, connectors: &Connectors) -> Self {
        Self::with_images(server, config, &Images::from(connectors))
    }

    /// The same with images that may be elsewhere than in clusters.
    fn with_images(server: &plan::Server, config: OpenStackCutover, images: &Images) -> Self {
        let volumes = server.volumes.iter().filter_map(|volume| CloudVolume::of(volume, images)).collect();
        Self {
            server: server.name.clone(),
            config,
            volumes,
            cloud: OnceCell::new(),
            access: None,
            is_leaving: AtomicBool::new(false),
            stand_in_is_complete: AtomicBool::new(false),
        }
    }

    async fn cloud(&self, operation: &str) -> Result<&Cloud, ProviderError> {
        let connect = async {
            let access = match &self.access {
                Some(access) => access.clone(),
                None => CloudAccess::load(self.config.cloud.as_deref())?,
            };
            Cloud::connect(access).await
        };
        self.cloud.get_or_try_init(|| connect).await.map_err(|error| self.cloud_error(operation, &error))
    }

    fn error(&self, operation: &str, problem: impl Into<String>, hint: Option<&str>) -> ProviderError {
        ProviderError {
            operation: operation.to_owned(),
            server: format!("server {}", self.server),
            problem: problem.into(),
            hint: hint.map(str::to_owned),
        }
    }

    fn cloud_error(&self, operation: &str, error: &CloudError) -> ProviderError {
        self.error(operation, crate::fleet::chain_text(error), error.hint.as_deref())
    }

    fn image_error(&self, operation: &str, error: &ImageError) -> ProviderError {
        self.error(operation, crate::fleet::chain_text(error), error.hint.as_deref())
    }

    /// All volumes, as Cinder has them.
    async fn cinder_volumes(&self, operation: &str) -> Result<Vec<Volume>, ProviderError> {
        let cloud = self.cloud(operation).await?;
        let show = self.volumes.iter().map(|volume| cloud.volume(&volume.cinder.volume));
        try_join_all(show).await.map_err(|error| self.cloud_error(operation, &error))
    }

    /// What is there of all volumes.
    async fn look(&self, operation: &str) -> Result<Vec<(Volume, Seen)>, ProviderError> {
        let volumes = self.cinder_volumes(operation).await?;
        let looks = self.volumes.iter().zip(&volumes).map(|(volume, shown)| volume.look(shown));
        let seen = try_join_all(looks).await.map_err(|error| self.image_error(operation, &error))?;
        Ok(volumes.into_iter().zip(seen).collect())
    }

    /// All volumes have the types that they leave, also after what was looked at before the first cycle.
    async fn as_planned(&self, operation: &str, from: Side) -> Result<(), ProviderError> {
        let volumes = self.cinder_volumes(operation).await?;
        for (volume, shown) in self.volumes.iter().zip(&volumes) {
            let (now, wanted) = (shown.volume_type.as_deref().unwrap_or_default(), volume.final_type(from));
            let id = &shown.id;
            if shown.is_moving() {
                let problem = format!("volume {id} is {} just now", shown.status);
                return Err(self.error(operation, problem, Some("let that end, and begin once more")));
            }
            if now != wanted {
                let problem = format!("volume {id} is of type {now:?}, and no longer of {wanted:?}");
                return Err(self.error(operation, problem, Some("somebody has retyped it: make the plan anew")));
            }
        }
        Ok(())
    }

    /// The side that all volumes are on.
    fn side_of(&self, all: &[(Volume, Seen)]) -> Option<Side> {
        let first = all.first()?.1.side()?;
        all.iter().all(|(_, seen)| seen.side() == Some(first)).then_some(first)
    }

    /// Gives all volumes their images on that side, and the type that goes with it. Nobody has them open.
    async fn switch_all(&self, operation: &str, to: Side, looked: Vec<(Volume, Seen)>) -> Result<(), ProviderError> {
        // All to their ends: what is dropped in the middle of a step goes on, in Cinder or in librbd, and nobody looks.
        let volumes = self.volumes.iter().zip(looked);
        let ended = join_all(volumes.map(|(volume, seen)| self.switch(operation, (volume, seen), to))).await;
        ended.into_iter().collect()
    }

    async fn switch(
        &self,
        operation: &str,
        (volume, looked): (&CloudVolume, (Volume, Seen)),
        to: Side,
    ) -> Result<(), ProviderError> {
        let cloud = self.cloud(operation).await?;
        let image_error = |error| self.image_error(operation, &error);
        let (mut seen, mut retyped, mut shut) = (Some(looked), false, false);
        let mut leaving = self.ours().filter(|_| self.is_leaving.load(Ordering::Acquire));
        for _ in 0..STEPS_MAX {
            let (mut shown, mut known) = match seen.take() {
                Some(seen) => seen,
                None => self.look_at(operation, volume).await?,
            };
            let (step, mut let_go) = (switch::next(to, &known), false);
            tracing::debug!(volume = volume.name, ?step, "{operation}");
            failpoint!("switch.{}", step.failpoint());
            // The image has another name from then on, and nobody has it open. Cinder still has to do with the volume.
            if !matches!(step, Step::Hide(_) | Step::StandIn(_) | Step::Refuse(_))
                && let Some(server) = leaving.take()
            {
                shown = self.until_let_go(operation, (volume, server)).await?;
                let_go = true;
            }
            match &step {
                Step::Done => return Ok(()),
                Step::Refuse(why) => {
                    let problem = format!("volume {} ({}): {why}", volume.name, volume.cinder.volume);
                    let hint =
                        "look at it with `openstack volume show` and `rbd ls` of both pools; nothing of it was removed";
                    return Err(self.error(operation, problem, Some(hint)));
                }
                Step::Wait => self.until_still(operation, volume).await?,
                Step::Retype => {
                    seen = Some(self.retype(operation, (volume, &shown, let_go), to).await?);
                    (retyped, shut) = (true, false);
                }
                // Cinder may still have a request that somebody has made in vain, and would move the image that is about
                // to have the name: it does so for what is available only.
                Step::Place(_) | Step::Aside(_) if !retyped && !shut => {
                    self.shut(operation, (cloud, volume), None).await?;
                    shut = true;
                }
                // A server that was shelved expects it to be kept for it.
                Step::Aside(_) if self.ours().is_some() && !shut => {
                    let is = Some(shown.status.clone()).filter(|status| status == Status::Available.name());
                    let (aside, kept) = join(volume.rename(&step), self.shut(operation, (cloud, volume), is)).await;
                    aside.map_err(image_error)?;
                    kept?;
                    known.after(&step);
                    (seen, shut) = (Some((shown, known)), true);
                }
                named => {
                    volume.rename(named).await.map_err(image_error)?;
                    known.after(&step);
                    seen = Some((shown, known));
                }
            }
        }
        Err(self.error(operation, format!("volume {} does not come to rest", volume.name), None))
    }

    /// Gives a volume a status in which Cinder does nothing with it; `is` says which one it was just seen with.
    async fn shut(
        &self,
        operation: &str,
        (cloud, volume): (&Cloud, &CloudVolume),
        is: Option<String>,
    ) -> Result<(), ProviderError> {
        let of_status = volumes::OfStatus {
            cloud,
            volume,
            status: self.shut_status(),
            ours: self.ours(),
            reserved: OnceLock::new(),
        };
        self.bring_about_from(operation, &of_status, is).await
    }

    /// Waits until Cinder is done with a volume.
    async fn until_still(&self, operation: &str, volume: &CloudVolume) -> Result<(), ProviderError> {
        let cloud = self.cloud(operation).await?;
        self.bring_about(operation, &volumes::AtRest { cloud, volume }).await
    }

    /// What is there of a volume.
    async fn look_at(&self, operation: &str, volume: &CloudVolume) -> Result<(Volume, Seen), ProviderError> {
        let cloud = self.cloud(operation).await?;
        let shown = cloud.volume(&volume.cinder.volume).await.map_err(|error| self.cloud_error(operation, &error))?;
        let seen = volume.look(&shown).await.map_err(|error| self.image_error(operation, &error))?;
        Ok((shown, seen))
    }

    /// Has Cinder give a volume, as it was seen, the next type on its way to a side; and looks at what is there then. Where
    /// its host has let go of it just now, and Cinder keeps it for its server, it is not looked at once more first.
    async fn retype(
        &self,
        operation: &str,
        (volume, before, let_go): (&CloudVolume, &Volume, bool),
        to: Side,
    ) -> Result<(Volume, Seen), ProviderError> {
        let cloud = self.cloud(operation).await?;
        if !volume.is_image_of(before) {
            let problem = format!("volume {} is {} for Cinder, and not what the plan has", volume.name, before.image());
            return Err(self.error(operation, problem, Some("make the plan anew: poolshift plan --openstack")));
        }
        let now = before.volume_type.as_deref().unwrap_or_default();
        let Some((next, migrates)) = volume.next_type(now, to) else {
            let problem = format!("volume {} has type {now:?}, which the plan does not know", volume.name);
            return Err(self.error(operation, problem, None));
        };
        let policy = if migrates { MigrationPolicy::OnDemand } else { MigrationPolicy::Never };
        let ours = self.ours();
        let is_kept = let_go && before.status == Status::Reserved.name();
        let seen = Mutex::new(is_kept.then(|| before.clone()));
        let (reserved, found) = (OnceLock::new(), OnceLock::new());
        let mut of_type = volumes::OfType { cloud, volume, now, next, policy, ours, reserved, seen, found };
        let is = format!("{} of type {now:?}", before.status);
        self.bring_about_from(operation, &of_type, Some(is)).await?;
        let (after, seen) = match of_type.found.take() {
            Some(after) => {
                let seen = volume.look(&after).await.map_err(|error| self.image_error(operation, &error))?;
                (after, seen)
            }
            None => self.look_at(operation, volume).await?,
        };
        if migrates && seen.on(to).in_use != switch::Holds::Placeholder {
            let host = after.host.as_deref().unwrap_or_default();
            let problem = format!("Cinder has brought volume {} to {host}, which is not the plan's pool", volume.name);
            return Err(self.error(operation, problem, Some("look at the backends of the types in the plan")));
        }
        Ok((after, seen))
    }

    /// The server that may be said to have a volume which is switched: that which has left its host.
    fn ours(&self) -> Option<&str> {
        match &self.config.holder {
            Holder::Server(id) => Some(id),
            Holder::Gateway { .. } | Holder::Nobody => None,
        }
    }

    /// The status in which Cinder does nothing with a volume.
    fn shut_status(&self) -> Status {
        match &self.config.holder {
            Holder::Server(_) => Status::Reserved,
            Holder::Gateway { .. } | Holder::Nobody => Status::Maintenance,
        }
    }

    /// Writes a status to all volumes that have another one.
    async fn reset_all(&self, operation: &str, status: Status) -> Result<(), ProviderError> {
        let cloud = self.cloud(operation).await?;
        let ours = self.ours();
        let of_status = |volume| volumes::OfStatus { cloud, volume, status, ours, reserved: OnceLock::new() };
        let effects: Vec<_> = self.volumes.iter().map(of_status).collect();
        self.bring_all_about(operation, &effects).await
    }
}

#[async_trait]
impl Provider for OpenStack {
    fn describe(&self) -> String {
        match &self.config.holder {
            Holder::Server(id) => format!("OpenStack server {id}, keep-ids"),
            Holder::Gateway { server, .. } => format!("OpenStack gateway {server}, keep-ids"),
            Holder::Nobody => "OpenStack, volumes that nobody has, keep-ids".into(),
        }
    }

    fn names_images(&self) -> bool {
        true
    }

    /// Cinder's driver moves an image within one cluster only; between two it would copy everything by itself.
    fn needs_one_cluster(&self) -> bool {
        true
    }

    async fn usual_pause(&self) -> Option<Duration> {
        match &self.config.holder {
            // How long it takes to stop and to boot, it alone knows.
            Holder::Server(_) => None,
            Holder::Gateway { .. } => Some(GATEWAY_PAUSE),
            Holder::Nobody => Some(Duration::from_secs(2)),
        }
    }

    async fn preconditions(&self, from: Side) -> Vec<Precondition> {
        preconditions::of(self, from).await
    }

    async fn observe(&self, _notes: &Notes) -> Result<Observed, ProviderError> {
        match &self.config.holder {
            Holder::Server(id) => self.observe_server(id).await,
            Holder::Gateway { server, .. } => self.observe_gateway(server).await,
            Holder::Nobody => self.observe_detached().await,
        }
    }

    async fn prepare(&self, from: Side, notes: &mut Notes) -> Result<(), ProviderError> {
        let operation = "preparation";
        let placeholders = async {
            let prepared = join_all(self.volumes.iter().map(|volume| volume.prepare(from))).await;
            prepared.into_iter().collect::<Result<Vec<()>, _>>().map_err(|error| self.image_error(operation, &error))
        };
        let no_snapshots = async {
            let cloud = self.cloud(operation).await?;
            for volume in &self.volumes {
                let id = volume.cinder.volume.as_str();
                let snapshots = cloud.snapshots(id).await.map_err(|error| self.cloud_error(operation, &error))?;
                if let Some(snapshot) = snapshots.first() {
                    let problem = format!("volume {id} has a snapshot of Cinder's by now, {}", snapshot.id);
                    return Err(self.error(
                        operation,
                        problem,
                        Some("remove it: Cinder retypes no volume that has one"),
                    ));
                }
            }
            Ok(())
        };
        let remember = async {
            match &self.config.holder {
                Holder::Gateway { server, .. } => self.remember_attachments(operation, server, notes).await,
                Holder::Server(_) | Holder::Nobody => Ok(()),
            }
        };
        // All to their ends: a placeholder that is made by a call that was dropped comes after it was tidied up.
        let (placeholders, no_snapshots, remember) = join3(placeholders, no_snapshots, remember).await;
        placeholders.and(no_snapshots).and(remember)?;
        self.as_planned(operation, from).await?;
        match &self.config.holder {
            Holder::Server(id) => self.lock_server(id).await,
            Holder::Gateway { .. } | Holder::Nobody => Ok(()),
        }
    }

    async fn quiesce(&self, _notes: &mut Notes) -> Result<(), ProviderError> {
        match &self.config.holder {
            Holder::Server(id) => self.stop_server(id).await,
            Holder::Gateway { server, pause, .. } => self.pause_and_detach(server, pause.as_deref()).await,
            Holder::Nobody => self.reset_all("maintenance", Status::Maintenance).await,
        }
    }

    async fn finish_stop(&self, _notes: &mut Notes) -> Result<(), ProviderError> {
        match &self.config.holder {
            Holder::Gateway { server, .. } => self.finish_detaching(server).await,
            // What is under way with a server is waited for whenever it is looked at.
            Holder::Server(_) | Holder::Nobody => Ok(()),
        }
    }

    async fn swap(&self, to: Side, _notes: &mut Notes) -> Result<(), ProviderError> {
        let operation = format!("switch to the {}", name(to));
        let looked = match &self.config.holder {
            // Whether it has left its host changes nothing of what is looked at.
            Holder::Server(id) => try_join(self.be_leaving(&operation, id), self.look(&operation)).await?.1,
            // It may have been given some of them already.
            Holder::Gateway { server, .. } => {
                self.detach_all(&operation, server).await?;
                self.look(&operation).await?
            }
            Holder::Nobody => self.look(&operation).await?,
        };
        self.switch_all(&operation, to, looked).await?;
        match &self.config.holder {
            Holder::Nobody => self.reset_all(&operation, Status::Maintenance).await,
            Holder::Server(_) | Holder::Gateway { .. } => Ok(()),
        }
    }

    async fn start(&self, on: Side, _fresh: bool, notes: &mut Notes) -> Result<(), ProviderError> {
        let operation = format!("start on the {}", name(on));
        match &self.config.holder {
            Holder::Server(id) => self.start_server(&operation, id, on).await,
            Holder::Gateway { server, .. } => self.attach_all(&operation, (server, on), notes).await,
            Holder::Nobody => self.reset_all(&operation, Status::Available).await,
        }
    }

    async fn undo(&self, from: Side, fresh: bool, notes: &mut Notes) -> Result<(), ProviderError> {
        self.is_leaving.store(false, Ordering::Release);
        // One that was only stopped need not leave its host.
        if self.side_of(&self.look("way back").await?) != Some(from) {
            self.swap(from, notes).await?;
        }
        self.start(from, fresh, notes).await
    }

    async fn settle(&self, on: Side, notes: &mut Notes) -> Result<Vec<String>, ProviderError> {
        let operation = "cleaning up";
        if let Holder::Server(id) = &self.config.holder {
            self.unlock_server(id).await?;
        }
        if let Holder::Gateway { server, resume, .. } = &self.config.holder {
            // A process that is gone may have given it some of them back, or none, and told nobody to go on.
            self.attach_all(operation, (server, on), notes).await?;
            if let Some(resume) = resume {
                self.hook("resume", resume).await?;
            }
        }
        let tidy = join_all(self.volumes.iter().map(CloudVolume::tidy_up)).await;
        tidy.into_iter().collect::<Result<Vec<()>, _>>().map_err(|error| self.image_error(operation, &error))?;
        // One of the placeholder's that came to nothing says nothing about the volume.
        let cloud = self.cloud(operation).await?;
        let effects: Vec<_> = self.volumes.iter().map(|volume| volumes::NoFailure { cloud, volume }).collect();
        self.bring_all_about(operation, &effects).await?;
        Ok(Vec::new())
    }
}
