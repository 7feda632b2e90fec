//! The text of a plan of a cloud's volumes, and of what is left out of it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;

use super::super::values::{PoolName, human_bytes};
use super::{name, quoted, shown, spec};
use crate::openstack::discovery::{Found, Group, Move, Who};
use crate::plan::{CinderVolume, HelperTypes, Holder, Strategy};

/// A volume's image.
pub(super) struct Seen {
    /// Where it is.
    pub(super) place: PoolName,
    /// Bytes.
    pub(super) size: u64,
    /// The bytes of all objects that there are; `None` where the object map doesn't tell.
    pub(super) used: Option<u64>,
    /// How many clones hang on it.
    pub(super) clones: usize,
}

/// How much there is, in a line.
pub(super) fn summary(found: &Found) -> String {
    let (ready, left): (Vec<&Group>, Vec<&Group>) = found.groups.iter().partition(|group| group.is_ready());
    let part = |groups: &[&Group], what: &str| {
        let volumes = groups.iter().map(|group| group.moves.len()).sum::<usize>();
        let is = if volumes == 1 { "is" } else { "are" };
        format!("{} of {} {is} {what}", counted(volumes, "volume"), servers(groups))
    };
    let size = ready.iter().fold(0u64, |sum, group| sum.saturating_add(group.size()));
    let mut text = format!("{}, {}", part(&ready, "planned"), human_bytes(size));
    if !left.is_empty() {
        let _ = write!(text, "; {}", part(&left, "left out"));
    }
    match found.already {
        0 => {}
        1 => text.push_str("; 1 has its type already"),
        already => {
            let _ = write!(text, "; {already} have their type already");
        }
    }
    text
}

fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// How many servers, and what else.
fn servers(groups: &[&Group]) -> String {
    let count = groups.iter().filter(|group| matches!(group.who, Who::Server(_))).count();
    let others = groups.len() - count;
    match (counted(count, "server"), others) {
        (servers, 0) => servers,
        (_, others) if count == 0 => counted(others, "other group"),
        (servers, others) => format!("{servers} and {}", counted(others, "other group")),
    }
}

/// What is left out, and why: a line for each thing that stands in the way.
pub(super) fn left_out(groups: &[Group]) -> Vec<String> {
    let mut lines = Vec::new();
    for group in groups.iter().filter(|group| !group.is_ready()) {
        let who = match &group.who {
            Who::Server(server) => format!("server {:?} ({})", group.label, server.id),
            Who::Gateway(server) => format!("{:?} on the gateway {:?} ({})", group.label, server.name, server.id),
            Who::Elsewhere(_) | Who::Nobody => String::new(),
        };
        lines.extend(group.obstacles.iter().map(|obstacle| match who.as_str() {
            // A group without a server is one volume, and that is what is in its own project's way.
            "" => format!("left out: {}: {obstacle}", volume(&group.moves[0])),
            who => format!("left out: {who}: {obstacle}"),
        }));
        for one in &group.moves {
            let who = if who.is_empty() { String::new() } else { format!("{who}, ") };
            lines.extend(one.obstacles.iter().map(|obstacle| format!("left out: {who}{}: {obstacle}", volume(one))));
        }
    }
    lines.iter().map(|line| shown(line)).collect()
}

fn volume(one: &Move) -> String {
    let kind = one.volume.volume_type.as_deref().unwrap_or("no type");
    let device = one.device.as_ref().map_or_else(String::new, |device| format!(", {device}"));
    let what = if one.boot { "boot volume" } else { "volume" };
    let name = if one.volume.name.is_empty() { String::new() } else { format!("{:?} ", one.volume.name) };
    format!("{what} {name}({}, {} GiB, {kind}{device})", one.volume.id, one.volume.size)
}

/// The lines as comments at the end of the plan.
pub(super) fn comment(text: &mut String, lines: &[String]) {
    if !lines.is_empty() {
        text.push('\n');
    }
    for line in lines {
        let _ = writeln!(text, "# {line}");
    }
}

/// Writes the groups that nothing stands in the way of; returns how many volumes these are.
pub(super) fn write(
    text: &mut String,
    (cloud, strategy): (Option<&str>, Strategy),
    groups: &[Group],
    seen: &HashMap<String, Seen>,
    targets: &BTreeMap<String, PoolName>,
) -> anyhow::Result<usize> {
    let mut names = HashSet::new();
    let mut count = 0;
    for group in groups.iter().filter(|group| group.is_ready()) {
        let cutover = format!("cutover = {{ openstack = {{{}}} }}", keys(cloud, strategy, &group.holder()));
        text.push('\n');
        for remark in &group.remarks {
            writeln!(text, "# {}", shown(remark))?;
        }
        let label = match group.label.as_str() {
            "" => group.moves[0].volume.id.as_str(),
            label => label,
        };
        // A volume that stands by itself is a server of its own, with one name.
        let alone = !matches!(group.who, Who::Server(_)) && group.moves.len() == 1;
        let server = name(label, &mut names);
        if !alone {
            let about = format!("{}, {}", counted(group.moves.len(), "volume"), human_bytes(group.size()));
            let status = match &group.who {
                Who::Server(server) => format!("{}, ", server.status),
                Who::Gateway(server) => format!("on the gateway {:?}, ", server.name),
                Who::Elsewhere(_) | Who::Nobody => String::new(),
            };
            writeln!(text, "[[server]]  # {}{about}", shown(&status))?;
            writeln!(text, "name = {}\n{cutover}", quoted(&server))?;
        }
        for one in &group.moves {
            let (Some(seen), Some(target)) = (seen.get(&one.volume.id), targets.get(&one.cinder.to_type)) else {
                anyhow::bail!("the volume {} is planned without its image or pool: this is a defect", one.volume.id);
            };
            let name = if alone { server.clone() } else { name(&volume_name(&group.label, one), &mut names) };
            let table = if alone { "[[volume]]" } else { "\n[[server.volume]]" };
            self::one(text, table, &name, one, seen, target)?;
            if alone {
                writeln!(text, "{cutover}")?;
            }
            count += 1;
        }
    }
    Ok(count)
}

/// What a volume is called in the plan, beside others of its server.
fn volume_name(server: &str, one: &Move) -> String {
    let own = one.volume.name.as_str();
    match (own, &one.device) {
        ("", _) if one.boot => format!("{server}-boot"),
        ("", Some(device)) => format!("{server}-{device}"),
        ("", None) => one.volume.id.clone(),
        (own, _) if own.starts_with(server) && own != server => own.to_owned(),
        (own, _) => format!("{server}-{own}"),
    }
}

fn one(text: &mut String, table: &str, name: &str, one: &Move, seen: &Seen, target: &PoolName) -> anyhow::Result<()> {
    let used =
        seen.used.map_or("how much is used is not known".into(), |used| format!("at most {} used", human_bytes(used)));
    writeln!(text, "{table}  # {}, {used}", human_bytes(one.size()))?;
    for remark in &one.remarks {
        writeln!(text, "# {}", shown(remark))?;
    }
    let source = spec(&seen.place, &one.volume.image()).to_string();
    // Never `volume-ID`: a migration of Cinder's that fails deletes what has that name in the pool that it was to go to.
    let target = spec(target, &format!("poolshift-{}", one.volume.id)).to_string();
    writeln!(text, "name = {}\nsource = {}\ntarget = {}", quoted(name), quoted(&source), quoted(&target))?;
    if one.boot {
        text.push_str("boot = true\n");
    }
    let CinderVolume { volume, from_type, to_type, by_way_of } = &one.cinder;
    let way = by_way_of.as_ref().map_or_else(String::new, |HelperTypes { from, to }| {
        format!(", by_way_of = {{ from = {}, to = {} }}", quoted(from), quoted(to))
    });
    let (volume, from_type, to_type) = (quoted(volume), quoted(from_type), quoted(to_type));
    writeln!(text, "cinder = {{ volume = {volume}, from_type = {from_type}, to_type = {to_type}{way} }}")?;
    Ok(())
}

/// The keys of `openstack`.
fn keys(cloud: Option<&str>, strategy: Strategy, holder: &Holder) -> String {
    let strategy = (strategy != Strategy::default()).then(|| format!("strategy = {}", quoted(strategy.name())));
    let cloud = cloud.map(|cloud| format!("cloud = {}", quoted(cloud)));
    let has = match holder {
        Holder::Server(id) => Some(format!("server = {}", quoted(id))),
        Holder::Gateway { server, .. } => Some(format!("gateway = {}", quoted(server))),
        Holder::Nobody => None,
    };
    let keys: Vec<_> = cloud.into_iter().chain(strategy).chain(has).collect();
    if keys.is_empty() { String::new() } else { format!(" {} ", keys.join(", ")) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;
    use crate::openstack::discovery::{Rules, World, sort};
    use crate::plan::{Cutover, Plan};

    /// An id whose last digits are these.
    fn id(number: u32) -> String {
        format!("00000000-0000-0000-0000-{number:012}")
    }

    fn read<T: serde::de::DeserializeOwned>(written: Value) -> T {
        serde_json::from_value(written).unwrap()
    }

    fn volume(number: u32, name: &str, server: Option<(u32, &str)>, extra: Value) -> Value {
        let attachments: Vec<_> =
            server.iter().map(|(server, device)| json!({"server_id": id(*server), "device": device})).collect();
        let mut written = json!({
            "id": id(number), "name": name, "size": number, "volume_type": "sata", "attachments": attachments,
            "status": if attachments.is_empty() { "available" } else { "in-use" },
            "os-vol-host-attr:host": "vm@sata#sata", "os-vol-tenant-attr:tenant_id": "p",
        });
        written.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        written
    }

    fn server(number: u32, name: &str, status: &str, volumes: &[u32]) -> Value {
        let volumes: Vec<_> = volumes.iter().map(|number| json!({"id": id(*number)})).collect();
        json!({
            "id": id(number), "name": name, "status": status, "OS-EXT-SRV-ATTR:root_device_name": "/dev/vda",
            "os-extended-volumes:volumes_attached": volumes,
        })
    }

    /// A server that is ready, one that is not, a gateway, and a volume of nobody's.
    fn found() -> Found {
        let servers = json!([
            server(101, "web 1", "SHELVED", &[1, 2]),
            server(102, "db\n[x]", "ACTIVE", &[3, 4]),
            server(103, "gw", "ACTIVE", &[5, 6, 7]),
        ]);
        let volumes = json!([
            volume(1, "", Some((101, "/dev/vda")), json!({})),
            volume(2, "logs", Some((101, "/dev/vdb")), json!({"os-vol-mig-status-attr:name_id": id(22)})),
            volume(3, "db-root", Some((102, "/dev/vda")), json!({})),
            volume(4, "", Some((102, "/dev/vdb")), json!({"encrypted": true, "group_id": "g"})),
            volume(5, "x", Some((103, "/dev/vdb")), json!({"metadata": {"for": "new-1"}})),
            volume(6, "new-1-root", Some((103, "/dev/vdc")), json!({"bootable": "true", "metadata": {"for": "new-1"}})),
            volume(7, "", Some((103, "/dev/vdd")), json!({})),
            volume(8, "web 1", None, json!({})),
        ]);
        let types = json!([
            {"id": "1", "name": "sata", "extra_specs": {"volume_backend_name": "sata"}},
            {"id": "2", "name": "sas", "extra_specs": {"volume_backend_name": "sas"}, "qos_specs_id": "q"},
            {"id": "3", "name": "plain \"sas\"", "extra_specs": {"volume_backend_name": "sas"}},
        ]);
        let (servers, volumes, types) = (read(servers), read(volumes), read(types));
        let world = World { servers, volumes, types, ..World::default() };
        let rules = Rules {
            boot_type: Some("sas".into()),
            data_type: Some("sas".into()),
            gateways: vec!["gw".into()],
            group_by: Some("for".into()),
            detached: true,
            ..Rules::default()
        };
        let mut found = sort(&world, &rules, "the cloud").unwrap();
        found.groups[0].moves[0].remarks.push("1 clone hangs\non its image".into());
        found
    }

    fn text(cloud: Option<&str>) -> String {
        let place: PoolName = "sata".parse().unwrap();
        let seen = (1..=8)
            .map(|number| {
                let used = (number % 2 == 0).then_some(1 << 20);
                (id(number), Seen { place: place.clone(), size: u64::from(number) << 30, used, clones: 0 })
            })
            .collect();
        let targets = BTreeMap::from([("sas".to_owned(), "fast/tenant".parse().unwrap())]);
        let found = found();
        let mut text = String::new();
        assert_eq!(write(&mut text, (cloud, Strategy::KeepIds), &found.groups, &seen, &targets).unwrap(), 6);
        comment(&mut text, &left_out(&found.groups));
        text
    }

    #[test]
    fn what_is_written_is_a_plan() {
        let text = text(Some("prod \"1\""));
        let plan = Plan::parse(&text, Path::new("plan.toml")).unwrap_or_else(|error| panic!("{error}\n{text}"));
        let told: Vec<String> = plan
            .volumes()
            .map(|(server, volume)| {
                let Cutover::OpenStack(openstack) = &server.cutover else { panic!("{server:?}") };
                assert_eq!(openstack.cloud.as_deref(), Some("prod \"1\""));
                let cinder = volume.cinder.as_ref().unwrap();
                let by_way_of = cinder.by_way_of.as_ref().unwrap();
                assert_eq!((by_way_of.from.as_str(), by_way_of.to.as_str()), ("sata", "plain \"sas\""));
                assert_eq!((cinder.from_type.as_str(), cinder.to_type.as_str()), ("sata", "sas"));
                assert_eq!(volume.target.to_string(), format!("rbd:fast/tenant/poolshift-{}", cinder.volume));
                let holder = match &openstack.holder {
                    Holder::Server(id) => format!("server {}", &id[33..]),
                    Holder::Gateway { server, .. } => format!("gateway {}", &server[33..]),
                    Holder::Nobody => "nobody".into(),
                };
                let boot = if volume.boot { " boots" } else { "" };
                let source = volume.source.to_string();
                format!("{}/{}: {}, {holder}{boot}", server.name, volume.name, &source[source.len() - 3..])
            })
            .collect();
        insta::assert_snapshot!(told.join("\n"), @r"
        web-1/web-1-boot: 001, server 101 boots
        web-1/web-1-logs: 022, server 101
        new-1/new-1-root: 006, gateway 103 boots
        new-1/new-1-x: 005, gateway 103
        00000000-0000-0000-0000-000000000007/00000000-0000-0000-0000-000000000007: 007, gateway 103
        web-1-2/web-1-2: 008, nobody
        ");
    }

    #[test]
    fn a_server_that_is_made_again_says_so() {
        let server = Holder::Server(id(1));
        let expected = format!(" strategy = \"recreate\", server = \"{}\" ", id(1));
        assert_eq!(keys(None, Strategy::Recreate, &server), expected);
    }

    #[test]
    fn without_a_cloud_the_environment_has_it() {
        let plan = Plan::parse(&text(None), Path::new("plan.toml")).unwrap();
        for server in &plan.servers {
            assert!(matches!(&server.cutover, Cutover::OpenStack(openstack) if openstack.cloud.is_none()));
        }
    }

    #[test]
    fn a_strategy_is_written_where_it_is_another_than_the_usual_one() {
        let keys = |strategy, holder| super::keys(None, strategy, &holder);
        assert_eq!(keys(Strategy::KeepIds, Holder::Nobody), "");
        assert_eq!(keys(Strategy::Retype, Holder::Nobody), " strategy = \"retype\" ");
    }

    #[test]
    fn one_is_not_called_many() {
        let mut found = found();
        found.groups.truncate(1);
        found.groups[0].moves.truncate(1);
        found.already = 1;
        let told = "1 volume of 1 server is planned, 1.0 GiB; 1 has its type already";
        assert_eq!(summary(&found), told);
        found.groups[0].who = Who::Nobody;
        found.already = 2;
        let told = "1 volume of 1 other group is planned, 1.0 GiB; 2 have their type already";
        assert_eq!(summary(&found), told);
    }

    #[test]
    fn a_person_finds_sizes_remarks_and_reasons_in_it() {
        insta::assert_snapshot!(text(Some("prod")).trim_start(), @r#"
        # the server is SHELVED: it has to be ACTIVE or SHUTOFF to be brought over
        [[server]]  # SHELVED, 2 volumes, 3.0 GiB
        name = "web-1"
        cutover = { openstack = { cloud = "prod", server = "00000000-0000-0000-0000-000000000101" } }

        [[server.volume]]  # 1.0 GiB, how much is used is not known
        # 1 clone hangs�on its image
        name = "web-1-boot"
        source = "rbd:sata/volume-00000000-0000-0000-0000-000000000001"
        target = "rbd:fast/tenant/poolshift-00000000-0000-0000-0000-000000000001"
        boot = true
        cinder = { volume = "00000000-0000-0000-0000-000000000001", from_type = "sata", to_type = "sas", by_way_of = { from = "sata", to = 'plain "sas"' } }

        [[server.volume]]  # 2.0 GiB, at most 1.0 MiB used
        name = "web-1-logs"
        source = "rbd:sata/volume-00000000-0000-0000-0000-000000000022"
        target = "rbd:fast/tenant/poolshift-00000000-0000-0000-0000-000000000002"
        cinder = { volume = "00000000-0000-0000-0000-000000000002", from_type = "sata", to_type = "sas", by_way_of = { from = "sata", to = 'plain "sas"' } }

        [[server]]  # on the gateway "gw", 2 volumes, 11.0 GiB
        name = "new-1"
        cutover = { openstack = { cloud = "prod", gateway = "00000000-0000-0000-0000-000000000103" } }

        [[server.volume]]  # 6.0 GiB, at most 1.0 MiB used
        name = "new-1-root"
        source = "rbd:sata/volume-00000000-0000-0000-0000-000000000006"
        target = "rbd:fast/tenant/poolshift-00000000-0000-0000-0000-000000000006"
        boot = true
        cinder = { volume = "00000000-0000-0000-0000-000000000006", from_type = "sata", to_type = "sas", by_way_of = { from = "sata", to = 'plain "sas"' } }

        [[server.volume]]  # 5.0 GiB, how much is used is not known
        name = "new-1-x"
        source = "rbd:sata/volume-00000000-0000-0000-0000-000000000005"
        target = "rbd:fast/tenant/poolshift-00000000-0000-0000-0000-000000000005"
        cinder = { volume = "00000000-0000-0000-0000-000000000005", from_type = "sata", to_type = "sas", by_way_of = { from = "sata", to = 'plain "sas"' } }

        [[volume]]  # 7.0 GiB, how much is used is not known
        name = "00000000-0000-0000-0000-000000000007"
        source = "rbd:sata/volume-00000000-0000-0000-0000-000000000007"
        target = "rbd:fast/tenant/poolshift-00000000-0000-0000-0000-000000000007"
        cinder = { volume = "00000000-0000-0000-0000-000000000007", from_type = "sata", to_type = "sas", by_way_of = { from = "sata", to = 'plain "sas"' } }
        cutover = { openstack = { cloud = "prod", gateway = "00000000-0000-0000-0000-000000000103" } }

        [[volume]]  # 8.0 GiB, at most 1.0 MiB used
        name = "web-1-2"
        source = "rbd:sata/volume-00000000-0000-0000-0000-000000000008"
        target = "rbd:fast/tenant/poolshift-00000000-0000-0000-0000-000000000008"
        cinder = { volume = "00000000-0000-0000-0000-000000000008", from_type = "sata", to_type = "sas", by_way_of = { from = "sata", to = 'plain "sas"' } }
        cutover = { openstack = { cloud = "prod" } }

        # left out: server "db\n[x]" (00000000-0000-0000-0000-000000000102), volume (00000000-0000-0000-0000-000000000004, 4 GiB, sata, vdb): Cinder encrypts it, and takes no image over that was copied beside it
        # left out: server "db\n[x]" (00000000-0000-0000-0000-000000000102), volume (00000000-0000-0000-0000-000000000004, 4 GiB, sata, vdb): it is in the group g: take it out with cinder group-update --remove-volumes
        "#);
        insta::assert_snapshot!(summary(&found()), @"6 volumes of 1 server and 3 other groups are planned, 29.0 GiB; 2 volumes of 1 server are left out");
    }
}
