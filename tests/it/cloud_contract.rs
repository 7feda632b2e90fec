//! What the tests on the simulated cloud lean on, held against it and against a real one by the same code: what requests
//! are answered with, what becomes of volumes, servers and images, and what is accepted and comes to nothing.

use std::time::{Duration, Instant};

use poolshift::image::Layout;
use poolshift::image::memory::{MemoryImage, MemoryPools};
use poolshift::openstack::sim::SimCloud;
use reqwest::Method;
use serde_json::{Value, json};

use crate::openstack_env::{OpenStackEnv, openstack};
use crate::openstack_world::{World, unique};
use crate::support::required;

/// How long anything may take: a real cloud boots an emulated guest.
const PATIENCE: Duration = Duration::from_secs(300);

const NOBODY: &str = "00000000-0000-4000-8000-000000000001";

/// What stands behind a cloud, and is made and looked at past its services.
trait Bed {
    /// A volume of the type `sata` that nobody has.
    fn volume(&self) -> String;
    /// A server that runs, with the volumes that it boots from and writes to.
    fn server(&self) -> (String, [String; 2]);
    /// A snapshot of a volume, as Cinder knows it.
    fn snapshot(&self, http: &Http, volume: &str);
    /// The images with a volume's id in their names, each as `POOL/NAME`.
    fn images(&self, volume: &str) -> Vec<String>;
    fn create_image(&self, pool: &str, name: &str);
    fn remove_image(&self, pool: &str, name: &str);
}

struct Real<'a> {
    env: &'a OpenStackEnv,
    world: World<'a>,
}

impl Bed for Real<'_> {
    fn volume(&self) -> String {
        self.world.volumes(&[unique("contract")]).remove(0)
    }

    fn server(&self) -> (String, [String; 2]) {
        let name = unique("contract");
        let volumes = self.world.guest_volumes("sata", &name);
        let guest = self.world.boot(&name, &volumes, &Value::Null);
        (guest.id.clone(), volumes.try_into().expect("two volumes"))
    }

    fn snapshot(&self, _: &Http, volume: &str) {
        self.world.snapshot(volume);
    }

    fn images(&self, volume: &str) -> Vec<String> {
        let of = |pool: &&str| self.env.images(pool, volume).into_iter().map(|name| format!("{pool}/{name}")).collect();
        ["sata", "sas"].iter().map(of).collect::<Vec<Vec<String>>>().concat()
    }

    fn create_image(&self, pool: &str, name: &str) {
        self.env.rbd(&["create", &format!("{pool}/{name}"), "--size", "4M"]);
    }

    fn remove_image(&self, pool: &str, name: &str) {
        self.env.rbd(&["rm", "--no-progress", &format!("{pool}/{name}")]);
    }
}

impl Bed for SimCloud {
    fn volume(&self) -> String {
        self.create_volume("sata")
    }

    fn server(&self) -> (String, [String; 2]) {
        let volumes = [self.create_volume("sata"), self.create_volume("sata")];
        (self.create_server(&volumes), volumes)
    }

    fn snapshot(&self, http: &Http, volume: &str) {
        let (status, answer) = http.cinder(&Method::POST, "snapshots", &json!({"snapshot": {"volume_id": volume}}));
        assert_eq!(status, 202, "{answer}");
    }

    fn images(&self, volume: &str) -> Vec<String> {
        let of = |pool: &&str| {
            let names = self.pools().names(pool).into_iter().filter(|name| name.contains(volume));
            names.map(|name| format!("{pool}/{name}")).collect()
        };
        ["sata", "sas"].iter().map(of).collect::<Vec<Vec<String>>>().concat()
    }

    fn create_image(&self, pool: &str, name: &str) {
        let layout = Layout { object_size: 4096, stripe_unit: 4096, stripe_count: 1 };
        self.pools().add(pool, MemoryImage::new(name, 4096, layout));
    }

    fn remove_image(&self, pool: &str, name: &str) {
        assert!(self.pools().remove(pool, name), "{pool}/{name} is there");
    }
}

/// The services of a cloud, by its catalog.
struct Http {
    runtime: tokio::runtime::Runtime,
    http: reqwest::Client,
    auth_url: String,
    /// What Keystone gives a token for.
    credentials: Value,
    token: String,
    volume_url: String,
    compute_url: String,
}

/// Gets a token, and what Keystone says with it.
async fn authenticate(http: &reqwest::Client, auth_url: &str, credentials: &Value) -> (String, Value) {
    let request = http.post(format!("{auth_url}/auth/tokens")).json(credentials);
    let response = request.send().await.expect("Keystone answers");
    assert_eq!(response.status().as_u16(), 201);
    let token = response.headers()["X-Subject-Token"].to_str().expect("a token").to_owned();
    (token, response.json().await.expect("JSON"))
}

impl Http {
    /// Where Keystone is (`…/v3`), and who is to be authenticated.
    fn log_in(
        runtime: tokio::runtime::Runtime,
        auth_url: String,
        user: &Value,
        project: &Value,
        password: &str,
    ) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut user = user.clone();
        user["password"] = password.into();
        let identity = json!({"methods": ["password"], "password": {"user": user}});
        let body = json!({"auth": {"identity": identity, "scope": {"project": project}}});
        let http = reqwest::Client::new();
        let (token, answer) = runtime.block_on(authenticate(&http, &auth_url, &body));
        let url = |service: &str| {
            let catalog = answer["token"]["catalog"].as_array().expect("a catalog");
            let found = catalog.iter().find(|entry| entry["type"] == service).expect("the service is in the catalog");
            let public = found["endpoints"].as_array().expect("a list").iter().find(|one| one["interface"] == "public");
            public.and_then(|one| one["url"].as_str()).expect("an address").to_owned()
        };
        let (volume_url, compute_url) = (url("volumev3"), url("compute"));
        Self { runtime, http, auth_url, credentials: body, token, volume_url, compute_url }
    }

    fn send(&self, url: &str, method: &Method, body: &Value) -> (u16, Value) {
        let mut request = self.http.request(method.clone(), url).header("X-Auth-Token", &self.token);
        let version = if url.starts_with(&self.volume_url) { "volume 3.27" } else { "compute 2.79" };
        request = request.header("OpenStack-API-Version", version);
        if !body.is_null() {
            request = request.json(body);
        }
        self.runtime.block_on(async {
            let response = request.send().await.expect("it answers");
            let status = response.status().as_u16();
            let body = response.bytes().await.expect("a whole answer");
            (status, serde_json::from_slice(&body).unwrap_or_default())
        })
    }

    fn cinder(&self, method: &Method, path: &str, body: &Value) -> (u16, Value) {
        self.send(&format!("{}/{path}", self.volume_url), method, body)
    }

    fn nova(&self, method: &Method, path: &str, body: &Value) -> (u16, Value) {
        self.send(&format!("{}/{path}", self.compute_url), method, body)
    }
}

/// A cloud, and what stands behind it.
struct Cloud<'a> {
    http: Http,
    bed: &'a dyn Bed,
}

impl Cloud<'_> {
    fn volume(&self, id: &str) -> Value {
        let (status, mut answer) = self.http.cinder(&Method::GET, &format!("volumes/{id}"), &Value::Null);
        assert_eq!(status, 200, "{answer}");
        answer["volume"].take()
    }

    fn server(&self, id: &str) -> Value {
        let (status, mut answer) = self.http.nova(&Method::GET, &format!("servers/{id}"), &Value::Null);
        assert_eq!(status, 200, "{answer}");
        answer["server"].take()
    }

    /// The status that an action on a volume is answered with.
    fn act(&self, volume: &str, action: &Value) -> u16 {
        let (status, answer) = self.http.cinder(&Method::POST, &format!("volumes/{volume}/action"), action);
        println!("{action}: {status} {answer}");
        status
    }

    fn act_on_server(&self, server: &str, action: &str) -> u16 {
        let (status, answer) =
            self.http.nova(&Method::POST, &format!("servers/{server}/action"), &json!({action: null}));
        println!("{action}: {status} {answer}");
        status
    }

    fn retype(&self, volume: &str, to: &str, policy: &str) -> u16 {
        self.act(volume, &json!({"os-retype": {"new_type": to, "migration_policy": policy}}))
    }

    fn reset(&self, volume: &str, status: &str) -> u16 {
        self.act(volume, &json!({"os-reset_status": {"status": status}}))
    }

    fn attach(&self, server: &str, volume: &str) -> u16 {
        let body = json!({"volumeAttachment": {"volumeId": volume}});
        self.http.nova(&Method::POST, &format!("servers/{server}/os-volume_attachments"), &body).0
    }

    fn detach(&self, server: &str, volume: &str) -> u16 {
        let path = format!("servers/{server}/os-volume_attachments/{volume}");
        self.http.nova(&Method::DELETE, &path, &Value::Null).0
    }

    /// The volumes that Nova names for a server.
    fn named(&self, server: &str) -> Vec<String> {
        let path = format!("servers/{server}/os-volume_attachments");
        let (status, answer) = self.http.nova(&Method::GET, &path, &Value::Null);
        assert_eq!(status, 200, "{answer}");
        let all = answer["volumeAttachments"].as_array().expect("a list").iter();
        all.map(|one| one["volumeId"].as_str().expect("an id").to_owned()).collect()
    }

    #[track_caller]
    fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !done() {
            assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Waits until nothing is under way with a volume, which has that status then.
    #[track_caller]
    fn rests(&self, id: &str, status: &str) -> Value {
        self.wait(&format!("volume {id} that is {status}"), || {
            let volume = self.volume(id);
            volume["status"] == status && volume["migration_status"] != "migrating"
        });
        self.volume(id)
    }

    #[track_caller]
    fn is(&self, server: &str, status: &str) -> Value {
        self.wait(&format!("server {server} that is {status}"), || {
            let shown = self.server(server);
            shown["status"] == status && shown["OS-EXT-STS:task_state"].is_null()
        });
        self.server(server)
    }

    #[track_caller]
    fn images_are(&self, volume: &str, wanted: &[&str]) {
        let wanted: Vec<String> = wanted.iter().map(|pool| format!("{pool}/volume-{volume}")).collect();
        // Cinder removes what it has copied a moment after it says that it is done.
        self.wait(&format!("the images {wanted:?}"), || self.bed.images(volume) == wanted);
    }
}

fn a_retype_moves_the_image_of_the_volume_s_name(cloud: &Cloud<'_>) {
    let id = cloud.bed.volume();
    let kept = format!("volume-{id}.kept");
    cloud.bed.create_image("sata", &kept);
    assert_eq!(cloud.retype(&id, "sas", "on-demand"), 202);
    // While it is at it, it takes no second one.
    assert_eq!(cloud.retype(&id, "sas", "on-demand"), 400);
    cloud.wait("the other type", || cloud.volume(&id)["volume_type"] == "sas");
    let shown = cloud.rests(&id, "available");
    assert_eq!(
        (&shown["migration_status"], &shown["os-vol-host-attr:host"]),
        (&json!("success"), &json!("vm@sas#sas"))
    );
    cloud.wait("the image in the other pool", || {
        cloud.bed.images(&id) == [format!("sata/{kept}"), format!("sas/volume-{id}")]
    });
    cloud.bed.remove_image("sata", &kept);
    // By itself it goes to no other pool.
    assert_eq!(cloud.retype(&id, "sata", "never"), 202);
    cloud.rests(&id, "available");
    assert_eq!(cloud.volume(&id)["volume_type"], "sas");
    cloud.images_are(&id, &["sas"]);
}

fn a_retype_that_can_t_be_is_accepted_and_comes_to_nothing(cloud: &Cloud<'_>) {
    let id = cloud.bed.volume();
    let name = format!("volume-{id}");
    let fails = |migration: &Value| {
        assert_eq!(cloud.retype(&id, "sas", "on-demand"), 202);
        let shown = cloud.rests(&id, "available");
        assert_eq!((&shown["volume_type"], &shown["migration_status"]), (&json!("sata"), migration), "{shown:#}");
    };
    // What has the volume's name in the other pool is deleted.
    cloud.bed.create_image("sas", &name);
    fails(&json!("error"));
    cloud.images_are(&id, &["sata"]);
    assert_eq!(cloud.act(&id, &json!({"os-reset_status": {"migration_status": "none"}})), 202);
    assert_eq!(cloud.volume(&id)["migration_status"], Value::Null);
    cloud.bed.snapshot(&cloud.http, &id);
    fails(&Value::Null);
    cloud.images_are(&id, &["sata"]);

    let other = cloud.bed.volume();
    cloud.bed.remove_image("sata", &format!("volume-{other}"));
    assert_eq!(cloud.retype(&other, "sas", "on-demand"), 202);
    assert_eq!(cloud.rests(&other, "available")["migration_status"], "error");
    cloud.bed.create_image("sata", &format!("volume-{other}"));
}

fn what_a_volume_s_status_allows(cloud: &Cloud<'_>) {
    let id = cloud.bed.volume();
    assert_eq!(cloud.retype(&id, "sata", "on-demand"), 400, "its own type");
    assert_eq!(cloud.retype(&id, "no-such", "on-demand"), 404);
    assert_eq!(cloud.reset(&id, "nonsense"), 400);
    assert_eq!(cloud.reset(&id, "in-use"), 400, "nobody has it");
    for status in ["maintenance", "reserved", "error", "attaching", "detaching"] {
        assert_eq!(cloud.reset(&id, status), 202);
        assert_eq!(cloud.volume(&id)["status"], status);
        assert_eq!(cloud.retype(&id, "sas", "on-demand"), 400, "{status}");
    }
    assert_eq!(cloud.reset(&id, "maintenance"), 202);
    let snapshot = json!({"snapshot": {"volume_id": id, "name": "it", "force": true}});
    assert_eq!(cloud.http.cinder(&Method::POST, "snapshots", &snapshot).0, 400);
    assert_eq!(cloud.reset(&id, "available"), 202);
    let get = |path: String| cloud.http.cinder(&Method::GET, &path, &Value::Null).0;
    assert_eq!((get(format!("volumes/{NOBODY}")), get(format!("attachments/{NOBODY}"))), (404, 404));
}

fn a_disk_is_taken_from_a_running_server_and_given_back(cloud: &Cloud<'_>, server: &str, volumes: &[String; 2]) {
    let [root, data] = volumes;
    let had = cloud.volume(data)["attachments"][0]["attachment_id"].clone();
    assert_eq!(cloud.detach(server, root), 400, "it boots from that");
    assert_eq!((cloud.detach(server, NOBODY), cloud.attach(server, NOBODY)), (404, 404));
    assert_eq!(cloud.attach(server, data), 400, "it has that");
    assert_eq!(cloud.detach(server, data), 202);
    assert_eq!(cloud.detach(server, data), 400, "it is being taken");
    let shown = cloud.rests(data, "available");
    assert_eq!(shown["attachments"], json!([]));
    cloud.wait("the end of what Nova names", || cloud.named(server) == [root.clone()]);
    assert_eq!(cloud.detach(server, data), 404);
    assert_eq!(cloud.reset(data, "maintenance"), 202);
    assert_eq!(cloud.attach(server, data), 400, "it is kept from everybody");
    assert_eq!(cloud.reset(data, "available"), 202);
    assert_eq!(cloud.attach(server, data), 200);
    assert!(cloud.named(server).contains(data), "Nova names it at once");
    let shown = cloud.rests(data, "in-use");
    let record = &shown["attachments"][0];
    assert_eq!((&record["server_id"], &record["device"]), (&json!(server), &json!("/dev/vdb")));
    assert_ne!(record["attachment_id"], had);
    assert_eq!(cloud.server(server)["status"], "ACTIVE");
}

/// The image that a server was told of, by its attachment.
fn told(cloud: &Cloud<'_>, volume: &str) -> Value {
    let record = cloud.volume(volume)["attachments"][0]["attachment_id"].as_str().expect("an id").to_owned();
    let (status, answer) = cloud.http.cinder(&Method::GET, &format!("attachments/{record}"), &Value::Null);
    assert_eq!(status, 200, "{answer}");
    answer["attachment"]["connection_info"]["name"].clone()
}

fn a_shelved_server_comes_back_from_where_its_volumes_are(cloud: &Cloud<'_>, server: &str, volumes: &[String; 2]) {
    let refused = |actions: &[&str]| {
        for action in actions {
            assert_eq!(cloud.act_on_server(server, action), 409, "{action}");
        }
    };
    refused(&["unshelve", "os-start"]);
    for (action, locked) in [("lock", true), ("lock", true), ("unlock", false), ("lock", true)] {
        assert_eq!(cloud.act_on_server(server, action), 202);
        assert_eq!(cloud.server(server)["locked"], locked);
    }
    assert_eq!(told(cloud, &volumes[0]), format!("sata/volume-{}", volumes[0]));
    assert_eq!(cloud.act_on_server(server, "shelve"), 202);
    assert_eq!(cloud.server(server)["OS-EXT-STS:task_state"], "shelving");
    refused(&["shelve"]);
    cloud.is(server, "SHELVED_OFFLOADED");
    cloud.wait("a server without a host", || cloud.server(server)["OS-EXT-SRV-ATTR:host"].is_null());
    refused(&["shelve", "os-start", "os-stop"]);
    assert_eq!(cloud.named(server), volumes, "Nova names them all the time");
    for id in volumes {
        let shown = cloud.rests(id, "reserved");
        assert_eq!(shown["attachments"], json!([]));
        assert_eq!(cloud.retype(id, "sas", "on-demand"), 400, "it is reserved");
        assert_eq!(cloud.reset(id, "available"), 202);
        assert_eq!(cloud.retype(id, "sas", "on-demand"), 202);
        cloud.wait("the other type", || cloud.volume(id)["volume_type"] == "sas");
        cloud.rests(id, "available");
    }
    // Its volumes need not be reserved for it, as their attachments still are.
    assert_eq!(cloud.act_on_server(server, "unshelve"), 202);
    assert_eq!(cloud.server(server)["OS-EXT-STS:task_state"].as_str().map(|task| task.ends_with("ing")), Some(true));
    cloud.is(server, "ACTIVE");
    for id in volumes {
        cloud.rests(id, "in-use");
        assert_eq!(told(cloud, id), format!("sas/volume-{id}"), "it was told anew");
    }
}

/// A token that the services have not seen yet: one that they have, they take for some minutes more.
fn a_token_that_was_revoked_is_refused(cloud: &mut Cloud<'_>) {
    let id = cloud.bed.volume();
    let Http { runtime, http, auth_url, credentials, token, .. } = &mut cloud.http;
    let (fresh, _) = runtime.block_on(authenticate(http, auth_url, credentials));
    let request = http.delete(format!("{auth_url}/auth/tokens"));
    let request = request.header("X-Auth-Token", fresh.as_str()).header("X-Subject-Token", fresh.as_str());
    let status = runtime.block_on(async { request.send().await.expect("Keystone answers").status() });
    assert_eq!(status.as_u16(), 204);
    *token = fresh;
    let refused = cloud.http.cinder(&Method::GET, &format!("volumes/{id}"), &Value::Null).0;
    assert_eq!((refused, cloud.http.nova(&Method::GET, &format!("servers/{NOBODY}"), &Value::Null).0), (401, 401));
}

fn all_of_it(cloud: &mut Cloud<'_>) {
    a_retype_moves_the_image_of_the_volume_s_name(cloud);
    a_retype_that_can_t_be_is_accepted_and_comes_to_nothing(cloud);
    what_a_volume_s_status_allows(cloud);
    let (server, volumes) = cloud.bed.server();
    let missing = cloud.http.nova(&Method::GET, &format!("servers/{NOBODY}"), &Value::Null).0;
    assert_eq!(missing, 404);
    a_disk_is_taken_from_a_running_server_and_given_back(cloud, &server, &volumes);
    a_shelved_server_comes_back_from_where_its_volumes_are(cloud, &server, &volumes);
    a_token_that_was_revoked_is_refused(cloud);
}

fn runtime() -> tokio::runtime::Runtime {
    // The simulated cloud goes on between requests.
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

#[test]
fn the_simulated_cloud_keeps_the_contract() {
    let runtime = runtime();
    let sim = runtime.block_on(SimCloud::start(MemoryPools::default()));
    let access = sim.access();
    let auth_url = format!("{}/v3", access.auth_url.as_str().trim_end_matches('/'));
    let named = json!({"name": "admin", "domain": {"id": "default"}});
    let http = Http::log_in(runtime, auth_url, &named, &named, "poolshift");
    all_of_it(&mut Cloud { http, bed: &sim });
}

#[test]
#[ignore = "needs OpenStack"]
fn a_real_cloud_keeps_the_contract() {
    let env = openstack();
    let real = Real { env: &env, world: World::new(&env) };
    let variable = |name| required(name, "an OpenStack");
    let (user, project) = (json!({"id": env.user()}), json!({"id": env.project()}));
    let http = Http::log_in(runtime(), variable("OS_AUTH_URL"), &user, &project, &variable("OS_PASSWORD"));
    all_of_it(&mut Cloud { http, bed: &real });
}
