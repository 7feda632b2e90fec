//! From a made-up cloud to groups, and what stands in their way.

use serde_json::{Value, json};

use super::sort::{backend_of_host, boot_volume};
use super::*;
use crate::plan::{HelperTypes, Holder};

/// What a cloud answers; the same that the client reads.
fn volume(id: &str, extra: Value) -> Volume {
    let mut written = json!({
        "id": id, "name": format!("{id}-name"), "size": 10, "status": "available", "volume_type": "sata",
        "bootable": "false", "os-vol-host-attr:host": "vm@sata#sata", "os-vol-tenant-attr:tenant_id": "p1",
        "attachments": [], "metadata": {},
    });
    merge(&mut written, extra);
    serde_json::from_value(written).unwrap()
}

/// A volume that a server has.
fn on(server: &str, id: &str, device: &str, extra: Value) -> Volume {
    let attachments = json!([{"server_id": server, "attachment_id": "a", "device": device}]);
    let mut all = json!({"status": "in-use", "attachments": attachments});
    merge(&mut all, extra);
    volume(id, all)
}

fn server(id: &str, volumes: &[&str], extra: Value) -> Server {
    let volumes: Vec<_> = volumes.iter().map(|id| json!({"id": id})).collect();
    let mut written = json!({
        "id": id, "name": format!("{id}-name"), "status": "ACTIVE", "tenant_id": "p1",
        "OS-EXT-SRV-ATTR:root_device_name": "/dev/vda", "os-extended-volumes:volumes_attached": volumes,
    });
    merge(&mut written, extra);
    serde_json::from_value(written).unwrap()
}

fn volume_type(name: &str, qos: Option<&str>, specs: Value) -> VolumeType {
    serde_json::from_value(json!({"id": format!("id-{name}"), "name": name, "extra_specs": specs, "qos_specs_id": qos}))
        .unwrap()
}

fn merge(into: &mut Value, more: Value) {
    let Value::Object(more) = more else { panic!("{more}") };
    into.as_object_mut().unwrap().extend(more);
}

fn types() -> Vec<VolumeType> {
    ["sata", "sas"].map(|name| volume_type(name, None, json!({"volume_backend_name": name}))).into()
}

fn world(servers: Vec<Server>, volumes: Vec<Volume>) -> World {
    World { servers, volumes, types: types(), ..World::default() }
}

/// Both kinds go to `sas`.
fn rules() -> Rules {
    Rules { boot_type: Some("sas".into()), data_type: Some("sas".into()), ..Rules::default() }
}

fn sorted(world: &World, rules: &Rules) -> Found {
    sort(world, rules, "the cloud").unwrap()
}

/// Label, and the ids of the volumes with a star for one to boot from.
fn shape(found: &Found) -> Vec<String> {
    let groups = found.groups.iter().map(|group| {
        let volumes = group.moves.iter().map(|one| format!("{}{}", one.volume.id, if one.boot { "*" } else { "" }));
        format!("{}: {}", group.label, volumes.collect::<Vec<_>>().join(" "))
    });
    groups.collect()
}

/// What stands in the way of the only volume of a world, which nobody has.
fn in_the_way(world: &World, rules: &Rules) -> Vec<Obstacle> {
    let rules = Rules { detached: true, ..rules.clone() };
    let found = sorted(world, &rules);
    let [group] = &found.groups[..] else { panic!("{:?}", found.groups) };
    let [one] = &group.moves[..] else { panic!("{group:?}") };
    assert_eq!(group.is_ready(), group.obstacles.is_empty() && one.obstacles.is_empty());
    group.obstacles.iter().chain(&one.obstacles).cloned().collect()
}

fn way_of(extra: Value) -> Vec<Obstacle> {
    in_the_way(&world(Vec::new(), vec![volume("v", extra)]), &rules())
}

#[test]
fn a_server_is_planned_with_its_boot_volume_first() {
    let volumes = vec![
        on("s", "c", "/dev/vdc", json!({})),
        on("s", "b", "/dev/vdb", json!({"bootable": "true"})),
        on("s", "a", "/dev/vda", json!({"bootable": "true"})),
        on("t", "d", "/dev/vda", json!({"bootable": "true"})),
    ];
    let world = world(vec![server("s", &["a", "b", "c"], json!({})), server("t", &["d"], json!({}))], volumes);
    let found = sorted(&world, &rules());
    assert_eq!(shape(&found), ["s-name: a* b c", "t-name: d*"]);
    let group = &found.groups[0];
    assert_eq!((group.is_ready(), group.holder(), group.size()), (true, Holder::Server("s".into()), 30 << 30));
    assert_eq!(group.moves[1].device.as_deref(), Some("vdb"));
    let cinder = &group.moves[0].cinder;
    assert_eq!((cinder.volume.as_str(), cinder.from_type.as_str(), cinder.to_type.as_str()), ("a", "sata", "sas"));
    assert_eq!(cinder.by_way_of, None);
    assert!(group.remarks.is_empty(), "{:?}", group.remarks);
}

#[test]
fn boot_and_data_volumes_have_rules_of_their_own() {
    let volumes = || vec![on("s", "a", "/dev/vda", json!({})), on("s", "b", "/dev/vdb", json!({"bootable": "true"}))];
    let world = world(vec![server("s", &["a", "b"], json!({}))], volumes());
    let only = |boot: Option<&str>, data: Option<&str>| {
        let rules =
            Rules { boot_type: boot.map(str::to_owned), data_type: data.map(str::to_owned), ..Rules::default() };
        sorted(&world, &rules)
    };
    assert_eq!(shape(&only(None, Some("sas"))), ["s-name: b"]);
    assert_eq!(shape(&only(Some("sas"), None)), ["s-name: a*"]);
    // What has its type already is counted, and no group.
    let found = only(Some("sata"), Some("sata"));
    assert_eq!((shape(&found), found.already), (Vec::new(), 2));
}

#[test]
fn what_a_server_boots_from_is_told_by_its_device() {
    let told = |root: Value, volumes: &[(&str, &str, bool)]| {
        let server = server("s", &[], json!({"OS-EXT-SRV-ATTR:root_device_name": root}));
        let volumes: Vec<Volume> = volumes
            .iter()
            .map(|(id, device, bootable)| on("s", id, device, json!({"bootable": bootable.to_string()})))
            .collect();
        boot_volume(&server, &volumes.iter().collect::<Vec<_>>()).map(|volume| volume.id.clone())
    };
    let [a, b] = [("a", "/dev/vdb", true), ("b", "/dev/vda", false)];
    assert_eq!(told(json!("/dev/vda"), &[a, b]).as_deref(), Some("b"));
    assert_eq!(told(json!("vdb"), &[a, b]).as_deref(), Some("a"));
    // Nobody says it: the first disk of its kind, if one can be booted from.
    assert_eq!(told(Value::Null, &[a, ("c", "/dev/sda", true)]).as_deref(), Some("c"));
    assert_eq!(told(json!(""), &[a, ("c", "vda", true)]).as_deref(), Some("c"));
    assert_eq!(told(Value::Null, &[a, b]), None);
    // It boots from something else, whatever can be booted from beside it.
    assert_eq!(told(json!("/dev/vda"), &[a, ("c", "/dev/sda", true)]), None);
    // Another server's device counts for nothing.
    let other = on("t", "x", "/dev/vda", json!({}));
    assert!(boot_volume(&server("s", &[], json!({})), &[&other]).is_none());
}

#[test]
fn only_what_is_meant_is_planned() {
    let volumes = vec![
        on("s", "a", "/dev/vdb", json!({"size": 5, "metadata": {"tier": "db"}, "name": "log"})),
        on("s", "b", "/dev/vdc", json!({"size": 50, "volume_type": "slow"})),
        on("t", "c", "/dev/vdb", json!({"size": 500, "name": ""})),
    ];
    let servers = vec![
        server("s", &["a", "b"], json!({"metadata": {"wave": "1"}, "name": "web-1"})),
        server("t", &["c"], json!({"metadata": {"wave": "2", "tier": "db"}, "name": "db-1"})),
    ];
    let mut world = world(servers, volumes);
    world.types.push(volume_type("slow", None, json!({"volume_backend_name": "slow"})));
    let fits = |filter: Filter| {
        let found = sorted(&world, &Rules { filter, ..rules() });
        let mut ids: Vec<_> =
            found.groups.iter().flat_map(|group| &group.moves).map(|one| one.volume.id.clone()).collect();
        ids.sort();
        ids.join(" ")
    };
    let metadata = |pairs: &[(&str, &str)]| {
        let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Filter { metadata: pairs, ..Filter::default() }
    };
    let named = |name: &str| Filter { name: Some(name.into()), ..Filter::default() };
    let sized = |min_size, max_size| Filter { min_size, max_size, ..Filter::default() };
    assert_eq!(fits(Filter::default()), "a b c");
    assert_eq!([named("web-*"), named("log"), named("?"), named("x*")].map(fits), ["a b", "a", "a b c", ""]);
    assert_eq!(fits(metadata(&[("wave", "1")])), "a b");
    assert_eq!(fits(metadata(&[("tier", "db")])), "a c");
    assert_eq!(fits(metadata(&[("tier", "db"), ("wave", "2")])), "c");
    assert_eq!(fits(metadata(&[("tier", "DB")])), "");
    let typed = |types: &[&str]| Filter { types: types.iter().map(|&name| name.into()).collect(), ..Filter::default() };
    assert_eq!([typed(&["slow"]), typed(&["sata"]), typed(&["sata", "slow"])].map(fits), ["b", "a c", "a b c"]);
    assert_eq!(fits(sized(Some(50 << 30), None)), "b c");
    assert_eq!(fits(sized(None, Some(50 << 30))), "a b");
    assert_eq!(fits(sized(Some((5 << 30) + 1), Some((500 << 30) - 1))), "b");
    assert_eq!(fits(Filter { types: vec!["slow".into()], ..named("db-*") }), "");
}

#[test]
fn the_volumes_of_a_gateway_go_by_whose_they_will_be() {
    let of = |key: &str, extra: Value| {
        let mut all = json!({"metadata": {"for": key}});
        merge(&mut all, extra);
        all
    };
    let volumes = vec![
        on("g", "root", "/dev/vda", json!({"bootable": "true"})),
        on("g", "b", "/dev/vdc", of("web-1", json!({"bootable": "true"}))),
        on("g", "a", "/dev/vdb", of("web-1", json!({}))),
        on("g", "c", "/dev/vdd", of("web-2", json!({}))),
        on("g", "d", "/dev/vde", json!({"name": ""})),
        on("g", "e", "/dev/vdf", json!({})),
    ];
    let gateway = server("g", &["root", "a", "b", "c", "d", "e"], json!({"flavor": {"ephemeral": 4}}));
    let world = world(vec![gateway], volumes);
    let by = |gateway: &str, group_by: Option<&str>| {
        let rules = Rules { gateways: vec![gateway.into()], group_by: group_by.map(str::to_owned), ..rules() };
        sorted(&world, &rules)
    };
    let found = by("g-name", Some("for"));
    assert_eq!(shape(&found), ["web-1: b* a", "web-2: c", "d: d", "e-name: e"]);
    // Nothing stops a gateway: what is lost by that keeps nobody.
    assert!(found.groups.iter().all(Group::is_ready), "{found:?}");
    let expected = Holder::Gateway { server: "g".into(), pause: None, resume: None };
    assert!(found.groups.iter().all(|group| group.holder() == expected));
    assert_eq!(by("g", None).groups.len(), 5);
    // The same server taken for one of its own.
    let found = sorted(&world, &rules());
    assert_eq!(shape(&found), ["g-name: root* a b c d e"]);
    assert_eq!(found.groups[0].obstacles, [Obstacle::Ephemeral(4)]);
}

#[test]
fn of_two_to_boot_from_on_a_gateway_none_is_chosen() {
    let bootable = || json!({"bootable": "true", "metadata": {"for": "web-1"}});
    let volumes = vec![on("g", "a", "/dev/vdb", bootable()), on("g", "b", "/dev/vdc", bootable())];
    let world = world(vec![server("g", &["a", "b"], json!({}))], volumes);
    let rules = Rules { gateways: vec!["g".into()], group_by: Some("for".into()), ..rules() };
    assert_eq!(shape(&sorted(&world, &rules)), ["web-1: a b"]);
    // They are boot volumes all the same.
    assert_eq!(shape(&sorted(&world, &Rules { boot_type: None, ..rules })), [""; 0]);
}

#[test]
fn a_gateway_has_to_be_there_and_to_be_one() {
    let named = |id: &str| server(id, &[], json!({"name": "gw"}));
    let world = world(vec![named("g1"), named("g2")], Vec::new());
    let failure = |name: &str| {
        let rules = Rules { gateways: vec![name.into()], ..rules() };
        let error = sort(&world, &rules, "the cloud").unwrap_err();
        (error.fault, format!("{error}; {}", error.hint.as_deref().unwrap_or_default()))
    };
    let (fault, text) = failure("gw");
    assert!(fault == Fault::Config && text.contains("give its id: g1, g2"), "{text}");
    let (fault, text) = failure("other");
    assert!(fault == Fault::NotFound && text.contains("has a server \"other\"; name its project"), "{text}");
    assert!(sort(&world, &Rules { gateways: vec!["g2".into()], ..rules() }, "the cloud").is_ok());
}

#[test]
fn a_type_that_is_not_there_is_told_with_those_that_are() {
    let rules = Rules { data_type: Some("ssd".into()), ..rules() };
    let error = sort(&world(Vec::new(), Vec::new()), &rules, "the cloud").unwrap_err();
    assert_eq!(error.fault, Fault::NotFound);
    assert_eq!(error.to_string(), "the cloud: cannot make a plan: it has no volume type \"ssd\"");
    assert_eq!(error.hint.as_deref(), Some("its types are: sata, sas"));
}

#[test]
fn volumes_that_nobody_has_are_asked_for() {
    let volumes = vec![volume("v", json!({})), volume("w", json!({"bootable": "true"}))];
    let world = world(Vec::new(), volumes);
    let found = sorted(&world, &rules());
    assert_eq!(shape(&found), ["v-name: v", "w-name: w*"]);
    assert!(found.groups.iter().all(|group| group.moves[0].obstacles == [Obstacle::Detached]), "{found:?}");
    let found = sorted(&world, &Rules { detached: true, ..rules() });
    assert!(found.groups.iter().all(|group| group.is_ready() && group.holder() == Holder::Nobody), "{found:?}");
    let found = sorted(&world, &Rules { boot_type: None, detached: true, ..rules() });
    assert_eq!(shape(&found), ["v-name: v"]);
}

#[test]
fn each_thing_in_the_way_of_a_volume_is_found() {
    assert_eq!(way_of(json!({})), []);
    for (extra, obstacle) in [
        (json!({"encrypted": true}), Obstacle::Encrypted),
        (json!({"multiattach": true}), Obstacle::Multiattach),
        (json!({"group_id": "g"}), Obstacle::Grouped("g".into())),
        (json!({"consistencygroup_id": "c"}), Obstacle::Grouped("c".into())),
        (json!({"replication_status": "enabled"}), Obstacle::Replicated("enabled".into())),
        (json!({"status": "error"}), Obstacle::Status("error".into())),
        (json!({"status": "reserved"}), Obstacle::Status("reserved".into())),
        (json!({"os-vol-mig-status-attr:migstat": "migrating"}), Obstacle::Migrating("migrating".into())),
        (json!({"os-vol-mig-status-attr:migstat": "target:x"}), Obstacle::Migrating("target:x".into())),
        (json!({"volume_type": null}), Obstacle::NoType),
        (json!({"volume_type": "gone"}), Obstacle::UnknownType("gone".into())),
    ] {
        assert_eq!(way_of(extra.clone()), [obstacle], "{extra}");
    }
    // What only looks like it.
    for extra in [
        json!({"replication_status": "disabled", "group_id": "", "consistencygroup_id": null}),
        json!({"replication_status": "not-capable", "os-vol-mig-status-attr:migstat": "success"}),
        json!({"os-vol-mig-status-attr:migstat": "error", "multiattach": false, "encrypted": false}),
    ] {
        assert_eq!(way_of(extra.clone()), [], "{extra}");
    }
    // Everything is told at once.
    assert_eq!(way_of(json!({"encrypted": true, "group_id": "g", "status": "error"})).len(), 3);
}

#[test]
fn snapshots_of_cinders_are_told_by_their_names() {
    let mut world = world(Vec::new(), vec![volume("v", json!({}))]);
    let snapshot = |id: &str, volume: &str, name: &str| {
        let written = json!({"id": id, "volume_id": volume, "name": name, "status": "available"});
        serde_json::from_value::<Snapshot>(written).unwrap()
    };
    world.snapshots = vec![snapshot("1", "v", "before"), snapshot("2", "w", "other"), snapshot("3", "v", "")];
    assert_eq!(in_the_way(&world, &rules()), [Obstacle::Snapshots(vec!["before".into(), "3".into()])]);
    world.snapshots.remove(0);
    world.snapshots.remove(1);
    assert_eq!(in_the_way(&world, &rules()), []);
}

#[test]
fn one_volume_keeps_its_whole_server_and_one_that_stays_nobody() {
    let volumes = vec![on("s", "a", "/dev/vda", json!({})), on("s", "b", "/dev/vdb", json!({"encrypted": true}))];
    let world = world(vec![server("s", &["a", "b"], json!({}))], volumes);
    let found = sorted(&world, &rules());
    assert!(!found.groups[0].is_ready() && found.groups[0].moves[0].obstacles.is_empty());
    let found = sorted(&world, &Rules { data_type: None, ..rules() });
    assert_eq!((shape(&found), found.groups[0].is_ready()), (vec!["s-name: a*".to_owned()], true));
}

#[test]
fn a_server_that_would_lose_a_disk_is_kept() {
    let kept = |volumes: Vec<Volume>, server: Server| {
        let found = sorted(&world(vec![server], volumes), &rules());
        found.groups.iter().flat_map(|group| group.obstacles.clone()).collect::<Vec<_>>()
    };
    let data = || on("s", "b", "/dev/vdb", json!({"bootable": "true"}));
    assert_eq!(kept(vec![data()], server("s", &["b"], json!({}))), [Obstacle::LocalBoot]);
    let boot = || on("s", "a", "/dev/vda", json!({}));
    let flavor = json!({"flavor": {"ephemeral": 20, "disk": 0, "swap": 512, "extra_specs": {}}});
    assert_eq!(kept(vec![boot()], server("s", &["a"], flavor)), [Obstacle::Ephemeral(20)]);
    assert_eq!(kept(vec![boot()], server("s", &["a"], json!({}))), []);
    let made_of_image = json!({"image": {"id": "i"}});
    assert_eq!(kept(vec![boot()], server("s", &["a"], made_of_image)), [Obstacle::LocalBoot]);
    assert_eq!(kept(vec![boot()], server("s", &["a"], json!({"image": ""}))), []);
    // What can't be seen may be what it boots from.
    assert_eq!(kept(vec![data()], server("s", &["a", "b"], json!({}))), [Obstacle::VolumeElsewhere("a".into())]);
    // None of its volumes is meant: it is nobody's business.
    let stays = on("s", "b", "/dev/vdb", json!({"volume_type": "sas"}));
    assert_eq!(kept(vec![stays], server("s", &["b"], json!({}))), []);
}

#[test]
fn a_servers_state_is_told_and_keeps_nobody() {
    let boot = on("s", "a", "/dev/vda", json!({}));
    let odd = json!({"status": "SHELVED_OFFLOADED", "locked": true, "OS-EXT-STS:task_state": "unshelving"});
    let found = sorted(&world(vec![server("s", &["a"], odd)], vec![boot.clone()]), &rules());
    assert!(found.groups[0].is_ready());
    let remarks = found.groups[0].remarks.join("; ");
    for part in ["SHELVED_OFFLOADED", "unshelving", "locked"] {
        assert!(remarks.contains(part), "{remarks}");
    }
    let off = server("s", &["a"], json!({"status": "SHUTOFF"}));
    assert!(sorted(&world(vec![off], vec![boot]), &rules()).groups[0].remarks.is_empty());
}

#[test]
fn a_volume_of_two_servers_keeps_both() {
    let attachments = json!([{"server_id": "s", "device": "/dev/vdb"}, {"server_id": "t", "device": "/dev/vdb"}]);
    let volumes = vec![volume("v", json!({"status": "in-use", "attachments": attachments}))];
    let servers = vec![server("s", &["v"], json!({})), server("t", &["v"], json!({}))];
    let found = sorted(&world(servers, volumes), &rules());
    assert_eq!(shape(&found), ["s-name: v", "t-name: v"]);
    assert!(found.groups.iter().all(|group| group.moves[0].obstacles == [Obstacle::Multiattach]), "{found:?}");
}

#[test]
fn who_is_elsewhere_is_told() {
    let found = sorted(&world(Vec::new(), vec![on("x", "v", "/dev/vdb", json!({}))]), &rules());
    assert_eq!(found.groups[0].moves[0].obstacles, [Obstacle::ServerElsewhere("x".into())]);
    assert!(!found.groups[0].is_ready());
}

#[test]
fn cinder_and_nova_have_to_agree() {
    let of = |volumes: Vec<Volume>, server: Server| {
        let found = sorted(&world(vec![server], volumes), &Rules { detached: true, ..rules() });
        found.groups.iter().flat_map(|group| &group.moves).flat_map(|one| one.obstacles.clone()).collect::<Vec<_>>()
    };
    let disagreement = |says_cinder| Obstacle::Disagreement { server: "s".into(), says_cinder };
    let boot = on("s", "a", "/dev/vda", json!({}));
    assert_eq!(of(vec![boot], server("s", &[], json!({}))), [disagreement(true)]);
    assert_eq!(of(vec![volume("v", json!({}))], server("s", &["v"], json!({}))), [disagreement(false)]);
}

#[test]
fn between_types_that_ask_for_more_there_is_a_way_around() {
    let way = |types: Vec<VolumeType>, extra: Value| {
        let mut world = world(Vec::new(), vec![volume("v", extra)]);
        world.types = types;
        let found = sorted(&world, &Rules { detached: true, ..rules() });
        let one = &found.groups[0].moves[0];
        (one.cinder.by_way_of.clone(), one.obstacles.clone())
    };
    let backend = |name: &str| json!({"volume_backend_name": name});
    let with = |name: &str, spec: &str| json!({"volume_backend_name": name, spec: "x"});
    let (sata, sas) = (volume_type("sata", None, backend("b1")), volume_type("sas", None, backend("b2")));
    let (fine_sata, fine_sas) =
        (volume_type("sata", None, with("b1", "cap:x")), volume_type("sas", Some("q"), backend("b2")));
    let plain = |name: &str, of: &str| volume_type(name, None, backend(of));
    let helpers = |from: &str, to: &str| Some(HelperTypes { from: from.into(), to: to.into() });

    assert_eq!(way(vec![sata.clone(), sas.clone()], json!({})), (None, Vec::new()));
    let both = vec![fine_sata.clone(), fine_sas.clone(), plain("p1", "b1"), plain("p2", "b2"), plain("p3", "b3")];
    assert_eq!(way(both, json!({})), (helpers("p1", "p2"), Vec::new()));
    // A side that is plain itself is its own helper.
    assert_eq!(
        way(vec![sata.clone(), fine_sas.clone(), plain("p2", "b2")], json!({})),
        (helpers("sata", "p2"), vec![])
    );
    assert_eq!(way(vec![fine_sata.clone(), sas.clone(), plain("p1", "b1")], json!({})), (helpers("p1", "sas"), vec![]));

    let (by_way_of, obstacles) = way(vec![fine_sata.clone(), fine_sas.clone(), plain("p3", "b3")], json!({}));
    let none = |name: &str, asks: &str, backend: &str| Obstacle::NoWayAround {
        name: name.into(),
        asks: asks.into(),
        backend: backend.into(),
    };
    let expected = vec![none("sata", "the extra specs cap:x", "b1"), none("sas", "a QoS", "b2")];
    assert_eq!((by_way_of, obstacles), (None, expected));
    // A plain type without a backend may lead anywhere.
    let (_, obstacles) = way(vec![sata.clone(), fine_sas.clone(), volume_type("any", None, json!({}))], json!({}));
    assert_eq!(obstacles, [none("sas", "a QoS", "b2")]);
    // A type that names no backend: the volume's own host does.
    let any = volume_type("sata", Some("q"), json!({}));
    assert_eq!(way(vec![any, sas.clone(), plain("p1", "sata")], json!({})), (helpers("p1", "sas"), vec![]));

    let (_, obstacles) = way(vec![sata.clone(), volume_type("sas", None, json!({}))], json!({}));
    assert_eq!(obstacles, [Obstacle::NoBackend("sas".into())]);
    let special = json!({"volume_backend_name": "b2", "multiattach": "<is> True"});
    let (_, obstacles) = way(vec![sata.clone(), volume_type("sas", None, special), plain("p2", "b2")], json!({}));
    assert_eq!(obstacles, [Obstacle::SpecialType { name: "sas".into(), spec: "multiattach".into() }]);

    // Neither a type that encrypts, nor one as a helper.
    let mut world = world(Vec::new(), vec![volume("v", json!({}))]);
    world.types = vec![sata, sas];
    world.encrypting.insert("id-sas".into());
    assert_eq!(in_the_way(&world, &rules()), [Obstacle::EncryptingType("sas".into())]);
    world.types = vec![fine_sata, volume_type("sas", None, backend("b2")), plain("p1", "b1")];
    world.encrypting = ["id-p1".to_owned()].into();
    assert_eq!(in_the_way(&world, &rules()), [none("sata", "the extra specs cap:x", "b1")]);
}

#[test]
fn a_host_names_its_backend() {
    let told = ["vm@sata#sata", "vm@sata#pool", "vm@sata", "vm@sata#", "vm", "vm@"].map(backend_of_host);
    assert_eq!(told, [Some("sata"), Some("pool"), Some("sata"), Some("sata"), None, None]);
}

/// Quotas of one project.
fn quotas(entries: &[(&str, i64, i64)]) -> BTreeMap<String, BTreeMap<String, Quota>> {
    let entries = entries.iter().map(|&(key, limit, in_use)| (key.to_owned(), Quota { limit, in_use, reserved: 1 }));
    BTreeMap::from([("p1".to_owned(), entries.collect())])
}

/// What of three servers with a volume of 10, 20 and 30 GiB each fits into the quotas.
fn fitting(quotas: BTreeMap<String, BTreeMap<String, Quota>>) -> Vec<Vec<Obstacle>> {
    fitting_of([10, 20, 30], quotas)
}

fn fitting_of(sizes: [u64; 3], quotas: BTreeMap<String, BTreeMap<String, Quota>>) -> Vec<Vec<Obstacle>> {
    let ids = ["a", "b", "c"];
    let servers = ids.iter().map(|id| server(&format!("s{id}"), &[id], json!({}))).collect();
    let sizes = ids.iter().zip(sizes);
    let volumes = sizes.map(|(id, size)| on(&format!("s{id}"), id, "/dev/vda", json!({"size": size}))).collect();
    let world = World { quotas, ..world(servers, volumes) };
    let mut found = sorted(&world, &rules());
    hold_against_quotas(&mut found.groups, &world);
    found.groups.into_iter().map(|group| group.obstacles).collect()
}

#[test]
fn what_does_not_fit_into_a_quota_is_left_out_and_the_rest_is_not() {
    let nothing = || vec![Vec::new(); 3];
    assert_eq!(fitting(BTreeMap::new()), nothing());
    assert_eq!(fitting(quotas(&[("gigabytes_sas", -1, 9_999), ("volumes_sas", -1, 9_999)])), nothing());
    // One is reserved: 61 are needed.
    assert_eq!(fitting(quotas(&[("gigabytes_sas", 61, 0), ("volumes_sas", 4, 0)])), nothing());
    // What is changed neither counts in the sum nor in the old type.
    assert_eq!(fitting(quotas(&[("gigabytes", 60, 60), ("gigabytes_sata", 0, 60), ("volumes", 3, 3)])), nothing());
    let short = |key: &str, room, needed, limit| {
        vec![Obstacle::Quota { project: "p1".into(), key: key.into(), room, needed, limit }]
    };
    let told = fitting(quotas(&[("gigabytes_sas", 60, 0)]));
    assert_eq!(told, [vec![], vec![], short("gigabytes_sas", 59, 60, 61)]);
    // A smaller one behind may fit where a larger one did not.
    let told = fitting_of([10, 90, 30], quotas(&[("gigabytes_sas", 141, 100)]));
    assert_eq!(told, [vec![], short("gigabytes_sas", 40, 130, 231), vec![]]);
    let told = fitting(quotas(&[("volumes_sas", 2, 0)]));
    assert_eq!(told, [vec![], short("volumes_sas", 1, 3, 4), short("volumes_sas", 1, 3, 4)]);
    // More is used than may be.
    let told = fitting(quotas(&[("gigabytes_sas", 0, 7)]));
    assert_eq!(told[0], short("gigabytes_sas", 0, 60, 68));
}

#[test]
fn what_is_kept_by_something_else_takes_no_quota() {
    let servers = vec![server("s", &["a"], json!({})), server("t", &["b"], json!({}))];
    let volumes = vec![on("s", "a", "/dev/vda", json!({"encrypted": true})), on("t", "b", "/dev/vda", json!({}))];
    let world = World { quotas: quotas(&[("gigabytes_sas", 11, 0)]), ..world(servers, volumes) };
    let mut found = sorted(&world, &rules());
    hold_against_quotas(&mut found.groups, &world);
    assert!(found.groups.iter().all(|group| group.obstacles.is_empty()), "{found:?}");
    assert!(found.groups[1].is_ready());
}

#[test]
fn helper_types_have_quotas_as_well() {
    let mut world = world(vec![server("s", &["a"], json!({}))], vec![on("s", "a", "/dev/vda", json!({}))]);
    let typed = |name: &str, backend: &str, qos| volume_type(name, qos, json!({"volume_backend_name": backend}));
    world.types = vec![typed("sata", "b1", None), typed("sas", "b2", Some("q")), typed("p2", "b2", None)];
    let fits = |limit| {
        let world = World { quotas: quotas(&[("gigabytes_p2", limit, 0), ("gigabytes_sata", 0, 10)]), ..world.clone() };
        let mut found = sorted(&world, &rules());
        hold_against_quotas(&mut found.groups, &world);
        found.groups[0].is_ready()
    };
    assert_eq!([fits(11), fits(10)], [true, false]);
}

#[test]
fn obstacles_say_what_to_do() {
    let texts: Vec<String> = [
        Obstacle::Snapshots(vec!["a".into()]),
        Obstacle::Snapshots(["a", "b\n", "c", "d"].map(String::from).into()),
        Obstacle::Disagreement { server: "s".into(), says_cinder: false },
        Obstacle::NoWayAround { name: "sas".into(), asks: "a QoS".into(), backend: "b2".into() },
        Obstacle::Quota { project: "p".into(), key: "gigabytes_sas fast".into(), room: 1, needed: 2, limit: 9 },
        Obstacle::NoImage { image: "volume-1".into(), pools: vec!["rbd:a".into(), "rbd:b".into()] },
        Obstacle::NoImage { image: "volume-1".into(), pools: Vec::new() },
        Obstacle::OtherSize { image: "rbd:a/volume-1".into(), found: 5, expected: 6 },
    ]
    .iter()
    .map(ToString::to_string)
    .collect();
    insta::assert_snapshot!(texts.join("\n"), @r#"
    Cinder has 1 snapshot of it ("a"): remove what is not needed, and take the rest out of Cinder with cinder snapshot-unmanage
    Cinder has 4 snapshots of it ("a", "b\n", "c", …): remove what is not needed, and take the rest out of Cinder with cinder snapshot-unmanage
    Nova says that the server s has it, and Cinder that it has not: clear that up first
    the type "sas" has a QoS, so that Cinder would copy everything: make a type with only volume_backend_name=b2, for the way
    the project p may have 1 more of gigabytes_sas fast, and its volumes need 2: openstack quota set --gigabytes 9 --volume-type "sas fast" p
    there is no image "volume-1" in rbd:a or rbd:b: say which pool its type is on with --pool TYPE=POOL
    there is no image "volume-1" in any pool that its host names: say which pool its type is on with --pool TYPE=POOL
    rbd:a/volume-1 has 5 bytes, and Cinder says 6
    "#);
}
