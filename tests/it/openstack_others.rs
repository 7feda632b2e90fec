//! Somebody else who is at work on the same volumes and servers, before a switch, in its middle, and while they are
//! replicated: it ends in one consistent world, or says what a person has to look at.

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::cutover_bed::Running;
use crate::openstack_bed::CloudBed;
use crate::openstack_env::{Service, openstack};
use crate::openstack_world::unique;
use crate::support::{Run, every_step};

/// Somebody, who touches something while `poolshift` stands still at a place.
fn touched_at(bed: &CloudBed<'_>, place: &str, touch: impl FnOnce()) -> Run {
    let mut command = bed.command(0, "cutover", &["--yes", "--json"]);
    command.env("POOLSHIFT_LOG", "poolshift=debug");
    let mut run = Running::start(command);
    let there = run.until_line(|line| line.trim_end().ends_with(place) || line.contains(&format!("{place} ")));
    assert!(there, "{place}: {:?}", run.finish());
    run.signal(Signal::STOP);
    touch();
    run.signal(Signal::CONT);
    let run = run.finish();
    let told: Vec<&str> = run.stderr.lines().filter(|line| !line.starts_with("DEBUG")).collect();
    println!("touched at {place}: {:?}\n{}\n{}", run.code, told.join("\n"), run.stdout);
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

/// Tells the reason, and what has not begun or went back has left everything where it was.
#[track_caller]
fn is_back(bed: &CloudBed<'_>, run: &Run, because: &str) {
    assert!(run.stderr.contains(because) || run.stdout.contains(because), "{because}: {run:?}");
    let end = bed.brought_to_an_end(0, run.code, true);
    assert!(["back", "refused", "undone"].contains(&end), "{end}: {run:?}");
    println!("{because}: it is {end}");
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
    let run = touched_at(&bed, ": syncing", || retype(&bed, &id, &other));
    retype(&bed, &id, "sata");
    is_back(&bed, &run, "somebody has retyped it");
    if every_step() {
        let mut snapshot = None;
        let run = touched_at(&bed, ": syncing", || snapshot = Some(bed.world.snapshot(&id)));
        bed.world.remove_snapshot(&snapshot.expect("it was made"));
        is_back(&bed, &run, "has a snapshot of Cinder's by now");
        let mut attachment = None;
        let run = touched_at(&bed, ": syncing", || attachment = Some(attach(&bed, &id)));
        assert_eq!(env.volume(&bed.servers[0].volumes[0])["status"], "available", "it is kept from nobody any more");
        detach(&bed, &id, &attachment.expect("it was made"));
        // Cinder writes to it how it was attached.
        bed.look_anew();
        assert_eq!(run.code, Some(12), "{run:?}");
        is_back(&bed, &run, "somebody has attached it meanwhile");
    }

    // In its midst: what Cinder refuses for a volume in maintenance, and what an administrator does all the same.
    let run = touched_at(&bed, "step=Retype", || {
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
    let placeholder = ["sata", "sas"].map(|pool| format!("{pool}/volume-{id}"));
    if every_step() {
        let run = touched_at(&bed, "step=Aside(Target)", || drop(env.rbd(&["rm", "--no-progress", &placeholder[1]])));
        is_over(&bed, run);
        let run = touched_at(&bed, "step=Place(Target)", || reset(&bed, &id, "available"));
        is_over(&bed, run);
        let run = touched_at(&bed, "step=Retype", || reset(&bed, &id, "error"));
        is_over(&bed, run);
        let run = touched_at(&bed, "step=Retype", || drop(env.rbd(&["rm", "--no-progress", &placeholder[0]])));
        let end = bed.brought_to_an_end(0, run.code, true);
        println!("without its placeholder: it is {end}");
        bed.bring_back(0);
        let mut attachment = None;
        let run = touched_at(&bed, "step=Retype", || {
            reset(&bed, &id, "available");
            attachment = Some(attach(&bed, &id));
        });
        assert!(run.stderr.contains("somebody has attached it meanwhile"), "{run:?}");
        assert_ne!(run.code, Some(0));
        detach(&bed, &id, &attachment.expect("it was made"));
        bed.look_anew();
        // It was on its way back, which is where the next command brings it, whichever that is.
        let end = bed.brought_to_an_end(0, run.code, true);
        println!("attached in its midst: it is {end}");
        bed.bring_back(0);
    }

    // It grows: what is carried over has the new size.
    let run = touched_at(&bed, ": syncing", || {
        env.volume_action(&id, &json!({"os-extend": {"new_size": 2}}));
        env.wait_for_volume(&id, "available");
    });
    println!("extended: {:?}", run.code);
    bed.look_anew();
    bed.note_contents_on(0, if run.code == Some(0) { "target" } else { "source" });
    let end = bed.brought_to_an_end(0, run.code, false);
    println!("extended before the last delta: it is {end}");
    bed.bring_back(0);
}

/// Nova, which fails to take a server from its host: it has shut it down, and says for ever after that it runs.
#[test]
#[ignore = "needs OpenStack"]
fn a_server_that_its_cloud_fails_to_shelve_is_switched_or_comes_back() {
    let env = openstack();
    let mut bed = CloudBed::server(&env, "half", "");
    bed.replicate();
    let server = bed.guest().id.clone();
    // Nova's own host stands still, so that it does not come first.
    let in_time = std::cell::Cell::new(0);
    let fail = || {
        env.signal("nova-compute", "STOP");
        let is_leaving =
            env.server(&server)["OS-EXT-STS:task_state"].as_str().is_some_and(|task| task.starts_with("shelving"));
        if !is_leaving {
            println!("Nova is done already");
            return env.signal("nova-compute", "CONT");
        }
        in_time.set(in_time.get() + 1);
        env.server_action(&server, &json!({"os-resetState": {"state": "active"}}));
        env.signal("nova-compute", "CONT");
        // What it does with the domain it does all the same, and fails when it would write down that it is done.
        env.wait_for("the end of its domain", || match std::fs::exists(env.console_file(&server)) {
            Ok(false) => Ok(()),
            there => Err(format!("its console is there: {there:?}")),
        });
        let shown = env.server(&server);
        assert_eq!((&shown["status"], &shown["OS-EXT-STS:task_state"]), (&json!("ACTIVE"), &Value::Null), "{shown:#}");
    };
    let places = [": final delta", ": verifying", ": swapping", "step=Retype"];
    for place in places.into_iter().filter(|place| every_step() || *place == ": final delta") {
        let run = touched_at(&bed, place, fail);
        is_over(&bed, run);
    }
    // And poolshift is killed there.
    for (place, undo) in [("step=Retype", true), ("step=StandIn(Source)", false)] {
        if undo || every_step() {
            assert!(bed.killed_at(0, "cutover", &[], place), "{place}");
            fail();
            println!("killed at {place}: it is {}", bed.brought_to_an_end(0, None, undo));
            bed.bring_back(0);
        }
    }
    // Where Nova was too fast for all of these.
    for _ in 0..5 {
        if in_time.get() == 0 {
            let run = touched_at(&bed, places[0], fail);
            is_over(&bed, run);
        }
    }
    assert!(in_time.get() > 0, "it never failed");
    bed.expect_well(0, "source");
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn somebody_touches_a_server_that_is_switched() {
    let env = openstack();
    let mut bed = CloudBed::server(&env, "others", "");
    bed.replicate();
    let (server, data) = (bed.guest().id.clone(), bed.servers[0].volumes[1].clone());
    let unshelve = |api: &crate::openstack_env::OpenStackEnv, owner: bool| {
        let (path, body) = (format!("servers/{server}/action"), json!({"unshelve": null}));
        match owner {
            true => api.ask_as_owner(&Method::POST, &path, Some(&body)),
            false => api.ask(Service::Nova, &Method::POST, &path, Some(&body)),
        }
        .expect("it answers")
        .0
    };

    // Its owner can't.
    let run = touched_at(&bed, "step=Aside(Target)", || {
        env.wait_for_server(&server, "SHELVED_OFFLOADED");
        assert_eq!(env.server(&server)["locked"], true);
        assert_eq!(unshelve(&env, true), 409);
    });
    is_over(&bed, run);

    // An administrator can.
    for place in ["step=Aside(Target)", "step=Place(Target)"] {
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
    let run = touched_at(&bed, ": syncing", || retype(&bed, &data, &other));
    retype(&bed, &data, "sata");
    is_back(&bed, &run, "somebody has retyped it");
}

/// What `status` shows of drift while it is replicated, and whether that holds it.
#[test]
#[ignore = "needs OpenStack"]
fn what_somebody_changes_while_it_is_replicated_is_shown() {
    let env = openstack();
    let mut bed = CloudBed::detached(&env, 1, "");
    bed.replicate();
    let id = bed.servers[0].volumes[1].clone();
    let other = bed.world.volume_type("sata");
    let shows = |bed: &CloudBed<'_>, text: &str, holds: bool| {
        bed.fleet.wait_for_server(0, text, |status| {
            let drift = status["drift"].as_array().into_iter().flatten();
            let shown = drift.filter_map(Value::as_str).any(|drift| drift.contains(text));
            shown && (!holds || status["activity"] == "held" && status["last_error"].to_string().contains(text))
        });
    };
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
    if !every_step() {
        return;
    }
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
    let shows = |bed: &CloudBed<'_>, text: &str| {
        bed.fleet.wait_for_server(0, text, |status| {
            let drift = status["drift"].as_array().into_iter().flatten();
            drift.filter_map(Value::as_str).any(|drift| drift.contains(text))
        });
    };
    let server = bed.guest().id.clone();
    let [more] = &bed.world.volumes(&[unique("more")])[..] else { panic!("one") };
    bed.world.attach(&server, more);
    bed.fleet.start_daemon();
    shows(&bed, "that the plan does not have");
    bed.fleet.stop_daemon();
    for id in [more, &bed.servers[0].volumes[1]] {
        let path = format!("servers/{server}/os-volume_attachments/{id}");
        env.tell(Service::Nova, &Method::DELETE, &path, &Value::Null);
        env.wait_for_volume(id, "available");
    }
    bed.fleet.start_daemon();
    shows(&bed, "is not with its server");
    bed.fleet.stop_daemon();
    let refused = bed.run(0, "cutover", &["--yes"]).expect_code(14);
    assert!(format!("{refused:?}").contains("it has not the volume"), "{refused:?}");
    bed.world.delete_server(&server);
    bed.fleet.start_daemon();
    shows(&bed, "the cloud has no server");
}
