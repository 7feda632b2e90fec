//! The server: found by its id or its mark, deleted without its volumes, made again.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use futures::future::try_join_all;

use super::super::super::{Notes, Power, ProviderError, Side};
use super::super::effect::{Effect, Look};
use super::super::server::{ACTIVE, AtRest, DELETED_SOFTLY, delete_for_good, is_moving, power, told};
use super::remembered::{BYTES_MAX, Remembered, SERVER_MARK};
use super::volumes::State;
use super::{Recreate, ports, volumes};
use crate::image::{Disk as _, ErrorKind};
use crate::openstack::cinder::Volume;
use crate::openstack::nova::{Server, Whose};
use crate::openstack::{Cloud, CloudError, Fault, if_there};

/// The server as it is found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) server: Server,
    /// Which side its volumes are on.
    pub(super) side: Option<Side>,
}

impl Found {
    /// Whether it was made again, and never ran.
    pub(super) fn has_failed(&self) -> bool {
        let never_ran = self.server.launched_at.is_none() && power(&self.server) != Power::Running;
        self.server.status == "ERROR" && never_ran && self.is_marked()
    }

    /// Whether Nova deletes it for good one day, and has stopped it.
    pub(super) fn is_deleted(&self) -> bool {
        self.server.status == DELETED_SOFTLY
    }

    pub(super) fn is_marked(&self) -> bool {
        self.server.metadata.contains_key(SERVER_MARK)
    }
}

/// The server that was made again for the one with that id; `None` where there is none.
pub(in crate::cutover::provider::openstack) async fn find_marked(
    cloud: &Cloud,
    id: &str,
) -> Result<Option<Server>, CloudError> {
    let mut all = cloud.servers(&Whose::Own).await?;
    all.retain(|server| is_marked_with(server, id));
    if all.len() > 1 {
        let ids: Vec<&str> = all.iter().map(|server| server.id.as_str()).collect();
        let detail = format!("{} servers are marked with {SERVER_MARK}={id}: {}", ids.len(), ids.join(", "));
        return Err(CloudError::new(Fault::Strange, format!("find server {id}"), cloud.name(), detail)
            .hint("take the mark from those that were not made by poolshift: openstack server unset --property"));
    }
    Ok(all.pop())
}

fn is_marked_with(server: &Server, id: &str) -> bool {
    server.metadata.get(SERVER_MARK).is_some_and(|mark| mark == id)
}

/// The server that has that id in a plan, whatever it is now.
async fn find(cloud: &Cloud, id: &str) -> Result<Option<Server>, CloudError> {
    match if_there(cloud.server(id).await)? {
        None => find_marked(cloud, id).await,
        found => Ok(found),
    }
}

/// It is gone.
struct Gone<'a> {
    cloud: &'a Cloud,
    id: &'a str,
}

#[async_trait]
impl Effect for Gone<'_> {
    fn wanted(&self) -> String {
        format!("end of server {}", self.id)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let Some(server) = if_there(self.cloud.server(self.id).await)? else { return Ok(Look::Done) };
        Ok(match () {
            () if is_moving(&server) => Look::Working(told(&server)),
            () if power(&server) == Power::Running => Look::Hopeless(format!("it is {}: it runs", told(&server))),
            () => Look::NotYet(told(&server)),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        delete_for_good(self.cloud, self.id).await
    }
}

/// A volume ends with the server, or does not.
struct Ends<'a> {
    cloud: &'a Cloud,
    server: &'a str,
    volume: &'a str,
    ends: bool,
}

#[async_trait]
impl Effect for Ends<'_> {
    fn wanted(&self) -> String {
        let not = if self.ends { "" } else { " not" };
        format!("volume {} that does{not} end with server {}", self.volume, self.server)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let attached = self.cloud.server_attachments(self.server).await?;
        let found = attached.iter().find(|found| found.volume == self.volume);
        Ok(match found {
            Some(found) if found.delete_on_termination != self.ends => Look::NotYet("otherwise".into()),
            _ => Look::Done,
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.cloud.end_with_server(self.server, self.volume, self.ends).await
    }
}

/// A volume that the server has had, and has no more.
struct Left<'a> {
    cloud: &'a Cloud,
    volume: &'a str,
    server: &'a str,
}

#[async_trait]
impl Effect for Left<'_> {
    fn wanted(&self) -> String {
        format!("volume {} that server {} has not", self.volume, self.server)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let shown = self.cloud.volume(self.volume).await?;
        let has = shown.attachments.iter().any(|found| found.server_id == self.server);
        Ok(if has || shown.status == "detaching" { Look::Working(shown.status) } else { Look::Done })
    }
}

/// It is there, and runs.
struct Made<'a> {
    cloud: &'a Cloud,
    /// The plan's.
    id: &'a str,
    remembered: &'a Remembered,
    /// For each of its disks the volume that it is to have.
    volumes: Vec<String>,
    made: Mutex<Option<String>>,
}

#[async_trait]
impl Effect for Made<'_> {
    fn wanted(&self) -> String {
        format!("server {} that is {ACTIVE}", self.remembered.name)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let found = match made {
            // One that is being built may be looked for too early.
            Some(id) => match if_there(self.cloud.server(&id).await)? {
                None => return Ok(Look::NotYet("gone".into())),
                found => found,
            },
            None => find_marked(self.cloud, self.id).await?,
        };
        let Some(server) = found else { return Ok(Look::NotYet("not there".into())) };
        Ok(match () {
            () if server.task.is_some() || server.status == "BUILD" => Look::Working(told(&server)),
            () if server.status == ACTIVE => Look::Done,
            () => Look::Hopeless(format!("it was made as server {}, and is {}", server.id, told(&server))),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        // Another process may have been faster by now.
        if find_marked(self.cloud, self.id).await?.is_some() {
            *self.made.lock().unwrap_or_else(PoisonError::into_inner) = None;
            return Ok(());
        }
        for volume in &self.volumes {
            volumes::free(self.cloud, volume).await?;
        }
        let disks = self.remembered.disks.iter().zip(&self.volumes);
        let now: std::collections::HashMap<&str, &str> =
            disks.map(|(disk, volume)| (disk.volume.as_str(), volume.as_str())).collect();
        let remembered = match ports::free(self.cloud, self.id, self.remembered).await {
            Err(error) => {
                ports::hold_again(self.cloud, self.id, self.remembered).await;
                return Err(error);
            }
            with => with?,
        };
        let wanted = remembered.new_server(self.id, |id| now.get(id).copied().unwrap_or(id));
        let made = match self.cloud.create_server(&wanted).await {
            Err(error) if !error.is_passing() => {
                ports::hold_again(self.cloud, self.id, &remembered).await;
                return Err(error);
            }
            made => made?,
        };
        tracing::info!(server = made, "it is made again");
        *self.made.lock().unwrap_or_else(PoisonError::into_inner) = Some(made);
        Ok(())
    }
}

impl Recreate {
    /// The server, once nothing is under way with it; `None` where there is none.
    pub(super) async fn find(&self, operation: &str) -> Result<Option<Found>, ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        let cloud_error = |error: CloudError| self.base.cloud_error(operation, &error);
        let found = match find(cloud, &self.id).await.map_err(cloud_error)? {
            None => self.find_deleted(operation).await?,
            found => found,
        };
        let Some(mut server) = found else { return Ok(None) };
        if is_moving(&server) {
            let id = server.id.clone();
            // What was under way may have been its end.
            let rest = self.base.bring_about(operation, &AtRest { cloud, id: &id }).await;
            let Some(now) = if_there(cloud.server(&id).await).map_err(cloud_error)? else { return Ok(None) };
            rest?;
            server = now;
        }
        let side = self.side_of(operation, &server).await?;
        Ok(Some(Found { server, side }))
    }

    /// The server that was made again, where somebody has deleted it and Nova keeps what is deleted for a while: such a one is
    /// in no list that its owner gets, and is shown to him by its id. Its volumes, new or old, still say who has them.
    async fn find_deleted(&self, operation: &str) -> Result<Option<Server>, ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        let targets = self.targets(operation).await?;
        let planned = self.base.volumes.iter().map(|volume| &volume.cinder.volume);
        let volumes = targets.iter().flatten().chain(planned);
        let found = async {
            let shown = try_join_all(volumes.map(|id| async move { if_there(cloud.volume(id).await) })).await?;
            let attached = shown.iter().flatten().flat_map(|volume| &volume.attachments);
            let ids: BTreeSet<&str> = attached.map(|attachment| attachment.server_id.as_str()).collect();
            for id in ids {
                let server = if_there(cloud.server(id).await)?;
                if let Some(server) = server.filter(|server| is_marked_with(server, &self.id)) {
                    return Ok(Some(server));
                }
            }
            Ok(None)
        };
        found.await.map_err(|error: CloudError| self.base.cloud_error(operation, &error))
    }

    /// The volumes of Cinder's that the targets are, by the names of their images; `None` for one that is none. What is
    /// being finalized has no image that its source leads to any more: it is known by its mark.
    pub(super) async fn targets(&self, operation: &str) -> Result<Vec<Option<String>>, ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        let looks = self.base.volumes.iter().map(|volume| async move {
            let name = async { volumes::image(volume).await?.name().await };
            let name = match name.await {
                Err(error) if error.kind == ErrorKind::NotFound => {
                    let marked = volumes::marked(cloud, &volume.cinder.volume).await;
                    let marked = marked.map_err(|error| self.base.cloud_error(operation, &error))?;
                    let has_it = |found: &Volume| matches!(State::of(found), State::Free | State::Taken);
                    return Ok(marked.into_iter().find(has_it).map(|found| found.id));
                }
                name => name.map_err(|error| self.base.image_error(operation, &error))?,
            };
            let idle = name == volume.at(Side::Target).1.idle;
            Ok(name.strip_prefix("volume-").filter(|_| !idle).map(str::to_owned))
        });
        try_join_all(looks).await
    }

    async fn side_of(&self, operation: &str, server: &Server) -> Result<Option<Side>, ProviderError> {
        let has = |id: &str| server.volumes.iter().any(|found| found.id == id);
        if self.base.volumes.iter().all(|volume| has(&volume.cinder.volume)) {
            return Ok(Some(Side::Source));
        }
        let targets = self.targets(operation).await?;
        let on_target = targets.iter().all(|id| id.as_deref().is_some_and(has));
        Ok(on_target.then_some(Side::Target))
    }

    /// Puts all that the server is made from among the notes.
    pub(super) async fn remember(&self, operation: &str, notes: &mut Notes) -> Result<(), ProviderError> {
        let remembered = self.look_at_all(operation).await?;
        match remembered.note(notes) {
            size if size > BYTES_MAX => Err(self.base.error(operation, too_large(size), Some(KEEP_IDS))),
            _ => Ok(()),
        }
    }

    async fn look_at_all(&self, operation: &str) -> Result<Remembered, ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        let cloud_error = |error: CloudError| self.base.cloud_error(operation, &error);
        let Some(found) = self.find(operation).await? else {
            return Err(self.base.error(operation, format!("the cloud has no server {}", self.id), None));
        };
        let id = found.server.id.as_str();
        let (definition, attachments) =
            futures::try_join!(cloud.definition(id), cloud.server_attachments(id)).map_err(cloud_error)?;
        let flavor = found.server.flavor.original_name.as_str();
        let Some(flavor) = cloud.find_flavor(flavor).await.map_err(cloud_error)? else {
            return Err(self.base.error(operation, format!("there is no flavor {flavor:?} any more"), Some(KEEP_IDS)));
        };
        let has_key = match &definition.key_name {
            Some(name) => cloud.has_key_pair(name).await.map_err(cloud_error)?,
            None => false,
        };
        let interfaces = ports::look(cloud, id, &self.id).await.map_err(cloud_error)?;
        let known = self.planned_ids(operation).await?;
        let root = found.server.root_device.as_deref();
        Ok(Remembered::of(&definition, (&flavor, has_key, root), (&attachments, interfaces.all), known))
    }

    /// Gives the plan's id for that of a target, and any other as it is.
    async fn planned_ids(&self, operation: &str) -> Result<impl Fn(&str) -> String, ProviderError> {
        let targets = self.targets(operation).await?;
        let pairs = targets.into_iter().zip(self.base.volumes.iter().map(|volume| volume.cinder.volume.clone()));
        let known: Vec<(String, String)> = pairs.filter_map(|(target, planned)| Some((target?, planned))).collect();
        Ok(move |id: &str| {
            let found = known.iter().find(|(target, _)| target == id);
            found.map_or_else(|| id.to_owned(), |(_, planned)| planned.clone())
        })
    }

    /// Deletes the server, which does not run, and none of its volumes and ports.
    pub(super) async fn delete(
        &self,
        operation: &str,
        found: &Found,
        remembered: &Remembered,
    ) -> Result<(), ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        let cloud_error = |error: CloudError| self.base.cloud_error(operation, &error);
        let id = found.server.id.as_str();
        let attached = cloud.server_attachments(id).await.map_err(cloud_error)?;
        let known = self.planned_ids(operation).await?;
        let is_known = |volume: &str| remembered.disks.iter().any(|disk| disk.volume == known(volume));
        if let Some(stranger) = attached.iter().find(|had| !is_known(&had.volume)) {
            let problem = format!("it has the volume {} by now, which it had not before", stranger.volume);
            return Err(self.base.error(operation, problem, Some("take it from the server, or begin anew")));
        }
        let volumes: Vec<&str> = attached.iter().map(|had| had.volume.as_str()).collect();
        // Where it was poolshift's doing, that was told before: whoever has deleted it wanted the end of that volume, too.
        if let Some(ends) = attached.iter().find(|had| found.is_deleted() && had.delete_on_termination) {
            return Err(self.deleted(operation, id, &format!("and its volume {} would end with it", ends.volume)));
        }
        let ends: Vec<Ends<'_>> =
            volumes.iter().map(|volume| Ends { cloud, server: id, volume, ends: false }).collect();
        for effect in &ends {
            self.base.bring_about(operation, effect).await?;
        }
        let never_had_them = found.has_failed() || found.is_deleted();
        self.hold_ports(operation, (id, never_had_them), remembered).await?;
        self.base.bring_about(operation, &Gone { cloud, id }).await?;
        let left: Vec<Left<'_>> = volumes.iter().map(|volume| Left { cloud, volume, server: id }).collect();
        self.base.bring_all_about(operation, &left).await
    }

    /// Makes the server from its volumes on that side, and waits until it runs.
    pub(super) async fn make(&self, operation: &str, remembered: &Remembered, on: Side) -> Result<(), ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        let targets = self.targets(operation).await?;
        let volumes: Option<Vec<String>> = remembered
            .disks
            .iter()
            .map(|disk| {
                let planned = self.base.volumes.iter().position(|volume| volume.cinder.volume == disk.volume);
                match (on, planned) {
                    (Side::Target, Some(at)) => targets.get(at).cloned().flatten(),
                    _ => Some(disk.volume.clone()),
                }
            })
            .collect();
        let Some(volumes) = volumes.filter(|_| on == Side::Target || targets.iter().all(Option::is_none)) else {
            let problem = format!("its volumes are not all on the {}", super::name(on));
            return Err(self.base.error(operation, problem, Some("look at both pools with rbd ls")));
        };
        let made = Mutex::default();
        self.base.bring_about(operation, &Made { cloud, id: &self.id, remembered, volumes, made }).await?;
        match self.find(operation).await? {
            Some(found) => self.give_ports(operation, &found.server.id, remembered).await,
            None => Ok(()),
        }
    }

    /// Tells Nova which volumes end with the server, as it was.
    pub(super) async fn tell_what_ends_with_it(
        &self,
        operation: &str,
        found: &Found,
        remembered: &Remembered,
    ) -> Result<(), ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        let id = found.server.id.as_str();
        let attached = cloud.server_attachments(id).await.map_err(|error| self.base.cloud_error(operation, &error))?;
        let known = self.planned_ids(operation).await?;
        for had in &attached {
            let planned = known(&had.volume);
            let ends = remembered.disks.iter().any(|disk| disk.volume == planned && disk.ends_with_server);
            if ends {
                self.base.bring_about(operation, &Ends { cloud, server: id, volume: &had.volume, ends }).await?;
            }
        }
        Ok(())
    }
}

/// What to do with a server that can't be made again.
pub(super) const KEEP_IDS: &str = "bring it over with strategy = \"keep-ids\", which keeps everything";

pub(super) fn too_large(size: usize) -> String {
    format!("what it was made with, its user data above all, has {size} bytes, and {BYTES_MAX} can be remembered")
}
