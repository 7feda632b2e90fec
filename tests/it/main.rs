//! All integration tests, in one binary: one link instead of one a file, and no file forgotten.

mod ceph_adversary;
mod ceph_backend;
mod ceph_busy;
mod ceph_crash;
mod ceph_cutover;
mod ceph_cutover_faults;
mod ceph_cutover_steps;
mod ceph_disk;
mod ceph_faults;
mod ceph_finalize;
mod ceph_interop;
mod ceph_model;
mod ceph_plan;
mod ceph_rehearse;
mod ceph_relations;
mod ceph_vm;
mod ceph_vm_provider;
mod cli;
#[cfg(debug_assertions)]
mod cloud_contract;
mod cutover_bed;
mod files;
mod fleet_commands;
mod librbd;
mod openstack_bed;
mod openstack_env;
mod openstack_gateway;
mod openstack_guest;
mod openstack_others;
mod openstack_proxy;
mod openstack_recreate;
mod openstack_rehearse;
mod openstack_retype;
mod openstack_server;
mod openstack_story;
mod openstack_types;
mod openstack_world;
mod rbd_commands;
mod streams;
mod support;
mod vm;

/// A file in this folder that no `mod` line names would be compiled by nobody, and pass for ever.
#[test]
fn no_test_file_is_forgotten() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it");
    let mut files: Vec<String> = std::fs::read_dir(folder)
        .expect("tests/it can be listed")
        .map(|entry| entry.expect("an entry of tests/it can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs") || path.join("mod.rs").is_file())
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .filter(|stem| stem != "main")
        .collect();
    files.sort();
    let mut named: Vec<String> = include_str!("main.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';').map(str::to_owned))
        .collect();
    named.sort();
    assert_eq!(files, named, "the files of tests/it (left) and the mod lines of tests/it/main.rs (right) differ");
}
