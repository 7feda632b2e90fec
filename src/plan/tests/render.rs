//! A plan as a file, with every key written out.

use std::fmt::Write as _;
use std::num::NonZeroU64;

use crate::plan::values::{duration_text, size_text, window_text};
use crate::plan::*;

pub(super) fn render(plan: &Plan) -> String {
    let mut text = String::new();
    cluster(&mut text, "source", &plan.source_cluster);
    cluster(&mut text, "target", &plan.target_cluster);
    let FleetLimits { volumes, first_syncs, volumes_per_pool, memory } = plan.limits;
    let memory = size_text(memory);
    write!(text, "[limits]\nvolumes = {volumes}\nfirst_syncs = {first_syncs}\n").unwrap();
    writeln!(text, "volumes_per_pool = {volumes_per_pool}\nmemory = \"{memory}\"").unwrap();
    let listen = plan.api.listen.map_or("off".into(), |listen| listen.to_string());
    writeln!(text, "[api]\nlisten = \"{listen}\"").unwrap();
    if let Some(token) = &plan.api.token_file {
        writeln!(text, "token_file = {}", quoted(token.to_str().unwrap())).unwrap();
    }
    for throttle in &plan.throttles {
        writeln!(text, "[[throttle]]\npool = {}\n{}", quoted(&throttle.pool), rate(throttle.rate, "\n")).unwrap();
        if let Some(limit) = throttle.latency_limit {
            writeln!(text, "latency_limit = \"{}\"", duration_text(limit)).unwrap();
        }
        let windows = throttle.windows.iter().map(|window| {
            let during = window_text(window.from_minute, window.until_minute);
            format!("{{ during = \"{during}\", {} }}", rate(window.rate, ", "))
        });
        writeln!(text, "windows = [{}]", windows.collect::<Vec<_>>().join(", ")).unwrap();
    }
    for server in &plan.servers {
        match &server.volumes[..] {
            [volume] if volume.name == server.name => {
                writeln!(text, "[[volume]]\n{}", self::volume(volume)).unwrap();
                settings(&mut text, server);
            }
            volumes => {
                writeln!(text, "[[server]]\nname = {}", quoted(&server.name)).unwrap();
                settings(&mut text, server);
                for volume in volumes {
                    writeln!(text, "[[server.volume]]\n{}", self::volume(volume)).unwrap();
                }
            }
        }
    }
    text
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn cluster(text: &mut String, key: &str, access: &ClusterAccess) {
    writeln!(text, "[{key}]").unwrap();
    for (key, value) in
        [("conf", access.conf.as_ref().and_then(|conf| conf.to_str())), ("user", access.user.as_deref())]
    {
        if let Some(value) = value {
            writeln!(text, "{key} = {}", quoted(value)).unwrap();
        }
    }
}

fn rate(rate: Rate, separator: &str) -> String {
    let bytes = rate.bytes_per_second.map_or("unlimited".into(), |bytes| size_text(bytes.get()));
    let operations = rate.operations_per_second.map(NonZeroU64::get);
    let operations = operations.map_or("\"unlimited\"".into(), |operations| operations.to_string());
    format!("bytes_per_second = \"{bytes}\"{separator}operations_per_second = {operations}")
}

fn volume(volume: &Volume) -> String {
    let (name, source) = (quoted(&volume.name), quoted(&volume.source.to_string()));
    let (target, boot) = (quoted(&volume.target.to_string()), volume.boot);
    let rate = rate(volume.rate, "\n");
    let cinder = volume.cinder.as_ref().map(cinder).unwrap_or_default();
    format!("name = {name}\nsource = {source}\ntarget = {target}\nboot = {boot}\n{rate}\n{cinder}")
}

fn cinder(cinder: &CinderVolume) -> String {
    let CinderVolume { volume, from_type, to_type, by_way_of } = cinder;
    let way = by_way_of.as_ref().map_or_else(String::new, |HelperTypes { from, to }| {
        format!(", by_way_of = {{ from = {}, to = {} }}", quoted(from), quoted(to))
    });
    let (volume, from, to) = (quoted(volume), quoted(from_type), quoted(to_type));
    format!("cinder = {{ volume = {volume}, from_type = {from}, to_type = {to}{way} }}\n")
}

fn settings(text: &mut String, server: &Server) {
    let Pace { interval, idle_interval, target_lag } = server.pace;
    for (key, value) in [("interval", interval), ("idle_interval", idle_interval), ("target_lag", target_lag)] {
        writeln!(text, "{key} = \"{}\"", duration_text(value)).unwrap();
    }
    writeln!(text, "keep = {}\npaused = {}", server.retention.keep, server.paused).unwrap();
    if let Some(keep_for) = server.retention.keep_for {
        writeln!(text, "keep_for = \"{}\"", duration_text(keep_for)).unwrap();
    }
    let quiesce = match &server.quiesce {
        Quiesce::None => "\"none\"".into(),
        Quiesce::Virsh { domain, uri, limit } => {
            let uri = uri.as_deref().map(|uri| format!("uri = {}, ", quoted(uri))).unwrap_or_default();
            let (domain, limit) = (quoted(domain), duration_text(*limit));
            format!("{{ virsh = {{ domain = {domain}, {uri}limit = \"{limit}\" }} }}")
        }
        Quiesce::Command { freeze, thaw, limit } => {
            let (freeze, thaw, limit) = (quoted(freeze), quoted(thaw), duration_text(*limit));
            format!("{{ command = {{ freeze = {freeze}, thaw = {thaw}, limit = \"{limit}\" }} }}")
        }
    };
    writeln!(text, "quiesce = {quiesce}").unwrap();
    writeln!(text, "{}", cutover(&server.cutover)).unwrap();
}

/// In a line: a table of its own would end that of the server.
fn cutover(cutover: &Cutover) -> String {
    let (mut keys, mut judged) = (Vec::<(&str, String)>::new(), Vec::<(&str, String)>::new());
    let (way, limit) = match cutover {
        Cutover::None => return String::new(),
        Cutover::Libvirt(LibvirtCutover { domain, uri, method, save_folder, limit, rehearsal }) => {
            let LibvirtRehearsal { console, check, network } = rehearsal;
            let given = [("console", console), ("check", check), ("network", network)];
            judged = given.iter().filter_map(|(key, value)| Some((*key, (*value).clone()?))).collect();
            keys.push(("domain", domain.clone()));
            keys.extend(uri.clone().map(|uri| ("uri", uri)));
            keys.push(("method", method.name().to_owned()));
            keys.push(("save_folder", save_folder.to_str().unwrap().to_owned()));
            ("libvirt", limit)
        }
        Cutover::OpenStack(OpenStackCutover { cloud, strategy, holder, limit, rehearsal }) => {
            let OpenStackRehearsal { console, check, flavor } = rehearsal;
            let given = [("console", console), ("check", check), ("flavor", flavor)];
            judged = given.iter().filter_map(|(key, value)| Some((*key, (*value).clone()?))).collect();
            keys.extend(cloud.clone().map(|cloud| ("cloud", cloud)));
            keys.push(("strategy", strategy.name().to_owned()));
            match holder {
                Holder::Server(id) => keys.push(("server", id.clone())),
                Holder::Gateway { server, pause, resume } => {
                    keys.push(("gateway", server.clone()));
                    keys.extend(pause.clone().map(|pause| ("pause", pause)));
                    keys.extend(resume.clone().map(|resume| ("resume", resume)));
                }
                Holder::Nobody => {}
            }
            ("openstack", limit)
        }
        Cutover::Command(CommandCutover { quiesce, stop, swap, start, undo, state, rehearse, limit }) => {
            for (key, command) in [("stop", stop), ("swap", swap), ("start", start), ("state", state)] {
                keys.push((key, command.clone()));
            }
            for (key, command) in [("quiesce", quiesce), ("undo", undo), ("rehearse", rehearse)] {
                keys.extend(command.clone().map(|command| (key, command)));
            }
            ("command", limit)
        }
    };
    keys.push(("limit", duration_text(*limit)));
    let lines = |keys: &[(&str, String)]| -> Vec<String> {
        keys.iter().map(|(key, value)| format!("{key} = {}", quoted(value))).collect()
    };
    let mut keys = lines(&keys);
    if !judged.is_empty() {
        keys.push(format!("rehearsal = {{ {} }}", lines(&judged).join(", ")));
    }
    format!("cutover = {{ {way} = {{ {} }} }}", keys.join(", "))
}
