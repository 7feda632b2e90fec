//! Ports: what a server's network interfaces are to Neutron.
//!
//! Source of paths and fields: the Networking API, <https://docs.openstack.org/api-ref/network/v2/#ports>; it has no
//! microversions.

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::Result;
use super::session::{Ask, Service};
use super::{Cloud, checked};

/// A port.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Port {
    /// Its id.
    pub id: String,
    /// The server that has it, or another device; empty where nobody has.
    #[serde(default)]
    pub device_id: String,
    /// Its address on the wire.
    #[serde(default)]
    pub mac_address: String,
    /// Its addresses in its network. Without one Nova does not show it among a server's addresses.
    #[serde(default)]
    pub fixed_ips: Vec<Value>,
    /// Its project.
    #[serde(default)]
    pub project_id: String,
    /// Its name for the DNS, where the cloud has one: Nova makes it that of the server's host.
    #[serde(default)]
    pub dns_name: String,
    /// Counts its changes; `None` where the cloud does not count them.
    #[serde(default)]
    pub revision_number: Option<u64>,
}

impl Cloud {
    /// A port.
    pub async fn port(&self, id: &str) -> Result<Port> {
        #[derive(Deserialize)]
        struct Answer {
            port: Port,
        }
        let operation = format!("show port {id}");
        let path = format!("ports/{}", checked(id, "port", &operation)?);
        Ok(self.ask::<Answer>(Service::Neutron, &path, &[], &operation).await?.port)
    }

    /// The ports that a device has.
    pub async fn ports_of(&self, device: &str) -> Result<Vec<Port>> {
        #[derive(Deserialize)]
        struct Answer {
            ports: Vec<Port>,
        }
        let operation = format!("list the ports of {device}");
        Ok(self.ask::<Answer>(Service::Neutron, "ports", &[("device_id", device)], &operation).await?.ports)
    }

    /// Says which server, or other device, has a port; with an empty text, that nobody has. Neutron believes it: Nova is not
    /// asked, and takes neither the interface from the server nor the port from where it is bound. With it goes a name for
    /// the DNS, if one is given.
    ///
    /// # Errors
    /// [`Fault::Conflict`](super::Fault::Conflict) if the port was changed since it was seen like that, by whomever.
    pub async fn set_port_device(&self, port: &Port, device: &str, dns_name: Option<&str>) -> Result<()> {
        let operation = match device {
            "" => format!("let go of port {}", port.id),
            _ => format!("give port {} to {device}", port.id),
        };
        let path = format!("ports/{}", checked(&port.id, "port", &operation)?);
        let mut body = json!({"port": {"device_id": device}});
        if let Some(name) = dns_name {
            body["port"]["dns_name"] = name.into();
        }
        let (service, method) = (Service::Neutron, Method::PUT);
        let ask = Ask { service, method, path: &path, query: &[], body: Some(&body), operation: &operation };
        match port.revision_number {
            Some(revision) => self.session.tell_if_still(revision, ask).await,
            None => self.session.tell(ask).await,
        }
    }
}
