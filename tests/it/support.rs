//! What integration tests share: the binary under test, and the real Ceph, if there is one.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A real cluster with the pools `sata` and `sas`, as `scripts/ceph-dev up` makes it.
#[derive(Clone, Debug)]
pub(crate) struct CephEnv {
    /// Its ceph.conf.
    pub conf: PathBuf,
    /// The user to work as, without `client.`; it has `profile rbd` on the two pools and no more.
    pub user: String,
    /// Held as long as any clone of this is.
    pub _turn: Arc<Turn>,
}

/// Who uses the cluster: any number of tests side by side, or one that disturbs it, alone.
static USERS: (Mutex<Users>, Condvar) =
    (Mutex::new(Users { running: Vec::new(), alone: false, waiting: 0, deadline: None }), Condvar::new());

/// How long all tests together may use the cluster. One that hangs, on a cluster that somebody broke say, is named and
/// ends the run.
fn patience() -> Duration {
    Duration::from_secs(if every_step() { 6 * 60 * 60 } else { 54 * 60 })
}

/// Whether all that can be tried is to be tried (`POOLSHIFT_TEST_EVERY_STEP=1`), which takes hours, and not a part of it.
pub(crate) fn every_step() -> bool {
    std::env::var_os("POOLSHIFT_TEST_EVERY_STEP").is_some_and(|value| value == "1")
}

struct Users {
    /// The names of the tests that have a turn.
    running: Vec<String>,
    alone: bool,
    /// Those who want to be alone: while there are any, nobody else begins.
    waiting: usize,
    /// Who ends the run when the patience is over; there from the first turn on.
    deadline: Option<std::thread::JoinHandle<()>>,
}

/// A test's turn on the cluster.
#[derive(Debug)]
pub(crate) struct Turn {
    name: String,
    alone: bool,
}

impl Turn {
    /// Waits for a turn. Blocks the thread, which is the test's own.
    fn take(alone: bool) -> Arc<Self> {
        let (users, changed) = &USERS;
        let mut users = users.lock().unwrap_or_else(PoisonError::into_inner);
        users.deadline.get_or_insert_with(|| std::thread::spawn(end_when_it_takes_too_long));
        users.waiting += usize::from(alone);
        let must_wait = |users: &mut Users| match alone {
            true => users.alone || !users.running.is_empty(),
            false => users.alone || users.waiting > 0,
        };
        users = changed.wait_while(users, must_wait).unwrap_or_else(PoisonError::into_inner);
        users.waiting -= usize::from(alone);
        users.alone = alone;
        let name = std::thread::current().name().unwrap_or("a test").to_owned();
        users.running.push(name.clone());
        Arc::new(Self { name, alone })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (users, changed) = &USERS;
        let mut users = users.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = users.running.iter().position(|name| *name == self.name) {
            users.running.swap_remove(at);
        }
        users.alone &= !self.alone;
        changed.notify_all();
    }
}

fn end_when_it_takes_too_long() {
    let patience = patience();
    let deadline = Instant::now() + patience;
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        std::thread::sleep(left);
    }
    let running = USERS.0.lock().unwrap_or_else(PoisonError::into_inner).running.join(", ");
    // The test harness catches what is printed in a test, not what is written here.
    let _ =
        writeln!(std::io::stderr(), "after {patience:?} with the cluster these still run, and are ended: {running}");
    std::process::exit(1);
}

/// The real cluster, or `None` after having said, and written down, that the calling test is skipped.
///
/// # Panics
/// If there is none and `POOLSHIFT_NO_SKIPS=1`.
#[track_caller]
pub(crate) fn ceph() -> Option<CephEnv> {
    cluster(false)
}

/// The same for a test that stops daemons, sets quotas, or minds the time: no other test uses the cluster meanwhile.
#[track_caller]
pub(crate) fn ceph_alone() -> Option<CephEnv> {
    cluster(true)
}

#[track_caller]
fn cluster(alone: bool) -> Option<CephEnv> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    match (set("POOLSHIFT_TEST_CEPH_CONF"), set("POOLSHIFT_TEST_CEPH_USER")) {
        (Some(conf), Some(user)) => {
            let user = user.into_string().expect("POOLSHIFT_TEST_CEPH_USER is text");
            Some(CephEnv { conf: conf.into(), user, _turn: Turn::take(alone) })
        }
        _ => {
            skip("a Ceph (POOLSHIFT_TEST_CEPH_CONF and POOLSHIFT_TEST_CEPH_USER; scripts/test starts one)");
            None
        }
    }
}

/// Says that the calling test is skipped for want of `what`, and appends a line to the file `POOLSHIFT_SKIP_LOG`, from
/// which `scripts/test` counts: to cargo a skipped test has passed.
///
/// # Panics
/// If `POOLSHIFT_NO_SKIPS=1`: then a skip is a failure.
#[track_caller]
pub(crate) fn skip(what: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let line = format!("SKIPPED: {test} needs {what}");
    assert!(
        std::env::var_os("POOLSHIFT_NO_SKIPS").is_none_or(|value| value != "1"),
        "{line}, and POOLSHIFT_NO_SKIPS=1 allows no skips"
    );
    println!("{line}");
    if let Some(log) = std::env::var_os("POOLSHIFT_SKIP_LOG").filter(|log| !log.is_empty()) {
        // One write of a whole line in append mode: lines of tests that run side by side don't mix.
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()))
            .unwrap_or_else(|error| panic!("{}: {error}", PathBuf::from(&log).display()));
    }
}

/// The folder of a cluster that `scripts/ceph-dev` made; says so where it is another kind of cluster, whose daemons
/// and pools are not to be touched.
pub(crate) fn ceph_dev_folder(env: &CephEnv) -> Option<&Path> {
    let folder = env.conf.parent().expect("ceph.conf is in a folder");
    if folder.join(".poolshift-ceph-dev").exists() {
        return Some(folder);
    }
    skip(&format!("a cluster of scripts/ceph-dev, which may be disturbed; {} is none", folder.display()));
    None
}

/// Runs `scripts/ceph-dev` for the cluster in `folder`.
fn ceph_dev(folder: &Path, words: &[&str]) {
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/ceph-dev"));
    command.env("POOLSHIFT_CEPH_DIR", folder.parent().expect("a folder of clusters")).args(words);
    command.arg("--name").arg(folder.file_name().expect("the cluster has a name"));
    assert!(command.status().expect("scripts/ceph-dev starts").success(), "{words:?}");
}

/// Something that was done to the cluster and is undone when this is dropped, also by a test that fails: the others
/// have the same cluster, and would wait for an OSD or for space without end.
#[must_use = "dropping it undoes it"]
pub(crate) struct Disturbed {
    folder: PathBuf,
    undo: Vec<String>,
}

impl Disturbed {
    /// Stops an OSD; `None` where daemons are not to be touched.
    pub(crate) fn osd_stopped(env: &CephEnv, osd: u32) -> Option<Self> {
        let osd = osd.to_string();
        Self::with(env, &["osd", "stop", &osd], &["osd", "start", &osd])
    }

    /// Sets the quota of a pool, in bytes; `None` where pools are not to be touched.
    pub(crate) fn quota(env: &CephEnv, pool: &str, bytes: u64) -> Option<Self> {
        Self::with(env, &["quota", pool, &bytes.to_string()], &["quota", pool, "0"])
    }

    fn with(env: &CephEnv, words: &[&str], undo: &[&str]) -> Option<Self> {
        let folder = ceph_dev_folder(env)?;
        // Made first: what was done half is undone as well.
        let disturbed = Self { folder: folder.to_owned(), undo: undo.iter().map(ToString::to_string).collect() };
        ceph_dev(folder, words);
        Some(disturbed)
    }

    /// Undoes it, and waits until that is so.
    pub(crate) fn undo(self) {
        drop(self);
    }
}

impl Drop for Disturbed {
    fn drop(&mut self) {
        let words: Vec<&str> = self.undo.iter().map(String::as_str).collect();
        if std::thread::panicking() {
            // A second panic would end the process, and say nothing of the first.
            let undone = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| ceph_dev(&self.folder, &words)));
            if undone.is_err() {
                eprintln!("could not undo a disturbance: {words:?}");
            }
        } else {
            ceph_dev(&self.folder, &words);
        }
    }
}

/// How a run of the binary ended.
#[derive(Debug)]
pub(crate) struct Run {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Run {
    /// The run itself, if its exit code was `code`; what it printed otherwise.
    #[track_caller]
    pub(crate) fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }
}

/// The built binary, with an environment that doesn't depend on who runs the tests.
pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_poolshift"));
    for name in [
        "CEPH_CONF",
        "CEPH_ARGS",
        "POOLSHIFT_CEPH_USER",
        "POOLSHIFT_TOKEN",
        "RUST_LOG",
        "RUST_BACKTRACE",
        "CLICOLOR_FORCE",
    ] {
        command.env_remove(name);
    }
    // The cloud of the tests is theirs; any other is somebody's.
    if std::env::var_os("POOLSHIFT_TEST_OPENSTACK").is_none_or(|folder| folder.is_empty()) {
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"OS_")) {
            command.env_remove(name);
        }
    }
    // clap wraps help at the width of the terminal; without one, at COLUMNS.
    command.env("COLUMNS", "100").env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

/// Runs the binary to its end.
pub(crate) fn poolshift<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Run {
    poolshift_with_input(args, b"")
}

/// Runs the binary to its end with `input` on its standard input.
pub(crate) fn poolshift_with_input<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>, input: &[u8]) -> Run {
    let mut child = binary()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut stdin = child.stdin.take().expect("standard input is piped");
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A child that ends without having read everything closes the pipe: its exit code says what happened.
            let _ = stdin.write_all(input);
        });
        child.wait_with_output().expect("the binary ends")
    });
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("standard output is text"),
        stderr: String::from_utf8(output.stderr).expect("standard error is text"),
    }
}
