//! What the tests of cutovers share: guests that run, the plan that has them as its servers, and `poolshift` at work on
//! them.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use poolshift::fleet::CUTOVER_NOTE;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process, waitid};
use serde_json::Value;

use crate::support::{CephEnv, Run, binary, poolshift};
use crate::vm::{Guest, GuestDisk, Role, VmEnv, rbd_command};

/// Nothing here takes as long; what does has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// The server that is the first guest.
pub(crate) const SERVER: &str = "web";

/// Guests that run, and the plan that has them as its servers.
pub(crate) struct Bed<'a> {
    pub(crate) env: &'a VmEnv,
    /// The guest of [`SERVER`].
    pub(crate) guest: Guest<'a>,
    /// Those of other servers.
    pub(crate) others: Vec<Guest<'a>>,
    fleet: Fleet,
}

/// A plan, and `poolshift` at work on it.
pub(crate) struct Fleet {
    dir: tempfile::TempDir,
    daemon: Option<Child>,
}

impl Fleet {
    /// With an empty plan.
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a folder"), daemon: None }
    }

    pub(crate) fn plan(&self) -> String {
        self.dir.path().join("plan.toml").display().to_string()
    }

    /// A folder for what a test needs.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.dir.path()
    }

    #[track_caller]
    pub(crate) fn write_plan(&self, text: &str) {
        std::fs::write(self.plan(), text).expect("a plan");
    }

    /// Where its daemon listens: at a port that nobody has.
    pub(crate) fn api() -> String {
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        format!("[api]\nlisten = \"{}\"\n", free.expect("a free port"))
    }

    /// How a plan begins, for a cluster that has both sides.
    pub(crate) fn beginning(ceph: &CephEnv) -> String {
        let (conf, user) = (ceph.conf.display(), &ceph.user);
        let mut text = Self::api() + "[defaults]\ninterval = \"2s\"\n";
        for side in ["source", "target"] {
            text += &format!("[{side}]\nconf = \"{conf}\"\nuser = \"{user}\"\n");
        }
        text
    }

    pub(crate) fn start_daemon(&mut self) {
        let command = binary().arg("replicate").arg(self.plan()).stderr(Stdio::null()).spawn();
        self.daemon = Some(command.expect("the daemon starts"));
    }

    /// In good order: what a killed one has open would stay open for half a minute.
    pub(crate) fn stop_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            send(&daemon, Signal::TERM);
            let begun = Instant::now();
            while daemon.try_wait().expect("it can be waited for").is_none() {
                if begun.elapsed() >= PATIENCE {
                    let _ = daemon.kill();
                    panic!("the daemon does not end");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// Has so many servers a point, and no daemon.
    #[track_caller]
    pub(crate) fn replicate(&mut self, servers: usize) {
        self.start_daemon();
        for server in 0..servers {
            self.wait_for_server(server, "a point", |status| status["point"].is_object());
        }
        self.stop_daemon();
    }

    /// `poolshift` with a command on a server.
    pub(crate) fn command(&self, server: &str, command: &str, words: &[&str]) -> Command {
        let mut binary = binary();
        binary.arg(command).arg(self.plan()).arg(server).args(words);
        binary
    }

    /// What a command on a server ends in.
    pub(crate) fn run(&self, server: &str, command: &str, words: &[&str]) -> Run {
        poolshift([command, &self.plan(), server].iter().chain(words))
    }

    #[track_caller]
    pub(crate) fn wait_for_server(&self, server: usize, what: &str, wanted: impl Fn(&Value) -> bool) {
        let begin = Instant::now();
        loop {
            let run = poolshift(["status", &self.plan(), "--json"]).expect_code(0);
            let status: Value = serde_json::from_str(&run.stdout).expect("one JSON value");
            let status = &status["servers"][server];
            if wanted(status) {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "waited in vain for {what}: {status:#}");
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.kill_daemon();
    }
}

impl<'a> Bed<'a> {
    /// A server with a guest that runs.
    #[track_caller]
    pub(crate) fn new(env: &'a VmEnv, tag: &str) -> Self {
        Self::with(env, tag, "")
    }

    /// The same, with more of `libvirt = { … }` in the plan: `, limit = "15s"`.
    #[track_caller]
    pub(crate) fn with(env: &'a VmEnv, tag: &str, more: &str) -> Self {
        let guest = Guest::make(env, tag);
        let bed = Self { env, guest, others: Vec::new(), fleet: Fleet::new() };
        bed.fleet.write_plan(&(Fleet::beginning(&env.ceph) + &bed.server(SERVER, &bed.guest, more)));
        bed.guest.start();
        bed
    }

    /// One more server, with a guest that runs.
    #[track_caller]
    pub(crate) fn add(&mut self, server: &str, more: &str) {
        let guest = Guest::make(self.env, server);
        let plan = std::fs::read_to_string(self.plan()).expect("there is a plan");
        self.fleet.write_plan(&(plan + &self.server(server, &guest, more)));
        guest.start();
        self.others.push(guest);
    }

    pub(crate) fn plan(&self) -> String {
        self.fleet.plan()
    }

    /// A folder for what a test needs.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.fleet.folder()
    }

    fn server(&self, name: &str, guest: &Guest<'_>, more: &str) -> String {
        let mut text = format!("[[server]]\nname = \"{name}\"\n");
        for GuestDisk { role, source, target } in &guest.disks {
            let (volume, boot) = (format!("{name}-{role:?}"), *role == Role::Root);
            text += &format!(
                "[[server.volume]]\nname = \"{volume}\"\nsource = \"rbd:{source}\"\ntarget = \"rbd:{target}\"\nboot = \
                 {boot}\n"
            );
        }
        let (domain, uri, folder) = (&guest.name, self.env.uri(), self.folder().display());
        text + &format!(
            "[server.cutover]\nlibvirt = {{ domain = \"{domain}\", uri = \"{uri}\", save_folder = \"{folder}\"{more} }}\n"
        )
    }

    pub(crate) fn start_daemon(&mut self) {
        self.fleet.start_daemon();
    }

    pub(crate) fn stop_daemon(&mut self) {
        self.fleet.stop_daemon();
    }

    /// Has every server a point, and no daemon.
    #[track_caller]
    pub(crate) fn replicate(&mut self) {
        let servers = self.others.len() + 1;
        self.fleet.replicate(servers);
    }

    /// `poolshift` with a command on [`SERVER`].
    pub(crate) fn command(&self, command: &str, words: &[&str]) -> Command {
        self.fleet.command(SERVER, command, words)
    }

    /// What a command on any server, or on all, ends in.
    pub(crate) fn run_on(&self, server: &str, command: &str, words: &[&str]) -> Run {
        self.fleet.run(server, command, words)
    }

    pub(crate) fn run(&self, command: &str, words: &[&str]) -> Run {
        self.run_on(SERVER, command, words)
    }

    pub(crate) fn start(&self, command: &str, words: &[&str]) -> Running {
        Running::start(self.command(command, words))
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) {
        self.fleet.wait_for_server(0, what, wanted);
    }

    /// Runs a command that ends with the server running from `side`, and gives back its report.
    #[track_caller]
    pub(crate) fn switch(&self, command: &str, words: &[&str], side: &str) -> Value {
        let words: Vec<&str> = words.iter().copied().chain(["--yes", "--json"]).collect();
        let report = report(&self.run(command, &words).expect_code(0));
        assert_eq!(report["runs_from"], side, "{report:#}");
        println!("{command} {words:?}: {report:#}");
        self.expect_well(side);
        report
    }

    /// The server runs from one side, will start from there, is on no other, writes, and lacks nothing.
    #[track_caller]
    pub(crate) fn expect_well(&self, side: &str) {
        self.expect_guest_well(&self.guest, side);
    }

    #[track_caller]
    pub(crate) fn expect_guest_well(&self, guest: &Guest<'_>, side: &str) {
        let on_targets = side == "target";
        let images = guest.disks.iter().map(|disk| if on_targets { &disk.target } else { &disk.source });
        let images: Vec<String> = images.cloned().collect();
        assert_eq!(guest.state(), "running");
        assert_eq!(guest.sources_inactive(), images);
        for GuestDisk { source, target, .. } in &guest.disks {
            let kept = format!("{source}.poolshift-kept");
            let (used, left) = if on_targets { (target, &kept) } else { (source, target) };
            // A worker of the fleet may be at both, for a moment.
            let begun = Instant::now();
            let users = loop {
                let users = self.env.watchers(used);
                if users == 1 || self.fleet.daemon.is_none() || begun.elapsed() >= PATIENCE {
                    break users;
                }
            };
            assert_eq!(users, 1, "{used}");
            assert!(on_targets || self.fleet.daemon.is_some() || self.env.watchers(left) == 0, "{left}");
            assert!(!on_targets || self.env.watchers(left) == 0, "{left}");
        }
        guest.wait_for_ack(guest.console().last_ack() + 2);
        assert_eq!(guest.oracle(), Ok(()));
    }

    /// Whether a cutover that was begun, or is done, is recorded with the first target: its journal is there, or the note
    /// by which the fleet's workers leave the server alone.
    pub(crate) fn is_begun(&self) -> bool {
        let text = self.env.rbd(&["image-meta", "list", "--format", "json", &self.guest.disks[0].target]);
        if text.trim().is_empty() {
            // `rbd` prints no list where there is nothing.
            return false;
        }
        let metadata: Value = serde_json::from_str(&text).expect("rbd prints JSON");
        let note = metadata["poolshift.note"].as_str().unwrap_or_default();
        !metadata["poolshift.cutover"].is_null() || note.starts_with(CUTOVER_NOTE)
    }
}

impl Drop for Bed<'_> {
    fn drop(&mut self) {
        self.fleet.kill_daemon();
        for disk in self.others.iter().chain([&self.guest]).flat_map(|guest| &guest.disks) {
            let kept = format!("{}.poolshift-kept", disk.source);
            // Back to the name under which the guest removes it.
            let _ = rbd_command(&self.env.ceph).args(["mv", &kept, &disk.source]).output();
        }
    }
}

fn send(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    kill_process(pid.expect("it has an id"), signal).expect("nobody has waited for it");
}

/// What a command with `--json` printed.
#[track_caller]
pub(crate) fn report(run: &Run) -> Value {
    serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {run:?}"))
}

/// How long a command may take to come to its failpoint: in a cloud it boots emulated guests on its way.
const FAILPOINT_LIMIT: Duration = Duration::from_secs(900);

/// Runs a command that is killed at a failpoint, `NAME` or `NAME#COUNT`, and gives back what it printed until then.
///
/// # Panics
/// If it was not killed there: it ended by itself, and the failpoint was not reached.
#[track_caller]
pub(crate) fn run_killed_at(mut command: Command, failpoint: &str) -> Run {
    command.env("POOLSHIFT_FAILPOINT", format!("{failpoint}=kill"));
    Running::start(command).expect_killed_at(failpoint)
}

/// Starts a command that is stopped (SIGSTOP) at a failpoint, `NAME` or `NAME#COUNT`, and waits until it is.
///
/// # Panics
/// If it ended by itself, and the failpoint was not reached.
#[track_caller]
pub(crate) fn stopped_at(mut command: Command, failpoint: &str) -> Running {
    command.env("POOLSHIFT_FAILPOINT", format!("{failpoint}=stop"));
    Running::start(command).expect_stopped_at(failpoint)
}

/// Runs a command that must not come to a failpoint: it would be killed there. Another test has to hit that one.
pub(crate) fn run_short_of(mut command: Command, failpoint: &str) -> Run {
    command.env("POOLSHIFT_FAILPOINT", format!("{failpoint}=kill"));
    Running::start(command).finish()
}

/// The same as [`stopped_at`] for a command that is killed at another failpoint, once it runs on.
#[track_caller]
pub(crate) fn stopped_and_to_be_killed(mut command: Command, stopped: &str, killed: &str) -> Running {
    command.env("POOLSHIFT_FAILPOINT", format!("{stopped}=stop;{killed}=kill"));
    Running::start(command).expect_stopped_at(stopped)
}

/// A `poolshift` that runs. Dropped, it is killed.
pub(crate) struct Running {
    child: Child,
    /// The lines of its standard error.
    lines: Receiver<String>,
    stdout: Option<JoinHandle<String>>,
    told: String,
}

impl Running {
    /// Starts a command. What it prints is read as it comes: it never waits for its reader.
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut stdout = child.stdout.take().expect("a pipe");
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.split(b'\n') {
                // One that is killed may leave half a character. A reader that is gone, with the test that failed, needs
                // no more of it.
                let _ = sender.send(String::from_utf8_lossy(&line.expect("a pipe can be read")).into_owned());
            }
        });
        let stdout = std::thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).expect("standard output is text");
            text
        });
        Self { child, lines, stdout: Some(stdout), told: String::new() }
    }

    fn take_line(&mut self) -> Option<String> {
        let line = self.lines.recv().ok()?;
        println!("{line}");
        self.told += &line;
        self.told += "\n";
        Some(line)
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send(&self.child, signal);
    }

    /// Lets it run on after it was stopped.
    pub(crate) fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Waits until a failpoint stops it.
    #[track_caller]
    fn expect_stopped_at(mut self, failpoint: &str) -> Self {
        if !self.wait_for_state_change(failpoint).stopped() {
            let run = self.finish();
            panic!("it was not stopped at {failpoint}, and ended with {:?}:\n{}{}", run.code, run.stdout, run.stderr);
        }
        self
    }

    /// Waits until a failpoint kills it, and gives back what it printed until then.
    #[track_caller]
    pub(crate) fn expect_killed_at(mut self, failpoint: &str) -> Run {
        let signal = self.wait_for_state_change(failpoint).terminating_signal();
        let run = self.finish();
        let killed = signal == Some(Signal::KILL.as_raw());
        assert!(
            killed,
            "it was not killed at {failpoint}, and ended with {:?}:\n{}{}",
            run.code, run.stdout, run.stderr
        );
        run
    }

    /// Waits until it is stopped, or has ended, which [`Running::finish`] can still find out.
    #[track_caller]
    fn wait_for_state_change(&mut self, failpoint: &str) -> WaitIdStatus {
        let pid = Pid::from_child(&self.child);
        let options = WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        let begun = Instant::now();
        loop {
            if let Some(status) = waitid(WaitId::Pid(pid), options).expect("it can be waited for") {
                return status;
            }
            if begun.elapsed() >= FAILPOINT_LIMIT {
                let _ = self.child.kill();
                while self.take_line().is_some() {}
                panic!("it did not come to {failpoint} in {FAILPOINT_LIMIT:?}:\n{}", self.told);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it as `kill -9` does; says whether it was still running.
    pub(crate) fn kill(mut self) -> bool {
        let running = self.child.try_wait().expect("it can be waited for").is_none();
        let _ = self.child.kill();
        let _ = self.child.wait();
        running
    }

    /// Waits for its end.
    pub(crate) fn finish(mut self) -> Run {
        while self.take_line().is_some() {}
        let stdout = self.stdout.take().expect("it was not waited for").join().expect("its output can be read");
        let status = self.child.wait().expect("it can be waited for");
        Run { code: status.code(), stdout, stderr: std::mem::take(&mut self.told) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_command_that_passes_no_failpoint_is_an_error() {
    for ends in [
        std::panic::catch_unwind(|| drop(run_killed_at(binary(), "no.such-place"))),
        std::panic::catch_unwind(|| drop(stopped_at(binary(), "no.such-place"))),
    ] {
        let message = *ends.expect_err("it is not reached").downcast::<String>().expect("a message");
        assert!(message.contains("at no.such-place, and ended with Some(2)"), "{message}");
    }
}
