//! A server's ports, which outlive it: Nova deletes with a server those that it made itself, as long as Neutron says that
//! the server has them. So Neutron is told that nobody has them before the server is deleted, and the next server is made
//! with them: the same ports, with their addresses, security groups and floating IPs.
//!
//! Tried on Neutron 21 (Zed) with ports of both kinds.

use async_trait::async_trait;
use futures::future::join_all;

use super::super::super::ProviderError;
use super::super::effect::{Effect, Look};
use super::Recreate;
use super::remembered::{Interface, Remembered};
use crate::openstack::definition::ServerInterface;
use crate::openstack::{Cloud, CloudError, Fault};

/// The interfaces of a server, in the order of its cards, if that is known.
#[derive(Debug, Default)]
pub(super) struct Interfaces {
    pub(super) all: Vec<Interface>,
    /// Whether they are in the order in which the server has them: more than one may be in another.
    pub(super) in_order: bool,
}

/// Looks at the interfaces of a server, and makes sure that Neutron can be asked for the ports. Only of a server that runs
/// it is told in which order it has them.
pub(super) async fn look(cloud: &Cloud, server: &str) -> Result<Interfaces, CloudError> {
    let found = cloud.interfaces(server).await?;
    for interface in &found {
        let port = cloud.port(&interface.port_id).await?;
        if port.device_id != server {
            let detail =
                format!("port {} is that of {:?}, and Nova says that this server has it", port.id, port.device_id);
            return Err(CloudError::new(Fault::Strange, format!("look at server {server}"), cloud.name(), detail));
        }
    }
    let cards = match found.len() {
        0 | 1 => None,
        // Needs an administrator.
        _ => cloud.network_cards(server).await.ok(),
    };
    Ok(sorted(found, cards.as_deref()))
}

fn sorted(mut found: Vec<ServerInterface>, cards: Option<&[String]>) -> Interfaces {
    let place = |interface: &ServerInterface| cards?.iter().position(|mac| *mac == interface.mac_addr);
    let in_order = found.len() < 2 || found.iter().all(|interface| place(interface).is_some());
    if in_order {
        found.sort_by_key(place);
    }
    let all = found.into_iter().map(|interface| Interface { port: interface.port_id, tag: interface.tag });
    Interfaces { all: all.collect(), in_order }
}

/// A port is a server's, or nobody's.
struct Had<'a> {
    cloud: &'a Cloud,
    port: &'a str,
    /// The server that is being deleted, or was not.
    server: &'a str,
    /// Whether the server is to have it.
    wanted: bool,
}

#[async_trait]
impl Effect for Had<'_> {
    fn wanted(&self) -> String {
        let by = if self.wanted { format!("server {} has", self.server) } else { "nobody has".into() };
        format!("port {} that {by}", self.port)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let found = match self.cloud.port(self.port).await {
            Err(error) if error.fault == Fault::NotFound => {
                return Ok(Look::Hopeless(format!("its port {} is gone: somebody has deleted it", self.port)));
            }
            found => found?.device_id,
        };
        let wanted = if self.wanted { self.server } else { "" };
        Ok(match found.as_str() {
            found if found == wanted => Look::Done,
            "" => Look::NotYet("nobody's".into()),
            found if found == self.server => Look::NotYet("the server's".into()),
            other => Look::Hopeless(format!("its port {} is that of {other} by now", self.port)),
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        self.cloud.set_port_device(self.port, if self.wanted { self.server } else { "" }).await
    }
}

/// Nova knows that a server has these ports, too: it keeps a list of its own, which it compares with Neutron's from time
/// to time.
struct Shown<'a> {
    cloud: &'a Cloud,
    server: &'a str,
    ports: &'a [Interface],
}

#[async_trait]
impl Effect for Shown<'_> {
    fn wanted(&self) -> String {
        format!("server {} with all its addresses", self.server)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let addresses = self.cloud.definition(self.server).await?.mac_addresses();
        for Interface { port, .. } in self.ports {
            let found = self.cloud.port(port).await?;
            // One without an address is not shown.
            if !found.fixed_ips.is_empty() && !addresses.contains(&found.mac_address) {
                return Ok(Look::Working(format!("without port {port}")));
            }
        }
        Ok(Look::Done)
    }
}

impl Recreate {
    /// No interface but those that were remembered ends with the server, and none of these does.
    pub(super) async fn take_ports(
        &self,
        operation: &str,
        server: &str,
        remembered: &Remembered,
    ) -> Result<(), ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        let has = cloud.interfaces(server).await.map_err(|error| self.base.cloud_error(operation, &error))?;
        let is_known = |port: &str| remembered.interfaces.iter().any(|interface| interface.port == port);
        if let Some(stranger) = has.iter().find(|interface| !is_known(&interface.port_id)) {
            let problem = format!("it has the port {} by now, which it had not before", stranger.port_id);
            return Err(self.base.error(operation, problem, Some("take it from the server, or begin anew")));
        }
        self.bring_ports(operation, server, remembered, false).await
    }

    /// A server that was not deleted after all has its ports.
    pub(super) async fn give_ports(
        &self,
        operation: &str,
        server: &str,
        remembered: &Remembered,
    ) -> Result<(), ProviderError> {
        if remembered.interfaces.is_empty() {
            return Ok(());
        }
        self.bring_ports(operation, server, remembered, true).await?;
        let cloud = self.base.cloud(operation).await?;
        self.base.bring_about(operation, &Shown { cloud, server, ports: &remembered.interfaces }).await
    }

    async fn bring_ports(
        &self,
        operation: &str,
        server: &str,
        remembered: &Remembered,
        wanted: bool,
    ) -> Result<(), ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        let all: Vec<Had<'_>> = remembered
            .interfaces
            .iter()
            .map(|interface| Had { cloud, port: &interface.port, server, wanted })
            .collect();
        join_all(all.iter().map(|had| self.base.bring_about(operation, had))).await.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_in_the_order_of_the_cards_where_all_are_known() {
        let found = |macs: &[&str]| {
            let interface = |mac: &&str| ServerInterface {
                port_id: format!("port-{mac}"),
                mac_addr: (*mac).to_owned(),
                tag: (*mac == "b").then(|| "mgmt".to_owned()),
            };
            macs.iter().map(interface).collect::<Vec<_>>()
        };
        let cards = |macs: &[&str]| macs.iter().map(|mac| (*mac).to_owned()).collect::<Vec<_>>();
        let ports = |found: &Interfaces| found.all.iter().map(|it| it.port.clone()).collect::<Vec<_>>();
        let known = sorted(found(&["a", "b", "c"]), Some(&cards(&["c", "a", "b"])));
        assert_eq!((ports(&known), known.in_order), (cards(&["port-c", "port-a", "port-b"]), true));
        assert_eq!(known.all[2].tag.as_deref(), Some("mgmt"));
        for unknown in [None, Some(cards(&["c", "b"]))] {
            let it = sorted(found(&["a", "b", "c"]), unknown.as_deref());
            assert_eq!((ports(&it), it.in_order), (cards(&["port-a", "port-b", "port-c"]), false));
        }
        assert!(sorted(found(&["a"]), None).in_order && sorted(Vec::new(), None).in_order);
    }
}
