//! Servers of a real cloud that run from their volumes and write all the time: over, back with what they wrote, over
//! again, and rid of their sources; killed at every step; and what is refused.

use std::time::Instant;

use serde_json::json;

use crate::openstack_bed::{CloudBed, places};
use crate::openstack_env::openstack;
use crate::support::every_step;

#[test]
#[ignore = "needs OpenStack"]
fn a_server_of_a_cloud_goes_over_and_back_and_is_finalized() {
    let env = openstack();
    let mut bed = CloudBed::server(&env, "over", "");
    bed.guest().wait_for_ack(5);
    bed.replicate();
    let begun = Instant::now();
    let acked = bed.guest().console().last_ack();
    bed.switch(0, "cutover", &[], "target");
    println!("over after {:?}", begun.elapsed());
    assert!(bed.guest().console().last_ack() > acked);
    assert_eq!(bed.guest().console().all("SHUTDOWN").count(), 1, "it was asked to stop, and not just ended");
    bed.switch(0, "rollback", &["--with-changes"], "source");
    bed.switch(0, "cutover", &[], "target");
    let console = bed.guest().console();
    assert_eq!(console.all("SHUTDOWN").count(), 3);
    assert_eq!(console.boot_ids().len(), 4);
    bed.finalized(0);
    bed.ends_as_any_other(0);
}

/// A server that is stopped by somebody while it is brought over goes over, and runs there.
#[track_caller]
fn stopped_on_the_way(bed: &CloudBed<'_>) {
    let mut run = bed.start(0, "cutover", &["--yes", "--json"]);
    assert!(run.until("syncing"), "{:?}", run.finish());
    bed.env.server_action(&bed.guest().id, &json!({"os-stop": null}));
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
    assert!(refused.stderr.contains("it is SHUTOFF, and has to be ACTIVE"), "{}", refused.stderr);
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
    if every_step() {
        stopped_on_the_way(&bed);
    }
    stopped_before(&bed);
    // All of a volume's steps are killed at with volumes that nobody has, which takes less.
    let all = places("shelve server", Some("unshelve server"));
    bed.killed_at_places(if every_step() { &all } else { &["unshelve server", "retype volume"] });
}

#[test]
#[ignore = "needs OpenStack"]
fn what_stands_in_the_way_of_volumes_is_named_and_left_alone() {
    let env = openstack();
    let mut bed = CloudBed::detached(&env, 1, "");
    bed.note_contents(0);
    bed.replicate();
    let id = bed.servers[0].volumes[1].clone();
    let refused = |because: &str| {
        let run = bed.run(0, "cutover", &["--yes"]).expect_code(14);
        assert!(run.stdout.contains(because) || run.stderr.contains(because), "{run:?}");
        assert!(!run.stderr.contains("quiescing"), "{run:?}");
        assert_eq!(env.images("sata", &id), [format!("volume-{id}")], "nothing was begun");
    };

    // What a failing migration of Cinder's would delete.
    let foreign = format!("sas/volume-{id}");
    env.rbd(&["create", &foreign, "--size", "7M"]);
    env.rbd(&["image-meta", "set", &foreign, "whose", "somebody's"]);
    refused("an image that poolshift does not know has its name in the target's pool");
    assert_eq!(env.rbd(&["image-meta", "get", &foreign, "whose"]).trim(), "somebody's");
    env.rbd(&["rm", "--no-progress", &foreign]);

    let snapshot = bed.world.snapshot(&id);
    refused(&snapshot);
    bed.world.remove_snapshot(&snapshot);

    env.volume_action(&id, &json!({"os-reset_status": {"status": "maintenance"}}));
    refused("it is maintenance, and not available");
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
    refused("somebody has retyped it");
    retype("sata");

    // And then nothing does.
    bed.switch(0, "cutover", &[], "target");
    env.rbd(&["create", &format!("sata/volume-{id}"), "--size", "7M"]);
    let run = bed.run(0, "rollback", &["--with-changes", "--yes"]).expect_code(14);
    assert!(
        format!("{run:?}").contains("an image that poolshift does not know has its name in the source's pool"),
        "{run:?}"
    );
    env.rbd(&["rm", "--no-progress", &format!("sata/volume-{id}")]);
    bed.switch(0, "rollback", &["--with-changes"], "source");
}
