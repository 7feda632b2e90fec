//! A cutover of a real server that writes all the time: over, back with what it wrote, and over again.

use serde_json::Value;

use crate::cutover_bed::Bed;
use crate::vm::{Role, inspect, oracle, vm};

#[test]
#[ignore = "needs Ceph and libvirt"]
fn a_server_goes_over_and_back_while_the_fleet_is_replicated() {
    let env = vm();
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
