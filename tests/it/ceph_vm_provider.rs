//! The provider for libvirt domains with a real one: each way moves a guest that writes all the time from SATA to SAS,
//! and brings it back from every point.

use std::future::Future;
use std::path::Path;
use std::time::{Duration, Instant};

use poolshift::cutover::provider::{
    Libvirt, Notes, Observed, Power, Precondition, Provider, ServerDisk, Side, Verdict,
};
use poolshift::plan::{LibvirtCutover, LibvirtRehearsal, Method};

use crate::ceph_vm::sync;
use crate::vm::{Guest, Role, VmEnv, vm};

/// A guest that runs, with the provider under test.
struct Bed<'a> {
    env: &'a VmEnv,
    guest: Guest<'a>,
    runtime: tokio::runtime::Runtime,
    folder: tempfile::TempDir,
    cycles: std::cell::Cell<u32>,
}

impl<'a> Bed<'a> {
    #[track_caller]
    fn new(env: &'a VmEnv, tag: &str) -> Self {
        let guest = Guest::make(env, tag);
        guest.start();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let bed = Self { env, guest, runtime, folder: tempfile::tempdir().expect("a folder"), cycles: 0.into() };
        bed.carry_over();
        bed
    }

    fn disks(&self) -> Vec<ServerDisk> {
        let disk = |disk: &crate::vm::GuestDisk| ServerDisk {
            target_in_use: None,
            volume: format!("{:?}", disk.role),
            source: format!("rbd:{}", disk.source).parse().expect("an image"),
            target: format!("rbd:{}", disk.target).parse().expect("an image"),
            boot: disk.role == Role::Root,
        };
        self.guest.disks.iter().map(disk).collect()
    }

    fn provider(&self, method: Method, limit: Duration) -> Libvirt {
        let config = LibvirtCutover {
            domain: self.guest.name.clone(),
            uri: Some(self.env.uri()),
            method,
            save_folder: self.folder.path().to_owned(),
            limit,
            rehearsal: LibvirtRehearsal::default(),
        };
        Libvirt::new(self.disks(), config, None)
    }

    /// One cycle of both disks.
    #[track_caller]
    fn carry_over(&self) {
        self.cycles.set(self.cycles.get() + 1);
        for disk in &self.guest.disks {
            sync(self.env, disk, &format!("cycle-{}", self.cycles.get()));
        }
    }

    /// Runs one call of the provider and says how long it took.
    #[track_caller]
    fn run<T, E: std::fmt::Debug>(&self, what: &str, call: impl Future<Output = Result<T, E>>) -> T {
        let begun = Instant::now();
        let done = self.runtime.block_on(call);
        println!("{what}: {:?}", begun.elapsed());
        done.unwrap_or_else(|error| panic!("{what}: {error:?}"))
    }

    #[track_caller]
    fn expect(&self, provider: &dyn Provider, notes: &Notes, power: Power, side: Side) {
        let observed = self.run("observe", provider.observe(notes));
        assert_eq!(observed, Observed { power, side: Some(side) });
        let (here, there) = (self.images(side), self.images(side.other()));
        let open = usize::from(matches!(power, Power::Running | Power::Suspended));
        for (image, watchers) in here.iter().map(|image| (image, open)).chain(there.iter().map(|image| (image, 0))) {
            assert_eq!(self.env.watchers(image), watchers, "{image}, as the domain is {power:?} on {side:?}");
        }
    }

    fn images(&self, side: Side) -> Vec<String> {
        let name = |disk: &ServerDisk| disk.on(side).to_string().trim_start_matches("rbd:").to_owned();
        self.disks().iter().map(name).collect()
    }

    /// It runs on a side, will start there, writes, and lacks nothing; and has booted that many times.
    #[track_caller]
    fn expect_well(&self, provider: &dyn Provider, notes: &Notes, side: Side, boots: usize) {
        self.expect(provider, notes, Power::Running, side);
        assert_eq!(self.guest.sources_inactive(), self.images(side));
        self.guest.wait_for_ack(self.guest.console().last_ack() + 2);
        assert_eq!(self.guest.console().boot_ids().len(), boots);
        assert_eq!(self.guest.oracle(), Ok(()));
    }

    #[track_caller]
    fn check(&self, provider: &dyn Provider, from: Side) {
        let found = self.runtime.block_on(provider.preconditions(from));
        let errors: Vec<&Precondition> = found.iter().filter(|found| found.verdict == Verdict::Error).collect();
        assert!(errors.is_empty(), "{errors:?}");
    }

    fn saves(&self) -> usize {
        std::fs::read_dir(self.folder.path()).expect("the folder is there").count()
    }
}

/// What it waits for is there.
async fn appears(path: &Path) {
    while !path.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

const LONG: Duration = Duration::from_secs(120);

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_saved_server_comes_back_from_every_point_and_goes_over() {
    let env = vm();
    let bed = Bed::new(&env, "warm");
    let provider = bed.provider(Method::Warm, LONG);
    assert!(provider.keeps_memory() && !provider.stays_open());
    let mut notes = Notes::new();
    bed.check(&provider, Side::Source);
    bed.run("prepare", provider.prepare(Side::Source, &mut notes));
    let file = notes.values().next().expect("it notes the file").clone();

    // Dropped while it is saved: libvirt goes on with it, and the next call finds that.
    bed.runtime.block_on(async {
        tokio::select! {
            done = provider.quiesce(&mut notes) => panic!("it was through: {done:?}"),
            () = appears(Path::new(&file)) => {}
        }
    });
    bed.run("quiesce, again", provider.quiesce(&mut notes));
    bed.expect(&provider, &notes, Power::Saved, Side::Source);
    bed.run("undo what was saved", provider.undo(Side::Source, false, &mut notes));
    bed.expect_well(&provider, &notes, Side::Source, 1);

    bed.run("quiesce", provider.quiesce(&mut notes));
    bed.carry_over();
    bed.run("swap", provider.swap(Side::Target, &mut notes));
    bed.expect(&provider, &notes, Power::Saved, Side::Target);
    // As start does it, and dies before the domain goes on.
    let xml = bed.folder.path().join("xml");
    let restored = env.virsh(&["save-image-dumpxml", &file]);
    let moved = bed.guest.disks.iter().fold(restored, |xml, disk| xml.replace(&disk.source, &disk.target));
    std::fs::write(&xml, moved).expect("the XML is written");
    env.virsh(&["restore", &file, "--xml", xml.to_str().expect("a path of text"), "--paused"]);
    std::fs::remove_file(&xml).expect("the XML is there");
    bed.expect(&provider, &notes, Power::Suspended, Side::Target);
    bed.run("undo what was restored", provider.undo(Side::Source, false, &mut notes));
    bed.expect_well(&provider, &notes, Side::Source, 1);

    let acked = bed.guest.console().last_ack();
    let begun = Instant::now();
    bed.run("quiesce", provider.quiesce(&mut notes));
    bed.carry_over();
    println!("stopped and in step: {:?}", begun.elapsed());
    bed.run("swap", provider.swap(Side::Target, &mut notes));
    bed.run("start", provider.start(Side::Target, false, &mut notes));
    bed.guest.wait_for_ack(acked + 2);
    println!("from the save to new lines: {:?}", begun.elapsed());
    bed.run("start, again", provider.start(Side::Target, false, &mut notes));
    let remarks = bed.run("settle", provider.settle(Side::Target, &mut notes));
    assert!(remarks.is_empty() && notes.is_empty(), "{remarks:?} {notes:?}");
    assert_eq!(bed.saves(), 0);
    assert_eq!(bed.guest.sources_live(), bed.images(Side::Target));
    bed.expect_well(&provider, &notes, Side::Target, 1);
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_server_that_is_shut_down_boots_from_its_targets_and_one_that_won_t_goes_on() {
    let env = vm();
    let bed = Bed::new(&env, "cold");
    let mut notes = Notes::new();
    bed.guest.command("deaf on");
    let hasty = bed.provider(Method::Cold, Duration::from_secs(15));
    bed.check(&hasty, Side::Source);
    bed.run("prepare", hasty.prepare(Side::Source, &mut notes));
    let error = bed.runtime.block_on(hasty.quiesce(&mut notes)).expect_err("nobody listens");
    assert!(error.problem.contains("ignored its power button for 15s"), "{error}");
    assert!(bed.guest.console().all("POWER").count() >= 1, "the button itself was pressed");
    bed.run("undo what never stopped", hasty.undo(Side::Source, false, &mut notes));
    bed.guest.command("deaf off");
    bed.expect_well(&hasty, &notes, Side::Source, 1);

    let provider = bed.provider(Method::Cold, LONG);
    assert!(!provider.keeps_memory() && !provider.stays_open());
    bed.run("quiesce", provider.quiesce(&mut notes));
    bed.run("quiesce, again", provider.quiesce(&mut notes));
    bed.expect(&provider, &notes, Power::Off, Side::Source);
    bed.carry_over();
    bed.run("swap", provider.swap(Side::Target, &mut notes));
    bed.expect(&provider, &notes, Power::Off, Side::Target);
    bed.run("undo what was swapped", provider.undo(Side::Source, false, &mut notes));
    bed.guest.wait_for("the second boot", |console| (console.boot_ids().len() == 2).then_some(()));
    bed.expect_well(&provider, &notes, Side::Source, 2);

    bed.run("quiesce", provider.quiesce(&mut notes));
    bed.carry_over();
    bed.run("swap", provider.swap(Side::Target, &mut notes));
    bed.run("start", provider.start(Side::Target, true, &mut notes));
    bed.guest.wait_for("the third boot", |console| (console.boot_ids().len() == 3).then_some(()));
    assert!(bed.run("settle", provider.settle(Side::Target, &mut notes)).is_empty());
    bed.expect_well(&provider, &notes, Side::Target, 3);
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_suspended_server_has_its_disks_opened_anew_and_can_be_saved_after_that() {
    let env = vm();
    let bed = Bed::new(&env, "hot");
    let provider = bed.provider(Method::Hot, LONG);
    assert!(provider.keeps_memory() && provider.stays_open());
    let mut notes = Notes::new();
    bed.check(&provider, Side::Source);
    bed.run("prepare", provider.prepare(Side::Source, &mut notes));
    bed.run("quiesce", provider.quiesce(&mut notes));
    bed.expect(&provider, &notes, Power::Suspended, Side::Source);
    bed.run("undo what was suspended", provider.undo(Side::Source, false, &mut notes));
    bed.expect_well(&provider, &notes, Side::Source, 1);

    bed.run("quiesce", provider.quiesce(&mut notes));
    bed.carry_over();
    bed.run("swap", provider.swap(Side::Target, &mut notes));
    bed.run("swap, again", provider.swap(Side::Target, &mut notes));
    bed.expect(&provider, &notes, Power::Suspended, Side::Target);
    bed.run("undo what was swapped", provider.undo(Side::Source, false, &mut notes));
    bed.expect_well(&provider, &notes, Side::Source, 1);

    let acked = bed.guest.console().last_ack();
    let begun = Instant::now();
    bed.run("quiesce", provider.quiesce(&mut notes));
    bed.carry_over();
    println!("suspended and in step: {:?}", begun.elapsed());
    bed.run("swap", provider.swap(Side::Target, &mut notes));
    bed.run("start", provider.start(Side::Target, false, &mut notes));
    bed.guest.wait_for_ack(acked + 2);
    println!("from the suspension to new lines: {:?}", begun.elapsed());
    bed.expect_well(&provider, &notes, Side::Target, 1);
    assert_eq!(bed.guest.sources_live(), bed.images(Side::Source), "libvirt does not know");
    let remarks = bed.run("settle", provider.settle(Side::Target, &mut notes));
    assert!(remarks.len() == 1 && remarks[0].contains("still names the disks that it left"), "{remarks:?}");

    // Out of the way, as after the commit: what libvirt would restore by itself fails, and its memory is kept.
    let file = bed.folder.path().join("by-hand");
    let file = file.to_str().expect("a path of text");
    env.virsh(&["save", &bed.guest.name, file]);
    for disk in &bed.guest.disks {
        env.rbd(&["mv", &disk.source, &format!("{}.kept", disk.source)]);
    }
    let restored = std::process::Command::new("virsh").args(["--connect", &env.uri(), "restore", file]).output();
    for disk in &bed.guest.disks {
        env.rbd(&["mv", &format!("{}.kept", disk.source), &disk.source]);
    }
    assert!(!restored.expect("virsh runs").status.success(), "it must not run from what it left");
    let xml = bed.folder.path().join("xml");
    let saved = env.virsh(&["save-image-dumpxml", file]);
    let moved = bed.guest.disks.iter().fold(saved, |xml, disk| xml.replace(&disk.source, &disk.target));
    std::fs::write(&xml, moved).expect("the XML is written");
    env.virsh(&["restore", file, "--xml", xml.to_str().expect("a path of text"), "--running"]);
    bed.expect_well(&provider, &notes, Side::Target, 1);
    assert_eq!(bed.guest.sources_live(), bed.images(Side::Target), "libvirt knows again");
    assert!(bed.run("settle", provider.settle(Side::Target, &mut notes)).is_empty());
}
