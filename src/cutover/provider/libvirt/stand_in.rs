//! The definition of a domain's stand-in: the domain's own, with its disks on the clones, and without whatever it would
//! share with the domain: its names, its network, the host's devices, files and sockets. Of its devices only those stay
//! that are known to share nothing.

use std::ops::Range;
use std::path::Path;

use roxmltree::Node;

use super::xml::{XmlError, child, escaped, parse, rbd_name, volume_of};
use crate::cutover::provider::ServerDisk;

/// The agent's channel, as libvirt makes it when nobody says where its socket is.
const AGENT: &str = "org.qemu.guest_agent.0";

/// Where the mark of a stand-in is, in its definition's metadata.
const NAMESPACE: &str = "https://poolshift.invalid/rehearsal";

/// What a stand-in is to be.
pub(super) struct Wanted<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// The rehearsal that it belongs to.
    pub(super) id: &'a str,
    /// Its UUID.
    pub(super) uuid: &'a str,
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
        self.lacks.push(format!("it lacks {what}"));
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
    let (own_name, id) = (escaped(wanted.name), escaped(wanted.id));
    let mark = format!("<metadata><poolshift:rehearsal xmlns:poolshift='{NAMESPACE}' id='{id}'/></metadata>");
    edits.replace(name, format!("<name>{own_name}</name><uuid>{}</uuid>{mark}", escaped(wanted.uuid)));
    for node in root.children().filter(|node| node.is_element()) {
        match node.tag_name().name() {
            // QEMU's own words, of files and sockets that libvirt does not know.
            kind if node.tag_name().namespace().is_some() => {
                edits.lacks(node, format!("what the domain gives to QEMU itself ({kind})"));
            }
            // Nothing may take the stand-in for the domain, or give it the domain's share of the host.
            "uuid" | "metadata" | "cputune" | "numatune" | "blkiotune" | "resource" | "title" => edits.remove(node),
            "genid" => edits.replace(node, "<genid/>"),
            "sysinfo" => sysinfo(node, wanted.uuid, &mut edits),
            "os" => firmware(node, &mut edits)?,
            _ => {}
        }
    }
    let mut found = vec![false; wanted.disks.len()];
    let (mut has_console, mut has_agent) = (false, false);
    let has_serial = child(devices, "serial").is_some();
    for device in devices.children().filter(|node| node.is_element()) {
        match device.tag_name().name() {
            "disk" => disk(device, wanted, &mut edits, &mut found),
            "interface" => {
                let mut names = vec!["mac", "model", "address", "boot", "rom", "acpi"];
                // Neither goes with a card that is connected to nothing.
                names.extend(wanted.network.iter().flat_map(|_| ["driver", "mtu"]));
                let kept = edits.kept(device, &names);
                edits.replace(device, interface(&kept, wanted.network));
            }
            // libvirt adds a console for the first serial port.
            "console" if has_serial => {
                let target = child(device, "target").and_then(|target| target.attribute("type")).unwrap_or("serial");
                if target == "serial" {
                    edits.remove(device);
                } else {
                    edits.lacks(device, format!("the domain's {target} console; its serial port is what is looked at"));
                }
            }
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
            "emulator" | "controller" | "watchdog" | "memballoon" | "panic" | "iommu" | "hub" => {}
            "video" => {
                let models = device.children().filter(|child| child.has_tag_name("model"));
                // It needs a screen.
                models.filter_map(|model| child(model, "acceleration")).for_each(|node| edits.remove(node));
            }
            "input" if matches!(device.attribute("type"), Some("mouse" | "tablet" | "keyboard")) => {}
            "rng"
                if child(device, "backend")
                    .is_some_and(|backend| is_one_of(backend, "model", &["random", "builtin"])) => {}
            "memory" if is_one_of(device, "model", &["dimm", "virtio-mem"]) => {}
            // Its screen and what belongs to that; what holds a lock for it.
            "graphics" | "redirdev" | "redirfilter" | "smartcard" | "audio" | "sound" | "lease" => edits.remove(device),
            kind => edits.lacks(device, format!("the domain's {}", device_name(kind))),
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

fn is_one_of(node: Node<'_, '_>, attribute: &str, known: &[&str]) -> bool {
    node.attribute(attribute).is_some_and(|value| known.contains(&value))
}

fn device_name(kind: &str) -> String {
    match kind {
        "hostdev" => "device of the host (hostdev)".into(),
        "filesystem" => "folder of the host (filesystem)".into(),
        "shmem" => "shared memory (shmem)".into(),
        kind => kind.to_owned(),
    }
}

/// What the firmware tells the guest is the stand-in's own.
fn sysinfo(node: Node<'_, '_>, uuid: &str, edits: &mut Edits<'_>) {
    let entries =
        node.descendants().filter(|entry| entry.has_tag_name("entry") && entry.attribute("name") == Some("uuid"));
    for entry in entries {
        edits.replace(entry, format!("<entry name='uuid'>{}</entry>", escaped(uuid)));
    }
}

/// The firmware's variables are in a file of the domain's.
fn firmware(os: Node<'_, '_>, edits: &mut Edits<'_>) -> Result<(), XmlError> {
    if child(os, "loader").is_some_and(|loader| is_one_of(loader, "readonly", &["no"])) {
        return Err(XmlError::Shared("a firmware that can be written (loader readonly='no')".into()));
    }
    let files = os.children().filter(|node| node.has_tag_name("nvram") || node.has_tag_name("varstore"));
    for file in files {
        match file.attribute("template") {
            Some(template) => {
                let kind = file.tag_name().name();
                edits.replace(file, format!("<{kind} template='{}'/>", escaped(template)));
            }
            None => edits.remove(file),
        }
        edits.lacks.push("its UEFI variables are new ones, not the domain's".into());
    }
    Ok(())
}

/// The rehearsal that a domain's definition says that it belongs to.
pub(super) fn id_in(xml: &str) -> Result<Option<String>, XmlError> {
    let document = parse(xml)?;
    let metadata = child(document.root_element(), "metadata");
    let mark =
        metadata.and_then(|metadata| metadata.children().find(|node| node.has_tag_name((NAMESPACE, "rehearsal"))));
    Ok(mark.and_then(|mark| mark.attribute("id")).map(str::to_owned))
}

/// Whether a domain has a card on that network of libvirt's, or on its bridge.
pub(super) fn is_on(xml: &str, network: &str, bridge: Option<&str>) -> Result<bool, XmlError> {
    let document = parse(xml)?;
    let devices = child(document.root_element(), "devices");
    let mut cards = devices.into_iter().flat_map(|devices| devices.children());
    Ok(cards.any(|card| {
        let source = child(card, "source").filter(|_| card.has_tag_name("interface"));
        source.is_some_and(|source| {
            source.attribute("network") == Some(network) || bridge.is_some() && source.attribute("bridge") == bridge
        })
    }))
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
    if device.attribute("device") == Some("cdrom") || child(device, "readonly").is_some() {
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

    const UUID: &str = "11111111-2222-4333-8444-555555555555";

    fn disks(pool: &str, ending: &str) -> Vec<ServerDisk> {
        let disk = |volume: &str| ServerDisk {
            target_in_use: None,
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
        definition(xml, &Wanted { name: "a&b", id: "17", uuid: UUID, disks: &disks, clones: &clones, network, console })
    }

    #[test]
    fn it_shares_nothing_with_the_domain_but_its_looks() {
        let xml = include_str!("tests/live.xml");
        let made = made(xml, None).unwrap();
        let domain = Domain::read(&made.xml, &disks("sas", ".r")).unwrap();
        assert_eq!(domain.side(2), Some(Side::Target));
        assert!(made.lacks.is_empty() && made.has_agent, "{made:?}");
        assert_eq!((id_in(&made.xml).unwrap().as_deref(), id_in(xml).unwrap()), (Some("17"), None));
        for gone in ["sata/", "ce818fbd", ".sock", ".log", "<name>guest<"] {
            assert!(!made.xml.contains(gone), "{gone} in {}", made.xml);
        }
        for there in
            ["<name>a&amp;b</name>", UUID, "<source path='/c/o&apos;n' append='off'/>", "<serial>guest-root</serial>"]
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
                "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>g</name><genid>1</genid>\
                 <uuid>u</uuid><metadata><nova/></metadata><cputune><shares>9</shares></cputune>\
                 <sysinfo type='smbios'><system><entry name='uuid'>u</entry></system></sysinfo>\
                 <os><nvram template='/t'>/n</nvram></os><devices>{}{}{devices}</devices>\
                 <qemu:commandline><qemu:arg value='-drive'/></qemu:commandline></domain>",
                disk("sata/guest-root", "vda", ""),
                disk("sas/guest-data", "vdb", ""),
            )
        };
        let devices = [
            &disk("sata/other", "vdc", ""),
            &disk("sata/tools", "vdd", "<readonly/>"),
            "<disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/></disk>",
            "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><model type='virtio'/>\
             <driver queues='4'/><mtu size='9000'/><acpi index='1'/><target dev='tap0'/></interface>",
            "<memory model='nvdimm'><source><path>/pmem</path></source></memory><memory model='dimm'/>",
            "<disk type='network' device='floppy'><source protocol='rbd' name='sata/f'/><target dev='fda'/></disk>",
            "<rng model='virtio'><backend model='egd'/></rng><rng model='virtio'><backend model='random'/></rng>",
            "<video><model type='virtio'><acceleration accel3d='yes'/></model></video><sound model='ich9'/>",
            "<input type='tablet' bus='usb'/><input type='evdev'><source dev='/dev/input/1'/></input>",
            "<hostdev mode='subsystem' type='pci'/><graphics type='vnc' port='5900'/>",
            "<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>",
        ]
        .concat();
        let whole = made(&domain(&devices), None).unwrap();
        assert_eq!(
            whole.lacks,
            [
                "its UEFI variables are new ones, not the domain's",
                "it lacks what the domain gives to QEMU itself (commandline)",
                "it lacks the disk vdc, which is no volume of the plan",
                "it lacks the domain's memory",
                "it lacks the disk fda, which is no volume of the plan",
                "it lacks the domain's rng",
                "it lacks the domain's input",
                "it lacks the domain's device of the host (hostdev)",
            ]
        );
        for gone in [
            "sata/other",
            "br0",
            "tap0",
            "vnc",
            "spice",
            "hostdev",
            "/n<",
            "<nova/>",
            "shares",
            ">u<",
            "qemu:",
            "queues",
            "mtu",
            "nvdimm",
            "sata/f",
            "egd",
            "accel3d",
            "ich9",
            "evdev",
        ] {
            assert!(!whole.xml.contains(gone), "{gone} in {}", whole.xml);
        }
        for there in [
            "sata/tools",
            "/iso",
            "52:54:00:00:00:01",
            "<link state='down'/>",
            "<genid/>",
            "template='/t'",
            "acpi index",
            "'dimm'",
            "'random'",
            "tablet",
        ] {
            assert!(whole.xml.contains(there), "{there} in {}", whole.xml);
        }
        assert_eq!(whole.xml.matches(UUID).count(), 2, "{}", whole.xml);
        assert!(!whole.has_agent && whole.xml.ends_with("</serial></devices></domain>"), "{}", whole.xml);
        let on = made(&domain(&devices), Some("lab")).unwrap();
        assert!(on.xml.contains("<source network='lab'/>") && !on.xml.contains("link state"), "{}", on.xml);
        assert!(on.xml.contains("queues") && on.xml.contains("mtu"), "{}", on.xml);
        assert!(is_on(&domain(&devices), "x", Some("br0")).unwrap() && !is_on(&domain(&devices), "x", None).unwrap());
        assert!(is_on(&on.xml, "lab", None).unwrap() && !is_on(&on.xml, "x", Some("br0")).unwrap());
        let written = domain("").replace("<nvram", "<loader readonly='no'>/f</loader><nvram");
        assert_eq!(made(&written, None).unwrap_err().to_string().matches("firmware that can be written").count(), 1);
        let missing = made(&domain("").replace("sas/guest-data", "sas/x"), None).unwrap_err();
        assert!(missing.to_string().contains("none of its disks is volume data"), "{missing}");
    }
}
