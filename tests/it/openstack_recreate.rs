//! Servers of a real cloud that are made again, with other ids, and write all the time: over, back with what they wrote,
//! over again, and rid of their old volumes; killed at every step; and what is refused.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Write as _;

use reqwest::Method;
use serde_json::{Value, json};

use crate::cutover_bed::{Fleet, report, run_killed_at};
use crate::openstack_env::{KeepingApi, OpenStackEnv, Service, openstack};
use crate::openstack_guest::CloudGuest;
use crate::openstack_world::{World, unique};
use crate::support::Run;

/// A server with a root and a data disk that writes all the time, and the plan that makes it again.
struct Again<'a> {
    env: &'a OpenStackEnv,
    fleet: Fleet,
    guest: RefCell<CloudGuest<'a>>,
    /// The server's id in the plan.
    planned: String,
    /// The volumes' ids in the plan.
    volumes: Vec<String>,
    facts: Value,
    world: World<'a>,
}

impl<'a> Again<'a> {
    #[track_caller]
    fn new(env: &'a OpenStackEnv, tag: &str) -> Self {
        let world = World::new(env);
        let name = unique(tag);
        let volumes = world.guest_volumes("sata", &name);
        let more = json!({
            "metadata": {"m": "1"}, "tags": ["one", "two"], "key_name": world.key_pair(), "description": "of a test",
            "user_data": "IyEvYmluL3RydWUK", "availability_zone": "nova", "networks": world.networks(),
        });
        let guest = world.boot(&name, &volumes, &more);
        world.adopt_ports(&guest.id);
        let (fleet, planned) = (Fleet::new(), guest.id.clone());
        let mut plan = Fleet::beginning(&env.ceph);
        let _ = write!(
            plan,
            "[[server]]\nname = \"web\"\ncutover = {{ openstack = {{ server = \"{planned}\", strategy = \"recreate\", limit \
             = \"180s\" }} }}\n"
        );
        for (number, id) in volumes.iter().enumerate() {
            let boot = number == 0;
            let _ = write!(
                plan,
                "[[server.volume]]\nname = \"web-{number}\"\nboot = {boot}\nsource = \"rbd:sata/volume-{id}\"\ntarget = \
                 \"rbd:sas/poolshift-{id}\"\ncinder = {{ volume = \"{id}\", from_type = \"sata\", to_type = \"sas\" }}\n"
            );
        }
        fleet.write_plan(&plan);
        let mut it = Self { env, fleet, guest: RefCell::new(guest), planned, volumes, facts: Value::Null, world };
        it.facts = it.look_at_facts();
        it
    }

    /// The server as it is: with the plan's id, or marked with it.
    fn server(&self) -> Option<Value> {
        let servers = self.env.get(Service::Nova, "servers/detail")["servers"].take();
        let ours = |server: &&Value| {
            server["id"] == self.planned.as_str() || server["metadata"]["poolshift-server"] == self.planned.as_str()
        };
        let all: Vec<Value> = servers.as_array().into_iter().flatten().filter(ours).cloned().collect();
        assert!(all.len() <= 1, "there are two of it: {all:#?}");
        all.into_iter().next()
    }

    /// The volumes of Cinder's that the targets are, by their marks.
    fn managed(&self) -> Vec<Value> {
        let volumes = self.env.get(Service::Cinder, "volumes/detail")["volumes"].take();
        let mark = |volume: &Value| volume["metadata"]["poolshift-volume"].as_str().map(str::to_owned);
        let all: Vec<Value> = volumes.as_array().into_iter().flatten().cloned().collect();
        let of =
            |id: &String| all.iter().filter(|volume| mark(volume).as_ref() == Some(id)).cloned().collect::<Vec<_>>();
        self.volumes.iter().flat_map(of).collect()
    }

    /// Takes on whatever was made meanwhile, and listens to the server that there is.
    fn follow(&self) {
        let managed: Vec<String> = self.managed().iter().map(|volume| text(&volume["id"])).collect();
        self.world.adopt(&[], &managed);
        let Some(server) = self.server() else { return };
        let id = text(&server["id"]);
        self.world.adopt(std::slice::from_ref(&id), &[]);
        if id != self.guest.borrow().id && ["ACTIVE", "BUILD"].contains(&server["status"].as_str().unwrap_or_default())
        {
            let next = self.world.follow(&self.guest.borrow(), &id, &self.volumes);
            self.guest.replace(next);
        }
    }

    fn run(&self, command: &str, words: &[&str]) -> Run {
        let run = self.fleet.run("web", command, words);
        println!("{command} {words:?}: {:?}\n{}{}", run.code, run.stderr, run.stdout);
        self.follow();
        run
    }

    #[track_caller]
    fn switch(&self, command: &str, words: &[&str], side: &str) {
        let words: Vec<&str> = words.iter().copied().chain(["--yes", "--json"]).collect();
        let report = report(&self.run(command, &words).expect_code(0));
        assert_eq!(report["runs_from"], side, "{report:#}");
        self.expect_well(side);
    }

    /// What is as it was, on whatever side.
    #[track_caller]
    fn look_at_facts(&self) -> Value {
        let server = self.server().expect("it is there");
        let own = |metadata: &Value| {
            let mut metadata = metadata.clone();
            let keys = ["poolshift-server", "poolshift-volume", "attached_mode", "readonly"];
            metadata.as_object_mut().expect("an object").retain(|key, _| !keys.contains(&key.as_str()));
            metadata
        };
        let keys = [
            "name",
            "tenant_id",
            "user_id",
            "key_name",
            "tags",
            "flavor",
            "description",
            "config_drive",
            "OS-DCF:diskConfig",
            "OS-EXT-AZ:availability_zone",
            "OS-EXT-SRV-ATTR:user_data",
            "OS-EXT-SRV-ATTR:hostname",
            "OS-EXT-SRV-ATTR:root_device_name",
        ];
        let mut facts: Value = keys.iter().map(|key| ((*key).to_owned(), server[*key].clone())).collect();
        facts["metadata"] = own(&server["metadata"]);
        let path = format!("servers/{}/os-volume_attachments", text(&server["id"]));
        let mut attached = self.env.get(Service::Nova, &path)["volumeAttachments"].take();
        let attached = attached.as_array_mut().expect("a list");
        attached.sort_by_key(|found| found["device"].to_string());
        facts["ports"] = self.guest.borrow().ports();
        facts["disks"] = attached
            .iter()
            .map(|found| {
                let volume = self.env.volume(&text(&found["volumeId"]));
                let keys = ["name", "description", "size", "volume_image_metadata", "bootable"];
                let mut disk: Value = keys.iter().map(|key| ((*key).to_owned(), volume[*key].clone())).collect();
                disk["metadata"] = own(&volume["metadata"]);
                for key in ["device", "delete_on_termination", "tag"] {
                    disk[key] = found[key].clone();
                }
                disk
            })
            .collect();
        facts
    }

    /// It runs from one side, and nothing of it is anywhere else; all that is to stay is as it was; nothing is lost.
    #[track_caller]
    fn expect_well(&self, side: &str) {
        self.follow();
        let env = self.env;
        let server = self.server().expect("it is there");
        assert_eq!(
            (&server["status"], &server["OS-EXT-STS:task_state"]),
            (&json!("ACTIVE"), &Value::Null),
            "{server:#}"
        );
        let managed = self.managed();
        let (used, expected): (Vec<String>, Vec<String>) = if side == "target" {
            assert_ne!(text(&server["id"]), self.planned);
            for volume in &managed {
                assert_eq!(
                    (&volume["status"], &volume["volume_type"]),
                    (&json!("in-use"), &json!("sas")),
                    "{volume:#}"
                );
                assert_eq!(volume["os-vol-host-attr:host"], "vm@sas#sas");
            }
            for id in &self.volumes {
                let old = env.volume(id);
                assert_eq!(
                    (&old["status"], &old["attachments"]),
                    (&json!("attaching"), &json!([])),
                    "it is held: {old:#}"
                );
            }
            let ids: Vec<String> = managed.iter().map(|volume| text(&volume["id"])).collect();
            (
                ids.iter().map(|id| format!("sas/volume-{id}")).collect(),
                ids.iter().map(|id| format!("volume-{id}")).collect(),
            )
        } else {
            assert_eq!(managed, Vec::<Value>::new());
            let used = self.volumes.iter().map(|id| format!("sata/volume-{id}")).collect();
            (used, self.volumes.iter().map(|id| format!("poolshift-{id}")).collect())
        };
        assert_eq!(managed.len(), if side == "target" { self.volumes.len() } else { 0 });
        let guest = self.guest.borrow();
        assert_eq!(text(&server["id"]), guest.id);
        assert_eq!(guest.images(), used);
        for id in &self.volumes {
            assert_eq!(env.images("sata", id), [format!("volume-{id}")], "the old image keeps its name");
        }
        let there: BTreeSet<String> = expected.iter().flat_map(|name| env.images("sas", name)).collect();
        assert_eq!(there, expected.iter().cloned().collect());
        assert_eq!(self.look_at_facts(), self.facts);
        guest.wait_for_ack(guest.console().last_ack() + 2);
        assert_eq!(guest.oracle(), Ok(()));
    }

    /// Runs a command that is killed at a failpoint, which it has to come to.
    #[track_caller]
    fn killed_at(&self, command: &str, words: &[&str], place: &str) {
        let words: Vec<&str> = words.iter().copied().chain(["--yes"]).collect();
        run_killed_at(self.fleet.command("web", command, &words), place);
        println!("{command} was killed at {place}");
    }

    /// Whatever was cut is ended: where it was, or where it was to go.
    #[track_caller]
    fn end(&self, undo: bool) -> &'static str {
        self.follow();
        if undo {
            self.run("rollback", &["--with-changes", "--yes", "--json"]).expect_code(0);
            self.expect_well("source");
            return "source";
        }
        let run = self.run("cutover", &["--yes", "--json"]);
        // It may have been over already (1).
        assert!(matches!(run.code, Some(0 | 1)), "{run:?}");
        self.expect_well("target");
        "target"
    }
}

impl Drop for Again<'_> {
    fn drop(&mut self) {
        // Of a test that failed, too.
        let managed: Vec<String> = self.managed().iter().map(|volume| text(&volume["id"])).collect();
        let servers: Vec<String> = self.server().iter().map(|server| text(&server["id"])).collect();
        self.world.adopt(&servers, &managed);
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("a text: {value}")).to_owned()
}

#[test]
#[ignore = "needs OpenStack"]
fn a_server_of_a_cloud_is_made_again_and_back_and_is_finalized() {
    let env = openstack();
    let mut bed = Again::new(&env, "again");
    bed.guest.borrow().wait_for_ack(5);
    bed.fleet.replicate(1);
    bed.switch("cutover", &[], "target");
    bed.switch("rollback", &["--with-changes"], "source");
    // It stays with the old volume, which Cinder would not delete with it.
    let snapshot = bed.world.snapshot(&bed.volumes[0]);
    bed.switch("cutover", &[], "target");
    assert_eq!(bed.guest.borrow().console().boot_ids().len(), 4);
    let run = bed.run("finalize", &["--yes"]);
    assert!(run.code != Some(0) && format!("{run:?}").contains(&snapshot), "{run:?}");
    bed.world.remove_snapshot(&snapshot);
    bed.run("finalize", &["--yes"]).expect_code(0);
    for id in &bed.volumes {
        assert_eq!(env.images("sata", id), Vec::<String>::new());
        assert!(!env.rbd(&["trash", "ls", "sata"]).contains(id.as_str()), "it was put into the trash");
        let path = format!("volumes?all_tenants=1&id={id}");
        assert!(!env.get(Service::Cinder, &path).to_string().contains(id.as_str()), "Cinder has it no more");
    }
    for volume in bed.managed() {
        let image = format!("sas/volume-{}", text(&volume["id"]));
        assert_eq!(env.rbd(&["snap", "ls", "--all", &image]).trim(), "", "Cinder would not delete it for good");
        let listed = env.rbd(&["image-meta", "list", &image]);
        assert_eq!(listed.lines().filter(|line| line.contains("poolshift")).count(), 0, "{listed}");
    }
    let guest = bed.guest.borrow();
    guest.wait_for_ack(guest.console().last_ack() + 3);
    assert_eq!(guest.oracle(), Ok(()));
    assert_eq!(bed.look_at_facts(), bed.facts);
}

#[test]
#[ignore = "needs OpenStack"]
fn a_server_that_is_made_again_by_a_process_that_is_killed_is_brought_to_an_end() {
    let env = openstack();
    let mut bed = Again::new(&env, "kill");
    bed.fleet.replicate(1);
    // There is no server: the old one is gone, and the new one is not there yet.
    bed.killed_at("cutover", &[], "openstack.delete-server");
    bed.end(true);
    // The new one was asked for, and nobody noted its id.
    bed.killed_at("cutover", &[], "openstack.create-server");
    bed.end(false);
}

/// The failpoints of the way over.
const PLACES: &[&str] = &[
    "cutover.syncing",
    "cutover.converged",
    "cutover.quiescing",
    "openstack.stop-server",
    "cutover.final-delta",
    "cutover.verifying",
    "cutover.swapping",
    "recreate.manage",
    "openstack.manage-image",
    "openstack.write-the",
    "openstack.say-whether",
    "openstack.give-port",
    "openstack.delete-server",
    "openstack.reserve-volume",
    "cutover.resuming",
    "openstack.create-server",
    "cutover.committed",
];

/// Those of the way back.
const PLACES_BACK: &[&str] = &[
    "cutover.quiescing",
    "openstack.stop-server",
    "cutover.final-delta",
    "cutover.swapping",
    "recreate.unmanage",
    "openstack.unmanage-volume",
    "recreate.rename",
    "openstack.delete-server",
    "cutover.resuming",
    "openstack.create-server",
    "cutover.committed",
];

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_server_that_is_made_again_is_killed_at_every_place() {
    let env = openstack();
    let mut bed = Again::new(&env, "kills");
    bed.fleet.replicate(1);
    for place in PLACES {
        bed.killed_at("cutover", &[], place);
        bed.end(true);
        bed.killed_at("cutover", &[], place);
        bed.end(false);
        bed.switch("rollback", &["--with-changes"], "source");
    }
    for place in PLACES_BACK {
        bed.switch("cutover", &[], "target");
        bed.killed_at("rollback", &["--with-changes"], place);
        bed.end(true);
    }
    // Whatever of the old volumes is gone, the rest goes.
    bed.switch("cutover", &[], "target");
    bed.killed_at("finalize", &[], "openstack.delete-volume");
    bed.run("finalize", &["--yes"]).expect_code(0);
    for id in &bed.volumes {
        assert_eq!(bed.env.images("sata", id), Vec::<String>::new());
    }
}

/// Its ports are held by a process that is killed, and its owner starts it: Nova gives it no cards then. It gets its ports,
/// and is told how to get the cards.
#[track_caller]
fn started_before_it_is_deleted(bed: &Again<'_>) {
    bed.killed_at("cutover", &[], "openstack.give-port");
    assert_eq!(bed.env.ports(&bed.planned).len(), 1, "one of its two ports is held");
    // What it still has are its first ones: those that come back are Nova's last.
    for (still, first) in bed.env.ports(&bed.planned).iter().zip(bed.facts["ports"].as_array().expect("a list")) {
        assert_eq!(still["id"], first["id"]);
    }
    bed.env.server_action(&bed.planned, &json!({"os-start": null}));
    bed.env.wait_for_server(&bed.planned, "ACTIVE");
    let run = bed.run("rollback", &["--with-changes", "--yes"]).expect_code(0);
    assert!(run.stderr.contains(&format!("reboot --hard {}", bed.planned)), "{run:?}");
    assert_eq!(bed.env.ports(&bed.planned).len(), 2);
    bed.env.server_action(&bed.planned, &json!({"reboot": {"type": "HARD"}}));
    bed.env.wait_for_server(&bed.planned, "ACTIVE");
    bed.expect_well("source");
}

/// What a test needs of a server that its owner deletes after it was made again: Nova keeps that for a while.
struct Deleted<'b, 'e> {
    bed: &'b Again<'e>,
    keeping: KeepingApi<'e>,
}

const BACK: [&str; 2] = ["--with-changes", "--yes"];

impl Deleted<'_, '_> {
    /// Deletes what there is as its owner does, when it runs.
    #[track_caller]
    fn delete(&self) -> String {
        self.bed.follow();
        let id = text(&self.bed.server().expect("it is there")["id"]);
        self.bed.env.wait_for_server(&id, "ACTIVE");
        self.keeping.delete(&id);
        id
    }

    /// A command is refused and names the deleted server, which is then brought back; gives back its volumes.
    #[track_caller]
    fn is_refused_until_it_is_back(&self, command: &str, words: &[&str], id: &str) -> Value {
        let env = self.bed.env;
        let run = self.bed.run(command, words);
        assert!(run.code != Some(0) && run.stderr.contains(id), "{run:?}");
        let shown = env.server(id);
        assert_eq!(shown["status"], "SOFT_DELETED");
        env.server_action(id, &json!({"restore": null}));
        env.wait_for_server(id, "ACTIVE");
        shown["os-extended-volumes:volumes_attached"].clone()
    }
}

/// Its owner deletes what it was made again as, and Nova keeps that for a while: it is found all the same.
#[test]
#[ignore = "needs OpenStack"]
fn a_server_that_its_owner_deletes_after_it_was_made_again_is_found() {
    let env = openstack();
    let mut bed = Again::new(&env, "deleted");
    bed.fleet.replicate(1);
    let deleted = Deleted { bed: &bed, keeping: KeepingApi::start(&env) };
    bed.run("cutover", &["--yes", "--json"]).expect_code(0);
    // It does not run, as it has to.
    let id = deleted.delete();
    deleted.is_refused_until_it_is_back("rollback", &BACK, &id);
    bed.run("rollback", &BACK).expect_code(0);
    // Nothing ends with it yet: it goes for good, and its volumes and ports stay.
    bed.killed_at("cutover", &[], "openstack.create-server");
    let id = deleted.delete();
    bed.run("rollback", &BACK).expect_code(0);
    assert_eq!(bed.guest.borrow().ports(), bed.facts["ports"]);
    let (status, _) = env.ask(Service::Nova, &Method::GET, &format!("servers/{id}"), None).expect("Nova answers");
    assert_eq!(status, 404);
    bed.expect_well("source");
}

/// The same, when it was not told yet that a volume ends with it: it is not told so before it is back.
#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_server_that_its_owner_deletes_before_it_is_all_that_it_was_is_found() {
    let env = openstack();
    let mut bed = Again::new(&env, "early");
    bed.fleet.replicate(1);
    let deleted = Deleted { bed: &bed, keeping: KeepingApi::start(&env) };
    bed.killed_at("cutover", &[], "cutover.committed");
    let id = deleted.delete();
    let volumes = deleted.is_refused_until_it_is_back("cutover", &["--yes"], &id);
    let ends = |all: &Value| all.as_array().expect("a list").iter().any(|one| one["delete_on_termination"] == true);
    assert!(!ends(&volumes), "{volumes}");
    bed.run("cutover", &["--yes"]);
    assert!(ends(&env.server(&id)["os-extended-volumes:volumes_attached"]));
    bed.run("rollback", &BACK).expect_code(0);
}

#[test]
#[ignore = "needs OpenStack"]
fn a_server_that_can_t_be_made_again_is_refused_and_left_alone() {
    let env = openstack();
    let mut bed = Again::new(&env, "refuse");
    bed.fleet.replicate(1);
    let refused = |because: &str| {
        let run = bed.run("cutover", &["--yes"]).expect_code(14);
        assert!(run.stdout.contains(because) || run.stderr.contains(because), "{because}: {run:?}");
        assert_eq!(text(&bed.server().expect("it is there")["id"]), bed.planned);
    };
    env.server_action(&bed.planned, &json!({"lock": null}));
    refused("server unlock");
    env.server_action(&bed.planned, &json!({"unlock": null}));

    // Cinder can't take what is not there: the server goes on as it was, with its id.
    let plan = std::fs::read_to_string(bed.fleet.plan()).expect("there is a plan");
    let other = bed.world.volume_type("sata");
    bed.fleet.write_plan(&plan.replace("to_type = \"sas\"", &format!("to_type = {other:?}")));
    refused("has the pool sata, and the target is in sas");
    bed.fleet.write_plan(&plan);

    started_before_it_is_deleted(&bed);

    // One volume more stays with it, as it is.
    let more = bed.world.volumes(&[unique("more")]);
    bed.world.attach(&bed.planned, &more[0]);
    let before = env.volume(&more[0]);
    bed.run("cutover", &["--yes", "--json"]).expect_code(0);
    let server = bed.server().expect("it is there");
    assert!(server["os-extended-volumes:volumes_attached"].to_string().contains(&more[0]), "{server:#}");
    assert_eq!(env.volume(&more[0])["metadata"]["owner"], before["metadata"]["owner"]);
    bed.run("rollback", &BACK).expect_code(0);
    let guest = bed.guest.borrow();
    guest.wait_for_ack(guest.console().last_ack() + 2);
    assert_eq!(guest.oracle(), Ok(()));
}
