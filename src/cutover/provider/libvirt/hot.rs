//! Suspended, and its disks opened anew below it.

use serde_json::json;

use super::super::{Power, ProviderError, Side};
use super::blocks::{devices, node_of, nodes};
use super::virsh::QUESTION;
use super::xml::{Domain, rbd_name, volume_of};
use super::{Libvirt, name};

impl Libvirt {
    /// Has the domain stand still. QEMU flushes its disks for it.
    pub(super) async fn suspend(&self) -> Result<(), ProviderError> {
        let operation = "suspend";
        if self.virsh.power_at_rest(operation, self.config.limit).await? != Power::Running {
            return Ok(());
        }
        match self.virsh.with_domain(operation, "suspend", &[], self.config.limit).await {
            Err(_) if self.virsh.power(operation).await? != Power::Running => Ok(()),
            other => other.map(drop),
        }
    }

    /// Opens the images on `to` below the suspended domain, all at once, and closes those on the other side.
    pub(super) async fn reopen(&self, operation: &str, to: Side) -> Result<(), ProviderError> {
        // Discards are all that QEMU does not tell of, and they are the same on both sides.
        let live = self.virsh.with_domain(operation, "dumpxml", &[], QUESTION).await?;
        let live = Domain::read(&live, &self.disks).map_err(|error| self.xml_error(operation, &error))?;
        let open = nodes(&self.virsh, operation).await?;
        let mut added = Vec::new();
        let reopened = self.open_and_switch(operation, to, &live, &open, &mut added).await;
        if reopened.is_err() {
            for node in &added {
                // Why it was not switched is what counts.
                let _ = self.virsh.qemu(operation, "blockdev-del", Some(json!({"node-name": node}))).await;
            }
        }
        reopened?;
        self.close(operation, to).await
    }

    async fn open_and_switch(
        &self,
        operation: &str,
        to: Side,
        live: &Domain,
        open: &[(String, String)],
        added: &mut Vec<String>,
    ) -> Result<(), ProviderError> {
        let mut switches = Vec::new();
        for device in devices(&self.virsh, operation).await? {
            let Some((index, side)) = volume_of(&self.disks, &device.image) else { continue };
            if side == to {
                continue;
            }
            let volume = &self.disks[index];
            let described = live.disks.iter().find(|disk| disk.volume.is_some_and(|(of, _)| of == index));
            let (Some(described), Some(image)) = (described, rbd_name(volume.on(to))) else {
                return Err(self.virsh.error(operation, format!("no disk of it is volume {}", volume.volume), None));
            };
            let node = node_of(&image);
            // One that an interrupted swap has left there may have cached what has changed since.
            for (left, _) in open.iter().filter(|(_, of)| *of == image) {
                self.virsh.qemu(operation, "blockdev-del", Some(json!({"node-name": left}))).await?;
            }
            let Some(opening) = device.opening(&image, &node, described.auth, described.discard) else {
                let problem = format!("QEMU has {} open in a way that poolshift doesn't know", device.image);
                return Err(self.virsh.error(operation, problem, Some("use the method warm")));
            };
            self.virsh.qemu(operation, "blockdev-add", Some(opening)).await?;
            switches.push(device.reopening(&node, described.discard));
            added.push(node);
        }
        // All disks in one transaction: there is no moment with one here and one there.
        self.virsh.qemu(operation, "blockdev-reopen", Some(json!({ "options": switches }))).await.map(drop)
    }

    /// Closes what is still open of the images on the side that is not `to`.
    pub(super) async fn close(&self, operation: &str, to: Side) -> Result<(), ProviderError> {
        for (node, image) in nodes(&self.virsh, operation).await? {
            if volume_of(&self.disks, &image).is_some_and(|(_, side)| side != to) {
                self.virsh.qemu(operation, "blockdev-del", Some(json!({"node-name": node}))).await?;
            }
        }
        Ok(())
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
