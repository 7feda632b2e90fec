//! `plan` and `check` on a real cluster.

use std::path::Path;
use std::process::Command;

use poolshift::image::rbd::CreateOptions;
use poolshift::plan::Plan;
use serde_json::Value;

use crate::ceph_faults::{admin, conf_with};
use crate::librbd::{Disk, Librbd, MIB, connect, name};
use crate::support::{CephEnv, Run, ceph, ceph_dev_folder, poolshift};

fn run(env: &CephEnv, words: &[&str]) -> Run {
    let conf = env.conf.to_str().expect("the path is text");
    poolshift(["--ceph-conf", conf, "--ceph-user", env.user.as_str()].iter().chain(words))
}

fn rbd(env: &CephEnv, words: &[&str]) {
    let mut command = Command::new("rbd");
    command.env_remove("CEPH_ARGS").arg("-c").arg(&env.conf).args(["--id", &env.user]).args(words);
    let output = command.output().expect("rbd runs");
    assert!(output.status.success(), "rbd {words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The report of `check`, which must end with this exit code.
fn check(env: &CephEnv, plan: &Path, code: i32) -> Value {
    let run = run(env, &["check", "--json", plan.to_str().expect("the path is text")]).expect_code(code);
    serde_json::from_str(&run.stdout).expect("one JSON value")
}

/// What the report says of a volume: its verdict, its target's state, and all findings.
fn told(report: &Value, name: &str) -> (String, String, String) {
    let volumes = report["volumes"].as_array().expect("a list");
    let volume = volumes.iter().find(|volume| volume["name"] == name).expect("the volume is in the report");
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let findings = volume["findings"].as_array().expect("a list").iter().map(|finding| text(&finding["text"]));
    (text(&volume["verdict"]), text(&volume["target_state"]), findings.collect::<Vec<_>>().join("\n"))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_pool_becomes_a_plan_that_is_right() {
    let env = ceph();
    let base = name("plan");
    let [small, large, trash] = ["small", "large", "trash"].map(|tag| format!("{base}-{tag}"));
    let mut disk = Disk::create(&env, &format!("sata/{small}"), 1, &CreateOptions::new(8 * MIB)).await;
    disk.write_noise(5 * MIB, MIB).await;
    disk.librbd.create(&format!("sata/{large}"), &CreateOptions::new(64 * MIB)).await;
    disk.librbd.create(&format!("sata/{trash}"), &CreateOptions::new(MIB)).await;
    rbd(&env, &["trash", "mv", &format!("sata/{trash}")]);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.toml");
    let (file, pattern) = (path.to_str().unwrap(), format!("{base}-*"));
    let words = ["plan", "--from-pool", "rbd:sata", "--to-pool", "sas", "--match", &pattern, "-o", file];
    run(&env, &words).expect_code(0);
    let again = run(&env, &words).expect_code(1);
    assert!(again.stderr.contains("File exists"), "{}", again.stderr);

    let plan = Plan::load(&path).unwrap();
    assert_eq!(plan.source_cluster.conf.as_deref(), Some(env.conf.as_path()));
    let sides: Vec<_> = plan.volumes().map(|(_, volume)| format!("{} {}", volume.source, volume.target)).collect();
    assert_eq!(sides, [&large, &small].map(|image| format!("rbd:sata/{image} rbd:sas/{image}")));
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("[[volume]]  # 8.0 MiB, at most 4.0 MiB used"), "{text}");
    // The same on standard output, but for the file's name.
    let shown = run(&env, &words[..words.len() - 2]).expect_code(0).stdout;
    assert_eq!(shown.replace("poolshift check FILE", &format!("poolshift check {file}")), text);

    let report = check(&env, &path, 0);
    assert_eq!((report["verdict"].as_str(), report["errors"].as_u64()), (Some("ok"), Some(0)), "{report:#}");
    let (verdict, state, findings) = told(&report, &small);
    assert_eq!((verdict.as_str(), state.as_str()), ("ok", "absent"));
    assert!(findings.starts_with("in use by client."), "{findings}");
    let rate = &report["rates"][0];
    assert_eq!((rate["pool"].as_str(), rate["first_copy_bytes"].as_u64()), (Some("sata"), Some(4 * MIB)));
    assert!(rate["measured"].as_u64().is_some_and(|measured| measured > 0), "{rate:#}");
    // Nothing has been made.
    assert!(connect(&env).await.images("sas", None).await.unwrap().iter().all(|image| image.name != small));

    run(&env, &["sync", &format!("rbd:sata/{small}"), &format!("rbd:sas/{small}")]).expect_code(0);
    disk.write_noise(0, MIB).await;
    let (verdict, state, _) = told(&check(&env, &path, 0), &small);
    assert_eq!((verdict.as_str(), state.as_str()), ("ok", "behind"));
    let table = run(&env, &["check", "--no-measure", file]).expect_code(0).stdout;
    assert!(table.contains("target behind") && table.contains("2 volumes: 0 errors, 0 warnings"), "{table}");

    let listed = Command::new("rbd")
        .env_remove("CEPH_ARGS")
        .arg("-c")
        .arg(&env.conf)
        .args(["--id", &env.user])
        .args(["trash", "ls", "sata"])
        .output()
        .unwrap()
        .stdout;
    let listed = String::from_utf8(listed).unwrap();
    let id = listed.lines().find_map(|line| line.strip_suffix(trash.as_str())).expect("it is in the trash").trim();
    rbd(&env, &["trash", "rm", &format!("sata/{id}")]);
    let images = [format!("sata/{small}"), format!("sata/{large}"), format!("sas/{small}")];
    disk.librbd.remove(&images.each_ref().map(String::as_str)).await;
}

/// After the first cutovers there is more in a pool than the disks of servers.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn what_was_put_aside_is_in_no_plan() {
    let env = ceph();
    let (base, connector) = (name("aside"), connect(&env).await);
    let mut librbd = Librbd::start(&env);
    let asides = ["kept.poolshift-kept", "volume-1.deleted", "vm.poolshift-rehearsal"];
    for tag in [&["disk"], &asides[..]].concat() {
        librbd.create(&format!("sata/{base}-{tag}"), &CreateOptions::new(MIB)).await;
    }
    let placeholder = format!("{base}-stands-in");
    let made = connector.prepare_placeholder("sata", None, &placeholder).await.unwrap();
    poolshift::image::Disk::rename(&made, &placeholder).await.unwrap();
    drop(made);
    let pattern = format!("{base}-*");
    let words = ["plan", "--from-pool", "rbd:sata", "--to-pool", "sas", "--match", &pattern];
    let plan = run(&env, &words).expect_code(0).stdout;
    assert_eq!(plan.matches("[[volume]]").count(), 1, "{plan}");
    assert!(plan.contains(&format!("source = \"rbd:sata/{base}-disk\"")), "{plan}");
    let of = |image: &str| plan.lines().any(|line| line.starts_with('#') && line.contains(image));
    let left_out: Vec<String> = asides.iter().map(|tag| format!("{base}-{tag}")).chain([placeholder]).collect();
    for image in &left_out {
        assert!(of(image), "nothing is said of {image}: {plan}");
    }
    let all: Vec<String> =
        left_out.iter().chain([&format!("{base}-disk")]).map(|image| format!("sata/{image}")).collect();
    librbd.remove(&all.iter().map(String::as_str).collect::<Vec<_>>()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_plan_is_told_what_is_wrong_with_it() {
    let env = ceph();
    let base = name("check");
    let mut librbd = Librbd::start(&env);
    let at = |pool: &str, tag: &str| format!("{pool}/{base}-{tag}");
    librbd.create(&at("sata", "foreign"), &CreateOptions::new(8 * MIB)).await;
    librbd.create(&at("sas", "foreign"), &CreateOptions::new(8 * MIB)).await;
    librbd.try_call(&format!("write {} 0", at("sas", "foreign")), b"somebody else's").await.unwrap();
    // Large objects, so that it is quickly removed again.
    let huge =
        CreateOptions { features: 1, object_size: 32 * MIB, stripe_unit: 32 * MIB, ..CreateOptions::new(20 << 30) };
    librbd.create(&at("sata", "huge"), &huge).await;
    librbd.call(format!("snap {} base", at("sata", "foreign"))).await;
    librbd.call(format!("clone {}@base {}", at("sata", "foreign"), at("sata", "clone"))).await;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.toml");
    let mut text = String::from("[[throttle]]\npool = \"no-such-pool\"\nbytes_per_second = \"1M\"\n");
    for (tag, pool) in [("foreign", "sas"), ("huge", "sas"), ("missing", "sas-2")] {
        let (source, target) = (at("sata", tag), at(pool, tag));
        text.push_str(&format!(
            "[[volume]]\nname = \"{tag}\"\nsource = \"rbd:{source}\"\ntarget = \"rbd:{target}\"\nbytes_per_second = \
             \"1M\"\n"
        ));
    }
    std::fs::write(&path, &text).unwrap();
    let report = check(&env, &path, 1);
    let (verdict, state, findings) = told(&report, "foreign");
    assert_eq!((verdict.as_str(), state.as_str()), ("error", "conflict"));
    assert!(findings.contains("poolshift did not make it; give an empty or new target"), "{findings}");
    assert!(findings.contains("clones depend on it (1)"), "{findings}");
    assert!(findings.contains("snapshots that poolshift did not name stay behind: 1"), "{findings}");
    let (verdict, state, findings) = told(&report, "huge");
    assert_eq!((verdict.as_str(), state.as_str()), ("warning", "absent"));
    assert!(findings.contains("has no object map with fast-diff"), "{findings}");
    assert!(findings.contains("how much of it is allocated is not known"), "{findings}");
    assert_eq!(report["volumes"][1]["first_copy_seconds"].as_u64(), Some(20 << 10), "at 1 MiB a second");
    let (verdict, _, findings) = told(&report, "missing");
    assert_eq!(verdict, "error");
    assert!(findings.contains("list the images: rbd ls sata") && findings.contains("no pool \"sas-2\""), "{findings}");
    let pools = report["pools"].to_string();
    assert!(pools.contains("throttle no-such-pool") && pools.contains("max_avail of `ceph df`"), "{pools}");
    // Its OSDs have 12 GiB each.
    ceph_dev_folder(&env);
    assert!(pools.contains("too much; add OSDs, or move fewer volumes"), "{pools}");

    std::fs::write(&path, text.replace("name = ", "nam = ")).unwrap();
    let refused = run(&env, &["check", path.to_str().unwrap()]).expect_code(2);
    assert!(refused.stdout.is_empty() && refused.stderr.contains("volume.nam: there is no such key"), "{refused:?}");
    run(&env, &["check", "/no/such/plan.toml"]).expect_code(5);
    librbd.remove(&[&at("sata", "clone")]).await;
    let images = [at("sata", "foreign"), at("sas", "foreign"), at("sata", "huge")];
    librbd.remove(&images.each_ref().map(String::as_str)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn pools_that_make_no_plan_are_refused() {
    let env = ceph();
    let same = run(&env, &["plan", "--from-pool", "sata", "--to-pool", "rbd:sata"]).expect_code(2);
    assert!(same.stderr.contains("are the same: rbd:sata"), "{}", same.stderr);
    let none = run(&env, &["plan", "--from-pool", "sata", "--to-pool", "sas", "--match", "no-such-*"]).expect_code(5);
    assert!(none.stderr.contains("it has no images that fit"), "{}", none.stderr);
    let missing = run(&env, &["plan", "--from-pool", "no-such-pool", "--to-pool", "sas"]).expect_code(5);
    assert!(missing.stderr.contains("hint: list the pools: ceph osd lspools"), "{}", missing.stderr);
    let namespace = run(&env, &["plan", "--from-pool", "sata/none", "--to-pool", "sas"]).expect_code(5);
    assert!(namespace.stderr.contains("rbd namespace create sata/none"), "{}", namespace.stderr);
}

/// A user that may read the pool of the targets, or of the sources, and not write there: known before the first copy.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_pool_that_may_not_be_written_is_an_error_of_the_check() {
    let env = ceph();
    ceph_dev_folder(&env);
    let image = name("caps");
    let mut librbd = Librbd::start(&env);
    librbd.create(&format!("sata/{image}"), &CreateOptions::new(MIB)).await;
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("plan.toml");
    let text = format!(
        "[[server]]\nname = \"web\"\ninterval = \"1m\"\n[[server.volume]]\nname = \"root\"\nsource = \
         \"rbd:sata/{image}\"\ntarget = \"rbd:sas/{image}\"\n"
    );
    std::fs::write(&plan, text).unwrap();
    assert_eq!(check(&env, &plan, 0)["errors"], 0);
    let (user, entity) = (name("reader"), format!("client.{}", name("reader")));
    for (may_write, denied) in [("sata", "target sas"), ("sas", "source sata")] {
        let other = if may_write == "sata" { "sas" } else { "sata" };
        let caps = format!("profile rbd pool={may_write}, profile rbd-read-only pool={other}");
        let key = admin(&env, "ceph", &["auth", "get-or-create", &entity, "mon", "profile rbd", "osd", &caps]);
        let theirs = CephEnv { conf: conf_with(&env, &folder, &user, &key), user: user.clone(), ..env.clone() };
        let report = check(&theirs, &plan, 1);
        let pools = report["pools"].as_array().unwrap();
        let refused: Vec<_> = pools.iter().filter(|pool| pool["verdict"] == "error").collect();
        assert!(refused.len() == 1 && refused[0]["pool"] == denied, "{report}");
        let finding = refused[0]["findings"][0]["text"].as_str().unwrap();
        assert!(finding.contains("'profile rbd' on pool"), "{finding}");
        admin(&env, "ceph", &["auth", "rm", &entity]);
    }
    librbd.remove(&[&format!("sata/{image}")]).await;
}

/// A QoS limit of librbd's: a copy keeps within it without a request that comes too late, and what is too low for any
/// request is named, with what shows it; `check` names it beforehand.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_limit_of_the_source_is_kept_to_and_named() {
    let env = ceph();
    let image = name("qos");
    let (source, target) = (format!("sata/{image}"), format!("sas/{image}"));
    let mut disk = Disk::create(&env, &source, 4, &CreateOptions::new(24 * MIB)).await;
    disk.write_noise(0, 24 * MIB).await;
    disk.librbd.call(format!("close {source}")).await;
    let limit = |bytes: u64| {
        rbd(&env, &["config", "image", "set", &source, "rbd_qos_read_bps_limit", &bytes.to_string()]);
    };
    let (rbd_source, rbd_target) = (format!("rbd:{source}"), format!("rbd:{target}"));
    let sync = ["--io-timeout", "16", "sync", &rbd_source, &rbd_target];

    // 4 MiB, which are read at once, take 20 s.
    limit(MIB / 5);
    let late = run(&env, &sync).expect_code(7);
    assert!(late.stderr.contains("rbd_qos_read_bps_limit = 209715 of image"), "{}", late.stderr);
    let shown = format!("rbd config image get {source} rbd_qos_read_bps_limit");
    assert!(late.stderr.contains(&shown) && !late.stderr.contains("ceph -s"), "{}", late.stderr);

    // All at once the last of them would take 24 s.
    limit(MIB);
    run(&env, &sync).expect_code(0);
    assert!(disk.librbd.read(&target).await == disk.bytes);

    rbd(&env, &["config", "image", "set", &target, "rbd_qos_write_iops_limit", "1000"]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.toml");
    let words = ["plan", "--from-pool", "rbd:sata", "--to-pool", "sas", "--match", &image, "-o"];
    run(&env, &[&words[..], &[path.to_str().unwrap()]].concat()).expect_code(0);
    let report = run(&env, &["check", "--no-measure", "--json", path.to_str().unwrap()]).expect_code(0);
    let (verdict, _, findings) = told(&serde_json::from_str(&report.stdout).unwrap(), &image);
    assert_eq!(verdict, "warning");
    assert!(findings.contains("reading is limited: rbd_qos_read_bps_limit = 1048576 of image"), "{findings}");
    assert!(findings.contains("writing is limited: rbd_qos_write_iops_limit = 1000 of image"), "{findings}");
    disk.librbd.remove(&[&source, &target]).await;
}
