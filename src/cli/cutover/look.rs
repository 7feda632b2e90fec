//! The look at a server before anything is done to it.

use serde::Serialize;

use super::{open, show};
use crate::cli::{Context, Interrupted, output};
use crate::cutover::journal::Journal;
use crate::cutover::provider::{Side, Verdict};
use crate::cutover::{self, CutoverError, Options, Readiness, Server};
use crate::fleet::CUTOVER_NOTE;
use crate::image::{Disk as _, ErrorKind, SourceImage as _, TargetImage as _};
use crate::observe::human::human_moment;
use crate::plan::{self, Method, Plan};

/// Where a server is, by its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::cli) enum State {
    /// It runs from its sources.
    OnSources,
    /// A way over or back was begun, and has not ended.
    Begun,
    /// It runs from its targets, and its sources are kept.
    OnTargets,
}

impl State {
    fn of(journal: Option<&Journal>) -> Self {
        match journal {
            Some(journal) if !(journal.phase.is_over() && journal.done) => Self::Begun,
            Some(journal) if journal.is_cut_over() => Self::OnTargets,
            _ => Self::OnSources,
        }
    }
}

/// Where a server is that has arrived.
fn there(to: Side) -> State {
    match to {
        Side::Target => State::OnTargets,
        Side::Source => State::OnSources,
    }
}

/// A server that was looked at.
pub(in crate::cli) struct Looked {
    /// It, open.
    pub(in crate::cli) server: Server,
    /// Its journal.
    pub(in crate::cli) journal: Option<Journal>,
    /// A cutover has paused it, and has not got to its journal.
    pub(in crate::cli) paused: bool,
    /// What stands in the way; `None` where something was begun, or there is no way to go.
    pub(in crate::cli) readiness: Option<Readiness>,
}

impl Looked {
    /// Where it is.
    pub(in crate::cli) fn state(&self) -> State {
        match State::of(self.journal.as_ref()) {
            State::OnSources if self.paused => State::Begun,
            state => state,
        }
    }

    /// Whether it runs where it is to go.
    pub(in crate::cli) fn is_there(&self, to: Side) -> bool {
        self.state() == there(to)
    }

    /// Whether something stands in the way.
    pub(in crate::cli) fn is_ready(&self, options: &Options) -> bool {
        let Some(readiness) = &self.readiness else { return true };
        let too_long = options.max_outage.zip(readiness.predicted_outage).is_some_and(|(limit, outage)| outage > limit);
        !too_long && readiness.preconditions.iter().all(|found| found.verdict != Verdict::Error)
    }

    /// Refuses a server that is not ready.
    pub(in crate::cli) fn refuse_unready(&self, options: &Options) -> Result<(), CutoverError> {
        let Some(readiness) = &self.readiness else { return Ok(()) };
        let server = || self.server.name.clone();
        if readiness.preconditions.iter().any(|found| found.verdict == Verdict::Error) {
            return Err(CutoverError::NotReady { server: server(), preconditions: readiness.preconditions.clone() });
        }
        match (options.max_outage, readiness.predicted_outage) {
            (Some(limit), Some(outage)) if outage > limit => {
                let how = format!("would be {:.2} s, over", outage.as_secs_f64());
                Err(CutoverError::TooLong { server: server(), how, limit })
            }
            _ => Ok(()),
        }
    }

    /// Prints it as the result of a dry run.
    pub(in crate::cli) fn print(&self, options: &Options, json: bool) -> anyhow::Result<()> {
        match json {
            true => output::json(&self.summary(options)),
            false => Ok(output::bytes(show::looked(self, options).as_bytes())?),
        }
    }

    /// It, as JSON shows it.
    pub(in crate::cli) fn summary<'a>(&'a self, options: &Options) -> Summary<'a> {
        Summary {
            server: &self.server.name,
            by: self.server.provider.describe(),
            state: self.state(),
            ready: self.is_ready(options),
            readiness: self.readiness.as_ref(),
        }
    }
}

/// What a dry run says of a server.
#[derive(Serialize)]
pub(in crate::cli) struct Summary<'a> {
    server: &'a str,
    by: String,
    state: State,
    ready: bool,
    readiness: Option<&'a Readiness>,
}

/// Opens a server and looks at what stands in the way to `to`. Changes nothing.
pub(in crate::cli) async fn look(
    context: &Context<'_>,
    plan: &Plan,
    server: &plan::Server,
    method: Option<Method>,
    to: Side,
) -> anyhow::Result<Looked> {
    let bar = context.terminal.progress(&format!("{}: looking", server.name));
    let work = async {
        let server = open::open_server(context, plan, server, method).await?;
        let journal = cutover::journal(&server).await?;
        // On its way over it begins anew, which needs a look.
        let paused = to == Side::Source && cutover::is_paused_by_a_cutover(&server).await?;
        let mut looked = Looked { server, journal, paused, readiness: None };
        // What was begun is finished, whatever stands in the way: the server may be down.
        if looked.state() != State::Begun && !looked.is_there(to) {
            looked.readiness = Some(cutover::readiness(&looked.server, to).await?);
        }
        Ok(looked)
    };
    let looked = tokio::select! {
        looked = work => looked,
        () = context.cancel.cancelled() => Err(Interrupted.into()),
    };
    drop(bar);
    looked
}

/// Why a server is not to be touched by what tidies up or holds plans against clusters: it was cut over, or is being cut
/// over. `None` where it runs from its sources, or has no target yet.
pub(in crate::cli) async fn hands_off(context: &Context<'_>, server: &plan::Server) -> anyhow::Result<Option<String>> {
    let Some(first) = server.volumes.first() else { return Ok(None) };
    let target = match open::target(context, first).await {
        Ok(Some(target)) => target,
        Ok(None) => return Ok(None),
        Err(error) if error.kind == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if let Some(text) = target.load_journal().await? {
        let location = target.location().to_owned();
        let journal = Journal::parse(&text).map_err(|error| CutoverError::Journal { location, error })?;
        match State::of(Some(&journal)) {
            State::OnSources => {}
            State::OnTargets => return Ok(Some(format!("it has run from its targets since {}", since(&journal)))),
            State::Begun => {
                let (to, begun) = (show::side(journal.to), human_moment(&journal.begun));
                return Ok(Some(format!("its way to {to} was begun at {begun}, and has not ended")));
            }
        }
    }
    let note = target.load_note().await?;
    Ok(note.as_deref().and_then(|note| note.strip_prefix(CUTOVER_NOTE)).map(|reason| reason.trim().to_owned()))
}

/// When a way that has ended did so.
pub(in crate::cli) fn since(journal: &Journal) -> String {
    human_moment(journal.ended.as_deref().unwrap_or(&journal.begun))
}
