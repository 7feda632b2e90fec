//! What is there of a volume, and what stands in the way of Cinder's copying it: a pure function of what was found.

use std::collections::BTreeMap;

use crate::image::rbd::{RbdLink, RbdSnapshot};
use crate::openstack::cinder::{Quota, Snapshot, Status, Volume, VolumeType};
use crate::replicate::is_automatic;

use super::super::preconditions::obstacle;
use super::images::Bound;

/// What is there of a volume that is not where it is to go.
pub(super) struct Found<'a> {
    /// As Cinder has it.
    pub(super) shown: &'a Volume,
    /// Its snapshots in Cinder.
    pub(super) snapshots: &'a [Snapshot],
    /// The name that its image has to have.
    pub(super) image: &'a str,
    /// What that is bound to; `None` where it is not there.
    pub(super) bound: Option<&'a Bound>,
    /// The image that has its name where it is to go.
    pub(super) taken: Option<&'a str>,
    /// Images that are there because it is replicated, or was cut over.
    pub(super) replicas: &'a [String],
    /// The types on its way, in their order, without the one that it has, each with whether it is in another pool.
    pub(super) way: &'a [(String, bool)],
    pub(super) types: &'a [VolumeType],
    /// Those of the types on its way that encrypt.
    pub(super) encrypting: &'a [String],
    /// Its project's.
    pub(super) quotas: &'a BTreeMap<String, Quota>,
    /// Whether clones may be cut loose.
    pub(super) flatten: bool,
}

/// What was made of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Judged {
    /// What stands in the way, and what to do about it.
    pub(super) errors: Vec<String>,
    /// What somebody should know.
    pub(super) warnings: Vec<String>,
    /// The clones that are cut loose before.
    pub(super) to_flatten: Vec<RbdLink>,
    /// The snapshots that were there for clones only, and go once none is left.
    pub(super) to_remove: Vec<RbdSnapshot>,
}

/// The image that is in the way of a volume's own.
pub(super) fn taken_by(image: &str) -> String {
    format!(
        "{image} is there already, and Cinder deletes what has that name when its own copy fails: wait \
         where Cinder is still removing what it has copied; else see whose it is, and give it another name"
    )
}

/// Whether Cinder has made a snapshot, on the image that it has cloned, for that clone only: `volume-ID.clone_snap`.
pub(super) fn is_clone_snapshot(name: &str) -> bool {
    name.strip_suffix(".clone_snap").is_some_and(crate::plan::is_cinders)
}

/// What is in the way.
pub(super) fn judge(found: &Found<'_>) -> Judged {
    let mut judged = Judged::default();
    let Found { shown, .. } = found;
    let mut wrong = |text: String| judged.errors.push(text);
    if let Some(obstacle) = obstacle(shown) {
        wrong(obstacle.to_owned());
    }
    if let Some(attachment) = shown.attachments.first() {
        wrong(format!("server {} has it: detach it, or plan it with strategy \"keep-ids\"", attachment.server_id));
    } else if shown.status != Status::Available.name() {
        wrong(format!("it is {}, and not available", shown.status));
    }
    if shown.image() != found.image {
        wrong(format!("its image is {}, and the plan has {}: make the plan anew", shown.image(), found.image));
    }
    // Without a copy to another pool all the rest stays where it is.
    if found.way.iter().any(|(_, migrates)| *migrates) {
        if !found.snapshots.is_empty() {
            let names: Vec<&str> = found.snapshots.iter().map(|snapshot| snapshot.id.as_str()).collect();
            wrong(format!(
                "Cinder has snapshots of it, with which it moves no volume: {}; remove them (openstack volume snapshot \
                 delete), or plan it with strategy \"keep-ids\" once they are unmanaged",
                names.join(", ")
            ));
        }
        if let Some(taken) = found.taken {
            wrong(taken_by(taken));
        }
        for image in found.replicas {
            wrong(format!(
                "it is replicated, or was: {image} is there; bring it over with strategy \"keep-ids\", or remove that \
                 image once it is not needed"
            ));
        }
        match found.bound {
            None => wrong(format!("its image {} is not there", found.image)),
            Some(bound) => bonds(found, bound, &mut judged),
        }
    }
    types(found, &mut judged);
    quotas(found, &mut judged);
    judged
}

/// What hangs on its image.
fn bonds(found: &Found<'_>, bound: &Bound, judged: &mut Judged) {
    if !bound.users.is_empty() {
        judged
            .warnings
            .push(format!("{} has its image open; that has to end before Cinder is asked", bound.users.join(", ")));
    }
    let mut replicated = 0;
    for snapshot in &bound.relations.snapshots {
        let RbdSnapshot { name, user, clones, .. } = snapshot;
        let of_cinder = found.snapshots.iter().any(|known| *name == format!("snapshot-{}", known.id));
        let goes = is_clone_snapshot(name) || (!user && !clones.is_empty());
        if !of_cinder && found.flatten && goes {
            judged.to_flatten.extend(clones.iter().cloned());
            if *user {
                judged.to_remove.push(snapshot.clone());
            }
            continue;
        }
        if let Some(clone) = clones.first() {
            let more = if clones.len() > 1 { format!(" and {} more", clones.len() - 1) } else { String::new() };
            if found.flatten {
                judged.to_flatten.extend(clones.iter().cloned());
            } else {
                judged.errors.push(format!(
                    "{clone}{more} is a clone that hangs on its snapshot {name:?}: --flatten cuts it loose"
                ));
            }
        } else if is_clone_snapshot(name) {
            judged
                .errors
                .push(format!("its snapshot {name:?} was there for a clone that is loose: --flatten removes it"));
        }
        match () {
            () if of_cinder || (is_clone_snapshot(name) && !found.flatten) => {}
            () if is_automatic(name) && *user => replicated += 1,
            () if *user => judged.errors.push(format!(
                "its image has the snapshot {name:?}, which Cinder does not know, and its copy would not have: remove it"
            )),
            () if clones.is_empty() => judged.errors.push(format!(
                "its image has a snapshot of a group, of a mirror or in the trash (id {}), which its copy would not have",
                snapshot.id
            )),
            () => {}
        }
    }
    if replicated > 0 {
        judged.errors.push(format!(
            "its image has {replicated} snapshots of poolshift's: it is replicated, or was; bring it over with strategy \
             \"keep-ids\", or remove them once nothing replicates it (rbd snap rm)"
        ));
    }
}

fn types(found: &Found<'_>, judged: &mut Judged) {
    let mut now = found.shown.volume_type.as_deref().unwrap_or_default();
    for (next, migrates) in found.way {
        for name in [now, next] {
            let asks = match found.types.iter().find(|known| known.name == name) {
                None if found.types.is_empty() => continue,
                None => {
                    judged.errors.push(format!("there is no volume type {name:?}"));
                    continue;
                }
                Some(known) => *migrates && !known.is_plain(),
            };
            if asks {
                judged.warnings.push(format!(
                    "type {name:?} has a QoS, or extra specs beside its backend: Cinder copies through its own host, \
                     which takes longer; types without, in by_way_of, spare that"
                ));
            }
        }
        if found.encrypting.contains(next) {
            judged.errors.push(format!("the volumes of type {next:?} are encrypted"));
        }
        now = next;
    }
    for list in [&mut judged.errors, &mut judged.warnings] {
        let mut seen = std::collections::HashSet::new();
        list.retain(|text| seen.insert(text.clone()));
    }
}

fn quotas(found: &Found<'_>, judged: &mut Judged) {
    let size = i64::try_from(found.shown.size).unwrap_or(i64::MAX);
    for (next, _) in found.way {
        for (what, needed) in [("gigabytes", size), ("volumes", 1)] {
            let key = format!("{what}_{next}");
            let Some(quota) = found.quotas.get(&key).filter(|quota| !quota.has_room(needed)) else { continue };
            let project = found.shown.project.as_deref().unwrap_or_default();
            judged.errors.push(format!(
                "the quota {key} of project {project} is {}, and it needs {needed} more than the {} that are there: raise it \
                 with cinder quota-update",
                quota.limit,
                quota.in_use.saturating_add(quota.reserved)
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::image::rbd::RbdRelations;

    const ID: &str = "7d1c1a0e-54a2-4c3b-9d6a-2d9f4d2f6f10";
    const OTHER: &str = "7d1c1a0e-54a2-4c3b-9d6a-2d9f4d2f6f11";

    fn volume(more: Value) -> Volume {
        let mut written = json!({
            "id": ID, "name": "v", "size": 2, "status": "available", "volume_type": "sata",
            "os-vol-tenant-attr:tenant_id": "p",
        });
        written.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(written).unwrap()
    }

    fn link(image: &str) -> RbdLink {
        RbdLink { pool: "sata".into(), namespace: None, image: image.into(), id: "1".into(), trash: false }
    }

    fn snapshot(name: &str, user: bool, clones: &[&str]) -> RbdSnapshot {
        let clones = clones.iter().map(|name| link(name)).collect();
        RbdSnapshot { id: 4, name: name.into(), size: 1, user, protected: false, has_parent: false, clones }
    }

    fn bound(snapshots: Vec<RbdSnapshot>) -> Bound {
        let relations =
            RbdRelations { size: 1, own_bytes: None, parent: None, flatten: None, deep_flatten: true, snapshots };
        Bound { relations, users: Vec::new() }
    }

    fn types() -> Vec<VolumeType> {
        let named = |name: &str, qos: Option<&str>| json!({"id": name, "name": name, "qos_specs_id": qos});
        let written = json!([named("sata", None), named("sas", None), named("sas-fast", Some("q"))]);
        serde_json::from_value(written).unwrap()
    }

    /// What is said of a volume, of which something is changed.
    fn said(change: impl FnOnce(&mut Found<'_>)) -> Judged {
        let (shown, types, well) = (volume(json!({})), types(), bound(Vec::new()));
        let (image, way) = (format!("volume-{ID}"), [("sas".to_owned(), true)]);
        let quotas = BTreeMap::new();
        let mut found = Found {
            shown: &shown,
            snapshots: &[],
            image: &image,
            bound: Some(&well),
            taken: None,
            replicas: &[],
            way: &way,
            types: &types,
            encrypting: &[],
            quotas: &quotas,
            flatten: false,
        };
        // What is borrowed for a moment only is left behind in tests.
        change(&mut found);
        judge(&found)
    }

    fn leaked<T>(value: T) -> &'static T {
        Box::leak(Box::new(value))
    }

    #[track_caller]
    fn refused(judged: &Judged, because: &str) {
        assert_eq!(judged.errors.len(), 1, "{judged:?}");
        assert!(judged.errors[0].contains(because), "{judged:?}");
    }

    #[test]
    fn what_nothing_is_in_the_way_of_goes() {
        assert_eq!(said(|_| {}), Judged::default());
        assert_eq!(said(|found| found.flatten = true), Judged::default());
    }

    #[test]
    fn what_cinder_says_of_a_volume_is_in_the_way() {
        for (more, because) in [
            (json!({"encrypted": true}), "encrypted"),
            (json!({"multiattach": true}), "several servers"),
            (json!({"group_id": "g"}), "in a group"),
            (json!({"replication_status": "enabled"}), "replicates"),
            (json!({"status": "in-use", "attachments": [{"server_id": "s-1"}]}), "server s-1 has it"),
            (json!({"attachments": [{"server_id": "s-1"}]}), "server s-1 has it"),
            (json!({"status": "maintenance"}), "it is maintenance, and not available"),
            (json!({"os-vol-mig-status-attr:name_id": OTHER}), "make the plan anew"),
        ] {
            refused(&said(|found| found.shown = leaked(volume(more.clone()))), because);
        }
        let snapshots: Vec<Snapshot> =
            serde_json::from_value(json!([{"id": "s-7", "volume_id": ID, "status": "available"}])).unwrap();
        let its_own = bound(vec![snapshot("snapshot-s-7", true, &[])]);
        let judged = said(|found| (found.snapshots, found.bound) = (leaked(snapshots.clone()), Some(leaked(its_own))));
        refused(&judged, "s-7");
    }

    #[test]
    fn what_a_failing_copy_would_delete_or_a_copy_would_lose_is_in_the_way() {
        refused(&said(|found| found.taken = Some("rbd:sas/volume-x")), "deletes what has that name");
        refused(&said(|found| found.replicas = leaked(vec!["sas/poolshift-x".to_owned()])), "sas/poolshift-x is there");
        refused(&said(|found| found.bound = None), "is not there");
        let with = |snapshots: Vec<RbdSnapshot>| said(|found| found.bound = Some(leaked(bound(snapshots))));
        refused(&with(vec![snapshot("mine", true, &[])]), "\"mine\"");
        refused(&with(vec![snapshot("mine", false, &[])]), "in the trash (id 4)");
        let ours = crate::replicate::name_of_now();
        refused(&with(vec![snapshot(&ours, true, &[])]), "1 snapshots of poolshift's");
    }

    #[test]
    fn clones_are_in_the_way_unless_they_may_be_cut_loose() {
        let for_clone = format!("volume-{OTHER}.clone_snap");
        let with = |snapshots: Vec<RbdSnapshot>, flatten| {
            said(|found| (found.bound, found.flatten) = (Some(leaked(bound(snapshots))), flatten))
        };
        let cloned = || vec![snapshot(&for_clone, true, &["c"])];
        refused(&with(cloned(), false), "--flatten cuts it loose");
        let judged = with(cloned(), true);
        assert_eq!((judged.errors.len(), judged.to_flatten, judged.to_remove), (0, vec![link("c")], cloned()));
        // One that is left of a clone that has gone.
        refused(&with(vec![snapshot(&for_clone, true, &[])], false), "--flatten removes it");
        assert_eq!(with(vec![snapshot(&for_clone, true, &[])], true).to_remove.len(), 1);
        // In the trash, where it goes by itself with its last clone.
        let judged = with(vec![snapshot("0d6c", false, &["c", "d"])], true);
        assert_eq!((judged.errors.len(), judged.to_flatten.len(), judged.to_remove.len()), (0, 2, 0));
        // A snapshot that somebody has made stays somebody's.
        let judged = with(vec![snapshot("mine", true, &["c"])], true);
        refused(&judged, "\"mine\"");
        assert_eq!((judged.to_flatten.len(), judged.to_remove.len()), (1, 0));
        assert!(!is_clone_snapshot("volume-x.clone_snap") && !is_clone_snapshot(&format!("volume-{OTHER}")));
    }

    #[test]
    fn types_and_quotas_have_to_fit() {
        let way = |name: &str| leaked(vec![(name.to_owned(), true)]);
        refused(&said(|found| found.way = way("nvme")), "no volume type \"nvme\"");
        let judged = said(|found| found.way = way("sas-fast"));
        assert!(judged.errors.is_empty() && judged.warnings[0].contains("by_way_of"), "{judged:?}");
        refused(&said(|found| found.encrypting = leaked(vec!["sas".to_owned()])), "encrypted");
        let quota =
            |limit| leaked(BTreeMap::from([("gigabytes_sas".to_owned(), Quota { limit, in_use: 9, reserved: 0 })]));
        refused(&said(|found| found.quotas = quota(10)), "gigabytes_sas of project p is 10");
        assert_eq!(said(|found| found.quotas = quota(11)), Judged::default());
        // Without a copy nothing is lost, and nothing has to go.
        let judged = said(|found| {
            (found.way, found.taken) = (leaked(vec![("sas".to_owned(), false)]), Some("rbd:sas/volume-x"));
        });
        assert_eq!(judged, Judged::default());
    }
}
