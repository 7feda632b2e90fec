//! The flags of `poolshift plan`, and what they mean together.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};

use super::config::{Command, Stream, UsageError};
use super::values::PoolName;
use crate::openstack::discovery::{Filter, Rules};
use crate::plan::Strategy;
use crate::plan::values::parse_size;

#[derive(Args, Debug)]
#[command(override_usage = "poolshift plan [OPTIONS] --from-pool <POOL> --to-pool <POOL>\n       \
                            poolshift plan [OPTIONS] --openstack [--boot-type <TYPE>] [--data-type <TYPE>]")]
pub(super) struct PlanArgs {
    /// The pool to empty, rbd:POOL[/NAMESPACE]
    #[arg(long, value_name = "POOL", required_unless_present = "openstack", conflicts_with = "openstack")]
    from_pool: Option<PoolName>,
    /// The pool to fill, rbd:POOL[/NAMESPACE]
    #[arg(long, value_name = "POOL", required_unless_present = "openstack", conflicts_with = "openstack")]
    to_pool: Option<PoolName>,
    /// Only images, or volumes and servers, whose names fit, with * and ?
    #[arg(long = "match", value_name = "GLOB")]
    pattern: Option<String>,
    /// Where to: a file that does not exist yet, or - for standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Args, Debug, Default, PartialEq)]
#[command(next_help_heading = "OpenStack")]
struct CloudArgs {
    /// Plan volumes of Cinder's, with the servers that have them
    #[arg(long)]
    openstack: bool,
    /// The type that boot volumes are to have; without it they stay
    #[arg(long, value_name = "TYPE", requires = "openstack")]
    boot_type: Option<String>,
    /// The type that data volumes are to have; without it they stay
    #[arg(long, value_name = "TYPE", requires = "openstack")]
    data_type: Option<String>,
    /// The cloud, of clouds.yaml [default: OS_CLOUD, or that of the other OS_* variables]
    #[arg(long, value_name = "NAME", requires = "openstack")]
    os_cloud: Option<String>,
    /// A project, by name or id; repeat it for several [default: that of the credentials]
    #[arg(long, value_name = "PROJECT", requires = "openstack")]
    project: Vec<String>,
    /// All projects
    #[arg(long, requires = "openstack", conflicts_with = "project")]
    all_projects: bool,
    /// Only volumes with this metadata, or on a server with it; repeat it for several, which must all be there
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_metadata, requires = "openstack")]
    metadata: Vec<(String, String)>,
    /// Only volumes of this type; repeat it for several
    #[arg(long, value_name = "TYPE", requires = "openstack")]
    from_type: Vec<String>,
    /// Only volumes of this size or larger, such as 100G
    #[arg(long, value_name = "BYTES", value_parser = parse_size, requires = "openstack")]
    min_size: Option<u64>,
    /// Only volumes of this size or smaller
    #[arg(long, value_name = "BYTES", value_parser = parse_size, requires = "openstack")]
    max_size: Option<u64>,
    /// A server, by name or id, whose data volumes are the disks of servers to come; repeat it for several
    #[arg(long, value_name = "SERVER", requires = "openstack")]
    gateway: Vec<String>,
    /// The key of a volume's metadata that says for which server to come it is [default: each volume by itself]
    #[arg(long, value_name = "KEY", requires = "gateway")]
    group_by: Option<String>,
    /// Also volumes that no server has
    #[arg(long, requires = "openstack")]
    detached: bool,
    /// How the volumes get their type [default: keep-ids]
    #[arg(long, value_enum, value_name = "HOW", requires = "openstack")]
    strategy: Option<Strategy>,
    /// The pool of a type's backend, where it has another name than the backend; repeat it for several
    #[arg(long, value_name = "TYPE=POOL", value_parser = parse_pool, requires = "openstack")]
    pool: Vec<(String, PoolName)>,
}

/// See `poolshift plan --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Plan {
    pub of: PlanOf,
    pub output: Stream,
}

/// What a plan is made of.
#[derive(Clone, Debug)]
pub enum PlanOf {
    /// The images of a pool.
    Pool(PoolPlan),
    /// The volumes of a cloud.
    Cloud(Box<CloudPlan>),
}

/// See `poolshift plan --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct PoolPlan {
    pub from_pool: PoolName,
    pub to_pool: PoolName,
    pub pattern: Option<String>,
}

/// See `poolshift plan --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct CloudPlan {
    pub cloud: Option<String>,
    pub projects: Projects,
    pub rules: Rules,
    /// By type.
    pub pools: BTreeMap<String, PoolName>,
}

/// Whose volumes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Projects {
    /// Those of the credentials' project.
    Own,
    /// Those of these projects, by name or id.
    Named(Vec<String>),
    /// All.
    All,
}

impl PlanArgs {
    pub(super) fn validated(self) -> Result<Command, UsageError> {
        let Self { from_pool, to_pool, pattern, output, cloud } = self;
        let of = match (from_pool, to_pool) {
            // The parser lets them pass, as what they need is excluded.
            (Some(_), Some(_)) if cloud != CloudArgs::default() => {
                return Err(UsageError("these flags are for a plan of a cloud: --openstack instead of pools".into()));
            }
            (Some(from_pool), Some(to_pool)) => PlanOf::Pool(PoolPlan { from_pool, to_pool, pattern }),
            // The parser has seen to it that there is one or the other.
            _ => PlanOf::Cloud(Box::new(cloud.validated(pattern)?)),
        };
        Ok(Command::Plan(Plan { of, output: output.into() }))
    }
}

impl CloudArgs {
    fn validated(self, pattern: Option<String>) -> Result<CloudPlan, UsageError> {
        if self.boot_type.is_none() && self.data_type.is_none() {
            let text = "say what is to be moved: --boot-type TYPE for boot volumes, --data-type TYPE for data volumes";
            return Err(UsageError(text.into()));
        }
        if let (Some(least), Some(most)) = (self.min_size, self.max_size)
            && least > most
        {
            return Err(UsageError("--min-size is larger than --max-size: no volume fits".into()));
        }
        let mut pools: BTreeMap<String, PoolName> = BTreeMap::new();
        for (name, pool) in self.pool {
            if let Some(other) = pools.insert(name.clone(), pool.clone())
                && other != pool
            {
                return Err(UsageError(format!("--pool gives the type {name:?} two pools: {other} and {pool}")));
            }
        }
        let projects = match self.project {
            _ if self.all_projects => Projects::All,
            named if named.is_empty() => Projects::Own,
            named => Projects::Named(named),
        };
        let strategy = self.strategy.unwrap_or_default();
        if strategy == Strategy::Retype && !self.gateway.is_empty() {
            return Err(UsageError("--strategy retype is for volumes that nobody has, and a gateway has them".into()));
        }
        if strategy == Strategy::Recreate && (self.detached || !self.gateway.is_empty()) {
            let text =
                "--strategy recreate is for servers that boot from their volumes: leave out --gateway and --detached";
            return Err(UsageError(text.into()));
        }
        let filter = Filter {
            name: pattern,
            metadata: self.metadata,
            types: self.from_type,
            min_size: self.min_size,
            max_size: self.max_size,
        };
        let rules = Rules {
            boot_type: self.boot_type,
            data_type: self.data_type,
            filter,
            gateways: self.gateway,
            group_by: self.group_by,
            detached: self.detached || strategy == Strategy::Retype,
            strategy,
        };
        Ok(CloudPlan { cloud: self.os_cloud, projects, rules, pools })
    }
}

impl ValueEnum for Strategy {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            Self::KeepIds => "They are replicated, and keep their ids, as their servers do",
            Self::Recreate => "Servers are made again, with other ids, from volumes with other ids",
            Self::Retype => "Cinder copies them itself: only volumes that nobody has, which are planned with it",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}

fn parse_metadata(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".into()),
    }
}

fn parse_pool(text: &str) -> Result<(String, PoolName), String> {
    // The name of a type may have a = in it; that of a pool had better not.
    match text.rsplit_once('=') {
        Some((name, pool)) if !name.is_empty() => Ok((name.to_owned(), pool.parse()?)),
        _ => Err("write TYPE=POOL".into()),
    }
}
