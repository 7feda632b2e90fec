//! The commands on `file:` images, as a user runs them.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use serde_json::Value;

use crate::cutover_bed::stopped_at;
use crate::support::{Run, binary, poolshift};

/// A folder with a source disk in it.
struct Disks {
    folder: tempfile::TempDir,
}

impl Disks {
    /// A source of `blocks` blocks of 64 KiB, every other one random and the rest holes; and a last odd bit.
    fn new(blocks: u64) -> Self {
        let disks = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        let file = File::create(disks.path("source")).expect("the source is created");
        file.set_len(blocks * 65536 + 513).expect("the source has its size");
        let mut random = fastrand::Rng::with_seed(blocks);
        let mut block = vec![0; 65536];
        for number in (0..blocks).step_by(2) {
            random.fill(&mut block);
            file.write_all_at(&block, number * 65536).expect("the source is written");
        }
        file.write_all_at(b"end", blocks * 65536 + 510).expect("the source is written");
        disks
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn spec(&self, name: &str) -> String {
        format!("file:{}", self.path(name).display())
    }

    fn write(&self, name: &str, offset: u64, data: &[u8]) {
        let file = OpenOptions::new().write(true).open(self.path(name)).expect("the disk is there");
        file.write_all_at(data, offset).expect("the disk is written");
    }

    /// Runs `COMMAND source target FLAGS…`.
    fn run(&self, command: &str, flags: &[&str]) -> Run {
        let (source, target) = (self.spec("source"), self.spec("target"));
        poolshift([&[command, &source, &target], flags].concat())
    }

    #[track_caller]
    fn assert_equal(&self) {
        assert!(
            fs::read(self.path("source")).expect("source") == fs::read(self.path("target")).expect("target"),
            "source and target differ"
        );
    }
}

#[track_caller]
fn json(run: &Run) -> Value {
    serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {}", run.stdout))
}

#[test]
fn a_volume_is_copied_then_brought_up_to_date() {
    let disks = Disks::new(20);
    let first = json(&disks.run("sync", &["--json"]).expect_code(0));
    assert_eq!((&first["base"], &first["unchanged_while_read"]), (&Value::Null, &Value::Bool(true)));
    assert!(first["bytes_written"].as_u64().is_some_and(|bytes| bytes >= 10 * 65536));
    disks.assert_equal();

    disks.write("source", 4 * 65536 + 100, b"changed");
    OpenOptions::new()
        .write(true)
        .open(disks.path("source"))
        .and_then(|file| file.set_len(25 * 65536))
        .expect("the source grows");
    let second = json(&disks.run("sync", &["--json", "--snapshot", "b"]).expect_code(0));
    assert_eq!(second["snapshot"], "b");
    assert!(second["bytes_written"].as_u64().is_some_and(|bytes| (1..=2 * 65536).contains(&bytes)), "{second}");
    disks.assert_equal();
    disks.run("verify", &[]).expect_code(0);
}

#[test]
fn the_plan_changes_nothing() {
    let disks = Disks::new(4);
    let plan = json(&disks.run("sync", &["--dry-run", "--json"]).expect_code(0));
    assert_eq!((&plan["action"], &plan["creates_target"]), (&Value::from("full"), &Value::Bool(true)));
    assert!(plan["data_bytes"].as_u64().is_some_and(|bytes| bytes >= 2 * 65536));
    let names: Vec<_> = fs::read_dir(disks.folder.path()).expect("the folder").collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[test]
fn a_target_that_somebody_wrote_is_refused_and_repaired_only_when_asked() {
    let disks = Disks::new(8);
    disks.run("sync", &[]).expect_code(0);
    disks.write("target", 70_000, b"not ours");
    let refused = disks.run("sync", &[]).expect_code(4);
    assert!(refused.stderr.contains("written by someone else") && refused.stderr.contains("hint: "), "{refused:?}");
    let status = json(&disks.run("status", &["--json"]).expect_code(0));
    assert_eq!((&status["state"], &status["head_dirty"]), (&Value::from("conflict"), &Value::Bool(true)));

    let found = json(&disks.run("verify", &["--json"]).expect_code(3));
    assert_eq!(found["ranges"], serde_json::json!([{"offset": 69_632, "length": 4096}]));
    disks.run("verify", &["--repair"]).expect_code(0);
    disks.assert_equal();
    disks.run("sync", &[]).expect_code(0);
}

#[test]
fn a_target_that_poolshift_did_not_make_is_taken_over_only_when_asked() {
    let disks = Disks::new(4);
    fs::write(disks.path("target"), vec![7; 300_000]).expect("the target is written");
    disks.run("sync", &[]).expect_code(4);
    disks.run("sync", &["--full"]).expect_code(4);
    assert!(fs::read(disks.path("target")).expect("target").iter().all(|&byte| byte == 7));
    disks.run("sync", &["--full", "--adopt"]).expect_code(0);
    disks.assert_equal();
}

#[test]
fn what_is_missing_or_the_same_is_named() {
    let disks = Disks::new(2);
    let missing = poolshift(["sync", &disks.spec("nothing"), &disks.spec("target")]).expect_code(5);
    assert!(missing.stderr.contains("nothing: cannot open it"), "{}", missing.stderr);
    assert!(!disks.path("target").exists());
    poolshift(["status", &disks.spec("source"), &disks.spec("target")]).expect_code(5);

    std::os::unix::fs::symlink(disks.path("source"), disks.path("target")).expect("a link");
    let same = disks.run("sync", &[]).expect_code(2);
    assert!(same.stderr.contains("the same image"), "{}", same.stderr);
}

#[test]
fn errors_are_one_json_line_when_asked() {
    let disks = Disks::new(2);
    let run = poolshift(["--log-format", "json", "sync", &disks.spec("nothing"), &disks.spec("target")]).expect_code(5);
    let error: Value = serde_json::from_str(run.stderr.trim()).expect("one JSON value on standard error");
    assert_eq!(error["exit_code"], 5);
    assert!(error["error"].as_str().is_some_and(|text| text.contains("nothing")));
}

#[test]
fn a_diff_of_a_file_lists_what_is_not_a_hole() {
    let disks = Disks::new(4);
    let run = poolshift(["diff", "--json", &disks.spec("source")]).expect_code(0);
    let rows: Vec<Value> = serde_json::from_str(&run.stdout).expect("an array");
    let covered = |offset: u64| {
        rows.iter().any(|row| {
            let (start, length) = (row["offset"].as_u64().expect("offset"), row["length"].as_u64().expect("length"));
            row["exists"] == "true" && (start..start + length).contains(&offset)
        })
    };
    assert!(covered(0) && covered(65535) && covered(2 * 65536) && covered(4 * 65536 + 512));
}

#[test]
fn a_cycle_that_is_interrupted_is_finished_by_the_next() {
    let disks = Disks::new(512);
    let mut command = binary();
    command.args(["sync", &disks.spec("source"), &disks.spec("target"), "--snapshot", "a", "--json"]);
    let run = stopped_at(command, "apply.batch");
    run.signal(rustix::process::Signal::INT);
    run.resume();
    run.finish().expect_code(130);

    let status = json(&disks.run("status", &["--json"]).expect_code(0));
    assert_eq!((&status["state"], &status["in_flight"]["snapshot"]), (&Value::from("in-flight"), &Value::from("a")));
    // A file has no snapshot that could be finished: it is compared as it is now, and what was moved is not moved again.
    let report = json(&disks.run("sync", &["--json"]).expect_code(0));
    assert!(report["bytes_equal"].as_u64().is_some_and(|bytes| bytes > 0), "{report}");
    disks.assert_equal();
}

#[test]
fn the_demonstration_ends_with_equal_disks() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let dir = folder.path().join("demo");
    let run = poolshift(["demo".as_ref(), dir.as_os_str(), "--size".as_ref(), "16M".as_ref()]).expect_code(0);
    assert!(run.stdout.contains("result:   equal"), "{}", run.stdout);
    assert!(fs::read(dir.join("sata.img")).expect("sata") == fs::read(dir.join("sas.img")).expect("sas"));
    let again = poolshift(["demo".as_ref(), dir.as_os_str()]).expect_code(2);
    assert!(again.stderr.contains("is there already"), "{}", again.stderr);
}
