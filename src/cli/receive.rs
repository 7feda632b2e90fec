//! `poolshift receive`: applies a batch stream from standard input.

use std::sync::Arc;

use super::config::{Receive, Stream};
use super::exit::Exit;
use super::images::{self, Model};
use super::output::{self, Facts};
use super::values::human_bytes;
use super::{Context, Interrupted, progress, streams};
use crate::image::TargetImage;
use crate::pipeline::Limits;
use crate::replicate::{self, Progress, ReceiveOptions, ReceiveReport};
use crate::wire::{Hello, StreamReader};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Receive) -> anyhow::Result<Exit> {
    let input = streams::input(&Stream::Standard)?;
    let stream = tokio::select! {
        stream = StreamReader::open(input) => stream?,
        () = context.cancel.cancelled() => return Err(Interrupted.into()),
    };
    let target = open_or_create(context, settings, stream.hello()).await?;
    for remark in target.remarks() {
        tracing::warn!("{remark}");
    }
    let limits = Limits { bytes: settings.memory, ..Limits::default() };
    let options = ReceiveOptions { keep: settings.keep as usize, limits };
    let shown = Progress::default();
    let work = replicate::receive(target, stream, &options, &shown, &context.cancel);
    let report = progress::shown(context, "receive", &shown, work).await?;
    if settings.json {
        output::json(&report)?
    } else {
        facts(&report).print()?
    }
    Ok(Exit::Success)
}

/// Only a stream from nothing has all that a new image needs.
async fn open_or_create(
    context: &Context<'_>,
    settings: &Receive,
    hello: &Hello,
) -> anyhow::Result<Arc<dyn TargetImage>> {
    let state_dir = settings.state_dir.as_deref();
    if hello.from.is_some() {
        return Ok(images::existing_target(context, &settings.target, state_dir).await?);
    }
    match images::target(context, &settings.target, state_dir).await? {
        Some(target) => Ok(target),
        None => {
            let model = Model { size: hello.to.size, layout: hello.layout, features: None };
            images::create(context, &settings.target, model, &settings.create).await
        }
    }
}

fn facts(report: &ReceiveReport) -> Facts {
    let mut facts = Facts::default();
    let note = if report.already_there { " (was there already)" } else { "" };
    facts.add("snapshot", format!("{}{note}", report.snapshot));
    facts.add("from", &report.source);
    facts.add("base", report.base.as_deref().unwrap_or("none"));
    if report.rewound {
        facts.add("before that", "the target's HEAD was brought back to the base");
    }
    if let Some(totals) = &report.totals {
        facts.add("data", human_bytes(totals.data_bytes)).add("zeroes", human_bytes(totals.zero_bytes));
    }
    facts.add("written", human_bytes(report.moved.bytes_written));
    for left in &report.pruned.left {
        facts.add("not removed", left);
    }
    facts
}
