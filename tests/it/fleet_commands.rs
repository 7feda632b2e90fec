//! The commands that ask and tell a daemon, against one that replicates files.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Run, binary, poolshift};

const TOKEN: &str = "correct-horse-battery-staple";

/// Nothing here takes as long; what does has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A plan of one server whose disk is a file, and the daemon of it, once it is started.
struct Plan {
    dir: tempfile::TempDir,
    path: PathBuf,
    daemon: Option<Child>,
}

impl Plan {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let file = |name: &str| dir.path().join(name);
        std::fs::write(file("source"), vec![7; 1 << 20]).expect("a source");
        std::fs::write(file("token"), TOKEN).expect("a token");
        std::fs::set_permissions(file("token"), std::fs::Permissions::from_mode(0o600)).expect("a mode");
        // Free when it is looked at; who takes it in between makes this test fail, and no other.
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let text = format!(
            "[api]\nlisten = \"{}\"\ntoken_file = \"{}\"\n\n[[volume]]\nname = \"web-1\"\nsource = \"file:{}\"\n\
             target = \"file:{}\"\n",
            free.expect("a free port"),
            file("token").display(),
            file("source").display(),
            file("target").display()
        );
        let path = file("plan.toml");
        std::fs::write(&path, text).expect("a plan");
        Self { dir, path, daemon: None }
    }

    fn run(&self, command: &str, words: &[&str]) -> Run {
        poolshift([command, &self.path.display().to_string()].iter().chain(words))
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.run("status", &["--json"]).expect_code(0).stdout).expect("one JSON value")
    }

    /// The status as soon as it is as wanted.
    fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let begin = Instant::now();
        loop {
            let status = self.status();
            if wanted(&status) {
                return status;
            }
            assert!(begin.elapsed() < PATIENCE, "waited in vain for {what}: {status:#}");
        }
    }

    fn start(&mut self) {
        self.daemon = Some(binary().arg("replicate").arg(&self.path).spawn().expect("the daemon starts"));
    }

    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            // It may have ended by itself.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

#[test]
fn without_a_daemon_the_images_are_read_and_nobody_acts() {
    let plan = Plan::new();
    let status = plan.status();
    assert_eq!((&status["origin"], &status["servers"][0]["activity"]), (&"images".into(), &"never-synced".into()));
    let table = plan.run("status", &[]).expect_code(0).stdout;
    assert!(table.starts_with("1 server: 1 not copied yet") && table.contains("missing figures"), "{table}");
    for (command, words) in [
        ("pause", &["--all"][..]),
        ("resume", &["web-1"]),
        ("sync-now", &["web-1"]),
        ("throttle", &["sata", "--reset"]),
    ] {
        let run = plan.run(command, words).expect_code(1);
        assert!(
            run.stderr.contains("no daemon answers at 127.0.0.1") && run.stderr.contains("hint: "),
            "{}",
            run.stderr
        );
    }
    let run = plan.run("status", &["--watch"]).expect_code(2);
    assert!(run.stderr.contains("standard output is none"), "{}", run.stderr);
    assert!(!Path::new(&plan.file("target")).exists(), "a status changes nothing");
}

#[test]
fn a_plan_that_is_not_there_or_has_no_api_is_an_error() {
    let run = poolshift(["status", "/nowhere/plan.toml"]).expect_code(5);
    assert!(run.stderr.contains("/nowhere/plan.toml"), "{}", run.stderr);
    let plan = Plan::new();
    let text = std::fs::read_to_string(&plan.path).expect("the plan");
    let off = text.lines().map(|line| if line.starts_with("listen") { "listen = \"off\"" } else { line });
    std::fs::write(&plan.path, off.collect::<Vec<_>>().join("\n")).expect("a plan");
    assert_eq!(plan.status()["origin"], "images");
    let run = plan.run("pause", &["--all"]).expect_code(1);
    assert!(run.stderr.contains("has no API") && run.stderr.contains("hint: set listen"), "{}", run.stderr);
}

#[test]
fn a_daemon_is_asked_and_told() {
    let mut plan = Plan::new();
    plan.start();
    let status = plan.wait_for("a point", |status| !status["servers"][0]["point"].is_null());
    assert_eq!(status["origin"], "daemon");
    let table = plan.run("status", &["--volumes"]).expect_code(0).stdout;
    assert!(table.starts_with("1 server: 1 in step") && table.contains("\n  web-1"), "{table}");

    assert_eq!(plan.run("pause", &["web-1"]).expect_code(0).stdout, "web-1: paused\n");
    plan.wait_for("a pause", |status| status["servers"][0]["activity"] == "paused");
    assert_eq!(plan.run("resume", &["--all"]).expect_code(0).stdout, "web-1: resumed\n");
    plan.wait_for("its end", |status| status["servers"][0]["activity"] != "paused");
    assert_eq!(plan.run("sync-now", &["web-1"]).expect_code(0).stdout, "web-1: due now\n");

    let run = plan.run("pause", &["web-2"]).expect_code(5);
    assert!(run.stderr.contains("no server or volume \"web-2\""), "{}", run.stderr);
    let run = plan.run("throttle", &["none", "--reset"]).expect_code(5);
    assert!(run.stderr.contains("reads from a pool \"none\""), "{}", run.stderr);
}

#[test]
fn a_token_is_held_to_wherever_it_comes_from() {
    let mut plan = Plan::new();
    plan.start();
    plan.wait_for("the daemon", |status| status["origin"] == "daemon");
    let wrong = plan.file("wrong");
    std::fs::write(&wrong, "wrong-horse-battery-staple").expect("a token");
    std::fs::set_permissions(&wrong, std::fs::Permissions::from_mode(0o600)).expect("a mode");
    let run = plan.run("pause", &["--all", "--token-file", &wrong]).expect_code(1);
    assert!(run.stderr.contains("token is not the right one") && run.stderr.contains("hint: "), "{}", run.stderr);
    std::fs::set_permissions(&wrong, std::fs::Permissions::from_mode(0o644)).expect("a mode");
    let run = plan.run("pause", &["--all", "--token-file", &wrong]).expect_code(1);
    assert!(run.stderr.contains("chmod 600"), "{}", run.stderr);
    for (token, code) in [("wrong-horse-battery-staple", 1), ("short", 1), ("", 0), (TOKEN, 0)] {
        let mut command = binary();
        let output = command.env("POOLSHIFT_TOKEN", token).arg("sync-now").arg(&plan.path).arg("web-1").output();
        let output = output.expect("the binary runs");
        assert_eq!(output.status.code(), Some(code), "{token}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(token.is_empty() || !String::from_utf8_lossy(&output.stderr).contains(token), "{token}");
    }
}
