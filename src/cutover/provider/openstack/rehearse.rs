//! A stand-in of a cloud's server: what it takes, and whether it has booted.

use std::ffi::OsStr;
use std::io::Write as _;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::future::try_join_all;

use super::super::rehearse::{Boots, Judgement, Rehearse, Staged, StandIn, check, last_words};
use super::super::{Precondition, ProviderError, ServerDisk, Verdict};
use super::OpenStack;
use super::server::{ACTIVE, told};
use super::stand_in::{CLONE, Parts, REHEARSAL, clone_of};
use crate::openstack::cinder::{Quota, Volume, VolumeType};
use crate::openstack::manage::Backend;
use crate::openstack::nova::{Server, ServerAttachment};
use crate::openstack::{Cloud, CloudError, Fault};
use crate::plan::Holder;

/// How often it is looked at what a stand-in prints.
const POLL: Duration = Duration::from_secs(1);

/// The server that a stand-in stands in for, and the volumes that it has.
type Original = (Server, Vec<ServerAttachment>);

/// The places of the plan's disks in the order in which a server has them, the one that it boots from first. `Err` with
/// what is wrong.
fn order(disks: &[(&str, &ServerDisk)], original: Option<&Original>) -> Result<Vec<usize>, String> {
    let all = 0..disks.len();
    let Some((server, attached)) = original else {
        let root = disks.iter().position(|(_, disk)| disk.boot);
        let root = root.ok_or("the plan does not say which volume it boots from: boot = true")?;
        return Ok([root].into_iter().chain(all.filter(|index| *index != root)).collect());
    };
    let device = |index: usize| {
        let of = attached.iter().find(|found| found.volume == disks[index].0);
        of.and_then(|found| found.device.as_deref()).unwrap_or_default()
    };
    let is_root = |index: usize| server.root_device.as_deref() == Some(device(index));
    if !all.clone().any(is_root) {
        let root = server.root_device.as_deref().unwrap_or("a disk that nobody knows");
        return Err(format!(
            "it boots from {root}, and none of the plan's volumes is that: there is nothing to boot from"
        ));
    }
    let mut order: Vec<usize> = all.collect();
    // vdb comes before vdaa.
    order.sort_by_key(|&index| (!is_root(index), device(index).len(), device(index)));
    Ok(order)
}

/// The host of the backend that a type names, or why there is none.
fn host_of(wanted: &str, types: &[VolumeType], backends: &[Backend]) -> Result<String, String> {
    let found = types.iter().find(|found| found.name == wanted);
    let found = found.ok_or_else(|| format!("there is no volume type {wanted:?}"))?;
    let Some(name) = found.extra_specs.get("volume_backend_name") else {
        return Err(format!(
            "type {wanted:?} names no backend (volume_backend_name), and Cinder takes images of one only"
        ));
    };
    let backend = backends.iter().find(|backend| backend.backend_name == *name);
    let host = backend.map(|backend| backend.host.clone());
    host.ok_or_else(|| format!("Cinder has no backend {name:?}, which type {wanted:?} names: is it up?"))
}

/// For how much of what a project is to have there is no room. `volumes`: of the volumes the size and the type.
fn over_quota<'a>(
    quotas: &'a std::collections::BTreeMap<String, Quota>,
    volumes: &[(u64, &str)],
) -> Vec<(&'a str, i64, Quota)> {
    let needed = |key: &str| {
        let (what, of_type) = key.split_once('_').map_or((key, None), |(what, of_type)| (what, Some(of_type)));
        let counted = volumes.iter().filter(|(_, volume_type)| of_type.is_none_or(|of_type| of_type == *volume_type));
        let each = |size: u64| match what {
            "volumes" => 1,
            "gigabytes" => i64::try_from(size).unwrap_or(i64::MAX),
            _ => 0,
        };
        counted.map(|(size, _)| each(*size)).fold(0, i64::saturating_add)
    };
    let all = quotas.iter().map(|(key, quota)| (key.as_str(), needed(key), *quota));
    all.filter(|(_, needed, quota)| *needed > 0 && !quota.has_room(*needed)).collect()
}

impl OpenStack {
    /// The server that a stand-in stands in for; `None` where no server boots from the volumes.
    async fn original(&self, cloud: &Cloud) -> Result<Option<Original>, CloudError> {
        match &self.config.holder {
            Holder::Server(id) => futures::try_join!(cloud.server(id), cloud.server_attachments(id)).map(Some),
            Holder::Gateway { .. } | Holder::Nobody => Ok(None),
        }
    }

    /// What a stand-in is made of, and what it has not of what its server has. What is wrong goes to `wrong`, and then
    /// there may be no parts.
    async fn parts(
        &self,
        operation: &str,
        stand_in: &StandIn,
        wrong: &mut (dyn FnMut(&str, String) + Send),
    ) -> Result<(Option<Parts>, Vec<String>), ProviderError> {
        let cloud = self.cloud(operation).await?;
        let failed = |error: CloudError| self.cloud_error(operation, &error);
        let original = self.original(cloud).await.map_err(failed)?;
        let what = format!("server {}", self.server);
        let mut lacks =
            vec!["it is on no network, and has neither the key pair nor the user data of the server".to_owned()];
        if let Some((server, attached)) = &original {
            if server.boots_from_image() {
                wrong(&what, "it boots from a disk of its own, no volume: there is nothing to clone".into());
            }
            let is_planned = |id: &str| self.volumes.iter().any(|volume| volume.cinder.volume == id);
            let others: Vec<&str> =
                attached.iter().map(|found| found.volume.as_str()).filter(|id| !is_planned(id)).collect();
            if !others.is_empty() {
                lacks.push(format!("it has not the volumes that the plan has not: {}", others.join(", ")));
            }
        }
        let own = || original.as_ref().map(|(server, _)| server.flavor.original_name.clone());
        let name = self.config.rehearsal.flavor.clone().or_else(own).unwrap_or_default();
        let flavor = cloud.find_flavor(&name).await.map_err(failed)?;
        if flavor.is_none() {
            wrong(&what, format!("there is no flavor {name:?} (any more): name one, rehearsal = {{ flavor = \"…\" }}"));
        }
        let ids = self.volumes.iter().map(|volume| volume.cinder.volume.as_str());
        let disks: Vec<(&str, &ServerDisk)> = ids.zip(&stand_in.disks).collect();
        let order = order(&disks, original.as_ref()).map_err(|problem| wrong(&what, problem)).ok();
        let (types, backends) = futures::try_join!(cloud.volume_types(), cloud.backends()).map_err(failed)?;
        let mut hosts = Vec::new();
        for volume in &self.volumes {
            let host = host_of(&volume.cinder.to_type, &types, &backends);
            hosts.extend(host.map_err(|problem| wrong(&format!("volume {}", volume.cinder.volume), problem)).ok());
        }
        let is_whole = hosts.len() == self.volumes.len();
        let parts = flavor.zip(order).filter(|_| is_whole).map(|(flavor, order)| Parts { flavor, order, hosts });
        Ok((parts, lacks))
    }

    async fn look_at_stage(&self, stand_in: &StandIn, found: &mut Vec<Precondition>) -> Result<(), ProviderError> {
        let operation = "check";
        let cloud = self.cloud(operation).await?;
        let failed = |error: CloudError| self.cloud_error(operation, &error);
        let mut wrong = |what: &str, text: String| found.push(Precondition::new(what, Verdict::Error, text));
        self.look_for_remains(cloud, stand_in, &mut wrong).await.map_err(failed)?;
        let judge = &self.config.rehearsal;
        if judge.console.is_none() && judge.check.is_none() {
            let text = "nothing would say whether its stand-in has booted: give it rehearsal = { console = \"login:\" } \
                        in the plan, or a check";
            wrong(&format!("server {}", self.server), text.to_owned());
        }
        self.parts(operation, stand_in, &mut wrong).await?;
        let show = self.volumes.iter().map(|volume| cloud.volume(&volume.cinder.volume));
        let shown: Vec<Volume> = try_join_all(show).await.map_err(failed)?;
        for volume in shown.iter().filter(|volume| volume.encrypted) {
            wrong(
                &format!("volume {}", volume.id),
                "it is encrypted by Cinder, which takes no clone of such a one".into(),
            );
        }
        let project = cloud.project().await.map_err(failed)?;
        let quotas = cloud.quotas(&project).await.map_err(failed)?;
        let types = self.volumes.iter().map(|volume| volume.cinder.to_type.as_str());
        let sizes: Vec<(u64, &str)> = shown.iter().map(|volume| volume.size).zip(types).collect();
        for (key, needed, Quota { limit, in_use, reserved }) in over_quota(&quotas, &sizes) {
            let text = format!(
                "its volumes are {needed} {key} for as long as it is there, and the project of the credentials has {} of \
                 {limit}: raise that",
                in_use.saturating_add(reserved)
            );
            wrong(&format!("quota of project {project}"), text);
        }
        Ok(())
    }

    /// What is left of a rehearsal whose clones are gone: by their names and poolshift's mark.
    async fn look_for_remains(
        &self,
        cloud: &Cloud,
        stand_in: &StandIn,
        wrong: &mut (dyn FnMut(&str, String) + Send),
    ) -> Result<(), CloudError> {
        let first = stand_in.disks.first().map(clone_of);
        for server in cloud.servers_named(&stand_in.name).await? {
            let is_of_these = server.metadata.get(CLONE).map(String::as_str) == first;
            if let Some(id) = server.metadata.get(REHEARSAL).filter(|_| is_of_these) {
                let text =
                    format!("it is of rehearsal {id}, whose clones are gone: openstack server delete {}", server.id);
                wrong(&format!("server {}", server.name), text);
            }
        }
        for disk in &stand_in.disks {
            for volume in cloud.volumes_named(clone_of(disk)).await? {
                if let Some(id) = volume.metadata.get(REHEARSAL) {
                    let cure = format!("cinder unmanage {}", volume.id);
                    let text = format!("it is {}, of rehearsal {id}, whose clone is gone: {cure}", volume.status);
                    wrong(&format!("volume {}", volume.name), text);
                }
            }
        }
        Ok(())
    }

    /// What the stand-in has printed; nothing where Nova has nothing yet.
    async fn console_of(&self, cloud: &Cloud, server: &str) -> Result<String, CloudError> {
        match cloud.console_output(server).await {
            Err(error) if error.is_passing() || matches!(error.fault, Fault::NotFound | Fault::Conflict) => {
                tracing::debug!("{}", crate::fleet::chain_text(&error));
                Ok(String::new())
            }
            shown => shown,
        }
    }

    /// Waits until it has booted, as far as the plan has something to see that by. With its id and what it has printed, by
    /// what it is known; `Err` with why not.
    async fn booted(
        &self,
        operation: &str,
        stand_in: &StandIn,
    ) -> Result<Result<(String, String, Option<String>), String>, ProviderError> {
        let (cloud, begun) = (self.cloud(operation).await?, Instant::now());
        loop {
            let Some(server) = self.stand_in_server(operation, stand_in).await? else {
                return Ok(Err("it is not there any more".into()));
            };
            // After the look at the server: what it printed before it ended is seen.
            let console = self.console_of(cloud, &server.id).await;
            let console = console.map_err(|error| self.cloud_error(operation, &error))?;
            let after = format!("after {:.1} s", begun.elapsed().as_secs_f64());
            match &self.config.rehearsal.console {
                None => return Ok(Ok((server.id, console, None))),
                Some(text) if console.contains(text.as_str()) => {
                    return Ok(Ok((server.id, console, Some(format!("its console showed {text:?} {after}")))));
                }
                Some(_) => {}
            }
            if server.status != ACTIVE {
                let words = last_words(console.as_bytes());
                return Ok(Err(format!("it is {} {after}, and did not come up{words}", told(&server))));
            }
            if begun.elapsed() >= self.config.limit {
                let (limit, words) = (self.config.limit, last_words(console.as_bytes()));
                let cure = "raise the limit in the plan if it is slow";
                return Ok(Err(format!("it did not come up within {limit:?} ({cure}){words}")));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn run_check(
        &self,
        script: &str,
        stand_in: &StandIn,
        (id, console): (&str, &str),
    ) -> Result<Judgement, ProviderError> {
        let written = tempfile::NamedTempFile::with_prefix("poolshift-console-").and_then(|mut file| {
            file.write_all(console.as_bytes())?;
            Ok(file)
        });
        let file = written.map_err(|error| {
            let problem = format!("its console can't be written to {}: {error}", std::env::temp_dir().display());
            self.error("rehearsal", problem, None)
        })?;
        let more = [("POOLSHIFT_STAND_IN", OsStr::new(id))];
        let renamed = self.as_renamed("rehearsal", stand_in).await?;
        Ok(check(script, &renamed, (file.path(), &more), self.config.limit).await)
    }
}

#[async_trait]
impl Rehearse for OpenStack {
    fn boots(&self) -> Boots {
        match &self.config.holder {
            Holder::Server(_) => Boots::Provider,
            Holder::Gateway { .. } | Holder::Nobody if self.config.rehearsal.flavor.is_some() => Boots::Provider,
            Holder::Gateway { .. } | Holder::Nobody => Boots::Person,
        }
    }

    fn strikes_from_anywhere(&self) -> bool {
        true
    }

    fn renames_clones(&self) -> bool {
        true
    }

    fn rehearsal_limit(&self) -> Duration {
        // Volumes, their image metadata, a server, its boot, and its check.
        self.config.limit * 5
    }

    async fn rehearsal_preconditions(&self, stand_in: &StandIn) -> Vec<Precondition> {
        if self.boots() == Boots::Person {
            return Vec::new();
        }
        let mut found = Vec::new();
        if let Err(error) = self.look_at_stage(stand_in, &mut found).await {
            found.push(Precondition::failed(error.server.clone(), error));
        }
        found
    }

    async fn staged(&self, stand_in: &StandIn) -> Result<Option<Staged>, ProviderError> {
        let found = self.stand_in_server("look for a stand-in", stand_in).await?;
        Ok(found.map(|_| Staged { id: Some(stand_in.id.clone()) }))
    }

    async fn stage(&self, stand_in: &StandIn) -> Result<Vec<String>, ProviderError> {
        if self.boots() == Boots::Person {
            self.stand_in_is_complete.store(true, Ordering::Relaxed);
            return Ok(Vec::new());
        }
        let (operation, mut problems) = ("start its stand-in", Vec::new());
        let mut wrong = |what: &str, text: String| problems.push(format!("{what}: {text}"));
        let (parts, lacks) = self.parts(operation, stand_in, &mut wrong).await?;
        let parts = parts.ok_or_else(|| self.error(operation, problems.join("; "), None))?;
        self.make_stand_in(operation, stand_in, &parts).await?;
        Ok(lacks)
    }

    async fn judge(&self, stand_in: &StandIn) -> Result<Judgement, ProviderError> {
        if self.boots() == Boots::Person {
            return Ok(Judgement::Unknown);
        }
        let operation = "rehearsal";
        let (id, console, mut found) = match self.booted(operation, stand_in).await? {
            Ok(booted) => booted,
            Err(problem) => return Ok(Judgement::NotWell(problem)),
        };
        if let Some(script) = &self.config.rehearsal.check {
            match self.run_check(script, stand_in, (&id, &console)).await? {
                Judgement::Well(said) => found = Some(found.map_or(said.clone(), |found| format!("{found}; {said}"))),
                other => return Ok(other),
            }
        }
        Ok(match self.stand_in_server(operation, stand_in).await? {
            Some(server) if server.status == ACTIVE => Judgement::Well(found.unwrap_or_default()),
            Some(server) => {
                Judgement::NotWell(format!("it is {} in the end{}", told(&server), last_words(console.as_bytes())))
            }
            None => Judgement::NotWell("it is not there any more in the end".into()),
        })
    }

    async fn strike(&self, stand_in: &StandIn) -> Result<(), ProviderError> {
        // Also where nobody boots one by the plan: it may have had another flavor, or one at all, before.
        self.remove_stand_in("remove its stand-in", stand_in).await
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn disk(boot: bool) -> ServerDisk {
        let spec = |text: &str| text.parse().unwrap();
        ServerDisk { volume: "v".into(), source: spec("rbd:a/v"), target: spec("rbd:b/v"), target_in_use: None, boot }
    }

    #[test]
    fn a_stand_in_has_its_disks_as_its_server_has_them() {
        let (root, data) = (disk(true), disk(false));
        let attached = |volume: &str, device: &str| {
            serde_json::from_value::<ServerAttachment>(json!({"volumeId": volume, "device": device})).unwrap()
        };
        let server: Server = serde_json::from_value(
            json!({"id": "s", "status": "ACTIVE", "OS-EXT-SRV-ATTR:root_device_name": "/dev/vda"}),
        )
        .unwrap();
        let all = vec![attached("c", "/dev/vdaa"), attached("r", "/dev/vda"), attached("b", "/dev/vdb")];
        let original = (server, all);
        let disks = [("c", &data), ("b", &data), ("r", &data)];
        assert_eq!(order(&disks, Some(&original)), Ok(vec![2, 1, 0]));
        assert!(order(&disks[..2], Some(&original)).unwrap_err().contains("it boots from /dev/vda"));
        // Of a server to be the plan knows.
        assert_eq!(order(&[("c", &data), ("r", &root), ("b", &data)], None), Ok(vec![1, 0, 2]));
        assert!(order(&disks, None).unwrap_err().contains("boot = true"));
    }

    #[test]
    fn a_type_leads_to_a_backend() {
        let of = |specs: serde_json::Value| {
            serde_json::from_value::<VolumeType>(json!({"id": "1", "name": "sas", "extra_specs": specs})).unwrap()
        };
        let backend =
            |host: &str, name: &str| Backend { host: host.into(), backend_name: name.into(), ..Backend::default() };
        let backends = [backend("vm@sata#sata", "sata"), backend("vm@sas#fast", "fast")];
        let named = |types: &[VolumeType]| host_of("sas", types, &backends);
        assert_eq!(named(&[of(json!({"volume_backend_name": "fast"}))]), Ok("vm@sas#fast".into()));
        assert!(named(&[of(json!({"volume_backend_name": "slow"}))]).unwrap_err().contains("no backend \"slow\""));
        assert!(named(&[of(json!({}))]).unwrap_err().contains("names no backend"));
        assert!(named(&[]).unwrap_err().contains("no volume type \"sas\""));
    }

    #[test]
    fn a_quota_is_looked_at_for_all_types_and_for_each() {
        let quota = |limit| Quota { limit, in_use: 5, reserved: 1 };
        let quotas = [
            ("volumes", 8),
            ("gigabytes", 100),
            ("volumes_sas", 7),
            ("gigabytes_sas", -1),
            ("gigabytes_sata", 0),
            ("snapshots", 0),
            ("per_volume_gigabytes", 1),
        ];
        let quotas = quotas.into_iter().map(|(key, limit)| (key.to_owned(), quota(limit))).collect();
        let over = |volumes: &[(u64, &str)]| -> Vec<(String, i64)> {
            over_quota(&quotas, volumes).into_iter().map(|(key, needed, _)| (key.to_owned(), needed)).collect()
        };
        assert_eq!(over(&[(10, "sas")]), []);
        assert_eq!(over(&[(10, "sas"), (20, "sas")]), [("volumes_sas".into(), 2)]);
        assert_eq!(over(&[(94, "ssd")]), []);
        assert_eq!(over(&[(95, "ssd")]), [("gigabytes".into(), 95)]);
    }
}
