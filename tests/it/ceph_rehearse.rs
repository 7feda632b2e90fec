//! Rehearsals of a real server that goes on meanwhile: a stand-in boots from clones, is judged, and leaves no trace,
//! whoever is killed.

use rustix::process::Signal;
use serde_json::Value;

use crate::cutover_bed::{Bed, PATIENCE, report, run_killed_at, stopped_at};
use crate::support::poolshift;
use crate::vm::vm;

/// The console of a guest that takes commands.
const BOOTED: &str = "GUEST READY";

/// All that a rehearsal makes: domains, images, files.
fn traces(bed: &Bed<'_>) -> Vec<String> {
    let domains = bed.env.virsh(&["list", "--all", "--name"]);
    let images = bed.env.rbd(&["ls", "sas"]);
    let files = std::fs::read_dir(bed.folder()).expect("a folder").map(|file| file.expect("a file").file_name());
    let files: Vec<String> = files.map(|file| file.to_string_lossy().into_owned()).collect();
    let all = domains.lines().chain(images.lines()).chain(files.iter().map(String::as_str));
    all.filter(|name| name.contains("rehearsal") && name.contains(&bed.guest.name)).map(str::to_owned).collect()
}

#[track_caller]
fn snapshots(bed: &Bed<'_>) -> Vec<String> {
    let list: Value =
        serde_json::from_str(&bed.env.rbd(&["snap", "ls", "--format", "json", &bed.guest.disks[0].target]))
            .expect("rbd prints JSON");
    let names = list.as_array().expect("a list").iter().map(|snapshot| snapshot["name"].as_str().expect("a name"));
    names.map(str::to_owned).collect()
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_rehearsal_boots_is_judged_and_leaves_no_trace() {
    let env = vm();
    let check = "grep -q 'GUEST BOOT' \"$POOLSHIFT_CONSOLE\" && ! grep -q 'GUEST LOSS' \"$POOLSHIFT_CONSOLE\" && \
                 virsh domblklist \"$POOLSHIFT_DOMAIN\" | grep -c poolshift-rehearsal";
    let judge = format!(", rehearsal = {{ console = \"{BOOTED}\", check = '''{check}''' }}");
    let mut bed = Bed::with(&env, "stand", &judge);
    let stand_in = format!("{}.poolshift-rehearsal", bed.guest.name);
    let early = bed.run("rehearse", &[]).expect_code(1);
    assert!(early.stderr.contains("not there yet"), "{}", early.stderr);
    // At its next start: a card on a bridge that is not there. A stand-in that had it could not start.
    let card = bed.folder().join("card.xml");
    let xml = "<interface type='bridge'><mac address='52:54:00:00:00:17'/><source bridge='production'/>\
               <model type='virtio'/><driver queues='2'/><mtu size='1450'/></interface>";
    std::fs::write(&card, xml).unwrap();
    env.virsh(&["attach-device", &bed.guest.name, "--config", &card.display().to_string()]);
    bed.start_daemon();
    bed.wait_for("a point", |server| server["point"].is_object());

    let acked = bed.guest.console().last_ack();
    let done = report(&bed.run("rehearse", &["--json"]).expect_code(0));
    println!("{done:#}");
    assert!(done["passed"] == true && done["left"] == serde_json::json!([]), "{done:#}");
    assert!(done["found"].as_str().is_some_and(|found| found.ends_with("; 2")), "both disks are clones: {done:#}");
    assert_eq!(traces(&bed), [""; 0]);
    assert!(bed.guest.console().last_ack() > acked, "the server went on");

    // One that is looked at, while its point is pruned.
    let kept = stopped_at(bed.command("rehearse", &["--keep", "1h"]), "rehearsal.judged");
    kept.resume();
    let before = snapshots(&bed);
    let begin = std::time::Instant::now();
    while snapshots(&bed).iter().any(|name| before.contains(name)) {
        assert!(begin.elapsed() < PATIENCE, "the daemon has not gone on: {before:?}");
    }
    assert_eq!(env.virsh(&["domstate", &stand_in]).trim(), "running");
    let live = env.virsh(&["dumpxml", &stand_in]);
    assert!(live.contains("52:54:00:00:00:17") && live.contains("<link state='down'/>"), "{live}");
    assert!(!live.contains("production") && !live.contains("sata/"), "{live}");
    bed.run("rehearse", &[]).expect_code(6);
    let gc = |words: &[&str]| gc(&bed, words);
    assert_eq!(gc(&[])["rehearsals"], serde_json::json!([]), "it is under way");
    assert!(kept.kill());
    // It is found, and removed only when that is asked for.
    let found = gc(&[]);
    assert_eq!(found["rehearsals"][0]["stand_in"], stand_in.as_str(), "{found:#}");
    assert_eq!(found["rehearsals"][0]["clones"].as_array().map(Vec::len), Some(2), "{found:#}");
    assert_eq!(traces(&bed).len(), 4, "{:?}", traces(&bed));
    assert_eq!(gc(&["--yes"])["rehearsals"][0]["removed"], true);
    assert_eq!(traces(&bed), [""; 0]);
    assert_eq!(gc(&[])["rehearsals"], serde_json::json!([]));

    // Ctrl-C while it boots; killed before and while it boots, and cleared by the next one, the last of which fails its
    // check.
    let interrupted = stopped_at(bed.command("rehearse", &[]), "rehearsal.launched");
    interrupted.signal(Signal::INT);
    interrupted.resume();
    let run = interrupted.finish();
    assert_eq!((run.code, traces(&bed)), (Some(130), Vec::new()), "{run:?}");
    for place in ["rehearsal.cloned", "rehearsal.defined", "rehearsal.launched"] {
        run_killed_at(bed.command("rehearse", &[]), place);
        let found = gc(&[]);
        assert_eq!(found["rehearsals"][0]["clones"].as_array().map(Vec::len), Some(2), "{place}: {found:#}");
    }
    let plan = std::fs::read_to_string(bed.plan()).unwrap();
    std::fs::write(bed.plan(), plan.replace(check, "echo no >&2; exit 3")).unwrap();
    let failed = bed.run("rehearse", &[]).expect_code(15);
    assert!(failed.stdout.contains("is NOT well") && failed.stdout.contains("exit status: 3): no"), "{failed:?}");
    assert_eq!(traces(&bed), [""; 0]);

    // A cutover after all that, from targets that no stand-in has touched.
    bed.switch("cutover", &["--verify", "full"], "target");
    let over = bed.run("rehearse", &[]).expect_code(1);
    assert!(over.stderr.contains("runs from its targets already"), "{}", over.stderr);
}

/// What `gc` says. A volume that the daemon is at is passed over, which is an exit code of 1.
#[track_caller]
fn gc(bed: &Bed<'_>, words: &[&str]) -> Value {
    let run = poolshift(["gc", &bed.plan(), "--json"].iter().chain(words));
    assert!(matches!(run.code, Some(0 | 1)), "{run:?}");
    report(&run)
}
