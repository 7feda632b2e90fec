//! A server of a cloud that is made again: with another id, from volumes with other ids, by calls that every cloud has.
//!
//! | part | what it is |
//! |---|---|
//! | `remembered` | all that the server is made again from |
//! | `server` | finding it, deleting it, making it |
//! | `ports` | what its network interfaces are, and stay |
//! | `volumes` | an image becomes a volume of Cinder's, or a mere image again |
//! | `preconditions` | what stands in the way |
//!
//! # The order
//!
//! 1. While the server runs, all of it is remembered in the notes, and with each source is noted which image its target
//!    is ([`crate::image::rbd::RbdImage::note_target`]).
//! 2. The server is stopped. The last delta.
//! 3. Cinder is given the targets, and renames their images. Only when it has all of them, no volume ends with the server
//!    any more and its ports are held, the server is deleted. What fails before that starts the server again, which has lost nothing.
//! 4. The old volumes are held (`os-reserve`), so that nobody attaches them: they are the way back.
//! 5. The server is made from the new volumes, and runs. Which volumes end with it, it is told after that.
//!
//! The way back is the same the other way: the server is deleted and its volumes stay, Cinder gives up the new volumes,
//! whose images get their names back, and the server is made from the old ones. Finalizing deletes the old volumes
//! through Cinder.
//!
//! # What a killed process leaves is found
//!
//! - The server of the plan is that with the plan's id; where there is none, that which is marked with it in its metadata
//!   ([`SERVER_MARK`](remembered::SERVER_MARK)). One that was asked for is there, or is not; one is made only where there
//!   is none, and a second one would not be given the volumes. One that somebody has deleted, and that Nova keeps for a
//!   while, is in no list that an owner gets: its volumes say who has them.
//! - A target is found by its image, whatever the name: that names the volume of Cinder's. One that Cinder was asked for
//!   and that has no image yet is marked as well.
//! - A volume whose image is not the target's is never taken from Cinder, unless it carries the mark and has no image.

mod ports;
mod preconditions;
mod remembered;
mod server;
mod volumes;

use std::time::Duration;

use async_trait::async_trait;
use futures::future::{join_all, try_join_all};

use super::super::rehearse::Rehearse;
use super::super::{Notes, Observed, Power, Precondition, Provider, ProviderError, Side, name};
use super::OpenStack;
use super::server::{ACTIVE, OFF, power, told};
use super::switch::Connectors;
use crate::openstack::nova::ServerAction;
use crate::plan::{self, Holder, OpenStackCutover};
use remembered::Remembered;
use server::Found;

pub(super) use server::find_marked;

/// A server of a cloud that is made again.
#[derive(Debug)]
pub struct Recreate {
    base: OpenStack,
    /// The id that it has in the plan.
    id: String,
}

impl Recreate {
    /// The server of the plan. Nobody is asked before something is to be known of it.
    ///
    /// # Errors
    /// If nothing boots from the volumes, which the plan's reader refuses.
    pub fn new(
        server: &plan::Server,
        config: OpenStackCutover,
        connectors: &Connectors,
    ) -> Result<Self, ProviderError> {
        let id = match &config.holder {
            Holder::Server(id) => Some(id.clone()),
            Holder::Gateway { .. } | Holder::Nobody => None,
        };
        let base = OpenStack::new(server, config, connectors);
        let hint = "name the server that boots from the volumes in the plan";
        let id = id.ok_or_else(|| base.error("cutover", "only a server can be made again", Some(hint)))?;
        Ok(Self { base, id })
    }

    fn remembered(&self, operation: &str, notes: &Notes) -> Result<Remembered, ProviderError> {
        Remembered::noted(notes).ok_or_else(|| {
            let hint = "make it again by hand, from its volumes: they are all there";
            self.base.error(operation, "what it was made with is not among the notes", Some(hint))
        })
    }

    /// Makes all targets volumes of Cinder's, or mere images.
    async fn bring_targets(&self, operation: &str, to: Side) -> Result<(), ProviderError> {
        // All to their ends: what is dropped in the middle of a step goes on, in Cinder, and nobody looks.
        let bring = self.base.volumes.iter().map(|volume| self.base.bring_target(operation, volume, to));
        join_all(bring).await.into_iter().try_for_each(|done| done.map(drop))
    }

    /// No server is deleted that could not be made again, because somebody has one of its new volumes.
    async fn refuse_taken(&self, operation: &str) -> Result<(), ProviderError> {
        for volume in &self.base.volumes {
            let seen = self.base.look_at_target(operation, volume).await?;
            if !matches!(seen.volume, Some((_, volumes::State::Free))) {
                let new = seen.id().unwrap_or("that its target is to be");
                let problem =
                    format!("the new volume {new} of {} is not available: somebody has taken it", volume.name);
                return Err(self.base.error(operation, problem, Some("see with `openstack volume show` who has it")));
            }
        }
        Ok(())
    }

    /// Nothing is told to a server that its cloud is about to delete: its volumes might be deleted with it.
    fn refuse_deleted(&self, operation: &str, found: &Found) -> Result<(), ProviderError> {
        match found.is_deleted() {
            true => Err(self.deleted(operation, &found.server.id, "and its cloud keeps it for a while")),
            false => Ok(()),
        }
    }

    fn deleted(&self, operation: &str, id: &str, and: &str) -> ProviderError {
        let hint = format!("openstack server restore {id}, then the same once more");
        self.base.error(operation, format!("somebody has deleted it, {and}"), Some(&hint))
    }

    /// Holds the old volumes, and the others of the server, while it is not there.
    async fn hold(&self, operation: &str, remembered: &Remembered) -> Result<(), ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        join_all(remembered.disks.iter().map(|disk| volumes::hold(cloud, &disk.volume))).await;
        Ok(())
    }
}

impl Rehearse for Recreate {}

#[async_trait]
impl Provider for Recreate {
    fn describe(&self) -> String {
        format!("OpenStack server {}, recreate", self.id)
    }

    fn names_images(&self) -> bool {
        true
    }

    fn keeps_source_names(&self) -> bool {
        true
    }

    fn needs_one_cluster(&self) -> bool {
        true
    }

    async fn usual_pause(&self) -> Option<Duration> {
        None
    }

    async fn preconditions(&self, from: Side) -> Vec<Precondition> {
        preconditions::of(self, from).await
    }

    async fn observe(&self, _notes: &Notes) -> Result<Observed, ProviderError> {
        let operation = "state";
        let Some(found) = self.find(operation).await? else {
            // It would be made from where the targets are now.
            let looks = self.base.volumes.iter().map(|volume| self.base.look_at_target(operation, volume));
            let all = try_join_all(looks).await?;
            let side = all.first().and_then(volumes::Seen::side);
            let side = side.filter(|side| all.iter().all(|seen| seen.side() == Some(*side)));
            return Ok(Observed { power: Power::Off, side });
        };
        Ok(Observed { power: power(&found.server), side: found.side })
    }

    async fn prepare(&self, from: Side, notes: &mut Notes) -> Result<(), ProviderError> {
        let operation = "preparation";
        self.remember(operation, notes).await?;
        if from == Side::Source {
            let note = self.base.volumes.iter().map(volumes::note_target);
            try_join_all(note).await.map_err(|error| self.base.image_error(operation, &error))?;
        }
        Ok(())
    }

    async fn quiesce(&self, _notes: &mut Notes) -> Result<(), ProviderError> {
        let operation = "stop";
        match self.find(operation).await? {
            Some(found) if power(&found.server) != Power::Off => {
                self.base.act(operation, &found.server.id, ServerAction::Stop, (OFF, &[ACTIVE, "ERROR"])).await
            }
            _ => Ok(()),
        }
    }

    async fn swap(&self, to: Side, notes: &mut Notes) -> Result<(), ProviderError> {
        let operation = format!("switch to the {}", name(to));
        let mut found = self.find(&operation).await?;
        if let Some(deleted) = found.take_if(|found| found.is_deleted()) {
            // It was asked for, and is under way: nothing but the end of it is the same whatever Nova does meanwhile.
            self.delete(&operation, &deleted, &self.remembered(&operation, notes)?).await?;
        }
        if let Some(found) = found.as_ref().filter(|found| found.side == Some(to) && !found.has_failed()) {
            // It may run there: all that is left is what the other side still has.
            return match to {
                Side::Target => Ok(()),
                Side::Source => {
                    tracing::debug!(server = found.server.id, "it was never deleted");
                    self.bring_targets(&operation, to).await
                }
            };
        }
        let remembered = self.remembered(&operation, notes)?;
        if let Some(found) = found.as_ref().filter(|found| power(&found.server) == Power::Running) {
            let problem = format!("it is {}: no server that runs is deleted", told(&found.server));
            return Err(self.base.error(&operation, problem, None));
        }
        if let Some(found) = found.as_ref().filter(|found| found.side != Some(to.other()) && !found.has_failed()) {
            let problem = format!("server {} has not the volumes that it had: it is not deleted", found.server.id);
            return Err(self.base.error(
                &operation,
                problem,
                Some(
                    "give them back to it (openstack server add volume); or delete it, and its volumes stay: then run the same \
                     command again",
                ),
            ));
        }
        if to == Side::Target {
            self.bring_targets(&operation, to).await?;
        }
        if let Some(found) = found {
            if to == Side::Target {
                self.refuse_taken(&operation).await?;
            }
            self.delete(&operation, &found, &remembered).await?;
        }
        if to == Side::Source {
            self.bring_targets(&operation, to).await?;
        }
        self.hold(&operation, &remembered).await
    }

    async fn start(&self, on: Side, _fresh: bool, notes: &mut Notes) -> Result<(), ProviderError> {
        let operation = format!("start on the {}", name(on));
        match self.find(&operation).await? {
            Some(found) if found.side != Some(on) => {
                let problem = format!("it is {}, and not on the {}", told(&found.server), name(on));
                Err(self.base.error(&operation, problem, Some("see with `openstack server show` which volumes it has")))
            }
            Some(found) => {
                self.refuse_deleted(&operation, &found)?;
                let id = found.server.id.as_str();
                if let Some(remembered) = Remembered::noted(notes) {
                    self.give_ports(&operation, id, &remembered).await?;
                }
                if power(&found.server) == Power::Running {
                    return Ok(());
                }
                if found.server.status == "ERROR" {
                    // Nova starts nothing that failed; it stops it.
                    self.base.act(&operation, id, ServerAction::Stop, (OFF, &["ERROR"])).await?;
                }
                self.base.act(&operation, id, ServerAction::Start, (ACTIVE, &[OFF])).await
            }
            None => {
                let remembered = self.remembered(&operation, notes)?;
                self.make(&operation, &remembered, on).await
            }
        }
    }

    async fn settle(&self, on: Side, notes: &mut Notes) -> Result<Vec<String>, ProviderError> {
        let operation = "cleaning up";
        let mut remarks = Vec::new();
        if let Some(found) = self.find(operation).await? {
            self.refuse_deleted(operation, &found)?;
            if let Some(remembered) = Remembered::noted(notes) {
                self.tell_what_ends_with_it(operation, &found, &remembered).await?;
                if found.side == Some(on) {
                    // Somebody may have started it before it was deleted.
                    self.give_ports(operation, &found.server.id, &remembered).await?;
                    if !remembered.interfaces.is_empty() {
                        remarks.extend(self.missing(operation, &found.server.id, &remembered).await?);
                    }
                }
            }
            if found.server.id != self.id {
                remarks
                    .push(format!("it is server {} now, which was {} when it was planned", found.server.id, self.id));
            }
        }
        Remembered::forget(notes);
        if on == Side::Source {
            // Somebody may have started it before a cutover that was cut had got to its deletion.
            self.bring_targets(operation, on).await?;
            let forget = self.base.volumes.iter().map(volumes::forget_target);
            try_join_all(forget).await.map_err(|error| self.base.image_error(operation, &error))?;
        }
        Ok(remarks)
    }

    async fn keeps_sources(&self) -> Result<Option<String>, ProviderError> {
        let operation = "look at the old volumes";
        let cloud = self.base.cloud(operation).await?;
        let mut with_snapshots = Vec::new();
        for volume in &self.base.volumes {
            let id = volume.cinder.volume.as_str();
            let snapshots = cloud.snapshots(id).await.map_err(|error| self.base.cloud_error(operation, &error))?;
            with_snapshots.extend(snapshots.iter().map(|found| format!("{} of {id}", found.id)));
        }
        let all = with_snapshots.join(", ");
        Ok((!with_snapshots.is_empty()).then(|| format!("Cinder has snapshots of the old volumes, remove them: {all}")))
    }

    async fn remove_source(&self, volume: &str) -> Result<bool, ProviderError> {
        let operation = "remove an old volume";
        let cloud = self.base.cloud(operation).await?;
        let Some(volume) = self.base.volumes.iter().find(|found| found.name == volume) else { return Ok(false) };
        self.base.bring_about(operation, &volumes::Deleted { cloud, volume }).await?;
        Ok(true)
    }
}
