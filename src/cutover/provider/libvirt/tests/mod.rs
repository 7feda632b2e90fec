//! The provider with a libvirt of shell: every call of virsh fails once, before its effect and after it.

mod stage;

use std::path::PathBuf;

use super::super::Verdict;
use super::*;
use crate::plan::LibvirtRehearsal;

struct Fake {
    folder: tempfile::TempDir,
}

impl Fake {
    fn new() -> Self {
        let fake = Self { folder: tempfile::tempdir().unwrap() };
        // No copy: a script that was just written can't be run while another test forks with it open.
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/src/cutover/provider/libvirt/tests/virsh");
        std::os::unix::fs::symlink(script, fake.path("virsh")).unwrap();
        for (file, text) in
            [("state", "running"), ("definition", "sata"), ("named", "sata"), ("memory", "1"), ("disk", "1")]
                .into_iter()
                .chain([("live", "sata"), ("node", "booted"), ("nodes", "booted sata 1")])
        {
            fake.set(file, text);
        }
        fake
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    fn set(&self, file: &str, text: &str) {
        std::fs::write(self.path(file), format!("{text}\n")).unwrap();
    }

    fn get(&self, file: &str) -> String {
        std::fs::read_to_string(self.path(file)).unwrap_or_default().trim().to_owned()
    }

    fn provider(&self, method: Method) -> Libvirt {
        let disk = ServerDisk {
            target_in_use: None,
            volume: "vm".into(),
            source: "rbd:sata/vm".parse().unwrap(),
            target: "rbd:sas/vm".parse().unwrap(),
            boot: true,
        };
        let config = LibvirtCutover {
            domain: "vm".into(),
            uri: None,
            method,
            save_folder: self.folder.path().to_owned(),
            limit: Duration::from_secs(20),
            rehearsal: LibvirtRehearsal::default(),
        };
        let mut provider = Libvirt::new(vec![disk], config, None);
        provider.virsh.program = self.path("virsh");
        provider
    }

    fn saves(&self) -> usize {
        let names = std::fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().contains("poolshift-save")).count()
    }

    /// It runs on a side, and will start there; its memory was kept, and used once.
    #[track_caller]
    fn assert_runs(&self, pool: &str, case: &str) {
        let found = ["state", "live", "definition"].map(|file| self.get(file));
        assert_eq!(found, ["running", pool, pool], "{case}\n{}", self.get("log"));
        assert!(!self.get("log").contains("corrupt"), "{case}\n{}", self.get("log"));
        let nodes = self.get("nodes");
        assert!(nodes.lines().count() == 1 && nodes.contains(pool), "{case}\n{nodes}");
    }
}

/// The walk of the driver, as far as a step that fails: which one, and the notes that it stored before.
async fn walk(provider: &Libvirt, stored: &mut Notes) -> Option<&'static str> {
    for step in ["prepare", "quiesce", "swap", "start", "settle"] {
        let mut notes = stored.clone();
        let done = match step {
            "prepare" => provider.prepare(Side::Source, &mut notes).await,
            "quiesce" => provider.quiesce(&mut notes).await,
            "swap" => provider.swap(Side::Target, &mut notes).await,
            "start" => provider.start(Side::Target, false, &mut notes).await,
            _ => provider.settle(Side::Target, &mut notes).await.map(drop),
        };
        if done.is_err() {
            return Some(step);
        }
        *stored = notes;
    }
    None
}

async fn every_call_fails(method: Method, back: bool) {
    // A shutdown has less that can go wrong: each case has its turn in one of the two directions.
    let whens: &[&str] = match (method, back) {
        (Method::Cold, true) => &["after"],
        (Method::Cold, false) => &["before", "killed"],
        _ => &["before", "after", "killed"],
    };
    for when in whens {
        let mut calls = 0;
        loop {
            let fake = Fake::new();
            fake.set("fail", &format!("{calls} {when}"));
            let provider = fake.provider(method);
            let mut notes = Notes::new();
            let failed = walk(&provider, &mut notes).await;
            let case = format!("{method:?}, call {calls} failed {when} its effect, in {failed:?}, back: {back}");
            if fake.path("fail").exists() {
                assert!(calls > 10, "{case}");
                break;
            }
            // Another process, with what was stored.
            let provider = fake.provider(method);
            let observed = provider.observe(&notes).await.unwrap();
            let on_target = observed == (Observed { power: Power::Running, side: Some(Side::Target) });
            if failed.is_some() && back && !on_target {
                provider.undo(Side::Source, false, &mut notes).await.unwrap_or_else(|error| panic!("{case}: {error}"));
                provider.settle(Side::Source, &mut notes).await.unwrap();
                fake.assert_runs("sata", &case);
            } else {
                assert_eq!(walk(&provider, &mut notes).await, None, "{case}\n{}", fake.get("log"));
                fake.assert_runs("sas", &case);
            }
            assert_eq!(fake.saves(), 0, "{case}");
            if method != Method::Cold && back {
                assert!(!fake.get("log").contains("boot"), "{case}\n{}", fake.get("log"));
            }
            calls += 1;
        }
    }
}

#[tokio::test]
async fn a_shutdown_ends_well_whatever_call_fails() {
    tokio::join!(every_call_fails(Method::Cold, false), every_call_fails(Method::Cold, true));
}

#[tokio::test]
async fn a_save_ends_well_whatever_call_fails() {
    tokio::join!(every_call_fails(Method::Warm, false), every_call_fails(Method::Warm, true));
}

#[tokio::test]
async fn a_suspension_ends_well_whatever_call_fails() {
    tokio::join!(every_call_fails(Method::Hot, false), every_call_fails(Method::Hot, true));
}

#[tokio::test]
async fn a_memory_is_used_once_and_never_after_the_disks_have_changed() {
    let fake = Fake::new();
    let provider = fake.provider(Method::Warm);
    let mut notes = Notes::new();
    provider.prepare(Side::Source, &mut notes).await.unwrap();
    provider.quiesce(&mut notes).await.unwrap();
    let saved = Observed { power: Power::Saved, side: Some(Side::Source) };
    assert_eq!(provider.observe(&notes).await.unwrap(), saved);
    assert_eq!(provider.observe(&Notes::new()).await.unwrap().power, Power::Off, "the save of another cutover");
    provider.swap(Side::Target, &mut notes).await.unwrap();
    provider.start(Side::Target, false, &mut notes).await.unwrap();
    // It ran, and was shut down before anybody cleaned up.
    fake.set("state", "shut off");
    assert_eq!(provider.observe(&notes).await.unwrap().power, Power::Off);
    provider.start(Side::Target, false, &mut notes).await.unwrap();
    assert_eq!(fake.get("log"), "resume sas\nboot sas");

    // Somebody started it while it was saved.
    provider.quiesce(&mut notes).await.unwrap();
    fake.set("state", "running");
    fake.set("memory", "7");
    fake.set("disk", "7");
    provider.start(Side::Target, false, &mut notes).await.unwrap();
    fake.set("state", "shut off");
    assert_eq!(provider.observe(&notes).await.unwrap().power, Power::Off);

    // The disks are not what they were.
    provider.start(Side::Target, false, &mut notes).await.unwrap();
    provider.quiesce(&mut notes).await.unwrap();
    assert_eq!(provider.observe(&notes).await.unwrap().power, Power::Saved);
    provider.undo(Side::Source, true, &mut notes).await.unwrap();
    assert_eq!(fake.get("log").lines().last(), Some("boot sata"));
    provider.settle(Side::Source, &mut notes).await.unwrap();
    assert_eq!((fake.saves(), notes.len()), (0, 0));
    fake.assert_runs("sata", "");
}

#[tokio::test]
async fn one_process_is_told_many_things_and_every_answer_is_told_from_the_rest() {
    let fake = Fake::new();
    let provider = fake.provider(Method::Hot);
    let virsh = &provider.virsh;
    let odd = "it's a $(node); echo `x` # @";
    // More than goes into one process.
    let many = (0..300).map(|number| virsh.say_to_qemu(&format!("x{}{number}", "-".repeat(1000)), None));
    let first = [
        virsh.say("domstate", &["--reason"]),
        virsh.say("resume", &[]),
        virsh.say_to_qemu("blockdev-del", Some(serde_json::json!({"node-name": odd}))),
    ];
    let said: Vec<_> = first.into_iter().chain(many).collect();
    let answers = virsh.batch("test", &said, QUESTION).await.unwrap();
    assert_eq!(answers.get(0).map(str::trim), Some("running (whatever)"));
    assert_eq!((answers.get(1), answers.error.trim()), (None, "error: domain is running"));
    let answer = |index: usize| virsh.qemu_said("test", "x", answers.get(index).unwrap()).unwrap_err().problem;
    assert_eq!(answer(2), format!("QEMU's x: there is no node {odd}"));
    assert!((0..300).all(|number| answers.get(3 + number).unwrap().contains(&format!("-{number}\""))));
    assert_eq!(answers.get(303), None);

    fake.set("fail", "2 killed");
    let answers = virsh.batch("test", &said[..5], QUESTION).await.unwrap();
    let answered: Vec<_> = (0..5).map(|index| answers.get(index).is_some()).collect();
    assert_eq!(answered, [true, false, false, false, false], "what was printed at its end may be a part of it");
}

#[tokio::test]
async fn a_disk_that_can_t_be_opened_or_switched_leaves_all_as_it_was() {
    // Seven questions and the definition are before them.
    for (call, what) in [(8, "blockdev-add"), (9, "blockdev-reopen")] {
        let fake = Fake::new();
        let provider = fake.provider(Method::Hot);
        let mut notes = Notes::new();
        provider.quiesce(&mut notes).await.unwrap();
        fake.set("fail", &format!("{call} before"));
        let error = provider.swap(Side::Target, &mut notes).await.unwrap_err();
        let expected = format!("QEMU's {what}: it was not answered: error: made to fail before");
        assert_eq!((error.problem, fake.get("live").as_str()), (expected, "sata"));
        assert_eq!(fake.get("nodes"), "booted sata 1");
        provider.undo(Side::Source, false, &mut notes).await.unwrap();
        fake.assert_runs("sata", what);
    }
}

#[tokio::test]
async fn what_runs_on_the_other_side_is_not_taken_away_from_there() {
    let fake = Fake::new();
    fake.set("live", "sas");
    let provider = fake.provider(Method::Cold);
    let error = provider.undo(Side::Source, false, &mut Notes::new()).await.unwrap_err();
    assert!(error.problem.contains("on the other side"), "{error}");
    let error = provider.start(Side::Source, false, &mut Notes::new()).await.unwrap_err();
    assert_eq!(error.operation, "start on the source");
    assert_eq!(fake.get("state"), "running");
}

#[tokio::test]
async fn a_journal_can_t_have_other_files_removed() {
    let fake = Fake::new();
    fake.set("other", "kept");
    let provider = fake.provider(Method::Warm);
    for file in [fake.path("other").to_str().unwrap(), "relative.poolshift-save", ""] {
        let mut notes = Notes::from([("save".to_owned(), file.to_owned())]);
        assert!(provider.settle(Side::Source, &mut notes).await.is_err(), "{file}");
        assert!(provider.quiesce(&mut notes).await.is_err(), "{file}");
    }
    assert_eq!((fake.get("other").as_str(), fake.get("state").as_str()), ("kept", "running"));
}

#[tokio::test]
async fn what_is_in_the_way_is_found_before() {
    let fake = Fake::new();
    let errors = |found: &[Precondition]| {
        let wrong = found.iter().filter(|found| found.verdict == Verdict::Error);
        wrong.map(|found| format!("{}: {}", found.what, found.found)).collect::<Vec<_>>().join("\n")
    };
    let provider = fake.provider(Method::Warm);
    assert_eq!(errors(&provider.preconditions(Side::Source).await), "");
    assert!(errors(&provider.preconditions(Side::Target).await).contains("names sata/vm already, on the source"));
    fake.set("state", "paused");
    assert!(errors(&provider.preconditions(Side::Source).await).contains("it is paused"));
    fake.set("state", "bewitched");
    assert!(errors(&provider.preconditions(Side::Source).await).contains("domstate printed \"bewitched"));
    fake.set("state", "running");
    fake.set("definition", "tape");
    assert!(errors(&provider.preconditions(Side::Source).await).contains("none of its disks is volume vm"));
    fake.set("definition", "sata");
    fake.set("live", "sas");
    assert!(errors(&provider.preconditions(Side::Source).await).contains("QEMU has its disks on the target"));
    fake.set("state", "loud");
    assert!(errors(&provider.preconditions(Side::Source).await).contains("printed more than 4 MiB"));
    fake.set("state", "running");
    let mut provider = fake.provider(Method::Warm);
    provider.config.save_folder = fake.path("nowhere");
    assert!(errors(&provider.preconditions(Side::Source).await).contains("there is no such folder"));
    provider.virsh.program = fake.path("no-virsh");
    assert!(errors(&provider.preconditions(Side::Source).await).contains("can't be run"));
}
