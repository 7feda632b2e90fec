//! Volumes and servers, and what happens to them at which time.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::PROJECT;
use crate::image::Layout;
use crate::image::memory::{MemoryImage, MemoryPools};

/// The size of every image, in bytes, and how it is laid out: small, so that a delta is a part of it.
const SIZE: u64 = 64 << 10;
const LAYOUT: Layout = Layout { object_size: 4096, stripe_unit: 4096, stripe_count: 1 };

/// A volume of Cinder's.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) id: String,
    pub(super) volume_type: String,
    pub(super) pool: String,
    pub(super) status: String,
    pub(super) migration: Option<String>,
    pub(super) records: Vec<Record>,
    pub(super) snapshots: Vec<String>,
    /// All that its servers were told is written.
    pub(super) acknowledged: Vec<u8>,
}

impl Volume {
    /// The name of its image.
    pub(super) fn image(&self) -> String {
        format!("volume-{}", self.id)
    }
}

/// An attachment, as Cinder keeps it.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) id: String,
    pub(super) server: String,
    pub(super) device: String,
    /// `reserved`, `attaching` or `attached`.
    pub(super) status: &'static str,
    /// The image that the server was told of: `sata/volume-3f…`.
    pub(super) image: Option<String>,
}

/// A volume that a server has, as Nova keeps it.
#[derive(Clone, Debug)]
pub(super) struct Mapping {
    pub(super) volume: String,
    pub(super) device: String,
    pub(super) delete_on_termination: bool,
}

/// A server.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) id: String,
    pub(super) status: &'static str,
    pub(super) task: Option<&'static str>,
    pub(super) power: u8,
    pub(super) host: Option<&'static str>,
    pub(super) locked: Option<Option<String>>,
    pub(super) mappings: Vec<Mapping>,
    pub(super) fault: Option<String>,
    /// The images that its guest has open, by volume.
    pub(super) open: Vec<(String, MemoryImage)>,
}

type Effect = Box<dyn FnOnce(&mut State) + Send>;

/// Something that happens later.
struct Event {
    at: Instant,
    number: u64,
    effect: Effect,
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Event").field("at", &self.at).finish_non_exhaustive()
    }
}

/// All of it.
#[derive(Debug)]
pub(super) struct State {
    pub(super) pools: MemoryPools,
    pub(super) volumes: Vec<Volume>,
    pub(super) servers: Vec<Server>,
    pub(super) violations: Vec<String>,
    /// For how long Nova names a volume after Cinder has released it, if it lags; and Cinder reserves it.
    pub(super) lag: Option<Duration>,
    /// How many servers are still to be shut down and not taken from their host when they are shelved.
    pub(super) shelves_to_fail: usize,
    pub(super) tokens: Vec<String>,
    pub(super) tokens_made: u64,
    /// Notified when something more is to happen.
    pub(super) more: Arc<Notify>,
    agenda: Vec<Event>,
    numbers: u64,
    pub(super) counter: u8,
}

impl State {
    pub(super) fn new(pools: MemoryPools) -> Self {
        Self {
            pools,
            volumes: Vec::new(),
            servers: Vec::new(),
            violations: Vec::new(),
            lag: None,
            shelves_to_fail: 0,
            tokens: Vec::new(),
            tokens_made: 0,
            more: Arc::default(),
            agenda: Vec::new(),
            numbers: 0,
            counter: 0,
        }
    }

    /// A new id, as UUIDs are written.
    pub(super) fn new_id(&mut self, kind: u16) -> String {
        self.numbers += 1;
        format!("{:08x}-{kind:04x}-4000-8000-{:012x}", self.numbers, self.numbers)
    }

    pub(super) fn volume(&self, id: &str) -> Option<&Volume> {
        self.volumes.iter().find(|volume| volume.id == id)
    }

    pub(super) fn volume_mut(&mut self, id: &str) -> Option<&mut Volume> {
        self.volumes.iter_mut().find(|volume| volume.id == id)
    }

    pub(super) fn server(&self, id: &str) -> Option<&Server> {
        self.servers.iter().find(|server| server.id == id)
    }

    pub(super) fn server_mut(&mut self, id: &str) -> Option<&mut Server> {
        self.servers.iter_mut().find(|server| server.id == id)
    }

    /// Has something happen after so many milliseconds.
    pub(super) fn after(&mut self, milliseconds: u64, effect: impl FnOnce(&mut Self) + Send + 'static) {
        self.numbers += 1;
        let (at, number) = (Instant::now() + Duration::from_millis(milliseconds), self.numbers);
        self.agenda.push(Event { at, number, effect: Box::new(effect) });
        self.more.notify_one();
    }

    /// When something happens next.
    pub(super) fn next(&self) -> Option<Instant> {
        self.agenda.iter().map(|event| event.at).min()
    }

    /// Lets happen what is due, in its order.
    pub(super) fn happen(&mut self, now: Instant) {
        loop {
            let due = self.agenda.iter().enumerate().filter(|(_, event)| event.at <= now);
            let Some((index, _)) = due.min_by_key(|(_, event)| (event.at, event.number)) else { return };
            let event = self.agenda.swap_remove(index);
            (event.effect)(self);
        }
    }

    pub(super) fn violate(&mut self, what: String) {
        self.violations.push(what);
    }

    pub(super) fn create_volume(&mut self, volume_type: &str) -> String {
        let id = self.new_id(1);
        let pool = pool_of(volume_type).unwrap_or("sata").to_owned();
        let volume = Volume {
            id: id.clone(),
            volume_type: volume_type.to_owned(),
            pool: pool.clone(),
            status: "available".into(),
            migration: None,
            records: Vec::new(),
            snapshots: Vec::new(),
            acknowledged: vec![0; SIZE as usize],
        };
        self.pools.add(&pool, MemoryImage::new(&volume.image(), SIZE, LAYOUT));
        self.volumes.push(volume);
        id
    }

    pub(super) fn create_server(&mut self, volumes: &[String]) -> String {
        let id = self.new_id(2);
        let mapping = |(index, volume): (usize, &String)| Mapping {
            volume: volume.clone(),
            device: device(index),
            delete_on_termination: index == 1,
        };
        self.servers.push(Server {
            id: id.clone(),
            status: "ACTIVE",
            task: None,
            power: 1,
            host: Some("vm"),
            locked: None,
            mappings: volumes.iter().enumerate().map(mapping).collect(),
            fault: None,
            open: Vec::new(),
        });
        for (index, volume) in volumes.iter().enumerate() {
            let record = self.new_id(3);
            let told = self.volume(volume).map(|volume| format!("{}/{}", volume.pool, volume.image()));
            if let Some(volume) = self.volume_mut(volume) {
                let (server, device) = (id.clone(), device(index));
                volume.records.push(Record { id: record, server, device, status: "attached", image: told });
                volume.status = "in-use".into();
            }
            self.open(&id, volume);
        }
        self.write();
        id
    }

    pub(super) fn fill(&mut self, id: &str) {
        let pools = self.pools.clone();
        let Some(volume) = self.volume_mut(id) else { return };
        let Some(image) = pools.find(&volume.pool, &volume.image()) else { return };
        for at in (0..volume.acknowledged.len() - 512).step_by(8192) {
            let data = [fastrand::u8(1..); 512];
            volume.acknowledged[at..at + data.len()].copy_from_slice(&data);
            image.write_as_server(at as u64, &data);
        }
    }

    /// A volume as Cinder shows it.
    pub(super) fn show_volume(&self, volume: &Volume) -> Value {
        let attached = volume.records.iter().filter(|record| record.status == "attached");
        let attachments: Vec<Value> = attached
            .map(|Record { id, server, device, .. }| {
                json!({"id": volume.id, "attachment_id": id, "volume_id": volume.id, "server_id": server,
                       "host_name": "vm", "device": device})
            })
            .collect();
        let host = format!("vm@{0}#{0}", volume.pool);
        json!({
            "id": volume.id, "status": volume.status, "size": 1, "name": "", "volume_type": volume.volume_type,
            "bootable": "true", "encrypted": false, "multiattach": false, "replication_status": null,
            "consistencygroup_id": null, "group_id": null, "metadata": {}, "attachments": attachments,
            "migration_status": volume.migration, "os-vol-mig-status-attr:migstat": volume.migration,
            "os-vol-mig-status-attr:name_id": null, "os-vol-host-attr:host": host,
            "os-vol-tenant-attr:tenant_id": PROJECT,
        })
    }

    /// A server as Nova shows it.
    pub(super) fn show_server(&self, server: &Server) -> Value {
        let volumes: Vec<Value> = server
            .mappings
            .iter()
            .map(|one| json!({"id": one.volume, "delete_on_termination": one.delete_on_termination}))
            .collect();
        let mut shown = json!({
            "id": server.id, "name": "web", "status": server.status, "tenant_id": PROJECT, "image": "",
            "flavor": {"original_name": "tiny", "ephemeral": 0}, "metadata": {}, "tags": [], "key_name": null,
            "OS-EXT-STS:task_state": server.task, "OS-EXT-STS:power_state": server.power,
            "OS-EXT-SRV-ATTR:host": server.host, "OS-EXT-SRV-ATTR:root_device_name": "/dev/vda",
            "OS-SRV-USG:launched_at": "2026-12-01T03:36:09.000000",
            "os-extended-volumes:volumes_attached": volumes,
            "locked": server.locked.is_some(), "locked_reason": server.locked.clone().flatten(),
        });
        if let Some(fault) = &server.fault {
            shown["fault"] = json!({"message": fault, "code": 500});
        }
        shown
    }
}

/// The pool of the backend that a type names.
pub(super) fn pool_of(volume_type: &str) -> Option<&'static str> {
    match volume_type {
        "sata" => Some("sata"),
        "sas" => Some("sas"),
        _ => None,
    }
}

/// Under which name a server has its disk of that number.
pub(super) fn device(index: usize) -> String {
    format!("/dev/vd{}", char::from(b'a' + u8::try_from(index).unwrap_or(25).min(25)))
}
