//! The commands on a real Ceph, as a user runs them, beside Ceph's own `rbd`.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use crate::support::{CephEnv, Run, binary, ceph};

/// An image name that nobody else uses, on both pools, removed at the end with its variants.
struct Volume {
    env: CephEnv,
    name: String,
}

impl Volume {
    /// A source of `mib` MiB with something in it; `None` without a Ceph.
    #[track_caller]
    fn new(mib: u32) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let env = ceph();
        let name = format!("commands-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let volume = Self { env, name };
        volume.rbd(&format!("create sata/NAME --size {mib}M"));
        volume.scribble();
        volume
    }

    fn args(&self, line: &str) -> Vec<String> {
        line.split_whitespace().map(|word| word.replace("NAME", &self.name)).collect()
    }

    /// Runs `rbd`; `NAME` stands for the volume's name. Returns its output.
    #[track_caller]
    fn rbd(&self, line: &str) -> Vec<u8> {
        let output = Command::new("rbd")
            .arg("--conf")
            .arg(&self.env.conf)
            .args(["--id", &self.env.user])
            .args(self.args(line))
            .stdin(Stdio::null())
            .env_remove("CEPH_ARGS")
            .output()
            .expect("rbd runs");
        assert!(output.status.success(), "rbd {line}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// Writes 32 pieces of 16 KiB anywhere in the source.
    #[track_caller]
    fn scribble(&self) {
        self.rbd("bench sata/NAME --io-type write --io-pattern rand --io-size 16K --io-total 512K");
    }

    #[track_caller]
    fn snapshot(&self, name: &str) {
        self.rbd(&format!("snap create --no-progress sata/NAME@{name}"));
    }

    /// Runs poolshift with `input`.
    fn feed(&self, line: &str, input: &[u8]) -> (Run, Vec<u8>) {
        use std::io::Write as _;
        let mut child = binary()
            .args(self.args(line))
            .env("CEPH_CONF", &self.env.conf)
            .env("POOLSHIFT_CEPH_USER", &self.env.user)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut stdin = child.stdin.take().expect("standard input is piped");
        let output = std::thread::scope(|scope| {
            scope.spawn(move || {
                // One that refuses its input does not read it: its exit code says why.
                let _ = stdin.write_all(input);
            });
            child.wait_with_output().expect("the binary ends")
        });
        let run = Run {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        };
        (run, output.stdout)
    }

    /// Runs poolshift, whose exit code must be `code`.
    #[track_caller]
    fn run(&self, code: i32, line: &str) -> Run {
        self.feed(line, b"").0.expect_code(code)
    }

    /// Runs poolshift; returns its JSON.
    #[track_caller]
    fn json(&self, line: &str) -> Value {
        let run = self.run(0, line);
        serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {}", run.stdout))
    }

    /// What an image holds, as `rbd export` reads it.
    #[track_caller]
    fn content(&self, image: &str) -> blake3::Hash {
        blake3::hash(&self.rbd(&format!("export --no-progress {image} -")))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        for pool in ["sata", "sas"] {
            let listed = self.rbd(&format!("ls {pool}"));
            let listed = String::from_utf8_lossy(&listed).into_owned();
            let own = format!("{}-", self.name);
            for image in listed.lines().filter(|image| *image == self.name || image.starts_with(&own)) {
                self.rbd(&format!("snap purge --no-progress {pool}/{image}"));
                self.rbd(&format!("rm --no-progress {pool}/{image}"));
            }
        }
    }
}

#[test]
#[ignore = "needs Ceph"]
fn a_volume_follows_its_source() {
    let volume = Volume::new(32);
    let sync = "sync rbd:sata/NAME rbd:sas/NAME --json";
    let plan = volume.json(&format!("{sync} --dry-run"));
    assert_eq!((&plan["action"], &plan["creates_target"]), (&Value::from("full"), &Value::from(true)));
    let first = volume.json(&format!("{sync} --snapshot a"));
    assert_eq!((&first["base"], &first["snapshot"]), (&Value::Null, &Value::from("a")));

    volume.scribble();
    volume.rbd("resize --no-progress sata/NAME --size 48M");
    volume.scribble();
    let status = volume.json("status rbd:sata/NAME rbd:sas/NAME --json");
    assert_eq!((&status["state"], &status["base"]["snapshot"]), (&Value::from("behind"), &Value::from("a")));
    let second = volume.json(&format!("{sync} --snapshot b"));
    assert_eq!((&second["base"], &second["method"]["name"]), (&Value::from("a"), &Value::from("two-level")));
    assert!(second["bytes_written"].as_u64().is_some_and(|bytes| bytes <= 2 * (512 << 10)), "{second}");

    volume.rbd("resize --no-progress --allow-shrink sata/NAME --size 20M");
    volume.json(&format!("{sync} --snapshot c"));
    for snapshot in ["a", "b", "c"] {
        let contents = ["sata", "sas"].map(|pool| volume.content(&format!("{pool}/NAME@{snapshot}")));
        assert_eq!(contents[0], contents[1], "{snapshot}");
        volume.run(0, &format!("verify rbd:sata/NAME@{snapshot} rbd:sas/NAME@{snapshot}"));
    }
    volume.run(3, "verify rbd:sata/NAME@b rbd:sas/NAME@a");
    let status = volume.json("status rbd:sata/NAME rbd:sas/NAME --json");
    assert_eq!((&status["state"], &status["lease"]), (&Value::from("in-step"), &Value::Null));
}

#[test]
#[ignore = "needs Ceph"]
fn diffs_and_rbds_are_interchangeable() {
    let volume = Volume::new(32);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    volume.snapshot("a");
    volume.scribble();
    volume.rbd("resize --no-progress sata/NAME --size 48M");
    volume.scribble();
    volume.snapshot("b");
    // What was beyond 16 MiB reads as zeroes from here on.
    volume.rbd("resize --no-progress --allow-shrink sata/NAME --size 16M");
    volume.rbd("resize --no-progress sata/NAME --size 24M");
    volume.scribble();
    volume.snapshot("c");

    let steps = [("", "a"), ("a", "b"), ("b", "c")];
    for (from, to) in steps {
        let (ours, theirs) = (path(&format!("ours-{to}")), path(&format!("theirs-{to}")));
        let (from_flag, rbd_flag) = match from {
            "" => (String::new(), String::new()),
            from => (format!("--from {from}"), format!("--from-snap {from}")),
        };
        volume.run(0, &format!("export-diff rbd:sata/NAME@{to} {ours} {from_flag}"));
        volume.rbd(&format!("export-diff --no-progress sata/NAME@{to} {theirs} {rbd_flag}"));
        volume.run(0, &format!("inspect {ours}"));
        volume.run(0, &format!("inspect {theirs}"));
    }
    volume.rbd("create sas/NAME-rbd --size 1M");
    volume.rbd("create sas/NAME-ours --size 1M");
    for (_, to) in steps {
        volume.rbd(&format!("import-diff --no-progress {} sas/NAME-rbd", path(&format!("ours-{to}"))));
        volume.run(0, &format!("import-diff {} rbd:sas/NAME-ours", path(&format!("theirs-{to}"))));
        let source = volume.content(&format!("sata/NAME@{to}"));
        assert_eq!(volume.content(&format!("sas/NAME-rbd@{to}")), source, "our diff, imported by rbd: {to}");
        assert_eq!(volume.content(&format!("sas/NAME-ours@{to}")), source, "rbd's diff, imported by us: {to}");
    }

    volume.run(0, &format!("merge-diff {} {} {}", path("ours-a"), path("theirs-b"), path("ab")));
    volume.run(0, &format!("merge-diff {} {} {}", path("ab"), path("ours-c"), path("abc")));
    volume.rbd("create sas/NAME-merged --size 1M");
    volume.rbd(&format!("import-diff --no-progress {} sas/NAME-merged", path("abc")));
    assert_eq!(volume.content("sas/NAME-merged@c"), volume.content("sata/NAME@c"));
    volume.run(4, &format!("merge-diff {} {} {}", path("ours-a"), path("ours-c"), path("wrong")));
    assert!(!folder.path().join("wrong").exists());
}

#[test]
#[ignore = "needs Ceph"]
fn extents_are_those_that_rbd_lists() {
    let volume = Volume::new(32);
    volume.snapshot("a");
    volume.scribble();
    volume.snapshot("b");
    let rows = |text: &[u8]| -> Vec<Value> { serde_json::from_slice(text).expect("an array") };
    let theirs = rows(&volume.rbd("diff --format json sata/NAME@b --from-snap a"));
    for exact in ["", "--exact"] {
        let ours = volume.run(0, &format!("diff rbd:sata/NAME@b --from a --json {exact}"));
        assert_eq!(rows(ours.stdout.as_bytes()), theirs, "{exact}");
    }
}

#[test]
#[ignore = "needs Ceph"]
fn a_stream_is_applied_only_where_it_fits_and_only_whole() {
    let volume = Volume::new(32);
    volume.snapshot("a");
    volume.scribble();
    volume.snapshot("b");
    let sent = |line: &str| {
        let (run, stream) = volume.feed(line, b"");
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        stream
    };
    let (first, second) = (sent("send rbd:sata/NAME@a"), sent("send rbd:sata/NAME@b --from a"));

    volume.feed("receive rbd:sas/NAME-r", &second).0.expect_code(5);
    volume.feed("receive rbd:sas/NAME-r", &first[..first.len() - 1]).0.expect_code(8);
    volume.feed("receive rbd:sas/NAME-r", &first).0.expect_code(0);
    assert_eq!(volume.content("sas/NAME-r@a"), volume.content("sata/NAME@a"));

    let mut flipped = second.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    volume.feed("receive rbd:sas/NAME-r", &flipped).0.expect_code(8);
    volume.feed("inspect -", &flipped).0.expect_code(8);
    let (run, _) = volume.feed("receive rbd:sas/NAME-r --json", &second);
    let report: Value = serde_json::from_str(&run.expect_code(0).stdout).expect("a report");
    assert_eq!((&report["base"], &report["snapshot"]), (&Value::from("a"), &Value::from("b")));
    assert_eq!(volume.content("sas/NAME-r@b"), volume.content("sata/NAME@b"));

    volume.rbd("create sas/NAME-other --size 32M");
    volume.feed("receive rbd:sas/NAME-other", &second).0.expect_code(4);
}

#[test]
#[ignore = "needs Ceph"]
fn a_target_that_somebody_wrote_is_a_conflict() {
    let volume = Volume::new(16);
    volume.run(0, "sync rbd:sata/NAME rbd:sas/NAME --snapshot a");
    volume.rbd("bench sas/NAME --io-type write --io-pattern rand --io-size 16K --io-total 64K");
    let refused = volume.run(4, "sync rbd:sata/NAME rbd:sas/NAME --snapshot b");
    assert!(refused.stderr.contains("written by someone else") && refused.stderr.contains("--full"), "{refused:?}");
    volume.run(0, "sync rbd:sata/NAME rbd:sas/NAME --snapshot b --full");
    assert_eq!(volume.content("sas/NAME@b"), volume.content("sata/NAME@b"));
}

#[test]
#[ignore = "needs Ceph"]
fn what_is_missing_or_not_allowed_is_named() {
    let volume = Volume::new(4);
    for (code, line, text) in [
        (5, "sync rbd:sata/NAME-none rbd:sas/NAME", "has no image"),
        (5, "sync rbd:nothing/NAME rbd:sas/NAME", "no pool \"nothing\""),
        (5, "sync rbd:sata/NAME rbd:nothing/NAME", "no pool \"nothing\""),
        (5, "diff rbd:sata/NAME@none", "no such snapshot"),
        (5, "status rbd:sata/NAME rbd:sas/NAME", "has no image"),
        (2, "sync rbd:sata/NAME rbd:sata/NAME", "the same image"),
        (1, "sync rbd:sata/NAME rbd:sas/NAME --ceph-user nobody", "ceph auth get client.nobody"),
        (5, "sync rbd:sata/NAME rbd:sas/NAME --ceph-conf /nonexistent/ceph.conf", "/nonexistent/ceph.conf"),
    ] {
        let run = volume.run(code, line);
        assert!(run.stderr.contains(text), "{line}\n{}\ndoes not say: {text}", run.stderr);
    }
}
