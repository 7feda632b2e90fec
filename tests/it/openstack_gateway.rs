//! A running server of a real cloud that has the disks of other servers: those are switched, and it goes on. And volumes
//! that nobody has.

use std::path::Path;

use reqwest::Method;
use serde_json::{Value, json};

use crate::cutover_bed::report;
use crate::openstack_bed::{CleanUp, CloudBed, all, places};
use crate::openstack_env::{Service, openstack};

/// How the gateway names the disks of a server of the plan, beside its own two.
fn devices(server: usize) -> [&'static str; 2] {
    [["vdc", "vdd"], ["vde", "vdf"]][server]
}

/// Has the gateway's guest write to the disks of a server, all the time.
#[track_caller]
fn write_to(bed: &CloudBed<'_>, server: usize) {
    let [one, other] = devices(server);
    let done = bed.guest().command(&format!(
        "sh : >/tmp/go{server}; for d in {one} {other}; do rm -f /tmp/over-$d; (i=0; while test -e /tmp/go{server}; do \
         i=$((i+1)); dd if=/dev/urandom of=/dev/$d bs=16k count=1 seek=$((i%4000)) conv=fsync 2>/dev/null || \
         : >/tmp/bad-$d; usleep 200000; done; : >/tmp/over-$d) & done"
    ));
    assert_eq!(done.last().and_then(|record| record.field("code")), Some("0"), "{done:?}");
}

/// Has it stop that.
#[track_caller]
fn let_go_of(bed: &CloudBed<'_>, server: usize) {
    let [one, other] = devices(server);
    let done = bed.guest().command(&format!(
        "sh rm /tmp/go{server}; until test -e /tmp/over-{one} -a -e /tmp/over-{other}; do usleep 20000; done; \
         test ! -e /tmp/bad-{one} -a ! -e /tmp/bad-{other} -a $(stat -c %s /tmp/over-{one}) = 0"
    ));
    assert_eq!(done.last().and_then(|record| record.field("code")), Some("0"), "{done:?}");
}

/// The hooks of the plan: they write down that they were run, and the pause waits until it is told that the disks are
/// let go of.
fn write_hooks(folder: &Path) {
    let folder = folder.display();
    let record = format!("echo \"$POOLSHIFT_SERVER $POOLSHIFT_STEP $POOLSHIFT_VOLUMES\" >>{folder}/hooks\n");
    let pause = format!("{record}until [ -e {folder}/idle-$POOLSHIFT_SERVER ]; do sleep 0.05; done\n");
    std::fs::write(format!("{folder}/pause"), pause).expect("a hook");
    std::fs::write(format!("{folder}/resume"), record).expect("a hook");
}

fn hooks_run(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join("hooks")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Brings a server of the plan to a side, while its disks are written until its pause and those of others all the time.
#[track_caller]
fn switched_below(bed: &CloudBed<'_>, server: usize, command: &str, words: &[&str], side: &str) {
    let (folder, name) = (bed.fleet.folder(), bed.servers[server].name.as_str());
    let idle = folder.join(format!("idle-{name}"));
    let _ = std::fs::remove_file(&idle);
    let before = hooks_run(folder);
    let (acked, volumes) = (bed.guest().console().last_ack(), &bed.servers[server].volumes);
    let words: Vec<&str> = words.iter().copied().chain(["--yes", "--json"]).collect();
    let run = bed.start(server, command, &words);
    bed.env.wait_for("the pause", || if hooks_run(folder).len() > before.len() { Ok(()) } else { Err("none".into()) });
    let_go_of(bed, server);
    let at_pause = bed.guest().console().last_ack();
    std::fs::write(&idle, "").expect("it is written");
    let run = run.finish();
    println!("{command}: {run:?}");
    assert_eq!(report(&run.expect_code(0))["runs_from"], side);

    let hooks = hooks_run(folder).split_off(before.len());
    assert_eq!(hooks.len(), 2, "{hooks:?}");
    for (line, step) in hooks.iter().zip(["pause", "resume"]) {
        let volumes = line.strip_prefix(&format!("{name} {step} ")).unwrap_or_else(|| panic!("{hooks:?}"));
        let volumes: Vec<Value> = serde_json::from_str(volumes).expect("a list");
        let ids = volumes.iter().map(|volume| volume["cinder"].as_str().unwrap_or_default());
        assert!(ids.eq(bed.servers[server].volumes.iter()), "{hooks:?}");
    }
    bed.expect_well(server, side);
    for id in volumes.iter().filter(|_| side == "target") {
        let (kept, used) = (format!("sata/volume-{id}.poolshift-kept"), format!("sas/volume-{id}"));
        assert_eq!(bed.env.digest(&kept), bed.env.digest(&used), "{id}");
    }
    let console = bed.guest().console();
    assert!(acked < at_pause && at_pause < console.last_ack(), "its own disks are written all the time");
    // The names that its kernel has for them are the same, too.
    for (device, id) in devices(server).iter().zip(volumes) {
        let done = bed.guest().command(&format!("sh test $(cat /sys/block/{device}/serial) = {}", &id[..20]));
        assert_eq!(done.last().and_then(|record| record.field("code")), Some("0"), "{device}: {done:?}");
    }
    write_to(bed, server);
}

#[test]
#[ignore = "needs OpenStack"]
fn a_gateway_goes_on_while_the_disks_of_others_are_switched_below_it() {
    let env = openstack();
    let more = ", pause = \"sh FOLDER/pause\", resume = \"sh FOLDER/resume\", rehearsal = { console = \"GUEST READY\", \
                flavor = \"tiny\" }";
    let mut bed = CloudBed::gateway_of_a_server_to_be(&env, 1, more);
    write_hooks(bed.fleet.folder());
    write_to(&bed, 0);
    bed.replicate();
    let last = bed.servers.len() - 1;
    is_rehearsed(&bed, last);
    switched_below(&bed, 0, "cutover", &[], "target");
    switched_below(&bed, 0, "rollback", &["--with-changes"], "source");

    // Nobody has to let go of what nobody uses.
    std::fs::write(bed.fleet.folder().join(format!("idle-{}", bed.servers[last].name)), "").expect("it is written");
    bed.switch(last, "cutover", &[], "target");
    becomes_a_server(&bed, last);
}

/// A server that has not booted yet is rehearsed with what the gateway has for it.
#[track_caller]
fn is_rehearsed(bed: &CloudBed<'_>, server: usize) {
    let _clean_up = CleanUp(bed);
    let before = all(bed.env);
    let done = report(&bed.run(server, "rehearse", &["--json"]).expect_code(0));
    assert!(done["passed"] == true && done["left"] == json!([]), "{done:#}");
    assert_eq!(all(bed.env), before);
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn the_disks_of_two_servers_are_switched_below_a_gateway_one_after_the_other() {
    let env = openstack();
    let hooks = ", pause = \"sh FOLDER/pause\", resume = \"sh FOLDER/resume\"";
    let mut bed = CloudBed::gateway(&env, 2, hooks);
    write_hooks(bed.fleet.folder());
    write_to(&bed, 0);
    write_to(&bed, 1);
    bed.replicate();
    switched_below(&bed, 0, "cutover", &[], "target");
    switched_below(&bed, 1, "cutover", &[], "target");
    bed.expect_well(0, "target");
    switched_below(&bed, 0, "rollback", &["--with-changes"], "source");
    bed.expect_well(1, "target");
}

/// The gateway gives the disks of a server away for good, and it boots from them.
fn becomes_a_server(bed: &CloudBed<'_>, server: usize) {
    let (env, volumes) = (bed.env, &bed.servers[server].volumes);
    for id in volumes {
        let path = format!("servers/{}/os-volume_attachments/{id}", bed.guest().id);
        env.tell(Service::Nova, &Method::DELETE, &path, &Value::Null);
        env.wait_for_volume(id, "available");
    }
    let guest = bed.world.boot("it-to-be", volumes, &json!({}));
    assert_eq!(guest.images(), volumes.iter().map(|id| format!("sas/volume-{id}")).collect::<Vec<_>>());
    guest.wait_for_ack(5);
    assert_eq!(guest.oracle(), Ok(()));
}

/// Every run does this to the simulated cloud: `a_cutover_below_a_gateway_may_be_killed_anywhere`.
#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_switch_below_a_gateway_is_killed_at_every_place() {
    let env = openstack();
    let mut bed = CloudBed::gateway(&env, 1, "");
    bed.note_contents(0);
    bed.replicate();
    bed.killed_at_places(&places("openstack.detach-volume", Some("openstack.attach-volume")));
}

#[test]
#[ignore = "needs OpenStack"]
fn volumes_that_nobody_has_are_switched_and_killed_on_the_way() {
    let env = openstack();
    let mut bed = CloudBed::detached(&env, 1, "");
    bed.note_contents(0);
    bed.replicate();
    bed.killed_and_ended("openstack.retype-volume", true);
    bed.killed_and_ended("switch.retire-placeholder.target", false);
    bed.killed_at(0, "rollback", &["--with-changes"], "switch.rename-to-active.source");
    bed.switch(0, "rollback", &["--with-changes"], "source");
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_switch_of_volumes_that_nobody_has_is_killed_at_every_place() {
    let env = openstack();
    let mut bed = CloudBed::detached(&env, 1, "");
    bed.note_contents(0);
    bed.replicate();
    bed.killed_at_places(&places("openstack.reset-volume", None));
}
