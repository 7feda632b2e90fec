//! The report for people: a table of the volumes, then what concerns many of them.

use std::fmt::Write as _;

use comfy_table::{ContentArrangement, Table, presets};

use super::{Finding, PoolRate, Report, Verdict, VolumeReport};
use crate::cli::values::human_bytes;
use crate::plan::values::duration_text;

/// The report, at most `width` characters wide; `None`: as wide as the terminal.
pub(super) fn text(report: &Report, width: Option<u16>) -> String {
    let mut volumes = table(width, ["volume", "source and target", "first copy", "verdict"]);
    for volume in &report.volumes {
        volumes.add_row([
            plain(&name(volume)),
            plain(&format!("{}\n→ {}", volume.source, volume.target)),
            first_copy(volume),
            verdict(volume.verdict, &volume.findings),
        ]);
    }
    let mut text = format!("{volumes}\n");
    if !report.pools.is_empty() {
        let mut pools = table(width, ["pool", "verdict"]);
        for pool in &report.pools {
            pools.add_row([plain(&pool.pool), verdict(pool.verdict, &pool.findings)]);
        }
        let _ = write!(text, "\n{pools}\n");
    }
    text.push('\n');
    for rate in &report.rates {
        text.push_str(&plain(&line(rate)));
        text.push('\n');
    }
    let count = |number: usize, what: &str| match number {
        1 => format!("1 {what}"),
        _ => format!("{number} {what}s"),
    };
    let (volumes, errors) = (count(report.volumes.len(), "volume"), count(report.errors, "error"));
    let _ = writeln!(text, "{volumes}: {errors}, {}", count(report.warnings, "warning"));
    // Cells are padded to the width of their column.
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn table<const N: usize>(width: Option<u16>, header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    if let Some(width) = width {
        table.force_no_tty().set_width(width);
    }
    table.set_header(header);
    table
}

fn name(volume: &VolumeReport) -> String {
    if volume.server == volume.name { volume.name.clone() } else { format!("{}/{}", volume.server, volume.name) }
}

fn first_copy(volume: &VolumeReport) -> String {
    let looked = &volume.looked;
    let state = looked.target_state.unwrap_or("not known");
    if looked.first_copy_bytes == 0 {
        return match looked.target_state {
            Some("absent" | "empty") => "nothing is allocated".into(),
            _ => format!("target {state}"),
        };
    }
    let time = volume.first_copy_seconds.map_or_else(String::new, |seconds| format!("\n{}", about(seconds)));
    format!("≤ {}{time}", human_bytes(looked.first_copy_bytes))
}

fn verdict(verdict: Verdict, findings: &[Finding]) -> String {
    let mut lines = Vec::new();
    let mut sorted: Vec<&Finding> = findings.iter().collect();
    sorted.sort_by_key(|finding| std::cmp::Reverse(finding.verdict));
    for finding in sorted {
        lines.push(match finding.verdict {
            Verdict::Error => format!("error: {}", plain(&finding.text)),
            Verdict::Warning => format!("warning: {}", plain(&finding.text)),
            Verdict::Ok => plain(&finding.text),
        });
    }
    if verdict == Verdict::Ok {
        lines.insert(0, "ok".into());
    }
    lines.join("\n")
}

fn line(rate: &PoolRate) -> String {
    let place = rate.pool.as_ref().map_or_else(|| "files".to_owned(), |pool| format!("pool {pool}"));
    if rate.first_copy_bytes == 0 {
        return format!("{place}: nothing to copy for the first time");
    }
    let per_second = |bytes: u64| format!("{}/s", human_bytes(bytes));
    let how = match (rate.measured, rate.allowed) {
        (Some(measured), Some(allowed)) => {
            format!("a sample was read at {}, {} are allowed", per_second(measured), per_second(allowed))
        }
        (Some(measured), None) => format!("a sample was read at {}, caches included", per_second(measured)),
        (None, Some(allowed)) => format!("{} are allowed, nothing was measured", per_second(allowed)),
        (None, None) => "how long they take is not known: nothing was measured, and there is no throttle".into(),
    };
    let time = rate.seconds.map_or_else(String::new, |seconds| format!(" in {}", about(seconds)));
    format!("{place}: first copies of at most {}{time}; {how}", human_bytes(rate.first_copy_bytes))
}

/// A number of seconds, in its two largest units.
fn about(seconds: u64) -> String {
    let rounded = match seconds {
        0..3_600 => seconds,
        3_600..86_400 => seconds / 60 * 60,
        _ => seconds / 3_600 * 3_600,
    };
    format!("about {}", duration_text(std::time::Duration::from_secs(rounded.max(1))))
}

/// Names may come from anywhere: nothing in them may move the cursor.
fn plain(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n', "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::super::{Looked, PoolReport};
    use super::*;

    fn volume(name: &str, verdict: Verdict, findings: Vec<Finding>, looked: Looked) -> VolumeReport {
        VolumeReport {
            server: "web-1".into(),
            name: name.into(),
            source: format!("rbd:sata/{name}"),
            target: format!("rbd:sas/{name}"),
            verdict,
            findings,
            first_copy_seconds: Some(looked.first_copy_bytes / (50 << 20)).filter(|&seconds| seconds > 0),
            looked,
        }
    }

    #[test]
    fn a_report_says_what_is_wrong_and_what_to_do() {
        let absent = Looked { target_state: Some("absent"), first_copy_bytes: 40 << 30, ..Looked::default() };
        let behind = Looked { target_state: Some("behind"), ..Looked::default() };
        let missing = "rbd:sata/data: cannot open the image: sata has no image \"data\"; list the images: rbd ls sata";
        let slow = "sata/root\u{1b}[31m has no object map with fast-diff: enable it: rbd feature enable sata/root";
        let report = Report {
            plan: "plan.toml".into(),
            verdict: Verdict::Error,
            errors: 1,
            warnings: 1,
            volumes: vec![
                volume("web-1", Verdict::Ok, vec![Finding::new(Verdict::Ok, "in use by client.7")], absent),
                volume("root", Verdict::Warning, vec![Finding::new(Verdict::Warning, slow)], behind),
                volume("data", Verdict::Error, vec![Finding::new(Verdict::Error, missing)], Looked::default()),
            ],
            pools: vec![PoolReport {
                pool: "target sas".into(),
                verdict: Verdict::Ok,
                findings: vec![Finding::new(Verdict::Ok, "the first copies need at most 40 GiB")],
            }],
            rates: vec![PoolRate {
                pool: Some("sata".into()),
                first_copy_bytes: 40 << 30,
                measured: Some(120 << 20),
                allowed: Some(50 << 20),
                seconds: Some(820),
            }],
        };
        let settings = [("check-report", Some(120)), ("check-report-narrow", Some(70))];
        for (name, width) in settings {
            insta::with_settings!({snapshot_path => "golden", prepend_module_to_snapshot => false, omit_expression => true},
                { insta::assert_snapshot!(name, text(&report, width)) });
        }
    }

    #[test]
    fn times_are_told_roughly() {
        let told = [0, 59, 61, 3_601, 7_300, 90_061].map(about);
        assert_eq!(told, ["about 1s", "about 59s", "about 1m1s", "about 1h", "about 2h1m", "about 1d1h"]);
    }
}
