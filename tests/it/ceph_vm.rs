//! A server that writes all the time is moved from SATA to SAS without a reboot, and has lost nothing.

use std::time::Instant;

use crate::support::poolshift;
use crate::vm::{Guest, GuestDisk, Role, VmEnv, inspect, oracle, vm};

/// One cycle with Ceph's options; enough snapshots are kept for a look at the past.
pub(crate) fn sync(env: &VmEnv, disk: &GuestDisk, snapshot: &str) {
    let (source, target) = (format!("rbd:{}", disk.source), format!("rbd:{}", disk.target));
    let conf = env.ceph.conf.to_str().expect("a path of text");
    let ceph = ["--ceph-conf", conf, "--ceph-user", &env.ceph.user];
    let words = ["sync", &source, &target, "--snapshot", snapshot, "--keep", "5"];
    poolshift(words.into_iter().chain(ceph)).expect_code(0);
}

fn verify(env: &VmEnv, disk: &GuestDisk, snapshot: &str) {
    let (source, target) = (format!("rbd:{}@{snapshot}", disk.source), format!("rbd:{}@{snapshot}", disk.target));
    let conf = env.ceph.conf.to_str().expect("a path of text");
    poolshift(["verify", &source, &target, "--ceph-conf", conf, "--ceph-user", &env.ceph.user]).expect_code(0);
}

/// Gives a domain's XML the disks on SAS.
fn on_sas(guest: &Guest<'_>, xml: &str) -> String {
    guest.disks.iter().fold(xml.to_owned(), |xml, GuestDisk { source, target, .. }| {
        let (old, new) = (format!("name='{source}'"), format!("name='{target}'"));
        assert_eq!(xml.matches(&old).count(), 1, "{source} in {xml}");
        xml.replace(&old, &new)
    })
}

/// The server's state is saved, the last of its writes moved, and the state restored on the other disks.
fn switch_to_sas(env: &VmEnv, guest: &Guest<'_>) -> u64 {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("a path of text").to_owned();
    let (state, restored, persistent) = (path("state"), path("restored.xml"), path("persistent.xml"));
    let begun = Instant::now();
    env.virsh(&["save", &guest.name, &state, "--running"]);
    let saved = begun.elapsed();
    assert_eq!(guest.state(), "shut off");
    let acked = guest.console().last_ack();
    for disk in &guest.disks {
        assert_eq!(env.watchers(&disk.source), 0, "{} is closed", disk.source);
        sync(env, disk, "final");
    }
    let synced = begun.elapsed();
    std::fs::write(&restored, on_sas(guest, &env.virsh(&["save-image-dumpxml", &state]))).unwrap();
    std::fs::write(&persistent, on_sas(guest, &env.virsh(&["dumpxml", "--inactive", &guest.name]))).unwrap();
    env.virsh(&["restore", &state, "--xml", &restored, "--running"]);
    env.virsh(&["define", &persistent]);
    guest.wait_for_ack(acked + 2);
    println!("saved after {saved:?}, in step after {synced:?}, writing on SAS after {:?}", begun.elapsed());
    acked
}

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_server_moves_without_a_reboot_and_loses_nothing() {
    let env = vm();
    let guest = Guest::make(&env, "vm");
    let sources: Vec<String> = guest.disks.iter().map(|disk| disk.source.clone()).collect();
    let targets: Vec<String> = guest.disks.iter().map(|disk| disk.target.clone()).collect();
    let begun = Instant::now();
    guest.start();
    guest.wait_for_ack(20);
    println!("20 lines after {:?}", begun.elapsed());
    assert_eq!(guest.sources_live(), sources);

    for snapshot in ["first", "second"] {
        let before = guest.console().last_ack();
        for disk in &guest.disks {
            sync(&env, disk, snapshot);
        }
        // It went on writing, and has more that only SATA has.
        guest.wait_for_ack(before + 10);
    }
    guest.wait_for_ack(guest.console().last_ack() + 10);

    let acked = switch_to_sas(&env, &guest);
    assert_eq!(guest.state(), "running");
    assert_eq!(guest.console().boot_ids().len(), 1, "it has not booted again");
    assert_eq!(guest.oracle(), Ok(()));
    guest.wait_for_ack(acked + 20);
    assert_eq!(guest.sources_live(), targets);
    assert_eq!(guest.sources_inactive(), targets);
    for disk in &guest.disks {
        assert_eq!(env.watchers(&disk.source), 0, "{}", disk.source);
        assert_eq!(env.watchers(&disk.target), 1, "{}", disk.target);
        verify(&env, disk, "final");
    }

    // The same oracle on what SAS had at the switch, and, as the control, on what it had had before the last cycle.
    let logs = |snapshot: &str| {
        let [root, data] = &targets[..] else { panic!("two disks") };
        [(Role::Root, root), (Role::Data, data)]
            .map(|(role, image)| inspect(&env, role, &format!("{image}@{snapshot}")))
    };
    assert_eq!(oracle(acked, logs("final")), Ok(()));
    let loss = oracle(acked, logs("second")).expect_err("the past lacks what was written since");
    assert!(loss.contains("lost"), "{loss}");

    // A cold start finds all of it on SAS, too.
    guest.shut_down();
    let before = guest.console().last_ack();
    guest.start();
    guest.wait_for_ack(before + 5);
    assert_eq!(guest.console().boot_ids().len(), 2);
    assert_eq!(guest.oracle(), Ok(()));
}
