//! Suspended, and its disks opened anew below it.

use serde_json::{Value, json};

use super::super::run::also;
use super::super::{Power, ProviderError, Side};
use super::blocks::{Node, new_node, nodes, nodes_question};
use super::look::Look;
use super::virsh::{QUESTION, Said};
use super::xml::{Domain, rbd_name, volume_of};
use super::{Libvirt, name};
use crate::failpoint::failpoint;

/// What closes a node.
fn deletion((node, _): &Node) -> (&'static str, Value) {
    ("blockdev-del", json!({"node-name": node}))
}

impl Libvirt {
    /// Has the domain stand still. QEMU flushes its disks for it.
    pub(super) async fn suspend(&self) -> Result<(), ProviderError> {
        let operation = "suspend";
        match self.virsh.with_domain(operation, "suspend", &[], self.config.limit).await {
            // It stands still already, or is off.
            Err(_) if self.virsh.power_at_rest(operation, self.config.limit).await? != Power::Running => Ok(()),
            other => other.map(drop),
        }
    }

    /// What has to be known beside the domain's state to have its disks opened anew.
    pub(super) fn disk_questions(&self) -> Vec<Said> {
        let (nodes, arguments) = nodes_question();
        vec![self.virsh.say("dumpxml", &[]), self.virsh.say_to_qemu(nodes, arguments)]
    }

    /// Opens the images on `to` below the suspended domain, all at once, and closes those on the other side.
    pub(super) async fn reopen(&self, operation: &str, to: Side, look: &Look) -> Result<(), ProviderError> {
        // Discards are all that QEMU does not tell of, and they are the same on both sides.
        let live = match look.more(0) {
            Some(live) => live.to_owned(),
            None => self.virsh.with_domain(operation, "dumpxml", &[], QUESTION).await?,
        };
        let live = Domain::read(&live, &self.disks).map_err(|error| self.xml_error(operation, &error))?;
        let open = nodes(&self.virsh, operation, look.more(1)).await?;
        let (mut added, mut orders, mut adding, mut switches) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for device in &look.devices {
            let Some((index, side)) = volume_of(&self.disks, &device.image) else { continue };
            if side == to {
                continue;
            }
            let volume = &self.disks[index];
            let described = live.disks.iter().find(|disk| disk.volume.is_some_and(|(of, _)| of == index));
            let (Some(described), Some(image)) = (described, rbd_name(volume.on(to))) else {
                return Err(self.virsh.error(operation, format!("no disk of it is volume {}", volume.volume), None));
            };
            // One that an interrupted swap has left there may have cached what has changed since.
            orders.extend(open.iter().filter(|(_, of)| *of == image).map(deletion));
            let node = new_node();
            let Some(opening) = device.opening(&image, &node, described.auth, described.discard) else {
                let problem = format!("QEMU has {} open in a way that poolshift doesn't know", device.image);
                return Err(self.virsh.error(operation, problem, Some("use the method warm")));
            };
            adding.push(("blockdev-add", opening));
            switches.push(device.reopening(&node, described.discard));
            added.push((node, image));
        }
        orders.extend(adding);
        // All disks in one transaction: there is no moment with one here and one there. An image that could not be opened
        // has no node, and without it nothing is switched; and while nothing is, QEMU closes none of what is in use.
        let switch = orders.len();
        orders.push(("blockdev-reopen", json!({ "options": switches })));
        orders.extend(open.iter().filter(|(_, image)| self.side_of(image) == Some(to.other())).map(deletion));
        let done = self.order(operation, orders).await;
        failpoint!("libvirt.reopened");
        if !done.as_ref().is_ok_and(|done| done[switch].is_ok()) {
            // Why it was not switched is what counts.
            let _ = self.order(operation, added.iter().map(deletion).collect()).await;
        }
        done?.into_iter().collect()
    }

    fn side_of(&self, image: &str) -> Option<Side> {
        volume_of(&self.disks, image).map(|(_, side)| side)
    }

    /// Has QEMU do one after the other, each whatever became of those before it.
    async fn order(
        &self,
        operation: &str,
        orders: Vec<(&'static str, Value)>,
    ) -> Result<Vec<Result<(), ProviderError>>, ProviderError> {
        let said: Vec<_> =
            orders.iter().map(|(execute, with)| self.virsh.say_to_qemu(execute, Some(with.clone()))).collect();
        let answers = self.virsh.batch(operation, &said, QUESTION).await?;
        let done = |(index, (execute, _)): (usize, &(&str, Value))| match answers.get(index) {
            Some(answer) => self.virsh.qemu_said(operation, execute, answer).map(drop),
            None => {
                let problem = format!("QEMU's {execute}: it was not answered{}", also(&answers.error));
                Err(self.virsh.error(operation, problem, None))
            }
        };
        Ok(orders.iter().enumerate().map(done).collect())
    }

    /// Closes what is still open of the images on the side that is not `to`.
    pub(super) async fn close(&self, operation: &str, to: Side) -> Result<(), ProviderError> {
        let open = nodes(&self.virsh, operation, None).await?;
        let left = open.iter().filter(|(_, image)| self.side_of(image) == Some(to.other())).map(deletion).collect();
        self.order(operation, left).await?.into_iter().collect()
    }

    /// What a person must know of a domain whose XML names disks that it does not have.
    pub(super) fn stale(&self, on: Side) -> String {
        let domain = &self.virsh.domain;
        let images: Vec<String> = self.disks.iter().filter_map(|disk| rbd_name(disk.on(on))).collect();
        format!(
            "domain {domain} runs from {}, but libvirt's XML of the running domain still names the disks that it left, \
             until it was shut down and started (a reboot from inside is not enough). Until then don't save, \
             migrate or snapshot it, and don't change its disks with virsh: libvirt would look for them on the {}. \
             Cold starts are right already; `virsh shutdown {domain}` and `virsh start {domain}` put the rest right",
            images.join(", "),
            name(on.other()),
        )
    }
}
