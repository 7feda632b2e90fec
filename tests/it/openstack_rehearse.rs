//! Rehearsals of servers of a real cloud: a stand-in boots from clones that Cinder is given for a while, is judged, and
//! leaves no trace; killed anywhere, and what is somebody else's.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::cutover_bed::{Running, report};
use crate::openstack_bed::{CleanUp, CloudBed, all};
use crate::openstack_env::{OpenStackEnv, Service, openstack};
use crate::support::{Run, every_step, poolshift};

const STAND_IN: &str = "web.poolshift-rehearsal";

fn gc(bed: &CloudBed<'_>, words: &[&str]) -> Value {
    let run = poolshift(["gc", &bed.fleet.plan(), "--json"].iter().chain(words));
    println!("gc: {run:?}");
    assert!(matches!(run.code, Some(0 | 1)), "{run:?}");
    report(&run)
}

/// The stand-in of the server, as Nova has it.
#[track_caller]
fn stand_in(env: &OpenStackEnv) -> Value {
    let answer = env.tell(Service::Nova, &Method::GET, "servers/detail?all_tenants=1", &Value::Null);
    let servers = answer["servers"].as_array().expect("a list");
    let ours = servers.iter().filter(|server| server["metadata"]["poolshift-rehearsal"].is_string());
    let [server] = &ours.collect::<Vec<_>>()[..] else { panic!("{answer:#}") };
    (*server).clone()
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
    let mut kept = bed.start(0, "rehearse", &["--keep", "1h"]);
    assert!(kept.until_line(|line| line.contains(" stays until ")), "{:?}", kept.finish());
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
    bed.change_plan("limit = \"90s\"", "limit = \"40s\"");
    let failed = bed.run(0, "rehearse", &[]).expect_code(15);
    assert!(failed.stdout.contains("is NOT well") && failed.stdout.contains("within 40s"), "{failed:?}");
    bed.change_plan("limit = \"40s\"", "limit = \"90s\"");
    assert_eq!(all(&env), before);
    bed.change_plan("console = \"login as nobody:\", ", "");
    let judged = format!("check = '''{check}'''");
    bed.change_plan(&judged, "check = 'echo no >&2; exit 3'");
    if every_step() {
        let failed = bed.run(0, "rehearse", &[]).expect_code(15);
        assert!(failed.stdout.contains("exit status: 3): no"), "{failed:?}");
    }
    bed.change_plan("check = 'echo no >&2; exit 3'", "");
    let refused = bed.run(0, "rehearse", &[]);
    assert!(refused.code != Some(0) && told(&refused).contains("nothing would say whether its stand-in has booted"));
    bed.change_plan("rehearsal = {  }", "rehearsal = { check = 'true', flavor = 'none-such' }");
    let refused = bed.run(0, "rehearse", &[]);
    assert!(refused.code != Some(0) && told(&refused).contains("there is no flavor \"none-such\""));
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

#[test]
#[ignore = "needs OpenStack"]
fn a_rehearsal_of_a_cloud_s_server_that_is_killed_leaves_no_trace_for_long() {
    const PLACES: &[&str] = &[
        "cloned as of",
        "manage image",
        "write the image metadata",
        "create server",
        "was started",
        "delete server",
        "unmanage volume",
    ];
    let env = openstack();
    let mut bed = CloudBed::server(&env, "struck", ", rehearsal = { console = \"GUEST READY\" }");
    bed.replicate();
    let _clean_up = CleanUp(&bed);
    let before = all(&env);
    let tried = |place: &&&str| every_step() || ["cloned as of", "manage image", "create server"].contains(place);
    for (number, place) in PLACES.iter().filter(tried).enumerate() {
        let mut command = bed.command(0, "rehearse", &[]);
        command.env("POOLSHIFT_LOG", "poolshift=debug");
        let mut run = Running::start(command);
        let told = run.until_line(|line| line.contains(place));
        if *place == "cloned as of" {
            // What it asks for next is on its way, or is not.
            std::thread::sleep(Duration::from_millis(fastrand::u64(..400)));
        }
        println!("killed at {place:?}: {}", run.kill() && told);
        if number % 2 == 0 {
            gc(&bed, &["--yes"]);
        } else {
            bed.run(0, "rehearse", &["--json"]).expect_code(0);
        }
        assert_eq!(all(&env), before, "{place}");
    }
    bed.expect_well(0, "source");
}

#[test]
#[ignore = "needs OpenStack"]
fn a_server_to_be_is_rehearsed_with_what_a_gateway_has_for_it() {
    let env = openstack();
    let judge = ", rehearsal = { console = \"GUEST READY\", flavor = \"tiny\" }";
    let mut bed = CloudBed::gateway_of_a_server_to_be(&env, 0, judge);
    bed.note_contents(0);
    bed.replicate();
    let _clean_up = CleanUp(&bed);
    let before = all(&env);
    let done = report(&bed.run(0, "rehearse", &["--json"]).expect_code(0));
    assert!(done["passed"] == true && done["left"] == json!([]), "{done:#}");
    assert_eq!(all(&env), before);

    // One that was killed is removed as well where its plan has nobody who boots it any more.
    let mut command = bed.command(0, "rehearse", &[]);
    command.env("POOLSHIFT_LOG", "poolshift=debug");
    let mut run = Running::start(command);
    assert!(run.until_line(|line| line.contains("was started")), "{:?}", run.finish());
    run.kill();
    bed.change_plan(judge, "");
    gc(&bed, &["--yes"]);
    assert_eq!(all(&env), before);
    bed.expect_well(0, "source");
}
