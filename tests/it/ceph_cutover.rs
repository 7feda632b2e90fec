//! Cutovers of a real server that writes all the time: over, back with what it wrote, and over again; and killed on the way.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Run, binary, poolshift};
use crate::vm::{Guest, GuestDisk, Role, VmEnv, inspect, oracle, vm};

/// Nothing here takes as long; what does has failed.
const PATIENCE: Duration = Duration::from_secs(180);

const SERVER: &str = "web";

/// A guest that runs, and the plan that has it as its server.
struct Bed<'a> {
    env: &'a VmEnv,
    guest: Guest<'a>,
    dir: tempfile::TempDir,
    daemon: Option<Child>,
}

impl<'a> Bed<'a> {
    #[track_caller]
    fn new(env: &'a VmEnv, tag: &str) -> Self {
        let guest = Guest::make(env, tag);
        let bed = Self { env, guest, dir: tempfile::tempdir().expect("a folder"), daemon: None };
        std::fs::write(bed.plan(), bed.plan_text()).expect("a plan");
        bed.guest.start();
        bed
    }

    fn plan(&self) -> String {
        self.dir.path().join("plan.toml").display().to_string()
    }

    fn plan_text(&self) -> String {
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let (conf, user) = (self.env.ceph.conf.display(), &self.env.ceph.user);
        let mut text = format!("[api]\nlisten = \"{}\"\n[defaults]\ninterval = \"2s\"\n", free.expect("a free port"));
        for side in ["source", "target"] {
            text += &format!("[{side}]\nconf = \"{conf}\"\nuser = \"{user}\"\n");
        }
        text += &format!("[[server]]\nname = \"{SERVER}\"\n");
        for GuestDisk { role, source, target } in &self.guest.disks {
            let boot = *role == Role::Root;
            text += &format!(
                "[[server.volume]]\nname = \"{role:?}\"\nsource = \"rbd:{source}\"\ntarget = \"rbd:{target}\"\nboot = {boot}\n"
            );
        }
        let (domain, uri, folder) = (&self.guest.name, self.env.uri(), self.dir.path().display());
        text + &format!(
            "[server.cutover]\nlibvirt = {{ domain = \"{domain}\", uri = \"{uri}\", save_folder = \"{folder}\" }}\n"
        )
    }

    fn start_daemon(&mut self) {
        let command = binary().arg("replicate").arg(self.plan()).stderr(Stdio::null()).spawn();
        self.daemon = Some(command.expect("the daemon starts"));
    }

    fn stop_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    fn run(&self, command: &str, words: &[&str]) -> Run {
        poolshift([command, &self.plan(), SERVER].iter().chain(words))
    }

    fn status(&self) -> Value {
        let run = poolshift(["status", &self.plan(), "--json"]).expect_code(0);
        let status: Value = serde_json::from_str(&run.stdout).expect("one JSON value");
        status["servers"][0].clone()
    }

    #[track_caller]
    fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) {
        let begin = Instant::now();
        loop {
            let status = self.status();
            if wanted(&status) {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "waited in vain for {what}: {status:#}");
        }
    }

    /// Runs a command that ends with the server running from `side`, and gives back its report.
    #[track_caller]
    fn switch(&self, command: &str, words: &[&str], side: &str) -> Value {
        let words: Vec<&str> = words.iter().copied().chain(["--yes", "--json"]).collect();
        let run = self.run(command, &words).expect_code(0);
        let report: Value = serde_json::from_str(&run.stdout).expect("one JSON value");
        assert_eq!(report["runs_from"], side, "{report:#}");
        println!("{command} {words:?}: {report:#}");
        self.expect_well(side);
        report
    }

    /// The server runs from one side, will start from there, is on no other, writes, and lacks nothing.
    #[track_caller]
    fn expect_well(&self, side: &str) {
        let on_targets = side == "target";
        let images = self.guest.disks.iter().map(|disk| if on_targets { &disk.target } else { &disk.source });
        let images: Vec<String> = images.cloned().collect();
        assert_eq!(self.guest.state(), "running");
        assert_eq!(self.guest.sources_inactive(), images);
        for GuestDisk { source, target, .. } in &self.guest.disks {
            let kept = format!("{source}.poolshift-kept");
            let (used, left) = if on_targets { (target, &kept) } else { (source, target) };
            assert_eq!(self.env.watchers(used), 1, "{used}");
            // A worker of the fleet may be at it.
            assert!(on_targets || self.daemon.is_some() || self.env.watchers(left) == 0, "{left}");
            assert!(!on_targets || self.env.watchers(left) == 0, "{left}");
        }
        self.guest.wait_for_ack(self.guest.console().last_ack() + 2);
        assert_eq!(self.guest.oracle(), Ok(()));
    }

    /// Starts a cutover and kills it as soon as it says that it is at a phase; says whether it was killed.
    fn killed_at(&self, words: &[&str], phase: &str) -> bool {
        let mut command = binary();
        command.arg("cutover").arg(self.plan()).arg(SERVER).args(words).arg("--yes");
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it starts");
        let lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let told = lines.map_while(Result::ok).any(|line| {
            println!("{line}");
            line.ends_with(&format!(": {phase}"))
        });
        let killed = told && child.try_wait().expect("it can be waited for").is_none();
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
        killed
    }
}

impl Drop for Bed<'_> {
    fn drop(&mut self) {
        self.stop_daemon();
        for disk in &self.guest.disks {
            let kept = format!("{}.poolshift-kept", disk.source);
            let rbd = |words: &[&str]| {
                let mut command = Command::new("rbd");
                command.env_remove("CEPH_ARGS").arg("--conf").arg(&self.env.ceph.conf);
                command.args(["--id", &self.env.ceph.user]).args(words).output()
            };
            // Back to the name under which the guest removes it.
            let _ = rbd(&["mv", &kept, &disk.source]);
        }
    }
}

#[test]
fn a_server_goes_over_and_back_while_the_fleet_is_replicated() {
    let Some(env) = vm() else { return };
    let mut bed = Bed::new(&env, "over");
    bed.guest.wait_for_ack(20);
    let early = bed.run("cutover", &["--yes"]).expect_code(5);
    assert!(early.stderr.contains("run poolshift replicate"), "{}", early.stderr);
    bed.start_daemon();
    bed.wait_for("a point", |server| server["point"].is_object());
    let before = bed.guest.console().last_ack();
    bed.switch("cutover", &[], "target");
    bed.wait_for("the daemon to leave it alone", |server| server["activity"] == "paused");
    let again = bed.run("cutover", &["--yes"]).expect_code(1);
    assert!(again.stderr.contains("runs from its targets already"), "{}", again.stderr);
    let unsaid = bed.run("rollback", &["--yes"]).expect_code(2);
    assert!(unsaid.stderr.contains("--with-changes"), "{}", unsaid.stderr);
    assert!(bed.guest.console().last_ack() > before);

    bed.switch("rollback", &["--with-changes"], "source");
    bed.wait_for("the daemon to go on", |server| server["activity"] != "paused");
    bed.stop_daemon();
    assert_eq!(bed.guest.console().boot_ids().len(), 1, "it has not booted again");

    // Without a daemon, by the other ways.
    bed.switch("cutover", &["--method", "hot"], "target");
    assert_eq!(bed.guest.console().boot_ids().len(), 1, "it has not booted again");
    bed.switch("rollback", &["--with-changes"], "source");
    let cold = bed.switch("cutover", &["--method", "cold", "--verify", "full"], "target");
    assert!(cold["proved_bytes"].as_u64() > Some(1 << 20), "{cold:#}");

    // Given up: the sources are as they were when they were left.
    bed.guest.wait_for_ack(bed.guest.console().last_ack() + 5);
    let acked = bed.guest.console().last_ack();
    let booted = |console: &crate::vm::Console| console.all("READY").count();
    let before = booted(&bed.guest.console());
    let words = ["--discard-changes", "--yes", "--json"];
    let report: Value = serde_json::from_str(&bed.run("rollback", &words).expect_code(0).stdout).unwrap();
    assert_eq!(report["runs_from"], "source", "{report:#}");
    bed.guest.wait_for("the guest to boot", |console| (booted(console) > before).then_some(()));
    bed.guest.shut_down();
    let [root, data] = &bed.guest.disks;
    let logs = [(Role::Root, root), (Role::Data, data)].map(|(role, disk)| inspect(&env, role, &disk.source));
    let loss = oracle(acked, logs).expect_err("what was written since is given up");
    assert!(loss.contains("lost"), "{loss}");
}

#[test]
fn a_cutover_that_is_killed_anywhere_is_finished_or_undone() {
    let Some(env) = vm() else { return };
    let mut bed = Bed::new(&env, "kill");
    bed.start_daemon();
    bed.wait_for("a point", |server| server["point"].is_object());
    bed.stop_daemon();
    // On images in memory it is killed at every step, by every method; here where the methods differ.
    let methods = [
        ("warm", &["quiescing", "final delta", "swapping", "resuming", "committed"][..]),
        ("hot", &["swapping", "resuming"]),
        ("cold", &["resuming"]),
    ];
    let mut undo = false;
    for (method, phases) in methods {
        for phase in phases {
            undo = !undo;
            let killed = bed.killed_at(&["--method", method], phase);
            println!("{method}, killed at {phase}: {killed}; undone: {undo}");
            let side = if undo {
                // Where it had run from its targets already, that is brought back, too.
                bed.switch("rollback", &["--with-changes"], "source");
                "source"
            } else {
                let run = bed.run("cutover", &["--method", method, "--yes", "--json"]);
                // It may have been too late to kill it.
                assert!(matches!(run.code, Some(0 | 1)), "{run:?}");
                bed.expect_well("target");
                "target"
            };
            if side == "target" {
                bed.switch("rollback", &["--with-changes"], "source");
            }
        }
    }
}
