//! What command lines mean, and which are refused.

use std::ffi::OsString;
use std::path::PathBuf;

use super::config::{CephAccess, Command, Config, PlanOf, Projects, StartOver, Stream};
use crate::fleet::control::Scope;
use crate::observe::client::Action;
use crate::openstack::discovery::{Filter, Rules};
use crate::plan::Strategy;

fn parse(line: &str) -> Result<Config, String> {
    let args = std::iter::once("poolshift").chain(line.split_whitespace()).map(OsString::from);
    super::parse(args).map_err(|refusal| refusal.0.to_string())
}

/// The first line of the refusal.
fn refusal(line: &str) -> String {
    parse(line).expect_err(line).lines().next().unwrap_or_default().to_owned()
}

#[test]
fn the_command_itself_is_sound() {
    use clap::CommandFactory as _;
    super::args::Arguments::command().debug_assert();
}

#[test]
fn sync_has_the_promised_defaults() {
    let Command::Sync(sync) = parse("sync rbd:sata/vm rbd:sas/vm").unwrap().command else { panic!("not sync") };
    assert_eq!((sync.source.to_string(), sync.target.to_string()), ("rbd:sata/vm".into(), "rbd:sas/vm".into()));
    assert_eq!((sync.keep, sync.memory, sync.start_over), (1, 64 << 20, StartOver::No));
    assert_eq!(sync.compress, crate::batch::CompressionChoice::Auto);
    assert!(sync.snapshot.is_none() && !sync.dry_run && !sync.json && sync.create == Default::default());
}

#[test]
fn a_sides_own_ceph_flags_win_over_the_common_ones() {
    let line = "sync rbd:a/x rbd:b/x --ceph-conf /c --ceph-user client.u --target-ceph-conf /t --source-ceph-user s";
    let config = parse(line).unwrap();
    let access = |conf: &str, user: &str| CephAccess { conf: Some(PathBuf::from(conf)), user: Some(user.into()) };
    assert_eq!((config.source_ceph, config.target_ceph), (access("/c", "s"), access("/t", "u")));
}

#[test]
fn a_dash_is_a_standard_stream() {
    let Command::MergeDiff(merge) = parse("merge-diff a - out").unwrap().command else { panic!("not merge-diff") };
    assert_eq!((merge.first, merge.second), (Stream::File("a".into()), Stream::Standard));
}

#[test]
fn one_path_is_a_plan_and_two_images_are_a_volume() {
    for plan in ["plan.toml", "/etc/poolshift/plan", "rbd:odd.toml"] {
        let Command::FleetStatus(status) = parse(&format!("status {plan} --volumes")).unwrap().command else {
            panic!("not a plan: {plan}")
        };
        assert_eq!((status.plan, status.volumes, status.watch), (PathBuf::from(plan), true, false));
    }
    let Command::Status(status) = parse("status file:/a file:/b --json").unwrap().command else { panic!("not images") };
    assert_eq!((status.source.to_string(), status.json), ("file:/a".into(), true));
}

#[test]
fn an_action_is_for_one_or_for_all() {
    let Command::Act(act) = parse("sync-now plan.toml web-1 --token-file /t").unwrap().command else {
        panic!("no act")
    };
    assert_eq!((act.action, act.scope), (Action::SyncNow, Scope::Named("web-1".into())));
    assert_eq!(act.token_file, Some(PathBuf::from("/t")));
    let Command::Act(act) = parse("pause plan.toml --all").unwrap().command else { panic!("no act") };
    assert_eq!((act.action, act.scope), (Action::Pause, Scope::All));
}

#[test]
fn a_throttle_is_set_whole_or_reset() {
    let rate = |line: &str| match parse(line).unwrap().command {
        Command::Throttle(throttle) => throttle.rate,
        _ => panic!("no throttle"),
    };
    let set = rate("throttle p.toml sata --bytes-per-second 100M --operations-per-second unlimited").unwrap();
    assert_eq!((set.bytes_per_second.map(u64::from), set.operations_per_second), (Some(100 << 20), None));
    assert_eq!(rate("throttle p.toml sata --reset"), None);
}

#[test]
fn a_plan_is_of_a_pool_or_of_a_cloud() {
    let plan = |line: &str| match parse(line).unwrap().command {
        Command::Plan(plan) => plan,
        _ => panic!("no plan"),
    };
    let pool = plan("plan --from-pool rbd:a --to-pool b --match x*");
    assert_eq!(pool.output, Stream::Standard);
    let PlanOf::Pool(pool) = pool.of else { panic!("{pool:?}") };
    assert_eq!((pool.from_pool.to_string(), pool.pattern.as_deref()), ("rbd:a".into(), Some("x*")));
    let cloud = |line: &str| match plan(line).of {
        PlanOf::Cloud(cloud) => cloud,
        of => panic!("{of:?}"),
    };
    let least = cloud("plan --openstack --data-type sas");
    assert_eq!((&least.cloud, &least.projects, least.pools.len()), (&None, &Projects::Own, 0));
    let data_type = Some("sas".into());
    assert_eq!(least.rules, Rules { data_type, ..Rules::default() });
    let all = cloud(
        "plan --openstack --boot-type b --data-type d --os-cloud c --project p --project q --metadata k=v=w --from-type t \
         --min-size 1G --max-size 2G --match x* --gateway g --group-by k --detached --pool t=a --pool x=y=rbd:b/n",
    );
    assert_eq!((all.cloud.as_deref(), all.projects), (Some("c"), Projects::Named(vec!["p".into(), "q".into()])));
    let pools: Vec<_> = all.pools.iter().map(|(name, pool)| format!("{name} {pool}")).collect();
    assert_eq!(pools, ["t rbd:a", "x=y rbd:b/n"]);
    let filter = Filter {
        name: Some("x*".into()),
        metadata: vec![("k".into(), "v=w".into())],
        types: vec!["t".into()],
        min_size: Some(1 << 30),
        max_size: Some(2 << 30),
    };
    let (boot_type, data_type) = (Some("b".into()), Some("d".into()));
    let (gateways, group_by) = (vec!["g".into()], Some("k".into()));
    let strategy = Strategy::KeepIds;
    assert_eq!(all.rules, Rules { boot_type, data_type, filter, gateways, group_by, detached: true, strategy });
    let again = cloud("plan --openstack --data-type sas --strategy recreate");
    assert_eq!(again.rules.strategy, Strategy::Recreate);
    assert_eq!(cloud("plan --openstack --data-type sas --all-projects").projects, Projects::All);
}

#[test]
fn command_lines_that_make_no_sense_are_refused() {
    for (line, problem) in [
        ("sync rbd:a/x@s rbd:b/x", "--snapshot names it"),
        ("sync rbd:a/x rbd:b/x@s", "drop @s"),
        ("sync file:/a file:/a", "the same"),
        ("sync rbd:a/x rbd:b/x --adopt", "required arguments were not provided"),
        ("sync rbd:a/x rbd:b/x --snapshot a/b", "can't contain '/'"),
        ("sync rbd:a/x rbd:b/x --keep 0", "0 is not in 1..=10000"),
        ("sync rbd:a/x rbd:b/x --memory 1M", "from 16M to 1G"),
        ("sync rbd:a/x rbd:b/x --compress lz4", "write auto, none, zstd"),
        ("sync rbd:a/x rbd:b/x --compress zstd:99", "level from -7 to 19"),
        ("sync rbd:a/x rbd:b/x --object-size 5M", "power of two"),
        ("sync rbd:a/x file:/b --object-size 4M", "this one is a file"),
        ("sync rbd:a/x rbd:b/x --image-feature object-map", "needs --image-feature exclusive-lock"),
        ("sync rbd:a/x rbd:b/x --io-timeout 0", "0 is not in 1..=3600"),
        ("sync rbd:a/x rbd:b/x -v -q", "cannot be used with"),
        ("sync sata/vm rbd:b/x", "it has no scheme"),
        ("verify rbd:a/x rbd:b/x@s", "SOURCE needs a snapshot"),
        ("verify rbd:a/x@s rbd:b/x", "TARGET needs a snapshot"),
        ("export-diff rbd:a/x - --json", "--json needs a FILE"),
        ("send rbd:a/x", "SOURCE needs a snapshot"),
        ("send rbd:a/x@s --from s", "nothing lies between"),
        ("diff file:/a --from s", "keeps no snapshots"),
        ("import-diff - rbd:a/x@s", "drop @s"),
        ("receive rbd:a/x@s", "drop @s"),
        ("status rbd:a/x@s rbd:b/x", "drop @s"),
        ("status rbd:a/x", "needs its TARGET"),
        ("status rbd:a", "needs its TARGET"),
        ("status a/x rbd:b/x", "it has no scheme"),
        ("status plan.toml --state-dir /s", "two images"),
        ("status rbd:a/x rbd:b/x --watch", "of a plan"),
        ("status plan.toml --watch --json", "cannot be used with"),
        ("pause plan.toml", "required arguments were not provided"),
        ("resume plan.toml web-1 --all", "cannot be used with"),
        ("throttle plan.toml sata", "required arguments were not provided"),
        ("throttle plan.toml sata --bytes-per-second 0 --operations-per-second unlimited", "poolshift pause"),
        ("throttle plan.toml sata --reset --bytes-per-second 1M", "cannot be used with"),
        ("merge-diff - - out", "both be standard input"),
        ("merge-diff a b a", "one of the diffs to merge"),
        ("demo --size 1M", "8M to 64G"),
        ("plan", "required arguments were not provided"),
        ("plan --from-pool rbd:a", "required arguments were not provided"),
        ("plan --from-pool rbd:a --to-pool rbd:b --openstack --data-type sas", "cannot be used with"),
        ("plan --from-pool rbd:a --to-pool rbd:b --data-type sas", "for a plan of a cloud"),
        ("plan --from-pool rbd:a --to-pool rbd:b --detached", "for a plan of a cloud"),
        ("plan --openstack", "say what is to be moved"),
        ("plan --openstack --data-type sas --project p --all-projects", "cannot be used with"),
        ("plan --openstack --data-type sas --group-by k", "required arguments were not provided"),
        ("plan --openstack --data-type sas --metadata k", "write KEY=VALUE"),
        ("plan --openstack --data-type sas --pool sas", "write TYPE=POOL"),
        ("plan --openstack --data-type sas --pool sas=a/b/c", "write rbd:POOL"),
        ("plan --openstack --data-type sas --pool sas=a --pool sas=b", "two pools: rbd:a and rbd:b"),
        ("plan --openstack --data-type sas --min-size 2G --max-size 1G", "no volume fits"),
    ] {
        let refusal = refusal(line);
        assert!(refusal.contains(problem), "{line}\n  {refusal}\n  does not say: {problem}");
    }
}
