//! From what a cloud has to groups of volumes that are brought over together.

use std::collections::{BTreeMap, BTreeSet};

use super::super::cinder::{Volume, VolumeType};
use super::super::error::{CloudError, Fault, Result};
use super::super::nova::Server;
use super::{Obstacle, Rules, World};
use crate::plan::{CinderVolume, HelperTypes, Holder, Strategy};

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The groups, servers first.
    pub groups: Vec<Group>,
    /// How many of the volumes that are meant have their type already.
    pub already: usize,
}

/// Volumes that are brought over together.
#[derive(Clone, Debug)]
pub struct Group {
    /// Who has them.
    pub who: Who,
    /// What they are called together, for people.
    pub label: String,
    /// The volumes, the one to boot from first.
    pub moves: Vec<Move>,
    /// What keeps all of them.
    pub obstacles: Vec<Obstacle>,
    /// What keeps nobody, and should be known.
    pub remarks: Vec<String>,
}

/// Who has the volumes of a group.
#[derive(Clone, Debug)]
pub enum Who {
    /// A server that runs from them.
    Server(Box<Server>),
    /// A server that has them beside those of others.
    Gateway(Box<Server>),
    /// A server of a project that was not looked at, by its id.
    Elsewhere(String),
    /// Nobody.
    Nobody,
}

/// A volume that is to get another type.
#[derive(Clone, Debug)]
pub struct Move {
    /// The volume.
    pub volume: Volume,
    /// Whether a server boots, or will boot, from it.
    pub boot: bool,
    /// Under which name its server has it.
    pub device: Option<String>,
    /// What the plan says of it.
    pub cinder: CinderVolume,
    /// What keeps it.
    pub obstacles: Vec<Obstacle>,
    /// What does not keep it, and should be known.
    pub remarks: Vec<String>,
}

impl Group {
    /// Whether nothing keeps the group from being moved.
    pub fn is_ready(&self) -> bool {
        self.obstacles.is_empty() && self.moves.iter().all(|one| one.obstacles.is_empty())
    }

    /// Who has the volumes, for the plan.
    pub fn holder(&self) -> Holder {
        match &self.who {
            Who::Server(server) => Holder::Server(server.id.clone()),
            Who::Gateway(server) => Holder::Gateway { server: server.id.clone(), pause: None, resume: None },
            // It is never written: something keeps it.
            Who::Elsewhere(_) | Who::Nobody => Holder::Nobody,
        }
    }

    /// All its volumes together, in bytes.
    pub fn size(&self) -> u64 {
        self.moves.iter().fold(0, |sum, one| sum.saturating_add(super::rules::bytes(&one.volume)))
    }
}

impl Move {
    /// How large the volume is, in bytes, by Cinder.
    pub fn size(&self) -> u64 {
        super::rules::bytes(&self.volume)
    }
}

/// Finds the volumes that the rules mean, puts together what is brought over together, and notes what stands in the way.
///
/// # Errors
/// [`Fault::NotFound`] for a type or a gateway that is not there, [`Fault::Config`] for a gateway's name that several
/// servers have.
pub fn sort(world: &World, rules: &Rules, cloud: &str) -> Result<Found> {
    for wanted in [&rules.boot_type, &rules.data_type].into_iter().flatten() {
        if !world.types.iter().any(|found| found.name == *wanted) {
            let names: Vec<_> = world.types.iter().map(|found| found.name.as_str()).collect();
            let detail = format!("it has no volume type {wanted:?}");
            return Err(CloudError::new(Fault::NotFound, "make a plan", cloud, detail)
                .hint(format!("its types are: {}", names.join(", "))));
        }
    }
    let gateways = gateways(world, rules, cloud)?;
    let mut sorter = Sorter::new(world, rules);
    for server in &world.servers {
        if gateways.contains(server.id.as_str()) { sorter.gateway(server) } else { sorter.server(server) }
    }
    sorter.others();
    Ok(sorter.found)
}

/// The ids of the gateways.
fn gateways<'w>(world: &'w World, rules: &Rules, cloud: &str) -> Result<BTreeSet<&'w str>> {
    let mut found = BTreeSet::new();
    for wanted in &rules.gateways {
        let fits: Vec<_> = match world.servers.iter().find(|server| server.id == *wanted) {
            Some(server) => vec![server],
            None => world.servers.iter().filter(|server| server.name == *wanted).collect(),
        };
        let failed = |fault, detail: String| CloudError::new(fault, "find the gateway", cloud, detail);
        match fits[..] {
            [server] => found.insert(server.id.as_str()),
            [] => {
                return Err(failed(Fault::NotFound, format!("none of these projects has a server {wanted:?}"))
                    .hint("name its project with --project"));
            }
            _ => {
                let ids: Vec<_> = fits.iter().map(|server| server.id.as_str()).collect();
                return Err(failed(Fault::Config, format!("{} servers have the name {wanted:?}", ids.len()))
                    .hint(format!("give its id: {}", ids.join(", "))));
            }
        };
    }
    Ok(found)
}

/// A device's name without the folder, which not everybody writes.
fn short(device: &str) -> &str {
    device.trim_start_matches("/dev/")
}

fn device<'v>(volume: &'v Volume, server: &Server) -> Option<&'v str> {
    volume.attachments.iter().find(|one| one.server_id == server.id)?.device.as_deref().map(short)
}

/// The volume that a server boots from; `None` where that is none of these.
pub(super) fn boot_volume<'v>(server: &Server, volumes: &[&'v Volume]) -> Option<&'v Volume> {
    let root = server.root_device.as_deref().map(short).filter(|root| !root.is_empty());
    volumes.iter().copied().find(|volume| match (device(volume, server), root) {
        (Some(device), Some(root)) => device == root,
        // What libvirt gives the first disk of each kind.
        (Some(device), None) => volume.bootable && matches!(device, "vda" | "sda"),
        (None, _) => false,
    })
}

struct Sorter<'a> {
    world: &'a World,
    rules: &'a Rules,
    by_server: BTreeMap<&'a str, Vec<&'a Volume>>,
    servers: BTreeMap<&'a str, &'a Server>,
    volumes: BTreeSet<&'a str>,
    /// By volume, the servers that have it by Nova's word.
    by_nova: BTreeMap<&'a str, BTreeSet<&'a str>>,
    snapshots: BTreeMap<&'a str, Vec<String>>,
    types: BTreeMap<&'a str, &'a VolumeType>,
    found: Found,
}

impl<'a> Sorter<'a> {
    fn new(world: &'a World, rules: &'a Rules) -> Self {
        let mut by_server: BTreeMap<&str, Vec<&Volume>> = BTreeMap::new();
        for volume in &world.volumes {
            for attachment in &volume.attachments {
                by_server.entry(&attachment.server_id).or_default().push(volume);
            }
        }
        let mut by_nova: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for server in &world.servers {
            for volume in &server.volumes {
                by_nova.entry(&volume.id).or_default().insert(&server.id);
            }
        }
        let mut snapshots: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for snapshot in &world.snapshots {
            let name = if snapshot.name.is_empty() { &snapshot.id } else { &snapshot.name };
            snapshots.entry(&snapshot.volume_id).or_default().push(name.clone());
        }
        Self {
            world,
            rules,
            by_server,
            servers: world.servers.iter().map(|server| (server.id.as_str(), server)).collect(),
            volumes: world.volumes.iter().map(|volume| volume.id.as_str()).collect(),
            by_nova,
            snapshots,
            types: world.types.iter().map(|found| (found.name.as_str(), found)).collect(),
            found: Found::default(),
        }
    }

    /// A volume, if the rules mean it, with what stands in its way.
    fn wanted(&mut self, volume: &Volume, is_boot: bool, server: Option<&Server>) -> Option<Move> {
        let target = self.rules.target(is_boot)?;
        if !self.rules.filter.fits(volume, server) {
            return None;
        }
        if volume.volume_type.as_deref() == Some(target) {
            self.found.already += 1;
            return None;
        }
        let (by_way_of, mut obstacles) = self.way(volume, target);
        obstacles.splice(0..0, self.obstacles(volume));
        let from_type = volume.volume_type.clone().unwrap_or_default();
        let cinder = CinderVolume { volume: volume.id.clone(), from_type, to_type: target.to_owned(), by_way_of };
        let device = server.and_then(|server| device(volume, server)).map(str::to_owned);
        Some(Move { volume: volume.clone(), boot: is_boot, device, cinder, obstacles, remarks: Vec::new() })
    }

    /// What keeps a volume, whatever its new type.
    fn obstacles(&self, volume: &Volume) -> Vec<Obstacle> {
        let mut obstacles = Vec::new();
        // They stay with the volume where that stays behind.
        let names = self.snapshots.get(volume.id.as_str()).filter(|_| self.rules.strategy != Strategy::Recreate);
        if let Some(names) = names {
            obstacles.push(Obstacle::Snapshots(names.clone()));
        }
        if volume.encrypted {
            obstacles.push(Obstacle::Encrypted);
        }
        if volume.multiattach || volume.attachments.len() > 1 {
            obstacles.push(Obstacle::Multiattach);
        }
        let groups = [&volume.group_id, &volume.consistencygroup_id].into_iter().flatten();
        obstacles.extend(groups.filter(|id| !id.is_empty()).map(|id| Obstacle::Grouped(id.clone())));
        // Cinder itself lets these pass (cinder/volume/api.py, `migrate_volume`).
        let replication = volume.replication_status.as_deref().unwrap_or_default();
        if !matches!(replication, "" | "disabled" | "not-capable") {
            obstacles.push(Obstacle::Replicated(replication.to_owned()));
        }
        if !matches!(volume.status.as_str(), "available" | "in-use") {
            obstacles.push(Obstacle::Status(volume.status.clone()));
        }
        let migration = volume.migration_status.as_deref().unwrap_or_default();
        if !matches!(migration, "" | "none" | "success" | "error" | "deleting") {
            obstacles.push(Obstacle::Migrating(migration.to_owned()));
        }
        let by_nova = self.by_nova.get(volume.id.as_str()).cloned().unwrap_or_default();
        let by_cinder: BTreeSet<_> = volume.attachments.iter().map(|one| one.server_id.as_str()).collect();
        for server in by_cinder.symmetric_difference(&by_nova) {
            let says_cinder = by_cinder.contains(server);
            if self.servers.contains_key(server) {
                obstacles.push(Obstacle::Disagreement { server: (*server).to_owned(), says_cinder });
            }
        }
        obstacles
    }

    /// Which types a volume passes on its way to the new one, and what keeps it from that.
    fn way(&self, volume: &Volume, target: &str) -> (Option<HelperTypes>, Vec<Obstacle>) {
        let Some(from) = volume.volume_type.as_deref() else { return (None, vec![Obstacle::NoType]) };
        let Some(from) = self.types.get(from) else {
            return (None, vec![Obstacle::UnknownType(from.to_owned())]);
        };
        // That the target's type is there was looked at before anything else.
        let Some(to) = self.types.get(target) else { return (None, vec![Obstacle::UnknownType(target.to_owned())]) };
        let Some(to_backend) = backend_of(to) else { return (None, vec![Obstacle::NoBackend(to.name.clone())]) };
        if self.world.encrypting.contains(&to.id) {
            return (None, vec![Obstacle::EncryptingType(to.name.clone())]);
        }
        let special = |spec: &&String| {
            let kinds = ["multiattach", "replication_enabled", "consistent_group_snapshot_enabled"];
            kinds.contains(&spec.as_str()) && to.extra_specs[*spec].to_ascii_lowercase().contains("true")
        };
        if let Some(spec) = to.extra_specs.keys().find(special) {
            return (None, vec![Obstacle::SpecialType { name: to.name.clone(), spec: spec.clone() }]);
        }
        // What is made again has its new type from the beginning.
        if from.is_plain() && to.is_plain() || self.rules.strategy == Strategy::Recreate {
            return (None, Vec::new());
        }
        let from_backend = backend_of(from).or_else(|| backend_of_host(volume.host.as_deref()?));
        let mut obstacles = Vec::new();
        let mut helper = |one: &VolumeType, backend: Option<&str>| {
            let found = backend.and_then(|backend| self.plain(one, backend));
            if found.is_none() {
                let backend = backend.unwrap_or("NAME").to_owned();
                obstacles.push(Obstacle::NoWayAround { name: one.name.clone(), asks: asks(one), backend });
            }
            found.map(str::to_owned)
        };
        let helpers = (helper(from, from_backend), helper(to, Some(to_backend)));
        match helpers {
            (Some(from), Some(to)) => (Some(HelperTypes { from, to }), obstacles),
            _ => (None, obstacles),
        }
    }

    /// A type that names this backend and nothing else: that one itself, or the first by its name.
    fn plain(&self, one: &'a VolumeType, backend: &str) -> Option<&'a str> {
        let fits = |found: &&VolumeType| {
            found.is_plain() && backend_of(found) == Some(backend) && !self.world.encrypting.contains(&found.id)
        };
        let all = self.types.values().copied();
        std::iter::once(one).chain(all).find(fits).map(|found| found.name.as_str())
    }

    fn server(&mut self, server: &Server) {
        let volumes = self.by_server.get(server.id.as_str()).cloned().unwrap_or_default();
        let root = boot_volume(server, &volumes).map(|root| root.id.as_str());
        let mut moves: Vec<_> = volumes
            .iter()
            .filter_map(|volume| self.wanted(volume, root == Some(volume.id.as_str()), Some(server)))
            .collect();
        if moves.is_empty() {
            return;
        }
        moves.sort_by(|one, other| (!one.boot, &one.device).cmp(&(!other.boot, &other.device)));
        let mut obstacles = Vec::new();
        let elsewhere = server.volumes.iter().find(|volume| !self.volumes.contains(volume.id.as_str()));
        match (elsewhere, root) {
            (Some(volume), _) => obstacles.push(Obstacle::VolumeElsewhere(volume.id.clone())),
            (None, None) => obstacles.push(Obstacle::LocalBoot),
            (None, Some(_)) if server.boots_from_image() => obstacles.push(Obstacle::LocalBoot),
            (None, Some(_)) => {}
        }
        if server.flavor.ephemeral > 0 {
            obstacles.push(Obstacle::Ephemeral(server.flavor.ephemeral));
        }
        let remarks = remarks(server);
        let (label, who) = (server.name.clone(), Who::Server(Box::new(server.clone())));
        self.found.groups.push(Group { who, label, moves, obstacles, remarks });
    }

    fn gateway(&mut self, server: &Server) {
        let volumes = self.by_server.get(server.id.as_str()).cloned().unwrap_or_default();
        let root = boot_volume(server, &volumes).map(|root| root.id.as_str());
        // In the order of the devices, by the value of the key that says whose they are.
        let mut groups: Vec<(Option<String>, Vec<Move>)> = Vec::new();
        let data = volumes.into_iter().filter(|volume| root != Some(volume.id.as_str()));
        let mut moves: Vec<_> = data.filter_map(|volume| self.wanted(volume, volume.bootable, Some(server))).collect();
        moves.sort_by(|one, other| one.device.cmp(&other.device));
        for one in moves {
            let key = self.rules.group_by.as_ref().and_then(|key| one.volume.metadata.get(key)).cloned();
            match groups.iter_mut().find(|(other, _)| key.is_some() && *other == key) {
                Some((_, moves)) => moves.push(one),
                None => groups.push((key, vec![one])),
            }
        }
        for (key, mut moves) in groups {
            // Several that could be booted from: which one it will be is not known here.
            if moves.iter().filter(|one| one.boot).count() > 1 {
                moves.iter_mut().for_each(|one| one.boot = false);
            }
            moves.sort_by_key(|one| !one.boot);
            let label = key.unwrap_or_else(|| named(&moves[0].volume));
            let who = Who::Gateway(Box::new(server.clone()));
            self.found.groups.push(Group { who, label, moves, obstacles: Vec::new(), remarks: remarks(server) });
        }
    }

    /// Volumes that nobody has, or somebody who was not looked at.
    fn others(&mut self) {
        for volume in &self.world.volumes {
            let (who, obstacle) = match volume.attachments.first() {
                None => (Who::Nobody, (!self.rules.detached).then_some(Obstacle::Detached)),
                Some(first) if volume.attachments.iter().all(|one| !self.servers.contains_key(&*one.server_id)) => {
                    let id = first.server_id.clone();
                    (Who::Elsewhere(id.clone()), Some(Obstacle::ServerElsewhere(id)))
                }
                Some(_) => continue,
            };
            let Some(mut one) = self.wanted(volume, volume.bootable, None) else { continue };
            one.obstacles.splice(0..0, obstacle);
            let label = named(volume);
            self.found.groups.push(Group { who, label, moves: vec![one], obstacles: Vec::new(), remarks: Vec::new() });
        }
    }
}

fn named(volume: &Volume) -> String {
    if volume.name.is_empty() { volume.id.clone() } else { volume.name.clone() }
}

/// The backend that a type asks for.
fn backend_of(found: &VolumeType) -> Option<&str> {
    found.extra_specs.get("volume_backend_name").map(String::as_str).filter(|name| !name.is_empty())
}

/// The backend's name in `host@backend#pool`: RBD's driver, which has one pool, gives it as the pool.
pub(super) fn backend_of_host(host: &str) -> Option<&str> {
    let (_, behind) = host.split_once('@')?;
    let (section, pool) = behind.split_once('#').unwrap_or((behind, ""));
    Some(if pool.is_empty() { section } else { pool }).filter(|name| !name.is_empty())
}

/// What a type asks of its backend beside its name.
fn asks(found: &VolumeType) -> String {
    let specs = found.extra_specs.keys().filter(|key| *key != "volume_backend_name").map(String::as_str);
    let specs: Vec<_> = specs.collect();
    match (found.qos_specs_id.is_some(), &specs[..]) {
        (true, []) => "a QoS".into(),
        (false, []) => "no backend of its own".into(),
        (true, specs) => format!("a QoS, and the extra specs {}", specs.join(", ")),
        (false, specs) => format!("the extra specs {}", specs.join(", ")),
    }
}

fn remarks(server: &Server) -> Vec<String> {
    let mut remarks = Vec::new();
    if !matches!(server.status.as_str(), "ACTIVE" | "SHUTOFF") {
        remarks.push(format!("the server is {}: it has to be ACTIVE or SHUTOFF to be brought over", server.status));
    }
    if let Some(task) = &server.task {
        remarks.push(format!("something is under way with the server ({task})"));
    }
    if server.locked {
        remarks.push("the server is locked: only an administrator can bring it over".into());
    }
    remarks
}
