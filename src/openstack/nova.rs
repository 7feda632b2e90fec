//! Servers, and the volumes that they have.
//!
//! Source of paths and fields: the Compute API, <https://docs.openstack.org/api-ref/compute/>.

use std::collections::BTreeMap;

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::Result;
use super::session::{Ask, Service};
use super::{Cloud, checked};

/// The order in which servers are listed.
const BY_AGE: &[(&str, &str)] = &[("sort_key", "created_at"), ("sort_dir", "asc")];

/// Whose servers and volumes are listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Whose {
    /// Those of the project that the credentials are for.
    #[default]
    Own,
    /// Those of the project with that id. Needs an administrator.
    Project(String),
    /// All. Needs an administrator.
    All,
}

impl Whose {
    pub(super) fn narrow<'a>(&'a self, query: &mut Vec<(&'a str, &'a str)>, key: &'static str) {
        match self {
            Self::Own => {}
            Self::Project(id) => query.extend([("all_tenants", "1"), (key, id.as_str())]),
            Self::All => query.push(("all_tenants", "1")),
        }
    }
}

/// A server.
#[derive(Clone, Debug, Deserialize)]
pub struct Server {
    /// Its id.
    pub id: String,
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// `ACTIVE`, `SHUTOFF`, `SHELVED_OFFLOADED`, `ERROR` and others.
    pub status: String,
    /// What is under way with it.
    #[serde(default, rename = "OS-EXT-STS:task_state")]
    pub task: Option<String>,
    /// When it first ran; `None` where it never did.
    #[serde(default, rename = "OS-SRV-USG:launched_at")]
    pub launched_at: Option<String>,
    /// What its hypervisor says: 0 nothing, 1 running, 3 paused, 4 off, 6 crashed, 7 suspended.
    #[serde(default, rename = "OS-EXT-STS:power_state")]
    pub power: u8,
    /// Whether it is locked: then an administrator only may do something with it.
    #[serde(default)]
    pub locked: bool,
    /// Why, in the words of whoever did.
    #[serde(default)]
    pub locked_reason: Option<String>,
    /// The project that it belongs to.
    #[serde(default, rename = "tenant_id")]
    pub project: String,
    /// The host that it is on. For administrators only.
    #[serde(default, rename = "OS-EXT-SRV-ATTR:host")]
    pub host: Option<String>,
    /// Under which name it has the disk that it boots from. For administrators only.
    #[serde(default, rename = "OS-EXT-SRV-ATTR:root_device_name")]
    pub root_device: Option<String>,
    /// The volumes that it has.
    #[serde(default, rename = "os-extended-volumes:volumes_attached")]
    pub volumes: Vec<ServerVolume>,
    /// What of it is on no volume, and what it is called.
    #[serde(default)]
    pub flavor: ServerFlavor,
    /// What its owner has written to it.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Its tags.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Its key pair's name.
    #[serde(default)]
    pub key_name: Option<String>,
    /// The image that it was made from: an empty text where it boots from a volume.
    #[serde(default)]
    image: Value,
    /// What went wrong with it last.
    #[serde(default)]
    pub fault: Option<ServerFault>,
}

impl Server {
    /// Whether it has a disk of its own, that no volume is, and boots from that.
    pub fn boots_from_image(&self) -> bool {
        self.image.is_object()
    }
}

/// A volume that a server has.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ServerVolume {
    /// The volume.
    pub id: String,
    /// Whether it ends with the server.
    #[serde(default)]
    pub delete_on_termination: bool,
}

/// What a server has been given, as far as it counts here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ServerFlavor {
    /// Its name.
    #[serde(default)]
    pub original_name: String,
    /// The GiB of a disk beside the one that it boots from, on its host, which is lost when the server leaves it.
    #[serde(default)]
    pub ephemeral: u64,
}

/// What went wrong with a server.
#[derive(Clone, Debug, Deserialize)]
pub struct ServerFault {
    /// In Nova's words.
    #[serde(default)]
    pub message: String,
}

/// A volume that a server has, with how it has it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ServerAttachment {
    /// The volume.
    #[serde(rename = "volumeId")]
    pub volume: String,
    /// Under which name the server has it: `/dev/vda`.
    #[serde(default)]
    pub device: Option<String>,
    /// Whether it ends with the server.
    #[serde(default)]
    pub delete_on_termination: bool,
    /// By which the server itself can tell it.
    #[serde(default)]
    pub tag: Option<String>,
}

/// A server that is made.
#[derive(Clone, Debug)]
pub struct NewServer<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its flavor, by its id.
    pub flavor: &'a str,
    /// Its volumes, in the order of its disks, with whether each ends with it and its tag. It boots from the first one.
    pub volumes: Vec<(&'a str, bool, Option<&'a str>)>,
    /// Its ports, in the order of its network cards, with their tags. Without any it is on no network.
    pub ports: Vec<(&'a str, Option<&'a str>)>,
    /// What is written to it.
    pub metadata: BTreeMap<String, String>,
    /// More of it, by Nova's own keys: `key_name`, `tags`, `user_data`.
    pub more: serde_json::Map<String, Value>,
}

impl NewServer<'_> {
    /// What Nova is told.
    pub fn body(&self) -> Value {
        let disks = self.volumes.iter().enumerate().map(|(index, (volume, delete, tag))| {
            let mut disk = json!({
                "boot_index": if index == 0 { 0 } else { -1 }, "uuid": volume, "source_type": "volume",
                "destination_type": "volume", "delete_on_termination": delete,
            });
            if let Some(tag) = tag {
                disk["tag"] = (*tag).into();
            }
            disk
        });
        let cards = self.ports.iter().map(|(port, tag)| {
            let mut card = json!({"port": port});
            if let Some(tag) = tag {
                card["tag"] = (*tag).into();
            }
            card
        });
        let networks = if self.ports.is_empty() { "none".into() } else { cards.collect() };
        let mut body = self.more.clone();
        body.insert("name".into(), self.name.into());
        body.insert("flavorRef".into(), self.flavor.into());
        body.insert("networks".into(), networks);
        body.insert("metadata".into(), json!(self.metadata));
        body.insert("block_device_mapping_v2".into(), disks.collect());
        Value::Object(body)
    }
}

/// What is done with a server as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerAction {
    /// It is told to shut down.
    Stop,
    /// It is started.
    Start,
    /// It leaves its host, and keeps its volumes and ports.
    Shelve,
    /// It leaves its host, having been shelved.
    ShelveOffload,
    /// It is built anew on a host, and starts. It asks Cinder how to reach its volumes.
    Unshelve,
    /// It is deleted at once, where its cloud keeps deleted servers for a while.
    ForceDelete,
    /// Nobody but an administrator may do anything with it. What is shown as the reason says who has locked it.
    Lock(&'static str),
    /// Its owner may do with it what he likes.
    Unlock,
}

impl ServerAction {
    fn body(self) -> (Value, &'static str) {
        match self {
            Self::Stop => (json!({"os-stop": null}), "stop"),
            Self::Start => (json!({"os-start": null}), "start"),
            Self::Shelve => (json!({"shelve": null}), "shelve"),
            Self::ShelveOffload => (json!({"shelveOffload": null}), "offload"),
            Self::Unshelve => (json!({"unshelve": null}), "unshelve"),
            Self::ForceDelete => (json!({"forceDelete": null}), "delete"),
            Self::Lock(reason) => (json!({"lock": {"locked_reason": reason}}), "lock"),
            Self::Unlock => (json!({"unlock": null}), "unlock"),
        }
    }
}

impl Cloud {
    /// A server.
    pub async fn server(&self, id: &str) -> Result<Server> {
        #[derive(Deserialize)]
        struct Answer {
            server: Server,
        }
        let operation = format!("show server {id}");
        let id = checked(id, "server", &operation)?;
        Ok(self.ask::<Answer>(Service::Nova, &format!("servers/{id}"), &[], &operation).await?.server)
    }

    /// All servers of the project, of another one, or of all.
    pub async fn servers(&self, whose: &Whose) -> Result<Vec<Server>> {
        #[derive(Deserialize)]
        struct Answer {
            servers: Vec<Server>,
        }
        let (service, order) = (Service::Nova, BY_AGE);
        let listed = |page: Answer| page.servers;
        self.pages((service, "servers/detail", "list servers"), order, whose, listed, |server| &server.id).await
    }

    /// The servers of all projects that have that name. Needs an administrator.
    pub async fn servers_named(&self, name: &str) -> Result<Vec<Server>> {
        #[derive(Deserialize)]
        struct Answer {
            servers: Vec<Server>,
        }
        let pattern = pattern(name);
        let query = [BY_AGE[0], BY_AGE[1], ("name", pattern.as_str())];
        let (service, listed) = (Service::Nova, |page: Answer| page.servers);
        let what = (service, "servers/detail", "look for servers by their name");
        let all = self.pages(what, &query, &Whose::All, listed, |server| &server.id).await?;
        Ok(all.into_iter().filter(|server| server.name == name).collect())
    }

    /// The end of what a server has printed on its console, as much as its hypervisor keeps.
    pub async fn console_output(&self, server: &str) -> Result<String> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            output: Option<String>,
        }
        let operation = format!("read the console of server {server}");
        let path = format!("servers/{}/action", checked(server, "server", &operation)?);
        let body = json!({"os-getConsoleOutput": {}});
        let (service, operation) = (Service::Nova, operation.as_str());
        let ask = Ask { service, method: Method::POST, path: &path, query: &[], body: Some(&body), operation };
        Ok(self.session.get::<Answer>(ask).await?.output.unwrap_or_default())
    }

    /// The volumes that a server has, with how it has them.
    pub async fn server_attachments(&self, server: &str) -> Result<Vec<ServerAttachment>> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(rename = "volumeAttachments")]
            attachments: Vec<ServerAttachment>,
        }
        let operation = format!("list the volumes of server {server}");
        let path = format!("servers/{}/os-volume_attachments", checked(server, "server", &operation)?);
        Ok(self.ask::<Answer>(Service::Nova, &path, &[], &operation).await?.attachments)
    }

    /// Begins to make a server, of the credentials' project. Gives back its id; the answer says nothing of whether it will
    /// run.
    pub async fn create_server(&self, wanted: &NewServer<'_>) -> Result<String> {
        #[derive(Deserialize)]
        struct Made {
            id: String,
        }
        #[derive(Deserialize)]
        struct Answer {
            server: Made,
        }
        let operation = format!("create server {}", wanted.name);
        let body = json!({"server": wanted.body()});
        let ask = Ask {
            service: Service::Nova,
            method: Method::POST,
            path: "servers",
            query: &[],
            body: Some(&body),
            operation: &operation,
        };
        Ok(self.session.get::<Answer>(ask).await?.server.id)
    }

    /// Begins to delete a server, with its volumes that end with it.
    pub async fn delete_server(&self, server: &str) -> Result<()> {
        let operation = format!("delete server {server}");
        let path = format!("servers/{}", checked(server, "server", &operation)?);
        self.tell(Service::Nova, Method::DELETE, &path, None, &operation).await
    }

    /// The id of the flavor of that name: of a server only the name is told.
    pub async fn find_flavor(&self, name: &str) -> Result<Option<String>> {
        #[derive(Deserialize)]
        struct Flavor {
            id: String,
            name: String,
        }
        #[derive(Deserialize)]
        struct Answer {
            flavors: Vec<Flavor>,
        }
        let what = (Service::Nova, "flavors", "list flavors");
        let listed = |page: Answer| page.flavors;
        let all = self.pages(what, &[("is_public", "None")], &Whose::Own, listed, |flavor| &flavor.id).await?;
        Ok(all.into_iter().find(|flavor| flavor.name == name).map(|flavor| flavor.id))
    }

    /// Begins something with a server. The answer says nothing of whether it will come about.
    pub async fn act_on_server(&self, server: &str, action: ServerAction) -> Result<()> {
        let (body, word) = action.body();
        let operation = format!("{word} server {server}");
        let path = format!("servers/{}/action", checked(server, "server", &operation)?);
        self.tell(Service::Nova, Method::POST, &path, Some(&body), &operation).await
    }

    /// Begins to take a volume from a server.
    pub async fn detach(&self, server: &str, volume: &str) -> Result<()> {
        let operation = format!("detach volume {volume} from server {server}");
        let server = checked(server, "server", &operation)?;
        let path = format!("servers/{server}/os-volume_attachments/{}", checked(volume, "volume", &operation)?);
        self.tell(Service::Nova, Method::DELETE, &path, None, &operation).await
    }

    /// Begins to give a volume to a server, as it had it.
    pub async fn attach(&self, server: &str, attachment: &ServerAttachment) -> Result<()> {
        let ServerAttachment { volume, device, delete_on_termination, tag } = attachment;
        let operation = format!("attach volume {volume} to server {server}");
        let path = format!("servers/{}/os-volume_attachments", checked(server, "server", &operation)?);
        let mut wanted = json!({"volumeId": volume, "delete_on_termination": delete_on_termination});
        for (key, value) in [("device", device), ("tag", tag)] {
            if let Some(value) = value {
                wanted[key] = value.as_str().into();
            }
        }
        self.tell(Service::Nova, Method::POST, &path, Some(&json!({"volumeAttachment": wanted})), &operation).await
    }
}

/// What Nova finds servers of a name by, and perhaps others: a regular expression of its database's.
fn pattern(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_".contains(c) { c.to_string() } else { ".+".to_owned() };
    format!("^{}$", name.chars().map(plain).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_looked_for_by_what_no_database_takes_otherwise() {
        assert_eq!(pattern("web-1.poolshift"), "^web-1.+poolshift$");
        assert_eq!(pattern("a (b)*ü"), "^a.+.+b.+.+.+$");
    }
}
