//! poolshift moves the disks of live servers from one storage pool to another without anyone waiting for the copy.
//!
//! # The line
//!
//! ```text
//! source image ──snapshot──▶ delta (plan) ──▶ read ──▶ batch (chunk, zero-detect, checksum, compress)
//!                                                         │
//!                                                     transport
//!                                                         │
//!       prune ◀── target snapshot = commit ◀── checkpoint ◀── flush ◀── apply ◀── verify, decompress
//! ```
//!
//! One walk along that line is a *cycle*: [`replicate::sync()`]. *Replication* repeats cycles while the server goes on
//! writing, each of which costs what changed since the last one: by hand, or for a whole [`fleet`], by a daemon. What the
//! last, short cycle is for is the *cutover*.
//!
//! # The layers, each importing only what stands above it
//!
//! | module | what it is |
//! |---|---|
//! | [`extent`] | offsets, lengths, extents; checked arithmetic |
//! | `clock` | the time of day, never set back |
//! | `failpoint` | places at which tests kill the process; debug builds only |
//! | `ceph` | librados and librbd, loaded at run time; the only unsafe code |
//! | [`image`] | the contracts [`image::SourceImage`] and [`image::TargetImage`], and the backends: RBD, files, memory |
//! | [`throttle`] | how much the source may be asked for, by pool and by volume |
//! | [`delta`] | which extents differ between two points; rbd's diff streams |
//! | [`batch`] | chunks, zero detection, checksums, compression |
//! | [`wire`] | the batch stream's frames, messages, versions and limits: what `proto/` defines |
//! | [`pipeline`] | reader, encoder, applier; budgets of bytes and requests; counters |
//! | [`transport`] | how batches get from the reader to the applier: in process, through a pipe |
//! | [`replicate`] | one volume's cycle: lineage, plan, state, checkpoint, commit, retention, verification, reports |
//! | [`plan`] | the plan file: which volumes and servers, how often, within which limits |
//! | [`fleet`] | many volumes: scheduler, consistency groups, what is known of each |
//! | [`openstack`] | Keystone, Cinder and Nova: a thin client |
//! | [`cutover`] | a server goes on from its targets: phases, journal, driver, providers, the way back |
//! | [`observe`] | the HTTP API, metrics, tables for people |
//! | [`cli`] | flags → validated configuration → one command a file |
//!
//! `scripts/check-layers` holds the sources to this table.
//!
//! # The words
//!
//! - **image**: a disk, as a backend stores it ([`image`]). Known by its [`image::ImageIdentity`], not its name.
//! - **volume**: a source image and the target image that follows it.
//! - **snapshot**: an immutable point in time of an image, told from others by its id ([`image::Snapshot`]). **HEAD** is
//!   the image as it is now.
//! - **extent**: an offset and a length in bytes, with whether there is data or zeroes ([`extent::Extent`]).
//! - **delta**: the sorted, disjoint extents in which one snapshot may differ from an earlier one, or from nothing
//!   ([`delta`]). What says where to look for them is the *plan*.
//! - **chunk**: what one checksum covers ([`batch::Chunk`]): at most 4 MiB of data, or zeroes.
//! - **batch**: the chunks that are compressed, sent, applied and acknowledged as one ([`batch::Batch`]).
//! - **cycle**: brings the target to one more snapshot of the source, and ends with the **commit**: the target's
//!   snapshot of the same name ([`replicate`]).
//! - **checkpoint**: how much of a delta is on the target and flushed, kept durably with the target; where the next run
//!   goes on ([`pipeline::Checkpoint`]).
//! - **base snapshot**: the newest snapshot that is on both sides and known by its ids to be the same. A delta starts
//!   from it, and so it is never pruned.
//! - **lease**: the right to write a target, held by one process at a time ([`image::lease`]). Who loses it is *fenced*:
//!   its late writes never land.
//! - **plan file**: what goes where, how often, within which limits ([`plan`]); not to be taken for a delta's plan.
//! - **server**, or **consistency group**: volumes that share every **point**, a moment at which all of them were
//!   snapshotted ([`fleet::group`]). It is committed when all of them have it on the target, and not before.
//! - **worker**: a `poolshift replicate` process ([`fleet::Worker`]). Several may run one plan; the leases decide.
//! - **lag**: the age of the newest committed point, or of the last look that found nothing changed since.
//! - **rewind**: brings a dirty HEAD of the target back to the base, where the snapshot that was in flight has gone.
//! - **cutover**: the server stops writing, the last cycle runs and is verified, and the server starts on the target.
//! - **kept source**: what a server left at its cutover, renamed, for the way back; until it is **finalized**.
//! - **placeholder**: a small image that has a volume's name in Cinder's place while the volume is switched.
//! - **drift**: what has become of a server where it runs that its plan does not know of ([`fleet::Drift`]).
//! - **rehearsal**: a **stand-in**, a throw-away server, boots from clones of the newest point, before the cutover.
//!
//! # The guarantees
//!
//! 1. **The snapshot is the commit.** A target snapshot is made only after every extent of its delta is applied and
//!    flushed: whoever sees it may trust it. Between commits the target's HEAD may be dirty, which is recorded before
//!    the first write. (A file has no snapshots; see [`image::file`] for what stands for one.)
//! 2. **Identity, not names.** A base is a pair of snapshots whose recorded ids agree. Anything else is a conflict with
//!    a name, which stops and shows both sides ([`replicate::ConflictKind`]); starting over is asked for, never assumed.
//! 3. **Dirtiness is never lost.** The source keeps the base until the next commit stands, and keeps what is in flight. A
//!    run that was killed at any instant is finished by the next one, to the *same* snapshot; if that has gone, HEAD is
//!    rewound first, because a new delta alone would miss a byte that changed in the lost snapshot and back after it.
//! 4. **Order only where it counts.** The extents of a delta are disjoint and applied in any order; then flush,
//!    then checkpoint, then the commit, then prune.
//! 5. **One writer.** Nothing is written without the lease. A server's volumes are worked on with the leases of all of
//!    them held; there is no other agreement between workers.
//! 6. **Checksums end to end.** The CRC-32 of a chunk is taken from the reader's buffer and checked right before the
//!    write, in every transport; `verify` compares BLAKE3 digests of both sides.
//! 7. **Bounded.** Bytes and requests in flight ([`pipeline::Limits`]), the sizes of frames, names and requests, and
//!    every wait for a cluster; a number from outside is checked before anything is allocated or sliced by it.
//!
//! What is not promised: that a file or block device which somebody writes to during a cycle is copied as of one point
//! in time. The report says when that may have happened.

pub mod batch;
#[allow(unsafe_code)]
mod ceph;
pub mod cli;
mod clock;
pub mod cutover;
pub mod delta;
pub mod extent;
mod failpoint;
pub mod fleet;
pub mod image;
pub mod observe;
pub mod openstack;
pub mod pipeline;
pub mod plan;
pub mod replicate;
pub mod throttle;
pub mod transport;
pub mod wire;
