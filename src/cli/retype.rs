//! `poolshift retype`: Cinder itself moves volumes that nobody has. One that fails does not stop the others.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use futures::stream::{self, StreamExt as _};
use serde::Serialize;

use super::config::{Retype as Settings, UsageError};
use super::cutover::{consent, find_retyped, show, worst};
use super::exit::Exit;
use super::fleet::{self, PlanImages};
use super::terminal::{Terminal, drawing};
use super::{Context, Interrupted, daemon, error, images, output};
use crate::cutover::provider::Side;
use crate::cutover::provider::openstack::Connectors;
use crate::cutover::provider::openstack::retype::{Copying, Retype, RetypeLook, RetypeReport, RetypeState};
use crate::cutover::{CutoverError, Observer};
use crate::observe::human::{human_seconds, plain};
use crate::plan::{Cutover, Plan, Server};

/// How many volumes are looked at at a time.
const LOOKS_AT_A_TIME: usize = 8;

/// A volume of a server of the plan.
struct Job {
    retype: std::sync::Arc<Retype>,
    index: usize,
    server: String,
    volume: String,
    cinder: String,
}

/// What becomes of a volume.
enum End {
    /// It had its type already.
    There,
    /// It has it now.
    Report(Box<RetypeReport>),
    /// It failed, or was not begun.
    Failed(anyhow::Error),
}

/// What stands in the JSON for a volume.
#[derive(Serialize)]
struct Entry<'a> {
    server: &'a str,
    volume: &'a str,
    cinder: &'a str,
    exit_code: u8,
    report: Option<&'a RetypeReport>,
    error: Option<String>,
}

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Settings) -> anyhow::Result<Exit> {
    let plan = daemon::load(&settings.plan).await?;
    let servers = chosen(context, settings, &plan)?;
    let plan_images = PlanImages::new(context, &plan);
    let context = &plan_images.context();
    let jobs = jobs(context, &servers).await?;
    let bar = context.terminal.progress("looking at the volumes");
    let looks = jobs.iter().map(|job| async move { Ok(job.retype.look(job.index, settings.options).await?) });
    let looks = stream::iter(looks).buffered(LOOKS_AT_A_TIME).collect::<Vec<anyhow::Result<RetypeLook>>>();
    let looks = tokio::select! {
        looks = looks => looks,
        () = context.cancel.cancelled() => return Err(Interrupted.into()),
    };
    drop(bar);
    if settings.consent.dry_run {
        return dry_run(settings, &jobs, &looks);
    }
    let ends: Vec<Option<End>> = jobs.iter().zip(looks).map(|(job, look)| begun(context, job, look)).collect();
    let ready = ends.iter().filter(|end| end.is_none()).count();
    if ready > 0 {
        let back = if settings.options.to == Side::Source { " back" } else { "" };
        let what = format!(
            "Cinder moves {ready} of {} volumes{back} to their other pool, {} at a time; nobody can use them meanwhile",
            ends.len(),
            settings.parallel
        );
        let word = if let [server] = &servers[..] { server.name.as_str() } else { "all" };
        consent::ask(context, settings.consent, &what, word).await?;
    }
    let works = jobs.iter().zip(ends).enumerate().map(|(index, (job, end))| async move {
        match end {
            Some(end) => (index, end),
            None => (index, one(context, settings, job).await),
        }
    });
    // Whoever is done makes room for the next, whatever their order.
    let mut ends: Vec<(usize, End)> = stream::iter(works).buffer_unordered(settings.parallel).collect().await;
    ends.sort_by_key(|(index, _)| *index);
    finish(settings, &jobs, ends.into_iter().map(|(_, end)| end).collect())
}

/// The servers that are meant.
fn chosen<'p>(context: &Context<'_>, settings: &Settings, plan: &'p Plan) -> anyhow::Result<Vec<&'p Server>> {
    let Some(names) = &settings.servers else {
        let (ours, others): (Vec<&Server>, Vec<&Server>) =
            plan.servers.iter().partition(|server| server.is_left_to_cinder());
        if ours.is_empty() {
            let text = format!("{}: no server has the strategy retype", plan.path.display());
            return Err(UsageError(text).into());
        }
        if !others.is_empty() {
            let names = fleet::listed(others.iter().map(|server| server.name.as_str()));
            context.terminal.say(&format!("passed over, as they have another strategy: {names}"));
        }
        return Ok(ours);
    };
    let mut seen = HashSet::new();
    let names = names.iter().filter(|name| seen.insert(name.as_str()));
    Ok(names.map(|name| find_retyped(plan, name)).collect::<Result<_, _>>()?)
}

async fn jobs(context: &Context<'_>, servers: &[&Server]) -> anyhow::Result<Vec<Job>> {
    let connectors = Connectors {
        source: images::connect(context, &context.config.source_ceph).await?,
        target: images::connect(context, &context.config.target_ceph).await?,
    };
    if connectors.source.fsid() != connectors.target.fsid() {
        let text = "source and target of the plan are two clusters, between which Cinder moves no image";
        return Err(UsageError(text.into()).into());
    }
    let mut jobs = Vec::new();
    for server in servers {
        let Cutover::OpenStack(config) = &server.cutover else { continue };
        let retype = std::sync::Arc::new(Retype::new(server, config.clone(), &connectors));
        for (index, (volume, cinder)) in retype.volumes().enumerate() {
            let (server, volume, cinder) = (server.name.clone(), volume.to_owned(), cinder.to_owned());
            jobs.push(Job { retype: std::sync::Arc::clone(&retype), index, server, volume, cinder });
        }
    }
    Ok(jobs)
}

/// Says what was found of a volume; what it ends with before it has begun.
fn begun(context: &Context<'_>, job: &Job, look: anyhow::Result<RetypeLook>) -> Option<End> {
    match look {
        Err(error) => {
            context.terminal.say(&format!("{}: {}", job.volume, error::render(&error).trim_end()));
            Some(End::Failed(error))
        }
        Ok(look) if look.state == RetypeState::There => Some(End::There),
        Ok(look) => {
            context.terminal.say(shown(&look).trim_end());
            (!look.is_ready()).then(|| End::Failed(unready(&look).into()))
        }
    }
}

fn unready(look: &RetypeLook) -> CutoverError {
    let wrong = look.preconditions.iter().filter(|found| found.verdict == crate::cutover::provider::Verdict::Error);
    CutoverError::NotRetyped {
        volume: look.volume.clone(),
        obstacles: wrong.map(|found| found.found.clone()).collect(),
    }
}

/// What was found of a volume. Ends with a newline.
fn shown(look: &RetypeLook) -> String {
    let (volume, now, to) = (plain(&look.volume), plain(&look.from_type), plain(&look.to_type));
    let mut text = match look.state {
        RetypeState::There => return format!("{volume}: has type {to} already\n"),
        RetypeState::Begun => format!("{volume}: a way to type {to} was begun, and is finished\n"),
        RetypeState::ToGo => format!("{volume}: from type {now} to {to}, by Cinder itself\n"),
    };
    text.push_str(&show::preconditions(&look.preconditions));
    for clone in &look.to_flatten {
        text.push_str(&format!("  clone {} is cut loose\n", plain(clone)));
    }
    for snapshot in &look.to_remove {
        text.push_str(&format!("  snapshot {} goes with its clone\n", plain(snapshot)));
    }
    text
}

fn dry_run(settings: &Settings, jobs: &[Job], looks: &[anyhow::Result<RetypeLook>]) -> anyhow::Result<Exit> {
    if settings.consent.json {
        #[derive(Serialize)]
        #[serde(untagged)]
        enum Look<'a> {
            Looked {
                ready: bool,
                #[serde(flatten)]
                look: &'a RetypeLook,
            },
            Failed {
                ready: bool,
                server: &'a str,
                volume: &'a str,
                error: String,
            },
        }
        let looks = jobs.iter().zip(looks).map(|(job, look)| match look {
            Ok(look) => Look::Looked { ready: look.is_ready(), look },
            Err(error) => {
                let (server, volume, error) = (job.server.as_str(), job.volume.as_str(), format!("{error:#}"));
                Look::Failed { ready: false, server, volume, error }
            }
        });
        output::json(&looks.collect::<Vec<_>>())?;
    } else {
        let text: String = jobs
            .iter()
            .zip(looks)
            .map(|(job, look)| match look {
                Ok(look) => shown(look),
                Err(error) => format!("{}: {}", job.volume, error::render(error)),
            })
            .collect();
        output::bytes(text.as_bytes())?;
    }
    let ready = looks.iter().all(|look| look.as_ref().is_ok_and(RetypeLook::is_ready));
    Ok(if ready { Exit::Success } else { Exit::Failed })
}

struct Notes {
    terminal: Terminal,
}

impl Observer for Notes {
    fn note(&self, text: &str) {
        self.terminal.say(&plain(text));
    }
}

async fn one(context: &Context<'_>, settings: &Settings, job: &Job) -> End {
    let (copying, notes) = (Copying::default(), Notes { terminal: context.terminal.clone() });
    let begun = std::time::Instant::now();
    let ended = if context.cancel.is_cancelled() {
        Err(anyhow::Error::from(Interrupted))
    } else {
        let bar = context.terminal.progress(&job.volume);
        let draw = || {
            let done = copying.done.load(Ordering::Relaxed);
            match copying.total.load(Ordering::Relaxed) {
                0 => bar.say(format!("{}: {}", job.volume, human_seconds(begun.elapsed().as_secs_f64()))),
                total => bar.set(done.min(total), total),
            }
        };
        let work = job.retype.carry_out(job.index, settings.options, (&notes, &copying), &context.cancel);
        // What Cinder has begun it goes on with: the next run sees it through.
        tokio::select! {
            ended = drawing(work, draw) => ended.map_err(anyhow::Error::from),
            () = context.cancel.cancelled() => Err(Interrupted.into()),
        }
    };
    match ended {
        Ok(report) => {
            for remark in &report.remarks {
                context.terminal.say(&format!("{}: {}", job.volume, plain(remark)));
            }
            let end = End::Report(Box::new(report));
            context.terminal.say(&format!("{}: {}", job.volume, end.result()));
            end
        }
        Err(error) => {
            context.terminal.say(&format!("{}: {}", job.volume, error::render(&error).trim_end()));
            End::Failed(error)
        }
    }
}

impl End {
    fn exit(&self) -> Exit {
        match self {
            Self::Report(report) if report.verified == Some(false) => Exit::Different,
            Self::There | Self::Report(_) => Exit::Success,
            Self::Failed(error) => Exit::of(error),
        }
    }

    /// In a few words.
    fn result(&self) -> String {
        match self {
            Self::There => "was there already".to_owned(),
            Self::Report(report) => match report.verified {
                None => "done".to_owned(),
                Some(true) => "done; it holds what it held".to_owned(),
                Some(false) => "DIFFERENT: it does not hold what it held before; restore it from a backup, unless \
                                somebody has written to it meanwhile"
                    .to_owned(),
            },
            Self::Failed(error) => error.to_string(),
        }
    }

    fn entry<'a>(&'a self, job: &'a Job) -> Entry<'a> {
        let (report, error) = match self {
            Self::There => (None, None),
            Self::Report(report) => (Some(report.as_ref()), None),
            Self::Failed(error) => (None, Some(format!("{error:#}"))),
        };
        let Job { server, volume, cinder, .. } = job;
        Entry { server, volume, cinder, exit_code: self.exit().code(), report, error }
    }

    fn row(&self, job: &Job) -> [String; 4] {
        let time = match self {
            Self::Report(report) => human_seconds(report.seconds),
            Self::There | Self::Failed(_) => "-".to_owned(),
        };
        [plain(&job.server), plain(&job.volume), time, plain(&self.result())]
    }
}

fn finish(settings: &Settings, jobs: &[Job], ends: Vec<End>) -> anyhow::Result<Exit> {
    if settings.consent.json {
        output::json(&jobs.iter().zip(&ends).map(|(job, end)| end.entry(job)).collect::<Vec<_>>())?;
    } else {
        let mut table = Table::new();
        table.load_style(NOTHING).force_no_tty();
        table.set_header(["SERVER", "VOLUME", "TIME", "RESULT"]);
        for (job, end) in jobs.iter().zip(&ends) {
            table.add_row(end.row(job));
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        output::bytes((table.trim_fmt() + "\n").as_bytes())?;
    }
    Ok(worst(ends.iter().map(End::exit)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cutover::provider::{Precondition, Verdict};

    fn look(state: RetypeState, preconditions: Vec<Precondition>) -> RetypeLook {
        RetypeLook {
            server: "web-1".into(),
            volume: "web-1-data".into(),
            cinder: "3f".into(),
            from_type: "sata".into(),
            to_type: "sas".into(),
            size_gib: 2,
            state,
            preconditions,
            to_flatten: vec!["rbd:sata/c".into()],
            to_remove: vec!["volume-c.clone_snap".into()],
        }
    }

    #[test]
    fn what_was_found_is_said_in_lines() {
        let found = |verdict, text: &str| Precondition::new("volume 3f", verdict, text);
        let ready = look(RetypeState::ToGo, vec![found(Verdict::Ok, "2 GiB of type \"sata\", on to \"sas\"")]);
        assert!(ready.is_ready());
        insta::assert_snapshot!(shown(&ready), @r#"
        web-1-data: from type sata to sas, by Cinder itself
          ok       volume 3f  2 GiB of type "sata", on to "sas"
          clone rbd:sata/c is cut loose
          snapshot volume-c.clone_snap goes with its clone
        "#);
        let wrong = look(RetypeState::ToGo, vec![found(Verdict::Error, "it is in a group: take it out")]);
        assert!(!wrong.is_ready());
        assert_eq!(
            unready(&wrong).to_string(),
            "volume web-1-data can't be retyped now: it is in a group: take it out"
        );
        assert_eq!(Exit::of(&unready(&wrong).into()), Exit::NotReady);
        assert_eq!(shown(&look(RetypeState::There, vec![])), "web-1-data: has type sas already\n");
    }

    #[test]
    fn a_copy_that_differs_has_its_exit() {
        let report = |verified| RetypeReport {
            from_type: "sata".into(),
            to_type: "sas".into(),
            seconds: 1.0,
            flattened: Vec::new(),
            removed_snapshots: Vec::new(),
            verified,
            remarks: Vec::new(),
        };
        let exit = |verified| End::Report(Box::new(report(verified))).exit();
        assert_eq!([exit(None), exit(Some(true)), exit(Some(false))], [Exit::Success, Exit::Success, Exit::Different]);
        assert_eq!(End::There.exit(), Exit::Success);
    }
}
