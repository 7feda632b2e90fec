//! What an administrator does with a real cloud, from its list of servers to the last source: a plan that poolshift
//! makes, the replication of it, a rehearsal, the cutover, the way back, and the end. And many servers at once.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::{Value, json};

use crate::cutover_bed::{Fleet, report};
use crate::openstack_bed::{CleanUp, CloudBed, all};
use crate::openstack_env::{OpenStackEnv, Service, openstack};
use crate::support::poolshift;

/// What Cinder's quotas of the project count, and what of it is reserved, by `gigabytes_sas` and the like.
#[track_caller]
fn usage(env: &OpenStackEnv) -> BTreeMap<String, [i64; 2]> {
    let answer = env.get(Service::Cinder, &format!("os-quota-sets/{}?usage=True", env.project()));
    let counted =
        |(key, of): (&String, &Value)| Some((key.clone(), [of["in_use"].as_i64()?, of["reserved"].as_i64()?]));
    let all = answer["quota_set"].as_object().expect("an object").iter().filter_map(counted);
    // Other tests make types meanwhile, of which this project has nothing.
    all.filter(|(_, counts)| *counts != [0, 0]).collect()
}

/// So many volumes of 1 GiB more, or less, are counted under a type.
fn counted(usage: &mut BTreeMap<String, [i64; 2]>, volume_type: &str, volumes: i64) {
    for what in ["volumes", "gigabytes"] {
        let key = format!("{what}_{volume_type}");
        let counts = usage.entry(key).or_default();
        counts[0] += volumes;
    }
    usage.retain(|_, counts| *counts != [0, 0]);
}

/// The quotas count what they should: soon, as Cinder shows a deleted volume no more before it has counted that.
#[track_caller]
fn expect_usage(env: &OpenStackEnv, wanted: &BTreeMap<String, [i64; 2]>) {
    env.wait_for("the quotas to count that", || {
        let found = usage(env);
        if found == *wanted { Ok(()) } else { Err(format!("{found:?}, and not {wanted:?}")) }
    });
}

/// The plan that poolshift has made: each server with its volumes, their roles, pools and types; of what is to stay no
/// word but why it does.
#[track_caller]
fn expect_planned(bed: &CloudBed<'_>) -> String {
    let text = std::fs::read_to_string(bed.fleet.plan()).expect("a plan");
    let plan: toml::Table = text.parse().unwrap_or_else(|error| panic!("{error}\n{text}"));
    let plan = serde_json::to_value(plan).expect("it is as JSON");
    println!("{text}");
    let cluster = json!({"conf": bed.env.ceph.conf, "user": bed.env.ceph.user});
    assert_eq!((&plan["source"], &plan["target"]), (&cluster, &cluster));
    assert_eq!(plan["volume"], Value::Null, "no volume is by itself");
    let mut found = plan["server"].as_array().expect("servers").clone();
    found.sort_by_key(|server| server["name"].to_string());
    let mut expected: Vec<Value> = bed
        .servers
        .iter()
        .enumerate()
        .map(|(index, server)| {
            let volumes = server.volumes.iter().zip(["root", "data"]).map(|(id, role)| {
                let mut volume = json!({
                    "name": format!("{}-{role}", server.name), "source": format!("rbd:sata/volume-{id}"),
                    "target": format!("rbd:sas/poolshift-{id}"),
                    "cinder": {"volume": id, "from_type": "sata", "to_type": "sas"},
                });
                if role == "root" {
                    volume["boot"] = true.into();
                }
                volume
            });
            let id = &bed.guest_of(index).expect("it runs").id;
            let cutover = json!({"openstack": {"server": id}});
            json!({"name": server.name, "cutover": cutover, "volume": volumes.collect::<Vec<_>>()})
        })
        .collect();
    expected.sort_by_key(|server| server["name"].to_string());
    assert_eq!(found, expected);
    text
}

/// Has poolshift make the plan, holds it against what is there, and changes in it what is left to a person.
#[track_caller]
fn write_the_plan(bed: &CloudBed<'_>, pinned: &str, spare: &str) {
    let words = ["--boot-type", "sas", "--data-type", "sas", "--from-type", "sata"];
    let run = bed.discover(&words).expect_code(0);
    let text = expect_planned(bed);
    let left_out = format!("left out: volume \"{}-spare\" ({spare}, 1 GiB, sata): nobody has it", bed.servers[0].name);
    assert!(text.contains(&format!("\n# {left_out}")) && run.stderr.contains(&left_out), "{run:?}\n{text}");
    assert!(!text.contains(pinned) && !run.stderr.contains(pinned), "{run:?}\n{text}");
    assert!(run.stderr.contains("2 volumes of 1 server are planned"), "{run:?}");
    let again = bed.discover(&words);
    assert!(again.code != Some(0), "it is never written over: {again:?}");
    assert_eq!(std::fs::read_to_string(bed.fleet.plan()).ok(), Some(text));
    set_listen(bed);
    // How a server says that it has booted.
    bed.change_plan("openstack = { ", "openstack = { rehearsal = { console = \"GUEST READY\" }, ");
    poolshift(["check", &bed.fleet.plan(), "--no-measure"]).expect_code(0);
}

/// Says in the plan where its daemon listens: several run on this host.
#[track_caller]
fn set_listen(bed: &CloudBed<'_>) {
    bed.change_plan("\n[defaults]", &format!("\n{}\n[defaults]", Fleet::api()));
}

/// Which volumes of the server are deleted with it, in the order of its disks.
#[track_caller]
fn delete_on_termination(bed: &CloudBed<'_>) -> Vec<Value> {
    let path = format!("servers/{}/os-volume_attachments", bed.guest().id);
    let mut found = bed.env.get(Service::Nova, &path)["volumeAttachments"].as_array().expect("a list").clone();
    found.sort_by_key(|one| one["device"].to_string());
    found.iter().map(|one| one["delete_on_termination"].clone()).collect()
}

#[test]
#[ignore = "needs OpenStack"]
fn a_fleet_of_a_cloud_is_planned_replicated_rehearsed_and_cut_over() {
    let env = openstack();
    let mut bed = CloudBed::unplanned(&env, "story", 1);
    let name = bed.servers[0].name.clone();
    // What stays: a disk of the server, of a type that is not asked for, and a volume that nobody has.
    let other_type = bed.world.volume_type("sata");
    let pinned = bed.world.volumes_of(&other_type, &[format!("{name}-pinned")]).remove(0);
    bed.give(0, &pinned);
    let spare = bed.world.volumes(&[format!("{name}-spare")]).remove(0);
    assert_eq!(delete_on_termination(&bed), [false, true, false], "what is kept below is of both kinds");
    let on_source = usage(&env);
    assert!(on_source.values().all(|[_, reserved]| *reserved == 0), "{on_source:?}");
    let mut on_target = on_source.clone();
    counted(&mut on_target, "sata", -2);
    counted(&mut on_target, "sas", 2);

    write_the_plan(&bed, &pinned, &spare);

    // The replication and a rehearsal, while the server goes on.
    bed.guest().wait_for_ack(5);
    bed.replicate();
    expect_usage(&env, &on_source);
    let _clean_up = CleanUp(&bed);
    let (before, acked) = (all(&env), bed.guest().console().last_ack());
    let done = report(&bed.run(0, "rehearse", &["--json"]).expect_code(0));
    assert!(done["passed"] == true && done["left"] == json!([]), "{done:#}");
    assert_eq!(all(&env), before);
    expect_usage(&env, &on_source);
    assert_eq!(bed.guest().console().boot_ids().len(), 1, "the server itself was never touched");
    assert!(bed.guest().console().last_ack() > acked, "the server went on");

    // Over, back with what it has written there, and over for good.
    bed.switch(0, "cutover", &[], "target");
    expect_usage(&env, &on_target);
    bed.switch(0, "rollback", &["--with-changes"], "source");
    expect_usage(&env, &on_source);
    bed.switch(0, "cutover", &[], "target");
    let console = bed.guest().console();
    assert_eq!((console.all("SHUTDOWN").count(), console.boot_ids().len()), (3, 4), "it was asked to stop");
    expect_usage(&env, &on_target);
    for (id, kind) in [(&pinned, &other_type), (&spare, &"sata".to_owned())] {
        let shown = env.volume(id);
        assert_eq!((&shown["volume_type"], env.images("sas", id).len()), (&json!(kind), 0), "{shown:#}");
    }

    // The end of the sources, and of all that was moved.
    bed.finalized(0);
    bed.expect_facts(0);
    expect_usage(&env, &on_target);
    bed.ends_as_any_other(0);
    counted(&mut on_target, "sas", -2);
    for what in ["volumes", "gigabytes"] {
        on_target.get_mut(what).expect("both are counted")[0] -= 2;
    }
    expect_usage(&env, &on_target);
}

#[test]
#[ignore = "needs OpenStack"]
fn two_servers_of_a_cloud_are_cut_over_at_once() {
    are_cut_over_at_once(2, false);
}

/// With ten emulated guests on two busy cores it takes twenty minutes.
#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn ten_servers_of_a_cloud_are_cut_over_at_once() {
    are_cut_over_at_once(10, true);
}

/// So many at once; with `back`, all of them back at once, too.
#[track_caller]
fn are_cut_over_at_once(many: usize, back: bool) {
    let env = openstack();
    let mut bed = CloudBed::unplanned(&env, "many", many);
    let on_source = usage(&env);
    let mut on_target = on_source.clone();
    let moved = 2 * i64::try_from(many).expect("not so many");
    counted(&mut on_target, "sata", -moved);
    counted(&mut on_target, "sas", moved);
    bed.discover(&["--boot-type", "sas", "--data-type", "sas"]).expect_code(0);
    expect_planned(&bed);
    set_listen(&bed);
    bed.replicate();

    let begun = Instant::now();
    let run = poolshift(["cutover", &bed.fleet.plan(), "--all", "--parallel", "10", "--yes", "--json"]);
    println!("{many} servers over after {:?}: {:?}\n{}{}", begun.elapsed(), run.code, run.stderr, run.stdout);
    let run = run.expect_code(0);
    let ends = report(&run);
    let of = |name: &str| ends.as_array().into_iter().flatten().find(|end| end["server"] == name);
    let first = run.stderr.lines().position(|line| line.ends_with(": committed")).expect("one is done first");
    for (number, server) in bed.servers.iter().enumerate() {
        let end = of(&server.name).unwrap_or_else(|| panic!("nothing is said of {}: {ends:#}", server.name));
        assert_eq!((&end["exit_code"], &end["report"]["runs_from"]), (&json!(0), &json!("target")), "{end:#}");
        let begins = run.stderr.lines().position(|line| line.ends_with(&format!("{}: syncing", server.name)));
        assert!(begins.is_some_and(|begins| begins < first), "{} waits for another\n{}", server.name, run.stderr);
        bed.expect_well(number, "target");
        let console = bed.guest_of(number).expect("it runs").console();
        assert_eq!((console.all("SHUTDOWN").count(), console.boot_ids().len()), (1, 2), "{}", server.name);
    }
    expect_usage(&env, &on_target);

    if !back {
        return;
    }
    let begun = Instant::now();
    let words = ["--all", "--parallel", "10", "--with-changes", "--yes", "--json"];
    let run = poolshift([&["rollback", &bed.fleet.plan()], &words[..]].concat());
    println!("{many} servers back after {:?}: {run:#?}", begun.elapsed());
    let ends = report(&run.expect_code(0));
    assert_eq!(ends.as_array().map(Vec::len), Some(many), "{ends:#}");
    for (number, server) in bed.servers.iter().enumerate() {
        let end = ends.as_array().into_iter().flatten().find(|end| end["server"] == server.name.as_str());
        assert_eq!(end.map(|end| &end["report"]["runs_from"]), Some(&json!("source")), "{ends:#}");
        bed.expect_well(number, "source");
    }
    expect_usage(&env, &on_source);
}
