//! From the text of a plan file to a [`Plan`], table by table.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::check::{self, Names};
use super::cloud;
use super::cutover;
use super::error::PlanError;
use super::fields::{self, Report, Section, Value, shown};
use super::{
    Api, ClusterAccess, Cutover, FILE_MAX, FleetLimits, Pace, Plan, Quiesce, Retention, Server, VOLUMES_MAX, Volume,
};
use crate::image::ImageSpec;
use crate::throttle::Rate;

const SECOND: Duration = Duration::from_secs(1);

/// The intervals that make sense: a cycle takes a second at least, and a month is no replication.
const INTERVALS: RangeInclusive<Duration> = SECOND..=Duration::from_secs(30 * 86_400);
/// How long snapshots may stay.
const KEEP_FOR: RangeInclusive<Duration> = SECOND..=Duration::from_secs(366 * 86_400);
/// How many snapshots may stay, as with `sync --keep`.
const KEEP: RangeInclusive<u64> = 1..=10_000;
/// How long writers may be frozen: a guest that hangs for longer is one that failed.
const FROZEN: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(300);
/// What a rate may be: below 64 KiB a second a volume would never end, above 1 TiB it is a typing error.
pub(super) const BYTES_PER_SECOND: RangeInclusive<u64> = 64 << 10..=1 << 40;
/// Requests a second.
pub(super) const OPERATIONS_PER_SECOND: RangeInclusive<u64> = 1..=10_000_000;
/// Volumes at a time.
const AT_A_TIME: RangeInclusive<u64> = 1..=1_000;
/// The bytes in flight in a whole process.
const MEMORY: RangeInclusive<u64> = 16 << 20..=64 << 30;

/// Reads a plan; `path` is for messages, and kept in the plan.
pub(super) fn read(text: &str, path: &Path) -> Result<Plan, PlanError> {
    if text.len() > FILE_MAX {
        return Err(PlanError::TooLarge { path: path.to_owned() });
    }
    let mut report = Report::new(text);
    let Some(table) = fields::parse(text, &mut report) else {
        report.finish(path)?;
        return Err(PlanError::Invalid { path: path.to_owned(), problems: Vec::new(), more: 0 });
    };
    let root = Section::root(&table);
    let plan = whole(root, path, &mut report);
    report.finish(path)?;
    Ok(plan)
}

fn whole(mut root: Section<'_>, path: &Path, report: &mut Report<'_>) -> Plan {
    let source_cluster = cluster(root.table("source", report), report);
    let target_cluster = cluster(root.table("target", report), report);
    let settings = defaults(root.table("defaults", report), report);
    let limits = limits(root.table("limits", report), report);
    let api = api(root.table("api", report), report);
    let throttles = super::throttles::read(root.tables("throttle", report), report);
    let servers = root.tables("server", report);
    let volumes = root.tables("volume", report);
    let all: usize = volumes.len() + servers.iter().map(|server| server.count("volume")).sum::<usize>();
    let mut plan =
        Plan { path: path.to_owned(), source_cluster, target_cluster, servers: Vec::new(), limits, throttles, api };
    let span = root.span.clone();
    root.finish(report);
    if all > VOLUMES_MAX {
        report.add(&span, "", format!("{all} volumes are more than {VOLUMES_MAX}"), "split the plan");
        return plan;
    }
    if servers.is_empty() && volumes.is_empty() && report.is_empty() {
        let cure = "add a [[volume]], or a [[server]] with volumes";
        report.add(&span, "", "there is no volume in it", cure);
    }
    let mut names = Names::new(plan.source_cluster.conf == plan.target_cluster.conf);
    let mut found: Vec<(usize, Server)> = Vec::new();
    for section in servers {
        found.extend(server(section, settings, &mut names, report));
    }
    for section in volumes {
        found.extend(single(section, settings, &mut names, report));
    }
    names.finish(report);
    // Servers and single volumes may be mixed: what counts is where they stand.
    found.sort_by_key(|(at, _)| *at);
    plan.servers = found.into_iter().map(|(_, server)| server).collect();
    plan
}

fn cluster(section: Option<Section<'_>>, report: &mut Report<'_>) -> ClusterAccess {
    let Some(mut section) = section else { return ClusterAccess::default() };
    let conf = section.value("conf").and_then(|value| value.path("/etc/ceph/ceph.conf", report));
    let user = section.value("user").and_then(|value| {
        let text = value.text("poolshift", report)?;
        let name = text.strip_prefix("client.").unwrap_or(text);
        if name.is_empty() || name.contains(char::is_whitespace) {
            let problem = format!("{:?} is no Ceph user", shown(text));
            value.wrong(problem, "write its name, with or without client., such as \"poolshift\"", report);
            return None;
        }
        Some(name.to_owned())
    });
    section.finish(report);
    ClusterAccess { conf, user }
}

/// What a server takes from the defaults, before its own keys: times that nobody has set follow the interval.
#[derive(Clone, Copy)]
struct Settings {
    pace: Pace,
    retention: Retention,
}

fn defaults(section: Option<Section<'_>>, report: &mut Report<'_>) -> Settings {
    let built_in = Settings { pace: Pace::default(), retention: Retention::default() };
    let Some(mut section) = section else { return built_in };
    let settings = own_settings(&mut section, built_in, report);
    section.finish(report);
    settings
}

/// The settings of a table, over those that it inherits.
fn own_settings(section: &mut Section<'_>, inherited: Settings, report: &mut Report<'_>) -> Settings {
    let interval = section.value("interval").and_then(|value| value.duration(INTERVALS, report));
    let interval = interval.unwrap_or(inherited.pace.interval);
    let mut no_shorter = |key: &'static str, inherited: Duration| {
        let Some(value) = section.value(key) else { return inherited };
        let duration = value.duration(INTERVALS, report);
        if duration.is_some_and(|duration| duration < interval) {
            let interval = super::values::duration_text(interval);
            let problem = format!("it is shorter than the interval of {interval}");
            value.wrong(problem, format!("write {interval} or longer"), report);
        }
        duration.unwrap_or(inherited)
    };
    let idle_interval = no_shorter("idle_interval", inherited.pace.idle_interval);
    let target_lag = no_shorter("target_lag", inherited.pace.target_lag);
    let keep = section.value("keep").and_then(|value| value.number(KEEP, report));
    let keep_for = section.value("keep_for").and_then(|value| value.duration(KEEP_FOR, report));
    Settings {
        pace: Pace { interval, idle_interval, target_lag },
        retention: Retention {
            keep: keep.and_then(|keep| usize::try_from(keep).ok()).unwrap_or(inherited.retention.keep),
            keep_for: keep_for.or(inherited.retention.keep_for),
        },
    }
}

impl Settings {
    /// What was inherited gives way to the interval: with `interval = "1h"` alone, nothing would ever be in time.
    fn pace(self) -> Pace {
        let Pace { interval, idle_interval, target_lag } = self.pace;
        let target_lag = if target_lag < interval { interval.saturating_mul(2) } else { target_lag };
        Pace { interval, idle_interval: idle_interval.max(interval), target_lag }
    }
}

fn limits(section: Option<Section<'_>>, report: &mut Report<'_>) -> FleetLimits {
    let mut limits = FleetLimits::default();
    let Some(mut section) = section else { return limits };
    let mut first_syncs = None;
    for (key, place) in [("volumes", &mut limits.volumes), ("volumes_per_pool", &mut limits.volumes_per_pool)] {
        let number = section.value(key).and_then(|value| value.number(AT_A_TIME, report));
        *place = number.and_then(|number| usize::try_from(number).ok()).unwrap_or(*place);
    }
    if let Some(value) = section.value("first_syncs") {
        first_syncs = value.number(AT_A_TIME, report).and_then(|number| usize::try_from(number).ok());
        if let Some(number) = first_syncs.filter(|&number| number > limits.volumes) {
            let problem = format!("{number} first copies don't fit into {} places", limits.volumes);
            value.wrong(problem, "write no more than limits.volumes, better less", report);
        }
    }
    limits.first_syncs = first_syncs.unwrap_or(limits.first_syncs).min(limits.volumes);
    let memory = section.value("memory").and_then(|value| value.size(MEMORY, report));
    limits.memory = memory.unwrap_or(limits.memory);
    section.finish(report);
    limits
}

fn api(section: Option<Section<'_>>, report: &mut Report<'_>) -> Api {
    let mut api = Api::default();
    let Some(mut section) = section else { return api };
    let token = section.value("token_file");
    // One that is wrong is told as such, and not as missing.
    let has_token = token.is_some();
    api.token_file = token.and_then(|value| value.path("/etc/poolshift/token", report));
    if let Some(value) = section.value("listen")
        && let Some(text) = value.text("127.0.0.1:9480", report)
    {
        match text.parse::<SocketAddr>() {
            _ if text == "off" => api.listen = None,
            Ok(address) if !address.ip().is_loopback() && !has_token => {
                let problem = format!("{address} can be reached from other hosts, and there is no token");
                let cure = "set api.token_file to a file with a secret in it, or listen on 127.0.0.1 or [::1]";
                value.wrong(problem, cure, report);
            }
            Ok(address) => api.listen = Some(address),
            Err(_) => {
                let problem = format!("{:?} is no address", shown(text));
                value.wrong(problem, "write an IP address and a port, such as \"127.0.0.1:9480\", or \"off\"", report);
            }
        }
    }
    section.finish(report);
    api
}

fn server(
    mut section: Section<'_>,
    inherited: Settings,
    names: &mut Names,
    report: &mut Report<'_>,
) -> Option<(usize, Server)> {
    let at = section.span.start;
    let name = name(&mut section, names, report);
    let (settings, paused, quiesce) = server_settings(&mut section, inherited, report);
    let cutover = cutover::read(&mut section, report);
    let given = section.count("volume");
    let mut volumes = Vec::new();
    let mut boots: Option<usize> = None;
    for mut part in section.tables("volume", report) {
        let volume_name = self::name(&mut part, names, report);
        let volume = volume(&mut part, volume_name, names, report);
        let boot = part.value("boot").filter(|value| value.flag(report) == Some(true));
        let boots_from = boot.is_some();
        if let Some(value) = boot {
            if let Some(first) = boots {
                let problem = format!("line {first} has boot = true already, and a server boots from one disk");
                value.wrong(problem, "leave one of them", report);
            }
            boots.get_or_insert(report.line(value.span.start));
        }
        part.finish(report);
        volumes.extend(volume.map(|volume| Volume { boot: boots_from, ..volume }));
    }
    if given == 0 {
        let (span, key) = (section.span.clone(), section.name_of("volume"));
        report.add(&span, &key, "the server has no volume", "add a [[server.volume]], or remove the server");
    }
    refuse_shared_files(&section, &volumes, &quiesce, report);
    if matches!(cutover, Cutover::OpenStack(_)) {
        cloud::check(&section, &volumes, report);
    }
    section.finish(report);
    Some((
        at,
        Server { name: name?, volumes, pace: settings.pace(), retention: settings.retention, quiesce, paused, cutover },
    ))
}

/// A volume that stands by itself: a server of its own.
fn single(
    mut section: Section<'_>,
    inherited: Settings,
    names: &mut Names,
    report: &mut Report<'_>,
) -> Option<(usize, Server)> {
    let at = section.span.start;
    let name = name(&mut section, names, report);
    let (settings, paused, quiesce) = server_settings(&mut section, inherited, report);
    let cutover = cutover::read(&mut section, report);
    let volume = volume(&mut section, name.clone(), names, report);
    let boot = section.value("boot").and_then(|value| value.flag(report));
    let volumes: Vec<Volume> =
        volume.into_iter().map(|volume| Volume { boot: boot.unwrap_or(false), ..volume }).collect();
    refuse_shared_files(&section, &volumes, &quiesce, report);
    if matches!(cutover, Cutover::OpenStack(_)) {
        cloud::check(&section, &volumes, report);
    }
    section.finish(report);
    Some((
        at,
        Server { name: name?, volumes, pace: settings.pace(), retention: settings.retention, quiesce, paused, cutover },
    ))
}

/// A file has no snapshots: no point can be made of it together with other disks, or while a server is frozen.
fn refuse_shared_files(section: &Section<'_>, volumes: &[Volume], quiesce: &Quiesce, report: &mut Report<'_>) {
    let file = volumes.iter().find(|volume| matches!(volume.source, ImageSpec::File { .. }));
    let Some(file) = file.filter(|_| volumes.len() > 1 || *quiesce != Quiesce::None) else { return };
    let (span, key) = (section.span.clone(), section.name_of("source"));
    let problem =
        format!("{} is a file, has no snapshots, and can share no point with other disks or a freeze", file.source);
    report.add(&span, &key, problem, "make it a [[volume]] by itself, without quiesce");
}

fn server_settings(
    section: &mut Section<'_>,
    inherited: Settings,
    report: &mut Report<'_>,
) -> (Settings, bool, Quiesce) {
    let settings = own_settings(section, inherited, report);
    let paused = section.value("paused").and_then(|value| value.flag(report)).unwrap_or(false);
    let quiesce = section.value("quiesce").and_then(|value| quiesce(value, report)).unwrap_or(Quiesce::None);
    (settings, paused, quiesce)
}

fn name(section: &mut Section<'_>, names: &mut Names, report: &mut Report<'_>) -> Option<String> {
    let value = section.needed("name", "\"web-1\"", report)?;
    let name = value.text("web-1", report)?;
    if let Err(problem) = check::name(name) {
        let cure = "write a letter or digit first, then letters, digits, dots, dashes and underscores";
        value.wrong(format!("{:?} is no name: {problem}", shown(name)), cure, report);
        return None;
    }
    names.add_name(name, &value, report);
    Some(name.to_owned())
}

/// The volume's own keys, but for `name` and `boot`.
fn volume(
    section: &mut Section<'_>,
    name: Option<String>,
    names: &mut Names,
    report: &mut Report<'_>,
) -> Option<Volume> {
    let source = section.needed("source", "\"rbd:sata/web-1\"", report);
    let source = source.and_then(|value| Some((image(&value, report)?, value)));
    let target = section.needed("target", "\"rbd:sas/web-1\"", report);
    let target = target.and_then(|value| Some((image(&value, report)?, value)));
    let rate = rate(section, report);
    let cinder = section.table("cinder", report).map(|section| cloud::volume(section, report));
    let (source, target) = (source?, target?);
    names.add_volume(name.as_deref(), (&source.0, &source.1), (&target.0, &target.1), report);
    let cinder = match cinder {
        Some(given) => Some(given?),
        None => None,
    };
    let (source, target, rate) = (source.0, target.0, rate.resolve(Rate::default()));
    Some(Volume { name: name?, source, target, boot: false, rate, cinder })
}

fn image(value: &Value<'_>, report: &mut Report<'_>) -> Option<ImageSpec> {
    let text = value.text("rbd:sata/web-1", report)?;
    let cure = "write \"rbd:POOL/[NAMESPACE/]IMAGE\", or \"file:PATH\" with the whole path";
    let problem = match text.parse::<ImageSpec>() {
        Err(error) => format!("{:?} names no image: {}", shown(text), error.problem),
        Ok(spec) if spec.snapshot().is_some() => {
            let snapshot = spec.snapshot().unwrap_or_default();
            let problem = format!("{:?} names a snapshot, and a plan is about images", shown(text));
            value.wrong(problem, format!("drop @{}", shown(snapshot)), report);
            return None;
        }
        Ok(ImageSpec::File { path, .. }) if !path.is_absolute() => {
            format!("{:?} depends on the folder that poolshift is started in", shown(text))
        }
        Ok(spec) => return Some(spec),
    };
    value.wrong(problem, cure, report);
    None
}

/// The two limits of a table, as they are written: `None` where the key is not there or wrong, `Some(None)` for
/// `"unlimited"`.
#[derive(Clone, Copy)]
pub(super) struct WrittenRate {
    bytes: Option<Option<NonZeroU64>>,
    operations: Option<Option<NonZeroU64>>,
}

impl WrittenRate {
    /// Whether nothing was written.
    pub(super) fn is_empty(self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }

    /// The limits, over those that count where nothing was written.
    pub(super) fn resolve(self, inherited: Rate) -> Rate {
        Rate {
            bytes_per_second: self.bytes.unwrap_or(inherited.bytes_per_second),
            operations_per_second: self.operations.unwrap_or(inherited.operations_per_second),
        }
    }
}

/// Reads the two limits of a table.
pub(super) fn rate(section: &mut Section<'_>, report: &mut Report<'_>) -> WrittenRate {
    let unlimited = |value: &Value<'_>| value.as_text() == Some("unlimited");
    let bytes = section.value("bytes_per_second").map(|value| match unlimited(&value) {
        true => None,
        false => value.size(BYTES_PER_SECOND, report).and_then(NonZeroU64::new),
    });
    let operations = section.value("operations_per_second").map(|value| match unlimited(&value) {
        true => None,
        false => value.number(OPERATIONS_PER_SECOND, report).and_then(NonZeroU64::new),
    });
    WrittenRate { bytes, operations }
}

fn quiesce(value: Value<'_>, report: &mut Report<'_>) -> Option<Quiesce> {
    let forms = "write \"none\", { virsh = { domain = \"web-1\", limit = \"10s\" } } or { command = { freeze = \"…\", thaw \
                 = \"…\", limit = \"10s\" } }";
    if let Some(text) = value.as_text() {
        if text != "none" {
            value.wrong(format!("{:?} is no way to quiesce", shown(text)), forms, report);
        }
        return Some(Quiesce::None);
    }
    let (span, key) = (value.span.clone(), value.key.clone());
    let mut section = value.section(report)?;
    let (virsh, command) = (section.value("virsh"), section.value("command"));
    section.finish(report);
    match (virsh, command) {
        (Some(virsh), None) => self::virsh(virsh.section(report)?, report),
        (None, Some(command)) => self::command(command.section(report)?, report),
        (both, _) => {
            let problem = if both.is_some() { "it names two ways at once" } else { "it names no way" };
            report.add(&span, &key, problem, forms);
            None
        }
    }
}

fn virsh(mut section: Section<'_>, report: &mut Report<'_>) -> Option<Quiesce> {
    let domain = section.needed("domain", "\"web-1\"", report).and_then(|value| value.text("web-1", report));
    let uri = section.value("uri").and_then(|value| value.text("qemu:///system", report));
    let limit = frozen_limit(&mut section, report);
    section.finish(report);
    Some(Quiesce::Virsh { domain: domain?.to_owned(), uri: uri.map(str::to_owned), limit: limit? })
}

fn command(mut section: Section<'_>, report: &mut Report<'_>) -> Option<Quiesce> {
    let mut text = |key| {
        let value = section.needed(key, &format!("\"/etc/poolshift/{key}\""), report)?;
        value.text("/etc/poolshift/hook", report).map(str::to_owned)
    };
    let (freeze, thaw) = (text("freeze"), text("thaw"));
    let limit = frozen_limit(&mut section, report);
    section.finish(report);
    Some(Quiesce::Command { freeze: freeze?, thaw: thaw?, limit: limit? })
}

/// How long the writers may stay frozen: never without a limit.
fn frozen_limit(section: &mut Section<'_>, report: &mut Report<'_>) -> Option<Duration> {
    section.needed("limit", "\"10s\"", report)?.duration(FROZEN, report)
}

/// Reads a plan's file; more than [`FILE_MAX`] bytes of it are never read.
pub(super) fn load(path: &Path) -> Result<Plan, PlanError> {
    use std::io::Read as _;
    let failed = |source| PlanError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_MAX as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > FILE_MAX {
        return Err(PlanError::TooLarge { path: PathBuf::from(path) });
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) => read(text, path),
        Err(error) => {
            // What stands before is text, and says where that is.
            let text = String::from_utf8_lossy(&bytes[..error.valid_up_to()]).into_owned();
            let mut report = Report::new(&text);
            let problem = format!("a byte {:#04x} that is no UTF-8", bytes[error.valid_up_to()]);
            report.add(&(text.len()..text.len()), "", problem, "save the file as UTF-8");
            match report.finish(path) {
                Err(error) => Err(error),
                Ok(()) => read(&text, path),
            }
        }
    }
}
