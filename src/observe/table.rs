//! A status as a person reads it: a summary, a table, and what went wrong in full sentences.

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, Color, Table};

use super::human::{human_bytes, human_moment, human_rate, human_seconds, plain};
use crate::fleet::status::{
    Activity, Convergence, CycleStatus, ErrorStatus, FleetStatus, Origin, ServerStatus, ThrottleStatus, VolumeStatus,
};

/// How a table is to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// The characters that fit in a line.
    pub width: usize,
    /// Whether to colour.
    pub colour: bool,
    /// Whether to show every volume, not only those of servers that are not in step.
    pub volumes: bool,
}

/// Where a server stands, in one word for the summary and one colour for all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    InStep,
    Lagging,
    FirstCopy,
    Failing,
    Held,
    Paused,
    Unknown,
}

/// Every standing in the order of the summary.
const STANDINGS: [(Standing, &str, Option<Color>); 7] = [
    (Standing::InStep, "in step", Some(Color::Green)),
    (Standing::Lagging, "lagging", Some(Color::Yellow)),
    (Standing::FirstCopy, "not copied yet", Some(Color::Cyan)),
    (Standing::Failing, "failing", Some(Color::Red)),
    (Standing::Held, "held", Some(Color::Red)),
    (Standing::Paused, "paused", Some(Color::Yellow)),
    (Standing::Unknown, "not known yet", None),
];

impl Standing {
    fn of(server: &ServerStatus) -> Self {
        match server.activity {
            Activity::Held => Self::Held,
            Activity::BackingOff => Self::Failing,
            Activity::Paused => Self::Paused,
            Activity::NeverSynced | Activity::FirstSync => Self::FirstCopy,
            Activity::Unknown | Activity::Syncing | Activity::Waiting | Activity::Elsewhere => match server.lag_seconds
            {
                None => Self::Unknown,
                Some(lag) if lag > server.target_lag_seconds => Self::Lagging,
                Some(_) => Self::InStep,
            },
        }
    }

    fn colour(self) -> Option<Color> {
        STANDINGS.iter().find(|(standing, ..)| *standing == self).and_then(|(.., colour)| *colour)
    }
}

/// Draws a status, for a width in characters. Every line ends with a newline.
pub fn fleet_table(status: &FleetStatus, look: Look) -> String {
    let mut text = String::new();
    for line in summary(status) {
        text.push_str(&wrapped(&line, look.width));
    }
    if !status.servers.is_empty() {
        text.push('\n');
        let rows = rows(status, look);
        // The last column but three is what one can do without.
        let drawn = [&[][..], &[RATE], &[RATE, MOVING]].into_iter().find_map(|hidden| table(&rows, hidden, look));
        text.push_str(&drawn.unwrap_or_else(|| list(&rows, look)));
    }
    let remarks: Vec<String> = status.servers.iter().flat_map(remarks).collect();
    if !remarks.is_empty() {
        text.push('\n');
    }
    for remark in remarks {
        text.push_str(&wrapped(&remark, look.width));
    }
    text
}

/// `1 volume`, `2 volumes`.
fn count(number: impl Into<u64>, what: &str) -> String {
    match number.into() {
        1 => format!("1 {what}"),
        number => format!("{number} {what}s"),
    }
}

fn summary(status: &FleetStatus) -> Vec<String> {
    let standings: Vec<Standing> = status.servers.iter().map(Standing::of).collect();
    let counted = STANDINGS.iter().filter_map(|(standing, name, _)| {
        let number = standings.iter().filter(|of| *of == standing).count();
        (number > 0).then(|| format!("{number} {name}"))
    });
    let counted = counted.collect::<Vec<_>>().join(", ");
    let changed: u64 = status.servers.iter().filter_map(|server| server.changed_bytes).fold(0, u64::saturating_add);
    let at_least = if status.servers.iter().any(|server| server.changed_bytes.is_none()) { "at least " } else { "" };
    let separator = if counted.is_empty() { "" } else { ": " };
    let mut lines = vec![format!(
        "{}{separator}{counted}; {at_least}{} changed since their points",
        count(status.servers.len() as u64, "server"),
        human_bytes(changed)
    )];
    if let Some(worker) = &status.worker {
        lines.push(format!(
            "worker {} ({}), since {}: {} running, {} done, {} failed, {} of memory",
            plain(&worker.host),
            worker.pid,
            human_moment(&worker.since),
            count(worker.volumes_running as u64, "volume"),
            count(worker.cycles_completed, "cycle"),
            worker.cycles_failed,
            human_bytes(worker.resident_bytes)
        ));
    }
    lines.extend(status.throttles.iter().map(throttle));
    if status.origin == Origin::Images {
        lines.push(
            "missing figures: no daemon answers, and the images alone tell no rates, predictions or errors".to_owned(),
        );
    }
    lines
}

fn throttle(throttle: &ThrottleStatus) -> String {
    let bytes =
        throttle.bytes_per_second.map_or_else(|| "no limit".to_owned(), |limit| format!("{}/s", human_bytes(limit)));
    let operations =
        throttle.operations_per_second.map_or_else(String::new, |limit| format!(" and {limit} operations/s"));
    let latency =
        throttle.latency_seconds.map_or_else(String::new, |latency| format!(", reads take {:.0} ms", latency * 1000.0));
    format!(
        "pool {}: {} of {bytes}{operations} ({}){latency}",
        plain(&throttle.pool),
        human_rate(throttle.used_bytes_per_second),
        plain(&throttle.reason)
    )
}

/// The columns, and the words for them in a list.
const COLUMNS: [&str; 8] = ["SERVER", "ACTIVITY", "LAG", "CHANGED", "CHANGES", "MOVES", "OUTAGE", "TREND"];
const RATE: usize = 4;
const MOVING: usize = 5;

/// A server or a volume.
struct Line {
    /// The name, indented for a volume.
    name: String,
    /// One for each column after the name; empty where it is not known.
    figures: [String; 7],
    colour: Option<Color>,
    is_volume: bool,
}

fn rows(status: &FleetStatus, look: Look) -> Vec<Line> {
    let mut rows = Vec::new();
    for server in &status.servers {
        let standing = Standing::of(server);
        rows.push(server_row(server, standing));
        let worth_it = server.volumes.len() > 1 && standing != Standing::InStep;
        if look.volumes || worth_it {
            rows.extend(server.volumes.iter().map(volume_row));
        }
    }
    rows
}

fn server_row(server: &ServerStatus, standing: Standing) -> Line {
    let progress = progress(server.volumes.iter().filter_map(|volume| volume.cycle.as_ref()));
    Line {
        name: plain(&server.name),
        figures: [
            activity(server.activity, progress),
            seconds(server.lag_seconds),
            server.changed_bytes.map_or_else(String::new, human_bytes),
            server.change_rate.map_or_else(String::new, human_rate),
            server.throughput.map_or_else(String::new, human_rate),
            seconds(server.predicted_outage_seconds),
            trend(&server.convergence).to_owned(),
        ],
        colour: standing.colour(),
        is_volume: false,
    }
}

fn volume_row(volume: &VolumeStatus) -> Line {
    Line {
        name: plain(&volume.name),
        figures: [
            activity(volume.activity, progress(volume.cycle.iter())),
            seconds(volume.lag_seconds),
            volume.changed_bytes.map_or_else(String::new, human_bytes),
            volume.change_rate.map_or_else(String::new, human_rate),
            volume.throughput.map_or_else(String::new, human_rate),
            String::new(),
            String::new(),
        ],
        colour: None,
        is_volume: true,
    }
}

fn seconds(value: Option<f64>) -> String {
    value.map_or_else(String::new, human_seconds)
}

/// How much of the running cycles is done, in percent; `None` while nobody knows.
fn progress<'a>(cycles: impl Iterator<Item = &'a CycleStatus>) -> Option<u64> {
    let (done, total) = cycles.fold((0_u128, 0_u128), |(done, total), cycle| {
        (done + u128::from(cycle.done_bytes.min(cycle.total_bytes)), total + u128::from(cycle.total_bytes))
    });
    u64::try_from((done * 100).checked_div(total)?).ok()
}

fn activity(activity: Activity, progress: Option<u64>) -> String {
    let word = match activity {
        Activity::Unknown => "unknown",
        Activity::NeverSynced => "never synced",
        Activity::FirstSync => "first sync",
        Activity::Syncing => "syncing",
        Activity::Waiting => "waiting",
        Activity::BackingOff => "backing off",
        Activity::Held => "held",
        Activity::Paused => "paused",
        Activity::Elsewhere => "elsewhere",
    };
    progress.map_or_else(|| word.to_owned(), |percent| format!("{word} {percent} %"))
}

fn trend(convergence: &Convergence) -> &'static str {
    match convergence {
        Convergence::Unknown => "",
        Convergence::Converging => "converging",
        Convergence::InStep => "in step",
        Convergence::Diverging { .. } => "diverging",
    }
}

/// The rows in columns without those that are hidden; `None` if that is wider than a line.
fn table(rows: &[Line], hidden: &[usize], look: Look) -> Option<String> {
    let shown = |cells: Vec<Cell>| -> Vec<Cell> {
        cells.into_iter().enumerate().filter(|(column, _)| !hidden.contains(column)).map(|(_, cell)| cell).collect()
    };
    let mut table = Table::new();
    table.load_style(NOTHING).force_no_tty();
    if look.colour {
        table.enforce_styling();
    }
    table.set_header(shown(COLUMNS.map(Cell::new).into()));
    for row in rows {
        let mut cells = vec![Cell::new(if row.is_volume { format!("  {}", row.name) } else { row.name.clone() })];
        for (figure, column) in row.figures.iter().zip(1..) {
            let cell = Cell::new(if figure.is_empty() && !row.is_volume { "-" } else { figure });
            // Words to the left, numbers to the right.
            let is_word = column == 1 || column == COLUMNS.len() - 1;
            cells.push(cell.set_alignment(if is_word { CellAlignment::Left } else { CellAlignment::Right }));
        }
        if let Some(colour) = row.colour {
            cells = cells.into_iter().map(|cell| cell.fg(colour)).collect();
        }
        table.add_row(shown(cells));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let needed: usize = table.column_max_content_widths().iter().map(|width| usize::from(*width) + 2).sum();
    (needed <= look.width + 2).then(|| table.trim_fmt() + "\n")
}

/// The same for narrow terminals: a paragraph for each row.
fn list(rows: &[Line], look: Look) -> String {
    let mut text = String::new();
    for row in rows {
        let [activity, lag, changed, rate, moving, outage, trend] = &row.figures;
        let indent = if row.is_volume { "  " } else { "" };
        let name = match row.colour.filter(|_| look.colour).and_then(ansi) {
            Some(code) => format!("\u{1b}[{code}m{}\u{1b}[0m", row.name),
            None => row.name.clone(),
        };
        text.push_str(&format!("{indent}{name}: {activity}\n"));
        let facts = [
            (lag, "", " old"),
            (changed, "", " changed since"),
            (rate, "changes ", ""),
            (moving, "moves ", ""),
            (outage, "outage ", ""),
            (trend, "", ""),
        ];
        let facts: Vec<String> = facts
            .into_iter()
            .filter(|(fact, ..)| !fact.is_empty())
            .map(|(fact, before, after)| format!("{before}{fact}{after}"))
            .collect();
        if !facts.is_empty() {
            text.push_str(&wrapped_at(&facts.join(", "), look.width, &format!("{indent}  "), &format!("{indent}  ")));
        }
    }
    text
}

/// The number of a colour in an escape sequence.
fn ansi(colour: Color) -> Option<u8> {
    match colour {
        Color::Red => Some(91),
        Color::Green => Some(92),
        Color::Yellow => Some(93),
        Color::Cyan => Some(96),
        _ => None,
    }
}

/// What can't be said in a column.
fn remarks(server: &ServerStatus) -> Vec<String> {
    let name = plain(&server.name);
    let mut remarks: Vec<String> =
        server.paused_because.iter().map(|reason| format!("{name} is paused: {}", plain(reason))).collect();
    remarks.extend(server.last_error.iter().map(|error| failure(&name, error)));
    remarks.extend(server.drift.iter().map(|drift| format!("{name} is not as planned: {}", plain(drift))));
    for volume in &server.volumes {
        let error = volume.last_error.as_ref();
        // The server's error is mostly that of one of its volumes.
        let news = error.filter(|error| server.last_error.as_ref().is_none_or(|known| known.message != error.message));
        remarks.extend(news.map(|error| failure(&plain(&volume.name), error)));
    }
    if let Convergence::Diverging { cure } = &server.convergence {
        remarks.push(format!("{name} is not going to catch up: {}", plain(cure)));
    }
    remarks
}

fn failure(name: &str, error: &ErrorStatus) -> String {
    let next = if error.retryable { "is tried again" } else { "waits for you" };
    format!(
        "{name} failed {}, last at {}, and {next}: {}",
        count(error.count, "time"),
        human_moment(&error.at),
        plain(&error.message)
    )
}

fn wrapped(text: &str, width: usize) -> String {
    wrapped_at(text, width, "", "  ")
}

/// Breaks a text between words, so that its lines fit where a word can; each ends with a newline.
fn wrapped_at(text: &str, width: usize, first: &str, others: &str) -> String {
    let (mut drawn, mut line, mut is_empty) = (String::new(), first.to_owned(), true);
    for word in text.split(' ') {
        if !is_empty && line.chars().count() + 1 + word.chars().count() > width {
            drawn.push_str(&line);
            drawn.push('\n');
            (line, is_empty) = (others.to_owned(), true);
        }
        if !is_empty {
            line.push(' ');
        }
        line.push_str(word);
        is_empty = false;
    }
    drawn + &line + "\n"
}

#[cfg(test)]
mod tests;
