//! Cutovers of a real server of which any one step fails, or is the last one: a call of virsh that has an error, before
//! or after it was carried out; a process that is killed. The server is then on one side with all that it has written,
//! or the next command brings it there.
//!
//! All steps of all methods take an hour or so. They are tried with `POOLSHIFT_TEST_EVERY_STEP=1`, and otherwise as many
//! as take a minute or two, the same ones every time. Kills at random moments are seeded by `POOLSHIFT_TEST_SEED`.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::cutover_bed::{Bed, Running};
use crate::support::{Run, every_step};
use crate::vm::{VmEnv, vm};

/// How long the guest's logs get before it is exchanged for a new one: it reads all of them again for each verdict.
const LOG_MAX: u64 = 3000;

/// How many calls of virsh of each method fail, of each kind, where not all do.
const SOME: usize = 2;

/// One bed after the other, the same for any number of cutovers.
struct Beds<'a> {
    env: &'a VmEnv,
    tag: &'a str,
    bed: Option<Bed<'a>>,
}

impl<'a> Beds<'a> {
    fn new(env: &'a VmEnv, tag: &'a str) -> Self {
        Self { env, tag, bed: None }
    }

    /// One whose server runs from its sources.
    fn bed(&mut self) -> &Bed<'a> {
        if self.bed.as_ref().is_some_and(|bed| bed.guest.console().last_ack() > LOG_MAX) {
            self.bed = None;
        }
        let (env, tag) = (self.env, self.tag);
        self.bed.get_or_insert_with(|| {
            let mut bed = Bed::new(env, tag);
            bed.replicate();
            bed
        })
    }
}

/// A `virsh` that is found before the real one, counts its calls, and lets one of them fail, with all that it was told.
struct Virsh {
    folder: PathBuf,
}

impl Virsh {
    fn new(bed: &Bed<'_>) -> Self {
        let folder = bed.folder().join("bin");
        let path = std::env::var_os("PATH").expect("there is a PATH");
        let real = std::env::split_paths(&path).map(|folder| folder.join("virsh")).find(|virsh| virsh.exists());
        let script = format!(
            "#!/bin/sh\n\
             folder={folder}\n\
             exec 9>>$folder/calls\n\
             flock 9\n\
             set -f\n\
             echo $(echo \"$*\") >&9\n\
             number=$(wc -l <$folder/calls)\n\
             exec 9>&-\n\
             [ $number = $(cat $folder/which) ] || exec {real} \"$@\"\n\
             [ ! -e $folder/after ] || {real} \"$@\" >/dev/null\n\
             echo 'error: this call was to fail' >&2\n\
             exit 1\n",
            folder = folder.display(),
            real = real.expect("virsh is installed").display(),
        );
        if !folder.exists() {
            std::fs::create_dir(&folder).expect("a folder");
            let file = folder.join("virsh");
            std::fs::write(&file, script).expect("the script is written");
            std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).expect("it can be run");
        }
        Self { folder }
    }

    /// Has a call fail, the first one being 1; with `after`, when it was carried out.
    fn fail(&self, call: usize, after: bool) {
        std::fs::write(self.folder.join("which"), call.to_string()).expect("it is written");
        std::fs::write(self.folder.join("calls"), "").expect("it is written");
        let file = self.folder.join("after");
        let _ = std::fs::remove_file(&file);
        if after {
            std::fs::write(&file, "").expect("it is written");
        }
    }

    /// The calls so far, in a line each.
    fn calls(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.folder.join("calls")).expect("it has counted");
        // Without the options of all calls, which are three words.
        text.lines().map(|line| line.splitn(4, ' ').last().unwrap_or_default().chars().take(80).collect()).collect()
    }

    /// Runs a cutover with it.
    fn cut_over(&self, bed: &Bed<'_>, method: &str) -> Run {
        let mut command = bed.command("cutover", &["--method", method, "--yes", "--json"]);
        let path = std::env::var_os("PATH").expect("there is a PATH");
        let folders = [self.folder.clone()].into_iter().chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(folders).expect("a PATH"));
        Running::start(command).finish()
    }
}

/// What became of the server, after a run that may have failed: where it is not on a side for good, the next command brings
/// it there, and it is well wherever it is.
#[track_caller]
fn brought_to_an_end(bed: &Bed<'_>, run: &Run, undo: bool) -> &'static str {
    match run.code {
        Some(0) => {
            bed.expect_well("target");
            "over"
        }
        Some(12) => {
            bed.expect_well("source");
            "back"
        }
        _ if !bed.is_begun() => {
            bed.expect_well("source");
            "refused"
        }
        _ if undo => {
            let undone = bed.run("rollback", &["--with-changes", "--yes", "--json"]);
            assert_eq!(undone.code, Some(0), "after {run:?}\n{undone:?}");
            bed.expect_well("source");
            "undone"
        }
        _ => {
            let again = bed.run("cutover", &["--yes", "--json"]);
            assert_eq!(again.code, Some(0), "after {run:?}\n{again:?}");
            bed.expect_well("target");
            "finished"
        }
    }
}

/// From wherever it is to its sources.
#[track_caller]
fn bring_back(bed: &Bed<'_>) {
    if bed.guest.sources_inactive()[0] == bed.guest.disks[0].target {
        bed.run("rollback", &["--with-changes", "--yes", "--json"]).expect_code(0);
    }
}

/// One cutover of which a call of virsh fails; `None` where it needs fewer calls.
fn with_a_call_that_fails(
    bed: &Bed<'_>,
    method: &str,
    (call, after): (usize, bool),
    undo: bool,
) -> Option<&'static str> {
    let virsh = Virsh::new(bed);
    virsh.fail(call, after);
    let begun = Instant::now();
    let run = virsh.cut_over(bed, method);
    let calls = virsh.calls();
    let Some(failed) = calls.get(call - 1) else {
        println!("{method}: {} calls", calls.len());
        run.expect_code(0);
        bed.expect_well("target");
        bring_back(bed);
        return None;
    };
    let when = if after { "after" } else { "before" };
    let ended = brought_to_an_end(bed, &run, undo);
    bring_back(bed);
    println!("{method}, call {call} fails {when} it: {ended} ({:?}) in {:?}: {failed}", run.code, begun.elapsed());
    Some(ended)
}

/// How many calls of virsh a cutover needs.
fn calls_of(bed: &Bed<'_>, method: &str) -> usize {
    let virsh = Virsh::new(bed);
    virsh.fail(usize::MAX, false);
    virsh.cut_over(bed, method).expect_code(0);
    bring_back(bed);
    virsh.calls().len()
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_call_of_virsh_that_fails_anywhere_loses_nothing() {
    let env = vm();
    let mut beds = Beds::new(&env, "virsh");
    let (mut runs, mut undo) = (0, false);
    let mut ends = std::collections::BTreeMap::<&str, u32>::new();
    let methods: &[&str] = if every_step() { &["warm", "hot", "cold"] } else { &["warm", "hot"] };
    for &method in methods {
        // Spread evenly, and the two kinds at different places.
        let step = if every_step() { 1 } else { calls_of(beds.bed(), method) / SOME };
        for after in [false, true] {
            let first = if every_step() {
                1
            } else if after {
                step
            } else {
                step / 2
            };
            for call in (first..).step_by(step).take(if every_step() { usize::MAX } else { SOME }) {
                undo = !undo;
                let Some(end) = with_a_call_that_fails(beds.bed(), method, (call, after), undo) else { break };
                runs += 1;
                *ends.entry(end).or_default() += 1;
            }
        }
    }
    println!("{runs} runs with a call that failed: {ends:?}");
    assert!(ends.keys().any(|end| *end != "over"), "nothing has failed: {ends:?}");
}

/// The places at which a cutover is killed, of each method: where the methods differ, or all.
fn places() -> Vec<(&'static str, Vec<&'static str>)> {
    const ALL: [&str; 8] =
        ["syncing", "converged", "quiescing", "final delta", "verifying", "swapping", "resuming", "committed"];
    if every_step() {
        return ["warm", "hot", "cold"].map(|method| (method, ALL.to_vec())).to_vec();
    }
    // On images in memory it is killed at every step, by every method.
    vec![
        ("warm", vec!["quiescing", "final delta", "swapping", "resuming", "committed"]),
        ("hot", vec!["swapping", "resuming"]),
        ("cold", vec!["resuming"]),
    ]
}

/// Starts a command and kills it a while after it has told that it is at a phase; says whether it was killed.
fn killed_at(bed: &Bed<'_>, command: &str, words: &[&str], phase: &str, delay: Duration) -> bool {
    let words: Vec<&str> = words.iter().copied().chain(["--yes"]).collect();
    let mut run = bed.start(command, &words);
    let told = run.until(phase);
    std::thread::sleep(delay);
    // It may have ended by itself.
    run.kill() && told
}

/// A cutover that is killed, and finished or undone; then the way back, which is killed at the same place where all are
/// tried. Says how often something was killed.
fn killed_on_the_way(bed: &Bed<'_>, method: &str, phase: &str, delay: Duration, undo: bool) -> u32 {
    let killed = killed_at(bed, "cutover", &["--method", method], phase, delay);
    println!("{method}, killed {delay:?} after {phase}: {killed}; undone: {undo}");
    if undo {
        // Where it had run from its targets already, that is brought back, too.
        bed.switch("rollback", &["--with-changes"], "source");
        return killed.into();
    }
    let run = bed.run("cutover", &["--method", method, "--yes", "--json"]);
    // It may have been too late to kill it.
    assert!(matches!(run.code, Some(0 | 1)), "{run:?}");
    bed.expect_well("target");
    let mut kills = u32::from(killed);
    if every_step() {
        let killed = killed_at(bed, "rollback", &["--with-changes"], phase, delay);
        println!("{method}, its way back killed {delay:?} after {phase}: {killed}");
        kills += u32::from(killed);
        if !killed {
            bed.expect_well("source");
            return kills;
        }
    }
    bed.switch("rollback", &["--with-changes"], "source");
    kills
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_cutover_that_is_killed_anywhere_is_finished_or_undone() {
    let env = vm();
    let seed: u64 = std::env::var("POOLSHIFT_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("POOLSHIFT_TEST_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut beds = Beds::new(&env, "kill");
    let (mut kills, mut undo) = (0, seed.is_multiple_of(2));
    for (method, phases) in places() {
        for phase in phases {
            undo = !undo;
            kills += killed_on_the_way(beds.bed(), method, phase, Duration::ZERO, undo);
            if every_step() {
                // The other way, so that an odd and an even seed have each kind end each way.
                let delay = Duration::from_millis(random.u64(1..300));
                kills += killed_on_the_way(beds.bed(), method, phase, delay, !undo);
            }
        }
    }
    println!("{kills} kills, 0 lost");
}
