//! The flags of the commands that bring servers over and back, and what they mean together.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::PossibleValue;
use clap::{ArgGroup, Args, ValueEnum};
use jiff::civil::Time;
use jiff::{Timestamp, ToSpan as _, ZonedDateTime};
use tokio::sync::Semaphore;

use super::config::{Command, UsageError};
use crate::cutover::journal::Changes;
use crate::cutover::{Options, Proof};
use crate::plan::Method;
use crate::plan::values::parse_duration;

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("whom").required(true).args(["server", "all"]))]
#[command(override_usage = "poolshift cutover [OPTIONS] <PLAN> <SERVER>\n       \
                            poolshift cutover [OPTIONS] <PLAN> --all [--parallel <N>] [--max-down <N>]")]
pub(super) struct CutoverArgs {
    /// The plan file
    plan: PathBuf,
    /// The server
    server: Option<String>,
    /// Every server of the plan, each by itself; those that run from their targets already are passed over
    #[arg(long)]
    all: bool,
    /// How many servers at a time
    #[arg(long, value_name = "N", default_value_t = 1, requires = "all", conflicts_with = "server")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// How many of them stand still at the same time; the others run on, and catch up when it is their turn [default: all]
    #[arg(long, value_name = "N", requires = "all", conflicts_with = "server")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=64))]
    max_down: Option<u16>,
    /// How a libvirt domain is brought over [default: what the plan says]
    #[arg(long, value_enum, value_name = "HOW")]
    method: Option<Method>,
    #[command(flatten)]
    proof: ProofArgs,
    /// Do not begin if the outage is predicted to be longer, and go back if it gets longer before the server is started
    #[arg(long, value_name = "TIME", value_parser = parse_outage)]
    max_outage: Option<Duration>,
    /// Wait until then, with the servers in step: HH:MM, the next time that a clock here shows it, or RFC 3339
    #[arg(long, value_name = "TIME", value_parser = parse_at, conflicts_with = "dry_run")]
    at: Option<At>,
    #[command(flatten)]
    consent: ConsentArgs,
}

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("whose").required(true).args(["server", "all"]))]
#[command(override_usage = "poolshift rollback [OPTIONS] <PLAN> <SERVER>\n       \
                            poolshift rollback [OPTIONS] <PLAN> --all [--parallel <N>]")]
pub(super) struct RollbackArgs {
    /// The plan file
    plan: PathBuf,
    /// The server
    server: Option<String>,
    /// Every server of the plan, each by itself; those that run from their sources are passed over
    #[arg(long)]
    all: bool,
    /// How many servers at a time
    #[arg(long, value_name = "N", default_value_t = 1, requires = "all", conflicts_with = "server")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// Carry back what the server has written on its targets since the cutover: nothing is lost
    #[arg(long)]
    with_changes: bool,
    /// Give up what the server has written on its targets since the cutover: its sources are as they were then
    #[arg(long, conflicts_with = "with_changes")]
    discard_changes: bool,
    #[command(flatten)]
    proof: ProofArgs,
    #[command(flatten)]
    consent: ConsentArgs,
}

#[derive(Args, Debug)]
pub(super) struct RehearseArgs {
    /// The plan file
    plan: PathBuf,
    /// The server
    server: String,
    /// Keep the stand-in for that long after it was judged, well or not, to look at it; Ctrl-C ends it earlier
    #[arg(long, value_name = "TIME", value_parser = parse_keep)]
    keep: Option<Duration>,
    /// Print the report as one JSON value
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
pub(super) struct FinalizeArgs {
    /// The plan file
    plan: PathBuf,
    /// The server
    server: String,
    /// Copy into the clones that hang on a source what they share with it, and cut them loose
    #[arg(long)]
    flatten: bool,
    #[command(flatten)]
    consent: ConsentArgs,
}

#[derive(Args, Debug)]
struct ProofArgs {
    /// How much of the copy is proved, by reading both sides, before the server is started on it
    #[arg(long = "verify", value_enum, value_name = "HOW", default_value_t)]
    proof: Proof,
}

#[derive(Args, Debug)]
pub(super) struct ConsentArgs {
    /// Do it without asking; needed where no terminal is there to ask on
    #[arg(long, conflicts_with = "dry_run")]
    yes: bool,
    /// End after the look at what stands in the way, and change nothing; exits with 1 if something does
    #[arg(long)]
    dry_run: bool,
    /// Print the report as one JSON value
    #[arg(long)]
    json: bool,
}

/// Whom a cutover, or a way back, is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whom {
    /// One server.
    Server(String),
    /// All of the plan, so many at a time.
    All(usize),
}

/// See `poolshift cutover --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Cutover {
    pub plan: PathBuf,
    pub whom: Whom,
    pub method: Option<Method>,
    pub options: Options,
    pub at: Option<At>,
    pub consent: Consent,
}

/// See `poolshift rollback --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Rollback {
    pub plan: PathBuf,
    pub whom: Whom,
    /// `None`: not said, which is enough while a cutover is unfinished.
    pub changes: Option<Changes>,
    pub options: Options,
    pub consent: Consent,
}

/// See `poolshift rehearse --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Rehearse {
    pub plan: PathBuf,
    pub server: String,
    pub keep: Option<Duration>,
    pub json: bool,
}

/// See `poolshift finalize --help`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Finalize {
    pub plan: PathBuf,
    pub server: String,
    pub flatten: bool,
    pub consent: Consent,
}

/// What the person at the keys, or the script, has agreed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Consent {
    /// Not to be asked.
    pub yes: bool,
    /// Nothing is to be changed.
    pub dry_run: bool,
    /// The result is to be JSON.
    pub json: bool,
}

impl ConsentArgs {
    pub(super) fn validated(&self) -> Consent {
        Consent { yes: self.yes, dry_run: self.dry_run, json: self.json }
    }
}

impl CutoverArgs {
    pub(super) fn validated(self) -> Command {
        // clap sees to it that there is exactly one of the two.
        let whom = self.server.map_or(Whom::All(self.parallel.into()), Whom::Server);
        let turns = self.max_down.map(|servers| Arc::new(Semaphore::new(servers.into())));
        let options = Options { proof: self.proof.proof, max_outage: self.max_outage, turns };
        let consent = self.consent.validated();
        Command::Cutover(Cutover { plan: self.plan, whom, method: self.method, options, at: self.at, consent })
    }
}

impl RollbackArgs {
    pub(super) fn validated(self) -> Command {
        let changes = match (self.with_changes, self.discard_changes) {
            (true, _) => Some(Changes::Carry),
            (_, true) => Some(Changes::Discard),
            (false, false) => None,
        };
        let options = Options { proof: self.proof.proof, ..Options::default() };
        let consent = self.consent.validated();
        let whom = self.server.map_or(Whom::All(self.parallel.into()), Whom::Server);
        Command::Rollback(Rollback { plan: self.plan, whom, changes, options, consent })
    }
}

impl RehearseArgs {
    pub(super) fn validated(self) -> Command {
        let Self { plan, server, keep, json } = self;
        Command::Rehearse(Rehearse { plan, server, keep, json })
    }
}

impl FinalizeArgs {
    pub(super) fn validated(self) -> Command {
        let consent = self.consent.validated();
        Command::Finalize(Finalize { plan: self.plan, server: self.server, flatten: self.flatten, consent })
    }
}

/// The moment that a cutover waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// This one.
    Moment(Timestamp),
    /// The next time that a clock here shows this.
    Clock(Time),
}

impl At {
    /// The moment, seen from `now`. One that has passed is refused.
    pub fn moment(self, now: &ZonedDateTime) -> Result<Timestamp, UsageError> {
        let wrong = |error: jiff::Error| UsageError(format!("--at can't be waited for: {error}"));
        match self {
            Self::Moment(at) if at < now.timestamp() => {
                Err(UsageError(format!("--at {at} has passed: leave it out to begin now")))
            }
            Self::Moment(at) => Ok(at),
            Self::Clock(time) => {
                let on = |date: jiff::civil::Date| date.to_datetime(time).to_zoned_datetime(now.time_zone().clone());
                let today = on(now.date()).map_err(wrong)?;
                if today > *now {
                    return Ok(today.timestamp());
                }
                let tomorrow = now.date().checked_add(1.day()).map_err(wrong)?;
                Ok(on(tomorrow).map_err(wrong)?.timestamp())
            }
        }
    }
}

fn parse_at(text: &str) -> Result<At, String> {
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(At::Moment(moment));
    }
    let two = |digits: &str| match digits.as_bytes() {
        [a, b] if a.is_ascii_digit() && b.is_ascii_digit() => digits.parse::<i8>().ok(),
        _ => None,
    };
    let clock = text.split_once(':').and_then(|(hour, minute)| Time::new(two(hour)?, two(minute)?, 0, 0).ok());
    clock.map(At::Clock).ok_or_else(|| {
        "write HH:MM, or a date and time with its offset from UTC, such as 2026-11-25T22:00:00+01:00".to_owned()
    })
}

fn parse_outage(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("an outage of 0 can't be kept: leave it out for no limit".to_owned()),
        limit => Ok(limit),
    }
}

/// The longest rehearsal: its clones grow in the target pool, and keep the space of a point that was pruned.
const KEEP_MAX: Duration = Duration::from_secs(7 * 86_400);

fn parse_keep(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("leave it out to remove it at once".to_owned()),
        keep if keep > KEEP_MAX => Err("a rehearsal is kept for 7d at most".to_owned()),
        keep => Ok(keep),
    }
}

impl ValueEnum for Method {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            Self::Cold => "It is shut down, and boots",
            Self::Warm => "Its memory is saved, and it goes on without a boot",
            Self::Hot => "It is suspended, and its disks are opened anew below it",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}

impl ValueEnum for Proof {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::None, Self::Delta, Self::Sample, Self::Full]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            Self::None => PossibleValue::new("none").help("Nothing"),
            Self::Delta => PossibleValue::new("delta").help("What was carried over while the server stood still"),
            Self::Sample => {
                PossibleValue::new("sample").help("That, and a random sample of the rest, before it is stopped")
            }
            Self::Full => PossibleValue::new("full").help("That, and all of the rest, before it is stopped"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_means_the_next_time_that_it_shows_that() {
        let here = jiff::tz::TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let now = |utc: &str| utc.parse::<Timestamp>().unwrap().to_zoned_datetime(here.clone());
        let evening = now("2026-11-25T20:30:00Z");
        let moment = |text: &str| parse_at(text).unwrap().moment(&evening).unwrap().to_string();
        assert_eq!(moment("22:00"), "2026-11-25T21:00:00Z");
        assert_eq!(moment("21:30"), "2026-11-26T20:30:00Z");
        assert_eq!(moment("02:15"), "2026-11-26T01:15:00Z");
        assert_eq!(moment("2026-12-01T00:00:00+01:00"), "2026-11-30T23:00:00Z");
        let passed = parse_at("2026-11-25T20:00:00Z").unwrap().moment(&evening).unwrap_err();
        assert!(passed.to_string().contains("has passed"), "{passed}");
        // The night in which a clock here shows 02:30 twice, and the one in which it never does.
        for (midnight, at) in
            [("2026-10-24T22:00:00Z", "2026-10-25T00:30:00Z"), ("2026-03-28T23:00:00Z", "2026-03-29T01:30:00Z")]
        {
            assert_eq!(parse_at("02:30").unwrap().moment(&now(midnight)).unwrap().to_string(), at);
        }
    }

    #[test]
    fn times_that_mean_nothing_are_refused() {
        for text in
            ["", "22", "24:00", "22:60", "2:00", "22:00:00", "+2:00", "tomorrow", "2026-11-25T22:00", "2026-11-25"]
        {
            assert!(parse_at(text).is_err(), "{text}");
        }
        assert!(parse_outage("0s").is_err() && parse_outage("30").is_err());
        assert_eq!(parse_outage("1m30s"), Ok(Duration::from_secs(90)));
        assert!(parse_keep("0s").is_err() && parse_keep("8d").is_err());
        assert_eq!(parse_keep("1h"), Ok(Duration::from_secs(3600)));
    }
}
