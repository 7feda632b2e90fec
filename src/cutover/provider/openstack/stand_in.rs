//! A stand-in of Nova's and its volumes: made from clones, which Cinder is given, and removed again.
//!
//! All that is made has the rehearsal's id in its metadata, and by that it is found: a volume or server of the same name
//! is somebody else's. Cinder never deletes the volumes of a stand-in, as it would their images: it gives them up, and the
//! clones are left, under the names that Cinder gave them, to whoever made them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::super::rehearse::StandIn;
use super::super::{ProviderError, ServerDisk};
use super::OpenStack;
use super::effect::{Effect, Look};
use super::server::{ACTIVE, delete_for_good, is_going, told};
use super::volumes::{Described, give_up};
use crate::image::ImageSpec;
use crate::openstack::cinder::{Status, Volume};
use crate::openstack::manage::Managed;
use crate::openstack::nova::{NewServer, Server};
use crate::openstack::{Cloud, CloudError, if_there};

/// What carries the rehearsal's id.
pub(super) const REHEARSAL: &str = "poolshift-rehearsal";
/// What carries the server's name in the plan.
const SERVER: &str = "poolshift-server";
/// What carries the clone's name; of a server that of its first one in the plan, as another plan's may have its name.
pub(super) const CLONE: &str = "poolshift-clone";
/// How often all that is there is removed at most.
const ROUNDS: usize = 5;
/// How long it is looked for more where not all of a stand-in was there: what a process that was killed asked for last may
/// come about late.
const LATE: Duration = Duration::from_secs(10);
/// How often it is looked meanwhile.
const POLL: Duration = Duration::from_millis(500);

/// The name of a disk's clone.
pub(super) fn clone_of(disk: &ServerDisk) -> &str {
    match &disk.target {
        ImageSpec::Rbd { image, .. } => image,
        ImageSpec::File { .. } => "",
    }
}

fn metadata(stand_in: &StandIn) -> BTreeMap<String, String> {
    // Nova and Cinder keep so much of a value.
    let server = stand_in.server.chars().take(255).collect();
    BTreeMap::from([(REHEARSAL.to_owned(), stand_in.id.clone()), (SERVER.to_owned(), server)])
}

fn is_of(metadata: &BTreeMap<String, String>, stand_in: &StandIn) -> bool {
    metadata.get(REHEARSAL) == Some(&stand_in.id)
}

/// The volumes of a stand-in.
async fn volumes_of(cloud: &Cloud, stand_in: &StandIn) -> Result<Vec<Volume>, CloudError> {
    cloud.volumes_with(REHEARSAL, &stand_in.id).await
}

/// The stand-in itself. More than one only where Nova was asked once more, because it did not answer.
async fn servers_of(cloud: &Cloud, stand_in: &StandIn) -> Result<Vec<Server>, CloudError> {
    let named = cloud.servers_named(&stand_in.name).await?;
    Ok(named.into_iter().filter(|server| is_of(&server.metadata, stand_in)).collect())
}

/// The volume that Cinder has made of a clone, how it is with it.
fn look_at(volumes: &[Volume], clone: &str) -> Look {
    let ours = || volumes.iter().filter(|volume| volume.metadata.get(CLONE).is_some_and(|found| found == clone));
    let failed = |volume: &&Volume| volume.status.starts_with("error");
    match () {
        () if ours().any(|volume| volume.status == Status::Available.name()) => Look::Done,
        () => match (ours().find(|volume| !failed(volume)), ours().next()) {
            (Some(working), _) => Look::Working(working.status.clone()),
            (None, Some(failed)) => Look::Hopeless(format!(
                "Cinder does not take {clone} as a volume: {} became {}; the log of cinder-volume says why, and whether \
                 the backend of its type has the pool that the clone is in",
                failed.id, failed.status
            )),
            (None, None) => Look::NotYet("not there".into()),
        },
    }
}

/// Cinder has a clone as a volume.
struct Taken<'a> {
    cloud: &'a Cloud,
    stand_in: &'a StandIn,
    managed: Managed<'a>,
}

#[async_trait]
impl Effect for Taken<'_> {
    fn wanted(&self) -> String {
        format!("volume of {}", self.managed.image)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        Ok(look_at(&volumes_of(self.cloud, self.stand_in).await?, self.managed.image))
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.cloud.manage(&self.managed).await.map(drop)
    }
}

/// How it is with a stand-in that is to run.
fn look_at_servers(servers: &[Server]) -> Look {
    let failed = |server: &&Server| server.status == "ERROR";
    match (servers.iter().find(|server| !failed(server)), servers.first()) {
        (Some(server), _) if server.status == ACTIVE && server.task.is_none() => Look::Done,
        (Some(server), _) => Look::Working(told(server)),
        (None, Some(failed)) => Look::Hopeless(format!("its stand-in {} is {}", failed.id, told(failed))),
        (None, None) => Look::NotYet("not there".into()),
    }
}

/// The stand-in runs.
struct Runs<'a> {
    cloud: &'a Cloud,
    stand_in: &'a StandIn,
    server: NewServer<'a>,
}

#[async_trait]
impl Effect for Runs<'_> {
    fn wanted(&self) -> String {
        format!("server {} that runs", self.stand_in.name)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        Ok(look_at_servers(&servers_of(self.cloud, self.stand_in).await?))
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.cloud.create_server(&self.server).await.map(drop)
    }
}

/// A stand-in is gone.
struct Gone<'a> {
    cloud: &'a Cloud,
    id: &'a str,
}

#[async_trait]
impl Effect for Gone<'_> {
    fn wanted(&self) -> String {
        format!("end of its stand-in {}", self.id)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        Ok(match if_there(self.cloud.server(self.id).await)? {
            None => Look::Done,
            Some(server) if is_going(&server) => Look::Working(told(&server)),
            Some(server) => Look::NotYet(told(&server)),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        delete_for_good(self.cloud, self.id).await
    }
}

/// What is to be done for Cinder to give a volume up.
fn look_at_parting(volume: &Volume) -> Look {
    match volume.status.as_str() {
        // It says so of what it could not take, and of what it could not give up.
        status if status.starts_with("error") || status == Status::Available.name() => Look::NotYet(status.to_owned()),
        status => Look::Working(status.to_owned()),
    }
}

/// Cinder has a volume no more; the image is where it was.
struct GivenUp<'a> {
    cloud: &'a Cloud,
    id: &'a str,
}

#[async_trait]
impl Effect for GivenUp<'_> {
    fn wanted(&self) -> String {
        format!("end of volume {}, whose image stays", self.id)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let found = if_there(self.cloud.volume(self.id).await)?;
        Ok(found.map_or(Look::Done, |volume| look_at_parting(&volume)))
    }

    async fn ask(&self) -> Result<(), CloudError> {
        give_up(self.cloud, self.id).await
    }
}

/// What a stand-in is made of, beside its clones.
pub(super) struct Parts {
    /// Its flavor's id.
    pub(super) flavor: String,
    /// The places of its disks in the plan, in the order in which it gets them: it boots from the first.
    pub(super) order: Vec<usize>,
    /// The host of each disk's backend, in the order of the plan.
    pub(super) hosts: Vec<String>,
}

impl OpenStack {
    /// The stand-in, if it is there.
    pub(super) async fn stand_in_server(
        &self,
        operation: &str,
        stand_in: &StandIn,
    ) -> Result<Option<Server>, ProviderError> {
        let cloud = self.cloud(operation).await?;
        let mut servers = servers_of(cloud, stand_in).await.map_err(|error| self.cloud_error(operation, &error))?;
        // One of two that failed is not the one to look at.
        servers.sort_by_key(|server| server.status == "ERROR");
        Ok(servers.into_iter().next())
    }

    /// Gives the clones to Cinder, and has a server boot from them.
    pub(super) async fn make_stand_in(
        &self,
        operation: &str,
        stand_in: &StandIn,
        parts: &Parts,
    ) -> Result<(), ProviderError> {
        let cloud = self.cloud(operation).await?;
        let root = parts.order.first().copied();
        let take = self.volumes.iter().zip(&stand_in.disks).zip(&parts.hosts).enumerate();
        let taken: Vec<Taken<'_>> = take
            .map(|(index, ((volume, disk), host))| {
                let (image, mut metadata) = (clone_of(disk), metadata(stand_in));
                metadata.insert(CLONE.to_owned(), image.to_owned());
                let (volume_type, bootable) = (volume.cinder.to_type.as_str(), root == Some(index));
                let managed = Managed { host, image, name: image, description: None, volume_type, bootable, metadata };
                Taken { cloud, stand_in, managed }
            })
            .collect();
        self.bring_all_about(operation, &taken).await?;

        let made = volumes_of(cloud, stand_in).await.map_err(|error| self.cloud_error(operation, &error))?;
        let of = |index: usize| {
            let clone = stand_in.disks.get(index).map(clone_of).unwrap_or_default();
            let is_it = |volume: &&Volume| volume.metadata.get(CLONE).is_some_and(|found| found == clone);
            let found = made.iter().filter(is_it).find(|volume| volume.status == Status::Available.name());
            found
                .map(|volume| volume.id.as_str())
                .ok_or_else(|| self.error(operation, format!("the volume of {clone} is not available any more"), None))
        };
        let ids = parts.order.iter().map(|&index| of(index)).collect::<Result<Vec<&str>, _>>()?;
        if let (Some(root), Some(&volume)) = (root, ids.first()) {
            let original = self.volumes[root].cinder.volume.as_str();
            let shown = cloud.volume(original).await.map_err(|error| self.cloud_error(operation, &error))?;
            self.bring_about(operation, &Described { cloud, volume, original: &shown }).await?;
        }
        let mut metadata = metadata(stand_in);
        metadata.extend(stand_in.disks.first().map(|disk| (CLONE.to_owned(), clone_of(disk).to_owned())));
        let server = NewServer {
            ports: Vec::new(),
            name: &stand_in.name,
            flavor: &parts.flavor,
            volumes: ids.into_iter().map(|id| (id, false, None)).collect(),
            metadata,
            more: serde_json::Map::new(),
        };
        self.bring_about(operation, &Runs { cloud, stand_in, server }).await?;
        self.stand_in_is_complete.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The same stand-in, with its clones by the names that Cinder has given them.
    pub(super) async fn as_renamed(&self, operation: &str, stand_in: &StandIn) -> Result<StandIn, ProviderError> {
        let cloud = self.cloud(operation).await?;
        let made = volumes_of(cloud, stand_in).await.map_err(|error| self.cloud_error(operation, &error))?;
        let mut renamed = stand_in.clone();
        for disk in &mut renamed.disks {
            let clone = clone_of(disk).to_owned();
            let now = made.iter().find(|volume| volume.metadata.get(CLONE) == Some(&clone)).map(Volume::image);
            if let (Some(now), ImageSpec::Rbd { image, .. }) = (now, &mut disk.target) {
                *image = now;
            }
        }
        Ok(renamed)
    }

    /// Removes a stand-in, and has Cinder give up its volumes.
    pub(super) async fn remove_stand_in(&self, operation: &str, stand_in: &StandIn) -> Result<(), ProviderError> {
        let cloud = self.cloud(operation).await?;
        let failed = |error: CloudError| self.cloud_error(operation, &error);
        let (mut rounds, mut quiet) = (0..ROUNDS, None::<Instant>);
        let mut complete = self.stand_in_is_complete.load(Ordering::Relaxed);
        loop {
            let volumes = volumes_of(cloud, stand_in).await.map_err(failed)?;
            let named = servers_of(cloud, stand_in).await.map_err(failed)?;
            complete |= volumes.len() >= stand_in.disks.len() && !named.is_empty();
            if volumes.is_empty() && named.is_empty() {
                if complete || quiet.get_or_insert_with(Instant::now).elapsed() >= LATE {
                    return Ok(());
                }
                tokio::time::sleep(POLL).await;
                continue;
            }
            quiet = None;
            if rounds.next().is_none() {
                let problem = format!("more and more of rehearsal {} comes to light", stand_in.id);
                let hint = "see who makes it: openstack server list, openstack volume list";
                return Err(self.error(operation, problem, Some(hint)));
            }
            let mut servers: BTreeSet<String> = named.into_iter().map(|server| server.id).collect();
            for volume in &volumes {
                for attachment in &volume.attachments {
                    if servers.contains(&attachment.server_id) {
                        continue;
                    }
                    // One that its cloud keeps for a while, or that was renamed.
                    match if_there(cloud.server(&attachment.server_id).await).map_err(failed)? {
                        None => {}
                        Some(server) if is_of(&server.metadata, stand_in) => drop(servers.insert(server.id)),
                        Some(server) => {
                            let problem = format!("volume {} is with server {}", volume.id, server.id);
                            let hint = "detach it there: poolshift has not made that server";
                            return Err(self.error(operation, problem, Some(hint)));
                        }
                    }
                }
            }
            for id in &servers {
                self.bring_about(operation, &Gone { cloud, id }).await?;
            }
            let parting: Vec<GivenUp<'_>> = volumes.iter().map(|volume| GivenUp { cloud, id: &volume.id }).collect();
            self.bring_all_about(operation, &parting).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn volume(status: &str, clone: &str) -> Volume {
        let metadata = json!({CLONE: clone, REHEARSAL: "1"});
        serde_json::from_value(json!({"id": "v", "size": 1, "status": status, "metadata": metadata})).unwrap()
    }

    fn server(status: &str, task: Option<&str>) -> Server {
        serde_json::from_value(json!({"id": "s", "status": status, "OS-EXT-STS:task_state": task})).unwrap()
    }

    fn kind(look: &Look) -> &'static str {
        match look {
            Look::Done => "done",
            Look::Working(_) => "working",
            Look::NotYet(_) => "not yet",
            Look::Hopeless(_) => "hopeless",
        }
    }

    #[test]
    fn a_clone_is_taken_when_one_volume_of_it_is_available() {
        let of = |statuses: &[&str]| {
            let volumes: Vec<Volume> = statuses.iter().map(|status| volume(status, "c")).collect();
            kind(&look_at(&volumes, "c"))
        };
        assert_eq!(of(&[]), "not yet");
        assert_eq!(of(&["managing"]), "working");
        assert_eq!(of(&["available"]), "done");
        assert_eq!(of(&["error_managing"]), "hopeless");
        // Asked twice, as it did not answer: the second one finds no image.
        assert_eq!(of(&["available", "error_managing"]), "done");
        assert_eq!(of(&["error", "managing"]), "working");
        assert_eq!(kind(&look_at(&[volume("available", "other")], "c")), "not yet");
    }

    #[test]
    fn a_stand_in_runs_when_nothing_is_under_way_with_it() {
        assert_eq!(kind(&look_at_servers(&[])), "not yet");
        assert_eq!(kind(&look_at_servers(&[server("BUILD", Some("spawning"))])), "working");
        assert_eq!(kind(&look_at_servers(&[server("ACTIVE", None)])), "done");
        assert_eq!(kind(&look_at_servers(&[server("ERROR", None)])), "hopeless");
        assert_eq!(kind(&look_at_servers(&[server("ERROR", None), server("ACTIVE", None)])), "done");
    }

    #[test]
    fn only_a_volume_at_rest_is_given_up() {
        for (status, expected) in [
            ("available", "not yet"),
            ("error", "not yet"),
            ("error_managing", "not yet"),
            ("error_unmanaging", "not yet"),
            ("managing", "working"),
            ("in-use", "working"),
            ("reserved", "working"),
            ("unmanaging", "working"),
        ] {
            assert_eq!(kind(&look_at_parting(&volume(status, "c"))), expected, "{status}");
        }
    }
}
