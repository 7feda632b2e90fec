//! A real OpenStack, as `scripts/openstack-dev` makes it: its services, as somebody reaches them, and what they say.

use std::cell::RefCell;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::openstack_world::unique;
use crate::support::{CephEnv, Turn, ceph, required, set_variables};
use crate::vm::{clients, rbd, rbd_command, run, run_for_text};

/// How long anything of the cloud's may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often it is looked.
const POLL: Duration = Duration::from_millis(100);

/// A cloud of `scripts/openstack-dev`, and the cluster that its volumes are on. The test has a project and a user of its
/// own, so that what it lists and counts is its own.
pub(crate) struct OpenStackEnv {
    pub(crate) ceph: CephEnv,
    pub(crate) folder: PathBuf,
    api: Api,
    account: Account,
    _turn: Arc<Turn>,
}

/// The project and the user of a test. The user is an administrator of the cloud.
struct Account {
    administrator: Api,
    project: String,
    user: String,
}

/// The cloud and its cluster, side by side with other tests.
///
/// # Panics
/// If one is missing: `scripts/test` starts both.
#[track_caller]
pub(crate) fn openstack() -> OpenStackEnv {
    cloud(false)
}

/// The same for a test that stops a service of the cloud: no other test uses the cloud meanwhile.
#[track_caller]
pub(crate) fn openstack_alone() -> OpenStackEnv {
    cloud(true)
}

#[track_caller]
fn cloud(alone: bool) -> OpenStackEnv {
    let folder = PathBuf::from(required("POOLSHIFT_TEST_OPENSTACK", "an OpenStack"));
    let turn = Turn::take(&folder, "cloud", alone);
    let administrator = Api::of(variable("OS_USERNAME"), variable("OS_PROJECT_NAME"));
    let (user, project) = (unique("user"), unique("project"));
    let account = Account::make(administrator, &user, &project);
    set_variables(&[("OS_USERNAME", &user), ("OS_PROJECT_NAME", &project)]);
    OpenStackEnv { ceph: ceph(), folder, api: Api::of(user, project), account, _turn: turn }
}

impl Account {
    #[track_caller]
    fn make(administrator: Api, user: &str, project: &str) -> Self {
        let tell = |method: &Method, path: &str, body: &Value| {
            let body = Some(body).filter(|body| !body.is_null());
            let answer = administrator.call(Service::Keystone, method, path, body);
            let (status, answer) = answer.unwrap_or_else(|error| panic!("{error}"));
            assert!((200..300).contains(&status), "{method} {path}: {status} {answer:#}");
            answer
        };
        let id = |value: &Value| value["id"].as_str().expect("it has an id").to_owned();
        let body = json!({"project": {"name": project, "domain_id": "default"}});
        let project = id(&tell(&Method::POST, "projects", &body)["project"]);
        let body = json!({"user": {"name": user, "domain_id": "default", "password": variable("OS_PASSWORD")}});
        let user = id(&tell(&Method::POST, "users", &body)["user"]);
        let role = id(&tell(&Method::GET, "roles?name=admin", &Value::Null)["roles"][0]);
        tell(&Method::PUT, &format!("projects/{project}/users/{user}/roles/{role}"), &Value::Null);
        Self { administrator, project, user }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        for path in [format!("users/{}", self.user), format!("projects/{}", self.project)] {
            let removed = self.administrator.call(Service::Keystone, &Method::DELETE, &path, None);
            let is_gone = matches!(removed, Ok((204, _)));
            assert!(is_gone || std::thread::panicking(), "{path} is left: {removed:?}");
        }
    }
}

/// A service of the cloud.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    Cinder,
    Nova,
    Neutron,
    Keystone,
}

/// The cloud's services, as somebody reaches them. What a test looks at, it does not see through poolshift's
/// own client.
struct Api {
    runtime: tokio::runtime::Runtime,
    http: reqwest::Client,
    auth_url: String,
    user: String,
    project: String,
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
    fn of(user: String, project: String) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let http = reqwest::Client::builder().timeout(Duration::from_secs(120)).build().expect("a client");
        Self { runtime, http, auth_url: variable("OS_AUTH_URL"), user, project, token: RefCell::default() }
    }

    fn authenticate(&self) -> Result<(), String> {
        let domain = json!({"id": "default"});
        let body = json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": {
                "name": self.user, "password": variable("OS_PASSWORD"), "domain": domain,
            }}},
            "scope": {"project": {"name": self.project, "domain": domain}},
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

    /// The token, which is asked for where there is none yet.
    fn token(&self) -> Result<Token, String> {
        if self.token.borrow().text.is_empty() {
            self.authenticate()?;
        }
        Ok(self.token.borrow().clone())
    }

    fn call(
        &self,
        service: Service,
        method: &Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(u16, Value), String> {
        let url = format!("{}/{path}", address(&self.auth_url, service, &self.token()?.project));
        let version = match service {
            Service::Cinder => "volume 3.27",
            Service::Nova => "compute 2.79",
            Service::Neutron => "network 2.0",
            Service::Keystone => "identity 3.0",
        };
        // It makes key pairs up to there only.
        let version = if path.starts_with("os-keypairs") { "compute 2.1" } else { version };
        self.call_at(&url, method, version, body)
    }

    fn call_at(&self, url: &str, method: &Method, version: &str, body: Option<&Value>) -> Result<(u16, Value), String> {
        for fresh in [false, true] {
            if fresh {
                self.authenticate()?;
            }
            let mut request = self.http.request(method.clone(), url).header("X-Auth-Token", self.token()?.text);
            request = request.header("OpenStack-API-Version", version);
            if let Some(body) = body {
                request = request.json(body);
            }
            let answer = self.runtime.block_on(async {
                let response = request.send().await?;
                Ok::<_, reqwest::Error>((response.status().as_u16(), response.bytes().await?))
            });
            let (status, body) = answer.map_err(|error| format!("{method} {url}: {error}"))?;
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
        Service::Neutron => format!("{host}:9696/v2.0"),
        Service::Keystone => auth_url.to_owned(),
    }
}

impl OpenStackEnv {
    /// The id of the project that the tests work in.
    pub(crate) fn project(&self) -> String {
        self.account.project.clone()
    }

    /// The id of the user that the test is for the cloud.
    pub(crate) fn user(&self) -> &str {
        &self.account.user
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
        Api::of("tenant".into(), self.api.project.clone()).call(Service::Nova, method, path, body)
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

    /// The ports of a server, by their ids.
    #[track_caller]
    pub(crate) fn ports(&self, server: &str) -> Vec<Value> {
        let mut found = self.get(Service::Neutron, &format!("ports?device_id={server}"))["ports"].take();
        let found = found.as_array_mut().expect("a list");
        found.sort_by_key(|port| port["id"].to_string());
        std::mem::take(found)
    }

    /// Waits until something is so, and gives it back.
    #[track_caller]
    pub(crate) fn wait_for<T>(&self, what: &str, mut found: impl FnMut() -> Result<T, String>) -> T {
        self.try_wait_for(what, &mut found).unwrap_or_else(|error| panic!("{error}"))
    }

    pub(crate) fn try_wait_for<T>(
        &self,
        what: &str,
        found: &mut dyn FnMut() -> Result<T, String>,
    ) -> Result<T, String> {
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

/// A second API of Nova's, which keeps for a while what is deleted: it is the API that decides that. It ends when this goes.
pub(crate) struct KeepingApi<'a> {
    env: &'a OpenStackEnv,
}

impl<'a> KeepingApi<'a> {
    const SERVICE: &'static str = "nova-api-keeping";
    const PORT: u16 = 18774;

    #[track_caller]
    pub(crate) fn start(env: &'a OpenStackEnv) -> Self {
        let file = |path: &str| env.folder.join(path).display().to_string();
        let port = format!("osapi_compute_listen_port = {}", Self::PORT);
        let text = format!("[DEFAULT]\nreclaim_instance_interval = 86400\n{port}\n");
        std::fs::write(file("etc/nova-keeping.conf"), text).expect("it can be configured");
        // As scripts/openstack-dev starts the first one.
        let start = "log=$1 pid=$2; shift 2; setsid \"$@\" >>\"$log\" 2>&1 </dev/null & echo $! >\"$pid\"";
        let main = "import sys; sys.argv[0] = 'nova-api'; from nova.cmd.api import main; sys.exit(main())";
        let mut command = Command::new(env.folder.join("chroot"));
        command.args(["sh", "-c", start, "sh"]);
        command.args([file(&format!("log/{}.log", Self::SERVICE)), file(&format!("run/{}.pid", Self::SERVICE))]);
        command.args(["/usr/bin/python3", "-W", "ignore", "-c", main]);
        command.args(["--config-file", &file("etc/nova.conf"), "--config-file", &file("etc/nova-keeping.conf")]);
        run(&mut command);
        Self { env }
    }

    /// Deletes a server as its owner does: Nova stops it, and keeps it.
    #[track_caller]
    pub(crate) fn delete(&self, id: &str) {
        let env = self.env;
        let url = format!("{}:{}/v2.1/servers/{id}", host(&env.api.auth_url), Self::PORT);
        env.wait_for("the second API", || match env.api.call_at(&url, &Method::DELETE, "compute 2.79", None) {
            Ok((204, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        });
        env.wait_for_server(id, "SOFT_DELETED");
    }
}

impl Drop for KeepingApi<'_> {
    fn drop(&mut self) {
        // A second panic would end the process, and say nothing of the first.
        if !std::thread::panicking() {
            self.env.signal(Self::SERVICE, "TERM");
        }
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
