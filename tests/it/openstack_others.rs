//! Somebody else who is at work on the same volumes and servers, before a switch, in its middle, and while they are
//! replicated: it ends in one consistent world, or says what a person has to look at.

use reqwest::Method;
use serde_json::{Value, json};

use crate::cutover_bed::stopped_at;
use crate::openstack_bed::CloudBed;
use crate::openstack_env::{OpenStackEnv, Service, openstack, openstack_alone};
use crate::openstack_world::unique;
use crate::support::Run;

/// What a command was told, and what the test does while it is stopped at a failpoint.
fn touched_at(bed: &CloudBed<'_>, place: &str, touch: impl FnOnce()) -> Run {
    let run = stopped_at(bed.command(0, "cutover", &["--yes", "--json"]), place);
    touch();
    run.resume();
    let run = run.finish();
    println!("touched at {place}: {:?}\n{}\n{}", run.code, run.stderr, run.stdout);
    run
}

/// Somebody gives a volume another type of the same backend.
#[track_caller]
fn retype(bed: &CloudBed<'_>, id: &str, to: &str) {
    bed.env.volume_action(id, &json!({"os-retype": {"new_type": to, "migration_policy": "never"}}));
    bed.env.wait_for("its other type", || {
        let shown = bed.env.volume(id);
        let done = shown["volume_type"] == to && shown["status"] != "retyping";
        if done { Ok(()) } else { Err(format!("{} {}", shown["volume_type"], shown["status"])) }
    });
}

fn reset(bed: &CloudBed<'_>, id: &str, status: &str) {
    bed.env.volume_action(id, &json!({"os-reset_status": {"status": status}}));
}

/// Somebody attaches a volume to what Cinder takes for a server, and says how to take it away again.
fn attach(bed: &CloudBed<'_>, id: &str) -> String {
    let elsewhere = "00000000-0000-4000-8000-000000000001";
    let body = json!({"os-attach": {"instance_uuid": elsewhere, "mountpoint": "/dev/vdb", "mode": "rw"}});
    bed.env.volume_action(id, &body);
    let shown = bed.env.wait_for_volume(id, "in-use");
    shown["attachments"][0]["attachment_id"].as_str().expect("it is attached").to_owned()
}

fn detach(bed: &CloudBed<'_>, id: &str, attachment: &str) {
    let path = format!("attachments/{attachment}");
    bed.env.tell(Service::Cinder, &Method::DELETE, &path, &Value::Null);
    bed.env.wait_for_volume(id, "available");
}

/// What has not begun, or went back, has left everything where it was.
#[track_caller]
fn is_back(bed: &CloudBed<'_>, run: &Run) {
    assert_ne!(run.code, Some(0), "{run:?}");
    let end = bed.brought_to_an_end(0, run.code, true);
    assert!(["back", "refused", "undone"].contains(&end), "{end}: {run:?}");
    bed.expect_well(0, "source");
}

#[track_caller]
fn is_over(bed: &CloudBed<'_>, run: Run) {
    run.expect_code(0);
    bed.expect_well(0, "target");
    bed.bring_back(0);
}

#[test]
#[ignore = "needs OpenStack"]
fn somebody_touches_volumes_that_are_switched() {
    let env = openstack();
    let mut bed = CloudBed::detached(&env, 1, "");
    bed.note_contents(0);
    bed.replicate();
    let id = bed.servers[0].volumes[1].clone();
    let other = bed.world.volume_type("sata");

    // Before it is kept from everybody.
    let run = touched_at(&bed, "cutover.syncing", || retype(&bed, &id, &other));
    retype(&bed, &id, "sata");
    is_back(&bed, &run);

    // In its midst: what Cinder refuses for a volume in maintenance, and what an administrator does all the same.
    let run = touched_at(&bed, "switch.retype", || {
        let refused = |path: &str, body: &Value| {
            let (status, answer) = env.ask(Service::Cinder, &Method::POST, path, Some(body)).expect("it answers");
            assert!((400..500).contains(&status), "{path} {body}: {status} {answer}");
        };
        let action = format!("volumes/{id}/action");
        refused("snapshots", &json!({"snapshot": {"volume_id": id, "force": true}}));
        refused(&action, &json!({"os-extend": {"new_size": 2}}));
        refused(&action, &json!({"os-retype": {"new_type": other, "migration_policy": "never"}}));
        refused(&action, &json!({"os-reserve": null}));
        reset(&bed, &id, "available");
    });
    is_over(&bed, run);

    // It grows before the last delta: what is carried over has the new size.
    let run = touched_at(&bed, "cutover.syncing", || {
        env.volume_action(&id, &json!({"os-extend": {"new_size": 2}}));
        env.wait_for_volume(&id, "available");
    });
    bed.look_anew();
    bed.note_contents_on(0, if run.code == Some(0) { "target" } else { "source" });
    let end = bed.brought_to_an_end(0, run.code, false);
    println!("extended before the last delta: it is {end}");
    bed.bring_back(0);
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn somebody_snapshots_or_attaches_volumes_before_they_are_switched() {
    let env = openstack();
    let mut bed = CloudBed::detached(&env, 1, "");
    bed.note_contents(0);
    bed.replicate();
    let id = bed.servers[0].volumes[1].clone();
    let mut snapshot = None;
    let run = touched_at(&bed, "cutover.syncing", || snapshot = Some(bed.world.snapshot(&id)));
    bed.world.remove_snapshot(&snapshot.expect("it was made"));
    is_back(&bed, &run);
    let mut attachment = None;
    let run = touched_at(&bed, "cutover.syncing", || attachment = Some(attach(&bed, &id)));
    assert_eq!(env.volume(&bed.servers[0].volumes[0])["status"], "available", "it is kept from nobody any more");
    detach(&bed, &id, &attachment.expect("it was made"));
    // Cinder writes to it how it was attached.
    bed.look_anew();
    assert_eq!(run.code, Some(12), "{run:?}");
    is_back(&bed, &run);
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn somebody_breaks_volumes_that_are_switched() {
    let env = openstack();
    let mut bed = CloudBed::detached(&env, 1, "");
    bed.note_contents(0);
    bed.replicate();
    let id = bed.servers[0].volumes[1].clone();
    let placeholder = ["sata", "sas"].map(|pool| format!("{pool}/volume-{id}"));
    let remove = |image: &str| drop(env.rbd(&["rm", "--no-progress", image]));
    // The first volume's placeholder is retired at the first such place, the touched one's at the second.
    let run = touched_at(&bed, "switch.retire-placeholder.target#2", || remove(&placeholder[1]));
    is_over(&bed, run);
    let run = touched_at(&bed, "switch.rename-to-active.target", || reset(&bed, &id, "available"));
    is_over(&bed, run);
    let run = touched_at(&bed, "switch.retype", || reset(&bed, &id, "error"));
    is_over(&bed, run);
    let run = touched_at(&bed, "switch.retype#2", || remove(&placeholder[0]));
    let end = bed.brought_to_an_end(0, run.code, true);
    println!("without its placeholder: it is {end}");
    bed.bring_back(0);
    let mut attachment = None;
    let run = touched_at(&bed, "switch.retype", || {
        reset(&bed, &id, "available");
        attachment = Some(attach(&bed, &id));
    });
    assert_ne!(run.code, Some(0), "{run:?}");
    detach(&bed, &id, &attachment.expect("it was made"));
    bed.look_anew();
    // It was on its way back, which is where the next command brings it, whichever that is.
    let end = bed.brought_to_an_end(0, run.code, true);
    println!("attached in its midst: it is {end}");
    bed.bring_back(0);
}

/// Nova, which fails to take a server from its host: it has shut it down, and says for ever after that it runs. Nova's
/// host stands still until the server's task was taken from it, so that it fails every time.
struct FailingToShelve<'a> {
    env: &'a OpenStackEnv,
    server: String,
}

impl<'a> FailingToShelve<'a> {
    fn begin(env: &'a OpenStackEnv, server: &str) -> Self {
        env.signal("nova-compute", "STOP");
        Self { env, server: server.to_owned() }
    }

    /// Nova was asked to shelve it.
    #[track_caller]
    fn fail(self) {
        let (env, server) = (self.env, self.server.clone());
        assert_eq!(env.server(&server)["OS-EXT-STS:task_state"], "shelving");
        env.server_action(&server, &json!({"os-resetState": {"state": "active"}}));
        drop(self);
        // What it does with the domain it does all the same, and fails when it would write down that it is done.
        env.wait_for("the end of its domain", || match std::fs::exists(env.console_file(&server)) {
            Ok(false) => Ok(()),
            there => Err(format!("its console is there: {there:?}")),
        });
        let shown = env.server(&server);
        assert_eq!((&shown["status"], &shown["OS-EXT-STS:task_state"]), (&json!("ACTIVE"), &Value::Null), "{shown:#}");
    }
}

impl Drop for FailingToShelve<'_> {
    fn drop(&mut self) {
        // Of a test that failed, too: the others have the same Nova. A second panic would say nothing of the first.
        let go_on = || self.env.signal("nova-compute", "CONT");
        if std::thread::panicking() {
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(go_on));
        } else {
            go_on();
        }
    }
}

/// Every run does this to the simulated cloud, under the same name.
#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_server_that_its_cloud_fails_to_shelve_is_switched_or_comes_back() {
    let env = openstack_alone();
    let mut bed = CloudBed::server(&env, "half", "");
    bed.replicate();
    let server = bed.guest().id.clone();
    let failing = FailingToShelve::begin(&env, &server);
    let run = touched_at(&bed, "openstack.shelve-server", || failing.fail());
    is_over(&bed, run);
    // And poolshift is killed there.
    let failing = FailingToShelve::begin(&env, &server);
    bed.killed_at(0, "cutover", &[], "openstack.shelve-server");
    failing.fail();
    assert_eq!(bed.brought_to_an_end(0, None, true), "undone");
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn somebody_touches_a_server_that_is_switched() {
    let env = openstack();
    let mut bed = CloudBed::server(&env, "others", "");
    bed.replicate();
    let (server, data) = (bed.guest().id.clone(), bed.servers[0].volumes[1].clone());
    let unshelve = |api: &OpenStackEnv, owner: bool| {
        let (path, body) = (format!("servers/{server}/action"), json!({"unshelve": null}));
        match owner {
            true => api.ask_as_owner(&Method::POST, &path, Some(&body)),
            false => api.ask(Service::Nova, &Method::POST, &path, Some(&body)),
        }
        .expect("it answers")
        .0
    };

    // Its owner can't.
    let run = touched_at(&bed, "switch.retire-placeholder.target", || {
        env.wait_for_server(&server, "SHELVED_OFFLOADED");
        assert_eq!(env.server(&server)["locked"], true);
        assert_eq!(unshelve(&env, true), 409);
    });
    is_over(&bed, run);

    // An administrator can.
    for place in ["switch.retire-placeholder.target", "switch.rename-to-active.target"] {
        let run = touched_at(&bed, place, || {
            env.wait_for_server(&server, "SHELVED_OFFLOADED");
            println!("unshelved: {}", unshelve(&env, false));
            env.wait_for("the end of what was asked of Nova", || match &env.server(&server)["OS-EXT-STS:task_state"] {
                Value::Null => Ok(()),
                task => Err(task.to_string()),
            });
        });
        let end = bed.brought_to_an_end(0, run.code, false);
        println!("unshelved at {place}: it is {end}");
        bed.bring_back(0);
    }

    let other = bed.world.volume_type("sata");
    let run = touched_at(&bed, "cutover.syncing", || retype(&bed, &data, &other));
    retype(&bed, &data, "sata");
    is_back(&bed, &run);
}

/// Waits until `status` shows drift of a kind, by a part of what it says, and that it holds the replication.
#[track_caller]
fn shows(bed: &CloudBed<'_>, text: &str, holds: bool) {
    bed.fleet.wait_for_server(0, text, |status| {
        let drift = status["drift"].as_array().into_iter().flatten();
        let shown = drift.filter_map(Value::as_str).any(|drift| drift.contains(text));
        shown && (!holds || status["activity"] == "held" && status["last_error"].to_string().contains(text))
    });
}

#[test]
#[ignore = "needs OpenStack"]
fn a_volume_that_somebody_retypes_while_it_is_replicated_is_shown() {
    let env = openstack();
    let mut bed = CloudBed::detached(&env, 1, "");
    bed.replicate();
    let id = bed.servers[0].volumes[1].clone();
    let other = bed.world.volume_type("sata");
    retype(&bed, &id, &other);
    bed.fleet.start_daemon();
    shows(&bed, "somebody has given volume", true);
    bed.fleet.stop_daemon();
    // And it goes on when a person has settled that.
    retype(&bed, &id, "sata");
    bed.fleet.start_daemon();
    bed.fleet.wait_for_server(0, "no drift", |status| {
        status["drift"].as_array().is_none_or(Vec::is_empty) && status["point"].is_object()
    });
    bed.fleet.stop_daemon();
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn what_somebody_does_with_volumes_while_they_are_replicated_is_shown() {
    let env = openstack();
    let mut bed = CloudBed::detached(&env, 1, "");
    bed.replicate();
    let id = bed.servers[0].volumes[1].clone();
    let attachment = attach(&bed, &id);
    bed.fleet.start_daemon();
    shows(&bed, "it was attached to server", false);
    bed.fleet.stop_daemon();
    detach(&bed, &id, &attachment);

    // It grows, and goes on.
    bed.fleet.start_daemon();
    env.volume_action(&id, &json!({"os-extend": {"new_size": 2}}));
    env.wait_for_volume(&id, "available");
    env.wait_for("a target of the new size", || {
        let shown = env.rbd(&["info", "--format", "json", &format!("sas/poolshift-{id}")]);
        let shown: Value = serde_json::from_str(&shown).expect("JSON");
        if shown["size"] == 2_u64 << 30 { Ok(()) } else { Err(shown["size"].to_string()) }
    });
    bed.fleet.stop_daemon();

    // To the other pool, by Cinder's own copy: its source is gone.
    env.volume_action(&id, &json!({"os-retype": {"new_type": "sas", "migration_policy": "on-demand"}}));
    env.wait_for("its other type", || {
        let shown = env.volume(&id);
        let done = shown["volume_type"] == "sas" && shown["status"] == "available";
        if done { Ok(()) } else { Err(format!("{} {}", shown["volume_type"], shown["status"])) }
    });
    bed.fleet.start_daemon();
    shows(&bed, "somebody has given volume", true);
    let refused = bed.run(0, "cutover", &["--yes"]);
    assert_ne!(refused.code, Some(0), "{refused:?}");
    bed.fleet.stop_daemon();

    // It is gone.
    let gone = bed.servers[0].volumes[0].clone();
    let _ =
        env.ask(Service::Cinder, &Method::POST, &format!("volumes/{gone}/action"), Some(&json!({"os-unmanage": {}})));
    env.wait_for("the end of a volume", || {
        match env.ask(Service::Cinder, &Method::GET, &format!("volumes/{gone}"), None)? {
            (404, _) => Ok(()),
            (_, shown) => Err(shown["volume"]["status"].to_string()),
        }
    });
    bed.fleet.start_daemon();
    shows(&bed, "the cloud has no volume", true);
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn what_somebody_does_with_a_server_while_it_is_replicated_is_shown() {
    let env = openstack();
    let mut bed = CloudBed::server(&env, "drift", "");
    bed.replicate();
    let server = bed.guest().id.clone();
    let [more] = &bed.world.volumes(&[unique("more")])[..] else { panic!("one") };
    bed.world.attach(&server, more);
    bed.fleet.start_daemon();
    shows(&bed, "that the plan does not have", false);
    bed.fleet.stop_daemon();
    for id in [more, &bed.servers[0].volumes[1]] {
        let path = format!("servers/{server}/os-volume_attachments/{id}");
        env.tell(Service::Nova, &Method::DELETE, &path, &Value::Null);
        env.wait_for_volume(id, "available");
    }
    bed.fleet.start_daemon();
    shows(&bed, "is not with its server", false);
    bed.fleet.stop_daemon();
    bed.run(0, "cutover", &["--yes"]).expect_code(14);
    bed.world.delete_server(&server);
    bed.fleet.start_daemon();
    shows(&bed, "the cloud has no server", false);
}
