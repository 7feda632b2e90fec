//! The validated configuration: whatever a command gets from here makes sense by itself and together.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::{
    Arguments, CheckArgs, CommandArgs, CreateArgs, DemoArgs, DepsArgs, DiffArgs, ExportDiffArgs, FlattenArgs, GcArgs,
    GlobalArgs, ImageFeature, ImportDiffArgs, InspectArgs, LogFormat, MergeDiffArgs, ReceiveArgs, ReplicateArgs,
    SendArgs, SyncArgs, VerifyArgs,
};
pub use super::cutover_args::{At, Consent, Cutover, Finalize, Rehearse, Rollback, Whom};
pub use super::fleet_args::{Act, FleetStatus, Throttle};
pub use super::plan_args::{CloudPlan, Plan, PlanOf, PoolPlan, Projects};
pub use super::retype_args::Retype;
use super::values::SnapshotName;
use crate::batch::CompressionChoice;
use crate::image::ImageSpec;
use crate::observe::client::Action;

/// A command line which can be read but makes no sense. Exit code 2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// What the command line says.
#[derive(Clone, Debug)]
pub struct Config {
    /// How to reach the source's cluster, if it is on one.
    pub source_ceph: CephAccess,
    /// How to reach the target's cluster.
    pub target_ceph: CephAccess,
    /// How long one request to the storage may take.
    pub io_timeout: Duration,
    /// How much to say.
    pub verbosity: Verbosity,
    /// How to say it.
    pub log_format: LogFormat,
    /// What to do.
    pub command: Command,
}

/// Which cluster, as whom. `None` leaves the choice to librados.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CephAccess {
    /// The ceph.conf.
    pub conf: Option<PathBuf>,
    /// The user, without `client.`.
    pub user: Option<String>,
}

/// How much goes to standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Errors only, and no progress.
    Quiet,
    /// Warnings as well.
    Normal,
    /// What is done.
    Info,
    /// And why.
    Debug,
    /// Every request.
    Trace,
}

/// One command with its settings.
#[derive(Clone, Debug)]
pub enum Command {
    /// `poolshift sync`
    Sync(Sync),
    /// `poolshift diff`
    Diff(Diff),
    /// `poolshift verify`
    Verify(Verify),
    /// `poolshift export-diff`
    ExportDiff(ExportDiff),
    /// `poolshift import-diff`
    ImportDiff(ImportDiff),
    /// `poolshift merge-diff`
    MergeDiff(MergeDiff),
    /// `poolshift send`
    Send(Send),
    /// `poolshift receive`
    Receive(Receive),
    /// `poolshift inspect`
    Inspect(Inspect),
    /// `poolshift status`
    Status(Status),
    /// `poolshift status` of a plan
    FleetStatus(FleetStatus),
    /// `poolshift replicate`
    Replicate(Replicate),
    /// `poolshift pause`, `resume` and `sync-now`
    Act(Act),
    /// `poolshift throttle`
    Throttle(Throttle),
    /// `poolshift cutover`
    Cutover(Cutover),
    /// `poolshift rehearse`
    Rehearse(Rehearse),
    /// `poolshift rollback`
    Rollback(Rollback),
    /// `poolshift finalize`
    Finalize(Finalize),
    /// `poolshift retype`
    Retype(Retype),
    /// `poolshift deps`
    Deps(Deps),
    /// `poolshift flatten`
    Flatten(Flatten),
    /// `poolshift gc`
    Gc(Gc),
    /// `poolshift plan`
    Plan(Plan),
    /// `poolshift check`
    Check(Check),
    /// `poolshift demo`
    Demo(Demo),
    /// `poolshift completions`
    Completions(clap_complete::Shell),
}

/// A file, or the standard stream that `-` stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stream {
    /// `-`
    Standard,
    /// A path.
    File(PathBuf),
}

impl From<PathBuf> for Stream {
    fn from(path: PathBuf) -> Self {
        if path == Path::new("-") { Self::Standard } else { Self::File(path) }
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Standard => f.write_str("-"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// What a target that doesn't exist is to be like, where it isn't to be like the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Create {
    /// RBD's object size, in bytes.
    pub object_size: Option<u64>,
    /// RBD's features, all of them.
    pub features: Option<Vec<ImageFeature>>,
    /// RBD's pool for the data.
    pub data_pool: Option<String>,
}

/// What may be done to a target that isn't poolshift's own continuation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartOver {
    /// Nothing: only a base that both sides share, or an empty or missing target.
    No,
    /// Copy everything again onto a target that poolshift created.
    Full,
    /// The same, onto any target.
    Adopt,
}

impl StartOver {
    fn new(full: bool, adopt: bool) -> Self {
        match (full, adopt) {
            (_, true) => Self::Adopt,
            (true, false) => Self::Full,
            (false, false) => Self::No,
        }
    }
}

/// See the fields' flags in `poolshift sync --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Sync {
    pub source: ImageSpec,
    pub target: ImageSpec,
    pub snapshot: Option<SnapshotName>,
    pub start_over: StartOver,
    pub keep: u32,
    pub compress: CompressionChoice,
    pub dry_run: bool,
    pub json: bool,
    pub explain: bool,
    /// Bytes in flight.
    pub memory: u64,
    pub create: Create,
    pub state_dir: Option<PathBuf>,
}

/// See `poolshift diff --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Diff {
    /// Perhaps with a snapshot.
    pub source: ImageSpec,
    pub from: Option<SnapshotName>,
    pub exact: bool,
    pub json: bool,
    pub explain: bool,
}

/// See `poolshift verify --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Verify {
    pub source: ImageSpec,
    pub target: ImageSpec,
    pub repair: bool,
    pub json: bool,
    /// Bytes in flight.
    pub memory: u64,
    pub state_dir: Option<PathBuf>,
}

/// See `poolshift export-diff --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct ExportDiff {
    pub source: ImageSpec,
    pub from: Option<SnapshotName>,
    pub output: Stream,
    /// Not with standard output as the output.
    pub json: bool,
    /// Bytes in flight.
    pub memory: u64,
}

/// See `poolshift import-diff --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct ImportDiff {
    pub input: Stream,
    pub target: ImageSpec,
    pub rewind: bool,
    pub json: bool,
    /// Bytes in flight.
    pub memory: u64,
    pub state_dir: Option<PathBuf>,
}

/// See `poolshift merge-diff --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct MergeDiff {
    pub first: Stream,
    pub second: Stream,
    pub output: Stream,
}

/// See `poolshift send --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Send {
    pub source: ImageSpec,
    pub from: Option<SnapshotName>,
    pub compress: CompressionChoice,
    /// Bytes in flight.
    pub memory: u64,
}

/// See `poolshift receive --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Receive {
    pub target: ImageSpec,
    pub keep: u32,
    pub json: bool,
    /// Bytes in flight.
    pub memory: u64,
    pub create: Create,
    pub state_dir: Option<PathBuf>,
}

/// See `poolshift inspect --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Inspect {
    pub input: Stream,
    pub json: bool,
}

/// See `poolshift status --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Status {
    pub source: ImageSpec,
    pub target: ImageSpec,
    pub json: bool,
    pub state_dir: Option<PathBuf>,
}

/// See `poolshift replicate --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Replicate {
    pub plan: PathBuf,
    /// Where the API listens, if not where the plan says; `Some(None)` for none.
    pub listen: Option<Option<SocketAddr>>,
}

/// See `poolshift deps --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Deps {
    /// On RBD.
    pub image: ImageSpec,
    pub json: bool,
}

/// See `poolshift flatten --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Flatten {
    /// On RBD.
    pub image: ImageSpec,
    pub children: bool,
    pub snapshot: Option<SnapshotName>,
    /// Bytes a second.
    pub rate: Option<NonZeroU64>,
    pub dry_run: bool,
    pub json: bool,
}

/// See `poolshift gc --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Gc {
    pub plan: PathBuf,
    /// Whether anything is removed.
    pub remove: bool,
    pub unknown: bool,
    pub json: bool,
    pub state_dir: Option<PathBuf>,
}

/// See `poolshift check --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Check {
    pub plan: PathBuf,
    pub measure: bool,
    pub json: bool,
}

/// See `poolshift demo --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Demo {
    pub dir: Option<PathBuf>,
    /// Bytes.
    pub size: u64,
}

impl TryFrom<Arguments> for Config {
    type Error = UsageError;

    fn try_from(arguments: Arguments) -> Result<Self, UsageError> {
        let Arguments { global, command } = arguments;
        let (source_ceph, target_ceph) = ceph_access(&global);
        Ok(Self {
            source_ceph,
            target_ceph,
            io_timeout: Duration::from_secs(global.io_timeout),
            verbosity: match (global.quiet, global.verbose) {
                (true, _) => Verbosity::Quiet,
                (false, 0) => Verbosity::Normal,
                (false, 1) => Verbosity::Info,
                (false, 2) => Verbosity::Debug,
                (false, _) => Verbosity::Trace,
            },
            log_format: global.log_format,
            command: command.try_into()?,
        })
    }
}

/// A side's own flag wins over the common one, which wins over the environment (clap sees to that).
fn ceph_access(global: &GlobalArgs) -> (CephAccess, CephAccess) {
    // `CEPH_CONF=` in the environment means "not set", as it does to librados.
    let conf = global.ceph_conf.as_ref().filter(|conf| !conf.is_empty()).map(PathBuf::from);
    let user = global.ceph_user.as_ref().filter(|user| !user.is_empty()).cloned();
    let side = |own_conf: &Option<PathBuf>, own_user: &Option<String>| CephAccess {
        conf: own_conf.clone().or_else(|| conf.clone()),
        user: own_user.clone().or_else(|| user.clone()),
    };
    (side(&global.source_ceph_conf, &global.source_ceph_user), side(&global.target_ceph_conf, &global.target_ceph_user))
}

impl TryFrom<CommandArgs> for Command {
    type Error = UsageError;

    fn try_from(command: CommandArgs) -> Result<Self, UsageError> {
        Ok(match command {
            CommandArgs::Sync(args) => Self::Sync(sync(args)?),
            CommandArgs::Diff(DiffArgs { source, from, exact, json, explain }) => {
                check_range(&source, from.as_ref())?;
                Self::Diff(Diff { source, from, exact, json, explain })
            }
            CommandArgs::Verify(args) => Self::Verify(verify(args)?),
            CommandArgs::ExportDiff(ExportDiffArgs { source, file, from, json, budget }) => {
                check_range(&source, from.as_ref())?;
                let output = Stream::from(file);
                if json && matches!(output, Stream::Standard) {
                    return Err(UsageError("--json needs a FILE: standard output has the diff".into()));
                }
                Self::ExportDiff(ExportDiff { source, from, output, json, memory: budget.memory })
            }
            CommandArgs::ImportDiff(ImportDiffArgs { file, target, rewind, json, budget, state }) => {
                no_snapshot("TARGET", &target)?;
                let (input, state_dir) = (file.into(), state.state_dir);
                Self::ImportDiff(ImportDiff { input, target, rewind, json, memory: budget.memory, state_dir })
            }
            CommandArgs::MergeDiff(args) => Self::MergeDiff(merge_diff(args)?),
            CommandArgs::Send(SendArgs { source, from, compress, budget }) => {
                needs_point("SOURCE", &source)?;
                check_range(&source, from.as_ref())?;
                Self::Send(Send { source, from, compress, memory: budget.memory })
            }
            CommandArgs::Receive(ReceiveArgs { target, keep, json, budget, create, state }) => {
                no_snapshot("TARGET", &target)?;
                Self::Receive(Receive {
                    create: self::create(&target, create)?,
                    target,
                    keep,
                    json,
                    memory: budget.memory,
                    state_dir: state.state_dir,
                })
            }
            CommandArgs::Inspect(InspectArgs { file, json }) => Self::Inspect(Inspect { input: file.into(), json }),
            CommandArgs::Status(args) => args.validated()?,
            CommandArgs::Pause(args) => args.validated(Action::Pause),
            CommandArgs::Resume(args) => args.validated(Action::Resume),
            CommandArgs::SyncNow(args) => args.validated(Action::SyncNow),
            CommandArgs::Throttle(args) => args.validated(),
            CommandArgs::Replicate(ReplicateArgs { plan, listen }) => {
                Self::Replicate(Replicate { plan, listen: listen.as_deref().map(parse_listen).transpose()? })
            }
            CommandArgs::Cutover(args) => args.validated(),
            CommandArgs::Rehearse(args) => args.validated(),
            CommandArgs::Rollback(args) => args.validated(),
            CommandArgs::Finalize(args) => args.validated(),
            CommandArgs::Retype(args) => args.validated(),
            CommandArgs::Deps(DepsArgs { image, json }) => {
                on_rbd(&image)?;
                Self::Deps(Deps { image, json })
            }
            CommandArgs::Flatten(args) => Self::Flatten(flatten(args)?),
            CommandArgs::Gc(GcArgs { plan, dry_run: _, yes, unknown, json, state }) => {
                Self::Gc(Gc { plan, remove: yes, unknown, json, state_dir: state.state_dir })
            }
            CommandArgs::Plan(args) => args.validated()?,
            CommandArgs::Check(CheckArgs { plan, no_measure, json }) => {
                Self::Check(Check { plan, measure: !no_measure, json })
            }
            CommandArgs::Demo(DemoArgs { dir, size }) => Self::Demo(Demo { dir, size }),
            CommandArgs::Completions(args) => Self::Completions(args.shell),
        })
    }
}

fn sync(args: SyncArgs) -> Result<Sync, UsageError> {
    if let Some(snapshot) = args.source.snapshot() {
        let text =
            format!("SOURCE is read at a new snapshot, not at {snapshot:?}: drop @{snapshot}; --snapshot names it");
        return Err(UsageError(text));
    }
    no_snapshot("TARGET", &args.target)?;
    different(&args.source, &args.target)?;
    Ok(Sync {
        create: create(&args.target, args.create)?,
        source: args.source,
        target: args.target,
        snapshot: args.snapshot,
        start_over: StartOver::new(args.full, args.adopt),
        keep: args.keep,
        compress: args.compress,
        dry_run: args.dry_run,
        json: args.json,
        explain: args.explain,
        memory: args.budget.memory,
        state_dir: args.state.state_dir,
    })
}

fn verify(args: VerifyArgs) -> Result<Verify, UsageError> {
    let VerifyArgs { source, target, repair, json, budget, state } = args;
    needs_point("SOURCE", &source)?;
    needs_point("TARGET", &target)?;
    different(&source, &target)?;
    Ok(Verify { source, target, repair, json, memory: budget.memory, state_dir: state.state_dir })
}

fn parse_listen(text: &str) -> Result<Option<SocketAddr>, UsageError> {
    if text == "off" {
        return Ok(None);
    }
    let wrong = |_| UsageError(format!("--listen takes ADDRESS:PORT or off, as 127.0.0.1:9480; this is {text:?}"));
    text.parse().map(Some).map_err(wrong)
}

fn merge_diff(args: MergeDiffArgs) -> Result<MergeDiff, UsageError> {
    let (first, second, output) = (Stream::from(args.first), Stream::from(args.second), Stream::from(args.out));
    if first == Stream::Standard && second == Stream::Standard {
        return Err(UsageError("FIRST and SECOND can't both be standard input".into()));
    }
    if output != Stream::Standard && (output == first || output == second) {
        return Err(UsageError(format!("OUT can't be one of the diffs to merge: {output}")));
    }
    Ok(MergeDiff { first, second, output })
}

fn flatten(args: FlattenArgs) -> Result<Flatten, UsageError> {
    let FlattenArgs { image, children, snapshot, rate, dry_run, yes: _, json } = args;
    on_rbd(&image)?;
    Ok(Flatten { image, children, snapshot, rate, dry_run, json })
}

/// Clones are a thing of RBD, and of whole images.
fn on_rbd(image: &ImageSpec) -> Result<(), UsageError> {
    if !matches!(image, ImageSpec::Rbd { .. }) {
        return Err(UsageError(format!("only images on RBD have clones: {image} is a file")));
    }
    no_snapshot("IMAGE", image)
}

fn create(target: &ImageSpec, args: CreateArgs) -> Result<Create, UsageError> {
    let CreateArgs { object_size, image_feature, data_pool } = args;
    let asked = object_size.is_some() || !image_feature.is_empty() || data_pool.is_some();
    if asked && !matches!(target, ImageSpec::Rbd { .. }) {
        let text = "--object-size, --image-feature and --data-pool are for a target on RBD; this one is a file";
        return Err(UsageError(text.into()));
    }
    for (feature, needed) in [
        (ImageFeature::FastDiff, ImageFeature::ObjectMap),
        (ImageFeature::ObjectMap, ImageFeature::ExclusiveLock),
        (ImageFeature::Journaling, ImageFeature::ExclusiveLock),
    ] {
        if image_feature.contains(&feature) && !image_feature.contains(&needed) {
            let (feature, needed) = (name_of(feature), name_of(needed));
            return Err(UsageError(format!("--image-feature {feature} needs --image-feature {needed} as well")));
        }
    }
    let features = (!image_feature.is_empty()).then_some(image_feature);
    Ok(Create { object_size, features, data_pool })
}

fn name_of(feature: ImageFeature) -> String {
    use clap::ValueEnum as _;
    feature.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

pub(super) fn no_snapshot(what: &str, spec: &ImageSpec) -> Result<(), UsageError> {
    match spec.snapshot() {
        Some(snapshot) => Err(UsageError(format!("{what} is an image, not a snapshot: drop @{snapshot}"))),
        None => Ok(()),
    }
}

/// An RBD image moves while it is read, so that a snapshot must be named; a file has none to name.
fn needs_point(what: &str, spec: &ImageSpec) -> Result<(), UsageError> {
    match spec {
        ImageSpec::Rbd { snapshot: None, .. } => {
            Err(UsageError(format!("{what} needs a snapshot, as HEAD may change while it is read: {spec}@SNAPSHOT")))
        }
        _ => Ok(()),
    }
}

fn check_range(source: &ImageSpec, from: Option<&SnapshotName>) -> Result<(), UsageError> {
    match (source.snapshot(), from) {
        (Some(to), Some(from)) if to == from.as_str() => {
            Err(UsageError(format!("--from {from} is the snapshot of SOURCE itself: nothing lies between")))
        }
        (None, Some(_)) if matches!(source, ImageSpec::File { .. }) => {
            Err(UsageError("a file keeps no snapshots, so that --from can name none".into()))
        }
        _ => Ok(()),
    }
}

/// Two clusters may well have RBD images of one name: what those really are is compared once they are open.
fn different(source: &ImageSpec, target: &ImageSpec) -> Result<(), UsageError> {
    if matches!(source, ImageSpec::File { .. }) && source.without_snapshot() == target.without_snapshot() {
        return Err(UsageError(format!("SOURCE and TARGET are the same: {}", source.without_snapshot())));
    }
    Ok(())
}
