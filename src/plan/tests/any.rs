//! Any plan is read back as it was written; any text is read or refused.

use std::num::NonZeroU64;
use std::time::Duration;

use proptest::prelude::*;
use proptest::strategy::Strategy;

use super::{beside_a_volume, parse, render::render};
use crate::plan::*;

fn text() -> impl Strategy<Value = String> {
    "[^\\p{Cc}]{1,12}"
}

fn path() -> impl Strategy<Value = PathBuf> {
    text().prop_map(|text| format!("/{text}").into())
}

fn millis(from: u64, to: u64) -> impl Strategy<Value = Duration> {
    (from..=to).prop_map(Duration::from_millis)
}

fn rate() -> impl Strategy<Value = Rate> {
    let number = |from: u64, to: u64| proptest::option::of((from..=to).prop_map(|n| NonZeroU64::new(n).unwrap()));
    (number(64 << 10, 1 << 40), number(1, 10_000_000))
        .prop_map(|(bytes_per_second, operations_per_second)| Rate { bytes_per_second, operations_per_second })
}

fn cluster() -> impl Strategy<Value = ClusterAccess> {
    (proptest::option::of(path()), proptest::option::of("[a-z]{1,8}"))
        .prop_map(|(conf, user)| ClusterAccess { conf, user })
}

fn limits() -> impl Strategy<Value = FleetLimits> {
    (1..=1000usize, 1..=1000usize, 1..=1000usize, 16u64 << 20..=64 << 30).prop_map(
        |(volumes, first_syncs, volumes_per_pool, memory)| FleetLimits {
            volumes,
            first_syncs: first_syncs.min(volumes),
            volumes_per_pool,
            memory,
        },
    )
}

fn api() -> impl Strategy<Value = Api> {
    let listen = proptest::option::of(("127\\.0\\.0\\.1|\\[::1\\]|0\\.0\\.0\\.0", any::<u16>()));
    (listen, proptest::option::of(path())).prop_map(|(listen, token_file)| {
        let listen = listen.map(|(host, port)| format!("{host}:{port}").parse::<SocketAddr>().unwrap());
        let token_file = token_file.or(listen.filter(|at| !at.ip().is_loopback()).map(|_| "/token".into()));
        Api { listen, token_file }
    })
}

/// Windows between neighbours of a sorted list of minutes, none over another, perhaps one over midnight.
fn windows() -> impl Strategy<Value = Vec<Window>> {
    (proptest::collection::btree_set(0u16..1440, 0..8), proptest::collection::vec(rate(), 8), any::<bool>()).prop_map(
        |(minutes, rates, over_midnight)| {
            let minutes: Vec<u16> = minutes.into_iter().collect();
            let mut ends: Vec<(u16, u16)> = minutes.windows(2).map(|pair| (pair[0], pair[1])).collect();
            if over_midnight && minutes.len() > 1 {
                ends.push((minutes[minutes.len() - 1], minutes[0]));
            }
            let window = |((from_minute, until_minute), rate)| Window { from_minute, until_minute, rate };
            ends.into_iter().zip(rates).map(window).collect()
        },
    )
}

fn throttles() -> impl Strategy<Value = Vec<PoolThrottle>> {
    let throttle = (rate(), windows(), proptest::option::of(millis(1, 60_000)));
    proptest::collection::btree_map("[^\\p{Cc}/@]{1,8}", throttle, 0..3).prop_map(|pools| {
        let throttle = |(pool, (rate, windows, latency_limit))| PoolThrottle { pool, rate, windows, latency_limit };
        pools.into_iter().map(throttle).collect()
    })
}

fn quiesce() -> impl Strategy<Value = Quiesce> {
    prop_oneof![
        Just(Quiesce::None),
        (text(), proptest::option::of(text()), millis(100, 300_000)).prop_map(|(domain, uri, limit)| Quiesce::Virsh {
            domain,
            uri,
            limit
        }),
        (text(), text(), millis(100, 300_000)).prop_map(|(freeze, thaw, limit)| Quiesce::Command {
            freeze,
            thaw,
            limit
        }),
    ]
}

fn cutover() -> impl Strategy<Value = Cutover> {
    let some = || proptest::option::of(text());
    let libvirt = (text(), some(), proptest::sample::select(&Method::ALL[..]), path(), [some(), some(), some()]);
    let commands = ([text(), text(), text(), text()], proptest::array::uniform3(proptest::option::of(text())));
    let limit = || millis(1_000, 3_600_000);
    let hooks = [some(), some()];
    let gateway = (id(), hooks).prop_map(|(server, [pause, resume])| Holder::Gateway { server, pause, resume });
    let holder = prop_oneof![id().prop_map(Holder::Server), gateway, Just(Holder::Nobody)];
    prop_oneof![
        Just(Cutover::None),
        (some(), holder, limit(), [some(), some(), some()], any::<bool>()).prop_map(
            |(cloud, holder, limit, [console, check, flavor], other)| {
                // Without a server they have none, or name a flavor.
                let rehearsal = match (&holder, &flavor) {
                    (Holder::Server(_), _) | (_, Some(_)) => OpenStackRehearsal { console, check, flavor },
                    _ => OpenStackRehearsal::default(),
                };
                let strategy = match &holder {
                    Holder::Nobody if other => crate::plan::Strategy::Retype,
                    Holder::Server(_) if other => crate::plan::Strategy::Recreate,
                    _ => crate::plan::Strategy::KeepIds,
                };
                Cutover::OpenStack(OpenStackCutover { cloud, strategy, holder, limit, rehearsal })
            }
        ),
        (libvirt, limit()).prop_map(|((domain, uri, method, save_folder, [console, check, network]), limit)| {
            let rehearsal = LibvirtRehearsal { console, check, network };
            Cutover::Libvirt(LibvirtCutover { domain, uri, method, save_folder, limit, rehearsal })
        }),
        (commands, limit()).prop_map(|(([stop, swap, start, state], [quiesce, undo, rehearse]), limit)| {
            Cutover::Command(CommandCutover { quiesce, stop, swap, start, undo, state, rehearse, limit })
        }),
    ]
}

/// An id of OpenStack's.
fn id() -> impl Strategy<Value = String> {
    "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
}

fn cinder() -> impl Strategy<Value = CinderVolume> {
    let helpers = proptest::option::of((text(), text()).prop_map(|(from, to)| HelperTypes { from, to }));
    (id(), text(), helpers).prop_map(|(volume, from_type, by_way_of)| {
        let to_type = format!("{from_type}+");
        CinderVolume { volume, from_type, to_type, by_way_of }
    })
}

/// A server of some volumes, whose names are made unique later; with none it is a volume that stands by itself.
fn server() -> impl Strategy<Value = Server> {
    let month = 30 * 86_400_000;
    let pace = (millis(1_000, month), millis(1_000, month), millis(1_000, month)).prop_map(|(a, b, c)| Pace {
        interval: a,
        idle_interval: a.max(b),
        target_lag: a.max(c),
    });
    let retention = (1..=10_000usize, proptest::option::of(millis(1_000, month)))
        .prop_map(|(keep, keep_for)| Retention { keep, keep_for });
    let volume = || ("[a-z]{1,4}", proptest::option::of("[a-z]{1,4}"), rate(), (any::<bool>(), cinder()));
    let volumes = proptest::collection::vec(volume(), 0..4);
    let alone = volume();
    (pace, retention, (quiesce(), cutover()), any::<(bool, bool)>(), volumes, alone).prop_map(
        |(pace, retention, (quiesce, cutover), (paused, boot), volumes, alone)| {
            let by_itself = volumes.is_empty();
            let volumes = if by_itself { vec![alone] } else { volumes };
            let of_cloud = matches!(cutover, Cutover::OpenStack(_));
            let volumes = volumes.into_iter().enumerate();
            let volumes = volumes.map(|(number, (pool, namespace, rate, (is_cinders, cinder)))| Volume {
                name: String::new(),
                source: ImageSpec::Rbd { pool: pool.clone(), namespace, image: String::new(), snapshot: None },
                target: ImageSpec::Rbd { pool, namespace: Some("to".into()), image: String::new(), snapshot: None },
                boot: boot && number == 0,
                rate,
                cinder: Some(cinder).filter(|_| is_cinders || of_cloud),
            });
            let name = if by_itself { "alone" } else { "server" }.to_owned();
            let volumes = volumes.collect();
            Server { name, volumes, pace, retention, quiesce, paused, cutover }
        },
    )
}

fn plan() -> impl Strategy<Value = Plan> {
    let servers = proptest::collection::vec(server(), 1..5);
    (cluster(), cluster(), servers, limits(), throttles(), api()).prop_map(
        |(source_cluster, target_cluster, mut servers, limits, throttles, api)| {
            let mut count = 0;
            for (number, server) in servers.iter_mut().enumerate() {
                let by_itself = server.name == "alone";
                server.name = format!("{}-{number}", server.name);
                let of_cloud = matches!(server.cutover, Cutover::OpenStack(_));
                for volume in &mut server.volumes {
                    count += 1;
                    volume.name = if by_itself { server.name.clone() } else { format!("disk_{count}") };
                    for spec in [&mut volume.source, &mut volume.target] {
                        let ImageSpec::Rbd { image, .. } = spec else { continue };
                        *image = format!("image \"{count}\" ä");
                    }
                    if let ImageSpec::Rbd { image, .. } = &mut volume.source
                        && of_cloud
                    {
                        *image = format!("volume-{count:08x}-54a2-4c3b-9d6a-2d9f4d2f6f10");
                    }
                }
            }
            let path = "plan.toml".into();
            // A source in the namespace of the targets would be a target.
            for volume in servers.iter_mut().flat_map(|server| &mut server.volumes) {
                if let ImageSpec::Rbd { namespace, .. } = &mut volume.source {
                    *namespace = namespace.take().filter(|name| name != "to");
                }
            }
            Plan { path, source_cluster, target_cluster, servers, limits, throttles, api }
        },
    )
}

/// Whatever is said of a text has its place in it.
fn check_places(text: &str) -> Result<(), TestCaseError> {
    let Err(error) = parse(text) else { return Ok(()) };
    prop_assert!(!error.problems().is_empty(), "{error}");
    let lines: Vec<&str> = text.split('\n').collect();
    for problem in error.problems() {
        prop_assert!((1..=lines.len()).contains(&problem.line), "{error}");
        let length = lines[problem.line - 1].chars().count();
        // The character behind the last one stands for "something is missing here".
        prop_assert!((1..=length + 1).contains(&problem.column), "{error}");
        prop_assert!(!problem.problem.is_empty() && !problem.cure.is_empty(), "{error}");
    }
    prop_assert!(!error.to_string().contains(|c: char| c.is_control() && c != '\n'), "{error:?}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_plan_is_read_back_as_it_was_written(plan in plan()) {
        let text = render(&plan);
        let read = parse(&text).map_err(|error| TestCaseError::fail(format!("{error}\n{text}")))?;
        prop_assert_eq!(read, plan);
    }

    #[test]
    fn a_plan_with_a_wrong_place_is_read_or_refused(plan in plan(), at in any::<proptest::sample::Index>(),
        removed in 0usize..8, inserted in "[\\PC\n\t]{0,4}|\\]|=|\"|\\{|[0-9]{1,20}") {
        let mut text: Vec<char> = render(&plan).chars().collect();
        let from = at.index(text.len());
        let until = (from + removed).min(text.len());
        text.splice(from..until, inserted.chars());
        check_places(&text.into_iter().collect::<String>())?;
    }

    #[test]
    fn any_text_is_read_or_refused(text in any::<String>(), line in "[a-z_\\[\\]=\"{}.,0-9 \n-]{0,60}") {
        check_places(&text)?;
        check_places(&line)?;
        check_places(&beside_a_volume(&line))?;
    }

    #[test]
    fn any_bytes_in_a_file_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        let error = Plan::load(file.path()).unwrap_err();
        prop_assert!(error.problems().iter().all(|problem| problem.line >= 1 && problem.column >= 1));
        prop_assert!(!error.problems().is_empty());
    }
}
