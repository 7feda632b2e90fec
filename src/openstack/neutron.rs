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
    /// The server that has it; empty where nobody has.
    #[serde(default)]
    pub device_id: String,
    /// Its address on the wire.
    #[serde(default)]
    pub mac_address: String,
    /// Its addresses in its network. Without one Nova does not show it among a server's addresses.
    #[serde(default)]
    pub fixed_ips: Vec<Value>,
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

    /// Says which server has a port; with an empty text, that nobody has. Neutron believes it: Nova is not asked, and
    /// takes neither the interface from the server nor the port from where it is bound.
    pub async fn set_port_device(&self, port: &str, server: &str) -> Result<()> {
        let operation = match server {
            "" => format!("take port {port} from its server"),
            _ => format!("give port {port} to server {server}"),
        };
        let path = format!("ports/{}", checked(port, "port", &operation)?);
        let body = json!({"port": {"device_id": server}});
        let (service, method) = (Service::Neutron, Method::PUT);
        let ask = Ask { service, method, path: &path, query: &[], body: Some(&body), operation: &operation };
        self.session.tell(ask).await
    }
}
