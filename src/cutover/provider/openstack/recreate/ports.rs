//! A server's ports, which outlive it.
//!
//! Nova deletes with a server the ports that it made itself, as long as Neutron says that the server has them; and of a
//! server that was there before it takes no port of which Neutron says that somebody has it. So before the server is
//! deleted its ports are held: Neutron is told that a device has them that there is not ([`held_by`]), by which they are
//! found again, and kept from everybody. The next server is made with them: the same ports, with their addresses, security
//! groups and floating IPs. A server that was not deleted after all is given its ports back.
//!
//! A port of which Neutron says otherwise Nova forgets at its next look, and one that comes back it appends, as the last of
//! the server's cards. So the last one is held first and given back last: what Nova knows is at any time a beginning of the
//! list, and the cards stay in their order, where that is known. Where it has forgotten all, it finds them by its own look
//! only, and puts them in order.
//!
//! Tried on Neutron 21 and Nova 26 (Zed) with ports of both kinds.

use async_trait::async_trait;

use super::super::super::ProviderError;
use super::super::effect::{Effect, Look};
use super::Recreate;
use super::remembered::{Interface, Remembered};
use crate::openstack::definition::ServerInterface;
use crate::openstack::neutron::Port;
use crate::openstack::{Cloud, CloudError, Fault, if_there};

/// Who has the ports while a server is not there; `id` is the server's in the plan.
fn held_by(id: &str) -> String {
    format!("poolshift-{id}")
}

/// The interfaces of a server, in the order of its cards, if that is known.
#[derive(Debug, Default)]
pub(super) struct Interfaces {
    pub(super) all: Vec<Interface>,
    /// Whether they are in the order in which the server has them: more than one may be in another.
    pub(super) in_order: bool,
    /// Why Nova would not make a server with one of them.
    pub(super) unfit: Vec<String>,
}

/// Looks at the interfaces of a server of the credentials' project, and makes sure that Neutron can be asked for the ports.
/// Those that are held for it are among them. Only of a server that runs it is told in which order it has them.
pub(super) async fn look(cloud: &Cloud, server: &str, planned: &str) -> Result<Interfaces, CloudError> {
    let found = cloud.interfaces(server).await?;
    let held = match cloud.ports_of(&held_by(planned)).await {
        // A cloud without networks has none.
        Err(error) if error.fault == Fault::Config && found.is_empty() => Vec::new(),
        held => held?,
    };
    let (ports, project) = match found.is_empty() {
        true => Default::default(),
        false => (cloud.ports_of(server).await?, cloud.project().await?),
    };
    if let Some(other) = found.iter().find(|interface| ports.iter().all(|port| port.id != interface.port_id)) {
        let detail = format!("Nova says that it has the port {}, and Neutron does not", other.port_id);
        return Err(CloudError::new(Fault::Strange, format!("look at server {server}"), cloud.name(), detail));
    }
    let cards = match found.len() {
        0 | 1 => None,
        // Needs an administrator.
        _ => cloud.network_cards(server).await.ok(),
    };
    let unfit = ports.iter().filter_map(|port| unfit(port, &project)).collect();
    let (mut all, in_order) = sorted(found, &ports, cards.as_deref());
    all.extend(held.iter().map(|port| Interface::new(port, None)));
    Ok(Interfaces { all, in_order, unfit })
}

/// What Nova refuses a port for.
fn unfit(port: &Port, project: &str) -> Option<String> {
    if port.fixed_ips.is_empty() {
        return Some(format!("its port {} has no address, and Nova makes no server with it", port.id));
    }
    let other = !port.project_id.is_empty() && port.project_id != project;
    other.then(|| {
        format!("its port {} is of the project {}, and Nova makes no server with it", port.id, port.project_id)
    })
}

fn sorted(mut found: Vec<ServerInterface>, ports: &[Port], cards: Option<&[String]>) -> (Vec<Interface>, bool) {
    let place = |interface: &ServerInterface| cards?.iter().position(|mac| *mac == interface.mac_addr);
    let in_order = found.len() < 2 || found.iter().all(|interface| place(interface).is_some());
    if in_order {
        found.sort_by_key(place);
    }
    let known = |interface: ServerInterface| {
        let port = ports.iter().find(|port| port.id == interface.port_id)?;
        Some(Interface::new(port, interface.tag))
    };
    (found.into_iter().filter_map(known).collect(), in_order)
}

/// A port, if it is there.
async fn port(cloud: &Cloud, id: &str) -> Result<Option<Port>, CloudError> {
    if_there(cloud.port(id).await)
}

/// How often a port is looked at once more, because somebody has changed it since: Nova writes to ports, too.
const CHANGED_MAX: u32 = 5;

/// Gives a port to a device, if it `is_to_go` there, with a name for the DNS if it needs another one; gives back the port as
/// it was seen before.
async fn give(
    cloud: &Cloud,
    id: &str,
    (device, dns_name): (&str, impl Fn(&Port) -> Option<String>),
    is_to_go: impl Fn(&Port) -> bool,
) -> Result<Option<Port>, CloudError> {
    for tried in 1.. {
        let found = port(cloud, id).await?;
        let Some(port) = found.as_ref().filter(|port| is_to_go(port)) else { return Ok(found) };
        match cloud.set_port_device(port, device, dns_name(port).as_deref()).await {
            Err(error) if error.fault == Fault::Conflict && tried < CHANGED_MAX => {}
            done => return done.map(|()| found),
        }
    }
    unreachable!("the last try is given back")
}

/// A port is held.
struct Held<'a> {
    cloud: &'a Cloud,
    interface: &'a Interface,
    /// The server that is to be deleted.
    server: &'a str,
    /// Whether it never ran, or is deleted already: it may never have got it, and keeps nobody from what he did with it.
    has_failed: bool,
    held_by: &'a str,
}

impl Held<'_> {
    fn judge(&self, port: Option<&Port>) -> Look {
        let id = self.interface.port.as_str();
        let Some(port) = port else {
            return match self.has_failed {
                true => Look::Done,
                false => Look::Hopeless(format!("its port {id} is gone: somebody has deleted it")),
            };
        };
        match port.device_id.as_str() {
            device if device == self.held_by => Look::Done,
            device if device == self.server => Look::NotYet("the server's".into()),
            "" if self.has_failed => Look::NotYet("nobody's".into()),
            _ if self.has_failed => Look::Done,
            "" => Look::Hopeless(format!("its port {id} is nobody's: somebody has taken it from the server")),
            other => Look::Hopeless(format!("its port {id} is that of {other} by now")),
        }
    }
}

#[async_trait]
impl Effect for Held<'_> {
    fn wanted(&self) -> String {
        format!("port {} that outlives server {}", self.interface.port, self.server)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        Ok(self.judge(port(self.cloud, &self.interface.port).await?.as_ref()))
    }

    async fn ask(&self) -> Result<(), CloudError> {
        // Of a name that another server's host name is not, Nova makes nothing of the port.
        let no_name = |port: &Port| (!port.dns_name.is_empty()).then(String::new);
        let is_to_go = |port: &Port| matches!(self.judge(Some(port)), Look::NotYet(_));
        give(self.cloud, &self.interface.port, (self.held_by, no_name), is_to_go).await.map(drop)
    }
}

/// A server has a port that was held for it. One that is gone, nobody's or another's the server does without.
struct Given<'a> {
    cloud: &'a Cloud,
    interface: &'a Interface,
    server: &'a str,
    held_by: &'a str,
}

#[async_trait]
impl Effect for Given<'_> {
    fn wanted(&self) -> String {
        format!("port {} that server {} has", self.interface.port, self.server)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let (id, server) = (self.interface.port.as_str(), self.server);
        let Some(port) = port(self.cloud, id).await? else {
            tracing::warn!("port {id} of server {server} is gone: somebody has deleted it");
            return Ok(Look::Done);
        };
        Ok(match port.device_id.as_str() {
            device if device == server => Look::Done,
            device if device == self.held_by => Look::NotYet("held".into()),
            other => {
                tracing::warn!(device = other, "port {id} of server {server} is nobody's, or another's, by now");
                Look::Done
            }
        })
    }

    async fn ask(&self) -> Result<(), CloudError> {
        let Interface { port: id, dns_name, .. } = self.interface;
        let is_held = |port: &Port| port.device_id == self.held_by;
        give(self.cloud, id, (self.server, |_: &Port| dns_name.clone()), is_held).await.map(drop)
    }
}

/// Nova knows of all ports that a server was given: it keeps a list of its own, which it compares with Neutron's from time to
/// time (`heal_instance_info_cache_interval`, one server of a host a minute).
struct Known<'a> {
    cloud: &'a Cloud,
    interfaces: &'a [Interface],
    server: &'a str,
}

#[async_trait]
impl Effect for Known<'_> {
    fn wanted(&self) -> String {
        format!("server {} whose ports Nova knows", self.server)
    }

    async fn look(&self) -> Result<Look, CloudError> {
        let (ports, shown) = futures::try_join!(self.cloud.ports_of(self.server), self.cloud.definition(self.server))?;
        let shown = shown.mac_addresses();
        let given = |port: &&Port| self.interfaces.iter().any(|interface| interface.port == port.id);
        // Of one without an address Nova shows nothing.
        let is_known = |port: &Port| port.fixed_ips.is_empty() || shown.contains(&port.mac_address);
        Ok(match ports.iter().filter(given).find(|port| !is_known(port)) {
            None => Look::Done,
            Some(port) => Look::Working(format!("Neutron's that has port {}, and not yet Nova's", port.id)),
        })
    }
}

/// Lets go of the ports that are held, for a server that is about to be made, and gives back what it is made with: those
/// that are gone, or another's, it does without.
pub(super) async fn free(cloud: &Cloud, planned: &str, remembered: &Remembered) -> Result<Remembered, CloudError> {
    let (held_by, mut with) = (held_by(planned), remembered.clone());
    with.interfaces.clear();
    for interface in &remembered.interfaces {
        let id = interface.port.as_str();
        match give(cloud, id, ("", |_: &Port| None), |port| port.device_id == held_by).await? {
            Some(port) if port.device_id == held_by || port.device_id.is_empty() => {}
            other => {
                let device = other.map(|port| port.device_id);
                tracing::warn!(device, "port {id} is gone, or another's: the server is made without it");
                continue;
            }
        }
        with.interfaces.push(interface.clone());
    }
    Ok(with)
}

/// Holds the ports of a server that was not made after all.
pub(super) async fn hold_again(cloud: &Cloud, planned: &str, remembered: &Remembered) {
    for interface in &remembered.interfaces {
        let id = interface.port.as_str();
        let is_nobodys = |port: &Port| port.device_id.is_empty();
        if let Err(error) = give(cloud, id, (&held_by(planned), |_: &Port| None), is_nobodys).await {
            tracing::warn!(
                error = crate::fleet::chain_text(&error),
                "port {id} is not kept from being given to another"
            );
        }
    }
}

impl Recreate {
    /// No interface but those that were remembered ends with the server, and none of these does.
    pub(super) async fn hold_ports(
        &self,
        operation: &str,
        (server, has_failed): (&str, bool),
        remembered: &Remembered,
    ) -> Result<(), ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        let has = cloud.interfaces(server).await.map_err(|error| self.base.cloud_error(operation, &error))?;
        let is_known = |port: &str| remembered.interfaces.iter().any(|interface| interface.port == port);
        if let Some(stranger) = has.iter().find(|interface| !is_known(&interface.port_id)) {
            let problem = format!("it has the port {} by now, which it had not before", stranger.port_id);
            return Err(self.base.error(operation, problem, Some("take it from the server, or begin anew")));
        }
        let held_by = held_by(&self.id);
        let mut all = Ok(());
        for interface in remembered.interfaces.iter().rev() {
            let held = Held { cloud, interface, server, has_failed, held_by: &held_by };
            all = all.and(self.base.bring_about(operation, &held).await);
            // One that runs again is to know a beginning of its ports; of another one as many are to outlive it as can.
            if all.is_err() && !has_failed {
                break;
            }
        }
        all
    }

    /// The server has its ports: that it was made with them is looked after, and one that was not deleted after all gets
    /// them back.
    pub(super) async fn give_ports(
        &self,
        operation: &str,
        server: &str,
        remembered: &Remembered,
    ) -> Result<(), ProviderError> {
        let (cloud, held_by) = (self.base.cloud(operation).await?, held_by(&self.id));
        let interfaces = remembered.interfaces.as_slice();
        // None is left behind because another one could not be given.
        let mut all = Ok(());
        for interface in interfaces {
            all =
                all.and(self.base.bring_about(operation, &Given { cloud, interface, server, held_by: &held_by }).await);
        }
        all?;
        if interfaces.is_empty() {
            return Ok(());
        }
        self.base.bring_about(operation, &Known { cloud, interfaces, server }).await
    }

    /// What of its ports is left to a person: those that it has no more; and where somebody has started the server while
    /// they were held, the cards that Nova made it without. These only an administrator sees.
    pub(super) async fn missing(
        &self,
        operation: &str,
        server: &str,
        remembered: &Remembered,
    ) -> Result<Vec<String>, ProviderError> {
        let cloud = self.base.cloud(operation).await?;
        let cloud_error = |error: CloudError| self.base.cloud_error(operation, &error);
        let cards = cloud.network_cards(server).await.ok();
        let (mut all, mut cardless) = (Vec::new(), 0);
        for Interface { port: id, .. } in &remembered.interfaces {
            match port(cloud, id).await.map_err(cloud_error)? {
                None => all.push(format!("server {server} has not its port {id}, which is gone")),
                Some(port) if port.device_id != server => {
                    all.push(format!("server {server} has not its port {id}, which is that of {:?}", port.device_id));
                }
                Some(port) => {
                    cardless += usize::from(cards.as_ref().is_some_and(|has| !has.contains(&port.mac_address)))
                }
            }
        }
        if cardless > 0 {
            all.push(format!(
                "server {server} was started while its ports were held, and has not {cardless} of its network cards: \
                 openstack server reboot --hard {server}"
            ));
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn port(mac: &str) -> Port {
        serde_json::from_value(json!({
            "id": format!("port-{mac}"), "device_id": "s", "mac_address": mac, "fixed_ips": [{"ip_address": "192.0.2.7"}],
            "project_id": "p",
        }))
        .unwrap()
    }

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
        let ports = ["a", "b", "c"].map(port);
        let cards = |macs: &[&str]| macs.iter().map(|mac| (*mac).to_owned()).collect::<Vec<_>>();
        let ids = |found: &[Interface]| found.iter().map(|it| it.port.clone()).collect::<Vec<_>>();
        let (all, in_order) = sorted(found(&["a", "b", "c"]), &ports, Some(&cards(&["c", "a", "b"])));
        assert_eq!((ids(&all), in_order), (cards(&["port-c", "port-a", "port-b"]), true));
        assert_eq!(all[2].tag.as_deref(), Some("mgmt"));
        for unknown in [None, Some(cards(&["c", "b"]))] {
            let (all, in_order) = sorted(found(&["a", "b", "c"]), &ports, unknown.as_deref());
            assert_eq!((ids(&all), in_order), (cards(&["port-a", "port-b", "port-c"]), false));
        }
        assert!(sorted(found(&["a"]), &ports, None).1 && sorted(Vec::new(), &ports, None).1);
    }

    #[test]
    fn what_nova_makes_no_server_with_is_told() {
        assert_eq!(unfit(&port("a"), "p"), None);
        assert!(unfit(&port("a"), "q").unwrap().contains("of the project p"));
        let without = Port { fixed_ips: Vec::new(), ..port("a") };
        assert!(unfit(&without, "p").unwrap().contains("port-a has no address"));
        // Old releases do not tell.
        assert_eq!(unfit(&Port { project_id: String::new(), ..port("a") }, "p"), None);
    }
}
