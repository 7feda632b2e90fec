//! The plan: what goes where, how often, and within which limits. Pure data, read from a TOML file.
//!
//! [`Plan::load`] takes a file or names everything that is wrong with it: an unknown key, a value of another type or out
//! of range, a name or image that is there twice, each with its line and column and with what to do ([`PlanError`]).
//! Nothing is looked up in a cluster here; that is what `poolshift check` does.
//!
//! # Times that nobody has set
//!
//! A server inherits from `[defaults]`, and these from [`Pace::default`] and [`Retention::default`]. An inherited
//! `idle_interval` that is shorter than the server's own `interval` becomes that interval, an inherited `target_lag` that
//! is shorter becomes twice the interval. Both are errors where they stand beside the interval. A window of a throttle
//! inherits what it doesn't set from outside of it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::image::ImageSpec;
use crate::throttle::Rate;
pub use crate::throttle::Window;

mod check;
mod cloud;
mod cutover;
mod error;
mod fields;
mod read;
mod throttles;
pub mod values;

#[cfg(test)]
mod tests;

pub(crate) use cloud::is_cinders;
pub use cloud::{CinderVolume, HelperTypes, Holder, OpenStackCutover, OpenStackRehearsal, Strategy};
pub use cutover::{CommandCutover, Cutover, LibvirtCutover, LibvirtRehearsal, Method};
pub use error::{PlanError, PlanProblem};

/// The largest plan file, in bytes.
pub const FILE_MAX: usize = 1 << 20;

/// The most volumes of a plan.
pub const VOLUMES_MAX: usize = 10_000;

/// A plan, validated: every name is known once, every reference leads somewhere, every number makes sense.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Where it was read from.
    pub path: PathBuf,
    /// How to reach the cluster of the sources.
    pub source_cluster: ClusterAccess,
    /// How to reach the cluster of the targets.
    pub target_cluster: ClusterAccess,
    /// The servers, in the order of the file. A volume that stands by itself is a server of one volume.
    pub servers: Vec<Server>,
    /// What a process may do at a time.
    pub limits: FleetLimits,
    /// Limits of source pools, by the pool's name.
    pub throttles: Vec<PoolThrottle>,
    /// The HTTP API.
    pub api: Api,
}

impl Plan {
    /// Reads a plan file. Blocks.
    pub fn load(path: &Path) -> Result<Self, PlanError> {
        read::load(path)
    }

    /// Reads a plan from the text of a file; `path` is for messages, and kept in the plan.
    pub fn parse(text: &str, path: &Path) -> Result<Self, PlanError> {
        read::read(text, path)
    }

    /// All volumes with their servers, in the order of the file.
    pub fn volumes(&self) -> impl Iterator<Item = (&Server, &Volume)> {
        self.servers.iter().flat_map(|server| server.volumes.iter().map(move |volume| (server, volume)))
    }

    /// The limits of a source pool, if the plan has some.
    pub fn throttle(&self, pool: &str) -> Option<&PoolThrottle> {
        self.throttles.iter().find(|throttle| throttle.pool == pool)
    }
}

/// Which cluster, as whom. `None` leaves the choice to the command line, the environment and librados, in that order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterAccess {
    /// The ceph.conf.
    pub conf: Option<PathBuf>,
    /// The user, without `client.`.
    pub user: Option<String>,
}

/// A consistency group: the disks of one server, which share every point in time.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// Its name, unique among servers and volumes.
    pub name: String,
    /// Its volumes, at least one, in the order of the file.
    pub volumes: Vec<Volume>,
    /// How often a new point is made.
    pub pace: Pace,
    /// What stays.
    pub retention: Retention,
    /// How the writers are quiesced for a point.
    pub quiesce: Quiesce,
    /// Not replicated until resumed.
    pub paused: bool,
    /// How it is stopped, and started on its targets.
    pub cutover: Cutover,
}

/// One disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Volume {
    /// Its name, unique in the plan. A volume that stands by itself has its server's name.
    pub name: String,
    /// The image that is read.
    pub source: ImageSpec,
    /// The image that is written; created if it does not exist.
    pub target: ImageSpec,
    /// Whether the server boots from it: one of each server's volumes, or none where the server has no boot disk here.
    pub boot: bool,
    /// What this volume may ask its source for.
    pub rate: Rate,
    /// Which volume of Cinder's it is, if it is one.
    pub cinder: Option<CinderVolume>,
}

impl Server {
    /// Whether Cinder itself moves its volumes, so that nothing is replicated.
    pub fn is_left_to_cinder(&self) -> bool {
        matches!(&self.cutover, Cutover::OpenStack(config) if config.strategy == Strategy::Retype)
    }
}

impl Volume {
    /// The name that the target has once a server uses it, where that is another one: where Cinder decides, that of the
    /// source.
    pub fn target_in_use(&self) -> Option<ImageSpec> {
        match (&self.cinder, &self.source, &self.target) {
            (Some(_), ImageSpec::Rbd { image: in_use, .. }, ImageSpec::Rbd { pool, namespace, .. }) => {
                let (pool, namespace, image) = (pool.clone(), namespace.clone(), in_use.clone());
                Some(ImageSpec::Rbd { pool, namespace, image, snapshot: None })
            }
            _ => None,
        }
    }
}

/// How often a new point is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// From the start of one cycle to the start of the next, while things change.
    pub interval: Duration,
    /// How long an unchanged server may go without a look at it: the pace slows from `interval` to this.
    pub idle_interval: Duration,
    /// The age of the newest committed point above which the server counts as lagging.
    pub target_lag: Duration,
}

impl Default for Pace {
    /// Every 5 minutes, every 30 while nothing changes; late after 15.
    fn default() -> Self {
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        Self { interval: minutes(5), idle_interval: minutes(30), target_lag: minutes(15) }
    }
}

/// What stays of poolshift's own snapshots on the target, beside the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// How many points at least.
    pub keep: usize,
    /// And those younger than this.
    pub keep_for: Option<Duration>,
}

impl Default for Retention {
    /// One point.
    fn default() -> Self {
        Self { keep: 1, keep_for: None }
    }
}

/// How the writers are quiesced while the snapshots of a server are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quiesce {
    /// Not at all: each volume is consistent by itself, as after a power cut, and the point says so.
    None,
    /// `virsh domfsfreeze` and `domfsthaw`.
    Virsh {
        /// The domain.
        domain: String,
        /// libvirt's URI; virsh's own default otherwise.
        uri: Option<String>,
        /// How long the domain may stay frozen.
        limit: Duration,
    },
    /// Two commands, run by `/bin/sh -c`.
    Command {
        /// Freezes the writers. Gets `POOLSHIFT_SERVER` and `POOLSHIFT_POINT` in its environment.
        freeze: String,
        /// Thaws them; run whatever happened to the freeze, and idempotent.
        thaw: String,
        /// How long they may stay frozen.
        limit: Duration,
    },
}

/// What a process may do at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FleetLimits {
    /// Volumes that are worked on at a time.
    pub volumes: usize,
    /// Of these, volumes that are copied for the first time: they never take all places.
    pub first_syncs: usize,
    /// Volumes of one source pool that are worked on at a time.
    pub volumes_per_pool: usize,
    /// Bytes in flight, in the whole process.
    pub memory: u64,
}

impl Default for FleetLimits {
    /// 8 volumes, 4 of them for the first time, 8 of a pool; 256 MiB.
    fn default() -> Self {
        Self { volumes: 8, first_syncs: 4, volumes_per_pool: 8, memory: 256 << 20 }
    }
}

/// What a source pool may be asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolThrottle {
    /// The pool's name.
    pub pool: String,
    /// The limit outside all windows.
    pub rate: Rate,
    /// Other limits at other times of the day; the first that matches counts.
    pub windows: Vec<Window>,
    /// Above this mean latency of our own reads the rate goes down. `None`: it is not looked at.
    pub latency_limit: Option<Duration>,
}

/// Where the HTTP API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Api {
    /// The address; `None` for no API. Beyond loopback it needs a token.
    pub listen: Option<SocketAddr>,
    /// A file with the token.
    pub token_file: Option<PathBuf>,
}

impl Default for Api {
    /// On port 9480 of this host alone, without a token.
    fn default() -> Self {
        Self { listen: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 9480))), token_file: None }
    }
}
