//! What integration tests share: the binary under test, and the real Ceph, if there is one.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};

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

/// A test's turn on a bed: any number of tests side by side, or one alone. It is a lock on a file in the cluster's
/// folder, so it also holds between tests that run in processes of their own, and ends with the process.
#[derive(Debug)]
pub(crate) struct Turn {
    _held: Option<File>,
}

impl Turn {
    /// Waits for a turn on the bed of that name. Blocks the thread, which is the test's own.
    pub(crate) fn take(folder: &Path, bed: &str, alone: bool) -> Arc<Self> {
        let how = if alone { FlockOperation::LockExclusive } else { FlockOperation::LockShared };
        Self::note("wait");
        // Whoever waits to be alone holds the gate meanwhile, so that no others begin.
        let _gate = Self::lock(folder, &format!("{bed}.gate"), how);
        let held = Self::lock(folder, bed, how);
        Self::note("turn");
        Arc::new(Self { _held: Some(held) })
    }

    /// Records for `scripts/run-tests` when the wait began and ended: it is no part of the test's time.
    fn note(what: &str) {
        let Some(path) = std::env::var_os("POOLSHIFT_TEST_TURNS") else { return };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970").as_secs_f64();
        let mut file = File::options().create(true).append(true).open(path).expect("the file of turns opens");
        // In one write, as it may be read at any time.
        file.write_all(format!("{what} {now}\n").as_bytes()).expect("the file of turns is written");
    }

    fn lock(folder: &Path, name: &str, how: FlockOperation) -> File {
        let path = folder.join(format!("tests-{name}.lock"));
        let file = File::options().create(true).append(true).open(&path);
        let file = file.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        flock(&file, how).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        file
    }
}

/// The real cluster.
///
/// # Panics
/// If there is none: `scripts/test` starts one.
#[track_caller]
pub(crate) fn ceph() -> CephEnv {
    cluster(false)
}

/// The same for a test that stops daemons, sets quotas, or minds the time: no other test uses the cluster meanwhile.
#[track_caller]
pub(crate) fn ceph_alone() -> CephEnv {
    cluster(true)
}

/// The same in a process that a test has started and waits for: it is that test's turn. One of its own would be waited
/// for without end if another test waits to be alone.
#[track_caller]
pub(crate) fn ceph_in_a_turn() -> CephEnv {
    cluster_with(|_| Arc::new(Turn { _held: None }))
}

#[track_caller]
fn cluster(alone: bool) -> CephEnv {
    cluster_with(|folder| Turn::take(folder, "ceph", alone))
}

#[track_caller]
fn cluster_with(turn: impl FnOnce(&Path) -> Arc<Turn>) -> CephEnv {
    let conf = PathBuf::from(required("POOLSHIFT_TEST_CEPH_CONF", "a Ceph"));
    let user = required("POOLSHIFT_TEST_CEPH_USER", "a Ceph");
    let turn = turn(conf.parent().expect("ceph.conf is in a folder"));
    CephEnv { conf, user, _turn: turn }
}

/// The variable by which `scripts/test` names a bed.
#[track_caller]
pub(crate) fn required(variable: &str, bed: &str) -> String {
    let value = std::env::var(variable).unwrap_or_default();
    assert!(!value.is_empty(), "this test needs {bed}, named by {variable}: scripts/test starts it");
    value
}

/// The folder of a cluster that `scripts/ceph-dev` made.
///
/// # Panics
/// If it is another kind of cluster, whose daemons and pools are not to be touched.
#[track_caller]
pub(crate) fn ceph_dev_folder(env: &CephEnv) -> &Path {
    let folder = env.conf.parent().expect("ceph.conf is in a folder");
    let made_here = folder.join(".poolshift-ceph-dev").exists();
    assert!(made_here, "this test disturbs its cluster, and {} is none of scripts/ceph-dev", folder.display());
    folder
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
    /// Stops an OSD.
    pub(crate) fn osd_stopped(env: &CephEnv, osd: u32) -> Self {
        let osd = osd.to_string();
        Self::with(env, &["osd", "stop", &osd], &["osd", "start", &osd])
    }

    /// Sets the quota of a pool, in bytes.
    pub(crate) fn quota(env: &CephEnv, pool: &str, bytes: u64) -> Self {
        Self::with(env, &["quota", pool, &bytes.to_string()], &["quota", pool, "0"])
    }

    fn with(env: &CephEnv, words: &[&str], undo: &[&str]) -> Self {
        let folder = ceph_dev_folder(env);
        // Made first: what was done half is undone as well.
        let disturbed = Self { folder: folder.to_owned(), undo: undo.iter().map(ToString::to_string).collect() };
        ceph_dev(folder, words);
        disturbed
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

thread_local! {
    /// What a test's own `poolshift` finds in its environment.
    static VARIABLES: RefCell<Vec<(&'static str, String)>> = RefCell::default();
}

/// Sets variables for every [`binary`] that this thread makes from now on.
pub(crate) fn set_variables(variables: &[(&'static str, &str)]) {
    VARIABLES.set(variables.iter().map(|(name, value)| (*name, (*value).to_owned())).collect());
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
    VARIABLES.with_borrow(|variables| command.envs(variables.iter().map(|(name, value)| (*name, value.as_str()))));
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
