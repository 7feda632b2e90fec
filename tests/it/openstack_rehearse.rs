//! Rehearsals of servers of a real cloud: a stand-in boots from clones that Cinder is given for a while, is judged, and
//! leaves no trace; killed anywhere, and what is somebody else's.

use reqwest::Method;
use serde_json::{Value, json};

use crate::cutover_bed::{report, run_killed_at};
use crate::openstack_bed::{CleanUp, CloudBed, all};
use crate::openstack_env::{OpenStackEnv, Service, openstack};
use crate::support::{Run, poolshift};

const STAND_IN: &str = "web.poolshift-rehearsal";

fn gc(bed: &CloudBed<'_>, words: &[&str]) -> Value {
    let run = poolshift(["gc", &bed.fleet.plan(), "--json"].iter().chain(words));
    println!("gc: {run:?}");
    assert!(matches!(run.code, Some(0 | 1)), "{run:?}");
    report(&run)
}

/// The stand-in of the server, as Nova has it when it runs.
#[track_caller]
fn stand_in(env: &OpenStackEnv) -> Value {
    env.wait_for("a stand-in that runs", || {
        let answer = env.get(Service::Nova, "servers/detail");
        let servers = answer["servers"].as_array().expect("a list");
        let mut ours = servers.iter().filter(|server| server["metadata"]["poolshift-rehearsal"].is_string());
        match (ours.next(), ours.next()) {
            (Some(server), None) if server["status"] == "ACTIVE" => Ok(server.clone()),
            _ => Err(answer.to_string()),
        }
    })
}

#[test]
#[ignore = "needs OpenStack"]
fn a_cloud_s_server_is_rehearsed_and_leaves_no_trace() {
    let env = openstack();
    let check = "grep -q GUEST.BOOT $POOLSHIFT_CONSOLE && ! grep -q GUEST.LOSS $POOLSHIFT_CONSOLE && \
                 echo $POOLSHIFT_STAND_IN";
    let judge = format!(", rehearsal = {{ console = \"GUEST READY\", check = '''{check}''' }}");
    let mut bed = CloudBed::server(&env, "stand", &judge);
    let id = bed.guest().id.clone();
    bed.guest().wait_for_ack(3);
    bed.replicate();
    let _clean_up = CleanUp(&bed);

    // Somebody else's, of the same names: the server itself, and a volume.
    let path = format!("servers/{id}");
    let name = env.server(&id)["name"].clone();
    env.tell(Service::Nova, &Method::PUT, &path, &json!({"server": {"name": STAND_IN}}));
    let clones = bed.servers[0].volumes.iter().map(|id| format!("poolshift-{id}.poolshift-rehearsal"));
    let clones: Vec<String> = clones.collect();
    let foreign = bed.world.volumes(&clones[..1]);
    let before = all(&env);
    let acked = bed.guest().console().last_ack();
    let boots = bed.guest().console().boot_ids().len();

    let done = report(&bed.run(0, "rehearse", &["--json"]).expect_code(0));
    assert!(done["passed"] == true && done["left"] == json!([]), "{done:#}");
    let found = done["found"].as_str().expect("it says why");
    assert!(found.starts_with("its console showed \"GUEST READY\" after ") && !found.contains(&id), "{done:#}");
    assert_eq!(all(&env), before);
    assert!(bed.guest().console().last_ack() > acked, "the server went on");

    // One that is looked at, and killed.
    let kept = bed.start(0, "rehearse", &["--keep", "1h"]);
    let shown = stand_in(&env);
    println!("{shown:#}");
    assert_eq!((&shown["name"], &shown["status"]), (&json!(STAND_IN), &json!("ACTIVE")));
    assert_eq!((&shown["addresses"], &shown["flavor"]), (&json!({}), &env.server(&id)["flavor"]));
    assert_eq!(shown["metadata"]["poolshift-server"], "web");
    let images = crate::vm::rbd_sources(
        &env.virsh(&["dumpxml", shown["OS-EXT-SRV-ATTR:instance_name"].as_str().expect("an administrator sees it")]),
    );
    let had = shown["os-extended-volumes:volumes_attached"].as_array().expect("a list").clone();
    assert_eq!(had.len(), 2, "{shown:#}");
    for (number, image) in images.iter().enumerate() {
        let volume = env.volume(image.strip_prefix("sas/volume-").expect("it is on the target"));
        assert_eq!(volume["name"], clones[number].as_str(), "{images:?}");
        assert_eq!((&volume["volume_type"], &volume["bootable"]), (&json!("sas"), &json!((number == 0).to_string())));
        let original = env.volume(&bed.servers[0].volumes[number]);
        assert_eq!(volume["volume_image_metadata"], original["volume_image_metadata"]);
    }
    assert_eq!(bed.run(0, "rehearse", &[]).expect_code(6).stdout, "");
    assert_eq!(gc(&bed, &[])["rehearsals"], json!([]), "it is under way");
    assert!(kept.kill());
    let left = gc(&bed, &[]);
    assert_eq!(left["rehearsals"][0]["stand_in"], STAND_IN, "{left:#}");
    assert_eq!(left["rehearsals"][0]["clones"].as_array().map(Vec::len), Some(2), "{left:#}");
    assert_eq!(gc(&bed, &["--yes"])["rehearsals"][0]["removed"], true);
    assert_eq!(all(&env), before);

    // One that can't boot so far: in time, and for want of anything to see it by.
    bed.change_plan("GUEST READY", "login as nobody:");
    // Long enough for a busy cloud to start it.
    bed.change_plan("limit = \"180s\"", "limit = \"60s\"");
    let failed = bed.run(0, "rehearse", &[]).expect_code(15);
    assert!(failed.stdout.contains("60s"), "{failed:?}");
    bed.change_plan("limit = \"60s\"", "limit = \"180s\"");
    assert_eq!(all(&env), before);
    bed.change_plan("console = \"login as nobody:\", ", "");
    let judged = format!("check = '''{check}'''");
    bed.change_plan(&judged, "");
    let refused = bed.run(0, "rehearse", &[]);
    assert!(refused.code != Some(0), "nothing would say whether its stand-in has booted: {refused:?}");
    bed.change_plan("rehearsal = {  }", "rehearsal = { check = 'true', flavor = 'none-such' }");
    let refused = bed.run(0, "rehearse", &[]);
    assert!(refused.code != Some(0) && told(&refused).contains("none-such"));
    assert_eq!(all(&env), before);

    assert_eq!(env.volume(&foreign[0])["status"], "available");
    env.tell(Service::Nova, &Method::PUT, &path, &json!({"server": {"name": name}}));
    assert_eq!(bed.guest().console().boot_ids().len(), boots, "the server itself was never touched");
    bed.expect_well(0, "source");
    // Targets that no stand-in has touched.
    bed.switch(0, "cutover", &["--verify", "full"], "target");
}

fn told(run: &Run) -> String {
    format!("{}{}", run.stdout, run.stderr)
}

/// A rehearsal is killed, and the next one, or `gc`, leaves nothing of it.
#[track_caller]
fn is_killed(bed: &CloudBed<'_>, place: &str, by_gc: bool) {
    let before = all(bed.env);
    run_killed_at(bed.command(0, "rehearse", &[]), place);
    if by_gc {
        assert_eq!(gc(bed, &["--yes"])["rehearsals"][0]["removed"], true);
    } else {
        bed.run(0, "rehearse", &["--json"]).expect_code(0);
    }
    assert_eq!(all(bed.env), before, "{place}");
}

#[test]
#[ignore = "needs OpenStack"]
fn a_rehearsal_of_a_cloud_s_server_that_is_killed_leaves_no_trace_for_long() {
    let env = openstack();
    let mut bed = CloudBed::server(&env, "struck", ", rehearsal = { console = \"GUEST READY\" }");
    bed.replicate();
    let _clean_up = CleanUp(&bed);
    is_killed(&bed, "rehearsal.cloned", true);
    is_killed(&bed, "openstack.create-server", true);
    bed.expect_well(0, "source");
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_rehearsal_of_a_cloud_s_server_is_killed_at_every_place() {
    const PLACES: &[&str] = &[
        "rehearsal.cloned",
        "openstack.manage-image",
        "openstack.manage-image#2",
        "openstack.write-the",
        "openstack.create-server",
        "rehearsal.launched",
        "rehearsal.judged",
        "openstack.delete-server",
        "openstack.unmanage-volume",
        "openstack.unmanage-volume#2",
    ];
    let env = openstack();
    let mut bed = CloudBed::server(&env, "strikes", ", rehearsal = { console = \"GUEST READY\" }");
    bed.replicate();
    let _clean_up = CleanUp(&bed);
    for place in PLACES {
        is_killed(&bed, place, true);
        is_killed(&bed, place, false);
    }
    bed.expect_well(0, "source");
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_rehearsal_that_nobody_plans_any_more_is_removed() {
    let env = openstack();
    let judge = ", rehearsal = { console = \"GUEST READY\", flavor = \"tiny\" }";
    let mut bed = CloudBed::gateway_of_a_server_to_be(&env, 0, judge);
    bed.note_contents(0);
    bed.replicate();
    let _clean_up = CleanUp(&bed);
    let before = all(&env);
    run_killed_at(bed.command(0, "rehearse", &[]), "openstack.create-server");
    bed.change_plan(judge, "");
    gc(&bed, &["--yes"]);
    assert_eq!(all(&env), before);
    bed.expect_well(0, "source");
}
