//! What QEMU has open: asked of QEMU itself, as libvirt's XML of a running domain does not know of disks that were
//! opened anew below it.

use serde_json::{Value, json};

use super::super::{ProviderError, ServerDisk, Side};
use super::virsh::Virsh;
use super::xml::{common_side, volume_of};

/// A disk of a running domain, as QEMU has it.
#[derive(Debug)]
pub(super) struct Device {
    /// The node right below the device: `libvirt-1-format`.
    pub(super) node: String,
    /// That node's driver.
    pub(super) driver: String,
    /// The RBD image at the bottom, `pool/[namespace/]image`.
    pub(super) image: String,
    /// What the image was opened with, without its key; `None` if it is not right below the node, or not known.
    pub(super) options: Option<Value>,
    read_only: bool,
    direct: bool,
    no_flush: bool,
    detect_zeroes: String,
}

/// The options of a block driver for RBD, somewhere below a node.
fn rbd_below(options: &Value) -> Option<&Value> {
    if options.get("driver").and_then(Value::as_str) == Some("rbd") {
        return Some(options);
    }
    options.get("file").and_then(rbd_below)
}

fn image_of(rbd: &Value) -> Option<String> {
    let text = |key: &str| rbd.get(key).and_then(Value::as_str);
    if text("snapshot").is_some() {
        return None;
    }
    let parts = [Some(text("pool")?), text("namespace").filter(|name| !name.is_empty()), Some(text("image")?)];
    Some(parts.into_iter().flatten().collect::<Vec<_>>().join("/"))
}

/// The image in a file name of QEMU's: `json:{…}`, or `rbd:pool/image:option=value`.
fn image_in(filename: &str) -> Option<String> {
    if let Some(options) = filename.strip_prefix("json:") {
        return image_of(rbd_below(&serde_json::from_str(options).ok()?)?);
    }
    let name = filename.strip_prefix("rbd:")?.split(':').next()?;
    (!name.contains(['@', '\\'])).then(|| name.to_owned())
}

impl Device {
    fn read(device: &Value) -> Option<Self> {
        let inserted = device.get("inserted")?;
        let text = |key: &str| inserted.get(key).and_then(Value::as_str);
        let is = |value: Option<&Value>| value.and_then(Value::as_bool).unwrap_or(false);
        let file = text("file")?;
        let below = |options: &str| {
            let options: Value = serde_json::from_str(options).ok()?;
            let file = options.get("file")?;
            (file.get("driver").and_then(Value::as_str) == Some("rbd")).then(|| file.clone())
        };
        let cache = |key: &str| is(inserted.get("cache").and_then(|cache| cache.get(key)));
        Some(Self {
            node: text("node-name")?.to_owned(),
            driver: text("drv")?.to_owned(),
            image: image_in(file)?,
            options: file.strip_prefix("json:").and_then(below),
            read_only: is(inserted.get("ro")),
            direct: cache("direct"),
            no_flush: cache("no-flush"),
            detect_zeroes: text("detect_zeroes").unwrap_or("off").to_owned(),
        })
    }

    /// Where libvirt has put the key for its image.
    pub(super) fn secret(&self) -> Option<String> {
        Some(format!("{}-storage-auth-secret0", self.node.strip_suffix("-format")?))
    }

    fn cache(&self) -> Value {
        json!({"direct": self.direct, "no-flush": self.no_flush})
    }

    /// What opens another image as a node, as its own was opened.
    pub(super) fn opening(&self, image: &str, node: &str, auth: bool, discard: bool) -> Option<Value> {
        let mut options = self.options.clone()?;
        let fields = options.as_object_mut()?;
        let (pool, rest) = image.split_once('/')?;
        fields.remove("namespace");
        let name = match rest.rsplit_once('/') {
            Some((namespace, name)) => {
                fields.insert("namespace".into(), namespace.into());
                name
            }
            None => rest,
        };
        fields.extend([("pool".into(), pool.into()), ("image".into(), name.into())]);
        fields.extend([("node-name".into(), node.into()), ("read-only".into(), self.read_only.into())]);
        fields.extend([("cache".into(), self.cache()), ("discard".into(), discarding(discard).into())]);
        if auth {
            // As libvirt does it.
            fields.insert("auth-client-required".into(), json!(["cephx", "none"]));
            fields.insert("key-secret".into(), self.secret()?.into());
        }
        Some(options)
    }

    /// What has the node below the device go on with another image: all of its options, as those left out would change.
    pub(super) fn reopening(&self, below: &str, discard: bool) -> Value {
        json!({
            "driver": self.driver, "node-name": self.node, "file": below, "read-only": self.read_only,
            "cache": self.cache(), "discard": discarding(discard), "detect-zeroes": self.detect_zeroes,
        })
    }
}

fn discarding(discard: bool) -> &'static str {
    if discard { "unmap" } else { "ignore" }
}

/// A name for the node of an image that is opened by poolshift, which no node has had before: where one could not be
/// opened, nothing else is taken for it.
pub(super) fn new_node() -> String {
    // QEMU takes 31 characters.
    format!("poolshift-{:016x}", fastrand::u64(..))
}

/// What QEMU answers to a question: as it was told already, or asked now.
async fn told(
    virsh: &Virsh,
    operation: &str,
    question: (&str, Option<Value>),
    told: Option<&str>,
) -> Result<Value, ProviderError> {
    let (execute, arguments) = question;
    match told.and_then(|text| virsh.qemu_said(operation, execute, text).ok()) {
        Some(answer) => Ok(answer),
        None => virsh.qemu(operation, execute, arguments).await,
    }
}

/// The devices that have an RBD image open.
pub(super) async fn devices(
    virsh: &Virsh,
    operation: &str,
    answer: Option<&str>,
) -> Result<Vec<Device>, ProviderError> {
    let answer = told(virsh, operation, ("query-block", None), answer).await?;
    Ok(answer.as_array().into_iter().flatten().filter_map(Device::read).collect())
}

/// The question for all nodes.
pub(super) fn nodes_question() -> (&'static str, Option<Value>) {
    ("query-named-block-nodes", Some(json!({"flat": true})))
}

/// A node, and its image.
pub(super) type Node = (String, String);

/// The nodes that have an RBD image open themselves.
pub(super) async fn nodes(virsh: &Virsh, operation: &str, answer: Option<&str>) -> Result<Vec<Node>, ProviderError> {
    let answer = told(virsh, operation, nodes_question(), answer).await?;
    let node = |node: &Value| {
        let text = |key: &str| node.get(key).and_then(Value::as_str);
        (text("drv")? == "rbd").then_some(())?;
        Some((text("node-name")?.to_owned(), image_in(text("file")?)?))
    };
    Ok(answer.as_array().into_iter().flatten().filter_map(node).collect())
}

/// Which side a running domain has its disks on.
pub(super) fn side(devices: &[Device], disks: &[ServerDisk]) -> Option<Side> {
    common_side(disks.len(), devices.iter().filter_map(|device| volume_of(disks, &device.image)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(file: &Value, node: &str) -> Value {
        let file = format!("json:{file}");
        json!({"device": "", "inserted": {"node-name": node, "drv": "raw", "ro": false, "file": file,
            "detect_zeroes": "off", "cache": {"direct": false, "no-flush": true, "writeback": true}}})
    }

    #[test]
    fn an_image_is_opened_as_the_one_before_it_was() {
        let file = json!({"driver": "raw", "file": {"driver": "rbd", "pool": "sata", "namespace": "n", "image": "a",
            "conf": "/etc/ceph/ceph.conf", "user": "u", "server": [{"host": "h", "port": "6789"}]}});
        let device = Device::read(&device(&file, "libvirt-2-format")).unwrap();
        assert_eq!(device.image, "sata/n/a");
        let options = device.opening("sas/b", "new", true, true).unwrap();
        let expected = json!({"driver": "rbd", "pool": "sas", "image": "b", "conf": "/etc/ceph/ceph.conf",
            "user": "u", "server": [{"host": "h", "port": "6789"}], "node-name": "new", "read-only": false,
            "cache": {"direct": false, "no-flush": true}, "discard": "unmap",
            "auth-client-required": ["cephx", "none"], "key-secret": "libvirt-2-storage-auth-secret0"});
        assert_eq!(options, expected);
        assert_eq!(device.opening("sas/m/b", "new", false, false).unwrap()["namespace"], "m");
        let reopening = device.reopening("new", false);
        assert_eq!((&reopening["file"], &reopening["discard"]), (&json!("new"), &json!("ignore")));
        assert_eq!(reopening["cache"], json!({"direct": false, "no-flush": true}));
    }

    #[test]
    fn what_is_no_image_of_ours_is_none() {
        for odd in [json!(null), json!(3), json!({"inserted": 3}), json!({"inserted": {"file": "json:{"}})] {
            assert!(Device::read(&odd).is_none(), "{odd}");
        }
        assert_eq!(image_in("rbd:sata/a:id=u:conf=/etc"), Some("sata/a".into()));
        assert_eq!(image_in("/var/lib/a.img"), None);
        assert_eq!(image_in("rbd:sata/a@s"), None);
        let deep = format!("json:{}1{}", "{\"file\":".repeat(1000), "}".repeat(1000));
        assert_eq!(image_in(&deep), None);
        assert!(new_node().len() <= 31 && new_node() != new_node());
    }
}
