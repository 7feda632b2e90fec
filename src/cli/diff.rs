//! `poolshift diff`: the extents between two points of an image.

use std::io::Write as _;

use futures::TryStreamExt as _;
use serde::Serialize;

use super::config::Diff;
use super::exit::Exit;
use super::{Context, Interrupted, images, output};
use crate::delta::{self, Plan};
use crate::extent::{ByteRange, Extent, ExtentKind};
use crate::replicate::{self, HeadWatch};

/// An extent as `rbd diff --format json` writes it; `exists` is a text there.
#[derive(Serialize)]
struct Row {
    offset: u64,
    length: u64,
    exists: &'static str,
    /// Not in rbd's rows: false where a writer of HEAD has been noticed by the time of the row.
    #[serde(skip_serializing_if = "Option::is_none")]
    consistent: Option<bool>,
}

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Diff) -> anyhow::Result<Exit> {
    let source = images::source(context, &settings.source).await?.image();
    for remark in source.remarks() {
        tracing::info!("{remark}");
    }
    let since = match &settings.from {
        Some(name) => Some(replicate::find(source.as_ref(), name.as_str()).await?),
        None => None,
    };
    let mut watch = HeadWatch::begin(source.as_ref(), settings.source.snapshot()).await?;
    if let Some(warning) = watch.warning() {
        tracing::warn!("{warning}");
    }
    let (view, _) = replicate::open_point(source.as_ref(), settings.source.snapshot()).await?;
    let plan = if settings.exact {
        Plan::exact(since.as_ref(), view.size(), "--exact was given", None)
    } else {
        delta::plan(view.as_ref(), since.as_ref()).await?
    };
    explain(settings, &plan);
    let mut extents = delta::extents(view, &plan, source.layout(), 0);
    let mut list = List::new(settings.json);
    list.consistent = watch.is_consistent();
    loop {
        let window = tokio::select! {
            window = extents.try_next() => window?,
            () = context.cancel.cancelled() => return Err(Interrupted.into()),
        };
        match window {
            Some(window) => window.into_iter().try_for_each(|extent| list.add(extent))?,
            None => break,
        }
    }
    let late = watch.end(source.as_ref()).await?;
    list.consistent = watch.is_consistent();
    list.end()?;
    if let Some(warning) = watch.warning().filter(|_| late) {
        tracing::warn!("{warning}");
    }
    Ok(Exit::Success)
}

/// On standard error, because standard output is the list and nothing else.
fn explain(settings: &Diff, plan: &Plan) {
    if settings.explain {
        eprintln!("delta: {}", plan.method);
        eprintln!("looked at: {} bytes of {} in {} runs", plan.covered(), plan.size, plan.runs.len());
    } else if let (delta::Method::Exact { .. }, false) = (&plan.method, settings.exact) {
        tracing::warn!("{}", plan.method);
    }
}

/// Writes extents as they come, neighbours of one kind as one: no list of all of them is ever held.
struct List {
    json: bool,
    buffer: Vec<u8>,
    rows: u64,
    pending: Option<Extent>,
    consistent: bool,
}

impl List {
    /// How much is written at a time, in bytes.
    const WRITE: usize = 64 << 10;

    fn new(json: bool) -> Self {
        let buffer =
            if json { b"[".to_vec() } else { format!("{:<15} {:<15} Type\n", "Offset", "Length").into_bytes() };
        Self { json, buffer, rows: 0, pending: None, consistent: true }
    }

    fn add(&mut self, extent: Extent) -> anyhow::Result<()> {
        match &mut self.pending {
            Some(last) if last.kind == extent.kind && last.range.end() == extent.range.offset() => {
                last.range = ByteRange::new(last.range.offset(), last.range.length() + extent.range.length())?;
                Ok(())
            }
            _ => match self.pending.replace(extent) {
                Some(last) => self.write(last),
                None => Ok(()),
            },
        }
    }

    fn write(&mut self, extent: Extent) -> anyhow::Result<()> {
        let (offset, length, data) = (extent.range.offset(), extent.range.length(), extent.kind == ExtentKind::Data);
        if self.json {
            self.buffer.extend_from_slice(if self.rows == 0 { b"\n  " } else { b",\n  " });
            let exists = if data { "true" } else { "false" };
            let row = Row { offset, length, exists, consistent: (!self.consistent).then_some(false) };
            serde_json::to_writer(&mut self.buffer, &row)?;
        } else {
            writeln!(self.buffer, "{offset:<15} {length:<15} {}", if data { "data" } else { "zero" })?;
        }
        self.rows += 1;
        if self.buffer.len() >= Self::WRITE {
            output::bytes(&self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }

    fn end(mut self) -> anyhow::Result<()> {
        if let Some(last) = self.pending.take() {
            self.write(last)?;
        }
        if self.json {
            self.buffer.extend_from_slice(if self.rows == 0 { b"]\n" } else { b"\n]\n" });
        }
        Ok(output::bytes(&self.buffer)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(json: bool, consistent: bool, extents: &[(u64, u64, ExtentKind)]) -> String {
        let mut list = List::new(json);
        list.consistent = consistent;
        for &(offset, length, kind) in extents {
            list.add(Extent { range: ByteRange::new(offset, length).unwrap(), kind }).unwrap();
        }
        if let Some(last) = list.pending.take() {
            list.write(last).unwrap();
        }
        String::from_utf8(list.buffer).unwrap()
    }

    #[test]
    fn neighbours_of_one_kind_are_one_row() {
        use ExtentKind::{Data, Zero};
        let extents = [(0, 4096, Data), (4096, 4096, Data), (8192, 10, Zero), (9000, 10, Zero)];
        insta::assert_snapshot!(listed(false, true, &extents), @r"
        Offset          Length          Type
        0               8192            data
        8192            10              zero
        9000            10              zero
        ");
        insta::assert_snapshot!(listed(true, true, &extents), @r#"
        [
          {"offset":0,"length":8192,"exists":"true"},
          {"offset":8192,"length":10,"exists":"false"},
          {"offset":9000,"length":10,"exists":"false"}
        "#);
    }

    #[test]
    fn a_row_of_a_head_that_is_written_says_so() {
        insta::assert_snapshot!(listed(true, false, &[(0, 10, ExtentKind::Data)]), @r#"
        [
          {"offset":0,"length":10,"exists":"true","consistent":false}
        "#);
    }
}
