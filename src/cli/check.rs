//! `poolshift check`: a plan held against the clusters. Nothing is changed, locked or watched.
//!
//! Each volume gets a verdict of its own ([`look`]); what concerns many of them, as the space of a pool, gets one below.
//! The size of a first copy is what is allocated on the source: from the object map, whole objects, so that it is an
//! upper bound; how long it takes is told by a bounded sample of reads ([`measure`]) and the plan's throttles.
//!
//! # What later commands refuse, and what of it is seen here
//!
//! | refused or slow later, because | here |
//! |---|---|
//! | a cluster does not answer, a keyring or configuration file can't be read, a key is refused | the command's error |
//! | an image, pool or namespace is missing, an image lacks an object or has format 1, a parent may not be read | error of the volume |
//! | the user may not write in a pool | error of the pool |
//! | the source can't be snapshotted: mirroring, migration, a lock of another tool, the limit of its snapshots | error of the volume |
//! | source and target have no common, undisturbed past | error of the volume |
//! | the first copies do not fit into the pool, or its quota | error of the pool, as of now |
//! | another process or client has the target's lock | warning: it may end before |
//! | exclusive lock, object map or fast-diff are missing or invalid, clones depend on the source | warning of the volume |
//! | the name given with `--snapshot` is taken, or of another moment | not seen: it is given later |
//! | the user may not add to the blocklist | not seen: only adding an entry would show it |
//! | a freeze hook, or a command of a cutover, fails | not seen: running it would do what it does |
//! | a server's domain, instance, volumes or host are not as a cutover needs them | `cutover --dry-run`, which asks libvirt and the cloud |
//! | a kept source has snapshots, clones or users | `finalize --dry-run`: it is so only after the cutover |

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal as _;

use futures::stream::{self, StreamExt as _};
use serde::Serialize;

use super::config::{CephAccess, Check, Config};
use super::exit::Exit;
use super::fleet::without_retyped;
use super::values::human_bytes;
use super::{Context, Interrupted, images, output};
use crate::image::{ErrorKind, ImageSpec};
use crate::plan::{ClusterAccess, Plan};

mod look;
mod measure;
mod show;

use look::Looked;

/// How many volumes are looked at at a time.
const AT_A_TIME: usize = 8;

/// How wide the report is in a file or a pipe, in characters.
const WIDTH: u16 = 120;

/// How good something is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// Nothing to do; a finding is for information.
    #[default]
    Ok,
    /// It works, and could be better or safer.
    Warning,
    /// It does not work.
    Error,
}

/// Something that was found out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    verdict: Verdict,
    /// What, and what to do about it.
    text: String,
}

impl Finding {
    fn new(verdict: Verdict, text: impl Into<String>) -> Self {
        Self { verdict, text: text.into() }
    }

    /// The error of an image, with what to do.
    fn failure(error: &crate::image::ImageError) -> Self {
        let hint = error.hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default();
        Self::new(Verdict::Error, format!("{error}{hint}"))
    }
}

fn worst(findings: &[Finding]) -> Verdict {
    findings.iter().map(|finding| finding.verdict).max().unwrap_or_default()
}

/// What stands in the report for one volume.
#[derive(Debug, Serialize)]
struct VolumeReport {
    server: String,
    name: String,
    source: String,
    target: String,
    verdict: Verdict,
    findings: Vec<Finding>,
    #[serde(flatten)]
    looked: Looked,
    /// How long the first copy takes if nothing else is copied; `None` where there is none, or no rate is known.
    first_copy_seconds: Option<u64>,
}

/// A pool, source or target, with what was found out.
#[derive(Debug, Serialize)]
struct PoolReport {
    pool: String,
    verdict: Verdict,
    findings: Vec<Finding>,
}

/// A source pool, or all files, with the rate at which first copies are read.
#[derive(Clone, Debug, Serialize)]
struct PoolRate {
    /// The pool; `None` for files.
    pool: Option<String>,
    /// What the first copies of all its volumes read, in bytes, at most.
    first_copy_bytes: u64,
    /// What a sample was read at, in bytes a second.
    measured: Option<u64>,
    /// What the plan allows outside of all windows, in bytes a second.
    allowed: Option<u64>,
    /// How long the first copies take.
    seconds: Option<u64>,
}

impl PoolRate {
    /// The lower of both, in bytes a second.
    fn rate(&self) -> Option<u64> {
        [self.measured, self.allowed].into_iter().flatten().min()
    }
}

/// The result.
#[derive(Debug, Serialize)]
struct Report {
    plan: String,
    verdict: Verdict,
    errors: usize,
    warnings: usize,
    volumes: Vec<VolumeReport>,
    pools: Vec<PoolReport>,
    rates: Vec<PoolRate>,
}

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Check) -> anyhow::Result<Exit> {
    let path = settings.plan.clone();
    let plan = tokio::task::spawn_blocking(move || Plan::load(&path)).await??;
    let plan = without_retyped(&context.terminal, plan);
    let config = with_plan(context.config, &plan);
    let context = Context { config: &config, terminal: context.terminal.clone(), cancel: context.cancel.clone() };
    let report = tokio::select! {
        report = check(&context, &plan, settings.measure) => report?,
        () = context.cancel.cancelled() => return Err(Interrupted.into()),
    };
    match settings.json {
        true => output::json(&report)?,
        false => {
            let width = (!std::io::stdout().is_terminal()).then_some(WIDTH);
            output::bytes(show::text(&report, width).as_bytes())?;
        }
    }
    Ok(if report.errors > 0 { Exit::Failed } else { Exit::Success })
}

/// The command line's way to the clusters, where the plan has none of its own.
fn with_plan(config: &Config, plan: &Plan) -> Config {
    let access = |plan: &ClusterAccess, given: &CephAccess| CephAccess {
        conf: plan.conf.clone().or_else(|| given.conf.clone()),
        user: plan.user.clone().or_else(|| given.user.clone()),
    };
    Config {
        source_ceph: access(&plan.source_cluster, &config.source_ceph),
        target_ceph: access(&plan.target_cluster, &config.target_ceph),
        ..config.clone()
    }
}

async fn check(context: &Context<'_>, plan: &Plan, measure: bool) -> anyhow::Result<Report> {
    let any_rbd = |of: fn(&crate::plan::Volume) -> &ImageSpec| {
        plan.volumes().any(|(_, volume)| matches!(of(volume), ImageSpec::Rbd { .. }))
    };
    // A cluster that can't be reached is one error, not one for each volume.
    if any_rbd(|volume| &volume.source) {
        images::connect(context, &context.config.source_ceph).await?;
    }
    if any_rbd(|volume| &volume.target) {
        images::connect(context, &context.config.target_ceph).await?;
    }
    let bar = context.terminal.progress("looking at the volumes");
    let looks = plan.volumes().map(|(server, volume)| look::look(context, server, volume));
    let looked: Vec<_> = stream::iter(looks).buffered(AT_A_TIME).collect().await;
    drop(bar);
    let rates = rates(context, plan, &looked, measure).await;
    let mut pools = targets(context, plan, &looked).await;
    pools.extend(access(context, plan).await);
    pools.extend(throttles(context, plan).await);
    let volumes: Vec<VolumeReport> = plan
        .volumes()
        .zip(looked)
        .map(|((server, volume), (looked, findings))| VolumeReport {
            server: server.name.clone(),
            name: volume.name.clone(),
            source: volume.source.to_string(),
            target: volume.target.to_string(),
            verdict: worst(&findings),
            first_copy_seconds: {
                let pool = rates.iter().find(|rate| rate.pool.as_deref() == pool_of(&volume.source));
                let own = volume.rate.bytes_per_second.map(std::num::NonZeroU64::get);
                let rate = [pool.and_then(PoolRate::rate), own].into_iter().flatten().min();
                rate.filter(|_| looked.first_copy_bytes > 0).map(|rate| looked.first_copy_bytes.div_ceil(rate.max(1)))
            },
            findings,
            looked,
        })
        .collect();
    let verdicts = || volumes.iter().map(|volume| volume.verdict).chain(pools.iter().map(|pool| pool.verdict));
    Ok(Report {
        plan: plan.path.display().to_string(),
        verdict: verdicts().max().unwrap_or_default(),
        errors: verdicts().filter(|&verdict| verdict == Verdict::Error).count(),
        warnings: verdicts().filter(|&verdict| verdict == Verdict::Warning).count(),
        volumes,
        pools,
        rates,
    })
}

/// The pool of an RBD image.
fn pool_of(spec: &ImageSpec) -> Option<&str> {
    match spec {
        ImageSpec::Rbd { pool, .. } => Some(pool),
        ImageSpec::File { .. } => None,
    }
}

/// Whether what is to be written fits into the target pools.
async fn targets(context: &Context<'_>, plan: &Plan, looked: &[(Looked, Vec<Finding>)]) -> Vec<PoolReport> {
    let mut needed: BTreeMap<&str, u64> = BTreeMap::new();
    for ((_, volume), (looked, _)) in plan.volumes().zip(looked) {
        if let Some(pool) = pool_of(&volume.target) {
            let sum = needed.entry(pool).or_default();
            *sum = sum.saturating_add(looked.first_copy_bytes);
        }
    }
    let mut reports = Vec::new();
    for (pool, needed) in needed {
        let space = match images::connect(context, &context.config.target_ceph).await {
            Ok(connector) => connector.pool_space(pool).await,
            Err(error) => Err(error),
        };
        let finding = match space {
            Ok(space) => {
                let free = space.available();
                let number = match space.quota {
                    Some(quota) if free < space.max_avail => {
                        format!("what is left of its quota of {}", human_bytes(quota))
                    }
                    _ => "max_avail of `ceph df`".to_owned(),
                };
                let text = format!(
                    "the first copies need at most {} (allocated on the sources) of {} that are free ({number})",
                    human_bytes(needed),
                    human_bytes(free),
                );
                match () {
                    () if needed > free => {
                        Finding::new(Verdict::Error, format!("{text}: too much; add OSDs, or move fewer volumes"))
                    }
                    // Ceph warns at 85 % of an OSD, and stops at 95 %.
                    () if needed > free / 100 * 85 => {
                        Finding::new(Verdict::Warning, format!("{text}: little is left for snapshots and growth"))
                    }
                    () => Finding::new(Verdict::Ok, text),
                }
            }
            // That the pool is missing stands with its volumes.
            Err(error) if error.kind == ErrorKind::NotFound => Finding::failure(&error),
            Err(error) => Finding::new(Verdict::Warning, format!("its free space is not known: {error}")),
        };
        let findings = vec![finding];
        reports.push(PoolReport { pool: format!("target {pool}"), verdict: worst(&findings), findings });
    }
    reports
}

/// The pools in which the user may not write: on the sources it makes snapshots.
async fn access(context: &Context<'_>, plan: &Plan) -> Vec<PoolReport> {
    let mut places = BTreeSet::new();
    for (_, volume) in plan.volumes() {
        for (side, image) in [("source", &volume.source), ("target", &volume.target)] {
            if let ImageSpec::Rbd { pool, namespace, .. } = image {
                places.insert((side, pool, namespace.as_deref()));
            }
        }
    }
    let mut reports = Vec::new();
    for (side, pool, namespace) in places {
        let ceph = if side == "source" { &context.config.source_ceph } else { &context.config.target_ceph };
        let probed = match images::connect(context, ceph).await {
            Ok(connector) => connector.may_write(pool, namespace).await,
            Err(error) => Err(error),
        };
        let finding = match probed {
            // That the pool is missing stands with its volumes.
            Ok(()) => continue,
            Err(error) if error.kind == ErrorKind::NotFound => continue,
            Err(error) if error.kind == ErrorKind::PermissionDenied => Finding::failure(&error),
            Err(error) => Finding::new(Verdict::Warning, format!("whether it may be written is not known: {error}")),
        };
        let (namespace, findings) = (namespace.map(|name| format!("/{name}")).unwrap_or_default(), vec![finding]);
        reports.push(PoolReport { pool: format!("{side} {pool}{namespace}"), verdict: worst(&findings), findings });
    }
    reports
}

/// Whether the pools that throttles name are there, and read.
async fn throttles(context: &Context<'_>, plan: &Plan) -> Vec<PoolReport> {
    let mut reports = Vec::new();
    for throttle in &plan.throttles {
        let found = match images::connect(context, &context.config.source_ceph).await {
            Ok(connector) => connector.find_pool(&throttle.pool, None).await,
            Err(error) => Err(error),
        };
        let read = plan.volumes().any(|(_, volume)| pool_of(&volume.source) == Some(&throttle.pool));
        let finding = match found {
            Err(error) => Finding::failure(&error),
            Ok(()) if read => Finding::new(Verdict::Ok, "the pool is there, and volumes are read from it"),
            Ok(()) => {
                Finding::new(Verdict::Warning, "no volume of the plan is read from it; remove it, or mend its name")
            }
        };
        let findings = vec![finding];
        reports.push(PoolReport { pool: format!("throttle {}", throttle.pool), verdict: worst(&findings), findings });
    }
    reports
}

/// How fast each source pool may be read.
async fn rates(context: &Context<'_>, plan: &Plan, looked: &[(Looked, Vec<Finding>)], measure: bool) -> Vec<PoolRate> {
    let mut pools: BTreeMap<Option<&str>, Vec<(&ImageSpec, u64)>> = BTreeMap::new();
    for ((_, volume), (looked, _)) in plan.volumes().zip(looked) {
        let copies = pools.entry(pool_of(&volume.source)).or_default();
        if looked.first_copy_bytes > 0 {
            copies.push((&volume.source, looked.first_copy_bytes));
        }
    }
    let measured_pools = pools.values().filter(|copies| !copies.is_empty()).count();
    let mut rates = Vec::new();
    for (pool, mut copies) in pools {
        let first_copy_bytes = copies.iter().fold(0u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
        let allowed = pool.and_then(|pool| plan.throttle(pool)).and_then(measure::allowed);
        copies.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let mut measured = None;
        if measure && first_copy_bytes > 0 {
            let sources: Vec<&ImageSpec> = copies.into_iter().map(|(source, _)| source).collect();
            let bar = context.terminal.progress("reading a sample");
            measured = measure::sample(context, &sources, measured_pools, allowed).await;
            drop(bar);
        }
        let mut rate = PoolRate { pool: pool.map(str::to_owned), first_copy_bytes, measured, allowed, seconds: None };
        rate.seconds = rate.rate().map(|rate| first_copy_bytes.div_ceil(rate.max(1)));
        rates.push(rate);
    }
    rates
}
