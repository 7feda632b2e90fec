//! Cutovers of a real server of which any one step fails, or is the last one: a call of virsh that has an error, before
//! or after it was carried out; a process that is killed. The server is then on one side with all that it has written,
//! or the next command brings it there.
//!
//! All steps of all methods, which take an hour or so, are tests of their own, marked as exhaustive. The others try each
//! call of virsh that changes the domain, and a kill after each step that the provider or the storage makes durable while
//! the server stands still; `cutover::tests` kills and fails all others on images in memory.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Instant;

use crate::cutover_bed::{Bed, Running, run_killed_at};
use crate::support::Run;
use crate::vm::{VmEnv, vm};

/// How long the guest's logs get before it is exchanged for a new one: it reads all of them again for each verdict.
const LOG_MAX: u64 = 3000;

/// The phases of a cutover, and of a rollback, as failpoints.
const PHASES: [&str; 8] = [
    "cutover.syncing",
    "cutover.converged",
    "cutover.quiescing",
    "cutover.final-delta",
    "cutover.verifying",
    "cutover.swapping",
    "cutover.resuming",
    "cutover.committed",
];

/// What else is made durable on the way, in each direction.
const STEPS: [&str; 8] = [
    "cutover.leases-taken",
    "cutover.quiesced",
    "cutover.fenced",
    "last-delta.carried",
    "cutover.leases-released",
    "cutover.started",
    "cutover.settled",
    "libvirt.defined",
];

/// What the provider makes durable, by its method.
fn steps_of(method: &str) -> &'static [&'static str] {
    match method {
        "warm" => &["libvirt.saved", "libvirt.restored", "libvirt.save-spent"],
        "hot" => &["libvirt.reopened"],
        "cold" => &["libvirt.button-pressed", "libvirt.booted"],
        other => panic!("{other} is no method"),
    }
}

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

/// Which call of virsh fails.
#[derive(Clone, Copy, Debug)]
enum Which {
    /// By its number, the first being 1.
    Call(usize),
    /// The first whose words contain this.
    With(&'static str),
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
             hit=no\n\
             case \"$*\" in *\"$(cat $folder/with)\"*) mkdir $folder/hit 2>/dev/null && hit=yes;; esac\n\
             [ $number != $(cat $folder/which) ] || hit=yes\n\
             [ $hit = yes ] || exec {real} \"$@\"\n\
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

    /// Has a call fail; with `after`, when it was carried out.
    fn fail(&self, which: Which, after: bool) {
        let (number, with) = match which {
            Which::Call(number) => (number, "no call has this"),
            Which::With(words) => (0, words),
        };
        for (file, text) in [("which", number.to_string()), ("with", with.to_owned()), ("calls", String::new())] {
            std::fs::write(self.folder.join(file), text).expect("it is written");
        }
        let _ = std::fs::remove_dir(self.folder.join("hit"));
        let file = self.folder.join("after");
        let _ = std::fs::remove_file(&file);
        if after {
            std::fs::write(&file, "").expect("it is written");
        }
    }

    /// The call that failed, if the run came to it.
    fn failed(&self, which: Which) -> Option<String> {
        match which {
            Which::Call(number) => self.calls().get(number - 1).cloned(),
            Which::With(words) => self.folder.join("hit").exists().then(|| words.trim().to_owned()),
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

/// One cutover of which a call of virsh fails; `None` where it has no such call.
fn with_a_call_that_fails(
    bed: &Bed<'_>,
    method: &str,
    (which, after): (Which, bool),
    undo: bool,
) -> Option<&'static str> {
    let virsh = Virsh::new(bed);
    virsh.fail(which, after);
    let begun = Instant::now();
    let run = virsh.cut_over(bed, method);
    let Some(failed) = virsh.failed(which) else {
        println!("{method}: {} calls, none is {which:?}", virsh.calls().len());
        run.expect_code(0);
        bed.expect_well("target");
        bring_back(bed);
        return None;
    };
    let when = if after { "after" } else { "before" };
    let ended = brought_to_an_end(bed, &run, undo);
    bring_back(bed);
    println!("{method}, {which:?} fails {when} it: {ended} ({:?}) in {:?}: {failed}", run.code, begun.elapsed());
    Some(ended)
}

/// Has calls of virsh fail once, each of which is made.
fn calls_that_fail(method: &str, calls: [(&'static str, bool); 4]) {
    let env = vm();
    let mut beds = Beds::new(&env, method);
    let mut undo = false;
    for (words, after) in calls {
        undo = !undo;
        let end = with_a_call_that_fails(beds.bed(), method, (Which::With(words), after), undo);
        let end = end.unwrap_or_else(|| panic!("a {method} cutover has no call with {words:?}"));
        assert!(after || end != "over", "{words:?} failed, and its server went over all the same");
    }
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_call_that_changes_the_domain_of_a_warm_cutover_fails_and_nothing_is_lost() {
    calls_that_fail("warm", [(" save ", true), (" define ", false), (" restore ", true), (" resume ", false)]);
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_call_that_changes_the_domain_of_a_hot_cutover_fails_and_nothing_is_lost() {
    calls_that_fail("hot", [(" suspend ", false), (" define ", true), ("blockdev-reopen", false), (" resume ", true)]);
}

#[test]
#[ignore = "exhaustive; needs Ceph and libvirt"]
fn every_call_of_virsh_fails_once_and_nothing_is_lost() {
    let env = vm();
    let mut beds = Beds::new(&env, "virsh");
    let (mut runs, mut undo) = (0, false);
    let mut ends = std::collections::BTreeMap::<&str, u32>::new();
    for method in ["warm", "hot", "cold"] {
        for after in [false, true] {
            for call in 1.. {
                undo = !undo;
                let Some(end) = with_a_call_that_fails(beds.bed(), method, (Which::Call(call), after), undo) else {
                    assert!(call > 4, "{method}: only {call} calls");
                    break;
                };
                runs += 1;
                *ends.entry(end).or_default() += 1;
            }
        }
    }
    println!("{runs} runs with a call that failed: {ends:?}");
    assert!(ends.keys().any(|end| *end != "over"), "nothing has failed: {ends:?}");
}

/// Has a command killed at a failpoint.
#[track_caller]
fn killed_at(bed: &Bed<'_>, command: &str, words: &[&str], place: &str) {
    let words: Vec<&str> = words.iter().copied().chain(["--yes"]).collect();
    run_killed_at(bed.command(command, &words), place);
}

/// A cutover that is killed, and finished or undone; afterwards the server is where it came from.
fn killed_on_the_way(bed: &Bed<'_>, method: &str, place: &str, undo: bool) {
    killed_at(bed, "cutover", &["--method", method], place);
    println!("{method}, killed at {place}; undone: {undo}");
    if undo {
        // Where it ran from its targets already, that is brought back, too.
        bed.switch("rollback", &["--with-changes"], "source");
        return;
    }
    bed.switch("cutover", &["--method", method], "target");
    bed.switch("rollback", &["--with-changes"], "source");
}

fn killed_at_each(method: &str, places: &[&str]) {
    let env = vm();
    let mut beds = Beds::new(&env, method);
    for (number, place) in places.iter().enumerate() {
        killed_on_the_way(beds.bed(), method, place, number % 2 == 0);
    }
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_warm_cutover_that_is_killed_while_its_server_stands_still_is_finished_or_undone() {
    let places = ["libvirt.saved", "last-delta.carried", "libvirt.defined", "libvirt.restored", "cutover.sources-kept"];
    killed_at_each("warm", &places);
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_hot_or_cold_cutover_that_is_killed_while_its_server_stands_still_is_finished_or_undone() {
    let env = vm();
    let mut beds = Beds::new(&env, "kill");
    killed_on_the_way(beds.bed(), "hot", "libvirt.reopened", true);
    killed_on_the_way(beds.bed(), "hot", "cutover.started", false);
    killed_on_the_way(beds.bed(), "cold", "libvirt.booted", true);
}

#[test]
#[ignore = "exhaustive; needs Ceph and libvirt"]
fn a_cutover_that_is_killed_at_any_step_is_finished_or_undone() {
    let env = vm();
    let mut beds = Beds::new(&env, "kills");
    for method in ["warm", "hot", "cold"] {
        let there = ["cutover.sources-marked", "cutover.sources-kept", "cutover.note-stored", "cutover.journal-stored"];
        for place in PHASES.iter().chain(&STEPS).chain(steps_of(method)).chain(&there) {
            for undo in [true, false] {
                killed_on_the_way(beds.bed(), method, place, undo);
            }
        }
    }
}

#[test]
#[ignore = "exhaustive; needs Ceph and libvirt"]
fn a_rollback_that_is_killed_at_any_step_is_finished() {
    let env = vm();
    let mut beds = Beds::new(&env, "kill-back");
    let back = ["cutover.sources-renamed-back", "cycle.reversed", "cycle.reversed-back", "cutover.states-forgotten"];
    for place in PHASES.iter().chain(&STEPS).chain(steps_of("warm")).chain(&back) {
        let bed = beds.bed();
        bed.switch("cutover", &[], "target");
        killed_at(bed, "rollback", &["--with-changes"], place);
        println!("a rollback was killed at {place}");
        bed.switch("rollback", &["--with-changes"], "source");
    }
}
