//! A domain's XML: which of its disks is which volume on which side, and the same XML with the other side.
//!
//! Nothing is written anew: the names of the images are replaced where they stand, and everything else stays to the
//! byte as libvirt had it.

use std::ops::Range;

use roxmltree::{Document, Node, ParsingOptions};

use super::super::{ServerDisk, Side};
use crate::image::ImageSpec;

/// The most nodes of a domain's XML; one with a hundred disks has a tenth of it.
const NODES_MAX: u32 = 50_000;

/// What is wrong with a domain's XML.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum XmlError {
    #[error("its XML can't be read: {0}")]
    Damaged(String),
    #[error("none of its disks is volume {volume}: not {source_image}, and not {target_image}")]
    Missing { volume: String, source_image: String, target_image: String },
    #[error("its disks {first} and {second} are both volume {volume}")]
    Twice { volume: String, first: String, second: String },
    #[error("it has {0}: nothing may share that with it")]
    Shared(String),
    #[error("volume {0} is a file: libvirt domains are moved between RBD images only")]
    NoRbd(String),
}

/// A disk of a domain that is an RBD image.
#[derive(Debug)]
pub(super) struct DomainDisk {
    /// `vda`.
    pub(super) device: String,
    /// `pool/[namespace/]image`.
    pub(super) image: String,
    /// Where that stands in the XML.
    at: Range<usize>,
    /// Which volume it is, and on which side.
    pub(super) volume: Option<(usize, Side)>,
    /// What makes it more than the one image that it names.
    pub(super) more: Option<&'static str>,
    /// Whether it is a part of an image.
    pub(super) sliced: bool,
    /// Whether it needs a key.
    pub(super) auth: bool,
    /// Whether discards reach the image.
    pub(super) discard: bool,
}

/// What is of interest in a domain's XML.
#[derive(Debug)]
pub(super) struct Domain {
    /// Its disks that are RBD images.
    pub(super) disks: Vec<DomainDisk>,
    /// `kvm` or `qemu`, or something else.
    pub(super) kind: String,
    /// What happens after it was shut down.
    pub(super) on_poweroff: String,
    /// What it has that can't be saved with its memory.
    pub(super) unsaveable: Vec<String>,
}

/// The image's name as librbd and libvirt have it; `None` for a file.
pub(super) fn rbd_name(image: &ImageSpec) -> Option<String> {
    let name = image.without_snapshot().to_string();
    name.strip_prefix("rbd:").map(str::to_owned)
}

/// A domain's XML, read.
pub(super) fn parse(xml: &str) -> Result<Document<'_>, XmlError> {
    parse_as("domain", xml)
}

fn parse_as<'x>(what: &str, xml: &'x str) -> Result<Document<'x>, XmlError> {
    let options = ParsingOptions { nodes_limit: NODES_MAX, ..ParsingOptions::default() };
    let document = Document::parse_with_options(xml, options).map_err(|error| XmlError::Damaged(error.to_string()))?;
    match document.root_element().has_tag_name(what) {
        true => Ok(document),
        false => Err(XmlError::Damaged(format!("it is no {what}"))),
    }
}

/// Whether a network's XML says that it ends at the host, and which bridge it has.
pub(super) fn network(xml: &str) -> Result<(bool, Option<String>), XmlError> {
    let document = parse_as("network", xml)?;
    let root = document.root_element();
    let bridge = child(root, "bridge").and_then(|bridge| bridge.attribute("name"));
    Ok((child(root, "forward").is_none(), bridge.map(str::to_owned)))
}

/// A text as it stands in XML, also in an attribute.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}

pub(super) fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn attribute<'a>(node: Node<'a, '_>, name: &str, attribute: &str) -> &'a str {
    child(node, name).and_then(|child| child.attribute(attribute)).unwrap_or_default()
}

/// Which volume an image is, and on which side.
pub(super) fn volume_of(disks: &[ServerDisk], image: &str) -> Option<(usize, Side)> {
    disks.iter().enumerate().find_map(|(index, disk)| {
        let side =
            [Side::Source, Side::Target].into_iter().find(|&side| rbd_name(disk.on(side)).as_deref() == Some(image));
        Some((index, side?))
    })
}

/// The one side that every volume is on.
pub(super) fn common_side(count: usize, found: impl Iterator<Item = (usize, Side)>) -> Option<Side> {
    let mut sides = vec![None; count];
    for (index, side) in found {
        // Twice is as bad as not at all.
        if sides.get(index)?.is_some() {
            return None;
        }
        sides[index] = Some(side);
    }
    let first = *sides.first()?;
    sides.iter().all(|side| *side == first).then_some(first)?
}

fn disk(node: Node<'_, '_>, disks: &[ServerDisk]) -> Option<DomainDisk> {
    let source = child(node, "source").filter(|source| source.attribute("protocol") == Some("rbd"))?;
    let name = source.attribute_node("name")?;
    let store = child(node, "backingStore");
    let more = if child(source, "snapshot").is_some() || name.value().contains('@') {
        Some("names a snapshot")
    } else if store.is_some_and(|store| store.has_attribute("type") || child(store, "source").is_some()) {
        Some("has a backing store of its own")
    } else if child(node, "mirror").is_some() {
        Some("is being copied by libvirt: end that with `virsh blockjob`")
    } else if child(node, "encryption").or_else(|| child(source, "encryption")).is_some() {
        Some("is encrypted by QEMU")
    } else if child(node, "shareable").is_some() {
        Some("is shared: another domain may write to it")
    } else if child(node, "transient").is_some() {
        Some("is transient: what it writes is lost")
    } else if attribute(node, "driver", "type") != "raw" {
        Some("has another format than raw")
    } else {
        None
    };
    Some(DomainDisk {
        device: attribute(node, "target", "dev").to_owned(),
        image: name.value().to_owned(),
        at: name.range_value(),
        volume: volume_of(disks, name.value()),
        more,
        sliced: child(source, "slices").is_some(),
        auth: child(node, "auth").or_else(|| child(source, "auth")).is_some(),
        discard: attribute(node, "driver", "discard") == "unmap",
    })
}

impl Domain {
    pub(super) fn read(xml: &str, disks: &[ServerDisk]) -> Result<Self, XmlError> {
        let document = parse(xml)?;
        let root = document.root_element();
        let devices = child(root, "devices");
        let nodes = devices.into_iter().flat_map(|devices| devices.children());
        let found =
            nodes.clone().filter(|node| node.has_tag_name("disk")).filter_map(|node| disk(node, disks)).collect();
        let mut unsaveable: Vec<String> = nodes.filter_map(unsaveable_device).collect();
        let features = child(root, "cpu").into_iter().flat_map(|cpu| cpu.children());
        let fixed = |feature: &Node<'_, '_>| {
            feature.attribute("name") == Some("invtsc") && feature.attribute("policy") == Some("require")
        };
        unsaveable.extend(features.filter(fixed).map(|_| "the CPU feature invtsc".to_owned()));
        unsaveable.extend(child(root, "launchSecurity").map(|_| "an encrypted memory (launchSecurity)".to_owned()));
        let on_poweroff =
            child(root, "on_poweroff").and_then(|node| node.text()).unwrap_or("destroy").trim().to_owned();
        let kind = root.attribute("type").unwrap_or_default().to_owned();
        Ok(Self { disks: found, kind, on_poweroff, unsaveable })
    }

    /// Which side all volumes are on; `None` if they are not all on one.
    pub(super) fn side(&self, count: usize) -> Option<Side> {
        common_side(count, self.disks.iter().filter_map(|disk| disk.volume))
    }

    /// The disk of every volume, in the order of the volumes.
    pub(super) fn by_volume(&self, disks: &[ServerDisk]) -> Result<Vec<&DomainDisk>, XmlError> {
        let of = |(index, disk): (usize, &ServerDisk)| {
            let names = (rbd_name(&disk.source), rbd_name(&disk.target));
            let (Some(source_image), Some(target_image)) = names else {
                return Err(XmlError::NoRbd(disk.volume.clone()));
            };
            let volume = disk.volume.clone();
            let mut found = self.disks.iter().filter(|found| found.volume.is_some_and(|(of, _)| of == index));
            match (found.next(), found.next()) {
                (None, _) => Err(XmlError::Missing { volume, source_image, target_image }),
                (Some(found), None) => Ok(found),
                (Some(first), Some(second)) => {
                    Err(XmlError::Twice { volume, first: first.device.clone(), second: second.device.clone() })
                }
            }
        };
        disks.iter().enumerate().map(of).collect()
    }
}

/// The same XML with every volume on `to`.
pub(super) fn on_side(xml: &str, disks: &[ServerDisk], to: Side) -> Result<String, XmlError> {
    let domain = Domain::read(xml, disks)?;
    let mut places = Vec::new();
    for (disk, found) in disks.iter().zip(domain.by_volume(disks)?) {
        let name = rbd_name(disk.on(to)).ok_or_else(|| XmlError::NoRbd(disk.volume.clone()))?;
        places.push((found.at.clone(), name));
    }
    places.sort_by_key(|(at, _)| at.start);
    let (mut rewritten, mut done) = (String::with_capacity(xml.len() + 256), 0);
    for (at, name) in places {
        rewritten.push_str(&xml[done..at.start]);
        rewritten.push_str(&escaped(&name));
        done = at.end;
    }
    rewritten.push_str(&xml[done..]);
    Ok(rewritten)
}

fn unsaveable_device(node: Node<'_, '_>) -> Option<String> {
    let kind = node.attribute("type").unwrap_or_default();
    match node.tag_name().name() {
        "hostdev" => Some(format!("a device of the host ({kind} hostdev)")),
        "interface" if kind == "hostdev" || kind == "vdpa" => Some(format!("a network card of the host ({kind})")),
        "filesystem" => Some("a folder of the host (filesystem)".into()),
        "shmem" => Some("shared memory (shmem)".into()),
        _ => None,
    }
}

#[cfg(test)]
#[path = "xml_tests.rs"]
mod tests;
