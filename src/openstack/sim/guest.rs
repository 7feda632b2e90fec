//! What a running server does with its volumes: it has their images open, and writes to them.

use std::collections::BTreeMap;

use super::state::State;
use crate::image::Point;
use crate::image::memory::MemoryImage;

/// The address from which a server's guest has its images open, as Ceph shows it.
fn address(server: &str) -> String {
    format!("10.0.0.1:0/{}", &server[..8])
}

impl State {
    /// The guest opens the image that it was told for a volume, and writes to it; it must hold all that was written to the
    /// volume, and accept the write. `false` if there is no such image.
    pub(super) fn open(&mut self, server: &str, volume: &str) -> bool {
        let Some(found) = self.volume(volume) else { return false };
        let told = found.records.iter().find(|record| record.server == server).and_then(|record| record.image.clone());
        let told = told.unwrap_or_default();
        let Some((pool, name)) = told.split_once('/') else { return false };
        let Some(image) = self.pools.find(pool, name) else { return false };
        if image.bytes_at(&Point::Head).as_ref() != Some(&found.acknowledged) {
            let what = format!("server {server} opens {pool}/{name}, which lacks what was written to volume {volume}");
            self.violate(what);
        }
        image.open_as_server(&address(server));
        let volume = volume.to_owned();
        if let Some(server) = self.server_mut(server) {
            server.open.retain(|(opened, _)| *opened != volume);
            server.open.push((volume.clone(), image.clone()));
        }
        if !self.write_to(server, &volume, &image) {
            self.violate(format!("server {server} opens {told:?}, to which it may not write"));
        }
        true
    }

    /// The guest closes the image of a volume, with all that it has in its cache written.
    pub(super) fn close(&mut self, server: &str, volume: &str) {
        let Some(found) = self.server_mut(server) else { return };
        let Some(at) = found.open.iter().position(|(opened, _)| opened == volume) else { return };
        let (_, image) = found.open.swap_remove(at);
        self.write_to(server, volume, &image);
        image.close_as_server(&address(server));
    }

    /// The guest closes all of its images.
    pub(super) fn close_all(&mut self, server: &str) {
        let open = self.server(server).map(|server| server.open.clone()).unwrap_or_default();
        open.iter().for_each(|(volume, _)| self.close(server, volume));
    }

    /// Every server that has images open writes to them. What is refused was not acknowledged.
    pub(super) fn write(&mut self) {
        let all = self.servers.iter().flat_map(|server| {
            server.open.iter().map(|(volume, image)| (server.id.clone(), volume.clone(), image.clone()))
        });
        for (server, volume, image) in all.collect::<Vec<_>>() {
            self.write_to(&server, &volume, &image);
        }
    }

    /// Whether the write was accepted.
    fn write_to(&mut self, server: &str, volume: &str, image: &MemoryImage) -> bool {
        self.counter = self.counter.wrapping_add(1).max(1);
        let Some(found) = self.volumes.iter_mut().find(|found| found.id == volume) else { return false };
        let size = found.acknowledged.len();
        let (at, length) = (fastrand::usize(..size - 64), fastrand::usize(1..64));
        let data = vec![self.counter; length];
        let accepted = image.write_at_server(&address(server), at as u64, &data).is_ok();
        if accepted {
            found.acknowledged[at..at + length].copy_from_slice(&data);
        }
        accepted
    }

    /// What is wrong with a server that is to run from these images, by volume; and how it has its volumes.
    pub(super) fn judge_server(
        &self,
        id: &str,
        images: &BTreeMap<String, String>,
    ) -> Result<Vec<(String, String, bool)>, String> {
        let server = self.server(id).ok_or("it has gone")?;
        let state = (server.status, server.task, server.power, server.host, server.locked.is_some());
        if state != ("ACTIVE", None, 1, Some("vm"), false) {
            return Err(format!("it is {state:?}"));
        }
        for (volume, wanted) in images {
            let open = server.open.iter().find(|(opened, _)| opened == volume).map(|(_, image)| image);
            let (pool, name) = wanted.split_once('/').ok_or("no image")?;
            let there = self.pools.find(pool, name).ok_or_else(|| format!("there is no {wanted}"))?;
            if !open.is_some_and(|open| open.is_same(&there)) {
                return Err(format!("it has not {wanted} open for volume {volume}"));
            }
        }
        let has = server.mappings.iter();
        Ok(has.map(|one| (one.volume.clone(), one.device.clone(), one.delete_on_termination)).collect())
    }
}
