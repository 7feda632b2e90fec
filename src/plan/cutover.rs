//! `[server.cutover]`: how a server is stopped, given its other disks, and started, at its cutover.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::cloud::{self, OpenStackCutover};
use super::fields::{Report, Section, shown};

/// How long a server may take to stop: less is a typing error, and nobody waits for more.
const LIMITS: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// How long a server may take to stop, and each command, where nobody has said so.
const LIMIT: Duration = Duration::from_secs(300);

/// Where libvirt itself keeps the memory of saved domains.
const SAVE_FOLDER: &str = "/var/lib/libvirt/qemu/save";

/// How a server is stopped, given its other disks, and started, at its cutover.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Cutover {
    /// By a person: poolshift carries the last changes over, proves the copy, and says what to swap.
    #[default]
    None,
    /// By libvirt.
    Libvirt(LibvirtCutover),
    /// By commands of the operator's.
    Command(CommandCutover),
    /// By OpenStack.
    OpenStack(OpenStackCutover),
}

/// A libvirt domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibvirtCutover {
    /// The domain.
    pub domain: String,
    /// libvirt's URI; virsh's own default otherwise.
    pub uri: Option<String>,
    /// How it is brought over; a command may ask for another.
    pub method: Method,
    /// Where its memory is saved meanwhile, a folder on libvirt's host.
    pub save_folder: PathBuf,
    /// How long it may take to stop, or in a rehearsal to boot.
    pub limit: Duration,
    /// How its rehearsals are judged.
    pub rehearsal: LibvirtRehearsal,
}

/// How the stand-in of a libvirt domain is judged, and what it is connected to, in a rehearsal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LibvirtRehearsal {
    /// What its serial console shows once it has booted. Without it and `check` its guest agent has to answer.
    pub console: Option<String>,
    /// A command, run by `/bin/sh -c` once it has booted: with 0 it says that all is well. [`crate::cutover::provider`]
    /// has its contract.
    pub check: Option<String>,
    /// The isolated network of libvirt's that it is on. Without it its network cards have no link.
    pub network: Option<String>,
}

/// How a libvirt domain is brought over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// It is shut down, and boots.
    Cold,
    /// Its memory is saved, and it goes on without a boot.
    #[default]
    Warm,
    /// It is suspended, and its disks are opened anew below it.
    Hot,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 3] = [Self::Cold, Self::Warm, Self::Hot];

    /// Its name, in a plan and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Hot => "hot",
        }
    }
}

/// Commands that are run by `/bin/sh -c`; [`crate::cutover::provider`] has their contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandCutover {
    /// Has the writers come to rest, before `stop`, if it is given.
    pub quiesce: Option<String>,
    /// Stops the server, or has it let go of its disks.
    pub stop: String,
    /// Gives it the disks of the side in `POOLSHIFT_SIDE`.
    pub swap: String,
    /// Starts it on the side in `POOLSHIFT_SIDE`.
    pub start: String,
    /// Brings it back instead of `swap` and `start`, if it is given.
    pub undo: Option<String>,
    /// Prints what the server is doing and on which side: `running source`.
    pub state: String,
    /// Has a throw-away server boot from the clones of a rehearsal, check itself, and go, if it is given.
    pub rehearse: Option<String>,
    /// How long each may take.
    pub limit: Duration,
}

/// Reads a server's own table of it.
pub(super) fn read(server: &mut Section<'_>, report: &mut Report<'_>) -> Cutover {
    let Some(mut section) = server.table("cutover", report) else { return Cutover::None };
    let (span, key) = (section.span.clone(), server.name_of("cutover"));
    let ways = ["libvirt", "command", "openstack"].map(|key| section.value(key));
    section.finish(report);
    let read = match ways {
        [Some(value), None, None] => {
            value.section(report).and_then(|section| libvirt_domain(section, report)).map(Cutover::Libvirt)
        }
        [None, Some(value), None] => {
            value.section(report).and_then(|section| commands(section, report)).map(Cutover::Command)
        }
        [None, None, Some(value)] => {
            let section = value.section(report);
            section.and_then(|section| cloud::cutover(section, limit, report)).map(Cutover::OpenStack)
        }
        ways => {
            let any = ways.iter().any(Option::is_some);
            let problem = if any { "it names several ways at once" } else { "it names no way" };
            let cure = "write libvirt = { domain = \"web-1\" }, openstack = { server = \"ID\" }, or command = { stop = \"…\", \
                        swap = \"…\", start = \"…\", state = \"…\" }; leave the table out to swap the disks by hand";
            report.add(&span, &key, problem, cure);
            None
        }
    };
    // What could not be read has been noted: nobody gets to see this plan.
    read.unwrap_or_default()
}

fn libvirt_domain(mut section: Section<'_>, report: &mut Report<'_>) -> Option<LibvirtCutover> {
    let domain = section.needed("domain", "\"web-1\"", report).and_then(|value| value.text("web-1", report));
    let uri = section.value("uri").and_then(|value| value.text("qemu:///system", report));
    let method = match section.value("method") {
        None => Some(Method::default()),
        Some(value) => value.text("warm", report).and_then(|text| {
            let method = Method::ALL.into_iter().find(|method| method.name() == text);
            if method.is_none() {
                let problem = format!("{:?} is no way to bring a domain over", shown(text));
                value.wrong(problem, "write \"cold\", \"warm\" or \"hot\"", report);
            }
            method
        }),
    };
    let save_folder = match section.value("save_folder") {
        None => Some(SAVE_FOLDER.into()),
        Some(value) => value.path(SAVE_FOLDER, report),
    };
    let limit = limit(&mut section, report);
    let rehearsal = section.table("rehearsal", report).map(|section| rehearsal(section, report)).unwrap_or_default();
    section.finish(report);
    Some(LibvirtCutover {
        domain: domain?.to_owned(),
        uri: uri.map(str::to_owned),
        method: method?,
        save_folder: save_folder?,
        limit: limit?,
        rehearsal,
    })
}

fn rehearsal(mut section: Section<'_>, report: &mut Report<'_>) -> LibvirtRehearsal {
    let mut given = |key, example| section.value(key).and_then(|value| value.text(example, report)).map(str::to_owned);
    let read = LibvirtRehearsal {
        console: given("console", "login:"),
        check: given("check", "/etc/poolshift/check"),
        network: given("network", "isolated"),
    };
    section.finish(report);
    read
}

fn commands(mut section: Section<'_>, report: &mut Report<'_>) -> Option<CommandCutover> {
    let example = |key| format!("/etc/poolshift/{key}");
    let mut needed = |key| {
        let value = section.needed(key, &format!("{:?}", example(key)), report)?;
        value.text(&example(key), report).map(str::to_owned)
    };
    let (stop, swap, start, state) = (needed("stop"), needed("swap"), needed("start"), needed("state"));
    let mut given = |key| section.value(key).and_then(|value| value.text(&example(key), report)).map(str::to_owned);
    let (quiesce, undo, rehearse) = (given("quiesce"), given("undo"), given("rehearse"));
    let limit = limit(&mut section, report);
    section.finish(report);
    Some(CommandCutover {
        quiesce,
        stop: stop?,
        swap: swap?,
        start: start?,
        undo,
        state: state?,
        rehearse,
        limit: limit?,
    })
}

fn limit(section: &mut Section<'_>, report: &mut Report<'_>) -> Option<Duration> {
    match section.value("limit") {
        None => Some(LIMIT),
        Some(value) => value.duration(LIMITS, report),
    }
}
