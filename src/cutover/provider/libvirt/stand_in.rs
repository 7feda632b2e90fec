//! The definition of a domain's stand-in: the domain's own, with its disks on the clones, and without whatever it would
//! share with the domain: its name, its network, the host's devices, files and sockets.

use std::ops::Range;
use std::path::Path;

use roxmltree::Node;

use super::xml::{XmlError, child, escaped, parse, rbd_name, volume_of};
use crate::cutover::provider::ServerDisk;

/// The agent's channel, as libvirt makes it when nobody says where its socket is.
const AGENT: &str = "org.qemu.guest_agent.0";

/// What a stand-in is to be.
pub(super) struct Wanted<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// The server's volumes.
    pub(super) disks: &'a [ServerDisk],
    /// The same, with the clones as their targets.
    pub(super) clones: &'a [ServerDisk],
    /// The network that it is on; none, and its cards have no link.
    pub(super) network: Option<&'a str>,
    /// Where its serial console is written to.
    pub(super) console: &'a Path,
}

/// A stand-in's definition.
#[derive(Debug)]
pub(super) struct Definition {
    pub(super) xml: String,
    /// What the domain has and it has not, for people.
    pub(super) lacks: Vec<String>,
    /// Whether a guest agent may answer.
    pub(super) has_agent: bool,
}

struct Edits<'x> {
    xml: &'x str,
    /// What stands instead of what; in any order, none within another.
    edits: Vec<(Range<usize>, String)>,
    lacks: Vec<String>,
}

impl<'x> Edits<'x> {
    fn replace(&mut self, node: Node<'_, '_>, with: impl Into<String>) {
        self.edits.push((node.range(), with.into()));
    }

    fn remove(&mut self, node: Node<'_, '_>) {
        self.replace(node, "");
    }

    fn lacks(&mut self, node: Node<'_, '_>, what: String) {
        self.remove(node);
        self.lacks.push(format!("it has not {what}"));
    }

    /// The children of a node with these names, as they stand.
    fn kept(&self, node: Node<'_, '_>, names: &[&str]) -> String {
        let kept = node.children().filter(|child| child.is_element() && names.contains(&child.tag_name().name()));
        kept.map(|child| &self.xml[child.range()]).collect()
    }

    fn applied(mut self) -> String {
        self.edits.sort_by_key(|(at, _)| at.start);
        let (mut text, mut done) = (String::with_capacity(self.xml.len()), 0);
        for (at, with) in &self.edits {
            text.push_str(&self.xml[done..at.start]);
            text.push_str(with);
            done = at.end;
        }
        text.push_str(&self.xml[done..]);
        text
    }
}

/// The stand-in of the domain with this definition.
pub(super) fn definition(xml: &str, wanted: &Wanted<'_>) -> Result<Definition, XmlError> {
    let document = parse(xml)?;
    let root = document.root_element();
    let mut edits = Edits { xml, edits: Vec::new(), lacks: Vec::new() };
    let damaged = |what: &str| XmlError::Damaged(what.to_owned());
    let name = child(root, "name").ok_or_else(|| damaged("it has no name"))?;
    let devices = child(root, "devices").ok_or_else(|| damaged("it has no devices"))?;
    edits.replace(name, format!("<name>{}</name>", escaped(wanted.name)));
    // Both are libvirt's to choose: nothing may take the stand-in for the domain.
    for node in root.children().filter(|node| node.has_tag_name("uuid") || node.has_tag_name("genid")) {
        let with = if node.has_tag_name("genid") { "<genid/>" } else { "" };
        edits.replace(node, with);
    }
    if let Some(nvram) = child(root, "os").and_then(|os| child(os, "nvram")) {
        match nvram.attribute("template") {
            Some(template) => edits.replace(nvram, format!("<nvram template='{}'/>", escaped(template))),
            None => edits.remove(nvram),
        }
        edits.lacks.push("its UEFI variables are new ones, not the domain's".into());
    }
    let mut found = vec![false; wanted.disks.len()];
    let (mut has_console, mut has_agent) = (false, false);
    let has_serial = child(devices, "serial").is_some();
    for device in devices.children().filter(|node| node.is_element()) {
        match device.tag_name().name() {
            "disk" => disk(device, wanted, &mut edits, &mut found),
            "interface" => {
                let kept = edits.kept(device, &["mac", "model", "driver", "address", "mtu", "boot"]);
                edits.replace(device, interface(&kept, wanted.network));
            }
            // libvirt adds a console for the first serial port.
            "console" if has_serial => edits.remove(device),
            "serial" | "console" if has_console => edits.remove(device),
            kind @ ("serial" | "console") => {
                has_console = true;
                let (kept, path) = (edits.kept(device, &["target", "address"]), text(wanted.console)?);
                let console = format!("<{kind} type='file'><source path='{path}' append='off'/>{kept}</{kind}>");
                edits.replace(device, console);
            }
            "channel" => {
                let target = child(device, "target").and_then(|target| target.attribute("name"));
                if target == Some(AGENT) && !has_agent {
                    has_agent = true;
                    let kept = edits.kept(device, &["target", "address"]);
                    edits.replace(device, format!("<channel type='unix'>{kept}</channel>"));
                } else {
                    edits.remove(device);
                }
            }
            // Its screen's port, or socket, is the domain's.
            "graphics" | "redirdev" | "redirfilter" | "smartcard" | "parallel" | "vsock" | "audio" | "sound" => {
                edits.remove(device);
            }
            "hostdev" => edits.lacks(device, "the device of the host that the domain has".into()),
            "filesystem" => edits.lacks(device, "the folder of the host that the domain has".into()),
            "shmem" => edits.lacks(device, "the domain's shared memory".into()),
            "lease" => edits.remove(device),
            "tpm" => edits.lacks(device, "a TPM".into()),
            _ => {}
        }
    }
    if !has_console {
        let end = devices.range().end - "</devices>".len();
        let console = format!("<serial type='file'><source path='{}' append='off'/></serial>", text(wanted.console)?);
        edits.edits.push((end..end, console));
    }
    if let Some(at) = found.iter().position(|found| !found) {
        let disk = &wanted.disks[at];
        let image = |spec| rbd_name(spec).ok_or_else(|| XmlError::NoRbd(disk.volume.clone()));
        let (source_image, target_image) = (image(&disk.source)?, image(&disk.target)?);
        return Err(XmlError::Missing { volume: disk.volume.clone(), source_image, target_image });
    }
    let lacks = std::mem::take(&mut edits.lacks);
    Ok(Definition { xml: edits.applied(), lacks, has_agent })
}

fn text(path: &Path) -> Result<String, XmlError> {
    path.to_str().map(escaped).ok_or_else(|| XmlError::Damaged(format!("{} is no plain text", path.display())))
}

/// A volume's disk goes to its clone. Another one that can be written stays away: the domain writes it.
fn disk(device: Node<'_, '_>, wanted: &Wanted<'_>, edits: &mut Edits<'_>, found: &mut [bool]) {
    let source = child(device, "source");
    let name = source.filter(|source| source.attribute("protocol") == Some("rbd")).and_then(|source| {
        let name = source.attribute_node("name")?;
        Some((volume_of(wanted.disks, name.value())?.0, name.range_value()))
    });
    if let Some((index, at)) = name
        && let Some(clone) = rbd_name(&wanted.clones[index].target)
        && !found[index]
    {
        found[index] = true;
        edits.edits.push((at, escaped(&clone)));
        return;
    }
    let is_medium = matches!(device.attribute("device"), Some("cdrom" | "floppy"));
    if is_medium || child(device, "readonly").is_some() {
        return;
    }
    let target = child(device, "target").and_then(|target| target.attribute("dev")).unwrap_or("?");
    let what = format!("the disk {}, which is no volume of the plan", escaped(target));
    edits.lacks(device, what);
}

/// A network card, which the guest finds where it was.
fn interface(kept: &str, network: Option<&str>) -> String {
    match network {
        Some(network) => {
            let network = escaped(network);
            format!("<interface type='network'><source network='{network}'/>{kept}</interface>")
        }
        None => format!("<interface type='user'>{kept}<link state='down'/></interface>"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cutover::provider::Side;
    use crate::cutover::provider::libvirt::xml::Domain;

    fn disks(pool: &str, ending: &str) -> Vec<ServerDisk> {
        let disk = |volume: &str| ServerDisk {
            volume: volume.into(),
            source: format!("rbd:sata/guest-{volume}").parse().unwrap(),
            target: format!("rbd:{pool}/guest-{volume}{ending}").parse().unwrap(),
            boot: volume == "root",
        };
        vec![disk("root"), disk("data")]
    }

    fn made(xml: &str, network: Option<&str>) -> Result<Definition, XmlError> {
        let (disks, clones) = (disks("sas", ""), disks("sas", ".r"));
        let console = Path::new("/c/o'n");
        definition(xml, &Wanted { name: "a&b", disks: &disks, clones: &clones, network, console })
    }

    #[test]
    fn it_shares_nothing_with_the_domain_but_its_looks() {
        let xml = include_str!("tests/live.xml");
        let made = made(xml, None).unwrap();
        let domain = Domain::read(&made.xml, &disks("sas", ".r")).unwrap();
        assert_eq!(domain.side(2), Some(Side::Target));
        assert!(made.lacks.is_empty() && made.has_agent, "{made:?}");
        for gone in ["sata/", "<uuid>", ".sock", ".log", "<name>guest<"] {
            assert!(!made.xml.contains(gone), "{gone} in {}", made.xml);
        }
        for there in
            ["<name>a&amp;b</name>", "<source path='/c/o&apos;n' append='off'/>", "<serial>guest-root</serial>"]
        {
            assert!(made.xml.contains(there), "{there} in {}", made.xml);
        }
        assert_eq!(made.xml.matches("type='file'").count(), 1, "{}", made.xml);
    }

    #[test]
    fn what_it_may_not_have_is_left_out_and_told() {
        let disk = |pool: &str, dev: &str, more: &str| {
            format!(
                "<disk type='network' device='disk'><driver type='raw'/><source protocol='rbd' name='{pool}'/>\
                 <target dev='{dev}'/>{more}</disk>"
            )
        };
        let domain = |devices: &str| {
            format!(
                "<domain type='kvm'><name>g</name><genid>1</genid><os><nvram template='/t'>/n</nvram></os><devices>{}{}\
                 {devices}</devices></domain>",
                disk("sata/guest-root", "vda", ""),
                disk("sas/guest-data", "vdb", ""),
            )
        };
        let devices = [
            &disk("sata/other", "vdc", ""),
            &disk("sata/tools", "vdd", "<readonly/>"),
            "<disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/></disk>",
            "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><model type='virtio'/>\
             <target dev='tap0'/></interface>",
            "<hostdev mode='subsystem' type='pci'/><graphics type='vnc' port='5900'/>",
            "<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>",
        ]
        .concat();
        let whole = made(&domain(&devices), None).unwrap();
        assert_eq!(
            whole.lacks,
            [
                "its UEFI variables are new ones, not the domain's",
                "it has not the disk vdc, which is no volume of the plan",
                "it has not the device of the host that the domain has",
            ]
        );
        for gone in ["sata/other", "br0", "tap0", "vnc", "spice", "hostdev", "/n<"] {
            assert!(!whole.xml.contains(gone), "{gone} in {}", whole.xml);
        }
        for there in ["sata/tools", "/iso", "52:54:00:00:00:01", "<link state='down'/>", "<genid/>", "template='/t'"] {
            assert!(whole.xml.contains(there), "{there} in {}", whole.xml);
        }
        assert!(!whole.has_agent && whole.xml.ends_with("</serial></devices></domain>"), "{}", whole.xml);
        let on = made(&domain(&devices), Some("lab")).unwrap();
        assert!(on.xml.contains("<source network='lab'/>") && !on.xml.contains("link state"), "{}", on.xml);
        let missing = made(&domain("").replace("sas/guest-data", "sas/x"), None).unwrap_err();
        assert!(missing.to_string().contains("none of its disks is volume data"), "{missing}");
    }
}
