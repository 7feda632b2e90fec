//! All that a server is made again from: what is remembered of it, and what Nova is told then. No I/O.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::super::super::Notes;
use crate::openstack::definition::Definition;
use crate::openstack::neutron::Port;
use crate::openstack::nova::{NewServer, ServerAttachment};

/// The key of a server's metadata that says which server of a plan it is: the id that it has there.
pub(super) const SERVER_MARK: &str = "poolshift-server";
/// The key of a volume's metadata that says which volume of a plan it is the target of: the id that it has there.
pub(super) const VOLUME_MARK: &str = "poolshift-volume";
/// Under which this is among the notes.
const NOTE: &str = "definition";
/// The most that it may be there, in bytes: the notes have room for 40 KiB.
pub(super) const BYTES_MAX: usize = 36 << 10;

/// A server, remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Remembered {
    pub(super) name: String,
    /// By its id.
    pub(super) flavor: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) key_name: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) metadata: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) tags: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) description: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) availability_zone: String,
    #[serde(default)]
    pub(super) config_drive: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) disk_config: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) user_data: Option<String>,
    /// In the order of its disks, that which it boots from first.
    pub(super) disks: Vec<Disk>,
    /// In the order of its network cards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) interfaces: Vec<Interface>,
}

/// A network interface of a server, remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Interface {
    /// The port that it is.
    pub(super) port: String,
    /// By which the server itself can tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tag: Option<String>,
    /// Its name for the DNS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) dns_name: Option<String>,
}

impl Interface {
    /// A port, as an interface.
    pub(super) fn new(port: &Port, tag: Option<String>) -> Self {
        let dns_name = Some(port.dns_name.clone()).filter(|name| !name.is_empty());
        Self { port: port.id.clone(), tag, dns_name }
    }
}

/// A volume of a server, remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Disk {
    /// The volume, by its id in the plan; by its own where the plan has it not.
    pub(super) volume: String,
    /// By which the server itself can tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tag: Option<String>,
    /// Whether it ends with the server.
    pub(super) ends_with_server: bool,
}

impl Remembered {
    /// A server as it is. `known` gives the plan's id for a volume's.
    pub(super) fn of(
        definition: &Definition,
        (flavor, has_key, root): (&str, bool, Option<&str>),
        (attachments, interfaces): (&[ServerAttachment], Vec<Interface>),
        known: impl Fn(&str) -> String,
    ) -> Self {
        let mut attachments: Vec<&ServerAttachment> = attachments.iter().collect();
        attachments.sort_by_key(|found| {
            let device = found.device.as_deref().unwrap_or_default();
            // vdb comes before vdaa.
            (root != Some(device), device.len(), device.to_owned())
        });
        let disk = |found: &ServerAttachment| Disk {
            volume: known(&found.volume),
            tag: found.tag.clone(),
            ends_with_server: found.delete_on_termination,
        };
        let mut metadata = definition.metadata.clone();
        metadata.remove(SERVER_MARK);
        Self {
            name: definition.name.clone(),
            flavor: flavor.to_owned(),
            key_name: definition.key_name.clone().filter(|_| has_key),
            metadata,
            tags: definition.tags.clone(),
            description: definition.description.clone(),
            availability_zone: definition.availability_zone.clone(),
            config_drive: definition.has_config_drive(),
            disk_config: definition.disk_config.clone(),
            user_data: definition.user_data.clone().flatten(),
            disks: attachments.into_iter().map(disk).collect(),
            interfaces,
        }
    }

    /// What is among the notes.
    pub(super) fn noted(notes: &Notes) -> Option<Self> {
        serde_json::from_str(notes.get(NOTE)?).ok()
    }

    /// Puts it among the notes, if there is room for it; gives back how many bytes it has. Of a server that was made again,
    /// and not yet told which volumes end with it, an older note knows that: they end with it if either says so. And it knows
    /// how a server had the ports that are held for it.
    pub(super) fn note(mut self, notes: &mut Notes) -> usize {
        if let Some(older) = Self::noted(notes) {
            for older in older.disks {
                let same = self.disks.iter_mut().find(|disk| disk.volume == older.volume);
                same.into_iter().for_each(|disk| disk.ends_with_server |= older.ends_with_server);
            }
            let has = |all: &[Interface], one: &Interface| all.iter().any(|other| other.port == one.port);
            let mut all = older.interfaces;
            all.retain(|interface| has(&self.interfaces, interface));
            self.interfaces.retain(|interface| !has(&all, interface));
            all.append(&mut self.interfaces);
            self.interfaces = all;
        }
        let text = self.text();
        let size = text.len();
        if size <= BYTES_MAX {
            notes.insert(NOTE.to_owned(), text);
        }
        size
    }

    /// The server has all that was remembered.
    pub(super) fn forget(notes: &mut Notes) {
        notes.remove(NOTE);
    }

    /// As it is noted.
    pub(super) fn text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// What Nova is told. `now` gives the id that a volume has on the side where the server is to run. No volume ends with
    /// it before it was seen to run: until then it may have to be deleted again.
    pub(super) fn new_server<'a>(&'a self, mark: &str, now: impl Fn(&'a str) -> &'a str) -> NewServer<'a> {
        let mut metadata = self.metadata.clone();
        metadata.insert(SERVER_MARK.to_owned(), mark.to_owned());
        let mut more = Map::new();
        let texts = [
            ("key_name", self.key_name.as_deref()),
            ("description", self.description.as_deref()),
            ("availability_zone", Some(self.availability_zone.as_str())),
            ("OS-DCF:diskConfig", self.disk_config.as_deref()),
            ("user_data", self.user_data.as_deref()),
        ];
        for (key, text) in texts {
            if let Some(text) = text.filter(|text| !text.is_empty()) {
                more.insert(key.to_owned(), Value::from(text));
            }
        }
        if !self.tags.is_empty() {
            more.insert("tags".to_owned(), json!(self.tags));
        }
        if self.config_drive {
            more.insert("config_drive".to_owned(), true.into());
        }
        let volumes = self.disks.iter().map(|disk| (now(&disk.volume), false, disk.tag.as_deref())).collect();
        let ports = self.interfaces.iter().map(|found| (found.port.as_str(), found.tag.as_deref())).collect();
        NewServer { name: &self.name, flavor: &self.flavor, volumes, ports, metadata, more }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(more: Value) -> Definition {
        let mut shown = json!({
            "name": "web", "tenant_id": "p", "key_name": "mine", "metadata": {"a": "1", "poolshift-server": "old"},
            "tags": ["one"], "description": "of a test", "OS-EXT-AZ:availability_zone": "nova", "config_drive": "",
            "OS-DCF:diskConfig": "MANUAL", "OS-EXT-SRV-ATTR:user_data": "IyE=",
        });
        shown.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(shown).unwrap()
    }

    fn attached(volume: &str, device: &str, ends: bool) -> ServerAttachment {
        let tag = (volume == "d").then(|| "logs".to_owned());
        ServerAttachment { volume: volume.into(), device: Some(device.into()), delete_on_termination: ends, tag }
    }

    fn interface(port: &str) -> Interface {
        Interface { port: port.into(), tag: (port == "q").then(|| "mgmt".to_owned()), dns_name: None }
    }

    fn remembered(has_key: bool, more: Value) -> Remembered {
        let attachments =
            [attached("z", "/dev/vdaa", false), attached("d", "/dev/vdb", true), attached("new", "/dev/vda", false)];
        let known = |id: &str| if id == "new" { "r".to_owned() } else { id.to_owned() };
        let interfaces = vec![interface("q"), interface("p")];
        Remembered::of(&definition(more), ("f", has_key, Some("/dev/vda")), (&attachments, interfaces), known)
    }

    #[test]
    fn a_server_is_made_from_all_that_was_remembered() {
        let it = remembered(true, json!({}));
        let now = |id| if id == "r" { "managed" } else { id };
        let disk = |index: i32, id: &str| {
            json!({
                "boot_index": index, "uuid": id, "source_type": "volume", "destination_type": "volume",
                "delete_on_termination": false,
            })
        };
        let mut logs = disk(-1, "d");
        logs["tag"] = "logs".into();
        let expected = json!({
            "name": "web", "flavorRef": "f", "networks": [{"port": "q", "tag": "mgmt"}, {"port": "p"}], "key_name": "mine", "description": "of a test",
            "availability_zone": "nova", "OS-DCF:diskConfig": "MANUAL", "user_data": "IyE=", "tags": ["one"],
            "metadata": {"a": "1", "poolshift-server": "planned"},
            "block_device_mapping_v2": [disk(0, "managed"), logs, disk(-1, "z")],
        });
        assert_eq!(it.new_server("planned", now).body(), expected);
        let bare = json!({
            "key_name": null, "description": null, "OS-EXT-SRV-ATTR:user_data": null, "tags": [], "config_drive": "True",
        });
        let mut bare = remembered(false, bare);
        bare.interfaces.clear();
        let body = bare.new_server("planned", now).body();
        assert_eq!(body["networks"], "none");
        let keys: Vec<&str> = body.as_object().unwrap().keys().map(String::as_str).collect();
        assert!(!keys.iter().any(|key| ["key_name", "description", "user_data", "tags"].contains(key)), "{keys:?}");
        assert_eq!(body["config_drive"], true);
        // Of a key pair that the credentials' user has not, the server is made without.
        assert_eq!(remembered(false, json!({})).key_name, None);
    }

    #[test]
    fn what_ends_with_a_server_is_remembered_until_it_was_told() {
        let mut notes = Notes::new();
        let it = remembered(true, json!({}));
        it.clone().note(&mut notes);
        assert_eq!(Remembered::noted(&notes).as_ref(), Some(&it));
        // It was made again, with nothing that ends with it, and the process was killed.
        let mut again = it.clone();
        again.disks.iter_mut().for_each(|disk| disk.ends_with_server = false);
        again.note(&mut notes);
        assert_eq!(Remembered::noted(&notes).as_ref(), Some(&it));
        // Its ports are held, of which nobody tells how it had them; one it has no more, and it has another one.
        let mut held = it.clone();
        held.interfaces = vec![interface("r"), Interface { tag: None, ..interface("q") }];
        held.note(&mut notes);
        let mut with = it;
        with.interfaces = vec![interface("q"), interface("r")];
        assert_eq!(Remembered::noted(&notes).as_ref(), Some(&with));
        // What is too large is not noted.
        let large = Remembered { user_data: Some("x".repeat(BYTES_MAX)), ..with.clone() };
        assert!(large.note(&mut notes) > BYTES_MAX);
        assert_eq!(Remembered::noted(&notes).as_ref(), Some(&with));
        Remembered::forget(&mut notes);
        assert_eq!(Remembered::noted(&notes), None);
    }
}
