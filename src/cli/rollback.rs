//! `poolshift rollback`: a server goes back to its sources, or a cutover that was begun is undone.

use super::config::Rollback;
use super::cutover::errors::AskError;
use super::cutover::look::{self, Looked, State};
use super::cutover::{consent, find, phases, refuse_finalizing, show, tell};
use super::exit::Exit;
use super::fleet::PlanImages;
use super::{Context, daemon};
use crate::cutover::journal::Changes;
use crate::cutover::provider::Side;
use crate::cutover::{self, CutoverError};
use crate::plan::{self, Method};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Rollback) -> anyhow::Result<Exit> {
    let plan = daemon::load(&settings.plan).await?;
    let planned = find(&plan, &settings.server)?;
    let plan_images = PlanImages::new(context, &plan);
    let context = &plan_images.context();
    let (options, consent) = (&settings.options, settings.consent);
    // What is given up was written by a server whose memory knows of it: that one boots.
    let is_domain = matches!(planned.cutover, plan::Cutover::Libvirt(_));
    let method = (settings.changes == Some(Changes::Discard) && is_domain).then_some(Method::Cold);
    refuse_finalizing(context, planned).await?;
    let looked = look::look(context, &plan, planned, method, Side::Source).await?;
    if looked.state() == State::OnSources {
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
    // Of what was begun it may turn out that it has come to its end: then it has to be said, and not to be guessed.
    let asked = if looked.state() == State::Begun { settings.changes } else { Some(changes) };
    let server = &looked.server;
    let report = phases::shown(context, &server.name, async |observer| {
        cutover::rollback(server, asked, options, observer, &context.cancel).await
    })
    .await?;
    tell(context, &report, server, consent.json)?;
    // A cutover that was begun ends as rolled back, which is what was asked for.
    Ok(if report.runs_from == Side::Source { Exit::Success } else { Exit::WentBack })
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
