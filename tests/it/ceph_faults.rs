//! Bad luck and bad input on a real Ceph: what `poolshift` says, how it exits, and that the next run makes it good.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use poolshift::image::rbd::CreateOptions;

use crate::ceph_crash::Volume;
use crate::librbd::{Librbd, MIB, name};
use crate::support::{CephEnv, Disturbed, Run, binary, ceph, ceph_alone, ceph_dev_folder, poolshift};
use crate::vm::rbd_command;

/// Runs a tool of Ceph's as client.admin.
pub(crate) fn admin(env: &CephEnv, tool: &str, words: &[&str]) -> String {
    let mut command = Command::new(tool);
    command.env_remove("CEPH_ARGS").arg("-c").arg(&env.conf).args(["--id", "admin"]).args(words);
    let output = command.output().expect("Ceph's tools are installed");
    assert!(output.status.success(), "{tool} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// A pool of a test's own; the usual user has no caps there.
fn make_pool(env: &CephEnv, pool: &str) {
    admin(env, "ceph", &["osd", "pool", "create", pool, "4", "4", "replicated", "sas"]);
    admin(env, "rbd", &["pool", "init", pool]);
}

fn remove_pool(env: &CephEnv, pool: &str) {
    admin(env, "ceph", &["config", "set", "mon", "mon_allow_pool_delete", "true"]);
    admin(env, "ceph", &["osd", "pool", "rm", pool, pool, "--yes-i-really-really-mean-it"]);
}

fn is_full(env: &CephEnv, pool: &str) -> bool {
    let dump = admin(env, "ceph", &["osd", "dump"]);
    dump.lines().any(|line| line.contains(&format!("'{pool}'")) && line.contains("full_quota"))
}

async fn sync_ends(volume: &Volume, words: &[&str], code: i32, says: &[&str]) -> Run {
    let run = volume.start_sync_with(words).finish().await.expect_code(code);
    for text in says {
        assert!(run.stderr.contains(text), "{text:?} is not in:\n{}", run.stderr);
    }
    run
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph alone"]
async fn an_osd_that_comes_back_and_one_that_does_not() {
    let env = ceph_alone();
    ceph_dev_folder(&env);
    let mut volume = Volume::new(&env, "osd", 21, 48 * MIB).await;
    volume.converge("at first").await;
    // Stopped and started in the middle of the writes: the run waits for it and goes on.
    volume.write().await;
    let run = volume.writing().await;
    Disturbed::osd_stopped(&env, 1).undo();
    volume.no_throttle().await;
    let run = run.finish().await;
    assert!(matches!(run.code, Some(0 | 7)), "{run:?}");
    volume.check("after the OSD came back").await;
    volume.converge("after the OSD came back").await;
    // It stays away: a bounded wait, and an error that says to run again.
    volume.write().await;
    let run = volume.sync_with_stopped_at(&["--io-timeout", "5"], "apply.batch").await;
    let stopped = Disturbed::osd_stopped(&env, 1);
    run.resume();
    let begun = Instant::now();
    let run = run.finish().await;
    let waited = begun.elapsed();
    stopped.undo();
    let run = run.expect_code(7);
    assert!(run.stderr.contains("did not answer in time"), "{}", run.stderr);
    assert!(waited < Duration::from_secs(60), "{waited:?}");
    volume.converge("after the OSD was away").await;
    volume.remove().await;
}

/// How long the monitors may take to notice that a quota is reached. A run that stands still for 30 s, or 10 s on a cluster
/// of `scripts/ceph-dev up --fast`, loses its watch, which is another story; such a cluster notices within two seconds.
const QUOTA_NOTICED: Duration = Duration::from_secs(25);

/// Has the quota of a pool reached, by what is in it, while a run that writes there stands still.
async fn reach_quota(env: &CephEnv, pool: &str) -> Disturbed {
    let quota = Disturbed::quota(env, pool, 4096);
    let begun = Instant::now();
    while !is_full(env, pool) {
        assert!(begun.elapsed() < QUOTA_NOTICED, "the monitors have not noticed in time");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    quota
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_quota_that_is_reached_in_the_middle() {
    let env = ceph();
    ceph_dev_folder(&env);
    // A pool of its own, so that nobody else runs into the quota; the usual user has no caps there.
    let (env, pool) = (CephEnv { user: "admin".into(), ..env }, name("quota"));
    make_pool(&env, &pool);
    let mut volume = Volume::in_pool(&env, &pool, "quota", 22, 48 * MIB).await;
    volume.converge("at first").await;
    volume.write().await;
    // What comes after the first batch waits in librbd.
    volume.throttle(4 * MIB).await;
    let run = volume.sync_stopped_at("apply.batch").await;
    let in_flight = volume.in_flight().await.expect("it is in the middle of its writes");
    let quota = reach_quota(&env, &pool).await;
    run.resume();
    let run = run.finish().await.expect_code(10);
    assert!(run.stderr.contains(&format!("quota of pool {pool:?} is reached")), "{}", run.stderr);
    assert!(run.stderr.contains("hint: raise it: ceph osd pool set-quota"), "{}", run.stderr);
    volume.check("at the quota").await;
    sync_ends(&volume, &[], 10, &["quota of pool"]).await;
    quota.undo();
    volume.no_throttle().await;
    let run = volume.start_sync().finish().await.expect_code(0);
    assert!(run.stdout.contains(&in_flight.name), "{}", run.stdout);
    volume.converge("after the quota was lifted").await;
    volume.remove().await;
    remove_pool(&env, &pool);
}

/// EDQUOT is for a limit of an image's snapshots as well as for a pool's quota.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_source_that_may_have_no_more_snapshots_says_so() {
    let env = ceph();
    let mut volume = Volume::new(&env, "snap-limit", 32, 8 * MIB).await;
    volume.converge("at first").await;
    volume.write().await;
    let limit = |limit: &str| {
        let words = ["snap", "limit", "set", "--limit", limit, &volume.disk.image];
        rbd_command(&env).args(words).output().expect("Ceph's tools are installed").status.success()
    };
    assert!(limit("1"));
    let image = volume.disk.image.clone();
    let refused = sync_ends(&volume, &[], 10, &["it may have 1 snapshots, and has 1", "rbd snap limit set"]).await;
    assert!(!refused.stderr.contains("quota of pool"), "{}", refused.stderr);
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("plan.toml");
    std::fs::write(
        &plan,
        format!("[[volume]]\nname = \"vm\"\nsource = \"rbd:{image}\"\ntarget = \"rbd:{}\"\n", volume.target),
    )
    .unwrap();
    let conf = env.conf.to_str().expect("the path is text");
    let words = ["--ceph-conf", conf, "--ceph-user", &env.user, "check", "--no-measure", plan.to_str().unwrap()];
    let run = poolshift(words).expect_code(1);
    assert!(run.stdout.contains("no snapshot can be made"), "{}", run.stdout);
    // What an earlier run has not begun leaves HEAD as it was.
    let sides = [&volume.disk.image, &volume.target].map(|image| format!("rbd:{image}"));
    let status = volume.start(&["status", &sides[0], &sides[1], "--json"]).finish().await.expect_code(0);
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!((&status["state"], &status["head_dirty"]), (&"in-flight".into(), &false.into()));
    assert!(limit("18446744073709551615") || limit("1000"));
    volume.converge("without a limit").await;
    volume.remove().await;
}

/// Three reasons for which an image can't be snapshotted (EROFS): each is found, and told from the others.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_source_that_can_t_be_snapshotted_says_why() {
    let env = ceph();
    ceph_dev_folder(&env);
    // A pool of its own, as mirroring is switched on for a whole pool.
    let (env, pool) = (CephEnv { user: "admin".into(), ..env }, name("mirrored"));
    make_pool(&env, &pool);
    admin(&env, "rbd", &["mirror", "pool", "enable", &pool, "image"]);
    for (tag, says) in [("lock", "rbd lock add"), ("snapshot", "non-primary"), ("journal", "non-primary")] {
        let (source, target) = (format!("{pool}/{tag}"), format!("sas/{}", name(&format!("why-{tag}"))));
        admin(&env, "rbd", &["create", "--size", "8M", &source]);
        match tag {
            "lock" => drop(admin(&env, "rbd", &["lock", "add", &source, "theirs"])),
            mode => {
                admin(&env, "rbd", &["mirror", "image", "enable", &source, mode]);
                admin(&env, "rbd", &["mirror", "image", "demote", &source]);
            }
        }
        let conf = env.conf.to_str().expect("the path is text");
        let words = ["--ceph-conf", conf, "--ceph-user", "admin", "sync"];
        let run = poolshift(words.iter().copied().chain([&*format!("rbd:{source}"), &*format!("rbd:{target}")]));
        assert!(run.code.is_some_and(|code| code != 0) && run.stderr.contains(says), "{tag}: {run:?}");
        let folder = tempfile::tempdir().unwrap();
        let plan = folder.path().join("plan.toml");
        let text = format!("[[volume]]\nname = \"vm\"\nsource = \"rbd:{source}\"\ntarget = \"rbd:{target}\"\n");
        std::fs::write(&plan, text).unwrap();
        let plan = plan.to_str().expect("the path is text");
        let run =
            poolshift(["--ceph-conf", conf, "--ceph-user", "admin", "check", "--no-measure", plan]).expect_code(1);
        assert!(run.stdout.contains("can't be snapshotted") && run.stdout.contains(says), "{tag}: {}", run.stdout);
        // What was made for a source that can't be read is gone with its pool.
        rbd_command(&env).args(["rm", "--no-progress", &target]).output().expect("Ceph's tools are installed");
    }
    remove_pool(&env, &pool);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_lock_left_by_a_client_that_died() {
    let env = ceph();
    let mut volume = Volume::new(&env, "dead", 23, 8 * MIB).await;
    volume.converge("at first").await;
    volume.write().await;
    let mut other = Librbd::start(&env);
    other.call(format!("lock {}", volume.target)).await;
    let busy = sync_ends(&volume, &[], 6, &["that is not poolshift"]).await;
    assert!(busy.stderr.contains("held by"), "{}", busy.stderr);
    other.kill().await;
    // Nobody can tell that it is dead before its watch has timed out; then it is shut out.
    let begun = Instant::now();
    loop {
        let run = volume.start_sync().finish().await;
        match run.code {
            Some(0) => break,
            Some(6) => assert!(begun.elapsed() < Duration::from_secs(90), "{run:?}"),
            _ => panic!("{run:?}"),
        }
    }
    volume.converge("after the lock was broken").await;
    volume.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_base_that_was_deleted() {
    let env = ceph();
    let delete = async |volume: &mut Volume, image: String| {
        let newest = volume.disk.librbd.snapshots(&image).await.pop().unwrap();
        volume.disk.librbd.call(format!("rmsnap {image} {newest}")).await;
        volume.disk.librbd.call(format!("close {image}")).await;
        volume.held.remove(&newest);
    };
    let of_source = async {
        let mut volume = Volume::new(&env, "base-source", 24, 16 * MIB).await;
        volume.converge("at first").await;
        let kept = volume.disk.librbd.snapshots(&volume.target).await;
        let image = volume.disk.image.clone();
        delete(&mut volume, image).await;
        volume.write().await;
        let says = ["no snapshot is left that both sides have", &kept[0], ": none", "hint: start over with --full"];
        sync_ends(&volume, &[], 4, &says).await;
        volume.start_sync_with(&["--full"]).finish().await.expect_code(0);
        volume.converge("after starting over").await;
        volume.remove().await;
    };
    let of_target = async {
        let mut volume = Volume::new(&env, "base-target", 25, 16 * MIB).await;
        volume.converge("at first").await;
        let target = volume.target.clone();
        delete(&mut volume, target).await;
        volume.write().await;
        sync_ends(&volume, &[], 4, &["which it was at, was removed by someone else", "hint: start over"]).await;
        volume.start_sync_with(&["--full"]).finish().await.expect_code(0);
        volume.converge("after starting over").await;
        volume.remove().await;
    };
    // With an older pair left, that is the base, and the target is brought back to it.
    let of_two = async {
        let mut volume = Volume::new(&env, "base-older", 26, 16 * MIB).await;
        for _ in 0..2 {
            volume.write().await;
            volume.start_sync_with(&["--keep", "2"]).finish().await.expect_code(0);
        }
        let older = volume.disk.librbd.snapshots(&volume.disk.image).await.remove(0);
        let image = volume.disk.image.clone();
        delete(&mut volume, image).await;
        volume.write().await;
        let run = volume.start_sync_with(&["--keep", "1"]).finish().await.expect_code(0);
        let report: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!((report["base"].as_str(), &report["rewound"]), (Some(older.as_str()), &true.into()));
        let snapshot = report["snapshot"].as_str().unwrap();
        assert!(volume.disk.librbd.read(&format!("{}@{snapshot}", volume.target)).await == volume.disk.bytes);
        volume.remove().await;
    };
    futures::join!(of_source, of_target, of_two);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_target_that_somebody_else_wrote() {
    let env = ceph();
    let mut volume = Volume::new(&env, "foreign", 27, 8 * MIB).await;
    let scribble = |volume: &Volume| format!("zero {} 5 70000", volume.target);
    volume.disk.librbd.call(format!("snap {} theirs", volume.target)).await;
    volume.disk.librbd.call(format!("close {}", volume.target)).await;
    sync_ends(&volume, &[], 4, &["poolshift did not make it", "theirs", "--full --adopt"]).await;
    volume.disk.librbd.call(format!("rmsnap {} theirs", volume.target)).await;
    volume.disk.librbd.call(format!("close {}", volume.target)).await;
    volume.converge("at first").await;
    volume.disk.librbd.call(scribble(&volume)).await;
    volume.disk.librbd.call(format!("close {}", volume.target)).await;
    sync_ends(&volume, &[], 4, &["was written by someone else since", "--full"]).await;
    volume.start_sync_with(&["--full"]).finish().await.expect_code(0);
    volume.converge("after starting over").await;
    volume.remove().await;
}

/// What a run that is killed while its target snapshot is made may leave, and what a process that is dead by then may still
/// bring to the disk after another one has finished its work: the same bytes once more.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_target_that_only_looks_as_if_somebody_had_written_it() {
    let env = ceph();
    let mut volume = Volume::new(&env, "looks", 31, 8 * MIB).await;
    volume.converge("at first").await;
    volume.write().await;
    volume.converge("with data").await;
    let target = volume.target.clone();
    volume.disk.librbd.call(format!("unclean {target}")).await;
    assert!(!volume.disk.librbd.call(format!("objects {target} {}", newest(&volume).await)).await.is_empty());
    volume.converge("with a map that was not cleaned").await;
    let same = volume.disk.librbd.read(&target).await;
    volume.disk.librbd.try_call(&format!("write {target} 0"), &same).await.expect("librbd writes");
    volume.disk.librbd.call(format!("close {target}")).await;
    volume.converge("with the same bytes").await;
    volume.remove().await;
}

async fn newest(volume: &Volume) -> String {
    volume.state().await.and_then(|state| Some(state.newest()?.name.clone())).expect("it has a commit")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn an_invalid_object_map_costs_time_and_nothing_else() {
    let env = ceph();
    let mut volume = Volume::new(&env, "map", 28, 16 * MIB).await;
    volume.converge("at first").await;
    let place = volume.disk.image.clone();
    volume.disk.librbd.call(format!("close {place}")).await;
    for words in [["feature", "disable"], ["feature", "enable"]] {
        admin(&env, "rbd", &[&words[..], &[&place, "object-map", "fast-diff"]].concat());
    }
    volume.write().await;
    let rebuild = format!("rbd object-map rebuild {place}");
    let run = sync_ends(&volume, &[], 0, &["flagged invalid", &rebuild]).await;
    let method = |run: &Run| serde_json::from_str::<serde_json::Value>(&run.stdout).unwrap()["method"].clone();
    assert_eq!(method(&run)["name"], "exact");
    assert!(method(&run)["cure"].as_str().unwrap().starts_with(&rebuild), "{}", run.stdout);
    volume.converge("with an invalid map").await;
    admin(&env, "rbd", &["object-map", "rebuild", &place]);
    for snapshot in volume.disk.librbd.snapshots(&place).await {
        admin(&env, "rbd", &["object-map", "rebuild", &format!("{place}@{snapshot}")]);
    }
    volume.write().await;
    assert_eq!(method(&sync_ends(&volume, &[], 0, &[]).await)["name"], "two-level");
    volume.converge("with a map that was rebuilt").await;
    volume.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn names_that_lead_nowhere_have_exit_codes() {
    let env = ceph();
    let mut volume = Volume::new(&env, "names", 29, 8 * MIB).await;
    let (there, nowhere) = (format!("rbd:{}", volume.disk.image), format!("rbd:sata/{}", name("nothing")));
    volume.disk.snapshot("one").await;
    let at_none = format!("{there}@none");
    let cases: [(&[&str], &str); 7] = [
        (&["sync", &nowhere, "rbd:sas/x"], "has no image"),
        (&["sync", &there, "rbd:nowhere/x"], "no pool \"nowhere\""),
        (&["sync", &there, "rbd:sas/no-such-space/x"], "no such namespace"),
        (&["diff", &at_none], "it has one"),
        (&["diff", &there, "--from", "none"], "it has one"),
        (&["verify", &format!("{there}@one"), &format!("{nowhere}@one")], "has no image"),
        (&["send", &at_none], "there is no such snapshot"),
    ];
    for (words, says) in cases {
        let run = volume.start(words).finish().await.expect_code(5);
        assert!(run.stderr.contains(says) && run.stderr.starts_with("error: rbd:"), "{words:?}:\n{}", run.stderr);
    }
    volume.remove().await;
}

/// A ceph.conf like the cluster's, with one more user.
pub(crate) fn conf_with(env: &CephEnv, folder: &tempfile::TempDir, user: &str, key: &str) -> PathBuf {
    let (conf, keyring) = (folder.path().join("ceph.conf"), folder.path().join("keyring"));
    std::fs::write(&keyring, key).unwrap();
    let text = std::fs::read_to_string(&env.conf).unwrap();
    std::fs::write(&conf, format!("{text}\n[client.{user}]\nkeyring = {}\n", keyring.display())).unwrap();
    conf
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn users_without_the_caps_are_told_which() {
    let env = ceph();
    ceph_dev_folder(&env);
    let mut volume = Volume::new(&env, "caps", 30, 8 * MIB).await;
    let (folder, usual) = (tempfile::tempdir().unwrap(), volume.env.clone());
    let user = name("user");
    let entity = format!("client.{user}");
    for caps in ["profile rbd pool=sas", "profile rbd pool=sata, profile rbd-read-only pool=sas"] {
        let key = admin(&env, "ceph", &["auth", "get-or-create", &entity, "mon", "profile rbd", "osd", caps]);
        volume.env = CephEnv { conf: conf_with(&env, &folder, &user, &key), user: user.clone(), ..env.clone() };
        let says = ["is not allowed to", "hint: compare what it has", "'profile rbd' on pool"];
        sync_ends(&volume, &[], 1, &says).await;
        admin(&env, "ceph", &["auth", "rm", &entity]);
    }
    volume.env = CephEnv { user: "nobody".into(), ..usual.clone() };
    sync_ends(&volume, &[], 1, &["cannot connect as client.nobody", "the monitors know no such user"]).await;
    // Nobody answers there.
    let away = folder.path().join("away.conf");
    std::fs::write(&away, "[global]\nmon host = 127.0.0.1:1\nauth client required = none\n").unwrap();
    volume.env = CephEnv { conf: away, ..usual.clone() };
    let begun = Instant::now();
    sync_ends(&volume, &[], 7, &["no monitor answered in time"]).await;
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    volume.env = usual;
    volume.converge("with the usual user").await;
    volume.remove().await;
}

/// A clone can be read only where its parent can: the message names that pool, and no caps that the user has.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_clone_whose_parent_may_not_be_read_names_its_pool() {
    let env = ceph();
    ceph_dev_folder(&env);
    let (pool, clone, apart) = (name("parents"), format!("sata/{}", name("of-parent")), name("apart"));
    make_pool(&env, &pool);
    let golden = format!("{pool}/golden@v1");
    admin(&env, "rbd", &["create", "--size", "8M", &format!("{pool}/golden")]);
    admin(&env, "rbd", &["snap", "create", "--no-progress", &golden]);
    admin(&env, "rbd", &["clone", "--rbd-default-clone-format", "2", &golden, &clone]);
    let conf = env.conf.to_str().expect("the path is text");
    let access = |conf: &str, user: &str| ["--ceph-conf", conf, "--ceph-user", user].map(str::to_owned);
    let run =
        |access: &[String], words: &[&str]| poolshift(access.iter().map(String::as_str).chain(words.iter().copied()));
    let (usual, source) = (access(conf, &env.user), format!("rbd:{clone}"));
    let says = [format!("in pool {pool}, which"), format!("'profile rbd-read-only' on pool {pool}")];
    let target = format!("rbd:sas/{}", name("of-parent"));
    for words in [vec!["sync", &source, &target], vec!["deps", &source]] {
        let refused = run(&usual, &words).expect_code(1);
        assert!(says.iter().all(|text| refused.stderr.contains(text)), "{words:?}: {}", refused.stderr);
    }
    // What is wrong with one image is a reason to leave it out, and not the others.
    let whole = format!("sata/{apart}");
    admin(&env, "rbd", &["create", "--size", "8M", &whole]);
    let listed = run(&usual, &["plan", "--from-pool", "rbd:sata", "--to-pool", "sas"]).expect_code(0);
    assert!(listed.stdout.contains(&whole) && listed.stdout.contains(&says[0]), "{}", listed.stdout);
    // And this is all that it takes.
    let (folder, user) = (tempfile::tempdir().unwrap(), name("parents"));
    let caps = format!("profile rbd pool=sata, profile rbd pool=sas, profile rbd-read-only pool={pool}");
    let entity = format!("client.{user}");
    let key = admin(&env, "ceph", &["auth", "get-or-create", &entity, "mon", "profile rbd", "osd", &caps]);
    let conf = conf_with(&env, &folder, &user, &key);
    let more = access(conf.to_str().expect("the path is text"), &user);
    run(&more, &["sync", &source, &target]).expect_code(0);
    run(&more, &["deps", &source]).expect_code(0);
    admin(&env, "ceph", &["auth", "rm", &entity]);
    for image in [&clone, &target["rbd:".len()..], &whole] {
        admin(&env, "rbd", &["snap", "purge", "--no-progress", image]);
        admin(&env, "rbd", &["rm", "--no-progress", image]);
    }
    remove_pool(&env, &pool);
}

/// `rbd ls` has the name, and nothing opens it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn an_image_without_its_header_says_what_is_missing() {
    let env = ceph();
    let (image, mut librbd) = (format!("sata/{}", name("no-header")), Librbd::start(&env));
    librbd.call(format!("cut-create {image}")).await;
    let conf = env.conf.to_str().expect("the path is text");
    let target = format!("rbd:sas/{}", name("no-header"));
    let words = ["--ceph-conf", conf, "--ceph-user", &env.user, "sync", &format!("rbd:{image}"), &target];
    let refused = poolshift(words).expect_code(5);
    let says = refused.stderr.contains("its object rbd_header.") && refused.stderr.contains(" is missing");
    assert!(says && !refused.stderr.contains("list the images"), "{}", refused.stderr);
    admin(&env, "rbd", &["rm", "--no-progress", &image]);
}

/// As for Ceph's own tools: `remote.conf` is of the cluster `remote`, whose keyring has that name.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn the_keyring_is_that_of_the_cluster_of_the_configuration_file() {
    let env = ceph();
    ceph_dev_folder(&env);
    let (folder, user) = (tempfile::tempdir().unwrap(), &env.user);
    let key = admin(&env, "ceph", &["auth", "get", &format!("client.{user}")]);
    let text = std::fs::read_to_string(&env.conf).unwrap();
    let keyring = folder.path().join("$cluster.$name.keyring");
    let conf = folder.path().join("remote.conf");
    std::fs::write(&conf, format!("{text}\n[client.{user}]\nkeyring = {}\n", keyring.display())).unwrap();
    let wanted = folder.path().join(format!("remote.client.{user}.keyring"));
    let run = || {
        let words = ["--ceph-conf", conf.to_str().expect("the path is text"), "--ceph-user", user];
        poolshift(words.iter().chain(&[
            "plan",
            "--from-pool",
            "rbd:sata",
            "--to-pool",
            "sas",
            "--match",
            "no-such-image",
        ]))
    };
    std::fs::write(folder.path().join(format!("ceph.client.{user}.keyring")), &key).unwrap();
    run().expect_code(1);
    std::fs::write(wanted, &key).unwrap();
    // Connected: there is no such image.
    run().expect_code(5);
}

/// What librados needs and may not read, which root may unless it gives up that capability.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_file_of_ceph_that_can_t_be_read_is_named() {
    let env = ceph();
    let folder = tempfile::tempdir().unwrap();
    ceph_dev_folder(&env);
    let key = admin(&env, "ceph", &["auth", "get", &format!("client.{}", env.user)]);
    let conf = conf_with(&env, &folder, &env.user, &key);
    let run = || {
        let poolshift = binary();
        let mut command = if rustix::process::geteuid().is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", "--"]);
            command.arg(poolshift.get_program());
            command
        } else {
            Command::new(poolshift.get_program())
        };
        command.arg("--ceph-conf").arg(&conf).args(["--ceph-user", &env.user]);
        command.args(["plan", "--from-pool", "rbd:sata", "--to-pool", "sas", "--match", "no-such-image"]);
        let output = command.env_remove("CEPH_ARGS").output().expect("setpriv is there");
        (output.status.code(), String::from_utf8(output.stderr).expect("text"))
    };
    // Connected: there is no such image.
    let usual = run();
    assert_eq!(usual.0, Some(5), "{}", usual.1);
    for (file, what) in [("keyring", "the keyring "), ("ceph.conf", "the configuration file ")] {
        let path = folder.path().join(file);
        let mode = |mode| std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        mode(0);
        let (code, told) = run();
        mode(0o600);
        let says = format!("{what}{} can't be read", path.display());
        assert!(code == Some(1) && told.contains(&says) && !told.contains("profile rbd"), "{code:?} {told}");
    }
}

/// A target without exclusive lock and object map works, and what is missing is said.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_target_without_features_works_and_says_so() {
    let env = ceph();
    let mut volume = Volume::new(&env, "bare", 31, 8 * MIB).await;
    volume.disk.librbd.remove(&[&volume.target]).await;
    volume.disk.librbd.create(&volume.target, &CreateOptions { features: 1, ..CreateOptions::new(8 * MIB) }).await;
    sync_ends(&volume, &[], 0, &["has no object map with fast-diff", "has no exclusive lock"]).await;
    volume.write().await;
    volume.converge("at the end").await;
    volume.remove().await;
}
