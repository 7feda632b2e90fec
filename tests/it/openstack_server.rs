//! Servers of a real cloud that run from their volumes and write all the time: over, back with what they wrote, over
//! again, and rid of their sources; killed at every step; and what is refused.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::openstack_bed::CloudBed;
use crate::openstack_world::{Service, openstack};
use crate::support::every_step;

#[test]
fn a_server_of_a_cloud_goes_over_and_back_and_is_finalized() {
    let Some(env) = openstack() else { return };
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

    finalized(&bed);
}

/// It runs from its targets, and goes on when its sources are removed: as Nova and Cinder know it, as before.
#[track_caller]
fn finalized(bed: &CloudBed<'_>) {
    let env = bed.env;
    bed.run(0, "finalize", &["--yes"]).expect_code(0);
    let volumes = &bed.servers[0].volumes;
    for id in volumes {
        assert_eq!(env.images("sata", id), Vec::<String>::new());
        assert_eq!(env.images("sas", id), [format!("volume-{id}")]);
        let image = format!("sas/volume-{id}");
        assert_eq!(env.rbd(&["snap", "ls", "--all", &image]).trim(), "", "Cinder would not delete it for good");
        assert_eq!(
            env.rbd(&["image-meta", "list", &image]).lines().filter(|line| line.contains("poolshift")).count(),
            0
        );
    }
    let guest = bed.guest();
    guest.wait_for_ack(guest.console().last_ack() + 5);
    assert_eq!(guest.oracle(), Ok(()));
    env.server_action(&guest.id, &json!({"os-stop": null}));
    env.wait_for_server(&guest.id, "SHUTOFF");
    let acked = guest.console().last_ack();
    env.server_action(&guest.id, &json!({"os-start": null}));
    env.wait_for_server(&guest.id, "ACTIVE");
    guest.wait_for_ack(acked + 3);
    assert_eq!(guest.oracle(), Ok(()));
    assert_eq!(guest.images(), volumes.iter().map(|id| format!("sas/volume-{id}")).collect::<Vec<_>>());

    // And it ends as any other: one volume with it, as it was told, and the other by itself.
    bed.world.delete_server(&guest.id);
    bed.world.delete_volume(&volumes[0]);
    for id in volumes {
        env.wait_for("the end of its image", || match env.images("sas", id) {
            left if left.is_empty() => Ok(()),
            left => Err(format!("{left:?}")),
        });
        assert!(!env.rbd(&["trash", "ls", "sas"]).contains(id.as_str()), "it was put into the trash");
    }
}

/// The places at which a cutover is killed: some of its phases, and steps of what is done with a volume.
fn places() -> &'static [&'static str] {
    const ALL: &[&str] = &[
        ": syncing",
        ": converged",
        ": quiescing",
        "stop server",
        ": final delta",
        ": verifying",
        ": swapping",
        "shelve server",
        "step=Hide(Source)",
        "step=StandIn(Source)",
        "step=Retype",
        "retype volume",
        "step=Aside(Target)",
        "step=Place(Target)",
        "step=Done",
        ": resuming",
        "unshelve server",
        ": committed",
    ];
    // All of a volume's steps are killed at with volumes that nobody has, which takes less.
    if every_step() { ALL } else { &["shelve server", "retype volume", "unshelve server"] }
}

#[test]
fn a_cutover_of_a_cloud_s_server_that_is_killed_is_finished_or_undone() {
    let Some(env) = openstack() else { return };
    let mut bed = CloudBed::server(&env, "kill", "");
    bed.replicate();
    let mut undo = false;
    for place in places() {
        for back in [false, true] {
            if back && !every_step() {
                continue;
            }
            undo = !undo;
            let killed = killed_at(&bed, 0, "cutover", &[], place);
            println!("killed at {place:?}: {killed}; undone: {undo}");
            let ended = bed.brought_to_an_end(0, None, undo);
            println!("it is {ended}");
            if back && ended == "finished" {
                let killed = killed_at(&bed, 0, "rollback", &["--with-changes"], place);
                println!("its way back killed at {place:?}: {killed}");
            }
            bed.bring_back(0);
        }
    }
    bed.expect_well(0, "source");
}

/// Starts a command and kills it once it has told a line with that; says whether it was killed.
pub(crate) fn killed_at(bed: &CloudBed<'_>, server: usize, command: &str, words: &[&str], place: &str) -> bool {
    let words: Vec<&str> = words.iter().copied().chain(["--yes"]).collect();
    let mut command = bed.command(server, command, &words);
    command.env("POOLSHIFT_LOG", "poolshift=debug");
    let mut run = crate::cutover_bed::Running::start(command);
    let told = run.until_line(|line| line.trim_end().ends_with(place) || line.contains(&format!("{place} ")));
    run.kill() && told
}
