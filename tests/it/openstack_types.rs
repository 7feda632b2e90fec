//! Volume types with limits (QoS) and extra specs, for which Cinder would copy everything: volumes get from one to the
//! other by way of plain types, and have the limits of the type that they have then. And who poolshift is for a cloud.

use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};

use crate::cutover_bed::Running;
use crate::openstack_bed::{CloudBed, Types};
use crate::openstack_env::{OpenStackEnv, Service, openstack};
use crate::openstack_world::{Qos, World, unique};

const LIMIT: &str = "rbd_qos_iops_limit";

fn limit_of(env: &OpenStackEnv, image: &str) -> String {
    let all = env.rbd(&["config", "image", "ls", "--format", "json", image]);
    let all: Vec<Value> = serde_json::from_str(&all).expect("JSON");
    let found = all.iter().find(|option| option["name"] == LIMIT);
    found.map(|option| option["value"].as_str().unwrap_or_default().to_owned()).expect("it has a default")
}

/// Types of both pools with the same extra spec, and limits that differ.
fn types(world: &World<'_>, consumer: &str, limits: [u32; 2]) -> Types {
    let of = |pool: &str, limit: u32| {
        let qos = (limit > 0).then(|| Qos { consumer: consumer.into(), iops: limit });
        world.volume_type_with(pool, &[("it:tier", "gold")], qos)
    };
    Types { from: of("sata", limits[0]), to: of("sas", limits[1]), by_way_of: Some(["sata".into(), "sas".into()]) }
}

/// Volumes of types with limits, and what limits their images have, in one pool and the other.
struct Limited<'a> {
    bed: CloudBed<'a>,
    expected: Vec<[&'static str; 2]>,
}

impl<'a> Limited<'a> {
    #[track_caller]
    fn new(env: &'a OpenStackEnv, kinds: &[(&str, [u32; 2], [&'static str; 2])]) -> Self {
        let make =
            |world: &World<'_>| kinds.iter().map(|(consumer, limits, _)| types(world, consumer, *limits)).collect();
        let mut bed = CloudBed::detached_of_types(env, make);
        bed.note_contents(0);
        bed.replicate();
        let limited = Self { bed, expected: kinds.iter().map(|(_, _, expected)| *expected).collect() };
        limited.expect(false);
        limited
    }

    #[track_caller]
    fn expect(&self, on_target: bool) {
        for (id, expected) in self.bed.servers[0].volumes.iter().zip(&self.expected) {
            let (pool, limit) = if on_target { ("sas", expected[1]) } else { ("sata", expected[0]) };
            assert_eq!(limit_of(self.bed.env, &format!("{pool}/volume-{id}")), limit, "{id} in {pool}");
        }
    }

    #[track_caller]
    fn go_there_and_back(&self) {
        self.bed.switch(0, "cutover", &[], "target");
        self.expect(true);
        self.bed.switch(0, "rollback", &["--with-changes"], "source");
        self.expect(false);
    }
}

#[test]
#[ignore = "needs OpenStack"]
fn volumes_of_types_with_limits_go_there_and_back_by_way_of_plain_types() {
    let env = openstack();
    let kinds = [("back-end", [700, 900], ["700", "900"]), ("front-end", [700, 900], ["0", "0"])];
    Limited::new(&env, &kinds).go_there_and_back();
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn volumes_of_types_of_which_one_has_limits_go_there_and_back_and_are_killed() {
    let env = openstack();
    let kinds = [("both", [0, 900], ["0", "900"]), ("back-end", [700, 0], ["700", "0"])];
    let limited = Limited::new(&env, &kinds);
    limited.go_there_and_back();
    // Cut in its middle, and undone: nothing has become of the limits.
    for place in ["switch.retype", "switch.retire-placeholder.target"] {
        limited.bed.killed_and_ended(place, true);
        limited.expect(false);
    }
}

#[test]
#[ignore = "exhaustive; needs OpenStack"]
fn a_server_s_volumes_with_limits_go_there_and_back() {
    let env = openstack();
    let mut bed = CloudBed::server_of_types(&env, "limits", |world| types(world, "front-end", [7000, 9000]));
    bed.replicate();
    let limits = |wanted: &str| assert_eq!(bed.guest().limits(), [wanted, wanted]);
    limits("7000");
    bed.switch(0, "cutover", &[], "target");
    limits("9000");
    bed.switch(0, "rollback", &["--with-changes"], "source");
    limits("7000");
}

/// Runs a command as somebody whom nothing but these variables tells of.
fn as_told(bed: &CloudBed<'_>, (command, words): (&str, &[&str]), variables: &[(&str, &str)], side: &str) {
    let words: Vec<&str> = words.iter().copied().chain(["--yes", "--json"]).collect();
    let told = only_with(bed.command(0, command, &words), variables);
    let run = Running::start(told).finish();
    println!("{command}: {run:?}");
    run.expect_code(0);
    bed.expect_well(0, side);
}

fn only_with(mut command: Command, variables: &[(&str, &str)]) -> Command {
    let others = std::env::vars().map(|(name, _)| name).filter(|name| name.starts_with("OS_"));
    for name in others {
        command.env_remove(name);
    }
    command.env("XDG_CONFIG_HOME", "/nowhere").envs(variables.iter().copied());
    command
}

#[test]
#[ignore = "needs OpenStack"]
fn a_cloud_is_found_in_clouds_yaml_and_takes_an_application_credential() {
    let env = openstack();
    let mut bed = CloudBed::detached(&env, 1, "");
    bed.note_contents(0);
    bed.replicate();
    let of = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let path = format!("users/{}/application_credentials", env.user());
    let (name, secret) = (unique("credential"), "of a test");
    let body = json!({"application_credential": {"name": name, "secret": secret}});
    let made = env.tell(Service::Keystone, &Method::POST, &path, &body);
    let id = made["application_credential"]["id"].as_str().expect("an id").to_owned();

    let home = bed.fleet.folder().join("config");
    std::fs::create_dir_all(home.join("openstack")).expect("a folder");
    let auth = |more: &Value| {
        let mut auth = json!({"auth_url": of("OS_AUTH_URL")});
        for (key, value) in more.as_object().into_iter().flatten() {
            auth[key] = value.clone();
        }
        auth
    };
    let by_password = auth(&json!({
        "user_id": env.user(), "project_id": env.project(),
    }));
    let clouds = json!({"clouds": {
        "it": {"auth": by_password, "region_name": "RegionOne"},
        "credential": {"auth_type": "v3applicationcredential", "auth": auth(&json!({"application_credential_id": id}))},
    }});
    let secure = json!({"clouds": {
        "it": {"auth": {"password": of("OS_PASSWORD")}},
        "credential": {"auth": {"application_credential_secret": secret}},
    }});
    // Every JSON is a YAML.
    std::fs::write(home.join("openstack/clouds.yaml"), clouds.to_string()).expect("it is written");
    std::fs::write(home.join("openstack/secure.yaml"), secure.to_string()).expect("it is written");
    let home = home.display().to_string();
    as_told(&bed, ("cutover", &[]), &[("XDG_CONFIG_HOME", &home), ("OS_CLOUD", "it")], "target");
    let back = ("rollback", &["--with-changes"][..]);
    as_told(&bed, back, &[("XDG_CONFIG_HOME", &home), ("OS_CLOUD", "credential")], "source");

    let variables = [
        ("OS_AUTH_URL", of("OS_AUTH_URL")),
        ("OS_AUTH_TYPE", "v3applicationcredential".into()),
        ("OS_APPLICATION_CREDENTIAL_ID", id.clone()),
        ("OS_APPLICATION_CREDENTIAL_SECRET", secret.into()),
    ];
    let variables = variables.iter().map(|(name, value)| (*name, value.as_str())).collect::<Vec<_>>();
    let looked = only_with(bed.command(0, "cutover", &["--dry-run"]), &variables);
    Running::start(looked).finish().expect_code(0);
    // One that is taken back is refused before anything is done, and the reason is told.
    env.tell(Service::Keystone, &Method::DELETE, &format!("{path}/{id}"), &Value::Null);
    let refused = Running::start(only_with(bed.command(0, "cutover", &["--yes"]), &variables)).finish();
    println!("without its credential: {refused:?}");
    assert_eq!(refused.code, Some(14), "{refused:?}");
    assert!(!format!("{refused:?}").contains(secret), "a secret is shown");
    bed.expect_well(0, "source");
}
