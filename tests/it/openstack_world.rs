//! A real OpenStack, as `scripts/openstack-dev` makes it: servers and volumes for a test, and what is true of them.
//!
//! All that a [`World`] makes is gone with it, also after a test that failed.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::openstack_guest::{CloudGuest, Recorder};
use crate::support::{CephEnv, ceph, skip};
use crate::vm::{Turns, clients, rbd, rbd_command, run, run_for_text};

/// How long anything of the cloud's may take.
const PATIENCE: Duration = Duration::from_secs(180);
/// How often it is looked.
const POLL: Duration = Duration::from_millis(100);

/// One test at a time in the cloud.
static CLOUD: Turns = Turns::new();

/// A cloud of `scripts/openstack-dev`, and the cluster that its volumes are on.
pub(crate) struct OpenStackEnv {
    pub(crate) ceph: CephEnv,
    folder: PathBuf,
    api: Api,
    _alone: MutexGuard<'static, ()>,
}

/// The cloud and its cluster, or `None` after having said, and written down, that the calling test is skipped.
///
/// # Panics
/// If one is missing and `POOLSHIFT_NO_SKIPS=1`.
#[track_caller]
pub(crate) fn openstack() -> Option<OpenStackEnv> {
    let Some(folder) = std::env::var_os("POOLSHIFT_TEST_OPENSTACK").filter(|folder| !folder.is_empty()) else {
        skip("an OpenStack (POOLSHIFT_TEST_OPENSTACK, a folder of scripts/openstack-dev; scripts/test starts one)");
        return None;
    };
    let alone = CLOUD.take();
    let api = Api::of_the_environment(variable("OS_USERNAME"));
    Some(OpenStackEnv { ceph: ceph()?, folder: folder.into(), api, _alone: alone })
}

/// A service of the cloud.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    Cinder,
    Nova,
    Keystone,
}

/// The cloud's services, as somebody reaches them. What a test looks at, it does not see through poolshift's
/// own client.
struct Api {
    runtime: tokio::runtime::Runtime,
    http: reqwest::Client,
    auth_url: String,
    user: String,
    token: RefCell<Token>,
}

#[derive(Clone, Default)]
struct Token {
    text: String,
    project: String,
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: eval \"$(scripts/openstack-dev env)\""))
}

impl Api {
    fn of_the_environment(user: String) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let http = reqwest::Client::builder().timeout(Duration::from_secs(120)).build().expect("a client");
        Self { runtime, http, auth_url: variable("OS_AUTH_URL"), user, token: RefCell::default() }
    }

    fn authenticate(&self) -> Result<(), String> {
        let domain = json!({"id": "default"});
        let body = json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": {
                "name": self.user, "password": variable("OS_PASSWORD"), "domain": domain,
            }}},
            "scope": {"project": {"name": variable("OS_PROJECT_NAME"), "domain": domain}},
        }});
        let url = format!("{}/auth/tokens", self.auth_url);
        let answer = self.runtime.block_on(async {
            let response = self.http.post(url).json(&body).send().await?.error_for_status()?;
            let text = response.headers().get("X-Subject-Token").and_then(|text| text.to_str().ok());
            let text = text.unwrap_or_default().to_owned();
            Ok::<_, reqwest::Error>((text, response.json::<Value>().await?))
        });
        let (text, body) = answer.map_err(|error| format!("get a token: {error}"))?;
        let project = body["token"]["project"]["id"].as_str().unwrap_or_default().to_owned();
        self.token.replace(Token { text, project });
        Ok(())
    }

    fn call(
        &self,
        service: Service,
        method: &Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(u16, Value), String> {
        for fresh in [false, true] {
            if fresh || self.token.borrow().text.is_empty() {
                self.authenticate()?;
            }
            let token = self.token.borrow().clone();
            let url = format!("{}/{path}", address(&self.auth_url, service, &token.project));
            let version = match service {
                Service::Cinder => "volume 3.27",
                Service::Nova => "compute 2.79",
                Service::Keystone => "identity 3.0",
            };
            // It makes key pairs up to there only.
            let version = if path.starts_with("os-keypairs") { "compute 2.1" } else { version };
            let mut request = self.http.request(method.clone(), url).header("X-Auth-Token", token.text);
            request = request.header("OpenStack-API-Version", version);
            if let Some(body) = body {
                request = request.json(body);
            }
            let answer = self.runtime.block_on(async {
                let response = request.send().await?;
                Ok::<_, reqwest::Error>((response.status().as_u16(), response.bytes().await?))
            });
            let (status, body) = answer.map_err(|error| format!("{method} {path}: {error}"))?;
            if status == 401 && !fresh {
                continue;
            }
            return Ok((status, serde_json::from_slice(&body).unwrap_or_default()));
        }
        unreachable!("the second time is the last one")
    }
}

/// What all services of a cloud are on.
pub(crate) fn host(auth_url: &str) -> &str {
    auth_url.strip_suffix(":5000/v3").unwrap_or_else(|| panic!("no address of scripts/openstack-dev: {auth_url}"))
}

/// Where a service is: at the port that it always has.
fn address(auth_url: &str, service: Service, project: &str) -> String {
    let host = host(auth_url);
    match service {
        Service::Cinder => format!("{host}:8776/v3/{project}"),
        Service::Nova => format!("{host}:8774/v2.1"),
        Service::Keystone => auth_url.to_owned(),
    }
}

impl OpenStackEnv {
    /// The id of the project that the tests work in.
    pub(crate) fn project(&self) -> String {
        if self.api.token.borrow().project.is_empty() {
            self.api.authenticate().expect("the cloud knows its administrator");
        }
        self.api.token.borrow().project.clone()
    }

    /// Asks a service, and gives back what it says, whatever that is.
    pub(crate) fn ask(
        &self,
        service: Service,
        method: &Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(u16, Value), String> {
        self.api.call(service, method, path, body)
    }

    /// The same as a user of the project who is no administrator, as the owners of servers are.
    #[track_caller]
    pub(crate) fn ask_as_owner(
        &self,
        method: &Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(u16, Value), String> {
        let id = |what: &str, name: &str| {
            let found = self.get(Service::Keystone, &format!("{what}?name={name}"))[what][0]["id"].take();
            found.as_str().unwrap_or_else(|| panic!("{what}: there is no {name}")).to_owned()
        };
        let (user, role) = (id("users", "tenant"), id("roles", "member"));
        let path_of_role = format!("projects/{}/users/{user}/roles/{role}", self.project());
        self.tell(Service::Keystone, &Method::PUT, &path_of_role, &Value::Null);
        Api::of_the_environment("tenant".into()).call(Service::Nova, method, path, body)
    }

    /// Asks, and is not refused.
    #[track_caller]
    pub(crate) fn tell(&self, service: Service, method: &Method, path: &str, body: &Value) -> Value {
        let body = Some(body).filter(|body| !body.is_null());
        let (status, answer) = self.ask(service, method, path, body).unwrap_or_else(|error| panic!("{error}"));
        assert!((200..300).contains(&status), "{method} {path} {body:?}: {status} {answer:#}");
        answer
    }

    #[track_caller]
    pub(crate) fn get(&self, service: Service, path: &str) -> Value {
        self.tell(service, &Method::GET, path, &Value::Null)
    }

    #[track_caller]
    pub(crate) fn volume(&self, id: &str) -> Value {
        self.get(Service::Cinder, &format!("volumes/{id}"))["volume"].take()
    }

    #[track_caller]
    pub(crate) fn server(&self, id: &str) -> Value {
        self.get(Service::Nova, &format!("servers/{id}"))["server"].take()
    }

    #[track_caller]
    pub(crate) fn volume_action(&self, id: &str, action: &Value) {
        self.tell(Service::Cinder, &Method::POST, &format!("volumes/{id}/action"), action);
    }

    #[track_caller]
    pub(crate) fn server_action(&self, id: &str, action: &Value) {
        self.tell(Service::Nova, &Method::POST, &format!("servers/{id}/action"), action);
    }

    /// Sends a signal to a service.
    #[track_caller]
    pub(crate) fn signal(&self, service: &str, signal: &str) {
        let file = self.folder.join("run").join(format!("{service}.pid"));
        let pid = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let kill = format!("kill -{signal} {}", pid.trim());
        run(Command::new(self.folder.join("chroot")).args(["sh", "-c", &kill]));
    }

    /// Where a server's console is written to, while it is on its host.
    pub(crate) fn console_file(&self, id: &str) -> PathBuf {
        self.folder.join("nova/instances").join(id).join("console.log")
    }

    /// Runs Ceph's own `rbd`.
    #[track_caller]
    pub(crate) fn rbd(&self, words: &[&str]) -> String {
        rbd(&self.ceph, words)
    }

    /// How many clients have an image open.
    #[track_caller]
    pub(crate) fn watchers(&self, image: &str) -> usize {
        clients(&self.ceph, image).len()
    }

    /// The names of the images of a pool with that in it.
    #[track_caller]
    pub(crate) fn images(&self, pool: &str, with: &str) -> Vec<String> {
        self.rbd(&["ls", pool]).lines().filter(|name| name.contains(with)).map(str::to_owned).collect()
    }

    /// The digest of all that an image holds, by what it has allocated.
    #[track_caller]
    pub(crate) fn digest(&self, image: &str) -> String {
        let mut command = rbd_command(&self.ceph);
        let stream = run(command.args(["export-diff", "--no-progress", image, "-"]));
        digest_of_diff(&stream).unwrap_or_else(|| panic!("{image}: its export is cut"))
    }

    /// Runs virsh for the cloud's own libvirt.
    #[track_caller]
    pub(crate) fn virsh(&self, words: &[&str]) -> String {
        run_for_text(
            Command::new(self.folder.join("chroot")).args(["virsh", "--quiet", "-c", "qemu:///system"]).args(words),
        )
    }

    /// Waits until something is so, and gives it back.
    #[track_caller]
    pub(crate) fn wait_for<T>(&self, what: &str, mut found: impl FnMut() -> Result<T, String>) -> T {
        self.try_wait_for(what, &mut found).unwrap_or_else(|error| panic!("{error}"))
    }

    fn try_wait_for<T>(&self, what: &str, found: &mut dyn FnMut() -> Result<T, String>) -> Result<T, String> {
        let begun = Instant::now();
        loop {
            match found() {
                Ok(found) => return Ok(found),
                Err(seen) if begun.elapsed() > PATIENCE => return Err(format!("waited in vain for {what}: {seen}")),
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    /// Waits until a volume has a status, and nothing is under way with it.
    #[track_caller]
    pub(crate) fn wait_for_volume(&self, id: &str, status: &str) -> Value {
        self.wait_for(&format!("volume {id} that is {status}"), || {
            let volume = self.volume(id);
            if volume["status"] == status { Ok(volume) } else { Err(volume["status"].to_string()) }
        })
    }

    /// Waits until a server has a status, and nothing is under way with it.
    #[track_caller]
    pub(crate) fn wait_for_server(&self, id: &str, status: &str) -> Value {
        self.wait_for(&format!("server {id} that is {status}"), || {
            let server = self.server(id);
            let still = server["OS-EXT-STS:task_state"].is_null() && server["status"] == status;
            let seen = || format!("{} {} {}", server["status"], server["OS-EXT-STS:task_state"], server["fault"]);
            if still { Ok(server.clone()) } else { Err(seen()) }
        })
    }
}

/// The digest of a stream of `rbd export-diff` without a beginning. What is zero counts as what was never written.
fn digest_of_diff(stream: &[u8]) -> Option<String> {
    const SECTOR: usize = 512;
    let mut rest = stream.strip_prefix(b"rbd diff v1\n")?;
    let mut hasher = blake3::Hasher::new();
    loop {
        let (tag, after) = rest.split_first()?;
        rest = after;
        let mut number = || {
            let (bytes, after) = rest.split_first_chunk::<8>()?;
            rest = after;
            usize::try_from(u64::from_le_bytes(*bytes)).ok()
        };
        match tag {
            b'e' => return Some(hasher.finalize().to_hex().to_string()),
            b's' => {
                hasher.update(&number()?.to_le_bytes());
            }
            b'z' => drop((number()?, number()?)),
            b'w' => {
                let (offset, length) = (number()?, number()?);
                let (data, after) = rest.split_at_checked(length)?;
                rest = after;
                for (index, sector) in data.chunks(SECTOR).enumerate() {
                    if sector.iter().any(|byte| *byte != 0) {
                        hasher.update(&(offset + index * SECTOR).to_le_bytes());
                        hasher.update(sector);
                    }
                }
            }
            _ => return None,
        }
    }
}

#[test]
fn what_is_in_an_image_has_one_digest_however_it_is_stored() {
    let write =
        |at: u64, data: &[u8]| [&b"w"[..], &at.to_le_bytes(), &(data.len() as u64).to_le_bytes(), data].concat();
    let zero = |at: u64| [&b"z"[..], &at.to_le_bytes(), &512_u64.to_le_bytes()].concat();
    let stream = |records: &[Vec<u8>]| {
        digest_of_diff(&[&b"rbd diff v1\ns"[..], &4096_u64.to_le_bytes(), &records.concat(), b"e"].concat()).unwrap()
    };
    let (one, other) = ([7; 512], [8; 512]);
    let both = stream(&[write(0, &[one, other].concat())]);
    assert_eq!(both, stream(&[write(0, &one), write(512, &other), zero(1024)]));
    assert_eq!(both, stream(&[write(0, &[one, other, [0; 512]].concat())]));
    assert_ne!(both, stream(&[write(0, &one), write(1024, &other)]));
    assert_ne!(both, stream(&[write(0, &one)]));
    assert_eq!(digest_of_diff(b"rbd diff v1\n"), None);
}

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
