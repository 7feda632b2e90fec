//! `openstack` in a server's cutover, and `cinder` in its volumes: a server, or volumes, of a cloud.

use std::collections::HashMap;
use std::time::Duration;

use super::fields::{Report, Section, Value, shown};
use super::{Cutover, Server, Volume};
use crate::image::ImageSpec;

/// A server, or volumes, of a cloud, which Cinder gives another type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenStackCutover {
    /// The cloud's name in `clouds.yaml`; by the environment otherwise, as every OpenStack tool has it.
    pub cloud: Option<String>,
    /// How the volumes get their other type.
    pub strategy: Strategy,
    /// Who has the volumes.
    pub holder: Holder,
    /// How long each step may take, and a stand-in to boot.
    pub limit: Duration,
    /// How its rehearsals are judged.
    pub rehearsal: OpenStackRehearsal,
}

/// How the stand-in of a cloud's server is made and judged, in a rehearsal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenStackRehearsal {
    /// What its console shows, by Nova, once it has booted.
    pub console: Option<String>,
    /// A command, run by `/bin/sh -c` once it has booted: with 0 it says that all is well.
    /// [`crate::cutover::provider::rehearse`] has its contract.
    pub check: Option<String>,
    /// Its flavor, by name; that of the server otherwise. Volumes that no server boots from have none without it, and
    /// are rehearsed by a person.
    pub flavor: Option<String>,
}

/// How volumes get another type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Servers and volumes keep their ids: Cinder moves a placeholder, and the image that was replicated takes its place.
    #[default]
    KeepIds,
    /// The server is deleted and made again, from volumes with other ids.
    Recreate,
    /// Cinder copies the volumes itself, which nobody has meanwhile: nothing is replicated.
    Retype,
}

impl Strategy {
    /// Every strategy.
    pub const ALL: [Self; 3] = [Self::KeepIds, Self::Recreate, Self::Retype];

    /// Its name, in a plan and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::KeepIds => "keep-ids",
            Self::Recreate => "recreate",
            Self::Retype => "retype",
        }
    }
}

/// Who has the volumes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The server with this id, which runs from them: it stops, and starts from them again, with its id and theirs.
    Server(String),
    /// The server with this id, which has them as data disks, beside those of others: it gives them away for a while
    /// and goes on.
    Gateway {
        /// Its id.
        server: String,
        /// Has the writers of these volumes let go of them, run by `/bin/sh -c`; [`crate::cutover::provider`] has its
        /// contract.
        pause: Option<String>,
        /// Has them go on.
        resume: Option<String>,
    },
    /// Nobody.
    Nobody,
}

/// A volume as Cinder knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CinderVolume {
    /// Its id.
    pub volume: String,
    /// Its type on the source.
    pub from_type: String,
    /// Its type on the target.
    pub to_type: String,
    /// Types without QoS and extra specs, for a way between two that have some: Cinder would copy everything
    /// otherwise.
    pub by_way_of: Option<HelperTypes>,
}

/// Types that name a backend, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelperTypes {
    /// One of the source's backend.
    pub from: String,
    /// One of the target's backend.
    pub to: String,
}

/// An id of OpenStack's.
fn id(value: &Value<'_>, report: &mut Report<'_>) -> Option<String> {
    let text = value.text(EXAMPLE, report)?;
    if is_id(text) {
        return Some(text.to_owned());
    }
    value.wrong(
        format!("{:?} is no id", shown(text)),
        format!("write an id of OpenStack's, such as {EXAMPLE:?}"),
        report,
    );
    None
}

const EXAMPLE: &str = "7d1c1a0e-54a2-4c3b-9d6a-2d9f4d2f6f10";

/// Whether a text looks like an id: hexadecimal digits in groups of 8, 4, 4, 4 and 12.
fn is_id(text: &str) -> bool {
    let groups: Vec<&str> = text.split('-').collect();
    groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12])
        && groups.iter().all(|group| group.chars().all(|c| c.is_ascii_hexdigit()))
}

pub(super) fn cutover(
    mut section: Section<'_>,
    limit: impl FnOnce(&mut Section<'_>, &mut Report<'_>) -> Option<Duration>,
    report: &mut Report<'_>,
) -> Option<OpenStackCutover> {
    let cloud = section.value("cloud").map(|value| value.text("prod", report).map(str::to_owned));
    let (server, gateway) = (section.value("server"), section.value("gateway"));
    let mut hook =
        |key| section.value(key).map(|value| (value.text("/etc/poolshift/pause", report).map(str::to_owned), value));
    let (pause, resume) = (hook("pause"), hook("resume"));
    let limit = limit(&mut section, report);
    let judged = section.table("rehearsal", report).map(|section| {
        let (span, key) = (section.span.clone(), section.name_of("flavor"));
        (rehearsal(section, report), span, key)
    });
    let strategy = match section.value("strategy") {
        None => Some(Strategy::default()),
        Some(value) => strategy(&value, (server.is_some(), server.is_some() || gateway.is_some()), report),
    };
    let holder = match (&server, &gateway) {
        (Some(_), Some(gateway)) => {
            gateway.wrong(
                "it has a server as well",
                "name the server that boots from the volumes, or the gateway",
                report,
            );
            None
        }
        (None, Some(gateway)) => id(gateway, report).map(|server| {
            let text = |hook: &Option<(Option<String>, Value<'_>)>| hook.as_ref().and_then(|(text, _)| text.clone());
            Holder::Gateway { server, pause: text(&pause), resume: text(&resume) }
        }),
        (server, None) => {
            for (_, value) in [&pause, &resume].into_iter().flatten() {
                value.wrong("only a gateway is paused", "take it out, or name the gateway", report);
            }
            match server {
                Some(server) => id(server, report).map(Holder::Server),
                None => Some(Holder::Nobody),
            }
        }
    };
    section.finish(report);
    let rehearsal = judged.map(|(rehearsal, span, key)| {
        if rehearsal.flavor.is_none() && matches!(holder, Some(Holder::Gateway { .. } | Holder::Nobody)) {
            let problem = "no server boots from the volumes, and nothing says what their stand-in would have";
            report.add(&span, &key, problem, "add flavor = \"m1.small\", or take rehearsal out");
        }
        rehearsal
    });
    let rehearsal = rehearsal.unwrap_or_default();
    let cloud = match cloud {
        Some(given) => Some(given?),
        None => None,
    };
    Some(OpenStackCutover { cloud, strategy: strategy?, holder: holder?, limit: limit?, rehearsal })
}

fn rehearsal(mut section: Section<'_>, report: &mut Report<'_>) -> OpenStackRehearsal {
    let mut given = |key, example| section.value(key).and_then(|value| value.text(example, report)).map(str::to_owned);
    let read = OpenStackRehearsal {
        console: given("console", "login:"),
        check: given("check", "/etc/poolshift/check"),
        flavor: given("flavor", "m1.small"),
    };
    section.finish(report);
    read
}

fn strategy(value: &Value<'_>, (boots, held): (bool, bool), report: &mut Report<'_>) -> Option<Strategy> {
    let text = value.text("keep-ids", report)?;
    match Strategy::ALL.into_iter().find(|strategy| strategy.name() == text) {
        Some(Strategy::Recreate) if !boots => {
            let problem = "only a server that boots from its volumes is made again";
            value.wrong(problem, "name the server that boots from the volumes, or leave the strategy out", report);
            None
        }
        Some(Strategy::Retype) if held => {
            let problem = "Cinder itself moves only volumes that nobody has, and these have a server or a gateway";
            value.wrong(problem, "detach them and take server or gateway out, or write \"keep-ids\"", report);
            None
        }
        Some(strategy) => Some(strategy),
        None => {
            let problem = format!("{:?} is no strategy", shown(text));
            value.wrong(problem, "write \"keep-ids\", which is the default, \"recreate\" or \"retype\"", report);
            None
        }
    }
}

pub(super) fn volume(mut section: Section<'_>, report: &mut Report<'_>) -> Option<CinderVolume> {
    let volume = section.needed("volume", &format!("{EXAMPLE:?}"), report).and_then(|value| id(&value, report));
    let mut named = |key, example: &str| {
        let value = section.needed(key, &format!("{example:?}"), report)?;
        value.text(example, report).map(str::to_owned)
    };
    let (from_type, to_type) = (named("from_type", "sata"), named("to_type", "sas"));
    let by_way_of = section.table("by_way_of", report).map(|mut section| {
        let mut named = |key, example: &str| {
            let value = section.needed(key, &format!("{example:?}"), report)?;
            value.text(example, report).map(str::to_owned)
        };
        let types = (named("from", "sata-plain"), named("to", "sas-plain"));
        section.finish(report);
        Some(HelperTypes { from: types.0?, to: types.1? })
    });
    let (span, key) = (section.span.clone(), section.name_of("to_type"));
    section.finish(report);
    if from_type.is_some() && from_type == to_type {
        report.add(&span, &key, "the volume has that type already", "name the type that it is to have");
        return None;
    }
    let by_way_of = match by_way_of {
        Some(given) => Some(given?),
        None => None,
    };
    Some(CinderVolume { volume: volume?, from_type: from_type?, to_type: to_type?, by_way_of })
}

/// Refuses a volume, or a server that runs from its volumes, that is there twice: two cutovers at once would work on it,
/// and each would switch it below the other.
pub(super) fn refuse_twice(servers: &[(usize, Server)], report: &mut Report<'_>) {
    let mut seen: HashMap<(&str, &str), (&str, bool)> = HashMap::new();
    for (at, server) in servers {
        let Cutover::OpenStack(config) = &server.cutover else { continue };
        // A gateway is shared by those whose volumes it has.
        let holder = match &config.holder {
            Holder::Server(id) => Some((("server", id.as_str()), false)),
            Holder::Gateway { server, .. } => Some((("server", server.as_str()), true)),
            Holder::Nobody => None,
        };
        let volumes = server.volumes.iter().filter_map(|volume| volume.cinder.as_ref());
        let volumes = volumes.map(|cinder| (("volume", cinder.volume.as_str()), false));
        for ((kind, id), may_be_shared) in holder.into_iter().chain(volumes) {
            if let Some((first, shared)) = seen.get(&(kind, id))
                && !(*shared && may_be_shared)
            {
                let problem = format!("{kind} {id} is in {first} already");
                report.add(&(*at..*at), &server.name, problem, "name every server and every volume of the cloud once");
            }
            seen.entry((kind, id)).or_insert((server.name.as_str(), may_be_shared));
        }
    }
}

/// Whether an image has a name that Cinder gives to those of its volumes.
pub(crate) fn is_cinders(image: &str) -> bool {
    image.strip_prefix("volume-").is_some_and(is_id)
}

/// Refuses what can't be the disks of a cloud's server. A failing migration of Cinder's *deletes* an image of the
/// volume's own name in the pool that it was to go to: no target has such a name before its time.
pub(super) fn check(section: &Section<'_>, volumes: &[Volume], report: &mut Report<'_>) {
    for volume in volumes {
        let mut wrong = |key: &str, problem: String, cure: String| {
            report.add(&section.span, &section.name_of(key), problem, cure);
        };
        let Volume { name, source, target, cinder, .. } = volume;
        let Some(cinder) = cinder else {
            let cure = "add cinder = { volume = \"ID\", from_type = \"sata\", to_type = \"sas\" } to the volume";
            wrong(
                "volume",
                format!("{name} is brought over by OpenStack, and nothing says which volume it is"),
                cure.into(),
            );
            continue;
        };
        match source {
            ImageSpec::Rbd { image, .. } if is_cinders(image) => {}
            _ => {
                let cure =
                    format!("Cinder names the images of its volumes volume-ID: rbd:POOL/volume-{}", cinder.volume);
                wrong("source", format!("{source} is no image of Cinder's"), cure);
            }
        }
        match target {
            ImageSpec::Rbd { image, .. } if is_cinders(image) => {
                let problem = format!("{target} has the name of a volume of Cinder's, which deletes such an image");
                wrong("target", problem, format!("give it a name of its own: poolshift-{}", cinder.volume));
            }
            ImageSpec::Rbd { .. } => {}
            ImageSpec::File { .. } => {
                wrong("target", format!("{target} is a file, and Cinder needs an image on RBD"), "name a pool".into());
            }
        }
    }
}
