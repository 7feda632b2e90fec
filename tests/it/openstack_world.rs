//! Servers and volumes of a real OpenStack for a test.
//!
//! All that a [`World`] makes is gone with it, also after a test that failed.

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use reqwest::Method;
use serde_json::{Value, json};

use crate::openstack_env::{OpenStackEnv, Service};
use crate::openstack_guest::{CloudGuest, Recorder};
use crate::support::CephEnv;
use crate::vm::{rbd_command, run};

/// What a test has made in the cloud. Dropped, all of it is deleted, with every image that has the id of one of its
/// volumes in its name.
pub(crate) struct World<'a> {
    env: &'a OpenStackEnv,
    made: RefCell<Made>,
}

#[derive(Default)]
struct Made {
    servers: Vec<String>,
    volumes: Vec<String>,
    snapshots: Vec<String>,
    key_pairs: Vec<String>,
    ports: Vec<String>,
    volume_types: Vec<String>,
    limits: Vec<String>,
}

/// The limits of a volume type.
pub(crate) struct Qos {
    /// Who sees to it: `front-end` is the hypervisor, `back-end` the storage, `both`.
    pub(crate) consumer: String,
    pub(crate) iops: u32,
}

/// A server that was asked for.
pub(crate) struct Booting {
    name: String,
    id: String,
    volumes: Vec<String>,
    recorder: Recorder,
}

/// A name that no other test has.
pub(crate) fn unique(tag: &str) -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    format!("it-{tag}-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))
}

impl<'a> World<'a> {
    pub(crate) fn new(env: &'a OpenStackEnv) -> Self {
        Self { env, made: RefCell::default() }
    }

    /// Volumes of 1 GiB and the type `sata`, with nothing in them.
    #[track_caller]
    pub(crate) fn volumes(&self, names: &[String]) -> Vec<String> {
        self.volumes_of("sata", names)
    }

    /// The same, of another type.
    #[track_caller]
    pub(crate) fn volumes_of(&self, volume_type: &str, names: &[String]) -> Vec<String> {
        let make = |name: &String| {
            let body = json!({"volume": {
                "name": name, "size": 1, "volume_type": volume_type, "metadata": {"owner": "it", "of": name},
            }});
            let answer = self.env.tell(Service::Cinder, &Method::POST, "volumes", &body);
            let id = answer["volume"]["id"].as_str().expect("it has an id").to_owned();
            self.made.borrow_mut().volumes.push(id.clone());
            id
        };
        let ids: Vec<String> = names.iter().map(make).collect();
        for id in &ids {
            self.env.wait_for_volume(id, "available");
        }
        ids
    }

    /// A volume that is a clone of another.
    #[track_caller]
    pub(crate) fn clone_of(&self, volume: &str, name: &str) -> String {
        let body = json!({"volume": {"name": name, "size": 1, "source_volid": volume}});
        let answer = self.env.tell(Service::Cinder, &Method::POST, "volumes", &body);
        let id = answer["volume"]["id"].as_str().expect("it has an id").to_owned();
        self.made.borrow_mut().volumes.push(id.clone());
        id
    }

    /// The two disks of the guest of `scripts/vm-dev`, as volumes of 1 GiB and a type.
    #[track_caller]
    pub(crate) fn guest_volumes(&self, volume_type: &str, name: &str) -> Vec<String> {
        let volumes = self.volumes_of(volume_type, &["root", "data"].map(|role| format!("{name}-{role}")));
        let images: Vec<String> = volumes.iter().map(|id| format!("sata/volume-{id}")).collect();
        for image in &images {
            self.env.rbd(&["rm", "--no-progress", image]);
        }
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/vm-dev"));
        if let Some(folder) = std::env::var_os("POOLSHIFT_TEST_VM").filter(|folder| !folder.is_empty()) {
            command.env("POOLSHIFT_VM_DIR", Path::new(&folder).parent().expect("a folder of libvirts"));
        }
        command.arg("import").arg("--ceph-conf").arg(&self.env.ceph.conf).args(["--ceph-user", &self.env.ceph.user]);
        command.args(["--root", &format!("rbd:{}", images[0]), "--data", &format!("rbd:{}", images[1])]);
        run(&mut command);
        for image in &images {
            self.env.rbd(&["resize", "--no-progress", image, "--size", "1G"]);
        }
        self.env.volume_action(&volumes[0], &json!({"os-set_bootable": {"bootable": true}}));
        let of_image = json!({"os-set_image_metadata": {"metadata": {"os_distro": "it"}}});
        self.env.volume_action(&volumes[0], &of_image);
        volumes
    }

    /// Writes something into a volume that nobody has, so many MiB of it, not all in one place.
    #[track_caller]
    pub(crate) fn write(&self, volume: &str, mib: u64) {
        let image = format!("sata/volume-{volume}");
        let (size, total) = ("64K", format!("{mib}M"));
        let words = ["bench", &image, "--io-type", "write", "--io-pattern", "rand", "--io-size", size];
        self.env.rbd(&[&words[..], &["--io-total", &total]].concat());
    }

    /// A key pair, by its name.
    #[track_caller]
    pub(crate) fn key_pair(&self) -> String {
        let name = unique("key");
        self.env.tell(Service::Nova, &Method::POST, "os-keypairs", &json!({"keypair": {"name": name}}));
        self.made.borrow_mut().key_pairs.push(name.clone());
        name
    }

    /// What Nova is told of networks, for a server with two network cards: of the first one Nova makes the port itself, the
    /// second one has been there before.
    #[track_caller]
    pub(crate) fn networks(&self) -> Value {
        let network = self.env.get(Service::Neutron, "networks?name=net")["networks"][0]["id"].take();
        let body = json!({"port": {"network_id": network, "name": unique("port")}});
        let port = self.env.tell(Service::Neutron, &Method::POST, "ports", &body)["port"]["id"].take();
        self.made.borrow_mut().ports.push(port.as_str().expect("it has an id").to_owned());
        json!([{"uuid": network}, {"port": port, "tag": "mgmt"}])
    }

    /// A type of volumes of a backend, by its name.
    #[track_caller]
    pub(crate) fn volume_type(&self, backend: &str) -> String {
        self.volume_type_with(backend, &[], None)
    }

    /// The same, with more extra specs, and limits.
    #[track_caller]
    pub(crate) fn volume_type_with(&self, backend: &str, specs: &[(&str, &str)], limits: Option<Qos>) -> String {
        let name = unique("type");
        let mut all = json!({"volume_backend_name": backend});
        specs.iter().for_each(|(key, value)| all[*key] = (*value).into());
        let body = json!({"volume_type": {"name": name, "extra_specs": all}});
        let id_of = |answer: &Value| answer["id"].as_str().expect("it has an id").to_owned();
        let made = id_of(&self.env.tell(Service::Cinder, &Method::POST, "types", &body)["volume_type"]);
        self.made.borrow_mut().volume_types.push(made.clone());
        if let Some(Qos { consumer, iops }) = limits {
            let body = json!({"qos_specs": {"name": name, "consumer": consumer, "total_iops_sec": iops.to_string()}});
            let limits = id_of(&self.env.tell(Service::Cinder, &Method::POST, "qos-specs", &body)["qos_specs"]);
            self.made.borrow_mut().limits.push(limits.clone());
            self.env.get(Service::Cinder, &format!("qos-specs/{limits}/associate?vol_type_id={made}"));
        }
        name
    }

    /// Removes a snapshot of Cinder's.
    #[track_caller]
    pub(crate) fn remove_snapshot(&self, id: &str) {
        self.try_remove_snapshot(id).unwrap_or_else(|error| panic!("{error}"));
    }

    /// A snapshot of Cinder's.
    #[track_caller]
    pub(crate) fn snapshot(&self, volume: &str) -> String {
        let body = json!({"snapshot": {"volume_id": volume, "name": unique("snapshot"), "force": true}});
        let answer = self.env.tell(Service::Cinder, &Method::POST, "snapshots", &body);
        let id = answer["snapshot"]["id"].as_str().expect("it has an id").to_owned();
        self.made.borrow_mut().snapshots.push(id.clone());
        self.env.wait_for("a snapshot that is available", || {
            let status = self.env.get(Service::Cinder, &format!("snapshots/{id}"))["snapshot"]["status"].take();
            if status == "available" { Ok(()) } else { Err(status.to_string()) }
        });
        id
    }

    /// A server that boots from the first of the volumes, and runs when this is done. `more` is more of what Nova is
    /// told.
    #[track_caller]
    pub(crate) fn boot(&self, name: &str, volumes: &[String], more: &Value) -> CloudGuest<'a> {
        self.booted(self.make(name, volumes, more))
    }

    /// The same, which may not run yet.
    #[track_caller]
    pub(crate) fn make(&self, name: &str, volumes: &[String], more: &Value) -> Booting {
        let env = self.env;
        let flavors = env.get(Service::Nova, "flavors");
        let tiny = flavors["flavors"].as_array().into_iter().flatten().find(|flavor| flavor["name"] == "tiny");
        let disk = |(index, id): (usize, &String)| {
            json!({
                "boot_index": if index == 0 { 0 } else { -1 }, "uuid": id, "source_type": "volume",
                // One of each kind.
                "destination_type": "volume", "delete_on_termination": index == 1,
            })
        };
        let mut server = json!({
            "name": name, "flavorRef": tiny.expect("there is a flavor tiny")["id"], "networks": "none",
            "block_device_mapping_v2": volumes.iter().enumerate().map(disk).collect::<Vec<_>>(),
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            server[key] = value.clone();
        }
        let answer = env.tell(Service::Nova, &Method::POST, "servers", &json!({"server": server}));
        let id = answer["server"]["id"].as_str().expect("it has an id").to_owned();
        self.made.borrow_mut().servers.push(id.clone());
        let recorder = self.recorder(&id, Vec::new());
        Booting { name: name.to_owned(), id, volumes: volumes.to_vec(), recorder }
    }

    /// Waits until a server runs.
    #[track_caller]
    pub(crate) fn booted(&self, made: Booting) -> CloudGuest<'a> {
        let Booting { name, id, volumes, recorder } = made;
        let guest = self.guest(&name, (&id, &volumes), recorder);
        guest.wait_for("the guest to boot", |console| console.all("READY").next().map(drop));
        guest
    }

    fn recorder(&self, id: &str, before: Vec<u8>) -> Recorder {
        Recorder::start(self.env.console_file(id), before)
    }

    fn guest(&self, name: &str, (id, volumes): (&str, &[String]), recorder: Recorder) -> CloudGuest<'a> {
        let env = self.env;
        let shown = env.wait_for_server(id, "ACTIVE");
        CloudGuest::new((env, env.folder.join("chroot")), name, &shown, volumes, recorder)
    }

    /// A server that somebody else has made from these volumes, with the guest that was another server's: what that has
    /// printed it has printed. It goes with the rest.
    #[track_caller]
    pub(crate) fn follow(&self, old: &CloudGuest<'_>, id: &str, volumes: &[String]) -> CloudGuest<'a> {
        let recorder = self.recorder(id, old.printed());
        self.guest("again", (id, volumes), recorder)
    }

    /// What others have made, by the test's doing: it goes with the rest.
    pub(crate) fn adopt(&self, servers: &[String], volumes: &[String]) {
        let mut made = self.made.borrow_mut();
        let Made { servers: had_servers, volumes: had_volumes, .. } = &mut *made;
        for (had, more) in [(had_servers, servers), (had_volumes, volumes)] {
            let new: Vec<String> = more.iter().filter(|id| !had.contains(id)).cloned().collect();
            had.extend(new);
        }
    }

    /// Ports that outlive their server go with the rest.
    pub(crate) fn adopt_ports(&self, server: &str) {
        let ports = self.env.ports(server).into_iter().filter_map(|port| Some(port["id"].as_str()?.to_owned()));
        self.made.borrow_mut().ports.extend(ports);
    }

    /// Gives a volume to a server that runs.
    #[track_caller]
    pub(crate) fn attach(&self, server: &str, volume: &str) {
        let path = format!("servers/{server}/os-volume_attachments");
        self.env.tell(Service::Nova, &Method::POST, &path, &json!({"volumeAttachment": {"volumeId": volume}}));
        self.env.wait_for_volume(volume, "in-use");
    }

    /// Deletes a server as its owner does.
    #[track_caller]
    pub(crate) fn delete_server(&self, id: &str) {
        self.try_delete_server(id).unwrap_or_else(|error| panic!("{error}"));
    }

    fn try_delete_server(&self, id: &str) -> Result<(), String> {
        let path = format!("servers/{id}");
        self.env.ask(Service::Nova, &Method::DELETE, &path, None)?;
        self.env.try_wait_for(&format!("the end of server {id}"), &mut || match self.env.ask(
            Service::Nova,
            &Method::GET,
            &path,
            None,
        )? {
            (404, _) => Ok(()),
            (_, shown) => Err(shown["server"]["status"].to_string()),
        })
    }

    /// Deletes a volume as its owner does.
    #[track_caller]
    pub(crate) fn delete_volume(&self, id: &str) {
        let path = format!("volumes/{id}");
        self.env.tell(Service::Cinder, &Method::DELETE, &path, &Value::Null);
        self.env.wait_for("the end of a volume", || {
            match self.env.ask(Service::Cinder, &Method::GET, &path, None)? {
                (404, _) => Ok(()),
                (_, shown) => Err(shown["volume"]["status"].to_string()),
            }
        });
    }

    fn try_remove_snapshot(&self, id: &str) -> Result<(), String> {
        let path = format!("snapshots/{id}");
        self.env.ask(Service::Cinder, &Method::DELETE, &path, None)?;
        self.env.try_wait_for(&format!("the end of snapshot {id}"), &mut || match self.env.ask(
            Service::Cinder,
            &Method::GET,
            &path,
            None,
        )? {
            (404, _) => Ok(()),
            (_, shown) => Err(shown["snapshot"]["status"].to_string()),
        })
    }

    /// Whatever has become of it.
    fn try_remove_volume(&self, id: &str) -> Result<(), String> {
        let env = self.env;
        let path = format!("volumes/{id}");
        let is_gone = || matches!(env.ask(Service::Cinder, &Method::GET, &path, None), Ok((404, _)));
        // Cinder moves an image with snapshots that it does not know into the trash.
        for pool in ["sata", "sas"] {
            for image in try_images(&env.ceph, pool, id)? {
                let _ = rbd_command(&env.ceph).args(["snap", "purge", "--no-progress", &image]).output();
            }
        }
        if !is_gone() {
            for action in [
                json!({"os-reset_status": {"status": "available", "attach_status": "detached", "migration_status": "none"}}),
                json!({"os-force_delete": {}}),
            ] {
                env.ask(Service::Cinder, &Method::POST, &format!("{path}/action"), Some(&action))?;
            }
            env.try_wait_for(&format!("the end of volume {id}"), &mut || {
                if is_gone() { Ok(()) } else { Err("it is still there".into()) }
            })?;
        }
        // What a process that was killed has open stays open for half a minute.
        env.try_wait_for(&format!("the end of the images of volume {id}"), &mut || {
            let mut left = Ok(());
            for pool in ["sata", "sas"] {
                for image in try_images(&env.ceph, pool, id)? {
                    let _ = rbd_command(&env.ceph).args(["snap", "purge", "--no-progress", &image]).output();
                    let removed = rbd_command(&env.ceph).args(["rm", "--no-progress", &image]).output();
                    if !removed.is_ok_and(|output| output.status.success()) {
                        left = Err(image);
                    }
                }
            }
            left
        })
    }

    fn clean_up(&self) -> Result<(), String> {
        let made = self.made.take();
        let mut done = Ok(());
        let mut note = |result: Result<(), String>| {
            if let Err(error) = result {
                eprintln!("cleaning up: {error}");
                done = Err(error);
            }
        };
        made.servers.iter().for_each(|id| note(self.try_delete_server(id)));
        for id in &made.ports {
            note(self.env.ask(Service::Neutron, &Method::DELETE, &format!("ports/{id}"), None).map(drop));
        }
        made.snapshots.iter().for_each(|id| note(self.try_remove_snapshot(id)));
        made.volumes.iter().for_each(|id| note(self.try_remove_volume(id)));
        for id in &made.volume_types {
            note(self.env.ask(Service::Cinder, &Method::DELETE, &format!("types/{id}"), None).map(drop));
        }
        for id in &made.limits {
            note(self.env.ask(Service::Cinder, &Method::DELETE, &format!("qos-specs/{id}?force=true"), None).map(drop));
        }
        for name in &made.key_pairs {
            note(self.env.ask(Service::Nova, &Method::DELETE, &format!("os-keypairs/{name}"), None).map(drop));
        }
        done
    }
}

fn try_images(ceph: &CephEnv, pool: &str, with: &str) -> Result<Vec<String>, String> {
    let listed = rbd_command(ceph).args(["ls", pool]).output().map_err(|error| error.to_string())?;
    let names = String::from_utf8_lossy(&listed.stdout).into_owned();
    Ok(names.lines().filter(|name| name.contains(with)).map(|name| format!("{pool}/{name}")).collect())
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        let done = self.clean_up();
        // A second panic would end the process, and say nothing of the first.
        assert!(done.is_ok() || std::thread::panicking(), "something is left for the next test: {done:?}");
    }
}
