//! What has to be so before a domain is stopped.

use std::path::Path;

use serde_json::Value;

use super::super::Verdict::{self, Error, Ok as Fine, Warning};
use super::super::{Power, Precondition, ProviderError, Side};
use super::blocks::{Device, devices};
use super::virsh::{QUESTION, Virsh};
use super::xml::{Domain, rbd_name, volume_of};
use super::{Libvirt, blocks, name};
use crate::plan::Method;

/// What a saved memory has beside the memory, at most: the devices, the definition.
const SAVE_SPARE: u64 = 256 << 20;

/// The verdicts, as they are found.
struct Found(Vec<Precondition>);

impl Found {
    fn add(&mut self, what: impl Into<String>, verdict: Verdict, found: impl Into<String>) {
        self.0.push(Precondition::new(what, verdict, found));
    }

    fn failed(&mut self, what: impl Into<String>, error: ProviderError) {
        self.0.push(Precondition::failed(what, error));
    }
}

/// The value behind a title in `virsh dominfo`.
pub(super) fn field<'i>(info: &'i str, title: &str) -> Option<&'i str> {
    info.lines().find_map(|line| Some(line.strip_prefix(title)?.strip_prefix(':')?.trim()))
}

/// A size in `virsh dominfo`, in bytes.
pub(super) fn size(info: &str, title: &str) -> Option<u64> {
    field(info, title).and_then(|text| text.strip_suffix(" KiB")?.parse::<u64>().ok()?.checked_mul(1 << 10))
}

/// What memory a domain has, in bytes; `None` where libvirt does not say.
pub(super) async fn memory(virsh: &Virsh) -> Result<Option<u64>, ProviderError> {
    let info = virsh.with_domain("check", "dominfo", &[], QUESTION).await?;
    Ok(size(&info, "Used memory").or_else(|| size(&info, "Max memory")))
}

pub(super) async fn of(libvirt: &Libvirt, from: Side) -> Vec<Precondition> {
    let mut found = Found(Vec::new());
    let what = format!("domain {}", libvirt.virsh.domain);
    if let Err(error) = look(libvirt, from, &what, &mut found).await {
        found.failed(what, error);
    }
    found.0
}

async fn look(libvirt: &Libvirt, from: Side, what: &str, found: &mut Found) -> Result<(), ProviderError> {
    let (virsh, operation) = (&libvirt.virsh, "check");
    let info = virsh.with_domain(operation, "dominfo", &[], QUESTION).await?;
    if field(&info, "Persistent") != Some("yes") {
        found.add(what, Error, "it is transient: libvirt forgets it when it is off; `virsh define` it");
    }
    if field(&info, "Managed save") == Some("yes") {
        let found_there = "libvirt has a managed save of it, which names its old disks: start it and let it go on, or \
                           give that up with `virsh managedsave-remove`";
        found.add(what, Error, found_there);
    }
    let power = virsh.power(operation).await?;
    match power {
        Power::Running => found.add(what, Fine, "it runs"),
        Power::Off | Power::Saved => found.add(what, Warning, "it is off: it will be started at the end"),
        Power::Suspended => found.add(what, Error, "it is paused: `virsh resume` it, or shut it down"),
    }
    let definition = virsh.definition(operation).await?;
    let domain = Domain::read(&definition, &libvirt.disks).map_err(|error| libvirt.xml_error(operation, &error))?;
    definition_found(libvirt, &domain, from, what, found);
    if power == Power::Running {
        let devices = devices(virsh, operation, None).await?;
        match blocks::side(&devices, &libvirt.disks) {
            Some(side) if side == from => {}
            Some(side) => found.add(what, Error, format!("QEMU has its disks on the {} open already", name(side))),
            None => {
                let text = "QEMU has not every volume open, or some here and some there: compare the plan with \
                            `virsh qemu-monitor-command --hmp 'info block'`";
                found.add(what, Error, text);
            }
        }
        if libvirt.method == Method::Hot {
            hot(libvirt, &domain, &devices, what, found).await?;
        }
    }
    if libvirt.method == Method::Warm {
        warm(libvirt, &domain, size(&info, "Max memory"), what, found).await?;
    }
    if libvirt.method == Method::Cold && domain.on_poweroff != "destroy" {
        let text = format!("its on_poweroff is {}: a shutdown would not end it; `virsh edit` it", domain.on_poweroff);
        found.add(what, Error, text);
    }
    Ok(())
}

fn definition_found(libvirt: &Libvirt, domain: &Domain, from: Side, what: &str, found: &mut Found) {
    if !matches!(domain.kind.as_str(), "kvm" | "qemu") {
        found.add(what, Error, format!("its type is {:?}: only kvm and qemu can be moved", domain.kind));
    }
    let named = match domain.by_volume(&libvirt.disks) {
        Ok(named) => named,
        Err(error) => {
            found.add(what, Error, format!("{error}; compare the plan with `virsh dumpxml`"));
            return;
        }
    };
    for (disk, volume) in named.iter().zip(&libvirt.disks) {
        let what = format!("disk {} ({})", disk.device, volume.volume);
        if let Some(more) = disk.more {
            found.add(&what, Error, format!("{} {more}: it can't be moved by libvirt", disk.image));
        }
        if disk.sliced && libvirt.method == Method::Hot {
            found.add(&what, Error, "it is a part of an image (slices): use the method warm");
        }
        if disk.volume.is_some_and(|(_, side)| side != from) {
            let text =
                format!("the definition names {} already, on the {}: `virsh edit` it", disk.image, name(from.other()));
            found.add(&what, Error, text);
        }
    }
    let pools: Vec<&str> = libvirt.disks.iter().filter_map(|disk| disk.on(from).pool()).collect();
    for disk in domain.disks.iter().filter(|disk| disk.volume.is_none()) {
        if disk.image.split('/').next().is_some_and(|pool| pools.contains(&pool)) {
            let text = format!("no volume of this server is {}: it stays there", disk.image);
            found.add(format!("disk {}", disk.device), Warning, text);
        }
    }
}

async fn warm(
    libvirt: &Libvirt,
    domain: &Domain,
    memory: Option<u64>,
    what: &str,
    found: &mut Found,
) -> Result<(), ProviderError> {
    for device in &domain.unsaveable {
        found.add(what, Error, format!("it has {device}, which can't be saved: use the method cold"));
    }
    let uri = libvirt.virsh.call("check", &["uri"], None, QUESTION).await?;
    let folder = &libvirt.config.save_folder;
    let place = format!("save_folder {}", folder.display());
    let verdict = save_folder(uri.trim(), folder);
    if let Some(problem) = verdict {
        found.add(place, Error, problem);
        return Ok(());
    }
    match (free(folder), memory.map(|memory| memory.saturating_add(SAVE_SPARE))) {
        (Some(free), Some(needed)) if free < needed => {
            let text = format!("it has {} MiB free, and the memory needs up to {} MiB", free >> 20, needed >> 20);
            found.add(place, Error, text);
        }
        (Some(free), Some(_)) => found.add(place, Fine, format!("{} MiB are free", free >> 20)),
        _ => found.add(place, Warning, "nobody knows whether there is room for the memory"),
    }
    Ok(())
}

/// What is wrong with the folder in which a domain's memory is saved, and the console of a stand-in is written; `None` if
/// nothing is.
pub(super) fn save_folder(uri: &str, folder: &Path) -> Option<&'static str> {
    if is_remote(uri) {
        Some(
            "libvirt runs on another host, and what it writes has to be read and removed there: run poolshift on that \
             host; a cutover has the methods cold and hot as well",
        )
    } else if !folder.is_absolute() {
        Some("it is no absolute path")
    } else if !folder.is_dir() {
        Some("there is no such folder: make it, for root or libvirt's user alone")
    } else if rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_err() {
        Some("poolshift may not write there: it has to remove what libvirt leaves there")
    } else {
        None
    }
}

/// Whether a URI of libvirt's names another host: `qemu+ssh://host/system`.
fn is_remote(uri: &str) -> bool {
    let host = uri.split_once("://").map_or("", |(_, rest)| rest.split(['/', '?']).next().unwrap_or_default());
    !matches!(host, "" | "localhost" | "127.0.0.1" | "[::1]")
}

fn free(folder: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(folder).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

async fn hot(
    libvirt: &Libvirt,
    domain: &Domain,
    devices: &[Device],
    what: &str,
    found: &mut Found,
) -> Result<(), ProviderError> {
    let (virsh, operation) = (&libvirt.virsh, "check");
    let commands = virsh.qemu(operation, "query-commands", None).await?;
    let named = |list: &Value, wanted: &str| {
        let mut names = list.as_array().into_iter().flatten().filter_map(|entry| entry.get("name")?.as_str());
        names.any(|name| name == wanted)
    };
    if !named(&commands, "blockdev-reopen") {
        found.add(what, Error, "its QEMU is older than 6.1 and has no blockdev-reopen: use the method warm");
        return Ok(());
    }
    let objects = virsh.qemu(operation, "qom-list", Some(serde_json::json!({"path": "/objects"}))).await?;
    for device in devices {
        let Some((index, _)) = volume_of(&libvirt.disks, &device.image) else { continue };
        let what = format!("disk of {}", libvirt.disks[index].volume);
        let auth = domain.disks.iter().any(|disk| disk.auth && disk.volume.is_some_and(|(of, _)| of == index));
        if device.driver != "raw" || device.options.is_none() {
            let text = format!(
                "QEMU has a {} node over {}, and not one of raw: use the method warm",
                device.driver, device.image
            );
            found.add(what, Error, text);
        } else if auth && !device.secret().is_some_and(|secret| named(&objects, &secret)) {
            found.add(what, Error, "its key is not where libvirt puts it in QEMU: use the method warm");
        }
    }
    let live = virsh.with_domain(operation, "dumpxml", &[], QUESTION).await?;
    let live = Domain::read(&live, &libvirt.disks).map_err(|error| libvirt.xml_error(operation, &error))?;
    if live.disks.iter().any(|disk| disk.volume.is_some() && disk.more.is_some()) {
        found.add(what, Error, "libvirt works on one of its disks: see `virsh dumpxml`");
    }
    let targets: Vec<String> = libvirt.disks.iter().filter_map(|disk| rbd_name(&disk.target)).collect();
    let text = format!(
        "libvirt's XML of the running domain will not know of {}, up to its next cold start: until then no save, \
         migration, snapshot or change of its disks with virsh; the method warm has not that price",
        targets.join(", ")
    );
    found.add(what, Warning, text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_libvirt_on_another_host_is_known() {
        for local in ["qemu:///system", "qemu+unix:///session?socket=/a/b", "qemu+tcp://localhost/system", "nonsense"] {
            assert!(!is_remote(local), "{local}");
        }
        for remote in ["qemu+ssh://root@a.example/system", "qemu://h?x=y", "qemu+tls://h:16514/system"] {
            assert!(is_remote(remote), "{remote}");
        }
    }

    #[test]
    fn fields_of_dominfo_are_found() {
        let info = "Max memory:     163840 KiB\nPersistent:     yes\nManaged save:   no\n";
        assert_eq!(field(info, "Managed save"), Some("no"));
        assert_eq!(size(info, "Max memory"), Some(160 << 20));
        assert_eq!(field(info, "Max"), None);
    }
}
