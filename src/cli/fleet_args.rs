//! The flags of the commands that ask or tell a fleet, and what they mean together.

use std::ffi::OsString;
use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::args::StateArgs;
use super::config::{Command, Status, UsageError};
use super::values::{Limit, parse_bytes_limit, parse_operations_limit};
use crate::fleet::control::Scope;
use crate::image::ImageSpec;
use crate::observe::client::Action;
use crate::throttle::Rate;

#[derive(Args, Debug)]
#[command(override_usage = "poolshift status [OPTIONS] <SOURCE> <TARGET>\n       poolshift status [OPTIONS] <PLAN>")]
pub(super) struct StatusArgs {
    /// The image that is read; or, alone, a plan file: then the status is that of all its servers
    #[arg(value_name = "SOURCE|PLAN")]
    first: OsString,
    /// The image that is written
    target: Option<ImageSpec>,
    /// Print the result as one JSON value
    #[arg(long)]
    json: bool,
    /// Draw the plan's status anew each second, until Ctrl-C; needs a terminal
    #[arg(long, conflicts_with = "json")]
    watch: bool,
    /// Show every volume of the plan, not only those of servers that are not in step
    #[arg(long, conflicts_with = "json")]
    volumes: bool,
    #[command(flatten)]
    token: TokenArgs,
    #[command(flatten)]
    state: StateArgs,
}

#[derive(Args, Debug)]
struct TokenArgs {
    /// A file with the daemon's token [default: POOLSHIFT_TOKEN in the environment, then the plan's token_file]
    #[arg(long, value_name = "PATH")]
    token_file: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("whom").required(true).args(["name", "all"]))]
pub(super) struct ActArgs {
    /// The plan file, which says where the daemon listens
    plan: PathBuf,
    /// The server, or one of its volumes
    name: Option<String>,
    /// Every server
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    token: TokenArgs,
}

#[derive(Args, Debug)]
#[command(override_usage = "poolshift throttle [OPTIONS] <PLAN> <POOL> --bytes-per-second <N|unlimited> \
                            --operations-per-second <N|unlimited>\n       \
                            poolshift throttle [OPTIONS] <PLAN> <POOL> --reset")]
pub(super) struct ThrottleArgs {
    /// The plan file, which says where the daemon listens
    plan: PathBuf,
    /// The pool that is read
    pool: String,
    /// How many bytes a second may be read from it; K, M, G and T are powers of 1024
    #[arg(long, value_name = "N|unlimited", value_parser = parse_bytes_limit, required_unless_present = "reset")]
    bytes_per_second: Option<Limit>,
    /// How many requests a second may go to it
    #[arg(long, value_name = "N|unlimited", value_parser = parse_operations_limit, required_unless_present = "reset")]
    operations_per_second: Option<Limit>,
    /// Back to what the plan says
    #[arg(long, conflicts_with_all = ["bytes_per_second", "operations_per_second"])]
    reset: bool,
    #[command(flatten)]
    token: TokenArgs,
}

/// See `poolshift status --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct FleetStatus {
    pub plan: PathBuf,
    pub json: bool,
    pub watch: bool,
    pub volumes: bool,
    pub token_file: Option<PathBuf>,
}

/// See `poolshift pause --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Act {
    pub action: Action,
    pub plan: PathBuf,
    pub scope: Scope,
    pub token_file: Option<PathBuf>,
}

/// See `poolshift throttle --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Throttle {
    pub plan: PathBuf,
    pub pool: String,
    /// `None`: what the plan says.
    pub rate: Option<Rate>,
    pub token_file: Option<PathBuf>,
}

impl StatusArgs {
    pub(super) fn validated(self) -> Result<Command, UsageError> {
        let first = self.first.to_str();
        let Some(target) = self.target else {
            let is_image = first.is_some_and(|text| text.starts_with("rbd:") || text.starts_with("file:"));
            if is_image && !first.is_some_and(|text| text.ends_with(".toml")) {
                return Err(UsageError(
                    "an image's status needs its TARGET as well; a plan's needs the plan file".into(),
                ));
            }
            return self.of_plan();
        };
        if self.watch || self.volumes || self.token.token_file.is_some() {
            return Err(UsageError("--watch, --volumes and --token-file are for the status of a plan".into()));
        }
        let text = first.ok_or_else(|| UsageError("SOURCE is not UTF-8".into()))?;
        let source: ImageSpec = text.parse().map_err(|error| UsageError(format!("SOURCE: {error}")))?;
        super::config::no_snapshot("SOURCE", &source)?;
        super::config::no_snapshot("TARGET", &target)?;
        Ok(Command::Status(Status { source, target, json: self.json, state_dir: self.state.state_dir }))
    }

    fn of_plan(self) -> Result<Command, UsageError> {
        if self.state.state_dir.is_some() {
            return Err(UsageError("--state-dir is for the status of two images".into()));
        }
        Ok(Command::FleetStatus(FleetStatus {
            plan: self.first.into(),
            json: self.json,
            watch: self.watch,
            volumes: self.volumes,
            token_file: self.token.token_file,
        }))
    }
}

impl ActArgs {
    pub(super) fn validated(self, action: Action) -> Command {
        // clap sees to it that there is exactly one of the two.
        let scope = self.name.map_or(Scope::All, Scope::Named);
        Command::Act(Act { action, plan: self.plan, scope, token_file: self.token.token_file })
    }
}

impl ThrottleArgs {
    pub(super) fn validated(self) -> Command {
        let limit = |limit: Option<Limit>| -> Option<NonZeroU64> { limit.and_then(|Limit(limit)| limit) };
        let rate = (!self.reset).then(|| Rate {
            bytes_per_second: limit(self.bytes_per_second),
            operations_per_second: limit(self.operations_per_second),
        });
        Command::Throttle(Throttle { plan: self.plan, pool: self.pool, rate, token_file: self.token.token_file })
    }
}
