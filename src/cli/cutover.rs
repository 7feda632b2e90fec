//! `poolshift cutover`: servers leave their sources and go on from their targets.
//!
//! First every precondition with its verdict, then somebody's consent, then the phases as they go by ([`phases`]), then
//! one line, or with `--json` one value, on standard output. What a failed one is mended with, the journal on the images
//! knows: the same command again, or `poolshift rollback`, on any host.

use super::config::{Consent, Cutover, Whom};
use super::exit::Exit;
use super::fleet::{self, PlanImages};
use super::{Context, daemon, output};
use crate::cutover::phase::Phase;
use crate::cutover::provider::Side;
use crate::cutover::{self, CutoverError, Options, Report, Server};
use crate::plan::{self, Method, Plan};

pub(super) mod consent;
pub(super) mod errors;
pub(super) mod look;
mod many;
mod open;
pub(super) mod phases;
pub(super) mod show;
mod wait;

use look::State;
pub(super) use many::{Way, run as run_many, worst};
pub(super) use open::{find, find_retyped, open_kept, open_stage, refuse_finalizing};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Cutover) -> anyhow::Result<Exit> {
    let plan = daemon::load(&settings.plan).await?;
    let at = settings.at.map(|at| at.moment(&jiff::ZonedDateTime::now())).transpose()?;
    let plan_images = PlanImages::new(context, &plan);
    let context = plan_images.context();
    match &settings.whom {
        Whom::Server(name) => one(&context, settings, &plan, open::find(&plan, name)?, at).await,
        Whom::All(parallel) => {
            let plan = fleet::without_retyped(&context.terminal, plan.clone());
            many::run(&context, settings, &plan, *parallel, at).await
        }
    }
}

async fn one(
    context: &Context<'_>,
    settings: &Cutover,
    plan: &Plan,
    planned: &plan::Server,
    at: Option<jiff::Timestamp>,
) -> anyhow::Result<Exit> {
    let (options, consent, name) = (&settings.options, settings.consent, planned.name.as_str());
    refuse_finalizing(context, planned).await?;
    let looked = look::look(context, plan, planned, settings.method, Side::Target).await?;
    refuse_there(&looked)?;
    if consent.dry_run {
        looked.print(options, consent.json)?;
        return Ok(if looked.is_ready(options) { Exit::Success } else { Exit::Failed });
    }
    context.terminal.say(show::looked(&looked, options).trim_end());
    looked.refuse_unready(options)?;
    consent::ask(context, consent, &format!("{name} is brought over to its targets"), name).await?;
    let server = match at {
        None => looked.server,
        Some(at) => {
            // Whatever was open is opened anew, when it is true.
            drop(looked);
            wait::until(context, name, at).await?;
            open::open_server(context, plan, planned, settings.method).await?
        }
    };
    let report = settings.bring(context, &server).await?;
    tell(context, &report, &server, consent.json)?;
    Ok(settings.exit(&report))
}

/// Refuses a server that is where it is to go.
fn refuse_there(looked: &look::Looked) -> Result<(), CutoverError> {
    match looked.state() {
        State::OnTargets => Err(CutoverError::WrongState {
            server: looked.server.name.clone(),
            problem: "runs from its targets already".to_owned(),
            hint: "its way back is: poolshift rollback PLAN SERVER".to_owned(),
        }),
        State::Begun | State::OnSources => Ok(()),
    }
}

impl Way for Cutover {
    fn to(&self) -> Side {
        Side::Target
    }

    fn options(&self) -> &Options {
        &self.options
    }

    fn consent(&self) -> Consent {
        self.consent
    }

    fn method(&self, _server: &plan::Server) -> Option<Method> {
        self.method
    }

    fn refuse(&self, looked: &look::Looked) -> anyhow::Result<()> {
        Ok(looked.refuse_unready(&self.options)?)
    }

    fn what(&self, servers: &str, parallel: usize) -> String {
        let down = self.options.turns.as_ref();
        let down = down.map(|turns| format!(", of which {} stand still", turns.available_permits()));
        format!("{servers} are brought over to their targets, {parallel} at a time{}", down.unwrap_or_default())
    }

    async fn bring(&self, context: &Context<'_>, server: &Server) -> Result<Report, CutoverError> {
        phases::shown(context, &server.name, async |observer| {
            cutover::cutover(server, &self.options, observer, &context.cancel).await
        })
        .await
    }

    fn exit(&self, report: &Report) -> Exit {
        if report.ended == Phase::Committed { Exit::Success } else { Exit::WentBack }
    }
}

/// Says how it ended. What is left to a person belongs to the result where poolshift swaps nothing.
pub(super) fn tell(context: &Context<'_>, report: &Report, server: &Server, json: bool) -> anyhow::Result<()> {
    if json {
        return output::json(report);
    }
    let mut text = show::ended(report);
    for remark in &report.remarks {
        match server.provider.by_hand() {
            true => text.push_str(&format!("{remark}\n")),
            false => context.terminal.say(&format!("{}: {remark}", report.server)),
        }
    }
    Ok(output::bytes(text.as_bytes())?)
}
