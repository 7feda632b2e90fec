//! What a person reads of a cutover: what stands in its way, how it ended.

use std::time::Duration;

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};

use super::look::{Looked, State};
use crate::cli::values::human_bytes;
use crate::cutover::provider::{Precondition, Side, Verdict};
use crate::cutover::{Options, Readiness, Report};
use crate::observe::human::{human_moment, plain};

/// The side of a server, as people are told of it.
pub(super) fn side(side: Side) -> &'static str {
    match side {
        Side::Source => "its sources",
        Side::Target => "its targets",
    }
}

/// What was looked at, with every verdict, and the outage that is to be expected. Ends with a newline.
pub(in crate::cli) fn looked(looked: &Looked, options: &Options) -> String {
    let mut text = format!("{}: {}\n", looked.server.name, plain(&looked.server.provider.describe()));
    if let (State::Begun, Some(journal)) = (looked.state(), &looked.journal) {
        text.push_str(&format!(
            "  the way to {} was begun at {} and got as far as {}: it is finished, or undone\n",
            side(journal.to),
            human_moment(&journal.begun),
            journal.phase
        ));
    }
    if let Some(readiness) = &looked.readiness {
        text.push_str(&preconditions(&readiness.preconditions));
        text.push_str(&format!("  {}\n", prediction(readiness, options)));
    }
    text
}

/// A line for each: its verdict, what was looked at, what was found.
pub(in crate::cli) fn preconditions(preconditions: &[Precondition]) -> String {
    let width = |texts: &mut dyn Iterator<Item = &str>| texts.map(|text| text.chars().count()).max().unwrap_or(0);
    let what_width = width(&mut preconditions.iter().map(|found| found.what.as_str()));
    let mut text = String::new();
    for Precondition { what, verdict, found } in preconditions {
        let verdict = match verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Error => "error",
        };
        let line = format!("  {verdict:<7}  {:<what_width$}  {}", plain(what), plain(found));
        text.push_str(&format!("{}\n", line.trim_end()));
    }
    text
}

fn prediction(readiness: &Readiness, options: &Options) -> String {
    let carried = readiness.delta_bytes.map(|bytes| format!(", with at most {} to carry over", human_bytes(bytes)));
    let Some(outage) = readiness.predicted_outage else {
        return match readiness.predicted_delta {
            Some(delta) => format!(
                "predicted outage: how long it takes to stop and to start, and {} beside that{}",
                seconds(delta),
                carried.unwrap_or_default()
            ),
            None => "the outage can't be predicted".to_owned(),
        };
    };
    let over = match options.max_outage {
        Some(limit) if outage > limit => format!("; that is over the limit of {}", seconds(limit)),
        _ => String::new(),
    };
    format!("predicted outage: {}{}{over}", seconds(outage), carried.unwrap_or_default())
}

/// `2.41 s`.
fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

/// How it ended, in a line: `web-1 runs from its targets; it stood still for 2.41 s`.
pub(in crate::cli) fn ended(report: &Report) -> String {
    let stood = match report.outage {
        Some(outage) => format!("it stood still for {}", seconds(outage)),
        None if report.rolled_back_because.is_some() => "it never stood still, as far as is known".to_owned(),
        None => "how long it stood still is not known".to_owned(),
    };
    let (server, runs_from) = (&report.server, side(report.runs_from));
    match &report.rolled_back_because {
        Some(because) => format!("{server} went back and runs from {runs_from}; {stood}: {}\n", plain(because)),
        None => format!("{server} runs from {runs_from}; {stood}\n"),
    }
}

/// A server's row in the table of many.
pub(super) struct Row {
    /// The server.
    pub(super) server: String,
    /// Where it runs, if that is known.
    pub(super) runs_from: Option<Side>,
    /// How long it stood still.
    pub(super) outage: Option<Duration>,
    /// How it ended, in a few words.
    pub(super) result: String,
}

/// The table of many servers. Ends with a newline.
pub(super) fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).force_no_tty();
    table.set_header(["SERVER", "RUNS FROM", "OUTAGE", "RESULT"]);
    for Row { server, runs_from, outage, result } in rows {
        let runs_from = runs_from.map_or("-", |runs_from| side(runs_from).trim_start_matches("its "));
        let outage = outage.map_or_else(|| "-".to_owned(), seconds);
        table.add_row([plain(server), runs_from.to_owned(), outage, plain(result)]);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    if let Some(outage) = table.column_mut(2) {
        outage.set_cell_alignment(CellAlignment::Right);
    }
    table.trim_fmt() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cutover::phase::Phase;

    fn report() -> Report {
        Report {
            server: "web-1".into(),
            by: "libvirt domain web-1, warm".into(),
            runs_from: Side::Target,
            ended: Phase::Committed,
            outage: Some(Duration::from_millis(2_414)),
            phases: Vec::new(),
            delta_bytes: 0,
            proved_bytes: 0,
            rolled_back_because: None,
            remarks: Vec::new(),
        }
    }

    #[test]
    fn the_end_is_told_in_a_line() {
        assert_eq!(ended(&report()), "web-1 runs from its targets; it stood still for 2.41 s\n");
        let back = Report {
            runs_from: Side::Source,
            ended: Phase::RolledBack,
            rolled_back_because: Some("domain web-1: it did not\nstop within 5m".into()),
            ..report()
        };
        assert_eq!(
            ended(&back),
            "web-1 went back and runs from its sources; it stood still for 2.41 s: domain web-1: it did not stop within \
             5m\n"
        );
        let unknown = Report { outage: None, ..report() };
        assert_eq!(ended(&unknown), "web-1 runs from its targets; how long it stood still is not known\n");
    }

    #[test]
    fn preconditions_are_aligned_and_stay_on_their_lines() {
        let found = [
            Precondition::new("domain web-1", Verdict::Ok, "it runs from its sources"),
            Precondition::new("rbd:sata/web-1", Verdict::Error, "192.168.7.9 has it open\u{1b}[2J\nas well"),
            Precondition::new("targets", Verdict::Warning, ""),
        ];
        insta::assert_snapshot!(preconditions(&found), @r"
          ok       domain web-1    it runs from its sources
          error    rbd:sata/web-1  192.168.7.9 has it open�[2J as well
          warning  targets
        ");
        let options = Options { max_outage: Some(Duration::from_secs(2)), ..Options::default() };
        let outage = Some(Duration::from_millis(3_100));
        let readiness = Readiness {
            preconditions: Vec::new(),
            predicted_delta: Some(Duration::from_millis(600)),
            predicted_outage: outage,
            delta_bytes: Some(12 << 20),
        };
        let text = "predicted outage: 3.10 s, with at most 12.0 MiB to carry over; that is over the limit of 2.00 s";
        assert_eq!(prediction(&readiness, &options), text);
        let cold = Readiness { predicted_outage: None, ..readiness };
        let text = "predicted outage: how long it takes to stop and to start, and 0.60 s beside that, with at most 12.0 MiB \
                    to carry over";
        assert_eq!(prediction(&cold, &options), text);
    }

    #[test]
    fn many_servers_are_a_table() {
        let row = |server: &str, runs_from, outage: Option<u64>, result: &str| Row {
            server: server.into(),
            runs_from,
            outage: outage.map(Duration::from_millis),
            result: result.into(),
        };
        let rows = [
            row("web-1", Some(Side::Target), Some(2_414), "done"),
            row("database", Some(Side::Source), Some(12_000), "went back: the outage has passed its limit of 10s"),
            row("app", None, None, "not ready: domain app: it is off"),
        ];
        insta::assert_snapshot!(table(&rows), @r"
        SERVER    RUNS FROM   OUTAGE  RESULT
        web-1     targets     2.41 s  done
        database  sources    12.00 s  went back: the outage has passed its limit of 10s
        app       -                -  not ready: domain app: it is off
        ");
    }
}
