//! Cutovers of a real server that meet what they can't get past: a target pool that is full or gone, another client,
//! another cutover, a guest that won't stop. The server runs on from where it was and lacks nothing, and the same command
//! succeeds when the trouble is over.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cutover_bed::{Bed, PATIENCE, Running, SERVER, report, run_short_of, stopped_and_to_be_killed, stopped_at};
use crate::librbd::Librbd;
use crate::support::{Disturbed, Run, ceph_dev_folder};
use crate::vm::{VmEnv, vm, vm_alone};

/// A warm cutover that is stopped when its server stands still, and has its last delta before it.
fn held_before_the_final_delta(bed: &Bed<'_>, words: &[&str]) -> Running {
    let words: Vec<&str> = ["--method", "warm", "--yes", "--json"].iter().chain(words).copied().collect();
    stopped_at(bed.command("cutover", &words), "cutover.final-delta")
}

/// It went back, because of `because`.
#[track_caller]
fn expect_back(bed: &Bed<'_>, run: Run, because: &str) -> Value {
    let report = report(&run.expect_code(12));
    println!("{report:#}");
    assert_eq!(report["runs_from"], "source", "{report:#}");
    let told = report["rolled_back_because"].as_str().unwrap_or_default();
    assert!(told.contains(because), "{report:#}");
    bed.expect_well("source");
    report
}

fn is_full(env: &VmEnv, pool: &str) -> bool {
    let mut command = Command::new("ceph");
    command.env_remove("CEPH_ARGS").arg("-c").arg(&env.ceph.conf).args(["--id", "admin", "osd", "dump"]);
    let dump = String::from_utf8(command.output().expect("Ceph's tools are installed").stdout).expect("text");
    dump.lines().any(|line| line.contains(&format!("'{pool}'")) && line.contains("full_quota"))
}

fn a_pool_that_is_full(bed: &Bed<'_>) {
    let run = held_before_the_final_delta(bed, &[]);
    let quota = Disturbed::quota(&bed.env.ceph, "sas", 4096);
    let begun = Instant::now();
    // One that stands still for 30 s loses its watches, which is another story.
    while !is_full(bed.env, "sas") {
        assert!(begun.elapsed() < Duration::from_secs(25), "the monitors did not hear of it in time");
        std::thread::sleep(Duration::from_millis(100));
    }
    run.resume();
    expect_back(bed, run.finish(), "quota of pool \"sas\" is reached");
    // Nothing is left of it, and nobody is kept from anything. `rbd` itself would wait for the quota to be lifted.
    let look = bed.run("cutover", &["--dry-run", "--json"]).expect_code(0);
    assert_eq!(report(&look)["state"], "on-sources", "{look:?}");
    bed.wait_for("a server that is not paused", |server| server["activity"] != "paused");
    // Earlier than that, it is found before the server is stopped.
    let early = run_short_of(bed.command("cutover", &["--yes"]), "cutover.quiescing").expect_code(10);
    assert!(early.stderr.contains("quota of pool"), "{}", early.stderr);
    bed.expect_well("source");
    quota.undo();
    bed.switch("cutover", &[], "target");
    bed.switch("rollback", &["--with-changes"], "source");
}

fn an_osd_that_comes_back(bed: &Bed<'_>) {
    let run = held_before_the_final_delta(bed, &["--max-outage", "90s"]);
    let stopped = Disturbed::osd_stopped(&bed.env.ceph, 1);
    run.resume();
    stopped.undo();
    let run = run.finish().expect_code(0);
    println!("{:#}", report(&run));
    bed.expect_well("target");
    bed.switch("rollback", &["--with-changes"], "source");
}

fn an_osd_that_stays_away(bed: &Bed<'_>) {
    let limit = Duration::from_secs(20);
    let run = held_before_the_final_delta(bed, &["--max-outage", "20s"]);
    let stopped = Disturbed::osd_stopped(&bed.env.ceph, 1);
    run.resume();
    // It runs again long before the command has given up on the target.
    let begun = Instant::now();
    while bed.guest.state() != "running" {
        assert!(begun.elapsed() < PATIENCE, "the server stands still");
    }
    println!("running again {:?} after the OSD was gone", begun.elapsed());
    bed.guest.wait_for_ack(bed.guest.console().last_ack() + 2);
    stopped.undo();
    let run = run.finish();
    let report = expect_back(bed, run, "the outage has passed its limit of 20s");
    let outage = Duration::from_secs_f64(report["outage_seconds"].as_f64().expect("it stood still"));
    // What comes on top is the way back: its memory is restored.
    assert!(outage < limit + Duration::from_secs(60), "{outage:?}");
    bed.switch("cutover", &[], "target");
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_target_that_fails_at_the_final_delta() {
    let env = vm_alone();
    ceph_dev_folder(&env.ceph);
    let mut bed = Bed::new(&env, "target");
    bed.replicate();
    a_pool_that_is_full(&bed);
    an_osd_that_comes_back(&bed);
    an_osd_that_stays_away(&bed);
}

/// Starts two cutovers of the same server, the second when the first is at a failpoint, or at once.
fn two_at_once(bed: &Bed<'_>, place: Option<&str>) {
    let words = ["--yes", "--json"];
    let first = match place {
        Some(place) => stopped_at(bed.command("cutover", &words), place),
        None => bed.start("cutover", &words),
    };
    let second = bed.start("cutover", &words);
    if place.is_some() {
        first.resume();
    }
    let runs = [first.finish(), second.finish()];
    println!("{place:?}: {runs:#?}");
    let (done, refused): (Vec<&Run>, Vec<&Run>) = runs.iter().partition(|run| run.code == Some(0));
    assert_eq!((done.len(), refused.len()), (1, 1), "{runs:#?}");
    // 14: the other one had the target open, and had not yet said who it is.
    assert!(matches!(refused[0].code, Some(1 | 6 | 14)), "{:?}", refused[0]);
    assert_eq!(report(done[0])["runs_from"], "target");
    bed.expect_well("target");
    bed.switch("rollback", &["--with-changes"], "source");
}

/// Another client of the source that is there when the server stands still: since before that, or since then.
fn a_client_that_has_it_open(bed: &Bed<'_>, method: &str, before: bool) {
    let source = &bed.guest.disks[1].source;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut other = runtime.block_on(async { Librbd::start(&bed.env.ceph) });
    let mut open = || {
        let known = bed.env.clients(source);
        runtime.block_on(other.call(format!("open {source}")));
        let strangers: Vec<String> = bed.env.clients(source).into_iter().filter(|one| !known.contains(one)).collect();
        let [stranger] = &strangers[..] else { panic!("{known:?} had {source} open, and then {strangers:?}") };
        stranger.clone()
    };
    let command = bed.command("cutover", &["--method", method, "--yes", "--json"]);
    // Neither comes to its last delta.
    let (run, address) = if before {
        let address = open();
        (run_short_of(command, "cutover.final-delta"), address)
    } else {
        let run = stopped_and_to_be_killed(command, "cutover.quiescing", "cutover.final-delta");
        let address = open();
        run.resume();
        (run.finish(), address)
    };
    println!("{method}, open before: {before}: {run:?}");
    runtime.block_on(other.call(format!("close {source}")));
    let report = expect_back(bed, run, &format!("final delta of web: rbd:{source} is open at "));
    let because = report["rolled_back_because"].as_str().unwrap_or_default();
    assert!(because.contains(&address), "{address}: {because}");
    // Whoever is there before is found before.
    assert_eq!(report["outage_seconds"].is_null(), before, "{report:#}");
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn whoever_else_is_there_is_told_from_the_server() {
    let env = vm();
    let mut bed = Bed::new(&env, "else");
    bed.replicate();
    two_at_once(&bed, None);
    two_at_once(&bed, Some("cutover.final-delta"));
    a_client_that_has_it_open(&bed, "warm", false);
    a_client_that_has_it_open(&bed, "hot", true);
    a_client_that_has_it_open(&bed, "hot", false);
    bed.switch("cutover", &["--method", "hot"], "target");
}

/// The guest ignores its power button, and the limit is that of its plan.
fn a_guest_that_won_t_stop(bed: &Bed<'_>) {
    let guest = &bed.others[0];
    guest.command("deaf on");
    let begun = Instant::now();
    let run = bed.run_on("db", "cutover", &["--method", "cold", "--yes", "--json"]);
    let took = begun.elapsed();
    let report = report(&run.expect_code(12));
    println!("{report:#} after {took:?}");
    let because = report["rolled_back_because"].as_str().expect("it says why");
    assert!(because.contains("the guest has ignored its power button for 20s"), "{because}");
    assert!(guest.console().all("POWER").count() >= 1, "the button itself was pressed");
    let seconds = |phase: &str| {
        let all = report["phases"].as_array().into_iter().flatten();
        all.filter(|entry| entry["phase"] == phase).filter_map(|entry| entry["seconds"].as_f64()).sum::<f64>()
    };
    // A question is asked once more at the end.
    assert!((20.0..45.0).contains(&seconds("quiescing")), "{report:#}");
    // It stays deaf: on a busy host it may hear the last press only now.
    assert_eq!(guest.console().boot_ids().len(), 1, "it never stopped");
    bed.expect_guest_well(guest, "source");
}

/// Two servers at a time, one of which is not ready at first.
fn all_servers(bed: &Bed<'_>) {
    let guest = &bed.others[0];
    bed.env.virsh(&["suspend", &guest.name]);
    let run = bed.run_on("--all", "cutover", &["--parallel", "2", "--yes"]).expect_code(14);
    println!("{}{}", run.stderr, run.stdout);
    let row = |run: &Run, server: &str| {
        let row = run.stdout.lines().find(|line| line.starts_with(server)).unwrap_or_default();
        row.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let (web, db) = (row(&run, SERVER), row(&run, "db"));
    assert!(web.starts_with("web targets ") && web.ends_with(" s done"), "{web}");
    assert!(db.starts_with("db - - db can't be cut over now: ") && db.contains("it is paused"), "{db}");
    bed.expect_well("target");
    bed.env.virsh(&["resume", &guest.name]);
    bed.expect_guest_well(guest, "source");
    // One that was never brought over is where it belongs, and what becomes of the other's writes has to be said.
    let run = bed.run_on("--all", "rollback", &["--yes"]);
    println!("{:?} {}{}", run.code, run.stderr, run.stdout);
    assert_eq!(run.code, bed.run("rollback", &["--yes"]).code);
    assert!(run.stdout.contains("--with-changes") || run.stderr.contains("--with-changes"), "{run:?}");
    assert_eq!(row(&run, "db"), "db sources - was there already");
    let dry = bed.run_on("--all", "rollback", &["--with-changes", "--dry-run"]).expect_code(0);
    assert!(dry.stdout.contains("db: runs from its sources already\n"), "{dry:?}");
    bed.expect_well("target");
    let run = bed.run_on("--all", "cutover", &["--parallel", "2", "--yes"]).expect_code(0);
    println!("{}{}", run.stderr, run.stdout);
    assert_eq!(row(&run, SERVER), "web targets - was there already");
    let db = row(&run, "db");
    assert!(db.starts_with("db targets ") && db.ends_with(" s done"), "{db}");
    bed.expect_well("target");
    bed.expect_guest_well(guest, "target");
    // All of them back, and over again.
    for (command, words, side) in [("rollback", &["--with-changes"][..], "source"), ("cutover", &[], "target")] {
        let words = [&["--parallel", "2", "--yes"], words].concat();
        let run = bed.run_on("--all", command, &words).expect_code(0);
        println!("{}{}", run.stderr, run.stdout);
        for server in [SERVER, "db"] {
            let row = row(&run, server);
            assert!(row.starts_with(&format!("{server} {side}s ")) && row.ends_with(" s done"), "{row}");
        }
        bed.expect_well(side);
        bed.expect_guest_well(guest, side);
    }
}

/// The guest runs from its targets, and goes on when its sources are removed.
fn finalized(bed: &Bed<'_>) {
    let kept = bed.guest.disks.each_ref().map(|disk| format!("{}.poolshift-kept", disk.source));
    let sources = || {
        let listed = bed.env.rbd(&["ls", "sata"]);
        listed
            .lines()
            .filter(|image| image.starts_with(&bed.guest.name))
            .map(|image| format!("sata/{image}"))
            .collect::<Vec<_>>()
    };
    let both: Vec<String> = kept.iter().rev().cloned().collect();
    let dry = bed.run("finalize", &["--dry-run"]).expect_code(0);
    assert!(kept.iter().all(|image| dry.stdout.contains(&format!("lost  rbd:{image}, "))), "{}", dry.stdout);
    bed.run("finalize", &[]).expect_code(2);
    assert_eq!(sources(), both);
    let done = bed.run("finalize", &["--yes"]).expect_code(0);
    assert!(done.stdout.contains("web is finalized: 2 sources and "), "{}", done.stdout);
    assert_eq!(sources(), Vec::<String>::new());
    bed.guest.wait_for_ack(bed.guest.console().last_ack() + 5);
    assert_eq!(bed.guest.oracle(), Ok(()));
    bed.guest.shut_down();
    let before = bed.guest.console().last_ack();
    bed.guest.start();
    bed.guest.wait_for_ack(before + 5);
    assert_eq!(bed.guest.oracle(), Ok(()));
    let targets = bed.guest.disks.each_ref().map(|disk| disk.target.clone());
    assert_eq!(bed.guest.sources_live(), targets);
    assert_eq!(bed.guest.sources_inactive(), targets);
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn servers_that_won_t_stop_or_are_not_ready_keep_nobody_and_one_that_is_over_is_finalized() {
    let env = vm();
    let mut bed = Bed::new(&env, "web");
    bed.add("db", ", limit = \"20s\"");
    bed.replicate();
    a_guest_that_won_t_stop(&bed);
    all_servers(&bed);
    finalized(&bed);
}
