//! Servers of a real cloud that run from their volumes and write all the time: over, back with what they wrote, over
//! again, and rid of their sources; killed at every step; and what is refused.

use serde_json::json;

use crate::cutover_bed::stopped_at;
use crate::openstack_bed::{CloudBed, places};
use crate::openstack_env::openstack;

/// A server that is stopped by somebody while it is brought over goes over, and runs there.
#[track_caller]
fn stopped_on_the_way(bed: &CloudBed<'_>) {
    let run = stopped_at(bed.command(0, "cutover", &["--yes", "--json"]), "cutover.syncing");
    bed.env.server_action(&bed.guest().id, &json!({"os-stop": null}));
    run.resume();
    let run = run.finish();
    println!("stopped while it was brought over: {run:?}");
    assert_eq!(bed.brought_to_an_end(0, run.code, false), "over", "{run:?}");
    bed.bring_back(0);
}

/// A server that its owner has stopped is left alone.
#[track_caller]
fn stopped_before(bed: &CloudBed<'_>) {
    let (env, id) = (bed.env, &bed.guest().id);
    env.server_action(id, &json!({"os-stop": null}));
    env.wait_for_server(id, "SHUTOFF");
    let refused = bed.run(0, "cutover", &["--yes"]).expect_code(14);
    assert!(refused.stderr.contains("SHUTOFF"), "{}", refused.stderr);
    assert_eq!(env.server(id)["status"], "SHUTOFF");
    let acked = bed.guest().console().last_ack();
    env.server_action(id, &json!({"os-start": null}));
    env.wait_for_server(id, "ACTIVE");
    bed.guest().wait_for_ack(acked + 2);
}

#[test]
#[ignore = "needs OpenStack"]
fn a_cutover_of_a_cloud_s_server_that_is_killed_is_finished_or_undone() {
    let env = openstack();
    let mut bed = CloudBed::server(&env, "kill", "");
    bed.replicate();
    // With one volume in the other pool, and the other one not.
    bed.killed_and_ended("switch.rename-to-active.target", true);
    // Nova brings it back already, and nobody noted that.
    bed.killed_and_ended("openstack.unshelve-server", false);
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_cutover_of_a_cloud_s_server_is_killed_at_every_place() {
    let env = openstack();
    let mut bed = CloudBed::server(&env, "kills", "");
    bed.replicate();
    stopped_on_the_way(&bed);
    stopped_before(&bed);
    bed.killed_at_places(&places("openstack.shelve-server", Some("openstack.unshelve-server")));
}

#[test]
#[ignore = "needs OpenStack"]
fn what_stands_in_the_way_of_volumes_is_named_and_left_alone() {
    let env = openstack();
    let mut bed = CloudBed::detached(&env, 1, "");
    bed.note_contents(0);
    bed.replicate();
    let id = bed.servers[0].volumes[1].clone();
    // The volume is named, and what else has a name or a state of its own.
    let refused = |because: &str| {
        let run = bed.run(0, "cutover", &["--yes"]).expect_code(14);
        assert!(run.stderr.contains(&format!("error    volume {id} ")) && run.stderr.contains(because), "{run:?}");
        assert!(!bed.is_begun(0), "{run:?}");
        assert_eq!(env.images("sata", &id), [format!("volume-{id}")], "nothing was begun");
    };

    // What a failing migration of Cinder's would delete.
    let foreign = format!("sas/volume-{id}");
    env.rbd(&["create", &foreign, "--size", "7M"]);
    env.rbd(&["image-meta", "set", &foreign, "whose", "somebody's"]);
    refused("does not know");
    assert_eq!(env.rbd(&["image-meta", "get", &foreign, "whose"]).trim(), "somebody's");
    env.rbd(&["rm", "--no-progress", &foreign]);

    let snapshot = bed.world.snapshot(&id);
    refused(&snapshot);
    bed.world.remove_snapshot(&snapshot);

    env.volume_action(&id, &json!({"os-reset_status": {"status": "maintenance"}}));
    refused("maintenance");
    env.volume_action(&id, &json!({"os-reset_status": {"status": "available"}}));

    let other = bed.world.volume_type("sata");
    let retype = |to: &str| {
        env.volume_action(&id, &json!({"os-retype": {"new_type": to, "migration_policy": "never"}}));
        env.wait_for("its other type", || {
            let shown = env.volume(&id);
            let done = shown["volume_type"] == to && shown["status"] == "available";
            if done { Ok(()) } else { Err(format!("{} {}", shown["volume_type"], shown["status"])) }
        });
    };
    retype(&other);
    refused(&other);
    retype("sata");

    // And then nothing does.
    bed.switch(0, "cutover", &[], "target");
    env.rbd(&["create", &format!("sata/volume-{id}"), "--size", "7M"]);
    bed.run(0, "rollback", &["--with-changes", "--yes"]).expect_code(14);
    env.rbd(&["rm", "--no-progress", &format!("sata/volume-{id}")]);
    bed.switch(0, "rollback", &["--with-changes"], "source");
}
