//! What stands in the way of making a server again.

use futures::future::join_all;

use super::super::super::{Precondition, Side, Verdict, name};
use super::super::preconditions::obstacle;
use super::super::server::why_not_active;
use super::super::switch::CloudVolume;
use super::ports::{self, Interfaces};
use super::remembered::BYTES_MAX;
use super::server::{KEEP_IDS, too_large};
use super::{Recreate, volumes};
use crate::openstack::cinder::{Status, Volume};
use crate::openstack::definition::{Definition, NOVA_ATTACHMENTS};
use crate::openstack::nova::Server;
use crate::openstack::{Cloud, CloudError, is_admin};

/// Looks; changes nothing.
pub(super) async fn of(provider: &Recreate, from: Side) -> Vec<Precondition> {
    let base = &provider.base;
    let what = format!("cloud of {}", base.server);
    let cloud = match base.cloud("preconditions").await {
        Ok(cloud) => cloud,
        Err(error) => return vec![Precondition::failed(what, error)],
    };
    let mut all = vec![cloud_itself(provider, cloud, what).await];
    all.extend(server(provider, cloud, from).await);
    let volumes = base.volumes.iter().map(|volume| one(provider, cloud, volume, from));
    all.extend(join_all(volumes).await.into_iter().flatten());
    all
}

/// What the calls need.
async fn cloud_itself(provider: &Recreate, cloud: &Cloud, what: String) -> Precondition {
    let asked = futures::future::try_join(cloud.roles(), cloud.speaks(NOVA_ATTACHMENTS)).await;
    match asked {
        Err(error) => Precondition::failed(what, provider.base.cloud_error("look at the cloud", &error)),
        Ok((_, false)) => {
            let found = format!(
                "its Nova does not speak {NOVA_ATTACHMENTS}, which came with OpenStack Ussuri: it can't be told that a \
                 server's volumes stay; {KEEP_IDS}"
            );
            Precondition::new(what, Verdict::Error, found)
        }
        Ok((roles, true)) if !is_admin(&roles) => {
            let found = format!(
                "the credentials have the roles {}, and not admin: by most clouds' rules only an administrator gives Cinder \
                 an image as a volume",
                roles.join(", ")
            );
            Precondition::new(what, Verdict::Warning, found)
        }
        Ok(_) => Precondition::new(what, Verdict::Ok, cloud.name()),
    }
}

/// What is known of a server that is to be made again.
struct Facts<'a> {
    server: &'a Server,
    definition: &'a Definition,
    /// Or why they are not known.
    interfaces: &'a Result<Interfaces, CloudError>,
    project: &'a str,
    has_flavor: bool,
    has_key: bool,
    /// The first volume of the plan that it has not.
    missing: Option<&'a str>,
}

/// What is lost with the server that there was.
const CHANGES: &str = "it is made again: with another id, volumes with other ids, and the credentials' user as its owner; \
                       cloud-init takes it for a new machine";

fn judge(facts: &Facts<'_>) -> Vec<(Verdict, String)> {
    let Facts { server, definition, .. } = facts;
    let mut all = Vec::new();
    let mut wrong = |is_so: bool, found: String| {
        if is_so {
            all.push((Verdict::Error, found));
        }
    };
    let keep = |why: &str| format!("{why}; {KEEP_IDS}");
    let (own, ephemeral) = (facts.project, server.flavor.ephemeral);
    wrong(server.task.is_some(), format!("{} is under way with it", server.task.as_deref().unwrap_or_default()));
    if let Some(why) = why_not_active(server) {
        wrong(true, why);
    }
    if let Some(missing) = facts.missing {
        wrong(true, format!("it has not the volume {missing}: make the plan anew, with poolshift plan --openstack"));
    }
    wrong(
        definition.project != own,
        format!(
            "it is of the project {}, and the credentials are for {own}, which would own what is made: use credentials for \
             its project",
            definition.project
        ),
    );
    wrong(server.locked, "it is locked by its owner: have it unlocked (openstack server unlock)".into());
    match facts.interfaces {
        Err(error) => {
            wrong(true, keep(&format!("its network interfaces are not known, and would end with it: {error}")))
        }
        Ok(interfaces) => interfaces.unfit.iter().for_each(|why| wrong(true, keep(why))),
    }
    wrong(
        !definition.server_groups.is_empty(),
        keep(&format!("it is in the server group {}, and may end up beside it", definition.server_groups.join(", "))),
    );
    wrong(server.boots_from_image(), keep("it boots from a disk of its own, no volume, which would be lost"));
    wrong(ephemeral > 0, keep(&format!("it has an ephemeral disk of {ephemeral} GiB, which would be lost")));
    wrong(!facts.has_flavor, keep(&format!("there is no flavor {:?} any more", server.flavor.original_name)));
    match &definition.user_data {
        None => wrong(
            true,
            "what its first boot was told may not be seen: use credentials with the role admin, or keep-ids".into(),
        ),
        Some(data) => {
            let size = data.as_ref().map_or(0, String::len);
            wrong(size > BYTES_MAX, keep(&too_large(size)));
        }
    }
    if let Some(key) = definition.key_name.as_ref().filter(|_| !facts.has_key) {
        let found = format!("its key pair {key:?} is another user's: it is made again without");
        all.push((Verdict::Warning, found));
    }
    if let Ok(Interfaces { all: interfaces, in_order, .. }) = facts.interfaces
        && !interfaces.is_empty()
    {
        let count = interfaces.len();
        let ports = format!("it keeps its ports ({count}), which stay when it is deleted one day");
        all.push((Verdict::Warning, ports));
        if !in_order {
            let order = "which of its network cards comes first is not known, and may change: credentials with the role \
                         admin may see that";
            all.push((Verdict::Warning, order.to_owned()));
        }
    }
    if !all.iter().any(|(verdict, _)| *verdict == Verdict::Error) {
        all.push((Verdict::Warning, CHANGES.to_owned()));
    }
    all
}

async fn server(provider: &Recreate, cloud: &Cloud, from: Side) -> Vec<Precondition> {
    let what = format!("server {}", provider.id);
    let operation = "look at the server";
    let failed =
        |error: &CloudError| vec![Precondition::failed(what.clone(), provider.base.cloud_error(operation, error))];
    let found = match provider.find(operation).await {
        Ok(Some(found)) => found,
        Ok(None) => {
            let found = "the cloud has it not, nor one that was made again for it: make the plan anew";
            return vec![Precondition::new(what, Verdict::Error, found)];
        }
        Err(error) => return vec![Precondition::failed(what, error)],
    };
    let id = found.server.id.as_str();
    let asked = futures::try_join!(
        cloud.definition(id),
        cloud.project(),
        cloud.find_flavor(&found.server.flavor.original_name)
    );
    let (definition, project, flavor) = match asked {
        Ok(asked) => asked,
        Err(error) => return failed(&error),
    };
    let has_key = match &definition.key_name {
        Some(name) => match cloud.has_key_pair(name).await {
            Ok(has) => has,
            Err(error) => return failed(&error),
        },
        None => true,
    };
    let interfaces = ports::look(cloud, id, &provider.id).await;
    let missing = match from {
        Side::Source => provider
            .base
            .volumes
            .iter()
            .map(|volume| volume.cinder.volume.as_str())
            .find(|volume| !found.server.volumes.iter().any(|had| had.id == **volume)),
        Side::Target => None,
    };
    let facts = Facts {
        server: &found.server,
        definition: &definition,
        interfaces: &interfaces,
        project: &project,
        has_flavor: flavor.is_some(),
        has_key,
        missing,
    };
    let mut all = judge(&facts);
    if found.side != Some(from) && missing.is_none() {
        all.push((Verdict::Error, format!("its volumes are not all on the {}", name(from))));
    }
    all.into_iter().map(|(verdict, found)| Precondition::new(what.clone(), verdict, found)).collect()
}

async fn one(provider: &Recreate, cloud: &Cloud, volume: &CloudVolume, from: Side) -> Vec<Precondition> {
    let base = &provider.base;
    let id = volume.cinder.volume.as_str();
    let what = format!("volume {id}");
    let failed =
        |error: &CloudError| vec![Precondition::failed(what.clone(), base.cloud_error("look at the volume", error))];
    let (old, snapshots) = match futures::try_join!(cloud.volume(id), cloud.snapshots(id)) {
        Ok(found) => found,
        Err(error) => return failed(&error),
    };
    let mut all: Vec<(Verdict, String)> = wrong_with_old(volume, &old, from);
    let seen = match base.look_at_target("look at the target", volume).await {
        Ok(seen) => seen,
        Err(error) => return vec![Precondition::failed(what, error)],
    };
    match (from, seen.id()) {
        (Side::Source, _) => {
            if seen.side() != Some(from) {
                let left = "Cinder has its target, or was to have it, from a cutover that was cut: poolshift rollback \
                            undoes that";
                all.push((Verdict::Error, left.into()));
            }
            if let Err(error) = base.host_of("find its backend", volume).await {
                all.push((Verdict::Error, error.problem));
            }
            if !snapshots.is_empty() {
                let found = format!(
                    "its {} snapshots of Cinder's stay with the old volume, and keep it from being removed when the server is \
                     finalized",
                    snapshots.len()
                );
                all.push((Verdict::Warning, found));
            }
        }
        (Side::Target, None) => {
            all.push((Verdict::Error, "Cinder has not its target: somebody has taken it from there".into()));
        }
        (Side::Target, Some(new)) => match cloud.snapshots(new).await {
            Ok(snapshots) if !snapshots.is_empty() => {
                let names: Vec<&str> = snapshots.iter().map(|found| found.id.as_str()).collect();
                let found = format!(
                    "volume {new} has snapshots of Cinder's, which does not give it up with them: remove {}",
                    names.join(", ")
                );
                all.push((Verdict::Error, found));
            }
            Ok(_) => {}
            Err(error) => return failed(&error),
        },
    }
    if !all.iter().any(|(verdict, _)| *verdict == Verdict::Error) {
        let found = match from {
            Side::Source => format!("{} GiB, on to a volume of type {:?}", old.size, volume.final_type(Side::Target)),
            Side::Target => format!("{} GiB, back to the old volume", old.size),
        };
        all.push((Verdict::Ok, found));
    }
    all.into_iter().map(|(verdict, found)| Precondition::new(what.clone(), verdict, found)).collect()
}

/// What is wrong with the volume that is left, or gone back to.
fn wrong_with_old(volume: &CloudVolume, old: &Volume, from: Side) -> Vec<(Verdict, String)> {
    let mut all: Vec<String> = obstacle(old).map(str::to_owned).into_iter().collect();
    if !volume.is_image_of(old) {
        all.push(format!("its image is {}, and not what the plan has: make the plan anew", old.image()));
    }
    let now = old.volume_type.as_deref().unwrap_or_default();
    if now != volume.final_type(Side::Source) {
        all.push(format!(
            "its type is {now:?}, and not {:?}: somebody has retyped it",
            volume.final_type(Side::Source)
        ));
    }
    let fits = match from {
        Side::Source => old.status == Status::InUse.name(),
        Side::Target => volumes::State::of(old) == volumes::State::Free || is_held(old),
    };
    if !fits {
        all.push(format!("it is {}, and somebody may have it", old.status));
    }
    all.into_iter().map(|found| (Verdict::Error, found)).collect()
}

/// Whether it is kept from being attached.
fn is_held(old: &Volume) -> bool {
    old.status == "attaching" && old.attachments.is_empty()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::remembered::Interface;
    use super::*;
    use crate::openstack::Fault;

    fn facts<'a>(
        server: &'a Server,
        definition: &'a Definition,
        interfaces: &'a Result<Interfaces, CloudError>,
    ) -> Facts<'a> {
        let (project, missing) = ("p", None);
        Facts { server, definition, interfaces, project, has_flavor: true, has_key: true, missing }
    }

    fn found(server: Value, change: impl FnOnce(&mut Facts<'_>)) -> String {
        found_with(server, &Ok(Interfaces { in_order: true, ..Interfaces::default() }), change)
    }

    fn found_with(
        server: Value,
        interfaces: &Result<Interfaces, CloudError>,
        change: impl FnOnce(&mut Facts<'_>),
    ) -> String {
        let mut shown = json!({
            "id": "s", "name": "web", "tenant_id": "p", "status": "ACTIVE", "OS-EXT-SRV-ATTR:user_data": null,
            "flavor": {"original_name": "tiny"}, "image": "",
        });
        shown.as_object_mut().unwrap().extend(server.as_object().unwrap().clone());
        let definition: Definition = serde_json::from_value(shown.clone()).unwrap();
        let server: Server = serde_json::from_value(shown).unwrap();
        let mut facts = facts(&server, &definition, interfaces);
        change(&mut facts);
        judge(&facts).into_iter().map(|(verdict, found)| format!("{verdict:?} {found}\n")).collect()
    }

    #[test]
    fn a_server_that_would_lose_something_is_refused_with_a_cure() {
        let plain = found(json!({}), |_| {});
        assert!(plain.starts_with("Warning it is made again") && plain.lines().count() == 1, "{plain}");
        let large = "x".repeat(BYTES_MAX + 1);
        for (server, words) in [
            (json!({"status": "SHUTOFF"}), "it is SHUTOFF"),
            (json!({"OS-EXT-STS:task_state": "rebooting"}), "rebooting is under way"),
            (json!({"tenant_id": "q"}), "of the project q"),
            (json!({"locked": true}), "server unlock"),
            (json!({"server_groups": ["g"]}), "in the server group g"),
            (json!({"image": {"id": "i"}}), "boots from a disk of its own"),
            (json!({"flavor": {"original_name": "tiny", "ephemeral": 7}}), "an ephemeral disk of 7 GiB"),
            (json!({"OS-EXT-SRV-ATTR:user_data": large}), "can be remembered"),
        ] {
            let found = found(server, |_| {});
            let wrong: Vec<&str> = found.lines().filter(|line| line.starts_with("Error")).collect();
            assert!(wrong.len() == 1 && wrong[0].contains(words), "{words}: {found}");
            assert!(!found.contains("cloud-init"), "{found}");
        }
        let unknown = Err(CloudError::new(Fault::Config, "find neutron", "the cloud", "the catalog has it not"));
        let unfit = Ok(Interfaces { unfit: vec!["port p has no address".into()], ..Interfaces::default() });
        for (words, found) in [
            ("are not known", found_with(json!({}), &unknown, |_| {})),
            ("port p has no address; bring it over", found_with(json!({}), &unfit, |_| {})),
            ("no flavor \"tiny\"", found(json!({}), |facts| facts.has_flavor = false)),
            ("not the volume v", found(json!({}), |facts| facts.missing = Some("v"))),
        ] {
            assert!(found.starts_with("Error") && found.contains(words), "{words}: {found}");
        }
    }

    #[test]
    fn ports_are_kept_and_an_order_that_is_not_known_is_told() {
        let interface = |port: &str| Interface { port: port.into(), tag: None, dns_name: None };
        let warned = |in_order: bool| {
            let interfaces = Ok(Interfaces { all: vec![interface("p"), interface("q")], in_order, unfit: Vec::new() });
            found_with(json!({"addresses": {"net": []}}), &interfaces, |_| {})
        };
        let (known, unknown) = (warned(true), warned(false));
        assert!(known.starts_with("Warning it keeps its ports (2)") && known.lines().count() == 2, "{known}");
        assert!(unknown.contains("Warning which of its network cards") && unknown.lines().count() == 3, "{unknown}");
    }

    #[test]
    fn another_user_s_key_pair_is_told_of_and_user_data_that_is_hidden_is_an_error() {
        let keyless = found(json!({"key_name": "k"}), |facts| facts.has_key = false);
        assert!(keyless.starts_with("Warning its key pair \"k\"") && keyless.contains("cloud-init"), "{keyless}");
        let definition: Definition = serde_json::from_value(json!({"name": "web", "tenant_id": "p"})).unwrap();
        let server: Server = serde_json::from_value(json!({"id": "s", "status": "ACTIVE"})).unwrap();
        let none = Ok(Interfaces::default());
        assert!(judge(&facts(&server, &definition, &none))[0].1.contains("may not be seen"));
    }
}
