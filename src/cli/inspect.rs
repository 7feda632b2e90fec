//! `poolshift inspect`: what is in a stream, and whether it is whole.

use super::config::Inspect;
use super::exit::Exit;
use super::output::{self, Facts};
use super::values::human_bytes;
use super::{Context, Interrupted, streams};
use crate::delta::stream::{DiffHeader, DiffVersion};
use crate::wire::{DiffSummary, ExportedImage, Inspection, inspect};

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Inspect) -> anyhow::Result<Exit> {
    let input = streams::input(&settings.input)?;
    let found = tokio::select! {
        found = inspect(input) => found?,
        () = context.cancel.cancelled() => return Err(Interrupted.into()),
    };
    if settings.json {
        output::json(&found)?
    } else {
        facts(&found).print()?
    }
    Ok(Exit::Success)
}

fn facts(found: &Inspection) -> Facts {
    let mut facts = Facts::default();
    match found {
        Inspection::Batches { hello, totals, payload_bytes, checksums_verified } => {
            facts.add("format", "poolshift batch stream");
            facts.add("source", format!("{}, which is {}", hello.location, hello.source));
            facts.add("from", hello.from.as_ref().map_or_else(|| "nothing".to_owned(), ToString::to_string));
            facts.add("to", &hello.to);
            facts.add("size", human_bytes(hello.to.size));
            facts.add("written by", &hello.tool);
            facts.add("data", human_bytes(totals.data_bytes)).add("zeroes", human_bytes(totals.zero_bytes));
            facts.add("payload", format!("{} ({})", human_bytes(*payload_bytes), hello.compression));
            facts.add("checked", format!("{checksums_verified} checksums, and the digest of the whole"));
        }
        Inspection::Diff { diff, stream_bytes } => {
            facts.add("format", name_of(&diff.header));
            add_diff(&mut facts, diff);
            facts.add("length", human_bytes(*stream_bytes));
        }
        Inspection::Export { image, diffs, stream_bytes } => {
            facts.add("format", "rbd export, version 2");
            if let Some(image) = image {
                add_image(&mut facts, image);
            }
            for diff in diffs {
                add_diff(&mut facts, diff);
            }
            facts.add("length", human_bytes(*stream_bytes));
        }
    }
    facts
}

fn name_of(header: &DiffHeader) -> &'static str {
    match header.version {
        DiffVersion::V1 => "rbd diff, version 1",
        DiffVersion::V2 => "rbd diff, version 2",
    }
}

fn add_image(facts: &mut Facts, image: &ExportedImage) {
    if let Some(object_size) = image.object_size {
        facts.add("object size", human_bytes(object_size));
    }
    if let (Some(unit), Some(count)) = (image.stripe_unit, image.stripe_count) {
        facts.add("stripes", format!("{count} of {}", human_bytes(unit)));
    }
}

fn add_diff(facts: &mut Facts, diff: &DiffSummary) {
    facts.add("from", diff.header.from.as_deref().unwrap_or("nothing"));
    facts.add("to", diff.header.to.as_deref().unwrap_or("HEAD"));
    facts.add("size", human_bytes(diff.header.size));
    facts.add("data", format!("{} in {} ranges", human_bytes(diff.data_bytes), diff.data_ranges));
    facts.add("zeroes", format!("{} in {} ranges", human_bytes(diff.zero_bytes), diff.zero_ranges));
    if !diff.ascending {
        facts.add("order", "not ascending: can't be merged");
    }
}
