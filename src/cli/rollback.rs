//! `poolshift rollback`: a server goes back to its sources, or a cutover that was begun is undone.

use super::config::{Consent, Rollback, Whom};
use super::cutover::errors::AskError;
use super::cutover::look::{self, Looked, State};
use super::cutover::{Way, consent, find, phases, refuse_finalizing, run_many, show, tell};
use super::exit::Exit;
use super::fleet::{self, PlanImages};
use super::{Context, daemon};
use crate::cutover::journal::Changes;
use crate::cutover::provider::Side;
use crate::cutover::{self, CutoverError, Options, Report, Server};
use crate::plan::{self, Method, Plan};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Rollback) -> anyhow::Result<Exit> {
    let plan = daemon::load(&settings.plan).await?;
    let plan_images = PlanImages::new(context, &plan);
    let context = plan_images.context();
    match &settings.whom {
        Whom::Server(name) => one(&context, settings, &plan, find(&plan, name)?).await,
        Whom::All(parallel) => {
            let plan = fleet::without_retyped(&context.terminal, plan.clone());
            run_many(&context, settings, &plan, *parallel, None).await
        }
    }
}

async fn one(context: &Context<'_>, settings: &Rollback, plan: &Plan, planned: &plan::Server) -> anyhow::Result<Exit> {
    let (options, consent) = (&settings.options, settings.consent);
    refuse_finalizing(context, planned).await?;
    let looked = look::look(context, plan, planned, settings.method(planned), Side::Source).await?;
    if looked.is_there(Side::Source) {
        return Err(CutoverError::WrongState {
            server: planned.name.clone(),
            problem: "runs from its sources: it was not cut over, or was brought back".to_owned(),
            hint: "nothing is left to be done".to_owned(),
        }
        .into());
    }
    if consent.dry_run {
        looked.print(options, consent.json)?;
        return Ok(if looked.is_ready(options) { Exit::Success } else { Exit::Failed });
    }
    let changes = changes(&looked, settings.changes)?;
    context.terminal.say(show::looked(&looked, options).trim_end());
    looked.refuse_unready(options)?;
    consent::ask(context, consent, &what_happens(&looked, changes), &planned.name).await?;
    let report = settings.bring(context, &looked.server).await?;
    tell(context, &report, &looked.server, consent.json)?;
    Ok(settings.exit(&report))
}

impl Way for Rollback {
    fn to(&self) -> Side {
        Side::Source
    }

    fn options(&self) -> &Options {
        &self.options
    }

    fn consent(&self) -> Consent {
        self.consent
    }

    fn method(&self, server: &plan::Server) -> Option<Method> {
        // What is given up was written by a server whose memory knows of it: that one boots.
        let is_domain = matches!(server.cutover, plan::Cutover::Libvirt(_));
        (self.changes == Some(Changes::Discard) && is_domain).then_some(Method::Cold)
    }

    fn refuse(&self, looked: &Looked) -> anyhow::Result<()> {
        changes(looked, self.changes)?;
        Ok(looked.refuse_unready(&self.options)?)
    }

    fn what(&self, servers: &str, parallel: usize) -> String {
        let written = match self.changes {
            Some(Changes::Carry) => ", with what they have written on their targets",
            Some(Changes::Discard) => "; what they have written on their targets is LOST",
            None => "",
        };
        format!("{servers} are brought back to their sources, {parallel} at a time{written}")
    }

    async fn bring(&self, context: &Context<'_>, server: &Server) -> Result<Report, CutoverError> {
        phases::shown(context, &server.name, async |observer| {
            // Of what was begun it may turn out that it has come to its end: then it has to be said, and not to be guessed.
            cutover::rollback(server, self.changes, &self.options, observer, &context.cancel).await
        })
        .await
    }

    fn exit(&self, report: &Report) -> Exit {
        // A cutover that was begun ends as rolled back, which is what was asked for.
        if report.runs_from == Side::Source { Exit::Success } else { Exit::WentBack }
    }
}

/// What becomes of the writes on the targets: it has to be said where there are any.
fn changes(looked: &Looked, asked: Option<Changes>) -> Result<Changes, AskError> {
    let begun = looked.journal.as_ref();
    match (asked, looked.state()) {
        (Some(changes), _) => Ok(changes),
        // A way back that was begun has its answer; on the way there nothing was written on the targets yet.
        (None, State::Begun) => Ok(begun.and_then(|journal| journal.changes).unwrap_or(Changes::Carry)),
        (None, _) => Err(AskError::WhichWay {
            server: looked.server.name.clone(),
            since: begun.map_or_else(|| "its cutover".to_owned(), look::since),
        }),
    }
}

fn what_happens(looked: &Looked, changes: Changes) -> String {
    let name = &looked.server.name;
    match (looked.state(), changes) {
        (State::Begun, _) => format!("what was begun with {name} is undone"),
        (_, Changes::Carry) => {
            format!("{name} is brought back to its sources, with what it has written on its targets")
        }
        (_, Changes::Discard) => {
            format!("{name} is brought back to its sources; what it has written on its targets is LOST")
        }
    }
}
