//! A server of a real cloud with the guest of `scripts/vm-dev`: its console, its disks as libvirt has them, and what stays
//! of it whatever pool these are in.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

use crate::openstack_env::{OpenStackEnv, Service};
use crate::vm::{Conversation, Line, Terminal, rbd_sources, run_for_text};

/// A server of the cloud, with the guest of `scripts/vm-dev`.
pub(crate) struct CloudGuest<'a> {
    env: &'a OpenStackEnv,
    pub(crate) id: String,
    /// Its name for libvirt, which it keeps.
    domain: String,
    /// In the order of its disks.
    pub(crate) volumes: Vec<String>,
    terminal: Terminal,
}

impl<'a> CloudGuest<'a> {
    /// A server that Nova shows so.
    pub(crate) fn new(
        (env, chroot): (&'a OpenStackEnv, PathBuf),
        name: &str,
        shown: &Value,
        volumes: &[String],
        recorder: Recorder,
    ) -> Self {
        let text = |key: &str| shown[key].as_str().expect("an administrator sees it").to_owned();
        let (id, domain) = (text("id"), text("OS-EXT-SRV-ATTR:instance_name"));
        let line = NovaConsole { chroot, domain: domain.clone(), recorder };
        let terminal = Terminal::new(name, Box::new(line));
        Self { env, id, domain, volumes: volumes.to_vec(), terminal }
    }
}

impl std::ops::Deref for CloudGuest<'_> {
    type Target = Terminal;

    fn deref(&self) -> &Terminal {
        &self.terminal
    }
}

impl Drop for CloudGuest<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the console of {}, at last:\n{}", self.domain, self.console().tail());
        }
    }
}

impl CloudGuest<'_> {
    /// The RBD images that libvirt has for its disks now, in their order.
    #[track_caller]
    pub(crate) fn images(&self) -> Vec<String> {
        rbd_sources(&self.env.virsh(&["dumpxml", &self.domain]))
    }

    /// The limits (`total_iops_sec`) of its disks, as libvirt keeps to them.
    #[track_caller]
    pub(crate) fn limits(&self) -> Vec<String> {
        let xml = self.env.virsh(&["dumpxml", &self.domain]);
        let found = xml.split("<total_iops_sec>").skip(1).filter_map(|rest| rest.split_once('<'));
        found.map(|(limit, _)| limit.to_owned()).collect()
    }

    /// The serial numbers and names of its disks, as libvirt gives them to it.
    #[track_caller]
    pub(crate) fn serials(&self) -> Vec<(String, String)> {
        let xml = self.env.virsh(&["dumpxml", &self.domain]);
        let disks = xml.split("<disk ").skip(1).map(|disk| {
            let between = |left: &str, right: &str| {
                let rest = disk.split_once(left).map(|(_, rest)| rest).unwrap_or_default();
                rest.split_once(right).map(|(text, _)| text).unwrap_or_default().to_owned()
            };
            (between("<target dev='", "'"), between("<serial>", "</serial>"))
        });
        let mut disks: Vec<_> = disks.collect();
        disks.sort();
        disks
    }

    /// Its ports, which are in use, in the order of its network cards.
    #[track_caller]
    pub(crate) fn ports(&self) -> Value {
        // Of a server that was started Neutron's agent says so a moment later.
        let mut ports = self.env.wait_for("ports that are in use", || {
            let ports = self.env.ports(&self.id);
            let idle = ports.iter().find(|port| port["status"] != "ACTIVE");
            idle.map_or_else(|| Ok(ports.clone()), |port| Err(port.to_string()))
        });
        let xml = self.env.virsh(&["dumpxml", &self.domain]);
        let cards = xml.split("<mac address='").skip(1).filter_map(|rest| rest.split_once('\''));
        let cards: Vec<&str> = cards.map(|(mac, _)| mac).collect();
        assert_eq!(cards.len(), ports.len(), "{xml}");
        ports.sort_by_key(|port| cards.iter().position(|mac| *mac == port["mac_address"]));
        let keys =
            ["id", "name", "mac_address", "fixed_ips", "tenant_id", "status", "binding:vif_type", "device_owner"];
        let kept = |port: &Value| keys.iter().map(|key| ((*key).to_owned(), port[*key].clone())).collect::<Value>();
        ports.iter().map(kept).collect()
    }

    /// What stays as it is, whatever pool its volumes are in.
    #[track_caller]
    pub(crate) fn facts(&self) -> Value {
        let server = self.env.server(&self.id);
        let keys = [
            "id",
            "name",
            "tenant_id",
            "user_id",
            "key_name",
            "metadata",
            "tags",
            "flavor",
            "description",
            "hostname",
            "locked",
            "OS-EXT-SRV-ATTR:root_device_name",
            "OS-EXT-SRV-ATTR:instance_name",
            "os-extended-volumes:volumes_attached",
        ];
        let mut facts: Value = keys.iter().map(|key| ((*key).to_owned(), server[*key].clone())).collect();
        let path = format!("servers/{}/os-volume_attachments", self.id);
        let mut attachments = self.env.get(Service::Nova, &path)["volumeAttachments"].take();
        for list in [&mut facts["os-extended-volumes:volumes_attached"], &mut attachments] {
            list.as_array_mut().expect("a list").sort_by_key(|entry| entry["id"].to_string());
        }
        facts["attachments"] = attachments;
        facts["ports"] = self.ports();
        facts["volumes"] = self.volumes.iter().map(|id| facts_of_volume(self.env, id)).collect();
        facts
    }
}

/// What stays of a volume.
#[track_caller]
pub(crate) fn facts_of_volume(env: &OpenStackEnv, id: &str) -> Value {
    let volume = env.volume(id);
    let keys = [
        "id",
        "name",
        "description",
        "size",
        "metadata",
        "volume_image_metadata",
        "bootable",
        "user_id",
        "os-vol-tenant-attr:tenant_id",
        "created_at",
        "multiattach",
        "os-vol-mig-status-attr:name_id",
    ];
    keys.iter().map(|key| ((*key).to_owned(), volume[*key].clone())).collect()
}

/// Follows a console's file. Nova begins it anew with every start of the server, and removes its folder when the server
/// leaves its host: what was printed last is in a file that has no name any more.
pub(crate) struct Recorder {
    text: Arc<Mutex<Vec<u8>>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    pub(crate) fn start(path: PathBuf, before: Vec<u8>) -> Self {
        let (text, over) = (Arc::new(Mutex::new(before)), Arc::<AtomicBool>::default());
        let (shared, told) = (Arc::clone(&text), Arc::clone(&over));
        let thread = std::thread::spawn(move || {
            let mut open: Option<File> = None;
            while !told.load(Ordering::Relaxed) {
                // Looked at before it is read: what is read after that is all that there ever was of an older one.
                let now = std::fs::metadata(&path).ok();
                let mut new = Vec::new();
                if let Some(file) = &mut open {
                    let begins_anew = now.as_ref().is_some_and(|now| {
                        let at = file.stream_position().expect("a file has a position");
                        file.metadata().is_ok_and(|had| had.ino() != now.ino()) || now.len() < at
                    });
                    let _ = file.read_to_end(&mut new);
                    if begins_anew {
                        // A line that was cut is no record.
                        new.push(b'\n');
                        open = None;
                    }
                }
                if open.is_none() && now.is_some() {
                    open = File::open(&path).ok();
                    if let Some(file) = &mut open {
                        let _ = file.seek(SeekFrom::Start(0));
                        let _ = file.read_to_end(&mut new);
                    }
                }
                shared.lock().unwrap_or_else(PoisonError::into_inner).extend(new);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { text, over, thread: Some(thread) }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The console of a server of Nova's: a terminal of QEMU's, and a file.
struct NovaConsole {
    chroot: PathBuf,
    domain: String,
    recorder: Recorder,
}

impl Line for NovaConsole {
    fn printed(&self) -> Vec<u8> {
        self.recorder.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn open(&self) -> Box<dyn Conversation> {
        let mut command = Command::new(&self.chroot);
        let name = run_for_text(command.args(["virsh", "--quiet", "-c", "qemu:///system", "ttyconsole", &self.domain]));
        // The instance has this host's terminals. QEMU has set it to pass everything on as it is.
        let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
        let flags = i32::try_from(flags.bits()).expect("they fit");
        let terminal = File::options().read(true).write(true).custom_flags(flags).open(name.trim());
        Box::new(terminal.unwrap_or_else(|error| panic!("the terminal {name:?}: {error}")))
    }
}
