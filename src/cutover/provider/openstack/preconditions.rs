//! What stands in the way of switching a server's volumes.

use futures::future::join_all;

use super::super::{Precondition, Side, Verdict};
use super::server::why_not_active;
use super::switch::{self, CloudVolume, Step};
use super::{OpenStack, lock, name};
use crate::openstack::cinder::{Status, Volume, VolumeType};
use crate::openstack::{Cloud, CloudError, is_admin};
use crate::plan::Holder;

/// Looks; changes nothing.
pub(super) async fn of(provider: &OpenStack, from: Side) -> Vec<Precondition> {
    let what = format!("cloud of {}", provider.server);
    let cloud = match provider.cloud("preconditions").await {
        Ok(cloud) => cloud,
        Err(error) => return vec![Precondition::failed(what, error)],
    };
    let mut all = vec![roles(provider, cloud).await];
    match &provider.config.holder {
        Holder::Server(id) => all.push(server(provider, cloud, id).await),
        Holder::Gateway { server: id, .. } => all.push(gateway(provider, cloud, id).await),
        Holder::Nobody => {}
    }
    let types = match cloud.volume_types().await {
        Ok(types) => types,
        Err(error) => {
            all.push(Precondition::failed(what, provider.cloud_error("list volume types", &error)));
            Vec::new()
        }
    };
    let volumes = provider.volumes.iter().map(|volume| one(provider, cloud, (volume, from), &types));
    all.extend(join_all(volumes).await.into_iter().flatten());
    all
}

async fn roles(provider: &OpenStack, cloud: &Cloud) -> Precondition {
    let what = format!("cloud of {}", provider.server);
    match cloud.roles().await {
        Ok(roles) if is_admin(&roles) => Precondition::new(what, Verdict::Ok, cloud.name()),
        Ok(roles) => {
            let found = format!(
                "the credentials have the roles {}, and not admin: a volume's status can be reset by an administrator only",
                roles.join(", ")
            );
            Precondition::new(what, Verdict::Warning, found)
        }
        Err(error) => Precondition::failed(what, provider.cloud_error("look at the roles", &error)),
    }
}

async fn server(provider: &OpenStack, cloud: &Cloud, id: &str) -> Precondition {
    let what = format!("server {id}");
    let server = match cloud.server(id).await {
        Ok(server) => server,
        Err(error) => return Precondition::failed(what, provider.cloud_error("look at the server", &error)),
    };
    let wrong = |found: String| Precondition::new(what.clone(), Verdict::Error, found);
    let missing =
        provider.volumes.iter().find(|volume| !server.volumes.iter().any(|had| had.id == volume.cinder.volume));
    let more = server.volumes.len().saturating_sub(provider.volumes.len());
    let idle = why_not_active(&server);
    match () {
        () if server.boots_from_image() => {
            wrong("it boots from a disk of its own, no volume: shelving it would make an image of that first".into())
        }
        () if server.flavor.ephemeral > 0 => {
            wrong(format!("it has an ephemeral disk of {} GiB, which shelving throws away", server.flavor.ephemeral))
        }
        () if server.task.is_some() => wrong(format!("{} is under way with it", server.task.unwrap_or_default())),
        () if idle.is_some() => wrong(idle.unwrap_or_default()),
        () if missing.is_some() => {
            let volume = missing.map(|volume| volume.cinder.volume.clone()).unwrap_or_default();
            wrong(format!("it has not the volume {volume}: make the plan anew, with poolshift plan --openstack"))
        }
        () if server.locked && !lock::is_ours(&server) => Precondition::new(
            what.clone(),
            Verdict::Warning,
            "it is locked by somebody: only an administrator can stop it, and it stays locked",
        ),
        () if lock::is_ours(&server) => Precondition::new(
            what.clone(),
            Verdict::Warning,
            "it is still locked by poolshift: that a run before this one has left, and this one takes away at its end",
        ),
        () if more > 0 => {
            let found = format!("it runs; it has {more} volumes more than the plan, which stay as they are");
            Precondition::new(what.clone(), Verdict::Ok, found)
        }
        () => Precondition::new(what.clone(), Verdict::Ok, "it runs"),
    }
}

async fn gateway(provider: &OpenStack, cloud: &Cloud, id: &str) -> Precondition {
    let what = format!("gateway {id}");
    let (server, attached) = match futures::try_join!(cloud.server(id), cloud.server_attachments(id)) {
        Ok(found) => found,
        Err(error) => return Precondition::failed(what, provider.cloud_error("look at the gateway", &error)),
    };
    let of = |volume: &CloudVolume| attached.iter().find(|found| found.volume == volume.cinder.volume);
    let missing = provider.volumes.iter().find(|volume| of(volume).is_none());
    let root = provider.volumes.iter().find(|volume| {
        let device = of(volume).and_then(|found| found.device.as_deref());
        device.is_some() && device == server.root_device.as_deref()
    });
    let (verdict, found) = match (server.status.as_str(), missing, root) {
        (_, Some(volume), _) => (Verdict::Error, format!("it has not the volume {}", volume.cinder.volume)),
        (_, _, Some(volume)) => {
            let text = format!("it boots from {}, which can't be detached: plan it as a server", volume.cinder.volume);
            (Verdict::Error, text)
        }
        ("ACTIVE" | "SHUTOFF", None, None) if server.task.is_none() => {
            (Verdict::Ok, format!("it is {}, and goes on", server.status))
        }
        (status, None, None) => (Verdict::Error, format!("it is {status}, and can't be told to detach anything")),
    };
    Precondition::new(what, verdict, found)
}

/// What Cinder itself says of a volume that can't be switched.
pub(super) fn obstacle(shown: &Volume) -> Option<&'static str> {
    let replicated =
        shown.replication_status.as_deref().is_some_and(|status| !matches!(status, "disabled" | "not-capable"));
    match () {
        () if shown.encrypted => Some("it is encrypted by Cinder, which can't move such a volume"),
        () if shown.multiattach => Some("several servers may have it at once"),
        () if shown.group_id.is_some() || shown.consistencygroup_id.is_some() => Some("it is in a group: take it out"),
        () if replicated => Some("Cinder replicates it"),
        () => None,
    }
}

async fn one(
    provider: &OpenStack,
    cloud: &Cloud,
    (volume, from): (&CloudVolume, Side),
    types: &[VolumeType],
) -> Vec<Precondition> {
    let id = volume.cinder.volume.as_str();
    let what = format!("volume {id}");
    let failed = |error: &CloudError| {
        vec![Precondition::failed(what.clone(), provider.cloud_error("look at the volume", error))]
    };
    let shown = match cloud.volume(id).await {
        Ok(shown) => shown,
        Err(error) => return failed(&error),
    };
    let snapshots = match cloud.snapshots(id).await {
        Ok(snapshots) => snapshots,
        Err(error) => return failed(&error),
    };
    let mut wrong: Vec<String> = obstacle(&shown).map(str::to_owned).into_iter().collect();
    if !volume.is_image_of(&shown) {
        wrong.push(format!(
            "its image is {}, and the plan has {}: make the plan anew",
            shown.image(),
            volume.image(from)
        ));
    }
    let now = shown.volume_type.as_deref().unwrap_or_default();
    if now != volume.final_type(from) {
        wrong.push(format!("its type is {now:?}, and not {:?}: somebody has retyped it", volume.final_type(from)));
    }
    let expected = match provider.config.holder {
        Holder::Server(_) | Holder::Gateway { .. } => Status::InUse.name(),
        Holder::Nobody => Status::Available.name(),
    };
    if shown.status != expected {
        wrong.push(format!("it is {}, and not {expected}", shown.status));
    }
    if !snapshots.is_empty() {
        let names: Vec<&str> = snapshots.iter().map(|found| found.id.as_str()).collect();
        wrong.push(format!(
            "it has snapshots of Cinder's, with which it refuses another type: {}; remove them, or unmanage them and manage \
             them again afterwards",
            names.join(", ")
        ));
    }
    let looked = volume.look(&shown).await;
    match looked {
        Ok(seen) => match switch::next(from.other(), &seen) {
            Step::Refuse(why) => wrong.push(why),
            // From where it is, it is all that is to be done.
            _ if seen.side() == Some(from) => {}
            _ => wrong.push(format!("its image on the {} has not the name {}", name(from), volume.image(from))),
        },
        Err(error) => wrong.push(crate::fleet::chain_text(&error)),
    }
    wrong.extend(types_of(volume, types));
    if wrong.is_empty() {
        let found = format!("{} GiB of type {now:?}, on to {:?}", shown.size, volume.final_type(from.other()));
        return vec![Precondition::new(what, Verdict::Ok, found)];
    }
    wrong.into_iter().map(|found| Precondition::new(what.clone(), Verdict::Error, found)).collect()
}

/// What is wrong with the types that a volume goes through.
fn types_of(volume: &CloudVolume, types: &[VolumeType]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut now = volume.final_type(Side::Source);
    while let Some((next, migrates)) = volume.next_type(now, Side::Target) {
        for name in [now, next] {
            match types.iter().find(|found| found.name == name) {
                None if !types.is_empty() => wrong.push(format!("there is no volume type {name:?}")),
                Some(found) if migrates && !found.is_plain() => wrong.push(format!(
                    "type {name:?} has a QoS, or extra specs beside its backend, and Cinder would copy everything: name \
                     types without in by_way_of"
                )),
                _ => {}
            }
        }
        now = next;
    }
    wrong.sort();
    wrong.dedup();
    wrong
}
