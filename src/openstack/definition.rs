//! All that a server is made again from, and the calls that keep its volumes while it is not there.
//!
//! Source of paths and fields: the Compute API, <https://docs.openstack.org/api-ref/compute/>.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{Result, if_there};
use super::session::{Ask, Service};
use super::{Cloud, Microversion, checked};

/// Since 2.85 (Ussuri) it can be changed whether a volume ends with its server.
pub const NOVA_ATTACHMENTS: Microversion = Microversion(2, 85);

/// A server, by what it was made with. Of the rest only what keeps it from being made again.
#[derive(Clone, Debug, Deserialize)]
pub struct Definition {
    /// Its name.
    pub name: String,
    /// Its project.
    #[serde(rename = "tenant_id")]
    pub project: String,
    /// Who has made it.
    #[serde(default)]
    pub user_id: String,
    /// Its key pair's name.
    #[serde(default)]
    pub key_name: Option<String>,
    /// What its owner has written to it.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Its tags.
    #[serde(default)]
    pub tags: Vec<String>,
    /// What it is for, in its owner's words.
    #[serde(default)]
    pub description: Option<String>,
    /// Where it is.
    #[serde(default, rename = "OS-EXT-AZ:availability_zone")]
    pub availability_zone: String,
    /// `True`, or an empty text.
    #[serde(default)]
    pub config_drive: Value,
    /// `AUTO` or `MANUAL`.
    #[serde(default, rename = "OS-DCF:diskConfig")]
    pub disk_config: Option<String>,
    /// What its first boot is told. `None` where the credentials may not see that, which is another thing than none.
    #[serde(default, rename = "OS-EXT-SRV-ATTR:user_data", deserialize_with = "present")]
    pub user_data: Option<Option<String>>,
    /// The groups that say which servers it is to be near, or far from.
    #[serde(default)]
    pub server_groups: Vec<String>,
    /// Its networks, with its addresses there.
    #[serde(default)]
    pub addresses: BTreeMap<String, Value>,
}

fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Option<String>>, D::Error> {
    Option::<String>::deserialize(deserializer).map(Some)
}

/// A network interface of a server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ServerInterface {
    /// The port that it is.
    pub port_id: String,
    /// Its address on the wire.
    #[serde(default)]
    pub mac_addr: String,
    /// By which the server itself can tell it.
    #[serde(default)]
    pub tag: Option<String>,
}

impl Definition {
    /// The addresses on the wire of all its interfaces that have another one.
    pub fn mac_addresses(&self) -> BTreeSet<String> {
        let listed = self.addresses.values().filter_map(Value::as_array).flatten();
        listed.filter_map(|address| address["OS-EXT-IPS-MAC:mac_addr"].as_str()).map(str::to_owned).collect()
    }

    /// Whether it has a drive with its metadata.
    pub fn has_config_drive(&self) -> bool {
        match &self.config_drive {
            Value::Bool(flag) => *flag,
            Value::String(text) => !text.is_empty() && !text.eq_ignore_ascii_case("false"),
            _ => false,
        }
    }
}

impl Cloud {
    /// What a server was made with.
    pub async fn definition(&self, server: &str) -> Result<Definition> {
        #[derive(Deserialize)]
        struct Answer {
            server: Definition,
        }
        let operation = format!("show server {server}");
        let path = format!("servers/{}", checked(server, "server", &operation)?);
        Ok(self.ask::<Answer>(Service::Nova, &path, &[], &operation).await?.server)
    }

    /// The network interfaces of a server, in no order.
    pub async fn interfaces(&self, server: &str) -> Result<Vec<ServerInterface>> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(rename = "interfaceAttachments")]
            interfaces: Vec<ServerInterface>,
        }
        let operation = format!("list the interfaces of server {server}");
        let path = format!("servers/{}/os-interface", checked(server, "server", &operation)?);
        Ok(self.ask::<Answer>(Service::Nova, &path, &[], &operation).await?.interfaces)
    }

    /// The addresses on the wire of a server's network cards, in the order in which it has them. Needs an administrator,
    /// and a server that runs.
    pub async fn network_cards(&self, server: &str) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Card {
            mac_address: String,
        }
        #[derive(Deserialize)]
        struct Answer {
            nic_details: Vec<Card>,
        }
        let operation = format!("list the network cards of server {server}");
        let path = format!("servers/{}/diagnostics", checked(server, "server", &operation)?);
        let cards = self.ask::<Answer>(Service::Nova, &path, &[], &operation).await?.nic_details;
        Ok(cards.into_iter().map(|card| card.mac_address).collect())
    }

    /// Whether the credentials' user has a key pair of that name.
    pub async fn has_key_pair(&self, name: &str) -> Result<bool> {
        let operation = format!("look for the key pair {name:?}");
        // Names may have anything in them but what would be another path.
        if name.contains(['/', '?', '#', '%']) {
            return Ok(false);
        }
        let found = self.ask::<Value>(Service::Nova, &format!("os-keypairs/{name}"), &[], &operation).await;
        Ok(if_there(found)?.is_some())
    }

    /// Says whether a volume ends with the server that has it. Needs [`NOVA_ATTACHMENTS`].
    pub async fn end_with_server(&self, server: &str, volume: &str, ends: bool) -> Result<()> {
        let operation = format!("say whether volume {volume} ends with server {server}");
        let server = checked(server, "server", &operation)?;
        let path = format!("servers/{server}/os-volume_attachments/{}", checked(volume, "volume", &operation)?);
        let body = json!({"volumeAttachment": {"volumeId": volume, "delete_on_termination": ends}});
        let (service, method) = (Service::Nova, Method::PUT);
        let ask = Ask { service, method, path: &path, query: &[], body: Some(&body), operation: &operation };
        self.session.tell_in(NOVA_ATTACHMENTS, ask).await
    }
}

#[test]
fn user_data_that_may_not_be_seen_is_not_taken_for_none() {
    let read = |extra: Value| {
        let mut shown = json!({"name": "web", "tenant_id": "p"});
        shown.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        serde_json::from_value::<Definition>(shown).unwrap()
    };
    assert_eq!(read(json!({})).user_data, None);
    assert_eq!(read(json!({"OS-EXT-SRV-ATTR:user_data": null})).user_data, Some(None));
    assert_eq!(read(json!({"OS-EXT-SRV-ATTR:user_data": "IyE="})).user_data, Some(Some("IyE=".into())));
    for (drive, has) in [(json!("True"), true), (json!(""), false), (json!(true), true), (json!(null), false)] {
        assert_eq!(read(json!({"config_drive": drive})).has_config_drive(), has);
    }
}
