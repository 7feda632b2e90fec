//! What the tests of cutovers in a cloud share: servers, gateways and volumes, the plan that has them, and what is to be
//! true of them when nothing is under way.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Command;

use serde_json::{Value, json};

use crate::cutover_bed::{Fleet, Running, report};
use crate::openstack_guest::{CloudGuest, facts_of_volume};
use crate::openstack_world::{OpenStackEnv, World, unique};
use crate::support::Run;

/// A server of the plan.
pub(crate) struct Planned {
    pub(crate) name: String,
    /// The ids of its volumes.
    pub(crate) volumes: Vec<String>,
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

/// Servers or volumes of a cloud, and the plan that has them.
pub(crate) struct CloudBed<'a> {
    pub(crate) env: &'a OpenStackEnv,
    pub(crate) fleet: Fleet,
    held: Held,
    /// The server that runs from the volumes, or the gateway.
    guest: Option<CloudGuest<'a>>,
    /// Those of the plan.
    pub(crate) servers: Vec<Planned>,
    /// What all that stays was in the beginning.
    facts: Value,
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

impl<'a> CloudBed<'a> {
    /// A server with a root and a data disk, which writes all the time. `more` is more of `openstack = { … }` in the plan.
    #[track_caller]
    pub(crate) fn server(env: &'a OpenStackEnv, tag: &str, more: &str) -> Self {
        let world = World::new(env);
        let name = unique(tag);
        let volumes = world.guest_volumes(&name);
        let more_of_server = json!({
            "metadata": {"m": "1"}, "tags": ["one", "two"], "key_name": world.key_pair(), "description": "of a test",
        });
        let guest = world.boot(&name, &volumes, &more_of_server);
        let servers = vec![Planned { name: "web".into(), volumes }];
        Self::of(env, world, Held::Server, Some(guest), servers, more)
    }

    /// A gateway that has a disk of its own to write to, and two volumes of each of so many servers.
    #[track_caller]
    pub(crate) fn gateway(env: &'a OpenStackEnv, servers: usize, more: &str) -> Self {
        let world = World::new(env);
        let name = unique("gateway");
        let mut volumes = world.guest_volumes(&name);
        let servers = Self::plan_servers(&world, servers);
        volumes.extend(servers.iter().flat_map(|server| server.volumes.clone()));
        let guest = world.boot(&name, &volumes, &Value::Null);
        Self::of(env, world, Held::Gateway, Some(guest), servers, more)
    }

    /// The same, with one server more, that has not booted yet: its disks were made, and given to the gateway later.
    #[track_caller]
    pub(crate) fn gateway_of_a_server_to_be(env: &'a OpenStackEnv, servers: usize, more: &str) -> Self {
        let world = World::new(env);
        let name = unique("gateway");
        let mut volumes = world.guest_volumes(&name);
        let mut servers = Self::plan_servers(&world, servers);
        volumes.extend(servers.iter().flat_map(|server| server.volumes.clone()));
        let mut guest = world.boot(&name, &volumes, &Value::Null);
        // Its own file systems are known by their labels, which these have as well.
        let to_be = world.guest_volumes(&unique("to-be"));
        for id in &to_be {
            world.attach(&guest.id, id);
            guest.volumes.push(id.clone());
        }
        servers.push(Planned { name: "to-be".into(), volumes: to_be });
        Self::of(env, world, Held::Gateway, Some(guest), servers, more)
    }

    /// Volumes that nobody has, two of each of so many servers.
    #[track_caller]
    pub(crate) fn detached(env: &'a OpenStackEnv, servers: usize, more: &str) -> Self {
        let world = World::new(env);
        let servers = Self::plan_servers(&world, servers);
        Self::of(env, world, Held::Nobody, None, servers, more)
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

    #[track_caller]
    fn of(
        env: &'a OpenStackEnv,
        world: World<'a>,
        held: Held,
        guest: Option<CloudGuest<'a>>,
        servers: Vec<Planned>,
        more: &str,
    ) -> Self {
        let fleet = Fleet::new();
        let contents = RefCell::default();
        let mut bed = Self { env, fleet, held, guest, servers, facts: Value::Null, contents, world };
        bed.facts = bed.look_at_facts();
        let mut plan = Fleet::beginning(&env.ceph);
        let more = more.replace("FOLDER", &bed.fleet.folder().display().to_string());
        let holder = match (held, &bed.guest) {
            (Held::Server, Some(guest)) => format!("server = \"{}\", ", guest.id),
            (Held::Gateway, Some(guest)) => format!("gateway = \"{}\", ", guest.id),
            _ => String::new(),
        };
        for Planned { name, volumes } in &bed.servers {
            let _ = write!(
                plan,
                "[[server]]\nname = \"{name}\"\ncutover = {{ openstack = {{ {holder}limit = \"90s\"{more} }} }}\n"
            );
            for (number, id) in volumes.iter().enumerate() {
                let (boot, source, idle) = (number == 0, source(id), idle(id));
                let _ = write!(
                    plan,
                    "[[server.volume]]\nname = \"{name}-{number}\"\nboot = {boot}\nsource = \"rbd:{source}\"\n\
                     target = \"rbd:{idle}\"\ncinder = {{ volume = \"{id}\", from_type = \"sata\", to_type = \"sas\" }}\n"
                );
            }
        }
        bed.fleet.write_plan(&plan);
        bed
    }

    fn look_at_facts(&self) -> Value {
        let planned = self.servers.iter().flat_map(|server| &server.volumes);
        let volumes: Vec<Value> = planned.map(|volume| facts_of_volume(self.env, volume)).collect();
        let serials = self.guest.as_ref().map(CloudGuest::serials);
        json!({"server": self.guest.as_ref().map(CloudGuest::facts), "volumes": volumes, "serials": serials})
    }

    /// The server, or the gateway.
    pub(crate) fn guest(&self) -> &CloudGuest<'a> {
        self.guest.as_ref().expect("somebody has the volumes")
    }

    /// Notes what is in the volumes that nobody writes to: it has to be in them ever after.
    #[track_caller]
    pub(crate) fn note_contents(&self, server: usize) {
        for id in &self.servers[server].volumes {
            self.contents.borrow_mut().insert(id.clone(), self.env.digest(&source(id)));
        }
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
        for id in volumes {
            let shown = env.volume(id);
            let (name, status) = (if on_target { "sas" } else { "sata" }, self.usual_status());
            assert_eq!(shown["volume_type"], name, "{shown:#}");
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
        assert_eq!(self.look_at_facts(), self.facts);
        if let Some(guest) = &self.guest {
            self.expect_guest_well(guest, volumes, on_target);
        }
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

    /// Whether a cutover that was begun, or is done, is noted with the first target.
    pub(crate) fn is_begun(&self, server: usize) -> bool {
        let first = &self.servers[server].volumes[0];
        let images = self.env.images("sas", first);
        let ours = images.iter().find(|name| **name == format!("poolshift-{first}")).or_else(|| images.first());
        let listed = ours.map(|name| self.env.rbd(&["image-meta", "list", &format!("sas/{name}")]));
        listed.is_some_and(|listed| listed.contains("poolshift.cutover") || listed.contains("for its cutover"))
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
                // It may have been too late for anything to be left of it.
                let run = self.run(server, "cutover", &["--yes", "--json"]);
                let was_over = run.code == Some(1) && run.stderr.contains("runs from its targets already");
                assert!(run.code == Some(0) || was_over, "{run:?}");
                self.expect_well(server, "target");
                "finished"
            }
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
