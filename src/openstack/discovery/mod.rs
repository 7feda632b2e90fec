//! Which servers and volumes a cloud has, which of them are to get another type, and what keeps them from it.
//!
//! [`look`] asks the cloud; nothing else here does. [`sort`] is a function of what it found and of the [`Rules`]: it tells
//! boot volumes from data volumes, puts together what is brought over together ([`Group`]), and notes what stands in the
//! way of each volume and of each group ([`Obstacle`]). What only the images can tell is added by the caller;
//! [`hold_against_quotas`] comes last, as only volumes that nothing else keeps count there.
//!
//! # Groups
//!
//! | whose volumes | a group is | [`Who`] |
//! |---|---|---|
//! | of a server | all of its volumes that are to be moved | `Server` |
//! | of a gateway, as data disks | those with one value of a key of their metadata, or each by itself | `Gateway` |
//! | nobody's | each by itself | `Nobody` |
//!
//! A volume that stays is in no group, whatever stands in its way. A group is moved whole, or not at all.

use std::collections::{BTreeMap, BTreeSet};

use futures::stream::{self, StreamExt as _, TryStreamExt as _};

use super::Cloud;
use super::cinder::{Quota, Snapshot, Volume, VolumeType};
use super::error::{CloudError, Fault, Result};
use super::nova::{Server, Whose};

mod obstacle;
mod quota;
mod rules;
mod sort;
#[cfg(test)]
mod tests;

pub use obstacle::Obstacle;
pub use quota::hold_against_quotas;
pub use rules::{Filter, Rules};
pub use sort::{Found, Group, Move, Who, sort};

/// How many questions of one kind are asked at a time.
const AT_A_TIME: usize = 4;

/// What a cloud has, as far as it was looked at.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// The servers, the oldest first.
    pub servers: Vec<Server>,
    /// The volumes, the oldest first.
    pub volumes: Vec<Volume>,
    /// The snapshots that Cinder knows of.
    pub snapshots: Vec<Snapshot>,
    /// The types.
    pub types: Vec<VolumeType>,
    /// The ids of the types that encrypt.
    pub encrypting: BTreeSet<String>,
    /// By project, what each may have; one whose quotas may not be seen is not in here.
    pub quotas: BTreeMap<String, BTreeMap<String, Quota>>,
}

/// Looks at the projects' servers and volumes. They may change while it looks.
///
/// # Errors
/// [`Fault::Forbidden`] where the credentials don't see on which backend a volume is: nothing of all this can be told then.
pub async fn look(cloud: &Cloud, whose: &[Whose], types: &[&str]) -> Result<World> {
    let servers = each(whose, |whose| cloud.servers(whose));
    let volumes = each(whose, |whose| cloud.volumes(whose));
    let snapshots = each(whose, |whose| cloud.all_snapshots(whose));
    let (servers, volumes, snapshots, all_types) =
        futures::try_join!(servers, volumes, snapshots, cloud.volume_types())?;
    if !volumes.is_empty() && volumes.iter().all(|volume| volume.host.is_none()) {
        let detail = "it does not say on which backend a volume is (os-vol-host-attr:host)";
        return Err(CloudError::new(Fault::Forbidden, "look at the volumes", cloud.name(), detail)
            .hint("Cinder tells that to administrators: use credentials with the role admin"));
    }
    let mut world = World { servers, volumes, snapshots, types: all_types, ..World::default() };
    let wanted = world.types.iter().filter(|found| types.contains(&found.name.as_str()));
    for found in wanted {
        if cloud.is_encrypting(&found.id).await? {
            world.encrypting.insert(found.id.clone());
        }
    }
    let projects: BTreeSet<_> = world.volumes.iter().filter_map(|volume| volume.project.clone()).collect();
    let quotas = projects.into_iter().map(|project| async {
        match cloud.quotas(&project).await {
            Ok(quotas) => Ok(Some((project, quotas))),
            Err(error) if matches!(error.fault, Fault::Forbidden | Fault::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    });
    let quotas: Vec<_> = stream::iter(quotas).buffered(AT_A_TIME).try_collect().await?;
    world.quotas = quotas.into_iter().flatten().collect();
    Ok(world)
}

/// The answers of all projects, one behind the other.
async fn each<'a, T, F: Future<Output = Result<Vec<T>>>>(
    whose: &'a [Whose],
    ask: impl Fn(&'a Whose) -> F,
) -> Result<Vec<T>> {
    let parts: Vec<Vec<T>> = stream::iter(whose.iter().map(ask)).buffered(AT_A_TIME).try_collect().await?;
    Ok(parts.into_iter().flatten().collect())
}
