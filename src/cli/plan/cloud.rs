//! `poolshift plan --openstack`: what the cloud has, what its pools have, and what becomes of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures::stream::{self, StreamExt as _, TryStreamExt as _};

use super::super::config::{CloudPlan, Projects, Stream, UsageError};
use super::super::values::PoolName;
use super::super::{Context, images};
use super::cloud_text::{self, Seen};
use super::{AT_A_TIME, extent, shown, spec};
use crate::image::rbd::{Connector, RbdImage};
use crate::image::{ErrorKind, ImageError};
use crate::openstack::cinder::{Volume, VolumeType};
use crate::openstack::discovery::{self, Found, Group, Move, Obstacle, Who, World};
use crate::openstack::nova::Whose;
use crate::openstack::{Cloud, CloudAccess, CloudError, Fault};
use crate::plan::{Strategy, VOLUMES_MAX};

/// The plan's text, and how many volumes are in it. What is left out is told on standard error.
pub(super) async fn plan(
    context: &Context<'_>,
    settings: &CloudPlan,
    output: &Stream,
) -> anyhow::Result<(String, usize)> {
    let config = context.config;
    let named = settings.cloud.clone().or_else(|| std::env::var("OS_CLOUD").ok()).filter(|name| !name.is_empty());
    let wanted = named.clone();
    let access = tokio::task::spawn_blocking(move || CloudAccess::load(wanted.as_deref())).await??;
    let cloud = Cloud::connect(access).await?;
    let whose = whose(&cloud, &settings.projects).await?;
    let rules = &settings.rules;
    let types: Vec<&str> = [&rules.boot_type, &rules.data_type].into_iter().flatten().map(String::as_str).collect();
    let world = discovery::look(&cloud, &whose, &types).await?;
    let mut found = discovery::sort(&world, rules, cloud.name())?;
    if rules.strategy == Strategy::Retype {
        keep_detached(context, &mut found);
    }
    let count: usize = found.groups.iter().map(|group| group.moves.len()).sum();
    if count > VOLUMES_MAX {
        let text = format!("{count} volumes are more than a plan's {VOLUMES_MAX}: choose with --project or --match");
        return Err(UsageError(text).into());
    }
    let targets = targets(context, settings, &world, &types).await?;
    let seen = look_at_images(context, settings, &mut found, &targets).await?;
    discovery::hold_against_quotas(&mut found.groups, &world);
    found.groups.sort_by(|one, other| other.size().cmp(&one.size()).then_with(|| one.label.cmp(&other.label)));
    let left_out = cloud_text::left_out(&found.groups);
    for line in &left_out {
        context.terminal.say(line);
    }
    if !found.groups.is_empty() {
        context.terminal.say(&cloud_text::summary(&found));
    }
    let Some(first) = found.groups.iter().find(|group| group.is_ready()) else {
        let detail = match (count, found.already) {
            (0, 0) => "it has no volume that fits".to_owned(),
            (0, already) => format!("it has no volume that fits and is of another type: {already} have theirs already"),
            (count, _) => format!("something stands in the way of all {count} volumes"),
        };
        return Err(CloudError::new(Fault::NotFound, "make a plan", cloud.name(), detail).into());
    };
    let pool = seen.get(&first.moves[0].volume.id).map_or_else(String::new, |seen| seen.place.pool.clone());
    let clusters = (&config.source_ceph, &config.target_ceph);
    let mut text = format!("# From {}: {}.\n", shown(cloud.name()), cloud_text::summary(&found));
    super::head(&mut text, output, clusters, &pool)?;
    let keys = (named.as_deref(), rules.strategy);
    let planned = cloud_text::write(&mut text, keys, &found.groups, &seen, &targets)?;
    cloud_text::comment(&mut text, &left_out);
    Ok((text, planned))
}

/// Cinder itself moves only what nobody has.
fn keep_detached(context: &Context<'_>, found: &mut Found) {
    let all = found.groups.len();
    found.groups.retain(|group| matches!(group.who, Who::Nobody));
    let held = all - found.groups.len();
    if held > 0 {
        let text = format!("passed over: the volumes of {held} servers; retype is for those that nobody has");
        context.terminal.say(&text);
    }
}

/// Whose servers and volumes are looked at.
async fn whose(cloud: &Cloud, projects: &Projects) -> Result<Vec<Whose>, CloudError> {
    let named = match projects {
        Projects::Own => return Ok(vec![Whose::Own]),
        Projects::All => return Ok(vec![Whose::All]),
        Projects::Named(named) => named,
    };
    let own = cloud.project().await?;
    let mut ids = BTreeSet::new();
    for wanted in named {
        // No administrator is needed for one's own.
        ids.insert(if *wanted == own { own.clone() } else { cloud.find_project(wanted).await?.id });
    }
    Ok(ids.into_iter().map(|id| if id == own { Whose::Own } else { Whose::Project(id) }).collect())
}

/// By type, the pool that its volumes are to go to. A type that does not say on which backend is not among them: its
/// volumes are left out for that.
async fn targets(
    context: &Context<'_>,
    settings: &CloudPlan,
    world: &World,
    types: &[&str],
) -> anyhow::Result<BTreeMap<String, PoolName>> {
    let connector = images::connect(context, &context.config.target_ceph).await?;
    let mut targets = BTreeMap::new();
    for found in world.types.iter().filter(|found| types.contains(&found.name.as_str())) {
        let Some(pool) = pool_of_type(settings, found) else { continue };
        connector.find_pool(&pool.pool, pool.namespace.as_deref()).await.map_err(|error| match error.kind {
            ErrorKind::NotFound => {
                let hint = format!("say which pool the type {0:?} is on: --pool {0}=POOL", found.name);
                ImageError::new(ErrorKind::NotFound, pool.to_string(), "find the target's pool")
                    .caused_by(error)
                    .hint(hint)
            }
            _ => error,
        })?;
        targets.insert(found.name.clone(), pool);
    }
    Ok(targets)
}

fn pool_of_type(settings: &CloudPlan, found: &VolumeType) -> Option<PoolName> {
    let named = || found.extra_specs.get("volume_backend_name")?.parse().ok();
    settings.pools.get(&found.name).cloned().or_else(named)
}

/// The pools that a volume's image may be in: that which the command line says of its type or, in `host@backend#pool`,
/// those with the names of the pool and of the backend.
fn pools_of(settings: &CloudPlan, volume: &Volume) -> Vec<PoolName> {
    if let Some(pool) = volume.volume_type.as_ref().and_then(|name| settings.pools.get(name)) {
        return vec![pool.clone()];
    }
    let (_, behind) = volume.host.as_deref().and_then(|host| host.split_once('@')).unwrap_or_default();
    let (backend, pool) = behind.split_once('#').unwrap_or((behind, ""));
    let mut pools: Vec<PoolName> = [pool, backend].iter().filter_map(|name| name.parse().ok()).collect();
    pools.dedup();
    pools
}

/// Finds each volume's image, and notes what it is in the way of. What is left out for whose it is is not looked for.
async fn look_at_images(
    context: &Context<'_>,
    settings: &CloudPlan,
    found: &mut Found,
    targets: &BTreeMap<String, PoolName>,
) -> anyhow::Result<HashMap<String, Seen>> {
    let connector = images::connect(context, &context.config.source_ceph).await?;
    let is_meant =
        |one: &Move| !one.obstacles.iter().any(|it| matches!(it, Obstacle::Detached | Obstacle::ServerElsewhere(_)));
    let volumes: BTreeMap<String, Volume> =
        all(&found.groups).filter(|one| is_meant(one)).map(|one| (one.volume.id.clone(), one.volume.clone())).collect();
    let looks = volumes.into_iter().map(|(id, volume)| {
        let connector = &connector;
        async move { Ok::<_, ImageError>((id, look(connector, &pools_of(settings, &volume), &volume).await?)) }
    });
    let looks: Vec<_> = stream::iter(looks).buffer_unordered(AT_A_TIME).try_collect().await?;
    let one_cluster = context.config.source_ceph.conf == context.config.target_ceph.conf;
    let looks: HashMap<String, Result<Seen, Obstacle>> = looks.into_iter().collect();
    for one in found.groups.iter_mut().flat_map(|group| &mut group.moves) {
        match looks.get(&one.volume.id) {
            None => {}
            Some(Err(obstacle)) => one.obstacles.push(obstacle.clone()),
            Some(Ok(seen)) => {
                one.obstacles.extend(judge(one, seen, targets.get(&one.cinder.to_type).filter(|_| one_cluster)));
                if seen.clones > 0 {
                    let image = spec(&seen.place, &one.volume.image());
                    let hang = if seen.clones == 1 { "clone hangs" } else { "clones hang" };
                    one.remarks.push(format!(
                        "{} {hang} on its image, and has to be cut loose before the image can be removed: poolshift \
                         flatten --children {image}",
                        seen.clones
                    ));
                }
            }
        }
    }
    Ok(looks.into_iter().filter_map(|(id, outcome)| Some((id, outcome.ok()?))).collect())
}

fn all(groups: &[Group]) -> impl Iterator<Item = &Move> {
    groups.iter().flat_map(|group| &group.moves)
}

/// What an image that was found is in the way of.
fn judge(one: &Move, seen: &Seen, target: Option<&PoolName>) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    let image = spec(&seen.place, &one.volume.image()).to_string();
    if seen.size != one.size() {
        obstacles.push(Obstacle::OtherSize { image, found: seen.size, expected: one.size() });
    }
    if target == Some(&seen.place) {
        obstacles.push(Obstacle::SamePool(seen.place.to_string()));
    }
    obstacles
}

/// Looks for a volume's image; says why it can't be in a plan.
async fn look(
    connector: &Connector,
    pools: &[PoolName],
    volume: &Volume,
) -> Result<Result<Seen, Obstacle>, ImageError> {
    let name = volume.image();
    for place in pools {
        let opened = RbdImage::open_source(connector, &place.pool, place.namespace.as_deref(), &name).await;
        let image = match opened {
            Ok(image) => image,
            Err(error) if error.kind == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if let Some(obstacle) = image.obstacle() {
            return Ok(Err(Obstacle::Image(obstacle.into())));
        }
        let (size, used) = extent(&image).await?;
        let relations = image.relations().await?;
        let clones = relations.snapshots.iter().map(|snapshot| snapshot.clones.len()).sum();
        return Ok(Ok(Seen { place: place.clone(), size, used, clones }));
    }
    Ok(Err(Obstacle::NoImage { image: name, pools: pools.iter().map(ToString::to_string).collect() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openstack::discovery::Rules;

    fn settings(pools: &[(&str, &str)]) -> CloudPlan {
        let pools = pools.iter().map(|(name, pool)| ((*name).to_owned(), pool.parse().unwrap())).collect();
        let (projects, rules) = (Projects::Own, Rules::default());
        CloudPlan { cloud: None, projects, rules, pools }
    }

    fn volume(host: &str) -> Volume {
        let written = serde_json::json!({
            "id": "v", "size": 1, "status": "available", "volume_type": "sata", "os-vol-host-attr:host": host,
        });
        serde_json::from_value(written).unwrap()
    }

    #[test]
    fn a_volumes_pool_is_that_of_its_type_or_has_its_backends_name() {
        let pools = |given: &[(&str, &str)], host: &str| {
            let pools = pools_of(&settings(given), &volume(host));
            pools.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(pools(&[], "vm@sata#sata"), "rbd:sata");
        assert_eq!(pools(&[], "vm@rbd-1#volumes"), "rbd:volumes rbd:rbd-1");
        assert_eq!(pools(&[], "vm@rbd-1"), "rbd:rbd-1");
        assert_eq!(pools(&[], "vm"), "");
        assert_eq!(pools(&[("sata", "volumes/tenant")], "vm@sata#sata"), "rbd:volumes/tenant");
        assert_eq!(pools(&[("sas", "volumes")], "vm@sata#sata"), "rbd:sata");
    }

    #[test]
    fn a_types_pool_is_given_or_has_its_backends_name() {
        let of = |given: &[(&str, &str)], specs: serde_json::Value| {
            let written = serde_json::json!({"id": "1", "name": "sas", "extra_specs": specs});
            let found: VolumeType = serde_json::from_value(written).unwrap();
            pool_of_type(&settings(given), &found).map(|pool| pool.to_string())
        };
        let named = || serde_json::json!({"volume_backend_name": "fast"});
        assert_eq!(of(&[], named()).as_deref(), Some("rbd:fast"));
        assert_eq!(of(&[("sas", "volumes")], named()).as_deref(), Some("rbd:volumes"));
        assert_eq!(of(&[("fast", "volumes")], named()).as_deref(), Some("rbd:fast"));
        assert_eq!(of(&[], serde_json::json!({})), None);
    }
}
