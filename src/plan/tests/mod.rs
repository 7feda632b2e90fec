//! What plan files mean, and what is said of those that mean nothing.

use std::num::NonZeroU64;
use std::path::Path;
use std::time::Duration;

use super::*;

mod any;
mod render;

fn parse(text: &str) -> Result<Plan, PlanError> {
    Plan::parse(text, Path::new("plan.toml"))
}

fn refusal(text: &str) -> String {
    parse(text).expect_err(text).to_string()
}

/// A plan of one volume, with something else in front of it.
fn beside_a_volume(text: &str) -> String {
    format!("{text}\n[[volume]]\nname = \"v\"\nsource = \"rbd:sata/v\"\ntarget = \"rbd:sas/v\"\n")
}

/// A plan of one volume with more lines.
fn in_a_volume(text: &str) -> String {
    format!("{}{text}\n", beside_a_volume(""))
}

fn golden(name: &str, text: &str) {
    insta::with_settings!({snapshot_path => "golden", prepend_module_to_snapshot => false, omit_expression => true}, {
        insta::assert_snapshot!(name, text);
    });
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn the_least_plan_has_the_promised_defaults() {
    let plan = parse(&beside_a_volume("")).unwrap();
    assert_eq!(plan.path, Path::new("plan.toml"));
    assert_eq!((&plan.source_cluster, &plan.target_cluster), (&ClusterAccess::default(), &ClusterAccess::default()));
    assert_eq!(plan.limits, FleetLimits { volumes: 8, first_syncs: 4, volumes_per_pool: 8, memory: 256 << 20 });
    assert_eq!(plan.api, Api { listen: Some("127.0.0.1:9480".parse().unwrap()), token_file: None });
    assert!(plan.throttles.is_empty());
    let [server] = &plan.servers[..] else { panic!("{:?}", plan.servers) };
    let (interval, idle_interval, target_lag) = (seconds(300), seconds(1800), seconds(900));
    assert_eq!(server.pace, Pace { interval, idle_interval, target_lag });
    assert_eq!(server.retention, Retention { keep: 1, keep_for: None });
    assert_eq!((server.name.as_str(), &server.quiesce, server.paused), ("v", &Quiesce::None, false));
    let [volume] = &server.volumes[..] else { panic!("{:?}", server.volumes) };
    assert_eq!((volume.name.as_str(), volume.boot, volume.rate), ("v", false, Rate::default()));
    assert_eq!((volume.source.to_string(), volume.target.to_string()), ("rbd:sata/v".into(), "rbd:sas/v".into()));
}

#[test]
fn the_readmes_plan_means_what_it_says() {
    let readme = include_str!("../../../README.md");
    let (_, behind) = readme.split_once("```toml\n").expect("the README has a plan");
    let (text, _) = behind.split_once("```").expect("it ends");
    let plan = parse(text).unwrap();
    let names: Vec<_> = plan.servers.iter().map(|server| (server.name.as_str(), server.volumes.len())).collect();
    assert_eq!(names, [("web-1", 2), ("archive", 1)]);
    let [web, archive] = &plan.servers[..] else { panic!() };
    assert_eq!((web.pace.interval, archive.pace.interval), (seconds(120), seconds(3600)));
    // Nobody has set them for an hour's interval.
    assert_eq!((archive.pace.idle_interval, archive.pace.target_lag), (seconds(3600), seconds(7200)));
    assert_eq!(web.retention, Retention { keep: 3, keep_for: Some(seconds(86_400)) });
    let expected = Quiesce::Virsh { domain: "web-1".into(), uri: None, limit: seconds(10) };
    assert_eq!((&web.quiesce, web.volumes[0].boot, web.volumes[1].boot), (&expected, true, false));
    assert!(matches!(&web.cutover, Cutover::Libvirt(libvirt) if libvirt.domain == "web-1"));
    assert_eq!(archive.cutover, Cutover::None);
    assert_eq!(archive.volumes[0].rate.bytes_per_second, NonZeroU64::new(50 << 20));
    let throttle = plan.throttle("sata").unwrap();
    assert_eq!(throttle.latency_limit, Some(Duration::from_millis(80)));
    let night = Rate { bytes_per_second: None, operations_per_second: NonZeroU64::new(2000) };
    assert_eq!(throttle.windows, [Window { from_minute: 1320, until_minute: 360, rate: night }]);
}

#[test]
fn servers_and_volumes_keep_the_order_of_the_file() {
    let volume =
        |name| format!("[[volume]]\nname = \"{name}\"\nsource = \"rbd:sata/{name}\"\ntarget = \"rbd:sas/{name}\"\n");
    let server =
        "[[server]]\nname = \"s\"\nvolume = [{ name = \"d\", source = \"rbd:sata/d\", target = \"rbd:sas/d\" }]\n";
    let plan = parse(&[volume("a"), server.into(), volume("b")].concat()).unwrap();
    let names: Vec<_> = plan.servers.iter().map(|server| server.name.as_str()).collect();
    assert_eq!(names, ["a", "s", "b"]);
    let volumes: Vec<_> = plan.volumes().map(|(server, volume)| format!("{}/{}", server.name, volume.name)).collect();
    assert_eq!(volumes, ["a/a", "s/d", "b/b"]);
}

#[test]
fn equal_names_in_two_clusters_are_two_images() {
    let same = "\n[[volume]]\nname = \"v\"\nsource = \"rbd:sata/v\"\ntarget = \"rbd:sata/v\"\n";
    assert!(refusal(same).contains("it is the source itself"));
    parse(&format!("[target]\nconf = \"/etc/ceph/other.conf\"\n{same}")).unwrap();
}

#[test]
fn everything_wrong_is_told_at_once() {
    let text = r#"
[default]
interval = "5m"

[defaults]
interval = "10m"
idle_interval = "5m"
keep = 0

[limits]
volumes = 2
first_syncs = 3
memory = "1M"

[api]
listen = "0.0.0.0:9480"

[[throttle]]
pool = "sata"
windows = [
    { during = "22:00-06:00", bytes_per_second = "unlimited" },
    { during = "05:00-07:00", operations_per_second = 10 },
]

[[throttle]]
pool = "sata"

[[server]]
name = "web-1"
quiesce = { virsh = { domain = "web-1" } }

[[server.volume]]
name = "root"
source = "rbd:sata/root@monday"
target = "rbd:sas/root"
boot = true

[[server.volume]]
name = "data"
source = "rbd:sata/data"
target = "rbd:sas/data"
boot = true

[[server]]
name = "web-1"

[[volume]]
name = "a b"
source = "sata/x"
target = "rbd:sas/data"
bytes_per_secnd = "1M"
paused = "no"

[[volume]]
source = "rbd:sas/root"
target = "rbd:sas/root"
bytes_per_second = -5
"#;
    golden("everything-wrong", &refusal(text));
}

#[test]
fn each_mistake_has_its_line() {
    let mut text = String::new();
    for plan in [
        String::new(),
        "[[volume]\n".into(),
        "[[volume]]\nname = \"v\"\nname = \"w\"\n".into(),
        "a = \"\u{1}\"\n".into(),
        "volume = 7\n".into(),
        "volume = [7]\n".into(),
        "[volume]\nname = \"v\"\n".into(),
        "[[server]]\n".into(),
        beside_a_volume("defaults = \"5m\""),
        beside_a_volume("\"de\\u0007fault\" = 1"),
        beside_a_volume("[defaults]\ninterval = 300"),
        beside_a_volume("[defaults]\ninterval = \"5 minutes\""),
        beside_a_volume("[defaults]\ninterval = \"0s\""),
        beside_a_volume("[defaults]\nkeep = 99999999999999999999"),
        beside_a_volume("[defaults]\nkeep = 1.5"),
        beside_a_volume("[limits]\nmemory = 18446744073709551616"),
        beside_a_volume("[limits]\nmemory = \"99999999T\""),
        beside_a_volume("[limits]\nvolumes = 0"),
        beside_a_volume("[api]\nlisten = \"localhost\""),
        beside_a_volume("[api]\nlisten = \"[::]:9480\"\ntoken_file = \"token\""),
        beside_a_volume("[source]\nuser = \"client.\""),
        beside_a_volume("[[throttle]]\npool = \"sata\""),
        beside_a_volume("[[throttle]]\nbytes_per_second = \"1K\""),
        beside_a_volume("[[throttle]]\npool = \"sata\"\nwindows = [{ during = \"22-06\" }]"),
        beside_a_volume("[[throttle]]\npool = \"sata\"\nlatency_limit = \"2m\""),
        in_a_volume("quiesce = \"fsfreeze\""),
        in_a_volume("quiesce = { command = { freeze = \"a\", limit = \"1h\" } }"),
        in_a_volume("quiesce = { virsh = {}, command = {} }"),
        in_a_volume("quiesce = {}"),
        in_a_volume("interval = \"10m\"\ntarget_lag = \"9m\""),
        in_a_volume("cutover = \"virsh\""),
        in_a_volume("cutover = {}"),
        in_a_volume("[volume.cutover]\nlibvirt = { domain = \"v\" }\ncommand = { stop = \"a\" }"),
        in_a_volume("[volume.cutover.libvirt]\ndomain = \"v\"\nrehearsal = { console = 7, chek = \"c\" }"),
        in_a_volume("[volume.cutover]\nlibvrt = { domain = \"v\" }"),
        in_a_volume(
            "[volume.cutover.libvirt]\nmethod = \"luke\"\nsave_folder = \"save\"\nlimit = \"2h\"\ndomian = \"v\"",
        ),
        in_a_volume("cutover = { command = { stop = \"\", swap = 7, undo = \"u\", limit = \"0s\" } }"),
        beside_a_volume("[[volume]]\nname = \"w\"\nsource = \"file:disk\"\ntarget = \"nbd:sas/w\""),
        beside_a_volume("[[volume]]\nname = \"w\"\nsource = \"rbd:sata/v\"\ntarget = \"rbd:sas/w\""),
    ] {
        text.push_str(&format!("{}\n\n", refusal(&plan)));
    }
    golden("mistakes", &text);
}

#[test]
fn a_cutover_has_the_promised_defaults() {
    let cutover = |text: &str| parse(&in_a_volume(text)).unwrap().servers[0].cutover.clone();
    assert_eq!(cutover(""), Cutover::None);
    let domain = LibvirtCutover {
        domain: "web-1".into(),
        uri: None,
        method: Method::Warm,
        save_folder: "/var/lib/libvirt/qemu/save".into(),
        limit: seconds(300),
        rehearsal: LibvirtRehearsal::default(),
    };
    assert_eq!(cutover("[volume.cutover]\nlibvirt = { domain = \"web-1\" }"), Cutover::Libvirt(domain.clone()));
    let all = "[volume.cutover]\nlibvirt = { domain = \"web-1\", uri = \"qemu+ssh://h/system\", method = \"hot\", \
               save_folder = \"/save\", limit = \"1h\", rehearsal = { console = \"login:\", network = \"lab\" } }";
    let expected = LibvirtCutover {
        uri: Some("qemu+ssh://h/system".into()),
        method: Method::Hot,
        save_folder: "/save".into(),
        limit: seconds(3600),
        rehearsal: LibvirtRehearsal { console: Some("login:".into()), check: None, network: Some("lab".into()) },
        ..domain
    };
    assert_eq!(cutover(all), Cutover::Libvirt(expected));
    let commands = cutover("cutover.command = { stop = \"a\", swap = \"b\", start = \"c\", state = \"d\" }");
    let Cutover::Command(commands) = commands else { panic!("{commands:?}") };
    assert_eq!(
        (commands.stop, commands.state, commands.undo, commands.limit),
        ("a".into(), "d".into(), None, seconds(300))
    );
}

const ID: &str = "7d1c1a0e-54a2-4c3b-9d6a-2d9f4d2f6f10";

/// A volume of a cloud, with other keys behind its own and those of its cutover.
fn of_a_cloud(holder: &str, source: &str, target: &str, cinder: &str) -> String {
    format!(
        "[[volume]]\nname = \"v\"\nsource = \"{source}\"\ntarget = \"{target}\"\ncutover = {{ openstack = {{ {holder} }} \
         }}\n{cinder}\n"
    )
}

/// The same where only the cutover's keys are of interest.
fn held_by(holder: &str) -> String {
    let cinder = format!("cinder = {{ volume = \"{ID}\", from_type = \"sata\", to_type = \"sas\" }}");
    of_a_cloud(holder, &format!("rbd:sata/volume-{ID}"), &format!("rbd:sas/poolshift-{ID}"), &cinder)
}

#[test]
fn volumes_of_a_cloud_have_somebody_or_nobody_who_has_them() {
    let openstack = |holder: &str| match parse(&held_by(holder)).unwrap().servers[0].cutover.clone() {
        Cutover::OpenStack(openstack) => openstack,
        other => panic!("{other:?}"),
    };
    let (strategy, rehearsal) = (Strategy::KeepIds, OpenStackRehearsal::default());
    let plain = OpenStackCutover { cloud: None, strategy, holder: Holder::Nobody, limit: seconds(300), rehearsal };
    assert_eq!(openstack(""), plain);
    let judged = "rehearsal = { console = \"login:\", check = \"/c\", flavor = \"m1.small\" }";
    let server = openstack(&format!("server = \"{ID}\", cloud = \"prod\", limit = \"1h\", {judged}"));
    let holder = Holder::Server(ID.into());
    let (console, check, flavor) = (Some("login:".into()), Some("/c".into()), Some("m1.small".into()));
    let rehearsal = OpenStackRehearsal { console, check, flavor };
    let cloud = Some("prod".into());
    assert_eq!(server, OpenStackCutover { cloud, strategy, holder, limit: seconds(3600), rehearsal });
    let nobodys = openstack("rehearsal = { check = \"/c\", flavor = \"m1.small\" }");
    let (check, flavor) = (Some("/c".into()), Some("m1.small".into()));
    let rehearsal = OpenStackRehearsal { console: None, check, flavor };
    assert_eq!(nobodys, OpenStackCutover { rehearsal, ..plain.clone() });
    assert_eq!(openstack(&format!("server = \"{ID}\", strategy = \"keep-ids\"")).strategy, Strategy::KeepIds);
    assert_eq!(openstack(&format!("server = \"{ID}\", strategy = \"recreate\"")).strategy, Strategy::Recreate);
    let gateway = openstack(&format!("gateway = \"{ID}\", pause = \"/p $x\", resume = \"/r\""));
    let holder = Holder::Gateway { server: ID.into(), pause: Some("/p $x".into()), resume: Some("/r".into()) };
    assert_eq!(gateway, OpenStackCutover { holder, ..plain.clone() });
    let holder = Holder::Gateway { server: ID.into(), pause: None, resume: None };
    assert_eq!(openstack(&format!("gateway = \"{ID}\"")), OpenStackCutover { holder, ..plain.clone() });
    assert_eq!(openstack("strategy = \"keep-ids\""), plain);
    assert_eq!(openstack("strategy = \"retype\""), OpenStackCutover { strategy: Strategy::Retype, ..plain });
    for (keys, problem) in [
        (format!("strategy = \"retype\", server = \"{ID}\""), "only volumes that nobody has"),
        ("strategy = \"recreate\"".into(), "only a server that boots"),
        ("strategy = \"copy\"".into(), "is no strategy"),
    ] {
        let error = parse(&held_by(&keys)).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }
}

#[test]
fn a_volume_of_a_cloud_has_its_types_and_perhaps_a_way_around() {
    let text = format!(
        "[[server]]\nname = \"s\"\ncutover = {{ openstack = {{ server = \"{ID}\" }} }}\n[[server.volume]]\nname = \"v\"\nsource \
         = \"rbd:sata/volume-{ID}\"\ntarget = \"rbd:sas/v\"\n[server.volume.cinder]\nvolume = \"{ID}\"\nfrom_type = \
         \"sata\"\nto_type = \"sas\"\nby_way_of = {{ from = \"a\", to = \"b\" }}\n"
    );
    let plan = parse(&text).unwrap();
    let by_way_of = Some(HelperTypes { from: "a".into(), to: "b".into() });
    let (volume, from_type, to_type) = (ID.into(), "sata".into(), "sas".into());
    let expected = CinderVolume { volume, from_type, to_type, by_way_of };
    assert_eq!(plan.servers[0].volumes[0].cinder, Some(expected));
    assert_eq!(parse(&beside_a_volume("")).unwrap().servers[0].volumes[0].cinder, None);
}

#[test]
fn each_mistake_about_a_cloud_has_its_line() {
    let cinder = |keys: &str| {
        let (source, target) = (format!("rbd:sata/volume-{ID}"), format!("rbd:sas/poolshift-{ID}"));
        of_a_cloud("", &source, &target, &format!("cinder = {{ {keys} }}"))
    };
    let types = "from_type = \"sata\", to_type = \"sas\"";
    let right = format!("cinder = {{ volume = \"{ID}\", {types} }}");
    let mut text = String::new();
    for plan in [
        held_by("server = \"web-1\""),
        held_by("gateway = 7"),
        // One digit too few, and one that is none.
        held_by(&format!("server = \"{}\"", &ID[1..])),
        held_by(&format!("server = \"{}g\"", &ID[..35])),
        held_by(&format!("server = \"{ID}\", gateway = \"{ID}\"")),
        held_by(&format!("server = \"{ID}\", pause = \"/p\"")),
        held_by("resume = \"/r\""),
        held_by("rehearsal = { console = \"login:\", network = \"lab\" }"),
        held_by(&format!("gateway = \"{ID}\", rehearsal = {{ check = 7 }}")),
        held_by(&format!("server = \"{ID}\", strategy = \"retype\"")),
        held_by(&format!("server = \"{ID}\", strategy = \"S2\"")),
        held_by(&format!("gateway = \"{ID}\", strategy = \"recreate\"")),
        held_by("strategy = \"recreate\""),
        held_by("cloud = \"\", limit = \"2h\", srever = \"x\""),
        cinder(""),
        cinder(&format!("volume = \"{ID}\", from_type = \"sas\", to_type = \"sas\"")),
        cinder(&format!("volume = \"x\", {types}")),
        cinder(&format!("volume = \"{ID}\", {types}, by_way_of = {{ from = \"a\", over = \"b\" }}")),
        cinder(&format!("volume = \"{ID}\", {types}, by_way_of = \"a\"")),
        of_a_cloud("", &format!("rbd:sata/volume-{ID}"), "rbd:sas/v", ""),
        of_a_cloud("", "rbd:sata/v", "rbd:sas/v", &right),
        of_a_cloud("", &format!("rbd:sata/volume-{ID}"), &format!("rbd:sas/volume-{ID}"), &right),
        of_a_cloud("", &format!("rbd:sata/volume-{ID}"), "file:/v", &right),
        in_a_volume("cutover = { openstack = {}, libvirt = { domain = \"v\" } }"),
    ] {
        text.push_str(&format!("{}\n\n", refusal(&plan)));
    }
    golden("mistakes-about-a-cloud", &text);
}

#[test]
fn no_target_has_a_name_that_cinder_deletes() {
    let other = "00000000-0000-0000-0000-000000000000";
    let target = |image: &str| {
        let right = format!("cinder = {{ volume = \"{ID}\", from_type = \"sata\", to_type = \"sas\" }}");
        parse(&of_a_cloud("", &format!("rbd:sata/volume-{ID}"), &format!("rbd:sas/{image}"), &right))
    };
    // Whose volume it is does not matter, nor the pool's namespace.
    for image in [format!("volume-{ID}"), format!("volume-{other}"), format!("tenant/volume-{ID}")] {
        let error = target(&image).expect_err(&image).to_string();
        assert!(error.contains("which deletes such an image"), "{error}");
    }
    target("volume-of-mine").unwrap();
}

#[test]
fn large_files_are_not_looked_at() {
    let error = parse(&" ".repeat(FILE_MAX + 1)).unwrap_err();
    assert_eq!(error.to_string(), "plan.toml: a plan has at most 1048576 bytes, this file has more");
    let volumes = "[[volume]]\n".repeat(VOLUMES_MAX + 1);
    let error = parse(&volumes).unwrap_err();
    assert_eq!(error.to_string(), "plan.toml:1:1: 10001 volumes are more than 10000; split the plan");
    // Many mistakes are counted, not listed.
    let error = parse(&"[[volume]]\n".repeat(1000)).unwrap_err();
    assert_eq!(error.problems().len(), PlanError::PROBLEMS_MAX);
    assert!(error.to_string().ends_with("and 2950 more"), "{error}");
}

#[test]
fn the_largest_plan_is_read_in_one_line_as_well() {
    let volume = |n| format!("{{name=\"v{n}\",source=\"rbd:sata/v{n}\",target=\"rbd:sas/v{n}\"}}");
    let text = format!("volume=[{}]", (0..VOLUMES_MAX).map(volume).collect::<Vec<_>>().join(","));
    assert!(text.len() < FILE_MAX);
    assert_eq!(parse(&text).unwrap().servers.len(), VOLUMES_MAX);
}

#[test]
fn a_file_is_read_and_its_errors_name_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.toml");
    let error = Plan::load(&path).unwrap_err();
    assert!(matches!(&error, PlanError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound));
    std::fs::write(&path, beside_a_volume("")).unwrap();
    assert_eq!(Plan::load(&path).unwrap().path, path);
    std::fs::write(&path, b"# \xc3\xa4\n# \xc3\xa4\xff").unwrap();
    let error = Plan::load(&path).unwrap_err().to_string();
    let expected = format!("{}:2:4: a byte 0xff that is no UTF-8; save the file as UTF-8", path.display());
    assert_eq!(error, expected);
    std::fs::write(&path, vec![b'#'; FILE_MAX + 1]).unwrap();
    assert!(matches!(Plan::load(&path), Err(PlanError::TooLarge { .. })));
}

#[test]
fn a_file_shares_no_point_with_other_disks() {
    let two = "[[server]]\nname = \"s\"\n[[server.volume]]\nname = \"a\"\nsource = \"file:/a\"\ntarget = \"rbd:sas/a\"\n\
               [[server.volume]]\nname = \"b\"\nsource = \"rbd:sata/b\"\ntarget = \"rbd:sas/b\"\n";
    assert!(refusal(two).contains("file:/a is a file, has no snapshots"), "{}", refusal(two));
    let frozen = "[[volume]]\nname = \"a\"\nsource = \"file:/a\"\ntarget = \"file:/b\"\n\
                  quiesce = { virsh = { domain = \"a\", limit = \"5s\" } }\n";
    assert!(refusal(frozen).contains("without quiesce"), "{}", refusal(frozen));
}

#[test]
fn nothing_of_a_cloud_is_in_a_plan_twice() {
    const OTHER: &str = "8d1c1a0e-54a2-4c3b-9d6a-2d9f4d2f6f10";
    let one = |name: &str, image: &str, holder: &str, volume: &str| {
        format!(
            "[[volume]]\nname = \"{name}\"\ncutover = {{ openstack = {{ {holder} }} }}\nsource = \"rbd:sata/volume-{image}\"\n\
             target = \"rbd:sas/{name}\"\ncinder = {{ volume = \"{volume}\", from_type = \"sata\", to_type = \"sas\" }}\n"
        )
    };
    let of = |server: &str| format!("server = \"{server}\"");
    let gateway = format!("gateway = \"{ID}\"");
    let said = |first: String, second: String| parse(&(first + &second)).map(drop).map_err(|error| error.to_string());
    let volume = said(one("a", ID, "", ID), one("b", OTHER, "", ID)).unwrap_err();
    assert!(volume.contains(&format!("volume {ID} is in a already")), "{volume}");
    for second in [of(ID), gateway.clone()] {
        let server = said(one("a", ID, &of(ID), ID), one("b", OTHER, &second, OTHER)).unwrap_err();
        assert!(server.contains(&format!("server {ID} is in a already")), "{server}");
    }
    // A gateway has volumes of many.
    assert_eq!(said(one("a", ID, &gateway, ID), one("b", OTHER, &gateway, OTHER)), Ok(()));
    assert_eq!(said(one("a", ID, &of(ID), ID), one("b", OTHER, &of(OTHER), OTHER)), Ok(()));
}
