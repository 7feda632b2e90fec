//! What the tests of cutovers in a cloud share: servers, gateways and volumes, the plan that has them, and what is to be
//! true of them when nothing is under way.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::Command;

use serde_json::{Value, json};

use crate::cutover_bed::{Fleet, Running, report, run_killed_at};
use crate::openstack_env::{OpenStackEnv, Service};
use crate::openstack_guest::{CloudGuest, facts_of_volume};
use crate::openstack_world::{World, unique};
use crate::support::{Run, poolshift};

/// A server of the plan.
pub(crate) struct Planned {
    pub(crate) name: String,
    /// The ids of its volumes.
    pub(crate) volumes: Vec<String>,
}

/// The types that a volume goes from and to.
#[derive(Clone, Debug)]
pub(crate) struct Types {
    pub(crate) from: String,
    pub(crate) to: String,
    /// Plain ones on its way, of both pools.
    pub(crate) by_way_of: Option<[String; 2]>,
}

impl Types {
    fn plain() -> Self {
        Self { from: "sata".into(), to: "sas".into(), by_way_of: None }
    }
}

/// Who has the volumes of the plan's servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// A server that boots from them.
    Server,
    /// A server that has them beside its own.
    Gateway,
    /// Nobody.
    Nobody,
}

/// The failpoints of a cutover: its phases and all steps of what is done with a volume, with the calls that stop and start
/// whoever has it.
pub(crate) fn places(stop: &'static str, start: Option<&'static str>) -> Vec<&'static str> {
    let before = ["cutover.syncing", "cutover.converged", "cutover.quiescing", stop];
    let phases = ["cutover.final-delta", "cutover.verifying", "cutover.swapping"];
    let steps = ["switch.rename-to-standby.source", "switch.install-placeholder.source", "switch.retype"];
    let more = ["openstack.retype-volume", "switch.retire-placeholder.target", "switch.rename-to-active.target"];
    let all = before.into_iter().chain(phases).chain(steps).chain(more).chain(["switch.done", "cutover.resuming"]);
    all.chain(start).chain(["cutover.committed"]).collect()
}

/// The failpoint of the way back that is what this one is of the way there.
fn on_the_way_back(place: &str) -> String {
    match place.rsplit_once('.') {
        Some((step, "source")) => format!("{step}.target"),
        Some((step, "target")) => format!("{step}.source"),
        _ => place.to_owned(),
    }
}

/// Servers or volumes of a cloud, and the plan that has them.
pub(crate) struct CloudBed<'a> {
    pub(crate) env: &'a OpenStackEnv,
    pub(crate) fleet: Fleet,
    held: Held,
    /// The servers that run from the volumes, one for each of the plan, or the gateway.
    guests: Vec<CloudGuest<'a>>,
    /// Those of the plan.
    pub(crate) servers: Vec<Planned>,
    /// The types of each server's volumes, in their order, over and over.
    types: Vec<Types>,
    /// By server of the plan, what all that stays was in the beginning.
    facts: Vec<Value>,
    /// What is in the volumes that nobody writes to, by their ids.
    pub(crate) contents: RefCell<BTreeMap<String, String>>,
    /// The last, as it has made the others.
    pub(crate) world: World<'a>,
}

fn source(volume: &str) -> String {
    format!("sata/volume-{volume}")
}

fn kept(volume: &str) -> String {
    format!("{}.poolshift-kept", source(volume))
}

fn target(volume: &str) -> String {
    format!("sas/volume-{volume}")
}

fn idle(volume: &str) -> String {
    format!("sas/poolshift-{volume}")
}

/// All that the test's project has: servers, volumes, the images with a volume's id in their names, and the clones of
/// these, whatever they are called.
#[track_caller]
pub(crate) fn all(env: &OpenStackEnv) -> BTreeSet<String> {
    let list = |service, path: &str, key: &str| -> Vec<Value> {
        env.get(service, path)[key].as_array().expect("a list").clone()
    };
    let (servers, volumes) =
        (list(Service::Nova, "servers/detail", "servers"), list(Service::Cinder, "volumes/detail", "volumes"));
    let of = |kind: &str, found: &[Value]| -> Vec<String> {
        found.iter().map(|entry| format!("{kind} {} {}", entry["id"], entry["name"])).collect()
    };
    let mut all: BTreeSet<String> = of("server", &servers).into_iter().chain(of("volume", &volumes)).collect();
    let ids: Vec<&str> = volumes.iter().filter_map(|volume| volume["id"].as_str()).collect();
    for pool in ["sata", "sas"] {
        let names = env.images(pool, "");
        for name in names.iter().filter(|name| ids.iter().any(|id| name.contains(id))) {
            let image = format!("{pool}/{name}");
            let clones = env.rbd(&["children", "--all", "--format", "json", &image]);
            all.insert(format!("image {image} with the clones {}", clones.trim()));
        }
    }
    all
}

/// Removes what a rehearsal in a test that has failed would leave to the next one.
pub(crate) struct CleanUp<'a, 'e>(pub(crate) &'a CloudBed<'e>);

impl Drop for CleanUp<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{:?}", poolshift(["gc", &self.0.fleet.plan(), "--yes"]));
        }
    }
}

impl<'a> CloudBed<'a> {
    /// A server with a root and a data disk, which writes all the time. `more` is more of `openstack = { … }` in the plan.
    #[track_caller]
    pub(crate) fn server(env: &'a OpenStackEnv, tag: &str, more: &str) -> Self {
        Self::server_of(env, tag, |_| Types::plain(), more)
    }

    /// The same, with volumes of other types.
    #[track_caller]
    pub(crate) fn server_of_types(env: &'a OpenStackEnv, tag: &str, types: impl Fn(&World<'_>) -> Types) -> Self {
        Self::server_of(env, tag, types, "")
    }

    #[track_caller]
    fn server_of(env: &'a OpenStackEnv, tag: &str, types: impl Fn(&World<'_>) -> Types, more: &str) -> Self {
        let world = World::new(env);
        let types = types(&world);
        let name = unique(tag);
        let volumes = world.guest_volumes(&types.from, &name);
        let more_of_server = json!({
            "metadata": {"m": "1"}, "tags": ["one", "two"], "key_name": world.key_pair(), "description": "of a test",
            "networks": world.networks(),
        });
        let guest = world.boot(&name, &volumes, &more_of_server);
        let servers = vec![Planned { name: "web".into(), volumes }];
        Self::of(env, world, (Held::Server, vec![guest]), (servers, vec![types]), more)
    }

    /// So many servers with a root and a data disk each, which write all the time, and no plan yet: in it they will have the
    /// names that they have in the cloud.
    #[track_caller]
    pub(crate) fn unplanned(env: &'a OpenStackEnv, tag: &str, servers: usize) -> Self {
        let world = World::new(env);
        let prefix = unique(tag);
        let plan = |number: usize| {
            let name = format!("{prefix}-{number}");
            let volumes = world.guest_volumes("sata", &name);
            Planned { name, volumes }
        };
        let servers: Vec<Planned> = (1..=servers).map(plan).collect();
        let key = world.key_pair();
        let make = |server: &Planned| {
            let more = json!({"metadata": {"m": &server.name}, "tags": ["one", "two"], "key_name": &key, "networks": world.networks()});
            world.make(&server.name, &server.volumes, &more)
        };
        // They boot beside each other.
        let booting: Vec<_> = servers.iter().map(make).collect();
        let guests = booting.into_iter().map(|made| world.booted(made)).collect();
        let mut bed = Self::new(env, world, (Held::Server, guests), (servers, vec![Types::plain()]));
        bed.look_anew();
        bed
    }

    /// A gateway that has a disk of its own to write to, and two volumes of each of so many servers.
    #[track_caller]
    pub(crate) fn gateway(env: &'a OpenStackEnv, servers: usize, more: &str) -> Self {
        let world = World::new(env);
        let name = unique("gateway");
        let mut volumes = world.guest_volumes("sata", &name);
        let servers = Self::plan_servers(&world, servers);
        volumes.extend(servers.iter().flat_map(|server| server.volumes.clone()));
        let guest = world.boot(&name, &volumes, &Value::Null);
        Self::of(env, world, (Held::Gateway, vec![guest]), (servers, vec![Types::plain()]), more)
    }

    /// The same, with one server more, that has not booted yet: its disks were made, and given to the gateway later.
    #[track_caller]
    pub(crate) fn gateway_of_a_server_to_be(env: &'a OpenStackEnv, servers: usize, more: &str) -> Self {
        let world = World::new(env);
        let name = unique("gateway");
        let mut volumes = world.guest_volumes("sata", &name);
        let mut servers = Self::plan_servers(&world, servers);
        volumes.extend(servers.iter().flat_map(|server| server.volumes.clone()));
        let mut guest = world.boot(&name, &volumes, &Value::Null);
        // Its own file systems are known by their labels, which these have as well.
        let to_be = world.guest_volumes("sata", &unique("to-be"));
        for id in &to_be {
            world.attach(&guest.id, id);
            guest.volumes.push(id.clone());
        }
        servers.push(Planned { name: "to-be".into(), volumes: to_be });
        Self::of(env, world, (Held::Gateway, vec![guest]), (servers, vec![Types::plain()]), more)
    }

    /// Volumes that nobody has, two of each of so many servers.
    #[track_caller]
    pub(crate) fn detached(env: &'a OpenStackEnv, servers: usize, more: &str) -> Self {
        let world = World::new(env);
        let servers = Self::plan_servers(&world, servers);
        Self::of(env, world, (Held::Nobody, Vec::new()), (servers, vec![Types::plain()]), more)
    }

    /// A server to be of volumes that nobody has, one of each of these types.
    #[track_caller]
    pub(crate) fn detached_of_types(env: &'a OpenStackEnv, types: impl Fn(&World<'_>) -> Vec<Types>) -> Self {
        let world = World::new(env);
        let types = types(&world);
        let make = |types: &Types| world.volumes_of(&types.from, &[unique("limited")]).remove(0);
        let volumes: Vec<String> = types.iter().map(make).collect();
        volumes.iter().for_each(|volume| world.write(volume, 8));
        let servers = vec![Planned { name: "web1".into(), volumes }];
        Self::of(env, world, (Held::Nobody, Vec::new()), (servers, types), "")
    }

    /// Servers of the plan, with two volumes each that hold something.
    #[track_caller]
    fn plan_servers(world: &World<'_>, count: usize) -> Vec<Planned> {
        let server = |number: usize| {
            let name = format!("web{number}");
            let volumes = world.volumes(&["root", "data"].map(|role| unique(&format!("{name}-{role}"))));
            for volume in &volumes {
                world.write(volume, 8);
            }
            Planned { name, volumes }
        };
        (1..=count).map(server).collect()
    }

    fn new(
        env: &'a OpenStackEnv,
        world: World<'a>,
        (held, guests): (Held, Vec<CloudGuest<'a>>),
        (servers, types): (Vec<Planned>, Vec<Types>),
    ) -> Self {
        let (fleet, facts, contents) = (Fleet::new(), Vec::new(), RefCell::default());
        Self { env, fleet, held, guests, servers, types, facts, contents, world }
    }

    #[track_caller]
    fn of(
        env: &'a OpenStackEnv,
        world: World<'a>,
        held: (Held, Vec<CloudGuest<'a>>),
        servers: (Vec<Planned>, Vec<Types>),
        more: &str,
    ) -> Self {
        let mut bed = Self::new(env, world, held, servers);
        bed.look_anew();
        let mut plan = Fleet::beginning(&env.ceph);
        let more = more.replace("FOLDER", &bed.fleet.folder().display().to_string());
        for (server, Planned { name, volumes }) in bed.servers.iter().enumerate() {
            let holder = match (bed.held, bed.guest_of(server)) {
                (Held::Server, Some(guest)) => format!("server = \"{}\", ", guest.id),
                (Held::Gateway, Some(guest)) => format!("gateway = \"{}\", ", guest.id),
                _ => String::new(),
            };
            let _ = write!(
                plan,
                "[[server]]\nname = \"{name}\"\ncutover = {{ openstack = {{ {holder}limit = \"180s\"{more} }} }}\n"
            );
            for (number, id) in volumes.iter().enumerate() {
                let (boot, source, idle) = (number == 0, source(id), idle(id));
                let Types { from, to, by_way_of } = &bed.types[number % bed.types.len()];
                let helpers = by_way_of.as_ref();
                let helpers = helpers.map(|[from, to]| format!(", by_way_of = {{ from = \"{from}\", to = \"{to}\" }}"));
                let helpers = helpers.unwrap_or_default();
                let _ = write!(
                    plan,
                    "[[server.volume]]\nname = \"{name}-{number}\"\nboot = {boot}\nsource = \"rbd:{source}\"\n\
                     target = \"rbd:{idle}\"\ncinder = {{ volume = \"{id}\", from_type = \"{from}\", to_type = \"{to}\"\
                     {helpers} }}\n"
                );
            }
        }
        bed.fleet.write_plan(&plan);
        bed
    }

    fn look_at_facts(&self, server: usize) -> Value {
        let volumes: Vec<Value> =
            self.servers[server].volumes.iter().map(|volume| facts_of_volume(self.env, volume)).collect();
        let guest = self.guest_of(server);
        let serials = guest.map(CloudGuest::serials);
        json!({"server": guest.map(CloudGuest::facts), "volumes": volumes, "serials": serials})
    }

    /// What stays has changed for good.
    pub(crate) fn look_anew(&mut self) {
        self.facts = (0..self.servers.len()).map(|server| self.look_at_facts(server)).collect();
    }

    /// The first server, or the gateway.
    pub(crate) fn guest(&self) -> &CloudGuest<'a> {
        self.guests.first().expect("somebody has the volumes")
    }

    /// Who has the volumes of a server of the plan.
    pub(crate) fn guest_of(&self, server: usize) -> Option<&CloudGuest<'a>> {
        self.guests.get(if self.held == Held::Gateway { 0 } else { server })
    }

    /// Gives a server one more volume, which is to stay where it is.
    #[track_caller]
    pub(crate) fn give(&mut self, server: usize, volume: &str) {
        self.world.attach(&self.guests[server].id, volume);
        self.guests[server].volumes.push(volume.to_owned());
        self.look_anew();
    }

    /// Has poolshift make the plan of all that has the names of these servers, as it is told; gives back what it says.
    #[track_caller]
    pub(crate) fn discover(&self, words: &[&str]) -> Run {
        let name = &self.servers[0].name;
        let pattern = name.trim_end_matches(|end: char| end.is_ascii_digit()).to_owned() + "*";
        let (conf, plan) = (self.env.ceph.conf.display().to_string(), self.fleet.plan());
        let cluster = ["--ceph-conf", &conf, "--ceph-user", &self.env.ceph.user];
        let run = poolshift(
            ["plan", "--openstack", "--match", &pattern, "--output", &plan].iter().chain(&cluster).chain(words),
        );
        println!("plan {words:?}: {run:?}");
        run
    }

    /// Notes what is in the volumes that nobody writes to: it has to be in them ever after.
    #[track_caller]
    pub(crate) fn note_contents(&self, server: usize) {
        self.note_contents_on(server, "source");
    }

    /// The same, where they are on that side.
    #[track_caller]
    pub(crate) fn note_contents_on(&self, server: usize, side: &str) {
        for id in &self.servers[server].volumes {
            let image = if side == "target" { target(id) } else { source(id) };
            self.contents.borrow_mut().insert(id.clone(), self.env.digest(&image));
        }
    }

    /// Writes the plan anew, with another text in it.
    #[track_caller]
    pub(crate) fn change_plan(&self, from: &str, to: &str) {
        let plan = std::fs::read_to_string(self.fleet.plan()).expect("the plan");
        assert!(plan.contains(from), "{plan}");
        self.fleet.write_plan(&plan.replace(from, to));
    }

    /// Has every server of the plan a point.
    #[track_caller]
    pub(crate) fn replicate(&mut self) {
        self.fleet.replicate(self.servers.len());
    }

    /// `poolshift` with a command on a server of the plan.
    pub(crate) fn command(&self, server: usize, command: &str, words: &[&str]) -> Command {
        self.fleet.command(&self.servers[server].name, command, words)
    }

    pub(crate) fn run(&self, server: usize, command: &str, words: &[&str]) -> Run {
        let run = self.fleet.run(&self.servers[server].name, command, words);
        println!("{command} {words:?}: {:?}\n{}{}", run.code, run.stderr, run.stdout);
        run
    }

    pub(crate) fn start(&self, server: usize, command: &str, words: &[&str]) -> Running {
        Running::start(self.command(server, command, words))
    }

    /// Runs a command that ends with a server on a side.
    #[track_caller]
    pub(crate) fn switch(&self, server: usize, command: &str, words: &[&str], side: &str) -> Value {
        let words: Vec<&str> = words.iter().copied().chain(["--yes", "--json"]).collect();
        let report = report(&self.run(server, command, &words).expect_code(0));
        assert_eq!(report["runs_from"], side, "{report:#}");
        self.expect_well(server, side);
        report
    }

    /// The volumes of a server are on one side, and on no other: for Cinder, in both pools, and for whoever has them; all
    /// that is to stay is as it was, and nothing is lost.
    #[track_caller]
    pub(crate) fn expect_well(&self, server: usize, side: &str) {
        let (env, on_target) = (self.env, side == "target");
        let volumes = &self.servers[server].volumes;
        for (number, id) in volumes.iter().enumerate() {
            let shown = env.volume(id);
            let (name, status) = (if on_target { "sas" } else { "sata" }, self.usual_status());
            let Types { from, to, .. } = &self.types[number % self.types.len()];
            assert_eq!(&shown["volume_type"], if on_target { to } else { from }, "{shown:#}");
            assert_eq!(shown["os-vol-host-attr:host"], format!("vm@{name}#{name}"), "{shown:#}");
            assert_eq!(shown["status"], status, "{shown:#}");
            let migration = shown["migration_status"].as_str().unwrap_or("none");
            assert!(["success", "none"].contains(&migration), "{shown:#}");
            let images = ["sata", "sas"].map(|pool| {
                let mut all = env.images(pool, id);
                all.iter_mut().for_each(|name| *name = format!("{pool}/{name}"));
                all
            });
            let (used, left) = if on_target { (target(id), kept(id)) } else { (source(id), idle(id)) };
            let pair = if on_target { [left.clone(), used.clone()] } else { [used.clone(), left.clone()] };
            assert_eq!(images.concat(), pair, "and nothing else");
            for (image, wanted) in [(&used, usize::from(self.held != Held::Nobody)), (&left, 0)] {
                // What a process that was killed had open stays so for half a minute.
                env.wait_for(&format!("{wanted} clients of {image}"), || match env.watchers(image) {
                    found if found == wanted => Ok(()),
                    found => Err(format!("{found} have it open")),
                });
            }
            if let Some(wanted) = self.contents.borrow().get(id) {
                assert_eq!(&env.digest(&used), wanted, "{used}");
            }
        }
        self.expect_facts(server);
        if let Some(guest) = self.guest_of(server) {
            self.expect_guest_well(guest, volumes, on_target);
        }
    }

    /// All that stays of a server is as it was.
    #[track_caller]
    pub(crate) fn expect_facts(&self, server: usize) {
        assert_eq!(self.look_at_facts(server), self.facts[server]);
    }

    fn usual_status(&self) -> &'static str {
        if self.held == Held::Nobody { "available" } else { "in-use" }
    }

    #[track_caller]
    fn expect_guest_well(&self, guest: &CloudGuest<'_>, volumes: &[String], on_target: bool) {
        let shown = self.env.server(&guest.id);
        assert_eq!((&shown["status"], &shown["OS-EXT-STS:task_state"]), (&json!("ACTIVE"), &Value::Null), "{shown:#}");
        let images = guest.images();
        for id in volumes {
            let wanted = if on_target { target(id) } else { source(id) };
            let named = images.iter().filter(|image| image.ends_with(&format!("/volume-{id}"))).collect::<Vec<_>>();
            assert_eq!(named, [&wanted], "{images:?}");
        }
        guest.wait_for_ack(guest.console().last_ack() + 2);
        assert_eq!(guest.oracle(), Ok(()));
        if self.held == Held::Gateway {
            assert_eq!(guest.console().boot_ids().len(), 1, "it goes on");
        }
    }

    /// A server runs from its targets, and goes on when its sources are removed: as Nova and Cinder know it, as before.
    #[track_caller]
    pub(crate) fn finalized(&self, server: usize) {
        let env = self.env;
        self.run(server, "finalize", &["--yes"]).expect_code(0);
        let volumes = &self.servers[server].volumes;
        for id in volumes {
            assert_eq!(env.images("sata", id), Vec::<String>::new());
            assert_eq!(env.images("sas", id), [format!("volume-{id}")]);
            let image = target(id);
            assert_eq!(env.rbd(&["snap", "ls", "--all", &image]).trim(), "", "Cinder would not delete it for good");
            let listed = env.rbd(&["image-meta", "list", &image]);
            assert_eq!(listed.lines().filter(|line| line.contains("poolshift")).count(), 0, "{listed}");
        }
        let guest = self.guest_of(server).expect("it is a server's");
        guest.wait_for_ack(guest.console().last_ack() + 5);
        assert_eq!(guest.oracle(), Ok(()));
        let had = guest.images();
        env.server_action(&guest.id, &json!({"os-stop": null}));
        env.wait_for_server(&guest.id, "SHUTOFF");
        let acked = guest.console().last_ack();
        env.server_action(&guest.id, &json!({"os-start": null}));
        env.wait_for_server(&guest.id, "ACTIVE");
        guest.wait_for_ack(acked + 3);
        assert_eq!(guest.oracle(), Ok(()));
        assert_eq!(guest.images(), had);
        assert_eq!(had[..volumes.len()], volumes.iter().map(|id| target(id)).collect::<Vec<_>>());
    }

    /// It is deleted as any other: one volume with it, as it was told, and the other by itself.
    #[track_caller]
    pub(crate) fn ends_as_any_other(&self, server: usize) {
        let (env, volumes) = (self.env, &self.servers[server].volumes);
        self.world.delete_server(&self.guest_of(server).expect("it is a server's").id);
        self.world.delete_volume(&volumes[0]);
        for id in volumes {
            env.wait_for("the end of its image", || match env.images("sas", id) {
                left if left.is_empty() => Ok(()),
                left => Err(format!("{left:?}")),
            });
            assert!(!env.rbd(&["trash", "ls", "sas"]).contains(id.as_str()), "it was put into the trash");
        }
    }

    /// Whether the first target has the journal of a cutover, or the note that pauses the fleet's workers for one.
    pub(crate) fn is_begun(&self, server: usize) -> bool {
        let first = &self.servers[server].volumes[0];
        let images = self.env.images("sas", first);
        let ours = images.iter().find(|name| **name == format!("poolshift-{first}")).or_else(|| images.first());
        ours.is_some_and(|name| {
            let listed = self.env.rbd(&["image-meta", "list", "--format", "json", &format!("sas/{name}")]);
            let listed: Value = serde_json::from_str(&listed).unwrap_or_default();
            ["poolshift.cutover", "poolshift.note"].iter().any(|key| listed[key].is_string())
        })
    }

    /// What became of a server, after a run that may have failed: where it is not on a side for good, the next command
    /// brings it there, and it is well wherever it is.
    #[track_caller]
    pub(crate) fn brought_to_an_end(&self, server: usize, code: Option<i32>, undo: bool) -> &'static str {
        match code {
            Some(0) => {
                self.expect_well(server, "target");
                "over"
            }
            Some(12) => {
                self.expect_well(server, "source");
                "back"
            }
            _ if !self.is_begun(server) => {
                self.expect_well(server, "source");
                "refused"
            }
            _ if undo => {
                self.switch(server, "rollback", &["--with-changes"], "source");
                "undone"
            }
            _ => {
                let run = self.run(server, "cutover", &["--yes", "--json"]);
                // What could not be brought back is brought back, and never over; or it was over already (1).
                let went_back = run.code == Some(12);
                assert!(went_back || matches!(run.code, Some(0 | 1)), "{run:?}");
                self.expect_well(server, if went_back { "source" } else { "target" });
                if went_back { "undone" } else { "finished" }
            }
        }
    }

    /// Runs a command that is killed at a failpoint, which it has to come to.
    #[track_caller]
    pub(crate) fn killed_at(&self, server: usize, command: &str, words: &[&str], place: &str) {
        let words: Vec<&str> = words.iter().copied().chain(["--yes"]).collect();
        run_killed_at(self.command(server, command, &words), place);
    }

    /// The first server is killed on its way over, and that is undone or finished by the next command.
    #[track_caller]
    pub(crate) fn killed_and_ended(&self, place: &str, undo: bool) {
        self.killed_at(0, "cutover", &[], place);
        let ended = self.brought_to_an_end(0, None, undo);
        println!("killed at {place}: it is {ended}");
        assert_eq!(ended, if undo { "undone" } else { "finished" });
    }

    /// The first server is killed at each place, there and back, and brought to an end both ways.
    #[track_caller]
    pub(crate) fn killed_at_places(&self, places: &[&str]) {
        for place in places {
            self.killed_and_ended(place, true);
            self.killed_and_ended(place, false);
            self.killed_at(0, "rollback", &["--with-changes"], &on_the_way_back(place));
            self.bring_back(0);
            self.expect_well(0, "source");
        }
    }

    /// From wherever it is to its sources, also where its way there was cut.
    #[track_caller]
    pub(crate) fn bring_back(&self, server: usize) {
        if self.is_begun(server) {
            self.run(server, "rollback", &["--with-changes", "--yes", "--json"]).expect_code(0);
        }
    }
}
