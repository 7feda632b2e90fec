//! The flags of `poolshift retype`, and what they mean together.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::config::{Command, Consent};
use super::cutover_args::ConsentArgs;
use crate::cutover::provider::Side;
use crate::cutover::provider::openstack::retype::RetypeOptions;

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("whom").required(true).args(["servers", "all"]))]
#[command(override_usage = "poolshift retype [OPTIONS] <PLAN> <SERVER>...\n       \
                            poolshift retype [OPTIONS] <PLAN> --all")]
pub(super) struct RetypeArgs {
    /// The plan file
    plan: PathBuf,
    /// The servers of the plan
    #[arg(value_name = "SERVER")]
    servers: Vec<String>,
    /// Every server of the plan with the strategy retype; the others are passed over
    #[arg(long)]
    all: bool,
    /// How many volumes at a time
    #[arg(long, value_name = "N", default_value_t = 2)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// The way back: give the volumes the type that the plan has for their source
    #[arg(long)]
    back: bool,
    /// Copy into the clones that hang on a volume what they share with it, cut them loose, and remove the snapshots that
    /// Cinder has made for them
    #[arg(long)]
    flatten: bool,
    /// Read each volume before and after, and compare what it holds: Cinder itself checks nothing
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    consent: ConsentArgs,
}

/// See `poolshift retype --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Retype {
    pub plan: PathBuf,
    /// `None`: all.
    pub servers: Option<Vec<String>>,
    pub parallel: usize,
    pub options: RetypeOptions,
    pub consent: Consent,
}

impl RetypeArgs {
    pub(super) fn validated(self) -> Command {
        let Self { plan, servers, all, parallel, back, flatten, verify, consent } = self;
        let to = if back { Side::Source } else { Side::Target };
        Command::Retype(Retype {
            plan,
            servers: (!all).then_some(servers),
            parallel: parallel.into(),
            options: RetypeOptions { to, flatten, verify },
            consent: consent.validated(),
        })
    }
}
