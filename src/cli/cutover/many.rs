//! `poolshift cutover PLAN --all`, and back: every server by itself. One that fails does not stop the others.

use std::time::Duration;

use futures::stream::{self, StreamExt as _};
use serde::Serialize;

use super::look::{self, Looked, Summary};
use super::open::{self, refuse_finalizing};
use super::show::{self, Row};
use super::{consent, wait};
use crate::cli::config::Consent;
use crate::cli::exit::Exit;
use crate::cli::{Context, Interrupted, error, output};
use crate::cutover::provider::Side;
use crate::cutover::{CutoverError, Options, Report, Server};
use crate::plan::{self, Method, Plan};

/// How many servers are looked at at a time.
const LOOKS_AT_A_TIME: usize = 8;

/// What becomes of a server.
enum End {
    /// It was there already.
    There(Side),
    /// It was brought there, or went back.
    Report(Box<Report>, Exit),
    /// It failed, or was not begun.
    Failed(anyhow::Error),
}

/// What stands in the JSON for a server.
#[derive(Serialize)]
struct Entry<'a> {
    server: &'a str,
    exit_code: u8,
    report: Option<&'a Report>,
    error: Option<String>,
}

/// Which way all servers go.
pub(in crate::cli) trait Way {
    /// Where they are to run.
    fn to(&self) -> Side;

    /// How.
    fn options(&self) -> &Options;

    /// What was agreed to.
    fn consent(&self) -> Consent;

    /// How a libvirt domain goes; `None` leaves it to the plan.
    fn method(&self, server: &plan::Server) -> Option<Method>;

    /// Refuses a server that is not to be begun with.
    fn refuse(&self, looked: &Looked) -> anyhow::Result<()>;

    /// What happens to so many, for somebody to agree to.
    fn what(&self, servers: &str, parallel: usize) -> String;

    /// Brings a server there, with its phases as they go by.
    async fn bring(&self, context: &Context<'_>, server: &Server) -> Result<Report, CutoverError>;

    /// How that ended.
    fn exit(&self, report: &Report) -> Exit;
}

/// Runs a command for all servers of the plan.
pub(in crate::cli) async fn run(
    context: &Context<'_>,
    way: &impl Way,
    plan: &Plan,
    parallel: usize,
    at: Option<jiff::Timestamp>,
) -> anyhow::Result<Exit> {
    let consent = way.consent();
    let looks = plan.servers.iter().map(|server| async {
        if way.to() == Side::Source {
            refuse_finalizing(context, server).await?;
        }
        look::look(context, plan, server, way.method(server), way.to()).await
    });
    let looks: Vec<anyhow::Result<Looked>> = stream::iter(looks).buffered(LOOKS_AT_A_TIME).collect().await;
    if context.cancel.is_cancelled() {
        return Err(Interrupted.into());
    }
    if consent.dry_run {
        return dry_run(way, plan, &looks);
    }
    let mut ends: Vec<Option<End>> = Vec::new();
    for (server, looked) in plan.servers.iter().zip(looks) {
        ends.push(match looked {
            Err(error) => {
                context.terminal.say(&format!("{}: {}", server.name, error::render(&error).trim_end()));
                Some(End::Failed(error))
            }
            Ok(looked) if looked.is_there(way.to()) => Some(End::There(way.to())),
            Ok(looked) => {
                context.terminal.say(show::looked(&looked, way.options()).trim_end());
                way.refuse(&looked).err().map(|error| {
                    // What stands in the way of a server was just told.
                    if !error.is::<CutoverError>() {
                        context.terminal.say(&format!("{}: {}", server.name, error::render(&error).trim_end()));
                    }
                    End::Failed(error)
                })
            }
        });
    }
    let ready = ends.iter().filter(|end| end.is_none()).count();
    if ready > 0 {
        consent::ask(context, consent, &way.what(&format!("{ready} of {} servers", ends.len()), parallel), "all")
            .await?;
        if let Some(at) = at {
            wait::until(context, "all servers", at).await?;
        }
    }
    let works = plan.servers.iter().zip(ends).enumerate().map(|(index, (server, end))| async move {
        match end {
            Some(end) => (index, end),
            None => (index, one(context, way, plan, server).await),
        }
    });
    // Whoever is done makes room for the next, whatever their order.
    let mut ends: Vec<(usize, End)> = stream::iter(works).buffer_unordered(parallel).collect().await;
    ends.sort_by_key(|(index, _)| *index);
    let ends: Vec<End> = ends.into_iter().map(|(_, end)| end).collect();
    finish(consent, plan, &ends)
}

fn dry_run(way: &impl Way, plan: &Plan, looks: &[anyhow::Result<Looked>]) -> anyhow::Result<Exit> {
    let options = way.options();
    if way.consent().json {
        #[derive(Serialize)]
        #[serde(untagged)]
        enum Look<'a> {
            Looked(Summary<'a>),
            Failed { server: &'a str, ready: bool, error: String },
        }
        let looks = plan.servers.iter().zip(looks).map(|(server, looked)| match looked {
            Ok(looked) => Look::Looked(looked.summary(options)),
            Err(error) => Look::Failed { server: &server.name, ready: false, error: format!("{error:#}") },
        });
        output::json(&looks.collect::<Vec<_>>())?;
    } else {
        let mut text = String::new();
        for (server, looked) in plan.servers.iter().zip(looks) {
            text.push_str(&match looked {
                Ok(looked) if looked.is_there(way.to()) => {
                    format!("{}: runs from {} already\n", server.name, show::side(way.to()))
                }
                Ok(looked) => show::looked(looked, options),
                Err(error) => format!("{}: {}", server.name, error::render(error)),
            });
        }
        output::bytes(text.as_bytes())?;
    }
    let ready = looks.iter().all(|looked| looked.as_ref().is_ok_and(|looked| looked.is_ready(options)));
    Ok(if ready { Exit::Success } else { Exit::Failed })
}

async fn one(context: &Context<'_>, way: &impl Way, plan: &Plan, server: &plan::Server) -> End {
    let work = async {
        if context.cancel.is_cancelled() {
            return Err(Interrupted.into());
        }
        // Those that were looked at an hour ago are opened anew: what was true then need not be now.
        let open = open::open_server(context, plan, server, way.method(server)).await?;
        let report = way.bring(context, &open).await?;
        for remark in &report.remarks {
            context.terminal.say(&format!("{}: {remark}", server.name));
        }
        anyhow::Ok(report)
    };
    match work.await {
        Ok(report) => {
            context.terminal.say(show::ended(&report).trim_end());
            let exit = way.exit(&report);
            End::Report(Box::new(report), exit)
        }
        Err(error) => {
            context.terminal.say(&format!("{}: {}", server.name, error::render(&error).trim_end()));
            End::Failed(error)
        }
    }
}

impl End {
    fn exit(&self) -> Exit {
        match self {
            Self::There(_) => Exit::Success,
            Self::Report(_, exit) => *exit,
            Self::Failed(error) => Exit::of(error),
        }
    }

    fn row(&self, server: &str) -> Row {
        let row = |runs_from: Option<Side>, outage: Option<Duration>, result: String| Row {
            server: server.to_owned(),
            runs_from,
            outage,
            result,
        };
        match self {
            Self::There(side) => row(Some(*side), None, "was there already".to_owned()),
            Self::Report(report, _) => {
                let result = match &report.rolled_back_because {
                    Some(because) => format!("went back: {because}"),
                    None => "done".to_owned(),
                };
                row(Some(report.runs_from), report.outage, result)
            }
            Self::Failed(error) => row(None, None, error.to_string()),
        }
    }

    fn entry<'a>(&'a self, server: &'a str) -> Entry<'a> {
        let (report, error) = match self {
            Self::There(_) => (None, None),
            Self::Report(report, _) => (Some(report.as_ref()), None),
            Self::Failed(error) => (None, Some(format!("{error:#}"))),
        };
        Entry { server, exit_code: self.exit().code(), report, error }
    }
}

fn finish(consent: Consent, plan: &Plan, ends: &[End]) -> anyhow::Result<Exit> {
    let named = || plan.servers.iter().map(|server| server.name.as_str()).zip(ends);
    if consent.json {
        output::json(&named().map(|(server, end)| end.entry(server)).collect::<Vec<_>>())?;
    } else {
        let rows: Vec<Row> = named().map(|(server, end)| end.row(server)).collect();
        output::bytes(show::table(&rows).as_bytes())?;
    }
    Ok(worst(ends.iter().map(End::exit)))
}

/// The exit of many: that of the server that needs a person most.
pub(in crate::cli) fn worst(exits: impl Iterator<Item = Exit>) -> Exit {
    let weight = |exit: &Exit| match exit {
        Exit::Success => 0,
        Exit::NotReady => 1,
        Exit::WentBack => 2,
        Exit::Interrupted => 4,
        Exit::NeedsPerson => 5,
        _ => 3,
    };
    exits.max_by_key(weight).unwrap_or(Exit::Success)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_is_what_needs_a_person_most() {
        let of = |exits: &[Exit]| worst(exits.iter().copied());
        assert_eq!(of(&[]), Exit::Success);
        assert_eq!(of(&[Exit::Success, Exit::WentBack, Exit::NotReady]), Exit::WentBack);
        assert_eq!(of(&[Exit::NeedsPerson, Exit::Interrupted, Exit::Temporary]), Exit::NeedsPerson);
        assert_eq!(of(&[Exit::Success, Exit::Temporary, Exit::WentBack]), Exit::Temporary);
    }

    #[test]
    fn a_server_that_was_there_is_no_failure() {
        assert_eq!(End::There(Side::Target).exit(), Exit::Success);
        let failed = End::Failed(Interrupted.into());
        assert_eq!((failed.exit(), failed.entry("web-1").exit_code), (Exit::Interrupted, 130));
    }
}
