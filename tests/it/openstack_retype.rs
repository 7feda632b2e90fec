//! Volumes that nobody has and that Cinder itself moves: many at once, with what is in the way of some; killed in the
//! middle; with clones; and back.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Command;

use serde_json::{Value, json};

use crate::cutover_bed::{Fleet, run_killed_at};
use crate::openstack_env::{OpenStackEnv, openstack};
use crate::openstack_guest::facts_of_volume;
use crate::openstack_world::{World, unique};
use crate::support::{Run, binary, poolshift};

/// Volumes that nobody has, each a server of the plan by itself.
struct Batch<'a> {
    env: &'a OpenStackEnv,
    fleet: Fleet,
    /// By their names in the plan, `v0` and so on.
    volumes: Vec<String>,
    contents: BTreeMap<String, String>,
    facts: BTreeMap<String, Value>,
    /// The last, as it has made the others.
    world: World<'a>,
}

fn image(pool: &str, volume: &str) -> String {
    format!("{pool}/volume-{volume}")
}

impl<'a> Batch<'a> {
    #[track_caller]
    fn new(env: &'a OpenStackEnv, count: usize, mib: u64) -> Self {
        let world = World::new(env);
        let names: Vec<String> = (0..count).map(|number| unique(&format!("retype-{number}"))).collect();
        let volumes = world.volumes(&names);
        let (mut contents, mut facts) = (BTreeMap::new(), BTreeMap::new());
        let mut plan = Fleet::beginning(&env.ceph);
        for (number, id) in volumes.iter().enumerate() {
            world.write(id, mib);
            contents.insert(id.clone(), env.digest(&image("sata", id)));
            facts.insert(id.clone(), facts_of_volume(env, id));
            let _ = write!(
                plan,
                "[[volume]]\nname = \"v{number}\"\nsource = \"rbd:{}\"\ntarget = \"rbd:sas/poolshift-{id}\"\n\
                 cinder = {{ volume = \"{id}\", from_type = \"sata\", to_type = \"sas\" }}\n\
                 cutover = {{ openstack = {{ strategy = \"retype\", limit = \"180s\" }} }}\n",
                image("sata", id)
            );
        }
        let fleet = Fleet::new();
        fleet.write_plan(&plan);
        Self { env, fleet, volumes, contents, facts, world }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = binary();
        command.arg("retype").arg(self.fleet.plan()).args(words);
        command
    }

    #[track_caller]
    fn run(&self, words: &[&str], code: i32) -> Run {
        let run = poolshift(["retype", &self.fleet.plan()].iter().chain(words));
        println!("retype {words:?}: {:?}\n{}{}", run.code, run.stderr, run.stdout);
        run.expect_code(code)
    }

    /// What a run says of each volume.
    #[track_caller]
    fn report(&self, words: &[&str], code: i32) -> Vec<Value> {
        let words: Vec<&str> = words.iter().copied().chain(["--yes", "--json"]).collect();
        let run = self.run(&words, code);
        serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {run:?}"))
    }

    /// A volume is in that pool and in no other, at rest, and is what it always was.
    #[track_caller]
    fn expect_in(&self, number: usize, pool: &str) {
        let (env, id) = (self.env, &self.volumes[number]);
        let shown = env.volume(id);
        assert_eq!((&shown["volume_type"], &shown["status"]), (&json!(pool), &json!("available")), "{shown:#}");
        assert_eq!(shown["os-vol-host-attr:host"], format!("vm@{pool}#{pool}"), "{shown:#}");
        for other in ["sata", "sas"] {
            let wanted = if other == pool { vec![format!("volume-{id}")] } else { Vec::new() };
            assert_eq!(env.images(other, id), wanted, "in {other}");
        }
        assert_eq!(env.digest(&image(pool, id)), self.contents[id], "v{number}");
        assert_eq!(facts_of_volume(env, id), self.facts[id], "v{number}");
        assert!(!env.rbd(&["trash", "ls", "sata"]).contains(id.as_str()), "it was put into the trash");
    }

    /// A volume of Cinder's that is a clone of another.
    #[track_caller]
    fn clone_of(&self, number: usize) -> String {
        let clone = self.world.clone_of(&self.volumes[number], &unique("clone"));
        self.env.wait_for_volume(&clone, "available");
        clone
    }
}

#[test]
#[ignore = "needs OpenStack"]
fn cinder_moves_many_volumes_and_what_is_in_the_way_of_some_is_named() {
    let env = openstack();
    let batch = Batch::new(&env, 4, 16);
    let snapshot = batch.world.snapshot(&batch.volumes[1]);
    let clone = batch.clone_of(2);
    let clone_holds = env.digest(&image("sata", &clone));

    // A look changes nothing.
    let run = batch.run(&["--all", "--dry-run"], 1);
    assert!(run.stdout.contains(&snapshot) && run.stdout.contains("--flatten"), "{}", run.stdout);
    let looks: Vec<Value> = serde_json::from_str(&batch.run(&["--all", "--dry-run", "--json"], 1).stdout).unwrap();
    let ready: Vec<&Value> = looks.iter().map(|look| &look["ready"]).collect();
    assert_eq!(ready, [&json!(true), &json!(false), &json!(false), &json!(true)]);
    assert!((0..4).all(|number| env.volume(&batch.volumes[number])["volume_type"] == "sata"));
    batch.run(&["nobody", "--yes"], 5);
    batch.run(&["v0"], 2);

    // Two go, two are refused by name.
    let ends = batch.report(&["--all", "--parallel", "2", "--verify"], 14);
    let codes: Vec<&Value> = ends.iter().map(|end| &end["exit_code"]).collect();
    assert_eq!(codes, [&json!(0), &json!(14), &json!(14), &json!(0)]);
    assert_eq!(ends[0]["report"]["verified"], true, "{:#}", ends[0]);
    assert!(ends[1]["error"].to_string().contains(&snapshot), "{:#}", ends[1]);
    assert!(ends[2]["error"].to_string().contains(&clone), "{:#}", ends[2]);
    for (number, pool) in [(0, "sas"), (2, "sata"), (3, "sas")] {
        let at = image(pool, &batch.volumes[number]);
        assert_eq!(env.digest(&at), batch.contents[&batch.volumes[number]], "{at}");
    }
    batch.expect_in(0, "sas");
    batch.expect_in(3, "sas");

    // A clone is cut loose, holds what it held, and is Cinder's as before.
    let ends = batch.report(&["v2", "--flatten"], 0);
    assert_eq!(ends[0]["report"]["flattened"].as_array().map(Vec::len), Some(1), "{:#}", ends[0]);
    assert_eq!(ends[0]["report"]["removed_snapshots"], json!([format!("volume-{clone}.clone_snap")]));
    batch.expect_in(2, "sas");
    assert_eq!(env.digest(&image("sata", &clone)), clone_holds);
    batch.world.delete_volume(&clone);
    assert_eq!(env.images("sata", &clone), Vec::<String>::new());

    // Without its snapshot the last one goes, and what is there is left alone.
    batch.world.remove_snapshot(&snapshot);
    let ends = batch.report(&["--all"], 0);
    assert!(ends.iter().all(|end| end["exit_code"] == 0), "{ends:#?}");
    assert_eq!((&ends[0]["report"], ends[1]["report"]["to_type"].as_str()), (&Value::Null, Some("sas")));
    (0..4).for_each(|number| batch.expect_in(number, "sas"));

    // An image that a failing copy of Cinder's would delete.
    let foreign = image("sata", &batch.volumes[0]);
    env.rbd(&["create", &foreign, "--size", "7M"]);
    let ends = batch.report(&["v0", "--back"], 14);
    assert!(ends[0]["error"].to_string().contains(&foreign), "{:#}", ends[0]);
    assert!(env.rbd(&["info", &foreign]).contains("7 MiB"));
    env.rbd(&["rm", "--no-progress", &foreign]);

    let ends = batch.report(&["--all", "--back", "--verify", "--parallel", "4"], 0);
    assert!(ends.iter().all(|end| end["report"]["verified"] == true), "{ends:#?}");
    (0..4).for_each(|number| batch.expect_in(number, "sata"));
}

impl Batch<'_> {
    /// A run to a pool is killed at a failpoint, and the next one goes on with it: what was noted before is compared.
    #[track_caller]
    fn is_killed(&self, pool: &str, place: &str) {
        let words: &[&str] = if pool == "sas" { &["--all", "--verify"] } else { &["--all", "--verify", "--back"] };
        let mut command = self.command(words);
        command.arg("--yes");
        run_killed_at(command, place);
        let ends = self.report(words, 0);
        assert!(ends.iter().all(|end| end["exit_code"] == 0), "{ends:#?}");
        (0..self.volumes.len()).for_each(|number| self.expect_in(number, pool));
    }
}

#[test]
#[ignore = "needs OpenStack"]
fn a_retype_that_is_killed_is_gone_on_with() {
    let env = openstack();
    let batch = Batch::new(&env, 2, 16);
    batch.is_killed("sas", "openstack.retype-volume");
    batch.is_killed("sata", "retype.compare");
}

#[test]
#[ignore = "needs OpenStack"]
fn other_commands_leave_such_volumes_alone_and_say_so() {
    let env = openstack();
    let batch = Batch::new(&env, 1, 1);
    let plan = batch.fleet.plan();
    for (command, code) in [("cutover", 2), ("rollback", 2), ("finalize", 2), ("rehearse", 2)] {
        let run = poolshift([command, &plan, "v0"]).expect_code(code);
        assert!(run.stderr.contains("poolshift retype"), "{command}: {}", run.stderr);
    }
    for command in ["status", "check", "gc"] {
        let run = poolshift([command, &plan]);
        assert!(run.stderr.contains("v0"), "{command}: {run:?}");
    }
    poolshift(["replicate", &plan]).expect_code(2);

    // And they are planned so, where they are asked for.
    let name = env.volume(&batch.volumes[0])["name"].as_str().expect("it has a name").to_owned();
    let words = ["plan", "--openstack", "--data-type", "sas", "--strategy", "retype", "--match", &name];
    let conf = env.ceph.conf.display().to_string();
    let cluster = ["--ceph-conf", &conf, "--ceph-user", &env.ceph.user];
    let run = poolshift(words.iter().chain(&cluster)).expect_code(0);
    assert!(run.stdout.contains("cutover = { openstack = { strategy = \"retype\" } }"), "{}", run.stdout);
    batch.expect_in(0, "sata");
}
