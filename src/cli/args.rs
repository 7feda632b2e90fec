//! The raw flags, as clap reads them. What they mean together is [`super::config`]'s matter.

use std::ffi::OsString;
use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use super::cutover_args::{CutoverArgs, FinalizeArgs, RehearseArgs, RollbackArgs};
use super::exit;
use super::fleet_args::{ActArgs, StatusArgs, ThrottleArgs};
use super::plan_args::PlanArgs;
use super::retype_args::RetypeArgs;
use super::values::{SnapshotName, parse_ceph_user, parse_demo_size, parse_memory, parse_object_size, parse_rate};
use crate::batch::CompressionChoice;
use crate::image::ImageSpec;

/// Moves the disks of live servers between storage pools by continuous incremental replication.
///
/// An image is written rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT] or file:PATH.
#[derive(Debug, Parser)]
#[command(name = "poolshift", version, max_term_width = 100, after_help = exit::help(), after_long_help = exit::help())]
#[command(disable_help_subcommand = true, subcommand_required = true, arg_required_else_help = true)]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) global: GlobalArgs,
    #[command(subcommand)]
    pub(super) command: CommandArgs,
}

#[derive(Args, Debug)]
pub(super) struct GlobalArgs {
    /// The cluster's ceph.conf, for both sides
    #[arg(long, global = true, value_name = "PATH", env = "CEPH_CONF", hide_env_values = true, help_heading = "Ceph")]
    pub(super) ceph_conf: Option<OsString>,

    /// The user for both sides, NAME or client.NAME [default: admin]
    #[arg(long, global = true, value_name = "NAME", env = "POOLSHIFT_CEPH_USER", hide_env_values = true)]
    #[arg(value_parser = parse_ceph_user, help_heading = "Ceph")]
    pub(super) ceph_user: Option<String>,

    /// The source's ceph.conf, where it is another cluster
    #[arg(long, global = true, value_name = "PATH", help_heading = "Ceph")]
    pub(super) source_ceph_conf: Option<PathBuf>,

    /// The user at the source
    #[arg(long, global = true, value_name = "NAME", value_parser = parse_ceph_user, help_heading = "Ceph")]
    pub(super) source_ceph_user: Option<String>,

    /// The target's ceph.conf, where it is another cluster
    #[arg(long, global = true, value_name = "PATH", help_heading = "Ceph")]
    pub(super) target_ceph_conf: Option<PathBuf>,

    /// The user at the target
    #[arg(long, global = true, value_name = "NAME", value_parser = parse_ceph_user, help_heading = "Ceph")]
    pub(super) target_ceph_user: Option<String>,

    /// How long one request to the storage may take before it counts as failed
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 60, help_heading = "Ceph")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(super) io_timeout: u64,

    /// Say more; twice for debugging, three times for every request
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet", help_heading = "Output")]
    pub(super) verbose: u8,

    /// Say nothing but errors and the result: no progress, no warnings
    #[arg(short, long, global = true, help_heading = "Output")]
    pub(super) quiet: bool,

    /// How log lines and errors are written to standard error
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t, help_heading = "Output")]
    pub(super) log_format: LogFormat,
}

/// How log lines and errors are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum CommandArgs {
    /// Bring TARGET up to SOURCE: one cycle of incremental replication
    ///
    /// Snapshots the source, finds the newest snapshot that both sides have in common, moves what changed since, and
    /// commits it as a snapshot of the same name on the target. A run that was interrupted is finished by the next.
    Sync(SyncArgs),
    /// List the extents that changed between two points of an image
    Diff(DiffArgs),
    /// Compare two images completely, by strong digests
    ///
    /// Reads both sides whole, holes skipped, and names the first ranges that differ. Exits with 3 if any do.
    Verify(VerifyArgs),
    /// Write what changed in an image as an rbd diff, as `rbd export-diff` does
    ExportDiff(ExportDiffArgs),
    /// Apply an rbd diff to an image, as `rbd import-diff` does
    ImportDiff(ImportDiffArgs),
    /// Join two consecutive rbd diffs into one, as `rbd merge-diff` does
    MergeDiff(MergeDiffArgs),
    /// Write a delta to standard output as poolshift's batch stream
    ///
    /// For the other end: poolshift send rbd:sata/vm@b --from a | ssh HOST poolshift receive rbd:sas/vm
    Send(SendArgs),
    /// Apply a batch stream from standard input to TARGET
    Receive(ReceiveArgs),
    /// Say what is in a stream of either format, and check every checksum
    Inspect(InspectArgs),
    /// Say how far TARGET is behind SOURCE, or how all servers of a plan are
    ///
    /// For a plan, its daemon is asked; where none runs, the images are, which know no rates and no predictions.
    Status(StatusArgs),
    /// Keep the volumes of PLAN in step, for weeks: the daemon
    ///
    /// SIGHUP reads the plan again, SIGTERM and Ctrl-C stop at the next checkpoint. Several processes, on several hosts,
    /// may run the same plan.
    Replicate(ReplicateArgs),
    /// Stop the cycles of a server, or of all, until they are resumed
    #[command(
        override_usage = "poolshift pause [OPTIONS] <PLAN> <NAME>\n       poolshift pause [OPTIONS] <PLAN> --all"
    )]
    Pause(ActArgs),
    /// Undo `pause`, and try again what is held
    #[command(
        override_usage = "poolshift resume [OPTIONS] <PLAN> <NAME>\n       poolshift resume [OPTIONS] <PLAN> --all"
    )]
    Resume(ActArgs),
    /// Make a cycle due at once
    #[command(
        override_usage = "poolshift sync-now [OPTIONS] <PLAN> <NAME>\n       poolshift sync-now [OPTIONS] <PLAN> --all"
    )]
    SyncNow(ActArgs),
    /// Limit what a source pool is asked for, until the daemon reads its plan again
    Throttle(ThrottleArgs),
    /// Boot a throw-away server from clones of a server's newest point, have it say that it is well, and remove it
    ///
    /// The server and its replication go on meanwhile. The stand-in is on no network, unless the plan names an isolated
    /// one. What a rehearsal that was killed has left, the next one removes first, or `gc`. Exits with 15 if the stand-in
    /// is not well.
    Rehearse(RehearseArgs),
    /// Bring a server over to its targets: stop it, carry the last changes over, prove the copy, start it there
    ///
    /// Shows every precondition and the outage that is to be expected, asks, and shows the phases as they go by. What
    /// fails before the server has started on its targets brings it back to where it ran, with exit code 12. A cutover
    /// that was cut is finished, or undone, by the same command or by `rollback`, on any host.
    Cutover(CutoverArgs),
    /// Bring a server back to its sources, or undo a cutover that was begun
    ///
    /// For as long as the sources are kept. A server that has run from its targets has written there: one of
    /// --with-changes and --discard-changes says what becomes of that.
    Rollback(RollbackArgs),
    /// Remove the kept sources of a server that runs from its targets, and poolshift's snapshots: there is no way back
    ///
    /// Shows what would be lost, foreign snapshots included, and asks. Clones that hang on a source stand in the way,
    /// unless --flatten cuts them loose. What was cut is finished by the same command. Take the server out of the plan
    /// then.
    Finalize(FinalizeArgs),
    /// Have Cinder itself move volumes that nobody has, many at a time, each seen to its end
    ///
    /// For servers of the plan with `strategy = "retype"`. Nothing is replicated, and nobody can use a volume while it is
    /// copied. What would be lost or deleted on the way is refused by name; one volume that fails does not stop the
    /// others. What Cinder gives up without a word is noticed, and asked for again. A run that was cut, or killed, is gone
    /// on with by the same command, on any host.
    Retype(RetypeArgs),
    /// Show what an RBD image is bound to: parents, snapshots, clones, and what must go before it can
    ///
    /// For each clone it says what flattening it would copy, at most.
    Deps(DepsArgs),
    /// Cut a clone loose from its parent, or with --children all clones from IMAGE
    ///
    /// Copies into the clone what it still shares with its parent, and changes nothing else. Can be stopped at any
    /// time; the next run goes on with what is left. Where another client owns the clone's exclusive lock, that client
    /// does the work: then no rate is kept, and stopping poolshift does not stop it.
    Flatten(FlattenArgs),
    /// Remove what poolshift made for a plan's volumes and nothing needs any more: snapshots, and what a rehearsal has left
    ///
    /// Lists it; removes it with --yes. A snapshot that only has a name like poolshift's, and is known to no target of
    /// the plan, is listed as unknown: another replication may have made it.
    Gc(GcArgs),
    /// Write a first plan file from the images of a pool, or from the servers of an OpenStack cloud
    ///
    /// Every image of a pool becomes a volume of its own, the largest first. Images that poolshift can't replicate are named
    /// in comments.
    ///
    /// With --openstack, the servers of the projects are listed with their volumes, and those that are to get another type
    /// are planned, each server whole. A server with a volume that something stands in the way of is left out: what it is,
    /// and what to do about it, is said in comments and on standard error. The credentials come from clouds.yaml or the
    /// OS_* variables, and have to be an administrator's.
    Plan(PlanArgs),
    /// Hold a plan file against the clusters; change nothing
    ///
    /// Looks at every source and target, says what is wrong with them and what to do about it, and how long the first
    /// copies may take. Exits with 1 if there are errors.
    Check(CheckArgs),
    /// Show the whole story on files: no Ceph, no root, a few seconds
    Demo(DemoArgs),
    /// Write a completion script for a shell to standard output
    Completions(CompletionsArgs),
}

#[derive(Args, Debug)]
pub(super) struct SyncArgs {
    /// The image to read; a snapshot is made of it
    pub(super) source: ImageSpec,
    /// The image to write; created if it does not exist
    pub(super) target: ImageSpec,
    /// The new snapshot's name [default: poolshift- and the time]
    #[arg(long, value_name = "NAME")]
    pub(super) snapshot: Option<SnapshotName>,
    /// Start over: copy everything again, whatever became of the past that both sides had in common
    #[arg(long)]
    pub(super) full: bool,
    /// Accept a target that poolshift did not create and that is not empty; its content is lost
    #[arg(long, requires = "full")]
    pub(super) adopt: bool,
    /// How many of poolshift's snapshots to keep on each side
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) keep: u32,
    /// auto, none or zstd[:LEVEL]; within one process, auto is none
    #[arg(long, value_name = "HOW", default_value_t)]
    pub(super) compress: CompressionChoice,
    /// Print the plan: base, snapshot, extents, bytes; change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Print the report as one JSON value
    #[arg(long)]
    pub(super) json: bool,
    /// Say how the delta was found
    #[arg(long)]
    pub(super) explain: bool,
    #[command(flatten)]
    pub(super) budget: BudgetArgs,
    #[command(flatten)]
    pub(super) state: StateArgs,
    #[command(flatten)]
    pub(super) create: CreateArgs,
}

#[derive(Args, Debug)]
pub(super) struct BudgetArgs {
    /// The bytes in flight, 16M to 1G
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = parse_memory)]
    pub(super) memory: u64,
}

#[derive(Args, Debug)]
pub(super) struct StateArgs {
    /// Where poolshift keeps its records of a block device; beside the image otherwise
    #[arg(long, value_name = "DIR")]
    pub(super) state_dir: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Creating the target")]
pub(super) struct CreateArgs {
    /// The object size of a new RBD image [default: the source's]
    #[arg(long, value_name = "BYTES", value_parser = parse_object_size)]
    pub(super) object_size: Option<u64>,
    /// A feature of a new RBD image; repeat it or separate by commas [default: the source's]
    #[arg(long, value_name = "FEATURE", value_enum, value_delimiter = ',')]
    pub(super) image_feature: Vec<ImageFeature>,
    /// The pool for a new RBD image's data
    #[arg(long, value_name = "POOL")]
    pub(super) data_pool: Option<String>,
}

/// A feature that an RBD image can be created with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFeature {
    /// Clones
    Layering,
    /// One writer at a time, enforced by the cluster: the lease
    ExclusiveLock,
    /// Which objects exist; needs exclusive-lock
    ObjectMap,
    /// Which objects changed; needs object-map
    FastDiff,
    /// Flattening reaches the snapshots
    DeepFlatten,
    /// A journal of writes; needs exclusive-lock
    Journaling,
}

#[derive(Args, Debug)]
pub(super) struct DiffArgs {
    /// The image, at a snapshot or at HEAD; at HEAD nobody should write it meanwhile
    pub(super) source: ImageSpec,
    /// The snapshot to start from [default: an image of zeroes]
    #[arg(long, value_name = "SNAP")]
    pub(super) from: Option<SnapshotName>,
    /// Ask every object instead of the object map first
    #[arg(long)]
    pub(super) exact: bool,
    /// Print an array of {offset, length, exists}, as rbd does; what may be of several moments also has
    /// "consistent": false
    #[arg(long)]
    pub(super) json: bool,
    /// Say how the delta was found
    #[arg(long)]
    pub(super) explain: bool,
}

#[derive(Args, Debug)]
pub(super) struct VerifyArgs {
    /// The image that is right, with its snapshot (files: as it is now)
    pub(super) source: ImageSpec,
    /// The image to check, with its snapshot (files: as it is now)
    pub(super) target: ImageSpec,
    /// Rewrite what differs, on a target that poolshift owns
    #[arg(long)]
    pub(super) repair: bool,
    /// Print the result as one JSON value
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) budget: BudgetArgs,
    #[command(flatten)]
    pub(super) state: StateArgs,
}

#[derive(Args, Debug)]
pub(super) struct ExportDiffArgs {
    /// The image, at a snapshot or at HEAD; at HEAD nobody should write it meanwhile
    pub(super) source: ImageSpec,
    /// Where to: a file that does not exist yet, or - for standard output
    pub(super) file: PathBuf,
    /// The snapshot to start from [default: an image of zeroes]
    #[arg(long, value_name = "SNAP")]
    pub(super) from: Option<SnapshotName>,
    /// Print the report as one JSON value; needs a FILE
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) budget: BudgetArgs,
}

#[derive(Args, Debug)]
pub(super) struct ImportDiffArgs {
    /// The diff, or - for standard input
    pub(super) file: PathBuf,
    /// The image to write; it must exist
    pub(super) target: ImageSpec,
    /// Bring the target's HEAD back to the diff's first snapshot before, as after an import that was cut; what was
    /// written to it since is lost
    #[arg(long)]
    pub(super) rewind: bool,
    /// Print the report as one JSON value
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) budget: BudgetArgs,
    #[command(flatten)]
    pub(super) state: StateArgs,
}

#[derive(Args, Debug)]
pub(super) struct MergeDiffArgs {
    /// The earlier diff, or - for standard input
    pub(super) first: PathBuf,
    /// The later diff, which starts where the first ends
    pub(super) second: PathBuf,
    /// Where to: a file that does not exist yet, or - for standard output
    pub(super) out: PathBuf,
}

#[derive(Args, Debug)]
pub(super) struct SendArgs {
    /// The image with its snapshot
    pub(super) source: ImageSpec,
    /// The snapshot to start from [default: an image of zeroes]
    #[arg(long, value_name = "SNAP")]
    pub(super) from: Option<SnapshotName>,
    /// auto, none or zstd[:LEVEL]; over a pipe, auto is zstd
    #[arg(long, value_name = "HOW", default_value_t)]
    pub(super) compress: CompressionChoice,
    #[command(flatten)]
    pub(super) budget: BudgetArgs,
}

#[derive(Args, Debug)]
pub(super) struct ReceiveArgs {
    /// The image to write; created by a full stream if it does not exist
    pub(super) target: ImageSpec,
    /// How many of poolshift's snapshots to keep
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) keep: u32,
    /// Print the report as one JSON value
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) budget: BudgetArgs,
    #[command(flatten)]
    pub(super) state: StateArgs,
    #[command(flatten)]
    pub(super) create: CreateArgs,
}

#[derive(Args, Debug)]
pub(super) struct InspectArgs {
    /// The stream, or - for standard input
    pub(super) file: PathBuf,
    /// Print the result as one JSON value
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct ReplicateArgs {
    /// The plan file
    pub(super) plan: PathBuf,
    /// Where the HTTP API listens, ADDRESS:PORT, or off [default: what the plan says]
    #[arg(long, value_name = "ADDRESS")]
    pub(super) listen: Option<String>,
}

#[derive(Args, Debug)]
pub(super) struct DepsArgs {
    /// The RBD image
    pub(super) image: ImageSpec,
    /// Print the tree as one JSON value
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct FlattenArgs {
    /// The clone; with --children, the image that clones were made of
    pub(super) image: ImageSpec,
    /// Flatten all clones of IMAGE's snapshots, and theirs, the deepest first
    #[arg(long)]
    pub(super) children: bool,
    /// Only the clones of this snapshot
    #[arg(long, value_name = "NAME", requires = "children")]
    pub(super) snapshot: Option<SnapshotName>,
    /// How many bytes a second may be copied, such as 50M [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = parse_rate)]
    pub(super) rate: Option<NonZeroU64>,
    /// Print what would be flattened and how much that would copy; change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Taken for scripts that always give it: flattening asks for no consent
    #[arg(long, hide = true)]
    pub(super) yes: bool,
    /// Print the report as one JSON value
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct GcArgs {
    /// The plan file
    pub(super) plan: PathBuf,
    /// List only; this is also what happens without --yes
    #[arg(long, conflicts_with = "yes")]
    pub(super) dry_run: bool,
    /// Remove them
    #[arg(long)]
    pub(super) yes: bool,
    /// With --yes: remove the unknown ones as well, whoever made them
    #[arg(long)]
    pub(super) unknown: bool,
    /// Print the report as one JSON value
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) state: StateArgs,
}

#[derive(Args, Debug)]
pub(super) struct CheckArgs {
    /// The plan file
    pub(super) plan: PathBuf,
    /// Read nothing to find out how fast the source is
    #[arg(long)]
    pub(super) no_measure: bool,
    /// Print the result as one JSON value
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct DemoArgs {
    /// Where to put the two disks, and leave them [default: a temporary folder, removed at the end]
    pub(super) dir: Option<PathBuf>,
    /// The size of the disk, 8M to 64G
    #[arg(long, value_name = "BYTES", default_value = "96M", value_parser = parse_demo_size)]
    pub(super) size: u64,
}

#[derive(Args, Debug)]
pub(super) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub(super) shell: clap_complete::Shell,
}
