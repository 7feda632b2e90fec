//! `[[throttle]]`: what a source pool may be asked for.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::fields::{Report, Section, shown};
use super::values::{parse_window, window_text};
use super::{PoolThrottle, Window, read};
use crate::throttle::Rate;

/// What a limit of latency may be: a disk turns in 8 ms, and nobody waits for a minute.
const LATENCY: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(60);

/// The most windows of one pool.
const WINDOWS_MAX: usize = 48;

/// Reads the throttles.
pub(super) fn read(sections: Vec<Section<'_>>, report: &mut Report<'_>) -> Vec<PoolThrottle> {
    let mut pools: HashMap<String, usize> = HashMap::new();
    sections.into_iter().filter_map(|section| throttle(section, &mut pools, report)).collect()
}

fn throttle(
    mut section: Section<'_>,
    pools: &mut HashMap<String, usize>,
    report: &mut Report<'_>,
) -> Option<PoolThrottle> {
    let span = section.span.clone();
    let pool = section.needed("pool", "\"sata\"", report).and_then(|value| {
        let pool = value.text("sata", report)?.to_owned();
        if pool.contains(['/', '@']) {
            value.wrong(format!("{:?} is no pool", shown(&pool)), "write the name of a pool alone", report);
        } else if let Some(line) = pools.get(&pool) {
            value.wrong(format!("line {line} has limits for this pool"), "join the two throttles", report);
        } else {
            pools.insert(pool.clone(), report.line(value.span.start));
        }
        Some(pool)
    });
    let written = read::rate(&mut section, report);
    let rate = written.resolve(Rate::default());
    let latency = section.value("latency_limit");
    let latency_limit = latency.as_ref().and_then(|value| value.duration(LATENCY, report));
    let given = section.count("windows");
    let windows = windows(&mut section, rate, report);
    if written.is_empty() && latency.is_none() && given == 0 {
        let cure = "set bytes_per_second, operations_per_second, latency_limit or windows, or remove it";
        report.add(&span, "throttle", "it limits nothing", cure);
    }
    section.finish(report);
    Some(PoolThrottle { pool: pool?, rate, windows, latency_limit })
}

fn windows(section: &mut Section<'_>, outside: Rate, report: &mut Report<'_>) -> Vec<Window> {
    let mut found: Vec<Window> = Vec::new();
    for mut part in section.tables("windows", report) {
        let at = part.span.clone();
        let name = part.name_of("during");
        if found.len() == WINDOWS_MAX {
            report.add(&at, &name, format!("there are more than {WINDOWS_MAX} windows"), "join some of them");
            break;
        }
        let during = part.needed("during", "\"22:00-06:00\"", report).and_then(|value| {
            let text = value.text("22:00-06:00", report)?;
            match parse_window(text) {
                Ok(window) => Some((window, value)),
                Err(cure) => {
                    let problem = format!("{:?} is no part of the day", shown(text));
                    value.wrong(problem, cure, report);
                    None
                }
            }
        });
        let rate = read::rate(&mut part, report);
        part.finish(report);
        if rate.is_empty() {
            let cure = "set bytes_per_second or operations_per_second in it, perhaps to \"unlimited\"";
            report.add(&at, &name, "the window changes nothing", cure);
        }
        let Some(((from_minute, until_minute), value)) = during else { continue };
        let window = Window { from_minute, until_minute, rate: rate.resolve(outside) };
        if let Some(other) = found.iter().find(|other| overlap(other, &window)) {
            let other = window_text(other.from_minute, other.until_minute);
            value.wrong(format!("it overlaps the window {other}"), "let one end where the other begins", report);
        }
        found.push(window);
    }
    found
}

/// Whether two windows have a minute in common.
fn overlap(one: &Window, other: &Window) -> bool {
    contains(one, other.from_minute) || contains(other, one.from_minute)
}

fn contains(window: &Window, minute: u16) -> bool {
    let Window { from_minute, until_minute, .. } = *window;
    match from_minute < until_minute {
        true => (from_minute..until_minute).contains(&minute),
        false => minute >= from_minute || minute < until_minute,
    }
}
