//! `poolshift finalize` on a real cluster: a server of two disks, run by shell commands, is cut over and loses its
//! sources.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cutover_bed::run_killed_at;
use crate::librbd::Librbd;
use crate::support::{CephEnv, Run, binary, ceph, poolshift};

/// Nothing here takes as long; what does has failed.
const PATIENCE: Duration = Duration::from_secs(120);

const DISKS: [&str; 2] = ["root", "data"];

/// A server in a plan, cut over.
struct Bed {
    env: CephEnv,
    name: String,
    dir: tempfile::TempDir,
}

impl Bed {
    /// `None` without a Ceph.
    #[track_caller]
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let env = ceph();
        let name = format!("final-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let bed = Self { env, name, dir: tempfile::tempdir().expect("a folder") };
        std::fs::write(bed.state_file(), "running source\n").expect("a state");
        std::fs::write(bed.plan(), bed.plan_text()).expect("a plan");
        for disk in DISKS {
            bed.rbd(&format!("create sata/NAME-{disk} --size 32M"));
            bed.fill(&format!("sata/NAME-{disk}"), 8);
        }
        bed
    }

    fn state_file(&self) -> String {
        self.dir.path().join("state").display().to_string()
    }

    fn plan(&self) -> String {
        self.dir.path().join("plan.toml").display().to_string()
    }

    fn plan_text(&self) -> String {
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let (conf, user, state) = (self.env.conf.display(), &self.env.user, self.state_file());
        let mut text = format!("[api]\nlisten = \"{}\"\n[defaults]\ninterval = \"1s\"\n", free.expect("a free port"));
        for side in ["source", "target"] {
            text += &format!("[{side}]\nconf = \"{conf}\"\nuser = \"{user}\"\n");
        }
        text += "[[server]]\nname = \"web\"\n";
        for disk in DISKS {
            let image = format!("{}-{disk}", self.name);
            text += &format!(
                "[[server.volume]]\nname = \"{disk}\"\nsource = \"rbd:sata/{image}\"\ntarget = \"rbd:sas/{image}\"\n"
            );
        }
        text + &format!(
            "[server.cutover.command]\nlimit = \"20s\"\nstate = \"cat {state}\"\n\
             stop = \"sed -i s/running/off/ {state}\"\n\
             swap = \"echo off $POOLSHIFT_SIDE > {state}\"\nstart = \"echo running $POOLSHIFT_SIDE > {state}\"\n"
        )
    }

    fn args(&self, line: &str) -> Vec<String> {
        line.split_whitespace().map(|word| word.replace("NAME", &self.name).replace("PLAN", &self.plan())).collect()
    }

    fn try_rbd(&self, line: &str) -> Result<String, String> {
        let mut command = Command::new("rbd");
        command.arg("--conf").arg(&self.env.conf).args(["--id", &self.env.user]).args(self.args(line));
        let output = command.stdin(Stdio::null()).env_remove("CEPH_ARGS").output().expect("rbd runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Runs `rbd`; `NAME` stands for the bed's name.
    #[track_caller]
    fn rbd(&self, line: &str) -> String {
        self.try_rbd(line).unwrap_or_else(|error| panic!("rbd {line}: {error}"))
    }

    fn fill(&self, image: &str, mib: u64) {
        self.rbd(&format!(
            "bench {image} --io-type write --io-pattern seq --io-threads 1 --io-size 1M --io-total {mib}M"
        ));
    }

    fn run(&self, line: &str) -> Run {
        poolshift(self.args(line))
    }

    /// Copies both disks.
    #[track_caller]
    fn replicate(&self) {
        let command = binary().args(self.args("replicate PLAN")).stderr(Stdio::null()).spawn();
        let mut daemon = Daemon(command.expect("the daemon starts"));
        let begin = Instant::now();
        loop {
            let status: Value = serde_json::from_str(&self.run("status PLAN --json").expect_code(0).stdout).unwrap();
            if status["servers"][0]["point"].is_object() {
                break;
            }
            assert!(begin.elapsed() < PATIENCE, "{status:#}");
            std::thread::sleep(Duration::from_millis(200));
        }
        daemon.stop();
    }

    #[track_caller]
    fn cut_over(&self) {
        self.replicate();
        self.run("cutover PLAN web --yes").expect_code(0);
        assert_eq!(std::fs::read_to_string(self.state_file()).unwrap(), "running target\n");
    }

    fn snapshots(&self, image: &str) -> Vec<String> {
        let listed: Value = serde_json::from_str(&self.rbd(&format!("snap ls {image} --format json"))).unwrap();
        let name = |snapshot: &Value| snapshot["name"].as_str().unwrap().to_owned();
        listed.as_array().unwrap().iter().map(name).collect()
    }

    fn has_metadata(&self, image: &str, key: &str) -> bool {
        self.try_rbd(&format!("image-meta get {image} {key}")).is_ok()
    }

    /// Runs `rados` on the header of an image of a pool.
    #[track_caller]
    fn on_header(&self, (pool, image): (&str, &str), words: &[&str], input: Option<&Path>) -> Vec<u8> {
        let info: Value = serde_json::from_str(&self.rbd(&format!("info {pool}/{image} --format json"))).unwrap();
        let header = format!("rbd_header.{}", info["id"].as_str().unwrap());
        let mut command = Command::new("rados");
        command.arg("-c").arg(&self.env.conf).args(["--id", &self.env.user, "-p", pool]).env_remove("CEPH_ARGS");
        command.arg(words[0]).arg(header).args(&words[1..]);
        if let Some(input) = input {
            command.arg("--input-file").arg(input);
        }
        let output = command.output().expect("rados runs");
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// Sets a key of an image's metadata to any bytes, which `rbd` can't.
    #[track_caller]
    fn set_bytes(&self, at: (&str, &str), key: &str, value: &[u8]) {
        let file = self.dir.path().join("value");
        std::fs::write(&file, value).expect("the value is written");
        self.on_header(at, &["setomapval", &format!("metadata_{key}")], Some(&file));
    }

    /// The bytes of a key of an image's metadata.
    #[track_caller]
    fn bytes(&self, at: (&str, &str), key: &str) -> Vec<u8> {
        let file = self.dir.path().join("found");
        self.on_header(at, &["getomapval", &format!("metadata_{key}"), &file.display().to_string()], None);
        std::fs::read(file).expect("the value was written")
    }

    /// Whether the journal says that the server is being finalized.
    #[track_caller]
    fn is_finalizing(&self) -> bool {
        let journal: Value = serde_json::from_str(&self.rbd("image-meta get sas/NAME-root poolshift.cutover")).unwrap();
        journal["finalizing"] == true
    }

    fn content(&self, image: &str) -> blake3::Hash {
        let mut command = Command::new("rbd");
        command.arg("--conf").arg(&self.env.conf).args(["--id", &self.env.user]);
        command.args(self.args(&format!("export --no-progress {image} -"))).env_remove("CEPH_ARGS");
        let output = command.output().expect("rbd runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        blake3::hash(&output.stdout)
    }

    /// Nothing of the sources is left, and nothing of poolshift's on the targets.
    #[track_caller]
    fn expect_finalized(&self, foreign: &[&str]) {
        let sources = self.rbd("ls sata");
        assert!(!sources.lines().any(|image| self.is_source(image)), "{sources}");
        for disk in DISKS {
            let target = format!("sas/NAME-{disk}");
            let expected: &[&str] = if disk == "root" { foreign } else { &[] };
            assert_eq!(self.snapshots(&target), expected);
            for key in ["poolshift.state", "poolshift.cutover", "poolshift.note", "poolshift.carried"] {
                assert!(!self.has_metadata(&target, key), "{target} {key}");
            }
        }
    }

    fn is_source(&self, image: &str) -> bool {
        DISKS.iter().any(|disk| image.starts_with(&format!("{}-{disk}", self.name)))
    }

    /// A finalize that is killed at a failpoint.
    #[track_caller]
    fn killed_at(&self, failpoint: &str) {
        let mut command = binary();
        command.args(self.args("finalize PLAN web --yes --flatten"));
        run_killed_at(command, failpoint);
    }
}

struct Daemon(Child);

impl Daemon {
    fn stop(&mut self) {
        let pid = self.0.id().to_string();
        let _ = Command::new("kill").args(["-TERM", &pid]).status();
        let _ = self.0.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // Clones first, whatever their order.
        for _ in 0..3 {
            for pool in ["sata", "sas"] {
                let listed = self.try_rbd(&format!("ls {pool}")).unwrap_or_default();
                let own = format!("{}-", self.name);
                for image in listed.lines().filter(|image| image.starts_with(&own)) {
                    let _ = self.try_rbd(&format!("snap unprotect {pool}/{image}@theirs"));
                    let _ = self.try_rbd(&format!("snap purge --no-progress {pool}/{image}"));
                    let _ = self.try_rbd(&format!("rm --no-progress {pool}/{image}"));
                }
            }
        }
    }
}

#[test]
#[ignore = "needs Ceph"]
fn a_server_is_finalized_and_nothing_is_left_but_its_targets() {
    let bed = Bed::new();
    bed.replicate();
    let early = bed.run("finalize PLAN web --yes").expect_code(1);
    assert!(early.stderr.contains("was not cut over"), "{}", early.stderr);
    bed.cut_over();
    bed.rbd("snap create --no-progress sata/NAME-root.poolshift-kept@theirs");
    bed.rbd("snap protect sata/NAME-root.poolshift-kept@theirs");
    bed.rbd("clone --rbd-default-clone-format 1 sata/NAME-root.poolshift-kept@theirs sata/NAME-hanging");
    bed.rbd("snap create --no-progress sas/NAME-root@mine");
    let contents = ["sata/NAME-hanging", "sas/NAME-root", "sas/NAME-data"].map(|image| bed.content(image));

    // A clone hangs on it, and so it is refused; a look says the same, and nothing changes.
    let dry = bed.run("finalize PLAN web --dry-run").expect_code(1);
    println!("{}", dry.stdout);
    assert!(dry.stdout.contains("@theirs") && dry.stdout.contains("FOREIGN") && dry.stdout.contains("give --flatten"));
    assert!(!dry.stdout.contains("@mine"), "{}", dry.stdout);
    let hanging = bed.run("finalize PLAN web --yes").expect_code(14);
    assert!(hanging.stderr.contains("-hanging is a clone"), "{}", hanging.stderr);
    let json = bed.run("finalize PLAN web --flatten --dry-run --json").expect_code(0).stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["ready"], &json["begun"]), (&Value::Bool(true), &Value::Bool(false)), "{json:#}");
    assert!(json["volumes"][0]["source"]["clones"][0]["cost"]["bytes_at_most"].as_u64() > Some(0), "{json:#}");
    let unasked = bed.run("finalize PLAN web --flatten").expect_code(2);
    assert!(unasked.stderr.contains("--yes"), "{}", unasked.stderr);
    // Nobody has agreed to anything yet.
    assert!(!bed.is_finalizing());

    // A server that does not run from its targets needs its sources.
    std::fs::write(bed.state_file(), "running source\n").unwrap();
    let strayed = bed.run("finalize PLAN web --flatten --yes").expect_code(14);
    assert!(strayed.stderr.contains("on its sources, which would go"), "{}", strayed.stderr);
    std::fs::write(bed.state_file(), "running target\n").unwrap();

    let done = bed.run("finalize PLAN web --flatten --yes").expect_code(0);
    println!("{}{}", done.stderr, done.stdout);
    assert!(done.stdout.contains("web is finalized: 1 clone flattened, 2 sources and "), "{}", done.stdout);
    assert!(done.stdout.contains("take it out of the plan"), "{}", done.stdout);
    bed.expect_finalized(&["mine"]);
    let images = ["sata/NAME-hanging", "sas/NAME-root", "sas/NAME-data"];
    assert_eq!(images.map(|image| bed.content(image)), contents);

    let again = bed.run("finalize PLAN web --yes").expect_code(1);
    assert!(again.stderr.contains("is finalized already") && again.stderr.contains("out of the plan"), "{again:?}");
    let back = bed.run("rollback PLAN web --with-changes --yes").expect_code(5);
    assert!(back.stderr.contains("if the server was finalized"), "{}", back.stderr);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Ceph"]
async fn a_source_in_use_is_not_removed() {
    let bed = Bed::new();
    bed.cut_over();
    let kept = format!("sata/{}-data.poolshift-kept", bed.name);
    let mut user = Librbd::start(&bed.env);
    user.try_call(&format!("write {kept} 0"), &[1; 4096]).await.unwrap();
    let open = bed.run("finalize PLAN web --yes").expect_code(14);
    assert!(open.stderr.contains("-data.poolshift-kept is open at "), "{}", open.stderr);
    assert!(bed.has_metadata("sas/NAME-root", "poolshift.note"));
    assert!(!bed.is_finalizing());
    user.kill().await;
}

/// A removal takes the header away before the name.
#[test]
#[ignore = "needs Ceph"]
fn the_name_that_a_removal_which_was_cut_has_left_goes_as_well() {
    let bed = Bed::new();
    bed.cut_over();
    let kept = "sata/NAME-data.poolshift-kept";
    bed.rbd(&format!("snap purge --no-progress {kept}"));
    let info: Value = serde_json::from_str(&bed.rbd(&format!("info {kept} --format json"))).unwrap();
    let mut command = Command::new("rados");
    command.arg("-c").arg(&bed.env.conf).args(["--id", &bed.env.user, "-p", "sata", "rm"]).env_remove("CEPH_ARGS");
    let header = format!("rbd_header.{}", info["id"].as_str().unwrap());
    assert!(command.arg(header).status().expect("rados runs").success());
    assert!(bed.try_rbd(&format!("info {kept}")).is_err());
    let done = bed.run("finalize PLAN web --yes").expect_code(0);
    assert!(done.stderr.contains("its source has gone already"), "{}", done.stderr);
    bed.expect_finalized(&[]);
}

#[test]
#[ignore = "needs Ceph"]
fn a_finalize_that_is_killed_is_finished_and_there_is_no_way_back() {
    let bed = Bed::new();
    bed.cut_over();
    bed.rbd("snap create --no-progress sata/NAME-root.poolshift-kept@theirs");
    bed.rbd("clone --rbd-default-clone-format 2 sata/NAME-root.poolshift-kept@theirs sata/NAME-hanging");
    let steps = [
        "finalize.begun",
        "finalize.flattened",
        "finalize.snapshot-removed",
        "finalize.source-removed",
        "finalize.source-removed",
        "finalize.target-tidied",
        "finalize.target-tidied#2",
        "finalize.note-removed",
    ];
    for step in steps {
        bed.killed_at(step);
        assert!(bed.has_metadata("sas/NAME-root", "poolshift.cutover"), "{step}: the journal goes last");
        // There is no way back, and none forth.
        for command in ["rollback PLAN web --with-changes --yes", "cutover PLAN web --yes"] {
            bed.run(command).expect_code(1);
            assert!(bed.is_finalizing(), "{step}: {command}");
        }
    }
    bed.killed_at("finalize.journal-removed");
    bed.expect_finalized(&[]);
    bed.rbd("info sata/NAME-hanging");
    bed.run("finalize PLAN web --yes --flatten").expect_code(1);
}

/// Limits, a CSI driver's wrapped key, owners: what belongs to a disk beside its bytes.
#[test]
#[ignore = "needs Ceph"]
fn metadata_goes_there_and_back_and_what_is_lost_with_the_source_is_named() {
    const LIMIT: &str = "conf_rbd_qos_bps_limit";
    const WRAPPED: [&str; 2] = ["rbd.csi.ceph.com/dek", ".rbd.csi.ceph.com/dek"];
    let bed = Bed::new();
    let (source, kept, target) = ("sata/NAME-root", "sata/NAME-root.poolshift-kept", "sas/NAME-root");
    let [name, kept_name] = [format!("{}-root", bed.name), format!("{}-root.poolshift-kept", bed.name)];
    let (here, there) = (("sata", name.as_str()), ("sas", name.as_str()));
    let wrapped: Vec<u8> = (0..20_000u32).map(|at| (at % 256) as u8).collect();
    for key in WRAPPED {
        bed.set_bytes(here, key, &wrapped);
    }
    // More than is read at once, in keys and in bytes.
    for number in 0..17 {
        bed.set_bytes(here, &format!("label-{number:02}"), b"l\0");
    }
    for number in 0..3 {
        bed.set_bytes(here, &format!("large-{number}"), &vec![number; 500_000]);
    }
    bed.rbd(&format!("image-meta set {source} {LIMIT} 8589934592"));
    bed.rbd(&format!("image-meta set {source} owner alice"));
    bed.set_bytes(here, ".rbd_mirror.4f2c", b"{}");
    bed.replicate();
    bed.rbd(&format!("image-meta set {target} owner nobody"));
    bed.rbd(&format!("image-meta set {target} theirs x"));

    bed.rbd("group create sata/NAME-group");
    bed.rbd("group image add sata/NAME-group sata/NAME-root");
    let check = bed.run("check PLAN --json").expect_code(0).stdout;
    bed.rbd("group rm sata/NAME-group");
    for told in
        ["is carried at a cutover", "its limits hold", "NOT carried: .rbd_mirror.4f2c", "member of an rbd group"]
    {
        assert!(check.contains(told), "{told}: {check}");
    }
    assert_eq!(check.matches("member of an rbd group").count(), 1, "the other disk is in none: {check}");
    let dry = bed.run("cutover PLAN web --dry-run").expect_code(0).stdout;
    assert!(dry.contains("its values replace those that the other image has: owner"), "{dry}");

    let cutover = || {
        let mut command = binary();
        command.args(bed.args("cutover PLAN web --yes"));
        command
    };
    run_killed_at(cutover(), "image.metadata-changed#5");
    run_killed_at(cutover(), "cutover.metadata-carried");
    bed.run("cutover PLAN web --yes").expect_code(0);
    for key in WRAPPED {
        assert!(bed.bytes(there, key) == wrapped, "{key}");
    }
    assert_eq!(bed.bytes(there, "label-16"), b"l\0");
    assert!(bed.bytes(there, "large-2") == vec![2; 500_000]);
    assert_eq!([LIMIT, "owner", "theirs"].map(|key| bed.bytes(there, key)), [&b"8589934592"[..], b"alice", b"x"]);
    assert!(!bed.has_metadata(target, ".rbd_mirror.4f2c"));

    // What has become of it there comes back.
    bed.rbd(&format!("image-meta remove {target} {LIMIT}"));
    bed.rbd(&format!("image-meta set {target} owner bob"));
    bed.rbd(&format!("image-meta set {kept} kept-only y"));
    bed.run("rollback PLAN web --with-changes --yes").expect_code(0);
    assert!(!bed.has_metadata(source, LIMIT));
    assert_eq!(["owner", "theirs", "kept-only"].map(|key| bed.bytes(here, key)), [&b"bob"[..], b"x", b"y"]);
    assert!(bed.bytes(here, WRAPPED[1]) == wrapped);

    bed.run("cutover PLAN web --yes").expect_code(0);
    bed.rbd(&format!("image-meta remove {target} theirs"));
    bed.rbd(&format!("image-meta set {target} owner carol"));
    bed.set_bytes(("sata", &kept_name), "late", &[0; 3]);
    let dry = bed.run("finalize PLAN web --dry-run").expect_code(0).stdout;
    println!("{dry}");
    let lost: Vec<&str> = dry.lines().filter_map(|line| line.trim().strip_prefix("metadata ")).collect();
    let owner = "owner, 3 bytes; the target has another value";
    assert_eq!(lost, ["late, 3 bytes; NOT on the target", owner, ".rbd_mirror.4f2c; NOT on the target"]);
    bed.run("finalize PLAN web --yes").expect_code(0);
    bed.expect_finalized(&[]);
    assert!(bed.bytes(there, WRAPPED[0]) == wrapped && bed.bytes(there, "owner") == b"carol");
}
